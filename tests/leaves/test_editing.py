"""Rules and measures are their formulas; rules with nothing to do are FedAvg to the bit."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from loops import end

import editing
from fedavg import FIXED_POINT, Cohort, FedAvg, Method
from federated.cohort import sample_clients, shares
from federated.methods import METHODS, Aggregation, Shared

PARTS = torch.tensor(
    [[4.0, -1.0, 3.0, 0.5, 2.0], [2.0, 3.0, -5.0, 0.25, -2.0], [-3.0, 2.0, -1.0, 0.125, 0.0]],
    dtype=torch.float64,
)
THIRDS = [1 / 3] * 3


def close(actual, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_task_vectors_add_up_and_a_negative_scale_takes_them_away():
    theta = torch.ones(5, dtype=torch.float64)
    there = editing.add_task_vectors(theta, PARTS[:2], 0.5)
    close(there, [4.0, 2.0, 0.0, 1.375, 1.0])
    close(editing.add_task_vectors(there, PARTS[:2], -0.5), [1.0] * 5)


def test_ties_trims_elects_and_averages_what_agrees():
    # kept, three of five: 4 . 3 . 2 | . 3 -5 . -2 (2 and -2 tie) -> 2 too | -3 2 -1 . .
    # signs of the sums: + (3), + (5), - (-3), none kept, none elected (2 - 2)
    merged = editing.ties(PARTS / 3, THIRDS, keep=0.6)
    close(merged, [3.0, 2.5, -3.0, 0.0, 0.0])
    close(editing.ties(PARTS / 3, THIRDS, keep=0.2), [4.0, 0.0, -5.0, 0.0, 0.0])


def test_ties_averages_by_weight_and_the_result_does_not_depend_on_their_scale():
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    parts = PARTS * weights[:, None]
    # elected by the weighted sums 2, 0.8, -0.2, 0.35, 0.4
    expected = [(2.0 + 0.6) / 0.8, (0.9 + 0.4) / 0.5, (-1.5 - 0.2) / 0.5, 0.35, 2.0]
    close(editing.ties(parts, weights, keep=1), expected)
    close(editing.ties(2 * parts, 2 * weights, keep=1), [2 * x for x in expected])


@pytest.mark.parametrize("total", [1e-30, 3e4, 1e9])
def test_weights_may_have_any_sum(total):
    scores = torch.tensor([[1.0, 2, 1, 1, 0], [1, 1, 1, 3, 1]])
    rules = [lambda parts, p: editing.ties(parts, p, keep=1), editing.sign_elected]
    rules.append(lambda parts, p: editing.fisher_mean(parts, p, scores))
    for rule in rules:
        few, many = (rule(PARTS[:2] * p, [p, p]) / (2 * p) for p in (0.5, total))
        torch.testing.assert_close(few, many, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "weights, said",
    [([0.5], "2 parts need as many weights, not 1"), ([1, math.nan], "finite"), ([1, -1], "least")],
)
def test_weights_that_do_not_fit_the_parts_are_refused(weights, said):
    for rule in (editing.ties, editing.sign_elected):
        with pytest.raises(ValueError, match=said):
            rule(PARTS[:2], weights)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_part_or_score_that_is_not_finite_is_refused(value):
    parts, half = torch.tensor([[1.0, 2.0], [1.0, value]]), [0.5, 0.5]
    for rule in (partial(editing.ties, keep=1.0), partial(editing.ties, keep=0.5)):
        with pytest.raises(ValueError, match="part 1 holds NaN or infinite values"):
            rule(parts, half)
    with pytest.raises(ValueError, match="part 1 holds"):
        editing.sign_elected(parts, half)
    with pytest.raises(ValueError, match="part 1 holds"):
        editing.fisher_mean(parts, half, torch.ones(2, 2))
    for score in (value, -1.0):
        with pytest.raises(ValueError, match="scores 0 hold values that are not finite, or below"):
            editing.fisher_mean(torch.ones(2, 2), half, torch.tensor([[1.0, score], [1.0, 1.0]]))


def test_padding_counts_in_no_share():
    padded = torch.nn.functional.pad(PARTS, (0, 15))
    merged = editing.ties(padded / 3, THIRDS, keep=0.6, size=5)
    assert torch.equal(merged[:5], editing.ties(PARTS / 3, THIRDS, keep=0.6))


def fisher_mean(parts, weights):
    """Merge under scores that a part's first entry decides, some of them zero."""
    grid = parts[:, :1].double() / parts[:, :1].double().abs().max()
    return editing.fisher_mean(parts, weights, (grid * torch.arange(parts.shape[1])).cos().relu())


