"""Seconds until the accuracy that a plain PyTorch loop has after 40 rounds. CIFAR-100, CPU.

    python bench/bench_time_to_accuracy.py [--settings NAME ...] [--turns 10] [--data-dir data]

Real images, a ViT-Ti/16 with ImageNet weights, 100 iid clients, C = 0.1, J = 4, B = 32, momentum
0.9, random crops and flips. `plain` is the loop of bench_peers.py that is called usual: 64 px, a
linear head from zero, everything trains. All other settings are this project's, and say what
they leave out. The target is plain's last validation accuracy, the best of its learning rates.

Accuracies and times are measured apart: other work on the machine changes only the times.
First each setting runs, and its validation accuracy (all 5,000 images) goes to NAME_curves.csv;
what is there already is not run again. With --to-target a setting ends where it has the target: the
ridge heads at 224 px do before their one round.
Then the settings take turns, one client each, on generated images. NAME.csv has one row a setting:
seconds = start_s + rounds * round_s. start_s is what precedes round 1 once images and weights are
in memory, fitting a head and the features for it; round_s is ten times the median client. A picture
is drawn beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_peers import plain_usual
from timing import ROOT, interleaved, keep_memory, quantiles, write_csv
from work import Work, build_learner, build_loop, one_round, opened

import data
from study import plots
from training.features import set_fitted_head
from training.workspace import Workspace

SHARED = (
    "fedavg --model vit_ti16 --clients 100 --fraction 0.1 --J 4 --batch-size 32 --augment "
    "--precision fp32 --device cpu"
)
LINEAR = "--head linear --lr 0.03"
RIDGE = "--head ridge --head-images 5000"
MOMENTUM = "--server fedavgm --server-momentum 0.5 --schedule cosine --rounds 24"
SETTINGS = {
    "plain, lr 0.03": f"--image-size 64 {LINEAR}",
    "plain, lr 0.01": "--image-size 64 --head linear --lr 0.01 --rounds 8",
    "plain, lr 0.1": "--image-size 64 --head linear --lr 0.1 --rounds 4",
    "whole": f"--image-size 64 {LINEAR} --rounds 8",  # plain's weights, by this project's loop
    "momentum": f"--image-size 64 {LINEAR} {MOMENTUM}",
    "momentum, half of the tokens": f"--image-size 64 {LINEAR} {MOMENTUM} --keep-tokens 0.5",
    "momentum, 48 px": f"--image-size 48 {LINEAR} {MOMENTUM}",
    "momentum, blocks 6 to 11": f"--image-size 64 {LINEAR} {MOMENTUM} --train blocks.6",
    "half of the tokens": f"--image-size 64 {LINEAR} --keep-tokens 0.5 --rounds 24",
    "a quarter of the tokens": f"--image-size 64 {LINEAR} --keep-tokens 0.25 --rounds 24",
    "ridge of all images": "--image-size 64 --head ridge --lr 0.01 --rounds 8",
    "ridge of 5,000": f"--image-size 64 {RIDGE} --lr 0.01 --rounds 8",
    "ridge of 5,000, half of the tokens": (
        f"--image-size 64 {RIDGE} --lr 0.01 --rounds 8 --keep-tokens 0.5"
    ),
    "ridge of 5,000, 96 px, a quarter of the tokens": (
        f"--image-size 96 {RIDGE} --lr 0.01 --rounds 8 --keep-tokens 0.25"
    ),
    "ridge of 1,000, 224 px": "--image-size 224 --head ridge --head-images 1000 --rounds 1",
    "ridge of 5,000, 224 px": f"--image-size 224 {RIDGE} --rounds 1",
}
PACED = SETTINGS | {  # of no accuracy here: 60,000 images' activations pay over more rounds
    "blocks 8 to 11": f"--image-size 64 {LINEAR} --train blocks.8",
    "blocks 8 to 11, activations kept": f"--image-size 64 {LINEAR} --train blocks.8 --no-augment",
}
PIECES = "rows come from several commands; these lines are the last one's"
LEVELS = {"30": 0.3, "40": 0.4, "50": 0.5}  # whose times the table shows beside the target's


class Progress:
    """Times what precedes the first round, and evaluates every so many rounds."""

    def __init__(self, setting: str, workspace: Workspace, every: int, rounds: int):
        self.setting, self.workspace, self.every, self.rounds = setting, workspace, every, rounds
        self.round, self.curve = -1, []
        self.started, self.start_s = time.perf_counter(), None

    def tick(self, model: torch.nn.Module) -> None:
        """Call this once before the first round, then after every round."""
        self.start_s = self.start_s or round(time.perf_counter() - self.started, 2)
        self.round += 1
        if self.round % self.every == 0 or self.round == self.rounds:
            accuracy = validation_accuracy(self.workspace, model)
            print(f"{self.setting}: round {self.round}, validation accuracy {accuracy}", flush=True)
            point = {"setting": self.setting, "options": SETTINGS[self.setting]}
            point |= {"start_s": self.start_s, "round": self.round, "val_acc": accuracy}
            self.curve.append(point)


@torch.no_grad()
def validation_accuracy(workspace: Workspace, model: torch.nn.Module) -> float:
    """Return a model's accuracy on all validation images."""
    (images, labels), preprocess = workspace.sets["train"], workspace.preprocess()
    parts = torch.from_numpy(workspace.val_index).split(workspace.eval_batch)
    right = sum((model(preprocess(images[i])).argmax(1) == labels[i]).sum().item() for i in parts)
    return right / len(workspace.val_index)


