"""Masks keep exactly their budget, rounds and damping do what they say, clients agree as told."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

import masks
from masks import (
    CONSENSUS,
    RULES,
    Rule,
    budget,
    calibrate,
    consensus,
    keep_lowest,
    mask_from_scores,
    overlap,
    pack,
    ranking,
    rate_factor,
    sensitivity_share,
    split_budget,
    unpack,
)


def by(rule, theta, scores, seed=0):
    """Keys of a rule, for `calibrate`; `scores` is called afresh in every round."""
    return lambda alive, keep: ranking(rule, theta, scores(), seed)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("size", "sparsity"), [(1, 0.0), (1023, 0.5), (1000, 0.999), (997, 0.1)])
def test_every_rule_keeps_exactly_its_budget(rule, size, sparsity):
    theta = torch.randn(size)
    mask = calibrate(theta, by(rule, theta, theta.square), sparsity=sparsity)
    share = 1 - Fraction(str(sparsity))
    assert mask.sum() == budget(size, sparsity) == math.floor(share * size + Fraction(1, 2))


def test_half_an_entry_is_rounded_up():
    """Of the sparsity as it is written: (1 - 0.9) * 5 is 0.49999999999999989 in floats."""
    assert [budget(5, sparsity) for sparsity in (0.9, 0.7, 0.5, 0.3)] == [1, 2, 3, 4]
    assert budget(5, torch.tensor(0.9)) == 1 and budget(9, 5 / 6) == 2


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("groups", [None, (600, 400)])
def test_a_mask_within_some_entries_keeps_the_whole_budget_there(rounds, groups):
    theta, within = torch.randn(1000), torch.arange(1000) % 3 == 0  # 334 of them
    damped = []

    def keys(alive, keep):
        damped.append(int((theta != original).sum()))
        return theta.square()

    original = theta.clone()
    settings = dict(sparsity=0.8, rounds=rounds, group_sizes=groups, damp=0.5)
    mask = calibrate(theta, keys, within=within, **settings)
    assert mask.sum() == 200 and not (mask & ~within).any() and damped[0] == 0
    if groups is None and rounds == 1:
        assert theta.abs()[mask].max() <= theta.abs()[within & ~mask].min()
    with pytest.raises(ValueError, match="only .* may be"):
        calibrate(theta, keys, within=within, **(settings | {"sparsity": 0.5}))


def test_equal_keys_fall_to_the_first():
    assert keep_lowest(torch.tensor([1.0, 0, 1, 0, 1, 1]), 4).tolist() == [1, 1, 1, 1, 0, 0]


def test_what_has_no_order_is_refused():
    with pytest.raises(ValueError, match="the scores of b hold NaN"):
        mask_from_scores({"a": torch.ones(3), "b": torch.tensor([1.0, math.nan])}, 0.0)
    with pytest.raises(ValueError, match="1 of 2 keys to rank are NaN"):
        keep_lowest(torch.tensor([1.0, math.nan]), 1)
    with pytest.raises(ValueError, match=r"a vector \(P,\), not \(4, 5\)"):
        keep_lowest(torch.zeros(4, 5), 3)


def test_the_rules_keep_what_they_say():
    theta, scores = torch.randn(500), torch.rand(500)
    masks = {
        rule: calibrate(theta, by(rule, theta, lambda: scores, 1), sparsity=0.8, rounds=1)
        for rule in RULES
    }
    for what, values in (("sensitive", scores), ("magnitude", theta.abs())):
        low, high = ("least-", "most-") if what == "sensitive" else ("lowest-", "highest-")
        assert values[masks[low + what]].max() <= values[~masks[low + what]].min()
        assert values[masks[high + what]].min() >= values[~masks[high + what]].max()
    again = calibrate(theta, by("random", theta, lambda: scores, 2), sparsity=0.8)
    assert not torch.equal(masks["random"], again)


def quadratic_scores(theta):
    """Scores that depend on the weights, as a network's do."""
    mix = torch.randn(len(theta), len(theta), generator=torch.Generator().manual_seed(5))
    return lambda: (mix @ theta).square() + 0.1 * theta.square()


@pytest.mark.parametrize("limit", [dict(sparsity=0.9), dict(threshold=200.0)])
def test_without_damping_rounds_change_nothing_and_with_it_they_do(limit):
    theta = torch.randn(300, generator=torch.Generator().manual_seed(1))
    keys = by("least-sensitive", theta, quadratic_scores(theta))
    once = calibrate(theta, keys, rounds=1, **limit)
    assert 0 < once.sum() < 300
    for rounds in (2, 4, 8):
        assert torch.equal(once, calibrate(theta, keys, rounds=rounds, damp=1.0, **limit))
        assert not torch.equal(once, calibrate(theta, keys, rounds=rounds, damp=0.1, **limit))


