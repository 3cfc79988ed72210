"""A run's folder: what is written is what is read, and damage never passes for data."""

import contextlib
import json
import os
import shutil
import signal
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from walk import Walk

from machine.drive import drive
from machine.runs import NAMES, STATES, Run
from machine.safe_files import SEAL, DamagedFile, WrongFile, load_checked, save_checked, write_json


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
    with pytest.raises(ValueError, match="a is None there and 0 here; .* here; and 2 more. Take"):
        Run(run.folder).open({"rounds": 10} | dict.fromkeys("abcdefg", 0))


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


@contextlib.contextmanager
def killed_at(number):
    """Interrupt at a rename: of a save 1 completes checkpoint.new.pt, the others put it in place.

    A number that is not reached interrupts nothing.
    """
    rename, numbers = os.replace, iter(range(1, 99))

    def replace(*paths):
        if next(numbers) == number:
            raise KeyboardInterrupt
        rename(*paths)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        yield


def round_of(path):
    return load_checked(path)["state"]["process"]["round"]


@pytest.mark.parametrize(("number", "newest"), [(1, 5), (2, 7), (3, 7)])
def test_a_damaged_checkpoint_never_takes_its_predecessors_place(run, number, newest):
    drive(run, Walk(), "round", 5)
    drive(run, Walk(), "round", 7)
    run.checkpoint_path.write_bytes(b"damaged")
    with killed_at(number):
        drive(Run(run.folder), Walk(), "round", 7)
    assert round_of(run.previous_path) == 5
    assert Run(run.folder).restore()["process"]["round"] == newest
    drive(Run(run.folder), Walk(), "round", 9)
    assert round_of(run.checkpoint_path) == 9 and round_of(run.previous_path) == newest


@pytest.mark.parametrize(("number", "newest"), [(1, 7), (2, 9), (3, 9), (4, 9)])
@pytest.mark.parametrize("again_at", range(1, 6))
def test_a_kill_within_a_save_loses_no_whole_checkpoint(run, number, newest, again_at, capsys):
    drive(run, Walk(), "round", 5)
    drive(run, Walk(), "round", 7)
    with killed_at(number):
        drive(Run(run.folder), Walk(), "round", 9)
    assert Run(run.folder).load()["state"]["process"]["round"] == newest
    assert Run(run.folder).restore()["process"]["round"] == newest
    assert run.records()[-1]["round"] == newest
    with killed_at(again_at):
        drive(Run(run.folder), Walk(), "round", 11)
    assert Run(run.folder).restore()["process"]["round"] in (newest, 11)
    drive(Run(run.folder), walk := Walk(), "round", 13)
    assert round_of(run.checkpoint_path) == 13 and round_of(run.previous_path) in (newest, 11)
    assert not run.fresh_path.exists() and "warning" not in capsys.readouterr().out
    expected = Walk()
    records = [{"round": 0}, *(expected.advance() for _ in range(13))]
    assert torch.equal(walk.value, expected.value) and run.records() == records


@pytest.mark.parametrize("there", [True, False])
def test_a_new_checkpoint_that_is_torn_is_none(run, there, capsys):
    drive(run, Walk(), "round", 5)
    raw = run.checkpoint_path.read_bytes()
    run.checkpoint_path.rename(run.previous_path) if there else run.checkpoint_path.unlink()
    run.fresh_path.write_bytes(raw[:-9])
    drive(Run(run.folder), walk := Walk(), "round", 7)
    assert "warning" not in capsys.readouterr().out
    assert walk.round == round_of(run.checkpoint_path) == 7 and not run.fresh_path.exists()
    assert run.previous_path.exists() == there and (not there or round_of(run.previous_path) == 5)


def test_a_new_checkpoint_alone_is_a_runs_and_another_runs_is_named(run, tmp_path, capsys):
    drive(run, Walk(), "round", 5)
    run.checkpoint_path.rename(run.fresh_path)
    run.config_path.unlink()
    (again := Run(run.folder)).open({"rounds": 9})
    assert again.saved() and again.load()["state"]["process"]["round"] == 5
    (other := Run(tmp_path / "other")).open({"rounds": 8})
    drive(other, Walk(), "round", 4)
    run.fresh_path.rename(run.checkpoint_path)
    shutil.copy(other.checkpoint_path, run.fresh_path)
    assert again.load()["state"]["process"]["round"] == 5
    said = capsys.readouterr().out
    assert "checkpoint.new.pt is whole, and belongs elsewhere" in said and said.count("\n") == 1


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
        run.save_file("a.pt", torch.zeros(1))
        run.save_file("b.pt", torch.ones(1))
    shutil.copy(theirs.checkpoint_path, ours.checkpoint_path)
    assert ours.load()["state"]["process"]["round"] == 5
    assert "checkpoint.pt is whole, and belongs elsewhere" in capsys.readouterr().out
    for other in (theirs.folder / "a.pt", ours.folder / "b.pt"):
        shutil.copy(other, ours.folder / "a.pt")
        with pytest.raises(DamagedFile, match="a.pt is whole, and belongs elsewhere"):
            ours.load_file("a.pt")
    assert ours.load_file("b.pt") == 1
    save_checked(ours.folder / "b.pt", torch.zeros(1))
    with pytest.raises(DamagedFile, match="b.pt is whole, and belongs elsewhere"):
        ours.load_file("b.pt")
    ours.config_path.unlink()  # typed again, the command makes the same; another does not
    (same := Run(ours.folder)).open({"rate": 1, "rounds": 9}, free={"rounds"})
    assert same.load()["state"]["process"]["round"] == 5
    ours.config_path.unlink()
    with pytest.raises(ValueError, match="ours is not empty and is no run's folder: take another"):
        Run(ours.folder).open({"rate": 3, "rounds": 7}, free={"rounds"})
    assert not ours.config_path.exists()


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_every_flipped_bit_of_a_json_file_is_found_or_says_the_same(run, name):
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


