"""Processes that share work, forked from this one or started by torchrun, as one group: sums of
tensors, plain values by rank.

    torchrun --nproc-per-node=2 train.py fedavg ...     also over several nodes

Tensors on CUDA devices are summed by NCCL, others and all plain values by Gloo. A forked process
has all that is imported already: it starts in milliseconds, and it ends with the first one.

    from ranks import forked, launched_group
    def work():
        with launched_group() as group:  # of one, where nothing has started others
            print(group.gather(group.rank))
    with forked(2, work): work()  # [0, 1], twice
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = datetime.timedelta(days=1)  # a lost process is noticed at once: its connection closes
PARTING = 2.0  # seconds that the others have to say why they end
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
MEETING = "RANKS_MEETING"  # names the file through which forked processes find one another
CAN_FORK = sys.platform == "linux"  # elsewhere libraries do not survive it, or there is none

LEAST_IMAGES = 5_000  # that a process trains on: seconds of training for those of a start
LEAST_FITTED = 50_000  # the same where one process alone fits a head first
LONGEST_ROUND = 3e12  # operations of a process, about a minute: several stop between rounds alone
LEAST_BUSY = 0.75  # of the cores: two processes take 0.6 to 0.85 of the time of two threads
MEMORY = 2e9  # bytes free for each


class Processes(NamedTuple):
    """Processes."""

    processes: Annotated[
        int | str,
        "processes of --threads 1 that share a round's clients on a CPU, to the bits of one such "
        "[auto: one a core where the whole backbone trains, each sees 5,000 images or more (50,000 "
        "where a head is fitted first), a round takes up to about a minute, and 2 GB are free for "
        "each; one under --threads]",
        "1 <= x <= 1024 or auto",
        "N",
    ] = "auto"


def processes_that_pay(
    rounds: int,
    clients: int,
    images: int,
    operations: float,
    cores: int,
    memory: float,
    fitted: bool,
) -> int:
    """Return how many processes of one thread a run is worth; 1: one, with a thread a core.

    Args:
        clients: of a round.
        images: that a client trains on in a round.
        operations: floating-point ones, of a training pass of an image.
        memory: bytes that are free.
        fitted: is a head fitted first, by one thread of one process?
    """
    turns = -(-clients // cores)
    size = -(-clients // turns)  # no more than are busy in all turns
    pays = (
        clients > LEAST_BUSY * turns * cores
        and rounds * turns * images >= (LEAST_FITTED if fitted else LEAST_IMAGES)
        and turns * images * operations <= LONGEST_ROUND
        and size * MEMORY <= memory
    )
    return size if pays else 1


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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave a block, which may gather, when all processes have; rank 0 says why it failed.

        Raises:
            ToldByFirst: in the others, when a process raised ValueError or OSError.
        """
        problem = None
        try:
            yield
        except (ValueError, OSError) as error:
            problem = error
        said = [text for text in self.gather(problem and str(problem)) if text]
        if said and self.rank == 0:
            raise problem or ValueError(said[0])
        if said:
            raise ToldByFirst(said[0])


class Group(OneProcess):
    """The processes of the environment's group; meets the others on construction."""

    def __init__(self):
        forked = MEETING in os.environ
        nccl = not forked and torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if nccl else "gloo",
            init_method=os.environ.get(MEETING, "env://"),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=PATIENCE,
        )
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
    """Join the processes that were forked, or that torchrun started; else return one alone."""
    return Group() if launched() > 1 else OneProcess()


def launched() -> int:
    """Return how many processes the environment's group has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Tell whether this process is the one that speaks for its group."""
    return int(os.environ.get("RANK", 0)) == 0


# ---------------------------------------------------------------------------- forks


@contextlib.contextmanager
def forked(size: int, work: Callable[[], object]) -> Iterator[None]:
    """Fork size - 1 processes, of one thread each, that do `work` while this one does the block.

    They are a group, which `launched_group` joins, and end with this process, the group's first: at
    the end of the block, and where a signal kills it. Nothing may have run in parallel before.
    """
    if size == 1:
        yield
        return
    context, environment = multiprocessing.get_context("fork"), dict(os.environ)
    meeting, others = tempfile.TemporaryFile(), []  # without a name: nothing of it stays
    shared = {"WORLD_SIZE": f"{size}", MEETING: f"file:///proc/self/fd/{meeting.fileno()}"}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.update(shared, RANK="0", LOCAL_RANK="0", GLOO_SOCKET_IFNAME="lo")
    try:
        for rank in range(1, size):
            process = context.Process(target=_do_as, args=(rank, work, os.getpid()))
            process.start()
            others.append(process)
        yield
    finally:
        end = time.monotonic() + PARTING
        for process in others:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        meeting.close()


def _do_as(rank: int, work: Callable[[], object], parent: int) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process has it too, and says so
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}")
    work()


def end_with_parent(parent: int | None = None) -> None:
    """Let this process be killed when its parent ends, so that a killed one leaves none behind.

    parent: its process id; where it has gone already, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
