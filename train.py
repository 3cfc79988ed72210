"""Federated learning of pre-trained vision transformers, from one command line.

    python train.py fedavg --nc 1 --J 4 --rounds 2000   the main job; the same command resumes it
    python train.py fedavg --data synthetic             a small one, with nothing to download

Every option has a default; COMMAND --help shows it. Runs go into runs/.
"""

from __future__ import annotations

import contextlib
import os
import signal

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with contextlib.suppress(ValueError):  # in a thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while PyTorch is imported: no traceback

import sys
from collections.abc import Callable

import torch

import fedavg
from commands import (
    calibrate,
    centralized,
    doctor,
    inspect,
    merge,
    report,
    ridge,
    shards,
    spread,
    sweep,
    tables,
)
from commands import fedavg as federated_command
from commands.options import Command, Line, parse
from machine import ranks, streams
from machine.drive import Interrupted
from machine.ranks import LostProcess, ToldByFirst

COMMANDS = {
    "fedavg": Command(federated_command.run, federated_command.OPTIONS, spread.processes),
    "centralized": Command(centralized.run, centralized.OPTIONS),
    "ridge": Command(ridge.run, ridge.OPTIONS),
    "calibrate": Command(calibrate.run, calibrate.OPTIONS),
    "doctor": Command(doctor.run, doctor.OPTIONS),
    "shards": Command(shards.run, shards.OPTIONS),
    "sweep": Command(sweep.run, sweep.OPTIONS),
    "report": Command(report.run, report.OPTIONS),
    "eval": Command(inspect.run_eval, inspect.EVAL),
    "merge": Command(merge.run, merge.OPTIONS),
    "export": Command(inspect.run_export, inspect.EXPORT),
    "runs": Command(tables.run_list, tables.LIST),
    "table": Command(tables.run_table, tables.TABLE),
    "plot": Command(tables.run_plot, tables.PLOT),
}
OUT_OF_MEMORY = (
    "no memory is left, on the device or on the host: try a lower --eval-batch, --micro-batch, "
    "--batch-size or --fraction"
)
CLOSED_PIPE = 128 + 13  # SIGPIPE
TOLD_ONCE = (ToldByFirst, fedavg.ClientError)  # errors that all processes of a group share


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns 0, 2 for bad input, 1 when a process of its group was lost, or
    128 + signal when interrupted, 141 where nobody reads what it says any more. Of several
    processes the first speaks for those that fail alike.
    """
    streams.guard()
    return status_of(lambda: run(arguments))


def run(arguments: list[str] | None) -> None:
    """Carry out a command line, in as many processes as it is worth."""
    line = parsed(arguments)
    with ranks.forked(
        COMMANDS[line.command].processes(line), lambda: status_of(lambda: take_part(line))
    ):
        carry_out(line)


def parsed(arguments: list[str] | None) -> Line:
    """Return the command line; the processes that torchrun started all refuse the same one."""
    try:
        return parse(arguments, COMMANDS, __doc__)
    except (ValueError, OSError) as error:
        raise error if ranks.is_first() else ToldByFirst(str(error)) from None


def carry_out(line: Line) -> None:
    """Run a command; what it says is dropped in all processes of a group but the first."""
    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as silence:
        if not ranks.is_first():
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        COMMANDS[line.command].run(line)


def take_part(line: Line) -> None:
    """Run a command in a forked process; that others are gone is for the first to say."""
    with contextlib.suppress(LostProcess):
        carry_out(line)


def status_of(work: Callable[[], None]) -> int:
    """Do some work; returns the exit status, after one line on stderr where it fails."""
    first = ranks.is_first()
    try:
        work()
        sys.stdout.flush()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if streams.reader_gone():
            return CLOSED_PIPE
        if out_of_memory(error):
            error = OUT_OF_MEMORY
        elif isinstance(error, RuntimeError):
            raise
        if first or not isinstance(error, TOLD_ONCE):
            who = "" if first else f" of process {os.environ['RANK']}"
            print(f"train.py: error{who}: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except LostProcess as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        return CLOSED_PIPE if streams.reader_gone() else stop.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def out_of_memory(error: Exception) -> bool:
    """Tell whether an error says that the device or the host has no memory left."""
    typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return typed or "can't allocate memory" in str(error)  # torch's own on a CPU


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
