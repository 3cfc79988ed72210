"""train.py calibrate: a mask from the clients' data, and what it is like."""

from __future__ import annotations

import shlex
import sys
import time

import numpy as np

from commands.options import GROUPS, Line
from machine.status import print_figures
from study import maps
from training import run_folder
from training.agreement import agreement
from training.calibration import Calibration
from training.features import set_fitted_head
from training.mask_cache import cached_mask
from training.mask_file import density_table
from training.workspace import Workspace

OPTIONS = GROUPS["calibrate"]
SHOWN = ("entries", "kept", "images", "clients", "bytes_up", "bytes_down", "seconds")


def run(line: Line) -> None:
    """Make a mask from the clients' data; write it, its density by layer, and a picture of that."""
    o, started = line.groups, time.monotonic()
    workspace = Workspace(o.source, o.machine, o.backbone, sharding=o.sharding)
    model = workspace.build_model()
    folder = run_folder.open_run(workspace, model, line.name, line.stored)
    with folder.opening():
        set_fitted_head(workspace, model, o.scoring_head.head, o.scoring_head.head_images)
        calibration = Calibration(workspace, model, o.masking, o.graph.cuda_graph)
        mask = cached_mask(calibration)
    mask.save(folder.folder / "mask.pt")
    kinds, layers, density = density_table(mask)
    print_density(kinds, layers, density)
    figures = {name: mask.origin[name] for name in SHOWN} | {"mask_bytes": mask.bytes}
    print_figures(figures)
    overlap = agreement(calibration)
    print_overlap(overlap)
    table = {
        kind: dict(zip(layers, row, strict=True))
        for kind, row in zip(kinds, density.tolist(), strict=True)
    }
    figures |= {"overlap": overlap, "density": table, "wall_seconds": time.monotonic() - started}
    folder.summarise(**figures)
    title = f"{o.masking.mask_rule}, {100 * mask.trains.double().mean():.1f} % trainable"
    try:
        maps.plot_density(kinds, layers, density, folder.folder / "density.png", title)
    except ValueError as error:
        print(f"no density.png: {error}", file=sys.stderr)
    path = folder.folder / "mask.pt"
    print(f"written to {path}; train it with --mask {shlex.quote(str(path))}")


def print_density(kinds: list[str], layers: list[str], density: np.ndarray) -> None:
    """Print the trainable share of every kind (rows) in every layer (columns), in percent."""
    print("trainable, %".ljust(16) + "".join(f"{layer:>6}" for layer in layers))
    for kind, row in zip(kinds, density, strict=True):
        print(f"{kind:16}" + "".join("     -" if x != x else f"{100 * x:6.1f}" for x in row))


def print_overlap(overlap: dict) -> None:
    """Print how far the clients' own masks agree, where that was measured."""
    if overlap.get("iou") is not None:
        print(
            f"masks of half of a client's images ({overlap['clients']} clients, "
            f"{overlap['images']} images each): IoU {overlap['iou']:.3f} between clients, "
            f"{overlap['ceiling']:.3f} between the halves of one, {overlap['chance']:.3f} by chance"
        )
        groups = (f"{iou:.3f} of {m}" for m, iou in overlap["groups"].items())
        print(f"masks of two groups of clients, all their images: IoU {', '.join(groups)} each")
