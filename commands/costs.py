"""What a command costs: how many images, steps and rounds it has, times the seconds of each.

costs.total(o)    the seconds of a fedavg, centralized, ridge or calibrate command, of Costs that
                  commands/trial.py measured on this machine

`o` is a parsed command's options by name, `line.stored`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import data
import masks
from federated.cohort import cohort_size
from training import agreement

COUNTED = ("fedavg", "centralized", "ridge", "calibrate")


class Costs(NamedTuple):
    """Seconds of what a command does; 0 what it does not."""

    feature: float = 0.0  # an image's features
    head: float = 0.0  # fitting the head
    score: float = 0.0  # scoring an image
    step: float = 0.0  # a training step beside its images
    image: float = 0.0  # an image of a step; 0 where the whole step was timed
    client: float = 0.0  # a client's part of a round beside its steps
    round: float = 0.0  # a round beside its clients
    evaluation: float = 0.0  # evaluating an image

    def total(self, o: dict) -> float:
        """Return the seconds of a command like the one that was measured."""
        return sum(self.parts(o).values())

    def parts(self, o: dict) -> dict[str, float]:
        """Return the seconds of each part of such a command."""
        heads = fitted(o) * (2 if o["command"] == "ridge" else 1)  # one of the clients' sums
        calibrates = o.get("mask_rule") is not None and masks.needs_scores(o["mask_rule"])
        parts = {
            "features": self.feature * featured(o),
            "head": self.head * heads,
            "calibration": self.score * scored(o) if calibrates else 0.0,
        }
        if o["command"] in ("ridge", "calibrate"):
            return parts
        tried = ("search_lr", "search_weight_decay", "search_schedule")
        tries = math.prod(len(o[name] or (1,)) for name in tried) * o["search"]
        length = o.get("rounds") or o["epochs"]
        short = self.training(o | {"eval_test": False}, o["search_length"] or length)
        full = self.training(o, length)
        tested = 2 * self.evaluation * images_of(o)[1]  # at the end, the last and the best weights
        goes_on = o["search_length"] in (None, length) or o["schedule"] == "constant"
        parts["head"] *= 1 + tries
        parts["search"] = max(0, tries - goes_on) * sum(short)  # the winner goes on as the run
        return parts | {"training": full[0], "evaluations": full[1] + tested}

    def training(self, o: dict, length: int) -> tuple[float, float]:
        """Return the seconds of so many rounds or epochs, and those of their evaluations."""
        looks = 1 + math.ceil(length / o["eval_every"])
        evaluations = self.evaluation * looks * evaluated(o)
        if "rounds" not in o:
            steps = math.ceil(train_images(o) / o["batch_size"])
            return length * steps * self.a_step(o), evaluations
        return length * self.a_round(o), evaluations

    def a_step(self, o: dict) -> float:
        """Return the seconds of a training step."""
        return self.step + batch_of(o) * self.image

    def a_round(self, o: dict) -> float:
        """Return the seconds of a round."""
        clients = cohort_size(o["clients"], o["fraction"])
        return clients * (o["J"] * self.a_step(o) + self.client) + self.round


def images_of(o: dict) -> tuple[int, int]:
    """Return how many images train, before validation is split off, and how many test."""
    return data.DATASETS[o["data"]].images


def train_images(o: dict) -> int:
    """Return how many images train."""
    images = images_of(o)[0]
    return images - round(o["val_fraction"] * images)


def evaluated(o: dict) -> int:
    """Return how many images an evaluation is of."""
    train, test = images_of(o)
    return train - train_images(o) + test * o["eval_test"]


def fitted(o: dict) -> bool:
    """Is a head fitted to features?"""
    return o.get("head", "ridge") != "linear"


def batch_of(o: dict) -> int:
    """Return the images of a step: of --batch-size full, a client's share."""
    return max(1, train_images(o) // o["clients"]) if o["batch_size"] == "full" else o["batch_size"]


def featured(o: dict) -> int:
    """Return of how many images features are computed, or activations that stand still."""
    train, test = images_of(o)
    if o["command"] == "ridge" or o.get("train") == "head":
        return train + test
    shown = train + (o["command"] != "calibrate") * test
    if o["head_images"] is not None:  # and an equal share of the validation images
        shown = round(o["head_images"] * train / max(1, train_images(o)))
    below = o.get("train", "all") not in ("all", "blocks.0") and not o["augment"]
    stand_still = below and o["keep_tokens"] == 1
    return fitted(o) * shown + stand_still * (train + test)


def scored(o: dict) -> int:
    """Return how many images are scored, those of `calibrate`'s comparison of clients included."""
    count = cohort_size(o["clients"], o["calibration_fraction"]) if "clients" in o else 1
    share = max(1, o["calibration_images"] // count)
    compared = (min(agreement.CLIENTS, count) + count) * share
    rounds = o["calibration_rounds"] * count * share
    return rounds + (compared if o["command"] == "calibrate" else 0)


def check(command: str) -> None:
    """Raise ValueError where it is not known what a command does."""
    if command not in COUNTED:
        hint = "; sweep --list times every table" * (command == "sweep")
        raise ValueError(f"what is examined is {', '.join(COUNTED)}, not {command!r}{hint}")
