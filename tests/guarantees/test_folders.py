"""A command never hurts what it did not make, and says in one line what is wrong with a folder."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, small_synthetic

import data
import train
from commands import search
from commands.options import Command
from machine import streams
from machine.runs import Run
from machine.safe_files import save_checked
from training import mask_cache
from training.mask_file import Mask

TINY = ("--data", "synthetic", "--clients", 10, "--fraction", 0.2, "--J", 1, "--batch-size", 4)
FEDAVG = ("fedavg", *TINY, "--name", "x", "--threads", 1)
MASKED = (*FEDAVG, "--head", "ridge", "--mask-rule", "random", "--scaffold", "--lr", 1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder above the runs of a masked command that is finished, and of another; made once."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synthetic_dataset", small_synthetic)
        patch.chdir(home)
        for options in ((), ("--name", "other", "--seed", 1)):
            command = (*MASKED, "--rounds", 1, *options)
            assert train.main([str(a) for a in command]) == 0
    return home


@pytest.fixture
def finished(trained, small_data):
    """A copy of the run below the working directory."""
    shutil.copytree(trained / "data", small_data / "data")
    return Path(shutil.copytree(trained / "runs" / "x", small_data / "runs" / "x"))


def snapshot(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def files(run):
    """Return what a run's files hold, but for config.json: --rounds is written there first."""
    return {p: content for p, content in snapshot(run).items() if p.name != "config.json"}


def refused(cli, *command):
    """Run a command that must end in one line and status 2."""
    status, _, err = cli(*command)
    assert status == 2 and err.count("\n") == 1 and err.startswith("train.py: error: "), err
    return err


# ---------------------------------------------------------------------------- no run's folder


@pytest.mark.parametrize("command", ["fedavg", "centralized", "ridge", "calibrate", "search"])
def test_a_folder_that_is_no_run_is_named_and_stays(cli, small_data, command):
    mine = small_data / "runs" / "mine"
    (mine / "sub").mkdir(parents=True)
    for name in ("notes.tmp", "sub/notes.tmp", "log.jsonl", "search.json", "head.pt"):
        (mine / name).write_text("mine\n")
    before = snapshot(mine)
    line = ["fedavg", "--search"] if command == "search" else [command]
    err = refused(cli, *line, "--data", "synthetic", "--name", "mine")
    assert "runs/mine is not empty and is no run's folder: take another --name" in err
    assert snapshot(mine) == before


