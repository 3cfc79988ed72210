"""A run's folder: its options, its log, its checkpoints.

    config.json      the options that define the run, and what it ran with
    log.jsonl        one JSON object per round or epoch
    checkpoint.pt    torch.save plus a footer; checkpoint.prev.pt is the one before, and
                     checkpoint.new.pt a newer one, which a kill kept from its place
    summary.json     final and best-by-validation figures, wall time, which run's they are

A checkpoint is written aside, fsynced and renamed, and holds the log of that moment, which a resume
goes back to. Every file that a run reads holds a SHA-256 of itself and of what it is for, in which
run (safe_files.py, which this file takes along). drive.py has the loop that resumes.

    from runs import Run
    run = Run("runs/example"); run.open({"rounds": 3})
    run.log({"round": 1}); run.save({"round": 1}); run.close()
    Run("runs/example").restore()  # {"round": 1}, and the log of that moment
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if __package__:
    from . import safe_files
else:  # copied beside it
    import safe_files

OPENING = ("config.json", "lock", "shards.npz", "head.pt", "mask.pt")  # written before the log
CHECKPOINTS = ("checkpoint.new.pt", "checkpoint.pt", "checkpoint.prev.pt")  # the newest first
STATES = ("scaffold", "local_norm")  # folders of clients' states
NAMES = (  # of a run's files and folders; none may be a link
    *(*OPENING, *CHECKPOINTS, "log.jsonl", "summary.json", "search.json", "curves.png"),
    *("density.png", "per_client.json", "per_client.png"),
    *("search", "tensorboard", *STATES),
)
FORMAT = 1  # of the folder; a folder of another format is refused by number
CHECKPOINT = 2  # the same of a checkpoint
SAID = 5  # options that a refusal names
PUT_BACK = "Put the run's own file in its place, or take another --name"


def say(line: str) -> None:
    """Print a line; what the output's encoding cannot hold is escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


