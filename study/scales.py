"""The sizes of the experiments: all that differs between scales, and the rates that rows try.

paper: DINO's ViT-S/16 at 224 px, the brief's sizes, for a GPU. colab: the same in fewer rounds,
rates and seeds: a tenth of paper's operations, 29 hours where a GPU does 15 TFLOP/s (a quarter of a
T4's peak; no T4 was measured: `sweep --list` measures yours). cpu: a ViT-Ti/16 at 64 px, at 224 px
where the head alone trains, for two cores. smoke: the synthetic data set and a few rows, to see
that all works. gpu and its like: other questions, in minutes at a time (study/gpu.py).
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from masks import CONSENSUS, RULES, needs_scores
from study.tables import WIDENED, Row, around, rung

SHARDINGS = {
    name: () if name == "iid" else ("--nc", name[2:])
    for name in ("iid", "nc50", "nc10", "nc5", "nc1")
}
SHARES = ("0.5", "0.9", "0.99")  # frozen
RUNGS = {("dense", "0"): 0.003} | {  # the lower of the two rates tried, iid
    (rule, share): lr  # the less the entries matter, the longer the step
    for rule, rates in {
        "least-sensitive": (0.01, 0.03, 3.0),
        "most-sensitive": (0.003, 0.003, 0.01),
        "lowest-magnitude": (0.003, 0.01, 0.03),
        "highest-magnitude": (0.003, 0.01, 0.03),
        "random": (0.003, 0.01, 0.03),
    }.items()
    for share, lr in zip(SHARES, rates, strict=True)
}
DENSE = {name: 1e-3 if name == "nc1" else 1e-2 for name in SHARDINGS}  # rates to begin with
RAW = ("--mask-lr", "raw")  # RUNGS are the rates of each rule, not of dense training


def mask(rule: str, share: str, images: int) -> tuple[str, ...]:
    """Return the options of a mask; none of dense training."""
    if rule == "dense":
        return ()
    scored = ("--calibration-images", f"{images}") if needs_scores(rule) else ()
    return ("--mask-rule", rule, "--sparsity", share, *scored)


# ------------------------------------------------------------------------------------ of the brief


class Scale(NamedTuple):
    """The sizes of the brief's experiments."""

    backbone: tuple[str, ...]  # model, data and batch where the backbone trains
    features: tuple[str, ...]  # the same where the head alone does
    solved: tuple[str, ...]  # and where it is solved
    local_steps: int  # J x rounds where the backbone trains
    mask_steps: int  # J x rounds of the mask rules
    method_rounds: int
    head_steps: int  # J x rounds where the head alone trains
    long_rounds: int  # of FedAvg to convergence
    epochs: int
    head_epochs: int
    images: int  # scored in a calibration round
    agreement_images: int  # scored where clients' masks are compared
    tries: int  # learning rates that a row tries
    mask_tries: int  # the same of mask rules
    seeds: tuple[int, ...]  # of heads, agreement, SCAFFOLD under a mask
    mask_seeds: tuple[int, ...]  # of mask rules
    wide_seeds: tuple[int, ...]  # of the other runs that train a backbone
    widened: int  # rates that a row may try beyond its own
    dense_rates: bool  # masked rows take dense training's rates, as --mask-lr matches them

    folder, watched_folder = "rules", ""  # of runs: masks' that several tables share, linearity's
    beside, consensus_tries = (), 2  # options of the runs of rules, rates of those of consensus
    rules = tuple((sharding, *key) for sharding in ("iid", "nc1") for key in RUNGS)
    sparsities = tuple(product(("iid", "nc1"), SHARES, "1248"))
    consensuses = tuple(
        (sharding, share, rule)
        for sharding in ("iid", "nc1")
        for share, rule in (*(("1", rule) for rule in CONSENSUS), ("0.1", "mean"), ("0.01", "mean"))
    )

    def rates(self, rule: str, share: str, sharding: str) -> tuple[float, ...]:
        """Return the rates that a mask rule tries.

        N_c = 1 takes rates three rungs lower, but for the least sensitive tenth, which hardly moves
        there: one.
        """
        key = ("dense", "0") if self.dense_rates else (rule, share)
        fewer = -1 if key == ("least-sensitive", "0.9") else -3
        low = rung(RUNGS[key], 0 if sharding == "iid" else fewer)
        return (low, rung(low, 1), rung(low, -1))

    def masked(
        self, key: tuple[str, ...], sharding: str, rule: str, share: str, *more: str, name: str = ""
    ) -> Row:
        """Return the row of a mask, or of dense training."""
        count = f"{max(1, self.mask_steps // 4)}"
        options = (*self.backbone, "--J", "4", "--rounds", count, "--eval-every", count)
        raw = () if self.dense_rates or rule == "dense" else RAW
        options += (*SHARDINGS[sharding], *mask(rule, share, self.images), *raw, *more)
        rates = self.rates(rule, share, sharding)[: self.mask_tries]
        return Row(key, options, rates, self.mask_seeds, name=name)

    def watched(self, sharding: str, rule: str, share: str) -> Row:
        """Return the row of a mask at a single rate, with what diagnostics tell."""
        second = rule == "least-sensitive" and not self.dense_rates
        row = self.masked((sharding, rule), sharding, rule, share, "--diagnostics")
        rates = self.rates(rule, share, sharding)[second:]
        return row._replace(rates=rates[:1], widened=0)


