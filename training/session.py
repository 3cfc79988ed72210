"""One run from its options to its summary: folder, head, loop, search.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import centralized
import data
import event_files
import fedavg
import model as vit
import plots
import runs
import safe_files
from calibration import scoped_names
from diagnostics import Diagnostics
from federation import federate, privacy_of_run, privacy_spent, uncovered
from learner import Evaluated, Learner
from mask_file import given_mask
from status import duration
from workspace import Workspace, fingerprint

FREE = {
    *("name", "runs_dir", "data_dir", "device", "threads"),
    *("cuda_graph", "eval_every", "eval_batch", "diagnostics", "tensorboard"),
    "micro_batch",
    "early_stop",  # a run that stops is the beginning of one that does not
}
NOT_STORED = {"run", "defaults"}  # what a parsed command line holds beside options


def train_federated(
    workspace: Workspace, shards: list, options: argparse.Namespace, name: str
) -> dict:
    """Run one federated training in its folder; returns its summary."""
    with workspace.group.first_then_others():
        model = workspace.build_model()
        run = open_run(workspace, model, options, name, shards)
        if summary := finished_summary(run, "round", options.rounds, options.early_stop):
            mirror(run, "round", options)([])
            return summary
        with run.opening():
            learner = Learner(workspace, model, options, run.folder, shards)
    with run.opening():
        learner.keep_activations()
        diagnostics = Diagnostics(learner, shards) if options.diagnostics else None
        federation = federate(learner, shards, run, diagnostics)
    opening = opening_bytes(learner, len(shards))
    if options.dp_clip is not None and (left_out := uncovered(options, learner.mask)):
        print(f"warning: epsilon covers the rounds, not {' and '.join(left_out)}", file=sys.stderr)

    def account() -> dict:
        sent = communication(run.records(), learner.dense_size)
        return sent | privacy_of_run(options, federation.round, learner.mask)

    def measure() -> dict:
        figures = diagnostics.measure() if diagnostics else {}
        return figures | privacy_spent(options, federation.round)

    opening |= privacy_spent(options, 0)
    further = dict(account=account, measure=measure)
    return drive_to_summary(run, federation, "round", options.rounds, learner, opening, **further)


def opening_bytes(learner: Learner, clients: int) -> dict[str, int]:
    """Return what was sent before round 1: calibration, then the mask once to every client."""
    if learner.mask is None:
        return {}
    made, broadcast = learner.mask.made, clients * learner.mask.bytes
    return {"bytes_up": made["bytes_up"], "bytes_down": made["bytes_down"] + broadcast}


def communication(records: list[dict], dense_size: int) -> dict[str, float]:
    """Add up what a run has sent, and compare it with sending every parameter both ways.

    Args:
        dense_size: parameters that would train without a mask.
    """
    up, down = (sum(r.get(key, 0) for r in records) for key in ("bytes_up", "bytes_down"))
    messages = [2 * len(r.get("clients", ())) + len(r.get("dropped_out", ())) for r in records]
    dense = 4 * dense_size * sum(messages)
    return {"bytes_up": up, "bytes_down": down, "bytes_to_dense": (up + down) / max(1, dense)}


def train_centralized(workspace: Workspace, options: argparse.Namespace, name: str) -> dict:
    """Run one centralised training in its folder; returns its summary."""
    model = workspace.build_model()
    run = open_run(workspace, model, options, name)
    if summary := finished_summary(run, "epoch", options.epochs, options.early_stop):
        mirror(run, "epoch", options)([])
        return summary
    with run.opening():
        learner = Learner(workspace, model, options, run.folder, [workspace.train_index])
    learner.keep_activations()
    entries, scale, grad = learner.entries, learner.loss_scale, learner.flat.grad
    backward = learner.graphed(learner.backward) or learner.backward
    tensors = {"theta": entries.theta, "loss_scale": scale.state}
    if entries.momentum is not None:
        tensors["momentum"] = entries.momentum

    def draw(epoch: int) -> torch.Tensor:
        where = dict(seed=options.seed, epoch=epoch, keep=learner.kept)
        draws = data.draw_epoch(workspace.train_index, options.batch_size, **where)
        return draws.to(workspace.device)

    def train_batch(draws: torch.Tensor, at: float) -> torch.Tensor:
        schedule = dict(total=options.epochs, lr=options.lr, warmup=options.warmup)
        lr = centralized.learning_rate(options.schedule, at, **schedule)

        def attempt(loss_scale: float) -> torch.Tensor:
            return backward(draws=draws, loss_scale=loss_scale)

        def overflowed() -> bool:
            return not torch.isfinite(grad).all().item()

        loss, used = scale.attempt(attempt, overflowed)
        entries.step(lr, first=at == 0, loss_scale=used)
        entries.gather()
        scale.next_round()
        return loss

    every = options.eval_every
    process = centralized.Centralized(draw, train_batch, tensors, entries.scatter, every)
    return drive_to_summary(run, process, "epoch", options.epochs, learner)


def default_name(options: argparse.Namespace) -> str:
    """Name a run after what it does, with a short hash of what it does not leave at its default.

    A later version's further options then change no name.
    """
    parts = [
        options.command,
        options.data,
        sharding_name(options) if "clients" in options else None,
    ]
    parts += [f"J{options.J}" if "J" in options else None, f"seed{options.seed}"]
    declared = options.defaults[options.command]
    told = {k: v for k, v in defining(options).items() if k not in declared or v != declared[k]}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return "-".join(p for p in [*parts, digest[:6]] if p)


def sharding_name(options: argparse.Namespace) -> str:
    """Return iid, nc5 or dir0.3."""
    if options.nc is not None:
        return f"nc{options.nc}"
    return f"dir{options.dirichlet:g}" if options.dirichlet is not None else "iid"


def defining(options: argparse.Namespace) -> dict:
    """Return the options that define an experiment; a constant schedule can be extended."""
    constant = getattr(options, "schedule", "constant") == "constant"
    extendable = {"rounds", "epochs"} if constant else set()
    free = FREE | extendable | NOT_STORED
    return {name: value for name, value in sorted(vars(options).items()) if name not in free}


def open_run(
    workspace: Workspace,
    model: vit.VisionTransformer,
    options: argparse.Namespace,
    name: str,
    shards: list[np.ndarray] | None = None,
) -> runs.Run:
    """Open the run's folder; one made by other options, splits or weights is refused."""
    folder = safe_files.folder_below(options.runs_dir, name)
    run = runs.Run(folder, writes=workspace.group.rank == 0)
    if getattr(options, "mask_rule", None) is not None:
        scoped_names(model, options.mask_scope)  # refuses before anything is written
    split = hashlib.sha256(b"".join(x.tobytes() for x in [workspace.val_index, *(shards or [])]))
    made_from = {"split_sha256": split.hexdigest(), "weights_sha256": fingerprint(model)}
    if getattr(options, "mask", None) is not None:
        mask = given_mask(options, model, run.folder / "mask.pt")
        made_from["mask_sha256"] = mask.sha256
        if mask.made["weights_sha256"] != made_from["weights_sha256"]:
            print(f"warning: --mask {options.mask} was made for other weights", file=sys.stderr)
    stored = {k: v for k, v in vars(options).items() if k not in NOT_STORED} | made_from
    extra = {
        "environment": workspace.environment(),
        "python": platform.python_version(),
        "commit": git_commit(),
    }
    if shards:
        sizes = [len(shard) for shard in shards]
        extra["shards"] = {"clients": len(sizes), "smallest": min(sizes), "largest": max(sizes)}
    run.open(stored, extra, free=set(stored) - {*defining(options), *made_from})
    path = run.folder / "shards.npz"
    if shards and run.writes and not path.exists():  # a record for others: no run reads it
        ends = np.cumsum([len(shard) for shard in shards])
        arrays = dict(validation=workspace.val_index, clients=np.concatenate(shards), ends=ends)
        save_arrays(path, arrays)
    return run


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """np.savez_compressed to exactly this path, atomically."""

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            np.savez_compressed(file, **arrays)

    safe_files.write_atomically(path, write)


