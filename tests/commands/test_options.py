"""Options are declared once, beside what uses them: help, bounds, choices, and the way back."""

import argparse
import json
import re
from typing import Annotated, NamedTuple

import pytest

import data
import masks
import model as vit
from commands.arguments import ESSENTIAL, Command, build_parser, number
from commands.merge import RULES as MERGING
from commands.options import GROUPS, grouped, parse, read, recipe_of
from federated.methods import METHODS
from federated.server import RULES as SERVERS
from machine.device import Machine
from machine.runs import Run
from machine.safe_files import DamagedFile
from study.experiments import SCALES
from train import COMMANDS

ACTIONS = {
    name: parser._actions
    for name, parser in build_parser(COMMANDS)._subparsers._group_actions[0].choices.items()
}


def action(command, dest):
    (found,) = (a for a in ACTIONS[command] if a.dest == dest)
    return found


def default_of(command, dest):
    """Return what stands in brackets in an option's help."""
    return re.search(r"\[(.*)\]$", action(command, dest).help, re.S)[1]


# ---------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_a_group_with_a_title(command):
    for option in ACTIONS[command]:
        assert re.match(r"[^\[\s]", option.help or ""), option.dest
    for group in COMMANDS[command].options:
        assert group.__doc__.endswith("."), group


@pytest.mark.parametrize("command", COMMANDS)
def test_help_tells_every_default(command):
    """A flag's default is to be off; what stands in brackets is what the parser fills in."""
    for option in ACTIONS[command]:
        if option.default in (None, argparse.SUPPRESS) or option.default is False:
            continue
        shown = default_of(command, option.dest)
        value = option.default
        value = f"{value:g}" if isinstance(value, float) else str(value)
        assert shown == value or shown.startswith(f"{value}:"), option.dest


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_speaks_of_its_own_options(command):
    flags = {flag for option in ACTIONS[command] for flag in option.option_strings}
    for option in ACTIONS[command]:
        spoken = re.findall(r"(?<!-)--[a-zA-Z][\w-]*", option.help)
        assert flags.issuperset(spoken), option.dest


def test_help_shows_what_most_runs_need_and_help_all_the_rest(capsys):
    shown = {}
    for page in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            parse(["fedavg", page], COMMANDS)
        shown[page] = set(re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.M))
    short, whole = shown.values()
    assert 20 <= len(short) <= 30 and short < whole and len(whole) == len(ACTIONS["fedavg"]) - 1
    names = {option.dest for command in COMMANDS for option in ACTIONS[command]}
    assert names.issuperset(ESSENTIAL)
    for command in COMMANDS:  # those of few options have it, too
        with pytest.raises(SystemExit) as end:
            parse([command, "--help-all"], COMMANDS)
        assert end.value.code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_follow_the_data_set_only_where_a_command_takes_one(command):
    if "data" not in [option.dest for option in ACTIONS[command]]:
        assert not [o.dest for o in ACTIONS[command] if "synthetic:" in o.help]


@pytest.mark.parametrize("command", GROUPS)
def test_defaults_that_follow_the_data_set_are_those_of_a_line_of_it(command):
    for entry in data.DATASETS:
        line = parse([command, "--data", entry], COMMANDS)
        for name in data.DATASETS[entry].defaults.keys() & line.stored.keys():
            if action(command, name).default is None:
                shown = default_of(command, name).split("; ")
                named = [s.removeprefix(f"{entry}: ") for s in shown if s.startswith(f"{entry}: ")]
                expected = named[0] if named else shown[0]
                assert str(line.stored[name]) == expected, name


@pytest.mark.parametrize(
    ("command", "values"),
    [
        ("fedavg", {"prox": "0", "dropout": "0", "seed": "0", "warmup": "0", "fraction": "0.1"}),
        ("centralized", {"epochs": "15; synthetic: 5", "batch_size": "64; synthetic: 32"}),
        ("calibrate", {"head": "ridge", "mask_rule": "none; calibrate: least-sensitive"}),
        ("merge", {"scale": "1", "rule": "mean", "ties_keep": "0.2"}),
        ("sweep", {"scale": "paper", "jobs": "1", "experiment": "all of them"}),
    ],
)
def test_these_defaults_are_told(command, values):
    assert {name: default_of(command, name) for name in values} == values


def test_the_rates_of_every_data_set_are_told():
    shown = default_of("fedavg", "lr")
    assert all(entry.lr_help in shown for entry in data.DATASETS.values())


# ---------------------------------------------------------------------------- values

REFUSED = argparse.ArgumentTypeError


