"""A step on static inputs, captured once as a CUDA graph and replayed.

A fast GPU runs a training step's kernels sooner than a CPU launches them one by one; a graph
launches all at once. It knows addresses, not values. So inputs are copied into static tensors,
numbers (a learning rate, a loss scale) into static fp32 scalars, and whatever else the step reads
or writes must be changed in place alone. A replay then launches the kernels of the eager step on
the same values, hence to the same bits. As libraries may choose otherwise under capture, the first
replay is compared with an eager step, bit by bit, and where the two differ the step stays eager.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

    import torch; from cuda_graph import GraphedStep
    device = "cuda" if torch.cuda.is_available() else "cpu"
    w = torch.zeros(3, device=device)
    def step(target, lr):
        w.add_(lr * (target - w)); return (target - w).norm()
    graphed = GraphedStep(step, state=[w], device=device)
    for lr in (0.5, 0.25): graphed(target=torch.ones(3), lr=lr)  # on a CPU: says why it is eager
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UPS = 2  # steps on the capturing stream: libraries make their handles and workspaces there
ROOM = 1.5  # free memory that a capture asks for, over what it will keep: others want some too


class CaptureError(ValueError):
    """A step cannot be replayed; the message says why."""


class GraphedStep:
    """Call `step` on static inputs; from the first call on by replay, where that gives its bits.

    `status` is "on", "off" or "off (why)", once the first call is made.

    Args:
        step: (**inputs) -> tensor without an autograd graph; it must not wait for the GPU (.item(),
            .cpu()), allocate state, or draw random numbers. Numbers reach it in fp32.
        state: the tensors that it changes in place; what a capture does to them is taken back.
        mode: "auto": eager where a capture fails, which `say` is told once; "on": a failure is
            raised; "off": eager.
        obstacle: why a capture cannot work, where that is known beforehand.

    Raises:
        CaptureError: in mode "on", from the first call.
        ValueError: an unknown mode, or an input of another shape or dtype than the captured one.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        state: Sequence[Tensor],
        device: torch.device | str,
        *,
        mode: str = "auto",
        obstacle: str | None = None,
        say: Callable[[str], object] = print,
    ):
        if mode not in ("auto", "on", "off"):
            raise ValueError(f"mode must be auto, on or off, not {mode!r}")
        self.step, self.state, self.device = step, list(state), torch.device(device)
        self.mode, self.obstacle, self.say = mode, obstacle, say
        self.inputs: dict[str, Tensor] = {}
        self.graph, self.output = None, None
        self.status = "off" if mode == "off" else None

    def __call__(self, **values: Tensor | float) -> Tensor:
        """Take one step on these inputs; a replay wants the shapes and dtypes of the first call."""
        for name, value in values.items():
            self._fill(name, value)
        if self.status is None:
            self._try_capture()
        if self.graph is None:
            return self.step(**self.inputs)
        self.graph.replay()
        return self.output.clone()  # the next replay writes over it

    def _fill(self, name: str, value: Tensor | float) -> None:
        shape = tuple(getattr(value, "shape", ()))
        dtype = value.dtype if torch.is_tensor(value) else torch.float32
        static = self.inputs.get(name)
        like = static is not None and (static.shape, static.dtype) == (shape, dtype)
        if like:  # copy_ alone would broadcast and cast
            static.copy_(value, non_blocking=True) if torch.is_tensor(value) else static.fill_(
                value
            )
        elif self.graph is not None:
            captured = None if static is None else f"{tuple(static.shape)} {static.dtype}"
            raise ValueError(f"input {name} was captured as {captured}, and is {shape} {dtype} now")
        else:
            fresh = torch.as_tensor(value, dtype=dtype).detach()
            self.inputs[name] = fresh.to(self.device, copy=True)

    def _try_capture(self) -> None:
        try:
            self.graph, self.output = self._checked_capture()
            self.status = "on"
        except CaptureError as error:
            if self.mode == "on":
                raise CaptureError(f"CUDA graph 'on': {error}; 'auto' goes on without") from None
            self.status = f"off ({error})"
            self.say(f"no CUDA graph, kernels are launched one by one: {error}")

    def _checked_capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Capture, and compare one replay with one eager step from the same state."""
        if self.obstacle:
            raise CaptureError(self.obstacle)
        gc.collect()  # earlier graphs, where cycles still hold them and their memory
        start = [x.clone() for x in self.state]

        def run() -> Tensor:
            return self.step(**self.inputs)

        def take_back() -> None:
            for x, before in zip(self.state, start, strict=True):
                x.copy_(before)

        try:
            expected = [x.clone() for x in (run(), *self.state)]
            graph, output = record(run, self.device)
            take_back()
            graph.replay()
            same = all(map(same_bits, (output, *self.state), expected))
        except CaptureError:
            raise
        except Exception as error:  # out of memory, a synchronising call, what a library raises
            said = str(error).partition("\n")[0]
            raise CaptureError(f"{type(error).__name__}: {said}") from error
        finally:
            take_back()
        if not same:
            raise CaptureError("a replay differs from the eager step")
        return graph, output


def record(run: Callable[[], Tensor], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Warm up and capture run() on one side stream; returns the graph and its static output.

    No autograd graph may outlive a call of `run`: its leaves would wait for the stream they were
    made on. What the graph works in stays its own, so a capture is refused where little would be
    left.

    Raises:
        CaptureError: no CUDA device, or too little memory.
    """
    if device.type != "cuda":
        raise CaptureError(f"it needs a CUDA device, and the step runs on a {device.type}")
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                run()
        torch.cuda.current_stream().wait_stream(stream)
        needed = torch.cuda.max_memory_allocated() - before
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if (free := torch.cuda.mem_get_info()[0]) < ROOM * needed:
            raise CaptureError(
                f"it would keep {needed / 1e9:.1f} GB to itself, and {free / 1e9:.1f} GB are free"
            )
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = run()
    return graph, output


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare two tensors byte by byte, so that a NaN equals itself."""
    return torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
