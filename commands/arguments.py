"""Groups of options as arguments of a parser: names, bounds, choices, help.

A group is a NamedTuple beside the code that uses it. Its docstring heads the group in --help; each
field is an option, Annotated with its help and, in any order:

    ">= 1", "0 < x <= 1"    the bound of a number, <= or < at either end; ">= 1 or full": or that
                            word; ">= 1 or share": a whole number, or a fraction of one
    "--J --local-steps"     its names, where they are not made of the field's
    "path"                  a file's or folder's name
    "N"                     what stands for the value in --help
    "positional"            an argument without a name; "remainder": and all that follows
    a table or a tuple      its choices

--help shows the ESSENTIAL options of a command that has many, --help-all the others too.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import data

if TYPE_CHECKING:
    from commands.options import Line

BOUND = re.compile(
    r"finite|(?:(?P<low>\S+) (?P<above><=?) x (?P<below><=?) (?P<high>\S+)|(?P<least>>=?) "
    r"(?P<from>\S+?))(?: or (?P<word>\w+))?"
)

ESSENTIAL = (  # options that most runs are told of, by name
    *("rounds", "epochs", "eval_every", "J", "batch_size", "fraction", "clients", "nc", "prox"),
    *("train", "head", "lr", "weight_decay", "schedule", "search"),
    *("mask", "mask_rule", "sparsity", "calibration_rounds", "dp_noise", "dp_clip"),
    *("data", "data_dir", "model", "weights", "image_size", "seed", "device", "name"),
)
MANY = 25  # options: beyond, --help shows the essential ones


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, one line each, and names are whole."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args=None, namespace=None):
        """Refuse what a command does not know by that command's own name."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            hint = meant(unknown[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown

    def _check_value(self, action, value):
        """Say of a value that is no choice which one is meant."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = meant(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, error.message + hint) from None

    def error(self, message: str):
        raise ValueError(f"{message} ({self.prog} --help lists the options)")


def meant(word: str, choices: Iterable[str]) -> str:
    """Return a question after the choice that is closest to a word; "" where none is close."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.75)
    return f"; is {close[0]} meant?" if close else ""


class Command(NamedTuple):
    """What runs, and the groups of its options; its docstring is its help."""

    run: Callable[[Line], None]
    options: tuple[type, ...]
    processes: Callable[[Line], int] = lambda line: 1  # that share a line's work here


def build_parser(
    commands: Mapping[str, Command], description: str = "", everything: bool = True
) -> Parser:
    """Return the parser of some commands.

    Args:
        everything: does --help show every option, where there are many?
    """
    parser = Parser(
        prog="train.py", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    subparsers = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND"
    )
    for name, command in commands.items():
        text = command.run.__doc__ or ""
        subparser = subparsers.add_parser(name, help=text.partition("\n")[0], description=text)
        names = [option for group in command.options for option in annotated(group)]
        shown = set(names)
        text = "list all options, and exit" if len(names) > MANY else argparse.SUPPRESS
        subparser.add_argument("--help-all", action="help", help=text)
        if len(names) > MANY:
            shown = shown if everything else shown.intersection(ESSENTIAL)
        if len(shown) < len(names):
            more = len(names) - len(shown)
            subparser.epilog = f"{more} more options: train.py {name} --help-all"
        for group in command.options:
            add_group(subparser, group, shown)
    return parser


def add_group(parser: argparse.ArgumentParser, group: type, shown: Collection[str]) -> None:
    """Declare a group's options, of which those that are `shown` are in --help."""
    title = " ".join((group.__doc__ or "").split()).rstrip(".")
    add = parser.add_argument_group(title[:1].lower() + title[1:]).add_argument
    for name, hint in annotated(group).items():
        add_option(add, name, hint, group._field_defaults.get(name), name in shown)


@functools.cache
def annotated(group: type) -> dict[str, Any]:
    """Return the types of a group's options with what is said of them, by name."""
    return typing.get_type_hints(group, include_extras=True)


def add_option(add: Callable, name: str, hint: Any, default: Any, shown: bool) -> None:
    """Declare one option.

    Args:
        add: add_argument of a parser or a group of it.
        shown: is it in --help?
    """
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
    settings["help"] = helped(name, text, default) if shown else argparse.SUPPRESS
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
    above, below = parts["above"] == "<" or parts["least"] == ">", parts["below"] == "<"
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
        if not low <= value <= high or (above and value == low) or (below and value == high):
            limit = f"{'above' if above else 'at least'} {low:g}"
            upper = f" and {'below' if below else 'at most'} {high:g}" if high < math.inf else ""
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


def kinds(hint: Any) -> tuple[type, ...]:
    """Return the types that a hint allows: those of a union, or the one that it is."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)
