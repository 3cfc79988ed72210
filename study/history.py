"""Runs that somebody made, by whatever commands: what differs between them, and their table.

    runs = read_all(["runs"])
    lines(runs, columns(runs))      # heading first; a row is a mean over seeds

Options that may change while a run goes on, paths and hashes are no difference; the seed is what a
row is a mean over. N_c and the concentration of a Dirichlet sharding are one column, `sharding`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import masks
from machine import safe_files
from machine.runs import folders_below
from study import packed, past
from study.measures import TEST, VALIDATION, Measure, Sample, best_of, merits
from study.past import Past
from study.tables import INSIDE, place
from study.typeset import formula

MEASURES = (
    *(VALIDATION, TEST),
    Measure("best validation %", "best_by_validation/val_acc", 100, 2),
    Measure("test % at best", "best_by_validation/test_acc", 100, 2),
)
SEEDS = "seeds"
ABSENT = "-"  # an option that a run does not have, or leaves off
UNSAID = {ABSENT, "auto", "none"}  # in a label
DENSE = "dense"  # the mask rule of a run that trains everything
LEADING = (  # of the columns; the others follow in the order of the command line
    *("command", "train", "head", "sharding", "J", "aggregate", "server"),
    *("mask_rule", "sparsity", "threshold", "calibration_rounds", "schedule"),
)
METHODS = (  # options that make another method of FedAvg, where they are set
    *("prox", "scaffold", "local_norm", "fedir", "fedvc", "dp_noise", "dp_clip", "dropout"),
    *("straggler_fraction", "secure_aggregation"),
)
TOLD = (  # wherever runs that have them differ in them, though others tell the same
    *("data", "model", "train", "sharding", "J", "aggregate", "server", "mask_rule", "sparsity"),
    *("schedule", *METHODS),
)
UNCOMPARED = {  # what no row is told by
    *("seed", "name", "runs_dir", "data_dir", "device", "threads", "pixels", "nc", "dirichlet"),
    *("search", "search_lr", "search_weight_decay", "search_schedule", "search_length", "fresh"),
    *("eval_every", "eval_test", "eval_batch", "cuda_graph", "fused", "processes", "diagnostics"),
    *("tensorboard", "wandb", "micro_batch", "early_stop"),
}
MASK = (  # options of what a mask keeps
    *("mask_rule", "sparsity", "threshold", "per_tensor", "mask_scope", "mask_within"),
)
SCORING = (  # options of how clients score for a mask
    *("calibration_rounds", "calibration_images", "calibration_fraction", "damp"),
    *("fisher_labels", "fisher_score", "consensus", "quorum", "score_precision"),
)
TUNED = ("weight_decay", "lr")  # chosen by validation where they are no column
WORDY = {"command", "sharding", "mask_rule", "schedule", "aggregate", "server", "consensus"}


def read_all(folders: Iterable[str]) -> list[Past]:
    """Return the pasts of the runs that these folders are or hold, each once."""
    runs = [run for folder in folders for run in runs_below(folder) or [read(folder)]]
    return [*{run.folder: run for run in runs}.values()]


def runs_below(folder: str | Path) -> list[Past]:
    """Return the pasts of the runs at or below a folder.

    Those that a sweep has put into a table's one file count as folders beside it.
    """
    runs = {path: read(path) for path in folders_below(folder)}
    for file in sorted(Path(folder).rglob(packed.FILE)):
        for name, run in packed.read(file).items():
            path = file.parent / name
            runs.setdefault(path, told(run._replace(folder=path)))
    return [*runs.values()]


def read(folder: str | Path) -> Past:
    """Read a run's folder; its options are those that rows are told by."""
    return told(past.read(folder))


def told(run: Past) -> Past:
    """Return a run with the options that rows are told by."""
    shared = {"sharding": run.sharding} if "clients" in run.options else {}
    return run._replace(config=run.config | {"options": run.options | shared | masked(run)})


