"""A run's folder: what is written is what is read, and damage never passes for data."""

import contextlib
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
from pathlib import Path

import numpy as np
import pytest
import torch
from walk import Walk

from machine.runs import (
    NAMES,
    STATES,
    Interrupted,
    Run,
    best_record,
    drive,
    evaluations_since_best,
)
from machine.safe_files import (
    SEAL,
    DamagedFile,
    WrongFile,
    fcntl,
    load_checked,
    save_checked,
    write_json,
)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.open({"rounds": 9})
    return run


def test_other_options_are_refused_by_name_and_free_ones_pass(run):
    before = run.config_path.read_bytes()
    with pytest.raises(ValueError, match="rounds is 9 there and 10 here"):
        Run(run.folder).open({"rounds": 10})
    assert run.config_path.read_bytes() == before
    Run(run.folder).open({"rounds": 10}, free={"rounds"})
    assert run.config()["options"] == {"rounds": 10}


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


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "gone"])
def test_a_damaged_checkpoint_gives_way_to_its_predecessor(run, damage, capsys):
    drive(run, Walk(), "round", 5)
    drive(run, Walk(), "round", 7)
    raw = bytearray(run.checkpoint_path.read_bytes())
    if damage == "gone":
        run.checkpoint_path.unlink()
    else:
        raw[len(raw) // 2] ^= 4
        cut = {"truncate": raw[:-9], "flip": raw, "empty": b""}[damage]
        run.checkpoint_path.write_bytes(cut)
    state = (again := Run(run.folder)).restore()
    assert state["process"]["round"] == 5
    assert again.records()[-1]["round"] == 5
    assert damage == "gone" or "checkpoint.pt is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("killed_at", range(1, 4))
def test_a_damaged_checkpoint_never_takes_its_predecessors_place(run, killed_at, monkeypatch):
    drive(run, Walk(), "round", 5)
    drive(run, Walk(), "round", 7)
    run.checkpoint_path.write_bytes(b"damaged")
    rename, calls = os.replace, iter(range(1, 9))

    def replace(*paths):
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt) if killed_at < 3 else contextlib.nullcontext():
        drive(again := Run(run.folder), Walk(), "round", 7)
    monkeypatch.undo()
    again.close()
    assert Run(run.folder).restore()["process"]["round"] == (5 if killed_at < 3 else 7)
    assert load_checked(run.previous_path)["state"]["process"]["round"] == 5


def test_two_damaged_checkpoints_stop_the_run(run):
    drive(run, Walk(), "round", 5)
    drive(run, Walk(), "round", 7)
    for path in (run.checkpoint_path, run.previous_path):
        path.write_bytes(b"nothing")
    with pytest.raises(DamagedFile, match=r"checkpoint.pt is damaged.*prev.pt is damaged"):
        run.restore()


@pytest.mark.parametrize("damage", ["flip", "truncate", "gone"])
def test_a_damaged_log_is_written_anew_from_the_checkpoint(run, damage, capsys):
    drive(run, Walk(), "round", 5)
    whole = run.log_path.read_bytes()
    flipped = whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]
    run.log_path.write_bytes({"flip": flipped, "truncate": whole[:-9], "gone": b""}[damage])
    assert [r["round"] for r in run.vouched_records()] == [0, 1, 2, 3, 4, 5]
    assert Run(run.folder).restore()["process"]["round"] == 5
    assert run.log_path.read_bytes() == whole
    assert "log.jsonl is not as the checkpoint knows it" in capsys.readouterr().out


def test_a_folder_without_an_id_is_read_and_never_gone_on_with(run):
    run.log({"round": 0})
    write_json(run.config_path, {k: run.config()[k] for k in ("format", "options")})
    assert Run(run.folder).vouched_records() == [{"round": 0}]
    with pytest.raises(ValueError, match="config.json holds no id, which this version needs"):
        Run(run.folder).open({"rounds": 9})


