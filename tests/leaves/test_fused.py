"""Fused passes: references against finite differences, kernels against them, one whole model."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_cuda
from kernels import DEVICE, INSTALLED, built_elsewhere, needs_triton
from torch import nn

import fused
from model import build_vit


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def norm_of(width, dtype=torch.float64):
    norm = nn.LayerNorm(width, eps=1e-6, device=DEVICE, dtype=dtype)
    norm.load_state_dict({"weight": draw(width, dtype=dtype), "bias": draw(width, dtype=dtype)})
    return norm


def operations(rows, width, dtype, backend="reference"):
    """Return each operation as (function of its operands, operands)."""
    norm, heads = norm_of(width, dtype), max(3, width // 64)

    def add_norm(x, branch, bias, weight, shift):
        norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(shift)
        return fused._AddNorm.apply(
            x, branch, bias, weight, shift, norm.eps, fused.chooses_kernels(backend, x)
        )

    def qkv(x, weight, bias):
        return fused.qkv_heads(x, weight, bias, heads, backend=backend)

    def gelu(x, bias):
        return fused.bias_gelu(x, bias, backend=backend)

    row = [draw(rows, width, dtype=dtype, seed=s) for s in range(2)]
    vectors = [draw(width, dtype=dtype, seed=s) for s in range(3)]
    weights = [draw(3 * width, width, dtype=dtype) / width**0.5, draw(3 * width, dtype=dtype)]
    return {
        "add_norm": (add_norm, [*row, *vectors]),
        "bias_gelu": (gelu, [row[0], vectors[0]]),
        "qkv_heads": (qkv, [row[0][None], *weights]),
    }


@pytest.mark.parametrize("name", ["add_norm", "bias_gelu", "qkv_heads"])
def test_references_have_the_gradients_of_finite_differences(name):
    function, operands = operations(5, 6, torch.float64)[name]
    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in operands])


@pytest.mark.parametrize("name", ["add_norm", "bias_gelu", "qkv_heads", "attention"])
def test_a_second_derivative_is_refused_rather_than_cut_short(name):
    cases = operations(5, 6, torch.float64)
    x, *linear = cases["qkv_heads"][1]
    cases["attention"] = partial(fused.attention, heads=3, backend="reference"), [x, *linear]
    function, operands = cases[name]
    scale = torch.ones((), dtype=torch.float64, device=DEVICE, requires_grad=True)
    x = operands[0].requires_grad_()
    result = function(x * scale, *operands[1:])
    result = result[0] if isinstance(result, tuple) else result
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(result.sum(), x, create_graph=True)


def test_references_are_pytorchs_own_operations():
    x, branch, bias, norm = draw(2, 5, 48), draw(2, 5, 48, seed=1), draw(48), norm_of(48)
    total, normed = fused.add_norm(x, branch, bias, norm)
    torch.testing.assert_close(total, x + branch + bias, rtol=0, atol=1e-14)
    torch.testing.assert_close(normed, norm(total), rtol=1e-13, atol=1e-13)
    assert torch.equal(fused.bias_gelu(x, bias), F.gelu(x + bias))
    linear = nn.Linear(48, 144, device=DEVICE, dtype=torch.float64)
    q, k, v = fused.qkv_heads(x, linear.weight, linear.bias, 3)
    parts = linear(x).view(2, 5, 3, 3, 16).permute(2, 0, 3, 1, 4)
    assert all(map(torch.equal, (q, k, v), parts))
    expected = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    for queries in (5, 2):
        for backend in ("auto", "reference"):
            y = fused.attention(x, linear.weight, linear.bias, 3, queries, backend=backend)
            torch.testing.assert_close(y, expected[:, :queries], rtol=1e-13, atol=1e-13)


def outputs_and_gradients(rows, width, dtype, backend):
    results = []
    for function, operands in operations(rows, width, dtype, backend).values():
        operands = [x.requires_grad_() for x in operands]
        outputs = function(*operands)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [draw(*y.shape, dtype=dtype, seed=i) for i, y in enumerate(outputs)]
        results += [*outputs, *torch.autograd.grad(outputs, operands, upstream)]
    return results


def assert_kernels_agree(rows, width, dtype):
    """Compare every output and gradient; a sum over rows is held to the root of their number."""
    kernels, references = (
        outputs_and_gradients(rows, width, dtype, backend) for backend in ("triton", "reference")
    )
    for a, b in zip(kernels, references, strict=True):
        terms = rows if b.dim() == 1 else 1
        precision = max(torch.finfo(dtype).eps, fused.ROUGH if DEVICE == "cuda" else 0)
        limit = fused.TOLERANCE * precision * b.abs().max() + 1e-7 * terms
        assert (a - b).abs().max() <= limit, (a.shape, (a - b).abs().max(), limit)


@needs_triton
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 48), (1023, 48), (1025, 48), (197, 192), (31, 384), (13, 768)]
)
def test_kernels_agree_with_the_references_at_odd_sizes(rows, width):
    assert_kernels_agree(rows, width, torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kernels_agree_in_half_precision(dtype):
    assert_kernels_agree(67, 48, dtype)


@needs_triton
def test_kernels_give_the_same_bits_every_time():
    first, second = (outputs_and_gradients(131, 48, torch.float32, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))


@needs_triton
def test_frozen_biases_cost_no_sum(monkeypatch):
    monkeypatch.setattr(fused, "add_up", lambda partial, dtype: pytest.fail("a sum was taken"))
    for function, operands in operations(5, 48, torch.float32, backend="triton").values():
        operands[0].requires_grad_()
        outputs = function(*operands)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad([y.sum() for y in outputs], operands[:1])


def attention_results(tokens, width, queries, dtype, backend):
    """Return attention's output and gradients; operands have the values that fp16 can hold."""
    weight = draw(3 * width, width) / width**0.5
    operands = [draw(2, tokens, width), weight, draw(3 * width)]
    operands = [x.half().to(dtype).requires_grad_() for x in operands]
    y = fused.attention(*operands, max(3, width // 64), queries, backend=backend)
    upstream = draw(*y.shape).half().to(dtype)
    return [y, *torch.autograd.grad(y, operands, upstream)]


@pytest.mark.parametrize("queries", [5, 1])
def test_attentions_reference_has_the_gradient_of_finite_differences(queries):
    operands = [draw(2, 5, 6), draw(18, 6), draw(18)]
    call = lambda *x: fused.attention(*x, 3, queries, backend="reference")  # noqa: E731
    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in operands])


