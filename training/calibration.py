"""From options to a mask: what takes part, and who scores it on which images."""

from __future__ import annotations

import copy
import fnmatch
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import fisher
import masks
import model as vit
from federated.cohort import sample_clients
from machine.cuda_graph import GraphedStep
from machine.device import exact_products
from machine.status import Status
from training.mask_file import Mask, by_kind, by_name, say_rounds

if TYPE_CHECKING:
    from training.workspace import Workspace

FP16_ATTEMPTS = (  # types of the passes, and scales: training's 2^14 is of a mean over 64 images
    (torch.float16, 256.0),
    (torch.float16, 16.0),
    (torch.float32, 1.0),
)


class GivenMask(NamedTuple):
    """Training under a mask: one made before, and the rate."""

    mask: Annotated[
        str | None, "a mask that `calibrate` wrote [everything trains]", "path", "FILE"
    ] = None
    mask_lr: Annotated[
        str | None,
        "under a mask --lr is the rate of DENSE training, and multiplied so that an update has the "
        "norm that it has there (matched), or that the loss changes as much (functional); raw "
        "takes it as it stands [matched]",
        masks.RATES,
    ] = None  # which is raw: what runs had before there was a choice


class Masking(NamedTuple):
    """Mask: which weights train; the head is fitted first and frozen."""

    mask_rule: Annotated[
        str | None, "what a mask keeps trainable [none; calibrate: least-sensitive]", masks.RULES
    ] = None
    sparsity: Annotated[float | None, "FROZEN share, below 1 [0.9]", "0 <= x < 1"] = None
    threshold: Annotated[
        float | None,
        "instead of --sparsity: train entries whose score is at most this (rules least- and "
        "lowest-), or at least this (most- and highest-)",
        ">= 0",
    ] = None
    per_tensor: Annotated[bool, "the same sparsity in every tensor [over all tensors together]"] = (
        None
    )
    mask_scope: Annotated[
        list[str] | None,
        "names of the parameters that take part, others are frozen; 'blocks.*.weight' is one "
        "[* : the whole backbone]",
        "PATTERN",
    ] = None
    mask_within: Annotated[
        list[str] | None,
        "kinds of the entries that a mask may keep, the budget being that of the whole scope: "
        "query.weight key.weight, or 'query.*'; calibrate lists them [all]",
        "PATTERN",
    ] = None
    calibration_rounds: Annotated[int | None, "rounds of scoring [4]", ">= 1"] = None
    calibration_images: Annotated[
        int | None,
        "images scored in a round by all clients together, each at least one [1000]",
        ">= 1",
    ] = None
    calibration_fraction: Annotated[
        float | None, "share of the clients that score [1]", "0 < x <= 1"
    ] = None
    damp: Annotated[
        float | None,
        "factor on dropped weights while the next round scores [0.1]",
        "0 <= x <= 1",
    ] = None
    fisher_labels: Annotated[
        str | None, "sampled from the model, or the data's [sampled]", ("sampled", "true")
    ] = None
    fisher_score: Annotated[
        str | None, "what is differentiated [log-prob]", ("log-prob", "logit")
    ] = None
    score_precision: Annotated[
        str,
        "arithmetic of the passes that score; sums are fp32 [auto: fp16 where a GPU trains in a "
        "half precision, else fp32]",
        ("auto", "fp32"),
    ] = "auto"
    consensus: Annotated[str | None, "how clients' scores become one [mean]", masks.CONSENSUS] = (
        None
    )
    quorum: Annotated[
        int | None,
        "clients that make a --consensus vote [more than half of those that score]",
        ">= 1",
    ] = None


