"""A table's runs in one file: a line a run, with its options, versions, machine, end and log.

    <table>/runs.jsonl    a line: {"name", "config", "summary", "records"}; .xz: compressed

A run that still has a folder of its own beside the file is read in the same way. Of logs of LONG
records and more the file has those with an evaluation alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import lzma
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from machine import safe_files
from machine.runs import Run
from study import past
from study.past import Past

FILE = "runs.jsonl"
FIELDS = Past._fields[:4]  # of a run's past, those that a line has
LONG = 500


def run_of(folder: Path, name: str) -> Past | None:
    """Return a run of the table in `folder`: its line, or what its own folder says.

    None of a run that is not done.
    """
    if (line := read(folder / FILE).get(name)) is not None:
        return line
    return past.read(folder / name) if _ended(folder / name) else None


def _ended(folder: Path) -> bool:
    """Tell whether a run has a good summary; without one, its end is to be repeated."""
    with contextlib.suppress(safe_files.DamagedFile):
        return Run(folder).summary(unbound=True) is not None
    return False


def read(path: Path) -> dict[str, Past]:
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
def _read(path: Path, *state: int) -> dict[str, Past]:
    return {line["name"]: unpacked(line) for line in lines(path, FIELDS)}


def unpacked(line: Mapping) -> Past:
    """Return the run of a line."""
    return Past(*(line[field] for field in FIELDS))


def line_of(run: Past) -> dict:
    """Return the line of a run; of a long log it has the evaluations."""
    line = {field: getattr(run, field) for field in FIELDS}
    if len(run.records) < LONG:
        return line
    return line | {"records": [record for record in run.records if "val_acc" in record]}


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


def add(folder: Path, runs: Iterable[Past]) -> None:
    """Put runs into a table's file, those of the same name in the place of what it has."""
    stored = read(folder / FILE) | {run.name: run for run in runs}
    write(folder / FILE, (line_of(stored[name]) for name in sorted(stored)))


def pack(folder: Path, name: str, keep: bool = False) -> None:
    """Move a run that is done from its own folder into its table's file; keep: copy it.

    Raises:
        DamagedFile: it is done, and its config or its log cannot be read.
    """
    if not _ended(folder / name):
        return
    run = past.read(folder / name)
    if run.fault:
        raise safe_files.DamagedFile(run.fault)
    add(folder, [run])
    if not keep:
        shutil.rmtree(folder / name)