def test_another_runs_file_does_not_pass_for_ones_own(tmp_path, capsys):
    ours, theirs = Run(tmp_path / "ours"), Run(tmp_path / "theirs")
    for run, rate in ((ours, 1), (theirs, 2)):
        run.open({"rate": rate, "rounds": 7}, free={"rounds"})
        drive(run, Walk(), "round", 5)
        drive(run, Walk(), "round", 7)
        run.keep("a.pt", torch.zeros(1))
        run.keep("b.pt", torch.ones(1))
    shutil.copy(theirs.checkpoint_path, ours.checkpoint_path)
    assert ours.load()["state"]["process"]["round"] == 5
    assert "checkpoint.pt is whole, and belongs elsewhere" in capsys.readouterr().out
    for other in (theirs.folder / "a.pt", ours.folder / "b.pt"):
        shutil.copy(other, ours.folder / "a.pt")
        with pytest.raises(DamagedFile, match="a.pt is whole, and belongs elsewhere"):
            ours.kept("a.pt")
    assert ours.kept("b.pt") == 1
    save_checked(ours.folder / "b.pt", torch.zeros(1))
    with pytest.raises(DamagedFile, match="b.pt is whole, and belongs elsewhere"):
        ours.kept("b.pt")
    ours.config_path.unlink()  # typed again, the command makes the same; another does not
    (same := Run(ours.folder)).open({"rate": 1, "rounds": 9}, free={"rounds"})
    assert same.load()["state"]["process"]["round"] == 5
    ours.config_path.unlink()
    with pytest.raises(ValueError, match="ours is not empty and is no run's folder: take another"):
        Run(ours.folder).open({"rate": 3, "rounds": 7}, free={"rounds"})
    assert not ours.config_path.exists()


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_every_flipped_bit_of_a_json_file_is_found_or_says_the_same(run, name, capsys):
    run.log({"round": 1, "val_acc": 0.5})
    run.summarise(round=1)
    whole, known = (run.folder / name).read_bytes(), (run.config(), run.summary())
    found = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        (run.folder / name).write_bytes(damaged)
        try:
            read = Run(run.folder).config(), run.summary()
        except ValueError as error:
            assert name in str(error)
            found += 1
            continue
        if "summary.json is damaged" in capsys.readouterr().out:
            found += 1
            continue
        for value, expected in zip(read, known, strict=True):  # a flip in the key of the hash
            assert {**value, SEAL: ""}.items() >= {**expected, SEAL: ""}.items()
    assert found >= 8 * (len(whole) - len(SEAL))


def test_what_a_killed_process_half_wrote_goes_at_the_next_start(run, tmp_path):
    run.close()
    half = "checkpoint.new.pt.0123abcd-1.tmp"
    (inner := Run(run.folder / "inner")).open({})
    (tmp_path / "elsewhere").mkdir()
    (run.folder / "link").symlink_to(tmp_path / "elsewhere")
    places = [run.folder / name for name in (".", "scaffold", "local_norm", "inner", "notes")]
    for folder in (*places, tmp_path / "elsewhere"):
        folder.mkdir(exist_ok=True)
        (folder / half).write_bytes(b"half")
        (folder / "notes.tmp").write_bytes(b"mine")
    Run(run.folder).open({"rounds": 9})
    stay = {inner.folder, run.folder / "notes", tmp_path / "elsewhere"}
    assert {path.parent for path in tmp_path.rglob(half)} == stay
    assert len(list(tmp_path.rglob("notes.tmp"))) == 6


# ---------------------------------------------------------------------------- others' files


def snapshot(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("names", [
    ("notes.tmp",), ("log.jsonl", "curves.png"), ("mask.pt", "head.pt"), ("summary.json",),
    ("lock",), ("search.json",), ("checkpoint.pt",), ("sub/",), ("scaffold/x.pt",),
    ("config.json.tmp",),
])  # fmt: skip
def test_a_folder_that_is_no_run_is_refused_and_loses_nothing(tmp_path, names):
    folder = tmp_path / "mine"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="mine is not empty and is no run's folder: take another"):
        Run(folder).open({"rounds": 9})
    assert snapshot(tmp_path) == before


def test_what_a_killed_opening_leaves_is_not_in_the_way(tmp_path):
    folder = tmp_path / "run"
    (folder / "search" / "lr0.1-wd0").mkdir(parents=True)
    for name in ("lock", "config.json.0123abcd-99.tmp"):
        (folder / name).touch()
    (folder / "search.json").write_text("{}")
    (run := Run(folder)).open({"rounds": 9})
    assert {p.name for p in folder.iterdir()} == {"search", "search.json", "lock", "config.json"}
    assert run.config()["options"] == {"rounds": 9}


@pytest.mark.parametrize("there", [(), ("folder",), ("folder", "lock")])
def test_an_opening_takes_back_what_it_made_and_no_more(tmp_path, there):
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
    if "lock" in there:
        (folder / "lock").touch()
    before = snapshot(tmp_path)
    for error in (ValueError, OSError, MemoryError, RuntimeError):
        (run := Run(folder)).open({"rounds": 9})
        with pytest.raises(error), run.opening():
            run.keep("head.pt", 3)
            raise error
        assert snapshot(tmp_path) == before


def test_an_opening_that_goes_on_takes_nothing_back(run):
    drive(run, Walk(), "round", 2)
    for name in ("config.json", "log.jsonl"):  # with a checkpoint alone it is a run's folder too
        (run.folder / name).unlink()
        run.keep("head.pt", 3) if run.config_path.exists() else None
        (again := Run(run.folder)).open({"rounds": 9})
        before = snapshot(run.folder)
        with pytest.raises(ValueError), again.opening():
            raise ValueError
        missing = before.keys() - snapshot(run.folder).keys()
        assert {p.name for p in missing} <= {"config.json", "lock"}


