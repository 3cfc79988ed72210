"""What a run keeps is what it was made from, or is said not to be; event files say its log."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from commands import fedavg
from machine.runs import Run
from study import plots
from training.mirrors import PACKAGES, EventFiles, Mirror

FEDAVG = ("fedavg", "--data", "synthetic", "--rounds", 2, "--clients", 10, "--fraction", 0.2)
FEDAVG += ("--J", 1, "--batch-size", 8, "--name", "a")
MASKED = (*FEDAVG, "--head", "ridge", "--mask-rule", "random")


def test_another_runs_file_is_refused_by_name_and_nobody_is_told_to_delete_it(cli, small_data):
    for run, lr in (("a", 0.01), ("b", 0.02)):
        assert cli(*MASKED, "--name", run, "--lr", lr)[0] == 0
    folder, other = (small_data / "runs" / run for run in "ab")
    log, command = (folder / "log.jsonl").read_bytes(), (*MASKED, "--lr", 0.01, "--rounds", 3)
    for name in ("head.pt", "mask.pt"):
        shutil.copy(other / name, folder / name)
        status, _, err = cli(*command)
        assert status == 2 and f"runs/a/{name}" in err and "belongs elsewhere" in err
        assert "delete" not in err and (folder / "log.jsonl").read_bytes() == log
        (folder / name).unlink()
    assert cli(*command)[0] == 0


EDITED = ('"round": 2', '"round": 3')


@pytest.mark.parametrize("content", ["edited", "", "[]", '{"round"'])
def test_a_damaged_summary_is_named_and_the_end_repeated(cli, small_data, content):
    assert cli(*FEDAVG)[0] == 0
    path = small_data / "runs" / "a" / "summary.json"
    text = path.read_text()
    path.write_text(text.replace(*EDITED) if content == "edited" else content)
    status, out, _ = cli(*FEDAVG)
    said = "summary.json is damaged" + " or edited" * (content == "edited")
    assert status == 0 and said in out
    whole, again = json.loads(text), json.loads(path.read_text())
    assert again["final"] == whole["final"] and again["round"] == 2


def test_a_run_counts_as_finished_only_when_its_curves_are_drawn(cli, small_data, monkeypatch):
    def killed(logs, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fedavg, "plot_curves", killed)
        assert cli(*FEDAVG)[0] == 130
    monkeypatch.setattr(fedavg, "plot_curves", plots.plot_curves)
    assert "is finished" not in cli(*FEDAVG)[1]
    assert (small_data / "runs" / "a" / "curves.png").exists()
    assert "is finished" in cli(*FEDAVG)[1]


# ---------------------------------------------------------------------------- TensorBoard


def points(folder):
    """Return the scalars of a run's event files: name -> [(step, value)]."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()["scalars"]}


def test_the_mirror_of_a_run_that_goes_on_holds_every_point_once(cli, small_data):
    pytest.importorskip("tensorboard")
    folder, command = small_data / "runs" / "a", (*FEDAVG, "--eval-every", 1)
    assert cli(*command, "--rounds", 1)[0] == 0
    assert not (folder / "tensorboard").exists()
    for rounds in (2, 3, 3):  # the last finds the run finished
        assert cli(*command, "--rounds", rounds, "--tensorboard")[0] == 0
        records, mirrored = Run(folder).records(), points(folder)
        for name in ("val_acc", "train_loss", "bytes_up"):
            logged = [(r["round"], r[name]) for r in records if name in r]
            assert [step for step, _ in mirrored[name]] == [step for step, _ in logged]
            assert [v for _, v in mirrored[name]] == pytest.approx([v for _, v in logged])
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_records_within_an_epoch_are_counted_and_notes_left_out(tmp_path):
    pytest.importorskip("tensorboard")
    log = [
        {"epoch": 0, "val_acc": 0.1},
        {"note": "another machine"},
        {"epoch": 0.5, "val_acc": 0.2},
    ]
    run = SimpleNamespace(folder=tmp_path, records=lambda: log)
    Mirror(EventFiles, run, "epoch").add([{"epoch": 1, "val_acc": 0.3}])
    mirrored = points(tmp_path)
    assert mirrored["val_acc"] == [(i, pytest.approx(0.1 * (i + 1))) for i in range(3)]
    assert mirrored["epoch"] == [(1, 0.5), (2, 1.0)]


class FakeWandb:
    """Stands in for Weights & Biases: a run by id, which goes on where it was."""

    def __init__(self):
        self.runs = {}

    def init(self, *, id, name, config, **settings):
        return self.runs.setdefault(id, self.Run(name, config))

    class Run:
        def __init__(self, name, config):
            self.name, self.config, self.step, self.logged = name, config, 0, []

        def log(self, figures, step):
            assert step >= self.step
            self.step = step + 1
            self.logged.append((step, figures))


def test_the_other_mirror_holds_every_point_once_too(cli, small_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb := FakeWandb())
    for rounds in (1, 3, 3):
        assert cli(*FEDAVG, "--eval-every", 1, "--rounds", rounds, "--wandb")[0] == 0
    (mirrored,) = wandb.runs.values()
    records = Run(small_data / "runs" / "a").records()
    assert mirrored.name == "a" and mirrored.config["J"] == 1
    assert [step for step, _ in mirrored.logged] == [0, 1, 2, 3]
    assert [f["val_acc"] for _, f in mirrored.logged] == [r["val_acc"] for r in records]


@pytest.mark.parametrize("option", PACKAGES)
def test_without_the_package_it_is_refused_before_anything_is_made(
    cli, small_data, monkeypatch, option
):
    monkeypatch.setitem(sys.modules, PACKAGES[option], None)
    status, _, err = cli(*FEDAVG, f"--{option}")
    assert status == 2 and err.strip().endswith(f"pip install {option}")
    assert not (small_data / "runs").exists()
