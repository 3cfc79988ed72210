"""One run from its options to its summary: folder, head, mask, learner, loop, curves."""

from __future__ import annotations

import hashlib
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np

import masks
import model as vit
from federated.client_states import ClientTerms
from flat import Sgd
from machine import runs, safe_files
from machine.device import processor
from machine.status import duration
from training.calibration import GivenMask, Masking, find_mask
from training.features import Head, features, head_splits, set_fitted_head
from training.learner import Learner, Training
from training.mask_file import given_mask
from training.mirrors import mirror
from training.naming import defining
from training.watching import Evaluated, Watching, end_advice, end_figures, headline

if TYPE_CHECKING:
    from training.workspace import Workspace

SEARCHES = {  # options of what went before a run
    *("search", "search_lr", "search_weight_decay", "search_schedule", "search_length")
}


class LearnerOptions(NamedTuple):
    """What trains, how a step is taken, with which head and under which mask."""

    training: Training
    sgd: Sgd
    head: Head
    masking: Masking
    given_mask: GivenMask = GivenMask()
    terms: ClientTerms = ClientTerms()
    cuda_graph: str = "auto"


class Running(NamedTuple):
    """Run."""

    name: Annotated[
        str | None, "the run's folder below --runs-dir [made from the options]", "--name"
    ] = None
    runs_dir: Annotated[str, "where runs go", "path"] = "runs"


# ---------------------------------------------------------------------------- the folder


def open_run(
    workspace: Workspace,
    model: vit.VisionTransformer,
    name: str,
    stored: dict,
    shards: list[np.ndarray] | None = None,
) -> runs.Run:
    """Open the run's folder; one made by other options, splits or weights is refused."""
    run = runs.Run(
        safe_files.folder_below(stored["runs_dir"], name), writes=workspace.group.rank == 0
    )
    if stored.get("mask_rule") is not None:
        vit.scoped_names(model, stored["mask_scope"])  # refuses before anything is written
    if stored.get("head_images") is not None:
        head_splits(workspace, stored["head_images"])
    split = hashlib.sha256(b"".join(x.tobytes() for x in [workspace.val_index, *(shards or [])]))
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
    free = set(stored) - set(defining(stored)) | same_files(run, made_from) | SEARCHES & set(stored)
    stored = stored | {
        name: max(stored[name], n) for name, n in reached(run).items() if name in free
    }
    run.open(stored | made_from, extra, free=free)
    if shards and run.writes and not (run.folder / "shards.npz").exists():
        ends = np.cumsum([len(shard) for shard in shards])
        clients = np.concatenate(shards)

        def write(aside: Path) -> None:
            with open(aside, "wb") as file:
                np.savez_compressed(
                    file, validation=workspace.val_index, clients=clients, ends=ends
                )

        safe_files.write_atomically(run.folder / "shards.npz", write)
    return run


def reached(run: runs.Run) -> dict[str, int]:
    """Return how many rounds or epochs a run has, which no later command makes fewer."""
    last = run.records()[-1:] if run.config_path.exists() else []
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
    summary = run.summary()
    if summary is None or unit not in summary:
        return None
    early = patience is not None and summary.get("stopped_early") == patience
    if summary[unit] < total and not early:
        return None
    for fault in run_faults(run):
        runs.say(f"warning: {fault}")
    why = ", stopped early" if early else ""
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


# ---------------------------------------------------------------------------- what trains


def prepare(
    workspace: Workspace,
    model: vit.VisionTransformer,
    run: runs.Run,
    shards: list[np.ndarray],
    o: LearnerOptions,
) -> Learner:
    """Return the learner of a run as it began: its head fitted, its mask found or made.

    Args:
        shards: whose data a mask is calibrated on.
    """
    head = o.head
    if head.head != "linear":
        set_fitted_head(workspace, model, head.head, head.head_images, run)
    start, to_all = None, head.head != "linear" and head.head_images is None
    if to_all and not run.saved() and o.training.train != "head":
        start = {"train": features(workspace, model, "train")}
    learner = Learner(
        workspace,
        model,
        o.training,
        o.sgd,
        freeze_head=head.freeze_head,
        mask=find_mask(workspace, model, o.given_mask.mask, o.masking, shards, run, o.cuda_graph),
        mask_lr=o.given_mask.mask_lr,
        prox=o.terms.prox,
        corrected=o.terms.scaffold,
    )
    learner.start = start  # of the untrained backbone, for the first evaluation
    return learner


# ---------------------------------------------------------------------------- while it goes on


