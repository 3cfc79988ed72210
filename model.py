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
import contextlib
import copy
import hashlib
import http.client
import importlib
import math
import os
import pickle
import re
import stat
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
    std: of the weights that a model without a checkpoint starts from.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    grid: int = 14
    module: Callable[[ViTShape, int], nn.Module] | None = None
    std: float = 0.02


MODELS = {
    "vit_s16": ViTShape(384, 12, 6),
    "vit_ti16": ViTShape(192, 12, 3),
    "vit_b16": ViTShape(768, 12, 12),
    "vit_demo": ViTShape(48, 2, 3, patch=8, grid=4),
    "vit_toy": ViTShape(48, 2, 3, patch=8, grid=4, std=0.1),  # it learns from the first round on
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


WRAPPERS = ("teacher", "model", "model_state_dict", "state_dict", "student")
HEADS = ("head", "heads", "classifier", "fc", "pooler", "projector")
HEADS_BYTES = 512 << 20  # DINO's two heads and Adam's moments of one: 360 MB
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # of torch.save before zip files
PLAIN = [argparse.Namespace, type(Path()), np.ndarray, np.dtype]  # making them runs no code
PLAIN += [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
for _make in (np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]):  # of NumPy 1 and 2
    PLAIN += [(_make, f"numpy.{core}.multiarray.{_make.__name__}") for core in ("core", "_core")]
BLOCK = re.compile(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?")  # number, stem, kind
HUGGING_FACE = {  # a parameter here -> there, in files and in transformers 5; {}: the block
    "cls_token": [["embeddings.cls_token"]],
    "pos_embed": [["embeddings.position_embeddings"]],
    "patch_embed.proj": [["embeddings.patch_embeddings.projection"]],
    "norm1": [["encoder.layer.{}.layernorm_before"], ["layers.{}.layernorm_before"]],
    "attn.qkv": [
        [f"encoder.layer.{{}}.attention.attention.{p}" for p in ("query", "key", "value")],
        [f"layers.{{}}.attention.{p}_proj" for p in "qkv"],
    ],
    "attn.proj": [["encoder.layer.{}.attention.output.dense"], ["layers.{}.attention.o_proj"]],
    "norm2": [["encoder.layer.{}.layernorm_after"], ["layers.{}.layernorm_after"]],
    "mlp.fc1": [["encoder.layer.{}.intermediate.dense"], ["layers.{}.mlp.fc1"]],
    "mlp.fc2": [["encoder.layer.{}.output.dense"], ["layers.{}.mlp.fc2"]],
    "norm": [["layernorm"]],
}
FOREIGN = {  # a word of a key -> what it is
    "fc_norm": "the norm of a mean over patches",
    "pre_logits": "a layer between the norm and the head",
    **dict.fromkeys(("reg_token", "register_tokens"), "register tokens"),
    **dict.fromkeys(("dist_token", "distillation_token"), "DeiT's distillation token"),
    **dict.fromkeys(("ls1", "ls2", "layer_scale1", "layer_scale2"), "layer scale, as in DINOv2"),
}
OTHER_FILES = {  # a key -> what the file is
    "mask_format": "a mask that `calibrate` wrote, which goes to --mask",
    "log": "the checkpoint of a run, of which `train.py export` makes weights",
    "param_groups": "the state of an optimiser",
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


EVERY, CLASS_TOKEN = slice(None), slice(1)  # rows of tokens


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what queries (N, heads, R, d) gather from keys and values: (N, R, heads * d)."""
    dtype = q.dtype
    if q.is_cpu and q.element_size() == 2:  # where a CPU's kernels are slow
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rows: slice = EVERY) -> Tensor:
        n, t, d = x.shape
        parts = self.qkv(x).view(n, t, 3, self.heads, d // self.heads).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        return self.proj(attend(q[:, :, rows], k, v))


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

    def forward(self, x: Tensor, rows: slice = EVERY) -> Tensor:
        """Return these rows of the block's result (N, R, D) of x (N, T, D)."""
        x = x[:, rows] + self.attn(self.norm1(x), rows)
        return x + self.mlp(self.norm2(x))


RESAMPLERS: dict[tuple, Tensor] = {}  # position_matrix by sizes, device and type, of all models


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
        self.passes: Any = None

    def positions(self, height: int, width: int) -> Tensor:
        """Return the position embedding (1, 1 + h*w, D) of an image of this many patches."""
        grid = self.shape.grid
        if (height, width) == (grid, grid):
            return self.pos_embed
        key = (grid, height, width, self.pos_embed.device, self.pos_embed.dtype)
        if (matrix := RESAMPLERS.get(key)) is None:
            with torch.inference_mode(False):  # others may train on it
                matrix = position_matrix(grid, height, width).to(*key[3:])
            traced = torch.compiler.is_compiling() or type(matrix) is not Tensor
            if not traced:  # as torch.export's, which ends with its trace
                RESAMPLERS[key] = matrix
        patches = matrix @ self.pos_embed[:, 1:]
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
        """Return the input (N, 1 + T, D) of block `first`; after the last one (N, 1, D)."""
        return self._through(self.embed(images), 0, first)

    def _through(self, x: Tensor, first: int, end: int) -> Tensor:
        """Take tokens through blocks; the last computes the class token alone, as all that is
        read."""
        for i in range(first, end):
            x = self.blocks[i](x, CLASS_TOKEN if i + 1 == len(self.blocks) else EVERY)
        return x

    def features_from(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Return the normalised class token (N, D) from the input of block `first`."""
        if self.passes is not None and first < len(self.blocks):
            return self._fused_features(tokens, self.blocks[first:])
        return self.norm(self._through(tokens, first, len(self.blocks))[:, 0])

    def _fused_features(self, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        """Return the same by `passes`, and by the modules' parameters alone: no hook sees it."""
        passes, y = self.passes, blocks[0].norm1(x)
        for block, norm in zip(blocks, [*(b.norm1 for b in blocks[1:]), self.norm], strict=True):
            queries = 1 if norm is self.norm else y.shape[1]  # the class token comes first
            qkv, proj, fc1, fc2 = block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2
            y = passes.attention(y, qkv.weight, qkv.bias, block.attn.heads, queries)
            x, y = x[:, :queries], F.linear(y, proj.weight)
            x, y = passes.add_norm(x, y, proj.bias, block.norm2)
            y = passes.bias_gelu(F.linear(y, fc1.weight), fc1.bias)
            x, y = passes.add_norm(x, F.linear(y, fc2.weight), fc2.bias, norm)
        return y[:, 0]

    @contextlib.contextmanager
    def fused(self, passes: Any) -> Iterator[None]:
        """Let the passes between a block's products be those of `passes`, fused.py for one.

        passes: has add_norm, bias_gelu and attention.
        """
        self.passes = passes
        try:
            yield
        finally:
            self.passes = None

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
    basis = torch.eye(grid * grid, dtype=torch.float64, device="cpu")
    basis = basis.view(1, grid * grid, grid, grid)
    scale = ((height + 0.1) / grid, (width + 0.1) / grid)
    out = F.interpolate(basis, scale_factor=scale, mode="bicubic")
    assert out.shape[-2:] == (height, width), out.shape
    return out[0].flatten(1).T.contiguous()


def build_vit(name: str, classes: int, seed: int = 0) -> VisionTransformer:
    """Build a model by `seed`: normal weights, the same in every torch; zero biases and head.

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
            nn.init.normal_(parameter, std=shape.std, generator=generator)
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
                f"put that file at {path}; --data synthetic without --weights needs none"
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
    check_backbone(model, read_checkpoint(path, model), path)


@torch.no_grad()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Copy a checkpoint into the backbone of `model`, its position grid resampled to the model's.

    Raises:
        ValueError: the file cannot serve: what it is, or the first key that differs.
    """
    tensors, parameters = read_checkpoint(path, model), _backbone(model)
    note = _fit_positions(tensors, parameters)
    check_backbone(model, tensors, path)
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"weights {path}: {key} holds NaN or infinite values")
    for key, tensor in tensors.items():
        parameters[key].copy_(tensor)
    if note:
        print(f"weights {path}: {note}")


def read_checkpoint(path: str | Path, model: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint's backbone in fp32 under the keys of `model`; none of its code runs.

    Raises:
        ValueError: the file is missing, damaged, or something else: the sentence says what.
    """
    names = {name: _hugging_face(name) for name in _backbone(model)}
    room = 4 * sum(4 * parameter.numel() for parameter in model.parameters()) + HEADS_BYTES
    try:
        content = _read_file(path, _check_file(path, room))
        other = OTHER_FILES.keys() & set(content) if isinstance(content, dict) else ()
        if other:
            raise ValueError(OTHER_FILES[min(other)])
        if not (state := _find_state(content)):
            kind = f"a {type(content).__name__} without tensors by name"
            raise ValueError(f"it holds {kind}; save the model's state_dict()")
        theirs = {key for layouts in names.values() for keys in layouts for key in keys}
        state = _strip_prefix(state, {*names, *theirs})
        tensors = {key: _dense(key, value) for key, value in state.items()}
        if sum(4 * tensor.numel() for tensor in tensors.values()) > room:  # of few stored values
            raise ValueError(f"its tensors take more than {room:,} bytes")
        return _map_layout({key: tensor.float() for key, tensor in tensors.items()}, names)
    except FileNotFoundError:
        raise ValueError(f"weights {path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"weights {path}: {error}") from None


def _backbone(model: nn.Module) -> dict[str, nn.Parameter]:
    return {k: p for k, p in model.named_parameters() if not k.startswith("head.")}


def _check_file(path: str | Path, room: int) -> bytes:
    """Return the start of a file; raise ValueError if it is of another kind, or too large."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("a folder, pipe or device, and no regular file")
    with open(path, "rb") as file:
        begin, size = file.read(32), os.path.getsize(path)
    if begin.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                files = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"damaged, or a zip file cut short ({error})") from None
        size, ends = sum(f.file_size for f in files), {Path(f.filename).name for f in files}
        if "data.pkl" not in ends or "constants.pkl" in ends:
            raise ValueError("a zip file of TorchScript or another program, and none of torch.save")
    elif TORCH_MAGIC not in begin and begin[8:10] != b'{"':
        what = f"it begins with {begin[:16]}" if begin else "it is empty"
        raise ValueError(f"no file of torch.save or safetensors, {what}")
    if size > room:
        only = f"of which this model takes {room:,} at most"
        raise ValueError(f"it unpacks to {size:,} bytes, {only}; save its state_dict() alone")
    return begin


def _read_file(path: str | Path, begin: bytes) -> Any:
    """Return what a file holds; raise ValueError if it is damaged or holds other objects."""
    try:
        if begin[8:10] == b'{"':
            return importlib.import_module("safetensors.torch").load_file(path)
        with torch.serialization.safe_globals(PLAIN), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        reason = "to read this file takes `pip install safetensors`"
    except Exception as error:  # torch.load raises many types on damaged files
        reason = f"damaged ({(str(error) or type(error).__name__).splitlines()[0]})"
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to run the file's code
            reason = "damaged, or pickled by a protocol that torch.save does not use"
            if name := re.search(r"(?:GLOBAL |<class ')([\w.]+)", str(error)):
                layers = b"ctorch.nn.modules." in Path(path).read_bytes()  # c: pickle's GLOBAL
                kind = "a whole pickled module" if layers else "a pickle of other objects"
                reason = f"{kind} ({name[1]}); save the model's state_dict() instead"
    raise ValueError(reason)


def _find_state(content: Any, depth: int = 5) -> dict[str, Any]:
    """Return the tensors by name of the innermost wrapper; {} where there are none."""
    if not isinstance(content, dict) or not depth:
        return {}
    for wrapper in WRAPPERS:
        if state := _find_state(content.get(wrapper), depth - 1):
            return state
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor | np.ndarray)}
    return {k: v for k, v in tensors.items() if isinstance(k, str)}


def _strip_prefix(state: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Return what follows the prefix before most of the known keys, heads left out."""
    counts: Counter[str] = Counter()
    for key in state:
        words = key.split(".", 12)
        ends = {".".join(words[start:]) for start in range(len(words))} & known
        counts.update(key.removesuffix(end) for end in ends)
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix, count in counts.items() if count == most] or [""]
    prefixes = [prefix for prefix in prefixes if "teacher" in prefix] or prefixes
    if len(prefixes) > 1:
        raise ValueError(f"it holds several backbones ({'*, '.join(prefixes[:4])}*); save one")
    cut = len(prefixes[0])
    inside = {key[cut:]: value for key, value in state.items() if key.startswith(prefixes[0])}
    return {k: v for k, v in inside.items() if k in known or k.split(".")[0] not in HEADS}


def _dense(key: str, value: Tensor | np.ndarray) -> Tensor:
    """Return a tensor, or an array as one; raise ValueError unless it is dense and of floats."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = torch.from_numpy(value.astype(np.float32))
    kind = str(value.dtype).removeprefix("torch.")
    if isinstance(value, Tensor) and value.dtype in FLOATS:
        if value.layout == torch.strided and not value.is_nested and not value.is_meta:
            return value.detach()
        kind = "nested" if value.is_nested else "meta" if value.is_meta else "sparse"
    raise ValueError(f"{key} is no dense tensor of fp16, bf16, fp32 or fp64, but {kind}")


def _hugging_face(name: str) -> list[list[str]]:
    """Return the keys that together hold a parameter in each of Hugging Face's layouts."""
    block, stem, kind = re.fullmatch(BLOCK, name).groups("")
    return [[key.format(block) + kind for key in keys] for keys in HUGGING_FACE.get(stem, ())]


def _map_layout(tensors: dict[str, Tensor], names: dict[str, list]) -> dict[str, Tensor]:
    """Give tensors under Hugging Face's keys their names here: query, key and value are one."""
    for name, keys in ((name, keys) for name, layouts in names.items() for keys in layouts):
        shapes = {tensors[key].shape if key in tensors else () for key in keys}
        if name not in tensors and len(shapes) == 1 and () not in shapes:
            tensors[name] = torch.cat([tensors.pop(key) for key in keys])
    return tensors


def _fit_positions(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """Resample a square position grid to the expected one; returns what was done, "" if nothing."""
    theirs, ours = tensors.get("pos_embed"), expected.get("pos_embed")
    if theirs is None or ours is None or not theirs.dim() == ours.dim() == 3:
        return ""
    old, new = (math.isqrt(max(0, grid.shape[1] - 1)) for grid in (theirs, ours))
    shape = (1, 1 + old**2, ours.shape[2])
    if theirs.shape != shape or theirs.shape == ours.shape or not 0 < old <= 64:
        return ""
    patches = position_matrix(old, new, new) @ theirs[:, 1:].double()
    tensors["pos_embed"] = torch.cat([theirs[:, :1], patches.float()], dim=1)
    return f"position grid of {old} x {old} resampled to {new} x {new}"


def check_backbone(model: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Raise ValueError unless keys and shapes are those of the model's backbone; names the first
    that differs."""
    expected = _backbone(model)
    if "pos_embed" in tensors and "cls_token" in expected.keys() - tensors.keys():
        raise ValueError(f"weights {path}: another architecture, it has no class token (cls_token)")
    for key in [key for key in tensors if key not in expected]:
        if word := FOREIGN.keys() & set(key.split(".")):
            what = FOREIGN[word.pop()]
            raise ValueError(f"weights {path}: another architecture, {key} is {what}")
    for key in [*expected, *tensors]:
        ours = tuple(expected[key].shape) if key in expected else "absent"
        theirs = tuple(tensors[key].shape) if key in tensors else "absent"
        if ours != theirs:
            width = theirs[-1] if key == "cls_token" and key in tensors else None
            meant = [name for name, shape in MODELS.items() if shape.width == width]
            raise ValueError(
                f"weights {path}: another architecture, {key} is {theirs} in the file and "
                f"{ours} in the model (--model {'|'.join(meant or MODELS)})"
            )


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
