"""A blank report from somebody's runs: their tables, figures and numbers, and text to write.

pieces, notes = write(history.read_all(["runs"]), Path("report"))
zipped(Path("report"))      # report.zip, for Overleaf

report.tex, references.bib  the writer's: there once, never written again
results.sty                 how the text quotes results
generated/                  written anew each time, as study/report.py writes it; runs.csv has
                            every finished run's row, of all rates that were tried
"""

from __future__ import annotations

import csv
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from study import history, report
from study.figures import FIGURES, Series, drawn
from study.history import METHODS, TUNED
from study.past import Past

LATEX = Path(__file__).parent / "latex"
WRITERS = {"report.tex": LATEX / "blank", "references.bib": LATEX}
PLAIN = {"aggregate": "mean", "server": "fedavg"}  # FedAvg's; of a version without them absent
LENGTHS = ("rounds", "epochs")


class Part(NamedTuple):
    """A table of the report: its name, which runs it holds, what its rows say in any case."""

    name: str
    holds: Callable[[dict], bool]
    says: tuple[str, ...]


PARTS = (
    Part("centralized", lambda o: o["command"] == "centralized" and not masked(o), ()),
    Part("ridge", lambda o: o["command"] == "ridge", ("sharding",)),
    Part("fedavg", lambda o: plain(o) and not masked(o), ("sharding",)),
    Part(
        "masks",
        lambda o: masked(o) and (plain(o) or o["command"] == "centralized"),
        ("mask_rule", "sparsity"),
    ),
    Part("methods", lambda o: o["command"] == "fedavg" and not plain(o), METHODS),
)
ROWS = {  # of a figure, what its axes and panels show; all else that differs is in the labels
    "heterogeneity": ("train", "sharding", "J"),
    "rules": ("sharding", "mask_rule", "sparsity"),
    "agreement": ("sharding",),
}
SOURCES = {  # of the figures of study/figures.py, the runs that they need
    "shards": "fedavg-iid heterogeneity",
    "centralized": "centralized",
    "fedavg-iid": "fedavg-iid",
    "heterogeneity": "heterogeneity",
    "bytes": "rules",
    "density": "density",
    "agreement": "agreement",
    "groups": "agreement",
}


def is_central(run: Past) -> bool:
    """Tell whether a run is a central one, under a mask or not."""
    return run.options["command"] == "centralized"


def masked(options: dict) -> bool:
    """Tell whether a run trains under a mask."""
    return options.get("mask") is not None or options.get("mask_rule") is not None


def plain(options: dict) -> bool:
    """Tell whether a run is FedAvg itself."""
    usual = all(options.get(name) in (None, value) for name, value in PLAIN.items())
    return (
        options["command"] == "fedavg" and usual and not any(options.get(name) for name in METHODS)
    )


