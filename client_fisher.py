"""What clients send beside their changes under --aggregate fisher: how much each entry matters.

`options` is the namespace of train.py's command line, its defaults resolved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import fedavg
import fisher
import model as vit
from calibration import BATCH, exact_products
from diagnostics import some_images
from learner import Learner
from workspace import cast_copy


class ClientFisher:
    """The Fisher diagonals of a round's local models, by client, until the server takes them.

    They are computed in fp32, whatever precision trains, on --fisher-images of the client's own.
    The loop saves and merges them beside the changes that they weigh.
    """

    def __init__(self, learner: Learner, shards: list[np.ndarray]):
        self.learner, self.shards = learner, shards
        self.model = cast_copy(learner.model, torch.float32)
        parameters = dict(self.model.named_parameters())
        self.flat = vit.FlatView((name, parameters[name]) for name in learner.flat.shapes)
        self.scorer = fisher.Scorer(self.model, parameters=list(self.flat.shapes))
        self.preprocess = learner.workspace.preprocess(torch.float32)
        self._scores: dict[int, Tensor] = {}
        self._unmerged: list[int] = []
        self._problem: str | None = None  # of the client that trained last

    def score(self, client: int, round: int, losses: Tensor) -> None:
        """Score the model as the client's local steps, of these losses, have left it."""
        self._problem = None
        if not torch.isfinite(losses).all():  # the loop will say so
            return
        self.flat.reset(self.learner.flat.theta)
        try:
            with exact_products():
                scores = self.scorer.diagonal(self._batches(client, round))
        except ValueError as error:
            self._problem = f"round {round}, client {client}: {error}; try a lower --lr"
            return
        vector, index = torch.zeros_like(self.flat.theta), self.learner.entries.index
        for name, values in scores.items():
            self.flat.view(vector, name).copy_(values)
        self._scores[client] = vector if index is None else vector[index]
        self._unmerged.append(client)

    def check(self) -> None:
        """Raise fedavg.ClientError if the model that was scored last had no scores."""
        if self._problem:
            raise fedavg.ClientError(self._problem)

    def _batches(self, client: int, round: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and the uniform numbers that draw their labels."""
        workspace, options = self.learner.workspace, self.learner.options
        where = round, client
        shard, count = self.shards[client], options.fisher_images
        images = some_images(workspace, shard, count, "fisher images", *where)
        uniform = data.random(options.seed, "fisher labels", *where).random(len(images))
        for at, given in zip(
            images.split(BATCH), torch.from_numpy(uniform).split(BATCH), strict=True
        ):
            yield self.preprocess(workspace.sets["train"].images[at]), given

    def take(self, clients: np.ndarray) -> Tensor:
        """Return the scores (m, P) of a round's clients, and forget them; of the skipped, zeros."""
        none = torch.zeros_like(self.learner.entries.theta)
        return torch.stack([self._scores.pop(int(client), none) for client in clients])

    def merge(self, group: Any) -> None:
        """Let every process of a group know what the others have scored."""
        for rank, clients in enumerate(group.gather(self._unmerged) if group.size > 1 else ()):
            for client in clients:
                if rank != group.rank:
                    self._scores[client] = torch.zeros_like(self.learner.entries.theta)
                group.sum_(self._scores[client])  # of zeros but for one process's: exact
        self._unmerged = []

    def next_round(self) -> None:
        """Do nothing: the server takes the scores after this."""

    def state_dict(self) -> dict:
        """Return the scores of the round in hand."""
        return {"scores": dict(self._scores)}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`'s answer."""
        place = self.learner.entries.theta.device
        self._scores = {client: scores.to(place) for client, scores in state["scores"].items()}
        self._unmerged = []
