"""What a GPU is to reach, beside what the files of on_a_gpu.sh say: a short table.

python bench/goals.py FOLDER
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

PLAIN, FUSED = {"fused": "no"}, {"fused": "yes"}
FUSED_PASS = {"method": "fused"}
ROUND, STEP = "round, s", "step, ms"
SHARE = "share of it in a step"
FIGURES = [  # what it is, goal, file, row, column
    ("round, ViT-S/16, s", "0.30 (H100 0.33)", "round", ("vit_s16", ROUND, FUSED), "median"),
    ("  passes not fused", "", "round", ("vit_s16", ROUND, PLAIN), "median"),
    ("step, ViT-S/16, ms", "7.0", "round", ("vit_s16", STEP, FUSED), "median"),
    ("  passes not fused", "", "round", ("vit_s16", STEP, PLAIN), "median"),
    ("  of the rate of products", ">= 0.35", "round", ("vit_s16", SHARE, FUSED), "median"),
    ("  CUDA graph", "on", "round", ("vit_s16", ROUND, FUSED), "cuda_graph"),
    ("round, ViT-Ti/16, s", "0.16", "round", ("vit_ti16_224", ROUND, FUSED), "median"),
    ("  passes not fused", "", "round", ("vit_ti16_224", ROUND, PLAIN), "median"),
    *(
        (f"  {name} over PyTorch's", "< 1", "fused", {"operation": name} | FUSED_PASS, "to_pytorch")
        for name in ("add_norm", "bias_gelu", "attention")
    ),
    ("careful plain loop over it", "", "peers", {"method": "careful"}, "to_project"),
    ("  weights apart by", "", "peers", {"method": "careful"}, "largest_difference"),
    ("optimiser step over a copy", "1.11", "sparse_sgdm", "sparse_sgdm_ triton", "to_copy"),
]


def value_of(folder: Path, file: str, row: tuple | dict | str, column: str) -> str:
    """Return what a file says; "not measured" where it does not."""
    if isinstance(row, tuple):
        row = {"setting": row[0], "figure": row[1], **row[2]}
    if isinstance(row, str):
        row = {"density": "1.0", "method": row}
    path = folder / f"{file}_gpu.csv"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in csv.DictReader(line for line in lines if not line.startswith("#")):
        if row.items() <= line.items():
            return line[column]
    return "not measured"


def scoring(folder: Path) -> str:
    """Return the milliseconds that scoring an image in half precision takes."""
    path = folder / "fisher_gpu_vit_s16.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    values = [row["ms_per_image"][0] for row in rows if row["method"] == "half"]
    return f"{values[0]:g}" if values else "not measured"


def main() -> None:
    folder = Path(sys.argv[1])
    table = [(what, goal, value_of(folder, *where)) for what, goal, *where in FIGURES]
    table.append(("scoring, ViT-S/16, ms an image", "0.25", scoring(folder)))
    print(f"{'224 px, B = 64, J = 4':32}{'goal':18}measured")
    for what, goal, measured in table:
        print(f"{what:32}{goal:18}{measured}")


if __name__ == "__main__":
    main()
