"""How long a run takes on this machine, before it starts: parts that are measured, times their
counts.

    Times(Path("times.json"), tables).seconds_of(cell)

The parts are an image in a local step, in evaluation and in scoring, and a step of heads, measured
once for every model and image size, on a GPU every batch, on generated images; a file keeps them.
Where runs of this machine are done, their row takes what they took, and the estimates of the others
are corrected by the median of what such rows took over what was estimated. Not counted: start-up,
diagnostics, noise, compiling.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fisher
import masks
from commands.options import GROUPS, Command, Line, federation, parse
from machine import safe_files
from machine.device import choose_device, processor
from machine.runs import Run
from study.tables import SECONDS, Cell, Experiment
from training.rounds import make_clients
from training.session import prepare
from training.workspace import Workspace

IMAGES = {  # that train, of an evaluation, in all
    "cifar100": (45_000, 15_000, 60_000),
    "synthetic": (18_000, 7_000, 25_000),
}
PARTS = ("step", "head", "forward", "score")  # seconds of each, as `measure` returns them
FULL = 64  # images that stand for a whole shard
LONG = 1.0  # seconds, from which on a CPU's first time counts
SMALL = 4  # images that a CPU is timed on
STEPS = {"cpu": 1, "cuda": 8}  # local steps that are timed


def nothing(line: Line) -> None:
    """Do nothing: a command that is parsed and not run."""


COMMANDS = {name: Command(nothing, groups) for name, groups in GROUPS.items()}


class Times:
    """Seconds that runs take here.

    Args:
        path: of the file that keeps what was measured.
        tables: experiments and the folders of their runs, whose finished ones refine estimates.
    """

    def __init__(self, path: Path, tables: Iterable[tuple[Experiment, Path]]):
        self.path, self.tables = path, list(tables)
        self.processor = processor(choose_device("auto"))
        self.parts: dict[str, dict[str, float]] = {}
        if path.exists():
            stored = safe_files.read_json(path)
            self.parts = stored["parts"] if stored.get("processor") == self.processor else {}

    def seconds_of(self, cell: Cell) -> float:
        """Return how long a run takes; NaN where a package that it needs is missing here."""
        if (took := self.measured.get((cell.command, cell.options))) is not None:
            return took
        return self.correction * self.estimate(cell.command, cell.options)

    @functools.cached_property
    def measured(self) -> dict[tuple, float]:
        """Return the mean seconds of the finished runs of this machine, by their row's options."""
        took: dict[tuple, list[float]] = {}
        for experiment, folder in self.tables:
            for row in experiment.rows:
                for run in experiment.runs(folder, row):
                    if run.config.get("processor") == self.processor:
                        seconds = SECONDS.of(run.summary)
                        took.setdefault((row.command, row.options), []).append(seconds)
        return {row: float(np.mean(s)) for row, s in took.items() if None not in s}

    @functools.cached_property
    def correction(self) -> float:
        """Return what rows that are done took over what was estimated: the median."""
        pairs = [(took, self.estimate(*row)) for row, took in self.measured.items()]
        return float(np.median([took / e for took, e in pairs if e > 0] or [1.0]))

    @functools.cache  # noqa: B019  (as long as the sweep)
    def estimate(self, command: str, options: tuple[str, ...]) -> float:
        """Return the seconds of a command by its parts."""
        if (line := parsed(command, options)) is None:
            return math.nan
        counted = counts(line.command, line.stored)
        parts = self.of(line.stored) if any(counted.values()) else {}
        return sum(count * parts[name] for name, count in counted.items() if count)

    def of(self, o: dict) -> dict[str, float]:
        """Return the measured parts of a command's setting, from the file or measured now."""
        names = ("model", "image_size", "keep_tokens", "precision", "device")
        if choose_device(o["device"]).type != "cpu":  # where an image takes the same in any batch
            names += ("batch_size",)
        key = json.dumps({"keep_tokens": 1.0} | {name: o[name] for name in names if name in o})
        if key not in self.parts:
            self.parts[key] = measure(o)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = {"processor": self.processor, "parts": self.parts}
            safe_files.write_json(self.path, content)
        return self.parts[key]

    def features(self, rows: Iterable[tuple[str, tuple[str, ...]]]) -> float:
        """Return the seconds of the features that these commands need, each once."""
        settings: dict[tuple, dict] = {}
        for command, options in rows:
            line = parsed(command, options)
            if line and (command == "ridge" or line.stored.get("head") not in (None, "linear")):
                settings[line.stored["model"], line.stored["image_size"]] = line.stored
        return sum(IMAGES[o["data"]][2] * self.of(o)["forward"] for o in settings.values())


