"""Batched sensitivity equals the per-sample definition, and masks keep exactly their budget."""

import itertools
import math

import pytest
import torch
from torch import nn

import fisher
from fisher import budget, calibrate, fisher_diagonal, keep_lowest, split_budget, square_accumulate_
from model import build_vit


class Odd(nn.Module):
    """Every kind of parameter: hooked, broadcast, tied, called twice, and used without a module."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(2, 6, 3, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.grid = nn.Parameter(torch.randn(1, 5, 6))
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Linear(6, 6, bias=False)
        self.twice = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.grid
        x = self.twice(self.twice(torch.tanh(self.mix(self.norm(x))))) * self.scale
        return self.head(x.mean(dim=1))


def reference(model, inputs, labels, logit=False):
    """The definition: one backward pass per sample, in float64."""
    model = model.double()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(inputs.double(), labels, strict=True):
        out = model(x[None])[0]
        value = out[y] if logit else out.log_softmax(0)[y]
        grads = torch.autograd.grad(value, list(model.parameters()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad**2 / len(inputs)
    return total


@pytest.fixture
def odd():
    torch.manual_seed(0)
    return Odd(), torch.randn(7, 2, 6, 6), torch.randint(4, (7,))


@pytest.mark.parametrize("score", ["log-prob", "logit"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_batched_fisher_is_the_per_sample_one_for_any_batch_size(odd, size, score):
    model, x, y = odd
    batches = list(zip(x.split(size), y.split(size), strict=True))
    with pytest.warns(UserWarning, match="one by one for"):
        found = fisher_diagonal(
            model.double(), [(a.double(), b) for a, b in batches], labels="true", score=score,
            dtype=torch.float64,
        )  # fmt: skip
    for name, expected in reference(model, x, y, score == "logit").items():
        # float64 throughout: only the order of sums differs
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-14)


def test_a_vit_is_scored_without_falling_back(recwarn):
    model = build_vit("vit_demo", 10, seed=1)
    nn.init.normal_(model.head.weight, std=0.3)
    names = [name for name, _ in model.named_parameters() if not name.startswith("head.")]
    x, y = torch.randn(5, 3, 40, 40), torch.randint(10, (5,))  # the position grid is resampled
    found = fisher_diagonal(model, [(x, y)], parameters=names, labels="true")
    assert not recwarn.list and list(found) == names
    model.forward = lambda images: nn.functional.linear(
        model.features(images), model.head.weight, model.head.bias
    )
    expected = reference(model, x, y)
    for name in names:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        if not name.endswith("qkv.bias"):  # a third of it, the keys', is exactly zero
            assert error < 1e-5, name


def test_the_square_is_of_each_sample_not_of_the_batch(odd):
    model, x, y = odd
    mean_gradient = torch.autograd.grad(
        nn.functional.cross_entropy(model(x), y), model.head.weight
    )[0]
    with pytest.warns(UserWarning):
        found = fisher_diagonal(model, [(x, y)], labels="true")["head.weight"]
    assert (found >= 0.9999 * mean_gradient**2).all()  # a mean of squares, up to rounding
    assert found.sum() > 1.5 * mean_gradient.square().sum()


def test_sampled_labels_follow_the_models_distribution_and_the_seed():
    model = nn.Linear(1, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    x = torch.zeros(20_000, 1)
    exact = torch.tensor([0.2 * 0.8, 0.3 * 0.7, 0.25])  # the variance of each indicator
    found = [fisher_diagonal(model, x.split(n), seed=3)["bias"] for n in (20_000, 333)]
    assert torch.allclose(found[0], exact, atol=0.01)  # 20,000 draws: a deviation of 0.002
    assert torch.allclose(*found, rtol=1e-5)
    assert not torch.allclose(found[0], fisher_diagonal(model, [x], seed=4)["bias"], rtol=1e-5)


def test_the_model_is_left_as_it_was(odd):
    model, x, y = odd
    model.mix.weight.requires_grad_(False)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning):
        fisher_diagonal(model, [(x, y)])
    assert all(
        torch.equal(p, state[name]) and p.grad is None for name, p in model.named_parameters()
    )
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["mix.weight"]
    assert not any(module._forward_hooks for module in model.modules())


def test_square_accumulate_equals_its_definition_at_odd_sizes(monkeypatch):
    monkeypatch.setattr(fisher, "CPU_CHUNK", 100)
    for n, t, o, i in itertools.product([1, 5], [1, 17], [1, 7], [1, 13]):
        g, a = torch.randn(n, t, o).double(), torch.randn(n, t, i).double()
        total = torch.ones(o, i).double()
        square_accumulate_(total, g, a)
        expected = 1 + torch.einsum("nto,nti->noi", g, a).square().sum(0)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_scored_is_refused(odd):
    model, x, _ = odd
    with pytest.raises(ValueError, match="no parameters"):
        fisher_diagonal(nn.Flatten(), [x])
    with pytest.raises(ValueError, match="calibration set is empty"):
        fisher_diagonal(model, [])
    with pytest.raises(ValueError, match="unknown labels 'false'"):
        fisher_diagonal(model, [x], labels="false")
    with pytest.raises(ValueError, match="is not finite"), pytest.warns(UserWarning):
        fisher_diagonal(model, [x * math.inf], labels="sampled")


# ---------------------------------------------------------------------------- masks


@pytest.mark.parametrize("rule", fisher.RULES)
@pytest.mark.parametrize(("size", "sparsity"), [(1, 0.0), (1023, 0.5), (1000, 0.999), (997, 0.1)])
def test_every_rule_keeps_exactly_its_budget(rule, size, sparsity):
    theta = torch.randn(size)
    mask = calibrate(theta, lambda: theta.square(), sparsity=sparsity, rule=rule)
    assert mask.sum() == budget(size, sparsity) == math.floor((1 - sparsity) * size + 0.5)


def test_equal_keys_fall_to_the_first():
    assert keep_lowest(torch.tensor([1.0, 0, 1, 0, 1, 1]), 4).tolist() == [1, 1, 1, 1, 0, 0]


def test_the_rules_keep_what_they_say():
    theta, scores = torch.randn(500), torch.rand(500)
    masks = {
        rule: calibrate(theta, lambda: scores, sparsity=0.8, rounds=1, rule=rule, seed=1)
        for rule in fisher.RULES
    }
    for rule, keys in (("sensitive", scores), ("magnitude", theta.abs())):
        low, high = ("least-", "most-") if rule == "sensitive" else ("lowest-", "highest-")
        assert keys[masks[low + rule]].max() <= keys[~masks[low + rule]].min()
        assert keys[masks[high + rule]].min() >= keys[~masks[high + rule]].max()
    again = calibrate(theta, lambda: scores, sparsity=0.8, rule="random", seed=2)
    assert not torch.equal(masks["random"], again)


def quadratic_scores(theta):
    """Scores that depend on the weights, as a network's do."""
    mix = torch.randn(len(theta), len(theta), generator=torch.Generator().manual_seed(5))
    return lambda: (mix @ theta).square() + 0.1 * theta.square()


