"""A run's folder: its options, its log, its checkpoints, and the loop that makes resuming exact.

    config.json      the options that define the run, and what it ran with
    log.jsonl        one JSON object per round or epoch
    checkpoint.pt    torch.save plus a footer; checkpoint.prev.pt is the one before
    summary.json     final and best-by-validation figures, wall time, which run's they are

A checkpoint is written aside, fsynced and renamed, and holds the log of that moment, which a resume
goes back to. Killed at any moment, a run loses at most what came after its last checkpoint, and
repeats that to the same bits when its process is deterministic. Every file that a run reads holds a
SHA-256 of itself and of what it is for, in which run (safe_files.py, which this file takes along).

    from runs import Run, drive
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
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

if __package__:
    from . import safe_files
else:  # copied beside it
    import safe_files

OPENING = ("config.json", "lock", "shards.npz", "head.pt", "mask.pt")  # written before the log
STATES = ("scaffold", "local_norm")  # folders of clients' states
NAMES = (  # of a run's files and folders; none may be a link
    *(*OPENING, "log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "summary.json", "search.json"),
    *("curves.png", "density.png", "per_client.json", "per_client.png"),
    *("search", "tensorboard", *STATES),
)
FORMAT = 1  # of the folder; a folder of another format is refused by number
CHECKPOINT = 2  # the same of a checkpoint
PUT_BACK = "Put the run's own file in its place, or take another --name"


class Interrupted(Exception):
    """A signal asked the run to stop; it has been saved."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


