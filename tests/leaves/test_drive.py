"""The loop: a run that was stopped ends in the bits of one that was not, and keeps its best."""

import io
import json
import math
import os
import random
import shutil
import signal
import sys
import threading
from collections import deque

import numpy as np
import pytest
import torch
from walk import Walk

from machine.drive import Interrupted, drive, evaluations_since_best
from machine.runs import Run, best_record
from machine.safe_files import fcntl, save_checked


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.open({"rounds": 9})
    return run


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    reference, broken = (Run(tmp_path / name) for name in ("reference", "broken"))
    for run in (reference, broken):
        run.open({})
    drive(reference, Walk(), "round", 20)
    for stop in (3, 4, 11, 20):
        drive(broken, Walk(), "round", stop)
        broken.log({"round": "a line after the last checkpoint"})
        broken = Run(broken.folder)
    broken.restore()
    assert broken.log_path.read_bytes() == reference.log_path.read_bytes()
    a, b = (run.load()["state"]["process"] for run in (reference, broken))
    assert torch.equal(a["value"], b["value"])


def test_a_kill_before_the_first_checkpoint_starts_over(run):
    run.log({"round": 1})
    drive(again := Run(run.folder), Walk(), "round", 2)
    assert [r["round"] for r in again.records()] == [0, 1, 2]


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(run, signum, status):
    walk, handler = Walk(), signal.getsignal(signum)

    def complete(record):
        if record["round"] == 4:
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted) as stop:
        drive(run, walk, "round", 9, complete=complete)
    assert stop.value.exit_status == status
    assert Run(run.folder).restore()["process"]["round"] == 4
    assert signal.getsignal(signum) is handler


def test_a_signal_during_the_first_evaluation_is_not_lost(tmp_path):
    run = Run(tmp_path / "run")
    run.open({})

    def evaluate(record):
        if not record["round"]:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as stop:
        drive(run, Walk(), "round", 5, complete=evaluate)
    assert stop.value.exit_status == 143
    assert run.load()["state"]["process"]["round"] == 1


def test_a_thread_drives_and_catches_no_signal(run):
    handler, ends = signal.getsignal(signal.SIGINT), []

    def work():
        ends.append(drive(run, Walk(), "round", 3))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ends and run.load()["state"]["process"]["round"] == 3
    assert signal.getsignal(signal.SIGINT) is handler


def test_another_environment_is_noted_with_the_round(run):
    drive(run, Walk(), "round", 2, environment={"device": "cpu"})
    drive(Run(run.folder), Walk(), "round", 3, environment={"device": "T4"})
    notes = [r["note"] for r in run.records() if "note" in r]
    assert notes == ["not bit-exact from round 3 on: device was cpu, is T4"]


@pytest.mark.skipif(fcntl is None, reason="needs flock")
@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_that_is_deleted_under_a_run_stops_it(run, anew):
    def delete(record):
        if record["round"] == 3:
            shutil.rmtree(run.folder)
            if anew:
                run.folder.mkdir()
                (run.folder / "lock").touch()

    with pytest.raises(FileNotFoundError, match="run was deleted, or made anew, while it was in"):
        drive(run, Walk(), "round", 9, complete=delete)
    assert not (run.folder / "log.jsonl").exists()
    run.close()


def test_what_an_output_cannot_print_is_escaped(tmp_path, monkeypatch):
    for rounds in (1, 2):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
        (run := Run(tmp_path / "größe \udc80")).open({})
        drive(run, Walk(), "round", rounds)
    assert rb"gr\xf6\xdfe \udc80 goes on from round 1" in raw.getvalue()


# ---------------------------------------------------------------------------- the best


