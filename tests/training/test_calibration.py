"""From options to a mask, and training under it: what is frozen stays, what is sent is counted."""

import json
import math
import os

import numpy as np
import pytest
import torch
from built import build, build_loop, parsed
from conftest import assert_frozen_stayed
from loops import run
from past import records, theta

import flat
import masks
from fisher import fisher_diagonal
from machine import safe_files
from machine.runs import Run
from training import calibration, mask_cache
from training.agreement import agreement, group_agreement
from training.calibration import Calibration, replay_on, score_dtype
from training.features import set_fitted_head
from training.mask_cache import cached_mask
from training.mask_file import Mask, by_kind, density_table
from training.workspace import Workspace

DATA = ("--data", "synthetic", "--clients", 10)
LOOP = ("--clients", 10, "--fraction", 0.2, "--batch-size", 8, "--J", 2)
TINY = ("fedavg", "--data", "synthetic", "--rounds", 2, "--eval-every", 2, *LOOP)
CENTRAL = ("centralized", "--data", "synthetic", "--val-fraction", 0.5, "--epochs", 1)
HEAD = ("--head", "ridge")
FEW = (*HEAD, "--head-images", 100)  # quick, and so small a head that little trains under it
MASK = (*HEAD, "--mask-rule", "least-sensitive", "--calibration-images", 40)
SPARSE = (*TINY, *MASK)
CALIBRATE = ("calibrate", *DATA, "--calibration-images", 40)
QUICK = ("--calibration-rounds", 1)


def prepare(folder, *arguments):
    """Return a calibration of the synthetic data's clients."""
    o = parsed("calibrate", "--data-dir", folder, "--clients", 10, *arguments).groups
    workspace = Workspace(o.source, o.machine, o.backbone, sharding=o.sharding)
    model = workspace.build_model()
    set_fitted_head(workspace, model, o.scoring_head.head, o.scoring_head.head_images)
    return Calibration(workspace, model, o.masking)


def test_a_mask_within_query_and_key_weights_has_the_budget_of_the_whole(small_data):
    within = ("--mask-within", "query.weight", "key.*", "--mask-rule", "random")
    mask = prepare(small_data, *within, "--sparsity", 0.95).make()
    pieces = by_kind(mask.shapes, mask.trains)
    assert {kind for _, kind, piece in pieces if piece.any()} == {
        "query.weight",
        "key.weight",
        "key.bias",
    }
    assert mask.trains.sum() == masks.budget(len(mask.trains), 0.95)


@pytest.mark.parametrize("labels", ["sampled", "true"])
def test_federated_calibration_by_all_clients_is_the_central_one(small_data, labels):
    options = ("--calibration-images", 300, "--fisher-labels", labels)
    many, central = prepare(small_data, *options), prepare(small_data, *options, "--clients", 1)
    index = {int(k): many.images(k) for k in many.clients}
    pooled = np.concatenate(list(index.values()))
    assert len(index) == 10 and len(np.unique(pooled)) == 300
    each = (many.client_keys(i) for i in index.values())
    everything = torch.ones_like(many.theta, dtype=torch.bool)
    weights = [len(many.shards[k]) for k in index]
    scores = masks.consensus(each, weights, alive=everything, keep=None)
    expected = central.sensitivity(pooled)
    assert (scores - expected).norm() / expected.norm() < 1e-5


def test_calibration_reads_training_shards_and_never_validation(small_data):
    calibration = prepare(small_data, "--nc", 10, "--calibration-images", 35)
    for k in calibration.clients:
        images = calibration.images(k)
        assert len(images) == 3 and np.isin(images, calibration.shards[k]).all()
        assert not np.isin(images, calibration.workspace.val_index).any()


