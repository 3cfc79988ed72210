"""Where tests of Triton's kernels run, and builds of kernels for cards that are not here."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
HAS_TRITON = INSTALLED and (DEVICE == "cuda" or INTERPRETED)
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="no Triton, or neither a GPU nor TRITON_INTERPRET=1"
)
CARDS = ((75, "*fp16"), (80, "*bf16"), (90, "*bf16"))  # Turing, Ampere, Hopper: their half types


def build(kernel, capability, types, constants, **options):
    """Build a kernel for a card; return what Triton makes of it. Other arguments are constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert f".target sm_{capability}" in built.asm["ptx"], built.asm["ptx"][:400]
    print("built", capability, kernel.__name__)
    return built


def built_elsewhere(script, cache):
    """Run a script of builds in a process without the interpreter; return how many it made."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.count("built")
