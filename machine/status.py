"""One live line on a terminal, and durations as people read them.

Into a file or a pipe goes nothing, or a line every tenth of what takes long. Of a group's processes
the first alone speaks.

    from status import Status, duration
    status = Status("images", total=500)
    status.show(20); status.close()  # images 20/500, the rate, the time left
    duration(3725)  # 1 h 2 min
"""

from __future__ import annotations

import os
import sys
import time

PATIENCE = 2.0  # seconds that are waited through without a line every tenth


class Status:
    """One live line on a terminal: what is done, the rate, the time left.

    Args:
        done: where it starts; the rate counts what is done from there on.
        tenths: elsewhere a line every tenth, of what takes more than seconds.
    """

    def __init__(self, what: str, total: int, done: float = 0, tenths: bool = False):
        self.what, self.total, self.start_at = what, total, done
        first = int(os.environ.get("RANK", 0)) == 0
        self.live, self.started = first and sys.stderr.isatty(), time.monotonic()
        self.tenths, self.tenth = first and tenths and not self.live, 0

    def show(self, done: float, note: str = "") -> None:
        """Redraw the line, or write one where a further tenth is done."""
        if self.live:
            print(f"\r\x1b[K{self.line(done, note)}", end="", file=sys.stderr, flush=True)
        tenth = int(10 * done / max(1, self.total))
        if self.tenths and tenth > self.tenth and time.monotonic() - self.started > PATIENCE:
            self.tenth = tenth
            print(self.line(done, note), file=sys.stderr, flush=True)

    def line(self, done: float, note: str = "") -> str:
        """Say what is done, at what rate, and the time left; at the start there is no rate."""
        line, done_here = f"{self.what} {done}/{self.total}", done - self.start_at
        if done_here > 0:
            seconds = (time.monotonic() - self.started) / done_here
            rate = f"{1 / seconds:.1f}/s" if 0 < seconds < 1 else f"{seconds:.1f} s each"
            line += f"  {rate}  {duration(seconds * (self.total - done))} left"
        return f"{line}  {note}".rstrip()

    def close(self) -> None:
        """Clear the line."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Write a duration as 42 s, 3 min 5 s, 1 h 2 min or 3 days 4 h."""
    rest, parts = round(seconds), []
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if parts or count or unit == "s":
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def print_figures(figures: dict) -> None:
    """Print one figure a line, accuracies in percent."""
    for name, value in figures.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        if name.endswith("_acc"):
            text = f"{100 * value:.2f} %"
        print(f"{name:22} {text}")
