"""A replayed step: the bits of the eager one, or the eager one itself and a word on why."""

import gc
import math
import weakref

import pytest
import taped
import torch
from conftest import needs_cuda

from machine import cuda_graph
from machine.cuda_graph import CaptureError, GraphedStep


class Descent:
    """Steps of gradient descent on a small network whose gradients are views of one vector."""

    def __init__(self, device="cpu"):
        generator = torch.Generator().manual_seed(0)
        self.theta = torch.randn(20, generator=generator).to(device)
        self.grad = torch.zeros(20, device=device)
        self.weight = torch.nn.Parameter(self.theta.view(4, 5))
        self.weight.data, self.weight.grad = self.theta.view(4, 5), self.grad.view(4, 5)
        self.calls = 0

    def step(self, x, lr):
        self.calls += 1
        self.grad.zero_()
        loss = (x @ self.weight).tanh().square().mean()
        loss.backward()
        self.theta.sub_(self.grad * lr)
        return loss.detach()


def run(take_step, steps=4):
    """Take steps on inputs and at rates that change; returns the losses."""
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(3, 4, generator=generator) for _ in range(steps)]
    return torch.stack([take_step(x=x, lr=0.5 / (1 + j)) for j, x in enumerate(inputs)]).cpu()


def unfaithful(run, device):
    tape, output = taped.record(run, device)
    replay = tape.replay
    tape.replay = lambda: (replay(), output.add_(1e-6))
    return tape, output


def failing(run, device):
    run()
    raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")


def without_memory(run, device):
    run()
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def expected(device="cpu"):
    plain = Descent(device)
    losses = run(lambda x, lr: plain.step(x.to(device), torch.tensor(lr, device=device)))
    return losses, plain.theta


def test_replays_read_new_inputs_and_the_capture_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(cuda_graph, "record", taped.record)
    descent, said = Descent(), []
    graphed = GraphedStep(descent.step, [descent.theta, descent.grad], "cpu", say=said.append)
    losses, theta = expected()
    assert torch.equal(run(graphed), losses) and torch.equal(descent.theta, theta)
    assert graphed.status == "on" and not said


FAILURES = {
    failing: "RuntimeError: operation not permitted when stream is capturing",
    without_memory: "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
    unfaithful: "a replay differs from the eager step",
    cuda_graph.record: "it needs a CUDA device, and the step runs on a cpu",
}


@pytest.mark.parametrize("record", FAILURES, ids=lambda f: f.__name__)
def test_where_a_capture_fails_the_step_is_eager_and_says_so_once(monkeypatch, record):
    monkeypatch.setattr(cuda_graph, "record", record)
    descent, said = Descent(), []
    graphed = GraphedStep(descent.step, [descent.theta, descent.grad], "cpu", say=said.append)
    losses, theta = expected()
    assert torch.equal(run(graphed), losses) and torch.equal(descent.theta, theta)
    why = FAILURES[record]
    assert said == [f"no CUDA graph, kernels are launched one by one: {why}"]
    assert graphed.status == f"off ({why})"


@pytest.mark.parametrize("record", FAILURES, ids=lambda f: f.__name__)
def test_a_graph_that_is_insisted_on_is_an_error_instead(monkeypatch, record):
    monkeypatch.setattr(cuda_graph, "record", record)
    descent = Descent()
    graphed = GraphedStep(descent.step, [descent.theta], "cpu", mode="on")
    start = descent.theta.clone()
    with pytest.raises(CaptureError, match="CUDA graph 'on': " + FAILURES[record][:20]):
        run(graphed)
    assert torch.equal(descent.theta, start)


def test_an_obstacle_known_beforehand_is_not_tried(monkeypatch):
    monkeypatch.setattr(cuda_graph, "record", None)
    descent, said = Descent(), []
    graphed = GraphedStep(descent.step, [], "cpu", obstacle="no room", say=said.append)
    run(graphed)
    assert len(said) == 1 and graphed.status == "off (no room)" and descent.calls == 4
    quiet = GraphedStep(descent.step, [], "cpu", mode="off", obstacle="no room", say=said.append)
    run(quiet)
    assert len(said) == 1 and quiet.status == "off" and descent.calls == 8


