"""A run's log as others show it: TensorBoard's event files, Weights & Biases."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from machine.runs import Run
    from training.watching import Watching

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # option -> its module


def check_package(option: str) -> None:
    """Raise ValueError, with what to install, where the package of an option is missing."""
    try:
        importlib.import_module(PACKAGES[option])
    except ImportError:
        raise ValueError(f"--{option} needs {option}: pip install {option}") from None


def mirror(run: Run, unit: str, watching: Watching) -> Callable[[Sequence[dict]], None]:
    """Return what adds records to the mirrors that are asked for, after those of the log."""
    opened = {"tensorboard": EventFiles, "wandb": Wandb}
    mirrors = [
        Mirror(opened[option], run, unit)
        for option in PACKAGES
        if getattr(watching, option) and run.writes
    ]

    def add(records: Sequence[dict]) -> None:
        for each in mirrors:
            each.add(records)

    return add


def scalars(record: dict) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record by name."""
    for name, value in record.items():
        if isinstance(value, (int, float)):
            yield name, value


class Mirror:
    """A log as a mirror shows it, every point once.

    A step is a whole number: records within an epoch are counted, and say their epoch as a scalar.
    What is there is replaced when the first record comes.

    Args:
        open: run -> what takes a step and its figures, a dictionary.
        unit: round or epoch, which every record but a note holds.
    """

    def __init__(self, open: Callable[[Run], Callable[[int, dict], None]], run: Run, unit: str):
        self.open, self.run, self.unit = open, run, unit
        self.write, self.step = None, 0

    def add(self, records: Sequence[dict]) -> None:
        """Write what these records say, after all that the log said before them."""
        if self.write is None:
            records = [*self.run.records(), *records]
            self.write = self.open(self.run)
        for record in records:
            if self.unit not in record:  # a note
                continue
            at = self.unit, self.step
            self.write(self.step, dict(pair for pair in scalars(record) if pair != at))
            self.step += 1


class EventFiles:
    """TensorBoard's event files: <run>/tensorboard/events.*"""

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(run.folder) / "tensorboard"
        for old in folder.glob("events.*"):
            old.unlink()
        # a viewer that has the old files open forgets what they said from step 0 on
        self.writer = SummaryWriter(str(folder), purge_step=0)

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Write the figures of a step."""
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()


PATHS = ("data_dir", "runs_dir", "weights", "mask")  # of this machine: they stay here


class Wandb:
    """A run of Weights & Biases with the run's name and options; WANDB_* settings apply.

    The same run goes on there, and is sent the steps that it does not have.
    """

    def __init__(self, run: Run):
        wandb: Any = importlib.import_module("wandb")
        self.run = wandb.init(
            project="fedavg",
            name=run.folder.name,
            id=f"{run.folder.name}-{run.id()[:12]}",
            config={k: v for k, v in run.config()["options"].items() if k not in PATHS},
            resume="allow",
            reinit=True,  # a search has several runs in a process
        )

    def __call__(self, step: int, figures: dict[str, float]) -> None:
        """Send the figures of a step."""
        if step >= self.run.step:
            self.run.log(figures, step=step)
