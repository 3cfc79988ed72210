"""From options to a mask, and training under it: what is frozen stays, what is sent is counted."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import assert_frozen_stayed
from test_learner import build
from test_train import FEDAVG, TINY, records, theta, without_seconds

import calibration
import entries
import masks
import model as vit
import safe_files
import train
from calibration import Calibration
from fisher import fisher_diagonal
from learner import set_fitted_head
from mask_file import Mask, density_table
from workspace import Workspace

MASK = ("--head", "ridge", "--mask-rule", "least-sensitive", "--calibration-images", 40)
SPARSE = (*TINY, *MASK)


def prepare(folder, *arguments):
    """Return a calibration of the synthetic data's clients."""
    command = ["calibrate", "--data", "synthetic", "--data-dir", str(folder), "--clients", "10"]
    options = train.resolve(train.build_parser().parse_args([*command, *map(str, arguments)]))
    workspace = Workspace(options)
    model = workspace.build_model()
    set_fitted_head(workspace, model, options.head)
    return Calibration(workspace, model, options, workspace.shards())


@pytest.mark.parametrize("labels", ["sampled", "true"])
def test_federated_calibration_by_all_clients_is_the_central_one(small_data, labels):
    many = prepare(small_data, "--calibration-images", 1000, "--fisher-labels", labels)
    one = prepare(
        small_data, "--calibration-images", 1000, "--fisher-labels", labels, "--clients", 1
    )
    index = {int(k): many.images(k) for k in many.clients}
    pooled = np.concatenate(list(index.values()))
    assert len(index) == 10 and len(np.unique(pooled)) == 1000
    each = (many.client_keys(i) for i in index.values())
    everything = torch.ones_like(many.theta, dtype=torch.bool)
    weights = [len(many.shards[k]) for k in index]
    found = masks.consensus(each, weights, alive=everything, keep=None)
    expected = one.sensitivity(pooled)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_calibration_reads_training_shards_and_never_validation(small_data):
    made = prepare(small_data, "--nc", 10, "--calibration-images", 35)
    for k in made.clients:
        images = made.images(k)
        assert len(images) == 3 and np.isin(images, made.shards[k]).all()
        assert not np.isin(images, made.workspace.val_index).any()


def test_scores_are_those_of_the_damped_network_and_the_weights_come_back(small_data):
    made = prepare(small_data, "--sparsity", 0.8, "--calibration-rounds", 2)
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    seen = []
    score = made.sensitivity

    def spy(index):
        seen.append(made.model.blocks[0].attn.qkv.weight.detach().clone())
        return score(index)

    made.sensitivity = spy
    mask = made.make()
    assert len(seen) == 20 and mask.made["kept"] == mask.kept.sum() == round(0.2 * len(mask.kept))
    original = before["blocks.0.attn.qkv.weight"]
    assert torch.equal(seen[0], original)
    changed = seen[-1] != original
    assert changed.any() and torch.equal(seen[-1][changed], (original * 0.1)[changed])
    for name, p in made.model.named_parameters():
        assert torch.equal(p, before[name]), name


def test_the_clients_scores_are_the_librarys(small_data):
    made = prepare(small_data, "--mask-scope", "blocks.1.*", "--calibration-images", 300)
    index = made.images(3)
    images = made.workspace.sets["train"].images[torch.from_numpy(index)]
    batch = (made.preprocess(images), made.uniform[torch.from_numpy(index)])
    expected = fisher_diagonal(made.model, [batch], parameters=made.names)
    assert all(name.startswith("blocks.1.") for name in made.names) and len(made.names) == 12
    assert torch.equal(
        made.sensitivity(index), torch.cat([expected[n].flatten() for n in made.names])
    )


def test_a_mask_file_holds_all_of_the_mask(small_data, tmp_path):
    mask = prepare(small_data, "--sparsity", 0.7, "--calibration-images", 10).make()
    mask.save(tmp_path / "deep" / "mask.pt")
    model = prepare(small_data).model
    again = Mask.load(tmp_path / "deep" / "mask.pt", model)
    assert again.sha256 == mask.sha256 and again.made == mask.made
    assert again.made["mask_rule"] == "least-sensitive" and again.made["sparsity"] == 0.7
    assert mask.bytes == math.ceil(len(mask.kept) / 8)
    kinds, layers, density = density_table(mask)
    parts = mask.parts()
    shown = [
        density[kinds.index(f"{k}.weight"), layers.index("1")] for k in ("query", "key", "value")
    ]
    thirds = parts["blocks.1.attn.qkv.weight"].chunk(3)
    assert shown == [part.double().mean().item() for part in thirds]
    assert np.isnan(density[kinds.index("cls_token"), layers.index("0")])
    assert sum(int(part.sum()) for part in parts.values()) == mask.made["kept"]