@pytest.mark.parametrize("name", NAMES)
def test_no_file_of_a_run_is_a_link(run, tmp_path, name):
    drive(run, Walk(), "round", 2)
    run.close()
    (outside := tmp_path / "outside").mkdir()
    (outside / "precious").write_text("precious")
    path = run.folder / name
    path.unlink(missing_ok=True)
    path.symlink_to(outside if name in ("search", "tensorboard", *STATES) else outside / "precious")
    before = snapshot(outside)
    for use in (lambda run: run.open({"rounds": 9}), Run.config, Run.id, Run.check):
        with pytest.raises(ValueError, match=f"{name} is a link, and what a run writes stays in"):
            use(Run(run.folder))
    assert snapshot(outside) == before


def test_a_log_that_becomes_a_link_is_not_followed(run, tmp_path):
    run.log({"round": 0})
    run.log_path.rename(tmp_path / "log")
    run.log_path.symlink_to(tmp_path / "log")
    before = (tmp_path / "log").read_bytes()
    with pytest.raises(OSError, match="cannot write .*log.jsonl"):
        run.log({"round": 1})
    assert (tmp_path / "log").read_bytes() == before
    run.log_path.unlink()
    run.keep("a.pt", 3)
    (run.folder / "a.pt").rename(tmp_path / "a.pt")
    (run.folder / "a.pt").symlink_to(tmp_path / "a.pt")
    with pytest.raises(WrongFile, match="a.pt is a link"):
        run.kept("a.pt")


def test_links_of_others_in_a_runs_folder_stay_and_its_folder_may_be_a_link(run, tmp_path):
    run.close()
    (run.folder / "extra").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(run.folder)
    drive(run := Run(tmp_path / "alias"), Walk(), "round", 2)
    Run(tmp_path / "alias").open({"rounds": 9})
    assert (run.folder / "extra").is_symlink() and len(run.records()) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["config.json", "checkpoint.pt", "log.jsonl", "lock", "mask.pt"])
def test_a_pipe_in_a_files_place_is_refused_at_once(run, name):
    run.close()
    (run.folder / name).unlink(missing_ok=True)
    os.mkfifo(run.folder / name)
    for use in (lambda run: run.open({"rounds": 9}), Run.config):
        with pytest.raises(ValueError, match=f"{name} is no regular file"):
            use(Run(run.folder))


# ---------------------------------------------------------------------------- wrong contents


def test_a_summary_counts_for_its_own_run_alone(tmp_path, capsys):
    ours, theirs = Run(tmp_path / "ours"), Run(tmp_path / "theirs")
    for run, rate in ((ours, 1), (theirs, 2)):
        run.open({"rate": rate})
        assert run.summarise(round=3)["run"] == run.id() == run.summary()["run"]
    for name, counts in (("theirs", ()), ("nobody's", (True,)), ("ours", (False, True))):
        if name == "theirs":
            shutil.copy(theirs.folder / "summary.json", ours.folder / "summary.json")
        elif name == "ours":
            ours.summarise(round=3)
        else:
            write_json(ours.folder / "summary.json", {"round": 3}, sealed=True)
        for unbound in (False, True):
            summary, said = ours.summary(unbound=unbound), capsys.readouterr().out
            assert (summary is not None) == (unbound in counts), (name, unbound)
            assert ("summary.json is not the summary of this run" in said) == (summary is None)


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
    before = snapshot(run.folder)
    with pytest.raises(ValueError, match="checkpoint.pt is whole, and its contents do not fit"):
        drive(Run(run.folder), Copied(), "round", 9)
    assert snapshot(run.folder) == before


def test_a_whole_checkpoint_with_another_log_is_named(run):
    drive(run, Walk(), "round", 5)
    for log in (3, {}, {"text": 3}, {"text": "no JSON\n"}):
        checkpoint = torch.load(run.checkpoint_path, weights_only=True) | {"log": log}
        save_checked(run.checkpoint_path, checkpoint, run.purpose("checkpoint"))
        with pytest.raises(ValueError, match="checkpoint.pt is whole, and its contents do not fit"):
            Run(run.folder).restore()


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


def test_another_environment_is_noted_with_the_round(run):
    drive(run, Walk(), "round", 2, environment={"device": "cpu"})
    drive(Run(run.folder), Walk(), "round", 3, environment={"device": "T4"})
    notes = [r["note"] for r in run.records() if "note" in r]
    assert notes == ["not bit-exact from round 3 on: device was cpu, is T4"]


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


