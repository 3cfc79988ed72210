"""Sensitivity of every weight: the diagonal of the Fisher information, exactly, in batches.

    F_i = mean over x of (d log p(y|x) / d theta_i)^2,  y drawn from the model's own p(y|x)

The square is of each sample's gradient; the mean gradient's square is another quantity. For a
linear layer with inputs A (N, T, I) and gradients G (N, T, O) of the summed log-likelihood
    F[o, i] = 1/N * sum over n of (sum over t of G[n, t, o] A[n, t, i])^2
so one batched forward and backward pass gives every sample's squared gradient.
Source: Goodfellow 2015, arXiv:1510.01799, with its sums over tokens; the Fisher as in Kunstner
2019, arXiv:1905.12558.

    import torch; from fisher import fisher_diagonal
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
    scores = fisher_diagonal(model, [torch.randn(32, 4)])  # {"0.weight": (8, 4), ...}
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; the reference serves there
    triton = None

CPU_CHUNK = 1_000_000  # elements of per-sample gradients held at a time: they stay in cache
GPU_CHUNK = 1 << 27  # the same on a GPU: half a gigabyte of fp32
SQUARES_BLOCK = 1024
TOLERANCE = 3.0  # times the root of the precision: relative error of a right tensor
NOISE = 8  # times the precision: error of a sum, in terms of the sum of what it adds up, unsigned
UNDERFLOW = 16  # times the smallest number: gradients below it are zeros to any comparison
BATCH = 64  # images to score at a time; changes no score
HALF_OR_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
PICKING = ("index", "masked_select", "nonzero")  # rows by truth values
FOR_BACKWARD = ("attention", "sdp", "pool", "norm", "dropout", "rnn")  # keep whole numbers for it
NAMES_SHOWN = 4  # names in a warning
REPLAYED = 2  # shapes of batches that are replayed: each keeps the memory of its passes
Replay = Callable[[Callable[..., Tensor], list[Tensor]], Callable[..., Tensor]]


class NotFinite(ValueError):
    """A score is Inf or NaN."""


# ---------------------------------------------------------------------------- squares of sums


def square_accumulate_reference_(total: Tensor, grads: Tensor, inputs: Tensor) -> None:
    """Add the squares with plain PyTorch operations; arguments as in `square_accumulate_`."""
    chunk = max(1, (CPU_CHUNK if total.is_cpu else GPU_CHUNK) // total.numel())
    buffer = grads.new_empty(min(chunk, len(grads)), *total.shape)  # fresh pages would cost as much
    for start in range(0, len(grads), chunk):
        rows, inputs_ = grads[start : start + chunk], inputs[start : start + chunk]
        products = torch.bmm(rows.transpose(1, 2), inputs_, out=buffer[: len(rows)])  # (n, O, I)
        products = products.to(total.dtype)
        if total.is_cpu:  # one pass over what is still in cache
            for product in products:
                total.addcmul_(product, product)
        else:
            total += products.square_().sum(dim=0)


if triton is not None:

    @triton.jit
    def _add_squares_kernel(
        total_ptr, products_ptr, size, SAMPLES: tl.constexpr, BLOCK: tl.constexpr
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = at < size
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        source = products_ptr + at
        for _ in range(SAMPLES):
            product = tl.load(source, live, other=0.0).to(tl.float32)
            squares += product * product
            source += size
        tl.store(total_ptr + at, tl.load(total_ptr + at, live, other=0.0) + squares, live)


def square_accumulate_triton_(total: Tensor, grads: Tensor, inputs: Tensor) -> None:
    """Add the squares in one fused pass over cuBLAS's products; arguments as in
    `square_accumulate_`."""
    if triton is None:
        raise ValueError("backend 'triton': the triton package is not installed here")
    if total.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend 'triton' needs CUDA tensors; on a CPU it runs only in Triton's interpreter "
            "(set TRITON_INTERPRET=1 before this file is imported)"
        )
    if total.dtype != torch.float32 or grads.dtype not in HALF_OR_SINGLE:
        raise ValueError(f"backend 'triton' sums in fp32, not {grads.dtype} into {total.dtype}")
    chunk = max(1, GPU_CHUNK // total.numel())
    blocks = (triton.cdiv(total.numel(), SQUARES_BLOCK),)
    for start in range(0, len(grads), chunk):
        part = slice(start, start + chunk)
        products = torch.bmm(grads[part].transpose(1, 2), inputs[part])
        with torch.cuda.device(total.device) if total.is_cuda else contextlib.nullcontext():
            _add_squares_kernel[blocks](
                total, products, total.numel(), SAMPLES=len(products), BLOCK=SQUARES_BLOCK
            )


_devices_without_triton: set[torch.device] = set()


def square_accumulate_(
    total: Tensor, grads: Tensor, inputs: Tensor, *, backend: str = "auto"
) -> None:
    """Add sum over n of (grads[n]' inputs[n])^2 to `total` in place.

    Args:
        total: (O, I) contiguous.
        grads: (N, T, O) gradients by a linear layer's outputs.
        inputs: (N, T, I) its inputs, in the same dtype; a half one rounds each product before the
            square.
        backend: "auto" takes Triton for fp32 sums on CUDA devices and PyTorch elsewhere;
            "reference" and "triton" force one of them.

    Raises:
        ValueError: backend "triton" where it cannot run.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be auto, triton or reference, not {backend!r}")
    serves = triton is not None and total.is_cuda and total.dtype == torch.float32
    serves = serves and total.device not in _devices_without_triton
    if backend == "reference" or (backend == "auto" and not serves):
        return square_accumulate_reference_(total, grads, inputs)
    try:
        return square_accumulate_triton_(total, grads, inputs)
    except Exception as error:  # compilers fail in many ways, all of them before the first launch
        if backend == "triton" or isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        warnings.warn(
            f"Triton does not run on {total.device}, using PyTorch: {error}", stacklevel=2
        )
        _devices_without_triton.add(total.device)
        return square_accumulate_reference_(total, grads, inputs)


# ---------------------------------------------------------------------------- sensitivity


def fisher_diagonal(
    model: nn.Module,
    batches: Iterable,
    *,
    parameters: Sequence[str] | None = None,
    labels: str = "sampled",
    score: str = "log-prob",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return the mean over samples of each parameter's squared per-sample gradient.

    Plain Linear, LayerNorm and Conv2d with kernel = stride take part in one batched backward pass,
    and so do parameters (1, ...) that broadcast over the batch, such as class tokens and position
    grids. All others are scored sample by sample, which is said once. On the first and the last
    sample of the first batch, every tensor's scores are compared with autograd's own per-sample
    gradients: one that differs is scored sample by sample too. One whose gradients are zero there
    is compared on the first batch where they are not. A layer that a later batch calls in another
    way, or with rows that are not the samples in their order (tokens that choose an expert), is
    scored sample by sample from there on.

    The model is scored in eval mode, without autocast and uncompiled, and left as it was: modes,
    buffers, requires_grad, gradients and the attributes of its modules, caches among them. It reads
    copies of the inputs. Neither train() nor eval() is called, nor a hook on accumulated gradients.

    What is not seen: a weight that is read past its module by none of the samples compared, but by
    others; rows of a layer that are chosen without a comparison, an index or a whole number; and
    what a model keeps outside of its modules (a global cache, a list that a hook fills).

    Args:
        model: on one device; answers with logits (N, C), alone, first in a tuple, under "logits" in
            a dictionary or as an attribute.
        batches: inputs, a tensor (N, ...), or pairs (inputs, given (N,)). Whole numbers that are
            given where labels are sampled are not read.
        parameters: names to score; None scores all.
        labels: "sampled" draws y from the model's own p(y|x), by `seed` and the sample's place in
            the stream, or by the uniform numbers in [0, 1) that are `given`; "true" takes the int64
            labels that are `given` (empirical Fisher).
        score: "log-prob" differentiates log p(y|x), "logit" the logit of y (TaLoS's release).
        dtype: of the sums, fp32 or fp64.

    Returns:
        name -> tensor of the parameter's shape, in `dtype`; all are views of one vector.

    Raises:
        ValueError: nothing to score, no samples, a tensor in place of batches, an unknown option,
            other outputs than logits, a single logit without score "logit", labels that are no
            classes, a model whose logits are random or depend on the rest of a batch, gradients
            that autograd cannot take or that reach a parameter in training mode alone, or a score
            that is not finite.
    """
    scorer = Scorer(model, parameters=parameters, labels=labels, score=score, dtype=dtype)
    return scorer.diagonal(batches, seed)


class _Plan(NamedTuple):
    """How the per-sample gradients of each parameter are taken."""

    hooked: dict[nn.Module, dict[str, str]]  # in a batch: weight or bias -> its name in the model
    broadcast: list[str]  # in a batch, by a copy for each sample
    looped: list[str]  # sample by sample
    unverified: list[str]  # of the others, what had gradients of zero alone: nothing was compared
    routing: bool  # rows may be chosen by what is in them: each batch is looked at

    @property
    def one_by_one(self) -> bool:
        """Tell whether something is scored sample by sample, or looked at in every batch."""
        return bool(self.looped or self.unverified or self.routing)

    def loop_over(self, names: Iterable[str]) -> None:
        """Let these parameters be scored sample by sample from now on."""
        for module, parts in [*self.hooked.items()]:
            parts = {kind: name for kind, name in parts.items() if name not in names}
            self.hooked.update({module: parts}) if parts else self.hooked.pop(module)
        for rest in (self.broadcast, self.unverified):
            rest[:] = [name for name in rest if name not in names]
        self.looped.extend(names)


class _Call(NamedTuple):
    """What a layer was called with, a scalar if not with rows, and the type of what it gave."""

    rows: Tensor
    kind: torch.dtype


_Calls = dict[nn.Module, list[_Call]]


class Scorer:
    """`fisher_diagonal` of one model, as often as its weights or the samples change.

    How each parameter's gradients are taken is found out at the first batch, not again for every
    client. Arguments and errors are those of `fisher_diagonal`. A model in half precision takes its
    passes in it; the sums stay in `dtype`.

    Args:
        scale: factor on what is differentiated, a power of two: it keeps gradients of fp16 passes
            from vanishing, and is taken out of the scores.
        replay: (step, state) -> a function that does what the step does by other means, such as a
            CUDA graph; step(inputs=, given=) returns logits and changes `state` in place. It takes
            a shape's batches from the second on, where nothing is scored one by one. The weights
            must then keep their places in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        parameters: Sequence[str] | None = None,
        labels: str = "sampled",
        score: str = "log-prob",
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
        replay: Replay | None = None,
    ):
        if labels not in ("sampled", "true") or score not in ("log-prob", "logit"):
            raise ValueError(f"unknown labels {labels!r} or score {score!r}")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"scores are summed in float32 or float64, not in {dtype}")
        self.model, self.parameters = model, dict(model.named_parameters())
        self.names = list(dict.fromkeys(self.parameters if parameters is None else parameters))
        if not self.names:
            raise ValueError("the model has no parameters to score")
        if unknown := [name for name in self.names if name not in self.parameters]:
            raise ValueError(f"the model has no parameter {unknown[0]!r} to score")
        for name in self.names:
            if not self.parameters[name].is_floating_point():
                raise ValueError(
                    f"{name} is {self.parameters[name].dtype}: it has no real gradient"
                )
        self.places: dict[nn.Parameter, list[str]] = {}  # the names of all that read a parameter
        for prefix, module in model.named_modules():
            for kind, p in module.named_parameters(recurse=False, remove_duplicate=False):
                self.places.setdefault(p, []).append(f"{prefix}.{kind}".lstrip("."))
        self.rounding = {n: _coarser(self.parameters[n].dtype, dtype) for n in self.names}
        self.coarsest = torch.float64  # of the types that the model's passes compute in
        self.classes, self.unreached = 0, self.names  # until a first call shows otherwise
        self.labels, self.score, self.dtype = labels, score, dtype
        self.scale, self.replay = scale, replay
        self._replays: dict[tuple, Callable[..., Tensor]] = {}  # by what a batch is
        self._replayed_sums: Tensor | None = None
        self._plans: dict[tuple, _Plan] = {}  # by what a sample is, and whether it is alone
        self._sizes: set[torch.Size] = set()  # of batches whose logits depend on no other sample

    def diagonal(self, batches: Iterable, seed: int = 0) -> dict[str, Tensor]:
        """Return what `fisher_diagonal` does of these batches, of the weights as they are now."""
        now = dict(self.model.named_parameters())
        if any(now.get(name) is not p for name, p in self.parameters.items()):
            raise ValueError("the model has other parameters than its Scorer was made for")
        if isinstance(batches, Tensor):
            raise ValueError("batches are several: pass [inputs], or inputs.split(32)")
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"fisher labels")]))
        with _frozen(self.model):
            total, count = self._empty_sums(), 0
            sums = self._by_name(total, self.names)
            for batch in batches:
                inputs, targets = _pair(batch)
                if self.labels == "sampled" and (
                    targets is None or not targets.is_floating_point()
                ):
                    targets = torch.from_numpy(generator.random(len(inputs)))
                elif targets is None:
                    raise ValueError("labels 'true' needs batches of (inputs, labels)")
                elif self.labels == "true" and targets.is_floating_point():
                    raise ValueError(f"labels 'true' are whole numbers, not {targets.dtype}")
                if targets.shape != inputs.shape[:1]:
                    shapes = f"{tuple(inputs.shape)} come with labels {tuple(targets.shape)}"
                    raise ValueError(f"inputs {shapes}: there must be one for each sample")
                if len(inputs) > 0:
                    self._add_batch(total, sums, inputs, targets)
                    samples = _first_and_last(inputs)
                count += len(inputs)
            if count == 0:
                raise ValueError("the calibration set is empty")
            self._check_reached(sums, samples)
            total = total if self.replay is None else total.clone()  # the next call's are the same
            total /= count * self.scale**2
            sums = self._by_name(total, self.names)
        if not torch.isfinite(total).all():
            _check_finite(sums)
        return sums

    def _zeros(self, names: Sequence[str]) -> Tensor:
        """Return a zero for each entry of some parameters: (P,)."""
        size = sum(self.parameters[name].numel() for name in names)
        return torch.zeros(size, dtype=self.dtype, device=self.parameters[names[0]].device)

    def _by_name(self, vector: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return views of a vector (P,) of some parameters' entries, by name."""
        shapes = [self.parameters[name].shape for name in names]
        parts = vector.split([shape.numel() for shape in shapes])
        return {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}

    def _empty_sums(self) -> Tensor:
        """Return sums (P,) of zeros; a replay knows them by their place."""
        if self.replay is None:
            return self._zeros(self.names)
        if self._replayed_sums is None:
            self._replayed_sums = self._zeros(self.names)
        return self._replayed_sums.zero_()

    # ------------------------------------------------------------------------ one batch

    def _add_batch(
        self, total: Tensor, sums: dict[str, Tensor], inputs: Tensor, given: Tensor
    ) -> None:
        """Add a batch's squares to `total` (P,), which `sums` are views of, by replay if it can."""
        plan, kind = self._plan_for(inputs), (inputs.shape, inputs.dtype, given.dtype)
        already = len(plan.looped)
        if not (given.is_cuda and kind in self._replays):  # it would wait for the device
            _check_given(given, self.classes)
        repeats = inputs.shape in self._sizes and not plan.one_by_one
        if self.replay and repeats and kind not in self._replays and len(self._replays) < REPLAYED:

            def step(inputs: Tensor, given: Tensor) -> Tensor:
                return self._add(sums, plan, inputs, given)

            self._replays[kind] = self.replay(step, [total])
        if repeats and kind in self._replays:
            self._replays[kind](inputs=inputs, given=given.to(inputs.device))
        else:
            self._check_size(inputs, self._add(sums, plan, inputs, given))
        _warn_looped(plan.looped[already:])

    def _add(
        self,
        sums: dict[str, Tensor],
        plan: _Plan,
        inputs: Tensor,
        given: Tensor,
        bounds: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Add the squared per-sample gradients of one batch; floats `given` stand for draws.

        With `bounds`, add to them what the squares of hooked modules come to without signs.

        Returns:
            The batch's logits.
        """
        copies = {}
        for name in plan.broadcast:
            p = self.parameters[name].detach()
            copies[name] = p.expand(len(inputs), *p.shape[1:]).clone().requires_grad_()
        fresh = {name: torch.zeros_like(sums[name]) for name in plan.unverified}
        parts = {**sums, **fresh}
        hooked = self._hooked(plan.hooked, parts, bounds or {})
        with torch.enable_grad(), self._training(fresh) as watched, hooked as (calls, leaves):
            logits = self._logits(inputs, copies)
            misaligned = self._misaligned(calls, inputs, plan.routing)
            if not misaligned:
                labels = _sampled_labels(logits, given) if given.is_floating_point() else given
                leaves = [*copies.values(), *watched, *leaves]
                grads = iter(_gradients(self._score_of(logits, labels), leaves))
        if misaligned:
            plan.loop_over([n for module in misaligned for n in plan.hooked[module].values()])
            return self._add(sums, plan, inputs, given, bounds)
        for name in copies:
            if (grad := next(grads)) is not None:
                parts[name] += _square(grad, parts[name]).sum(dim=0, keepdim=True)
        self._add_looped(parts, plan.looped, inputs, labels)
        reached = {n for n in fresh if (grad := next(grads)) is not None and grad.any()}
        if doubtful := [name for name in fresh if name in reached or parts[name].any()]:
            self._verify(parts, plan, doubtful, inputs, labels)
        for name in fresh:
            sums[name] += parts[name]
        return logits.detach()

    def _misaligned(self, calls: _Calls, inputs: Tensor, routing: bool) -> list[nn.Module]:
        """Return the layers that did not see one row a sample, in the order of the samples."""
        misaligned = [module for module, seen in calls.items() if _lengths(seen) != [len(inputs)]]
        if routing and not misaligned and len(inputs) > 1:
            with torch.no_grad():
                self._logits(inputs.flip(0))  # whose rows come in the other order, if they are
            misaligned = [m for m, seen in calls.items() if not self._mirrored(*seen)]
        for seen in calls.values():
            seen.clear()  # its memory
        return misaligned

    def _mirrored(self, *seen: _Call) -> bool:
        """Tell whether two calls saw the same rows, in opposite orders."""
        if len(seen) != 2 or seen[0].rows.shape != seen[1].rows.shape:
            return False
        rows, others = seen[0].rows.flatten(1).double(), seen[1].rows.flip(0).flatten(1).double()
        allowed = _tolerance(self.coarsest) * rows.norm(dim=1)
        return bool(((rows - others).norm(dim=1) <= allowed).all())

    def _verify(
        self,
        parts: dict[str, Tensor],
        plan: _Plan,
        names: list[str],
        inputs: Tensor,
        labels: Tensor,
    ) -> None:
        """Compare squares of a batch, the first ones that are not zero, with autograd's."""
        truth = self._by_name(self._zeros(names), names)
        self._add_looped(truth, names, inputs, labels)
        plan.unverified[:] = [name for name in plan.unverified if name not in names]
        kinds = {name: _coarser(self.rounding[name], self.coarsest) for name in names}
        if wrong := [n for n in names if _differs(parts[n], truth[n], kinds[n])]:
            plan.loop_over(wrong)
            for name in wrong:
                parts[name] = truth[name]

    def _logits(self, inputs: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits of a copy of the inputs, with other values of some parameters."""
        pairs = (values or {}).items()
        places = {at: value for n, value in pairs for at in self.places[self.parameters[n]]}
        copy, call = inputs.detach().clone(), torch.func.functional_call
        with _attributes_restored(self.model):
            if not places:
                return _logits(self.model(copy))
            # by torch's own search for shared weights, a module with two names would stay changed
            return _logits(call(self.model, places, (copy,), tie_weights=False))

    def _score_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what is differentiated: the sum of all samples' scores, times the scale."""
        return _summed_score(logits, labels, self.score) * self.scale

    @contextlib.contextmanager
    def _training(self, names: Iterable[str]) -> Iterator[list[nn.Parameter]]:
        """Let gradients of these parameters be taken in the block, and yield them."""
        chosen = [self.parameters[name] for name in names]
        try:
            for p in chosen:
                p.requires_grad_(True)
            yield chosen
        finally:
            for p in chosen:
                p.requires_grad_(False)

    @contextlib.contextmanager
    def _hooked(
        self,
        modules: dict[nn.Module, dict[str, str]],
        sums: dict[str, Tensor],
        bounds: dict[str, Tensor],
    ) -> Iterator[tuple[_Calls, list[Tensor]]]:
        """Let these modules add their squares to `sums` in a backward pass of the block.

        Yields:
            what comes to hold the rows of each call, and the leaves at which the graph begins.
        """
        calls: _Calls = {module: [] for module in modules}
        leaves: list[Tensor] = []
        handles = []
        for module, names in modules.items():
            parts = {kind: sums[name] for kind, name in names.items() if sums}
            limits = {kind: bounds[name] for kind, name in names.items() if bounds}
            hook = _recorder(parts, limits, calls[module], leaves)
            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        try:
            yield calls, leaves
        finally:
            for handle in handles:
                handle.remove()

    def _add_looped(
        self, sums: dict[str, Tensor], names: list[str], inputs: Tensor, labels: Tensor
    ) -> None:
        """Add squares of gradients that autograd takes of one sample after the other."""
        for n in range(len(inputs) if names else 0):
            self._add_sample(sums, names, inputs[n : n + 1], labels[n : n + 1], 0)

    def _add_sample(
        self, sums: dict[str, Tensor], names: list[str], inputs: Tensor, labels: Tensor, n: int
    ) -> None:
        """Add squares of the gradients that autograd takes of sample n, in a batch."""
        part = slice(n, n + 1)
        with torch.enable_grad(), self._training(names) as chosen:
            grads = _gradients(self._score_of(self._logits(inputs)[part], labels[part]), chosen)
        for name, grad in zip(names, grads, strict=True):
            if grad is not None:
                sums[name] += _square(grad, sums[name])

    # ------------------------------------------------------------------------ the first batch

    def _plan_for(self, inputs: Tensor) -> _Plan:
        """Return how the parameters' per-sample gradients are taken of such inputs (N, ...)."""
        kind = inputs.shape[1:], inputs.dtype, len(inputs) == 1
        if kind in self._plans:
            return self._plans[kind]
        samples = _first_and_last(inputs)
        plain = _plain_modules(self.model, {*self.names})
        with self._hooked(plain, {}, {}) as (calls, _):
            out, routing = self._checked_logits(samples)
        usual = [len(samples), 1]  # as many rows as samples, in both calls
        hooked = {
            module: names for module, names in plain.items() if _lengths(calls[module]) == usual
        }
        covered = {name: m for m, names in hooked.items() for name in names.values()}
        for name, module in covered.items():
            self.rounding[name] = _coarser(self.rounding[name], *(c.kind for c in calls[module]))
        rest = [name for name in self.names if name not in covered]
        broadcast = [name for name in rest if self.parameters[name].shape[:1] == (1,)]
        truth = self._truth(samples, out)
        plan = _Plan(hooked, broadcast, [], [], routing)
        plan.loop_over(self._differing(plan, {*covered, *broadcast}, truth, samples, out))
        looped = {*rest, *plan.looped} - {*plan.broadcast}
        plan.looped[:] = [name for name in self.names if name in looped]
        plan.unverified[:] = [n for n in self.names if n not in looped and not truth[n].any()]
        _warn_looped(plan.looped)
        if all(torch.isfinite(total).all() for total in truth.values()):
            self._plans[kind] = plan
        return plan

    @torch.no_grad()
    def _checked_logits(self, samples: Tensor) -> tuple[Tensor, bool]:
        """Return the logits of some samples, and whether rows may be chosen by what is in them;
        refuse a model that has no per-sample gradients."""
        out, first = self._logits(samples), samples[:1]
        if len(out) != len(samples):
            raise ValueError(f"{len(samples)} samples have {len(out)} rows of logits")
        self.classes = out.shape[1]
        if self.classes == 1 and self.score == "log-prob":
            raise ValueError(
                "the model has a single logit, of which log p is always 0: score 'logit' "
                "differentiates the logit itself, and logits (0, z) are a binary model's"
            )
        with _Operations() as operations:  # of a second pass: the first may try its kernels
            alone = self._logits(first)
        self.coarsest = _coarser(self.coarsest, operations.coarsest)
        if not self._close(alone, out[:1]) and not self._close(alone, self._logits(first)):
            raise ValueError(
                "the model's logits of the same samples differ between two calls, in eval mode "
                "too: there is something random in it"
            )
        self._check_apart(alone, out[:1])
        return out, operations.choose

    @torch.no_grad()
    def _check_size(self, inputs: Tensor, logits: Tensor) -> None:
        """Refuse a model that mixes the samples of a batch of this size."""
        if inputs.shape not in self._sizes:
            if len(inputs) > 2:
                self._check_apart(self._logits(_first_and_last(inputs)), _first_and_last(logits))
            self._sizes.add(inputs.shape)

    def _check_apart(self, some: Tensor, others: Tensor) -> None:
        """Refuse a model of which the same samples have other logits in another batch."""
        if not self._close(some, others):
            raise ValueError(
                "the logits of a sample depend on the others in its batch, in eval mode too (batch "
                "statistics?): it has no gradients of its own"
            )

    def _close(self, a: Tensor, b: Tensor) -> bool:
        """Tell whether logits agree up to the rounding of the passes; what is not finite has to be
        so in both."""
        tolerance = _tolerance(_coarser(self.coarsest, a.dtype))
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return False
        a, b = a.where(finite, 0), b.where(finite, 0)
        return _norm(a - b) <= tolerance * max(_norm(a), a.numel() ** 0.5)

    def _truth(self, samples: Tensor, out: Tensor) -> dict[str, Tensor]:
        """Return autograd's squares of some samples, for the labels of `_strong_labels`. They take
        the passes of the batch, so that no other kernel's rounding comes in."""
        truth = self._by_name(self._zeros(self.names), self.names)
        labels = _strong_labels(out, self.score)
        try:
            for n in range(len(samples)):
                self._add_sample(truth, self.names, samples, labels, n)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"autograd cannot take this model's gradients: {reason}") from error
        everywhere = self.score == "log-prob" and (out.isnan() | out.isposinf()).any()
        if everywhere or self.scale != 1:  # of all labels then; or another scale may do
            _check_finite(truth)
        return truth

    def _differing(
        self,
        plan: _Plan,
        names: Iterable[str],
        truth: dict[str, Tensor],
        samples: Tensor,
        out: Tensor,
    ) -> set[str]:
        """Return those of some names whose squares are not the true ones."""
        zeros = self._zeros(self.names), self._zeros(self.names)
        sums, bounds = (self._by_name(vector, self.names) for vector in zeros)
        try:
            self._add(sums, plan, samples, _strong_labels(out, self.score), bounds)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # the model's own: it may look at the shape of what it reads
            differ = {*names}
        else:
            differ = {n for n in names if _differs(sums[n], truth[n], self.rounding[n], bounds[n])}
        if copied := [name for name in plan.broadcast if name in differ]:
            plan.loop_over(copied)  # the others may be right without these copies
            return self._differing(plan, names, truth, samples, out)
        return differ

    # ------------------------------------------------------------------------ what stayed zero

    def _check_reached(self, sums: dict[str, Tensor], samples: Tensor) -> None:
        """Refuse scores of zero of parameters that gradients reach in training mode alone.

        Which a gradient reaches is asked once: the next call's model is the same.
        """
        if not self.unreached:
            return
        scored = torch.stack([sums[name].any() for name in self.unreached]).tolist()
        zeros = [name for name, some in zip(self.unreached, scored, strict=True) if not some]
        reached = self._reached(zeros, samples, training=False)
        zeros = [name for name in zeros if name not in reached]
        if len(zeros) == len(self.parameters):
            raise ValueError(
                "no gradient reaches any of the model's parameters, so that all would score 0: "
                "does its forward run under no_grad, or detach what it computes?"
            )
        if late := self._reached(zeros, samples, training=True):
            raise ValueError(
                f"no gradient reaches {', '.join(late)} in eval mode, only in training mode, so "
                "that it would score 0: if the model keeps in eval mode what it computed of it, "
                "call model.train() before scoring; else leave it out of `parameters`"
            )
        self.unreached = []

    def _reached(self, names: list[str], samples: Tensor, training: bool) -> list[str]:
        """Return those of some parameters that the logits' gradients reach in a mode."""
        if not names:
            return []
        devices = [p.device.index for p in self.parameters.values() if p.is_cuda][:1]
        with torch.random.fork_rng(devices), _frozen(self.model, training):
            with torch.enable_grad(), self._training(names) as chosen:
                try:
                    grads = _gradients(self._logits(samples).sum(), chosen)
                except torch.OutOfMemoryError:
                    raise
                except Exception:  # the model's own: statistics of a single sample, say
                    return []
        return [name for name, grad in zip(names, grads, strict=True) if grad is not None]


class _Operations(TorchDispatchMode):
    """Notes what the operations of the block do.

    Attributes:
        coarsest: of the types that they compute in; fp8 is only stored in.
        choose: whether rows may be chosen: real numbers become truth values or whole ones, or
            truth values pick rows.
    """

    coarsest, choose = torch.float64, False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch that nothing is compiled here: else it imports its compiler, for seconds."""
        return False

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple = (), named: dict | None = None
    ) -> Any:
        result = operation(*arguments, **(named or {}))
        values = [value for value in tree_leaves(result) if value is not None]
        real = [value.dtype for value in values if _is_real(value)]
        self.coarsest = _coarser(self.coarsest, *(kind for kind in real if kind.itemsize > 1))
        reads = any(map(_is_real, tree_leaves((arguments, named))))
        backward = any(part in operation.__name__ for part in FOR_BACKWARD)
        self.choose |= reads and len(real) < len(values) and not backward
        if operation.__name__.startswith(PICKING):
            kinds = [x.dtype for x in tree_leaves((arguments, named)) if isinstance(x, Tensor)]
            self.choose |= torch.bool in kinds or torch.uint8 in kinds
        return result


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _coarser(*kinds: torch.dtype) -> torch.dtype:
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)


def _tolerance(kind: torch.dtype) -> float:
    return TOLERANCE * torch.finfo(kind).eps ** 0.5


def _differs(total: Tensor, truth: Tensor, kind: torch.dtype, bound: Tensor | None = None) -> bool:
    """Tell whether squares of gradients in a type are not the true ones; without signs they come to
    `bound`."""
    precision = torch.finfo(kind)
    allowed = _tolerance(kind) * _norm(truth)
    allowed += (UNDERFLOW * precision.eps * precision.tiny) ** 2 * truth.numel() ** 0.5
    if bound is not None:
        allowed += (NOISE * precision.eps) ** 2 * _norm(bound)  # of a sum that cancels
    return not _norm(total - truth) <= allowed


def _gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    """Return the gradients by some leaves, dense; None where none reaches. Accumulates nothing."""
    if not leaves or not value.requires_grad:
        return [None] * len(leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [grad if grad is None else grad.to_dense() for grad in grads]


def _pair(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Return the inputs and what is given with them.

    Raises:
        ValueError: it is no batch.
    """
    inputs, given = batch, None
    if isinstance(batch, tuple | list):
        if len(batch) != 2:
            raise ValueError(
                "a batch is a tensor of inputs or a pair (inputs, labels), not a "
                f"{_described(batch)} of {len(batch)}: take the inputs, or the pair, out of it"
            )
        inputs, given = batch
    if not isinstance(inputs, Tensor) or inputs.dim() == 0:
        raise ValueError(f"samples come as a tensor (N, ...), not {_described(inputs)}")
    if not isinstance(given, Tensor | None):
        raise ValueError(f"labels come as a tensor (N,), not {_described(given)}")
    return inputs, given


def _check_given(given: Tensor, classes: int) -> None:
    """Refuse numbers that draw no label, and labels that are no classes."""
    draws = given.is_floating_point()
    if not ((given >= 0) & (given < (1 if draws else classes))).all():
        allowed = "numbers given to labels 'sampled' lie in [0, 1)"
        allowed = allowed if draws else f"labels 'true' lie in 0..{classes - 1}, a logit each"
        raise ValueError(f"{allowed}; these are {given.min().item()} to {given.max().item()}")


def _warn_looped(names: Sequence[str]) -> None:
    if names:
        shown = (
            names
            if len(names) <= NAMES_SHOWN
            else [f"{len(names)} parameters", *names[:NAMES_SHOWN], "..."]
        )
        warnings.warn(f"per-sample gradients one by one for {', '.join(shown)}", stacklevel=5)


def _strong_labels(out: Tensor, score: str) -> Tensor:
    """Return labels (N,) whose score has large gradients, however sure the model is."""
    if score == "logit":
        return out.argmax(dim=1)
    return out.masked_fill(~out.isfinite(), torch.inf).argmin(dim=1)


def _first_and_last(rows: Tensor) -> Tensor:
    """Return the first and the last row, or the only one."""
    return rows[[0, -1]] if len(rows) > 1 else rows


def _check_finite(scores: dict[str, Tensor]) -> None:
    for name, total in scores.items():
        if not torch.isfinite(total).all():
            raise NotFinite(f"the sensitivity of {name} is not finite")


def _norm(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).item()


def _square(grad: Tensor, total: Tensor) -> Tensor:
    """Return the squares of gradients, in the type of their total where that holds more."""
    return grad.to(torch.promote_types(grad.dtype, total.dtype)).square()


@contextlib.contextmanager
def _frozen(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Hold a model in a mode, frozen, uncompiled and without autocast; leave it as it was.

    Modes are set by their flags: train() and eval() may do more, such as merging weights.
    """
    modes = {module: module.training for module in model.modules()}
    trainable = {p: p.requires_grad for p in model.parameters()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next(iter(trainable)).device.type if trainable else "cpu"
    fast = torch.backends.mha.get_fastpath_enabled()
    compiles = "torch._dynamo" in sys.modules  # compiled modules may pass hooks by
    eager = torch.compiler.set_stance("force_eager") if compiles else contextlib.nullcontext()
    try:
        for module in modes:
            module.training = training
        torch.backends.mha.set_fastpath_enabled(False)  # it passes modules by
        for p in trainable:
            p.requires_grad_(False)
        with eager, torch.inference_mode(False), torch.autocast(device, enabled=False):
            with _attributes_restored(model):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for p, trains in trainable.items():
            p.requires_grad_(trains)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                with contextlib.suppress(RuntimeError):  # an expanded one: none can write to it
                    buffer.copy_(before)


@contextlib.contextmanager
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Leave the attributes of all modules as they were, whatever a pass keeps there; likewise what
    is in dictionaries, lists and sets among them."""
    before = [(vars(module), {**vars(module)}) for module in model.modules()]
    containers = [
        (value, [*value.items()] if isinstance(value, dict) else [*value])
        for _, attributes in before
        for value in attributes.values()
        if type(value) in CONTAINERS
    ]
    try:
        yield
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)
        for container, values in containers:
            container.clear()
            container.extend(values) if isinstance(container, list) else container.update(values)


def _logits(output: Any) -> Tensor:
    """Return the logits (N, C) in a model's output.

    Raises:
        ValueError: there are none.
    """
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple | list) and not hasattr(output, "logits"):
        output = output[0] if output else None
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor) or output.dim() != 2 or not output.is_floating_point():
        raise ValueError(
            f"a model that is scored answers with logits (N, C), alone, first in a tuple or as "
            f"'logits'; this one with {_described(output)}"
        )
    return output


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _sampled_labels(logits: Tensor, u: Tensor) -> Tensor:
    """Return labels (N,) drawn from the softmax of `logits` by inversion of its CDF at u (N,)."""
    shares, u = logits.detach().double().softmax(dim=1), u.to(logits.device).double()
    if shares.is_cpu:
        cdf = shares.cumsum(dim=1)
    else:  # where that is not deterministic, and nothing may wait for the host: a product
        cdf = shares @ torch.ones_like(shares[:1]).expand(shares.shape[1], -1).triu()
    return (cdf < u[:, None] * cdf[:, -1:]).sum(dim=1)


