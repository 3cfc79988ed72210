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
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    def _add_squares_kernel(total_ptr, products_ptr, samples, size, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = at < size
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        source = products_ptr + at
        for _ in range(samples):
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
                total, products, len(products), total.numel(), BLOCK=SQUARES_BLOCK
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
    grids. All others are scored sample by sample, which is said once. On two samples every tensor's
    scores are compared with autograd's own per-sample gradients: one that differs is scored sample
    by sample too. One whose gradients are zero there is compared on the first batch where they are
    not. A layer that a later batch calls in another way is scored sample by sample from there on.

    The model is scored in eval mode, without autocast, and left as it was: modes, buffers,
    requires_grad, gradients. It reads copies of the inputs.

    Args:
        model: on one device; answers with logits (N, C), alone, first in a tuple, under "logits" in
            a dictionary or as an attribute.
        batches: inputs, a tensor (N, ...), or pairs (inputs, given (N,)).
        parameters: names to score; None scores all.
        labels: "sampled" draws y from the model's own p(y|x), by `seed` and the sample's place in
            the stream, or by the uniform numbers in [0, 1) that are `given`; "true" takes the int64
            labels that are `given` (empirical Fisher).
        score: "log-prob" differentiates log p(y|x), "logit" the logit of y (TaLoS's release).
        dtype: of the sums, fp32 or fp64.

    Returns:
        name -> tensor of the parameter's shape, in `dtype`; all are views of one vector.

    Raises:
        ValueError: nothing to score, no samples, an unknown option, other outputs than logits, a
            model whose logits are random or depend on the rest of a batch, gradients that autograd
            cannot take, or a score that is not finite.
    """
    scorer = Scorer(model, parameters=parameters, labels=labels, score=score, dtype=dtype)
    return scorer.diagonal(batches, seed)


class _Ways(NamedTuple):
    """How the per-sample gradients of each parameter are had."""

    hooked: dict[nn.Module, dict[str, str]]  # in a batch: weight or bias -> its name in the model
    broadcast: list[str]  # in a batch, by a copy for each sample
    mapped: list[str]  # sample by sample, by torch.func
    looped: list[str]  # sample by sample, by autograd
    unproven: list[str]  # of these, what had gradients of zero alone: no comparison tells anything

    @property
    def one_by_one(self) -> bool:
        """Tell whether something is scored sample by sample, or compared with what is."""
        return bool(self.mapped or self.looped or self.unproven)

    def loop_over(self, names: Sequence[str]) -> None:
        """Let these parameters be scored sample by sample, by autograd, from now on."""
        for module, parts in [*self.hooked.items()]:
            parts = {kind: name for kind, name in parts.items() if name not in names}
            self.hooked.update({module: parts}) if parts else self.hooked.pop(module)
        for rest in (self.broadcast, self.mapped, self.unproven):
            rest[:] = [name for name in rest if name not in names]
        self.looped.extend(names)
        _say_singly(names)


class Scorer:
    """`fisher_diagonal` of one model, as often as its weights or the samples change.

    How each parameter's gradients are had is found out at the first batch, not again for every
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
        floats = [p.dtype for p in self.parameters.values() if p.is_floating_point()]
        self.precision = torch.finfo(max(floats, key=lambda kind: torch.finfo(kind).eps))
        self.labels, self.score, self.dtype = labels, score, dtype
        self.scale, self.replay = scale, replay
        self._replays: dict[tuple, Callable[..., Tensor]] = {}  # by what a batch is
        self._replayed_sums: Tensor | None = None
        self._ways: dict[tuple, _Ways] = {}  # by what a sample is, and whether it is alone
        self._sizes: set[torch.Size] = set()  # of batches whose logits depend on no other sample

    def diagonal(self, batches: Iterable, seed: int = 0) -> dict[str, Tensor]:
        """Return what `fisher_diagonal` does of these batches, of the weights as they are now."""
        now = dict(self.model.named_parameters())
        if any(now.get(name) is not p for name, p in self.parameters.items()):
            raise ValueError("the model has other parameters than its Scorer was made for")
        generator = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(b"fisher labels")]))
        with _standing_still(self.model):
            total, count = self._empty_sums(), 0
            sums = self._by_name(total, self.names)
            for batch in batches:
                inputs, targets = batch if isinstance(batch, tuple | list) else (batch, None)
                if not isinstance(inputs, Tensor) or inputs.dim() == 0:
                    raise ValueError(f"samples come as a tensor (N, ...), not {_described(inputs)}")
                if self.labels == "sampled" and (
                    targets is None or not targets.is_floating_point()
                ):
                    targets = torch.from_numpy(generator.random(len(inputs)))
                elif targets is None or (self.labels == "true" and targets.is_floating_point()):
                    raise ValueError("labels 'true' needs batches of (inputs, labels)")
                if targets.shape != inputs.shape[:1]:
                    shapes = f"{tuple(inputs.shape)} come with labels {tuple(targets.shape)}"
                    raise ValueError(f"inputs {shapes}: there must be one for each sample")
                if len(inputs) > 0:
                    self._add_batch(total, sums, inputs, targets)
                count += len(inputs)
            if count == 0:
                raise ValueError("the calibration set is empty")
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
        ways, kind = self._ways_of(inputs), (inputs.shape, inputs.dtype, given.dtype)
        repeats = inputs.shape in self._sizes and not ways.one_by_one
        if self.replay and repeats and kind not in self._replays and len(self._replays) < REPLAYED:

            def step(inputs: Tensor, given: Tensor) -> Tensor:
                return self._add(sums, ways, inputs, given)

            self._replays[kind] = self.replay(step, [total])
        if repeats and kind in self._replays:
            self._replays[kind](inputs=inputs, given=given.to(inputs.device))
        else:
            self._check_size(inputs, self._add(sums, ways, inputs, given))

    def _add(
        self,
        sums: dict[str, Tensor],
        ways: _Ways,
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
        for name in ways.broadcast:
            p = self.parameters[name].detach()
            copies[name] = p.expand(len(inputs), *p.shape[1:]).clone().requires_grad_()
        fresh = {name: torch.zeros_like(sums[name]) for name in ways.unproven}
        parts = {**sums, **fresh}
        watched = _watching({name: self.parameters[name] for name in fresh})
        with torch.enable_grad(), watched as reached, self._hooked(parts, ways, bounds) as calls:
            logits = self._logits(inputs, copies)
            strays = [module for module, rows in calls.items() if rows != [len(inputs)]]
            if not strays:
                labels = _sampled_labels(logits, given) if given.is_floating_point() else given
                if logits.requires_grad:  # something is hooked, copied or watched
                    self._score_of(logits, labels).backward()
        if strays:
            ways.loop_over([n for module in strays for n in ways.hooked[module].values()])
            return self._add(sums, ways, inputs, given, bounds)
        for name, copy in copies.items():
            if copy.grad is not None:
                parts[name] += _square(copy.grad, parts[name]).sum(dim=0, keepdim=True)
        if ways.mapped:
            self._add_mapped(parts, ways.mapped, inputs, labels)
        if ways.looped:
            self._add_looped(parts, ways.looped, inputs, labels)
        if doubtful := [name for name in fresh if name in reached or parts[name].any()]:
            self._prove(parts, ways, doubtful, inputs, labels)
        for name in fresh:
            sums[name] += parts[name]
        return logits.detach()

    def _prove(
        self,
        parts: dict[str, Tensor],
        ways: _Ways,
        names: list[str],
        inputs: Tensor,
        labels: Tensor,
    ) -> None:
        """Compare squares of a batch, the first ones that are not zero, with autograd's."""
        truth = self._by_name(self._zeros(names), names)
        self._add_looped(truth, names, inputs, labels)
        ways.unproven[:] = [name for name in ways.unproven if name not in names]
        if wrong := [name for name in names if self._differs(parts[name], truth[name])]:
            ways.loop_over(wrong)
            for name in wrong:
                parts[name] = truth[name]

    def _logits(self, inputs: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the logits of a copy of the inputs, with other values of some parameters."""
        if not values:
            return _logits(self.model(inputs.detach().clone()))
        # by torch's own search for shared parameters, a module with two names would stay changed
        values = {place: value for name, value in values.items() for place in self._places_of(name)}
        replaced = torch.func.functional_call
        return _logits(replaced(self.model, values, (inputs.detach().clone(),), tie_weights=False))

    def _score_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return what is differentiated: the sum of all samples' scores, times the scale."""
        return _summed_score(logits, labels, self.score) * self.scale

    def _places_of(self, name: str) -> list[str]:
        return self.places[self.parameters[name]]

    @contextlib.contextmanager
    def _hooked(
        self, sums: dict[str, Tensor], ways: _Ways, bounds: dict[str, Tensor] | None
    ) -> Iterator[dict[nn.Module, list[int]]]:
        """Let the batched modules add their squares to `sums` in the block's backward pass.

        Yields:
            of how many samples each was called, which is filled by the forward pass.
        """
        calls: dict[nn.Module, list[int]] = {}
        handles = []
        for module, names in ways.hooked.items():
            mine = {kind: sums[name] for kind, name in names.items()}
            limits = {kind: bounds[name] for kind, name in names.items()} if bounds else {}
            hook = _recorder(mine, limits, calls.setdefault(module, []))
            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()

    def _add_mapped(
        self, sums: dict[str, Tensor], names: list[str], inputs: Tensor, labels: Tensor
    ) -> None:
        """Add squares of gradients that torch.func takes of all samples at once."""
        chosen = {name: self.parameters[name].detach() for name in names}

        def sample_score(values: dict, x: Tensor, y: Tensor) -> Tensor:
            return self._score_of(self._logits(x[None], values), y[None])

        gradients = torch.func.vmap(torch.func.grad(sample_score), in_dims=(None, 0, 0))
        for name, grad in gradients(chosen, inputs, labels).items():
            sums[name] += _square(grad, sums[name]).sum(dim=0)

    def _add_looped(
        self, sums: dict[str, Tensor], names: list[str], inputs: Tensor, labels: Tensor
    ) -> None:
        """Add squares of gradients that autograd takes of one sample after the other."""
        chosen = [self.parameters[name] for name in names]
        try:
            for p in chosen:
                p.requires_grad_(True)
            for x, y in zip(inputs, labels, strict=True):
                with torch.enable_grad():
                    value = self._score_of(self._logits(x[None]), y[None])
                if not value.requires_grad:
                    continue
                grads = torch.autograd.grad(value, chosen, allow_unused=True)
                for name, grad in zip(names, grads, strict=True):
                    if grad is not None:
                        sums[name] += _square(grad.to_dense(), sums[name])
        finally:
            for p in chosen:
                p.requires_grad_(False)

    # ------------------------------------------------------------------------ the first batch

    def _ways_of(self, inputs: Tensor) -> _Ways:
        """Return how the parameters' per-sample gradients are had of such inputs (N, ...)."""
        kind = inputs.shape[1:], inputs.dtype, len(inputs) == 1
        if kind in self._ways:
            return self._ways[kind]
        samples = _ends(inputs)
        plain = _plain_modules(self.model, {*self.names})
        with _counted(plain) as calls:
            out = self._checked_logits(samples)
        usual = [len(samples), 1]  # as many rows as samples, in both calls
        hooked = {module: names for module, names in plain.items() if calls[module] == usual}
        covered = {name for names in hooked.values() for name in names.values()}
        rest = [name for name in self.names if name not in covered]
        broadcast = self._broadcasting(rest, samples, out)
        mapped = [name for name in rest if name not in broadcast]
        truth = self._truth(samples, out)
        ways = self._verified(_Ways(hooked, broadcast, mapped, [], []), samples, out, truth)
        _say_singly([name for name in self.names if name in {*ways.mapped, *ways.looped}])
        if all(torch.isfinite(total).all() for total in truth.values()):
            self._ways[kind] = ways
        return ways

    @torch.no_grad()
    def _checked_logits(self, samples: Tensor) -> Tensor:
        """Return the logits of some samples; refuse a model that has no per-sample gradients."""
        out, first = self._logits(samples), samples[:1]
        if len(out) != len(samples):
            raise ValueError(f"{len(samples)} samples have {len(out)} rows of logits")
        alone = self._logits(first)
        if not self._close(alone, out[:1]) and not self._close(alone, self._logits(first)):
            raise ValueError(
                "the model's logits of the same samples differ between two calls, in eval mode "
                "too: there is something random in it"
            )
        self._check_apart(alone, out[:1])
        return out

    @torch.no_grad()
    def _check_size(self, inputs: Tensor, logits: Tensor) -> None:
        """Refuse a model that mixes the samples of a batch of this size."""
        if inputs.shape not in self._sizes:
            if len(inputs) > 2:
                self._check_apart(self._logits(_ends(inputs)), _ends(logits))
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
        tolerance = TOLERANCE * max(self.precision.eps, torch.finfo(a.dtype).eps) ** 0.5
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return False
        a, b = a.where(finite, 0), b.where(finite, 0)
        return _norm(a - b) <= tolerance * max(_norm(a), a.numel() ** 0.5)

    @torch.no_grad()
    def _broadcasting(self, names: list[str], samples: Tensor, out: Tensor) -> list[str]:
        """Return the parameters of which each sample reads its own copy, along the first axis."""
        names = [n for n in names if self.parameters[n].shape[:1] == (1,)]
        if not names:
            return []
        copies = {
            n: torch.cat([self.parameters[n] + i for i in range(len(samples))]) for n in names
        }
        try:
            changed = self._logits(samples, copies)
            alone = self._close(out[:1], changed[:1])  # copies may take another kernel's rounding
        except (RuntimeError, IndexError, ValueError):
            alone = False
        if alone or len(names) < 2:
            return names if alone else []
        return [n for name in names for n in self._broadcasting([name], samples, out)]

    def _truth(self, samples: Tensor, out: Tensor) -> dict[str, Tensor]:
        """Return autograd's squares of some samples, for the labels of `_strong_labels`."""
        truth = self._by_name(self._zeros(self.names), self.names)
        try:
            self._add_looped(truth, self.names, samples, _strong_labels(out, self.score))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"autograd cannot take this model's gradients: {reason}") from error
        everywhere = self.score == "log-prob" and (out.isnan() | out.isposinf()).any()
        if everywhere or self.scale != 1:  # of all labels then; or another scale may do
            _check_finite(truth)
        return truth

    def _verified(
        self, ways: _Ways, samples: Tensor, out: Tensor, truth: dict[str, Tensor]
    ) -> _Ways:
        """Return the ways that give autograd's own squares of these samples, tensor by tensor."""
        labels = _strong_labels(out, self.score)
        names = {name for parts in ways.hooked.values() for name in parts.values()}
        names |= {*ways.broadcast}
        batched = ways._replace(mapped=[])
        differ = self._differing(batched, names, truth, samples, labels)
        hooked = {
            module: {kind: name for kind, name in parts.items() if name not in differ}
            for module, parts in ways.hooked.items()
        }
        hooked = {module: parts for module, parts in hooked.items() if parts}
        broadcast = [name for name in ways.broadcast if name not in differ]
        mapped = [n for n in self.names if n in {*ways.mapped, *differ}]
        alone = _Ways({}, [], mapped, [], [])
        looped = self._differing(alone, mapped, truth, samples, labels) if mapped else set()
        mapped = [name for name in mapped if name not in looped]
        unproven = [n for n in self.names if n not in looped and not truth[n].any()]
        return _Ways(hooked, broadcast, mapped, [n for n in self.names if n in looped], unproven)

    def _differing(
        self,
        ways: _Ways,
        names: Iterable[str],
        truth: dict[str, Tensor],
        samples: Tensor,
        labels: Tensor,
    ) -> set[str]:
        """Return those of some names whose squares are not the true ones."""
        zeros = self._zeros(self.names), self._zeros(self.names)
        sums, bounds = (self._by_name(vector, self.names) for vector in zeros)
        try:
            self._add(sums, ways, samples, labels, bounds)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
            return {*names}
        return {name for name in names if self._differs(sums[name], truth[name], bounds[name])}

    def _differs(self, total: Tensor, truth: Tensor, bound: Tensor | None = None) -> bool:
        """Tell whether squares are not the true ones; without signs they come to `bound`."""
        precision = self.precision.eps
        smallest = precision * self.precision.tiny
        allowed = TOLERANCE * precision**0.5 * _norm(truth)
        allowed += (UNDERFLOW * smallest) ** 2 * truth.numel() ** 0.5
        if bound is not None:
            allowed += (NOISE * precision) ** 2 * _norm(bound)  # of a sum that cancels
        return not _norm(total - truth) <= allowed


def _say_singly(names: Sequence[str]) -> None:
    if names:
        warnings.warn(f"per-sample gradients one by one for {', '.join(names)}", stacklevel=5)


def _strong_labels(out: Tensor, score: str) -> Tensor:
    """Return labels (N,) whose score has large gradients, however sure the model is."""
    if score == "logit":
        return out.argmax(dim=1)
    return out.masked_fill(~out.isfinite(), torch.inf).argmin(dim=1)


def _ends(rows: Tensor) -> Tensor:
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
def _watching(parameters: dict[str, nn.Parameter]) -> Iterator[set[str]]:
    """Yield a set that comes to hold the parameters that a backward pass in the block reaches with
    gradients other than zero."""
    reached: set[str] = set()
    before = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
        p.requires_grad_(True)
    try:
        yield reached
        for name, p in parameters.items():
            if p.grad is not None and p.grad.to_dense().any():
                reached.add(name)
    finally:
        for name, p in parameters.items():
            p.requires_grad_(False)
            p.grad = before[name]


@contextlib.contextmanager
def _standing_still(model: nn.Module) -> Iterator[None]:
    """Hold a model in eval mode, frozen and without autocast; leave it as it was."""
    modes = {module: module.training for module in model.modules()}
    trainable = {p: p.requires_grad for p in model.parameters()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    device = next(iter(trainable)).device.type if trainable else "cpu"
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # it passes modules by
        for p in trainable:
            p.requires_grad_(False)
        with torch.inference_mode(False), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for p, trains in trainable.items():
            p.requires_grad_(trains)
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)  # which the model may have replaced


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
    """Return the modules whose per-sample gradients can be had in a batch: weight or bias -> its
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


@contextlib.contextmanager
def _counted(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[int]]]:
    """Yield a dictionary that comes to hold the rows of each call of these modules."""
    calls: dict[nn.Module, list[int]] = {module: [] for module in modules}

    def note(module: nn.Module, inputs: tuple, named: dict, output: Tensor) -> None:
        calls[module].append(_rows(inputs, named))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _rows(inputs: tuple, named: dict) -> int:
    """Return the length of a module's input along the first axis; -1: it has no such axis."""
    x = _input_of(inputs, named)
    return len(x) if x is not None and x.dim() > 1 else -1


def _input_of(inputs: tuple, named: dict) -> Tensor | None:
    """Return the one tensor that a module was called with, by position or by name."""
    values = [*inputs, *named.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], Tensor) else None


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


def _recorder(sums: dict[str, Tensor], bounds: dict[str, Tensor], calls: list[int]) -> Callable:
    """Return the forward hook that adds a module's squared per-sample gradients to `sums`, what
    they come to without signs to `bounds`, and its number of rows to `calls`."""

    def forward(module: nn.Module, inputs: tuple, named: dict, output: Tensor) -> Tensor | None:
        calls.append(_rows(inputs, named))
        if not torch.is_grad_enabled() or calls[-1] < 0:
            return None
        x, entered = _input_of(inputs, named).detach(), None
        if not output.requires_grad:  # nothing trains: the graph begins here
            entered = output.requires_grad_().clone()  # which may be changed in place
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
    if x.dtype != grad.dtype:  # of a model with autocast of its own
        x, grad = x.to(total.dtype), grad.to(total.dtype)
    x, grad = (v.reshape(len(v), -1, v.shape[-1]) for v in (x, grad))
    if not signs:
        x, grad = x.abs(), grad.abs()
    if "weight" in sums:
        square_accumulate_(sums["weight"].view(sums["weight"].shape[0], -1), grad, x)
    if "bias" in sums:
        sums["bias"] += grad.sum(dim=1, dtype=summed).square_().sum(dim=0)
