"""Splits, shards and batches: every sample counted, every draw a function of its counters."""

import hashlib
import io
import pickle
import tarfile
import urllib.request
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from data import (
    PADDING,
    Preprocess,
    crop_and_flip,
    draw_batches,
    draw_by_class,
    draw_epoch,
    shard_by_class,
    shard_dirichlet,
    shard_iid,
    split_validation,
    synthetic_dataset,
)


def balanced(classes=100, each=450):
    return np.random.default_rng(0).permutation(np.repeat(np.arange(classes), each))


def skewed(classes=20, samples=3000):
    shares = np.random.default_rng(1).dirichlet(np.full(classes, 2.0))
    counts = np.maximum(np.random.default_rng(2).multinomial(samples, shares), 30)
    return np.random.default_rng(3).permutation(np.repeat(np.arange(classes), counts))


def holds_every_sample_once(shards, labels):
    together = np.concatenate(shards)
    assert all(s.dtype == np.int64 and len(s) for s in shards)
    assert np.array_equal(np.sort(together), np.arange(len(labels)))
    return True


def class_counts(shards, labels):
    """(K, C) samples of each class that each client holds."""
    owner = np.repeat(np.arange(len(shards)), [len(s) for s in shards])
    pairs = owner * (labels.max() + 1) + labels[np.concatenate(shards)]
    return np.bincount(pairs, minlength=len(shards) * (labels.max() + 1)).reshape(len(shards), -1)


# ---------------------------------------------------------------------------- splits and shards


@pytest.mark.parametrize("labels", [balanced(), skewed()], ids=["balanced", "skewed"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5])
def test_validation_takes_its_share_of_every_class(labels, fraction):
    train, val = split_validation(labels, fraction, seed=3)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
    counts = np.bincount(labels)
    held_out = np.bincount(labels[val], minlength=len(counts))
    assert np.array_equal(held_out, np.round(fraction * counts))
    again = split_validation(labels, fraction, seed=3)[1]
    assert np.array_equal(val, again)
    assert not fraction or not np.array_equal(val, split_validation(labels, fraction, seed=4)[1])


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_bad_validation_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=f"not {fraction}"):
        split_validation(balanced(), fraction, seed=0)