def masked(run: Past) -> dict[str, object]:
    """Return what says which mask a run trains under; no way of scoring, of a rule without scores.

    Of a given mask the run's own copy says how it was made, else its file's name is told.
    """
    options = {} if run.options.get("mask") is None else made_by(run)
    rule = options.get("mask_rule", run.options.get("mask_rule"))
    if rule in masks.RULES and not masks.needs_scores(rule):
        options |= {name: None for name in SCORING if name in run.options}
    return options


def made_by(run: Past) -> dict[str, object]:
    """Return the options that a given mask was made by, as far as the run tells."""
    try:
        origin = safe_files.load_checked(run.folder / "mask.pt")["made"]
        names = {*MASK, *SCORING} - {"score_precision"}  # which it has in other words
        return {"mask_rule": origin["mask_rule"]} | {n: origin[n] for n in names & origin.keys()}
    except (OSError, ValueError, LookupError, TypeError):
        return {"mask_rule": rule_of(run.options)}


def rule_of(options: dict) -> str:
    """Return the mask rule, of a given mask the name of its file or its folder, or dense."""
    if options.get("mask_rule") is not None or options.get("mask") is None:
        return options.get("mask_rule") or DENSE
    path = Path(options["mask"])
    return f"mask {path.parent.name if path.name == 'mask.pt' and path.parent.name else path.name}"


# ---------------------------------------------------------------------------- what differs


def text(value: object) -> str:
    """Write an option's value in a table."""
    if value is None or value is False:
        return ABSENT
    if isinstance(value, (list, tuple)):
        return " ".join(map(text, value))
    return "yes" if value is True else f"{value:g}" if isinstance(value, float) else str(value)


def differing(runs: Iterable[Past]) -> list[str]:
    """Return the options in which runs differ, in the order of a table's columns."""
    runs = list(runs)
    names = dict.fromkeys(name for name in LEADING)
    names |= dict.fromkeys(name for run in runs for name in run.options)
    compared = [n for n in names if n not in UNCOMPARED and not n.endswith("_sha256")]
    differ = [n for n in compared if len({text(run.options.get(n)) for run in runs}) > 1]
    makes_masks = (*MASK, *SCORING, "sharding", "seed")
    if "mask" in differ:  # a path: it is told last, and only where nothing else tells masks apart
        differ.remove("mask")
        differ += ["mask"] * (
            len(rows(runs, [*makes_masks, "mask"])) > len(rows(runs, makes_masks))
        )
    return differ


def columns(runs: Sequence[Past]) -> list[str]:
    """Return options that tell apart what differs; one that follows from those before is left out.

    The learning rate is the last of them, and among them wherever it differs.
    """
    names = differing(runs)
    last = [name for name in TUNED if name in names]
    chosen = splitting(runs, [], [n for n in names if n not in TUNED])
    split = splitting(runs, chosen, last)
    return [*chosen, *(n for n in last if n in split or n == "lr")] or ["command"]


