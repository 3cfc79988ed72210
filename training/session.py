"""One run from its options to its summary: head, mask, learner, loop, curves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import masks
import model as vit
from federated.client_states import ClientTerms
from flat import Sgd
from machine import drive as loop
from machine import runs
from machine.status import duration
from training.calibration import GivenMask, Masking
from training.features import Head, features, set_fitted_head
from training.learner import Learner, Training
from training.mask_cache import find_mask
from training.mirrors import mirror
from training.watching import Evaluated, Watching, end_advice, end_figures, headline

if TYPE_CHECKING:
    from training.workspace import Workspace


class LearnerOptions(NamedTuple):
    """What trains, how a step is taken, with which head and under which mask."""

    training: Training
    sgd: Sgd
    head: Head
    masking: Masking
    given_mask: GivenMask = GivenMask()
    terms: ClientTerms = ClientTerms()
    cuda_graph: str = "auto"


# ---------------------------------------------------------------------------- what trains


def prepare(
    workspace: Workspace,
    model: vit.VisionTransformer,
    run: runs.Run,
    o: LearnerOptions,
) -> Learner:
    """Return the learner of a run as it began: its head fitted, its mask found or made."""
    head = o.head
    if head.head != "linear":
        set_fitted_head(workspace, model, head.head, head.head_images, run)
    start, to_all = None, head.head != "linear" and head.head_images is None
    if to_all and not run.saved() and o.training.train != "head":
        start = {"train": features(workspace, model, "train")}
    learner = Learner(
        workspace,
        model,
        o.training,
        o.sgd,
        freeze_head=head.freeze_head,
        mask=find_mask(workspace, model, o.given_mask.mask, o.masking, run, o.cuda_graph),
        mask_lr=o.given_mask.mask_lr,
        prox=o.terms.prox,
        corrected=o.terms.scaffold,
    )
    learner.start = start  # of the untrained backbone, for the first evaluation
    return learner


# ---------------------------------------------------------------------------- while it goes on


def drive(
    run: runs.Run,
    process: Any,
    unit: str,
    total: int,
    learner: Learner,
    every: float,
    watching: Watching,
    *,
    draw_curves: Callable[[dict[str, Sequence[dict]], Path], None],
    theta: Callable[[], Any],
    opening: dict | None = None,
    account: Callable[[], dict] = dict,
    measure: Callable[[], dict] = dict,
    test: bool = True,
) -> dict:
    """Drive the process to `total` rounds or epochs, then write summary and curves.

    Args:
        process: as machine.drive.drive takes it.
        every: units between evaluations.
        theta: returns the weights (P,) that are evaluated.
        draw_curves: (label -> records, path), draws a log.
        opening: what the log's first record says beside its evaluation.
        account: returns further figures of the summary, when the log is complete.
        measure: returns further figures of each evaluation but the first.
        test: False: the test set is not looked at, whatever --eval-test says.
    """
    workspace = learner.workspace
    sets = ("val", "test") if test and watching.eval_test else ("val",)
    print(f"{run.folder}: {learner.entries.size:,} parameters train on {workspace.device}")
    if rate := learner.masked_rate():
        print(rate_line(learner, rate))

    def evaluate() -> dict:
        learner.entries.load(theta())
        return learner.evaluate(sets)

    opening, classes = (opening or {}) | rate, workspace.classes
    evaluated = Evaluated(evaluate, unit, total, every, opening, measure, classes)
    watch = mirror(run, unit, watching)

    def complete(record: dict) -> None:
        evaluated(record)
        watch([record])

    try:
        wall, best = loop.drive(
            run,
            process,
            unit,
            total,
            complete=complete,
            environment=learner.environment(),
            patience=watching.early_stop,
            weights=theta,
            gather=learner.group.gather,
        )
    except loop.Interrupted as stop:
        print(
            f"{stop}: saved at {unit} {getattr(process, unit)}; the same command goes on from there"
        )
        raise
    figures = {unit: (reached := getattr(process, unit)), "wall_seconds": wall} | rate
    if reached < total:
        figures["stopped_early"] = watching.early_stop
        print(
            f"stopped early: {watching.early_stop} evaluations without a better validation accuracy"
        )
    tested = end_figures(learner, theta(), best.get("weights")) if test else ({}, {})
    summary = conclude(run, figures, tested, account, draw_curves) if run.writes else None
    summary = learner.group.gather(summary)[0]
    if advice := run.writes and end_advice(
        run.records(), classes, len(workspace.val_index), learner.dense_lr
    ):
        print(f"warning: {advice}", file=sys.stderr)
    print(f"{unit} {reached} reached in {duration(wall)}. {headline(summary)}. See {run.folder}")
    return summary


def rate_line(learner: Learner, rate: dict[str, float]) -> str:
    """Say how the learning rate follows the mask."""
    origin, what = learner.mask.origin, "all sensitivity"
    if not masks.needs_scores(origin["mask_rule"]):
        what = "the entries"
    elif "sensitivity_share" not in origin:
        what = "the entries (its file is older, and does not say how much of the sensitivity)"
    return (
        f"lr {learner.dense_lr:g} x {rate['lr_factor']:.4g} = {rate['lr']:.4g}: --mask-lr "
        f"{learner.mask_lr}, as the mask keeps {100 * rate['sensitivity_share']:.3g} % of {what}; "
        "--mask-lr raw takes --lr as it stands"
    )


def conclude(
    run: runs.Run,
    figures: dict,
    tested: tuple[dict, dict],
    account: Callable[[], dict],
    draw_curves: Callable[[dict[str, Sequence[dict]], Path], None],
) -> dict:
    """Write a complete run's curves, and at last its summary, by which it counts as finished.

    Args:
        tested: test figures of the last weights and of the best.
    """
    sent = account()
    try:
        draw_curves({run.folder.name: run.records()}, run.folder / "curves.png")
    except ValueError as error:
        print(f"no curves.png: {error}", file=sys.stderr)
    summary = run.summarise(tested, **figures, **sent)
    if sent:
        first, megabytes = run.records()[0], 1e-6
        before = (first.get("bytes_up", 0) + first.get("bytes_down", 0)) * megabytes
        once = f", {before:,.1f} MB of them for calibration and mask" if before else ""
        share = f": {sent['bytes_to_dense']:.4g} times the bytes of dense FedAvg"
        print(
            f"sent {sent['bytes_up'] * megabytes:,.1f} MB up and "
            f"{sent['bytes_down'] * megabytes:,.1f} MB down{once}"
            f"{share if sent['bytes_to_dense'] != 1 else ''}"
        )
    return summary
