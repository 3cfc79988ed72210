"""--processes is one run to whoever watches: the bits, voice and ends are those of one process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_cuda

import train
from commands import spread
from commands.options import parse
from machine import ranks
from machine.ranks import processes_that_pay
from machine.runs import Run

slow = pytest.mark.slow  # processes of their own

TINY = [
    *("--data", "synthetic", "--rounds", 3, "--eval-every", 2, "--clients", 20, "--fraction", 0.35),
    *("--J", 2, "--batch-size", 8, "--runs-dir", "runs", "--name", "x"),
]
LONG = ("--rounds", 4000, "--eval-every", 1)


def start(folder, *arguments):
    """Start train.py fedavg in a folder, in a session of its own, as a terminal does."""
    command = [sys.executable, ROOT / "train.py", "fedavg", *TINY, *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(
        [str(a) for a in command], cwd=folder, env=environment, start_new_session=True, **pipes
    )


def ended(process, timeout=120):
    """Return exit status, stdout, stderr, once all processes that hold its pipes have ended."""
    said = process.communicate(timeout=timeout)
    return process.returncode, *said


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def children(process):
    return [
        int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def forked(process):
    """Tell whether a process has begun to fork: it holds the file where all of them meet."""
    files = Path(f"/proc/{process.pid}/fd")
    with contextlib.suppress(FileNotFoundError):  # others come and go
        return any("(deleted)" in os.readlink(file) for file in files.iterdir())


def running(folder, process):
    """Wait until a run has had a round."""
    log = folder / "runs" / "x" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") > 1, process)


def outcome(folder):
    """Return a run's final parameters, its log without seconds and its identity."""
    run = Run(folder / "runs" / "x")
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in run.records()]
    return run.load()["state"]["process"]["theta"], records, run.id()


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


# ---------------------------------------------------------------------------- the decision


@pytest.mark.parametrize(("expected", "changed"), [
    (2, {}),
    (1, dict(cores=1)),
    (1, dict(clients=1)),
    (1, dict(clients=3)),  # a quarter of the cores would be idle
    (2, dict(clients=7)),
    (3, dict(cores=3)),  # 4, 3 and 3 clients
    (5, dict(cores=6)),  # five are done as soon as six
    (1, dict(cores=8)),
    (10, dict(cores=11)),
    (1, dict(rounds=77)),  # 49,280 images a process
    (2, dict(rounds=79)),
    (2, dict(rounds=8, fitted=False)),
    (1, dict(rounds=7, fitted=False)),
    (1, dict(operations=4.7e9)),  # a round of more than a minute
    (2, dict(operations=4.6e9)),
    (1, dict(memory=3.9e9)),
    (1, dict(memory=0)),  # the host does not say
])  # fmt: skip
def test_processes_are_forked_where_that_pays(expected, changed):
    usual = dict(rounds=2000, clients=10, images=128, operations=1e8, cores=2, memory=64e9)
    usual |= dict(fitted=True)
    assert processes_that_pay(**usual | changed) == expected


