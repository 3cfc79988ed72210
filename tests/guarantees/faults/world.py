"""What all faults share: small runs in forked children, what they come to, and the tally.

One process imports everything once and forks: a start costs seconds, a fork costs milliseconds. It
must not run a parallel operation before it forks, hence the single thread. As a script this is
train.py on the small data, for the faults that need processes of their own; a sweep's processes
import it too.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "leaves")]

import torch  # noqa: E402

torch.set_num_threads(1)

import data  # noqa: E402
import train  # noqa: E402
from commands import centralized, fedavg  # noqa: E402
from machine import drive  # noqa: E402
from machine.safe_files import SEAL  # noqa: E402
from training import run_folder  # noqa: E402

SMALL = data.synthetic_dataset(samples_per_class=10)
data.synthetic_dataset = lambda: SMALL
run_folder.git_commit = lambda: "faults"  # quicker; so are curves that nobody sees
fedavg.plot_curves = centralized.plot_curves = lambda logs, path: Path(path).touch()
SAVE_SECONDS = 0.05  # between checkpoints; a run outside these tests has 60
drive.drive.__kwdefaults__["save_seconds"] = SAVE_SECONDS
UNEQUAL = ("seconds", "wall_seconds", "date", "environment", "commit", "log", SEAL)  # of equal runs
UNCOUNTED = ("config.json", "checkpoint.prev.pt", "checkpoint.new.pt", "lock")


class Ended(NamedTuple):
    """How a process ended: status, or minus the signal that killed it, and what it said."""

    code: int
    said: str


class Child:
    """One command in a forked process, in a folder of its own, under runs/x and data/."""

    def __init__(self, folder: Path, command: str, prepare: Callable[[], None] = lambda: None):
        folder.mkdir(exist_ok=True)
        self.said, self.code = tempfile.TemporaryFile("w+"), None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(self.said.fileno(), 1)
            os.dup2(self.said.fileno(), 2)
            status = 1
            try:
                os.chdir(folder)
                prepare()
                status = train.main([*command.split(), "--threads", "1"])
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)

    def kill(self, signum: int = signal.SIGKILL) -> None:
        """Send it a signal, if it is there."""
        if not self.ended():
            os.kill(self.pid, signum)

    def ended(self, flags: int = os.WNOHANG) -> bool:
        """Tell whether it has ended."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, flags)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def end(self) -> Ended:
        """Wait for its end."""
        self.ended(flags=0)
        self.said.seek(0)
        return Ended(self.code, self.said.read())


def run(folder: Path, command: str, prepare: Callable[[], None] = lambda: None) -> Ended:
    """Run one command to its end."""
    return Child(folder, command, prepare).end()


def canonical(value: Any) -> Any:
    """Return a value that is equal for runs whose bits are equal."""
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(raw).hexdigest()
    if isinstance(value, dict):
        return {k: canonical(v) for k, v in value.items() if k not in UNEQUAL}
    return [canonical(v) for v in value] if isinstance(value, list | tuple) else value


def outcome(folder: Path) -> dict[str, Any]:
    """Return what a finished run holds, times aside: name of a file -> its values."""
    found = {}
    for path in sorted((folder / "runs" / "x").rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in UNCOUNTED or path.suffix not in (".pt", ".json", ".jsonl", ".npz"):
            continue
        if path.name.startswith("clients-"):
            continue
        if path.suffix == ".pt":
            found[name] = canonical(with_vectors(path))
        elif path.suffix == ".npz":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            found[name] = [canonical(json.loads(line)) for line in lines]
    return found


def with_vectors(path: Path) -> Any:
    """Load a file; a checkpoint with its clients' vectors in place of the files that hold them."""
    content = torch.load(path, weights_only=True)
    states = content["state"]["process"].get("states", {}) if path.stem == "checkpoint" else {}
    for name, state in states.items():
        if files := state.pop("files", None):  # which saves wrote them depends on when they came
            parts = {
                f: torch.load(path.parent / name / f, weights_only=True) for f in {*files.values()}
            }
            state.update(saves=None, vectors={k: parts[f][k] for k, f in sorted(files.items())})
    return content


class Tally:
    """By kind of fault, what was tried and what came of it."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict] = {}

    def of(self, kind: str) -> dict:
        """Return the figures of a kind."""
        names = ("tried", "survived", "lost_runs", "wrong_results", "tracebacks")
        return self.kinds.setdefault(kind, dict.fromkeys(names, 0) | {"failures": []})

    def add(self, kind: str, result: str, what: str = "", times: int = 1) -> None:
        """Count faults whose result is "survived", "lost_runs", "wrong_results" or "tracebacks"."""
        figures = self.of(kind)
        figures["tried"] += times
        figures[result] += times
        if result != "survived":
            figures["failures"].append(what)

    def judge(
        self,
        kind: str,
        what: str,
        folder: Path,
        ended: Ended,
        expected: dict,
        *,
        names: str = "",
        retry: Callable[[], Ended] | None = None,
        times: int = 1,
    ) -> None:
        """Count how a run ended that met a fault.

        Args:
            expected: the `outcome` of the run that met none.
            names: what an error of status 2 must name.
            retry: mends what the error names and runs again; without it an error is a lost run.
        """
        if ended.code == 2 and retry is not None:
            lines = ended.said.strip().splitlines()
            if "Traceback" in ended.said or names not in lines[-1] or "error: " not in lines[-1]:
                self.add(kind, "tracebacks", f"{what}: {ended.said[-600:]}", times)
                return
            ended = retry()
        if "Traceback" in ended.said or ended.code not in (0, 2):
            self.add(kind, "tracebacks", f"{what}: {ended.code} {ended.said[-600:]}", times)
        elif ended.code == 2:
            self.add(kind, "lost_runs", f"{what}: {ended.said[-300:]}", times)
        elif (found := outcome(folder)) != expected:
            differ = [n for n in {*found, *expected} if found.get(n) != expected.get(n)]
            self.add(kind, "wrong_results", f"{what}: other {differ}", times)
        else:
            self.add(kind, "survived", times=times)


def lines(folder: Path) -> int:
    """Return how many lines the log of a folder's run has."""
    log = folder / "runs" / "x" / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until something holds."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError
        time.sleep(0.01)


def fresh(folder: Path, like: Path | None = None) -> Path:
    """Return an empty folder, or one like another."""
    shutil.rmtree(folder, ignore_errors=True)
    if like is None:
        folder.mkdir(parents=True)
    else:
        shutil.copytree(like, folder)
    return folder


def reference(folder: Path, command: str) -> dict:
    """Run a command that meets no fault; returns its outcome."""
    ended = run(fresh(folder), command)
    if ended.code:
        raise RuntimeError(f"{command}: {ended}")
    return outcome(folder)


if __name__ == "__main__":
    from study import experiments, tables

    TINY = (
        "--data",
        "synthetic",
        "--clients",
        "10",
        "--J",
        "2",
        "--threads",
        "1",
        "--rounds",
        "60",
    )
    ROWS = tuple(tables.Row((name,), TINY, (0.1,), widened=0) for name in ("a", "b", "c", "d"))
    experiments.at_scale = lambda *scale: {"rules": tables.Experiment(("row",), ROWS)}
    sys.exit(train.main())
