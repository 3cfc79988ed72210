"""kill -9 at any moment, then the same command: the bits of the uninterrupted run."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.slow

# One process imports everything once and forks: a start costs seconds, a fork costs milliseconds.
# It must not run a parallel operation before it forks, hence the single thread.
ZYGOTE = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import data, train
from machine import runs
small = data.synthetic_dataset(samples_per_class=20)
data.synthetic_dataset = lambda: small
runs.drive.__kwdefaults__["save_seconds"] = 0.05

def lines(name):
    log = Path("runs", name, "log.jsonl")
    return log.read_bytes().count(b"\\n") if log.exists() else 0

def run(name, kill_after=None, stop_by=None):
    before = lines(name)
    child = os.fork()
    if child == 0:
        status = train.main([*sys.argv[1:], "--name", name, "--threads", "1"])
        sys.stdout.flush()
        os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    if stop_by is not None:  # after a round or epoch more
        while lines(name) < max(2, before + 1):
            time.sleep(0.002)
        os.kill(child, stop_by)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

started = time.monotonic()
assert run("whole") == 0
whole = time.monotonic() - started
moments = random.Random(0)
deaths = [run("killed", moments.uniform(0.05, 1) * whole / 7) for _ in range(10)]
print("deaths", deaths, file=sys.stderr)
assert run("killed") == 0
stops = [run("signalled", stop_by=s) for s in (signal.SIGINT, signal.SIGTERM)]
print("stops", stops, file=sys.stderr)
assert run("signalled") == 0
"""

COMMANDS = {
    "fedavg": "fedavg --data synthetic --rounds 40 --eval-every 5 --clients 20 --nc 10 --J 3 "
    "--local-norm --straggler-fraction 0.5 --dropout 0.3 --aggregate fednova --server fedadam",
    "heads": "fedavg --data synthetic --rounds 120 --eval-every 12 --train head --nc 1 --scaffold",
    "centralized": "centralized --data synthetic --epochs 3 --schedule cosine --warmup 1 "
    "--eval-every 0.6 --early-stop 20",
}


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs os.fork")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_ten_times_ends_in_the_same_bits(name, tmp_path):
    command = [sys.executable, "-c", ZYGOTE, *COMMANDS[name].split()]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("-9") >= 8, done.stderr  # a kill may come after the end
    assert "stops [130, 143]" in done.stderr, done.stderr
    whole = tmp_path / "runs" / "whole"
    for other in ("killed", "signalled"):
        folder = tmp_path / "runs" / other
        assert theta_and_log(folder) == theta_and_log(whole), done.stdout


def theta_and_log(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]
    process, best = state["process"], state.get("best", {})
    theta = process["theta"] if "theta" in process else process["tensors"]["theta"]
    if best:
        theta = torch.cat([theta, best["weights"], torch.tensor([best["at"]])])
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return theta.numpy().tobytes(), [{**record, "seconds": None} for record in records]
