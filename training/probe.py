"""What the parts of a run cost on this machine, each measured in a second or two.

Where a step or a pass of the wanted size would take longer, a smaller one is timed, and what an
image adds to it is added for the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

import data
import fedavg
import head
import model as vit
from machine.device import exact_products
from machine.rates import seconds_of
from training.calibration import Calibration, Masking

if TYPE_CHECKING:
    from training.learner import Learner
    from training.workspace import Workspace

LONGEST = 1.0  # seconds that a timed step or pass may take
FEW = 4  # images of a step that tells what an image costs
BATCH = 64  # images of what is timed without a step
FITTED = 4_500  # rows that a timed head is fitted to


def draws_of(learner: Learner, images: int) -> torch.Tensor:
    """Return the draws (B, 4 + R) of a training step."""
    index, keep = learner.workspace.train_index, learner.seen_patches
    draws = data.draw_batches(index, images, 1, seed=0, round=1, client=0, keep=keep)
    return draws[0].to(learner.workspace.device)


def passes(learner: Learner) -> tuple[float, float]:
    """Return the seconds of forward and backward passes: of any step, and of an image in it."""
    single, several = draws_of(learner, 1), draws_of(learner, FEW)
    device, budget = learner.workspace.device, LONGEST / 2
    alone = seconds_of(lambda: learner.backward(single, 1.0), device, budget)
    together = seconds_of(lambda: learner.backward(several, 1.0), device, budget, warm=True)
    each = max((together - alone) / (FEW - 1), 0.1 * together / FEW)  # noise: no less than that
    return max(0.0, alone - each), each


def operations(learner: Learner) -> float:
    """Return the operations of an image's matrix products, forward and backward."""
    draws, steps = draws_of(learner, 1), learner.trained_logits_of
    learner.trained_logits_of = learner.logits_of  # what is compiled is counted uncompiled
    with FlopCounterMode(display=False) as counter:
        learner.backward(draws, 1.0)
    learner.trained_logits_of = steps
    return float(counter.get_total_flops())


def operations_of(name: str, classes: int, size: int) -> float:
    """Return the same of one of model.MODELS, all of which trains, at so many pixels a side."""
    model = vit.build_vit(name, classes)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, size, size)).sum().backward()
    return float(counter.get_total_flops())


def pixels(learner: Learner, images: int) -> float:
    """Return the seconds that cropping, resizing and normalising take, an image."""
    workspace, draws = learner.workspace, draws_of(learner, images)
    preprocess, train = workspace.preprocess(), learner.inputs["train"]
    if learner.on_features or train.dim() != 4:  # what lies below was computed once
        return 0.0

    def work() -> torch.Tensor:
        augmented = learner.training.augment
        chosen = data.crop_and_flip(train, draws) if augmented else train[draws[:, 0]]
        return preprocess(chosen)

    return seconds_of(work, workspace.device) / images


def optimiser(learner: Learner) -> float:
    """Return the seconds of an optimiser step."""
    step = learner.entries.step
    return seconds_of(lambda: step(0.0, grad_scale=1.0), learner.workspace.device)


def optimiser_bytes(learner: Learner) -> int:
    """Return the least that a step reads and writes: parameter, gradient and momentum, fp32."""
    vectors = 5 if learner.entries.sgd.momentum else 3
    return 4 * vectors * learner.entries.size


def average(learner: Learner) -> float:
    """Return the seconds of a client's start and of its part in the round's sum."""
    entries = learner.entries
    theta = entries.theta.clone()
    total = torch.zeros_like(theta, dtype=torch.int64)

    def work() -> None:
        entries.load(theta)
        fedavg.add_delta_(total, entries.gather(), theta, 0.5)

    return seconds_of(work, learner.workspace.device)


def average_bytes(learner: Learner) -> int:
    """Return the least that this moves: one copy, two vectors read, the int64 total renewed."""
    return (2 * 4 + 2 * 4 + 2 * 8) * learner.entries.size


@torch.no_grad()
def evaluation(learner: Learner, images: int) -> float:
    """Return the seconds of evaluating an image, as an evaluation of many does."""
    at = draws_of(learner, images)[:, 0]
    work = lambda: learner.logits_of(learner.inputs_of("train", at), None).argmax(1)  # noqa: E731
    return seconds_of(work, learner.workspace.device) / images


@torch.no_grad()
def feature(workspace: Workspace, model: vit.VisionTransformer, images: int) -> float:
    """Return the seconds of an image's features, computed of so many at a time."""
    backbone, preprocess = vit.cast_copy(model, workspace.dtype), workspace.preprocess()
    batch = workspace.sets["train"].images[:images]
    work = lambda: backbone.features(preprocess(batch))  # noqa: E731
    return seconds_of(work, workspace.device, budget=LONGEST) / len(batch)


def score(
    workspace: Workspace,
    model: vit.VisionTransformer,
    options: Masking,
    images: int,
    cuda_graph: str,
) -> float:
    """Return the seconds of scoring an image, in calls of as many as a client has.

    Args:
        model: its head is filled with noise; zeros would score nothing.
        images: that a timed call may take at most.
    """
    with torch.no_grad():
        model.head.weight.normal_(std=0.1)
    calibration = Calibration(workspace, model, options, cuda_graph)
    index = calibration.images(calibration.clients[0])[:images]
    with exact_products():
        work = lambda: calibration.sensitivity(index)  # noqa: E731
        if workspace.device.type == "cuda":
            work()  # finds out how to score; the next call records the graph
        return seconds_of(work, workspace.device) / len(index)


def fitted_head(workspace: Workspace, kind: str, width: int, images: int) -> float:
    """Return the seconds of fitting a head to the features of so many images."""
    count, classes, device = min(images, FITTED), workspace.classes, workspace.device
    rows = torch.randn(count + classes, width, device=device)
    labels = torch.arange(len(rows), device=device) % classes
    seen, held_out = (rows[classes:], labels[classes:]), (rows[:classes], labels[:classes])

    def work() -> object:
        if kind == "probe":
            return head.train_probe(*seen, classes, *held_out)
        return head.fit_ridge(head.RidgeSums(width, classes, device).update(*seen), *held_out)

    return seconds_of(work, device, budget=0) * images / count