def test_a_validation_set_leaves_something_to_train_on():
    with pytest.raises(ValueError, match="fraction of 0.9 leaves none of 8 samples"):
        split_validation(np.arange(8) // 4, 0.9, seed=0)


@pytest.mark.parametrize("labels", [balanced(), skewed()], ids=["balanced", "skewed"])
def test_samples_by_class_keep_the_classes_shares(labels):
    counts = np.bincount(labels)
    for count in (1, 500, 777, len(labels)):
        drawn = draw_by_class(labels, count, seed=3)
        assert len(np.unique(drawn)) == len(drawn) == count
        expected = count * counts / len(labels)
        assert (np.abs(np.bincount(labels[drawn], minlength=len(counts)) - expected) <= 1).all()
    assert np.isin(draw_by_class(labels, 500, seed=3), draw_by_class(labels, 777, seed=3)).all()
    assert not np.array_equal(draw_by_class(labels, 500, 3), draw_by_class(labels, 500, 4))


@pytest.mark.parametrize("count", [0, 45_001])
def test_more_samples_than_there_are_cannot_be_drawn(count):
    with pytest.raises(ValueError, match=f"{count} samples cannot be drawn from 45000"):
        draw_by_class(balanced(), count, seed=0)


@pytest.mark.parametrize("clients", [1, 7, 100, 45_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_iid_shards(clients, seed):
    labels = balanced()
    shards = shard_iid(labels, clients, seed)
    assert len(shards) == clients and holds_every_sample_once(shards, labels)
    sizes = [len(s) for s in shards]
    assert max(sizes) - min(sizes) <= 1


FEASIBLE = [(100, 1), (100, 2), (100, 5), (100, 10), (100, 50), (100, 100), (10, 10), (10, 23),
            (1, 100), (33, 4), (450, 10), (45_000, 1), (37, 77), (2, 50)]  # fmt: skip


@pytest.mark.parametrize(("clients", "nc"), FEASIBLE)
@pytest.mark.parametrize("seed", range(5))
def test_class_shards(clients, nc, seed):
    labels = balanced()
    shards = shard_by_class(labels, clients, nc, seed)
    assert len(shards) == clients and holds_every_sample_once(shards, labels)
    counts = class_counts(shards, labels)
    assert ((counts > 0).sum(axis=1) == nc).all()
    sharing = (counts > 0).sum(axis=0)
    assert sharing.min() >= 1 and sharing.max() - sharing.min() <= 1
    if clients * nc % 100 == 0:
        sizes = counts.sum(axis=1)
        assert sizes.max() - sizes.min() <= nc


@pytest.mark.parametrize(("clients", "nc"), [(20, 1), (7, 3), (60, 5), (100, 10), (1, 20)])
def test_class_shards_of_unequal_classes(clients, nc):
    labels = skewed()
    shards = shard_by_class(labels, clients, nc, seed=0)
    assert holds_every_sample_once(shards, labels)
    assert ((class_counts(shards, labels) > 0).sum(axis=1) == nc).all()


def test_classes_meet_in_clients_at_random():
    sets = {tuple(sorted(set(balanced()[s]))) for s in shard_by_class(balanced(), 100, 5, seed=0)}
    assert len(sets) == 100


@pytest.mark.parametrize("alpha", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("clients", [1, 10, 999])
def test_dirichlet_shards(alpha, clients):
    labels = skewed()
    shards = shard_dirichlet(labels, clients, alpha, seed=0)
    assert len(shards) == clients and holds_every_sample_once(shards, labels)
    sizes = [len(s) for s in shards]
    assert max(sizes) - min(sizes) <= 1


def test_alpha_goes_from_one_class_a_client_to_the_prior():
    labels = balanced()
    held = [
        (class_counts(shard_dirichlet(labels, 50, alpha, seed=0), labels) > 0).sum(axis=1)
        for alpha in (1e-3, 1.0, 1e5)
    ]
    iid = (class_counts(shard_iid(labels, 50, seed=0), labels) > 0).sum(axis=1)
    assert np.median(held[0]) <= 5 < np.median(held[1]) < np.median(held[2])
    assert abs(held[2].mean() - iid.mean()) < 3


@pytest.mark.parametrize("make", [
    lambda labels, seed: shard_iid(labels, 100_000, seed),
    lambda labels, seed: shard_by_class(labels, 100_000, 3, seed),
    pytest.param(
        lambda labels, seed: shard_dirichlet(labels, 100_000, 0.5, seed), marks=pytest.mark.slow
    ),
], ids=["iid", "class", "dirichlet"])  # fmt: skip
def test_a_hundred_thousand_clients(make):
    labels = np.random.default_rng(0).integers(0, 100, 1_000_000)
    shards = make(labels, 0)
    assert len(shards) == 100_000 and holds_every_sample_once(shards, labels)


@pytest.mark.parametrize("make", [
    lambda seed: shard_iid(balanced(), 10, seed),
    lambda seed: shard_by_class(balanced(), 50, 4, seed),
    lambda seed: shard_dirichlet(balanced(), 10, 0.5, seed),
], ids=["iid", "class", "dirichlet"])  # fmt: skip
def test_shards_are_a_function_of_the_seed(make):
    first, again, other = make(0), make(0), make(1)
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def test_one_function_deals_by_whichever_rule_is_named():
    labels = balanced()
    for settings, expected in (
        ({}, shard_iid(labels, 50, 3)),
        ({"nc": 4}, shard_by_class(labels, 50, 4, 3)),
        ({"dirichlet": 0.5}, shard_dirichlet(labels, 50, 0.5, 3)),
    ):
        assert all(map(np.array_equal, data.shard(labels, 50, seed=3, **settings), expected))


@pytest.mark.parametrize(("make", "message"), [
    (lambda y: shard_iid(y, 0, 0), "not 0"),
    (lambda y: shard_iid(y, 45_001, 0), r"1..45000 \(the samples\), not 45001"),
    (
        lambda y: shard_by_class(y, 33, 3, 0),
        "33 clients of 3 classes cannot cover 100 classes; cover=False leaves some out",
    ),
    (lambda y: shard_by_class(y, 1, 101, 0, cover=False), "not 101"),
    (lambda y: shard_by_class(y, 4500, 11, 0, cover=False), "need 49500 parts"),
    (lambda y: shard_by_class(y, 10, 101, 0), "not 101"),
    (lambda y: shard_by_class(y, 10, 0, 0), "not 0"),
    (lambda y: shard_by_class(y, 4500, 11, 0), "need 49500 parts"),
    (lambda y: shard_dirichlet(y, 10, 0.0, 0), "not 0.0"),
    (lambda y: shard_dirichlet(y, 10, float("nan"), 0), "not nan"),
    (lambda y: shard_dirichlet(y, 5, 1e-308, 0), "must lie in"),  # its draws would underflow
])  # fmt: skip
def test_what_cannot_be_sharded_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(balanced())


@pytest.mark.parametrize(("clients", "nc"), [(1, 1), (1, 99), (9, 11), (33, 3), (3, 33)])
@pytest.mark.parametrize("labels", [balanced(), skewed(100, 5000)], ids=["balanced", "skewed"])
def test_few_clients_may_leave_classes_out(labels, clients, nc):
    shards = data.shard(labels, clients, nc=nc, cover=False, seed=3)
    assert len(shards) == clients and all(s.dtype == np.int64 for s in shards)
    counts = class_counts(shards, labels)
    assert ((counts > 0).sum(axis=1) == nc).all()
    sharing = (counts > 0).sum(axis=0)
    assert sharing.max() == 1 and sharing.sum() == clients * nc  # that many classes, one client's
    assert np.array_equal(counts.sum(axis=0), np.bincount(labels) * sharing)  # all their samples
    assert len(np.unique(np.concatenate(shards))) == counts.sum()
    again = shard_by_class(labels, clients, nc, 3, cover=False)
    assert all(map(np.array_equal, shards, again))
    if clients * nc < 99:
        other = class_counts(data.shard(labels, clients, nc=nc, cover=False, seed=4), labels)
        assert not np.array_equal(other.sum(axis=0) > 0, sharing > 0)


@pytest.mark.parametrize(("clients", "nc"), [(100, 1), (10, 10), (33, 4)])
def test_enough_clients_cover_all_classes_either_way(clients, nc):
    both = [shard_by_class(balanced(), clients, nc, 0, cover=cover) for cover in (True, False)]
    assert all(map(np.array_equal, *both))


# ---------------------------------------------------------------------------- labels

TAKERS = {
    "split_validation": lambda labels: split_validation(labels, 0.25, seed=0),
    "draw_by_class": lambda labels: [draw_by_class(labels, 50, seed=0)],
    "shard_iid": lambda labels: data.shard(labels, 7, seed=0),
    "shard_by_class": lambda labels: data.shard(labels, 8, nc=2, seed=0),
    "shard_dirichlet": lambda labels: data.shard(labels, 7, dirichlet=0.5, seed=0),
}
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FORMS = {
    "list": list,
    "list of int": np.ndarray.tolist,
    "tuple": tuple,
    "tensors": lambda labels: list(torch.tensor(labels)),
    **{name: lambda labels, name=name: labels.astype(name) for name in INTEGERS},
    **{f"torch {n}": lambda labels, n=n: torch.tensor(labels.astype(n)) for n in INTEGERS},
    "big-endian": lambda labels: labels.astype(">i4"),
    "every second": lambda labels: np.repeat(labels, 2)[::2],
    "read-only": lambda labels: np.broadcast_to(labels, labels.shape),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("form", FORMS)
def test_labels_of_every_whole_kind_are_drawn_from_alike(taker, form):
    labels = balanced(classes=10, each=12) + 117  # most classes have no sample, one is over int8
    labels[labels == 126] = 3
    expected = TAKERS[taker](labels)
    assert all(map(np.array_equal, TAKERS[taker](FORMS[form](labels)), expected))
    assert all(part.dtype == np.int64 for part in expected)


@pytest.mark.parametrize("taker", TAKERS)
def test_classes_without_a_sample_change_nothing(taker):
    labels = balanced(classes=10, each=12)
    expected = TAKERS[taker](labels)
    for spread in (labels * 7 + 2, labels * 10**15):
        assert all(map(np.array_equal, TAKERS[taker](spread), expected))


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(("labels", "message"), [
    ([], "there are no samples: the labels are empty"),
    (np.zeros(0, np.int64), "there are no samples"), (torch.zeros(0), "there are no samples"),
    (np.ones(99), r"one whole number a sample, not of type float64 and shape \(99,\)"),
    ([0, 1.5] * 50, "whole number"), (torch.ones(99), "not of type torch.float32"),
    (torch.ones(99, dtype=torch.bfloat16), "not of type torch.bfloat16"),
    (torch.ones(99, requires_grad=True), "not of type torch.float32"),
    ([0, -1] * 50, "classes from 0 on, not -1 to 0"), (np.full(99, -3, np.int8), "not -3 to -3"),
    (np.full(99, 2**63, np.uint64), "classes from 0 on"), (["cat", "dog"] * 50, "whole number"),
    ([None] * 99, "whole number"), (np.ones((99, 2), int), r"shape \(99, 2\)"), (3, "whole number"),
    ([[1, 2], [3]] * 50, "whole number"), (np.ones(99, bool), "not of type bool"),
])  # fmt: skip
def test_what_is_no_label_is_refused_in_a_sentence(taker, labels, message):
    with pytest.raises(ValueError, match=message):
        TAKERS[taker](labels)


# ---------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def synthetic():
    return synthetic_dataset()


def test_the_synthetic_set_is_what_it_says(synthetic):
    assert synthetic.train.images.shape == (20_000, 3, 32, 32)
    assert synthetic.test.images.shape == (5000, 3, 32, 32)
    assert synthetic.train.images.dtype == torch.uint8
    assert synthetic.train.labels.bincount().tolist() == [200] * 100
    assert len(synthetic.classes) == 100
    small = [synthetic_dataset(samples_per_class=4) for _ in range(2)]
    assert torch.equal(small[0].train.images, small[1].train.images)


def test_a_linear_classifier_on_raw_pixels_fails_on_it(synthetic):
    def pixels(images):
        x = images[:, :, ::2, ::2].flatten(1).double() / 255  # each second pixel: 768 features
        return torch.cat([x, torch.ones(len(x), 1)], dim=1)

    x, y = pixels(synthetic.train.images), F.one_hot(synthetic.train.labels).double()
    weight = torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(x.shape[1]), x.T @ y)
    guess = (pixels(synthetic.test.images) @ weight).argmax(1)
    assert (guess == synthetic.test.labels).double().mean() < 0.2


def test_real_cifar100_has_its_classes(real_data):
    pytest.importorskip("torchvision")
    cifar = data.load_cifar100(real_data)
    assert cifar.train.images.shape == (50_000, 3, 32, 32)
    assert cifar.train.labels.bincount().tolist() == [500] * 100
    assert cifar.test.labels.bincount().tolist() == [100] * 100
    assert cifar.classes[0] == "apple" and len(cifar.classes) == 100


class Answer(io.BytesIO):
    """What a server sends: torchvision asks for a redirection and a length, and there are none."""

    url = length = None


@pytest.fixture
def served(monkeypatch):
    """What the network answers by a URL's last part, nothing at first; and what was asked for."""
    pytest.importorskip("torchvision")
    files, asked = {}, []

    def urlopen(request):
        asked.append(request.full_url)
        if (name := request.full_url.rpartition("/")[2]) not in files:
            raise URLError("no network")
        return Answer(files[name])

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return files, asked


def test_offline_the_folder_and_the_way_out_are_named(tmp_path, served):
    folder = tmp_path / "cifar-100-python"
    for damaged in (False, True):
        if damaged:
            folder.mkdir()
            for name in ("train", "test", "meta"):
                (folder / name).write_bytes(b"garbage")
        with pytest.raises(ValueError, match="no network.*--data synthetic") as error:
            data.load_cifar100(tmp_path)
        message = str(error.value)
        assert f"delete {folder}" in message and "\n" not in message
        assert f"put cifar-100-python.tar.gz into {tmp_path}, from https://" in message
    assert {p.read_bytes() for p in folder.iterdir()} == {b"garbage"}


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """The archive of a CIFAR-100 of a few images, whose MD5s torchvision expects."""
    cifar = pytest.importorskip("torchvision").datasets.CIFAR100
    home = tmp_path / "served" / cifar.base_folder
    home.mkdir(parents=True)
    images = {"data": np.zeros((100, 3072), np.uint8), "fine_labels": list(range(100))}
    names = [f"class {c}" for c in range(100)]
    meta = {"fine_label_names": names}
    for name, content in (("train", images), ("test", images), ("meta", meta)):
        (home / name).write_bytes(pickle.dumps(content))
    with tarfile.open(home.parent / cifar.filename, "w:gz") as tar:
        tar.add(home, cifar.base_folder)
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in home.parent.rglob("*.*")}
    md5 |= {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in home.iterdir()}
    monkeypatch.setattr(cifar, "train_list", [["train", md5["train"]]])
    monkeypatch.setattr(cifar, "test_list", [["test", md5["test"]]])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": md5["meta"]})
    monkeypatch.setattr(cifar, "tgz_md5", md5[cifar.filename])
    return home.parent / cifar.filename


def test_cifar_is_downloaded_checked_and_unpacked_once(tmp_path, small_cifar, served):
    files, asked = served
    files[small_cifar.name] = small_cifar.read_bytes()
    for _ in range(2):
        loaded = data.load_cifar100(tmp_path)
        assert set(asked) == {"https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"}
        assert len(asked) == 2  # where it is, and the file
    assert loaded.classes[7] == "class 7"


def test_a_download_that_was_cut_short_is_not_unpacked_and_made_good(tmp_path, small_cifar, served):
    files, _ = served
    whole = small_cifar.read_bytes()
    files[small_cifar.name] = whole[:-9]
    with pytest.raises(ValueError, match="no whole CIFAR-100 in .*corrupted"):
        data.load_cifar100(tmp_path)
    assert not (tmp_path / "cifar-100-python").exists()
    files[small_cifar.name] = whole
    assert len(data.load_cifar100(tmp_path).train.labels) == 100


def test_an_archive_put_there_by_hand_needs_no_network(tmp_path, small_cifar, served):
    (tmp_path / small_cifar.name).write_bytes(small_cifar.read_bytes())
    data.load_cifar100(tmp_path)
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"garbage")
    assert len(data.load_cifar100(tmp_path).train.labels) == 100 and not served[1]


@pytest.mark.parametrize("place", [".", "cifar-100"])
def test_cifar_as_kaggle_lays_it_out_is_taken(tmp_path, small_cifar, served, place, monkeypatch):
    with tarfile.open(small_cifar) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    flat = tmp_path / "data" / place
    flat.parent.mkdir(exist_ok=True)
    (tmp_path / "unpacked" / "cifar-100-python").rename(flat)
    (flat / "file.txt~").touch()
    assert len(data.load_cifar100(tmp_path / "data").train.labels) == 100 and not served[1]
    monkeypatch.chdir(tmp_path / "data")
    loaded = data.load_cifar100(".")
    assert loaded.classes[7] == "class 7" and not served[1]
    for name in ("train", "test", "meta"):
        good = (flat / name).read_bytes()
        (flat / name).write_bytes(pickle.dumps([good]))
        with pytest.raises(ValueError, match="no network.*delete cifar-100-python if it is there"):
            data.load_cifar100(".")
        (flat / name).write_bytes(good)
    (flat / "meta").write_bytes(b"garbage")  # with a network it is downloaded beside
    served[0][small_cifar.name] = small_cifar.read_bytes()
    assert len(data.load_cifar100(".").train.labels) == 100
    assert (flat / "meta").read_bytes() == b"garbage"


@pytest.mark.parametrize("place", [".", "cifar100"])
def test_the_hubs_parquet_files_are_named_for_what_they_are(tmp_path, served, place):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    (folder / "other.parquet").touch()
    with pytest.raises(ValueError, match="no whole CIFAR-100"):
        data.load_cifar100(tmp_path)
    (folder / "train-00000-of-00001.parquet").touch()
    with pytest.raises(ValueError, match="the python version is needed: put cifar-100-python") as e:
        data.load_cifar100(tmp_path)
    assert "train-00000-of-00001.parquet is CIFAR-100 as the hub's parquet files" in str(e.value)
    assert "\n" not in str(e.value) and f"into {tmp_path}, from https://" in str(e.value)


def test_no_pickle_is_read_whose_md5_differs(tmp_path, small_cifar, served):
    class Evil:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "owned",)

    archive = tmp_path / small_cifar.name
    archive.write_bytes(small_cifar.read_bytes())
    data.load_cifar100(tmp_path)
    archive.unlink()
    for name in ("train", "test", "meta"):
        path = tmp_path / "cifar-100-python" / name
        good = path.read_bytes()
        path.write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match=f"(corrupted|no network).*delete {path.parent}"):
            data.load_cifar100(tmp_path)
        path.write_bytes(good)
    assert not (tmp_path / "owned").exists()


