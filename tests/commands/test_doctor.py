"""doctor says what a command will cost, measured as the command would train."""

import json
import re
import time
from pathlib import Path

import pytest

from commands import doctor
from training.clients import Clients, HeadsTogether

TINY = ("fedavg", "--data", "synthetic", "--rounds", 2, "--clients", 10, "--fraction", 0.3)
TINY = (*TINY, "--batch-size", 8)


@pytest.mark.parametrize("options", [(), ("--train", "head"), ("--nc", 5, "--train", "blocks.1")])
def test_doctor_says_what_a_command_will_cost(cli, small_data, options):
    command = ("doctor", "--json", "d.json", *TINY, "--rounds", 50, *options)
    status, out, err = cli(*command)
    assert status == 0, err
    figures = json.loads((small_data / "d.json").read_text())
    assert figures["seconds_a_round"] == pytest.approx(3 * figures["seconds_a_client"], rel=1e-3)
    least = 50 * figures["seconds_a_round"]
    assert least < figures["seconds_in_all"] < 2 * least + 100 * figures["seconds_an_evaluation"]
    assert "seconds a round" in out and "time in all" in out
    counted = ["features for the head"] if "head" in options else []
    assert figures["not_counted"] == counted
    assert re.search(rf"not counted +{', '.join(counted) or 'nothing'}", out)
    assert figures["cuda_graph"].startswith("off (")
    assert not (small_data / "runs").exists() and not (small_data / "data").exists()
    assert cli("doctor", "ridge")[0] == 2


def figures_of(cli, *options):
    """Return the figures that doctor tells of a command."""
    status, _, err = cli("doctor", "--json", "d.json", *TINY, *options)
    assert status == 0, err
    return json.loads(Path("d.json").read_text())


def test_doctor_times_a_mask_of_the_commands_sparsity(cli, learners):
    rule = ("--mask-rule", "least-sensitive", "--sparsity", 0.8, "--mask-scope", "blocks.*.weight")
    figures, learner = figures_of(cli, "--head", "ridge", *rule), learners[-1]
    scoped = sum(p.numel() for n, p in learner.model.named_parameters() if n in learner.mask.shapes)
    assert figures["parameters"] == learner.entries.size == round(0.2 * scoped) < 71_668
    assert all(name.startswith("blocks.") for name in learner.mask.shapes)
    made = ("--mask-rule", "random", "--sparsity", 0.99, "--name", "m")
    assert cli("calibrate", "--data", "synthetic", *made)[0] == 0
    figures = figures_of(cli, "--head", "ridge", "--mask", "runs/m/mask.pt")
    assert figures["parameters"] == learners[-1].mask.origin["kept"] < 700
    threshold = ("--mask-rule", "least-sensitive", "--threshold", 1e-6)
    figures = figures_of(cli, "--head", "ridge", *threshold)
    assert learners[-1].mask is None
    assert figures["not_counted"] == ["features for the head", "calibration"]


def test_doctor_counts_clipping_a_client_and_noise_a_round(cli, small_data, monkeypatch):
    pytest.importorskip("dp_accounting")
    monkeypatch.setattr(doctor.privacy, "clip_factor", lambda *a, **k: time.sleep(0.1))
    monkeypatch.setattr(doctor.privacy, "add_noise_", lambda *a, **k: time.sleep(0.2))
    figures = figures_of(cli, "--dp-noise", 1, "--dp-clip", 0.1)
    spent = figures["seconds_a_round"] - 3 * figures["seconds_a_client"]
    assert 0.5 <= spent < 2  # three clients, one round


def test_doctor_times_heads_as_the_command_trains_them(cli, small_data, monkeypatch):
    trained = []
    for kind in (Clients, HeadsTogether):
        way = kind.__call__
        record = lambda *a, kind=kind, way=way: trained.append(kind) or way(*a)  # noqa: E731
        monkeypatch.setattr(kind, "__call__", record)
    figures = figures_of(cli, "--train", "head", "--batch-size", "full")
    assert set(trained) == {Clients}
    one_by_one = figures["images_a_second"] * figures["seconds_a_client"]
    assert one_by_one == pytest.approx(4 * 4500, rel=1e-3)
    trained.clear()
    figures_of(cli, "--train", "head")
    assert set(trained) == {HeadsTogether}