def test_scores_are_those_of_the_damped_network_and_the_weights_come_back(small_data):
    options = ("--sparsity", 0.8, "--calibration-rounds", 2, "--calibration-images", 40)
    calibration = prepare(small_data, *options)
    model, score = calibration.model, calibration.sensitivity
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = []

    def spy(index):
        seen.append(model.blocks[0].attn.qkv.weight.detach().clone())
        return score(index)

    calibration.sensitivity = spy
    mask = calibration.make()
    assert len(seen) == 20 and mask.origin["kept"] == mask.trains.sum() == round(
        0.2 * len(mask.trains)
    )
    original = before["blocks.0.attn.qkv.weight"]
    assert torch.equal(seen[0], original)
    changed = seen[-1] != original
    assert changed.any() and torch.equal(seen[-1][changed], (original * 0.1)[changed])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_the_clients_scores_are_the_librarys(small_data):
    calibration = prepare(small_data, "--mask-scope", "blocks.1.*", "--calibration-images", 300)
    index, names = calibration.images(3), calibration.names
    at = torch.from_numpy(index)
    images = calibration.workspace.sets["train"].images[at]
    batch = (calibration.preprocess(images), calibration.uniform[at])
    expected = fisher_diagonal(calibration.model, [batch], parameters=names)
    assert all(name.startswith("blocks.1.") for name in names) and len(names) == 12
    scores = torch.cat([expected[n].flatten() for n in names])
    assert torch.equal(calibration.sensitivity(index), scores)


# ---------------------------------------------------------------------------- precision of scores


def test_scores_are_taken_in_half_precision_where_a_gpu_trains_in_one():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for half in (torch.bfloat16, torch.float16):
        assert score_dtype("auto", half, gpu) == torch.float16
        assert score_dtype("fp32", half, gpu) == score_dtype("auto", half, cpu) == torch.float32
    assert score_dtype("auto", torch.float32, gpu) == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_makes_nearly_the_mask_of_fp32(small_data, monkeypatch, recwarn, dtype):
    options = ("--calibration-images", 300, "--fisher-labels", "true", *QUICK)
    exact = prepare(small_data, *options)
    monkeypatch.setattr(calibration, "score_dtype", lambda name, training, device: dtype)
    half = prepare(small_data, *options)
    masks_made = [made.make() for made in (exact, half)]
    assert overlap_of(*masks_made) > 0.95  # by chance 0.05
    assert [m.origin["score_precision"] for m in masks_made] == ["float32", str(dtype)[6:]]
    assert not [w for w in recwarn if "one by one" in str(w.message)]
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.scored.head.weight.dtype == torch.float32
    assert half.scored.blocks[0].attn.qkv.weight.dtype == dtype


