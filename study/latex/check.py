"""What must hold of the report: no result is typed by hand, and LaTeX has nothing to complain of.

python check.py text *.tex      numbers that are typed in the text: one line each, exit 1
python check.py log report.log  undefined references, wide boxes, more pages than MOST_PAGES
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

MOST_PAGES, WIDEST = 8, 5.0  # pages with references, points that a line may stick out
WRITTEN = {  # by hand: macros, the template, placeholders
    *("macros.tex", "template.tex", "authors.tex"),
}
# Commands whose argument is a name and no text.
NAMES = r"\\(?:result|ifresult|iftrend|iftable|iffigure|seetable|seefigure|cite|ref|eqref|label|"
NAMES += r"input|usepackage|documentclass|includegraphics|bibliography)\*?(?:\[[^\]]*\])?\{[^{}]*\}"
# Names of things, and constants of the set-up.
ALLOWED = r"CIFAR-100|ViT-(?:Ti|S|B)/16|2\^\{-48\}|224(?= pixels)|J = 4|seed 0|95(?= per cent)"
ALLOWED += r"|\\\{0,1\\\}"
# A decimal, a share in per cent, or a number of two digits and more.
NUMBER = re.compile(r"\d+[.,]\d+|\d+\s*(?:\\?%|per\s?cent|points?)|(?<![A-Za-z])\d{2,}", re.I)


def typed_numbers(text: str) -> list[tuple[int, str]]:
    """Return the line and wording of every number in a LaTeX text that no macro has looked up."""

    def blank(problems: re.Match) -> str:
        return re.sub(r"[^\n]", " ", problems[0])

    text = re.sub(r"(?<!\\)%.*", blank, text)
    text = re.sub(r"\\ifabove\{[^{}]*\}\{[^{}]*\}", blank, text)
    text = re.sub(NAMES, blank, text)
    text = re.sub(r"\\(?:result|wide)(?:table|figure)\{[^{}]*\}", blank, text)
    text = re.sub(ALLOWED, blank, text)
    return [(text.count("\n", 0, m.start()) + 1, m[0]) for m in NUMBER.finditer(text)]


def complaints(log: str) -> list[str]:
    """Return what LaTeX's log says that a reader would see."""
    problems = re.findall(
        r"LaTeX Warning: (?:Reference|Citation|Float too large|There were).*", log
    )
    for box, points in re.findall(r"Overfull \\([hv]box) \(([\d.]+)pt too \w+\)", log):
        if float(points) > WIDEST:
            problems.append(f"a {box} sticks out by {points} pt")
    pages = re.search(r"Output written on .*?\((\d+) pages?", log)
    if pages is None:
        problems.append("no pages were written")
    elif int(pages[1]) > MOST_PAGES:
        problems.append(f"{pages[1]} pages, and {MOST_PAGES} are allowed")
    return problems


def main(what: str, *paths: str) -> int:
    """Print what is wrong in the files; return 1 if anything is."""
    wrong = []
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8", errors="replace")
        if what == "log":
            wrong += complaints(text)
        elif path.name not in WRITTEN:
            wrong += [
                f"{path.name}:{line}: {number!r} is typed by hand; quote it by \\result{{KEY}}"
                for line, number in typed_numbers(text)
            ]
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
