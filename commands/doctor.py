"""train.py doctor: what a command will cost on this machine, in device, kernels, seconds a round.

Measured on generated images of CIFAR's size and untrained weights, so that nothing is downloaded;
neither changes the time. In place of a mask that the command makes stands a random one of the same
sparsity; of one made to a --threshold, whose sparsity is not known before, none. Not counted: the
features that a head is fitted to, calibration, a search.
"""

from __future__ import annotations

import functools
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NamedTuple

import numpy as np
import torch

import fisher
import masks
import sparse_sgdm
from commands.options import GROUPS, Command, Line, federation, parse
from fedavg import FedAvg
from federated import privacy
from federated.cohort import sample_clients
from machine import safe_files
from machine.device import free_memory
from machine.runs import Run
from machine.status import duration
from training.clients import HeadsTogether
from training.learner import Learner
from training.rounds import Federation, client_terms, cohort_of, make_clients, method_of
from training.session import prepare
from training.workspace import Workspace

CLIENTS_TIMED = 5
TRAINED = 45_000  # images of CIFAR-100 that train
EVALUATED = 5_000 + 10_000  # images of an evaluation on CIFAR-100: validation and test


class Doctor(NamedTuple):
    """What is examined."""

    fedavg_command: Annotated[
        list[str], "the command to examine, as it would be typed [fedavg]", "remainder"
    ]
    json: Annotated[str | None, "where the figures go too [none]", "path", "FILE"] = None


OPTIONS = (Doctor,)


def run(line: Line) -> None:
    """Say what this machine is, which kernels run on it, and how long a fedavg command will take.

    It needs no download: images and weights are generated.
    """
    name, *rest = line.groups.doctor.fedavg_command or ["fedavg"]
    if name != "fedavg":
        raise ValueError(f"doctor examines a fedavg command, not {name!r}")
    figures = examine(parse(["fedavg", *rest], {"fedavg": Command(run, GROUPS["fedavg"])}))
    print_table(figures)
    if line.groups.doctor.json:
        safe_files.write_json(Path(line.groups.doctor.json), figures)


def trial_of(line: Line) -> Line:
    """Return the command with generated images and weights, and without what needs others."""
    o = line.stored
    changed = {
        **dict(data="synthetic", weights="none", nc=None, dirichlet=None, head_images=None),
        **dict(head="linear", dropout=0.0, dp_noise=None, dp_clip=None),
        "clients": min(o["clients"], 1000),
    }
    if o["mask_rule"] is not None:
        changed |= {"mask_rule": None if o["sparsity"] is None else "random", "quorum": None}
    if o["train"] != "head":  # of heads it decides whether they train together
        changed["straggler_fraction"] = 0.0
    return line.replaced(**changed)


def uncounted(o: dict) -> list[str]:
    """Name what comes before the first round and is not counted."""
    scores = o["mask_rule"] is not None and masks.needs_scores(o["mask_rule"])
    parts = {
        "features for the head": o["head"] != "linear" or o["train"] == "head",
        "calibration": scores,
        "search": o["search"],
    }
    return [what for what, has in parts.items() if has]


