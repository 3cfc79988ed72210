"""A run's folder: opened for the options that define the run, and what a finished one lacks."""

from __future__ import annotations

import hashlib
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np

import model as vit
from machine import runs, safe_files
from machine.device import processor
from training.features import head_splits
from training.mask_file import given_mask
from training.naming import defining
from training.watching import headline

if TYPE_CHECKING:
    from training.workspace import Workspace

SEARCHES = {  # options of what went before a run
    *("search", "search_lr", "search_weight_decay", "search_schedule", "search_length")
}


class Running(NamedTuple):
    """Run."""

    name: Annotated[
        str | None, "the run's folder below --runs-dir [made from the options]", "--name"
    ] = None
    runs_dir: Annotated[str, "where runs go", "path"] = "runs"


def open_run(
    workspace: Workspace,
    model: vit.VisionTransformer,
    name: str,
    stored: dict,
) -> runs.Run:
    """Open the run's folder; one made by other options, splits or weights is refused."""
    run = runs.Run(
        safe_files.folder_below(stored["runs_dir"], name), writes=workspace.group.rank == 0
    )
    if run.config_path.exists():
        command = run.config()["options"].get("command")
        if command != stored["command"]:
            raise ValueError(f"{run.folder} is of {command}, another command: take another --name")
    if stored.get("mask_rule") is not None:
        vit.scoped_names(model, stored["mask_scope"])  # refuses before anything is written
    if stored.get("head_images") is not None:
        head_splits(workspace, stored["head_images"])
    shards = workspace.shards if "clients" in stored else []
    split = hashlib.sha256(b"".join(x.tobytes() for x in [workspace.val_index, *shards]))
    made_from = {"split_sha256": split.hexdigest(), "weights_sha256": vit.fingerprint(model)}
    made_from["pixels"] = workspace.normalisation()
    if stored.get("mask") is not None:
        mask = given_mask(stored["mask"], model, run.folder / "mask.pt")
        made_from["mask_sha256"] = mask.sha256
        if mask.origin["weights_sha256"] != made_from["weights_sha256"]:
            print(f"warning: --mask {stored['mask']} was made for other weights", file=sys.stderr)
    extra = {
        "environment": workspace.environment(),
        "processor": processor(workspace.device),
        "python": platform.python_version(),
        "commit": git_commit(),
    }
    if shards:
        sizes = [len(shard) for shard in shards]
        extra["shards"] = {"clients": len(sizes), "smallest": min(sizes), "largest": max(sizes)}
    free = set(stored) - set(defining(stored))
    free |= same_files(run, made_from) | SEARCHES & set(stored)
    stored = stored | {
        name: max(stored[name], n) for name, n in reached(run).items() if name in free
    }
    run.open(stored | made_from, extra, free=free)
    if shards and run.writes and not (run.folder / "shards.npz").exists():
        keep_shards(run.folder / "shards.npz", workspace.val_index, shards)
    return run


def keep_shards(path: Path, validation: np.ndarray, shards: list[np.ndarray]) -> None:
    """Write who holds what: indices of validation images, of all clients', and where each ends."""
    clients, ends = np.concatenate(shards), np.cumsum([len(shard) for shard in shards])

    def write(aside: Path) -> None:
        with open(aside, "wb") as file:
            np.savez_compressed(file, validation=validation, clients=clients, ends=ends)

    safe_files.write_atomically(path, write)


def reached(run: runs.Run) -> dict[str, int]:
    """Return how many rounds or epochs a run has, which no later command makes fewer."""
    last = []
    if run.config_path.exists():
        try:
            last = run.records()[-1:]
        except safe_files.DamagedFile:  # the checkpoint holds the log, too
            last = run.vouched_records()[-1:]
    return {
        f"{unit}s": math.ceil(r[unit]) for r in last for unit in ("round", "epoch") if unit in r
    }


def same_files(run: runs.Run, made_from: dict) -> set[str]:
    """Return the options that name the files that a run was made with, whatever their paths."""
    before = run.config()["options"] if run.config_path.exists() else {}
    hashes = {"weights": "weights_sha256", "mask": "mask_sha256"}
    return {n for n, key in hashes.items() if key in before and before[key] == made_from.get(key)}


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
    try:
        summary = run.summary()
    except safe_files.DamagedFile as error:
        runs.say(f"warning: {error}; the run's end is repeated")
        return None
    if summary is None or unit not in summary:
        return None
    early = patience is not None and summary.get("stopped_early") == patience
    if summary[unit] < total and not early:
        return None
    for fault in run_faults(run):
        runs.say(f"warning: {fault}")
    why = ", stopped early" if early else ""
    why += f", beyond the {total} asked for" if summary[unit] > total else ""
    print(f"{run.folder} is finished: {unit} {summary[unit]}{why}. {headline(summary)}")
    return summary


def run_faults(run: runs.Run) -> list[str]:
    """Name what is gone or damaged among the files of a finished run."""
    options, faults = run.config()["options"], []

    def read(name: str, purpose: str) -> Any:
        path = run.folder / name
        try:
            return safe_files.load_checked(path, run.purpose(purpose))
        except FileNotFoundError:
            faults.append(f"{path} is gone")
        except (OSError, ValueError) as error:
            faults.append(str(error))
        return None

    if options.get("head", "linear") != "linear":
        read("head.pt", "head.pt")
    if options.get("mask") is not None or options.get("mask_rule") is not None:
        read("mask.pt", "mask.pt")
    log = run.log_path.read_bytes() if run.log_path.exists() else None
    if log is None:
        faults.append(f"{run.log_path} is gone")
    if (checkpoint := read("checkpoint.pt", "checkpoint")) is None:
        return faults
    try:
        with safe_files.contents(run.checkpoint_path):
            if log not in (None, checkpoint["log"]["text"].encode()):
                faults.append(f"{run.log_path} is not as the checkpoint knows it")
            states = checkpoint["state"]["process"].get("states", {})
            for name, state in states.items():
                for file in sorted(set(state.get("files", {}).values())):
                    read(f"{name}/{file}", f"{name}/{file}")
    except ValueError as error:
        faults.append(str(error))
    return faults
