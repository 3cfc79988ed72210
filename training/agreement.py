"""Do clients agree on what is insensitive? The overlap of the masks that they would make alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import masks
from machine.device import exact_products

if TYPE_CHECKING:
    from training.calibration import Calibration

CLIENTS = 10  # whose masks are compared
GROUPS = (1, 2, 5, 10, 20, 50)  # sizes of the groups of clients whose masks are compared


def agreement(calibration: Calibration) -> dict:
    """Compare the masks that clients would make alone, in one round on half of their images.

    Returns:
        what `masks.overlap` says, and of how many clients and images each.
    """
    clients = [k for k in calibration.clients if len(calibration.images(k)) > 1][:CLIENTS]
    if not calibration.scores or not clients:
        return {}
    halves = [np.array_split(calibration.images(k), 2) for k in clients]
    try:
        with exact_products():
            pairs = [
                [mask_by(calibration, calibration.client_keys(half)) for half in pair]
                for pair in halves
            ]
            groups = group_agreement(calibration)
    except masks.NothingKept:
        return {}
    counts = {"clients": len(clients), "images": len(halves[-1][0])}
    return masks.overlap(pairs) | counts | {"groups": groups}


def group_agreement(calibration: Calibration) -> dict[str, float]:
    """Return the IoU of the masks that two groups of m clients make, for several m.

    The groups share no client; their scores are added up weighted by samples.
    """
    clients, theta = calibration.clients, calibration.theta
    half, ious, weight = len(clients) // 2, {}, np.zeros((2, 1))
    sides = torch.zeros(2, len(theta), dtype=torch.float64, device=theta.device)
    for m in range(1, half + 1):
        for i, client in enumerate((clients[m - 1], clients[-m])):
            samples = len(calibration.shards[client])
            weight[i] += samples
            sides[i] += samples * calibration.client_keys(calibration.images(client))
        if m in GROUPS or m == half:
            means = (sides / torch.from_numpy(weight).to(sides)).to(theta.dtype)
            first, second = (mask_by(calibration, keys) for keys in means)
            ious[f"{m}"] = masks.overlap([(first, first), (second, second)])["iou"]
    return ious


def mask_by(calibration: Calibration, keys: Tensor) -> Tensor:
    """Return the mask (P,) that these keys make in one round."""
    return calibration.masked(lambda alive, keep: keys, rounds=1).cpu()
