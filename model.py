"""Vision transformer by hand, in DINO's key layout, and the checkpoints that it loads.

    x = patches W + b + position;  x = x + attention(norm1(x));  x = x + mlp(norm2(x));  norm(x)[0]

Pre-norm, exact GELU, LayerNorm eps 1e-6 (Dosovitskiy 2021, arXiv:2010.11929); position grids of
other sizes by DINO's bicubic rule (Caron 2021, arXiv:2104.14294), kept as one constant matrix.

Another backbone is an entry of MODELS, or of WEIGHTS; or any module with this one's names in place
of its four methods: features, tokens, features_from and classify.

    import torch; from model import build_vit
    vit = build_vit("vit_demo", classes=10)
    vit(torch.zeros(2, 3, 32, 32))  # logits (2, 10)
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import http.client
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
HEAD = ("head.weight", "head.bias")


@dataclass(frozen=True)
class ViTShape:
    """Sizes of a vision transformer; `grid` is the side of its position grid in patches.

    module: (shape, classes) -> the model; None: VisionTransformer.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    grid: int = 14
    module: Callable[[ViTShape, int], nn.Module] | None = None


MODELS = {
    "vit_s16": ViTShape(384, 12, 6),
    "vit_ti16": ViTShape(192, 12, 3),
    "vit_b16": ViTShape(768, 12, 12),
    "vit_demo": ViTShape(48, 2, 3, patch=8, grid=4),
}


class Weights(NamedTuple):
    """A checkpoint that is downloaded: of which model, where it lies, bytes of its tensors."""

    model: str
    url: str
    bytes: int
    normalisation: tuple[tuple, tuple] = IMAGENET

    @property
    def file(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]


WEIGHTS = {
    "dino": Weights(
        "vit_s16",
        "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/"
        "dino_deitsmall16_pretrain.pth",
        86_662_656,
    ),
}


