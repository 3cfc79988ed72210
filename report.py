"""The report's tables, figures and quoted numbers, from the logs of one scale's runs.

    python train.py report --scale cpu      # report/build.sh calls this, and then LaTeX

    numbers.tex, numbers.json   every figure that the prose may quote, under a readable key:
                                EXPERIMENT/ROW'S KEY/COLUMN, EXPERIMENT/GROUP/best, setup/OPTION
    NAME.tex, NAME.md           an experiment's table, for two columns; NAME-short.tex, for one
    NAME.pdf                    the figures for which there is data

A key that any scale's experiments declare is known; one that did not run at this scale says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import experiments
import runs
from experiments import Experiment
from figures import FIGURES, Done, drawn
from typeset import NOT_RUN, VALUE, latex_table, markdown_table, tex

SCALES = ("paper", "cpu", "smoke")
SAME_FOR_ALL = ("seeds", "other lr")  # of a table's columns, what its caption says
HEADING = "% written by train.py report: do not edit\n"


class Found(NamedTuple):
    """An experiment, and the folder of its runs."""

    name: str
    experiment: Experiment
    folder: Path

    def ran(self) -> list[list[Done]]:
        """Return the runs of each row's best learning rate, one a seed; none of rows that wait."""
        rows = []
        for row in self.experiment.rows:
            lr, summaries = self.experiment.best(self.folder, row) or (None, {})
            folders = {s: runs.Run(self.folder / row.cell(lr, s).name) for s in summaries}
            parts = [(f.config()["options"], summaries[s], f.records()) for s, f in folders.items()]
            rows += [[Done(row.key, *part) for part in parts]] if parts else []
        return rows

    def finished(self) -> Iterator[tuple[dict, dict]]:
        """Yield config and summary of every run that is done."""
        for cell in self.experiment.cells():
            if summary := experiments.summary(self.folder, cell):
                yield runs.Run(self.folder / cell.name).config(), summary


def write(scale: str, results: Path, out: Path) -> list[str]:
    """Write all that the report takes from the runs below `results`/`scale` into the folder `out`.

    Returns:
        the names of the tables and figures that could be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.tex", "*.md", "*.pdf", "numbers.json"):
        for old in out.glob(pattern):
            old.unlink()
    found = [
        Found(name, experiment, results / scale / name)
        for name, experiment in experiments.at_scale(scale).items()
    ]
    pieces = dict.fromkeys((f"table/{name}" for name in declared_names()), False)
    for one in found:
        pieces[f"table/{one.name}"] = write_tables(one, out)
    ran = {one.name: one.ran() for one in found}
    for name, draw in FIGURES.items():
        pieces[f"figure/{name}"] = drawn(draw, ran, out / f"{name}.pdf")
    numbers = dict.fromkeys(declared_keys()) | quotable(found) | {"scale": scale}
    (out / "numbers.tex").write_text(numbers_tex(numbers, pieces), encoding="utf-8")
    runs.write_json(out / "numbers.json", numbers)
    return [name for name, made in pieces.items() if made]


# ---------------------------------------------------------------------------- numbers


def declared_names() -> list[str]:
    """Return the names of the experiments of all scales."""
    return list(dict.fromkeys(n for scale in SCALES for n in experiments.at_scale(scale)))


def declared_keys() -> Iterator[str]:
    """Yield every key that a scale can give a value."""
    for scale in SCALES:
        nowhere = Path("no such folder")
        yield from quotable(
            [Found(name, one, nowhere) for name, one in experiments.at_scale(scale).items()]
        )


def quotable(found: list[Found]) -> dict[str, str | None]:
    """Return what can be quoted: key -> text, None where it did not run."""
    numbers: dict[str, str | None] = {}
    for one in found:
        numbers |= table_numbers(one) | run_numbers(one)
    configs = [config for one in found for config, _ in one.finished()]
    return numbers | setup_numbers("setup", configs)


def table_numbers(found: Found) -> dict[str, str | None]:
    """Return an experiment's table by NAME/KEY/COLUMN, and each group's best row by validation."""
    heading, *lines = found.experiment.lines(found.folder)
    width = len(found.experiment.columns)
    numbers: dict[str, str | None] = {}
    best: dict[str, tuple[float, list[str]]] = {}
    for line in lines:
        ran = NOT_RUN not in line
        for column, text in zip(heading[width:], line[width:], strict=True):
            numbers[key_of(found.name, *line[:width], column)] = text if ran else None
        group = key_of(found.name, *line[: min(1, width - 1)])
        best.setdefault(group, (-np.inf, []))
        if ran and "validation" in heading:
            value = float(VALUE.match(line[heading.index("validation")])[2])
            best[group] = max(best[group], (value, line), key=lambda item: item[0])
    for group, (_, line) in best.items():
        numbers[f"{group}/best"] = " ".join(line[min(1, width - 1) : width]) or None
        for i, column in enumerate(heading[width:], width):
            numbers[key_of(f"{group}/best", column)] = line[i] if line else None
    return numbers


def run_numbers(found: Found) -> dict[str, str | None]:
    """Return how much of an experiment ran, for how long, and the options its runs share."""
    finished = list(found.finished())
    hours = sum(summary.get("wall_seconds", 0) for _, summary in finished) / 3600
    numbers = {
        f"{found.name}/runs/done": f"{len(finished)}",
        f"{found.name}/runs/all": f"{len(found.experiment.cells())}",
        f"{found.name}/seeds": f"{len(found.experiment.seeds)}",
        f"{found.name}/hours": f"{hours:.1f}" if finished else None,
    }
    return numbers | setup_numbers(f"{found.name}/setup", [config for config, _ in finished])


SETUP = (
    *(
        "model",
        "image_size",
        "data",
        "val_fraction",
        "clients",
        "fraction",
        "rounds",
        "epochs",
        "J",
    ),
    *(
        "batch_size",
        "momentum",
        "weight_decay",
        "schedule",
        "head",
        "eval_every",
        "nc",
        "dirichlet",
    ),
    *("calibration_rounds", "calibration_images", "damp", "sparsity", "consensus", "threads"),
    *("prox", "dare_drop", "ties_keep", "straggler_fraction", "server_lr"),
)
SETUP_MADE = ("device", "precision", "torch", "largest", "smallest")


def setup_numbers(prefix: str, configs: list[dict]) -> dict[str, str | None]:
    """Return the values that the options of SETUP have in these runs, each named once."""
    seen: dict[str, list] = {name: [] for name in (*SETUP, *SETUP_MADE)}
    for config in configs:
        told = config["environment"] | config.get("shards", {}) | config["options"]
        told |= {name: config["environment"].get(name) for name in ("device", "precision")}
        for name in seen:
            if told.get(name) is not None and told[name] not in seen[name]:
                seen[name].append(told[name])
    texts = {name: ", ".join(map(plain, sorted(seen[name], key=rank))) for name in seen}
    return {f"{prefix}/{name.replace('_', '-')}": text or None for name, text in texts.items()}


def plain(value) -> str:
    """Write an option's value."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def rank(value) -> tuple:
    """Sort numbers by size, then words."""
    number = isinstance(value, (int, float))
    return (not number, value if number else 0, str(value))


