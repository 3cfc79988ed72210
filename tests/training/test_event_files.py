"""Event files say what the log says, each point once, and nothing else depends on them."""

import sys

import pytest

TINY = ("fedavg", "--data", "synthetic", "--clients", 10, "--threads", 1, "--eval-every", 1)


def points(folder):
    """Return the scalars of a run's event files: name -> [(step, value)]."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {n: [(e.step, e.value) for e in found.Scalars(n)] for n in found.Tags()["scalars"]}


def test_the_mirror_of_a_run_that_goes_on_holds_every_point_once(cli, small_data):
    pytest.importorskip("tensorboard")
    import runs

    folder = small_data / "runs" / "a"
    assert cli(*TINY, "--rounds", 1, "--name", "a")[0] == 0
    assert not (folder / "tensorboard").exists()
    for rounds in (2, 3, 3):  # the last finds the run finished
        assert cli(*TINY, "--rounds", rounds, "--name", "a", "--tensorboard")[0] == 0
        records, mirrored = runs.Run(folder).records(), points(folder)
        for name in ("val_acc", "train_loss", "bytes_up"):
            logged = [(r["round"], r[name]) for r in records if name in r]
            assert [step for step, _ in mirrored[name]] == [step for step, _ in logged]
            assert [v for _, v in mirrored[name]] == pytest.approx([v for _, v in logged])
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_records_within_an_epoch_are_counted_and_notes_left_out(tmp_path):
    pytest.importorskip("tensorboard")
    from event_files import EventFiles

    log = [
        {"epoch": 0, "val_acc": 0.1},
        {"note": "another machine"},
        {"epoch": 0.5, "val_acc": 0.2},
    ]
    EventFiles(tmp_path, "epoch", lambda: log).add([{"epoch": 1, "val_acc": 0.3}])
    mirrored = points(tmp_path)
    assert mirrored["val_acc"] == [(i, pytest.approx(0.1 * (i + 1))) for i in range(3)]
    assert mirrored["epoch"] == [(1, 0.5), (2, 1.0)]


def test_without_the_package_it_is_refused_before_anything_is_made(cli, small_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, err = cli(*TINY, "--rounds", 1, "--tensorboard")
    assert status == 2 and err.strip().endswith("pip install tensorboard")
    assert not (small_data / "runs").exists()