# ---------------------------------------------------------------------------- training under it


@pytest.mark.parametrize("command", ["fedavg", "centralized"])
@pytest.mark.parametrize(
    ("sparsity", "extra"), [(0.9, ()), (0.9, ("--weight-decay", 0.1, "--nesterov")), (0.2, ())]
)
def test_frozen_coordinates_keep_their_bits_through_a_whole_run(
    cli, small_data, learners, command, sparsity, extra
):
    options = [o for o in SPARSE[1:] if command == "fedavg"] or [
        *("--data", "synthetic", "--epochs", 1, *MASK)
    ]
    options += ["--sparsity", sparsity, "--lr", 0.01, *extra, "--name", "s"]
    status, _, err = cli(command, *options)
    assert status == 0, err
    (learner,) = learners
    assert_frozen_stayed(learner)
    assert torch.equal(theta(small_data / "runs" / "s"), learner.entries.theta)


def test_compact_and_dense_steps_give_the_same_bits(cli, small_data, monkeypatch):
    for name, below in (("compact", 1.0), ("dense", 0.0)):
        monkeypatch.setattr(entries, "COMPACT_BELOW", below)
        extra = ("--name", name, "--sparsity", 0.5, "--weight-decay", 1e-3)
        assert cli(*SPARSE, *extra)[0] == 0
        assert (
            cli("centralized", *SPARSE[1:3], *MASK, "--epochs", 1, *extra[:1], f"c-{name}")[0] == 0
        )
    runs = small_data / "runs"
    for prefix in ("", "c-"):
        assert torch.equal(theta(runs / f"{prefix}compact"), theta(runs / f"{prefix}dense"))
    assert without_seconds(runs / "compact") == without_seconds(runs / "dense")


def test_a_mask_that_keeps_everything_trains_as_no_mask_does(cli, small_data):
    assert cli(*SPARSE, "--sparsity", 0, "--name", "mask")[0] == 0
    assert cli(*TINY, "--head", "ridge", "--name", "none")[0] == 0
    masked, plain = (records(small_data / "runs" / name) for name in ("mask", "none"))
    assert [r["val_loss"] for r in masked] == [r["val_loss"] for r in plain]


