"""--search: short runs over a grid of learning rates and weight decays, then the one that is best.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import centralized
import fedavg
import safe_files
from ranks import OneProcess
from session import default_name


def search_then_train(
    group: OneProcess,
    options: argparse.Namespace,
    length: str,
    train: Callable[[argparse.Namespace, str], dict],
) -> None:
    """Train once; with --search, first short runs over the grid, the best by validation chosen."""
    name = default_name(options) if options.name is None else options.name
    if not options.search:
        train(options, name)
        return
    results = []
    for lr in options.search_lr:
        for weight_decay in options.search_weight_decay:
            cell = copy.copy(options)
            cell.search, cell.lr, cell.weight_decay = False, lr, weight_decay
            setattr(cell, length, options.search_length or getattr(options, length))
            print(f"search: lr {lr:g}, weight decay {weight_decay:g}")
            try:
                summary = train(cell, f"{name}/search/lr{lr:.9g}-wd{weight_decay:.9g}")
                shown = "best_by_validation" if options.early_stop else "final"
                val_acc = summary[shown]["val_acc"]
            except (fedavg.ClientError, centralized.Diverged) as error:
                print(f"search: given up, {error}")
                val_acc = 0.0
            results.append({"lr": lr, "weight_decay": weight_decay, "val_acc": val_acc})
    best = max(results, key=lambda r: r["val_acc"])
    if not best["val_acc"]:
        raise ValueError("--search: every try diverged; give lower rates by --search-lr")
    if group.rank == 0:
        found = {"cells": results, "best": best}
        safe_files.write_json(Path(options.runs_dir) / name / "search.json", found)
    chosen = copy.copy(options)
    chosen.lr, chosen.weight_decay = best["lr"], best["weight_decay"]
    print(f"search: chose lr {best['lr']:g}, weight decay {best['weight_decay']:g} by validation")
    train(chosen, name)
