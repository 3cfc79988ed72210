"""The files that features are kept in, whole ones and those that are still being computed."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

import safe_files

SAVE_SECONDS = 60.0  # the most work that a kill may cost


class KeptFeatures:
    """The file of some features, and, while they are computed, that of the first of them.

    Args:
        key: what names these features among all others.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        self.begun_path, self.saved = path.with_suffix(".begun"), time.monotonic()

    def load(self) -> Tensor | None:
        """Return all features (N, D), if they are there and whole."""
        return self._load(self.path, self.key)

    def save(self, features: Tensor) -> None:
        """Keep all features (N, D)."""
        self._save(self.path, self.key, features)
        with contextlib.suppress(OSError):
            self.begun_path.unlink(missing_ok=True)

    def load_begun(self, batch: int) -> Tensor | None:
        """Return the features of the first images, if they are there; batch: images at a time."""
        return self._load(self.begun_path, f"{self.key} {batch}")

    def save_begun(self, rows: list[Tensor], batch: int) -> None:
        """Keep the features so far, if the last time is SAVE_SECONDS ago."""
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            self._save(self.begun_path, f"{self.key} {batch}", torch.cat(rows))
            self.saved = time.monotonic()

    def _load(self, path: Path, purpose: str) -> Tensor | None:
        if not path.exists():
            return None
        try:
            return safe_files.load_checked(path, purpose)
        except safe_files.DamagedFile as error:
            print(f"warning: {error}; computed again", file=sys.stderr)
            return None

    def _save(self, path: Path, purpose: str, features: Tensor) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safe_files.forget_asides(path.parent, safe_files.DAY)
            safe_files.save_checked(path, features.cpu(), purpose)
        except OSError as error:
            print(f"warning: the features are not kept: {error}", file=sys.stderr)
