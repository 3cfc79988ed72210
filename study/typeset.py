"""Tables in print: lines of text, heading first, as Markdown and as a LaTeX tabular.

    from typeset import latex_table
    lines = [["rule", "accuracy"], ["random", "34.2 ± 0.1"], ["vote", "not run"]]
    print(latex_table(lines, width=1, measures=["accuracy"]))

A line that holds NOT_RUN says so in place of its figures. LaTeX needs booktabs, and a macro
\\bestresult for what is best.
"""

from __future__ import annotations

import re

NOT_RUN = "not run"
NUMBER = r"[+-]?[0-9]+(?:\.[0-9]+)?"
VALUE = re.compile(  # 34.2, 3e-05, 34.2 ± 0.1, +1.2 [-0.3, +2.7]
    r"(?P<sign>[+-]?)[0-9]+(?:\.[0-9]+)?(?:e[+-][0-9]+)?"
    rf"(?: ± {NUMBER}| \[(?P<low>{NUMBER}), (?P<high>{NUMBER})\])?"
)
MARKUP = re.compile(r"[\\|`*<]|(?<=\])\(")  # of Markdown: cells, code, emphasis, HTML, links
LAST = "\u0180"  # of the letters that LaTeX's Latin fonts have, the first beyond
TEX = {
    **{c: f"\\{c}" for c in "%&#_${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"},
}
SHARDINGS = {"nc": "N_c", "dir": r"\alpha"}  # of the names nc5 and dir0.3, the symbols
BESIDE = 3  # groups that fit side by side
FIT = 6  # figures that fit into a line of side-by-side groups
LESS_TOLD = ("lr", "bytes to dense")  # what gives way first


def printable(text: str) -> str:
    """Return a text whose characters all print: others, line ends too, as escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def markdown_table(lines: list[list[str]]) -> str:
    """Return lines, heading first, as a table of Markdown; no cell ends early, or is markup."""
    heading, *rows = ([MARKUP.sub(r"\\\g<0>", printable(cell)) for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in [heading, ["---"] * len(heading), *rows])


def latex_table(
    lines: list[list[str]], width: int, measures: list[str], *, best_by: str = ""
) -> str:
    """Return lines, heading first, as a booktabs tabular; few groups of rows lie side by side.

    Args:
        width: columns of a row's key.
        measures: the other columns to show.
        best_by: the column whose highest value makes a row the best, which is set in bold, of its
            group; groups are the shardings, or all rows.
    """
    heading, *rows = lines
    split, measures = layout(heading[:width], rows, measures)
    groups = list(dict.fromkeys(row[split] for row in rows)) if split is not None else [""]
    at = [heading.index(measure) for measure in measures]
    keyed = [i for i in range(width) if i != split]
    bold = best_rows(rows, heading, best_by, split) if best_by in heading else []
    cells: dict[tuple, dict[str, list[str]]] = {}
    for row in rows:
        texts = [NOT_RUN] if NOT_RUN in row else [tex(row[i]) for i in at]
        if row in bold:
            texts = [f"\\bestresult{{{text}}}" if text else "" for text in texts]
        group = row[split] if split is not None else ""
        cells.setdefault(tuple(row[i] for i in keyed), {})[group] = texts
    headed = [tex(heading[i].removeprefix(f"{best_by} ")) for i in at]  # "to ..." of a difference
    named = [tex(heading[i]) for i in keyed] + headed * len(groups)
    columns = "l" * len(keyed) + "r" * len(at) * len(groups)
    lines = [f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}", "\\toprule"]
    if split is not None:
        lines += group_headings(heading[split], groups, len(keyed), len(at))
    lines += [" & ".join(named) + r" \\", "\\midrule", *body(cells, groups, len(at))]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def layout(
    columns: list[str], rows: list[list[str]], measures: list[str]
) -> tuple[int | None, list[str]]:
    """Return the key's column whose values lie side by side, if any, and the measures that fit."""
    split = grouping(columns, rows)
    if split is None:
        return None, measures
    count = len({row[split] for row in rows})
    fewer = [measure for measure in measures if measure not in LESS_TOLD]
    for some in (measures, fewer):
        if count * len(some) <= FIT:
            return split, some
    return None, measures


