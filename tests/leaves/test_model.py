"""The ViT equals torchvision's and its own equations; checkpoints load whole or not at all."""

import argparse
import hashlib
import io
import math
import os
import sys
import threading
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as vit
from model import (
    build_vit,
    fingerprint,
    first_trained_block,
    load_weights,
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


def test_the_dino_checkpoint_loads_whole(tmp_path):
    """As it is published; LAYOUTS below has the wrappings."""
    dino = dino_checkpoint()
    torch.save(dino, tmp_path / "x.pth")
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
            {"pos_embed": torch.zeros(1, 6, 48)},
            r"pos_embed is \(1, 6, 48\) in the file and \(1, 17",
        ),
    ],
)
def test_the_first_key_that_differs_is_named(change, message, tmp_path):
    state = {k: v for k, v in (demo_state() | change).items() if v is not None}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_weights(build_vit("vit_demo", 5), tmp_path / "x.pth")


def randomised_state(seed=7):
    model = randomise(build_vit("vit_demo", 5, seed))
    return {k: p.detach() for k, p in model.named_parameters() if not k.startswith("head.")}


SOURCE = randomised_state()
CLASSIFIER = {"weight": torch.ones(100, 48), "bias": torch.zeros(100)}


def behind(prefix, state=SOURCE):
    return {prefix + key: value for key, value in state.items()}


def hugging_face(prefix=""):
    """The keys of transformers' ViTModel, written out apart from model.py's table."""
    state, ours = {}, SOURCE
    state["embeddings.cls_token"] = ours["cls_token"]
    state["embeddings.position_embeddings"] = ours["pos_embed"]
    for kind in ("weight", "bias"):
        patches = f"embeddings.patch_embeddings.projection.{kind}"
        state[patches] = ours[f"patch_embed.proj.{kind}"]
        state[f"layernorm.{kind}"] = ours[f"norm.{kind}"]
        state[f"pooler.dense.{kind}"] = torch.ones(48)
        for i in range(2):
            layer, block = f"encoder.layer.{i}", f"blocks.{i}"
            q, k, v = ours[f"{block}.attn.qkv.{kind}"].split(48)
            state[f"{layer}.attention.attention.query.{kind}"] = q
            state[f"{layer}.attention.attention.key.{kind}"] = k
            state[f"{layer}.attention.attention.value.{kind}"] = v
            state[f"{layer}.attention.output.dense.{kind}"] = ours[f"{block}.attn.proj.{kind}"]
            state[f"{layer}.intermediate.dense.{kind}"] = ours[f"{block}.mlp.fc1.{kind}"]
            state[f"{layer}.output.dense.{kind}"] = ours[f"{block}.mlp.fc2.{kind}"]
            state[f"{layer}.layernorm_before.{kind}"] = ours[f"{block}.norm1.{kind}"]
            state[f"{layer}.layernorm_after.{kind}"] = ours[f"{block}.norm2.{kind}"]
    return behind(prefix, state)


def transformers_5(prefix=""):
    """The keys of the state_dict() of a ViTModel of transformers 5; its files have the others."""
    renames = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    state = {}
    for key, value in hugging_face().items():
        for old, new in renames.items():
            key = key.replace(old, new)
        state[prefix + key] = value
    return state