class Plain(Work):
    """The plain loop's work on real images, cropped and flipped as this project does it."""

    def batches(self, client: int, round: int):
        """Return the client's (images, labels) batches of a DataLoader, uint8, then augmented."""
        for (x, y), draws in zip(
            super().batches(client, round), self.draws(client, round), strict=True
        ):
            draws[:, 0] = torch.arange(len(x))
            yield data.crop_and_flip(x, draws), y


def run_project(
    workspace: Workspace, options: SimpleNamespace, progress: Progress, target: float
) -> None:
    """Run this project's loop until it has `target`, at most progress.rounds rounds."""
    with tempfile.TemporaryDirectory() as folder:
        workspace.source = workspace.source._replace(data_dir=folder)  # no features of other runs
        model = workspace.build_model()
        progress.started = time.perf_counter()
        if options.head.head != "linear":
            set_fitted_head(workspace, model, options.head.head, options.head.head_images)
        learner = build_learner(workspace, options, model)
        learner.keep_activations()
        loop = build_loop(learner, options)
        progress.tick(model)
        while progress.round < progress.rounds and progress.curve[-1]["val_acc"] < target:
            one_round(loop)
            learner.entries.load(loop.theta)
            progress.tick(model)


def run(setting: str, target: float, options: argparse.Namespace) -> list[dict]:
    """Run one setting; returns its evaluations."""
    weights = f"--weights {options.data_dir / 'vit_tiny_patch16_224.pth'}"
    shared = f"{SHARED} {weights} --data-dir {options.data_dir} --threads {options.threads}"
    arguments = f"{shared} --rounds {options.rounds} {SETTINGS[setting]}"
    if setting.startswith("plain"):
        work = Plain(arguments)
        progress = Progress(setting, work.workspace, options.eval_every, work.rounds)
        work.tick = progress.tick
        plain_usual(work)
    else:
        o, workspace = opened(arguments)
        progress = Progress(setting, workspace, options.eval_every, o.rounds.rounds)
        run_project(workspace, o, progress, target)
    return progress.curve


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a file of `write_csv`, their numbers as numbers."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [{k: number(v) for k, v in row.items() if v} for row in rows]


def number(text: str) -> str | float:
    """Return the number that a cell holds, or its text."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def read_curves(path: Path) -> dict[str, list[dict]]:
    """Return the evaluations that a file holds, by setting."""
    curves = {}
    for row in read_rows(path):
        curves.setdefault(row["setting"], []).append(row)
    return curves


def read_paces(path: Path) -> dict[str, dict]:
    """Return what `pace` measured, from the table that it went to."""
    measured = ("round_s", "to_whole_median", "to_whole_p20", "to_whole_p80")
    return {row["setting"]: {k: row[k] for k in measured} for row in read_rows(path)}


def best_plain(curves: dict[str, list[dict]]) -> dict:
    """Return the last evaluation of the plain loop under its best learning rate."""
    ends = [curve[-1] for setting, curve in curves.items() if setting.startswith("plain")]
    return max(ends, key=lambda point: point["val_acc"], default={"val_acc": math.inf})


def prepare(setting: str, threads: int) -> Callable[[], object]:
    """Return a call that trains a setting's next client, on generated images."""
    shared = f"{SHARED} --data synthetic --weights none --threads {threads} {PACED[setting]}"
    if setting.startswith("plain"):
        work, turn = Plain(shared), itertools.count()
        model = work.workspace.build_model()
        total = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}

        def client() -> None:
            local = copy.deepcopy(model)
            work.local_training(local, next(turn), 1)
            for name, value in local.state_dict().items():
                total[name] = total[name] + value

        return client
    options, workspace = opened(shared)
    learner = build_learner(workspace, options)  # its head is not fitted, but frozen as in a run
    learner.keep_activations()
    return build_loop(learner, options).advance


