"""Random command lines, drawn from the parser's own declarations: exit 0, or 2 in one line.

FUZZ=5000 FUZZ_SEED=7 python -m pytest -m slow tests/guarantees/test_fuzz.py    more, other seeds
"""

import argparse
import inspect
import json
import math
import os
import shlex
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import SYNTHETIC_DATASET

import data
import model as vit
import train
from commands import centralized, fedavg
from commands.options import build_parser
from machine import safe_files
from training import learner

pytestmark = pytest.mark.slow
COUNT, SEED = int(os.environ.get("FUZZ", 24)), int(os.environ.get("FUZZ_SEED", 0))
TINY = ("--rounds", 1, "--clients", 10, "--fraction", 0.2, "--J", 2, "--batch-size", 4)
BASE = {  # before what is drawn, which may repeat it: the last one counts
    "fedavg": ("--data", "synthetic", *TINY),
    "centralized": ("--data", "synthetic", "--epochs", 1, "--batch-size", 100),
    "ridge": ("--data", "synthetic", "--clients", 10),
    "calibrate": ("--data", "synthetic", "--clients", 10),
    "doctor": ("fedavg", "--data", "synthetic", *TINY),
    "shards": ("--data", "synthetic",),
}  # fmt: skip
THEMES = {  # what gives other options something to act on
    "fedavg": (
        *(
            "",
            "--head ridge",
            "--head probe",
            "--train head",
            "--train head --head ridge --lr 0.01",
        ),
        *("--head ridge --mask-rule least-sensitive --calibration-images 20 --lr 1e-5",),
        *("--head ridge --mask-rule random", "--head ridge --mask mask.pt", "--scaffold --lr 0.1"),
        *("--search --search-lr 0.1 --search-length 1", "--local-norm", "--aggregate fednova"),
        *("--aggregate ties", "--aggregate dare", "--aggregate sign --diagnostics", "--fedvc"),
        *("--server fedadam", "--dp-noise 1 --dp-clip 1", "--dp-clip 0.1", "--early-stop 1"),
        *("--secure-aggregation", "--batch-size full --J 1", "--nc 10", "--dirichlet 0.3"),
    ),
    "centralized": ("", "--head ridge", "--train head", "--search --search-lr 0.1", "--augment"),
    "calibrate": (
        *("--calibration-images 20", "--calibration-images 20 --consensus vote"),
        *("--calibration-images 20 --threshold 1e-9", "--mask-rule random"),
    ),
    "eval": ("", "--per-client", "--per-client --personalised", "--best"),
    "merge": ("", "--rule ties", "--rule fisher --fisher-images 10", "--rule dare"),
}
FEW = ("1", "2", "3")
VALUES = {  # what costs too much at the bounds, or is a name
    **dict.fromkeys(("rounds", "epochs", "search_length", "calibration_rounds", "threads"), FEW),
    **dict(processes=("1", "2", "auto")),
    **dict(J=FEW, batch_size=("1", "5", "full"), early_stop=FEW, search_lr=("0", "0.1", "1e30")),
    **dict(clients=("1", "3", "10", "101", "900", "901", "1e5"), nc=("1", "2", "10", "100", "101")),
    **dict(image_size=("8", "16", "32", "40", "33", "0"), eval_batch=("1000", "64"), jobs=FEW),
    **dict(head_images=("100", "99", "500", "901"), fisher_images=("1", "10", "5000")),
    **dict(val_fraction=("0", "0.1", "0.5", "0.001", "0.9"), keep_tokens=("0.01", "0.5", "1")),
    **dict(calibration_images=("1", "10", "50"), clients_evaluated=("1", "3", "100000")),
    **dict(weights=("none", "dino", "good.pth", "evil.pth", "away.pth", "occupied", "")),
    **dict(mask=("mask.pt", "good.pth", "occupied"), device=("cpu", "auto", "cuda", "x")),
    **dict(train=("all", "head", "blocks.0", "blocks.1", "blocks.2", "")),
    **dict(model=("vit_demo", "vit_xl"), scale=("0", "-1", "0.5", "1e30")),
    **dict(mask_within=("query.*", "*.bias", "[!k]*", "x", "")),
    **dict(mask_scope=("*", "blocks.*", "*.weight", "norm.weight", "blocks.7", "")),
    **dict(name=("x", "a/b", "../x", "", ".", "n" * 300, "a\0b", "/tmp/x", "out/x", "a:b", "con")),
    **dict(runs_dir=("runs", "occupied", "deep/er", ""), data_dir=("data", "occupied", "")),
    **dict(out=("out.png", "away/x.png", "occupied", ""), json=("j.json", "away/j.json", "")),
    **dict(file=("x.pth", "away/x.pth", "occupied", ""), results=("results", "occupied")),
    **dict(examined=("",), mask_within=("query.weight", "*", "none")),
}  # fmt: skip
RUNS = ("runs/done", "runs/early", "runs/masked", "runs/central", "runs/none", "occupied", "")
ODD = ("", "x", "nan", "inf", "-1", "1e400", "9" * 30, "0x10", "½")


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each sub-command that works in this process."""
    actions = build_parser(train.COMMANDS)._actions
    parsers = next(a for a in actions if isinstance(a, argparse._SubParsersAction)).choices
    return {name: parser for name, parser in parsers.items() if name != "sweep"}  # it has its own


def values(action: argparse.Action, draw: np.random.Generator) -> str:
    """Draw a value for an option: most often valid, at a bound or inside, else not."""
    if draw.random() < 0.06:
        return str(draw.choice(ODD))
    if action.dest in ("run_folder", "run_folders"):
        return str(draw.choice(RUNS))
    if action.dest in VALUES:
        return str(draw.choice(VALUES[action.dest]))
    if action.choices:
        return str(draw.choice(list(action.choices)))
    bounds = inspect.getclosurevars(action.type).nonlocals if action.type else {}
    if "low" not in bounds:  # a word of some kind
        return str(draw.choice(ODD))
    low, high = bounds["low"], bounds["high"]
    inside = [0, 1, 2, 10] if bounds["kind"] is int else [0, 1e-30, 1e-3, 0.1, 0.5, 1, 3, 1e30]
    edges = [b for b in (low, high) if math.isfinite(b)]
    drawn = [str(bounds["kind"](value)) for value in (*inside, *edges)]
    words = {None: [], "share": ["0.5"]}.get(bounds["word"], [bounds["word"]])
    return str(draw.choice([*drawn, *words]))


def command_line(seed: int) -> list[str]:
    """Draw a sub-command and a few of its options, as a function of the seed."""
    draw = np.random.default_rng(seed)
    parsers = subcommands()
    shares = np.array([6 if name == "fedavg" else 2 if "ca" in name else 1 for name in parsers])
    name = str(draw.choice(list(parsers), p=shares / shares.sum()))
    options = [a for a in parsers[name]._actions if a.dest not in ("help", "help_all", "list")]
    theme = str(draw.choice(THEMES.get(name, ("",))))
    line = [name, *map(str, BASE.get(name, ())), *theme.split()]
    if name == "doctor":
        options = [a for a in parsers["fedavg"]._actions if a.dest[:4] != "help"]
        line = [name, *["--json", "j.json"] * draw.integers(2), *line[1:]]
    named = [a for a in options if a.option_strings]
    chosen = draw.permutation(len(named))[: draw.geometric(0.3) - 1]
    for action in [named[i] for i in chosen]:
        line.append(str(draw.choice(action.option_strings)))
        if action.nargs != 0:
            count = draw.integers(1, 3) if action.nargs == "+" else 1
            line += [values(action, draw) for _ in range(count)]
    for action in options:
        if not action.option_strings and (draw.random() < 0.98 or action.nargs == "+"):
            count = draw.integers(1, 3) if action.nargs == "+" else 1
            line += [values(action, draw) for _ in range(count)]
    return line


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with finished runs, weights, a mask, and what is in the way; no network."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("fuzz")
        patch.chdir(home)
        small = SYNTHETIC_DATASET(samples_per_class=10)
        patch.setattr(data, "synthetic_dataset", lambda: small)
        patch.setattr(learner, "compiled", lambda function: function)  # half a minute each
        for command in (fedavg, centralized):  # a second each; `plot` and others draw
            patch.setattr(command, "plot_curves", lambda logs, path: None)

        def offline(*arguments, **options):
            raise URLError("no network")

        patch.setattr(urllib.request, "urlopen", offline)
        patch.setattr(torch.hub, "download_url_to_file", offline)
        Path("occupied").write_text("a file")
        torch.save(vit.build_vit("vit_demo", 100, seed=1).state_dict(), "good.pth")
        torch.save({"norm.weight": os.getcwd}, "evil.pth")
        start = ("--seed", "0")
        for name, command, options in (
            ("done", "fedavg", ()),
            ("early", "fedavg", ("--early-stop", 5, "--eval-every", 1)),
            ("masked", "fedavg", ("--mask-rule", "lowest-magnitude", "--head", "ridge")),
            ("central", "centralized", ()),
        ):
            options = (command, *BASE[command], *start, *options, "--name", name)
            assert train.main([str(o) for o in options]) == 0
        Path("mask.pt").write_bytes(Path("runs/masked/mask.pt").read_bytes())
        Path("elsewhere").mkdir()
        Path("runs/out").symlink_to(home / "elsewhere")
        yield home


def half_written(home: Path) -> list[Path]:
    """Return the run folders that hold options but no log: no other options may use them."""
    return [
        config.parent
        for config in home.rglob("config.json")
        if not (config.parent / "log.jsonl").exists()
    ]


def complaint(line: list[str], home: Path, capsys) -> str | None:
    """Run a command line; returns what is wrong with how it ended."""
    before = set(half_written(home))
    try:
        status = train.main(line)
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        capsys.readouterr()
        return f"raised {error!r}"
    finally:
        for folder in list(safe_files._locks):
            safe_files._locks.pop(folder).close()
    said = capsys.readouterr().err.splitlines()
    errors = [
        text for text in said if not text.startswith(("warning: ", "no curves.png", "measuring "))
    ]
    if status not in (0, 2):
        return f"exit {status}"
    if len(errors) != (status == 2):
        return f"exit {status} and {len(errors)} lines on stderr: {errors}"
    if status == 2 and not errors[0].removeprefix("train.py: error: ").strip():
        return "exit 2 without a reason"
    left = set(half_written(home)) - before
    if status == 2 and left:
        return f"left {[str(p.relative_to(home)) for p in left]} after: {errors[0]}"
    if any((home / "elsewhere").iterdir()):
        return "left --runs-dir"
    return None


@pytest.mark.parametrize("part", range(4))
def test_any_command_line_ends_in_0_or_in_one_line_and_2(place, capsys, part):
    problems = {}
    for i in range(part, COUNT, 4):
        line = command_line(1_000_000 * SEED + i)
        if problem := complaint(line, place, capsys):
            problems[f"{i}: {shlex.join(line)}"] = problem
    assert not problems, "\n" + json.dumps(problems, indent=2, ensure_ascii=False)
