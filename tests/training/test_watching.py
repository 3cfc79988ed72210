"""What a run says while it goes on, and what looks wrong in it."""

import math
from types import SimpleNamespace

import pytest
import torch

from training.watching import Evaluated, chance_advice, end_advice, end_figures, head_note

CHANCE = math.log(100)


def evaluated(losses, total, capsys, classes=100, start=0):
    """Return what goes to stderr over rounds of these losses."""
    rounds = Evaluated(dict, "round", total, total, {}, classes=classes)
    rounds({"round": start})
    for at, loss in enumerate(losses, start + 1):
        rounds({"round": at, "train_loss": loss})
    return capsys.readouterr().err


def test_a_loss_at_chance_for_a_tenth_of_the_run_is_told_once(capsys):
    said = evaluated([CHANCE + 0.01, CHANCE - 0.01, *[1.0] * 18], 20, capsys)
    assert said.count("warning:") == 1 and "at chance (ln 100 = 4.61): try a higher --lr" in said
    said = evaluated([9.0, CHANCE, 1.0], 20, capsys)
    assert "6.80 on average, is above chance" in said and "try a lower --lr" in said
    assert "warning" not in evaluated([CHANCE, 3.0], 20, capsys)
    assert "warning" not in evaluated([CHANCE] * 4, 50, capsys)  # not a tenth
    assert "warning" not in evaluated([CHANCE] * 9, 50, capsys, start=20)  # resumed later


@pytest.mark.parametrize(
    ("accuracies", "said"),
    [
        ((0.01, 0.012), "ends at chance, 1.20 %"),
        ((0.30, 0.01), "it is too short, or its steps are too long: try --lr 0.01"),
        ((0.30, 0.29), "ends at 29.00 % on validation, below the 30.00 %"),
        ((0.30, 0.31), ""),
        ((0.01,), ""),
    ],
)
def test_an_end_at_chance_or_below_the_start_is_told(accuracies, said):
    records = [{"round": t, "val_acc": acc} for t, acc in enumerate(accuracies)]
    advice = end_advice([*records[:1], {"note": ""}, *records[1:]], 100, 5000, 0.1)
    assert said in advice and bool(said) == bool(advice)


def test_a_loss_that_is_no_number_is_above_chance():
    assert "lower --lr" in chance_advice([math.nan], 10)


def test_a_frozen_head_is_told_of():
    assert "--no-freeze-head" in head_note("ridge", True, False)
    assert "mask" in head_note("probe", True, True)
    assert head_note("linear", False, False) == head_note("ridge", False, False) == ""


def test_the_test_set_is_looked_at_for_the_last_and_the_best_weights():
    learner = SimpleNamespace(
        entries=torch.zeros(2), evaluate=lambda sets: {"test_acc": loaded[-1]}
    )
    loaded = []
    learner.entries = SimpleNamespace(load=lambda theta: loaded.append(theta[0].item()))
    last, best = torch.tensor([0.5, 0.0]), torch.tensor([0.75, 0.0])
    assert end_figures(learner, last, best) == ({"test_acc": 0.5}, {"test_acc": 0.75})
    assert loaded == [0.75, 0.5]  # the last ones stay
    loaded.clear()
    assert end_figures(learner, last, last.clone()) == ({"test_acc": 0.5}, {"test_acc": 0.5})
    assert len(loaded) == 1 and end_figures(learner, last, None)[1] == {}


def test_the_last_weights_may_be_those_that_the_learner_holds():
    theta, best = torch.ones(2), torch.zeros(2)  # as centrally: loading changes them
    entries = SimpleNamespace(load=theta.copy_)
    learner = SimpleNamespace(entries=entries, evaluate=lambda sets: {"test_acc": theta[0].item()})
    assert end_figures(learner, theta, best) == ({"test_acc": 1.0}, {"test_acc": 0.0})
    assert theta.equal(torch.ones(2))
