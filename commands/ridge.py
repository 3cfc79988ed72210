"""train.py ridge: the closed-form head, central and from the clients' sums."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

import head
from commands.options import GROUPS, Line
from machine.device import exact_place
from machine.status import print_figures
from training import run_folder
from training.features import features, fit_head
from training.workspace import Workspace

OPTIONS = GROUPS["ridge"]


def run(line: Line) -> None:
    """Solve the ridge head centrally and from the clients' sums, and compare the two."""
    o, started = line.groups, time.monotonic()
    workspace = Workspace(o.source, o.machine, o.backbone, sharding=o.sharding)
    shards, model = workspace.shards, workspace.build_model()
    folder = run_folder.open_run(workspace, model, line.name, line.stored)
    parts, place = ("train", "test"), exact_place(workspace.device)
    rows, test_rows = (features(workspace, model, part).to(place) for part in parts)
    labels, test_labels = (workspace.sets[part].labels.to(place) for part in parts)
    central = fit_head(workspace, model, "ridge")
    total = head.RidgeSums(rows.shape[1], workspace.classes, place)
    for shard in shards:
        at = torch.from_numpy(shard).to(place)
        sums = head.RidgeSums(rows.shape[1], workspace.classes, place)
        total = total + sums.update(rows[at], labels[at])
    weight, bias = (x / central.temperature for x in head.solve_ridge(total, central.strength))
    logits = test_rows.double() @ weight.T + bias
    final = {
        "val_acc": central.val_acc,
        "test_acc": (logits.argmax(1) == test_labels).double().mean().item(),
        "test_loss": F.cross_entropy(logits, test_labels).item(),
    }
    figures = {
        "ridge": central.strength,
        "temperature": central.temperature,
        "train_images": len(workspace.train_index),
        "clients": len(shards),
        "difference_to_central": ((weight - central.weight).norm() / central.weight.norm()).item(),
        "bytes_up": total.bytes * len(shards),
    }
    print_figures(final | figures)
    figures |= {"final": final, "wall_seconds": time.monotonic() - started}
    folder.summarise(**figures)
    print(f"written to {folder.folder / 'summary.json'}")
