"""Standard streams that are closed, or whose reader goes, cost a run nothing.

A closed stream leaves its number to the next file that is opened, and what libraries print would go
there: it gets /dev/null instead. Where the reader of a pipe has gone (`| head -1`) and SIGTERM is
handled, as while a run goes on, the process stops and saves as if that signal had come; elsewhere
BrokenPipeError comes at once. What is said afterwards is dropped.

    import sys; from streams import guard, reader_gone
    guard()
    print("said"); reader_gone()  # False
"""

from __future__ import annotations

import io
import os
import signal
import sys


class Pipe(io.FileIO):
    """A stream's file, which outlives its reader."""

    gone = False

    def write(self, content) -> int | None:
        """Write, or drop what nobody reads."""
        try:
            return len(content) if self.gone else super().write(content)
        except BrokenPipeError:
            self.gone = True
            if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.SIG_IGN, None):
                raise
            signal.raise_signal(signal.SIGTERM)
            return len(content)


def guard() -> None:
    """Open closed streams on /dev/null, and make stdout and stderr survive their readers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter
            if stream is getattr(sys, f"__{name}__") and type(_file(stream)) is io.FileIO:
                setattr(sys, name, _guarded(stream))


def _guarded(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    file = Pipe(stream.fileno(), "w", closefd=False)
    at_once = stream.buffer is _file(stream)  # python -u
    return io.TextIOWrapper(
        file if at_once else io.BufferedWriter(file),
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=at_once,
    )


def _file(stream: object) -> object:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)


def reader_gone() -> bool:
    """Tell whether stdout or stderr has lost its reader."""
    return any(getattr(_file(stream), "gone", False) for stream in (sys.stdout, sys.stderr))
