"""Where tensors live and how they are computed there: the device of a command, its precision, its
free memory, and steps that are compiled where PyTorch can.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ranks import OneProcess


def choose_device(name: str, group: OneProcess) -> torch.device:
    """Return the device of --device; "auto" is a CUDA device, one a process, where there is one."""
    given = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{group.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {given}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {given}: PyTorch sees no CUDA device here; --device cpu runs anywhere"
        )
    if device.type == "cuda" and device.index >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {given}: {device} is wanted, and {count} are here")
    if group.size > 1 and given.startswith("cuda:"):
        raise ValueError(f"--device {given}: {group.size} processes need a device each: cuda")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype; "auto" is bf16 from capability 8.0, fp16 below, fp32 on a CPU."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if recent else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def free_memory(device: torch.device) -> int:
    """Return how many bytes are free on a device; on a host that does not say, none."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:  # in kB; counts what the page cache would give back
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):  # macOS and Windows
        return 0


def compiled(function: Callable) -> Callable:
    """Return a function that is compiled at its first call, or, saying why not, stays as it is.

    Its backward pass is compiled when it first runs; an error of that is raised.
    """
    steady = (
        "deterministic" in torch._inductor.list_options()
    )  # choices are not timed, from 2.10 on
    fast = torch.compile(function, dynamic=False, options={"deterministic": True} if steady else {})
    chosen = []

    def call(*arguments):
        if chosen:
            return chosen[0](*arguments)
        try:
            result = fast(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # the step itself may raise others
            said = " ".join(str(error).strip().partition("\n\n")[0].split())
            print(f"--compile: PyTorch cannot, steps stay as they are: {said}")
            chosen.append(function)
            return function(*arguments)
        chosen.append(fast)
        return result

    return call