OTHER = {key: value + 1 for key, value in SOURCE.items()}
LAYOUTS = {
    "model_state_dict": {"epoch": 3, "model_state_dict": SOURCE, "optimizer_state_dict": {}},
    "a configuration called model": {"model": {"name": "vit"}, "state_dict": SOURCE},
    "wrapper in a wrapper": {"state_dict": {"model": behind("module.")}},
    "Lightning": {
        "state_dict": behind("backbone.") | behind("classifier.", CLASSIFIER),
        "hyper_parameters": {"lr": 0.1},
    },
    "head": SOURCE | behind("head.", CLASSIFIER),
    "fc": SOURCE | behind("fc.", CLASSIFIER),
    "classifier": SOURCE | behind("classifier.", CLASSIFIER),
    "DINO's head": SOURCE | {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer": 3},
    "module": behind("module."),
    "_orig_mod": behind("_orig_mod.") | behind("_orig_mod.head.", CLASSIFIER),
    "module._orig_mod": behind("module._orig_mod."),
    "_orig_mod.module": behind("_orig_mod.module."),
    "model": {"state_dict": behind("model.")},
    "encoder": behind("encoder."),
    "vit": behind("vit."),
    "a name of one's own": behind("net.trunk."),
    "teacher in model": {"model": behind("teacher.backbone.") | behind("student.backbone.", OTHER)},
    "teacher and student": {
        "student": behind("module.backbone.", OTHER),
        "teacher": behind("module.backbone.") | {"module.head.mlp.0.weight": torch.ones(2, 2)},
        "optimizer": {"state": {}},
        "args": argparse.Namespace(arch="vit_small", folder=Path("x")),
        "dino_loss": OrderedDict(center=torch.zeros(1, 3)),
    },
    "student alone": {"student": behind("backbone."), "teacher": {}},
    "plain values beside": SOURCE | {"epoch": 3, "name": "x", "best": np.float64(0.5)},
    "numpy scalars": {
        "model": SOURCE,
        "best": np.mean([0.5, 0.7]),
        "history": [np.float32(1), np.int64(2), np.bool_(True)],
        "at": np.arange(3),
    },
    "numpy arrays": {key: value.numpy() for key, value in SOURCE.items()},
    "big-endian arrays": {key: value.numpy().astype(">f8") for key, value in SOURCE.items()},
    "parameters": OrderedDict((k, torch.nn.Parameter(v)) for k, v in SOURCE.items()),
    "float64": {key: value.double() for key, value in SOURCE.items()},
    "ViTModel": hugging_face(),
    "ViTForImageClassification": hugging_face("vit.") | behind("classifier.", CLASSIFIER),
    "ViTModel of transformers 5": transformers_5(),
    "its ViTForImageClassification": transformers_5("vit.") | behind("classifier.", CLASSIFIER),
    "ViTModel in a wrapper": {"model": hugging_face("module.encoder.")},
}


def loaded(path):
    model = build_vit("vit_demo", 5)
    load_weights(model, path)
    return {k: p.detach() for k, p in model.named_parameters() if not k.startswith("head.")}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_source_models_tensors(layout, old, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(LAYOUTS[layout], path, _use_new_zipfile_serialization=not old)
    parameters = loaded(path)
    assert parameters.keys() == SOURCE.keys()
    assert all(torch.equal(parameters[key], SOURCE[key]) for key in SOURCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast(dtype, tmp_path):
    torch.save({key: value.to(dtype) for key, value in SOURCE.items()}, tmp_path / "x.pth")
    for key, value in loaded(tmp_path / "x.pth").items():
        assert value.dtype == torch.float32 and torch.equal(value, SOURCE[key].to(dtype).float())


@pytest.mark.parametrize("state", [SOURCE, hugging_face("vit.")], ids=["timm", "Hugging Face"])
def test_safetensors_load(state, tmp_path, monkeypatch):
    package = pytest.importorskip("safetensors.torch")
    path = tmp_path / "model.safetensors"
    package.save_file({key: value.contiguous() for key, value in state.items()}, path)
    parameters = loaded(path)
    assert all(torch.equal(parameters[key], SOURCE[key]) for key in SOURCE)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert "damaged (" in refusal(path)
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(path)


@pytest.mark.parametrize("grid", [1, 3, 7])
def test_a_position_grid_of_another_size_is_resampled_by_dinos_rule(grid, tmp_path, capsys):
    positions = torch.randn(1, 1 + grid**2, 48)
    torch.save(SOURCE | {"pos_embed": positions}, tmp_path / "x.pth")
    parameters = loaded(tmp_path / "x.pth")
    patches = positions[:, 1:].reshape(1, grid, grid, 48).permute(0, 3, 1, 2)
    scale = (4 + 0.1) / grid
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    expected = torch.cat([positions[:, :1], patches.flatten(2).mT], dim=1)
    torch.testing.assert_close(parameters["pos_embed"], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(parameters["norm.bias"], SOURCE["norm.bias"])
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"grid of {grid} x {grid} resampled to 4 x 4" in said


def refusal(path):
    """Return the sentence that refuses a file; the model is as it was."""
    model = build_vit("vit_demo", 5)
    before = fingerprint(model)
    with pytest.raises(ValueError) as error:
        load_weights(model, path)
    said = str(error.value)
    assert said.startswith(f"weights {path}: ") and "\n" not in said
    assert fingerprint(model) == before
    return said


def saved_refusal(content, folder):
    torch.save(content, folder / "x.pth")
    return refusal(folder / "x.pth")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("fc_norm.weight", "the norm of a mean over patches"),
        ("pre_logits.fc.weight", "a layer between the norm and the head"),
        ("reg_token", "register tokens"),
        ("dist_token", "DeiT's distillation token"),
        ("blocks.0.ls1.gamma", "layer scale, as in DINOv2"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.backbone."])
def test_parts_that_the_model_has_no_place_for_are_named(key, what, prefix, tmp_path):
    said = saved_refusal(behind(prefix, SOURCE | {key: torch.ones(48)}), tmp_path)
    assert said.endswith(f"another architecture, {key} is {what}")


def test_a_vit_without_a_class_token_is_named(tmp_path):
    state = {key: value for key, value in SOURCE.items() if key != "cls_token"}
    assert "it has no class token" in saved_refusal(state, tmp_path)


def test_weights_of_another_models_width_name_that_model(tmp_path):
    state = {"cls_token": torch.zeros(1, 1, 384)}
    assert saved_refusal(state, tmp_path).endswith("in the model (--model vit_s16)")


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        (vit.ViTShape(48, 2, 3, patch=16, grid=4), "patch_embed.proj.weight"),
        (vit.ViTShape(48, 2, 3, patch=4, grid=8), "patch_embed.proj.weight"),
        (vit.ViTShape(96, 2, 3, patch=8, grid=4), "cls_token"),
        (vit.ViTShape(48, 3, 3, patch=8, grid=4), "blocks.2.norm1.weight"),
    ],
)
def test_another_patch_size_width_or_depth_is_another_architecture(shape, key, tmp_path, capsys):
    state = vit.VisionTransformer(shape, 5).state_dict()
    assert f"another architecture, {key} is " in saved_refusal(state, tmp_path)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(value, tmp_path):
    state = SOURCE | {
        "norm.bias": SOURCE["norm.bias"].clone().index_fill_(0, torch.tensor(3), value)
    }
    assert saved_refusal(state, tmp_path).endswith("norm.bias holds NaN or infinite values")


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.zeros(48), 1.0, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.zeros(48, dtype=torch.int64), "int64"),
        (lambda: torch.zeros(48, dtype=torch.bool), "bool"),
        (lambda: torch.zeros(48, dtype=torch.complex64), "complex64"),
        (lambda: torch.zeros(48, dtype=torch.uint8).view(torch.bits8), "bits8"),
        (lambda: np.zeros(48, dtype=np.int32), "int32"),
        (lambda: torch.empty(48, device="meta"), "meta"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
        (lambda: torch.eye(48).to_sparse(), "sparse"),
        (quantised, "qint8"),
    ],
)
def test_tensors_that_are_not_dense_floats_are_named(make, kind, tmp_path):
    said = saved_refusal(SOURCE | {"norm.bias": make()}, tmp_path)
    assert said.endswith(f"norm.bias is no dense tensor of fp16, bf16, fp32 or fp64, but {kind}")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "it holds a dict without tensors by name"),
        ({7: torch.zeros(2)}, "it holds a dict without tensors by name"),
        ({"norm.weight": "text"}, "it holds a dict without tensors by name"),
        (list(SOURCE.values()), "it holds a list without tensors by name"),
        (torch.zeros(3), "it holds a Tensor without tensors by name"),
        (torch.optim.SGD([torch.zeros(2)], lr=1).state_dict(), "the state of an optimiser"),
        ({"mask_format": 1, "bits": torch.zeros(2)}, "a mask that `calibrate` wrote"),
        ({"format": 2, "state": {"process": {}}, "log": ""}, "the checkpoint of a run"),
        (torch.nn.Linear(2, 2), "a whole pickled module (torch.nn.modules.linear.Linear)"),
        ({"model": build_vit("vit_demo", 5)}, "a whole pickled module (model.VisionTransformer)"),
        (SOURCE | {"args": threading.Thread}, "a pickle of other objects (threading.Thread)"),
        (SOURCE | {"names": np.array(["a"])}, "a pickle of other objects (numpy.dtypes.StrDType)"),
        (behind("a.") | behind("b."), "it holds several backbones (a.*, b.*)"),
        (SOURCE | {"pos_embed": torch.zeros(1).expand(1, 1 + 10**10, 48)}, "its tensors take more"),
    ],
)
def test_what_is_no_checkpoint_is_named_for_what_it_is(content, what, tmp_path):
    said = saved_refusal(content, tmp_path)
    assert said.removeprefix(f"weights {tmp_path / 'x.pth'}: ").startswith(what)
    assert "damaged" not in said


