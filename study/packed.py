"""A table's runs in one file: a line a run, with its options, versions, machine, end and log.

    <table>/runs.jsonl    a line: {"name", "config", "summary", "records"}; .xz: compressed

A run that still has a folder of its own beside the file is read in the same way. Of logs of LONG
records and more the file has those with an evaluation alone.
"""

from __future__ import annotations

import functools
import json
import lzma
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from machine import safe_files
from machine.runs import Run

FILE = "runs.jsonl"
LONG = 500


class Finished(NamedTuple):
    """A run that is done, as its folder has it."""

    name: str
    config: dict
    summary: dict
    records: list[dict]

    @classmethod
    def of(cls, run: Run) -> Finished | None:
        """Return what a run's folder says; None of a run that is not done.

        Raises:
            DamagedFile: it is done, and its config or its log cannot be read.
        """
        if (summary := run.summary(unbound=True)) is None:
            return None
        return cls(run.folder.name, safe_files.read_json(run.config_path), summary, run.records())


def finished(folder: Path, name: str) -> Finished | None:
    """Return a run of the table in `folder`: its line, or what its own folder says; or None."""
    line = read(folder / FILE).get(name)
    return Finished.of(Run(folder / name)) if line is None else line


def read(path: Path) -> dict[str, Finished]:
    """Return the runs of a table's file by name; none where there is no file.

    Raises:
        DamagedFile: a line is no run.
    """
    try:
        state = path.stat()
    except FileNotFoundError:
        return {}
    return _read(path, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=64)
def _read(path: Path, *state: int) -> dict[str, Finished]:
    runs = (Finished(*map(line.get, Finished._fields)) for line in lines(path, Finished._fields))
    return {run.name: run for run in runs}


def lines(path: Path, fields: Iterable[str]) -> list[dict]:
    """Return a file's lines, each an object that has these fields.

    Raises:
        DamagedFile: a line is no such object.
    """
    try:
        with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
            objects = [json.loads(line) for line in file]
        if all(isinstance(line, dict) and line.keys() >= {*fields} for line in objects):
            return objects
    except (ValueError, EOFError, lzma.LZMAError, RecursionError):
        pass
    raise safe_files.DamagedFile(f"{path} is damaged: a line of it is no run")


def write(path: Path, objects: Iterable[dict]) -> None:
    """Write a file of these lines in place of the one that is there."""
    text = "".join(json.dumps(line) + "\n" for line in objects).encode()
    packed = lzma.compress(text) if path.suffix == ".xz" else text
    safe_files.write_atomically(path, lambda aside: aside.write_bytes(packed))


def add(folder: Path, runs: Iterable[Finished]) -> None:
    """Put runs into a table's file, those of the same name in the place of what it has."""
    stored = read(folder / FILE) | {run.name: run._replace(records=short(run)) for run in runs}
    write(folder / FILE, (stored[name]._asdict() for name in sorted(stored)))


def short(run: Finished) -> list[dict]:
    """Return the log as the file has it."""
    if len(run.records) < LONG:
        return run.records
    return [record for record in run.records if "val_acc" in record]


def pack(folder: Path, name: str, keep: bool = False) -> None:
    """Move a run that is done from its own folder into its table's file; keep: copy it."""
    if run := Finished.of(Run(folder / name)):
        add(folder, [run])
        if not keep:
            shutil.rmtree(folder / name)
