"""How many processes share the clients of a federated run."""

from __future__ import annotations

from pathlib import Path

import torch

import model as vit
from commands.options import Line
from federated.cohort import cohort_size
from machine import ranks, runs
from machine.device import choose_device, free_memory


def processes(line: Line) -> int:
    """Return how many processes are to share a run's clients: those of --processes."""
    o, size = line.groups, line.groups.processes.processes
    if size != "auto":
        return size
    spread = o.training.train == "all" and o.local_steps.batch_size != "full"
    fits = o.machine.threads is None and ranks.launched() == 1 and ranks.CAN_FORK
    if not (spread and fits and choose_device(o.machine.device).type == "cpu"):
        return 1
    begun, cores = threads_of(line), torch.get_num_threads()
    memory = free_memory(torch.device("cpu"))
    clients = cohort_size(o.sharding.clients, o.participation.fraction)
    if begun is not None:  # a run goes on to the same bits, by one thread in two processes or more
        fit = max(2, min(clients, int(memory // ranks.MEMORY)))
        return min(cores, fit) if begun == 1 else 1
    return ranks.processes_that_pay(
        rounds=o.rounds.rounds,
        clients=clients,
        images=o.local_steps.J * o.local_steps.batch_size,
        operations=training_operations(vit.MODELS[o.backbone.model], o.backbone.image_size),
        cores=cores,
        memory=memory,
        fitted=o.head.head != "linear",
    )


def threads_of(line: Line) -> int | None:
    """Return the threads that the command's run has begun with; None where it has not."""
    run = runs.Run(Path(line.groups.running.runs_dir) / line.name)
    try:
        return run.config()["environment"]["threads"] if run.config_path.exists() else None
    except (ValueError, KeyError, TypeError):
        return None  # opening it says what is wrong


def training_operations(shape: vit.ViTShape, image_size: int) -> float:
    """Return about how many floating-point operations a training pass of an image takes."""
    tokens = 1 + (image_size // shape.patch) ** 2
    return 3 * 2 * tokens * 12 * shape.width**2 * shape.depth  # the blocks' products