def test_a_process_that_does_not_write_writes_nothing(run):
    drive(run, Walk(), "round", 2)
    before = snapshot(run.folder)
    reader = Run(run.folder, writes=False)
    reader.open({"rounds": 9})
    drive(reader, Walk(), "round", 3)
    reader.save_file("head.pt", torch.zeros(1))
    assert snapshot(run.folder) == before


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
            run.save_file("head.pt", 3)
            raise error
        assert snapshot(tmp_path) == before


def test_an_opening_that_goes_on_takes_nothing_back(run):
    drive(run, Walk(), "round", 2)
    for name in ("config.json", "log.jsonl"):  # with a checkpoint alone it is a run's folder too
        (run.folder / name).unlink()
        run.save_file("head.pt", 3) if run.config_path.exists() else None
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
    run.save_file("a.pt", 3)
    (run.folder / "a.pt").rename(tmp_path / "a.pt")
    (run.folder / "a.pt").symlink_to(tmp_path / "a.pt")
    with pytest.raises(WrongFile, match="a.pt is a link"):
        run.load_file("a.pt")


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


def test_a_summary_counts_for_its_own_run_alone(tmp_path):
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
            if unbound in counts:
                assert ours.summary(unbound=unbound)["round"] == 3
                continue
            with pytest.raises(WrongFile, match="summary.json is not the summary of this run"):
                ours.summary(unbound=unbound)
    (ours.folder / "summary.json").unlink()
    assert ours.summary() is None


def test_a_whole_checkpoint_with_another_log_is_named(run):
    drive(run, Walk(), "round", 5)
    for log in (3, {}, {"text": 3}, {"text": "no JSON\n"}):
        checkpoint = torch.load(run.checkpoint_path, weights_only=True) | {"log": log}
        save_checked(run.checkpoint_path, checkpoint, run.purpose("checkpoint"))
        with pytest.raises(ValueError, match="checkpoint.pt is whole, and its contents do not fit"):
            Run(run.folder).restore()


def test_the_summary_holds_the_last_and_the_best_evaluation(run):
    for t, accuracy in enumerate([0.1, 0.5, 0.3]):
        run.log({"round": t, "val_acc": accuracy})
    run.log({"note": "another machine"})
    summary = run.summarise(({"test_acc": 0.2}, {"test_acc": 0.4}), round=3)
    assert summary["final"] == {"round": 2, "val_acc": 0.3, "test_acc": 0.2}
    assert summary["best_by_validation"] == {"round": 1, "val_acc": 0.5, "test_acc": 0.4}


def test_a_files_own_keys_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="'options' is a key of config.json's own"):
        Run(tmp_path / "new").open({}, extra={"options": {}})
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="'run' is a key of summary.json's own"):
        run.summarise(run="x")


def test_a_full_disk_leaves_no_part_of_a_line(run):
    resource = pytest.importorskip("resource")
    run.log({"round": 1})
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.SIG_IGN
    handler = signal.signal(signal.SIGXFSZ, ignored)
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.log_path.stat().st_size + 10, limit[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*log.jsonl: File too large"):
            run.log({"round": 2, "x": "y" * 50})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    run.log({"round": 2})
    assert run.records() == [{"round": 1}, {"round": 2}] == run.logged()


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


@pytest.mark.parametrize("name", ["checkpoint.pt", "clients/3.pt"])
@pytest.mark.parametrize("change", ["wrong", "gone", "unreadable"])
def test_no_message_advises_to_delete_what_is_whole(tmp_path, name, change, monkeypatch):
    ours, theirs = Run(tmp_path / "ours"), Run(tmp_path / "theirs")
    for run, rate in ((ours, 1), (theirs, 2)):
        run.open({"rate": rate})
        (run.folder / "clients").mkdir()
        run.save_file("clients/3.pt", torch.zeros(1))
        drive(run, Walk(), "round", 5)
    if change == "wrong":
        shutil.copy(theirs.folder / name, ours.folder / name)
    elif change == "unreadable":
        monkeypatch.setattr("machine.safe_files._readable", lambda value, where: value)
        ours.save_file(name, {1: deque()}) if "/" in name else ours.save({"x": deque()})
        ours.previous_path.unlink(missing_ok=True)
    elif "/" in name:
        (ours.folder / name).unlink()
    else:
        return  # no checkpoint: the run starts over
    with pytest.raises(DamagedFile, match="Put the run's own file in its place, or") as refused:
        ours.load(lambda state: ours.load_file("clients/3.pt"))
    assert "elete" not in str(refused.value) and str(refused.value).count("--name") == 1
    if "/" in name and change != "gone":
        with pytest.raises(WrongFile, match="3.pt is whole, and .* in its place, or take another"):
            ours.load_file(name)
    with pytest.raises(ValueError, match="take another --name|Take another --name") as refused:
        Run(ours.folder).open({"rate": 3})
    assert "elete" not in str(refused.value)
