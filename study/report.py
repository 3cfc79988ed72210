"""The report's tables, figures and quoted numbers, from the logs of one scale's runs, and of what a
GPU measured beside the scales.

    python train.py report --scale cpu      # study/latex/build.sh calls this, and then LaTeX

    numbers.tex, numbers.json   every figure that the prose may quote, under a readable key:
                                EXPERIMENT/ROW'S KEY/COLUMN; EXPERIMENT/COLUMN=VALUE/best/COLUMN,
                                the best of such rows by validation; setup/OPTION; gpu/RUN/COLUMN;
                                FILE/ROW'S KEY/COLUMN, of a table that is a file; density/KIND
    NAME.tex, NAME.md           an experiment's table, for two columns; NAME-short.tex, for one
    FILE.tex                    a table that is a file
    NAME.pdf                    the figures for which there is data

A key that the experiments of any scale declare is known; one that did not run has no value.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from machine import runs, safe_files
from study import experiments
from study.figures import FIGURES, Series, drawn
from study.measures import SECONDS
from study.measures import VALIDATION as ACCURACY
from study.past import Past
from study.tables import INSIDE, PLACE, Experiment, placed
from study.typeset import NOT_RUN, grouping, latex_table, markdown_table, tex

HEADING = "% written by train.py report: do not edit\n"
VALIDATION = ACCURACY.heading
CAPTIONED = ("seeds", "other lr", PLACE)  # of a table's columns, what its caption says
SETUP = (
    *("model", "image_size", "data", "val_fraction", "clients", "fraction", "rounds", "epochs"),
    *("J", "batch_size", "momentum", "weight_decay", "schedule", "head", "eval_every", "nc"),
    *("calibration_rounds", "calibration_images", "calibration_fraction", "damp", "sparsity"),
    *("prox", "dp_clip", "dare_drop", "ties_keep", "straggler_fraction", "server_lr", "threads"),
)
ENVIRONMENT = ("device", "precision", "torch")
ON_A_GPU = {  # beside the scales, in gpu/
    "iid": "iid-linear-lr0.03",
    "nc10": "nc10-ridge-lr0.01",
    "nc5": "nc5-ridge-lr0.003",
    "nc1": "nc1-ridge-lr0.001",
}
BESIDE = {"gpu-64px": ("query-key",)}  # scale -> its tables that every report has
CALIBRATED = "calibrate/iid-least-sensitive-0.9/summary.json"  # a mask of four rounds


class File(NamedTuple):
    """A table that is a file: its place below the results, its columns that are rows' keys, and
    those that LaTeX shows beside them."""

    path: str
    width: int
    shown: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the report calls it."""
        return Path(self.path).stem.replace("_", "-")


FILES = (
    File("gpu/pilot_masks.csv", 2, (VALIDATION, "test %", "bytes to dense")),
    File("gpu/mask_rates.csv", 3, ("factor",)),
    File("cpu/score_precision.csv", 2, ("fp16", "bf16", "fp32, other images")),
    File("cpu/rates.csv", 4, ("best to matched", "best to functional")),
    File("cpu/rate_powers.csv", 2, ("power", "low", "high")),
)


def write(scale: str, results: Path, out: Path) -> list[str]:
    """Write all that the report takes from the runs below `results`/`scale` into the folder `out`.

    Returns:
        the names of the tables and figures that could be made.

    Raises:
        ValueError: the folder holds other files than an earlier report's.
    """
    clear(out)
    with safe_files.contents(results / scale):
        tables = tables_of(scale, results)
        pieces = {f"table/{name}": write_table(name, table, out) for name, table in tables.items()}
        rows = {name: series(table) for name, table in tables.items()}
        for name, draw in FIGURES.items():
            pieces[f"figure/{name}"] = drawn(draw, rows, out / f"{name}.pdf")
        for file in FILES:
            if lines := lines_of(results / file.path):
                text = latex_table(lines, file.width, list(file.shown), best_by=VALIDATION)
                (out / f"{file.name}.tex").write_text(HEADING + text, encoding="utf-8")
        write_numbers(dict.fromkeys(declared()) | values(scale, results), out)
    return [name for name, there in pieces.items() if there]


def clear(out: Path) -> None:
    """Make the folder of what is generated, or empty that of an earlier report.

    Raises:
        ValueError: the folder holds other files.
    """
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not (out / "numbers.json").exists():
        raise ValueError(f"--out {out} holds other files: give it an empty or a new folder")
    safe_files.write_json(out / "numbers.json", {})  # marks the folder, should this be interrupted
    for pattern in ("*.tex", "*.md", "*.pdf", "*.png", "*.csv"):
        for old in out.glob(pattern):
            old.unlink()


