"""What is watched while a run goes on: evaluations, the line that says so, and what looks wrong."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

from machine.status import Status

if TYPE_CHECKING:
    from torch import Tensor

    from training.learner import Learner

NEAR_CHANCE = 0.01  # nats that a loss at chance may lie below ln(classes)
FAR_ABOVE = 0.1  # nats: no rate that is too low raises a loss so far


class Watching(NamedTuple):
    """What is watched while a run goes on."""

    eval_test: Annotated[
        bool, "evaluations see the test set too [validation alone, the test set at the end]"
    ] = False
    early_stop: Annotated[
        int | None,
        "stop after N evaluations (--eval-every) without a better validation accuracy [never]",
        ">= 1",
        "N",
    ] = None
    tensorboard: Annotated[
        bool, "mirror the log into event files, in the run's folder tensorboard/"
    ] = False
    wandb: Annotated[bool, "mirror log and options to Weights & Biases, as project fedavg"] = False


def evaluation_due(at: float, every: float, total: int) -> bool:
    """Tell whether an evaluation follows a record at round or epoch `at`.

    Within an epoch there are records only where one is due.
    """
    return every < 1 or at % every == 0 or at >= total


class Evaluated:
    """Completes the records of a loop: evaluation every so often, and a word to whoever watches.

    Args:
        evaluate: returns val_*, perhaps test_*, of the model as it is.
        opening: figures of the first record, which stands for the start.
        measure: returns further figures of later records that have an evaluation.
        classes: of the data, for the loss that is chance.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict],
        unit: str,
        total: int,
        every: float,
        opening: dict,
        measure: Callable[[], dict] = dict,
        classes: int | None = None,
    ):
        self.evaluate, self.unit, self.total, self.every = evaluate, unit, total, every
        self.opening, self.measure, self.classes = opening, measure, classes
        self.status, self.note = None, ""
        self.at, self.losses = None, []  # of the record before, of the first tenth

    def __call__(self, record: dict) -> None:
        """Evaluate where it is due, adding val_* and test_* to the record; show progress."""
        at = record[self.unit]
        if at:
            self.status = self.status or Status(self.unit, self.total, at)
            self.status.show(at, self.note)
        else:
            record |= self.opening
        if evaluation_due(at, self.every, self.total):
            record |= self.evaluate()
            record |= self.measure() if at else {}
            self.note = figures_of(record)
            if self.status:
                self.status.close()
            loss = f"train loss {record['train_loss']:.4f}" if "train_loss" in record else ""
            said = ", ".join(filter(None, [loss, self.note]))
            print(f"{self.unit} {at}/{self.total}{': ' * bool(said)}{said}", flush=True)
        self.status = self.status or Status(self.unit, self.total, at)
        self.judge(record)

    def judge(self, record: dict) -> None:
        """Say, once a tenth of the run is over, that its loss has been at chance."""
        at, before, tenth = record[self.unit], self.at, self.total / 10
        self.at = at
        if before is None or before >= tenth or "train_loss" not in record or not self.classes:
            return
        self.losses.append(record["train_loss"])
        if at >= tenth and (advice := chance_advice(self.losses, self.classes)):
            print(f"warning: {advice}", file=sys.stderr)


def figures_of(record: dict) -> str:
    """Return what a record says of the model, in a line."""
    named = (("validation", "val_acc"), ("test", "test_acc"))
    figures = [f"{label} {100 * record[key]:.2f} %" for label, key in named if key in record]
    figures += [f"epsilon {record['epsilon']:.4g}"] if "epsilon" in record else []
    return ", ".join(figures)


# ---------------------------------------------------------------------------- the end


def end_figures(learner: Learner, last: Tensor, best: Tensor | None) -> tuple[dict, dict]:
    """Return test_loss and test_acc of the last weights (P,), and of those that validated best.

    The learner holds the last ones then. None: nothing was validated.
    """
    last = last.clone()  # it may be what the learner loads into
    same, figures = best is not None and best.equal(last.to(best.device)), []
    for theta in (None if same else best, last):
        if theta is not None:
            learner.entries.load(theta.to(last.device))
            figures.append(learner.evaluate(("test",)))
    return figures[-1], {} if best is None else figures[0]


def headline(summary: dict) -> str:
    """Return the final figures in one line, and the test accuracy of the best weights."""
    final, best = summary.get("final", {}), summary.get("best_by_validation", {})
    named = (("validation", "val_acc"), ("test", "test_acc"))
    shown = [f"{label} accuracy {100 * final[key]:.2f} %" for label, key in named if key in final]
    unit, line = "round" if "round" in best else "epoch", ", ".join(shown)
    if "test_acc" in best and best[unit] != final.get(unit):
        at = f"{unit} {best[unit]}, which validated best"
        line += f" ({100 * best['test_acc']:.2f} % with the weights of {at})"
    return line


# ---------------------------------------------------------------------------- what looks wrong


def head_note(head: str, frozen: bool, masked: bool) -> str:
    """Return what a fitted head that stays frozen means, and what else there is; "" for others."""
    if head == "linear" or not frozen:
        return ""
    if masked:
        return f"the {head} head is fitted first and stays frozen, as under every mask"
    return (
        f"the {head} head is fitted first and stays frozen, which serves clients of any classes; "
        "--no-freeze-head trains it on, and iid clients have ended higher from --head linear in "
        "more rounds (docs/method.md, Heads)"
    )


def chance_advice(losses: Sequence[float], classes: int) -> str:
    """Return what to do about losses that are at chance or above on average; "" where not."""
    mean, chance = math.fsum(losses) / len(losses), math.log(classes)
    if mean < chance - NEAR_CHANCE:
        return ""
    if not mean < chance + FAR_ABOVE:
        return (
            f"a tenth of the run is over, and the training loss, {mean:.2f} on average, is above "
            f"chance (ln {classes} = {chance:.2f}): try a lower --lr"
        )
    return (
        f"a tenth of the run is over, and the training loss is at chance (ln {classes} = "
        f"{chance:.2f}): try a higher --lr, or --head ridge, which starts above chance"
    )


def end_advice(records: Sequence[dict], classes: int, images: int, lr: float) -> str:
    """Return what to do about a run that ends at chance or below its start; "" where it does not.

    Args:
        records: of its log, from the start on.
        images: that its validation accuracy is of.
        lr: that was typed.
    """
    accuracies = [record["val_acc"] for record in records if "val_acc" in record]
    if len(accuracies) < 2 or not images or any("answered" in record for record in records):
        return ""  # of a private run noise and clipping decide, and nothing is searched
    start, end, chance = accuracies[0], accuracies[-1], 1 / classes
    if end < start:
        return (
            f"the run ends at {100 * end:.2f} % on validation, below the {100 * start:.2f} % that "
            f"it started from: it is too short, or its steps are too long: try --lr {lr / 10:g}"
        )
    if end <= chance + 2 * math.sqrt(chance / images):  # two standard errors of a guess
        return (
            f"the run ends at chance, {100 * end:.2f} % on validation: try --head ridge without "
            "--lr, or --search, which tries several rates"
        )
    return ""