# ---------------------------------------------------------------------------- batches


def test_draws_are_a_function_of_seed_round_and_client():
    shard = np.arange(100, 200)
    base = dict(seed=1, round=2, client=3)
    first = draw_batches(shard, 8, 5, **base)
    assert first.shape == (5, 8, 4) and first.dtype == torch.int64
    assert torch.equal(first, draw_batches(shard, 8, 5, **base))
    for changed in (dict(seed=2), dict(round=3), dict(client=2)):
        assert not torch.equal(first, draw_batches(shard, 8, 5, **base | changed))
    assert torch.equal(first[:2, :, 0], draw_batches(shard, 8, 2, **base)[..., 0])


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_a_local_epoch_is_a_permutation_and_small_shards_repeat(size):
    shard = np.arange(1000, 1000 + size)
    draws = draw_batches(shard, 8, 25, seed=0, round=1).flatten(0, 1)
    for start in range(0, 200 - size, size):
        assert sorted(draws[start : start + size, 0].tolist()) == shard.tolist()
    assert set(draws[:, 1:3].flatten().tolist()) == set(range(2 * PADDING + 1))
    assert set(draws[:, 3].tolist()) == {0, 1}


def test_an_epoch_covers_all_that_fills_batches():
    train = np.arange(50, 153)
    seen = draw_epoch(train, 10, seed=0, epoch=0)
    assert seen.shape == (10, 10, 4)
    assert len(set(seen[..., 0].flatten().tolist())) == 100
    assert draw_epoch(train, 500, seed=0, epoch=0).shape == (1, 103, 4)
    assert not torch.equal(seen, draw_epoch(train, 10, seed=0, epoch=1))
    assert sorted(draw_epoch([8, 9], 10, seed=0, epoch=0)[0, :, 0].tolist()) == [8, 9]


