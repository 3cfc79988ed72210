"""Loops of rounds that are run to a round, and what a file gives back of a state."""

import io

import torch


def run(loop, rounds):
    """Advance a loop to a round; return the records of it, whose seconds are 0."""
    records = []
    while loop.round < rounds:
        if (record := loop.advance()) is not None:
            records.append(record | {"seconds": 0})
    return records


def end(loop, rounds):
    """Advance a loop to a round; return a copy of theta there."""
    run(loop, rounds)
    return loop.theta.clone()


def reloaded(state):
    """Return a state after a save and a load."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
