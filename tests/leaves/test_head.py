"""Closed-form heads are what their equations say, whoever holds the samples."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import small_synthetic

from data import shard_by_class, shard_iid
from head import RidgeSums, fit_ridge, fit_temperature, solve_ridge, train_heads, train_probe


def problem(n=900, width=12, classes=10, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, width, generator=generator)
    features = centres[labels] + noise * torch.randn(n, width, generator=generator) + 3.0
    return features, labels


def test_the_ridge_head_solves_the_centred_normal_equations():
    features, labels = problem()
    weight, bias = solve_ridge(RidgeSums(12, 10).update(features, labels), ridge=0.1)
    x, y = features.double().numpy(), np.eye(10)[labels]
    xc, yc = x - x.mean(0), y - y.mean(0)
    gram = xc.T @ xc
    expected = np.linalg.solve(gram + 0.1 * np.trace(gram) / 12 * np.eye(12), xc.T @ yc)
    np.testing.assert_allclose(weight.T, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bias, y.mean(0) - x.mean(0) @ expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nc", [None, 1, 5, 10, 50])
def test_the_federated_head_is_the_central_one(nc):
    labels = small_synthetic().train.labels
    features = small_synthetic().train.images[:, :, ::8, ::8].flatten(1).float() / 255
    y = labels.numpy()
    shards = (
        shard_iid(y, 100, 0) if nc is None else shard_by_class(y, 100 if nc < 50 else 40, nc, 0)
    )
    width = features.shape[1]
    total = RidgeSums(width, 100)
    for shard in shards:
        total = total + RidgeSums(width, 100).update(features[shard], labels[shard])
    whole = RidgeSums(width, 100).update(features, labels)
    for name, value in vars(whole).items():
        torch.testing.assert_close(getattr(total, name), value, rtol=1e-12, atol=1e-12)
    for a, b in zip(solve_ridge(total, 1e-3), solve_ridge(whole, 1e-3), strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()


def test_a_ridge_head_needs_samples_and_a_positive_ridge():
    with pytest.raises(ValueError, match="ridge must be positive, not 0"):
        solve_ridge(RidgeSums(2, 2), 0)
    with pytest.raises(ValueError, match="at least one sample"):
        solve_ridge(RidgeSums(2, 2), 1)


@pytest.mark.parametrize("planted", [0.02, 1.0, 30.0])
def test_the_temperature_is_the_one_that_was_planted(planted):
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20_000, 8, generator=generator).double()
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    found = fit_temperature(logits * planted, labels)
    assert found == pytest.approx(planted, rel=0.03)  # 20,000 labels: a deviation of about 1 %

    def loss(t):
        return F.cross_entropy(logits * planted / t, labels).item()

    assert loss(found) <= min(loss(found * 1.001), loss(found / 1.001))


def test_fit_ridge_keeps_the_best_by_validation_with_its_temperature_inside():
    features, labels = problem(noise=2.0)
    val_features, val_labels = problem(noise=2.0, n=400)
    sums = RidgeSums(12, 10).update(features[:60], labels[:60])
    accuracies = {}
    for ridge in (1e-6, 1e-2, 1e2):
        weight, bias = solve_ridge(sums, ridge)
        guess = (val_features.double() @ weight.T + bias).argmax(1)
        accuracies[ridge] = (guess == val_labels).double().mean().item()
    fitted = fit_ridge(sums, val_features, val_labels, grid=accuracies)
    assert fitted.val_acc == max(accuracies.values()) == accuracies[fitted.strength]
    logits = val_features.double() @ fitted.weight.T + fitted.bias
    assert fit_temperature(logits, val_labels) == pytest.approx(1.0, rel=1e-4)


def test_the_probe_is_at_the_optimum_of_its_penalty():
    features, labels = problem()
    val = problem(n=300)
    fitted = train_probe(features, labels, 10, *val, grid=(1e-3,), iterations=500)
    mean, std = features.mean(0), features.std(0)
    x = (features - mean) / std
    weight = (fitted.weight * fitted.temperature * std).float().requires_grad_()
    bias = (fitted.bias + fitted.weight @ mean.double()) * fitted.temperature
    logits = F.linear(x, weight, bias.float())
    loss = F.cross_entropy(logits, labels) + 1e-3 * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.norm() < 1e-3 * weight.norm()  # L-BFGS stops at a change of 1e-9 a step
    assert fitted.val_acc > 0.8


def test_heads_trained_together_are_a_plain_loop_per_client():
    m, steps, batch, classes, width = 3, 4, 6, 5, 7
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(50, width, generator=generator).double()
    labels = torch.randint(classes, (50,), generator=generator)
    indices = torch.randint(50, (m, steps, batch), generator=generator)
    start = torch.nn.Linear(width, classes).double()
    weight = start.weight.detach().repeat(m, 1, 1)
    bias = start.bias.detach().repeat(m, 1)
    grads = torch.zeros_like(weight), torch.zeros_like(bias)
    buffers = torch.zeros_like(weight), torch.zeros_like(bias)

    def step(j):
        for p, g, b in zip((weight, bias), grads, buffers, strict=True):
            b.mul_(0.9).add_(g)
            p.sub_(0.1 * b)

    losses = train_heads(weight, bias, features, labels, indices, step, *grads)
    for k in range(m):
        head = torch.nn.Linear(width, classes).double()
        head.load_state_dict(start.state_dict())
        optimiser = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        for j in range(steps):
            at = indices[k, j]
            loss = F.cross_entropy(head(features[at]), labels[at])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            assert losses[k, j].item() == pytest.approx(loss.item(), rel=1e-6)  # kept in fp32
        torch.testing.assert_close(weight[k], head.weight.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(bias[k], head.bias.detach(), rtol=1e-12, atol=1e-12)


def test_features_that_are_all_alike_give_a_head_of_sense():
    """What rounding leaves of their spread is no spread."""
    labels = torch.arange(50) % 3
    weight, bias = solve_ridge(RidgeSums(8, 3).update(torch.full((50, 8), 0.1), labels), 1e-3)
    assert weight.abs().max() < 10
    scores = torch.full((8,), 0.1, dtype=torch.float64) @ weight.T + bias
    torch.testing.assert_close(scores, labels.bincount() / 50.0, check_dtype=False)


def test_what_gives_no_head_is_refused():
    features, labels = problem(60)
    bad = features.clone()
    bad[0, 0] = math.inf
    with pytest.raises(ValueError, match="not finite"):
        fit_ridge(RidgeSums(12, 10).update(bad, labels), features, labels)
    sums = RidgeSums(12, 10).update(features, labels)
    with pytest.raises(ValueError, match="validation samples, and there are none"):
        fit_ridge(sums, features[:0], labels[:0])
    with pytest.raises(ValueError, match="a feature of the validation samples is not finite"):
        fit_ridge(sums, bad, labels)
    for samples, said in (
        ((features, labels, 10, features[:0], labels[:0]), "needs validation samples"),
        ((features[:0], labels[:0], 10, features, labels), "needs training samples"),
        ((bad, labels, 10, features, labels), "feature of the training samples is not finite"),
        ((features, labels, 10, bad, labels), "feature of the validation samples is not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            train_probe(*samples)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
        RidgeSums(12, 10).update(features, labels + 1)
    with pytest.raises(ValueError, match="60 features come with 59 labels"):
        RidgeSums(12, 10).update(features, labels[1:])
    with pytest.raises(ValueError, match="sums of other features or classes"):
        sums + RidgeSums(12, 1)
