"""Options: groups of them to arguments of a parser, and a parsed line back to groups.

A group is a NamedTuple beside the code that uses it. Its docstring heads the group in --help; each
field is an option, Annotated with its help and, in any order:

    ">= 1", "0 < x <= 1"    the bound of a number; ">= 1 or full": or that word; ">= 1 or share":
                            a whole number, or a fraction of one
    "--J --local-steps"     its names, where they are not made of the field's
    "path"                  a file's or folder's name
    "N"                     what stands for the value in --help
    "positional"            an argument without a name; "remainder": and all that follows
    a table or a tuple      its choices

    o = grouped((Source, LocalSteps), values)    -> o.source.seed, o.local_steps.J
"""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import data
from centralized import Epochs, Schedule
from commands import rules
from federated.client_states import ClientTerms
from federated.cohort import Participation
from federated.methods import Aggregation
from federated.privacy import Privacy
from federated.server import ServerOptions
from flat import Sgd
from machine.device import Graph, Machine
from machine.runs import Run
from machine.safe_files import DamagedFile
from training.calibration import GivenMask, Masking
from training.clients import LocalSteps
from training.diagnostics import Diagnosing
from training.features import FittedHead, Head
from training.learner import Training
from training.outcome import Recipe
from training.rounds import Federation, Rounds
from training.session import Running, Watching, default_name
from training.workspace import Backbone, Sharding, Source

BOUND = re.compile(
    r"finite|(?:(?P<low>\S+) (?P<above><=?) x <= (?P<high>\S+)|(?P<least>>=?) (?P<from>\S+?))"
    r"(?: or (?P<word>\w+))?"
)

FILLED = (  # options of a run that are never None: they follow others
    *("model", "weights", "image_size", "lr", "weight_decay", "batch_size", "head"),
)


class Search(NamedTuple):
    """Search, on validation accuracy."""

    search: typing.Annotated[bool, "choose learning rate and weight decay first"] = False
    search_lr: typing.Annotated[
        list[float] | None,
        "learning rates to try [a third of --lr, --lr, three times --lr]",
        "0 <= x <= 1e38",
        "LR",
    ] = None
    search_weight_decay: typing.Annotated[
        list[float] | None, "weight decays to try [0 0.0005]", "0 <= x <= 1e38", "WD"
    ] = None
    search_length: typing.Annotated[
        int | None, "rounds or epochs of each try [as the run]", ">= 1", "N"
    ] = None


BASE = (Source, Backbone, Machine, Running)
TRAINED = (Training, Head, Sgd, Schedule, Graph, Watching, Search, GivenMask, Masking)
GROUPS = {  # of the commands that make runs
    "fedavg": (
        *(Rounds, LocalSteps, Participation, ClientTerms, Aggregation, ServerOptions, Privacy),
        *(Diagnosing, Sharding, *TRAINED, *BASE),
    ),
    "centralized": (Epochs, *TRAINED, *BASE),
    "ridge": (Sharding, *BASE),
    "calibrate": (Masking, FittedHead, Sharding, *BASE),
}


class Line(NamedTuple):
    """A command line."""

    command: str
    stored: dict  # all options by name, as a run's config.json holds them
    defaults: dict  # the same of a line without any, before they follow one another
    groups: types.SimpleNamespace

    @property
    def name(self) -> str:
        """The run's folder: --name, or one made of the options."""
        if self.stored["name"] is not None:
            return self.stored["name"]
        sharding = self.groups.sharding.name if "clients" in self.stored else None
        return default_name(self.command, self.stored, self.defaults, sharding)

    def replaced(self, **values: Any) -> Line:
        """Return the line with other values of some options."""
        stored = self.stored | values
        return self._replace(stored=stored, groups=grouped(GROUPS[self.command], stored))


# ---------------------------------------------------------------------------- arguments


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, one line each, and names are whole."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse what a command does not know by that command's own name."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(
                unknown[0], self._option_string_actions, n=1, cutoff=0.75
            )
            meant = f"; is {close[0]} meant?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return namespace, unknown

    def error(self, message: str):
        raise ValueError(f"{message} ({self.prog} --help lists the options)")


class Command(NamedTuple):
    """What runs, and the groups of its options; its docstring is its help."""

    run: Callable[[Line], None]
    options: tuple[type, ...]


