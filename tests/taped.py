"""A CUDA graph played on a CPU: a step's operations recorded once, repeated on the same memory.

What Python computes stays as it was at the recording, and what no capture allows is an error here
too: a value that is asked for, a result whose size hangs on one, a tensor made of Python's numbers.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.lift_fresh.default,  # torch.tensor(): on a GPU a copy from memory that is not pinned
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
}


class Tape(TorchDispatchMode):
    """Records the operations of its block; `replay` takes torch.cuda.CUDAGraph's place."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        chosen = arguments[1] if operation is aten.index.Tensor else ()  # x[mask] has that size
        if operation in WAITS or any(i is not None and i.dtype == torch.bool for i in chosen):
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation}")
        result = operation(*arguments, **named)
        self.calls.append((operation, arguments, named, result))
        return result

    def replay(self) -> None:
        """Repeat the operations, each into the memory that it wrote to."""
        with torch.no_grad():
            for operation, arguments, named, result in self.calls:
                again = operation(*arguments, **named)
                for new, old in zip(tree_leaves(again), tree_leaves(result), strict=True):
                    if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                        old.copy_(new)


def record(run, device):
    """What machine.cuda_graph.record returns on a GPU."""
    run()
    with Tape() as tape:
        output = run()
    return tape, output
