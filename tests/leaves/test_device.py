"""Devices are chosen or refused; the loss scale does not depend on the order of clients."""

import pytest
import torch

from machine.device import (
    LossScale,
    choose_device,
    choose_precision,
    exact_place,
    exact_products,
    processor,
)


def needs(limit):
    """A client that overflows above `limit`: (train, overflowed) for LossScale.attempt."""
    last = []
    return last.append, lambda: last[-1] > limit


def test_an_overflowing_client_is_redone_whatever_the_others_did():
    for order in ([64.0, 4.0, 1e9], [1e9, 64.0, 4.0], [4.0, 1e9, 64.0]):
        scale = LossScale(256.0)
        used = {limit: scale.attempt(*needs(limit))[1] for limit in order}
        assert used == {64.0: 64.0, 4.0: 4.0, 1e9: 256.0}
        scale.next_round()
        assert scale.state.tolist() == [4.0, 4.0, 0.0]


def test_the_scale_doubles_after_quiet_rounds_and_sleeps_at_one():
    scale = LossScale(8.0, patience=3)
    for expected in (8.0, 8.0, 16.0, 16.0, 16.0, 32.0):
        scale.attempt(*needs(1e9))
        scale.next_round()
        assert scale.state[0] == expected
    off = LossScale(1.0, patience=1)
    assert not off.active and off.attempt(*needs(0.1))[1] == 1.0
    off.next_round()
    assert off.state.tolist() == [1.0, 1.0, 0.0]


def test_a_scale_that_has_come_down_to_one_goes_up_again():
    scale = LossScale(2.0, patience=2)
    scale.attempt(*needs(1.0))
    scale.next_round()
    assert scale.state[0] == 1.0 and scale.active
    for _ in range(2):
        scale.attempt(*needs(1e9))
        scale.next_round()
    assert scale.state[0] == 2.0


def test_a_state_is_a_copy():
    scale = LossScale(64.0)
    state = scale.state_dict()
    scale.attempt(*needs(16.0))
    assert state["state"].tolist() == [64.0, 64.0, 0.0]
    off = LossScale(1.0)
    off.load_state_dict(state)
    assert off.attempt(*needs(16.0))[1] == 16.0


def test_the_scale_is_all_in_its_state():
    a, b = LossScale(64.0, patience=2), LossScale(1024.0, patience=2)
    a.attempt(*needs(16.0))
    b.state.copy_(a.state)
    for scale in (a, b):
        scale.next_round(), scale.next_round(), scale.next_round()
    assert torch.equal(a.state, b.state) and a.state[0] == 32.0


def test_a_group_takes_the_lowest_scale_that_one_of_it_needed():
    class Others:
        def gather(self, value):
            return [value, 16.0, 128.0]

    scale = LossScale(64.0)
    scale.merge(Others())
    scale.next_round()
    assert scale.state.tolist() == [16.0, 16.0, 0.0]


def test_what_fails_at_any_scale_says_nothing_about_the_scale():
    scale = LossScale(64.0)
    assert scale.attempt(*needs(0.0))[1] == 1.0
    scale.attempt(*needs(32.0))
    scale.next_round()
    assert scale.state.tolist() == [32.0, 32.0, 0.0]


def test_a_device_that_is_not_here_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    for name in ("meta", "gpu", ""):
        with pytest.raises(ValueError, match=f"--device {name}: choose auto, cpu, cuda"):
            choose_device(name)
    with pytest.raises(ValueError, match="--device cuda:0: PyTorch sees no CUDA device here"):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    names = [choose_device(name, local_rank=1, processes=2) for name in ("auto", "cuda")]
    assert names == [torch.device("cuda:1")] * 2
    with pytest.raises(ValueError, match="--device cuda: cuda:2 is wanted, and 2 are here"):
        choose_device("cuda", local_rank=2, processes=3)
    with pytest.raises(ValueError, match="--device cuda:0: 2 processes need a device each"):
        choose_device("cuda:0", processes=2)


def test_apples_gpu_is_taken_by_name_alone_and_sums_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device mps: PyTorch sees no Apple GPU here"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps").type == "mps" and choose_device("auto").type == "cpu"
    with pytest.raises(ValueError, match="--device mps: one process alone"):
        choose_device("mps", processes=2)
    assert choose_precision("auto", torch.device("mps")) == torch.float32
    assert exact_place(torch.device("mps")) == torch.device("cpu")
    for device in (torch.device("cpu"), torch.device("cuda:1")):
        assert exact_place(device) == device


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_the_precision_follows_the_device(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device("cuda:0")) == dtype
    assert choose_precision("auto", torch.device("cpu")) == torch.float32
    assert choose_precision("bf16", torch.device("cpu")) == torch.bfloat16


def test_products_are_exact_inside_and_as_before_after_an_error():
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    try:
        settings.allow_tf32 = True
        with pytest.raises(KeyError), exact_products():
            assert not settings.allow_tf32
            raise KeyError
        assert settings.allow_tf32
    finally:
        settings.allow_tf32 = before


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs PyTorch's newer way"
)
def test_products_are_exact_where_the_newer_way_has_set_them_otherwise():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    with exact_products():
        pass
    assert settings.fp32_precision == before  # "none": as PyTorch's own
    try:
        settings.fp32_precision = "tf32"
        with exact_products():
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before


def test_a_cpu_has_a_name():
    assert len(processor(torch.device("cpu"))) > 2