def test_a_threshold_keeps_what_lies_below_it_and_never_nothing():
    theta = torch.tensor([3.0, -1.0, 2.0, 0.5])
    keys = by("lowest-magnitude", theta, lambda: None)
    assert calibrate(theta, keys, threshold=2.0).tolist() == [False, True, True, True]
    keys = by("highest-magnitude", theta, lambda: None)
    assert calibrate(theta, keys, threshold=-2.0).tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match=r"no key is at most -9; they lie between -3 and -0.5"):
        calibrate(theta, keys, threshold=-9.0)


def test_damped_weights_come_back_to_the_bit_also_when_scoring_fails():
    theta = torch.randn(100)
    before, calls = theta.clone(), []

    def failing():
        calls.append(theta.clone())
        if len(calls) == 3:
            raise RuntimeError("midway")
        return theta.square()

    with pytest.raises(RuntimeError, match="midway"):
        calibrate(theta, by("least-sensitive", theta, failing), sparsity=0.9)
    assert torch.equal(theta, before) and not torch.equal(calls[2], before)
    not_a_number = by("least-sensitive", theta, lambda: theta * math.nan)
    with pytest.raises(ValueError, match="round 1: a score is not finite"):
        calibrate(theta, not_a_number, sparsity=0.9)
    assert torch.equal(theta, before)


def test_groups_keep_the_same_share_each():
    theta, sizes = torch.randn(100), [50, 33, 17]
    keys = by("least-sensitive", theta, theta.square)
    mask = calibrate(theta, keys, sparsity=0.77, group_sizes=sizes)
    assert [int(part.sum()) for part in mask.split(sizes)] == split_budget(23, sizes) == [11, 8, 4]


def test_masks_by_name_keep_the_least_sensitive_of_all_tensors_together():
    scores = {"a": torch.tensor([[1.0, 5.0]]), "b": torch.tensor([0.5, 9.0, 9.0])}
    masks = mask_from_scores(scores, sparsity=0.6)
    assert masks["a"].tolist() == [[True, False]] and masks["b"].tolist() == [True, False, False]


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, math.nan])
def test_bad_masks_are_refused(sparsity):
    theta = torch.randn(10)
    keys = by("least-sensitive", theta, theta.square)
    with pytest.raises(ValueError, match="sparsity must lie in"):
        calibrate(theta, keys, sparsity=sparsity)
    with pytest.raises(ValueError, match="a sparsity of 0.99 keeps none of 10 entries"):
        calibrate(theta, keys, sparsity=0.99)
    with pytest.raises(ValueError, match="at least one round, not 0"):
        calibrate(theta, keys, sparsity=0.5, rounds=0)
    with pytest.raises(ValueError, match="unknown mask rule 'best'"):
        calibrate(theta, by("best", theta, theta.square), sparsity=0.5)
    for both in ({}, dict(sparsity=0.5, threshold=1.0)):
        with pytest.raises(ValueError, match="either a sparsity or a threshold"):
            calibrate(theta, keys, **both)


def test_the_rate_under_a_mask_is_its_law():
    """Of f = sum_i g_i theta_i, F_i = g_i^2: a step of rate lr moves lr * |m g|, and changes f by
    -lr * |m g|^2. Gradients (3, 4, 12), of which the mask keeps 3 and 4: 5^2 of 13^2."""
    share = sensitivity_share(torch.tensor([True, True, False]), torch.tensor([9.0, 16.0, 144.0]))
    assert share == pytest.approx(25 / 169)
    factors = [rate_factor(share, how) for how in ("matched", "functional", "raw")]
    assert factors == pytest.approx([13 / 5, 169 / 25, 1])  # the same move, the same change


def test_where_nothing_is_scored_the_share_is_the_density():
    mask = torch.arange(1000) < 10
    assert sensitivity_share(mask) == 0.01 and rate_factor(0.01) == pytest.approx(10)
    assert sensitivity_share(mask, torch.full((1000,), 3.0)) == pytest.approx(0.01)


def test_a_calibration_reports_its_rounds():
    theta, rounds = torch.arange(100.0), []
    keys = by("lowest-magnitude", theta.clone(), lambda: None)
    mask = calibrate(theta, keys, sparsity=0.75, rounds=2, report=rounds.append)
    assert [(r.round, r.of, r.alive, r.bar) for r in rounds] == [(1, 100, 50, 49), (2, 50, 25, 24)]
    assert rounds[0].quantiles == (1, 10, 50, 89, 98) and mask.sum() == 25


# ---------------------------------------------------------------------------- many clients

KEYS = [torch.tensor(k) for k in ([1.0, 2, 3, 9], [4.0, 1, 2, 9], [9.0, 1, 3, 2])]
ALL = torch.ones(4, dtype=torch.bool)