def _summed_score(logits: Tensor, labels: Tensor, score: str) -> Tensor:
    values = logits if score == "logit" else logits.log_softmax(dim=1)
    chosen = labels[:, None] == torch.arange(values.shape[1], device=values.device)
    return values.where(chosen, 0).sum()  # gather's gradient is not deterministic on every GPU


# ---------------------------------------------------------------------------- layers in a batch


def _plain_modules(model: nn.Module, scored: set[str]) -> dict[nn.Module, dict[str, str]]:
    """Return the modules whose per-sample gradients a batch can give: weight or bias -> its
    name in the model, where that is scored."""
    owners: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter] = owners.get(parameter, 0) + 1
    plain = {}
    for prefix, module in model.named_modules():
        if _is_plain(module) and all(owners[p] == 1 for p in module.parameters()):
            names = {kind: f"{prefix}.{kind}".lstrip(".") for kind, _ in module.named_parameters()}
            names = {kind: name for kind, name in names.items() if name in scored}
            if names:
                plain[module] = names
    return plain


def _lengths(calls: list[_Call]) -> list[int]:
    """Return how many rows each call of a module saw; -1: what it saw has none."""
    return [len(call.rows) if call.rows.dim() > 1 else -1 for call in calls]


def _input_of(inputs: tuple, named: dict) -> Tensor:
    """Return the one tensor that a module was called with, by position or name; else a scalar."""
    values = [*inputs, *named.values()]
    single = len(values) == 1 and isinstance(values[0], Tensor)
    return values[0] if single else torch.empty(())


