"""Two processes of one thread against one process of two, and of one, round by round of one run.

    python bench/bench_ranks.py [--settings vit_demo vit_468k] [--rounds 12] [--repeat 3]
    python bench/bench_ranks.py --settings vit_ti16 --rounds 3 --data-dir data --weights FILE

Runs `train.py fedavg` with --processes 2 and without, in turn, and takes the seconds of each round
from the logs (the first is left out). Data are synthetic without --data-dir, weights random without
--weights. The final weights of two processes must be those of one process of one thread, to the
bit. vit_468k is vit_demo twice as wide and deep.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from timing import ROOT, quantiles, write_csv

import data
import model
from machine.runs import Run

SETTINGS = {
    "vit_demo": "--model vit_demo --image-size 32 --batch-size 8",
    "vit_468k": "--model vit_468k --image-size 32 --batch-size 8",
    "vit_ti16": "--model vit_ti16 --image-size 64 --batch-size 32",
}
GOALS = {"vit_demo": 1.3, "vit_468k": 1.1, "vit_ti16": 1.3}
SHAPES = {
    "1 process x 2 threads": "--processes 1 --threads 2",
    "1 process x 1 thread": "--processes 1 --threads 1",
    "2 processes x 1 thread": "--processes 2",
}
SHARED = "--head linear --J 4 --lr 0.001 --eval-every 100000 --val-fraction 0.02"
TESTED = 1000  # images, for the evaluations before and after are not timed


def run(setting: str, shape: str, options: argparse.Namespace) -> tuple[list, torch.Tensor]:
    """Return the seconds of the rounds after the first, and the final parameters."""
    source = f"cifar100 --data-dir {options.data_dir}" if options.data_dir else "synthetic"
    command = [sys.executable, __file__, "--train", "fedavg", "--data", *source.split()]
    command += [*SHARED.split(), *SETTINGS[setting].split(), *SHAPES[shape].split()]
    command += ["--weights", options.weights, "--rounds", f"{options.rounds}"]
    with tempfile.TemporaryDirectory() as folder:
        command += ["--runs-dir", folder, "--name", "x"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        finished = Run(Path(folder) / "x")
        theta = finished.load()["state"]["process"]["theta"]
        return [r["seconds"] for r in finished.records()[2:]], theta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(GOALS)[:2])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--data-dir", help="of CIFAR-100")
    parser.add_argument("--weights", default="none")
    parser.add_argument("--csv", type=Path, default=ROOT / "results/bench/ranks.csv")
    options = parser.parse_args()
    rows, load = [], os.getloadavg()[0]
    for setting in options.settings:
        seconds, thetas = {shape: [] for shape in SHAPES}, {}
        for _ in range(options.repeat):
            for shape, rounds in seconds.items():
                more, thetas[shape] = run(setting, shape, options)
                rounds.append(more)
        assert torch.equal(*[theta for shape, theta in thetas.items() if "1 thread" in shape])
        for shape, rounds in seconds.items():
            rows.append({"setting": setting, "figure": f"{shape}, s a round"} | quantiles(rounds))
        threads, single, pair = (np.ravel(rounds) for rounds in seconds.values())
        for other, slower in zip(SHAPES, (threads, single), strict=False):
            figure = f"{other} over 2 processes, paired"
            rows.append({"setting": setting, "figure": figure} | quantiles(slower / pair))
        rows[-2]["goal"] = GOALS[setting]
        print(*rows[-5:], sep="\n")
    note = "each process's threads are in the figure's name"
    write_csv(options.csv, rows, note=note, load=f"{load:.1f} before the start")


def few_tested(load):
    """Return a data set's loader that keeps few of the test images."""

    def loaded(folder: str) -> data.Dataset:
        dataset = load(folder)
        return dataset._replace(test=data.ImageSet(*(x[:TESTED] for x in dataset.test)))

    return loaded


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        model.MODELS["vit_468k"] = model.ViTShape(96, 4, 3, patch=8, grid=4)
        for name, entry in data.DATASETS.items():
            data.DATASETS[name] = entry._replace(load=few_tested(entry.load))
        sys.argv = [str(ROOT / "train.py"), *sys.argv[2:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
