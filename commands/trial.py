"""What a command's parts cost on this machine, in seconds, on generated images of CIFAR's size.

    costs(line)    measures a parsed fedavg, centralized, ridge or calibrate command; its total and
                   that of others like it are counted in commands/costs.py

Images and weights are generated, so that nothing is downloaded; neither changes the time. In place
of a mask that the command makes stands a random one of the same sparsity; of one made to a
--threshold, whose sparsity is not known before, none.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Callable

import numpy as np
import torch

import masks
import model as vit
from commands.costs import Costs, batch_of, check, featured, fitted, train_images
from commands.options import Line, federation, learner_options
from data import ImageSet
from fedavg import FedAvg
from federated import privacy
from machine.rates import seconds_of
from machine.runs import Run
from training import probe
from training.clients import HeadsTogether, LocalSteps
from training.learner import Learner
from training.rounds import client_terms, cohort_of, make_clients, method_of
from training.session import prepare
from training.workspace import Workspace

CLIENTS = 1_000  # of a trial
STEPS = 20  # of a timed client
WHILE = 1.5  # seconds that clients are timed for
SLOW = 0.4  # seconds of an image's passes: from there on nothing but a step is timed
FORWARD, SCORED = 1 / 3, 1.25  # what is taken of these passes then: for a feature, for a score


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
        sharding = vars(o).get("sharding")
        self.workspace = Workspace(o.source, o.machine, o.backbone, sharding=sharding)
        self.learner: Learner | None = None
        self.cuda_graph = "off (no CUDA device)"
        if line.stored.get("batch_size") == "full":  # as many images as in the run
            index = np.resize(self.workspace.train_index, batch_of(line.stored))
            self.workspace.shards = [index] * len(self.workspace.shards)
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
        learner = prepare(self.workspace, self.workspace.build_model(), run, options)
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

    def beside_images(self, seconds: float) -> float:
        """Return a timed step's seconds without those of its images, by noise perhaps more."""
        return max(0.0, seconds - self.batch * self.image)

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
        terms = client_terms(learner, loop, None)
        clients = make_clients(learner, loop, list(terms.values()))
        method = method_of(learner, loop, terms)
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
            return self.beside_images(client / J), 0.0
        return self.beside_images((client - self.average) / steps.J), self.average

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
        return self.beside_images(seconds)

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
        if featured(o):
            say("features of images")
            seconds["feature"] = self.feature()
        if fitted(o):
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
        return probe.score(self.workspace, model, options, self.batch, graph)

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