def test_the_graph_option_reaches_the_scoring_on_a_gpu(cli, small_data, monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert replay_on(gpu, "off") is None is replay_on(cpu, "auto")
    for mode in ("auto", "on"):
        step = replay_on(gpu, mode)(step=torch.add, state=[])
        assert (step.mode, step.device) == (mode, gpu)
    modes = []
    monkeypatch.setattr(calibration, "replay_on", lambda device, mode: modes.append(mode))
    assert cli(*CALIBRATE, *QUICK, "--cuda-graph", "off", "--name", "c")[0] == 0
    assert cli(*SPARSE, *QUICK, "--fresh", "--cuda-graph", "off", "--name", "f")[0] == 0
    assert modes == ["off", "off"]


def overlap_of(first, second):
    both, either = first.trains & second.trains, first.trains | second.trains
    return (both.sum() / either.sum()).item()


def test_fp16_scores_out_of_range_are_taken_in_fp32(small_data, monkeypatch, capsys):
    exact = prepare(small_data, *QUICK)
    monkeypatch.setattr(calibration, "score_dtype", lambda *given: torch.float16)
    scales = ((torch.float16, 2.0**40), (torch.float16, 2.0**30), (torch.float32, 1.0))
    monkeypatch.setattr(calibration, "FP16_ATTEMPTS", scales)
    wide, index = prepare(small_data, *QUICK), exact.images(0)
    assert torch.equal(wide.sensitivity(index), exact.sensitivity(index))
    assert "scoring goes on in fp32" in capsys.readouterr().err
    assert wide.score_precision == "float32"


def test_a_kept_mask_is_of_its_precision(small_data, monkeypatch):
    options = ("--calibration-images", 40, *QUICK)
    cached_mask(prepare(small_data, *options))
    cached_mask(prepare(small_data, *options, "--score-precision", "fp32"))  # the same on a CPU
    files = set((small_data / "masks").iterdir())
    assert len(files) == 1
    monkeypatch.setattr(calibration, "score_dtype", lambda *given: torch.bfloat16)
    cached_mask(prepare(small_data, *options))
    assert len(set((small_data / "masks").iterdir()) - files) == 1


def test_a_mask_file_holds_all_of_the_mask(small_data, tmp_path):
    mask = prepare(small_data, "--sparsity", 0.7, "--calibration-images", 10).make()
    mask.save(tmp_path / "deep" / "mask.pt")
    model = prepare(small_data).model
    again = Mask.load(tmp_path / "deep" / "mask.pt", model)
    assert again.sha256 == mask.sha256 and again.origin == mask.origin
    assert again.origin["mask_rule"] == "least-sensitive" and again.origin["sparsity"] == 0.7
    assert mask.bytes == math.ceil(len(mask.trains) / 8)
    kinds, layers, density = density_table(mask)
    parts = mask.parts()
    shown = [
        density[kinds.index(f"{k}.weight"), layers.index("1")] for k in ("query", "key", "value")
    ]
    thirds = parts["blocks.1.attn.qkv.weight"].chunk(3)
    assert shown == [part.double().mean().item() for part in thirds]
    assert np.isnan(density[kinds.index("cls_token"), layers.index("0")])
    assert sum(int(part.sum()) for part in parts.values()) == mask.origin["kept"]


# ---------------------------------------------------------------------------- training under it


@pytest.mark.parametrize("sparsity", [0.9, pytest.param(0.2, marks=pytest.mark.slow)])
def test_frozen_entries_keep_their_bits_through_a_central_run(
    cli, small_data, learners, monkeypatch, sparsity
):
    rates, step = set(), flat.Entries.step

    def recorded(entries, lr, **settings):
        rates.add(lr)
        step(entries, lr, **settings)

    monkeypatch.setattr(flat.Entries, "step", recorded)
    options = ("--sparsity", sparsity, "--lr", 0.01, "--weight-decay", 0.1, "--nesterov")
    status, _, err = cli(*CENTRAL, *MASK, *QUICK, *options, "--name", "s")
    assert status == 0, err
    (learner,) = learners
    assert_frozen_stayed(learner)
    (rate,) = rates
    assert rate == pytest.approx(0.01 * learner.mask.rate_factor("matched"))
    assert torch.equal(theta(small_data / "runs" / "s"), learner.entries.theta)


def test_compact_and_dense_steps_give_the_same_bits(small_data, monkeypatch):
    ends = []
    for below in (1.0, 0.0):
        monkeypatch.setattr(flat, "COMPACT_BELOW", below)
        options = (*MASK, *QUICK, "--sparsity", 0.5, "--weight-decay", 1e-3)
        learner, loop = build_loop(small_data, *LOOP, *options)
        assert learner.entries.compact == (below == 1.0)
        ends.append((loop.theta, run(loop, 2)))
    (compact, log), (dense, dense_log) = ends
    assert torch.equal(compact, dense) and log == dense_log


def test_a_mask_that_keeps_everything_trains_as_no_mask_does(small_data):
    logs = []
    for folder, mask in (("mask", (*MASK, *QUICK, "--sparsity", 0)), ("none", HEAD)):
        (small_data / folder).mkdir()
        learner, loop = build_loop(small_data / folder, *LOOP, *mask, "--lr", 1e-5)
        start = learner.evaluate()
        losses = [record["train_loss"] for record in run(loop, 2)]
        learner.entries.load(loop.theta)
        logs.append([*losses, end := learner.evaluate()])
        assert abs(end["val_loss"] - start["val_loss"]) > 1e-3
    assert logs[0] == logs[1]


def test_tensors_that_are_frozen_throughout_take_no_gradient(small_data):
    scope = ("--mask-scope", "blocks.1.mlp.*", "--sparsity", 0.5)
    learner, clients = build(small_data, *MASK, *QUICK, *scope)
    assert set(learner.flat.shapes) <= {
        f"blocks.1.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    seen = []
    hook = learner.model.blocks[0].register_full_backward_hook(lambda *_: seen.append(1))
    clients.train_client(learner.entries.theta.clone(), 3, round=1)
    hook.remove()
    assert not seen  # the backward pass ends above block 0


def test_the_rate_follows_the_sensitivity_that_the_mask_keeps(cli, small_data):
    options = (*TINY, *FEW, *QUICK, "--mask-rule", "least-sensitive", "--calibration-images", 40)
    calibration = prepare(small_data, "--head-images", 100, *QUICK, "--calibration-images", 40)
    scores = calibration.client_keys  # of one round: the mask ranks the scores of the network as is
    weights = torch.tensor([len(calibration.shards[k]) for k in calibration.clients])
    each = [scores(calibration.images(k)) * len(calibration.shards[k]) for k in calibration.clients]
    mean = (sum(each) / weights.sum()).double()
    share = (mean.sort().values[: round(0.1 * len(mean))].sum() / mean.sum()).item()
    status, out, err = cli(*options, "--mask-lr", "functional", "--lr", 1e-6, "--name", "x")
    assert status == 0, err
    first = Run(small_data / "runs" / "x").records()[0]
    summary = json.loads((small_data / "runs" / "x" / "summary.json").read_text())
    expected = {"lr": 1e-6 / share, "lr_factor": 1 / share, "sensitivity_share": share}
    for name, value in expected.items():
        assert first[name] == summary[name] == pytest.approx(value, rel=1e-4), name
    (said,) = (line for line in out.splitlines() if line.startswith("lr 1e-06 x "))
    assert f"= {1e-6 / share:.4g}: --mask-lr functional" in said


@pytest.mark.parametrize("rule", ["random", "least-sensitive"])
def test_the_rate_that_clients_step_by_is_the_masked_one(small_data, rule):
    rates = ("--lr", 0.01, "--schedule", "cosine", "--warmup", 0)
    scored = ("--calibration-images", 40, *QUICK) * (rule != "random")
    masked = (*LOOP, *FEW, "--rounds", 2, *rates, "--mask-rule", rule, *scored)
    learner, clients = build(small_data, *masked)
    raw = build(small_data, *masked, "--mask-lr", "raw")[1]
    factor = learner.mask.rate_factor("matched")
    assert factor > 3.1 and [clients.lr(t) for t in (1, 2)] == pytest.approx(
        [raw.lr(t) * factor for t in (1, 2)]
    )
    if rule == "random":
        kept, size = learner.mask.origin["kept"], len(learner.mask.trains)
        assert factor == pytest.approx(math.sqrt(size / kept))


@pytest.mark.parametrize("consensus", ["vote", "max"])
def test_the_share_is_of_mean_scores_whatever_the_consensus(small_data, consensus):
    options = ("--mask-rule", "least-sensitive", "--calibration-images", 40, *QUICK)
    calibration = prepare(small_data, *options, "--consensus", consensus)
    mask = calibration.make()
    sizes = [len(calibration.shards[k]) for k in calibration.clients]
    scores = [calibration.sensitivity(calibration.images(k)).double() for k in calibration.clients]
    mean = sum(n * s for n, s in zip(sizes, scores, strict=True))
    share = (mean[mask.trains].sum() / mean.sum()).item()
    assert mask.origin["sensitivity_share"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("rule", ["random", "least-sensitive"])
def test_a_mask_file_of_an_older_version_goes_by_its_density(cli, small_data, rule):
    path = save_mask(small_data, 0.75)
    content = safe_files.load_checked(path)
    content["made"]["mask_rule"] = rule
    del content["made"]["sensitivity_share"]
    safe_files.save_checked(path, content)
    status, out, err = cli(*TINY, *FEW, "--mask", path, "--lr", 1e-6)
    assert status == 0, err
    assert "lr 1e-06 x 2 = 2e-06: --mask-lr matched, as the mask keeps 25 % of the entries" in out
    assert ("its file is older" in out) == (rule != "random")


def test_a_mask_of_what_the_output_does_not_depend_on_has_no_matched_rate(cli, small_data):
    path = save_mask(small_data, 0.75)
    content = safe_files.load_checked(path)
    content["made"]["sensitivity_share"] = 0.0
    safe_files.save_checked(path, content)
    status, _, err = cli(*TINY, *FEW, "--mask", path)
    assert status == 2 and "--mask-lr matched: nothing that the output depends on trains" in err
    assert cli(*TINY, *FEW, "--mask", path, "--mask-lr", "raw")[0] == 0


def test_a_calibration_says_what_each_round_came_to(small_data, capsys):
    options = ("--sparsity", 0.75, "--calibration-rounds", 2, "--calibration-images", 40)
    calibration = prepare(small_data, "--mask-rule", "most-sensitive", *options)
    capsys.readouterr()
    mask = calibration.make()
    first, last = capsys.readouterr().out.splitlines()
    assert "calibration round 1: 33,384 of 66,768 weights stay alive, scores from" in first
    assert "calibration round 2: 16,692 of 33,384 weights stay alive, scores from" in last
    assert "below" not in last
    steps = mask.origin["rounds"]
    levels = [-key for key in reversed(steps[0]["quantiles"])]  # of the scores, rising
    assert f"50 % below {levels[2]:.3g}" in first and f"99 % below {levels[4]:.3g}" in first
    assert levels == sorted(levels)
    assert -steps[0]["bar"] == pytest.approx(levels[2], rel=1e-3)  # half of them stay alive
    threshold = -steps[0]["bar"]  # what the line says makes the mask that it speaks of
    options = ("--threshold", threshold, *QUICK, "--calibration-images", 40)
    again = prepare(small_data, "--mask-rule", "most-sensitive", *options).make()
    assert again.origin["kept"] == steps[0]["alive"] == 33_384


@pytest.mark.parametrize("rule", ["random", "vote"])
def test_a_calibration_whose_keys_are_no_scores_shows_none(small_data, capsys, rule):
    vote = ("--mask-rule", "least-sensitive", "--consensus", "vote", *QUICK)
    options = vote if rule == "vote" else ("--mask-rule", "random")
    prepare(small_data, *options, "--calibration-images", 40).make()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "calibration round 1: 6,677 of 66,768 weights stay alive"
    )


def test_options_that_a_rule_does_not_use_are_ignored_in_one_line(capsys):
    idle = ("--calibration-images", 100, "--damp", 0.5, "--quorum", 3)
    line = parsed("fedavg", "--mask-rule", "random", *idle)
    said = "--calibration-images, --damp, --quorum: ignored, as --mask-rule random scores nothing\n"
    assert capsys.readouterr().out == said
    assert line.name == parsed("fedavg", "--mask-rule", "random").name
    parsed("fedavg", "--mask-rule", "least-sensitive", *idle[:4])
    assert not capsys.readouterr().out


def test_every_line_of_the_log_counts_what_was_sent(cli, small_data):
    status, out, _ = cli(*SPARSE, "--sparsity", 0.9, "--nc", 10, "--name", "a")
    folder = small_data / "runs" / "a"
    size = 66768  # of vit_demo's backbone
    count = round(0.1 * size)
    first, *rounds = Run(folder).records()
    alive = sum(math.ceil(0.1 ** (r / 4) * size) for r in range(4))  # nothing else is scored
    assert first["bytes_up"] == 10 * 4 * alive  # clients x fp32
    assert first["bytes_down"] == (3 * 10 + 10) * math.ceil(size / 8)  # masks so far, the last one
    assert all(r["bytes_up"] == r["bytes_down"] == 2 * 4 * count for r in rounds)
    summary = json.loads((folder / "summary.json").read_text())
    sent = sum(r["bytes_up"] + r["bytes_down"] for r in (first, *rounds))
    assert summary["bytes_up"] + summary["bytes_down"] == sent
    assert summary["bytes_to_dense"] == sent / (2 * 2 * 2 * 4 * size)
    assert f"{summary['bytes_to_dense']:.4g} times the bytes of dense FedAvg" in out
    before = (first["bytes_up"] + first["bytes_down"]) / 1e6
    assert f", {before:.1f} MB of them for calibration and mask: " in out
    status, out, _ = cli(*TINY, *FEW, "--name", "dense")
    assert status == 0 and "calibration" not in out
    dense = json.loads((small_data / "runs" / "dense" / "summary.json").read_text())
    assert dense["bytes_to_dense"] == 1


def test_calibrate_writes_a_mask_that_fedavg_takes(cli, small_data):
    making = ("--nc", 10, "--sparsity", 0.8, "--calibration-images", 40)
    status, out, _ = cli(*CALIBRATE, *making, "--name", "c")
    folder = small_data / "runs" / "c"
    assert status == 0 and "query.weight" in out and "IoU" in out and "by chance" in out
    names = {path.name for path in folder.iterdir()}
    assert {"mask.pt", "density.png", "summary.json", "config.json"} <= names
    options = (*TINY, "--nc", 10, *HEAD)
    assert cli(*options, "--mask", folder / "mask.pt", "--name", "file")[0] == 0
    assert cli(*options, "--mask-rule", "least-sensitive", *making, "--name", "rule")[0] == 0
    by_file, by_rule = (small_data / "runs" / name for name in ("file", "rule"))
    assert torch.equal(theta(by_file), theta(by_rule))
    assert records(by_file, "seconds") == records(by_rule, "seconds")
    assert cli("eval", by_file)[0] == 0


def test_groups_of_clients_agree_as_far_as_their_masks_overlap(small_data):
    calibration = prepare(small_data, "--clients", 5, "--calibration-images", 25)
    groups = group_agreement(calibration)
    assert list(groups) == ["1", "2"]
    keys = [calibration.client_keys(calibration.images(k)).double() for k in range(5)]
    sizes = [len(shard) for shard in calibration.shards]

    def mask_of(clients):
        mean = sum(sizes[k] * keys[k] for k in clients) / sum(sizes[k] for k in clients)
        return masks.keep_lowest(mean.float(), round(0.1 * len(mean)))

    for m, iou in groups.items():
        first = mask_of(calibration.clients[: int(m)])
        second = mask_of(calibration.clients[-int(m) :])
        expected = ((first & second).sum() / (first | second).sum()).item()
        assert iou == pytest.approx(expected, rel=1e-3) and 0.0526 < iou < 1


def test_a_mask_of_the_same_options_is_made_once(cli, small_data, monkeypatch):
    command = (*SPARSE, *QUICK, "--name")
    assert cli(*command, "a")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(Calibration, "make", None)  # would fail
        status, out, _ = cli(*command, "b", "--lr", 0.01)
    (path,) = (small_data / "data" / "masks").iterdir()
    date = safe_files.load_checked(path)["made"]["date"]
    assert status == 0 and f"mask taken from {path.relative_to(small_data)}, made {date}" in out
    assert "calibration round 1: " in out


def test_a_mask_that_other_code_made_is_not_taken(small_data, monkeypatch, tmp_path):
    calibration = prepare(small_data, "--mask-rule", "random")
    cached_mask(calibration)
    edited = tmp_path / "masks.py"
    edited.write_text("# another version")
    monkeypatch.setattr(mask_cache, "MAKERS", (*mask_cache.MAKERS, edited))
    cached_mask(calibration)
    assert len(list((small_data / "masks").iterdir())) == 2


def test_fresh_makes_masks_and_features_anew_and_once(small_data, monkeypatch):
    options = ("--mask-rule", "random", "--seed", 1)
    prepare(small_data, *options).make()
    cached_mask(prepare(small_data, *options))
    files = [*(small_data / "masks").iterdir(), *(small_data / "features").iterdir()]
    for file in files:
        os.utime(file, (0, 0))
    cached_mask(prepare(small_data, *options))
    assert all(file.stat().st_mtime == 0 for file in files)
    calibration = prepare(small_data, *options, "--fresh")
    cached_mask(calibration)
    assert files and all(file.stat().st_mtime > 0 for file in files)
    monkeypatch.setattr(Calibration, "make", None)  # what this command has made serves it
    cached_mask(calibration)
    assert parsed("fedavg", "--fresh").name == parsed("fedavg").name


@pytest.mark.parametrize(
    "options",
    [
        ("--mask-rule", "random"),
        ("--mask-rule", "lowest-magnitude", "--sparsity", 0.5, "--per-tensor"),
        ("--mask-rule", "highest-magnitude", "--threshold", 0.05),
        ("--mask-rule", "most-sensitive", "--consensus", "max", "--damp", 0.5),
        ("--mask-rule", "least-sensitive", "--consensus", "median-rank", "--fisher-score", "logit"),
        ("--mask-rule", "least-sensitive", "--consensus", "vote", "--quorum", 2),
        ("--mask-rule", "least-sensitive", "--calibration-fraction", 0.3, "--sparsity", 0.99),
    ],
)
def test_every_kind_of_mask_trains(small_data, options):
    sensitive = options[1].endswith("sensitive")
    scoring = ("--calibration-images", 20, "--calibration-rounds", 2) if sensitive else ()
    learner, loop = build_loop(small_data, *LOOP, *FEW, *scoring, *options)
    start = loop.theta.clone()
    (record,) = run(loop, 1)
    assert (learner.mask.origin["bytes_up"] > 0) == sensitive and record["bytes_up"] > 0
    assert not torch.equal(loop.theta, start)


BAD = {
    "--sparsity makes a mask and needs --mask-rule": ("--sparsity", 0.5),
    "--quorum makes a mask and needs --mask-rule": ("--quorum", 5),
    "--sparsity: 1 must be at least 0 and below 1": (*MASK, "--sparsity", 1),
    "--sparsity: -0.1 must be at least 0": (*MASK, "--sparsity", -0.1),
    "--calibration-rounds: 0 must be at least 1": (*MASK, "--calibration-rounds", 0),
    "--threshold with --sparsity": (*(*MASK, "--sparsity", 0.5, "--threshold", 1),),
    "--threshold with --mask-rule random: which has no scores": (
        *("--head", "ridge", "--mask-rule", "random", "--threshold", 1),
    ),
    "--quorum belongs to --consensus vote": (*MASK, "--quorum", 2),
    "--mask-lr functional is of a rate under a mask": (*HEAD, "--mask-lr", "functional"),
    "--threshold with --per-tensor": (*MASK, "--per-tensor", "--threshold", 1),
    "the head is fitted first and frozen: --head ridge or probe": (
        *("--mask-rule", "random", "--head", "linear"),
    ),
    "--mask-scope in place of --train head": (*MASK, "--train", "head"),
    "no parameter of the backbone has such a name": (*MASK, "--mask-scope", "head.*"),
    "mask .: a folder; a run's mask is its mask.pt": ("--head", "ridge", "--mask", "."),
    "mask nowhere.pt: no such file": ("--head", "ridge", "--mask", "nowhere.pt"),
    "leave one of them away": (*MASK, "--mask", "nowhere.pt"),
    "--threshold 0 keeps nothing in calibration round 1": (*MASK, "--threshold", 0),
    "--threshold is compared with scores": (
        *(*MASK, "--threshold", 1, "--consensus", "median-rank"),
    ),
    "--sparsity 0.999 keeps none of the 48 entries": (
        *(*MASK, "--mask-scope", "norm.bias", "--sparsity", 0.999),
    ),
    "--mask-within querry.*: no such kind": (*MASK, "--mask-within", "query.*", "querry.*"),
    "and --sparsity 0.1 keeps": (*MASK, "--mask-within", "query.*", "--sparsity", 0.1),
    "--mask-within makes a mask and needs": ("--mask-within", "query.*"),
    "--mask-scope blokcs.*": (*MASK, "--mask-scope", "norm.bias", "blokcs.*"),
    "--quorum 9: only 3 clients score": (
        *(*MASK, "--consensus", "vote", "--quorum", 9, "--calibration-fraction", 0.3),
    ),
    "argument --mask: the name is empty": ("--head", "ridge", "--mask", ""),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_mask_options_get_one_line(cli, small_data, message):
    status, out, err = cli(*TINY, *BAD[message])
    assert status == 2 and message in err, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not list(small_data.glob("runs/*"))  # the corrected command finds nothing in its way


# ---------------------------------------------------------------------------- mask files


def save_mask(folder, sparsity=0.9):
    """Write the file of a random mask; returns its path."""
    path = folder / f"{sparsity}.pt"
    options = ("--mask-rule", "random", "--sparsity", sparsity, "--head-images", 100)
    prepare(folder, *options).make().save(path)
    return path


def test_bad_mask_files_are_named(cli, small_data):
    path = save_mask(small_data)
    whole = path.read_bytes()
    options = (*TINY, *FEW, "--mask", path)
    for damage in (whole[: len(whole) // 2], whole[:-60] + b"x" + whole[-59:], b"", b"{}"):
        path.write_bytes(damage)
        status, _, err = cli(*options)
        assert status == 2 and f"mask {path}: damaged, or no mask that `calibrate` wrote" in err
    path.write_bytes(whole)
    status, _, err = cli(*options, "--model", "vit_ti16", "--weights", "none", "--image-size", 32)
    assert status == 2 and "made for another model, cls_token is (1, 1, 48) in the mask" in err
    content = safe_files.load_checked(path)
    safe_files.save_checked(path, content | {"bits": torch.zeros_like(content["bits"])})
    status, _, err = cli(*options)
    assert status == 2 and "it keeps no entry" in err
    assert not list(small_data.glob("runs/*"))  # no half-written run


def test_a_run_refuses_a_mask_file_that_changed(cli, small_data):
    path, other = save_mask(small_data, 0.5), save_mask(small_data, 0.9)
    options = (*TINY, *FEW, "--mask", path, "--name", "x")
    assert cli(*options, "--rounds", 1)[0] == 0
    first = path.read_bytes()
    path.write_bytes(other.read_bytes())
    status, _, err = cli(*options)
    assert status == 2 and "is not the mask that" in err
    copy = small_data / "runs" / "x" / "mask.pt"
    content = copy.read_bytes()
    copy.unlink()
    status, _, err = cli(*options)
    assert status == 2 and "mask_sha256 is" in err
    copy.write_bytes(content)
    path.unlink()
    assert cli(*options)[0] == 0  # the run keeps its own copy
    path.write_bytes(first)
    assert cli(*options, "--rounds", 3)[0] == 0


def test_clients_whose_own_masks_are_empty_are_not_compared(small_data):
    options = ("--mask-rule", "most-sensitive", "--calibration-images", 40, *QUICK)
    calibration = prepare(small_data, *options)
    keys = torch.stack([calibration.client_keys(calibration.images(k)) for k in range(10)])
    top = -keys.mean(dim=0).min().item()  # of the mean: half of a client's images has lower ones
    assert agreement(prepare(small_data, *options, "--sparsity", 0.9))
    calibration = prepare(small_data, *options, "--threshold", 0.99 * top)
    assert calibration.make().trains.any() and agreement(calibration) == {}


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_a_kept_mask_of_something_else_is_named_and_made_again(small_data, capsys, damage):
    calibration = prepare(small_data, "--mask-rule", "random")
    whole = cached_mask(calibration)
    (path,) = (small_data / "masks").iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    else:
        Mask(whole.shapes, ~whole.trains, whole.origin).save(path, "another key")
    assert cached_mask(calibration).sha256 == whole.sha256
    said = "damaged, or no mask" if damage == "cut" else "no mask that belongs here"
    assert f"{path.name}: {said}" in capsys.readouterr().err
    assert cached_mask(calibration).sha256 == whole.sha256 and not capsys.readouterr().err
