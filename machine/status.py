"""One live line on a terminal, and durations as people read them.

Nothing is written where nobody watches: into a file, or by any process of a group but its first.

    from status import Status, duration
    status = Status("images", total=500)
    status.show(20); status.close()  # images 20/500, the rate, the time left
    duration(3725)  # 1:02:05
"""

from __future__ import annotations

import os
import sys
import time


class Status:
    """One live line on a terminal, nothing elsewhere: what is done, the rate, the time left."""

    def __init__(self, what: str, total: int, done: float = 0):
        self.what, self.total, self.start_at = what, total, done
        first = int(os.environ.get("RANK", 0)) == 0
        self.live, self.started = first and sys.stderr.isatty(), time.monotonic()

    def show(self, done: float, note: str = "") -> None:
        """Redraw the line."""
        if self.live:
            seconds = (time.monotonic() - self.started) / ((done - self.start_at) or 1)
            left = seconds * (self.total - done)
            rate = f"{1 / seconds:.1f}/s" if seconds < 1 else f"{seconds:.1f} s each"
            line = f"{self.what} {done}/{self.total}  {rate}  {duration(left)} left  {note}"
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the line."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Write a duration as 42 s, 3:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def print_figures(figures: dict) -> None:
    """Print one figure a line, accuracies in percent."""
    for name, value in figures.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        if name.endswith("_acc"):
            text = f"{100 * value:.2f} %"
        print(f"{name:22} {text}")