def key_of(*parts: str) -> str:
    """Join the parts of a key, without what TeX or a reader would trip over."""
    return "/".join(re.sub(r"[^\w./=+]+", "-", part).strip("-") for part in parts)


def numbers_tex(numbers: dict[str, str | None], pieces: dict[str, bool]) -> str:
    """Return the macros: \\defresult{key}{text}{number}{trend}, \\defpiece{name}{0 or 1}."""
    lines = []
    for key, text in numbers.items():
        if text is None:
            lines.append(f"\\defmissing{{{key}}}")
        else:
            lines.append(f"\\defresult{{{key}}}{{{tex(text)}}}{{{size(text)}}}{{{trend(text)}}}")
    lines += [f"\\defpiece{{{name}}}{{{int(made)}}}" for name, made in pieces.items()]
    return HEADING + "\n".join(lines) + "\n"


def size(text: str) -> str:
    """Return a number as TeX compares it, nothing where it cannot."""
    found = VALUE.fullmatch(text)
    value = float(text.split(" ")[0]) if found else np.inf
    return f"{value:.5f}" if abs(value) < 16000 else ""


def trend(text: str) -> str:
    """Return up or down for a difference, level where the spread over seeds covers zero."""
    found = VALUE.fullmatch(text)
    if not found or not found[1]:
        return ""
    value = float(text.split(" ")[0])
    level = abs(value) <= float(found[4] or 0)
    return "level" if level else "up" if value > 0 else "down"


def write_tables(found: Found, out: Path) -> bool:
    """Write an experiment's table as Markdown, and for two columns and for one as LaTeX."""
    lines = found.experiment.lines(found.folder)
    if all(NOT_RUN in line for line in lines[1:]):
        return False
    (out / f"{found.name}.md").write_text(markdown_table(lines), encoding="utf-8")
    width = len(found.experiment.columns)
    measures = [c for c in lines[0][width:] if c not in SAME_FOR_ALL]
    short = [c for c in measures if c == "validation"] or measures[:2]
    for name, columns in ((found.name, measures), (f"{found.name}-short", short)):
        text = HEADING + latex_table(lines, width, columns)
        (out / f"{name}.tex").write_text(text, encoding="utf-8")
    return True
