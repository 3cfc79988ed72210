"""Folders of runs: what they hold, and some that nobody has run, for what reads them."""

import json

from machine.runs import Run


def records(folder, *without):
    """Return what a run has logged, but for these keys."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def theta(folder):
    """Return the parameters in a run's checkpoint."""
    state = Run(folder).load()["state"]["process"]
    return state["theta"] if "theta" in state else state["tensors"]["theta"]


def leave(folder, val_acc, rounds=3, reached=None, **options):
    """Leave a run's folder as `train.py fedavg` does."""
    folder.mkdir(parents=True)
    usual = {"command": "fedavg", "rounds": rounds, "clients": 10, "nc": None, "J": 4, "seed": 0}
    usual |= {"lr": 0.1, "train": "head", "dirichlet": None, "mask_rule": None, "threads": 1}
    config = {"format": 1, "options": usual | options}
    (folder / "config.json").write_text(json.dumps(config))
    last = rounds if reached is None else reached
    records = [{"round": r, "val_acc": val_acc, "val_loss": 1.0} for r in range(last + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if last == rounds:
        figures = {"val_acc": val_acc, "test_acc": val_acc / 2}
        summary = {"round": rounds, "final": figures, "best_by_validation": figures}
        (folder / "summary.json").write_text(json.dumps(summary))
