"""What must hold of the report: no result is typed by hand, every number that it quotes exists and
is the one that the text was written for, and LaTeX has nothing to complain of.

python check.py text *.tex      numbers that are typed in the text: one line each, exit 1
python check.py numbers *.tex   keys without a value, values that have changed: a line each, exit 1
python check.py accept *.tex    takes the values of generated/numbers.json as those of the text
python check.py log report.log  undefined references, wide boxes, more pages than MOST_PAGES

quoted.json holds the values that the text was written for, and their scale. A value that has
changed wants its sentence read again, then `accept`. At another scale keys without a value are
named and cost nothing: the text has a question mark in their place.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MOST_PAGES, WIDEST = 8, 5.0  # pages with references, points that a line may stick out
WRITTEN = {  # by hand: macros, the template, placeholders
    *("macros.tex", "template.tex", "authors.tex"),
}
# Commands whose argument is a name and no text.
NAMES = r"\\(?:result|generated|drawn|cite|ref|eqref|label|input|usepackage|documentclass|"
NAMES += r"bibliography|vspace)\*?(?:\[[^\]]*\])?\{[^{}]*\}"
# Names of things, and constants of the set-up.
ALLOWED = r"CIFAR-100|ViT-(?:Ti|S|B)/16|2\^\{-48\}|(?:64|224)(?= pixels)|J = 4|N_c = 10|seed 0"
ALLOWED += r"|95(?= per cent)|\\\{0,1\\\}|100(?= clients)|0\.3(?= points)|H[12]00"
# A decimal, a share in per cent, or a number of two digits and more.
NUMBER = re.compile(r"\d+[.,]\d+|\d+\s*(?:\\?%|per\s?cent|points?)|(?<![A-Za-z])\d{2,}", re.I)
HERE = Path(__file__).parent


def typed_numbers(text: str) -> list[tuple[int, str]]:
    """Return the line and wording of every number in a LaTeX text that no macro has looked up."""

    def blank(problems: re.Match) -> str:
        return re.sub(r"[^\n]", " ", problems[0])

    text = re.sub(r"(?<!\\)%.*", blank, text)
    text = re.sub(NAMES, blank, text)
    text = re.sub(ALLOWED, blank, text)
    return [(text.count("\n", 0, m.start()) + 1, m[0]) for m in NUMBER.finditer(text)]


def quoted_keys(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the key of every number that a LaTeX text quotes."""
    text = re.sub(r"(?<!\\)%.*", "", text)
    for match in re.finditer(r"\\result\{([^{}]*)\}", text):
        yield text.count("\n", 0, match.start()) + 1, match[1]


def unfit(places: dict[str, str], numbers: dict, quoted: dict) -> tuple[list[str], list[str]]:
    """Return what has no value, and what has another than the text was written for.

    Args:
        places: of each key that the text quotes, the file and line.
        numbers, quoted: values by key, those of now and those that the text was written for.
    """
    missing = [f"{at}: {key!r} has no value" for key, at in places.items() if not numbers.get(key)]
    stale = [
        f"{at}: {key!r} is {numbers[key]!r}, and the text was written for {quoted.get(key)!r}: "
        "read the sentence again, then check.py accept"
        for key, at in places.items()
        if numbers.get(key) and numbers[key] != quoted.get(key)
    ]
    unused = [f"quoted.json: {key!r} is quoted nowhere" for key in quoted if key not in places]
    return missing, stale + unused


def quotes(paths: list[Path]) -> dict[str, str]:
    """Return of each key that the files quote the first place."""
    places: dict[str, str] = {}
    for path in paths:
        if path.name not in WRITTEN:
            for line, key in quoted_keys(path.read_text(encoding="utf-8")):
                places.setdefault(key, f"{path.name}:{line}")
    return places


def check_numbers(paths: list[Path], folder: Path = HERE, accept: bool = False) -> list[str]:
    """Return what is wrong with the numbers that the files quote; `accept` writes quoted.json."""
    numbers = json.loads((folder / "generated" / "numbers.json").read_text(encoding="utf-8"))
    at, places = folder / "quoted.json", quotes(paths)
    if accept:
        quoted = {key: numbers.get(key) for key in sorted(places)}
        text = json.dumps({"scale": numbers["scale"], "values": quoted}, indent=1)
        at.write_text(text.replace("\\u00b1", "±") + "\n", encoding="utf-8")
    written = json.loads(at.read_text(encoding="utf-8"))
    missing, stale = unfit(places, numbers, written["values"])
    if numbers["scale"] == written["scale"]:
        return missing + stale
    if missing:
        count = f"{len(missing)} of {len(places)} numbers have no value at this scale"
        print(f"{count}, and stand as [?]:", *sorted(k for k in places if not numbers.get(k)))
    return []


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


def check_text(paths: list[Path]) -> list[str]:
    """Return the numbers that are typed in the files."""
    return [
        f"{path.name}:{line}: {number!r} is typed by hand; quote it by \\result{{KEY}}"
        for path in paths
        if path.name not in WRITTEN
        for line, number in typed_numbers(path.read_text(encoding="utf-8"))
    ]


def main(what: str, *names: str) -> int:
    """Print what is wrong in the files; return 1 if anything is."""
    paths = [Path(name) for name in names]
    if what == "log":
        wrong = [c for p in paths for c in complaints(p.read_text("utf-8", errors="replace"))]
    elif what == "text":
        wrong = check_text(paths)
    else:
        wrong = check_numbers(paths, accept=what == "accept")
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
