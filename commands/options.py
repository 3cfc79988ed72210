"""Options: what groups of them each command has, a parsed line, and a run's options back again.

commands/arguments.py says how a group declares its options.

    o = grouped((Source, LocalSteps), values)    -> o.source.seed, o.local_steps.J
"""

from __future__ import annotations

import functools
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from centralized import SCHEDULES, Epochs, Schedule
from commands.arguments import Command, annotated, build_parser, kinds
from commands.refusals import Options
from commands.rules import resolve
from federated.client_states import ClientTerms
from federated.cohort import Participation
from federated.methods import Aggregation
from federated.privacy import Privacy
from federated.server import ServerOptions
from flat import Sgd
from machine.device import Graph, Machine
from machine.ranks import Processes
from machine.runs import Run
from machine.safe_files import DamagedFile
from masks import needs_scores
from training.calibration import GivenMask, Masking
from training.clients import LocalSteps
from training.diagnostics import Diagnosing
from training.features import Head, ScoringHead
from training.learner import Training
from training.naming import default_name
from training.outcome import Recipe
from training.rounds import Federation, Rounds
from training.run_folder import Running
from training.session import LearnerOptions
from training.watching import Watching
from training.workspace import Backbone, Sharding, Source

OF_A_MASK = ("mask_scope", "per_tensor")
SCORING = ("calibration_rounds", "calibration_images", "calibration_fraction", "damp")
FILLED = (  # options of a run that are never None: they follow others
    *("model", "weights", "image_size", "lr", "weight_decay", "batch_size", "head"),
)


class Search(NamedTuple):
    """Search, on validation accuracy."""

    search: typing.Annotated[
        bool, "choose learning rate, weight decay and --search-schedule first"
    ] = False
    search_lr: typing.Annotated[
        list[float] | None,
        "learning rates to try [a third of --lr, --lr, three times --lr]",
        "0 <= x <= 1e38",
        "LR",
    ] = None
    search_weight_decay: typing.Annotated[
        list[float] | None, "weight decays to try [0 0.0005]", "0 <= x <= 1e38", "WD"
    ] = None
    search_schedule: typing.Annotated[
        list[str] | None, "schedules to try [that of --schedule]", SCHEDULES
    ] = None
    search_length: typing.Annotated[
        int | None, "rounds or epochs of each try [as the run]", ">= 1", "N"
    ] = None


BASE = (Source, Backbone, Machine, Running)
TRAINED = (Training, Head, Sgd, Schedule, Graph, Watching, Search, GivenMask, Masking)
GROUPS = {  # of the commands that make runs
    "fedavg": (
        *(Rounds, LocalSteps, Participation, ClientTerms, Aggregation, ServerOptions, Privacy),
        *(Diagnosing, Sharding, *TRAINED, *BASE, Processes),
    ),
    "centralized": (Epochs, *TRAINED, *BASE),
    "ridge": (Sharding, *BASE),
    "calibrate": (Masking, ScoringHead, Graph, Sharding, *BASE),
}


class Line(NamedTuple):
    """A command line."""

    command: str
    stored: dict  # all options by name, as a run's config.json holds them
    defaults: dict  # the same of a line without any, before they follow one another
    groups: types.SimpleNamespace

    @property
    def name(self) -> str:
        """The run's folder: --name, or the one that it has already, or one made of the options."""
        if self.stored["name"] is not None:
            return self.stored["name"]
        sharding = self.groups.sharding.name if "clients" in self.stored else None
        name, pattern = default_name(
            self.command, self.stored, self.defaults, self.usual(), sharding
        )
        runs_dir = Path(self.stored["runs_dir"])
        there = sorted(path.name for path in runs_dir.glob(pattern) if path.is_dir())
        return name if name in there or not there else there[0]

    def usual(self) -> dict:
        """Return the options that a line with this data set and mask rule, and no other, has."""
        entries = {key: self.stored[key] for key in ("data", "mask_rule") if key in self.stored}
        options = Options(**self.defaults | entries, command=self.command)
        try:
            return vars(resolve(options))
        except ValueError:  # it needs further options
            return {}

    def replaced(self, **values: Any) -> Line:
        """Return the line with other values of some options."""
        stored = self.stored | values
        return self._replace(stored=stored, groups=grouped(GROUPS[self.command], stored))