def test_a_client_without_a_sample_is_named():
    for empty in (np.zeros(0, np.int64), []):
        with pytest.raises(ValueError, match="client 7 has no sample to draw batches from"):
            draw_batches(empty, 8, 5, seed=0, round=1, client=7)
        with pytest.raises(ValueError, match="there are no samples to draw an epoch from"):
            draw_epoch(empty, 8, seed=0, epoch=0)
    for batch_size, steps in ((0, 5), (8, 0)):
        with pytest.raises(ValueError, match=f"{steps} batches of {batch_size} samples"):
            draw_batches(np.arange(9), batch_size, steps, seed=0, round=1)


def test_crop_and_flip_equal_a_plain_loop():
    images = torch.randint(0, 256, (20, 3, 12, 10), dtype=torch.uint8)
    draws = draw_batches(np.arange(20), 64, 1, seed=0, round=0)[0]
    padded = F.pad(images.float(), (PADDING,) * 4, mode="replicate").to(torch.uint8)
    for out, (i, row, column, flip) in zip(crop_and_flip(images, draws), draws, strict=True):
        window = padded[i, :, row : row + 12, column : column + 10]
        assert torch.equal(out, window.flip(2) if flip else window)
    centre = torch.tensor([[7, PADDING, PADDING, 0]])
    assert torch.equal(crop_and_flip(images, centre)[0], images[7])


