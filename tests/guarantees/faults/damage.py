"""Files cut, flipped, emptied or replaced: found and named, never taken for what they were.

The properties work on functions, thousands of times; the rest on whole commands.
"""

from __future__ import annotations

import contextlib
import functools
import io
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import hypothesis
import torch
from hypothesis import strategies as st
from matrix import SMALL
from walk import Walk
from world import Tally, fresh, reference, run

import model as vit
from machine import drive, runs
from training.mask_file import Mask

COMMAND = (
    f"fedavg {SMALL} --rounds 8 --fraction 0.3 --scaffold --head ridge --early-stop 9 "
    "--mask-rule least-sensitive --sparsity 0.5 --calibration-images 40 --calibration-rounds 1 "
    "--eval-every 1 --mask-lr raw"
)
OTHER = f"{COMMAND} --lr 0.02 --seed 1"
STOP = 5  # the round after which the run to be damaged was stopped
OF_A_RUN = (
    *("config.json", "log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "head.pt", "mask.pt"),
    "scaffold/client*.pt",
)


# ---------------------------------------------------------------------------- ways to damage


def cut(raw: bytes, at: float) -> bytes:
    return raw[: int(at * len(raw))]


def flip(raw: bytes, at: float) -> bytes:
    position = int(at * 8 * len(raw))
    byte = raw[position // 8] ^ 1 << position % 8
    return raw[: position // 8] + bytes([byte]) + raw[position // 8 + 1 :]


def lengthen(raw: bytes, at: float) -> bytes:
    return raw + raw[int(at * len(raw)) :]


def empty(raw: bytes, at: float) -> bytes:
    return b""


WAYS = {"cut": cut, "flip": flip, "lengthen": lengthen, "empty": empty}


# ---------------------------------------------------------------------------- functions

damages = st.tuples(
    st.sampled_from(sorted(WAYS)), st.floats(0, 1, exclude_max=True, allow_subnormal=False)
)


def damaged(path: Path, damage: tuple[str, float]) -> bool:
    """Damage a file; returns whether that changed it."""
    whole = path.read_bytes()
    path.write_bytes(WAYS[damage[0]](whole, damage[1]))
    return path.read_bytes() != whole


def walked(folder: Path, rate: int = 0) -> runs.Run:
    """Return a run of 7 rounds whose last two checkpoints are those of rounds 5 and 7."""
    run = runs.Run(folder)
    run.open({"rate": rate})
    for total in (5, 7):
        drive.drive(run, Walk(), "round", total)
    run.summarise(round=7)
    return run


def holds_walk(run: runs.Run) -> bool:
    """Tell whether a run goes on to the bits of one that met nothing."""
    walk, expected = Walk(), Walk()
    drive.drive(run, walk, "round", 9)
    for _ in range(9):
        expected.advance()
    records = [record["round"] for record in run.records()]
    return torch.equal(walk.value, expected.value) and records == list(range(10))


class Properties:
    """What must hold of one damaged file; each method raises AssertionError where it does not."""

    def __init__(self, where: Path):
        self.where = where
        self.run, self.other = walked(where / "run"), walked(where / "other", rate=1)
        self.model = vit.build_vit("vit_demo", 100, 0)
        self.mask_path = where / "mask.pt"
        shapes = {"cls_token": tuple(self.model.cls_token.shape)}
        kept = torch.rand(self.model.cls_token.numel()) < 0.5
        self.mask = Mask(shapes, kept, {"seed": 0})
        self.mask.save(self.mask_path, "this one")

    def victim(self) -> runs.Run:
        return runs.Run(fresh(self.where / "victim", self.run.folder))

    def checkpoint(self, damage) -> None:
        """One damaged checkpoint: its predecessor, or what it was."""
        for name in ("checkpoint.pt", "checkpoint.prev.pt"):
            damaged((run := self.victim()).folder / name, damage)
            assert holds_walk(run)

    def log(self, damage) -> None:
        """A damaged log: written anew from the checkpoint."""
        damaged((run := self.victim()).log_path, damage)
        assert holds_walk(run)

    def json(self, damage) -> None:
        """A damaged config or summary: named, or the same values."""
        for name in ("config.json", "summary.json"):
            changed = damaged((run := self.victim()).folder / name, damage)
            try:
                options, summary = run.config()["options"], run.summary()
            except ValueError as error:
                assert changed and name in str(error)
                continue
            assert options == {"rate": 0} and summary["round"] == 7

    def mask_file(self, damage) -> None:
        """A damaged mask: named, for whichever purpose it is read."""
        path = self.where / "victim.pt"
        shutil.copy(self.mask_path, path)
        changed = damaged(path, damage)
        for purpose in (None, "this one"):
            try:
                mask = Mask.load(path, self.model, purpose)
            except ValueError as error:
                assert changed and str(path) in str(error)
                continue
            assert not changed and mask.sha256 == self.mask.sha256


PROPERTIES = ("checkpoint", "log", "json", "mask_file")


def check_property(tally: Tally, where: Path, name: str, examples: int) -> None:
    """Let Hypothesis look for damage to which a property does not hold, the same each time."""
    kind, holds = f"damaged {name.replace('_', ' ')}, functions", getattr(Properties(where), name)

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(damages)
    def tried(damage):
        tally.of(kind)["tried"] += 1
        with contextlib.redirect_stdout(io.StringIO()):
            holds(damage)
        tally.of(kind)["survived"] += 1

    try:
        tried()
    except Exception as error:  # Hypothesis tries a failing example again and again
        result = "wrong_results" if isinstance(error, AssertionError) else "tracebacks"
        tally.add(kind, result, f"{type(error).__name__}: {error} {error.__notes__}")


# ---------------------------------------------------------------------------- commands


class StopAfter:
    """Sends this process a signal once its log has the record of a round."""

    def __init__(self, round: int, signum: int = signal.SIGTERM):
        self.round, self.signum = round, signum

    def install(self) -> None:
        drive.drive.__kwdefaults__["save_seconds"] = 0.0
        log = runs.Run.log

        def logged(run, record):
            log(run, record)
            if record.get("round") == self.round:
                signal.raise_signal(self.signum)

        runs.Run.log = logged


def damaged_commands(tally: Tally, where: Path, ways: int, seed: int) -> None:
    """Damage each file of a run that was stopped, or of its caches; then type it again."""
    moments, expected = random.Random(seed), reference(where / "whole", COMMAND)
    for name, command in (("half", COMMAND), ("other", OTHER)):
        stopped = run(fresh(where / name), command, StopAfter(STOP).install)
        if stopped.code != 143:
            raise RuntimeError(stopped)
    for pattern in (*(f"runs/x/{name}" for name in OF_A_RUN), "data/features/*", "data/masks/*"):
        paths = in_use(where / "half", pattern)
        others = in_use(where / "other", pattern)
        for index, path in enumerate(paths[: 3 if ways else 1]):
            name = path.relative_to(where / "half")
            other = others[index % len(others)]
            tries = {way: WAYS[way](path.read_bytes(), moments.random()) for way in WAYS}
            for number in range(ways - len(WAYS)):
                way = ("flip", "cut")[number % 2]
                tries[f"{way} {number}"] = WAYS[way](path.read_bytes(), moments.random())
            tries["another run's"] = other.read_bytes()
            tries["deleted"] = None
            if len(paths) > 1:
                tries["its neighbour"] = paths[index - 1].read_bytes()
            few = list(tries.items()) if ways else [moments.choice(list(tries.items()))]
            for way, content in few:
                folder = fresh(where / "victim", where / "half")
                if content is None:
                    (folder / name).unlink()
                else:
                    (folder / name).write_bytes(content)
                kind = f"damaged {Path(pattern).name if 'data' not in pattern else pattern}"
                retry = functools.partial(without, folder, folder / name)
                what = f"{name} {way}"
                named = "runs/x" if name.name == "config.json" else name.name
                options = dict(names=named, retry=retry)
                tally.judge(kind, what, folder, run(folder, COMMAND), expected, **options)


def without(folder: Path, path: Path):
    """Delete what an error named, and type the command again."""
    path.unlink(missing_ok=True)
    return run(folder, COMMAND)


def in_use(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern that the checkpoint needs."""
    found = sorted(folder.glob(pattern))
    if "client" not in pattern:
        return found
    process = torch.load(folder / "runs/x/checkpoint.pt", weights_only=True)["state"]["process"]
    files = set(process["states"]["scaffold"]["files"].values())
    return [path for path in found if path.name in files]


def damaged_evaluations(tally: Tally, where: Path, ways: int, seed: int) -> None:
    """Damage each file of a finished run that an evaluation reads: the same figures, or named."""
    kind, moments = "damaged file, eval --best", random.Random(seed)
    reference(where / "whole", COMMAND)
    command = "eval runs/x --best"
    expected = run(where / "whole", command)
    if expected.code:
        raise RuntimeError(expected)
    for pattern in ("config.json", "checkpoint.pt", "head.pt", "mask.pt", "log.jsonl"):
        path = next(iter((where / "whole" / "runs" / "x").glob(pattern)))
        name = path.relative_to(where / "whole")
        for number in range(ways):
            way = sorted(WAYS)[number % len(WAYS)]
            folder = fresh(where / "victim", where / "whole")
            (folder / name).write_bytes(WAYS[way](path.read_bytes(), moments.random()))
            ended = run(folder, command)
            named, what = name.name in ended.said, f"{name} {way}: {ended.said[-300:]}"
            if "Traceback" in ended.said or ended.code not in (0, 2):
                tally.add(kind, "tracebacks", what)
            elif named or ended.code == 0 and ended.said == expected.said:
                tally.add(kind, "survived")
            else:
                tally.add(kind, "wrong_results", what)


def planned(full: bool) -> list[tuple[str, Callable, tuple]]:
    """Return what to try: name, function, arguments."""
    examples = {"checkpoint": 300, "log": 300, "json": 1000, "mask_file": 2000}
    tries = [
        (f"damaged {name}, functions", check_property, (name, examples[name] if full else 20))
        for name in PROPERTIES
    ]
    tries.append(("damaged files, commands", damaged_commands, (5 if full else 0, 0)))
    tries.append(("damaged files, eval", damaged_evaluations, (8 if full else 1, 0)))
    return tries
