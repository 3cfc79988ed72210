"""Two processes of one thread against one process of two, round by round of the same run.

    python bench/bench_ranks.py [--settings vit_demo vit_468k] [--rounds 12] [--repeat 3]

Runs `train.py fedavg` on the synthetic data set, under torchrun and without, in turn, and takes the
seconds of each round from the logs (the first is left out). The final weights of the two processes
must be those of one process of one thread, to the bit. vit_468k is vit_demo twice as wide and deep.
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

import model
from machine.runs import Run

SETTINGS = {
    "vit_demo": "--model vit_demo --image-size 32 --batch-size 8",
    "vit_468k": "--model vit_468k --image-size 32 --batch-size 8",
    "vit_ti16": "--model vit_ti16 --image-size 64 --batch-size 32",
}
GOALS = {"vit_demo": 1.3, "vit_468k": 1.1}
SHARED = "--data synthetic --weights none --head linear --J 4 --lr 0.001 --eval-every 100000"


def run(
    setting: str, processes: int, threads: int, rounds: int
) -> tuple[list[float], torch.Tensor]:
    """Return the seconds of the rounds after the first, and the final parameters."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, __file__, "--train", "fedavg", *SHARED.split()]
    command += [*SETTINGS[setting].split(), "--threads", f"{threads}", "--rounds", f"{rounds}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        command += ["--runs-dir", folder, "--name", "x"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        finished = Run(Path(folder) / "x")
        theta = finished.load()["state"]["process"]["theta"]
        return [r["seconds"] for r in finished.records()[2:]], theta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=tuple(GOALS))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--csv", type=Path, default=ROOT / "results/bench/ranks.csv")
    options = parser.parse_args()
    rows = []
    for setting in options.settings:
        seconds = {(1, 2): [], (2, 1): []}
        for _ in range(options.repeat):
            for shape, repetitions in seconds.items():
                rounds, theta = run(setting, *shape, options.rounds)
                repetitions.append(rounds)
        assert torch.equal(theta, run(setting, 1, 1, options.rounds)[1])
        threads, ranks = (np.array(values).ravel() for values in seconds.values())
        for name, values in (("1 process x 2 threads", threads), ("2 processes x 1 thread", ranks)):
            rows.append({"setting": setting, "figure": f"{name}, s a round"} | quantiles(values))
        rows.append({"setting": setting, "figure": "speed-up, paired"} | quantiles(threads / ranks))
        rows[-1]["goal"] = GOALS.get(setting, "")
        print(*rows[-3:], sep="\n")
    write_csv(options.csv, rows, note="each process's threads are in the figure's name")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        model.MODELS["vit_468k"] = model.ViTShape(96, 4, 3, patch=8, grid=4)
        sys.argv = [str(ROOT / "train.py"), *sys.argv[2:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        main()
