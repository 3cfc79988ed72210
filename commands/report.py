"""train.py report: the material of a report, of your own runs or of a scale's."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NamedTuple

from commands.options import Line
from study import blank, experiments, history, report


class Report(NamedTuple):
    """Which material."""

    runs: Annotated[
        list[str] | None,
        "your own runs, or folders of them: a blank report with their tables and figures",
        "path",
        "RUN",
    ] = None
    scale: Annotated[
        str | None, "in their place the experiments' runs of this scale [paper]", experiments.SCALES
    ] = None
    results: Annotated[str, "where the scales' runs lie", "path"] = "results"
    out: Annotated[
        str | None, "where it all goes [report; of a scale study/latex/generated]", "path"
    ] = None


OPTIONS = (Report,)


def run(line: Line) -> None:
    """Write a report's tables, figures and numbers: of your runs a blank one, of a scale ours.

    With --runs the folder is a LaTeX project, zipped beside it for Overleaf; none is needed here.
    Made again it has new results, and the text that you wrote.
    """
    o = line.groups.report
    if o.runs is None:
        out = Path(o.out or "study/latex/generated")
        pieces = report.write(o.scale or "paper", Path(o.results), out)
        print(f"written to {out}: numbers.tex, {', '.join(pieces) or 'nothing else has run'}")
        return
    if o.scale is not None:
        raise ValueError("--scale: not allowed with --runs")
    out = Path(o.out or "report")
    pieces, notes = blank.write(history.read_all(o.runs), out)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"written to {out}: report.tex, {', '.join(pieces)}")
    print(f"for Overleaf: {blank.zipped(out)}")
