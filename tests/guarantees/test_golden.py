"""Thirteen commands end in the weights and the log that they ended in before.

golden.json holds what each came to, and where. There the bits must be the same: a change that moves
one must say why. Elsewhere (another processor, another version of torch) rounding differs, and the
figures must agree as far as that allows.

    python tests/guarantees/test_golden.py    writes golden.json anew, from the code as it is
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = Path(__file__).with_name("golden.json")
ROUNDS = "--rounds 3 --eval-every 2 --clients 20 --fraction 0.25 --batch-size 8 --J 3"
FEDAVG = f"fedavg {ROUNDS} --lr 0.02"
RULE = "--mask-rule least-sensitive --sparsity 0.8 --calibration-images 60"
MASKED = f"--lr 1e-4 --mask-lr raw {RULE}"
COMMANDS = {
    "plain": f"{FEDAVG} --nc 10",
    "masked": f"{FEDAVG} {MASKED}",
    "masked, at the matched rate": f"{FEDAVG} --lr 1e-6 {RULE}",
    "SCAFFOLD under a mask": f"{FEDAVG} {MASKED} --scaffold",
    "local norms": f"{FEDAVG} --local-norm --nc 10 --straggler-fraction 0.5 --dropout 0.3",
    "FedAdam": f"{FEDAVG} --server fedadam --prox 0.1 --diagnostics",
    "TIES": f"{FEDAVG} --aggregate ties --fedvc --dirichlet 0.5",
    "private": f"{FEDAVG} --dp-noise 0.1 --dp-clip 0.5 --dp-seed 0",
    "head only": f"{FEDAVG} --train head --head ridge --lr 0.05 --scaffold --nc 10",
    "blocks.1": f"{FEDAVG} --train blocks.1 --head ridge --lr 1e-7 --nesterov --weight-decay 1",
    "central, cosine": "centralized --lr 0.05 --epochs 2 --B 64 --schedule cosine --augment",
    "2 processes": f"{FEDAVG} --nc 10 --fedir --secure-aggregation --clip-norm 1 --augment",
    "calibrate": "calibrate --clients 20 --calibration-images 60 --nc 10 --sparsity 0.9",
}
# One process imports everything once; each command then runs in it, on less synthetic data.
RUN = """
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv.pop(1))
import data, train
from commands import centralized, fedavg
centralized.plot_curves = fedavg.plot_curves = lambda logs, path: None  # nobody looks
small = data.synthetic_dataset(samples_per_class=20)
data.synthetic_dataset = lambda: small
for line in sys.argv[1:]:
    model = ["--data", "synthetic", "--model", "vit_demo"]
    if status := train.main([*line.split(), *model, "--threads", "1"]):
        sys.exit(status)
"""


def environment() -> str:
    """Return what decides the last bits: torch and how the processor multiplies."""
    import torch

    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def start(folder: Path, lines: list[str], **group: int) -> subprocess.Popen:
    """Run commands one after the other in a process, which may be one of a group."""
    settings = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    settings |= {name: str(value) for name, value in group.items()}
    command = [sys.executable, "-c", RUN, str(ROOT), *lines]
    return subprocess.Popen(command, cwd=folder, env=os.environ | settings)


def run_all(folder: Path) -> dict[str, dict]:
    """Run the commands in a folder; return by name what each came to."""
    lines = [f"{line} --name {name.replace(' ', '_')}" for name, line in COMMANDS.items()]
    pair = [line for line in lines if "2_processes" in line]
    alone = start(folder, [line for line in lines if line not in pair])
    assert alone.wait() == 0
    group = dict(WORLD_SIZE=2, MASTER_PORT=29_571 + os.getpid() % 1000)
    processes = [start(folder, pair, RANK=rank, LOCAL_RANK=rank, **group) for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    return {name: outcome(folder / "runs" / name.replace(" ", "_")) for name in COMMANDS}


def outcome(folder: Path) -> dict:
    """Return hashes of a run's weights and log, and its last figures."""
    import torch

    if not (folder / "checkpoint.pt").exists():
        mask = torch.load(folder / "mask.pt", weights_only=True)
        summary = json.loads((folder / "summary.json").read_text())
        return {"theta": sha256(mask["bits"].numpy().tobytes()), "iou": summary["overlap"]["iou"]}
    process = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["process"]
    theta = process["theta"] if "theta" in process else process["tensors"]["theta"]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    bare = [{k: v for k, v in record.items() if k != "seconds"} for record in records]
    named = ("train_loss", "val_loss", "test_loss")  # of private runs no client's loss
    final = json.loads((folder / "summary.json").read_text())["final"]
    figures = {k: final[k] for k in named if k in final}
    hashes = {
        "theta": sha256(theta.numpy().tobytes()),
        "log": sha256(json.dumps(bare, sort_keys=True).encode()),
    }
    return hashes | figures | {"norm": theta.double().norm().item()}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_all(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_where_it_ended_before(outcomes, name):
    golden = json.loads(GOLDEN.read_text())
    expected, found = golden["commands"][name], outcomes[name]
    if golden["environment"] == environment():
        assert found == expected
    else:
        for key in expected.keys() - {"theta", "log"}:
            assert found[key] == pytest.approx(expected[key], rel=0.02), key


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        written = {"environment": environment(), "commands": run_all(Path(made))}
    GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