@pytest.mark.parametrize(
    ("kind", "bound", "taken", "refused"),
    [
        (float, "0 < x <= 1", {"1": 1.0, "1e-9": 1e-9}, ("0", "-1", "1.1", "nan", "inf", "", "x")),
        (float, "0 <= x <= 1", {"0": 0.0, "1": 1.0}, ("-1e-9", "1.001")),
        (float, "0 <= x < 1", {"0": 0.0, "0.999": 0.999}, ("-1e-9", "1", "1.001")),
        (float, "> 0", {"1e300": 1e300}, ("0", "1e400")),
        (float, "finite", {"-3": -3.0}, ("inf", "nan")),
        (int, ">= 1", {"1": 1, "7": 7}, ("0", "-1", "1.5", "1e3", "full", "")),
        (int, ">= 1 or full", {"full": "full", "3": 3}, ("0", "half", "Full", "0.5")),
        (int, ">= 1 or share", {"0.1": 0.1, "1": 1, "4": 4}, ("0", "1.5", "-0.1", "nan", "share ")),
        (int, "0 <= x <= 9223372036854775807", {str(2**63 - 1): 2**63 - 1}, (str(2**63), "-1")),
    ],
)
def test_bounds_are_parsed(kind, bound, taken, refused):
    convert = number(kind, bound)
    for text, value in taken.items():
        assert convert(text) == value and type(convert(text)) is type(value)
    for text in refused:
        with pytest.raises(REFUSED):
            convert(text)


@pytest.mark.parametrize(
    ("command", "dest", "table"),
    [
        ("fedavg", "aggregate", METHODS),
        ("fedavg", "server", SERVERS),
        ("fedavg", "mask_rule", masks.RULES),
        ("fedavg", "consensus", masks.CONSENSUS),
        ("fedavg", "data", data.DATASETS),
        ("shards", "data", data.DATASETS),
        ("fedavg", "model", vit.MODELS),
        ("merge", "rule", MERGING),
        ("sweep", "scale", SCALES),
    ],
)
def test_choices_come_from_the_tables(command, dest, table):
    assert action(command, dest).choices == tuple(table)


class Notes(NamedTuple):
    """Everything that an option can say of itself."""

    count: Annotated[int, "how many", ">= 1", "N"] = 3
    share: Annotated[float | None, "how much of it", "0 < x <= 1", "--share --S"] = None
    on: Annotated[bool, "a flag"] = False
    either: Annotated[bool | None, "a flag that follows others [on]"] = None
    names: Annotated[list[str] | None, "which [all]", "NAME"] = None
    folder: Annotated[str, "where", "path"] = "here"
    files: Annotated[list[str] | None, "some", "positional"] = None


def notes(*arguments):
    return parse(["go", *arguments], {"go": Command(lambda line: None, (Notes,))}).groups.notes


def test_an_annotation_is_all_that_an_option_needs():
    assert notes() == Notes(files=[])
    assert notes("a", "b", "--S", "0.5", "--on", "--no-either", "--names", "c", "d") == Notes(
        share=0.5, on=True, either=False, names=["c", "d"], files=["a", "b"]
    )
    for bad in (["--count", "0"], ["--share", "2"], ["--folder", ""], ["--coun", "3"]):
        with pytest.raises(ValueError, match=r"\(train.py go --help lists the options\)"):
            notes(*bad)


# ---------------------------------------------------------------------------- and back

LINES = {
    "fedavg": "--nc 5 --J 2 --batch-size full --prox 0.1 --mask-rule random --mask-scope a b",
    "centralized": "--eval-every 0.1 --search --search-lr 0.1 0.2 --epochs 2 --augment",
    "ridge": "--dirichlet 0.3 --val-fraction 0.2",
    "calibrate": "--threshold 1e-6 --consensus max --weights none",
}


@pytest.mark.parametrize("command", LINES)
def test_a_group_read_back_from_a_config_is_the_group_parsed(command):
    line = parse([command, "--data", "synthetic", *LINES[command].split()], COMMANDS)
    stored = json.loads(json.dumps(line.stored))
    assert vars(grouped(GROUPS[command], stored)) == vars(line.groups)


VALID = {"count": 3, "share": 0.5, "on": True, "either": None, "names": ["a"], "folder": "x"}
VALID["files"] = []


def test_a_whole_number_is_a_number():
    assert read(Notes, VALID | {"share": 1}).share == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("count", value) for value in ("3", 3.0, True, None, [3])),
        *(("share", value) for value in ("0.5", False, [0.5])),
        *(("on", value) for value in (1, "true", None)),
        *(("names", value) for value in ("a", {"a": 1}, 3)),
        *(("folder", value) for value in (3, None, ["x"])),
    ],
)
def test_a_value_of_another_type_is_damage(name, value):
    with pytest.raises(DamagedFile, match=f"{name} is .* in its options"):
        read(Notes, VALID | {name: value})


def test_a_value_that_is_missing_is_damage():
    for name in VALID:
        with pytest.raises(DamagedFile, match=f"{name} is missing in its options"):
            read(Notes, {k: v for k, v in VALID.items() if k != name})


def test_the_options_of_an_older_run_are_read_as_it_was_made(monkeypatch, tmp_path):
    """Before --mask-lr rates under a mask were raw; --fresh is of the command that reads."""
    stored = parse(["fedavg", "--data", "synthetic", "--mask-rule", "random"], COMMANDS).stored
    older = {k: v for k, v in stored.items() if k not in ("mask_lr", "fresh")}
    older |= {"weights_sha256": "", "pixels": "half"}
    for options, rate in ((older, None), (older | stored, "matched")):
        monkeypatch.setattr(Run, "config", lambda run, options=options: {"options": options})
        recipe = recipe_of(str(tmp_path), "data", Machine())
        assert recipe.learner.given_mask.mask_lr == rate and recipe.source.fresh is False
