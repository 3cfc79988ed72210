"""The ViT equals torchvision's and its own equations; checkpoints load whole or not at all."""

import argparse
import hashlib
import io
import math
import os
import threading
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F

import model as vit
from model import (
    build_vit,
    fingerprint,
    first_trained_block,
    load_weights,
    read_checkpoint,
    scoped_names,
    trained_names,
)

DINO = vit.WEIGHTS["dino"]


def randomise(model, seed=0):
    """Give every parameter, position and bias included, a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.1 if p.dim() == 1 else 0.03))
    return model


@pytest.fixture(scope="module")
def ti16():
    return randomise(build_vit("vit_ti16", classes=10)).eval()


def test_at_224_px_it_is_torchvisions(ti16):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.models.VisionTransformer(224, 16, 12, 3, 192, 768, num_classes=10).eval()
    names = {
        "cls_token": "class_token", "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj", "norm": "encoder.ln", "head": "heads.head",
        "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "self_attention.out_proj",
        "attn.qkv.weight": "self_attention.in_proj_weight",
        "attn.qkv.bias": "self_attention.in_proj_bias", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3",
    }  # fmt: skip
    state = {}
    for key, value in ti16.state_dict().items():
        prefix, rest = "", key
        if key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            prefix = f"encoder.layers.encoder_layer_{number}."
        stem = next(s for s in sorted(names, key=len, reverse=True) if rest.startswith(s))
        state[prefix + names[stem] + rest[len(stem) :]] = value
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ti16(images), theirs(images), rtol=1e-5, atol=1e-5)


def written_out(p, images, heads, patch=16, grid=14):
    """The equations of the ViT, with DINO's position rule, over a dictionary of parameters."""

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * p[name + ".weight"] + p[name + ".bias"]

    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=patch)
    h, w = x.shape[-2:]
    position = p["pos_embed"][:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if (h, w) != (grid, grid):
        scale = ((h + 0.1) / grid, (w + 0.1) / grid)
        position = F.interpolate(position, scale_factor=scale, mode="bicubic")
    x = (x + position).flatten(2).transpose(1, 2)
    token = (p["cls_token"] + p["pos_embed"][:, :1]).expand(len(x), -1, -1)
    x = torch.cat([token, x], dim=1)
    n, t, d = x.shape
    for i in range(sum(name.endswith("norm1.weight") for name in p)):
        b = f"blocks.{i}."
        qkv = linear(norm(x, b + "norm1"), b + "attn.qkv").view(n, t, 3, heads, d // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(d // heads)).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).reshape(n, t, d), b + "attn.proj")
        hidden = linear(norm(x, b + "norm2"), b + "mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, b + "mlp.fc2")
    return linear(norm(x[:, 0], "norm"), "head")


@pytest.mark.parametrize("size", [(160, 160), (96, 96), (96, 160), (224, 224), (64, 64)])
def test_at_other_sizes_it_is_the_equations(ti16, size):
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = written_out(dict(ti16.named_parameters()), images, heads=3)
        torch.testing.assert_close(ti16(images), expected, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- checkpoints


def dino_checkpoint():
    """The keys and shapes of dino_deitsmall16_pretrain.pth, as published, with random values."""
    shapes = {
        "cls_token": (1, 1, 384), "pos_embed": (1, 197, 384),
        "patch_embed.proj.weight": (384, 3, 16, 16), "patch_embed.proj.bias": (384,),
    }  # fmt: skip
    for i in range(12):
        for name, shape in {
            "norm1": (384,), "attn.qkv": (1152, 384), "attn.proj": (384, 384),
            "norm2": (384,), "mlp.fc1": (1536, 384), "mlp.fc2": (384, 1536),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    shapes |= {"norm.weight": (384,), "norm.bias": (384,)}
    assert len(shapes) == 150 and sum(map(math.prod, shapes.values())) == 21_665_664
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def dino():
    return dino_checkpoint()


@pytest.mark.parametrize("layout", ["plain", "full", "module", "with a head"])
def test_the_dino_checkpoint_loads_in_every_wrapping(dino, layout, tmp_path):
    backbone = {f"module.backbone.{k}": v for k, v in dino.items()}
    head = {"module.head.mlp.0.weight": torch.zeros(3, 3)}
    state = {
        "plain": dino,
        "full": {"student": {}, "teacher": backbone | head, "args": argparse.Namespace(lr=1)},
        "module": {f"module.{k}": v for k, v in dino.items()},
        "with a head": dino | {"head.weight": torch.zeros(1000, 384)},
    }[layout]
    torch.save(state, tmp_path / "x.pth")
    model = build_vit("vit_s16", classes=100)
    load_weights(model, tmp_path / "x.pth")
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    assert own.keys() == dino.keys()
    assert all(torch.equal(own[key], dino[key]) for key in dino)


def demo_state():
    return {k: v for k, v in build_vit("vit_demo", 5).state_dict().items() if k[:5] != "head."}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, "norm.weight is absent in the file"),
        ({"extra": torch.zeros(2)}, r"extra is \(2,\) in the file and absent in the model"),
        (
            {"pos_embed": torch.zeros(1, 5, 48)},
            r"pos_embed is \(1, 5, 48\) in the file and \(1, 17",
        ),
    ],
)
def test_the_first_key_that_differs_is_named(change, message, tmp_path):
    state = {k: v for k, v in (demo_state() | change).items() if v is not None}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(build_vit("vit_demo", 5), tmp_path / "x.pth")


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save(demo_state(), tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html>Access denied</html>")
    torch.save({"norm.weight": Evil()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in ("cut", "page", "evil", "list", "absent"):
        with pytest.raises(ValueError, match=f"weights .*{name}.pth: (damaged|holds no|no such)"):
            load_weights(build_vit("vit_demo", 5), tmp_path / f"{name}.pth")
    assert not (tmp_path / "owned").exists()


def test_the_real_vit_ti16_loads_and_sees(real_data):
    model = build_vit("vit_ti16", classes=100)
    load_weights(model, real_data / "vit_tiny_patch16_224.pth")
    assert model.pos_embed.abs().mean() > 0.01
    assert model.features(torch.zeros(1, 3, 224, 224)).isfinite().all()


def test_a_full_checkpoint_loads_and_no_class_but_namespace_does(tmp_path):
    state = {f"module.backbone.{key}": value for key, value in demo_state().items()}
    full = {"teacher": state, "student": {}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(full, tmp_path / "full.pth")
    load_weights(build_vit("vit_demo", 5), tmp_path / "full.pth")
    torch.save(full | {"args": threading.Thread}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="damaged or no PyTorch checkpoint"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "state",
    [
        {7: torch.zeros(2)},
        {"norm.weight": torch.zeros(2, 2).to_sparse()},
        {"norm.weight": torch.zeros(48, dtype=torch.complex64)},
        {"norm.weight": "text"},
    ],
)
def test_what_holds_other_than_names_and_dense_tensors_is_refused(state, tmp_path):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="holds no dictionary of names and dense tensors"):
        load_weights(build_vit("vit_demo", 5), tmp_path / "x.pth")


def test_dino_offline_says_where_the_file_goes(tmp_path, monkeypatch):
    def offline(url, path, progress):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        ValueError, match="^--weights dino: cannot download .*--data synth"
    ) as error:
        vit.download("dino", tmp_path)
    assert str(tmp_path / DINO.file) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_dino(monkeypatch):
    """DINO's model is a small one; returns what serves its weights, after `change`."""
    torch.save(demo_state(), saved := io.BytesIO())
    saved = saved.getvalue()
    monkeypatch.setitem(vit.MODELS, "vit_s16", vit.MODELS["vit_demo"])
    monkeypatch.setitem(vit.WEIGHTS, "dino", DINO._replace(bytes=len(saved) - 100))

    def serve(change=lambda content: content):
        def download(url, path, progress):
            asked.append(url)
            Path(path).write_bytes(change(saved))

        asked = []
        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        return asked

    return serve


def test_dinos_first_use_is_pinned_and_a_changed_file_refused(tmp_path, small_dino, capsys):
    asked = small_dino()
    path = vit.download("dino", tmp_path / "new")
    assert "pinned" in capsys.readouterr().out and vit.download("dino", tmp_path / "new") == path
    assert asked == [DINO.url]
    pin = path.with_name(path.name + ".sha256")
    assert set(path.parent.iterdir()) == {path, pin}
    assert pin.read_text() == hashlib.sha256(path.read_bytes()).hexdigest() + "\n"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="is damaged: its SHA-256 differs"):
        vit.download("dino", tmp_path / "new")


def test_a_download_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stopped(url, path, progress):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        vit.download("dino", tmp_path)
    assert not list(tmp_path.iterdir())


def flipped(content):
    """One bit of a tensor is another one."""
    at = content.index(demo_state()["patch_embed.proj.weight"].numpy().tobytes())
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"<html>", "it has 6 bytes"),
        (lambda content: content[:-200], "another file: it has"),
        (lambda content: content + bytes(len(content)), "another file: it has"),
        (lambda content: bytes(len(content)), "damaged or no PyTorch checkpoint"),
        (flipped, "the CRC of .* differs"),
    ],
)
def test_what_is_not_dinos_checkpoint_is_not_kept(change, message, tmp_path, small_dino):
    small_dino(change)
    with pytest.raises(ValueError, match=f"^--weights dino: cannot download .*{message}"):
        vit.download("dino", tmp_path)
    assert not list(tmp_path.iterdir())


