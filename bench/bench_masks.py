"""The share of all sensitivity that the masks of results/cpu keep, of which a rate follows.

    python bench/bench_masks.py [--rounds 1 2 4 8] [--shardings iid nc1] [--data-dir DIR]

Every mask rule that scores at three sparsities and so many calibration rounds, as the runs of
results/cpu/rules and results/cpu/sparsity have them: ViT-Ti/16 at 64 px, 500 images of 100 clients,
seed 0. Adds to results/cpu/shares.csv.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from commands.options import parse
from machine.device import exact_products
from train import COMMANDS
from training.calibration import Calibration
from training.features import set_fitted_head
from training.run_folder import git_commit
from training.workspace import Workspace

PATH = Path(__file__).resolve().parent.parent / "results" / "cpu" / "shares.csv"
HEADING = "sharding,rule,sparsity,rounds,sensitivity_share"
RULES = ("least-sensitive", "most-sensitive")
MASKS = [
    (rule, sparsity, rounds)
    for rounds, rule, sparsity in itertools.product((4, 1, 2, 8), RULES, (0.5, 0.9, 0.99))
    if rule == RULES[0] or rounds == 4
]


def calibrations(sharding: str, rounds_wanted: list[int], data_dir: str):
    """Yield (rule, sparsity, rounds) and the mask of each; the scores of round 1 are shared."""
    workspace = undamped = None
    for rule, sparsity, rounds in (mask for mask in MASKS if mask[2] in rounds_wanted):
        words = f"calibrate --mask-rule {rule} --sparsity {sparsity} --calibration-rounds {rounds}"
        words += f" --calibration-images 500 --data-dir {data_dir} --threads 1"
        words += f" --model vit_ti16 --weights {data_dir}/vit_tiny_patch16_224.pth --image-size 64"
        words += " --nc 1" * (sharding == "nc1")
        o = parse(words.split(), COMMANDS).groups
        workspace = workspace or Workspace(o.source, o.machine, o.backbone, sharding=o.sharding)
        model = workspace.build_model()
        with torch.no_grad():
            set_fitted_head(workspace, model, o.scoring_head.head, None)
        calibration = Calibration(workspace, model, o.masking)
        if undamped is None:
            with exact_products():
                undamped = {
                    int(k): calibration.sensitivity(calibration.images(k))
                    for k in calibration.clients
                }
        yield (rule, sparsity, rounds), shared(calibration, undamped).make()


def shared(calibration: Calibration, undamped: dict) -> Calibration:
    """Let a calibration take the scores of the undamped network, which are there already."""
    score, original = calibration.sensitivity, calibration.theta.clone()
    clients = {calibration.images(k).tobytes(): int(k) for k in calibration.clients}

    def sensitivity(index):
        whole = torch.equal(calibration.theta, original)
        return undamped[clients[index.tobytes()]] if whole else score(index)

    calibration.sensitivity = sensitivity
    return calibration


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shardings", nargs="+", default=["iid", "nc1"])
    parser.add_argument("--rounds", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--data-dir", default="data")
    o = parser.parse_args()
    command = f"python bench/bench_masks.py --rounds {' '.join(map(str, o.rounds))}"
    command += f" --shardings {' '.join(o.shardings)}"
    lines = PATH.read_text().splitlines() if PATH.exists() else [HEADING]
    lines.insert(0, f"# {command}, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, ")
    lines[0] += f"1 thread, commit {git_commit()}"
    for sharding in o.shardings:
        for what, mask in calibrations(sharding, o.rounds, o.data_dir):
            share = mask.origin["sensitivity_share"]
            lines.append(",".join(map(str, (sharding, *what, f"{share:.6g}"))))
            PATH.write_text("\n".join(lines) + "\n")
            print(lines[-1], f"{mask.origin['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
