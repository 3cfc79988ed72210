"""Tables in print: lines of text, heading first, as Markdown and as a LaTeX tabular.

    from typeset import latex_table
    lines = [["rule", "validation"], ["random", "34.2 ± 0.1"], ["vote", "not run"]]
    print(latex_table(lines, width=1, measures=["validation"]))

A line that holds NOT_RUN says so in place of its figures. LaTeX needs booktabs, and a macro
\\bestresult for the best of a group.
"""

from __future__ import annotations

import re

NOT_RUN = "not run"
VALUE = re.compile(r"([+-]?)(\d+(?:\.\d+)?)(?:e([+-]\d+))?(?: ± (\d+(?:\.\d+)?))?")


def markdown_table(lines: list[list[str]]) -> str:
    """Return lines, heading first, as a table of Markdown."""
    heading, *rows = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in [heading, ["---"] * len(heading), *rows])


def latex_table(lines: list[list[str]], width: int, measures: list[str]) -> str:
    """Return lines, heading first, as a booktabs tabular; groups lie side by side where few.

    Args:
        width: columns of a row's key; the first of two or more names its group.
        measures: the columns to show; what is best by validation in its group is set in bold.
    """
    heading, *rows = lines
    groups = list(dict.fromkeys(row[0] for row in rows))
    beside = width > 1 and len(groups) in (2, 3) and len(rows) > len(groups)
    keys = list(dict.fromkeys(tuple(row[1 if beside else 0 : width]) for row in rows))
    blocks = groups if beside else [""]
    if beside and len(measures) * len(blocks) > 6:
        measures = [m for m in measures if m not in ("lr", "bytes to dense")]
    at = [heading.index(measure) for measure in measures]
    cells = {}
    for row in rows:
        block, key = (row[0], tuple(row[1:width])) if beside else ("", tuple(row[:width]))
        missing = NOT_RUN in row
        cells[block, key] = [tex(row[i]) for i in at] if not missing else [NOT_RUN]
    for block, key in best_of(rows, heading, width, beside):
        cells[block, key] = [
            f"\\bestresult{{{cell}}}" if cell else "" for cell in cells[block, key]
        ]
    head = [tex(column) for column in heading[1 if beside else 0 : width]]
    spec = "l" * len(head) + "r" * (len(blocks) * len(at))
    body = [f"\\begin{{tabular}}{{@{{}}{spec}@{{}}}}", "\\toprule"]
    if beside:
        spans = [f"\\multicolumn{{{len(at)}}}{{c}}{{{tex(block)}}}" for block in blocks]
        body.append(" & ".join([""] * len(head) + spans) + r" \\")
        ends = [len(head) + 1 + i * len(at) for i in range(len(blocks))]
        body.append("".join(f"\\cmidrule(lr){{{e}-{e + len(at) - 1}}}" for e in ends))
    body.append(" & ".join(head + [tex(heading[i]) for i in at] * len(blocks)) + r" \\")
    body.append("\\midrule")
    before: tuple = ()
    for key in keys:
        if before and len(key) > 1 and key[0] != before[0]:
            body.append("\\addlinespace[2pt]")
        named = [
            tex(k) if i or key[0] != (before or ("",))[0] or len(key) == 1 else ""
            for i, k in enumerate(key)
        ]
        values = [cell for block in blocks for cell in spread(cells.get((block, key)), len(at))]
        body.append(" & ".join(named + values) + r" \\")
        before = key
    return "\n".join([*body, "\\bottomrule", "\\end{tabular}", ""])


def spread(cells: list[str] | None, count: int) -> list[str]:
    """Return a row's cells in `count` columns; one that did not run says so once."""
    cells = ["--"] * count if cells is None else cells
    return cells + [""] * (count - len(cells))


def best_of(rows: list[list[str]], heading: list[str], width: int, beside: bool) -> list[tuple]:
    """Return (group, key) of the row with the best validation accuracy of every group."""
    if "validation" not in heading:
        return []
    best: dict[str, tuple[float, tuple]] = {}
    for row in rows:
        if NOT_RUN not in row and (value := VALUE.match(row[heading.index("validation")])):
            key = (row[0], tuple(row[1:width])) if beside else ("", tuple(row[:width]))
            group = row[0] if width > 1 else ""
            best[group] = max(best.get(group, (-1.0, key)), (float(value[2]), key))
    return [key for _, key in best.values()] if len(rows) > len(best) else []


def tex(text: str) -> str:
    """Write a table's text in LaTeX: numbers in mathematics, nc5 as N_c = 5, 3e-05 as a power."""
    if found := re.fullmatch(r"nc(\d+)", text):
        return f"\\ensuremath{{N_c = {found[1]}}}"
    if VALUE.fullmatch(text):
        text = re.sub(r"e([+-])0*(\d+)", lambda m: f" 10^{{{m[1].strip('+')}{m[2]}}}", text)
        text = re.sub(r"^([+-]?)1 10\^", r"\g<1>10^", text).replace(" 10^", r" \cdot 10^")
        text = text.replace("±", r"\pm")
        return f"\\ensuremath{{{text}}}"
    return re.sub(r"([%&#_$])", r"\\\1", text).replace("±", r"$\pm$")