def git_commit() -> str | None:
    """Return the commit of this code, or None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def finished_summary(
    run: runs.Run, unit: str, total: int, patience: int | None = None
) -> dict | None:
    """Return the summary of a run that has reached `total`, or stopped early, after saying so."""
    summary = run.summary()
    if summary is None or unit not in summary:
        return None
    early = patience is not None and summary.get("stopped_early") == patience
    if summary[unit] < total and not early:
        return None
    why = ", stopped early" if early else ""
    print(f"{run.folder} is finished: {unit} {summary[unit]}{why}. {headline(summary)}")
    return summary


def mirror(
    run: runs.Run, unit: str, options: argparse.Namespace
) -> Callable[[Sequence[dict]], None]:
    """Return what adds records to --tensorboard's event files, after those of the log."""
    if not (options.tensorboard and run.writes):
        return lambda records: None
    return event_files.EventFiles(run.folder, unit, run.records).add


def headline(summary: dict) -> str:
    """Return the final figures in one line."""
    final = summary.get("final", {})
    named = (("validation", "val_acc"), ("test", "test_acc"))
    shown = [f"{label} accuracy {100 * final[key]:.2f} %" for label, key in named if key in final]
    return ", ".join(shown)


def drive_to_summary(
    run: runs.Run,
    process: fedavg.FedAvg | centralized.Centralized,
    unit: str,
    total: int,
    learner: Learner,
    opening: dict | None = None,
    account: Callable[[], dict] = dict,
    measure: Callable[[], dict] = dict,
) -> dict:
    """Drive the process to `total` rounds or epochs, then write summary and curves.

    Args:
        opening: what the log's first record says beside its evaluation.
        account: returns further figures of the summary, when the log is complete.
        measure: returns further figures of each evaluation but the first.
    """
    print(f"{run.folder}: {learner.entries.size:,} parameters train on {learner.workspace.device}")
    every = learner.options.eval_every
    evaluated = Evaluated(learner, unit, total, every, opening or {}, measure)
    watch = mirror(run, unit, learner.options)

    def complete(record: dict) -> None:
        evaluated(record)
        watch([record])

    watching = dict(complete=complete, environment=learner.workspace.environment())
    patience = learner.options.early_stop
    watching |= dict(patience=patience, weights=lambda: learner.entries.theta)
    try:
        wall = runs.drive(run, process, unit, total, **watching, gather=learner.group.gather)
    except runs.Interrupted as stop:
        print(
            f"{stop}: saved at {unit} {getattr(process, unit)}; the same command goes on from there"
        )
        raise
    figures = {unit: (reached := getattr(process, unit)), "wall_seconds": wall}
    if reached < total:
        figures["stopped_early"] = patience
        print(f"stopped early: {patience} evaluations without a better validation accuracy")
    summary = conclude(run, figures, account) if run.writes else None
    summary = learner.group.gather(summary)[0]
    print(f"{unit} {reached} reached in {duration(wall)}. {headline(summary)}. See {run.folder}")
    return summary


def conclude(run: runs.Run, figures: dict, account: Callable[[], dict]) -> dict:
    """Write a complete run's curves, and at last its summary, by which it counts as finished."""
    sent = account()
    try:
        plots.plot_curves({run.folder.name: run.records()}, run.folder / "curves.png")
    except ValueError as error:
        print(f"no curves.png: {error}", file=sys.stderr)
    summary = run.summarise(**figures, **sent)
    if sent:
        first, megabytes = run.records()[0], 1e-6
        before = (first.get("bytes_up", 0) + first.get("bytes_down", 0)) * megabytes
        once = f", {before:,.1f} of them for calibration and mask" if before else ""
        print(
            f"sent {sent['bytes_up'] * megabytes:,.1f} MB up, "
            f"{sent['bytes_down'] * megabytes:,.1f} MB down{once}: "
            f"{sent['bytes_to_dense']:.4f} of dense FedAvg"
        )
    return summary
