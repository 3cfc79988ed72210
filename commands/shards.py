"""train.py shards: who holds how many samples of which class."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np

from commands.options import Line
from machine.device import Machine
from study import maps
from training.workspace import Sharding, Source, Workspace


class Shardings(NamedTuple):
    """Clients; several shardings are shown side by side."""

    clients: Annotated[int, "number of clients K", ">= 1", "--clients --K"] = 100
    nc: Annotated[list[int] | None, "classes per client N_c, one or several [iid]", ">= 1"] = None
    dirichlet: Annotated[
        list[float] | None,
        "concentration of the clients' class mixtures, one or several [iid]",
        "1e-6 <= x <= 1e9",
    ] = None
    cover: Annotated[
        str, "all: every class has a client; partial: where that cannot be", ("all", "partial")
    ] = "all"

    def each(self) -> list[Sharding]:
        """Return the shardings that are asked for."""
        if self.nc is not None:
            return [Sharding(self.clients, nc=nc, cover=self.cover) for nc in self.nc]
        return [
            Sharding(self.clients, dirichlet=alpha, cover=self.cover)
            for alpha in self.dirichlet or [None]
        ]


class Shown(NamedTuple):
    """What is shown."""

    show: Annotated[int | None, "clients to list [10; of several shardings none]", ">= 0"] = None
    out: Annotated[str | None, "picture of the heat map, such as shards.png [none]", "path"] = None


OPTIONS = (Shown, Shardings, Source, Machine)


def run(line: Line) -> None:
    """Print and plot who holds how many samples of which class, under one sharding or several."""
    o = line.groups
    shardings, tables = o.shardings.each(), {}
    for sharding in shardings:
        workspace = Workspace(o.source, o.machine, sharding=sharding)
        shards, labels = workspace.shards, workspace.dataset.train.labels.numpy()
        counts = np.stack([np.bincount(labels[s], minlength=workspace.classes) for s in shards])
        if len(shardings) > 1:
            print(f"{sharding.name}: ", end="")
        show = (10 if len(shardings) == 1 else 0) if o.shown.show is None else o.shown.show
        print_shards(counts, workspace.dataset.classes, show)
        tables[f"{sharding.name}, seed {o.source.seed}"] = counts
    if o.shown.out:
        print(f"written to {maps.plot_shards(tables, o.shown.out)}")


def print_shards(counts: np.ndarray, classes: list[str], show: int) -> None:
    """Print the counts (clients, classes) in short, and what the first `show` clients hold."""
    sizes, different = counts.sum(axis=1), (counts > 0).sum(axis=1)
    print(f"{len(counts)} clients, {sizes.sum()} samples, {len(classes)} classes")
    for what, values in (
        ("samples per client", sizes),
        ("classes per client", different),
        ("clients per class", (counts > 0).sum(axis=0)),
    ):
        print(f"{what:19} min {values.min()}  median {np.median(values):g}  max {values.max()}")
    if not show:
        return
    print("client  samples  classes: samples")
    for k in range(min(len(counts), show)):
        top = np.argsort(-counts[k], kind="stable")[: min(different[k], 6)]
        parts = ", ".join(f"{classes[c]}: {counts[k, c]}" for c in top)
        print(f"{k:6}  {sizes[k]:7}  {parts}{', ...' if different[k] > len(top) else ''}")
    if len(counts) > show:
        print(f"... and {len(counts) - show} more clients (--show)")