def write_numbers(numbers: dict[str, str | None], out: Path) -> None:
    """Write what can be quoted: what has a value as LaTeX's macros, all for a reader."""
    figures = {key: text for key, text in numbers.items() if text is not None}
    macros = "".join(f"\\defresult{{{k}}}{{{tex(text)}}}\n" for k, text in figures.items())
    (out / "numbers.tex").write_text(HEADING + macros, encoding="utf-8")
    safe_files.write_json(out / "numbers.json", numbers)


def tables_of(scale: str, results: Path) -> dict[str, Experiment]:
    """Return the experiments of a scale by name, and those of BESIDE that it does not have."""
    tables: dict[str, Experiment] = {}
    for other, names in BESIDE.items():
        every = placed(experiments.at_scale(other), results / other)
        tables |= {name: every[name] for name in names}
    return tables | placed(experiments.at_scale(scale), results / scale)


def values(scale: str, results: Path) -> dict[str, str | None]:
    """Return what can be quoted of a scale, of the GPU's runs and of the tables that are files."""
    numbers = quotable(tables_of(scale, results)) | gpu_numbers(results / "gpu")
    for file in FILES:
        if lines := lines_of(results / file.path):
            numbers |= line_numbers(file.name, lines, file.width)
    return numbers | density_numbers(results / CALIBRATED) | {"scale": scale}


def series(table: Experiment) -> list[Series]:
    """Return the runs of each row's chosen learning rate, of rows that ran."""
    best = [(row.key, table.best(row)) for row in table.rows]
    return [Series(key, table.columns, list(runs[1].values())) for key, runs in best if runs]


# ---------------------------------------------------------------------------- numbers


def declared() -> Iterator[str]:
    """Yield every key that a scale can give a value."""
    for scale in experiments.SCALES:
        yield from quotable(placed(experiments.at_scale(scale), Path("no such folder")))


def quotable(tables: dict[str, Experiment]) -> dict[str, str | None]:
    """Return what can be quoted: key -> text, None where it did not run."""
    numbers: dict[str, str | None] = {}
    finished: list[Past] = []
    for name, table in tables.items():
        runs = [run for row in table.rows for run in table.runs(row)]
        numbers |= line_numbers(name, table.lines(), len(table.columns))
        numbers |= run_numbers(name, table, runs)
        finished += runs
    took = {(run.options.get("runs_dir"), run.options.get("name")): run for run in finished}
    hours = hours_of(list(took.values()))  # of each run once, though tables share some
    return numbers | setup_numbers("setup", finished) | {"hours": hours}


def line_numbers(name: str, table: list[list[str]], width: int) -> dict[str, str | None]:
    """Return a table's figures under NAME/KEY/COLUMN, and the best rows by validation.

    Args:
        table: lines of text, heading first.
        width: columns of a row's key.
    """
    heading, *lines = table
    headed = [column.replace(f"{VALIDATION} to", "to") for column in heading]
    numbers: dict[str, str | None] = {}
    best: dict[str, tuple[list[int], list[str] | None]] = {}
    for line in lines:
        for column, text in list(zip(headed, line, strict=True))[width:]:
            ran = NOT_RUN not in line
            numbers[key_of(name, *line[:width], column)] = text if ran else None
        for count in range(min(width, 3)):
            for fixed in itertools.combinations(range(width), count):
                group = (f"{key_of(heading[i])}={key_of(line[i])}" for i in fixed)
                key = key_of(name, *group, "best")
                free = [i for i in range(width) if i not in fixed]
                best[key] = free, better(best.get(key, (free, None))[1], line, heading)
    for key, (free, line) in best.items() if VALIDATION in heading else ():
        numbers[key] = ", ".join(line[i] for i in free) if line else None
        for i, column in enumerate(headed[width:], width):
            numbers[f"{key}/{key_of(column)}"] = line[i] if line else None
    return numbers


def better(best: list[str] | None, line: list[str], heading: list[str]) -> list[str] | None:
    """Return which of two lines validates better; None where neither ran."""
    at = heading.index(VALIDATION) if VALIDATION in heading else None
    if at is None or NOT_RUN in line or not line[at]:
        return best
    return max([best, line] if best else [line], key=lambda row: float(row[at].split()[0]))


def run_numbers(name: str, table: Experiment, finished: list[Past]) -> dict[str, str | None]:
    """Return how much of an experiment ran, for how long, and the options its runs share."""
    needed = sum(len(row.rates) + len(row.seeds) - 1 for row in table.rows)
    numbers = {
        f"{name}/runs/done": f"{needed - sum(count for _, count in table.left())}",
        f"{name}/runs/all": f"{needed}",
        f"{name}/seeds": f"{max(len(row.seeds) for row in table.rows)}",
        f"{name}/hours": hours_of(finished),
    }
    return numbers | setup_numbers(f"{name}/setup", finished)


