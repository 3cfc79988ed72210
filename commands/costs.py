"""What a command costs on this machine: measured in seconds, on generated images of CIFAR's size.

    costs(line).total(line)    the seconds that a parsed fedavg, centralized, ridge or calibrate
                               command will take; of others like it, Costs.total without measuring

Images and weights are generated, so that nothing is downloaded; neither changes the time. In place
of a mask that the command makes stands a random one of the same sparsity; of one made to a
--threshold, whose sparsity is not known before, none.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import data
import masks
import model as vit
from commands.options import Line, federation, learner_options
from data import ImageSet
from fedavg import FedAvg
from federated import privacy
from federated.cohort import sample_clients
from machine.rates import seconds_of
from machine.runs import Run
from training import calibration, probe
from training.clients import HeadsTogether, LocalSteps
from training.learner import Learner
from training.rounds import client_terms, cohort_of, make_clients, method_of
from training.session import prepare
from training.workspace import Workspace

COUNTED = ("fedavg", "centralized", "ridge", "calibrate")
CLIENTS = 1_000  # of a trial
STEPS = 20  # of a timed client
WHILE = 1.5  # seconds that clients are timed for
SLOW = 0.4  # seconds of an image's passes: from there on nothing but a step is timed
FORWARD, SCORED = 1 / 3, 1.25  # what is taken of these passes then: for a feature, for a score


class Costs(NamedTuple):
    """Seconds of what a command does; 0 what it does not."""

    feature: float = 0.0  # an image's features
    head: float = 0.0  # fitting the head
    score: float = 0.0  # scoring an image
    step: float = 0.0  # a training step beside its images
    image: float = 0.0  # an image of a step; 0 where the whole step was timed
    client: float = 0.0  # a client's part of a round beside its steps
    round: float = 0.0  # a round beside its clients
    evaluation: float = 0.0  # evaluating an image

    def total(self, line: Line) -> float:
        """Return the seconds of a command like the one that was measured."""
        return sum(self.parts(line).values())

    def parts(self, line: Line) -> dict[str, float]:
        """Return the seconds of each part of such a command."""
        o = line.stored
        calibrates = o.get("mask_rule") is not None and masks.needs_scores(o["mask_rule"])
        parts = {
            "features": self.feature * featured(line),
            "head": self.head
            * fitted(line)
            * (2 if line.command == "ridge" else 1),  # clients' sums
            "calibration": self.score * scored(o) if calibrates else 0.0,
        }
        if line.command in ("ridge", "calibrate"):
            return parts
        tried = ("search_lr", "search_weight_decay", "search_schedule")
        tries = math.prod(len(o[name] or (1,)) for name in tried) * o["search"]
        length = o.get("rounds") or o["epochs"]
        short = self.training(line.replaced(eval_test=False), o["search_length"] or length)
        full = self.training(line, length)
        tested = 2 * self.evaluation * images_of(o)[1]  # at the end, the last and the best weights
        goes_on = o["search_length"] in (None, length) or o["schedule"] == "constant"
        parts["head"] *= 1 + tries
        parts["search"] = max(0, tries - goes_on) * sum(short)  # the winner goes on as the run
        return parts | {"training": full[0], "evaluations": full[1] + tested}

    def training(self, line: Line, length: int) -> tuple[float, float]:
        """Return the seconds of so many rounds or epochs, and those of their evaluations."""
        o = line.stored
        looks = 1 + math.ceil(length / o["eval_every"])
        evaluations = self.evaluation * looks * evaluated(o)
        if "rounds" not in o:
            steps = math.ceil(train_images(o) / o["batch_size"])
            return length * steps * self.a_step(o), evaluations
        return length * self.a_round(o), evaluations

    def a_step(self, o: dict) -> float:
        """Return the seconds of a training step."""
        return self.step + batch_of(o) * self.image

    def a_round(self, o: dict) -> float:
        """Return the seconds of a round."""
        return cohort_size(o) * (o["J"] * self.a_step(o) + self.client) + self.round


def images_of(o: dict) -> tuple[int, int]:
    """Return how many images train, before validation is split off, and how many test."""
    return data.DATASETS[o["data"]].images


def train_images(o: dict) -> int:
    """Return how many images train."""
    images = images_of(o)[0]
    return images - round(o["val_fraction"] * images)


def evaluated(o: dict) -> int:
    """Return how many images an evaluation is of."""
    train, test = images_of(o)
    return train - train_images(o) + test * o["eval_test"]


def fitted(line: Line) -> bool:
    """Is a head fitted to features?"""
    return line.stored.get("head", "ridge") != "linear"


def cohort_size(o: dict) -> int:
    """Return how many clients take part in a round."""
    return len(sample_clients(o["clients"], o["fraction"], seed=0, round=1))


def batch_of(o: dict) -> int:
    """Return the images of a step: of --batch-size full, a client's share."""
    return max(1, train_images(o) // o["clients"]) if o["batch_size"] == "full" else o["batch_size"]


def featured(line: Line) -> int:
    """Return of how many images features are computed, or activations that stand still."""
    o, (train, test) = line.stored, images_of(line.stored)
    if line.command == "ridge" or o.get("train") == "head":
        return train + test
    shown = train + (line.command != "calibrate") * test
    if o["head_images"] is not None:  # and an equal share of the validation images
        shown = round(o["head_images"] * train / max(1, train_images(o)))
    below = o.get("train", "all") not in ("all", "blocks.0") and not o["augment"]
    stand_still = below and o["keep_tokens"] == 1
    return fitted(line) * shown + stand_still * (train + test)


def scored(o: dict) -> int:
    """Return how many images are scored, those of `calibrate`'s comparison of clients included."""
    count = max(1, round(o["calibration_fraction"] * o["clients"])) if "clients" in o else 1
    share = max(1, o["calibration_images"] // count)
    compared = (min(calibration.OVERLAP_CLIENTS, count) + count) * share
    rounds = o["calibration_rounds"] * count * share
    return rounds + (compared if o["command"] == "calibrate" else 0)


def check(command: str) -> None:
    """Raise ValueError where it is not known what a command does."""
    if command not in COUNTED:
        hint = "; sweep --list times every table" * (command == "sweep")
        raise ValueError(f"what is examined is {', '.join(COUNTED)}, not {command!r}{hint}")


# ---------------------------------------------------------------------------- measuring


def trial_of(line: Line) -> Line:
    """Return the command with generated images and weights, and without what needs others."""
    o = line.stored
    changed = {
        **dict(data="synthetic", weights="none", nc=None, dirichlet=None, head_images=None),
        **dict(dropout=0.0, dp_noise=None, dp_clip=None),
        **dict(cover="all", clients=min(o.get("clients", 1), CLIENTS)),
    }
    if "train" in o:
        changed["head"] = "linear"
        if o["mask_rule"] is not None:
            changed["mask_rule"] = None if o["sparsity"] is None else "random"
            changed["quorum"] = None
        if o["train"] != "head":  # of heads it decides whether they train together
            changed["straggler_fraction"] = 0.0
    return line.replaced(**{name: value for name, value in changed.items() if name in o})


class Trial:
    """A command's learner on generated data, and what is measured on it."""

    def __init__(self, line: Line, folder: str):
        o = trial_of(line).groups
        o.source = o.source._replace(data_dir=folder)
        self.line, self.groups = line, o
        self.workspace = Workspace(o.source, o.machine, o.backbone)
        self.learner: Learner | None = None
        self.cuda_graph = "off (no CUDA device)"
        self.shards = [self.workspace.train_index]
        if "clients" in line.stored:
            self.shards = self.workspace.shards(o.sharding)
        if line.stored.get("batch_size") == "full":  # as many images as in the run
            index = np.resize(self.workspace.train_index, batch_of(line.stored))
            self.shards = [index] * len(self.shards)
        if line.command in ("fedavg", "centralized"):
            with contextlib.redirect_stdout(io.StringIO()):  # what it says of its random mask
                self.learner = self.prepared(folder)
            self.learner.keep_activations()

    def prepared(self, folder: str) -> Learner:
        """Return the command's learner; heads train on few images' features, over and over."""
        o, sets = self.groups, self.workspace.sets
        if o.training.train == "head":
            few = {part: ImageSet(*(x[: probe.FEW] for x in every)) for part, every in sets.items()}
            self.workspace.sets = few
        run, options = Run(folder), learner_options(o)
        learner = prepare(self.workspace, self.workspace.build_model(), run, self.shards, options)
        self.workspace.sets, learner.labels = sets, {p: s.labels for p, s in sets.items()}
        if learner.on_features:
            for part, rows in learner.inputs.items():
                at = torch.arange(len(sets[part].labels), device=rows.device) % len(rows)
                learner.inputs[part] = rows[at]
        return learner

    @functools.cached_property
    def passes(self) -> tuple[float, float]:
        """Seconds of forward and backward passes: of any step, and of an image in it."""
        if self.learner is not None:
            return probe.passes(self.learner)
        return 0.0, probe.feature(self.workspace, self.workspace.build_model(), 1) / FORWARD

    @functools.cached_property
    def slow(self) -> bool:
        """Is this machine so slow that what is no step follows from the passes?"""
        return self.workspace.device.type == "cpu" and self.passes[1] > SLOW

    @functools.cached_property
    def batch(self) -> int:
        """Images of what is timed."""
        images = batch_of(self.line.stored) if self.learner is not None else probe.BATCH
        if not self.image:
            return images
        return max(1, min(images, int((probe.LONGEST - self.passes[0]) / self.image)))

    @functools.cached_property
    def optimiser(self) -> float:
        return probe.optimiser(self.learner)

    @functools.cached_property
    def average(self) -> float:
        return probe.average(self.learner)

    @property
    def image(self) -> float:
        """Seconds of an image of a step; 0 where the whole step is timed."""
        heads = self.learner is not None and self.learner.on_features
        return 0.0 if heads or self.workspace.device.type == "cuda" else self.passes[1]

    def local_steps(self) -> tuple[float, float]:
        """Return the seconds of a local step beside its images, of a client beside its steps."""
        o, learner = self.groups, self.learner
        J, batch = o.local_steps.J, batch_of(self.line.stored)
        steps = o.local_steps
        if self.batch < batch:  # too long for a look: fewer images, one step
            steps = LocalSteps(1, self.batch)
        elif J > STEPS and o.training.train != "head":
            steps = LocalSteps(STEPS, steps.batch_size)
        loop = federation(o)._replace(steps=steps)
        terms = client_terms(learner, self.shards, loop, None)
        clients = make_clients(learner, self.shards, loop, list(terms.values()))
        method = method_of(learner, loop, terms, len(self.shards))
        cohort = functools.partial(cohort_of, loop, clients, None)
        process = FedAvg(learner.entries.theta.clone(), clients, cohort, method=method)
        if isinstance(clients, HeadsTogether):
            self.cuda_graph = "off (heads train together)"

            def whole_round() -> dict:
                while (record := process.advance()) is None:
                    pass
                return record

            many = max(1, len(whole_round()["clients"]))
            return seconds_of(whole_round, self.workspace.device, WHILE) / many / J, 0.0
        client = seconds_of(process.advance, self.workspace.device, WHILE)
        self.cuda_graph = clients.graphed.status if clients.graphed else self.cuda_graph
        if steps == o.local_steps:
            return client / J - batch * self.image, 0.0
        step = max(0.0, client - self.average) / steps.J
        return step - self.batch * self.image, self.average

    def epoch_step(self) -> float:
        """Return the seconds of a step over all training data, beside its images."""
        learner, entries, scale = self.learner, self.learner.entries, self.learner.loss_scale
        graphed = learner.graphed(learner.backward, self.groups.graph.cuda_graph)
        draws = probe.draws_of(learner, self.batch)
        grad = learner.flat.grad

        def work() -> None:
            scale.attempt(
                lambda s: (graphed or learner.backward)(draws=draws, loss_scale=s),
                lambda: not torch.isfinite(grad).all().item(),
            )
            entries.step(1e-9, first=False, grad_scale=1.0)
            entries.gather()

        seconds = seconds_of(work, self.workspace.device)
        self.cuda_graph = graphed.status if graphed else self.cuda_graph
        return seconds - self.batch * self.image

    def private(self) -> tuple[float, float]:
        """Return the seconds of clipping a client's change, and of a round's noise."""
        o, device = self.line.groups.privacy, self.workspace.device
        theta, clip, noise = self.learner.entries.theta, 0.0, 0.0
        if o.dp_clip is not None:
            clip = seconds_of(lambda: privacy.clip_factor(theta, theta, o.dp_clip), device)
        if o.dp_noise:
            total = torch.zeros_like(theta, dtype=torch.int64)
            add = functools.partial(privacy.add_noise_, total, 1.0, unit=1.0, seed=0, round=1)
            noise = seconds_of(add, device)
        return clip, noise

    def measure(self, say: Callable[[str], object]) -> Costs:
        """Return what the command's parts cost; `say` is told what comes next."""
        o, seconds = self.line.stored, {}
        if self.line.command == "fedavg":
            say("a client's local steps")
            seconds["step"], client = self.local_steps()
            clip, noise = self.private()
            seconds |= {"client": client + clip, "round": noise}
        if self.line.command == "centralized":
            say("a training step")
            seconds["step"] = self.epoch_step()
        if self.learner is not None:
            say("an evaluation")
            seconds |= {"image": self.image, "evaluation": self.evaluation()}
        if featured(self.line):
            say("features of images")
            seconds["feature"] = self.feature()
        if fitted(self.line):
            kind, width = o.get("head", "ridge"), vit.MODELS[o["model"]].width
            say(f"fitting a {kind} head")
            images = o.get("head_images") or train_images(o)
            seconds["head"] = probe.fitted_head(self.workspace, kind, width, images)
        if o.get("mask_rule") is not None and masks.needs_scores(o["mask_rule"]):
            say("scoring images")
            seconds["score"] = self.scoring()
        return Costs(**seconds)

    def scoring(self) -> float:
        """Return the seconds of scoring an image."""
        if self.slow:
            return SCORED * self.passes[1]
        options, model = self.line.groups.masking, self.workspace.build_model()
        options, graph = options._replace(quorum=None), self.groups.graph.cuda_graph
        return probe.score(self.workspace, model, options, self.shards, self.batch, graph)

    def evaluation(self) -> float:
        """Return the seconds of evaluating an image."""
        if self.slow:
            return FORWARD * self.passes[1]
        images = self.workspace.eval_batch
        cpu = self.workspace.device.type == "cpu"
        return probe.evaluation(self.learner, min(images, 2 * self.batch) if cpu else images)

    def feature(self) -> float:
        """Return the seconds of an image's features."""
        if self.slow:
            return FORWARD * self.passes[1]
        images = self.workspace.eval_batch
        if self.workspace.device.type == "cpu":
            images = min(images, 2 * (self.batch if self.image else probe.FEW))
        return probe.feature(self.workspace, self.workspace.build_model(), images)


def costs(line: Line, say: Callable[[str], object] = lambda what: None) -> Costs:
    """Measure what a command's parts cost on this machine; no more than half a minute.

    Args:
        say: is told what is measured next.

    Raises:
        ValueError: a command that makes no run.
    """
    check(line.command)
    with tempfile.TemporaryDirectory() as folder:
        return Trial(line, folder).measure(say)
