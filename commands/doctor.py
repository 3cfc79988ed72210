"""train.py doctor: what a command will cost on this machine, and where its time goes.

Measured as commands/trial.py says. The products' part of a round is its matrix operations at the
rate of a large product measured here; the passes are what is left of the round. The optimiser and
the average are compared with plain passes over as much memory, as fast as caches make them.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import torch

import fisher
import sparse_sgdm
from commands.costs import Costs, batch_of, check, evaluated
from commands.options import GROUPS, Command, Line, parse
from commands.trial import Trial
from federated.cohort import cohort_size
from machine import safe_files
from machine.device import free_memory
from machine.rates import copy_bandwidth, pass_seconds, product_rate, synchronise
from machine.status import duration
from training import probe
from training.learner import Learner
from training.workspace import Workspace


class Doctor(NamedTuple):
    """What is examined."""

    examined: Annotated[
        list[str],
        "the command to examine, as it would be typed: fedavg, centralized, ridge or calibrate, "
        "with its options [fedavg]",
        "remainder",
    ]
    json: Annotated[str | None, "where the figures go too [none]", "path", "FILE"] = None


OPTIONS = (Doctor,)
LONG = 24 * 3600  # seconds; a command that takes longer is told of a smaller one
WORTH = 1.3  # times the rate of products, from which on another precision is named
SMALLER = ("vit_ti16", 64)  # its model, and pixels a side


def run(line: Line) -> None:
    """Say what this machine is, how long a command will take on it, and where a round's time goes.

    It takes half a minute and needs no download: images and weights are generated.
    """
    words = line.groups.doctor.examined or ["fedavg"]
    check(words[0])
    examined = parse(words, {words[0]: Command(run, GROUPS[words[0]])})
    figures = examine(examined)
    print_report(figures)
    if line.groups.doctor.json:
        safe_files.write_json(Path(line.groups.doctor.json), figures)


def say(what: str) -> None:
    """Tell whoever waits what is measured next."""
    print(f"measuring {what} ...", file=sys.stderr, flush=True)


def examine(line: Line) -> dict:
    """Return the figures of a command on this machine; every name has its unit."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(line, folder)
        workspace, device = trial.workspace, trial.workspace.device
        costs = trial.measure(say)
        say("matrix products and copies")
        rates = product_rate(workspace.dtype, device), copy_bandwidth(device)
        figures = environment(workspace) | {
            "command": line.command,
            "only_a_step_was_timed": trial.slow,  # what evaluates and scores follows from it
            "product_rate_tflop_per_second": rounded(rates[0] / 1e12),
            "copy_bandwidth_gb_per_second": rounded(rates[1] / 1e9),
        }
        if workspace.dtype == torch.float32 and device.type == "cpu":
            half = product_rate(torch.bfloat16, device)
            figures["bf16_to_product_rate"] = rounded(half / rates[0])
        if trial.learner is not None:
            figures |= of_training(trial, costs, rates[0])
        if costs.feature:
            figures["feature_milliseconds_an_image"] = rounded(1e3 * costs.feature)
        if costs.score:
            figures["scoring_milliseconds_an_image"] = rounded(1e3 * costs.score)
        parts = costs.parts(line.stored)
        figures["parts_seconds"] = {name: rounded(s) for name, s in parts.items() if s}
        figures["total_seconds"] = rounded(costs.total(line.stored))
        if trial.learner is not None and device.type == "cuda":
            say("the largest batch")
            figures["largest_batch_images"] = largest_batch(trial.learner)
    return figures


def of_training(trial: Trial, costs: Costs, rate: float) -> dict:
    """Return what a step and a round cost, and an evaluation.

    Args:
        rate: operations a second of a large product.
    """
    o, learner = trial.line.stored, trial.learner
    batch, images, step = batch_of(o), evaluated(o), costs.a_step(o)
    figures = {
        "trained_parameters": learner.entries.size,
        "cuda_graph": trial.cuda_graph,
        "fused": learner.fuses,
        "images_a_step": batch,
        "images_a_timed_step": trial.batch,
        "step_seconds": rounded(step),
        "images_per_second": rounded(batch / step),
        "evaluation_seconds": rounded(costs.evaluation * images),
        "evaluation_images": images,
    }
    steps, clients = 1, 0
    if "clients" in o:
        clients = cohort_size(o["clients"], o["fraction"])
        steps = o["J"] * clients
        figures |= {
            "clients_a_round": clients,
            "steps_a_client": o["J"],
            "client_seconds": rounded(o["J"] * step + costs.client),
            "round_seconds": rounded(costs.a_round(o)),
            "rounds": o["rounds"],
        }
    if learner.on_features:
        return figures
    say("what a step consists of")
    seconds = costs.a_round(o) if clients else step
    of_image = probe.operations(learner)
    operations = steps * batch * of_image
    parts = {
        "products": operations / rate,
        "pixels": steps * batch * probe.pixels(learner, trial.batch),
        "optimiser": steps * trial.optimiser,
    }
    if clients:
        parts["average"] = clients * trial.average
    parts["passes"] = max(0.0, seconds - sum(parts.values()))
    unit = "round" if clients else "step"
    smaller = probe.operations_of(SMALLER[0], trial.workspace.classes, SMALLER[1])
    return figures | {
        "smaller_job_to_operations": rounded(smaller / of_image),
        f"{unit}_parts_seconds": {name: rounded(value) for name, value in parts.items()},
        f"{unit}_tflop": rounded(operations / 1e12),
        "share_of_product_rate": rounded(operations / seconds / rate),
        **memory_shares(trial, clients > 0),
    }