def pace(settings: Iterable[str], turns: int, threads: int) -> dict[str, dict]:
    """Return each setting's seconds a round, and its ratio to the whole's, client by client."""
    seconds = interleaved({name: prepare(name, threads) for name in settings}, turns)
    paces = {}
    for name, values in seconds.items():
        round_s = {"round_s": quantiles(10 * values)["median"]}
        paces[name] = round_s | {
            f"to_whole_{k}": v for k, v in quantiles(values / seconds["whole"]).items()
        }
    return paces


def summaries(curves: dict[str, list[dict]], paces: dict[str, dict]) -> list[dict]:
    """Return a row for each setting: its pace, where it ends, and when it has which accuracy."""
    plain, rows = best_plain(curves), []
    plain_s = plain["round"] * paces[plain["setting"]]["round_s"]
    for setting, rate in paces.items():
        row = {"setting": setting, "options": PACED[setting], **rate}
        rows.append(row)
        if setting not in curves:
            continue
        curve = curves[setting]
        row |= {"start_s": curve[0]["start_s"], "rounds": curve[-1]["round"]}
        row |= {"start_acc": curve[0]["val_acc"], "last_acc": curve[-1]["val_acc"]}
        for name, level in (*LEVELS.items(), ("target", plain["val_acc"])):
            first = next((p["round"] for p in curve if p["val_acc"] >= level), None)
            if first is not None:
                row[f"s_to_{name}"] = round(row["start_s"] + first * rate["round_s"], 1)
        if "s_to_target" in row:
            row["plain_to_it"] = round(plain_s / row["s_to_target"], 2)
    return rows


def draw(curves: dict[str, list[dict]], paces: dict[str, dict], path: Path) -> None:
    """Draw accuracy against seconds."""
    plt = plots.pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    timed = {setting: curve for setting, curve in curves.items() if setting in paces}
    for i, (setting, curve) in enumerate(timed.items()):
        x = [curve[0]["start_s"] + p["round"] * paces[setting]["round_s"] for p in curve]
        style = dict(color=plots.PALETTE[i % 7], linestyle=("-", "--", ":")[i // 7 % 3])
        axes.plot(x, [100 * p["val_acc"] for p in curve], marker=".", label=setting, **style)
    axes.axhline(100 * best_plain(curves)["val_acc"], color="grey", linewidth=0.8)
    axes.set(xlabel="seconds", ylabel="validation accuracy (%)")
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    print(f"see {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="*", choices=tuple(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=40, help="where a setting has none")
    parser.add_argument("--to-target", action="store_true", help="stop a setting that has it")
    parser.add_argument("--eval-every", type=int, default=4, metavar="ROUNDS")
    parser.add_argument("--turns", type=int, default=10, help="clients timed; 0: as in --csv")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default="results/bench/time_to_accuracy.csv")
    options = parser.parse_args()
    points = options.csv.with_name(options.csv.stem + "_curves.csv")
    curves = read_curves(points)
    for setting in options.settings:
        if setting in curves:
            print(f"{setting}: in {points} already")
            continue
        target = best_plain(curves)["val_acc"] if options.to_target else math.inf
        curves[setting] = run(setting, target, options)
        write_csv(points, [point for curve in curves.values() for point in curve], pieces=PIECES)
    if options.turns:
        paces = pace(PACED, options.turns, options.threads)
    else:
        paces = read_paces(options.csv)
    if paces:
        write_csv(options.csv, summaries(curves, paces), pieces=PIECES)
        draw(curves, paces, options.csv.with_suffix(".png"))


if __name__ == "__main__":
    keep_memory()
    main()