def attention_runs(dtype):
    """Tell whether attention's kernels compute these here: Triton's interpreter multiplies bf16's
    bits as integers, and fp32's tiles do not fit on a GPU."""
    if DEVICE == "cpu":
        return fused.triton is not None and dtype != torch.bfloat16
    return dtype != torch.float32 and fused.hopper(torch.device(DEVICE))


@pytest.mark.parametrize("dtype", fused.DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "queries"),
    [(1, 48, 1), (17, 48, 17), (37, 192, 1), (65, 96, 65), (197, 192, 197), (197, 48, 2),
     (256, 192, 1)],
)  # fmt: skip
def test_attentions_kernels_are_as_near_the_truth_as_their_reference(tokens, width, queries, dtype):
    if not attention_runs(dtype):
        pytest.skip("not for these")
    sizes = tokens, width, queries
    kernels = attention_results(*sizes, dtype, "triton")
    references = attention_results(*sizes, dtype, "reference")
    truths = attention_results(*sizes, torch.float64, "reference")
    for kernel, reference, truth in zip(kernels, references, truths, strict=True):
        near = (reference - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (kernel - truth).abs().max() <= 2 * near, truth.shape


@pytest.mark.skipif(not attention_runs(torch.float16), reason="no Hopper GPU, no Triton")
def test_very_low_scores_stay_finite_beside_the_places_that_no_token_fills():
    bias = torch.cat([torch.full((48,), value) for value in (10.0, -10.0, 1.0)]).half().to(DEVICE)
    x, weight = draw(1, 17, 48).half(), (draw(144, 48) / 100).half()
    operands = [t.requires_grad_() for t in (x, weight, bias)]
    y, reference = (fused.attention(*operands, 3, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(y, reference, rtol=0.01, atol=0.01)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), operands))