@pytest.mark.parametrize(("expected", "line"), [
    (2, "--data synthetic"),
    (1, "--data synthetic --mask-rule random"),
    (2, "--data synthetic --mask-rule random --rounds 100"),
    (2, "--model vit_ti16 --weights x.pth --image-size 64 --batch-size 32 --rounds 79"),
    (1, "--model vit_ti16 --weights x.pth --image-size 64 --batch-size 32 --rounds 78"),
    (1, "--rounds 2000"),  # ViT-S/16 at 224 px: a round takes minutes
    (1, "--data synthetic --train head"),
    (1, "--data synthetic --train blocks.1"),  # each would compute what is below
    (1, "--data synthetic --threads 2"),
    (1, "--data synthetic --rounds 3"),
    (1, "--data synthetic --batch-size full"),
    (1, "--data synthetic --processes 1"),
    (3, "--data synthetic --processes 3 --rounds 1 --train head --threads 1"),
])  # fmt: skip
def test_auto_asks_what_a_command_is(monkeypatch, tmp_path, expected, line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(spread, "free_memory", lambda device: 8e9)
    monkeypatch.setattr(ranks, "CAN_FORK", True)
    assert spread.processes(parse(f"fedavg {line}".split(), train.COMMANDS)) == expected
    for name, value in (("CAN_FORK", False), ("launched", lambda: 2)):
        with monkeypatch.context() as patch:
            patch.setattr(ranks, name, value)
            if "--processes" not in line:
                assert spread.processes(parse(f"fedavg {line}".split(), train.COMMANDS)) == 1


@pytest.mark.parametrize(("began", "expected"), [(2, 1), (1, 2), (None, 2)])
def test_a_run_goes_on_in_as_many_threads_as_it_began_with(
    monkeypatch, small_data, began, expected
):
    line = parse(["fedavg", "--data", "synthetic"], train.COMMANDS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(spread, "free_memory", lambda device: 8e9 if began is None else 0)
    if began:
        folder = small_data / "runs" / line.name
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
    config = {"environment": {"threads": began}}
    monkeypatch.setattr(spread.runs.Run, "config", lambda run: config)
    assert spread.processes(line) == expected


def test_a_run_of_one_thread_goes_on_in_no_more_processes_than_fit(monkeypatch):
    line = parse(["fedavg", "--data", "synthetic", "--fraction", "0.1"], train.COMMANDS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(spread, "threads_of", lambda line: 1)
    for memory, expected in ((8e9, 4), (1e12, 10), (1e9, 2)):
        monkeypatch.setattr(spread, "free_memory", lambda device, memory=memory: memory)
        assert spread.processes(line) == expected


def test_processes_are_refused_where_they_cannot_be(cli, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ranks, "CAN_FORK", False)
        status, _, err = cli("fedavg", *TINY, "--processes", 2)
    assert (
        status == 2 and "--processes 2 needs a CPU under Linux: torchrun --nproc-per-node=2" in err
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = cli("fedavg", *TINY, "--processes", 2)
    assert status == 2 and "--processes 2 under torchrun" in err


@needs_cuda
def test_processes_are_for_a_cpu_on_a_gpu(cli):
    assert "needs a CPU" in cli("fedavg", *TINY, "--processes", 2)[2]


# ---------------------------------------------------------------------------- the run


@slow
def test_two_processes_are_one_run_to_whoever_watches(tmp_path, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    options = ("--secure-aggregation", "--dropout", 0.1, "--local-norm")
    status, *said = ended(start(tmp_path, "--processes", 2, *options))
    assert status == 0, said
    expected = ended(start(alone, "--processes", 1, "--threads", 1, *options))
    lines, others = said[0].splitlines(), expected[1].splitlines()
    assert lines[:-1] == others[:-1]  # the last holds seconds
    assert len(lines) == len(others) and said[1] == expected[2]
    warnings = said[1].splitlines()
    assert warnings and len(set(warnings)) == len(warnings) == said[1].count("warning: ")
    assert_same(outcome(tmp_path), outcome(alone))
    status, out, _ = ended(start(tmp_path, "--processes", 1, *options))
    assert status == 0 and "is finished" in out


@slow
def test_a_run_goes_on_in_another_number_of_processes(tmp_path, tmp_path_factory):
    alone, rounds = tmp_path_factory.mktemp("alone"), ("--rounds", 60, "--eval-every", 60)
    process = start(tmp_path, *rounds, "--processes", 2)
    running(tmp_path, process)
    os.kill(process.pid, signal.SIGTERM)  # the first alone has it
    status, out, err = ended(process)
    assert status == 143 and out.count("SIGTERM: saved at round") == 1 and not err
    process = start(tmp_path, *rounds, "--processes", 3)
    while "goes on from round" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C on a terminal: all have it
    status, out, err = ended(process)
    assert status in (0, 130) and out.count("SIGINT: saved at round") == (status == 130)
    assert not err
    assert ended(start(tmp_path, *rounds, "--threads", 1))[0] == 0
    assert ended(start(alone, *rounds, "--threads", 1))[0] == 0
    assert_same(outcome(tmp_path), outcome(alone))


@slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_a_signal_before_the_first_round_ends_all_quietly(tmp_path, signum, status):
    process = start(tmp_path, *LONG, "--processes", 2)
    wait_for(lambda: forked(process), process)
    time.sleep(0.3)  # while data are made
    os.kill(process.pid, signum)
    assert ended(process) == (status, "", "")


@slow
def test_a_second_interrupt_ends_all_at_once(tmp_path):
    process = start(tmp_path, *LONG, "--processes", 2, "--J", 3000)
    log = tmp_path / "runs" / "x" / "log.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes(), process)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    started = time.monotonic()
    status, _, err = ended(process)
    assert status == 130 and not err and time.monotonic() - started < 10


@slow
def test_a_lost_process_ends_the_others_with_one_message(tmp_path):
    process = start(tmp_path, *LONG, "--processes", 3)
    running(tmp_path, process)
    os.kill(children(process)[0], signal.SIGKILL)
    status, _, err = ended(process)
    assert status == 1 and err.count("another process of the job has gone") == 1
    assert "Traceback" not in err


@slow
def test_the_first_process_takes_the_others_along(tmp_path):
    process = start(tmp_path, *LONG, "--processes", 2)
    running(tmp_path, process)
    os.kill(process.pid, signal.SIGKILL)
    assert ended(process)[::2] == (-9, "")


@slow
def test_what_all_processes_meet_is_told_once(tmp_path):
    status, _, err = ended(start(tmp_path, "--processes", 2, "--lr", 1e30))
    assert status == 2 and err.count("train.py: error: ") == err.count("\n") == 1, err


@slow
def test_what_all_processes_meet_before_the_first_round_leaves_nothing(tmp_path):
    masked = ("--local-norm", "--mask-rule", "random", "--mask-scope", "*.qkv.weight")
    status, _, err = ended(start(tmp_path, "--processes", 2, "--head", "ridge", *masked))
    assert status == 2 and err.count("train.py: error") == 1, err
    assert not (tmp_path / "runs" / "x").exists()


@slow
def test_a_reader_that_goes_stops_all(tmp_path):
    process = start(tmp_path, *LONG, "--processes", 2)
    running(tmp_path, process)
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr.read() == ""
    assert Run(tmp_path / "runs" / "x").load()["state"]["process"]["round"] < 4000


def test_a_group_that_has_ended_leaves_the_threads_as_they_were():
    script = """
import torch
from machine import ranks
torch.set_num_threads(3)
with ranks.forked(2, lambda: None):
    assert torch.get_num_threads() == 1
assert torch.get_num_threads() == 3
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
