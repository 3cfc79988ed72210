"""Rates: what a call costs a GPU, not what it costs to launch it and to wait for it."""

import pytest
import torch

from machine import rates

LAUNCH, WAIT = 2e-5, 3e-5  # seconds of Python's part


class Gpu:
    """A clock, and a device that works off what is launched, one call after the other."""

    def __init__(self, seconds):
        self.seconds, self.now, self.busy, self.calls = seconds, 0.0, 0.0, 0

    def work(self):
        self.calls += 1
        self.now += LAUNCH
        self.busy = max(self.busy, self.now) + self.seconds

    def synchronise(self, device):
        self.now = max(self.now, self.busy) + WAIT

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("seconds", [1e-4, 0.5])
def test_a_short_call_is_timed_without_its_launch(monkeypatch, seconds):
    gpu = Gpu(seconds)
    monkeypatch.setattr(rates, "synchronise", gpu.synchronise)
    monkeypatch.setattr(rates, "time", gpu)
    taken = rates.seconds_of(gpu.work, torch.device("cuda"))
    assert seconds < taken < 1.01 * seconds
    assert gpu.now < 2 * rates.BUDGET + 2 * seconds
    assert gpu.calls == 4 or seconds < rates.SPAN  # a warm-up, and until 1.5 s are over