def test_tensors_that_are_frozen_throughout_take_no_gradient(small_data):
    options = [str(o) for o in (*MASK, "--mask-scope", "blocks.1.mlp.*", "--sparsity", 0.5)]
    learner, training = build(small_data, *options)
    assert set(learner.flat.shapes) <= {
        f"blocks.1.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    seen = []
    hook = learner.model.blocks[0].register_full_backward_hook(lambda *_: seen.append(1))
    training.one(3, round=1)
    hook.remove()
    assert not seen  # the backward pass ends above block 0


def test_every_line_of_the_log_counts_what_was_sent(cli, small_data):
    status, out, _ = cli(*SPARSE, "--sparsity", 0.9, "--nc", 10, "--name", "a")
    folder = small_data / "runs" / "a"
    size = 66768  # of vit_demo's backbone
    kept = round(0.1 * size)
    first, *rounds = records(folder)
    alive = sum(math.ceil(0.1 ** (r / 4) * size) for r in range(4))  # nothing else is scored
    assert first["bytes_up"] == 10 * 4 * alive  # clients x fp32
    assert first["bytes_down"] == (3 * 10 + 10) * math.ceil(size / 8)  # masks so far, the last one
    assert all(r["bytes_up"] == r["bytes_down"] == 3 * 4 * kept for r in rounds)
    summary = json.loads((folder / "summary.json").read_text())
    sent = sum(r["bytes_up"] + r["bytes_down"] for r in (first, *rounds))
    assert summary["bytes_up"] + summary["bytes_down"] == sent
    assert summary["bytes_to_dense"] == sent / (2 * 3 * 2 * 4 * size)
    assert f"{summary['bytes_to_dense']:.4f} of dense FedAvg" in out
    before = (first["bytes_up"] + first["bytes_down"]) / 1e6
    assert f", {before:.1f} of them for calibration and mask: " in out
    status, out, _ = cli(*TINY, "--head", "ridge", "--name", "dense")
    assert status == 0 and "calibration" not in out
    dense = json.loads((small_data / "runs" / "dense" / "summary.json").read_text())
    assert dense["bytes_to_dense"] == 1


def test_calibrate_writes_a_mask_that_fedavg_takes(cli, small_data):
    data = ("--data", "synthetic", "--nc", 10, "--clients", 10)
    making = ("--sparsity", 0.8, "--calibration-images", 40)
    status, out, _ = cli("calibrate", *data, *making, "--name", "made")
    folder = small_data / "runs" / "made"
    assert status == 0 and "query.weight" in out and "IoU" in out and "by chance" in out
    assert {"mask.pt", "density.png", "summary.json", "config.json"} <= {
        p.name for p in folder.iterdir()
    }
    options = (*TINY, "--nc", 10, "--head", "ridge")
    assert cli(*options, "--mask", folder / "mask.pt", "--name", "file")[0] == 0
    rule = ("--mask-rule", "least-sensitive", *making)
    assert cli(*options, *rule, "--name", "rule")[0] == 0
    assert without_seconds(small_data / "runs" / "file") == without_seconds(
        small_data / "runs" / "rule"
    )
    assert cli("eval", small_data / "runs" / "file")[0] == 0


def test_groups_of_clients_agree_as_far_as_their_masks_overlap(small_data):
    calibration = prepare(small_data, "--clients", 5, "--calibration-images", 25)
    groups = calibration.group_agreement()
    assert list(groups) == ["1", "2"]
    keys = [calibration.client_keys(calibration.images(k)).double() for k in range(5)]
    sizes = [len(shard) for shard in calibration.shards]

    def kept(clients):
        mean = sum(sizes[k] * keys[k] for k in clients) / sum(sizes[k] for k in clients)
        return masks.keep_lowest(mean.float(), round(0.1 * len(mean)))

    for m, iou in groups.items():
        one, two = kept(calibration.clients[: int(m)]), kept(calibration.clients[-int(m) :])
        expected = ((one & two).sum() / (one | two).sum()).item()
        assert iou == pytest.approx(expected, rel=1e-3) and 0.0526 < iou < 1


def test_a_mask_of_the_same_options_is_made_once(cli, small_data, monkeypatch):
    assert cli(*SPARSE, "--name", "a")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(calibration.Calibration, "make", None)  # would fail
        assert cli(*SPARSE, "--name", "b", "--lr", 0.01)[0] == 0
    (kept,) = (small_data / "data" / "masks").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    damaged = kept.read_bytes()
    assert cli(*SPARSE, "--name", "c")[0] == 0 and kept.read_bytes() != damaged


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
def test_every_kind_of_mask_trains(cli, small_data, options):
    sensitive = options[1].endswith("sensitive")
    scoring = ("--calibration-images", 30, "--calibration-rounds", 2) if sensitive else ()
    status, out, err = cli(*TINY, "--head", "ridge", *scoring, *options, "--name", "x")
    assert status == 0, err
    first = records(small_data / "runs" / "x")[0]
    assert (first["bytes_up"] > 0) == sensitive


BAD = {
    "--sparsity makes a mask and needs --mask-rule": ("--sparsity", 0.5),
    "--quorum makes a mask and needs --mask-rule": ("--quorum", 5),
    "--sparsity 1: the frozen share must be below 1": (*MASK, "--sparsity", 1),
    "--sparsity: -0.1 must be at least 0": (*MASK, "--sparsity", -0.1),
    "--calibration-rounds: 0 must be at least 1": (*MASK, "--calibration-rounds", 0),
    "argument --threshold: not allowed with argument --sparsity": (
        *(*MASK, "--sparsity", 0.5, "--threshold", 1),
    ),
    "--threshold has no meaning for --mask-rule random": (
        *("--head", "ridge", "--mask-rule", "random", "--threshold", 1),
    ),
    "--quorum belongs to --consensus vote": (*MASK, "--quorum", 2),
    "--damp belongs to --mask-rule least-sensitive|most-sensitive: random scores nothing": (
        *("--head", "ridge", "--mask-rule", "random", "--damp", 0.5),
    ),
    "--per-tensor shares a --sparsity out": (*MASK, "--per-tensor", "--threshold", 1),
    "the head is fitted first and frozen: --head ridge or probe": (
        *("--mask-rule", "random", "--head", "linear"),
    ),
    "--mask-scope in place of --train head": (*MASK, "--train", "head"),
    "no parameter of the backbone has such a name": (*MASK, "--mask-scope", "head.*"),
    "mask .: a folder; a run's mask is its mask.pt": ("--head", "ridge", "--mask", "."),
    "mask nowhere.pt: no such file": ("--head", "ridge", "--mask", "nowhere.pt"),
    "leave --mask-rule away": (*MASK, "--mask", "nowhere.pt"),
    "--threshold 0 keeps nothing in calibration round 1": (*MASK, "--threshold", 0),
    "--threshold is compared with scores": (
        *(*MASK, "--threshold", 1, "--consensus", "median-rank"),
    ),
    "--sparsity 0.999 keeps none of the 48 entries": (
        *(*MASK, "--mask-scope", "norm.bias", "--sparsity", 0.999),
    ),
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


def test_bad_mask_files_are_named(cli, small_data):
    cli("calibrate", *FEDAVG[1:], "--calibration-images", 100, "--name", "m")
    path = small_data / "runs" / "m" / "mask.pt"
    whole = path.read_bytes()
    options = (*TINY, "--head", "ridge", "--mask", path)
    for damage in (whole[: len(whole) // 2], whole[:-60] + b"x" + whole[-59:], b""):
        path.write_bytes(damage)
        status, _, err = cli(*options)
        assert status == 2 and str(path) in err and "damaged" in err
    path.write_bytes(whole)
    status, _, err = cli(*options, "--model", "vit_ti16", "--weights", "none", "--image-size", 32)
    assert status == 2 and "made for another model, cls_token is (1, 1, 48) in the mask" in err
    status, _, err = cli(*TINY, "--head", "ridge", "--mask", small_data / "runs/m/summary.json")
    assert status == 2 and "summary.json: damaged, or no mask that `calibrate` wrote" in err
    assert [p.name for p in (small_data / "runs").iterdir()] == ["m"]  # no half-written run


def test_a_run_refuses_a_mask_file_that_changed(cli, small_data):
    for sparsity, name in ((0.5, "a"), (0.9, "b")):
        making = ("--sparsity", sparsity, "--calibration-images", 100, "--name", name)
        cli("calibrate", *FEDAVG[1:], *making)
    a, b = (small_data / "runs" / n / "mask.pt" for n in "ab")
    options = (*TINY, "--head", "ridge", "--mask", a, "--name", "x")
    assert cli(*options)[0] == 0
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    status, _, err = cli(*options, "--rounds", 3)
    assert status == 2 and "is not the mask that" in err
    kept = small_data / "runs" / "x" / "mask.pt"
    own = kept.read_bytes()
    kept.unlink()
    status, _, err = cli(*options, "--rounds", 3)
    assert status == 2 and "mask_sha256 is" in err
    kept.write_bytes(own)
    a.unlink()
    assert cli(*options, "--rounds", 3)[0] == 0  # the run keeps its own copy
    a.write_bytes(first)
    assert cli(*options, "--rounds", 4)[0] == 0


def test_an_empty_mask_is_refused(cli, small_data):
    cli("calibrate", *FEDAVG[1:], "--calibration-images", 100, "--name", "m")
    path = small_data / "runs" / "m" / "mask.pt"
    content = safe_files.load_checked(path)
    safe_files.save_checked(path, content | {"bits": torch.zeros_like(content["bits"])})
    status, _, err = cli(*TINY, "--head", "ridge", "--mask", path)
    assert status == 2 and "it keeps no entry" in err


def test_clients_whose_own_masks_are_empty_are_not_compared(cli, small_data):
    making = ("--mask-rule", "most-sensitive", "--calibration-rounds", 1, "--name", "m")
    top = ("--threshold", 0.02)  # of the mean: few clients have such scores by themselves
    status, out, err = cli("calibrate", *FEDAVG[1:], "--calibration-images", 100, *making, *top)
    assert status == 0, err
    assert (small_data / "runs" / "m" / "summary.json").exists()


@pytest.mark.parametrize("damage", ["cut", "another's"])
def test_a_kept_mask_of_something_else_is_named_and_made_again(cli, small_data, damage):
    command = ("calibrate", *FEDAVG[1:], "--calibration-images", 100, "--name")
    assert cli(*command, "m")[0] == 0
    (path,) = (small_data / "data" / "masks").iterdir()
    whole = Mask.load(small_data / "runs" / "m" / "mask.pt", vit.build_vit("vit_demo", 100, 0))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-99])
    else:
        Mask(whole.shapes, ~whole.kept, whole.made).save(path, "another key")
    status, _, err = cli(*command, "n")
    assert status == 0 and f"{path.name}: damaged, or another mask" in err
    again = Mask.load(small_data / "runs" / "n" / "mask.pt", vit.build_vit("vit_demo", 100, 0))
    assert again.sha256 == whole.sha256
