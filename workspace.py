"""What a run works with: data, model, head and device brought together, and what of it trains.

The leaves know nothing of one another; this file hands each what it needs from the others. `options`
is the namespace of train.py's command line with its defaults resolved.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import fedavg
import head
import model as vit
import runs
from centralized import learning_rate
from sparse_sgdm import sparse_sgdm_

HEAD = ("head.weight", "head.bias")


class Workspace:
    """The data set, its splits and the device of one command; builds models with their weights."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = choose_device(options.device)
        self.dtype = choose_precision(options.precision, self.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(True)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        synthetic = options.data == "synthetic"
        self.dataset = (
            data.synthetic_dataset() if synthetic else data.load_cifar100(options.data_dir)
        )
        self.classes = len(self.dataset.classes)
        self.sets = {
            name: getattr(self.dataset, name).to(self.device) for name in ("train", "test")
        }
        labels = self.dataset.train.labels.numpy()
        self.train_index, self.val_index = data.split_validation(
            labels, options.val_fraction, options.seed
        )
        self.train_labels = labels[self.train_index]

    def shards(self) -> list[np.ndarray]:
        """Return each client's indices into the training images."""
        options, labels = self.options, self.train_labels
        if options.nc is not None:
            parts = data.shard_by_class(labels, options.clients, options.nc, options.seed)
        elif options.dirichlet is not None:
            parts = data.shard_dirichlet(labels, options.clients, options.dirichlet, options.seed)
        else:
            parts = data.shard_iid(labels, options.clients, options.seed)
        return [self.train_index[part] for part in parts]

    def build_model(self) -> vit.VisionTransformer:
        """Build the model with its backbone weights and a zero head, in fp32 on the device."""
        options = self.options
        model = vit.build_vit(options.model, self.classes, options.seed)
        if options.weights == "dino":
            vit.load_weights(model, vit.download_dino(options.data_dir))
        elif options.weights != "none":
            vit.load_weights(model, options.weights)
        return model.to(self.device)

    def preprocess(self) -> data.Preprocess:
        """Return the resize and normalisation that the weights expect."""
        options = self.options
        known = {"imagenet": vit.IMAGENET, "half": vit.HALF}
        mean, std = known.get(options.normalisation) or vit.default_normalisation(options.weights)
        return data.Preprocess(options.image_size, mean, std, self.device, self.dtype)

    @torch.no_grad()
    def features(self, model: vit.VisionTransformer, part: str) -> Tensor:
        """Return the backbone's features (N, D) fp32 of all "train" or "test" images, unaugmented.

        They are kept in <data-dir>/features under a key of all that they depend on.
        """
        preprocess, images = self.preprocess(), self.sets[part].images
        settings = [
            part,
            preprocess.scale.tolist(),
            preprocess.shift.tolist(),
            preprocess.image_size,
        ]
        settings += [str(self.dtype), self.device.type, fingerprint(model), self.options.data]
        key = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
        path = Path(self.options.data_dir) / "features" / f"{self.options.data}-{part}-{key}.pt"
        if path.exists():
            try:
                return runs.load_checked(path).to(self.device)
            except runs.DamagedFile as error:
                print(f"warning: {error}; computed again", file=sys.stderr)
        backbone, rows = cast_copy(model, self.dtype), []
        status = Status(f"features of the {part} images", len(images))
        for chunk in data.in_chunks(len(images), self.options.eval_batch):
            rows.append(backbone.features(preprocess(images[chunk])).float())
            status.show(chunk.stop)
        status.close()
        features = torch.cat(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        runs.save_checked(path, features.cpu())
        return features

    def fit_head(self, features: Tensor, kind: str) -> head.FittedHead:
        """Fit a "ridge" head or a linear "probe" on the training split; validation makes its choices."""
        labels = self.sets["train"].labels
        train, val = (
            torch.from_numpy(i).to(self.device) for i in (self.train_index, self.val_index)
        )
        if len(val) == 0:
            raise ValueError(f"--head {kind} needs validation data: --val-fraction above 0")
        held_out = features[val], labels[val]
        if kind == "probe":
            return head.train_probe(features[train], labels[train], self.classes, *held_out)
        sums = head.RidgeSums(features.shape[1], self.classes, self.device)
        return head.fit_ridge(sums.update(features[train], labels[train]), *held_out)

    def environment(self) -> dict:
        """Return what may change the last bits of a result."""
        cuda = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "threads": None if cuda else torch.get_num_threads(),
            "precision": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "numpy": np.__version__,
        }


def choose_device(name: str) -> torch.device:
    """Return the device of --device; "auto" is a CUDA device where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: PyTorch sees no CUDA device here; --device cpu runs anywhere"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype; "auto" is bf16 from compute capability 8.0, fp16 below, fp32 on a CPU."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if recent else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def fingerprint(model: vit.VisionTransformer) -> str:
    """Return the SHA-256 of the backbone's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in HEAD:
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cast_copy(model: vit.VisionTransformer, dtype: torch.dtype) -> vit.VisionTransformer:
    """Return a copy of the model in another dtype."""
    copy = vit.VisionTransformer(model.shape, model.head.out_features).to(model.cls_token.device)
    copy.load_state_dict(model.state_dict())
    return copy.to(dtype)


class Status:
    """One live line on a terminal, nothing elsewhere: what is done, the rate, the time left."""

    def __init__(self, what: str, total: int, done: int = 0):
        self.what, self.total, self.start_at = what, total, done
        self.live, self.started = sys.stderr.isatty(), time.monotonic()

    def show(self, done: int, note: str = "") -> None:
        """Redraw the line."""
        if self.live:
            seconds = (time.monotonic() - self.started) / max(1, done - self.start_at)
            left = seconds * (self.total - done)
            rate = f"{1 / seconds:.1f}/s" if seconds < 1 else f"{seconds:.1f} s each"
            line = f"{self.what} {done}/{self.total}  {rate}  {duration(left)} left  {note}"
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Write a duration as 42 s, 3:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class Learner:
    """The parameters that train, as a flat view, and the loss of a batch drawn from the data.

    With --train head the inputs are the backbone's features, computed once; else the images.

    Args:
        folder: where the fitted head is kept, so that a resumed run need not fit it again.
    """

    def __init__(self, workspace: Workspace, options: argparse.Namespace, folder: Path):
        self.workspace, self.options = workspace, options
        model = workspace.build_model()
        if options.head != "linear":
            self._set_fitted_head(model, folder / "head.pt")
        names = vit.trained_names(model, options.train, options.freeze_head)
        model.requires_grad_(False)
        trained = [(n, p) for n, p in model.named_parameters() if n in names]
        self.on_features = options.train == "head"
        self.labels = {part: images.labels for part, images in workspace.sets.items()}
        if self.on_features:
            self.inputs = {part: workspace.features(model, part) for part in workspace.sets}
            self.flat = vit.FlatView(trained)
            self.logits_of = model.head
        else:
            self.inputs = {part: images.images for part, images in workspace.sets.items()}
            self.flat = vit.FlatView(trained, compute_dtype=workspace.dtype)
            for name, parameter in model.named_parameters():
                if name not in names and name not in HEAD:
                    parameter.data = parameter.data.to(workspace.dtype)
            preprocess = workspace.preprocess()
            self.logits_of = lambda images: model(preprocess(images))
        self.momentum = torch.zeros_like(self.flat.theta) if options.momentum else None
        self.loss_scale = fedavg.LossScale(
            2.0**14 if self.flat.grad.dtype == torch.float16 else 1.0
        )

    @torch.no_grad()
    def _set_fitted_head(self, model: vit.VisionTransformer, path: Path) -> None:
        if path.exists():
            fitted = head.FittedHead(**runs.load_checked(path))
        else:
            features = self.workspace.features(model, "train")
            fitted = self.workspace.fit_head(features, self.options.head).to("cpu")
            runs.save_checked(path, vars(fitted))
        model.head.weight.copy_(fitted.weight)
        model.head.bias.copy_(fitted.bias)

    def loss(self, draws: Tensor) -> Tensor:
        """Return the mean cross-entropy of the training samples that `draws` (B, 4) names."""
        inputs, at = self.inputs["train"], draws[:, 0]
        augment = self.options.augment and not self.on_features
        batch = data.crop_and_flip(inputs, draws) if augment else inputs[at]
        return F.cross_entropy(self.logits_of(batch), self.labels["train"][at])

    def step(self, lr: float, first: bool, loss_scale: float = 1.0) -> None:
        """Take one optimiser step from the flat gradient."""
        flat = self.flat
        self.step_flat(
            flat.theta,
            flat.grad,
            self.momentum,
            flat.compute,
            lr=lr,
            first=first,
            grad_scale=loss_scale,
        )

    def step_flat(self, *tensors: Tensor | None, **changing) -> None:
        """Call `sparse_sgdm_` with the run's constants."""
        options = self.options
        constants = dict(momentum=options.momentum, weight_decay=options.weight_decay)
        sparse_sgdm_(*tensors, nesterov=options.nesterov, **constants, **changing)

    def overflowed(self) -> bool:
        """Tell whether a parameter is Inf or NaN."""
        return not torch.isfinite(self.flat.theta).all().item()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return loss and accuracy on the validation and the test set."""
        result = {}
        test_index = np.arange(len(self.labels["test"]))
        for name, part, index in (
            ("val", "train", self.workspace.val_index),
            ("test", "test", test_index),
        ):
            if len(index):
                loss, accuracy = self._evaluate_part(part, torch.from_numpy(index))
                result |= {f"{name}_loss": loss, f"{name}_acc": accuracy}
        return result

    def _evaluate_part(self, part: str, index: Tensor) -> tuple[float, float]:
        inputs, labels = self.inputs[part], self.labels[part]
        index = index.to(labels.device)
        totals = torch.zeros(2, dtype=torch.float64, device=labels.device)
        for chunk in data.in_chunks(len(index), self.options.eval_batch):
            at = index[chunk]
            logits = self.logits_of(inputs[at])
            totals[0] += F.cross_entropy(logits, labels[at], reduction="sum")
            totals[1] += (logits.argmax(1) == labels[at]).sum()
        loss, accuracy = (totals / len(index)).tolist()
        return loss, accuracy


class ClientTraining:
    """The local training of clients: one after the other on images, all at once on features."""

    def __init__(self, learner: Learner, shards: list[np.ndarray]):
        self.learner, self.shards, self.options = learner, shards, learner.options

    def lr(self, round: int) -> float:
        """Return the round's client learning rate."""
        options = self.options
        schedule = dict(total=options.rounds, lr=options.lr, warmup=options.warmup)
        return learning_rate(options.schedule, round - 1, **schedule)

    def draws(self, client: int, round: int) -> Tensor:
        """Draw the client's J batches: (J, B, 4)."""
        o, shard = self.options, self.shards[client]
        return data.draw_batches(
            shard, o.batch_size, o.J, seed=o.seed, round=round, client=int(client)
        )

    def one(self, client: int, round: int) -> Tensor:
        """Take the client's J local steps on the learner's parameters; returns the (J,) losses."""
        learner, flat, lr = self.learner, self.learner.flat, self.lr(round)
        draws = self.draws(client, round).to(flat.theta.device, non_blocking=True)
        start = flat.theta.clone() if learner.loss_scale.active else None

        def attempt(scale: float) -> Tensor:
            if start is not None:
                flat.reset(start)

            def step(j: int) -> None:
                learner.step(lr, first=j == 0, loss_scale=scale)

            return fedavg.local_sgd(draws, learner.loss, flat.grad, step, scale)

        return learner.loss_scale.attempt(attempt, learner.overflowed)[0]

    def heads(self, theta_global: Tensor, clients: np.ndarray, round: int) -> Iterator:
        """Train the heads of all `clients` together on features; yields (theta_k, losses) of each."""
        learner, flat, lr = self.learner, self.learner.flat, self.lr(round)
        theta = theta_global.repeat(len(clients), 1)  # (m, P)
        grad = torch.zeros_like(theta)
        momentum = torch.empty_like(theta) if self.options.momentum else None
        flattened = [x if x is None else x.view(-1) for x in (theta, grad, momentum)]

        def step(j: int) -> None:
            learner.step_flat(*flattened, lr=lr, first=j == 0)

        indices = torch.stack([self.draws(k, round)[..., 0] for k in clients]).to(theta.device)
        losses = head.train_heads(
            *(flat.view(theta, name) for name in HEAD),
            learner.inputs["train"],
            learner.labels["train"],
            indices,
            step,
            *(flat.view(grad, name) for name in HEAD),
        )
        yield from zip(theta, losses, strict=True)


class Evaluated:
    """Completes the records of a loop: evaluation every so often, and a word to whoever watches."""

    def __init__(self, learner: Learner, unit: str, total: int, every: int):
        self.learner, self.unit, self.total, self.every = learner, unit, total, every
        self.status, self.note = None, ""

    def __call__(self, record: dict) -> None:
        """Evaluate where it is due, adding val_* and test_* to the record; show progress."""
        at = record[self.unit]
        if self.status is None:
            self.status = Status(self.unit, self.total, at - 1)
        self.status.show(at, self.note)
        if at % self.every == 0 or at >= self.total:
            record |= self.learner.evaluate()
            figures = ", ".join(
                f"{label} {100 * record[key]:.2f} %"
                for label, key in (("validation", "val_acc"), ("test", "test_acc"))
                if key in record
            )
            loss = f"train loss {record['train_loss']:.4f}, " if "train_loss" in record else ""
            self.note = figures
            self.status.close()
            print(f"{self.unit} {at}/{self.total}: {loss}{figures}", flush=True)