def test_the_summary_holds_the_last_and_the_best_evaluation(run):
    for t, accuracy in enumerate([0.1, 0.5, 0.3]):
        run.log({"round": t, "val_acc": accuracy})
    run.log({"note": "another machine"})
    summary = run.summarise(({"test_acc": 0.2}, {"test_acc": 0.4}), round=3)
    assert summary["final"] == {"round": 2, "val_acc": 0.3, "test_acc": 0.2}
    assert summary["best_by_validation"] == {"round": 1, "val_acc": 0.5, "test_acc": 0.4}


def test_a_file_that_would_run_code_does_not(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    with pytest.raises(ValueError, match="state: an Evil, which could not be read back"):
        save_checked(tmp_path / "x.pt", {"state": Evil()})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("machine.safe_files._readable", lambda value, where: value)
    save_checked(tmp_path / "x.pt", {"state": Evil()})
    with pytest.raises(DamagedFile, match="more than tensors"):
        load_checked(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


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


def test_a_checkpoint_that_refers_to_a_damaged_file_gives_way_to_its_predecessor(run, capsys):
    drive(run, Walk(), "round", 5)
    drive(run, Walk(), "round", 7)
    assert capsys.readouterr().out == f"{run.folder} goes on from round 5\n"

    def take(state):
        if state["process"]["round"] in bad:
            raise DamagedFile("client3-2.pt is damaged")

    bad = {7}
    assert Run(run.folder).restore(take)["process"]["round"] == 5
    said = capsys.readouterr().out
    assert said == "warning: client3-2.pt is damaged; going on from checkpoint.prev.pt\n"
    assert [r["round"] for r in Run(run.folder).records()] == [0, 1, 2, 3, 4, 5]
    bad = {5, 7}
    with pytest.raises(DamagedFile, match="Delete .* to start over"):
        Run(run.folder).restore(take)


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


def test_options_are_compared_as_their_json(tmp_path):
    options = dict(path=Path("data"), lr=np.float32(0.5), ends=(1, 2), scale=float("nan"))
    for _ in range(2):
        (run := Run(tmp_path / "run")).open(options)
        run.close()
    assert run.config()["options"] == json.loads(run.config_path.read_text())["options"]
    with pytest.raises(ValueError, match=r"ends is \[1, 2\] there and \[1, 3\] here"):
        Run(run.folder).open(options | {"ends": (1, 3)})
    with pytest.raises(ValueError, match="options.scope: a set, which JSON cannot hold"):
        Run(tmp_path / "other").open({"scope": {"head"}})
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------------------- elsewhere


def test_a_thread_drives_and_catches_no_signal(run):
    handler, ends = signal.getsignal(signal.SIGINT), []

    def work():
        ends.append(drive(run, Walk(), "round", 3))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ends and run.load()["state"]["process"]["round"] == 3
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_an_output_cannot_print_is_escaped(tmp_path, monkeypatch):
    for rounds in (1, 2):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
        (run := Run(tmp_path / "größe \udc80")).open({})
        drive(run, Walk(), "round", rounds)
    assert rb"gr\xf6\xdfe \udc80 goes on from round 1" in raw.getvalue()


@pytest.mark.parametrize("name", ["checkpoint.pt", "clients/3.pt"])
@pytest.mark.parametrize("change", ["wrong", "gone", "unreadable"])
def test_no_message_advises_to_delete_what_is_whole(tmp_path, name, change, monkeypatch):
    ours, theirs = Run(tmp_path / "ours"), Run(tmp_path / "theirs")
    for run, rate in ((ours, 1), (theirs, 2)):
        run.open({"rate": rate})
        (run.folder / "clients").mkdir()
        run.keep("clients/3.pt", torch.zeros(1))
        drive(run, Walk(), "round", 5)
    if change == "wrong":
        shutil.copy(theirs.folder / name, ours.folder / name)
    elif change == "unreadable":
        monkeypatch.setattr("machine.safe_files._readable", lambda value, where: value)
        ours.keep(name, {1: deque()}) if "/" in name else ours.save({"x": deque()})
        ours.previous_path.unlink(missing_ok=True)
    elif "/" in name:
        (ours.folder / name).unlink()
    else:
        return  # no checkpoint: the run starts over
    with pytest.raises(DamagedFile, match="Put the run's own file in its place, or") as refused:
        ours.load(lambda state: ours.kept("clients/3.pt"))
    assert "elete" not in str(refused.value) and str(refused.value).count("--name") == 1
    if "/" in name and change != "gone":
        with pytest.raises(WrongFile, match="3.pt is whole, and .* in its place, or take another"):
            ours.kept(name)
    with pytest.raises(ValueError, match="take another --name|Take another --name") as refused:
        Run(ours.folder).open({"rate": 3})
    assert "elete" not in str(refused.value)
