"""The loop that makes resuming exact: advance a process, log its records, save its state.

Killed at any moment, a run loses at most what came after its last checkpoint, and repeats that to
the same bits when its process is deterministic. This file takes runs.py along, which is the folder,
and safe_files.py.

    from drive import drive; from runs import Run
    run = Run("runs/example"); run.open({"rounds": 3})
    class Count:
        round = 0
        def advance(self): self.round += 1; return {"round": self.round}
        def state_dict(self): return {"round": self.round}
        def load_state_dict(self, state): self.round = state["round"]
    drive(run, Count(), "round", 3)
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

if __package__:
    from .runs import Run, best_record, say
else:  # copied beside it
    from runs import Run, best_record, say


class Interrupted(Exception):
    """A signal asked the run to stop; it has been saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying; a second SIGINT interrupts at once.

    None is caught outside the main thread, where Python allows no handler.
    """
    caught: list[int] = []

    def note(signum, frame):
        if signum in caught and signum == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signum)

    main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {s: signal.signal(s, note) for s in signals}
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler or signal.SIG_DFL)  # None: set by no Python


def drive(
    run: Run,
    process: Any,
    unit: str,
    total: int,
    *,
    complete: Callable[[dict], None] = lambda record: None,
    environment: dict | None = None,
    save_seconds: float = 60.0,
    patience: int | None = None,
    weights: Callable[[], Tensor] | None = None,
    gather: Callable[[Any], list] = lambda value: [value],
) -> tuple[float, dict[str, Any]]:
    """Advance `process` to `total` rounds or epochs, logging its records and saving its state.

    Args:
        process: has advance() -> record or None, state_dict(), load_state_dict(state), a counter.
        unit: the counter's name, "round" or "epoch"; every record holds it, or a fraction where
            the process gives records within an epoch.
        complete: fills in a record (say, an evaluation) before it is logged; the log's first
            record, {unit: 0}, stands for the start.
        environment: what may change the last bits; a resume under another one is noted in the log.
        save_seconds: the most work, in seconds, that a kill may cost.
        patience: stop after so many evaluations without a better "val_acc"; None: never.
        weights: returns the tensor that was evaluated. The first of the best by "val_acc" is in the
            state as "best": {"at": round or epoch, "weights": a copy on the CPU}.
        gather: returns the plain value of every process that shares the run, the writing one's
            first; all of them advance, stop and take their state together.

    Returns:
        The wall time of the whole run in seconds, earlier starts included, and the state's
        "best", which is empty where no record has a "val_acc".

    Raises:
        ValueError: the run is beyond `total` already.
        Interrupted: SIGINT or SIGTERM came; the state at the end of the advance in hand is saved.
    """
    with caught_signals() as caught:
        started, best, highest = time.monotonic(), {}, -math.inf

        def note(record: dict) -> None:
            nonlocal highest
            complete(record)
            run.log(record)
            if weights is not None and record.get("val_acc", -math.inf) > highest:
                highest = record["val_acc"]
                best.update(at=record[unit], weights=weights().to("cpu", copy=True))

        def stale() -> bool:  # a function of the log: a resumed run knows it too
            judges = bool(patience) and run.writes
            return gather(judges and evaluations_since_best(run.records()) >= patience)[0]

        before = _begin(run, process, unit, note, environment, best)
        if (record := best_record(run.logged())) is not None:  # of a resumed run's log
            highest = max(highest, record["val_acc"])
        if (reached := getattr(process, unit)) > total:
            raise ValueError(
                f"{run.folder} is at {unit} {reached} already, beyond {total}: "
                f"--{unit}s {reached} or more, or another --name"
            )
        saved, stopped = time.monotonic(), stale()

        def save() -> None:
            nonlocal saved
            wall = before + time.monotonic() - started
            state = {"process": process.state_dict(), "wall_seconds": wall}
            run.save(state | {"environment": environment, "best": best})
            saved = time.monotonic()

        while getattr(process, unit) < total and not stopped:
            record = process.advance()
            if record is not None:
                note(record)
                stopped = "val_acc" in record and stale()
            due = time.monotonic() - saved >= save_seconds
            signals, dues = zip(*gather((caught[0] if caught else 0, due)), strict=True)
            if any(signals):
                save()
                raise Interrupted(max(signals))
            if dues[0]:
                save()
        save()
    run.close()
    return before + time.monotonic() - started, best


def evaluations_since_best(records: list[dict]) -> int:
    """Count the validated records after the best of them; a NaN is better than none."""
    validated = [record for record in records if "val_acc" in record]
    best = best_record(validated) or next(iter(validated), None)
    return len(validated) - 1 - validated.index(best) if validated else 0


def _begin(
    run: Run, process: Any, unit: str, note: Callable, environment: dict | None, best: dict
) -> float:
    """Restore the process and `best`, or log the start; returns earlier starts' wall time."""

    def take(state: dict) -> None:
        process.load_state_dict(state["process"])
        _check_like(state["process"], process.state_dict(), unit)
        best.clear()
        best.update(state.get("best", {}))
        sum([getattr(process, unit), state["wall_seconds"]])  # TypeError for what is no number
        _differences(state["environment"], environment)

    if (state := run.restore(take)) is None:
        note({unit: 0})
        return 0.0
    reached = getattr(process, unit)
    if run.writes:
        say(f"{run.folder} goes on from {unit} {reached}")
    if changes := _differences(state["environment"], environment):
        run.log({"note": f"not bit-exact from {unit} {int(reached) + 1} on: {changes}"})
    return state["wall_seconds"]


def _check_like(stored: Any, restored: Any, where: str) -> None:
    """Raise TypeError where a restored process has other tensors than were stored."""
    if isinstance(restored, dict):
        for name in restored.keys() & stored.keys():
            _check_like(stored[name], restored[name], name)
    elif isinstance(restored, Tensor):
        if (stored.shape, stored.dtype) != (restored.shape, restored.dtype):
            raise TypeError(f"{where} is {tuple(stored.shape)} {stored.dtype}")


def _differences(before: dict | None, now: dict | None) -> str:
    before, now = before or {}, now or {}  # an older version's state has fewer names
    names = [name for name in sorted(before) if before[name] != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)