@needs_triton
@pytest.mark.skipif(not attention_runs(torch.float16), reason="no Hopper GPU")
def test_attentions_kernels_give_the_same_bits_and_add_up_only_what_trains(monkeypatch):
    first, second = (attention_results(65, 96, 65, torch.float16, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
    monkeypatch.setattr(fused, "add_up", lambda partial, dtype: pytest.fail("a sum was taken"))
    x, weight = draw(1, 5, 48).half().requires_grad_(), draw(144, 48).half()
    y = fused.attention(x, weight, draw(144).half(), 3, backend="triton")
    torch.autograd.grad(y.sum(), x)


def model_gradients(model, images, backend=None):
    """Return a loss's gradients by name, of the model as it is or with fused passes."""
    names = ("add_norm", "bias_gelu", "attention")
    passes = SimpleNamespace(**{n: partial(getattr(fused, n), backend=backend) for n in names})
    if backend is None:
        logits = model(images)
    else:
        with model.fused(passes):
            logits = model(images)
    loss = F.cross_entropy(logits, torch.arange(len(images), device=images.device) % 10)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
def test_a_whole_models_gradient_is_that_without_fusion(backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    model = build_vit("vit_demo", classes=10).to(DEVICE, dtype)
    nn.init.normal_(model.head.weight, std=0.1)
    images = draw(3, 3, 32, 32, dtype=dtype)
    plain, passes = model_gradients(model, images), model_gradients(model, images, backend)
    for name, gradient in plain.items():
        bound = 1e3 * torch.finfo(dtype).eps * gradient.norm()
        assert (passes[name] - gradient).norm() <= bound, name
    assert model.passes is None


BACKENDS = ["reference", pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_vectors_may_lie_anyhow_in_memory(backend):
    x, norm = draw(2, 5, 8, dtype=torch.float32), norm_of(8, torch.float32)
    column, single = draw(8, 3, dtype=torch.float32)[:, 0], torch.ones(1, device=DEVICE)
    for bias in (column, single.expand(8)):
        expected = x + x + bias
        total, normed = fused.add_norm(x, x, bias, norm, backend=backend)
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(normed, norm(expected), rtol=1e-5, atol=1e-5)
        gelu = fused.bias_gelu(x, bias, backend=backend)
        torch.testing.assert_close(gelu, F.gelu(x + bias), rtol=1e-5, atol=1e-5)
    norm.weight = nn.Parameter(column)
    normed = fused.add_norm(x, x, column, norm, backend=backend)[1]
    torch.testing.assert_close(normed, norm(x + x + column), rtol=1e-5, atol=1e-5)


class Shifted(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_computed_is_refused_by_name(backend):
    x, norm = draw(2, 5, 8, dtype=torch.float32), norm_of(8, torch.float32)
    bias = x[0, 0]
    operations = [
        ("branch must be", lambda: fused.add_norm(x, x[:1, :1], bias, norm, backend=backend)),
        ("bias must be", lambda: fused.add_norm(x, x, bias[:4], norm, backend=backend)),
        ("bias must be", lambda: fused.bias_gelu(x, bias[:4], backend=backend)),
        (r"bias must be \(8,\), not None", lambda: fused.bias_gelu(x, None, backend=backend)),
        ("weight must be", lambda: fused.qkv_heads(x, x[0], bias, 2, backend=backend)),
        ("multiple of 3", lambda: fused.qkv_heads(x, x[0], bias, 3, backend=backend)),
        ("multiple of 3", lambda: fused.attention(x, x[0], bias, 3, backend=backend)),
    ]
    for queries in (0, 6):
        call = partial(fused.attention, x, draw(24, 8).float(), None, 2, queries, backend=backend)
        operations.append(("queries must be 1 to 5", call))
    others = nn.LayerNorm((5, 8)), nn.LayerNorm(8, bias=False), Shifted(8)
    for other in (*others, nn.LayerNorm(8, elementwise_affine=False)):
        call = partial(fused.add_norm, x, x, bias, other.to(DEVICE), backend=backend)
        operations.append(("norm must be an nn.LayerNorm", call))
    for said, call in operations:
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("bias", [True, False])
def test_heads_under_autocast_have_the_gradients_of_a_linear_layer(bias):
    linear, x = nn.Linear(8, 24, bias, device=DEVICE), draw(2, 5, 8, dtype=torch.float32)
    gradients = []
    for fuses in (True, False):
        with torch.autocast(DEVICE, torch.bfloat16):
            parts = (
                fused.qkv_heads(x, linear.weight, linear.bias, 2)
                if fuses
                else linear(x).split(8, dim=-1)
            )
            loss = sum((i + 1) * part.sum() for i, part in enumerate(parts))
        assert parts[0].dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(loss, list(linear.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-2, atol=1e-2)


def test_first_use_compares_kernels_with_the_reference(monkeypatch):
    fused.serves.cache_clear()
    device = torch.device(DEVICE)
    if fused.triton is not None:
        assert fused.serves(device, torch.float32, 48, 3) == ""
    wrong = lambda x, bias: fused.bias_gelu_reference(x, bias) + 0.01  # noqa: E731
    monkeypatch.setattr(fused, "bias_gelu_triton", wrong)
    fused.serves.cache_clear()
    assert "differ by" in fused.serves(device, torch.float32, 48, 3)
    nowhere = lambda *parts: [x * math.nan for x in fused.pack_reference(*parts)]  # noqa: E731
    monkeypatch.undo()
    monkeypatch.setattr(fused, "pack_triton", nowhere)
    fused.serves.cache_clear()
    assert "differ by nan" in fused.serves(device, torch.float32, 48, 3)

    def broken(*operands):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(fused, "add_norm_triton", broken)
    fused.serves.cache_clear()
    said = fused.serves(device, torch.float32, 48, 3)
    assert said.endswith("RuntimeError: no compiler"), said
    fused.serves.cache_clear()


def test_attention_is_pytorchs_where_the_kernels_are_not_for(monkeypatch):
    device, half = torch.device(DEVICE), torch.float16
    monkeypatch.setattr(fused, "hopper", lambda device: False)
    fused.attends.cache_clear()
    assert "half precision on a Hopper GPU" in fused.attends(device, half, 48, 3, 17)
    monkeypatch.setattr(fused, "hopper", lambda device: True)
    fused.attends.cache_clear()
    assert "half precision on a Hopper GPU" in fused.attends(device, torch.float32, 48, 3, 17)
    assert "up to 256 tokens" in fused.attends(device, half, 48, 3, 257)
    assert "heads of 16, 32, 64, not 17 tokens and heads of 24" in fused.attends(
        device, half, 48, 2, 17
    )
    fused.attends.cache_clear()


@needs_triton
@pytest.mark.skipif(not attention_runs(torch.float16), reason="no Hopper GPU")
def test_first_use_compares_attention_with_the_reference(monkeypatch):
    device, half = torch.device(DEVICE), torch.float16
    monkeypatch.setattr(fused, "hopper", lambda device: True)
    for mode in (torch.no_grad(), torch.inference_mode()):  # somebody's first call is anywhere
        fused.attends.cache_clear()
        with mode:
            assert fused.attends(device, half, 48, 3, 37) == ""
    right = fused.attention_backward_triton

    def wrong(*operands):
        d, sums = right(*operands)
        return d + 0.1 * d.abs().max(), sums

    monkeypatch.setattr(fused, "attention_backward_triton", wrong)
    fused.attends.cache_clear()
    assert "differ by" in fused.attends(device, half, 48, 3, 37)
    fused.attends.cache_clear()


@needs_triton
def test_attentions_kernels_refuse_what_they_cannot_hold():
    x, weight = draw(1, 257, 48, dtype=torch.float32), draw(144, 48, dtype=torch.float32)
    with pytest.raises(ValueError, match="up to 256 tokens"):
        fused.attention(x, weight, None, 3, backend="triton")


@pytest.mark.parametrize(
    ("backend", "x", "said"),
    [
        ("cuda", torch.zeros(2, 4), "auto, triton or reference"),
        ("triton", torch.zeros(2, 4, dtype=torch.float64), "fp16, bf16 and fp32"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(backend, x, said):
    with pytest.raises(ValueError, match=said):
        fused.bias_gelu(x, torch.zeros(4), backend=backend)


@needs_cuda
@pytest.mark.parametrize("dtype", fused.DTYPES)
def test_vit_sizes_agree_on_a_gpu(dtype):
    for width in (192, 384, 768):
        assert_kernels_agree(8 * 197, width, dtype)


COMPILE = """
import fused
from kernels import CARDS, build
scalars = dict.fromkeys(("rows", "width", "tokens", "queries", "heads"), "i32")
scalars |= dict(eps="fp32", scale="fp32")
fp32 = {"mean_ptr", "inverse_ptr", "partial_ptr", "log_sums_ptr"}
norm, tile = dict(zip(("ROWS", "WIDTH"), fused.norm_tile(384))), dict(COLUMNS=fused.COLUMNS)
tile |= dict(ROWS=fused.ROWS, STEPS=fused.STEPS, SUMS=True)
blocks = dict.fromkeys(("_bias_gelu_kernel", "_bias_gelu_backward_kernel", "_pack_kernel"), tile)
blocks["_add_norm_kernel"] = norm
blocks["_add_norm_backward_kernel"] = norm | dict(STEPS=fused.NORM_STEPS, SUMS=True)
blocks["_add_up_kernel"] = dict(ROWS=fused.SUM_ROWS, STEPS=2, COLUMNS=fused.SUM_COLUMNS)
head = dict(WIDTH=64)
blocks["_attention_kernel"] = head | dict(ROWS=fused.QUERIES, TOKENS=256)
blocks["_attention_backward_kernel"] = head | dict(ROWS=256, KEYS=64, STEPS=4, SUMS=True)
warps = {"_attention_backward_kernel": 8}
kernels = [getattr(fused, name) for name in dir(fused) if name.endswith("_kernel")]
for capability, half in CARDS:
    for kernel in kernels:
        attends = "attention" in kernel.__name__
        if attends and capability != 90:
            continue
        types = {n: "*fp32" if n in fp32 else half for n in kernel.arg_names if n.endswith("_ptr")}
        chosen = {n: x for n, x in blocks[kernel.__name__].items() if n in kernel.arg_names}
        options = dict(num_warps=warps.get(kernel.__name__, 4), num_stages=2)
        built = build(kernel, capability, types | scalars, chosen, **options)
        assert "atom." not in built.asm["ptx"]
        assert attends == ("wgmma" in built.asm["ptx"]) and built.metadata.shared <= 227 << 10
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="no Triton")
def test_kernels_compile_for_turing_ampere_and_hopper_without_a_gpu(tmp_path):
    assert built_elsewhere(COMPILE, tmp_path) == 3 * 6 + 2