def test_a_state_that_holds_itself_ends(tmp_path):
    state = {"epoch": 3}
    state["model"] = state["teacher"] = state
    assert "without tensors by name" in saved_refusal(state, tmp_path)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_files_of_other_programs_are_named_and_cut_ones_are_damaged(tmp_path):
    path = tmp_path / "x.pth"
    assert refusal(path).endswith("no such file")
    torch.save(SOURCE, path)
    path.write_bytes(path.read_bytes()[:5000])
    assert "damaged, or a zip file cut short" in refusal(path)
    torch.save(SOURCE, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:5000])
    assert "damaged (" in refusal(path)
    torch.save(SOURCE, path, pickle_protocol=4)
    assert "pickled by a protocol that torch.save does not use" in refusal(path)
    path.write_text("<!DOCTYPE html><html>Access denied</html>")
    assert "it begins with b'<!DOCTYPE html><'" in refusal(path)
    path.write_bytes(b"")
    assert refusal(path).endswith("no file of torch.save or safetensors, it is empty")
    np.savez(tmp_path / "x.npz", a=np.zeros(2))
    assert "a zip file of TorchScript or another program" in refusal(tmp_path / "x.npz")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "a zip file of TorchScript" in refusal(tmp_path / "script.pt")
    assert "a folder, pipe or device" in refusal(tmp_path)
    assert "a folder, pipe or device" in refusal(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    assert "a folder, pipe or device" in refusal(tmp_path / "pipe")


def test_a_zip_that_unpacks_to_more_than_the_model_needs_is_not_unpacked(tmp_path, monkeypatch):
    torch.save(SOURCE, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/999", bytes(5 << 20))
    monkeypatch.setattr(vit, "HEADS_BYTES", 4 << 20)
    monkeypatch.setattr(torch, "load", None)
    assert "it unpacks to 5," in refusal(tmp_path / "x.pth")


def test_the_real_vit_ti16_loads_and_sees(real_data):
    model = build_vit("vit_ti16", classes=100)
    load_weights(model, real_data / "vit_tiny_patch16_224.pth")
    assert model.pos_embed.abs().mean() > 0.01
    assert model.features(torch.zeros(1, 3, 224, 224)).isfinite().all()


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
        (lambda content: bytes(len(content)), "no file of torch.save or safetensors"),
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


def test_what_traces_a_model_leaves_no_tensor_of_its_own_behind():
    """The matrix that resamples positions is kept for all models."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, images = build_vit("vit_toy", 5).eval(), torch.randn(2, 3, 48, 48)
    vit.RESAMPLERS.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(images)
    torch.export.export(model, (images,))
    assert all(type(matrix) is torch.Tensor for matrix in vit.RESAMPLERS.values())
    assert type(model(images)) is torch.Tensor
    torch.export.export(model, (images,), strict=False)  # with the matrix at hand
    with torch.device("meta"):
        vit.RESAMPLERS.clear()
        assert model(images).device.type == "cpu"


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_attends_in_fp32_on_a_cpu(dtype):
    q, k, v = torch.randn(3, 2, 3, 17, 16).to(dtype).unbind()
    attended = vit.attend(q.requires_grad_(), k, v)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).transpose(1, 2)
    assert torch.equal(attended, exact.flatten(2).to(dtype))
    attended.sum().backward()
    assert q.grad.dtype == attended.dtype == dtype


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
