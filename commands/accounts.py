"""What log and summary of a federated run say beside its rounds: bytes, clients, privacy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

import masks
from federated.privacy import Privacy, epsilon
from training.learner import Learner
from training.mask_file import Mask

NEVER_COVERED = (  # by epsilon, of what a private run leaves behind
    "the number of clients in each round, which the log holds",
    "options that were chosen by looking at earlier runs",
    "what eval --per-client and --personalised show of single clients",
    "whoever has the run's checkpoint, which holds its secret: hand on what export writes",
)


def opening_bytes(learner: Learner, clients: int) -> dict[str, int]:
    """Return what was sent before round 1: calibration, then the mask once to every client."""
    if learner.mask is None:
        return {}
    origin, broadcast = learner.mask.origin, clients * learner.mask.bytes
    return {"bytes_up": origin["bytes_up"], "bytes_down": origin["bytes_down"] + broadcast}


def absent_classes(names: list[str]) -> dict[str, list[str]]:
    """Return what log and summary say of classes that nobody holds; {} where there are none."""
    return {"classes_without_client": names} if names else {}


def communication(records: list[dict], dense_size: int) -> dict[str, float]:
    """Add up what a run has sent, and compare it with sending every parameter both ways.

    Args:
        dense_size: parameters that would train without a mask.
    """
    up, down = (sum(r.get(key, 0) for r in records) for key in ("bytes_up", "bytes_down"))
    answered = [r.get("answered", len(r.get("clients", ()))) for r in records]
    dropped = [len(r.get("dropped_out", ())) for r in records]
    dense = 4 * dense_size * (2 * sum(answered) + sum(dropped))
    return {"bytes_up": up, "bytes_down": down, "bytes_to_dense": (up + down) / max(1, dense)}


def seen(records: list[dict], shards: list[np.ndarray], labels: np.ndarray) -> dict[str, dict]:
    """Count the clients that a run has trained on, and the classes that these hold.

    Args:
        labels: of the training images, which shards are indices into.
    """
    clients = sorted({k for record in records for k in record.get("clients", ())})
    classes = {int(c) for k in clients for c in np.unique(labels[shards[k]])}
    counts = {"clients": len(clients), "classes": len(classes)}
    return {"seen": counts} if clients else {}  # a private run does not name them


def privacy_spent(o: SimpleNamespace, rounds: int) -> dict[str, float]:
    """Return the epsilon of a run's first rounds; nothing where no noise was added."""
    noise, delta = o.privacy.dp_noise, o.privacy.dp_delta
    return {"epsilon": epsilon(noise, o.participation.fraction, rounds, delta)} if noise else {}


def privacy_of_run(o: SimpleNamespace, rounds: int, mask: Mask | None) -> dict:
    """Return what a summary says of privacy; {} of a run without."""
    privacy: Privacy = o.privacy
    if privacy.dp_clip is None:
        return {}
    settings = {n: getattr(privacy, n) for n in ("dp_noise", "dp_clip", "dp_delta", "dp_seed")}
    protects = bool(privacy.dp_noise) and privacy.dp_seed is None
    not_covered = [*uncovered(o, mask), *NEVER_COVERED]
    figures = settings | privacy_spent(o, rounds) | {"protects": protects}
    return {"privacy": figures | {"not_covered": not_covered}}


def uncovered(o: SimpleNamespace, mask: Mask | None) -> list[str]:
    """Name what a run takes from the clients' data outside of its private rounds."""
    fitted = [f"the {o.head.head} head fitted to their data"] * (o.head.head != "linear")
    scored = mask is not None and masks.needs_scores(mask.origin["mask_rule"])
    return fitted + ["the mask calibrated on their data"] * scored


def warnings_of(o: SimpleNamespace, mask: Mask | None) -> list[str]:
    """Return what a run's privacy and secure aggregation do not do, a sentence each."""
    warnings, privacy = [], o.privacy
    if privacy.dp_clip is not None and (left_out := uncovered(o, mask)):
        warnings.append(f"epsilon covers the rounds, not {' and '.join(left_out)}")
    if privacy.dp_noise and privacy.dp_seed is not None:
        warnings.append(
            "--dp-seed: the noise can be subtracted by whoever reads the seed, config.json holds "
            "it: this run protects nobody"
        )
    if privacy.secure_aggregation and (o.participation.dropout or privacy.dp_clip is not None):
        where = "in_the_clear" if privacy.dp_clip is None else "answered: 1"
        warnings.append(
            "--secure-aggregation: a client that is alone in its round is sent in the clear, and "
            f"the log says so ({where})"
        )
    return warnings
