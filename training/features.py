"""The file that features are kept in, for other runs."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

import safe_files


def load(path: Path, key: str) -> Tensor | None:
    """Return the features (N, D), if they are there and whole.

    Args:
        key: what names these features among all others.
    """
    if not path.exists():
        return None
    try:
        return safe_files.load_checked(path, key)
    except safe_files.DamagedFile as error:
        print(f"warning: {error}; computed again", file=sys.stderr)
        return None


def save(path: Path, key: str, features: Tensor) -> None:
    """Keep the features (N, D), or warn where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safe_files.forget_asides(path.parent, safe_files.DAY)
        safe_files.save_checked(path, features.cpu(), key)
    except OSError as error:
        print(f"warning: the features are not kept: {error}", file=sys.stderr)
