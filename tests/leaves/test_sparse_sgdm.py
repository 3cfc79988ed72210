"""Masked momentum SGD: torch's where nothing is masked, nothing at all where something is."""

import copy
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import sparse_sgdm
from sparse_sgdm import SparseSGDM, sparse_sgdm_, sparse_sgdm_reference_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = sparse_sgdm.triton is not None and (
    DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
)
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="no Triton, or neither a GPU nor TRITON_INTERPRET=1"
)
VALID = [
    dict(momentum=m, dampening=d, weight_decay=w, nesterov=n)
    for m, d, w, n in itertools.product([0.0, 0.9], [0.0, 0.3], [0.0, 0.01], [False, True])
    if not n or (m > 0 and d == 0)
]


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (1,), (3, 2, 4), (11,)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params[:-1]:  # the last one never has a gradient
        p.grad = torch.randn(p.shape, generator=generator) + p.detach()


@pytest.mark.parametrize("options", VALID, ids=str)
def test_without_a_mask_it_steps_in_lockstep_with_torch(options):
    mine, theirs = parameters(), parameters()
    optimisers = SparseSGDM(mine, lr=0.05, **options), torch.optim.SGD(theirs, lr=0.05, **options)
    for step in range(20):
        for params, optimiser in zip((mine, theirs), optimisers, strict=True):
            set_gradients(params, step)
            optimiser.step()
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
            buffers = [
                o.state[p].get("momentum_buffer") for o, p in zip(optimisers, (a, b), strict=True)
            ]
            if options["momentum"] and a.grad is not None:
                assert torch.equal(*buffers)


@pytest.mark.parametrize("options", VALID, ids=str)
def test_frozen_entries_keep_their_bits_and_the_others_do_not_notice(options):
    mine, free = parameters(), parameters()
    masks = [torch.rand(p.shape, generator=torch.Generator().manual_seed(9)) < 0.4 for p in mine]
    start = [p.detach().clone() for p in mine]
    masked = SparseSGDM(mine, lr=0.05, masks=masks, **options)
    unmasked = SparseSGDM(free, lr=0.05, **options)
    for step in range(5):
        set_gradients(mine, step), set_gradients(free, step)
        for p, mask in zip(mine[:-1], masks, strict=False):
            p.grad[~mask] = [math.nan, math.inf, -math.inf][step % 3]
        masked.step(), unmasked.step()
    for p, q, before, mask in zip(mine, free, start, masks, strict=True):
        assert torch.equal(p[~mask], before[~mask]) and torch.equal(p[mask], q[mask])
        if "momentum_buffer" in masked.state[p]:
            assert not masked.state[p]["momentum_buffer"][~mask].any()


def test_all_ones_is_no_mask_and_all_zeros_is_no_step():
    for value in (True, False):
        masked, plain = parameters(), parameters()
        masks = [torch.full(p.shape, value) for p in masked]
        optimiser = SparseSGDM(masked, lr=0.1, momentum=0.9, weight_decay=0.1, masks=masks)
        other = SparseSGDM(plain, lr=0.1 if value else 0.0, momentum=0.9, weight_decay=0.1)
        for step in range(3):
            set_gradients(masked, step), set_gradients(plain, step)
            optimiser.step(), other.step()
        assert all(torch.equal(a, b) for a, b in zip(masked, plain, strict=True))


def test_parameter_groups_and_a_saved_state_go_on_identically():
    def build(params):
        groups = [{"params": params[:2], "lr": 0.3}, {"params": params[2:], "momentum": 0.0}]
        return SparseSGDM(groups, lr=0.1, momentum=0.9, masks=[None] * 4)

    mine = parameters()
    optimiser = build(mine)
    for step in range(2):
        set_gradients(mine, step)
        optimiser.step()
    other = [nn.Parameter(p.detach().clone()) for p in mine]
    resumed = build(other)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for params, o in ((mine, optimiser), (other, resumed)):
        set_gradients(params, 2)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


@pytest.mark.parametrize(
    "options",
    [dict(lr=-1.0), dict(momentum=-0.1), dict(weight_decay=-1.0), dict(lr=math.nan),
     dict(nesterov=True), dict(nesterov=True, momentum=0.9, dampening=0.1)],
    ids=str,
)  # fmt: skip
def test_invalid_options_are_refused(options):
    with pytest.raises(ValueError, match=r"must not be negative|nesterov needs"):
        SparseSGDM(parameters(), **{"lr": 0.1} | options)


def test_masks_that_do_not_fit_are_refused():
    params = parameters()
    with pytest.raises(ValueError, match="1 masks for 4 parameters"):
        SparseSGDM(params, lr=0.1, masks=[None])
    with pytest.raises(ValueError, match=r"mask 1 must be a bool tensor of shape \(1,\)"):
        SparseSGDM(params, lr=0.1, masks=[None, torch.ones(2, dtype=torch.bool), None, None])
    with pytest.raises(ValueError, match="mask 0 .* not torch.float32"):
        SparseSGDM(params, lr=0.1, masks=[torch.ones(7, 5), None, None, None])


