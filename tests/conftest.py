"""What all tests share: Triton's interpreter where there is no GPU, and where the real data is."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before a file with kernels is imported

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("CIFAR_DIR", ROOT / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with cifar-100-python and vit_tiny_patch16_224.pth; the test skips without it."""
    for name in ("cifar-100-python", "vit_tiny_patch16_224.pth"):
        if not (REAL_DATA / name).exists():
            pytest.skip(f"real data: no {name} in {REAL_DATA} (CIFAR_DIR names another folder)")
    return REAL_DATA