def say(line: str) -> None:
    """Print a line; what the output's encoding cannot hold is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


# ---------------------------------------------------------------------------- the folder


class Run:
    """One run's folder; `open` it with the options, then `restore`, `log` and `save`.

    Args:
        writes: False for all but one of the processes that share a run: they only read.
    """

    def __init__(self, folder: str | Path, writes: bool = True):
        self.folder, self.writes = Path(folder), writes
        self.config_path, self.log_path = self.folder / "config.json", self.folder / "log.jsonl"
        self.checkpoint_path = self.folder / "checkpoint.pt"
        self.previous_path = self.folder / "checkpoint.prev.pt"
        self._log = bytearray()  # what log.jsonl holds
        self._fell_back = False  # on the checkpoint before, the newest being damaged
        self._new: list[Path] = []  # what this object makes before the log
        self._id = None

    def open(self, options: dict, extra: dict | None = None, free: Iterable[str] = ()) -> None:
        """Create the folder, or check that it was made by the same options.

        Args:
            options: values by name, as JSON can hold them (numbers of numpy, paths and tuples are
                taken); all but those named in `free` must equal the folder's.
            extra: what else config.json records (versions, statistics); never compared.

        Raises:
            ValueError: the folder is of other options (they are named), no run's, open in another
                process, or cannot be written; or JSON cannot hold an option.
        """
        options, free = safe_files.as_json(options, "options"), set(free)
        extra = safe_files.as_json(extra or {}, "extra")
        identity = safe_files.seal({name: options[name] for name in set(options) - free})
        self._check_options(options, free, identity)
        if not self.writes:
            return
        try:
            new = [p for p in (*(self.folder / n for n in OPENING), self.folder) if not p.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            safe_files.lock(self.folder)
            self._check_options(options, free, identity)  # another process may have been here
            for folder in (self.folder, *(self.folder / name for name in STATES)):
                safe_files.forget_asides(folder)  # no other process writes here now
            fresh = not self.config_path.exists()
            self._new = new if fresh else []
            config = {"format": FORMAT, "options": options} | extra
            config["id"] = identity if fresh else self.id()
            if fresh or self.config()["options"] != options:
                safe_files.write_json(self.config_path, config, sealed=True)
        except OSError as error:
            raise ValueError(f"cannot write the run folder {self.folder}: {error}") from None

    def check(self, identity: str | None = None) -> None:
        """Raise ValueError where a link stands for a run's file, or others' files are in the way.

        A checkpoint of the run `identity`, or of any, speaks for a folder without config.json.
        """
        safe_files.check_plain(*(self.folder / name for name in NAMES))
        if self.config_path.exists() or not self.folder.is_dir():
            return
        left = ("search", "search.json") if (self.folder / "search").is_dir() else ()  # by --search
        there = [p for p in self.folder.iterdir() if p.name not in left]
        there = [p for p in there if not safe_files.ASIDE.fullmatch(p.name)]
        if all(p.name == "lock" and not p.stat().st_size for p in there):  # of a killed opening
            return
        for path in (self.checkpoint_path, self.previous_path):
            with contextlib.suppress(OSError, safe_files.DamagedFile):
                safe_files.load_checked(path, identity and f"checkpoint of run {identity}")
                return
        raise ValueError(f"{self.folder} is not empty and is no run's folder: take another --name")

    def close(self) -> None:
        """Let other processes open the folder."""
        safe_files.unlock(self.folder)

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Take back a folder that this object made when the block, before the log, refuses."""
        try:
            yield
        except (ValueError, OSError, MemoryError, RuntimeError):
            for path in self._new if not self.log_path.exists() else ():
                with contextlib.suppress(OSError):  # it was not made, or is not empty
                    path.rmdir() if path == self.folder else path.unlink()
            self.close()
            raise

    def config(self) -> dict:
        """Return config.json.

        Raises:
            ValueError: this is no run folder, its config is damaged, or of another format.
        """
        safe_files.check_plain(*(self.folder / name for name in NAMES))
        try:
            config = safe_files.read_json(self.config_path)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{self.folder} is no run folder: it has no config.json") from None
        except safe_files.DamagedFile as error:
            way = "Without it the command that made the run goes on" if self.saved() else PUT_BACK
            raise safe_files.DamagedFile(f"{error}. {way}") from None
        if config.get("format") == FORMAT and isinstance(config.get("options"), dict):
            return config
        raise ValueError(f"{self.config_path}: not of format {FORMAT}, which this version reads")

    def _check_options(self, options: dict, free: set[str], identity: str) -> None:
        self.check(identity)
        stored = self.config()["options"] if self.config_path.exists() else options
        other = "; ".join(
            f"{name} is {stored.get(name)!r} there and {options.get(name)!r} here"
            for name in sorted({*stored, *options} - free)
            if stored.get(name) != options.get(name)
            and json.dumps(stored.get(name)) != json.dumps(options.get(name))  # nan is not nan
        )
        if other:
            raise ValueError(
                f"{self.folder} was made by other options: {other}. Take another --name"
            )

    def id(self) -> str:
        """Return what binds a file to this run: the hash of the options that it was made by."""
        if self._id is None:
            self._id = self.config().get("id")
        if not self._id:
            raise ValueError(f"{self.config_path} holds no id, which this version needs")
        return self._id

    def purpose(self, name: str) -> str | None:
        """Return what a file of this run is for; None in a folder that is no run's."""
        return f"{name} of run {self.id()}" if self.config_path.exists() else None

    def keep(self, name: str, value: Any) -> None:
        """`save_checked` a file of this run, by its name in the folder."""
        safe_files.save_checked(self.folder / name, value, self.purpose(name))

    def kept(self, name: str) -> Any:
        """`load_checked` what was kept under this name; no other file passes for it."""
        try:
            safe_files.check_plain(self.folder / name)
            return safe_files.load_checked(self.folder / name, self.purpose(name))
        except safe_files.WrongFile as error:
            raise safe_files.WrongFile(f"{error}. {PUT_BACK}") from None

    def log(self, record: dict) -> None:
        """Append one record to the log; ValueError names what of it JSON cannot hold."""
        if not self.writes:
            return
        safe_files.check_held(self.folder)
        line = (json.dumps(safe_files.as_json(record, "record")) + "\n").encode()
        try:
            with open(self.log_path, "ab", opener=safe_files.no_link) as file:
                file.write(line)
        except OSError as error:
            raise OSError(f"cannot write {self.log_path}: {error.strerror}") from None
        self._log += line

    def records(self) -> list[dict]:
        """Return the log's records; a last line cut short by a kill is left out."""
        if not self.log_path.exists():
            return []
        with contextlib.suppress(ValueError, RecursionError):
            records = _parsed(self.log_path.read_bytes())
            if all(isinstance(record, dict) for record in records):
                return records
        raise safe_files.DamagedFile(f"{self.log_path} is damaged: a line is no JSON object")

    def vouched_records(self) -> list[dict]:
        """Return the records that the newest whole checkpoint knows; all where there is none."""
        checkpoint = self.load()
        return _parsed(checkpoint["log"]["text"].encode()) if checkpoint else self.records()

    def saved(self) -> bool:
        """Tell whether there is a checkpoint, whole or not."""
        return self.checkpoint_path.exists() or self.previous_path.exists()

    def save(self, state: dict) -> None:
        """Write a checkpoint; the one before, as last restored, stays until then and beside it."""
        if not self.writes:
            return
        safe_files.check_held(self.folder)
        with open(self.log_path, "ab", opener=safe_files.no_link) as file:
            os.fsync(file.fileno())
        fresh, log = self.folder / "checkpoint.new.pt", {"text": self._log.decode()}
        checkpoint = {"format": CHECKPOINT, "state": state, "log": log}
        safe_files.save_checked(fresh, checkpoint, self.purpose("checkpoint"))
        if self.checkpoint_path.exists() and not self._fell_back:
            os.replace(self.checkpoint_path, self.previous_path)
        os.replace(fresh, self.checkpoint_path)
        self._fell_back = False
        safe_files.sync_folder(self.folder)

    def load(self, take: Callable[[Any], object] = lambda state: None) -> dict | None:
        """Return the newest whole checkpoint {"state", "log"}, or None where there is none.

        Args:
            take: called with its state; where a file that this refers to turns out to be damaged or
                gone, the checkpoint before takes its place.

        Raises:
            DamagedFile: there are checkpoints, and none of them can be gone on from.
            ValueError: one is whole, and not the state of this run's process.
        """
        damaged, way = [], f"Delete {self.folder} to start over"
        for path in filter(Path.exists, (self.checkpoint_path, self.previous_path)):
            try:
                checkpoint = safe_files.load_checked(path, self.purpose("checkpoint"))
                if not isinstance(checkpoint, dict) or not {"log", "state"} <= checkpoint.keys():
                    raise safe_files.WrongFile(f"{path} is whole, and no checkpoint of a run")
                if checkpoint.get("format") != CHECKPOINT:
                    reads = f"not of format {CHECKPOINT}, which this version reads"
                    raise ValueError(f"{path}: {reads}; go on with the version that made it")
                with safe_files.contents(path):
                    _parsed(checkpoint["log"]["text"].encode())
                    take(checkpoint["state"])
            except (FileNotFoundError, safe_files.DamagedFile) as error:
                gone = isinstance(error, FileNotFoundError)
                message = f"{error.filename} is gone" if gone else str(error)
                damaged.append(message.removesuffix(f". {PUT_BACK}"))
                if gone or isinstance(error, safe_files.WrongFile):  # nothing is to be deleted
                    way = PUT_BACK
                continue
            for message in damaged:
                say(f"warning: {message}; going on from {path.name}")
            self._fell_back |= bool(damaged)
            return checkpoint
        if damaged:
            raise safe_files.DamagedFile(f"{'; '.join(damaged)}. {way}")
        return None

    def restore(self, take: Callable[[Any], object] = lambda state: None) -> dict | None:
        """Return the state that `load` finds, the log cut back to it; None at the start."""
        checkpoint = self.load(take)
        self._log = bytearray(checkpoint["log"]["text"].encode() if checkpoint else b"")
        if self.writes:
            written = self.log_path.read_bytes() if self.log_path.exists() else b""
            if not written.startswith(self._log):
                say(f"warning: {self.log_path} is not as the checkpoint knows it; written anew")
                safe_files.write_atomically(self.log_path, lambda p: p.write_bytes(self._log))
            elif written != self._log:
                with open(self.log_path, "ab", opener=safe_files.no_link) as file:
                    file.truncate(len(self._log))
        return checkpoint["state"] if checkpoint else None

    def summarise(self, tested: tuple[dict, dict] = ({}, {}), **figures: Any) -> dict:
        """Write and return summary.json: `figures`, the last and the best-by-validation record.

        Args:
            tested: what those two records say beside what the log has.
        """
        records = [record for record in self.records() if "note" not in record]
        summary = {"run": self.id()} | figures
        if records:
            summary["final"] = records[-1] | tested[0]
        if best := best_record(records):
            summary["best_by_validation"] = best | tested[1]
        safe_files.write_json(self.folder / "summary.json", summary, sealed=True)
        return summary

    def summary(self, unbound: bool = False) -> dict | None:
        """Return summary.json, if `unbound` one that names no run too; None without a good one."""
        try:
            return self.sound_summary(unbound)
        except safe_files.DamagedFile as error:
            say(f"warning: {error}; the run's end is repeated")
            return None

    def sound_summary(self, unbound: bool = False) -> dict | None:
        """Return what `summary` does; DamagedFile where summary.json is no good."""
        path = self.folder / "summary.json"
        try:
            summary = safe_files.read_json(path)
        except FileNotFoundError:
            return None
        if not (unbound and "run" not in summary) and summary.get("run") != self.id():
            raise safe_files.WrongFile(f"{path} is not the summary of this run")
        return summary


def folders_below(folder: str | Path) -> list[Path]:
    """Return the run folders at or below a folder, by name; the tries of a search are its part."""
    folders = []
    for at, inside, files in os.walk(folder):
        if {"config.json", "checkpoint.pt"} & set(files):
            folders.append(Path(at))
            inside.clear()
    return sorted(folders)


def _parsed(log: bytes | bytearray) -> list[dict]:
    return [json.loads(line) for line in log.split(b"\n")[:-1]]


def best_record(records: list[dict]) -> dict | None:
    """Return the first record of the highest validation accuracy; None where none has a number."""
    validated = [record for record in records if not math.isnan(record.get("val_acc", math.nan))]
    return max(validated, key=lambda record: record["val_acc"], default=None)


def evaluations_since_best(records: list[dict]) -> int:
    """Count the validated records after the best of them; a NaN is better than none."""
    validated = [record for record in records if "val_acc" in record]
    best = best_record(validated) or next(iter(validated), None)
    return len(validated) - 1 - validated.index(best) if validated else 0


# ---------------------------------------------------------------------------- the loop


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
        if (record := best_record(_parsed(run._log))) is not None:  # of a resumed run's log
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
    before, now = before or {}, now or {}
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)