def test_dinos_checkpoint_has_dinos_keys_and_shapes(tmp_path, small_dino, monkeypatch):
    monkeypatch.setitem(vit.MODELS, "vit_s16", vit.ViTShape(48, 1, 3, patch=8, grid=4))
    small_dino()
    with pytest.raises(ValueError, match="another architecture, blocks.1"):
        vit.download("dino", tmp_path)


# ---------------------------------------------------------------------------- building, naming


def test_a_model_is_a_function_of_its_seed_and_starts_with_a_zero_head():
    a, b, c = (build_vit("vit_demo", 5, seed=s) for s in (0, 0, 1))
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    assert not torch.equal(a.pos_embed, c.pos_embed)
    assert not a.head.weight.any() and not a.head.bias.any()
    assert (a.blocks[0].norm1.weight == 1).all() and not a.blocks[0].mlp.fc1.bias.any()


@pytest.mark.parametrize("size", [(33, 32), (32, 4), (0, 32)])
def test_sizes_that_the_patch_does_not_divide_are_refused(size):
    with pytest.raises(ValueError, match="no multiple of the patch size 8"):
        build_vit("vit_demo", 5)(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match="unknown model 'vit_x'"):
        build_vit("vit_x", 5)


def test_normalisation_follows_the_checkpoints_name():
    assert vit.default_normalisation("data/vit_tiny_patch16_224.pth") == vit.HALF
    assert vit.default_normalisation("dino") == vit.default_normalisation("x.pth") == vit.IMAGENET