def test_the_flat_step_is_the_written_equation_in_float64():
    theta, grad, b, anchor, correction = torch.randn(5, 50, dtype=torch.float64)
    mask = torch.rand(50) < 0.5
    g = grad / 4 + 0.01 * theta + 0.3 * (theta - anchor) + correction
    b_new = torch.where(mask, 0.9 * b + g, b)
    expected = torch.where(mask, theta - 0.1 * (g + 0.9 * b_new), theta)
    options = dict(momentum=0.9, weight_decay=0.01, nesterov=True, grad_scale=4, prox=0.3)
    sparse_sgdm_(theta, grad, b, mask, None, anchor, correction, lr=0.1, **options)
    torch.testing.assert_close(theta, expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(b, b_new, rtol=1e-15, atol=1e-15)


def test_the_momentum_of_frozen_entries_is_neither_read_nor_written():
    theta, b = torch.randn(10), torch.full((10,), math.nan)
    before, mask = theta.clone(), torch.arange(10) < 5
    b[mask] = 1.0
    sparse_sgdm_(theta, torch.ones(10), b, mask, lr=0.1, momentum=0.9)
    assert torch.equal(theta[~mask], before[~mask]) and b[~mask].isnan().all()
    torch.testing.assert_close(theta[mask], before[mask] - 0.19)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler_is_served_as_torchs_own_fused_optimiser_is(overflow):
    mine, theirs = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(300))
    optimisers = SparseSGDM([mine], 0.1, 0.9), torch.optim.SGD([theirs], 0.1, 0.9, fused=True)
    for p, optimiser in zip((mine, theirs), optimisers, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            optimiser.zero_grad()
            scaler.scale((torch.arange(300.0) * p**2).sum() / 300).backward()
            if overflow and step == 1:
                p.grad[7] = math.inf
            scaler.step(optimiser)
            scaler.update()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert torch.isfinite(mine).all()


@pytest.mark.parametrize("options", VALID, ids=str)
def test_a_step_size_in_a_tensor_is_read_in_each_step(options):
    theta, grad, b = torch.randn(3, 1000)
    rates, moved = (0.5, 2.0**-7, 0.0), []  # powers of two: lr * d is exact, rounded or not
    for tensor in (False, True):
        x, buffer, lr = theta.clone(), b.clone() if options["momentum"] else None, torch.zeros(())
        for rate in rates:
            sparse_sgdm_(x, grad, buffer, lr=lr.fill_(rate) if tensor else rate, **options)
        moved.append(x)
    assert torch.equal(*moved) and not torch.equal(moved[0], theta)


def test_the_optimiser_takes_its_step_size_from_a_tensor():
    mine, theirs, lr = parameters(), parameters(), torch.tensor(0.05)
    optimisers = SparseSGDM(mine, lr=lr, momentum=0.9), SparseSGDM(theirs, lr=0.05, momentum=0.9)
    for step in range(3):
        lr.fill_(0.05 / (1 + step))
        optimisers[1].param_groups[0]["lr"] = 0.05 / (1 + step)
        for params, optimiser in zip((mine, theirs), optimisers, strict=True):
            set_gradients(params, step)
            optimiser.step()
    for a, b in zip(mine, theirs, strict=True):  # lr * d is rounded once more
        torch.testing.assert_close(a, b, rtol=5e-7, atol=5e-7)


def test_chunks_do_not_show(monkeypatch):
    theta, grad, b = torch.randn(3, 1000)
    copies = [x.clone() for x in (theta, grad, b)]
    sparse_sgdm_(theta, grad, b, lr=0.1, momentum=0.9)
    monkeypatch.setattr(sparse_sgdm, "CPU_CHUNK", 17)
    sparse_sgdm_(*copies, lr=0.1, momentum=0.9)
    assert torch.equal(theta, copies[0]) and torch.equal(b, copies[2])


@needs_triton
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 4099])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(momentum=0.9), dict(momentum=0.9, first=True, weight_decay=0.1),
     dict(momentum=0.9, nesterov=True, prox=0.2), dict(momentum=0.5, dampening=0.3, grad_scale=8.0),
     dict(momentum=0.9, grad_scale=torch.tensor(8.0), found_inf=torch.tensor(0.0)),
     dict(momentum=0.9, found_inf=torch.tensor(1.0)), dict(lr=torch.tensor(0.1), momentum=0.9)],
    ids=str,
)  # fmt: skip
def test_the_kernel_equals_the_reference(size, masked, options):
    generator = torch.Generator().manual_seed(size)
    theta, grad, b, anchor, correction = (
        torch.randn(size, generator=generator).to(DEVICE) for _ in range(5)
    )
    options = {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in options.items()}
    mask = (torch.rand(size, generator=generator) < 0.3).to(DEVICE) if masked else None
    if masked:
        mask[1024:2048] = False  # a block in which nothing trains
        grad[~mask] = math.nan
    terms = (anchor, correction) if "prox" in options else ()
    buffer = b if "momentum" in options else None
    ours = [theta.clone(), grad, None if buffer is None else b.clone(), mask, None, *terms]
    start = theta.clone()
    options = dict(lr=0.1) | options
    sparse_sgdm_reference_(theta, grad, buffer, mask, None, *terms, **options)
    sparse_sgdm_(*ours, backend="triton", **options)
    # a fused multiply-add rounds once where the reference rounds twice
    torch.testing.assert_close(ours[0], theta, rtol=5e-7, atol=5e-7)
    if buffer is not None:
        torch.testing.assert_close(ours[2], b, rtol=5e-7, atol=5e-7)
    if masked:
        assert torch.equal(ours[0][~mask], start[~mask])
    if "found_inf" in options and options["found_inf"]:
        assert torch.equal(ours[0], start)