def gpu_numbers(folder: Path) -> dict[str, str | None]:
    """Return round and test accuracy of the last evaluation of each of ON_A_GPU's runs."""
    numbers: dict[str, str | None] = {}
    for name, run in ON_A_GPU.items():
        evaluated = [r for r in runs.Run(folder / run).records() if "test_acc" in r]
        last = evaluated[-1] if evaluated else None
        numbers[f"gpu/{name}/round"] = f"{last['round']}" if last else None
        numbers[f"gpu/{name}/test"] = f"{100 * last['test_acc']:.1f}" if last else None
    return numbers


def lines_of(path: Path) -> list[list[str]]:
    """Return a CSV file's lines, heading first, without its comments; none where it is missing."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8").splitlines()
    heading, *rows = csv.reader(line for line in text if not line.startswith("#"))
    return [[column.replace("_", " ") for column in heading], *rows]


def density_numbers(path: Path) -> dict[str, str]:
    """Return what a mask keeps of each kind of parameter, in per cent, its least and most layer."""
    numbers = {}
    for kind, by_layer in safe_files.read_json(path)["density"].items() if path.exists() else ():
        shares = [100 * share for share in by_layer.values() if not math.isnan(share)]
        numbers[f"density/{kind}/least"] = f"{min(shares):.0f}"
        numbers[f"density/{kind}/most"] = f"{max(shares):.0f}"
    return numbers


def hours_of(done: list[Past]) -> str | None:
    """Return how long these runs took, in hours; None where there are none."""
    return f"{sum(SECONDS.over(done).values) / 3600:.1f}" if done else None


def setup_numbers(prefix: str, done: list[Past]) -> dict[str, str | None]:
    """Return the values that options have in these runs, each named once."""
    seen: dict[str, dict] = {name: {} for name in (*SETUP, *ENVIRONMENT)}
    for run in done:
        settings = {name: run.options.get(name) for name in SETUP}
        settings |= {name: run.config["environment"].get(name) for name in ENVIRONMENT}
        for name, value in settings.items():
            if value is not None:
                seen[name][value] = None
    return {
        f"{prefix}/{name.replace('_', '-')}": listed(list(values)) for name, values in seen.items()
    }


def listed(values: list) -> str | None:
    """Write numbers by size, then words; None where there is nothing."""
    words = sorted((v for v in values if not isinstance(v, (int, float))), key=str)
    numbers = sorted(v for v in values if isinstance(v, (int, float)))
    return ", ".join([*(f"{v:g}" for v in numbers), *map(str, words)]) or None


def key_of(*parts: str) -> str:
    """Join the parts of a key, without what TeX or a reader would trip over; an option that is
    absent is none."""
    return "/".join(re.sub(r"[^\w.=+]+", "-", part).strip("-") or "none" for part in parts)


# ---------------------------------------------------------------------------- tables


def write_table(name: str, table: Experiment, out: Path) -> bool:
    """Write an experiment's table, where some of it ran."""
    lines = table.lines()
    if all(NOT_RUN in line for line in lines[1:]):
        return False
    write_lines(name, lines, len(table.columns), out)
    return True


def write_lines(name: str, lines: list[list[str]], width: int, out: Path) -> None:
    """Write a table as Markdown, and for two columns and for one as LaTeX."""
    (out / f"{name}.md").write_text(markdown_table(lines), encoding="utf-8")
    lines, note = marked(lines)
    measures = [column for column in lines[0][width:] if column not in CAPTIONED]
    split = grouping(lines[0][:width], lines[1:])
    short = measures[:3]
    if VALIDATION in measures:
        short = [VALIDATION] if split is not None else [VALIDATION, "test %"]
    for file, columns in ((name, measures), (f"{name}-short", short)):
        columns = [column for column in columns if column in lines[0]]
        text = HEADING + latex_table(lines, width, columns, best_by=VALIDATION) + note
        (out / f"{file}.tex").write_text(text, encoding="utf-8")


def marked(lines: list[list[str]]) -> tuple[list[list[str]], str]:
    """Return a table with a star at every rate that is not bracketed, and a note that says so."""
    if PLACE not in lines[0]:
        return lines, ""
    lr, place = lines[0].index("lr"), lines[0].index(PLACE)
    rated = [line for line in lines[1:] if NOT_RUN not in line and line[place]]
    ends = [line for line in rated if line[place] != INSIDE]
    if not ends:
        return lines, ""
    starred = [[*x[:lr], f"{x[lr]}*", *x[lr + 1 :]] if x in ends else x for x in lines]
    count = f"in {len(ends)} of {len(rated)} rows the best rate is at an end of those tried"
    return starred, f"\\par\\smallskip{{\\footnotesize * {count}}}\n"