def test_earlier_steps_have_given_their_memory_back(monkeypatch):
    monkeypatch.setattr(cuda_graph, "record", taped.record)
    earlier = GraphedStep(Descent().step, [], "cpu")
    earlier.step, gone = lambda x, earlier=earlier: None, weakref.ref(earlier)  # a cycle
    del earlier

    def step(x):
        assert gone() is None
        return x.sum()

    gc.disable()
    try:
        assert GraphedStep(step, [], "cpu", mode="on")(x=torch.ones(3)) == 3
    finally:
        gc.enable()


def test_a_diverged_step_is_no_difference(monkeypatch):
    monkeypatch.setattr(cuda_graph, "record", taped.record)
    x = torch.tensor([math.inf, 1.0])

    def step(by):
        return x.sub_(by * x).sum()  # Inf - Inf

    graphed = GraphedStep(step, [x], "cpu")
    assert graphed(by=0.5).isnan() and graphed.status == "on" and x[1] == 0.5


def test_what_cannot_be_meant_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="mode must be auto, on or off, not 'yes'"):
        GraphedStep(lambda: None, [], "cpu", mode="yes")
    monkeypatch.setattr(cuda_graph, "record", taped.record)
    eager, graphed = (GraphedStep(torch.sum, [], "cpu", mode=mode) for mode in ("off", "on"))
    for step in (eager, graphed):
        assert step(input=torch.ones(3, 4)) == 12
    assert eager(input=torch.ones(1, 4)) == 4
    assert eager(input=torch.ones(1, 4, dtype=torch.int64)).dtype == torch.int64
    with pytest.raises(ValueError, match=r"captured as \(3, 4\) torch.float32, and is \(1, 4\)"):
        graphed(input=torch.ones(1, 4))  # copying would broadcast
    with pytest.raises(ValueError, match=r"and is \(3, 4\) torch.int64 now"):
        graphed(input=torch.ones(3, 4, dtype=torch.int64))  # and cast


def test_a_number_that_python_counts_on_is_seen_to_stand_still(monkeypatch):
    monkeypatch.setattr(cuda_graph, "record", taped.record)
    seen, said = [], []

    def step(x):
        seen.append(x)
        return x.sum() * len(seen)

    GraphedStep(step, [], "cpu", say=said.append)(x=torch.ones(3))
    assert said == [
        "no CUDA graph, kernels are launched one by one: a replay differs from the eager step"
    ]


HOST = {
    "asks": lambda x: x * x.sum().item(),
    "chooses": lambda x: x[x > 0].sum(),
    "branches": lambda x: x if x.sum() > 0 else -x,
    "makes": lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("step", HOST.values(), ids=HOST)
def test_a_step_that_waits_for_the_host_is_not_recorded(monkeypatch, step):
    monkeypatch.setattr(cuda_graph, "record", taped.record)
    graphed = GraphedStep(step, [], "cpu", mode="on")
    with pytest.raises(CaptureError, match="operation not permitted when stream is capturing"):
        graphed(x=torch.ones(3))


@needs_cuda
def test_on_a_gpu_a_replay_gives_the_bits_of_the_eager_step():
    descent = Descent("cuda")
    graphed = GraphedStep(descent.step, [descent.theta, descent.grad], "cuda", mode="on")
    losses, theta = expected("cuda")
    assert torch.equal(run(graphed), losses) and torch.equal(descent.theta, theta)
    # one eager step, the warm-ups and the capture itself: no replay runs Python
    assert graphed.status == "on" and descent.calls == 2 + cuda_graph.WARM_UPS


@needs_cuda
def test_on_a_gpu_a_step_that_waits_is_not_captured_and_later_ones_are():
    descent, said = Descent("cuda"), []

    def waiting(x, lr):
        loss = descent.step(x, lr)
        loss.item()
        return loss

    graphed = GraphedStep(waiting, [descent.theta, descent.grad], "cuda", say=said.append)
    losses, theta = expected("cuda")
    assert torch.equal(run(graphed), losses) and torch.equal(descent.theta, theta)
    assert len(said) == 1
    again = Descent("cuda")
    graphed = GraphedStep(again.step, [again.theta, again.grad], "cuda", mode="on")
    assert torch.equal(run(graphed), losses)


@needs_cuda
def test_on_a_gpu_little_memory_is_not_taken(monkeypatch):
    monkeypatch.setattr(cuda_graph, "ROOM", 1e12)
    descent = Descent("cuda")
    graphed = GraphedStep(descent.step, [descent.theta], "cuda", say=lambda text: None)
    run(graphed)
    assert "to itself, and" in graphed.status
