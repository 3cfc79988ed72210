"""TensorBoard's event files as a mirror of a run's log; nothing else reads them.

    <run>/tensorboard/events.*    a scalar per number of a record, at its round or epoch

A step is a whole number: records within an epoch are counted, and say their epoch as a scalar.

The files are written anew from the log when a run goes on, so that no point appears twice; needs
the tensorboard package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path


def check_tensorboard() -> None:
    """Raise ValueError, with what to install, where TensorBoard's package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ValueError("--tensorboard needs tensorboard: pip install tensorboard") from None


class EventFiles:
    """Event files that follow a log; what is there is replaced when the first record comes.

    Args:
        folder: the run's.
        unit: round or epoch, which every record but a note holds.
        earlier: returns the records that the log holds already.
    """

    def __init__(self, folder: Path, unit: str, earlier: Callable[[], list[dict]]):
        self.folder, self.unit, self.earlier = folder / "tensorboard", unit, earlier
        self.writer, self.step = None, 0

    def add(self, records: Sequence[dict]) -> None:
        """Write what these records say, after all that the log said before them."""
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            records = [*self.earlier(), *records]
            for old in self.folder.glob("events.*"):
                old.unlink()
            # a viewer that has the old files open forgets what they said from step 0 on
            self.writer = SummaryWriter(str(self.folder), purge_step=0)
        for record in records:
            if self.unit not in record:  # a note
                continue
            for name, value in record.items():
                if isinstance(value, (int, float)) and (name, value) != (self.unit, self.step):
                    self.writer.add_scalar(name, value, self.step)
            self.step += 1
        self.writer.flush()