def splitting(runs: Sequence[Past], before: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return of these options, in their order, those that split the rows of all before them, and
    what is TOLD."""
    chosen: list[str] = []
    for name in names:
        having = [run for run in runs if name in run.options]
        tells = name in TOLD and len(rows(having, [name])) > 1
        if tells or len(rows(runs, [*before, *chosen, name])) > len(rows(runs, [*before, *chosen])):
            chosen.append(name)
    return chosen


def arranged(runs: Sequence[Past], by: str | None) -> tuple[list[Past], list[str], list[str]]:
    """Return the runs to show, the columns that tell rows apart, and those that were tuned.

    Columns are those of --by, as nc,J, and what splits their rows; else all that differ. Of a row
    of --by the learning rate that is best by validation is shown, with the weight decay: a tuned
    column says which.

    Raises:
        ValueError: no run has such an option.
    """
    if by is None:
        return list(runs), columns(runs), []
    names = named(runs, by)
    names += splitting(runs, names, [n for n in differing(runs) if n not in (*names, *TUNED)])
    tuned = [name for name in TUNED if name in differing(runs) and name not in names]
    return best_rates(runs, names), names, tuned


def named(runs: Sequence[Past], by: str) -> list[str]:
    """Return the options that --by names; nc is part of the sharding."""
    names = [name.strip().replace("-", "_") for name in by.split(",")]
    names = ["sharding" if name in ("nc", "dirichlet") else name for name in names]
    for name in names:
        if not any(name in run.options for run in runs):
            differ = ", ".join(differing(runs)) or "in nothing but the seed"
            raise ValueError(f"--by {name}: no such option; the runs differ in: {differ}")
    return list(dict.fromkeys(names))


def rows(runs: Iterable[Past], names: Sequence[str]) -> dict[tuple[str, ...], list[Past]]:
    """Return the runs by the values of these options, in the order of the values."""
    groups: dict[tuple[str, ...], list[Past]] = {}
    for run in runs:
        groups.setdefault(tuple(text(run.options.get(name)) for name in names), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: [rank(value) for value in item[0]]))


def rank(value: str) -> tuple:
    """Return what sorts values: iid, then shardings and other numbers by size, then words."""
    number = value.removeprefix("nc").removeprefix("dir")
    try:
        return (1, float(number), "")
    except ValueError:
        return (0 if value in ("iid", ABSENT) else 2, 0.0, value)


def label(names: Sequence[str], values: Sequence[str], plain: bool = False) -> str:
    """Return a row's name in a figure: N_c = 5, J 4; plain: as a terminal has it."""
    return worded(names, values, plain) or ("all runs" if not names else "default")


def worded(names: Sequence[str], values: Sequence[str], plain: bool = False) -> str:
    """Return the same; nothing where no value is set."""
    parts = []
    for name, value in zip(names, values, strict=True):
        if value in UNSAID:
            parts.append({"mask_rule": DENSE}.get(name, ""))
        elif name == "J" and not plain:
            parts.append(f"$J = {value}$")
        elif name == "sharding":
            parts.append(value if plain else sharded(value))
        else:
            said = name.replace("_", " ")
            parts.append(value if name in WORDY else said if value == "yes" else f"{said} {value}")
    return ", ".join(filter(None, parts))


def sharded(name: str) -> str:
    """Return a sharding's name as a figure has it: iid, $N_c = 5$."""
    return f"${formula(name)}$" if formula(name) else name


def best_rates(runs: Sequence[Past], names: Sequence[str]) -> list[Past]:
    """Return of every row the runs whose rate and weight decay have the best mean validation."""
    chosen: list[Past] = []
    for group in rows(runs, names).values():
        tried = rows(group, TUNED)
        accuracies = {
            rate: [(run.options["seed"], run.accuracy("val_acc")) for run in some]
            for rate, some in tried.items()
        }
        chosen += tried[best_of(accuracies)]
    return chosen


def at_ends(runs: Sequence[Past], names: Sequence[str]) -> list[str]:
    """Return a line on the rows whose best rate, of several, is an end of those tried."""
    ends = []
    for key, group in rows(runs, names).items():
        decay = best_rates(group, names)[0].options.get("weight_decay")
        tried: dict[float, list[tuple[int, float | None]]] = {}
        for run in group:
            if run.options.get("lr") is not None and run.options.get("weight_decay") == decay:
                pair = run.options["seed"], run.accuracy("val_acc")
                tried.setdefault(run.options["lr"], []).append(pair)
        if len(tried) > 1 and (where := place(merits(tried))) != INSIDE:
            ends.append(f"{label(names, key, plain=True)} ({where})")
    said = "best at an end of the rates tried, beyond which to try"
    return [f"{said}: {'; '.join(ends)}"] * bool(ends)


# ---------------------------------------------------------------------------- the table


def usable(runs: Iterable[Past]) -> tuple[list[Past], list[str]]:
    """Return the runs that a table can hold, and a line for each that it cannot."""
    good, notes = [], []
    for run in runs:
        if run.fault or not run.finished:
            notes.append(f"left out: {run.fault or f'{run.folder}: {run.state}'}")
        elif not run.summary.get("final"):
            command = run.options.get("command")
            notes.append(f"left out: {run.folder}: a run of {command}, without accuracy")
        else:
            good.append(run)
    return good, notes


def distinct(runs: Iterable[Past]) -> tuple[list[Past], list[str]]:
    """Return a run for each seed of what differs, the longest or else the fullest or the latest,
    and a line for each other."""
    runs = list(runs)
    chosen, notes = [], []
    for group in rows(runs, [*differing(runs), "seed"]).values():
        *others, run = sorted(group, key=lambda run: (run.reached, figures(run), run.changed))
        chosen.append(run)
        same = f"{run.folder} has the same options and seed, and stands for both"
        notes += [f"left out: {other.folder}: {same}" for other in others]
    return chosen, notes


def figures(run: Past) -> int:
    """Return how many kinds of figures a run's log has."""
    return len({name for record in run.records for name in record})


def measures_of(runs: Iterable[Past]) -> list[Measure]:
    """Return the figures that some of the runs have."""
    return [measure for measure in MEASURES if measure.over(runs).values]


def lines(runs: Sequence[Past], names: Sequence[str], tuned: Sequence[str] = ()) -> list[list[str]]:
    """Return the table's lines, heading first: means over seeds with standard deviations.

    Args:
        names: options that tell rows apart.
        tuned: options that each row has chosen, shown beside its figures.
    """
    measures = measures_of(runs)
    heading = [name.replace("_", " ") for name in (*names, *tuned)]
    table = [[*heading, *(m.heading for m in measures), SEEDS]]
    for key, group in rows(runs, names).items():
        cells = [
            DENSE if (n, x) == ("mask_rule", ABSENT) else x for n, x in zip(names, key, strict=True)
        ]
        chosen = [
            rate_of(group[0]) if name == "lr" else text(group[0].options.get(name))
            for name in tuned
        ]
        table.append([*cells, *chosen, *(m.text(m.over(group)) for m in measures), seeds_of(group)])
    return table


def rate_of(run: Past) -> str:
    """Write a run's rate, of dense training times what a mask makes of it."""
    rate, factor = text(run.options.get("lr")), run.summary.get("lr_factor", 1.0)
    return rate if factor == 1.0 else f"{rate} x {factor:.3g}"


def numbers(runs: Sequence[Past], names: Sequence[str]) -> list[list[str]]:
    """Return the same for a spreadsheet: mean and deviation apart, and the folders of each row."""
    measures = measures_of(runs)
    heads = [f"{m.heading} {what}" for m in measures for what in ("mean", "deviation")]
    table = [[*names, *heads, SEEDS, "runs"]]
    for key, group in rows(runs, names).items():
        figures = [part for m in measures for part in apart(m.over(group))]
        table.append([*key, *figures, seeds_of(group), " ".join(str(run.folder) for run in group)])
    return table


def seeds_of(runs: Iterable[Past]) -> str:
    """Return how many seeds there are."""
    return f"{len({run.options['seed'] for run in runs})}"


def apart(sample: Sample) -> list[str]:
    """Return mean and standard deviation in full; nothing where they are not defined."""
    return ["" if x is None else f"{x:.6g}" for x in (sample.mean, sample.deviation)]


def along(runs: Sequence[Past], names: Collection[str], shown: str = "columns") -> list[str]:
    """Return a line on what else differs, along with the columns.

    Of runs of several commands the options that all of these have, in which runs that use them
    differ.

    Args:
        shown: what the names are in what is shown.
    """
    commands = rows(runs, ["command"]).values()
    shared = [n for n in differing(runs) if all(any(n in r.options for r in c) for c in commands)]
    others = [n for n in shared if n not in names and len(rows(users(runs, n), [n])) > 1]
    said = f"not among the {shown}, as they change along with them: {', '.join(others)}"
    return [said] * bool(others)


def users(runs: Iterable[Past], name: str) -> list[Past]:
    """Return the runs that use an option: one of a mask's only under a mask."""
    if name in (*MASK, "mask_lr"):
        return [run for run in runs if run.options.get("mask_rule") is not None]
    if name in (*SCORING, "freeze_head"):
        return [run for run in runs if run.options.get(name) is not None]
    return list(runs)


def split_by(runs: Sequence[Past], by: str | None, names: Sequence[str]) -> list[str]:
    """Return a line on the options that tell rows apart beside those of --by."""
    further = [name for name in names if name not in named(runs, by)] if by else []
    return [f"--by {by}: runs differ in {', '.join(further)} too, which is told as well"] * bool(
        further
    )
