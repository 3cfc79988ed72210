"""Where tensors live and how they are computed there: the device of a command, its precision and
loss scale, its free memory, steps that are compiled where PyTorch can.

The loss scale keeps fp16 gradients in range: a loss times `scale` has a gradient that the optimiser
divides by it again. It has no hidden state, and is fixed within a round.
Source: Micikevicius 2018, arXiv:1710.03740, with the retry of a client in place of a skipped step.

    from device import LossScale, choose_device, choose_precision
    device = choose_device("auto")  # the GPU, where there is one
    choose_precision("auto", device)  # bf16, fp16 or, on a CPU, fp32
    scale = LossScale(1024.0)
    result, used = scale.attempt(train=lambda s: s * 100.0, overflowed=lambda: False)
    scale.next_round()
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor


class Machine(NamedTuple):
    """What a command runs on."""

    device: Annotated[str, "cpu, cuda, cuda:N or mps [auto: cuda where there is one]"] = "auto"
    threads: Annotated[int | None, "CPU threads [PyTorch's choice]", "1 <= x <= 1024"] = None
    precision: Annotated[
        str,
        "arithmetic of the passes [auto: bf16 from compute capability 8.0, fp16 below, fp32 on a "
        "CPU or mps]",
        ("auto", "fp32", "bf16", "fp16"),
    ] = "auto"
    eval_batch: Annotated[
        int | None,
        "images per forward pass [256; on a CPU fewer where images or model are large]",
        ">= 1",
    ] = None


class Graph(NamedTuple):
    """How a GPU launches kernels."""

    cuda_graph: Annotated[
        str,
        "launch the kernels of a step, or of a batch that is scored, all at once, to the same bits "
        "[auto: on a GPU, where a first one shows that it works]",
        ("auto", "on", "off"),
    ] = "auto"


def choose_device(name: str, local_rank: int = 0, processes: int = 1) -> torch.device:
    """Return the device of --device; "auto" is a CUDA device, one a process, where there is one."""
    choice = name
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {choice}: choose auto, cpu, cuda, cuda:N or mps")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"--device {choice}: PyTorch sees no Apple GPU here; --device cpu runs anywhere"
        )
    if device.type == "mps" and processes > 1:
        raise ValueError(f"--device {choice}: one process alone has it; --device cpu shares work")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {choice}: PyTorch sees no CUDA device here; --device cpu runs anywhere"
        )
    if device.type == "cuda" and device.index >= (count := torch.cuda.device_count()):
        raise ValueError(f"--device {choice}: {device} is wanted, and {count} are here")
    if processes > 1 and choice.startswith("cuda:"):
        raise ValueError(f"--device {choice}: {processes} processes need a device each: cuda")
    return device


def processor(device: torch.device) -> str:
    """Return what a run is computed by: the GPU's name, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def exact_place(device: torch.device) -> torch.device:
    """Return where sums in float64 and int64 of what a device computes live: on the device, or, as
    Apple's GPUs know no float64, on the CPU.
    """
    return torch.device("cpu") if device.type == "mps" else device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype; "auto" is bf16 from capability 8.0, fp16 below, else fp32."""
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


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Turn TF32 off, whose rounding would decide between entries of nearly the same score."""
    products, setting, off = torch.backends.cuda.matmul, "allow_tf32", False
    try:
        before = products.allow_tf32
    except RuntimeError:  # it was set by the newer of PyTorch's two ways
        setting, off = "fp32_precision", "ieee"
        before = products.fp32_precision
    whole = getattr(products, "fp32_precision", None)  # "none": as PyTorch's own, whatever that is
    setattr(products, setting, off)
    try:
        yield
    finally:
        setattr(products, setting, before)
        if whole is not None:
            products.fp32_precision = whole


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


class LossScale:
    """The loss scale of half-precision training: fixed within a round, adapted between rounds.

    A client that overflows is trained again at half the scale, whatever the others did, so neither
    order nor process matters. `state` (3,) float64: the scale, the lowest that this round needed,
    and the rounds since the last change.
    """

    bytes = 0

    def __init__(self, start: float = 2.0**14, patience: int = 200):
        self.patience, self.active = patience, start > 1.0  # active: are losses scaled at all?
        self.state = torch.tensor([start, start, 0.0], dtype=torch.float64)

    def merge(self, group: Any) -> None:
        """Let every process of a group know the lowest scale that one of them needed."""
        if self.active:
            self.state[1] = min(group.gather(self.state[1].item()))

    def attempt(
        self, train: Callable[[float], Tensor], overflowed: Callable[[], bool]
    ) -> tuple[Tensor, float]:
        """Return train(scale) and scale: the round's, halved until nothing overflows or it is 1."""
        scale = self.state[0].item()
        while True:
            result = train(scale)
            failed = self.active and overflowed()
            if not failed:  # what fails at any scale says nothing about the scale
                self.state[1] = min(self.state[1].item(), scale)
            if not failed or scale <= 1.0:
                return result, scale
            scale /= 2

    def next_round(self) -> None:
        """Adapt the scale: down to what the round needed, doubled after `patience` quiet rounds."""
        if not self.active:
            return
        scale, lowest, quiet = self.state.tolist()
        quiet = 0.0 if lowest < scale else quiet + 1
        if quiet >= self.patience:
            lowest, quiet = min(scale * 2, 2.0**24), 0.0
        self.state[:] = torch.tensor([lowest, lowest, quiet])

    def state_dict(self) -> dict[str, Tensor]:
        """Return all there is to save."""
        return {"state": self.state.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`'s answer."""
        self.state.copy_(state["state"])
        self.active = self.active or self.state[0].item() > 1.0