def build_parser(commands: Mapping[str, Command], description: str = "") -> Parser:
    """Return the parser of some commands."""
    parser = Parser(
        prog="train.py", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    subparsers = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND"
    )
    for name, command in commands.items():
        text = command.run.__doc__ or ""
        subparser = subparsers.add_parser(name, help=text.partition("\n")[0], description=text)
        for group in command.options:
            add_group(subparser, group)
    return parser


def parse(
    arguments: list[str] | None, commands: Mapping[str, Command], description: str = ""
) -> Line:
    """Return a command line with its defaults filled in.

    Raises:
        ValueError: one line that names the option and says what is wrong.
    """
    parser = build_parser(commands, description)
    options = vars(parser.parse_args(arguments))
    name = options["command"]
    defaults = vars(parser.parse_args([name])) if name in GROUPS else {}
    defaults.pop("command", None)  # which is part of what a run is named after
    values = vars(rules.resolve(rules.Options(**options)))
    return Line(name, values, defaults, grouped(commands[name].options, values))


def add_group(parser: argparse.ArgumentParser, group: type) -> None:
    """Declare a group's options."""
    title = " ".join((group.__doc__ or "").split()).rstrip(".")
    add = parser.add_argument_group(title[:1].lower() + title[1:]).add_argument
    for name, hint in annotated(group).items():
        add_option(add, name, hint, group._field_defaults.get(name))


@functools.cache
def annotated(group: type) -> dict[str, Any]:
    """Return the types of a group's options with what is said of them, by name."""
    return typing.get_type_hints(group, include_extras=True)


def add_option(add: Callable, name: str, hint: Any, default: Any) -> None:
    """Declare one option; add: add_argument of a parser or a group of it."""
    hint, *notes = typing.get_args(hint)
    names, text, settings = [f"--{name.replace('_', '-')}"], "", {"default": default}
    bound = choices = place = None
    for note in notes:
        if not isinstance(note, str):
            choices = tuple(note)
        elif note.startswith("--"):
            names = note.split()
        elif BOUND.fullmatch(note):
            bound = note
        elif note == "path":
            settings["type"] = path
        elif note in ("positional", "remainder"):
            place = note
        elif re.fullmatch("[A-Z]+", note):
            settings["metavar"] = note
        else:
            text = note
    allowed = [kind for kind in kinds(hint) if kind is not types.NoneType]
    optional = len(allowed) < len(kinds(hint))
    if allowed == [bool]:
        settings["action"] = argparse.BooleanOptionalAction if optional else "store_true"
    elif typing.get_origin(allowed[0]) in (list, Sequence):
        settings["nargs"] = "*" if place and optional else "+"
        allowed = typing.get_args(allowed[0])
    if choices is not None:
        settings["choices"] = choices
    elif bound is not None:
        settings["type"] = number(int if int in allowed else float, bound)
    settings["help"] = helped(name, text, default)
    if place == "remainder":
        settings["nargs"] = argparse.REMAINDER
    if place is not None:
        add(name, **settings)
        return
    if len(names) > 1 or names[0] != f"--{name.replace('_', '-')}":
        settings["dest"] = name
    add(*names, **settings)


def helped(name: str, text: str, default: Any) -> str:
    """Return an option's help with its default, unless it says that itself."""
    shown = default
    if default is None:
        shown = by_data(name)
    elif isinstance(default, float):
        shown = f"{default:g}"
    if "[" not in text and shown is not None and shown is not False:
        text = f"{text} [{shown}]"
    return text.replace("%", "%%")


def by_data(name: str) -> str | None:
    """Return the defaults that follow --data, the first data set's first; None of other options."""
    entries = data.DATASETS.items()
    shown = {key: entry.defaults[name] for key, entry in entries if name in entry.defaults}
    if name == "lr":
        shown = {key: entry.lr_help for key, entry in entries}
    first, *others = shown or [None]
    return first and "; ".join([f"{shown[first]}", *(f"{key}: {shown[key]}" for key in others)])


def number(kind: type, bound: str) -> Callable[[str], Any]:
    """Return an argparse type: a finite number within a bound."""
    parts = BOUND.fullmatch(bound)
    low = float(parts["low"] or parts["from"] or -math.inf)
    above = parts["above"] == "<" or parts["least"] == ">"
    high, word = float(parts["high"] or math.inf), parts["word"]
    if kind is int and parts["high"]:
        high = int(parts["high"])

    def parse(text: str) -> Any:
        if word == "share" and 0 < share_of(text) < 1:
            return share_of(text)
        if text == word:
            return text
        try:
            value = kind(text)
        except ValueError:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is no finite number")
        if not low <= value <= high or (above and value == low):
            limit = f"{'above' if above else 'at least'} {low:g}"
            upper = f" and at most {high:g}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be {limit}{upper}")
        return value

    return parse