class Judged(Walk):
    """A walk that is validated at every round, by a table; its weights are one tensor."""

    CURVE = (0.1, 0.3, 0.2, 0.5, 0.5, 0.4, 0.45, 0.9)
    weights = torch.zeros(3, dtype=torch.float64)

    def run(self, folder, patience=3, total=7, complete=lambda record: None, **options):
        run = Run(folder)
        run.open({})

        def judge(record):
            complete(record)
            self.judge(record)

        drive(
            run,
            self,
            "round",
            total,
            complete=judge,
            patience=patience,
            weights=lambda: self.weights,
            **options,
        )
        return run

    def judge(self, record):
        self.weights.copy_(self.value)
        record["val_acc"] = self.CURVE[record["round"]]


def best_of(run):
    best = run.load()["state"]["best"]
    return best["at"], best["weights"]


def test_a_run_stops_when_validation_has_not_improved(tmp_path):
    walk = Judged()
    run = walk.run(tmp_path / "run")
    assert walk.round == 6  # the best, the first 0.5, came in round 3
    reference = Judged()
    for _ in range(3):
        reference.advance()
    at, value = best_of(run)
    assert at == 3 and torch.equal(value, reference.value)
    again = Judged()
    again.run(tmp_path / "run")
    assert again.round == 6
    further = Judged()  # more patience goes on from there
    assert further.run(tmp_path / "run", patience=4).load()["state"]["process"]["round"] == 7
    assert further.round == 7


@pytest.mark.parametrize("stop", range(1, 6))
@pytest.mark.parametrize("save_seconds", [0.0, 60.0])
def test_a_kill_leaves_no_best_that_the_log_does_not_know(tmp_path, stop, save_seconds):
    class Killed(Exception):
        pass

    def kill(record):
        if record["round"] == stop:
            raise Killed

    with pytest.raises(Killed):
        Judged().run(tmp_path / "run", complete=kill, save_seconds=save_seconds)
    if (run := Run(tmp_path / "run")).load():
        assert best_of(run)[0] == (0, 1, 1, 3, 3)[stop - 1]  # of the rounds before
    walk, whole = Judged(), Judged()
    ends = [w.run(tmp_path / name) for w, name in ((walk, "run"), (whole, "whole"))]
    assert walk.round == whole.round == 6
    assert ends[0].records() == ends[1].records()
    best = [best_of(run) for run in ends]
    assert best[0][0] == best[1][0] == 3 and torch.equal(best[0][1], best[1][1])


def test_a_damaged_checkpoints_predecessor_has_its_best(tmp_path):
    def damage(record):
        if record["round"] == 4:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        Judged().run(tmp_path / "run", complete=damage, save_seconds=0.0)
    run = Run(tmp_path / "run")
    run.checkpoint_path.write_bytes(b"damaged")
    assert best_of(run)[0] == 3


@pytest.mark.parametrize(
    "accuracies, best, since",
    [([math.nan, 0.5, 0.6], 2, 0), ([0.5, math.nan, 0.4], 0, 2), ([math.nan] * 3, None, 2)],
)
def test_a_nan_is_never_the_best(accuracies, best, since):
    records = [{"round": t, "val_acc": accuracy} for t, accuracy in enumerate(accuracies)]
    assert best_record(records) is (None if best is None else records[best])
    assert evaluations_since_best(records) == since


def test_what_validated_best_is_there_without_patience_too(tmp_path):
    assert best_of(Judged().run(tmp_path / "run", patience=None, total=4))[0] == 3
    assert best_of(Judged().run(tmp_path / "run", patience=None, total=6))[0] == 3
    assert best_of(Judged().run(tmp_path / "run", patience=None))[0] == 7


def test_a_run_that_kept_no_best_knows_from_its_log_what_beats_it(tmp_path):
    run = Run(tmp_path / "run")
    run.open({})
    drive(run, walk := Judged(), "round", 4, complete=walk.judge)  # no weights: none are kept
    assert not run.load()["state"]["best"]
    assert not Judged().run(tmp_path / "run", total=6).load()["state"]["best"]
    assert best_of(Judged().run(tmp_path / "run", patience=None))[0] == 7


# ---------------------------------------------------------------------------- what is taken