def body(cells: dict[tuple, dict[str, list[str]]], groups: list[str], count: int) -> list[str]:
    """Return the table's lines: a space where the first part of the key changes, named once."""
    lines: list[str] = []
    before = None
    for key, by_group in cells.items():
        repeated = len(key) > 1 and key[0] == before
        if lines and len(key) > 1 and not repeated:
            lines.append("\\addlinespace[2pt]")
        names = ["" if repeated else tex(key[0]), *map(tex, key[1:])]
        figures = [text for group in groups for text in spread(by_group.get(group), count)]
        lines.append(" & ".join(names + figures) + r" \\")
        before = key[0]
    return lines


def grouping(columns: list[str], rows: list[list[str]]) -> int | None:
    """Return the key's column whose values lie side by side: shardings, or else the last that can.

    None where no column has two or three values, or a third of the places would stay empty.
    """
    possible = []
    for i in range(len(columns)) if len(columns) > 1 else ():
        groups = {row[i] for row in rows}
        others = {(*row[:i], *row[i + 1 : len(columns)]) for row in rows}
        if 2 <= len(groups) <= BESIDE and 1.5 * len(rows) > len(groups) * len(others):
            possible.insert(0, i)
    shardings = [i for i in possible if columns[i] == "sharding"]
    return (shardings or possible or [None])[0]


def best_rows(
    rows: list[list[str]], heading: list[str], best_by: str, split: int | None
) -> list[list[str]]:
    """Return the rows of the highest value of each group; none where shardings mix in a group."""
    at = heading.index(best_by)
    if "sharding" in heading and (split is None or heading[split] != "sharding"):
        return []
    sharding = heading.index("sharding") if "sharding" in heading else None
    groups: dict[str, dict[float, list[list[str]]]] = {}
    for row in rows:
        if NOT_RUN not in row and row[at]:
            alike = groups.setdefault("" if sharding is None else row[sharding], {})
            alike.setdefault(float(row[at].split()[0]), []).append(row)
    return [row for alike in groups.values() for row in alike[max(alike)]]


def group_headings(column: str, groups: list[str], before: int, width: int) -> list[str]:
    """Return the lines that name the groups above their columns."""
    names = [group if not group[:1].isdigit() else f"{column} = {group}" for group in groups]
    spans = [f"\\multicolumn{{{width}}}{{c}}{{{tex(name)}}}" for name in names]
    starts = [before + 1 + i * width for i in range(len(groups))]
    rules = "".join(f"\\cmidrule(lr){{{start}-{start + width - 1}}}" for start in starts)
    return [" & ".join([""] * before + spans) + r" \\", rules]


def spread(cells: list[str] | None, count: int) -> list[str]:
    """Return a row's cells in `count` columns; one that did not run says so once."""
    cells = ["--"] if cells is None else cells
    return cells + [""] * (count - len(cells))


def formula(text: str) -> str:
    """Return a sharding's name in mathematics: N_c = 5 of nc5, \\alpha = 0.3 of dir0.3; else ""."""
    named = re.fullmatch(r"(nc|dir)([0-9.]+(?:e[+-]?[0-9]+)?)", text)
    return f"{SHARDINGS[named[1]]} = {named[2]}" if named else ""


def tex(text: str) -> str:
    """Write a table's text in LaTeX: numbers in mathematics, nc5 as N_c = 5, 3e-05 as a power.

    What LaTeX would act on, or its fonts may lack, is escaped.
    """
    if sharding := formula(text):
        return f"\\ensuremath{{{sharding}}}"
    if VALUE.fullmatch(text):
        text = re.sub(r"e([+-])0*(\d+)", lambda m: f" 10^{{{m[1].strip('+')}{m[2]}}}", text)
        text = re.sub(r"^([+-]?)1 10\^", r"\g<1>10^", text).replace(" 10^", r" \cdot 10^")
        text = text.replace("±", r"\pm").replace(", ", r",\,").replace(" [", r"\;[")
        return f"\\ensuremath{{{text}}}"
    if re.fullmatch(rf"{NUMBER}(?:, {NUMBER})+", text):  # several differences
        return ", ".join(map(tex, text.split(", ")))
    shown = (c if c < LAST else ascii(c)[1:-1] for c in printable(text))
    return "".join(TEX.get(c, c) for c in "".join(shown))
