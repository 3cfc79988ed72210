"""The entries that train: the norm that bounds their gradient is torch's, under a mask theirs."""

import math

import pytest
import torch
from test_learner import build

from entries import clip_divisor


@pytest.mark.parametrize("size", [1, 1023, 262_144, 262_145, 700_001])
@pytest.mark.parametrize("bound", [0.5, 1e-3, 1e4])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**14, torch.tensor(2.0**14)], ids=str)
def test_the_divisor_clips_as_torch_does(size, bound, loss_scale):
    grad = torch.randn(size, generator=torch.Generator().manual_seed(size))
    weight = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
    weight.grad = grad.double()
    norm = torch.nn.utils.clip_grad_norm_([weight], bound).item()
    divisor = clip_divisor(grad * loss_scale, bound, loss_scale)
    assert divisor.dtype == torch.float32
    torch.testing.assert_close(grad * loss_scale / divisor, weight.grad.float(), rtol=3e-7, atol=0)
    assert (divisor.item() == float(loss_scale)) == (norm <= bound)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    grad = torch.ones(5)
    grad[2] = bad
    assert not torch.isfinite(grad / clip_divisor(grad, 1.0)).all()


@pytest.mark.parametrize("compact", [True, False])
def test_under_a_mask_the_norm_is_of_what_trains(small_data, compact):
    mask = ("--head", "ridge", "--mask-rule", "random", "--sparsity", "0.9" if compact else "0.2")
    plain = ("--momentum", "0", "--lr", "1", "--clip-norm", "0.01", "--precision", "fp32")
    learner, training = build(small_data, *mask, *plain, "--J", "1")
    entries = learner.entries
    assert entries.compact == compact
    start = entries.theta.clone()
    training.one(4, round=1)
    grad = learner.flat.grad
    assert grad[entries.index].norm() > 0.01 and grad.norm() > 1.05 * grad[entries.index].norm()
    # a step of lr 1; the differences of fp32 parameters round to 2^-24 of their size
    assert (start - entries.theta).double().norm().item() == pytest.approx(0.01, rel=1e-4)