class Run:
    """One run's folder; `open` it with the options, then `restore`, `log` and `save`.

    Args:
        writes: False for all but one of the processes that share a run: they only read.
    """

    def __init__(self, folder: str | Path, writes: bool = True):
        self.folder, self.writes = Path(folder), writes
        self.config_path, self.log_path = self.folder / "config.json", self.folder / "log.jsonl"
        self._checkpoint_paths = [self.folder / name for name in CHECKPOINTS]
        self.fresh_path, self.checkpoint_path, self.previous_path = self._checkpoint_paths
        self._newest = self.checkpoint_path  # the one last restored or saved
        self._log = bytearray()  # what log.jsonl holds
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
                process, or cannot be written; JSON cannot hold an option, or `extra` has one of
                config.json's own keys.
        """
        options, free = safe_files.as_json(options, "options"), set(free)
        extra = safe_files.as_json(extra or {}, "extra")
        check_free(extra, "config.json", ("format", "options", "id"))
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
        for path in self._checkpoint_paths:
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
        others = [
            f"{name} is {stored.get(name)!r} there and {options.get(name)!r} here"
            for name in sorted({*stored, *options} - free)
            if stored.get(name) != options.get(name)
            and json.dumps(stored.get(name)) != json.dumps(options.get(name))  # nan is not nan
        ]
        if others:
            more = f"; and {len(others) - SAID} more" if len(others) > SAID else ""
            other = "; ".join(others[:SAID]) + more
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

    def save_file(self, name: str, value: Any) -> None:
        """`save_checked` a file of this run, by its name in the folder."""
        if self.writes:
            safe_files.save_checked(self.folder / name, value, self.purpose(name))

    def load_file(self, name: str) -> Any:
        """`load_checked` what was saved under this name; no other file passes for it."""
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
            with open(self.log_path, "ab", 0, opener=safe_files.no_link) as file:
                end, rest = file.tell(), memoryview(line)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(end)  # a part of a line would stand before the next one
                    raise
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

    def logged(self) -> list[dict]:
        """Return the records that this object has restored or logged itself."""
        return _parsed(self._log)

    def vouched_records(self) -> list[dict]:
        """Return the records that the newest whole checkpoint knows; all where there is none."""
        checkpoint = self.load()
        return _parsed(checkpoint["log"]["text"].encode()) if checkpoint else self.records()

    def saved(self) -> bool:
        """Tell whether there is a checkpoint, whole or not."""
        return any(path.exists() for path in self._checkpoint_paths)

    def save(self, state: dict) -> None:
        """Write a checkpoint; the one before, as last restored, stays until then and beside it."""
        if not self.writes:
            return
        safe_files.check_held(self.folder)
        with open(self.log_path, "ab", opener=safe_files.no_link) as file:
            os.fsync(file.fileno())
        if self._newest == self.fresh_path:
            os.replace(self.fresh_path, self.checkpoint_path)
            self._newest = self.checkpoint_path
        log = {"text": self._log.decode()}
        checkpoint = {"format": CHECKPOINT, "state": state, "log": log}
        safe_files.save_checked(self.fresh_path, checkpoint, self.purpose("checkpoint"))
        if self._newest == self.checkpoint_path and self.checkpoint_path.exists():
            os.replace(self.checkpoint_path, self.previous_path)
        os.replace(self.fresh_path, self.checkpoint_path)
        self._newest = self.checkpoint_path
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
        return self._load(take)[1]

    def _load(self, take: Callable[[Any], object]) -> tuple[Path, dict | None]:
        """Return what `load` does, after its path; without any that of the first to be."""
        damaged, way = [], f"Delete {self.folder} to start over"
        for path in filter(Path.exists, self._checkpoint_paths):
            try:
                if (checkpoint := self._read(path)) is None:
                    continue
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
            return path, checkpoint
        if damaged:
            raise safe_files.DamagedFile(f"{'; '.join(damaged)}. {way}")
        return self.checkpoint_path, None

    def _read(self, path: Path) -> dict | None:
        """Return a whole checkpoint; None of a new one that never was whole, or is in place now."""
        try:
            checkpoint = safe_files.load_checked(path, self.purpose("checkpoint"))
        except (FileNotFoundError, safe_files.DamagedFile) as error:
            if path == self.fresh_path and not isinstance(error, safe_files.WrongFile):
                return None
            raise
        if not isinstance(checkpoint, dict) or not {"log", "state"} <= checkpoint.keys():
            raise safe_files.WrongFile(f"{path} is whole, and no checkpoint of a run")
        if checkpoint.get("format") != CHECKPOINT:
            reads = f"not of format {CHECKPOINT}, which this version reads"
            raise ValueError(f"{path}: {reads}; go on with the version that made it")
        return checkpoint

    def restore(self, take: Callable[[Any], object] = lambda state: None) -> dict | None:
        """Return the state that `load` finds, the log cut back to it; None at the start."""
        self._newest, checkpoint = self._load(take)
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

        Raises:
            ValueError: a figure is called run, as what says whose summary it is.
        """
        check_free(figures, "summary.json", ("run",))
        records = [record for record in self.records() if "note" not in record]
        summary = {"run": self.id()} | figures
        if records:
            summary["final"] = records[-1] | tested[0]
        if best := best_record(records):
            summary["best_by_validation"] = best | tested[1]
        safe_files.write_json(self.folder / "summary.json", summary, sealed=True)
        return summary

    def summary(self, unbound: bool = False) -> dict | None:
        """Return summary.json, if `unbound` one that names no run too; None where there is none.

        Raises:
            DamagedFile: it is no good, or another run's.
        """
        path = self.folder / "summary.json"
        try:
            summary = safe_files.read_json(path)
        except FileNotFoundError:
            return None
        if not (unbound and "run" not in summary) and summary.get("run") != self.id():
            raise safe_files.WrongFile(f"{path} is not the summary of this run")
        return summary


def check_free(values: dict, name: str, reserved: Iterable[str]) -> None:
    """Raise ValueError where values have a key that a file uses itself."""
    for key in reserved:
        if key in values:
            raise ValueError(f"{key!r} is a key of {name}'s own: choose another")


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
