"""The processes that torchrun started, as one group: sums of tensors, plain values by rank.

    torchrun --nproc-per-node=2 train.py fedavg ...     also over several nodes

Tensors on CUDA devices are summed by NCCL, others and all plain values by Gloo.

    from ranks import launched_group
    with launched_group() as group:  # of one, where torchrun started nothing
        group.gather(group.rank)  # [0]
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = datetime.timedelta(days=1)  # a lost process is noticed at once: its connection closes


class LostProcess(Exception):
    """Another process of the group has gone."""


class ToldByFirst(ValueError):
    """The first process failed, and says so."""


class OneProcess:
    """A process that is alone, with the methods of a group."""

    rank, size, local_rank = 0, 1, 0

    def sum_(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place."""

    def gather(self, value: Any) -> list:
        """Return every process's plain value, by rank."""
        return [value]

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(self, *error) -> None:
        """Leave the group."""

    @contextlib.contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Let rank 0 pass through the block first, so that the others find what it wrote.

        Raises:
            ToldByFirst: in the others, when rank 0 raised ValueError or OSError.
        """
        problem = None
        if self.rank == 0:
            try:
                yield
            except (ValueError, OSError) as error:
                problem = error
        said = self.gather(problem and str(problem))[0]
        if problem or said:
            raise problem or ToldByFirst(said)
        if self.rank != 0:
            yield


class Group(OneProcess):
    """The processes of torchrun's environment; meets the others on construction."""

    def __init__(self):
        nccl = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=PATIENCE)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self._plain = dist.new_group(backend="gloo", timeout=PATIENCE)

    def sum_(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place; integers wrap mod 2^64."""
        if tensor.is_cuda:
            self.gather(None)  # a lost process shows here; NCCL would wait for it
        with _explained():
            dist.all_reduce(tensor)

    def gather(self, value: Any) -> list:
        """Return every process's plain value, by rank."""
        values = [None] * self.size
        with _explained():
            dist.all_gather_object(values, value, group=self._plain)
        return values

    def __exit__(self, *error) -> None:
        """Leave the group; an open one would abort the process at its end."""
        dist.destroy_process_group()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostProcess(
            "another process of the job has gone; the same command goes on from the last "
            f"checkpoint ({str(error).splitlines()[0]})"
        ) from None


def launched_group() -> OneProcess:
    """Join the processes that torchrun started; without it return a process that is alone."""
    return Group() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else OneProcess()
