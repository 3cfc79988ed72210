"""What several benches put together from a command line: a learner, its loop, a peer's work."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from commands import fedavg as federated_command
from commands.options import Command, federation, parse
from fedavg import FedAvg
from federated.cohort import sample_clients
from model import VisionTransformer
from training.learner import Learner
from training.rounds import federate
from training.workspace import Workspace

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as train.py, before cuBLAS starts
COMMANDS = {"fedavg": Command(federated_command.run, federated_command.OPTIONS)}


def opened(arguments: str) -> tuple[SimpleNamespace, Workspace]:
    """Return the groups of options of a fedavg command line, and its workspace."""
    o = parse(arguments.split(), COMMANDS).groups
    return o, Workspace(o.source, o.machine, o.backbone, sharding=o.sharding)


def build_learner(
    workspace: Workspace, options: SimpleNamespace, model: VisionTransformer | None = None
) -> Learner:
    """Return the learner of a command line without a mask; the model's head stays as it is."""
    if model is None:
        model = workspace.build_model()
    freeze_head = options.head.freeze_head
    return Learner(workspace, model, options.training, options.sgd, freeze_head=freeze_head)


def build_loop(learner: Learner, options: SimpleNamespace) -> FedAvg:
    """Return the loop of rounds over these clients."""
    return federate(learner, federation(options))


def one_round(loop: FedAvg) -> None:
    """Train a round's clients."""
    while loop.advance() is None:
        pass


class Work:
    """What is to be done: the same for every method, in this process or in a peer's workers.

    Args:
        arguments: of `train.py`: a fedavg command line.
        best: batches by index and a fused optimiser, not a DataLoader and its defaults.
        trains: False: a client returns theta plus a constant.
    """

    def __init__(self, arguments: str, *, best: bool = False, trains: bool = True):
        self.arguments, self.best, self.trains = arguments, best, trains
        self.options, self.workspace = opened(arguments)
        self.rounds = self.options.rounds.rounds
        self.shards = self.workspace.shards
        self.images = self.workspace.sets["train"]
        self.sizes = [len(shard) for shard in self.shards]
        assert len(set(self.sizes)) == 1  # so that peers' unweighted means are FedAvg's
        self.preprocess, self.threads = self.workspace.preprocess(), self.options.machine.threads
        self.ticks, self.rank = [], int(os.environ.get("RANK", 0))

    def tick(self, model: nn.Module | None = None) -> None:
        """Note the time: once before the first round, then after every round."""
        if self.workspace.device.type == "cuda":
            torch.cuda.synchronize()
        self.ticks.append(time.perf_counter())

    def clients(self, round: int) -> list[int]:
        """Return who takes part in a round 1, 2, ..."""
        count, fraction = len(self.shards), self.options.participation.fraction
        seed = self.options.source.seed
        return sample_clients(count, fraction, seed=seed, round=round).tolist()

    def draws(self, client: int, round: int) -> Tensor:
        """Return the (J, B, 4) draws of a client's local steps."""
        steps, size = self.options.local_steps
        seed = self.options.source.seed
        return data.draw_batches(
            self.shards[client], size, steps, seed=seed, round=round, client=client
        )

    def order(self, client: int, round: int) -> Tensor:
        """Return the (J * B,) images of a client's local steps."""
        return self.draws(client, round)[..., 0].flatten()

    def batches(self, client: int, round: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Return the client's (images, labels) batches, uint8: by index, or by a DataLoader."""
        order, size = self.order(client, round), self.options.local_steps.batch_size
        order = order.to(self.images.labels.device)
        if self.best:
            return ((self.images.images[at], self.images.labels[at]) for at in order.split(size))
        subset = torch.utils.data.Subset(
            torch.utils.data.TensorDataset(*self.images), order.tolist()
        )
        return torch.utils.data.DataLoader(subset, batch_size=size)

    def optimiser(self, parameters, lr: float | None = None) -> torch.optim.Optimizer:
        """Return a new torch.optim.SGD."""
        sgd, fused = self.options.sgd, True if self.best else None
        return torch.optim.SGD(parameters, lr=lr or sgd.lr, momentum=sgd.momentum, fused=fused)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy of a uint8 batch."""
        return nn.functional.cross_entropy(model(self.preprocess(x)), y)

    def local_training(self, model: nn.Module, client: int, round: int) -> None:
        """Train a client's model where it stands, as any PyTorch user would."""
        if not self.trains:
            self.shift(model.parameters(), client)
            return
        optimiser = self.optimiser(model.parameters())
        for x, y in self.batches(client, round):
            optimiser.zero_grad()
            self.loss(model, x, y).backward()
            optimiser.step()

    @torch.no_grad()
    def shift(self, tensors: Iterable[Tensor], client: int) -> None:
        """Stand in for training: add the client's constant."""
        torch._foreach_add_(list(tensors), 1e-5 * (client + 1))

    def shifted(self, learner: Learner, theta: Tensor, clients) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what this project's clients make of theta (P,) where they shift alone."""
        for client in map(int, clients):
            learner.entries.load(theta)
            self.shift([learner.entries.theta], client)
            yield learner.entries.gather(), torch.zeros(1)
