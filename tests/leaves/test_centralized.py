"""Schedules have their shapes; the loop stops at any batch and goes on to the same bits."""

import math

import pytest
import torch

from centralized import SCHEDULES, Centralized, learning_rate


def rates(schedule, warmup=0, total=100):
    return [learning_rate(schedule, t, total=total, lr=0.1, warmup=warmup) for t in range(total)]


def test_the_schedules_have_their_shapes():
    assert rates("constant") == [0.1] * 100
    step = rates("step")
    assert step[49] == 0.1 and step[50] == pytest.approx(0.01) and step[75] == pytest.approx(1e-3)
    exponential = rates("exponential")
    ratios = {round(b / a, 9) for a, b in zip(exponential, exponential[1:], strict=False)}
    assert ratios == {round(0.01 ** (1 / 100), 9)}
    cosine = rates("cosine")
    assert cosine[50] == pytest.approx(0.05) and 0 < cosine[99] < 1e-4
    assert cosine == sorted(cosine, reverse=True)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_to_the_full_rate(schedule):
    warm = rates(schedule, warmup=9)
    assert warm[:9] == pytest.approx([0.1 * (t + 1) / 10 for t in range(9)])
    assert warm[9] == 0.1 == max(warm)


@pytest.mark.parametrize("warmup", [-1, 100, 200, math.nan])
def test_bad_schedules_are_refused(warmup):
    with pytest.raises(ValueError, match="warm-up"):
        learning_rate("cosine", 0, total=100, lr=0.1, warmup=warmup)
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        learning_rate("linear", 0, total=100, lr=0.1)


def loop(fail_at=None, every=1):
    theta = torch.ones(2, dtype=torch.float64)
    calls = []

    def train(batch, at):
        calls.append(at)
        loss = (theta * batch).sum()
        theta.sub_(0.1 * torch.cos(theta * batch))
        return loss * (math.nan if len(calls) == fail_at else 1)

    def draw(epoch):
        generator = torch.Generator().manual_seed(epoch)
        return torch.randn(4, 2, generator=generator, dtype=torch.float64)

    return Centralized(draw, train, {"theta": theta}, every=every), theta, calls


@pytest.mark.parametrize("stop", range(1, 9))
def test_it_stops_at_any_batch_and_goes_on_to_the_same_bits(stop):
    whole, expected, times = loop()
    records = [whole.advance() for _ in range(8)]
    assert times == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]
    assert [r and r["epoch"] for r in records] == [None, None, None, 1, None, None, None, 2]
    first, _, _ = loop()
    for _ in range(stop):
        first.advance()
    state = first.state_dict()
    second, theta, _ = loop()
    second.load_state_dict(state)
    rest = [second.advance() for _ in range(8 - stop)]
    assert torch.equal(theta, expected)
    for mine, theirs in zip(rest, records[stop:], strict=True):
        assert (mine and mine["train_loss"]) == (theirs and theirs["train_loss"])


@pytest.mark.parametrize(
    ("every", "at"),
    [
        (0.5, [0.5, 1, 1.5, 2]),
        (0.25, [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]),
        (0.01, [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]),
        (0.3, [0.5, 0.75, 1, 1.5, 1.75, 2]),  # 0.3, 0.6 and 0.9 are reached by batches 2, 3 and 4
        (0.9, [1, 2]),
        (3, [1, 2]),
    ],
)
def test_records_come_where_a_batch_reaches_a_multiple_of_a_share_of_the_epoch(every, at):
    whole, process = loop()[0], loop(every=every)[0]
    records = [record for _ in range(8) if (record := process.advance())]
    assert [r["epoch"] for r in records] == at
    ends = {r["epoch"]: r["train_loss"] for _ in range(8) if (r := whole.advance())}
    spans = {1: 0.0, 2: 0.0}  # losses are those since the record before
    for before, record in zip([0, *at], records, strict=False):
        spans[math.ceil(record["epoch"])] += record["train_loss"] * (record["epoch"] - before)
    assert spans == pytest.approx(ends, rel=1e-12)


def test_the_last_batch_of_millions_is_still_in_its_epoch():
    many = torch.zeros(1).expand(4_000_000)
    first, second = (Centralized(lambda epoch: many, lambda batch, at: batch, {}) for _ in range(2))
    first.whole, first.step = 2, 3_999_999
    second.load_state_dict(first.state_dict())
    assert (second.whole, second.step, second.epoch) == (2, 3_999_999, 2.999999)
    state = {k: v for k, v in first.state_dict().items() if k != "whole"}
    second.load_state_dict(state | {"epoch": 2.5})  # as it was saved without
    assert second.whole == 2


def test_a_tenth_is_a_tenth_however_many_batches_an_epoch_has():
    for steps in range(10, 200):
        draw = lambda epoch, steps=steps: torch.zeros(steps, 1)  # noqa: E731
        process = Centralized(draw, lambda batch, at: batch.sum(), {}, every=0.1)
        found = [r["epoch"] for _ in range(steps) if (r := process.advance())]
        assert found == [round(-(-k * steps // 10) / steps, 6) for k in range(1, 11)], steps


@pytest.mark.parametrize("stop", range(1, 8))
def test_it_goes_on_to_the_same_bits_between_records_and_to_another_cadence(stop):
    whole, expected, _ = loop(every=0.5)
    records = [whole.advance() for _ in range(8)]
    for every in (0.5, 1):
        first, second = loop(every=every)[0], loop(every=0.5)
        for _ in range(stop):
            first.advance()
        second[0].load_state_dict(first.state_dict())
        assert second[0].epoch == first.epoch == stop / 4
        rest = [second[0].advance() for _ in range(8 - stop)]
        assert torch.equal(second[1], expected)
        assert [r and r["epoch"] for r in rest] == [r and r["epoch"] for r in records[stop:]]
        if every == 0.5:
            losses = [[r and r["train_loss"] for r in some] for some in (rest, records[stop:])]
            assert losses[0] == losses[1]


@pytest.mark.parametrize("every", [1, 0.25])
def test_a_diverged_state_is_named_and_not_saved(every):
    process, _, _ = loop(fail_at=6, every=every)
    for _ in range(5):
        process.advance()
    with pytest.raises(ValueError, match="epoch 2, step 2: the loss is nan"):
        process.advance()
        process.state_dict()


def test_the_tensors_may_be_a_models_own_parameters():
    model = torch.nn.Linear(2, 1)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)

    def train_batch(batch, at):
        optimiser.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimiser.step()
        return loss.detach()

    loop = Centralized(
        lambda epoch: torch.ones(3, 4, 2), train_batch, dict(model.named_parameters())
    )
    loop.advance()
    state = loop.state_dict()
    assert not state["tensors"]["weight"].requires_grad
    loop.advance()
    ended = model.weight.detach().clone()
    loop.load_state_dict(state)
    loop.advance()
    assert torch.equal(model.weight, ended)