def keep_two(keys):
    return keep_lowest(keys, 2)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("mean", [(1 + 2 * 4 + 9) / 4, 5 / 4, 10 / 4, (9 + 2 * 9 + 2) / 4]),
        ("max", [9, 2, 3, 9]),
        ("median-rank", [2, 0, 2, 3]),
        ("vote", [4 + 2, 0, 4 + 1, 4 + 3]),  # votes 1, 3, 1, 1; the quorum is 2; rank by mean
    ],
)
def test_consensus_by_hand(how, expected):
    found = consensus(KEYS, [10, 20, 10], how, alive=ALL, keep=keep_two)
    assert found.tolist() == expected


def test_a_quorum_is_what_counts_as_a_vote():
    options = dict(alive=ALL, keep=keep_two)
    first = consensus(KEYS, [1, 1, 1], "vote", quorum=3, **options)
    assert first.tolist()[1] == 0 and all(first[[0, 2, 3]] >= 4)
    assert consensus(KEYS, [1, 1, 1], "vote", quorum=1, **options).max() < 4


def test_ranks_are_taken_among_those_alive():
    alive = torch.tensor([True, False, True, True])
    found = consensus(KEYS, [1, 1, 1], "median-rank", alive=alive, keep=keep_two)
    assert found[alive].tolist() == [1, 1, 2]


@pytest.mark.parametrize("how", CONSENSUS)
def test_one_client_is_its_own_consensus(how):
    keys = torch.randn(500)
    kept = lambda k: keep_lowest(k, 50)  # noqa: E731
    alive = torch.ones(500, dtype=torch.bool)
    found = consensus([keys], [7], how, alive=alive, keep=kept)
    assert torch.equal(kept(found), kept(keys))


def test_unknown_consensus_is_refused():
    with pytest.raises(ValueError, match="unknown consensus 'all'"):
        consensus(KEYS, [1, 1, 1], "all", alive=ALL, keep=keep_two)


def test_overlap_equals_its_definition_and_chance_is_chance():
    generator = torch.Generator().manual_seed(0)
    common = torch.rand(1_000_000, generator=generator) < 0.1
    flips = [
        [common ^ (torch.rand(common.shape, generator=generator) < 0.02) for _ in range(2)]
        for _ in range(3)
    ]
    found = overlap(flips)
    pairs = [(flips[j][0], flips[k][1]) for j, k in itertools.permutations(range(3), 2)]
    expected = [((a & b).sum() / (a | b).sum()).item() for a, b in pairs]
    assert found["iou"] == pytest.approx(sum(expected) / 6)
    own = [((a & b).sum() / (a | b).sum()).item() for a, b in flips]
    assert found["ceiling"] == pytest.approx(sum(own) / 3)
    assert found["matrix"][0][0] == pytest.approx(own[0])
    assert [found["matrix"][j][k] for j, k in itertools.permutations(range(3), 2)] == (
        pytest.approx(expected)
    )
    random = [[torch.rand(common.shape, generator=generator) < 0.2] * 2 for _ in range(2)]
    found = overlap(random)
    assert found["ceiling"] == 1 and found["chance"] == pytest.approx(0.2 / 1.8, abs=2e-3)
    assert found["iou"] == pytest.approx(found["chance"], abs=2e-3)  # a million entries
    assert overlap(random[:1])["iou"] is None


@pytest.mark.parametrize("size", [1, 7, 8, 1023])
def test_a_packed_mask_comes_back(size):
    mask = torch.rand(size) < 0.3
    bits = pack(mask)
    assert bits.dtype == torch.uint8 and len(bits) == math.ceil(size / 8)
    assert torch.equal(unpack(bits, size), mask)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Rule(lambda theta, scores, seed: scores * theta), "None without scores=True"),
        (Rule(lambda theta, scores, seed: theta[:2]), "a key for every entry"),
        (Rule(lambda theta, scores, seed: theta @ theta), "a key for every entry"),
    ],
)
def test_a_rule_of_ones_own_that_cannot_rank_is_told_why(monkeypatch, rule, said):
    monkeypatch.setitem(RULES, "mine", rule)
    with pytest.raises(ValueError, match=f"mask rule 'mine': .*{said}"):
        ranking("mine", torch.ones(3))


def test_a_share_is_of_a_mask_and_of_something():
    with pytest.raises(ValueError, match="a mask is bool, not torch.int64"):
        masks.sensitivity_share(torch.tensor([0, 1, 0]), torch.ones(3))
    with pytest.raises(ValueError, match="no entry has a sensitivity"):
        masks.sensitivity_share(torch.tensor([False, True]), torch.zeros(2))


@pytest.mark.parametrize("rule", ["least-sensitive", "most-sensitive"])
def test_a_rule_that_needs_scores_says_so(rule):
    with pytest.raises(ValueError, match="ranks by sensitivity: give scores"):
        masks.ranking(rule, torch.ones(3))


def test_calibration_takes_a_parameter_that_trains():
    theta = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    mask = masks.calibrate(theta, lambda alive, keep: theta.detach().clone(), sparsity=0.5)
    assert mask.tolist() == [True, True, False, False] and theta.tolist() == [1, 2, 3, 4]