def memory_shares(trial: Trial, averages: bool) -> dict[str, float]:
    """Return what plain passes over as much memory take, as a share of optimiser and average.

    Under a mask there are none: its entries lie scattered.
    """
    learner, device = trial.learner, trial.workspace.device
    if learner.mask is not None:
        return {}
    shares = {"optimiser": pass_seconds(probe.optimiser_bytes(learner), device) / trial.optimiser}
    if averages:
        shares["average"] = pass_seconds(probe.average_bytes(learner), device) / trial.average
    return {f"{name}_share_of_memory_rate": rounded(share) for name, share in shares.items()}


def rounded(value: float) -> float:
    """Return a figure to four digits."""
    return float(f"{value:.4g}")


# ---------------------------------------------------------------------------- the machine


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


NO_KERNEL = "reference (no CUDA device)"
KERNELS = {"optimiser": optimiser_kernel, "scoring": scoring_kernel}


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


# ---------------------------------------------------------------------------- what is printed

PARTS = {  # of a round or a step: how they are called, and what they are
    "products": ("matrix products", "if they ran at the measured rate"),
    "pixels": ("preparing images", "crop, resize, normalise"),
    "optimiser": ("optimiser", "the update of the weights"),
    "average": ("averaging clients", "each one's start, and its part of the mean"),
    "passes": ("everything else", "normalisation, activations, softmax, overhead"),
}
TAKEN = (
    "this machine is slow, so only a training step was timed: evaluating an image is taken to last "
    "a third of training on it, scoring it 1.25 times as long"
)


def print_report(figures: dict) -> None:
    """Print the figures in words and units, the conclusion last."""
    for name, text in described(figures):
        print(f"{name:22} {text}")


def described(f: dict) -> list[tuple[str, str]]:
    """Return what is printed, line by line: what it is about, and the figures."""
    threads = f["threads"] and f", {f['threads']} thread{'s' * (f['threads'] > 1)}"
    rate, bandwidth = f["product_rate_tflop_per_second"], f["copy_bandwidth_gb_per_second"]
    limits = f"{1e3 * rate:,.3g} GFLOP/s in matrix products, {bandwidth:.3g} GB/s in copying memory"
    kernels = {name: kernel for name, kernel in f["kernels"].items() if kernel != NO_KERNEL}
    lines = [
        ("this machine", f"{f['device']}{threads or ''}, {f['free_memory_gb']} GB of memory free"),
        ("software", f"torch {f['torch']}, Python {f['python']}, computing in {f['precision']}"),
        *((f"{name} kernel", kernel) for name, kernel in kernels.items()),
        ("what it can do", f"{limits}, measured just now"),
    ]
    if (times := f.get("bf16_to_product_rate", 0)) >= WORTH:
        lines.append(("--precision bf16", f"its matrix products are {times:.1f} times as fast"))
    if "step_seconds" in f:
        each = f["images_per_second"]
        speed = f"{f['images_a_step']} images, so {each:,.{0 if each >= 10 else 1}f} images/s"
        lines.append(("a training step", f"{timed(f['step_seconds'])} for {speed}"))
        if kernels:
            lines.append(("CUDA graph", f["cuda_graph"]))
            lines.append(("fused passes", "on" if f["fused"] else "off"))
    if "round_seconds" in f:
        cohort = f"{f['clients_a_round']} clients, {f['steps_a_client']} steps each"
        lines.append(("a round", f"{timed(f['round_seconds'])} for {cohort}"))
    for unit in ("round", "step"):
        if parts := f.get(f"{unit}_parts_seconds"):
            lines += [
                (f"  {PARTS[name][0]}", part_of(name, parts, f)) for name in parts if parts[name]
            ]
            share = f"{100 * f['share_of_product_rate']:.0f} % of what this machine's matrix"
            lines.append(("speed", f"the {unit} reaches {share} products reach, measured just now"))
    if "evaluation_seconds" in f:
        counted = f"{f['evaluation_images']:,} images"
        lines.append(("an evaluation", f"{timed(f['evaluation_seconds'])} for {counted}"))
    for name, what in (("feature", "features"), ("scoring", "scoring for a mask")):
        if (value := f.get(f"{name}_milliseconds_an_image")) is not None:
            lines.append((what, f"{timed(1e-3 * value)} for an image"))
    if "largest_batch_images" in f:
        lines.append(("largest batch", f"{f['largest_batch_images']:,} images in a training step"))
    if f["only_a_step_was_timed"]:
        lines.append(("not measured", TAKEN))
    lines += [
        (f"time for {'the ' * (name == 'head')}{name}", timed(s))
        for name, s in f["parts_seconds"].items()
    ]
    lines.append(("time in all", f"{timed(f['total_seconds'])} for this {f['command']} command"))
    if f["total_seconds"] > LONG and (share := f.get("smaller_job_to_operations", 1)) < 0.5:
        name, size = SMALLER
        less = f"1/{1 / share:.0f} of the operations an image, by count"
        lines.append(("a smaller job", f"--model {name} --image-size {size} has {less}"))
    return lines


def part_of(name: str, parts: dict[str, float], f: dict) -> str:
    """Return what is said of a part of a round or a step."""
    share, why = 100 * parts[name] / max(sum(parts.values()), 1e-12), PARTS[name][1]
    if (of_memory := f.get(f"{name}_share_of_memory_rate")) is not None:
        why += f"; {100 * of_memory:.0f} % as fast as reading and writing as much memory"
    return f"{timed(parts[name])}, {share:.1f} % of it: {why}"


def timed(seconds: float) -> str:
    """Write a time in milliseconds, seconds, or as a duration."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