def test_what_trains_is_named_from_the_first_block_on():
    model = build_vit("vit_demo", 5)
    everything = [name for name, _ in model.named_parameters()]
    assert trained_names(model, "all", freeze_head=False) == everything
    assert trained_names(model, "all", freeze_head=True) == everything[:-2]
    assert trained_names(model, "head", freeze_head=False) == ["head.weight", "head.bias"]
    tail = trained_names(model, "blocks.1", freeze_head=True)
    assert tail[0] == "blocks.1.norm1.weight" and tail[-1] == "norm.bias" and len(tail) == 14
    with pytest.raises(ValueError, match="--train blocks.2: choose all, head, or one of blocks.0"):
        trained_names(model, "blocks.2", freeze_head=True)
    with pytest.raises(ValueError, match="nothing to train"):
        trained_names(model, "head", freeze_head=True)


def test_a_model_on_kept_patches_is_the_model_of_those_patches():
    model = build_vit("vit_demo", 10)
    images, generator = torch.randn(3, 3, 32, 32), torch.Generator().manual_seed(0)
    everything = torch.stack([torch.randperm(16, generator=generator) for _ in range(3)])
    whole = model.features(images)  # attention does not know the order of patches
    torch.testing.assert_close(model.features(images, everything), whole, rtol=1e-5, atol=1e-5)
    keep = everything[:, :5]
    tokens = model.embed(images)
    kept = torch.stack([t[[0, *(k + 1).tolist()]] for t, k in zip(tokens, keep, strict=True)])
    assert torch.equal(model.embed(images, keep), kept)
    assert not torch.allclose(model.features(images, keep), whole, rtol=1e-3)


def test_features_can_be_had_from_any_block_on():
    model = build_vit("vit_demo", 10)
    images = torch.randn(2, 3, 32, 32)
    for first in range(model.shape.depth + 1):
        tokens = model.tokens(images, first)
        assert torch.equal(model.features_from(tokens, first), model.features(images))


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["cls_token", "blocks.3.norm1.weight"], 0),
        (["patch_embed.proj.bias"], 0),
        (["blocks.10.norm1.weight", "blocks.2.mlp.fc1.bias"], 2),
        (["norm.weight", "head.bias"], 12),
    ],
)
def test_the_first_trained_block(names, first):
    assert first_trained_block(names, 12) == first


def test_a_scope_names_the_backbones_parameters_by_patterns():
    model = build_vit("vit_demo", 5)
    names = scoped_names(model, ["blocks.1.*.bias", "norm.weight", "norm.*"])
    assert names[0] == "blocks.1.norm1.bias" and names[-2:] == ["norm.weight", "norm.bias"]
    assert len(names) == 8
    with pytest.raises(ValueError, match="--mask-scope head.*: no parameter of the backbone"):
        scoped_names(model, ["norm.*", "head.*"])


def test_a_fingerprint_is_of_the_backbone_alone():
    model, other = (build_vit("vit_demo", 5, seed=s) for s in (0, 0))
    with torch.no_grad():
        other.head.weight.fill_(1)
        assert fingerprint(model) == fingerprint(other)
        other.norm.bias[0] = 1
    assert fingerprint(model) != fingerprint(other)