def drive(
    run: runs.Run,
    process: Any,
    unit: str,
    total: int,
    learner: Learner,
    every: float,
    watching: Watching,
    *,
    draw_curves: Callable[[dict[str, Sequence[dict]], Path], None],
    theta: Callable[[], Any],
    opening: dict | None = None,
    account: Callable[[], dict] = dict,
    measure: Callable[[], dict] = dict,
    test: bool = True,
) -> dict:
    """Drive the process to `total` rounds or epochs, then write summary and curves.

    Args:
        process: as machine.runs.drive takes it.
        every: units between evaluations.
        theta: returns the weights (P,) that are evaluated.
        draw_curves: (label -> records, path), draws a log.
        opening: what the log's first record says beside its evaluation.
        account: returns further figures of the summary, when the log is complete.
        measure: returns further figures of each evaluation but the first.
        test: False: the test set is not looked at, whatever --eval-test says.
    """
    workspace = learner.workspace
    sets = ("val", "test") if test and watching.eval_test else ("val",)
    print(f"{run.folder}: {learner.entries.size:,} parameters train on {workspace.device}")
    if rate := learner.masked_rate():
        print(rate_line(learner, rate))

    def evaluate() -> dict:
        learner.entries.load(theta())
        return learner.evaluate(sets)

    opening, classes = (opening or {}) | rate, workspace.classes
    evaluated = Evaluated(evaluate, unit, total, every, opening, measure, classes)
    watch = mirror(run, unit, watching)

    def complete(record: dict) -> None:
        evaluated(record)
        watch([record])

    try:
        wall, best = runs.drive(
            run,
            process,
            unit,
            total,
            complete=complete,
            environment=learner.environment(),
            patience=watching.early_stop,
            weights=theta,
            gather=learner.group.gather,
        )
    except runs.Interrupted as stop:
        print(
            f"{stop}: saved at {unit} {getattr(process, unit)}; the same command goes on from there"
        )
        raise
    figures = {unit: (reached := getattr(process, unit)), "wall_seconds": wall} | rate
    if reached < total:
        figures["stopped_early"] = watching.early_stop
        print(
            f"stopped early: {watching.early_stop} evaluations without a better validation accuracy"
        )
    tested = end_figures(learner, theta(), best.get("weights")) if test else ({}, {})
    summary = conclude(run, figures, tested, account, draw_curves) if run.writes else None
    summary = learner.group.gather(summary)[0]
    if advice := run.writes and end_advice(
        run.records(), classes, len(workspace.val_index), learner.dense_lr
    ):
        print(f"warning: {advice}", file=sys.stderr)
    print(f"{unit} {reached} reached in {duration(wall)}. {headline(summary)}. See {run.folder}")
    return summary


def rate_line(learner: Learner, rate: dict[str, float]) -> str:
    """Say how the learning rate follows the mask."""
    origin, what = learner.mask.origin, "all sensitivity"
    if not masks.needs_scores(origin["mask_rule"]):
        what = "the entries"
    elif "sensitivity_share" not in origin:
        what = "the entries (its file is older, and does not say how much of the sensitivity)"
    return (
        f"lr {learner.dense_lr:g} x {rate['lr_factor']:.4g} = {rate['lr']:.4g}: --mask-lr "
        f"{learner.mask_lr}, as the mask keeps {100 * rate['sensitivity_share']:.3g} % of {what}; "
        "--mask-lr raw takes --lr as it stands"
    )


def conclude(
    run: runs.Run,
    figures: dict,
    tested: tuple[dict, dict],
    account: Callable[[], dict],
    draw_curves: Callable[[dict[str, Sequence[dict]], Path], None],
) -> dict:
    """Write a complete run's curves, and at last its summary, by which it counts as finished.

    Args:
        tested: test figures of the last weights and of the best.
    """
    sent = account()
    try:
        draw_curves({run.folder.name: run.records()}, run.folder / "curves.png")
    except ValueError as error:
        print(f"no curves.png: {error}", file=sys.stderr)
    summary = run.summarise(tested, **figures, **sent)
    if sent:
        first, megabytes = run.records()[0], 1e-6
        before = (first.get("bytes_up", 0) + first.get("bytes_down", 0)) * megabytes
        once = f", {before:,.1f} of it all for calibration and mask" if before else ""
        print(
            f"sent {sent['bytes_up'] * megabytes:,.1f} MB up, "
            f"{sent['bytes_down'] * megabytes:,.1f} MB down{once}: "
            f"{sent['bytes_to_dense']:.4f} of dense FedAvg"
        )
    return summary