@functools.cache
def parsed(command: str, options: tuple[str, ...]) -> Line | None:
    """Return a command line; None where a package that it needs is missing here."""
    try:
        return parse([command, *options], {command: COMMANDS[command]})
    except ValueError:
        return None


def counts(command: str, o: dict) -> dict[str, float]:
    """Return how many images local steps see, how many steps heads take together, and how many
    images are evaluated and scored."""
    alone, (trained, evaluated, _) = o.get("train") == "head", IMAGES[o["data"]]
    rounds, every = o.get("rounds") or o.get("epochs") or 0, o.get("eval_every") or 1
    clients = max(1, round((o.get("fraction") or 1) * (o.get("clients") or 1)))
    steps, batch = 0, o.get("batch_size")
    if command == "fedavg":
        batch = trained // o["clients"] if batch == "full" else batch
        steps = rounds * clients * o["J"]
    elif command == "centralized":
        steps = rounds * math.ceil(trained / batch)
    evaluations = 0 if alone or command == "calibrate" else 1 + rounds / every
    scored = 0.0
    if (rule := o.get("mask_rule")) and masks.needs_scores(rule):
        senders = o["calibration_fraction"] * (o.get("clients") or 1)
        scored = o["calibration_rounds"] * max(o["calibration_images"], senders)
        scored *= 3 if command == "calibrate" else 1  # it compares clients' masks, too
    return {
        "step": 0 if alone else steps * (batch or 0),
        "head": steps / clients if alone else 0,
        "forward": evaluations * evaluated,
        "score": scored,
    }


def measure(o: dict) -> dict[str, float]:
    """Time an image in a local step, in evaluation and in scoring, and a step of ten heads."""
    device = choose_device(o["device"])
    batch = o.get("batch_size") or FULL
    batch = FULL if batch == "full" else batch
    timed = min(batch, SMALL) if device.type == "cpu" else batch
    print(f"timing {o['model']} at {o['image_size']} px ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        line = trial(o, folder, timed, STEPS.get(device.type, 1))
        workspace = Workspace(line.groups.source, line.groups.machine, line.groups.backbone)
        clients = trial_clients(workspace, line, folder)
        learner = clients.learner
        at = torch.arange(timed, device=device)

        def forward() -> None:
            with torch.no_grad():
                learner.logits_of(learner.gather("train", at), None)

        def step() -> None:
            clients.train_client(learner.entries.theta.clone(), 0, round=1)

        parts = {"step": seconds(step, device) / STEPS.get(device.type, 1) / timed}
        parts["forward"] = seconds(forward, device) / timed
        parts["score"] = seconds(scoring(workspace, timed), device) / timed
    return parts | {"head": seconds(head_step(workspace, batch), device)}


def trial(o: dict, folder: str, batch: int, steps: int) -> Line:
    """Return a dense fedavg command of the same model, on generated images and weights."""
    names = ("model", "image_size", "keep_tokens", "precision", "device", "threads")
    words = [f"--{name.replace('_', '-')}={o[name]}" for name in names if o.get(name) is not None]
    words += [f"--batch-size={batch}", f"--J={steps}", f"--data-dir={folder}", "--augment"]
    return parse(
        ["fedavg", "--data", "synthetic", "--weights", "none", "--head", "linear", *words], COMMANDS
    )


def trial_clients(workspace: Workspace, line: Line, folder: str):
    """Return the clients of a trial, whose learner trains everything."""
    o = line.groups
    shards = workspace.shards(o.sharding)
    learner = prepare(
        workspace,
        workspace.build_model(),
        Run(folder),
        shards,
        o.training,
        o.sgd,
        o.head,
        o.masking,
    )
    return make_clients(learner, shards, federation(o), ())


def scoring(workspace: Workspace, images: int) -> Callable[[], object]:
    """Return the scoring of so many images."""
    model, preprocess = workspace.build_model(), workspace.preprocess(torch.float32)
    scorer = fisher.Scorer(model, labels="sampled")
    batch = preprocess(workspace.sets["train"].images[:images])
    return lambda: scorer.diagonal([batch])


def head_step(workspace: Workspace, batch: int) -> Callable[[], object]:
    """Return a step of ten clients' heads on features."""
    width = workspace.build_model(load=False).head.in_features
    features = torch.randn(10, batch, width, device=workspace.device)
    weights = torch.zeros(10, width, workspace.classes, device=workspace.device, requires_grad=True)
    labels = torch.zeros(10 * batch, dtype=torch.int64, device=workspace.device)

    def step() -> None:
        loss = nn.functional.cross_entropy((features @ weights).flatten(0, 1), labels)
        torch.autograd.grad(loss, weights)

    return step


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that something takes, for the second time where the first is short."""
    for _ in range(2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif (took := time.perf_counter() - started) > LONG:
            return took
    return time.perf_counter() - started
