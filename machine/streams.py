"""Standard streams: closed ones and lost readers cost a run nothing, and no text drives a terminal.

A closed stream leaves its number to the next file that is opened, and what libraries print would go
there: it gets /dev/null instead. Where the reader of a pipe has gone (`| head -1`) and SIGTERM is
handled, as while a run goes on, the process stops and saves as if that signal had come; elsewhere
BrokenPipeError comes at once. What is said afterwards is dropped. Names in files and folders may
be anyone's: characters that do not print (ESC, say) are written as escapes.

    import sys; from streams import guard, reader_gone
    guard()
    print("said"); reader_gone()  # False
"""

from __future__ import annotations

import io
import os
import re
import signal
import sys

REDRAW = re.compile(r"(?:\r(?:\x1b\[K)?)?")  # how a status line or a progress bar begins


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


class Printable(io.TextIOWrapper):
    """A stream's text, of which what does not print is escaped but for line ends and tabs."""

    def write(self, text: str) -> int:
        """Write the text; a carriage return, alone or with an erased line, may begin it."""
        start = REDRAW.match(text).end()
        escaped = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text[start:])
        super().write(text[:start] + "".join(escaped))
        return len(text)


def guard() -> None:
    """Open closed streams on /dev/null; make stdout and stderr survive readers, and escape."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a letter
            if stream is getattr(sys, f"__{name}__"):
                setattr(sys, name, _guarded(stream))


def _guarded(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    at_once, buffer = stream.buffer is _file(stream), stream.buffer  # at once: python -u
    if type(_file(stream)) is io.FileIO:  # a console of Windows is none
        file = Pipe(stream.fileno(), "w", closefd=False)
        buffer = file if at_once else io.BufferedWriter(file)
    return Printable(
        buffer,
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
