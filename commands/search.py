"""--search: short runs over a grid of learning rates and weight decays, then the one that is best.

The choice is that of a table's row (study/tables.py): the best mean validation accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import centralized
import fedavg
from commands.options import Line
from machine import runs, safe_files
from machine.ranks import OneProcess
from study.tables import best_of


def search_then_train(line: Line, group: OneProcess, train: Callable[[Line, str], dict]) -> None:
    """Train once; with --search, first short runs over the grid, the best by validation chosen.

    Args:
        train: (command line, name of its folder) -> summary.
    """
    name, search = line.name, line.groups.search
    if not search.search:
        train(line, name)
        return
    runs.Run(Path(line.stored["runs_dir"]) / name).check()  # before search.json goes there
    seed, tried = line.stored["seed"], {}
    for lr in search.search_lr:
        for weight_decay in search.search_weight_decay:
            print(f"search: lr {lr:g}, weight decay {weight_decay:g}")
            cell = line.replaced(search=False, lr=lr, weight_decay=weight_decay)
            if search.search_length:
                unit = "rounds" if "rounds" in line.stored else "epochs"
                cell = cell.replaced(**{unit: search.search_length})
            try:
                summary = train(cell, f"{name}/search/lr{lr:.9g}-wd{weight_decay:.9g}")
                if line.stored["early_stop"]:
                    summary = summary | {"final": summary["best_by_validation"]}
            except (fedavg.ClientError, centralized.Diverged) as error:
                print(f"search: given up, {error}")
                summary = {"final": {"val_acc": 0.0}}
            tried[lr, weight_decay] = {seed: summary}
    (lr, weight_decay), best = best_of(tried)
    if not best[seed]["final"]["val_acc"]:
        raise ValueError("--search: every try diverged; give lower rates by --search-lr")
    if group.rank == 0:
        cells = [
            {"lr": a, "weight_decay": b, "val_acc": summaries[seed]["final"]["val_acc"]}
            for (a, b), summaries in tried.items()
        ]
        chosen = next(c for c in cells if (c["lr"], c["weight_decay"]) == (lr, weight_decay))
        path = Path(line.stored["runs_dir"]) / name / "search.json"
        safe_files.write_json(path, {"cells": cells, "best": chosen})
    print(f"search: chose lr {lr:g}, weight decay {weight_decay:g} by validation")
    train(line.replaced(lr=lr, weight_decay=weight_decay), name)
