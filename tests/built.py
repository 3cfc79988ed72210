"""What commands are made of, for tests that look inside: a learner, its clients, their loop."""

from pathlib import Path

from commands.options import Line, federation, learner_options, parse
from fedavg import FedAvg
from machine.runs import Run
from train import COMMANDS
from training.clients import Clients
from training.learner import Learner
from training.rounds import client_terms, federate, make_clients
from training.session import prepare
from training.workspace import Workspace


def parsed(*arguments: object) -> Line:
    """Return a command line of the synthetic data set, unless it says otherwise."""
    command, *rest = map(str, arguments)
    return parse([command, "--data", "synthetic", *rest], COMMANDS)


def build_learner(folder: Path, *arguments: object) -> tuple[Learner, list, Line]:
    """Return the learner of a fedavg command line, its shards and the line itself."""
    line = parsed("fedavg", "--data-dir", folder, *arguments)
    o = line.groups
    workspace = Workspace(o.source, o.machine, o.backbone, sharding=o.sharding)
    model, run = workspace.build_model(), Run(folder)
    learner = prepare(workspace, model, run, learner_options(o))
    return learner, workspace.shards, line


def build(folder: Path, *arguments: object) -> tuple[Learner, Clients]:
    """Return the learner and the clients of a fedavg command line."""
    learner, _, line = build_learner(folder, *arguments)
    loop = federation(line.groups)
    terms = client_terms(learner, loop, None)
    return learner, make_clients(learner, loop, list(terms.values()))


def build_loop(folder: Path, *arguments: object, group=None) -> tuple[Learner, FedAvg]:
    """Return the learner and the loop of rounds of a fedavg command line."""
    learner, _, line = build_learner(folder, *arguments)
    if group is not None:
        learner.group = group
    return learner, federate(learner, federation(line.groups))