@pytest.mark.parametrize("last", ["config.json", "log.jsonl", "checkpoint.pt"])
def test_what_a_search_leaves_above_it_is_a_runs_folder(cli, small_data, monkeypatch, last):
    searched = (*FEDAVG, "--rounds", 1, "--search", "--search-lr", 0.1, "--search-weight-decay", 0)
    copy = search.shutil.copyfile

    def killed(source, target):
        if source.name == last:
            raise KeyboardInterrupt
        copy(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(search.shutil, "copyfile", killed)
        assert cli(*searched)[0] == 130
    folder = small_data / "runs" / "x"
    assert (folder / "config.json").exists() == (last != "config.json")
    assert cli(*searched)[0] == 0
    ends = [Run(path).records() for path in (folder, *(folder / "search").iterdir())]
    for record in ends[0] + ends[1]:
        record.pop("seconds", None)
    assert ends[0] == ends[1] and (folder / "summary.json").exists()


# ---------------------------------------------------------------------------- links and pipes

OUTSIDE = ("config.json", "log.jsonl", "checkpoint.pt", "lock", "curves.png", "summary.json")


@pytest.mark.parametrize("name", [*OUTSIDE, "mask.pt", "scaffold", "tensorboard"])
def test_links_do_not_lead_out_of_a_runs_folder(cli, finished, small_data, name):
    (outside := small_data / "outside").mkdir()
    (outside / "precious").write_text("precious")
    path = finished / name
    if path.is_dir():
        shutil.move(path, outside / name)
    elif path.exists():
        path.rename(outside / name)
    path.symlink_to(outside / name)
    before = snapshot(small_data)
    for command in ((*MASKED, "--rounds", 2), ("eval", finished), ("plot", finished)):
        assert f"runs/x/{name} is a link" in refused(cli, *command)
    assert snapshot(small_data) == before


@pytest.mark.parametrize("name", ["config.json", "mask.pt", "checkpoint.pt"])
def test_a_pipe_in_a_runs_folder_is_refused_at_once(cli, finished, name):
    (finished / name).unlink()
    os.mkfifo(finished / name)
    for command in ((*MASKED, "--rounds", 2), ("eval", finished)):
        assert f"runs/x/{name} is no regular file" in refused(cli, *command)


def test_a_pipe_or_a_device_is_no_mask(cli, small_data):
    os.mkfifo("pipe")
    for name in ("pipe", "/dev/zero"):
        err = refused(cli, *FEDAVG, "--rounds", 1, "--head", "ridge", "--mask", name)
        assert f"mask {name}: " in err and "is no regular file" in err
    assert not (small_data / "runs").exists()


def test_a_pipe_among_what_runs_share_is_made_again(cli, small_data):
    calibrate = ("calibrate", "--data", "synthetic", "--clients", 10, "--calibration-images", 20)
    assert cli(*calibrate, "--name", "a")[0] == 0
    shared = sorted((small_data / "data").rglob("*.pt"))
    for path in shared:
        path.unlink()
        os.mkfifo(path)
    (small_data / "data" / "masks" / "notes.tmp").write_text("mine")
    os.utime(small_data / "data" / "masks" / "notes.tmp", (0, 0))
    status, _, err = cli(*calibrate, "--name", "b")
    assert status == 0 and err.count("is no regular file") == len(shared) >= 2
    assert all(path.is_file() for path in shared)
    assert (small_data / "data" / "masks" / "notes.tmp").exists()
    masks = [torch.load(f"runs/{name}/mask.pt", weights_only=True)["bits"] for name in "ab"]
    assert torch.equal(*masks)


# ---------------------------------------------------------------------------- what is bound


def test_another_runs_summary_is_named_and_the_end_repeated(cli, trained, finished):
    whole = json.loads((finished / "summary.json").read_text())
    for content in ((trained / "runs" / "other" / "summary.json").read_text(), '{"round": 1}'):
        (finished / "summary.json").write_text(content)
        status, out, _ = cli(*MASKED, "--rounds", 1)
        assert status == 0 and "is finished" not in out
        assert "runs/x/summary.json is not the summary of this run" in out
        again = json.loads((finished / "summary.json").read_text())
        assert again["final"] == whole["final"] and again["run"] == whole["run"]
    assert "is finished" in cli(*MASKED, "--rounds", 1)[1]


@pytest.mark.parametrize("command", [("ridge",), ("calibrate", "--mask-rule", "random")])
def test_every_summary_names_its_run(cli, small_data, command):
    assert cli(*command, "--data", "synthetic", "--clients", 10, "--name", "x")[0] == 0
    assert (run := Run(small_data / "runs" / "x")).summary()["run"] == run.id()


LOST = ("log.jsonl", "checkpoint.pt", "mask.pt", "head.pt", "scaffold/clients-1.pt")


@pytest.mark.parametrize("how", ["gone", "damaged"])
@pytest.mark.parametrize("name", LOST)
def test_a_finished_run_names_what_it_has_lost(cli, finished, name, how):
    assert "warning" not in cli(*MASKED, "--rounds", 1)[1]
    path = finished / name
    path.unlink() if how == "gone" else path.write_bytes(path.read_bytes()[:-9])
    before = snapshot(finished)
    status, out, err = cli(*MASKED, "--rounds", 1)
    assert status == 0 and "is finished" in out, err
    assert out.count("warning: ") == 1 and f"runs/x/{name} is " in out
    assert snapshot(finished) == before


@pytest.mark.parametrize("line", ["x\n", "[3]\n"])
def test_an_unfinished_run_with_a_damaged_log_goes_on(cli, finished, line):
    """Its checkpoint holds the log, too."""
    log = (finished / "log.jsonl").read_bytes()
    (finished / "log.jsonl").write_bytes(log + line.encode())
    status, out, err = cli(*MASKED, "--rounds", 2)
    assert status == 0, err
    lines = (finished / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert b"".join(lines[: log.count(b"\n")]) == log and json.loads(lines[-1])["round"] == 2


def test_what_is_no_weights_is_called_a_checkpoint(cli, finished):
    said = refused(cli, *FEDAVG, "--name", "y", "--weights", finished / "checkpoint.pt")
    assert "the checkpoint of a run, of which `train.py export` makes weights" in said


def test_a_printed_command_holds_for_paths_with_spaces(cli, finished):
    path = finished.parent / "a b" / "c d.pth"
    path.parent.mkdir()
    said = cli("export", finished, path)[1]
    options = shlex.split(said[said.index("load it by ") :].removeprefix("load it by "))
    assert options[options.index("--weights") + 1] == str(path)


# ---------------------------------------------------------------------------- wrong contents


def edited(change):
    def edit(checkpoint):
        change(checkpoint["state"], checkpoint["state"]["process"])

    return edit


WRONG = {
    "theta of one": edited(lambda s, p: p.update(theta=p["theta"][:1])),
    "theta of another size": edited(lambda s, p: p.update(theta=p["theta"][:-1])),
    "theta of another type": edited(lambda s, p: p.update(theta=p["theta"].long())),
    "theta of text": edited(lambda s, p: p.update(theta="theta")),
    "no theta": edited(lambda s, p: p.pop("theta")),
    "no process": edited(lambda s, p: s.update(process=3)),
}
RESUMED = {
    "round of text": edited(lambda s, p: p.update(round="1")),
    "no states": edited(lambda s, p: p.pop("states")),
    "no files": edited(lambda s, p: p["states"]["scaffold"].pop("files")),
    "files of another": edited(lambda s, p: p["states"]["scaffold"].update(files={0: 3})),
    "mean of one": edited(lambda s, p: p["states"]["scaffold"].update(mean=torch.zeros(1))),
    "no time": edited(lambda s, p: s.pop("wall_seconds")),
}


@pytest.mark.parametrize("wrong", [*WRONG, *RESUMED])
def test_a_whole_checkpoint_with_wrong_contents_is_named_and_stays(cli, finished, wrong):
    run = Run(finished)
    checkpoint = torch.load(run.checkpoint_path, weights_only=True)
    (WRONG | RESUMED)[wrong](checkpoint)
    save_checked(run.checkpoint_path, checkpoint, run.purpose("checkpoint"))
    before = files(finished)
    commands = [(*MASKED, "--rounds", 2)]
    if wrong in WRONG:
        commands += [("eval", finished), ("export", finished, "x.pth"), ("merge", finished)]
    for command in commands:
        assert "runs/x/checkpoint.pt" in refused(cli, *command)
    assert files(finished) == before


@pytest.mark.parametrize("change", [
    {"weight": torch.zeros(1, 48)}, {"bias": 3}, {"strength": None, "more": 1}, None,
])  # fmt: skip
def test_a_whole_head_with_wrong_contents_is_named_and_stays(cli, finished, change):
    run = Run(finished)
    run.save_file("head.pt", run.load_file("head.pt") | change if change else [3])
    before = files(finished)
    for command in ((*MASKED, "--rounds", 2), ("eval", finished)):
        assert "runs/x/head.pt" in refused(cli, *command)
    assert files(finished) == before


# ---------------------------------------------------------------------------- memory and streams


def without_memory(kind):
    if kind == "torch":
        torch.empty(1 << 60, dtype=torch.uint8)
    if kind == "python":
        bytearray(1 << 60)
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("kind", ["torch", "python", "device"])
def test_no_memory_is_said_in_one_line(cli, monkeypatch, kind):
    def run(line):
        """Take too much."""
        without_memory(kind)

    monkeypatch.setitem(train.COMMANDS, "ridge", Command(run, train.COMMANDS["ridge"].options))
    err = refused(cli, "ridge")
    assert "no memory is left" in err and "--eval-batch, --micro-batch" in err


def test_other_errors_of_torch_are_faults_of_the_program(cli, monkeypatch):
    def run(line):
        """Fail."""
        torch.zeros(2) + torch.zeros(3)

    monkeypatch.setitem(train.COMMANDS, "ridge", Command(run, train.COMMANDS["ridge"].options))
    with pytest.raises(RuntimeError, match="size of tensor"):
        cli("ridge")


def test_a_run_without_memory_leaves_no_folder(cli, small_data, monkeypatch):
    monkeypatch.setattr("commands.fedavg.federate", lambda *a: without_memory("torch"))
    assert "no memory is left" in refused(cli, *FEDAVG, "--rounds", 1)
    assert not (small_data / "runs" / "x").exists()


def test_a_pipe_without_reader_is_like_sigterm_where_that_is_handled(monkeypatch):
    reader, writer = os.pipe()
    stream = io.TextIOWrapper(io.BufferedWriter(streams.Pipe(writer, "w")), line_buffering=True)
    monkeypatch.setattr(sys, "stdout", stream)
    print("heard")
    assert os.read(reader, 99) == b"heard\n" and not streams.reader_gone()
    os.close(reader)
    caught = []
    before = signal.signal(signal.SIGTERM, lambda *signal: caught.append(signal[0]))
    try:
        print("unheard")
        print("again")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == [signal.SIGTERM] and streams.reader_gone()


def start(folder, line):
    """Run a shell line with $TRAIN in a folder; returns what subprocess.run does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["TRAIN"] = f"{sys.executable} {ROOT / 'train.py'}"
    command = ["bash", "-c", line]
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, capture_output=True, timeout=300
    )


@pytest.mark.slow
def test_a_reader_that_goes_saves(tmp_path):  # and the run goes on: faults/matrix.py
    line = "$TRAIN " + " ".join(map(str, (*FEDAVG, "--rounds", 12, "--eval-every", 1)))
    cut = start(tmp_path, f"{line} | head -2; exit ${{PIPESTATUS[0]}}")
    assert cut.returncode == 141 and cut.stderr == "", cut
    assert 0 < Run(tmp_path / "runs" / "x").load()["state"]["process"]["round"] < 12


@pytest.mark.slow
def test_closed_streams_are_no_files_of_a_run(tmp_path):
    line = "$TRAIN " + " ".join(map(str, (*FEDAVG, "--rounds", 1)))
    assert start(tmp_path, f"{line} --dropout 1 2>&- <&-").returncode == 0
    assert start(tmp_path, f"{line} --name y >&- 2>&- <&-").returncode == 0
    for name in "xy":
        records = Run(tmp_path / "runs" / name).records()
        assert len(records) == 2 and not (tmp_path / "runs" / name / "lock").read_bytes()
    wrong = start(tmp_path, f"{line} --lr 3 2>&-")
    assert wrong.returncode == 2 and wrong.stdout == ""
    gone = start(tmp_path, "$TRAIN --help | true; exit ${PIPESTATUS[0]}")
    assert gone.returncode in (0, 141) and gone.stderr == ""


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("out", "written"), [
    ("pic", "pic.png"), ("pic.", "pic.png"), ("a.b/pic", "a.b/pic.png"), ("pic.pdf", "pic.pdf"),
    (".pic", ".pic.png"),
])  # fmt: skip
def test_a_picture_is_named_as_it_is_written(cli, finished, small_data, out, written):
    (small_data / "a.b").mkdir()
    for command in (("plot", finished), ("shards", "--data", "synthetic", "--clients", 10)):
        status, said, err = cli(*command, "--out", out)
        assert status == 0 and said.endswith(f"written to {written}\n"), err
        assert Path(written).stat().st_size and not Path(out).with_suffix("").is_file()
        Path(written).unlink()


def test_a_mask_made_anew_must_be_the_checkpoints(cli, finished, monkeypatch):
    """theta holds its entries alone: under another mask each would land elsewhere."""
    (finished / "mask.pt").unlink()
    assert cli("eval", finished)[0] == 0 and (finished / "mask.pt").exists()
    (finished / "mask.pt").unlink()
    cached_mask = mask_cache.cached_mask

    def another(calibration):
        mask = cached_mask(calibration)
        return Mask(mask.shapes, mask.trains.roll(1), mask.origin)

    monkeypatch.setattr(mask_cache, "cached_mask", another)
    for command in (("eval", finished), (*MASKED, "--rounds", 2)):
        assert "mask.pt is gone" in refused(cli, *command)
    assert not (finished / "mask.pt").exists()


def test_a_head_fitted_anew_is_that_of_the_clients_images(cli, small_data):
    """Under --cover partial no image of a class without a client takes part."""
    options = ("--cover", "partial", "--clients", 5, "--nc", 2, "--head", "ridge", "--J", 1)
    assert cli("fedavg", "--data", "synthetic", *options, "--rounds", 1, "--name", "x")[0] == 0
    path = small_data / "runs" / "x" / "head.pt"
    before = path.read_bytes()
    path.unlink()
    for file in (small_data / "data").rglob("*.pt"):
        file.unlink()
    assert cli("export", "runs/x", "x.pth", "--with-head")[0] == 0
    assert path.read_bytes() == before
