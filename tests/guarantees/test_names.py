"""Runs keep the names that they have always had: the same command finds its folder again.

python tests/guarantees/test_names.py    writes names.json anew, from the code as it is
"""

import json
import sys
from pathlib import Path

import pytest

NAMES = Path(__file__).with_name("names.json")
COMMANDS = (
    "fedavg --nc 1 --J 4 --rounds 2000",
    "fedavg --data synthetic",
    "fedavg --data synthetic --rounds 7 --schedule cosine --warmup 2",
    "fedavg --dirichlet 0.3 --server fedadam --server-lr 0.1 --seed 3",
    "fedavg --nc 5 --mask-rule least-sensitive --sparsity 0.9 --calibration-rounds 2",
    "fedavg --nc 5 --mask-rule least-sensitive --sparsity 0.9 --calibration-rounds 2 --mask-lr raw",
    "fedavg --mask-rule random --mask-scope blocks.* --head probe",
    "fedavg --mask-rule random --mask-scope blocks.* --head probe --mask-lr raw",
    "fedavg --train head --nc 1 --lr 0.001 --momentum 0",
    "fedavg --train blocks.8 --head ridge --freeze-head --batch-size full --J 1",
    "fedavg --scaffold --clip-norm 1 --threads 2 --device cpu --micro-batch 8",
    "fedavg --aggregate ties --ties-keep 0.3 --prox 0.1",
    "fedavg --aggregate dare --secure-aggregation --dropout 0.2",
    "fedavg --aggregate fednova --straggler-fraction 0.5 --fedvc --local-norm",
    "fedavg --data synthetic --dp-noise 0.5 --dp-clip 1 --clients 50 --fraction 0.2",
    "fedavg --data synthetic --fedir --nesterov --weight-decay 0.001 --augment --diagnostics",
    "fedavg --model vit_ti16 --weights x.pth --image-size 64 --normalisation half --compile",
    "fedavg --threshold 0.001 --mask-rule most-sensitive --consensus max --keep-tokens 0.5 "
    "--mask-lr raw",
    "fedavg --search --search-lr 0.1 0.2 --search-length 5",
    "centralized --epochs 3 --schedule step --early-stop 4 --eval-every 0.5",
    "centralized --data synthetic --precision bf16 --no-augment --head-images 500 --head ridge",
    "ridge --nc 10 --val-fraction 0.2",
    "calibrate --data synthetic --sparsity 0.5 --per-tensor --fisher-labels true",
    "calibrate --nc 50 --mask-rule highest-magnitude",
)


def name_of(command: str) -> str:
    """Return the folder that a command's run goes into."""
    from commands.options import parse
    from train import COMMANDS

    return parse(command.split(), COMMANDS).name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_the_name_that_it_had(command):
    assert name_of(command) == json.loads(NAMES.read_text())[command]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
    written = {command: name_of(command) for command in COMMANDS}
    NAMES.write_text(json.dumps(written, indent=1) + "\n")