def share_of(text: str) -> float:
    """Return the number that a text is; NaN where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def path(text: str) -> str:
    """The argparse type of a file's or folder's name: not empty, as an unset variable is."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(
            "the name is empty" if not text else "the name holds a NUL"
        )
    return text


# ---------------------------------------------------------------------------- groups


@functools.cache
def fields(group: type) -> dict[str, tuple[type, ...]]:
    """Return the types of a group's options, by name."""
    hints = typing.get_type_hints(group)
    return {name: tuple(typing.get_origin(k) or k for k in kinds(h)) for name, h in hints.items()}


def kinds(hint: Any) -> tuple[type, ...]:
    """Return the types that a hint allows: those of a union, or the one that it is."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def read(group: type, values: Mapping[str, Any]) -> Any:
    """Return a group of options from values by name.

    Raises:
        DamagedFile: a value that is missing or of another type, as in a file that was edited.
    """
    chosen = {}
    for name, allowed in fields(group).items():
        if name not in values:
            raise DamagedFile(f"{name} is missing in its options")
        value = values[name]
        if not fits(value, allowed, optional=group._field_defaults.get(name, name) is None):
            raise DamagedFile(f"{name} is {value!r} in its options")
        chosen[name] = value
    return group(**chosen)


def fits(value: Any, allowed: tuple[type, ...], optional: bool) -> bool:
    """Tell whether a value is of an option's types; a whole number is a number, and a flag none."""
    if value is None:
        return optional or types.NoneType in allowed
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, (*allowed, int) if float in allowed else allowed)


def grouped(groups: Iterable[type], values: Mapping[str, Any]) -> types.SimpleNamespace:
    """Return values by name as groups: o.local_steps is the LocalSteps among them."""
    return types.SimpleNamespace(**{snake(group.__name__): read(group, values) for group in groups})


def snake(name: str) -> str:
    """Write LocalSteps as local_steps."""
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


def federation(o: types.SimpleNamespace) -> Federation:
    """Return what makes a run federated, of a command line's groups."""
    return Federation(
        rounds=o.rounds.rounds,
        steps=o.local_steps,
        schedule=o.schedule,
        participation=o.participation,
        terms=o.client_terms,
        aggregation=o.aggregation,
        privacy=o.privacy,
        server=o.server_options,
        cuda_graph=o.graph.cuda_graph,
    )


def recipe_of(folder: str, data_dir: str, machine: Machine, weights: str | None = None) -> Recipe:
    """Return the options of the run in a folder, on this machine.

    Args:
        machine: its precision in place of the run's, unless it is auto.
        weights: where those that the run began with are now; None: where they were.

    Raises:
        ValueError: no run folder, or one whose config is damaged.
    """
    run = Run(folder)
    stored = run.config()["options"]
    command, precision = stored.get("command"), stored.get("precision")
    here = machine._asdict() | {"data_dir": data_dir, "cuda_graph": "off"}
    here["precision"] = precision if machine.precision == "auto" else machine.precision
    here["normalisation"] = stored.get("pixels")  # whatever the file is called now
    here |= {"fresh": False, "mask_lr": stored.get("mask_lr")}  # older runs have neither
    here["weights"] = stored.get("weights") if weights is None else weights
    if command in ("ridge", "calibrate"):
        raise ValueError(f"{folder} holds no checkpoint: a run of {command}, without one")
    try:
        o = grouped(GROUPS[command], stored | here)
        missing = next((name for name in FILLED if stored[name] is None), None)
    except (DamagedFile, KeyError) as error:
        raise DamagedFile(f"{run.config_path} is damaged: {error}") from None
    if missing or not isinstance(stored.get("weights_sha256"), str):
        raise DamagedFile(f"{run.config_path} is damaged: {missing or 'weights_sha256'}")
    federated = command == "fedavg"
    return Recipe(
        source=o.source,
        backbone=o.backbone,
        machine=o.machine,
        training=o.training,
        sgd=o.sgd,
        head=o.head,
        masking=o.masking,
        given_mask=o.given_mask,
        weights_sha256=stored["weights_sha256"],
        sharding=o.sharding if federated else None,
        federation=federation(o) if federated else None,
    )