def score_dtype(name: str, training: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of the passes that score, unless fp32 is named that of a GPU's training; fp16
    in place of bf16, whose rounding changes the labels that are drawn."""
    half = name == "auto" and device.type == "cuda" and training != torch.float32
    return torch.float16 if half else torch.float32


def replay_on(device: torch.device, mode: str) -> fisher.Replay | None:
    """Return what replays the scoring of a batch as --cuda-graph says; None: launched kernel by
    kernel."""
    if device.type != "cuda" or mode == "off":
        return None
    return functools.partial(GraphedStep, device=device, mode=mode)


class Calibration:
    """Scores a model on the clients' own images; its head is fitted and frozen.

    Args:
        model: in fp32, restored to the bit when `make` returns or fails.
        cuda_graph: of --cuda-graph: how a GPU launches the scoring of a batch.
    """

    def __init__(
        self,
        workspace: Workspace,
        model: vit.VisionTransformer,
        options: Masking,
        cuda_graph: str = "auto",
    ):
        self.workspace, self.model, self.options = workspace, model, options
        self.shards = workspace.shards
        self.cuda_graph = cuda_graph
        self.seed = workspace.source.seed
        self.names = vit.scoped_names(model, options.mask_scope)
        parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(parameters[name].shape) for name in self.names}
        self.theta = torch.cat([parameters[name].detach().flatten() for name in self.names])
        if options.sparsity is not None and not masks.budget(len(self.theta), options.sparsity):
            raise ValueError(
                f"--sparsity {options.sparsity:g} keeps none of the {len(self.theta)} entries of "
                f"--mask-scope {' '.join(options.mask_scope)}"
            )
        for name, part in by_name(self.shapes, self.theta).items():
            parameters[name].data = part  # scoring sees what happens to theta
        self.clients = sample_clients(
            len(self.shards), options.calibration_fraction, seed=self.seed, round=0
        )
        if (options.quorum or 0) > len(self.clients):
            raise ValueError(f"--quorum {options.quorum}: only {len(self.clients)} clients score")
        self.scores = masks.needs_scores(options.mask_rule)
        dtype = score_dtype(options.score_precision, workspace.dtype, workspace.device)
        self.attempts = iter(FP16_ATTEMPTS if dtype == torch.float16 else [(dtype, 1.0)])
        self.score_by(*next(self.attempts))
        draws = data.random(self.seed, "calibration labels")
        self.uniform = torch.from_numpy(draws.random(len(workspace.dataset.train.labels)))
        self.sign = masks.RULES[options.mask_rule].sign
        self.within = self.entries_within(options.mask_within)

    def score_by(self, dtype: torch.dtype, scale: float) -> None:
        """Take the passes that score in this type, at this scale; the head stays in fp32."""
        self.dtype, self.scored = dtype, self.model
        self.preprocess = self.workspace.preprocess(dtype)
        if dtype != torch.float32:
            self.scored = copy.deepcopy(self.model)
            for name, parameter in self.scored.named_parameters():
                parameter.data = parameter.data.to(torch.float32 if name in vit.HEAD else dtype)
        self.scorer = fisher.Scorer(
            self.scored,
            parameters=self.names,
            labels=self.options.fisher_labels,
            score=self.options.fisher_score,
            scale=scale,
            replay=replay_on(self.workspace.device, self.cuda_graph),
        )

    @property
    def score_precision(self) -> str:
        """The type of the passes that score, by its name."""
        return str(self.dtype).removeprefix("torch.")

    def entries_within(self, patterns: list[str] | None) -> Tensor | None:
        """Return the entries (P,) of the kinds that match one of the patterns; None: all.

        Raises:
            ValueError: a pattern that matches no kind, or fewer entries than the mask keeps.
        """
        if patterns is None:
            return None
        within = torch.zeros_like(self.theta, dtype=torch.bool)
        kinds = list(dict.fromkeys(kind for _, kind, _ in by_kind(self.shapes, within)))
        chosen = {pattern: fnmatch.filter(kinds, pattern) for pattern in patterns}
        for pattern, matches in chosen.items():
            if not matches:
                raise ValueError(
                    f"--mask-within {pattern}: no such kind; there are {', '.join(kinds)}"
                )
        for _, kind, piece in by_kind(self.shapes, within):
            piece.fill_(any(kind in matches for matches in chosen.values()))
        count = masks.budget(len(self.theta), self.options.sparsity or 0)
        if self.options.sparsity is not None and count > int(within.sum()):
            raise ValueError(
                f"--mask-within {' '.join(patterns)}: {int(within.sum()):,} entries, and "
                f"--sparsity {self.options.sparsity:g} keeps {count:,} of all"
            )
        return within

    def images(self, client: int) -> np.ndarray:
        """Draw the client's calibration images from its training shard, without replacement."""
        share = max(1, self.options.calibration_images // len(self.clients))
        draws = data.random(self.seed, "calibration images", int(client))
        return draws.permutation(self.shards[client])[:share]

    def sensitivity(self, index: np.ndarray) -> Tensor:
        """Return the sensitivities (P,) on these training images of the model as it stands."""
        while True:
            if self.scored is not self.model:
                with torch.no_grad():
                    torch._foreach_copy_([*self.scored.parameters()], [*self.model.parameters()])
            try:
                scores = self.scorer.diagonal(self.batches(index))
                return torch.cat([scores[name].flatten() for name in self.names])
            except fisher.NotFinite:
                if self.dtype != torch.float16:
                    raise
            self.score_by(*next(self.attempts))
            if self.dtype == torch.float32:
                print("scores leave the range of fp16: scoring goes on in fp32", file=sys.stderr)

    def batches(self, index: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield these training images with their labels, or with the numbers that draw them."""
        train = self.workspace.sets["train"]
        for chunk in data.in_chunks(len(index), fisher.BATCH):
            at = torch.from_numpy(index[chunk])
            at_device = at.to(train.labels.device)
            true = self.options.fisher_labels == "true"
            labels = train.labels[at_device] if true else self.uniform[at]
            yield self.preprocess(train.images[at_device]), labels

    def client_keys(self, index: np.ndarray, total: Tensor | None = None, share: float = 1.0):
        """Return the keys (P,) by which a client that holds these images would rank alone.

        Args:
            total: (P,), to which the client's sensitivities are added, times `share`.
        """
        scores = self.sensitivity(index) if self.scores else None
        if total is not None:
            total.add_(scores, alpha=share)
        return masks.ranking(self.options.mask_rule, self.theta, scores, self.seed)

    def make(self) -> Mask:
        """Calibrate; the bytes are those of the scores and of the masks they are taken under."""
        options, started = self.options, time.monotonic()
        images = {int(k): self.images(k) for k in self.clients}
        weights = np.array([len(self.shards[k]) for k in self.clients])
        rounds = options.calibration_rounds if self.scores else 1  # other keys do not change
        status, done = Status("calibration: client", rounds * len(images)), itertools.count(1)
        steps: list[masks.CalibrationRound] = []
        undamped = torch.zeros_like(self.theta) if self.scores else None  # all clients' mean

        def keys(alive: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
            if not self.scores:
                return self.client_keys(np.empty(0, dtype=np.int64))

            def each() -> Iterator[Tensor]:
                for index, share in zip(images.values(), weights / weights.sum(), strict=True):
                    yield self.client_keys(index, None if steps else undamped, share)
                    status.show(next(done))

            return masks.consensus(
                each(), weights, options.consensus, alive=alive, keep=keep, quorum=options.quorum
            )

        def report(step: masks.CalibrationRound) -> None:
            steps.append(step)
            status.close()
            say_rounds([step._asdict()], options.mask_rule, options.consensus)

        try:
            with exact_products():
                mask = self.masked(keys, rounds, report)
        except masks.NothingKept as error:
            low, high = sorted((self.sign * error.low, self.sign * error.high))
            raise ValueError(
                f"--threshold {options.threshold:g} keeps nothing in calibration round "
                f"{error.round}, where the scores lie between {low:.3g} and {high:.3g}"
            ) from None
        senders = len(images) if self.scores else 0
        origin = options._asdict() | {
            "seed": self.seed,
            "model": self.workspace.backbone.model,
            "weights_sha256": vit.fingerprint(self.model),
            "entries": len(mask),
            "kept": int(mask.sum()),
            "clients": senders,
            "images": sum(map(len, images.values())) if self.scores else 0,
            "score_precision": self.score_precision if self.scores else None,
            "bytes_up": 4 * senders * sum(step.of for step in steps),
            "bytes_down": (rounds - 1) * senders * math.ceil(len(mask) / 8),
            "sensitivity_share": masks.sensitivity_share(mask, undamped),
            "rounds": [step._asdict() for step in steps],
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "seconds": float(f"{time.monotonic() - started:.3f}"),
        }
        return Mask(self.shapes, mask, origin)

    def masked(
        self,
        keys: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
        rounds: int,
        report: Callable[[masks.CalibrationRound], None] | None = None,
    ) -> Tensor:
        """Return the mask (P,) that `masks.calibrate` makes of these keys under the options."""
        threshold, per_tensor = self.options.threshold, self.options.per_tensor
        return masks.calibrate(
            self.theta,
            keys,
            sparsity=self.options.sparsity,
            threshold=None if threshold is None else self.sign * threshold,
            rounds=rounds,
            damp=self.options.damp,
            group_sizes=[math.prod(s) for s in self.shapes.values()] if per_tensor else None,
            within=self.within,
            report=report,
        )