@needs_triton
def test_the_kernel_steps_to_the_same_bits_by_a_number_and_by_a_tensor():
    theta, grad, b = torch.randn(3, 1025, device=DEVICE)
    ends = []
    for lr in (0.1, torch.tensor(0.1, device=DEVICE)):
        x, buffer = theta.clone(), b.clone()
        sparse_sgdm_(x, grad, buffer, lr=lr, momentum=0.9, backend="triton")
        ends.append(x)
    assert torch.equal(*ends)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_and_the_compute_copy(dtype):
    theta, grad = torch.randn(1025, device=DEVICE), torch.randn(1025, device=DEVICE).to(dtype)
    copies = [torch.zeros(1025, dtype=dtype, device=DEVICE) for _ in range(2)]
    ours = theta.clone()
    sparse_sgdm_reference_(theta, grad, compute_copy=copies[0], lr=0.1)
    sparse_sgdm_(ours, grad, compute_copy=copies[1], lr=0.1, backend="triton")
    torch.testing.assert_close(ours, theta, rtol=3e-7, atol=3e-7)
    assert torch.equal(copies[0], theta.to(dtype))
    # the interpreter truncates bf16 stores where torch rounds: one unit in the last place
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(copies[1].float(), copies[0].float(), rtol=ulp, atol=1e-6)


def test_backends_are_dispatched_as_promised(monkeypatch):
    theta, grad = torch.ones(4), torch.ones(4)
    with pytest.raises(ValueError, match="backend must be auto, triton or reference"):
        sparse_sgdm_(theta, grad, lr=0.1, backend="cuda")
    if sparse_sgdm.triton is not None:
        with pytest.raises(ValueError, match="steps fp32 parameters, not torch.float64"):
            sparse_sgdm_(theta.double().to(DEVICE), grad.to(DEVICE), lr=0.1, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="triton"):
        sparse_sgdm_(theta, grad, lr=0.1, backend="triton")
    assert torch.equal(theta, torch.ones(4))


def test_where_triton_fails_the_reference_takes_over_and_says_so_once(monkeypatch, recwarn):
    def broken(*arguments, **options):
        raise RuntimeError("cannot compile")

    monkeypatch.setattr(sparse_sgdm, "sparse_sgdm_triton_", broken)
    monkeypatch.setattr(sparse_sgdm, "_devices_without_triton", known := set())
    monkeypatch.setattr(sparse_sgdm, "_triton_serves", lambda theta: theta.device not in known)
    theta = torch.ones(4)
    for _ in range(2):
        sparse_sgdm_(theta, torch.ones(4), lr=0.25)
    assert theta.tolist() == [0.5] * 4
    assert [str(w.message) for w in recwarn.list] == [
        "Triton does not run on cpu, using PyTorch: cannot compile"
    ]


COMPILE = """
import sparse_sgdm, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
kernel = sparse_sgdm._sparse_sgdm_kernel
fp32 = ["theta", "momentum", "anchor", "correction", "lr", "scale", "found_inf"]
pointers = {f"{name}_ptr": "*fp32" for name in fp32} | {"mask_ptr": "*u8"}
scalars = ["lr", "momentum", "rate", "weight_decay", "prox", "grad_scale"]
scalars = dict.fromkeys(scalars, "fp32")
names = ["MOMENTUM", "MASK", "COPY", "ANCHOR", "CORRECTION", "LR", "SCALE", "FOUND_INF"]
flags = {f"HAS_{name}": True for name in names} | dict(NESTEROV=False, FIRST=False)
for capability, half in ((75, "fp16"), (80, "bf16"), (90, "bf16")):
    types = pointers | scalars | dict(grad_ptr="*" + half, copy_ptr="*" + half, count="i32")
    constants = flags | dict(BLOCK=sparse_sgdm.TRITON_BLOCK)
    signature = {n: types.get(n, "constexpr") for n in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f".target sm_{capability}" in built.asm["ptx"], built.asm["ptx"][:400]
    print("built", capability, len(built.asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sparse_sgdm.triton is None, reason="no Triton")
def test_the_kernel_compiles_for_turing_ampere_and_hopper_without_a_gpu(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("built") == 3, done.stderr