@pytest.mark.parametrize("rule", [editing.ties, editing.sign_elected, fisher_mean])
def test_fixed_point_parts_give_what_floats_give_in_any_order(rule, monkeypatch):
    monkeypatch.setattr(editing, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(6, 101, dtype=torch.float64, generator=generator) / 6
    weights = torch.rand(6, dtype=torch.float64, generator=generator)
    units = (parts * FIXED_POINT).round().long()
    merged = rule(units, weights)
    floats = merged.double() / FIXED_POINT
    torch.testing.assert_close(floats, rule(parts, weights), rtol=1e-10, atol=1e-13)
    order = torch.randperm(6, generator=generator)
    assert torch.equal(rule(units[order], weights[order]), merged)


def test_elected_signs_keep_the_norm_of_the_mean():
    merged = editing.sign_elected(PARTS / 3, THIRDS)
    mean = PARTS.mean(dim=0)
    agreeing = torch.tensor([3.0, 2.5, -3.0, 0.875 / 3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(merged.norm(), mean.norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(merged, agreeing * (mean.norm() / agreeing.norm()))
    assert not editing.sign_elected(torch.zeros(2, 3), [0.5, 0.5]).any()


def test_dare_keeps_the_expectation_and_its_pattern_has_no_hidden_state():
    vector = torch.linspace(1, 2, 200_000, dtype=torch.float64)
    once = editing.dare(vector, 0.9, seed=1, round=2, client=3)
    assert torch.equal(once, editing.dare(vector, 0.9, seed=1, round=2, client=3))
    for other in (dict(seed=2), dict(round=1), dict(client=2)):
        where = dict(seed=1, round=2, client=3) | other
        assert not torch.equal(once, editing.dare(vector, 0.9, **where))
    stays = once != 0
    # five standard deviations of a binomial share
    assert abs(stays.double().mean() - 0.1) < 5 * math.sqrt(0.1 * 0.9 / len(vector))
    torch.testing.assert_close(once[stays], vector[stays] / (1 - 0.9), rtol=1e-12, atol=0)
    assert torch.equal(editing.dare(vector, 0.0), vector)


def test_scores_weigh_entries_and_without_any_the_mean_is_plain():
    scores = torch.tensor([[1.0, 0.0, 2.0, 0, 1], [3.0, 1.0, 0.0, 0, 1]], dtype=torch.float64)
    merged = editing.fisher_mean(PARTS[:2] / 2, [0.5, 0.5], scores)
    close(merged, [2.5, 3.0, 3.0, 0.375, 0.0])
    # p_k F_k: 0.75 and 0.75, 0 and 0.25, ...
    weights = torch.tensor([0.75, 0.25], dtype=torch.float64)
    merged = editing.fisher_mean(PARTS[:2] * weights[:, None], weights, scores)
    close(merged, [3.0, 3.0, 3.0, 0.4375, 1.0])
    # a part without weight has no say, whatever its score
    merged = editing.fisher_mean(PARTS[:2] * torch.tensor([[1.0], [0.0]]), [1.0, 0.0], scores)
    close(merged, PARTS[0].tolist())


def test_interference_of_pairs():
    vectors = torch.tensor([[3.0, 4.0, 0.0], [3.0, -4.0, 1.0], [0.0, 2.0, 0.0]]).double()
    compared = editing.interference(vectors)
    root = math.sqrt(26)
    close(compared.norms, [5.0, root, 2.0])
    pairs = [(9 - 16) / (5 * root), 8 / 10, -8 / (2 * root)]
    assert compared.cosine == pytest.approx(sum(pairs) / 3, rel=1e-12)
    assert compared.sign_agreement == pytest.approx((1 / 2 + 1 + 0) / 3, rel=1e-12)
    units = editing.interference((vectors * 2**40).long())
    assert units[1:] == pytest.approx(compared[1:], rel=1e-9)
    assert editing.interference(vectors[:1])[1:] == (None, None)


def test_a_move_is_scaled_to_the_displacement_that_is_asked_for():
    theta, tau = torch.randn(2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    function = lambda t: (t.square() + t).view(4, 10)  # noqa: E731
    felt = editing.displacement(function, theta, tau)
    change = (theta + tau).square() + tau - theta.square()
    assert felt == pytest.approx(change.square().mean().sqrt().item(), rel=1e-12)
    for target in (felt, felt / 100, 1000 * felt):
        scale = editing.scale_to(function, theta, tau, target)
        assert editing.displacement(function, theta, scale * tau) == pytest.approx(target, rel=0.01)
    assert editing.scale_to(function, theta, tau, felt) == 1
    assert editing.scale_to(function, theta, 0 * tau, felt) is None
    assert editing.scale_to(torch.tanh, theta, tau, 10.0) is None  # beyond what it can move


def test_the_linearity_error_is_zero_of_a_linear_model_and_grows_on_a_quadratic():
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta, tau = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([1.0, 0.5, 0.25]).double()
    assert editing.linearity_error(lambda t: weight @ t + 1, theta, tau) < 1e-14
    assert editing.linearity_error(lambda t: t.square(), theta, 0 * tau) == 0
    for scale in (0.01, 0.1, 1.0):
        # of t^2: the change is 2 s theta tau + s^2 tau^2, its last part is not linear
        rest, change = scale**2 * tau**2, 2 * scale * theta * tau + scale**2 * tau**2
        error = editing.linearity_error(lambda t: t.square(), theta, scale * tau)
        assert error == pytest.approx((rest.norm() / change.norm()).item(), rel=1e-10)
    # with theta = tau = 1 that is s / (2 + s)
    ones = torch.ones(3, dtype=torch.float64)
    assert editing.linearity_error(torch.square, ones, 3 * ones) == pytest.approx(0.6, rel=1e-12)


def test_attention_has_a_forward_product():
    tokens = torch.randn(
        1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def function(theta):
        q = tokens * theta
        return torch.nn.functional.scaled_dot_product_attention(q, q, tokens)

    theta, tau = torch.ones(4, dtype=torch.float64), 0.1 * torch.ones(4, dtype=torch.float64)
    errors = [editing.linearity_error(function, theta, s * tau) for s in (1e-3, 1e-2)]
    assert errors[1] == pytest.approx(10 * errors[0], rel=0.05)  # of second order


def test_pytorchs_own_transformer_has_a_linearity_error():
    """In eval mode its fast path has no forward-mode product."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).double().eval()
    names, parameters = zip(*layer.named_parameters(), strict=True)
    tokens = torch.randn(2, 3, 8, dtype=torch.float64)

    def function(theta):
        parts = theta.split([p.numel() for p in parameters])
        values = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (tokens,))

    theta = torch.cat([p.detach().flatten() for p in parameters])
    tau, fast = torch.randn_like(theta), torch.backends.mha.get_fastpath_enabled()
    errors = [editing.linearity_error(function, theta, s * tau) for s in (1e-5, 1e-4)]
    assert errors[1] == pytest.approx(10 * errors[0], rel=0.05)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_vectors_on_entries_of_their_own_do_not_disturb_each_other():
    def logits(theta, x):
        return x @ theta.view(2, 3)

    theta = torch.zeros(6)
    inputs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    apart = torch.tensor([[0, 1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    assert editing.disentanglement_error(logits, theta, apart, inputs) == 0
    clash = apart + torch.tensor([[0.0] * 6, [2.0, 0, 0, 0, 0, 0]])
    assert editing.disentanglement_error(logits, theta, clash, inputs) == 1.0  # of the first task


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, math.nan])
def test_a_share_outside_its_range_is_refused(keep):
    with pytest.raises(ValueError, match=rf"must lie in \(0, 1\], not {keep:g}"):
        editing.ties(PARTS, THIRDS, keep=keep)


@pytest.mark.parametrize("drop", [1.0, -0.1, math.nan])
def test_a_drop_outside_its_range_is_refused(drop):
    with pytest.raises(ValueError, match=rf"must lie in \[0, 1\), not {drop:g}"):
        editing.dare(PARTS[0], drop)


# ---------------------------------------------------------------------------- inside a round


TARGETS = torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
ENTRIES = Shared(torch.ones(5, dtype=torch.bool), size=5, seed=3)


def rule(name, **settings):
    """Return a method of the table."""
    return METHODS[name](Aggregation(name, **settings), ENTRIES)


def fisher_rule(scores):
    """Return a method that merges under scores (m, P) of the parts (m, P)."""

    def combine(parts, cohort, round):
        return editing.fisher_mean(parts, cohort.weights, scores(parts))

    return Method(apart=lambda round: True, combine=combine)


def by_first_entry(parts, cohort, round):
    return fisher_mean(parts, cohort.weights)


SUM_OF_PARTS = Method(apart=lambda round: True)
FISHER = Method(apart=lambda round: True, combine=by_first_entry)
EQUAL_FISHER = fisher_rule(lambda parts: torch.full(parts.shape, 0.3))
NO_FISHER = fisher_rule(lambda parts: torch.zeros(parts.shape))


def federation(method=None, fraction=0.4, one_way=False, flip=False):
    targets = TARGETS.abs() if one_way else TARGETS

    def train(theta, clients, round):
        for client in clients:
            theta_k = theta + 0.3 * targets[client]
            yield theta_k, theta_k.mean()[None]

    def cohort(round):
        clients = sample_clients(12, fraction, seed=3, round=round)[:: -1 if flip else 1].copy()
        return Cohort(clients, clients, shares(np.arange(1, 13), clients))

    return FedAvg(torch.zeros(5), train, cohort, method=method or Method())


@pytest.mark.parametrize(
    ("method", "where"),
    [
        (SUM_OF_PARTS, {}),
        (rule("ties", ties_keep=1), dict(one_way=True)),  # all agree
        (rule("sign"), dict(one_way=True)),
        (EQUAL_FISHER, {}),
        (NO_FISHER, {}),
        (FISHER, dict(fraction=0.05)),  # one client
        (rule("dare", dare_drop=0.0)._replace(apart=lambda round: True), {}),
    ],
)
def test_degenerate_rules_are_fedavg_to_the_bit(method, where):
    """Those of the table at their neutral settings are in test_contract.py."""
    assert torch.equal(end(federation(method, **where), 4), end(federation(**where), 4))


RULES = (rule("ties", ties_keep=0.4), rule("sign"), FISHER, rule("dare", dare_drop=0.6))


@pytest.mark.parametrize("method", RULES)
def test_rules_know_no_order_of_clients_whose_weights_differ(method):
    """In test_contract.py they are alike."""
    assert torch.equal(end(federation(method, flip=True), 3), end(federation(method), 3))


def test_one_round_of_solved_quadratics_under_their_fishers_is_the_common_optimum():
    """Clients whose loss is sum of h (theta - target)^2 / 2 go to its optimum; the Fisher is h."""
    generator = torch.Generator().manual_seed(2)
    targets, h = torch.rand(2, 6, 7, dtype=torch.float64, generator=generator)
    h[:, 0], h[3], h[0, 1:] = 0, 0, 1e3 * h[0, 1:]  # an entry that matters to none, a client
    sizes, clients = torch.arange(1, 7).double(), np.arange(6)

    def train(theta, clients, round):
        for client in clients:
            yield targets[client].clone(), torch.zeros(1)

    p = (sizes / sizes.sum())[:, None]
    everyone = Cohort(clients, clients, p[:, 0].numpy())
    theta, method = torch.zeros(7, dtype=torch.float64), fisher_rule(lambda parts: h)
    merged = end(FedAvg(theta, train, lambda round: everyone, method=method), 1)
    optimum = (p * h * targets).sum(dim=0)[1:] / (p * h).sum(dim=0)[1:]
    torch.testing.assert_close(merged[1:], optimum, rtol=0, atol=1e-10)
    torch.testing.assert_close(merged[0], (p * targets).sum(dim=0)[0], rtol=0, atol=1e-10)
