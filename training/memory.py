"""What a run keeps beside its model: whether that fits in the free memory, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from federated.cohort import cohort_size
from federated.methods import compares_clients
from machine.device import exact_place, free_memory

if TYPE_CHECKING:
    from training.diagnostics import Diagnostics
    from training.learner import Learner
    from training.rounds import Federation

HOST = torch.device("cpu")
SHARE = {"cuda": 0.5, "cpu": 0.8}  # of the free memory, for what clients keep
APART = 16  # bytes of an entry of a change and of its copy


def memory_room(learner: Learner) -> dict[torch.device, float]:
    """Return the bytes that a process may take where exact sums live and on the host; 0: not known.

    Processes hold the same, and share the host.
    """
    group, places = learner.group, (exact_place(learner.workspace.device), HOST)
    sharing = {"cuda": 1, "cpu": group.size}
    room = [SHARE[place.type] * free_memory(place) / sharing[place.type] for place in places]
    lowest = map(min, zip(*group.gather(room), strict=True))
    return dict(zip(places, lowest, strict=True))


def check_apart(learner: Learner, o: Federation, diagnostics: Diagnostics | None) -> None:
    """Raise ValueError where a round's changes are kept apart and do not fit beside the sums."""
    compares = compares_clients(o.aggregation.aggregate)
    if not compares and diagnostics is None:
        return
    workspace, fraction = learner.workspace, o.participation.fraction
    entries = len(learner.entries.theta) * cohort_size(len(workspace.shards), fraction)
    needed, room = APART * entries, memory_room(learner)[exact_place(workspace.device)]
    if room and needed > room:
        option = f"--aggregate {o.aggregation.aggregate}" if compares else "--diagnostics"
        raise ValueError(
            f"{option} keeps a round's changes apart and copies them, {needed / 1e9:,.1f} GB, and "
            f"there is room for {room / 1e9:,.1f} GB: a lower --fraction, or a mask (--mask-rule)"
        )


def state_place(learner: Learner, o: Federation, option: str, each: int) -> torch.device:
    """Return where the clients' states lie: on the device where they fit, else on the host.

    Args:
        option: that keeps them.
        each: bytes of a client's.

    Raises:
        ValueError: they fit on neither; a host that does not say what is free is trusted.
    """
    clients = len(learner.workspace.shards)
    taking_part = min(clients, o.rounds * cohort_size(clients, o.participation.fraction))
    needed, room = each * taking_part, memory_room(learner)
    place = next((place for place in room if needed <= room[place]), None)
    if place is None and room[HOST]:
        raise ValueError(
            f"{option} keeps {needed / 1e9:,.1f} GB, {each / 1e6:,.1f} MB for each client, and the "
            f"free memory has room for {max(room.values()) / 1e9:,.1f} GB: fewer --clients, or a "
            "mask (--mask-rule), whose entries alone are kept"
        )
    return place or HOST