def parse(
    arguments: list[str] | None, commands: Mapping[str, Command], description: str = ""
) -> Line:
    """Return a command line with its defaults filled in.

    Raises:
        ValueError: one line that names the option and says what is wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser(commands, description, everything="--help-all" in arguments)
    options = vars(parser.parse_args(arguments))
    name = options["command"]
    defaults = vars(parser.parse_args([name])) if name in GROUPS else {}
    defaults.pop("command", None)  # which is part of what a run is named after
    values = vars(resolve(Options(**options)))
    return Line(name, values, defaults, grouped(commands[name].options, values))


# ---------------------------------------------------------------------------- groups


@functools.cache
def fields(group: type) -> dict[str, tuple[type, ...]]:
    """Return the types of a group's options, by name."""
    hints = typing.get_type_hints(group)
    return {name: tuple(typing.get_origin(k) or k for k in kinds(h)) for name, h in hints.items()}


@functools.cache
def choices_of(group: type) -> dict[str, tuple]:
    """Return the choices of a group's options, by name, of those that have some."""
    notes = {name: typing.get_args(hint)[1:] for name, hint in annotated(group).items()}
    return {n: tuple(x) for n, some in notes.items() for x in some if not isinstance(x, str)}


def read(group: type, values: Mapping[str, Any]) -> Any:
    """Return a group of options from values by name.

    Raises:
        DamagedFile: a value that is missing, of another type or no choice, as in an edited file.
    """
    chosen = {}
    for name, allowed in fields(group).items():
        if name not in values:
            raise DamagedFile(f"{name} is missing in its options")
        value = values[name]
        chooses = not isinstance(value, str) or value in choices_of(group).get(name, (value,))
        optional = group._field_defaults.get(name, name) is None
        if not (chooses and fits(value, allowed, optional)):
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


def learner_options(o: types.SimpleNamespace) -> LearnerOptions:
    """Return what a learner is made by, of the groups of a command that trains."""
    return LearnerOptions(
        training=o.training,
        sgd=o.sgd,
        head=o.head,
        masking=o.masking,
        given_mask=o.given_mask,
        terms=getattr(o, "client_terms", ClientTerms()),
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
    here = machine._asdict() | {"data_dir": data_dir, "cuda_graph": "off", "processes": 1}
    here["precision"] = precision if machine.precision == "auto" else machine.precision
    here["normalisation"] = stored.get("pixels")  # whatever the file is called now
    here |= {"fresh": False, "mask_lr": stored.get("mask_lr")}  # older runs have neither
    here["weights"] = stored.get("weights") if weights is None else weights
    if command in ("ridge", "calibrate"):
        raise ValueError(f"{folder} holds no checkpoint: a run of {command}, without one")
    try:
        o = grouped(GROUPS[command], stored | here)
        rule, needed = o.masking.mask_rule, FILLED
        if rule is not None:
            needed += OF_A_MASK + (SCORING if needs_scores(rule) else ())
        missing = next((name for name in needed if stored[name] is None), None)
    except (DamagedFile, KeyError) as error:
        raise DamagedFile(f"{run.config_path} is damaged: {error}") from None
    if missing or not isinstance(stored.get("weights_sha256"), str):
        raise DamagedFile(f"{run.config_path} is damaged: {missing or 'weights_sha256'}")
    federated = command == "fedavg"
    return Recipe(
        source=o.source,
        backbone=o.backbone,
        machine=o.machine,
        learner=learner_options(o),
        weights_sha256=stored["weights_sha256"],
        sharding=o.sharding if federated else None,
        federation=federation(o) if federated else None,
    )