def _is_plain(module: nn.Module) -> bool:
    """Tell whether a module is exactly one whose per-sample gradients are known.

    A subclass may do anything, and so may hooks and reparametrisations. One that computes what its
    base does, by other operations, says so: `computes = nn.Conv2d` in its own class.
    """
    kind = vars(type(module)).get("computes", type(module))
    if kind not in (nn.Linear, nn.LayerNorm, nn.Conv2d) or not isinstance(module, kind):
        return False
    if (
        module._forward_pre_hooks
        or "forward" in vars(module)
        or any(True for _ in module.children())
    ):
        return False
    parameters = dict(module.named_parameters())
    if not (parameters.keys() <= {"weight", "bias"}):
        return False
    if any(type(p) is not nn.Parameter for p in parameters.values()):  # quantised, say
        return False
    if kind is nn.Conv2d:
        simple = module.kernel_size == module.stride and module.padding in ((0, 0), "valid")
        return simple and module.groups == 1 and module.dilation == (1, 1)
    return isinstance(module.weight, nn.Parameter) or kind is nn.LayerNorm


def _recorder(
    sums: dict[str, Tensor], bounds: dict[str, Tensor], calls: list[_Call], leaves: list[Tensor]
) -> Callable:
    """Return the forward hook that adds a module's squared per-sample gradients to `sums`, what
    they come to without signs to `bounds`, what it saw to `calls`, and to `leaves` its output where
    the graph begins there."""

    def forward(module: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor | None:
        x, entered = _input_of(inputs, named).detach(), None
        calls.append(_Call(x, output.dtype))
        if not torch.is_grad_enabled() or x.dim() < 2:
            return None
        if not output.requires_grad:  # nothing trains: the graph begins here
            leaves.append(output.requires_grad_())
            entered = output.clone()  # which may be changed in place
        version = x._version

        def backward(grad: Tensor) -> None:
            if "weight" in sums and x._version != version:
                raise ValueError("the input of a layer was changed in place")
            _add_squares(module, sums, x, grad.detach())
            if bounds:
                _add_squares(module, bounds, x, grad.detach(), signs=False)

        output.register_hook(backward)
        return entered

    return forward


def _patches(images: Tensor, height: int, width: int) -> Tensor:
    """Return the patches (N, T, C height width) of images (N, C, H, W), by rows."""
    rows = images.unfold(2, height, height).unfold(3, width, width)  # (N, C, rows, columns, h, w)
    return rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def _add_squares(
    module: nn.Module, sums: dict[str, Tensor], x: Tensor, grad: Tensor, signs: bool = True
) -> None:
    """Add a module's squared per-sample gradients; without signs, nothing in them cancels."""
    total = next(iter(sums.values()))
    summed = torch.promote_types(grad.dtype, total.dtype)
    if x.dtype != grad.dtype:  # of a model with autocast of its own
        x, grad = x.to(summed), grad.to(summed)
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        normal = F.layer_norm(x, shape, eps=module.eps)
        for name, value in (("weight", grad * normal), ("bias", grad)):
            if name in sums:
                value = value if signs else value.abs()
                per_sample = value.reshape(len(x), -1, *shape).sum(dim=1, dtype=summed)
                sums[name] += per_sample.square_().sum(dim=0)
        return
    if isinstance(module, nn.Conv2d):
        x = _patches(x, *module.kernel_size)
        grad = grad.flatten(2).transpose(1, 2)
    x, grad = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
    if not signs:
        x, grad = x.abs(), grad.abs()
    if "weight" in sums:
        square_accumulate_(sums["weight"].view(sums["weight"].shape[0], -1), grad, x)
    if "bias" in sums:
        sums["bias"] += grad.sum(dim=1, dtype=summed).square_().sum(dim=0)
