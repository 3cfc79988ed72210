"""From options to a mask: what takes part, who scores it on which images, where masks are kept.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import fedavg
import fisher
import masks
import model as vit
import safe_files
from mask_file import Mask
from status import Status
from workspace import Workspace, fingerprint

BATCH = 64  # images scored at a time; changes no score
OVERLAP_CLIENTS = 10  # whose masks are compared
GROUPS = (1, 2, 5, 10, 20, 50)  # sizes of the groups of clients whose masks are compared
MAKING = (  # the options that decide what a mask is
    "mask_rule",
    "sparsity",
    "threshold",
    "per_tensor",
    "mask_scope",
    "calibration_rounds",
    "calibration_images",
    "calibration_fraction",
    "damp",
    "fisher_labels",
    "fisher_score",
    "consensus",
    "quorum",
    "seed",
)


def scoped_names(model: vit.VisionTransformer, patterns: list[str]) -> list[str]:
    """Return the backbone's parameters that match one of the shell patterns.

    Raises:
        ValueError: a pattern that matches none.
    """
    backbone = vit.trained_names(model, "all", freeze_head=True)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in backbone):
            raise ValueError(
                f"--mask-scope {pattern}: no parameter of the backbone has such a name; "
                f"there are {backbone[0]}, {backbone[-1]} and others"
            )
    return [name for name in backbone if any(fnmatchcase(name, p) for p in patterns)]


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Turn TF32 off, whose rounding would decide between entries of nearly the same score."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Calibration:
    """Scores a model on the clients' own images; its head is fitted and frozen.

    Args:
        model: in fp32, restored to the bit when `make` returns or fails.
        shards: each client's indices into the training images.
    """

    def __init__(
        self,
        workspace: Workspace,
        model: vit.VisionTransformer,
        options: argparse.Namespace,
        shards: list[np.ndarray],
    ):
        self.workspace, self.model, self.options, self.shards = workspace, model, options, shards
        self.names = scoped_names(model, options.mask_scope)
        parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(parameters[name].shape) for name in self.names}
        self.theta = torch.cat([parameters[name].detach().flatten() for name in self.names])
        if options.sparsity is not None and not masks.budget(len(self.theta), options.sparsity):
            raise ValueError(
                f"--sparsity {options.sparsity:g} keeps none of the {len(self.theta)} entries of "
                f"--mask-scope {' '.join(options.mask_scope)}"
            )
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        for (name, shape), part in zip(self.shapes.items(), self.theta.split(sizes), strict=True):
            parameters[name].data = part.view(shape)  # scoring sees what happens to theta
        self.clients = fedavg.sample_clients(
            len(shards), options.calibration_fraction, seed=options.seed, round=0
        )
        if (options.quorum or 0) > len(self.clients):
            raise ValueError(f"--quorum {options.quorum}: only {len(self.clients)} clients score")
        self.scores = masks.needs_scores(options.mask_rule)
        how = dict(labels=options.fisher_labels, score=options.fisher_score)
        self.scorer = fisher.Scorer(model, parameters=self.names, **how)
        self.preprocess = workspace.preprocess(torch.float32)
        draws = data.random(options.seed, "calibration labels")
        self.uniform = torch.from_numpy(draws.random(len(workspace.dataset.train.labels)))
        self.sign = masks.RULES[options.mask_rule][1]
        self.limits = dict(
            sparsity=options.sparsity,
            threshold=None if options.threshold is None else self.sign * options.threshold,
            group_sizes=sizes if options.per_tensor else None,
        )

    def images(self, client: int) -> np.ndarray:
        """Draw the client's calibration images from its training shard, without replacement."""
        share = max(1, self.options.calibration_images // len(self.clients))
        draws = data.random(self.options.seed, "calibration images", int(client))
        return draws.permutation(self.shards[client])[:share]

    def sensitivity(self, index: np.ndarray) -> Tensor:
        """Return the sensitivities (P,) on these training images of the model as it stands."""
        options, train = self.options, self.workspace.sets["train"]

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for chunk in data.in_chunks(len(index), BATCH):
                at = torch.from_numpy(index[chunk])
                true = options.fisher_labels == "true"
                at_device = at.to(train.labels.device)
                given = train.labels[at_device] if true else self.uniform[at]
                yield self.preprocess(train.images[at_device]), given

        scores = self.scorer.diagonal(batches())
        return torch.cat([scores[name].flatten() for name in self.names])

    def client_keys(self, index: np.ndarray) -> Tensor:
        """Return the keys (P,) by which a client that holds these images would rank alone."""
        scores = self.sensitivity(index) if self.scores else None
        return masks.ranking(self.options.mask_rule, self.theta, scores, self.options.seed)

    def make(self) -> Mask:
        """Calibrate; the bytes are those of the scores and of the masks they are taken under."""
        options, started = self.options, time.monotonic()
        images = {int(k): self.images(k) for k in self.clients}
        weights = [len(self.shards[k]) for k in self.clients]
        rounds = options.calibration_rounds if self.scores else 1  # other keys do not change
        status, done = Status("calibration: client", rounds * len(images)), itertools.count(1)
        sent = []  # scores that a client sends in each round: those of the entries alive

        def keys(alive: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
            if not self.scores:
                return self.client_keys(np.empty(0, dtype=np.int64))
            sent.append(int(alive.sum()))

            def each() -> Iterator[Tensor]:
                for index in images.values():
                    yield self.client_keys(index)
                    status.show(next(done))

            how = dict(alive=alive, keep=keep, quorum=options.quorum)
            return masks.consensus(each(), weights, options.consensus, **how)

        try:
            with exact_products():
                how = dict(rounds=rounds, damp=options.damp, **self.limits)
                kept = masks.calibrate(self.theta, keys, **how)
        except masks.NothingKept as error:
            low, high = sorted((self.sign * error.low, self.sign * error.high))
            raise ValueError(
                f"--threshold {options.threshold:g} keeps nothing in calibration round "
                f"{error.round}, where the scores lie between {low:.3g} and {high:.3g}"
            ) from None
        status.close()
        senders = len(images) if self.scores else 0
        made = {name: getattr(options, name) for name in MAKING}
        made |= {
            "model": options.model,
            "weights_sha256": fingerprint(self.model),
            "entries": len(kept),
            "kept": int(kept.sum()),
            "clients": senders,
            "images": sum(map(len, images.values())) if self.scores else 0,
            "bytes_up": 4 * senders * sum(sent),
            "bytes_down": (rounds - 1) * senders * math.ceil(len(kept) / 8),
            "seconds": float(f"{time.monotonic() - started:.3f}"),
        }
        return Mask(self.shapes, kept, made)

    def agreement(self) -> dict:
        """Compare the masks that clients would make alone, in one round on half of their images.

        Returns:
            what `masks.overlap` says, and of how many clients and images each.
        """
        clients = [k for k in self.clients if len(self.images(k)) > 1][:OVERLAP_CLIENTS]
        if not self.scores or not clients:
            return {}
        try:
            with exact_products():
                halves = [[self.own_mask(part) for part in self.halves(k)] for k in clients]
                groups = self.group_agreement()
        except masks.NothingKept:
            return {}
        images = len(self.halves(clients[-1])[0])
        found = masks.overlap(halves) | {"clients": len(clients), "images": images}
        return found | {"groups": groups}

    def group_agreement(self) -> dict[str, float]:
        """Return the IoU of the masks that two groups of m clients make, for several m.

        The groups share no client; their scores are added up weighted by samples.
        """
        half, found, weight = len(self.clients) // 2, {}, np.zeros((2, 1))
        sides = torch.zeros(2, len(self.theta), dtype=torch.float64, device=self.theta.device)
        for m in range(1, half + 1):
            for i, client in enumerate((self.clients[m - 1], self.clients[-m])):
                weight[i] += len(self.shards[client])
                sides[i] += len(self.shards[client]) * self.client_keys(self.images(client))
            if m in GROUPS or m == half:
                means = (sides / torch.from_numpy(weight).to(sides)).to(self.theta.dtype)
                one, two = map(self.mask_by, means)
                found[f"{m}"] = masks.overlap([(one, one), (two, two)])["iou"]
        return found

    def halves(self, client: int) -> list[np.ndarray]:
        """Split the client's calibration images in two."""
        return np.array_split(self.images(client), 2)

    def own_mask(self, index: np.ndarray) -> Tensor:
        """Return the mask (P,) that these images alone make in one round."""
        return self.mask_by(self.client_keys(index))

    def mask_by(self, keys: Tensor) -> Tensor:
        """Return the mask (P,) that these keys make in one round."""
        return masks.calibrate(self.theta, lambda alive, keep: keys, rounds=1, **self.limits).cpu()


def cached_mask(calibration: Calibration) -> Mask:
    """Return the calibration's mask, from <data-dir>/masks where it was made before."""
    workspace, model, options = calibration.workspace, calibration.model, calibration.options
    preprocess = calibration.preprocess
    made_from = [getattr(options, name) for name in MAKING]
    made_from += [preprocess.image_size, preprocess.scale.tolist(), preprocess.shift.tolist()]
    made_from += [options.data, fingerprint(model), workspace.device.type, safe_files.BOUND]
    digest = hashlib.sha256(repr(made_from).encode())
    for tensor in (model.head.weight, model.head.bias):
        digest.update(tensor.detach().cpu().numpy().tobytes())
    for shard in calibration.shards:
        digest.update(len(shard).to_bytes(8, "little") + shard.tobytes())
    purpose = digest.hexdigest()
    path = Path(options.data_dir) / "masks" / f"{purpose[:16]}.pt"
    if path.exists():
        try:
            return Mask.load(path, model, purpose)
        except ValueError as error:
            print(f"warning: {error}; made again", file=sys.stderr)
    mask = calibration.make()
    try:
        safe_files.forget_asides(path.parent, safe_files.DAY)
        mask.save(path, purpose)
    except OSError as error:
        print(f"warning: the mask is not kept for other runs: {error}", file=sys.stderr)
    return mask