@pytest.mark.parametrize("size", [16, 32, 64, 96, 224])
def test_resizing_equals_interpolates_antialiased_bicubic(size):
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = Preprocess(size, mean, std, "cpu", torch.float32)(images)
    theirs = F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
    theirs = theirs.clamp(0, 255) / 255
    theirs = (theirs - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    # pixels of 255 carry 24 bits; their sums and the normalisation round a few times
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6)


def test_resizing_agrees_with_pil_to_a_grey_level():
    image = pytest.importorskip("PIL.Image")
    noise = torch.rand(1, 3, 36, 36) * 255
    pixels = F.avg_pool2d(noise, 5, 1).to(torch.uint8)  # smooth: PIL also clips between its passes
    ours = Preprocess(64, (0, 0, 0), (1 / 255,) * 3, "cpu", torch.float32)(pixels)[0]
    picture = image.fromarray(pixels[0].permute(1, 2, 0).numpy()).resize((64, 64), image.BICUBIC)
    theirs = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    # PIL rounds after each pass, and the second pass weighs the first rounding by up to 1.3
    assert (ours - theirs).abs().max() <= 1.15


def test_kept_patches_are_drawn_beside_the_crops():
    where = dict(seed=0, round=3, client=2)
    plain = draw_batches(np.arange(50), 8, 40, **where)
    draws = draw_batches(np.arange(50), 8, 40, **where, keep=(5, 16))
    assert torch.equal(draws[..., :4], plain)
    kept = draws[..., 4:]
    assert kept.shape == (40, 8, 5) and (kept.diff(dim=2) > 0).all()
    counts = torch.bincount(kept.flatten(), minlength=16)
    assert len(counts) == 16 and (counts - 100).abs().max() < 50  # 100 each, 8 to a deviation


def test_images_that_are_floats_already_keep_their_values():
    images = torch.randint(256, (2, 3, 8, 8)).float()
    before = images.clone()
    Preprocess(8, (0.5,) * 3, (0.5,) * 3, "cpu", torch.float32)(images)
    assert torch.equal(images, before)
