"""How much of a mask the precision of the passes that score changes: IoU with the fp32 mask.

    python bench/bench_score_precision.py [--images 256] [--data-dir DIR]

ViT-Ti/16 at 64 px under a ridge head, on the CPU, which imitates half precision. The first training
images, the same for all; sums in fp32. Labels that are drawn take the same uniform numbers. Writes
results/cpu/score_precision.csv.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import torch
from timing import write_csv

sys.path.insert(0, str(Path(__file__).parent.parent))
import fisher
import masks
import model as vit
from commands.options import parse
from machine.device import exact_products
from train import COMMANDS
from training.features import set_fitted_head
from training.workspace import Workspace

PATH = Path(__file__).resolve().parent.parent / "results" / "cpu" / "score_precision.csv"
SPARSITIES = (0.5, 0.9, 0.99)


def scores(model: vit.VisionTransformer, inputs, given, labels: str, dtype) -> torch.Tensor:
    """Return the scores (P,) of passes in a precision; the head stays in fp32."""
    scored = copy.deepcopy(model)
    for name, parameter in scored.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in vit.HEAD else dtype)
    scale = 256.0 if dtype == torch.float16 else 1.0
    scorer = fisher.Scorer(scored, labels=labels, scale=scale)
    batches = zip(inputs.to(dtype).split(fisher.BATCH), given.split(fisher.BATCH), strict=True)
    with exact_products():
        return torch.cat([part.flatten() for part in scorer.diagonal(batches).values()])


def overlap(a: torch.Tensor, b: torch.Tensor, sparsity: float) -> float:
    """Return the IoU of the least sensitive entries of two scores."""
    count = masks.budget(len(a), sparsity)
    entries = masks.keep_lowest(a, count), masks.keep_lowest(b, count)
    return (entries[0] & entries[1]).sum().item() / (entries[0] | entries[1]).sum().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--data-dir", default="data")
    o = parser.parse_args()
    words = f"calibrate --sparsity 0.9 --data-dir {o.data_dir} --model vit_ti16 --image-size 64"
    words += f" --weights {o.data_dir}/vit_tiny_patch16_224.pth"
    groups = parse(words.split(), COMMANDS).groups
    workspace = Workspace(groups.source, groups.machine, groups.backbone)
    model = workspace.build_model()
    with torch.no_grad():
        set_fitted_head(workspace, model, "ridge", None)
    train, count = workspace.sets["train"], 2 * o.images
    inputs = workspace.preprocess()(train.images[:count])
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, others = slice(0, o.images), slice(o.images, count)
    rows = []
    for labels, given in (("true", train.labels[:count]), ("sampled", uniform)):
        exact = scores(model, inputs[first], given[first], labels, torch.float32)
        ways = {
            "fp16": scores(model, inputs[first], given[first], labels, torch.float16),
            "bf16": scores(model, inputs[first], given[first], labels, torch.bfloat16),
            "fp32, other images": scores(model, inputs[others], given[others], labels, exact.dtype),
        }
        for sparsity in SPARSITIES:
            ious = {way: f"{overlap(s, exact, sparsity):.3f}" for way, s in ways.items()}
            rows.append({"labels": labels, "sparsity": sparsity} | ious)
            print(rows[-1], flush=True)
    write_csv(PATH, rows, images=o.images, iou="of the least sensitive entries with fp32's")


if __name__ == "__main__":
    main()
