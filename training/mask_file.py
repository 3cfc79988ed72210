"""A mask by parameter names: its file, what `--mask` stands for, its density by layer and kind."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import masks
import model as vit
from flat import FlatView
from machine import safe_files

FORMAT = 1
ORIGIN = ("mask_rule", "weights_sha256", "bytes_up", "bytes_down")  # what others read of `origin`


class Mask:
    """Which entries of which parameters train; everything else is frozen.

    Args:
        shapes: name -> shape of the parameters that took part, in the order of `trains`.
        trains: (P,) bool, their entries end to end, True = trainable.
        origin: plain values that say how it was made.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], trains: Tensor, origin: dict):
        self.shapes, self.trains, self.origin = shapes, trains.cpu(), origin

    @property
    def bytes(self) -> int:
        """What sending it costs: a bit an entry."""
        return math.ceil(len(self.trains) / 8)

    @property
    def sha256(self) -> str:
        """Hash which entries of which parameters are kept."""
        digest = hashlib.sha256(repr(list(self.shapes.items())).encode())
        digest.update(masks.pack(self.trains).numpy().tobytes())
        return digest.hexdigest()

    @property
    def sensitivity_share(self) -> float:
        """The share of all sensitivity that it keeps; of a file that does not say, of entries."""
        share = self.origin.get("sensitivity_share")
        return masks.sensitivity_share(self.trains) if share is None else share

    def rate_factor(self, mask_lr: str | None) -> float:
        """Return what the dense learning rate is multiplied by; mask_lr: as GivenMask has it.

        Raises:
            ValueError: no rate matches, as the mask keeps no sensitivity.
        """
        if mask_lr is None:
            return 1.0
        if not self.sensitivity_share > 0:
            raise ValueError(
                f"--mask-lr {mask_lr}: nothing that the output depends on trains under this mask, "
                "so no rate matches dense training's; --mask-lr raw, or another mask"
            )
        return masks.rate_factor(self.sensitivity_share, mask_lr)

    def parts(self) -> dict[str, Tensor]:
        """Return name -> bool tensor of the parameter's shape."""
        return by_name(self.shapes, self.trains)

    def trained(self, names: Iterable[str]) -> list[str]:
        """Return those of some parameters that are not frozen throughout."""
        parts = self.parts()
        return [name for name in names if name in parts and parts[name].any()]

    def flat(self, view: FlatView) -> Tensor:
        """Return the mask in the layout of a flat view: (P,) bool on its device."""
        parts, mask = self.parts(), torch.zeros_like(view.theta, dtype=torch.bool)
        for name in view.shapes:
            view.view(mask, name).copy_(parts[name])
        return mask

    def save(self, path: Path, purpose: str | None = None) -> None:
        """Write the mask file; purpose: as `safe_files.save_checked` takes it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        content = {"mask_format": FORMAT, "shapes": shapes, "bits": masks.pack(self.trains)}
        safe_files.save_checked(path, content | {"made": self.origin}, purpose)

    @classmethod
    def load(cls, path: Path, model: vit.VisionTransformer, purpose: str | None = None) -> Mask:
        """Read a mask file; purpose: as `safe_files.load_checked` takes it, None for any mask.

        Raises:
            ValueError: no such file, no mask, damaged, empty, or made for another model.
        """
        try:
            content = safe_files.load_checked(path, purpose)
        except IsADirectoryError:
            raise ValueError(f"mask {path}: a folder; a run's mask is its mask.pt") from None
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"mask {path}: no such file") from None
        except safe_files.WrongFile as error:
            raise ValueError(f"mask {path}: no mask that belongs here ({error})") from None
        except safe_files.DamagedFile:
            raise ValueError(
                f"mask {path}: damaged, or no mask that `calibrate` wrote; a run's own mask.pt is "
                "made again where it is gone"
            ) from None
        if not isinstance(content, dict) or content.get("mask_format") != FORMAT:
            raise ValueError(
                f"mask {path}: not a mask of format {FORMAT}; `calibrate` writes mask.pt"
            )
        try:
            shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
            size, bits, origin = (
                sum(map(math.prod, shapes.values())),
                content["bits"],
                content["made"],
            )
            if origin["mask_rule"] not in masks.RULES or not origin.keys() >= set(ORIGIN):
                raise KeyError("made")
            if bits.dtype != torch.uint8 or bits.shape != (math.ceil(size / 8),):
                raise TypeError("bits")
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"mask {path}: damaged, or no mask that `calibrate` wrote") from None
        expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
        for name, shape in shapes.items():
            if expected.get(name) != shape:
                raise ValueError(
                    f"mask {path}: made for another model, {name} is {shape} in the mask and "
                    f"{expected.get(name, 'absent')} in the model"
                )
        mask = cls(shapes, masks.unpack(bits, size), origin)
        if not mask.trains.any():
            raise ValueError(f"mask {path}: it keeps no entry, so that nothing would train")
        return mask


def given_mask(file: str, model: vit.VisionTransformer, copy: Path) -> Mask:
    """Return the mask of `--mask`, or where that file has gone the run's own copy.

    Raises:
        ValueError: the file cannot serve, or is not the mask that the run was made with.
    """
    path = Path(file)
    if not copy.exists():
        return Mask.load(path, model)
    mask = Mask.load(copy, model)
    if path.exists() and Mask.load(path, model).sha256 != mask.sha256:
        raise ValueError(f"--mask {path} is not the mask that {copy.parent} was made with")
    return mask


def say_rounds(rounds: Iterable[dict], rule: str, consensus: str) -> None:
    """Print what rounds of a calibration came to, in scores, which --threshold is compared with.

    How the scores are spread is said of the first round, of all weights.

    Args:
        rounds: a masks.CalibrationRound each, as a mask file has it.
    """
    sign = masks.RULES[rule].sign
    ranks = rule == "random" or (masks.needs_scores(rule) and consensus in masks.RANKS)
    for step in rounds:
        alive = f"{step['alive']:,} of {step['of']:,} weights stay alive"
        bar = f"scores {'from' if sign < 0 else 'up to'} {sign * step['bar']:.3g}"
        quantiles = sorted(sign * key for key in step["quantiles"])  # LEVELS lie around a half
        pairs = zip(masks.LEVELS, quantiles, strict=True)
        below = ", ".join(f"{100 * level:g} % below {score:.3g}" for level, score in pairs)
        scores = "" if ranks else f", {bar}" + f" (of all: {below})" * (step["round"] == 1)
        print(f"calibration round {step['round']}: {alive}{scores}", flush=True)


def by_name(shapes: dict[str, tuple[int, ...]], entries: Tensor) -> dict[str, Tensor]:
    """Return views of some parameters' entries (P,), end to end: name -> a tensor of its shape."""
    parts = entries.split([math.prod(shape) for shape in shapes.values()])
    return {
        name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def by_kind(
    shapes: dict[str, tuple[int, ...]], entries: Tensor
) -> Iterator[tuple[str, str, Tensor]]:
    """Yield layer, kind and view of all that `by_name` returns, query, key and value apart."""
    for name, part in by_name(shapes, entries).items():
        layer, kinds = layer_and_kinds(name)
        for kind, piece in zip(kinds, part.chunk(len(kinds)), strict=True):
            yield layer, kind, piece


def layer_and_kinds(name: str) -> tuple[str, list[str]]:
    """Split a parameter's name into its layer ("embed", "0", ..., "norm") and the kinds it holds.

    A block's query, key and value weights are one tensor of three kinds.
    """
    parts = name.split(".")
    if parts[0] == "blocks":
        module, kind = parts[-2:]
        modules = ("query", "key", "value") if module == "qkv" else (module,)
        return parts[1], [f"{module}.{kind}" for module in modules]
    layer = "norm" if parts[0] == "norm" else "embed"
    return layer, [name.replace("patch_embed.proj", "patch")]


def density_table(mask: Mask) -> tuple[list[str], list[str], np.ndarray]:
    """Return kinds, layers and the kept share (kinds, layers) of their entries; NaN where none."""
    cells = {
        (layer, kind): piece.double().mean().item()
        for layer, kind, piece in by_kind(mask.shapes, mask.trains)
    }
    layers, kinds = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    table = np.array([[cells.get((layer, kind), np.nan) for layer in layers] for kind in kinds])
    return kinds, layers, table
