"""doctor says what a command will cost, measured as the command would train."""

import json
import time
from pathlib import Path

import pytest
from built import parsed

from commands import doctor, trial
from commands.costs import Costs
from training import probe
from training.clients import Clients, HeadsTogether

TINY = ("fedavg", "--data", "synthetic", "--rounds", 2, "--clients", 10, "--fraction", 0.3)
TINY = (*TINY, "--batch-size", 8)
MEASURED = ("client's local steps", "evaluation", "matrix products and copies")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short measurements: what they come to is no matter here."""
    monkeypatch.setattr(trial, "WHILE", 0.1)
    monkeypatch.setattr(trial, "SLOW", 1e9)
    monkeypatch.setattr(probe, "LONGEST", 1e9)
    monkeypatch.setattr(probe, "FITTED", 200)


def figures_of(cli, *options, command=TINY):
    """Return the figures that doctor tells of a command, and what it prints."""
    status, out, err = cli("doctor", "--json", "d.json", *command, *options)
    assert status == 0, err
    return json.loads(Path("d.json").read_text()), out, err


@pytest.mark.parametrize("options", [(), ("--nc", 5, "--train", "blocks.1")])
def test_doctor_says_what_a_command_will_cost(cli, small_data, options):
    figures, out, err = figures_of(cli, "--rounds", 50, *options)
    assert figures["round_seconds"] == pytest.approx(3 * figures["client_seconds"], rel=2e-3)
    parts = figures["parts_seconds"]
    assert parts["training"] == pytest.approx(50 * figures["round_seconds"], rel=2e-3)
    assert parts["evaluations"] > 2 * figures["evaluation_seconds"]
    assert figures["total_seconds"] == pytest.approx(sum(parts.values()), rel=2e-3)
    of_a_round = figures["round_parts_seconds"]
    assert sum(of_a_round.values()) >= 0.99 * figures["round_seconds"] > 0
    reached = figures["round_tflop"] / figures["round_seconds"]
    share = reached / figures["product_rate_tflop_per_second"]
    assert figures["share_of_product_rate"] == pytest.approx(share, rel=2e-3)
    of_memory = (f"{part}_share_of_memory_rate" for part in ("optimiser", "average"))
    assert all(figures[name] > 0 for name in of_memory)
    said = (
        "a round  ",
        "images/s",
        "of what this machine's matrix products reach, measured just now",
    )
    assert all(words in out for words in (*said, "time in all")) and "passes" not in out
    assert all(f"measuring a {what}" in err or what in err for what in MEASURED)
    slow = doctor.described(figures | {"images_per_second": 0.79})
    assert any(text.endswith("so 0.8 images/s") for _, text in slow)
    assert figures["cuda_graph"].startswith("off (")
    assert not (small_data / "runs").exists() and not (small_data / "data").exists()


def test_doctor_names_what_would_be_faster(cli, small_data):
    figures, *_ = figures_of(cli)
    assert figures["bf16_to_product_rate"] > 0 and figures["smaller_job_to_operations"] > 1
    slow = {"total_seconds": 1e6, "bf16_to_product_rate": 2.0, "smaller_job_to_operations": 0.02}
    lines = dict(doctor.described(figures | slow))
    assert lines["--precision bf16"] == "its matrix products are 2.0 times as fast"
    smaller = "--model vit_ti16 --image-size 64 has 1/50 of the operations an image, by count"
    assert lines["a smaller job"] == smaller
    short = dict(
        doctor.described(figures | slow | {"total_seconds": 60, "bf16_to_product_rate": 1})
    )
    assert not {"--precision bf16", "a smaller job"} & short.keys()
    large = dict(doctor.described(figures | {"total_seconds": 1e6}))
    assert "a smaller job" not in large  # its model is the larger one
    half, *_ = figures_of(cli, "--precision", "bf16")
    assert "bf16_to_product_rate" not in half


def test_doctor_serves_the_other_commands(cli, small_data):
    data = ("--data", "synthetic")
    central, out, _ = figures_of(cli, "--epochs", 3, command=("centralized", *data, "--B", 32))
    steps = -(-18_000 // 32)  # of an epoch: nine tenths of 20,000 images train
    training = central["parts_seconds"]["training"]
    assert training == pytest.approx(3 * steps * central["step_seconds"], rel=2e-3)
    assert "the step reaches" in out and "averaging" not in out and "round_seconds" not in central
    ridge, *_ = figures_of(cli, command=("ridge", *data))
    assert ridge["parts_seconds"].keys() == {"features", "head"}
    features = 1e-3 * ridge["feature_milliseconds_an_image"] * 25_000
    assert ridge["parts_seconds"]["features"] == pytest.approx(features, rel=2e-3)
    few = ("--calibration-images", 40, "--clients", 10)
    calibrate, *_ = figures_of(cli, command=("calibrate", *data, *few))
    assert calibrate["parts_seconds"].keys() == {"features", "head", "calibration"}
    images = 4 * 40 + 2 * 40  # rounds, and clients compared
    scoring = 1e-3 * calibrate["scoring_milliseconds_an_image"] * images
    assert calibrate["parts_seconds"]["calibration"] == pytest.approx(scoring, rel=2e-3)
    status, _, err = cli("doctor", "sweep")
    assert status == 2 and "not 'sweep'" in err


def test_the_costs_of_a_command_are_those_of_others_like_it():
    price = Costs(1e-3, 2.0, 1e-2, step=0.1, client=0.05, round=1.0)
    price = price._replace(evaluation=1e-4)
    o = parsed("fedavg", "--rounds", 10, "--J", 4, "--eval-every", 5).stored
    assert price.parts(o) == pytest.approx(
        dict(features=0, head=0, calibration=0, search=0, training=10 * (10 * 0.45 + 1))
        | dict(evaluations=(3 * 2_000 + 2 * 5_000) * 1e-4)
    )
    masked = ("--mask-rule", "least-sensitive", "--calibration-images", 2000)
    parts = price.parts(parsed("fedavg", "--rounds", 10, *masked).stored)
    assert parts["calibration"] == pytest.approx(4 * 2000 * 1e-2)
    assert parts["features"] == pytest.approx(25_000 * 1e-3) and parts["head"] == 2
    search = ("--search", "--search-lr", 1, 2, 3, "--search-weight-decay", 0, "--search-length", 5)
    searched = price.parts(parsed("fedavg", "--rounds", 10, "--eval-every", 5, *search).stored)
    assert searched["search"] == pytest.approx(2 * (5 * 5.5 + 2 * 0.2))
    assert price.total(o) == pytest.approx(sum(price.parts(o).values()))


def test_a_slow_machine_takes_smaller_steps_and_scales_them(cli, small_data, monkeypatch):
    whole, *_ = figures_of(cli)
    monkeypatch.setattr(probe, "LONGEST", 0.0)
    parts, *_ = figures_of(cli)
    assert (whole["images_a_timed_step"], parts["images_a_timed_step"]) == (8, 1)
    assert parts["images_a_step"] == 8
    assert parts["step_seconds"] > 0
    monkeypatch.setattr(trial, "SLOW", 0.0)
    monkeypatch.setattr(probe, "evaluation", lambda *given: pytest.fail("timed"))
    figures, out, _ = figures_of(cli)
    assert figures["evaluation_seconds"] > 0 and figures["only_a_step_was_timed"]
    assert "only a training step was timed" in out


def test_doctor_times_a_mask_of_the_commands_sparsity(cli, learners):
    rule = ("--mask-rule", "least-sensitive", "--sparsity", 0.8, "--mask-scope", "blocks.*.weight")
    few = ("--calibration-images", 10)
    figures, learner = figures_of(cli, "--head", "ridge", *rule, *few)[0], learners[-1]
    scoped = sum(p.numel() for n, p in learner.model.named_parameters() if n in learner.mask.shapes)
    assert figures["trained_parameters"] == learner.entries.size == round(0.2 * scoped) < 71_668
    assert "optimiser_share_of_memory_rate" not in figures  # its entries lie scattered
    assert all(name.startswith("blocks.") for name in learner.mask.shapes)
    made = ("--mask-rule", "random", "--sparsity", 0.99, "--name", "m")
    assert cli("calibrate", "--data", "synthetic", *made)[0] == 0
    figures, *_ = figures_of(cli, "--head", "ridge", "--mask", "runs/m/mask.pt")
    assert figures["trained_parameters"] == learners[-1].mask.origin["kept"] < 700
    threshold = ("--mask-rule", "least-sensitive", "--threshold", 1e-6, *few)
    figures, *_ = figures_of(cli, "--head", "ridge", *threshold)
    assert learners[-1].mask is None
    assert {"features", "head", "calibration"} <= figures["parts_seconds"].keys()


def test_doctor_counts_clipping_a_client_and_noise_a_round(cli, small_data, monkeypatch):
    pytest.importorskip("dp_accounting")
    monkeypatch.setattr(trial.privacy, "clip_factor", lambda *a, **k: time.sleep(0.1))
    monkeypatch.setattr(trial.privacy, "add_noise_", lambda *a, **k: time.sleep(0.2))
    figures, *_ = figures_of(cli, "--dp-noise", 1, "--dp-clip", 0.1)
    spent = figures["round_seconds"] - 3 * 4 * figures["step_seconds"]
    assert 0.5 <= spent < 2  # three clients, one round


def test_doctor_times_heads_as_the_command_trains_them(cli, small_data, monkeypatch):
    trained = []
    for kind in (Clients, HeadsTogether):
        way = kind.__call__
        record = lambda *a, kind=kind, way=way: trained.append(kind) or way(*a)  # noqa: E731
        monkeypatch.setattr(kind, "__call__", record)
    figures, *_ = figures_of(cli, "--train", "head", "--batch-size", "full")
    assert set(trained) == {Clients}
    assert figures["images_a_step"] == 1800
    assert figures["parts_seconds"]["features"] > 0
    trained.clear()
    figures, *_ = figures_of(cli, "--train", "head")
    assert set(trained) == {HeadsTogether} and "round_parts_seconds" not in figures