def examine(line: Line) -> dict:
    """Return the figures of a `fedavg` command on this machine."""
    stored, o = line.stored, trial_of(line).groups
    with tempfile.TemporaryDirectory() as folder:
        o.source = o.source._replace(data_dir=folder)
        workspace = Workspace(o.source, o.machine, o.backbone)
        shards = workspace.shards(o.sharding)
        if stored["batch_size"] == "full":  # a batch of as many images as in the run
            size = max(1, TRAINED // stored["clients"])
            shards = [np.resize(workspace.train_index, size)] * len(shards)
        learner = trial_learner(workspace, shards, o, Run(folder))
    evaluated = EVALUATED if stored["data"] == "cifar100" else None
    loop = federation(o)
    client, evaluation = time_client(learner, shards, loop), time_evaluation(learner, evaluated)
    batch = len(shards[0]) if stored["batch_size"] == "full" else stored["batch_size"]
    sampled = len(sample_clients(stored["clients"], stored["fraction"], seed=0, round=1))
    evaluations = 1 + -(-stored["rounds"] // stored["eval_every"])
    a_round = sampled * client + time_privacy(learner, line.groups.privacy, sampled)
    left = stored["rounds"] * a_round + evaluations * evaluation
    return environment(workspace) | {
        "parameters": learner.entries.size,
        "seconds_a_client": float(f"{client:.4g}"),
        "seconds_a_round": float(f"{a_round:.4g}"),
        "images_a_second": float(f"{stored['J'] * batch / client:.4g}"),
        "seconds_an_evaluation": float(f"{evaluation:.4g}"),
        "cuda_graph": cuda_graph(learner, shards, loop),
        "rounds": stored["rounds"],
        "seconds_in_all": float(f"{left:.4g}"),
        "not_counted": uncounted(stored),
        "largest_batch": largest_batch(learner),
    }


def trial_learner(
    workspace: Workspace, shards: list[np.ndarray], o: SimpleNamespace, run: Run
) -> Learner:
    """Return the learner of a trial."""
    learner = prepare(
        workspace,
        workspace.build_model(),
        run,
        shards,
        o.training,
        o.sgd,
        o.head,
        o.masking,
        o.given_mask,
        o.client_terms,
    )
    learner.keep_activations()
    return learner


def environment(workspace: Workspace) -> dict:
    """Return what the machine is and which kernels run on it."""
    device = workspace.device
    cuda = device.type == "cuda"
    return workspace.environment() | {
        "python": platform.python_version(),
        "free_memory_gb": round(free_memory(device) / 1e9, 1),
        "kernels": {
            name: kernel(device) if cuda else NO_KERNEL for name, kernel in KERNELS.items()
        },
    }


def optimiser_kernel(device: torch.device) -> str:
    """Say whether the fused optimiser kernel compiles and equals the reference on the device."""
    theta, grad = torch.randn(2, 4099, device=device).unbind()
    mask, other = grad > 0, theta.clone()
    try:
        sparse_sgdm.sparse_sgdm_(theta, grad, None, mask, lr=0.1, backend="triton")
    except Exception as error:  # compilers fail in many ways
        return f"reference ({str(error).splitlines()[0]})"
    sparse_sgdm.sparse_sgdm_(other, grad, None, mask, lr=0.1, backend="reference")
    return "triton" if torch.allclose(theta, other) else "triton DIFFERS from the reference"


def scoring_kernel(device: torch.device) -> str:
    """Say the same of the kernel that accumulates squared sums."""
    grads, inputs = torch.randn(2, 3, 17, 65, device=device).unbind()
    totals = torch.zeros(2, 65, 65, device=device)
    try:
        fisher.square_accumulate_(totals[0], grads, inputs, backend="triton")
    except Exception as error:
        return f"reference ({str(error).splitlines()[0]})"
    fisher.square_accumulate_(totals[1], grads, inputs, backend="reference")
    same = torch.allclose(*totals, rtol=1e-5, atol=1e-5)
    return "triton" if same else "triton DIFFERS from the reference"


NO_KERNEL, NO_GRAPH = "reference (no CUDA device)", "off (no CUDA device)"
KERNELS = {"optimiser": optimiser_kernel, "scoring": scoring_kernel}


def cuda_graph(learner: Learner, shards: list[np.ndarray], loop: Federation) -> str:
    """Say whether a local step is replayed as a CUDA graph, or why not."""
    clients = make_clients(learner, shards, loop, ())
    if isinstance(clients, HeadsTogether):
        return "off (heads train together)"
    if clients.graphed is None:
        return NO_GRAPH
    clients.train_client(learner.entries.theta.clone(), 0, round=1)
    return clients.graphed.status


def time_client(learner: Learner, shards: list[np.ndarray], loop: Federation) -> float:
    """Return the median seconds of one client's part of a round, after one that warms up."""
    theta, terms = learner.entries.theta.clone(), client_terms(learner, shards, loop, None)
    clients = make_clients(learner, shards, loop, list(terms.values()))
    method = method_of(learner, loop, terms, len(shards))
    cohort = functools.partial(cohort_of, loop, clients, None)
    process = FedAvg(theta, clients, cohort, method=method)
    seconds: list[float] = []
    if isinstance(clients, HeadsTogether):
        for _ in range(2):
            while (record := process.advance()) is None:
                pass
        return record["seconds"] / max(1, len(record["clients"]))
    while len(seconds) <= CLIENTS_TIMED:
        synchronise(learner.workspace.device)
        started = time.perf_counter()
        process.advance()
        synchronise(learner.workspace.device)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def time_privacy(learner: Learner, options: privacy.Privacy, sampled: int) -> float:
    """Return the seconds that a round of --dp-noise and --dp-clip spends on them."""
    theta, seconds = learner.entries.theta, 0.0
    if options.dp_clip is not None:
        clip = functools.partial(privacy.clip_factor, theta, theta, options.dp_clip)
        seconds += sampled * seconds_of(clip, theta.device)
    if options.dp_noise:
        total = torch.zeros_like(theta, dtype=torch.int64)
        noise = functools.partial(privacy.add_noise_, total, 1.0, unit=1.0, seed=0, round=1)
        seconds += seconds_of(noise, theta.device)
    return seconds


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that something takes when it is done for the second time."""
    work()
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def time_evaluation(learner: Learner, images: int | None) -> float:
    """Return the seconds of an evaluation of so many images, or of those that there are."""
    learner.start = None
    counted = len(learner.workspace.val_index) + len(learner.labels["test"])
    return seconds_of(learner.evaluate, learner.workspace.device) * (images or counted) / counted


def largest_batch(learner: Learner) -> int | None:
    """Return the largest power of two that an uncompiled step holds on the GPU; None on a CPU."""
    device = learner.workspace.device
    if device.type != "cuda":
        return None
    learner.trained_logits_of = learner.logits_of  # or every size would be compiled
    size = 1
    while size < 32_768:  # attention kernels launch at most 65,535 images
        patches = torch.arange(learner.seen_patches[0], device=device).expand(2 * size, -1)
        draws = torch.zeros(2 * size, 4, dtype=torch.int64, device=device)
        draws = torch.cat([draws, patches], dim=1)
        try:
            learner.flat.fill_grad(learner.loss(draws))
            synchronise(device)
        except torch.cuda.OutOfMemoryError:
            break
        size *= 2
    torch.cuda.empty_cache()
    return size


def synchronise(device: torch.device) -> None:
    """Wait for what runs on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_table(figures: dict) -> None:
    """Print one figure a line."""
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(value) or "nothing"
        print(f"{name.replace('_', ' '):22} {value}")
    print(f"{'time in all':22} {duration(figures['seconds_in_all'])}")