def write(runs: Sequence[Past], out: Path) -> tuple[list[str], list[str]]:
    """Write a report's folder from these runs.

    Returns:
        names of the tables and figures, and lines on what was left out.

    Raises:
        ValueError: no run is finished, or the folder holds other files.
    """
    good, notes = history.usable(runs)
    done = [r for r in runs if r.options.get("command") == "calibrate" and r.finished]
    notes = [note for note in notes if not any(f" {run.folder}:" in note for run in done)]
    (good, twice), (done, again) = history.distinct(good), history.distinct(done)
    notes += twice + again
    if not good and not done:
        raise ValueError("; ".join(["no run is finished", *notes]))
    generated = out / "generated"
    if out.exists() and any(out.iterdir()) and not (generated / "numbers.json").exists():
        raise ValueError(f"--out {out} holds other files: give it an empty or a new folder")
    report.clear(generated)
    numbers: dict[str, str | None] = {}
    pieces = []
    for part in PARTS:
        if chosen := [run for run in good if part.holds(run.options)]:
            chosen += dense_beside(chosen, good) if part.name == "masks" else []
            numbers |= write_part(part, chosen, generated)
            pieces.append(f"table/{part.name}")
    report.write_numbers(numbers, generated)
    shown, further = comparable(good)
    ran = experiments(shown, done)
    if len(masks := ran["density"]) > 1:
        first = f"figure/density shows the first mask, {masks[0].runs[0].folder}"
        further.append(f"{first}; `calibrate` has drawn each in its folder")
    figures = draw(ran, generated)
    if good:
        with open(generated / "runs.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(history.numbers(good, history.columns(good)))
    shutil.copy(LATEX / "blank" / "results.sty", out)
    for name, folder in WRITERS.items():
        if not (out / name).exists():
            shutil.copy(folder / name, out)
    return pieces + figures, notes + further


def draw(ran: dict[str, list[Series]], out: Path) -> list[str]:
    """Draw the figures for which there are runs; return their names."""
    figures = []
    for name, sources in SOURCES.items():
        if any(ran[source] for source in sources.split()):
            files = (out / f"{name}.{kind}" for kind in ("png", "pdf"))
            figures += [f"figure/{name}"] * all(drawn(FIGURES[name], ran, file) for file in files)
    return figures


def comparable(runs: Sequence[Past]) -> tuple[list[Past], list[str]]:
    """Return the runs that figures show, and a line for each that only the tables have.

    All are of the data set of most runs; of central ones those with test figures on their way, if
    some have them. Of runs that differ in their rounds or epochs alone those of the most are shown.
    """
    counts = Counter(run.options["data"] for run in runs if "data" in run.options)
    main = max(counts, key=counts.get, default=None)
    others = [run for run in runs if run.options.get("data", main) != main]
    why = {id(run): f"most runs are on {main}" for run in others}
    central = [run for run in runs if is_central(run) and id(run) not in why]
    if any(map(tested, central)):
        untested = "its log has no test figures, which --eval-test writes"
        why |= {id(run): untested for run in central if not tested(run)}
    names = [name for name in history.differing(runs) if name not in LENGTHS]
    for group in history.rows([r for r in runs if id(r) not in why], names).values():
        longest = max(group, key=length)
        for run in group:
            if length(run) < length(longest):
                why[id(run)] = f"{longest.folder} is the same but longer"
    reasons: dict[str, list[Past]] = {}
    for run in runs:
        if id(run) in why:
            reasons.setdefault(why[id(run)], []).append(run)
    notes = [
        f"in no figure: {first.folder}{f' and {len(more)} more' * bool(more)}: {reason}"
        for reason, (first, *more) in reasons.items()
    ]
    return [run for run in runs if id(run) not in why], notes


def length(run: Past) -> int:
    """Return the rounds or epochs of a run."""
    return run.options.get(f"{run.unit}s") or 0


def tested(run: Past) -> bool:
    """Tell whether a log has test figures on the run's way."""
    return any("test_acc" in record for record in run.records[:-1])


def write_part(part: Part, runs: list[Past], out: Path) -> dict[str, str | None]:
    """Write a table: a row for what differs, of each the best rate; return its numbers."""
    says = [n for n in part.says if any(run.options.get(n) for run in runs)]
    names = [n for n in dict.fromkeys([*history.columns(runs), *says]) if n not in TUNED]
    if len({run.options["command"] for run in runs}) == 1:
        names = [n for n in names if n != "command"] or ["command"]
    best = history.best_rates(runs, names)
    tuned = [column for column in TUNED if column in history.differing(runs)]
    lines = history.lines(best, names, tuned)
    report.write_lines(part.name, lines, len(names), out)
    return report.line_numbers(part.name, lines, len(names))


def experiments(runs: list[Past], calibrated: list[Past]) -> dict[str, list[Series]]:
    """Return runs as the figures take them: rows by experiment."""
    central = [run for run in runs if is_central(run)]
    federated = [run for run in runs if plain(run.options)]
    dense = [run for run in federated if not masked(run.options)]
    iid = [run for run in dense if run.sharding == "iid"]
    masks = [run for run in federated if masked(run.options)]
    several = len({run.sharding for run in dense}) > 1
    measured = [run for run in calibrated if run.summary.get("density")]
    compared = [run for run in measured if run.summary.get("overlap", {}).get("iou")]
    return {
        "centralized": curves(central),
        "fedavg-iid": curves(iid),
        "heterogeneity": configurations(dense if several else [], ROWS["heterogeneity"]),
        "rules": configurations(masks + dense_beside(masks, runs), ROWS["rules"]),
        "density": configurations(measured, ROWS["agreement"]),
        "agreement": configurations(compared, ROWS["agreement"]),
    }


def dense_beside(masks: Sequence[Past], runs: Sequence[Past]) -> list[Past]:
    """Return the runs without a mask that masked ones compare with: dense training's."""
    alike = {compared_by(run) for run in masks}
    dense = [run for run in runs if not masked(run.options)]
    trained = [run for run in dense if plain(run.options) or PARTS[0].holds(run.options)]
    return [run for run in trained if compared_by(run) in alike]


def compared_by(run: Past) -> tuple:
    """Return what trained, how long, on which clients: runs are compared where these are alike."""
    names = ("command", "train", "J", "rounds", "epochs", "schedule", "sharding")
    return tuple(run.options.get(name) for name in names)


def curves(runs: list[Past]) -> list[Series]:
    """Return rows by what trains, then by whatever else differs."""
    names = ("train", *(name for name in history.columns(runs) if name != "train"))
    return [Series(key, names, group) for key, group in history.rows(runs, names).items()]


def configurations(runs: list[Past], shown: Sequence[str]) -> list[Series]:
    """Return a row of each configuration, at the rate that is best by validation.

    Args:
        shown: options that the figure's axes and panels show.
    """
    columns = history.columns(runs)
    names = (*shown, *(n for n in columns if n not in (*shown, *TUNED, "command")))
    best = history.best_rates(runs, names)
    return [Series(key, names, group) for key, group in history.rows(best, names).items()]


def zipped(out: Path) -> Path:
    """Write the folder as a zip beside it, all that LaTeX needs; return its path."""
    path = out.with_name(f"{out.name}.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(out.rglob("*")):
            if file.suffix in (".tex", ".sty", ".bib", ".pdf"):
                archive.write(file, file.relative_to(out))
    return path