class PatchConv(nn.Conv2d):
    """A convolution whose kernel equals its stride, as one matrix product."""

    computes = nn.Conv2d  # for fisher.py: its result is the convolution's

    def forward(self, images: Tensor) -> Tensor:
        p = self.kernel_size[0]
        n, c, h, w = images.shape
        x = images.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(x.reshape(n, h // p, w // p, c * p * p), self.weight.flatten(1), self.bias)
        return x.permute(0, 3, 1, 2)  # (N, D, h/p, w/p)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = PatchConv(3, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (N, T, D)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        parts = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A ViT with DINO's parameter names and a linear head; see `build_vit`."""

    def __init__(self, shape: ViTShape, classes: int):
        super().__init__()
        self.shape = shape
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + shape.grid**2, shape.width))
        self.patch_embed = PatchEmbed(shape.patch, shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, classes)
        self._resamplers: dict[tuple, Tensor] = {}

    def positions(self, height: int, width: int) -> Tensor:
        """Return the position embedding (1, 1 + h*w, D) of an image of this many patches."""
        grid = self.shape.grid
        if (height, width) == (grid, grid):
            return self.pos_embed
        key = (height, width, self.pos_embed.device, self.pos_embed.dtype)
        if key not in self._resamplers:
            matrix = position_matrix(grid, height, width)
            self._resamplers[key] = matrix.to(self.pos_embed.device, self.pos_embed.dtype)
        patches = self._resamplers[key] @ self.pos_embed[:, 1:]
        return torch.cat([self.pos_embed[:, :1], patches], dim=1)

    def embed(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Turn images (N, 3, H, W) into the first block's input (N, 1 + T, D).

        Args:
            keep: (N, R) int64, the patches 0..T-1 that each image keeps; None keeps all, T = R.
        """
        check_image_size(images.shape[-2:], self.shape.patch)
        height, width = (side // self.shape.patch for side in images.shape[-2:])
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(height, width)
        if keep is None:
            return x
        image = torch.arange(len(x), device=x.device)[:, None]
        return x[image, F.pad(keep + 1, (1, 0))]  # class token: place 0

    def tokens(self, images: Tensor, first: int) -> Tensor:
        """Return the input (N, 1 + T, D) of block `first`."""
        x = self.embed(images)
        for block in self.blocks[:first]:
            x = block(x)
        return x

    def features_from(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Return the normalised class token (N, D) from the input of block `first`."""
        for block in self.blocks[first:]:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def features(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return the normalised class token (N, D) of images (N, 3, H, W); keep as in `embed`."""
        return self.features_from(self.embed(images, keep))

    def classify(self, features: Tensor) -> Tensor:
        """Return logits (N, classes) of features (N, D), in fp32 or wider."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        if features.dtype == self.head.weight.dtype == dtype:
            return self.head(features)  # where hooks see it
        return F.linear(features.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype))

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return logits (N, classes) of images (N, 3, H, W), in fp32; keep as in `embed`."""
        return self.classify(self.features(images, keep))


def check_image_size(size: Iterable[int], patch: int) -> None:
    """Raise ValueError unless every side is a positive multiple of the patch."""
    for side in size:
        if side < patch or side % patch:
            raise ValueError(f"image size {side} is no multiple of the patch size {patch}")


def position_matrix(grid: int, height: int, width: int) -> Tensor:
    """Return the constant (height*width, grid*grid) matrix of DINO's bicubic position resampling.

    DINO gives interpolate the scale (n + 0.1) / grid, not a size; coordinates follow the scale.
    """
    basis = torch.eye(grid * grid, dtype=torch.float64).view(1, grid * grid, grid, grid)
    scale = ((height + 0.1) / grid, (width + 0.1) / grid)
    out = F.interpolate(basis, scale_factor=scale, mode="bicubic")
    assert out.shape[-2:] == (height, width), out.shape
    return out[0].flatten(1).T.contiguous()


def build_vit(name: str, classes: int, seed: int = 0) -> VisionTransformer:
    """Build a model by `seed`: truncated normal 0.02 weights, zero biases and a zero head.

    Raises:
        ValueError: the name is not in MODELS.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    shape = MODELS[name]
    model = (shape.module or VisionTransformer)(shape, classes)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and not key.startswith("head."):
            nn.init.trunc_normal_(parameter, std=0.02, a=-2.0, b=2.0, generator=generator)
        elif not key.startswith(("norm", "blocks")) or key.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


def default_normalisation(weights: str) -> tuple[tuple, tuple]:
    """Return (mean, std) of a checkpoint by its name: 0.5 for ViTs trained by Google's recipe."""
    if weights in WEIGHTS:
        return WEIGHTS[weights].normalisation
    name = Path(weights).name
    return HALF if name == "none" or name.startswith("vit_tiny_patch16") else IMAGENET


def download(name: str, folder: str | Path) -> Path:
    """Return one of WEIGHTS in `folder`, downloading it first where it is missing.

    No checksum of it is published. So its size, keys, shapes and the CRC of every tensor are
    checked, and its first use pins its SHA-256 in a side file: a file that no longer matches is
    refused.

    Raises:
        ValueError: no network, or a file that is damaged.
    """
    weights = WEIGHTS[name]
    path = Path(folder) / weights.file
    pin = path.with_name(weights.file + ".sha256")
    if not path.exists():
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        print(f"downloading {weights.url} to {path}", flush=True)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(weights.url, str(aside), progress=sys.stderr.isatty())
            check_download(weights, aside)
            os.replace(aside, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(
                f"--weights {name}: cannot download {weights.url} ({error}). Without a network, "
                f"put that file at {path}, or take --data synthetic, which needs no weights"
            ) from None
        finally:
            aside.unlink(missing_ok=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not pin.exists():
        check_download(weights, path)
        aside = pin.with_name(f"{pin.name}.{os.getpid()}.tmp")
        aside.write_text(digest + "\n")
        os.replace(aside, pin)
        print(f"{path}: SHA-256 {digest} pinned in {pin.name}")
    elif pin.read_text().strip() != digest:
        raise ValueError(
            f"{path} is damaged: its SHA-256 differs from {pin}; delete both, run again"
        )
    return path


def check_download(weights: Weights, path: Path) -> None:
    """Raise ValueError unless a file is as it was published, as far as is known."""
    size = path.stat().st_size
    if not weights.bytes <= size <= 1.02 * weights.bytes:
        raise ValueError(
            f"weights {path}: damaged, or another file: it has {size:,} bytes, and {weights.file} "
            f"slightly more than {weights.bytes:,}"
        )
    if zipfile.is_zipfile(path):  # torch.load looks at no CRC
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                raise ValueError(f"weights {path}: damaged, the CRC of {bad} differs")
    with torch.device("meta"):
        model = VisionTransformer(MODELS[weights.model], 1)
    check_backbone(model, read_checkpoint(path), path)


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Return a checkpoint's backbone tensors under DINO's keys; heads and wrappers are dropped.

    Raises:
        ValueError: the file is missing, damaged, or holds no tensors.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"weights {path}: no such file") from None
    except Exception as error:  # torch.load raises many types on damaged files
        reason = str(error).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # torch advises to load it unsafely
            reason = "not a file of tensors and plain values alone"
        raise ValueError(f"weights {path}: damaged or no PyTorch checkpoint ({reason})") from None
    for wrapper in ("teacher", "model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(map(_is_parameter, state, state.values())):
        raise ValueError(f"weights {path}: holds no dictionary of names and dense tensors")
    tensors = {}
    for key, value in state.items():
        for prefix in ("module.", "backbone."):
            key = key.removeprefix(prefix)
        if not key.startswith("head."):
            tensors[key] = value
    return tensors


def _is_parameter(name: Any, value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return isinstance(name, str) and dense and not value.is_complex() and not value.is_quantized


def check_backbone(model: VisionTransformer, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Raise ValueError unless keys and shapes are those of the model's backbone; names the first
    that differs."""
    expected = {k: p for k, p in model.named_parameters() if not k.startswith("head.")}
    for key in [*expected, *tensors]:
        ours = tuple(expected[key].shape) if key in expected else "absent"
        theirs = tuple(tensors[key].shape) if key in tensors else "absent"
        if ours != theirs:
            raise ValueError(
                f"weights {path}: another architecture, {key} is {theirs} in the file and "
                f"{ours} in the model (--model {'|'.join(MODELS)})"
            )


@torch.no_grad()
def load_weights(model: VisionTransformer, path: str | Path) -> None:
    """Copy a checkpoint into the backbone of `model`; keys and shapes must match exactly.

    Raises:
        ValueError: damaged file, or another architecture; the first key that differs is named.
    """
    tensors = read_checkpoint(path)
    check_backbone(model, tensors, path)
    parameters = dict(model.named_parameters())
    for key, tensor in tensors.items():
        parameters[key].copy_(tensor)


def check_train(train: str, depth: int) -> None:
    """Raise ValueError unless `train` is "all", "head" or a block of a model of this depth."""
    if train not in ("all", "head", *(f"blocks.{i}" for i in range(depth))):
        raise ValueError(
            f"--train {train}: choose all, head, or one of blocks.0 to blocks.{depth - 1}"
        )


def trained_names(model: VisionTransformer, train: str, freeze_head: bool) -> list[str]:
    """Return the parameters that train: "all", "head", or from a block on ("blocks.8").

    Raises:
        ValueError: no such block, or nothing left to train.
    """
    check_train(train, model.shape.depth)
    names = [name for name, _ in model.named_parameters() if not name.startswith("head.")]
    if train == "head":
        names = []
    elif train != "all":
        first = next(i for i, name in enumerate(names) if name.startswith(train + "."))
        names = names[first:]
    names += [] if freeze_head else ["head.weight", "head.bias"]
    if not names:
        raise ValueError("--train head with --freeze-head leaves nothing to train")
    return names


def first_trained_block(names: Iterable[str], depth: int) -> int:
    """Return the first block that holds one of these parameters, `depth` for later ones alone."""
    blocks = [name.split(".")[1] if name.startswith("blocks.") else name for name in names]
    after = ("norm.weight", "norm.bias", "head.weight", "head.bias")
    return min(depth if b in after else int(b) if b.isdecimal() else 0 for b in blocks)


def scoped_names(model: VisionTransformer, patterns: list[str]) -> list[str]:
    """Return the backbone's parameters that match one of the shell patterns.

    Raises:
        ValueError: a pattern that matches none.
    """
    backbone = trained_names(model, "all", freeze_head=True)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in backbone):
            raise ValueError(
                f"--mask-scope {pattern}: no parameter of the backbone has such a name; "
                f"there are {backbone[0]}, {backbone[-1]} and others"
            )
    return [name for name in backbone if any(fnmatchcase(name, p) for p in patterns)]


def fingerprint(model: VisionTransformer) -> str:
    """Return the SHA-256 of the backbone's parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in HEAD:
            digest.update(parameter.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cast_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a model in another dtype."""
    return copy.deepcopy(model).to(dtype)