def test_without_damping_rounds_change_nothing_and_with_it_they_do():
    theta = torch.randn(300, generator=torch.Generator().manual_seed(1))
    options = dict(sparsity=0.9)
    once = calibrate(theta, quadratic_scores(theta), rounds=1, **options)
    for rounds in (2, 4, 8):
        same = calibrate(theta, quadratic_scores(theta), rounds=rounds, damp=1.0, **options)
        assert torch.equal(once, same)
        damped = calibrate(theta, quadratic_scores(theta), rounds=rounds, damp=0.1, **options)
        assert not torch.equal(once, damped)


def test_damped_weights_come_back_to_the_bit_also_when_scoring_fails():
    theta = torch.randn(100)
    before, calls = theta.clone(), []

    def failing():
        calls.append(theta.clone())
        if len(calls) == 3:
            raise RuntimeError("midway")
        return theta.square()

    with pytest.raises(RuntimeError, match="midway"):
        calibrate(theta, failing, sparsity=0.9)
    assert torch.equal(theta, before) and not torch.equal(calls[2], before)
    with pytest.raises(ValueError, match="round 1: a score is not finite"):
        calibrate(theta, lambda: theta * math.nan, sparsity=0.9)
    assert torch.equal(theta, before)


def test_groups_keep_the_same_share_each():
    theta = torch.randn(100)
    groups = list(torch.arange(100).split([50, 33, 17]))
    mask = calibrate(theta, lambda: theta.square(), sparsity=0.77, groups=groups)
    assert [int(mask[g].sum()) for g in groups] == split_budget(23, groups) == [11, 8, 4]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_bad_masks_are_refused(sparsity):
    theta = torch.randn(10)
    with pytest.raises(ValueError, match="sparsity must lie in"):
        calibrate(theta, lambda: theta, sparsity=sparsity)
    with pytest.raises(ValueError, match="at least one round, not 0"):
        calibrate(theta, lambda: theta, sparsity=0.5, rounds=0)
    with pytest.raises(ValueError, match="unknown mask rule 'best'"):
        calibrate(theta, lambda: theta, sparsity=0.5, rule="best")