CPU = ("--model", "vit_ti16", "--weights", "data/vit_tiny_patch16_224.pth", "--threads", "1")
SMOKE = ("--data", "synthetic", "--threads", "1")
RIDGE = ("--head", "ridge")  # which CIFAR-100 has anyway
B64 = ("--batch-size", "64")
PX64 = (*CPU, "--image-size", "64", "--batch-size", "32")
PX224 = (*CPU, "--image-size", "224")
BY_SCALE = Scale(  # paper, colab, cpu, smoke
    backbone=(B64, B64, PX64, (*SMOKE, *RIDGE, "--batch-size", "8")),
    features=((), (), PX224, (*SMOKE, *RIDGE)),
    solved=((), (), PX224, SMOKE),
    local_steps=(800, 320, 48, 16),
    mask_steps=(800, 120, 16, 4),
    method_rounds=(50, 6, 4, 1),
    head_steps=(8000, 8000, 8000, 16),
    long_rounds=(500, 150, 60, 3),
    epochs=(15, 3, 1, 1),
    head_epochs=(25, 25, 25, 1),
    images=(5000, 1000, 500, 100),
    agreement_images=(2000, 1000, 2000, 400),
    tries=(3, 2, 3, 1),
    mask_tries=(3, 1, 2, 1),
    seeds=((0, 1, 2), (0, 1, 2), (0, 1, 2), (0,)),
    mask_seeds=((0, 1, 2), (0,), (0, 1, 2), (0,)),
    wide_seeds=((0, 1, 2), (0,), (0,), (0,)),
    widened=(WIDENED, 2, WIDENED, WIDENED),
    dense_rates=(False, True, False, False),
)
BRIEF_SCALES = dict(zip(("paper", "colab", "cpu", "smoke"), map(Scale, *BY_SCALE), strict=True))


# ------------------------------------------------------------------------------------ of questions


class Size(NamedTuple):
    """The sizes of a GPU's questions, and of a trial of them; everything trains."""

    backbone: tuple[str, ...]  # model, data and batch
    image_sizes: tuple[int, ...]  # pixels a side, ascending
    steps: int  # J x rounds
    epochs: int
    last_blocks: str  # those that train alone
    images: int  # scored in a calibration round
    agreement_images: int  # scored where clients' masks are compared
    method_rounds: int
    tries: int
    seeds: tuple[int, ...]
    widened: int = WIDENED  # rates that a row may try beyond its own
    pixels: int = 0  # of the tables of masks, as the first table decides

    folder, watched_folder = "", "rules"  # of runs: each table has its own, but linearity
    beside, consensus_tries = ("--diagnostics",), None
    rules = tuple(
        (sharding, *key)
        for key in (("dense", "0"), *product(RULES, SHARES))
        for sharding in ("nc5", "iid", "nc1")
    )
    sparsities = tuple(product(("nc5",), ("0.9", "0.99", "0.5"), "1248"))
    consensuses = tuple(("nc5", share, "mean") for share in ("1", "0.1", "0.01"))

    def training(
        self, sharding: str, pixels: int = 0, J: int = 4, share: float = 1
    ) -> tuple[str, ...]:
        """Return the options of a federated run of a share of all steps, evaluated twice."""
        count = max(1, round(share * self.steps) // J)
        length = ("--J", f"{J}", "--rounds", f"{count}", "--eval-every", f"{-(-count // 2)}")
        cosine = ("--schedule", "cosine", "--head", "ridge")
        size = ("--image-size", f"{pixels or self.pixels}")
        return (*self.backbone, *cosine, *size, *length, *SHARDINGS[sharding])

    def row(self, key: tuple[str, ...], options: tuple[str, ...], rate: float = 1e-2) -> Row:
        """Return a row that tries rates around this one; its name has the images' pixels."""
        name = "-".join((*key, f"{self.pixels}px")).replace(", ", "-")
        return Row(key, options, around(rate, self.tries), self.seeds, name=name)

    def masked(
        self, key: tuple[str, ...], sharding: str, rule: str, share: str, *more: str, name: str = ""
    ) -> Row:
        """Return the row of a mask, or of dense training; it is of its key, whatever `name`."""
        options = (*self.training(sharding), *mask(rule, share, self.images), *more)
        return self.row(key, options, DENSE[sharding])

    def watched(self, sharding: str, rule: str, share: str) -> Row:
        """Return the row of the rules that has the same runs."""
        row = self.masked((sharding, rule, share), sharding, rule, share, *self.beside)
        return row._replace(key=(sharding, rule))


TI = ("--model", "vit_ti16", "--weights", "data/vit_tiny_patch16_224.pth", *B64)
GPU = Size(TI, (112, 128, 160, 224), 400, 10, "blocks.8", 1000, 2000, 200, 3, (0, 1, 2))
SIZES = {
    "gpu": GPU,
    "gpu-dino": GPU._replace(backbone=B64),  # where a user has its weights
    "gpu-64px": Size(  # the same on two cores, forty short rounds
        (*TI[:-2], "--threads", "1", "--batch-size", "16"),
        *((64,), 160, 1, "blocks.8", 500, 2000, 40, 3, (0, 1, 2)),
    ),
    "gpu-smoke": Size(
        (*SMOKE, "--batch-size", "8"),
        *((16, 32), 80, 1, "blocks.1", 100, 400, 1, 1, (0,)),
    ),
}