class Carrying(Walk):
    """A walk whose state and records hold something more."""

    def __init__(self, extra=None, **figures):
        super().__init__()
        self.extra, self.figures = extra, figures

    def advance(self):
        return super().advance() | self.figures

    def state_dict(self):
        return super().state_dict() | {"extra": self.extra}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.extra = state["extra"]


def test_a_state_that_could_not_be_read_back_is_refused_at_the_first_save(run):
    with pytest.raises(ValueError, match=r"state\.process\.extra\.seen: a deque, which could"):
        drive(run, Carrying({"seen": deque([1])}), "round", 9, save_seconds=0.0)
    assert [r["round"] for r in run.records()] == [0, 1] and not run.saved()


def test_generators_come_back_where_they_were(run):
    generators = random.Random(1), np.random.RandomState(2)
    drive(run, Carrying([generators[0].getstate(), generators[1].get_state()]), "round", 2)
    walk = Carrying()
    drive(Run(run.folder), walk, "round", 3)
    again = random.Random(), np.random.RandomState(3)
    again[0].setstate(walk.extra[0])
    again[1].set_state(walk.extra[1])
    for a, b in zip(generators, again, strict=True):
        assert [a.random() for _ in range(700)] == [b.random() for _ in range(700)]


def test_records_hold_the_numbers_of_numpy_and_torch(run):
    figures = dict(a=np.float32(0.5), b=np.int64(3), c=torch.tensor(0.5), d=np.bool_(True))
    figures |= dict(e=np.array([1, 2]), f=torch.tensor([0.5]), g=float("inf"))
    drive(run, Carrying(**figures), "round", 1)
    expected = dict(a=0.5, b=3, c=0.5, d=True, e=[1, 2], f=[0.5], g=float("inf"))
    assert run.records()[1].items() >= expected.items()
    run.log({"loss": float("nan")})
    assert np.isnan(json.loads(run.log_path.read_text().splitlines()[-1])["loss"])
    summary = run.summarise(best=np.float64(0.25))
    assert run.summary()["best"] == summary["best"] == 0.25


@pytest.mark.parametrize(("value", "place"), [
    ({1, 2}, "record.loss: a set"), ([0, {"x": 1j}], "record.loss.1.x: a complex"),
    (np.longdouble(1), "record.loss: a"), ({(1, 2): 3}, "record.loss: a dict"),
])  # fmt: skip
def test_a_record_that_json_cannot_hold_is_refused_by_name(run, value, place):
    with pytest.raises(ValueError, match=f"{place}.*, which JSON cannot hold"):
        drive(run, Carrying(loss=value), "round", 9)
    assert [r["round"] for r in run.records()] == [0]


# ---------------------------------------------------------------------------- wrong contents


class Copied(Walk):
    """A walk whose tensor stays where it is, as those of models do."""

    def load_state_dict(self, state):
        self.round = state["round"]
        self.value.copy_(state["value"])


WRONG = {
    "no process": lambda state: state.pop("process"),
    "no counter": lambda state: state["process"].pop("round"),
    "a counter of text": lambda state: state["process"].update(round="5"),
    "no tensor": lambda state: state["process"].update(value=[1, 2, 3]),
    "another shape": lambda state: state["process"].update(value=torch.zeros(1).double()),
    "another type": lambda state: state["process"].update(value=torch.zeros(3)),
    "no time": lambda state: state.pop("wall_seconds"),
    "time of text": lambda state: state.update(wall_seconds="1"),
    "no environment": lambda state: state.pop("environment"),
    "environment of numbers": lambda state: state.update(environment=3),
    "best of numbers": lambda state: state.update(best=3),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_whole_checkpoint_of_another_process_is_named_and_stays(run, wrong):
    drive(run, Walk(), "round", 5)
    drive(run, Walk(), "round", 7)
    checkpoint = run.load()
    WRONG[wrong](checkpoint["state"])
    save_checked(run.checkpoint_path, checkpoint, run.purpose("checkpoint"))
    before = {path: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(ValueError, match="checkpoint.pt is whole, and its contents do not fit"):
        drive(Run(run.folder), Copied(), "round", 9)
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
