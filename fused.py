"""A transformer block's passes over memory, each fused with the sums that its gradient needs.

    add_norm    total = x + (branch + bias);  normed = LayerNorm(total)
    bias_gelu   GELU(x + bias), exact
    attention   softmax(q k' / sqrt(C)) v,  q, k, v = the heads of x W' + b

`bias` is that of the linear layer before, which computes its product alone. So its gradient, a sum
over tokens, and those of LayerNorm's weight and bias come out of the pass that has the values at
hand: as a partial sum for every few rows, which a second small pass adds up. No atomics, block
sizes fixed by shape: the same bits every time. Operands are fp16, bf16, fp32 or, in the reference,
fp64; arithmetic and sums are in fp32 or wider. Reverse mode alone, once: no forward-mode products.

Attention is PyTorch's, and then only the gradients of q, k and v are put together here; but for
half precision and up to 256 tokens on a Hopper GPU. There a program has a whole head at hand: no
softmax in pieces, and a gradient in one pass, straight into that of x W' + b.
Source: Ba 2016, arXiv:1607.06450; Hendrycks 2016, arXiv:1606.08415; fused as in Liger's kernels
(arXiv:2410.10989); the gradient of attention from its rows' sums as in Dao 2022, arXiv:2205.14135.

    import torch; from fused import add_norm
    x, branch = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    total, normed = add_norm(x, branch, torch.zeros(48), torch.nn.LayerNorm(48))
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; the reference serves there
    triton = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of the kernels
NORM_TILE = 2048  # elements of a tile of whole rows, at least one row
NORM_STEPS = 8  # tiles whose gradients share a partial sum
COLUMNS, ROWS, STEPS = 128, 16, 4  # the same of tiles that are cut out of rows
SUM_ROWS, SUM_COLUMNS = 256, 16  # of partial sums: a few hundred rows in one or two loads
TOKENS, HEAD_WIDTHS = 256, (16, 32, 64)  # the most that attention's kernels take, and which
QUERIES, KEYS = 64, 64  # of a program of attention, and of a step of its gradient
LOG2E = math.log2(math.e)
TOLERANCE = 4  # times the precision of a dtype: kernel against reference, of values near 1
ROUGH = 2.0**-21  # what passes there for fp32's: a GPU's quick division and root err by some units


# ---------------------------------------------------------------------------- reference


def wide(*tensors: Tensor) -> list[Tensor]:
    """Return tensors in fp32, or in fp64 where they are."""
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def add_norm_reference(
    x: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return total (R, D), normed (R, D), and each row's mean and 1 / deviation (R,), fp32."""
    a, b, c, scale, offset = wide(x, branch, bias, weight, shift)
    total = (a + (b + c)).to(x.dtype)
    (t,) = wide(total)
    mean = t.mean(1)
    centred = t - mean[:, None]
    inverse = (centred.square().mean(1) + eps).rsqrt()
    normed = centred * inverse[:, None] * scale + offset
    return total, normed.to(x.dtype), mean, inverse


def add_norm_backward_reference(
    d_total: Tensor,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient (R, D) by x and by branch, and those (3, D) by bias, weight and shift."""
    d, dn, t, scale = wide(d_total, d_normed, total, weight)
    hat = (t - mean[:, None]) * inverse[:, None]
    g = dn * scale
    inner = g - g.mean(1, keepdim=True) - hat * (g * hat).mean(1, keepdim=True)
    d = d + inner * inverse[:, None]
    parts = torch.stack([d.sum(0), (dn * hat).sum(0), dn.sum(0)]) if sums else None
    return d.to(total.dtype), parts if parts is None else parts.to(total.dtype)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias), (R, F)."""
    a, b = wide(x, bias)
    return F.gelu(a + b).to(x.dtype)


def bias_gelu_backward_reference(
    d: Tensor, x: Tensor, bias: Tensor, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients by x (R, F) and by bias (1, F)."""
    g, a, b = wide(d, x, bias)
    z = a + b
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    g = g * (0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density)
    return g.to(x.dtype), g.sum(0, keepdim=True).to(x.dtype) if sums else None


def pack_reference(q: Tensor, k: Tensor, v: Tensor, sums: bool) -> tuple[Tensor, Tensor | None]:
    """Return three (R, D) side by side, and their columns' sums (1, 3 D)."""
    packed = torch.cat([q, k, v], dim=1)
    if not sums:
        return packed, None
    return packed, wide(packed)[0].sum(0, keepdim=True).to(q.dtype)


def attention_reference(qkv: Tensor, heads: int, queries: int) -> tuple[Tensor, Tensor]:
    """Return what the first tokens gather (N, queries, D), of qkv (N, T, 3 D), and the logarithm
    (N, heads, queries), to base 2, of each row's sum of exponentials."""
    q, k, v = heads_of(qkv, heads)
    scores = q[:, :, :queries] @ k.mT * (LOG2E / math.sqrt(q.shape[-1]))
    log_sums = torch.logsumexp(scores / LOG2E, -1) * LOG2E
    gathered = torch.exp2(scores - log_sums[..., None]) @ v
    return gathered.transpose(1, 2).flatten(2).to(qkv.dtype), log_sums


def attention_backward_reference(
    d: Tensor, qkv: Tensor, gathered: Tensor, log_sums: Tensor, heads: int, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient by qkv, (N * T, 3 D), and its columns' sums (1, 3 D)."""
    n, queries, width = d.shape
    q, k, v = heads_of(qkv, heads)
    q, scale = q[:, :, :queries], 1 / math.sqrt(q.shape[-1])
    d, gathered = (x.view(n, queries, heads, -1).transpose(1, 2) for x in wide(d, gathered))
    p = torch.exp2(q @ k.mT * (scale * LOG2E) - log_sums[..., None])
    d_scores = p * (d @ v.mT - (d * gathered).sum(-1, keepdim=True)) * scale
    d_q = F.pad(d_scores @ k, (0, 0, 0, k.shape[2] - queries))
    parts = (d_q, d_scores.mT @ q, p.mT @ d)
    return pack_reference(
        *(x.transpose(1, 2).reshape(-1, width).to(qkv.dtype) for x in parts), sums
    )


def heads_of(qkv: Tensor, heads: int) -> Tensor:
    """Return q, k and v, (3, N, heads, T, C) in fp32 or wider, of qkv (N, T, 3 D)."""
    (parts,) = wide(qkv.unflatten(-1, (3, heads, -1)))
    return parts.permute(2, 0, 3, 1, 4)


# ---------------------------------------------------------------------------- kernels

if triton is not None:

    @triton.jit
    def _add_norm_kernel(
        total_ptr,
        normed_ptr,
        mean_ptr,
        inverse_ptr,
        x_ptr,
        branch_ptr,
        bias_ptr,
        weight_ptr,
        shift_ptr,
        rows,
        width,
        eps,
        ROWS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, WIDTH)
        inside = column < width
        live = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * width + column[None, :]
        x = tl.load(x_ptr + at, live, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + at, live, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)
        total = (x + (branch + bias[None, :])).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, live)
        t = total.to(tl.float32)
        mean = tl.sum(t, 1) / width
        centred = tl.where(live, t - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
        weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + column, inside, other=0.0).to(tl.float32)
        normed = centred * inverse[:, None] * weight[None, :] + shift[None, :]
        tl.store(normed_ptr + at, normed.to(normed_ptr.dtype.element_ty), live)
        tl.store(mean_ptr + row, mean, row < rows)
        tl.store(inverse_ptr + row, inverse, row < rows)

    @triton.jit
    def _add_norm_backward_kernel(
        d_ptr,
        partial_ptr,  # (programs, 3, width)
        d_total_ptr,
        d_normed_ptr,
        total_ptr,
        weight_ptr,
        mean_ptr,
        inverse_ptr,
        rows,
        width,
        SUMS: tl.constexpr,
        ROWS: tl.constexpr,
        STEPS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDTH)
        inside = column < width
        weight = tl.load(weight_ptr + column, inside, other=0.0).to(tl.float32)
        by_bias = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        by_weight = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        by_shift = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        for step in range(STEPS):
            row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
            live = (row < rows)[:, None] & inside[None, :]
            at = row[:, None] * width + column[None, :]
            mean = tl.load(mean_ptr + row, row < rows, other=0.0)
            inverse = tl.load(inverse_ptr + row, row < rows, other=0.0)
            total = tl.load(total_ptr + at, live, other=0.0).to(tl.float32)
            d_normed = tl.load(d_normed_ptr + at, live, other=0.0).to(tl.float32)
            d = tl.load(d_total_ptr + at, live, other=0.0).to(tl.float32)
            hat = tl.where(live, (total - mean[:, None]) * inverse[:, None], 0.0)
            g = d_normed * weight[None, :]
            mean_g = tl.sum(g, 1) / width
            mean_gh = tl.sum(g * hat, 1) / width
            d += (g - mean_g[:, None] - hat * mean_gh[:, None]) * inverse[:, None]
            tl.store(d_ptr + at, d.to(d_ptr.dtype.element_ty), live)
            if SUMS:
                by_bias += tl.where(live, d, 0.0)
                by_weight += d_normed * hat
                by_shift += d_normed
        if SUMS:
            sums_ptr = partial_ptr + program * 3 * width + column
            tl.store(sums_ptr, tl.sum(by_bias, 0), inside)
            tl.store(sums_ptr + width, tl.sum(by_weight, 0), inside)
            tl.store(sums_ptr + 2 * width, tl.sum(by_shift, 0), inside)

    @triton.jit
    def _bias_gelu_kernel(
        out_ptr, x_ptr, bias_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        live = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        bias = tl.load(bias_ptr + column, column < width, other=0.0).to(tl.float32)
        z = tl.load(x_ptr + at, live, other=0.0).to(tl.float32) + bias[None, :]
        result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), live)

    @triton.jit
    def _bias_gelu_backward_kernel(
        dx_ptr,
        partial_ptr,  # (programs, width)
        d_ptr,
        x_ptr,
        bias_ptr,
        rows,
        width,
        SUMS: tl.constexpr,
        ROWS: tl.constexpr,
        STEPS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        bias = tl.load(bias_ptr + column, inside, other=0.0).to(tl.float32)
        by_bias = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(STEPS):
            row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
            live = (row < rows)[:, None] & inside[None, :]
            at = row[:, None] * width + column[None, :]
            z = tl.load(x_ptr + at, live, other=0.0).to(tl.float32) + bias[None, :]
            d = tl.load(d_ptr + at, live, other=0.0).to(tl.float32)
            below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
            d *= below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
            tl.store(dx_ptr + at, d.to(dx_ptr.dtype.element_ty), live)
            if SUMS:
                by_bias += d
        if SUMS:
            tl.store(partial_ptr + program * width + column, tl.sum(by_bias, 0), inside)

    @triton.jit
    def _pack_kernel(
        packed_ptr,
        partial_ptr,  # (programs, 3 * width)
        q_ptr,
        k_ptr,
        v_ptr,
        rows,
        width,
        SUMS: tl.constexpr,
        ROWS: tl.constexpr,
        STEPS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        program = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        for part in tl.static_range(3):
            source = q_ptr if part == 0 else (k_ptr if part == 1 else v_ptr)
            by_bias = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for step in range(STEPS):
                row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
                live = (row < rows)[:, None] & inside[None, :]
                value = tl.load(source + row[:, None] * width + column[None, :], live, other=0.0)
                to = row[:, None] * (3 * width) + part * width + column[None, :]
                tl.store(packed_ptr + to, value, live)
                if SUMS:
                    by_bias += value.to(tl.float32)
            if SUMS:
                at = (program * 3 + part) * width + column
                tl.store(partial_ptr + at, tl.sum(by_bias, 0), inside)

    @triton.jit
    def _attention_kernel(
        gathered_ptr,  # (N, queries, heads, C)
        log_sums_ptr,  # (N, heads, queries)
        qkv_ptr,  # (N, tokens, 3, heads, C)
        tokens,
        queries,
        heads,
        scale,  # of scores, to base 2
        ROWS: tl.constexpr,
        TOKENS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        n, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
        width = heads * WIDTH
        c = head * WIDTH + tl.arange(0, WIDTH)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        token = tl.arange(0, TOKENS)
        live, inside = (row < queries)[:, None], (token < tokens)[:, None]
        at_q = (n * tokens + row[:, None]) * (3 * width) + c[None, :]
        at_k = (n * tokens + token[:, None]) * (3 * width) + width + c[None, :]
        q = tl.load(qkv_ptr + at_q, live, other=0.0)
        k = tl.load(qkv_ptr + at_k, inside, other=0.0)
        v = tl.load(qkv_ptr + at_k + width, inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((token < tokens)[None, :], scores, float("-inf"))
        top = tl.max(scores, 1)
        p = tl.exp2(scores - top[:, None])
        total = tl.sum(p, 1)
        gathered = tl.dot(p.to(v.dtype), v, input_precision="ieee") / total[:, None]
        at = (n * queries + row[:, None]) * width + c[None, :]
        tl.store(gathered_ptr + at, gathered.to(gathered_ptr.dtype.element_ty), live)
        at = (n * heads + head) * queries + row
        tl.store(log_sums_ptr + at, top + tl.log2(total), row < queries)

    @triton.jit
    def _attention_backward_kernel(
        d_qkv_ptr,  # (N, tokens, 3, heads, C)
        partial_ptr,  # (N, 3, heads, C)
        d_ptr,  # (N, queries, heads, C)
        qkv_ptr,
        gathered_ptr,
        log_sums_ptr,
        tokens,
        queries,
        heads,
        scale,  # of scores, to base 2
        SUMS: tl.constexpr,
        ROWS: tl.constexpr,  # all queries
        KEYS: tl.constexpr,
        STEPS: tl.constexpr,
        WIDTH: tl.constexpr,
    ):
        n, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
        width = heads * WIDTH
        c = head * WIDTH + tl.arange(0, WIDTH)
        row = tl.arange(0, ROWS)
        live = (row < queries)[:, None]
        at_q = (n * tokens + row[:, None]) * (3 * width) + c[None, :]
        at = (n * queries + row[:, None]) * width + c[None, :]
        q = tl.load(qkv_ptr + at_q, live, other=0.0)
        d = tl.load(d_ptr + at, live, other=0.0)
        gathered = tl.load(gathered_ptr + at, live, other=0.0)
        inner = tl.sum(d.to(tl.float32) * gathered.to(tl.float32), 1)
        sums_ptr = partial_ptr + n * 3 * width + c
        if SUMS:  # over keys, rows of p add up to 1 and those of d_scores to 0
            tl.store(sums_ptr + width, tl.zeros((WIDTH,), dtype=tl.float32))
            tl.store(sums_ptr + 2 * width, tl.sum(d.to(tl.float32), 0))
        at = (n * heads + head) * queries + row
        log_sums = tl.load(log_sums_ptr + at, row < queries, other=0.0)
        d_q = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        for step in range(STEPS):
            key = step * KEYS + tl.arange(0, KEYS)
            inside = (key < tokens)[:, None]
            at_k = (n * tokens + key[:, None]) * (3 * width) + width + c[None, :]
            k = tl.load(qkv_ptr + at_k, inside, other=0.0)
            v = tl.load(qkv_ptr + at_k + width, inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            p = tl.exp2(scores - log_sums[:, None])
            p = tl.where((key < tokens)[None, :], p, 0.0)
            d_v = tl.dot(tl.trans(p.to(d.dtype)), d, input_precision="ieee")
            tl.store(d_qkv_ptr + at_k + width, d_v.to(d_qkv_ptr.dtype.element_ty), inside)
            d_p = tl.dot(d, tl.trans(v), input_precision="ieee")
            d_scores = (p * (d_p - inner[:, None]) * (scale * 0.6931471805599453)).to(q.dtype)
            d_k = tl.dot(tl.trans(d_scores), q, input_precision="ieee")
            tl.store(d_qkv_ptr + at_k, d_k.to(d_qkv_ptr.dtype.element_ty), inside)
            d_q = tl.dot(d_scores, k, d_q, input_precision="ieee")
            unasked = inside & (key >= queries)[:, None]
            tl.store(d_qkv_ptr + at_k - width, tl.zeros_like(k), unasked)
        tl.store(d_qkv_ptr + at_q, d_q.to(d_qkv_ptr.dtype.element_ty), live)
        if SUMS:
            tl.store(sums_ptr, tl.sum(d_q, 0))

    @triton.jit
    def _add_up_kernel(
        sums_ptr,
        partial_ptr,
        rows,
        width,
        ROWS: tl.constexpr,
        STEPS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < width
        sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(STEPS):
            row = step * ROWS + tl.arange(0, ROWS)
            at = row[:, None].to(tl.int64) * width + column[None, :]
            sums += tl.load(partial_ptr + at, (row < rows)[:, None] & inside[None, :], other=0.0)
        tl.store(sums_ptr + column, tl.sum(sums, 0).to(sums_ptr.dtype.element_ty), inside)


# ---------------------------------------------------------------------------- launchers


def add_norm_triton(
    x: Tensor, branch: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`add_norm_reference` in one pass."""
    rows, width = x.shape
    total, normed = torch.empty_like(x), torch.empty_like(x)
    mean, inverse = x.new_empty(2, rows, dtype=torch.float32)
    tile, tile_width = norm_tile(width)
    with on(x):
        _add_norm_kernel[(triton.cdiv(rows, tile),)](
            *(total, normed, mean, inverse, x, branch, bias, weight, shift),
            *(rows, width, eps),
            ROWS=tile,
            WIDTH=tile_width,
        )
    return total, normed, mean, inverse


def add_norm_backward_triton(
    d_total: Tensor,
    d_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    sums: bool,
) -> tuple[Tensor, Tensor | None]:
    """`add_norm_backward_reference` in one pass and that of the sums."""
    rows, width = total.shape
    tile, tile_width = norm_tile(width)
    programs = triton.cdiv(rows, tile * NORM_STEPS)
    d, partial = torch.empty_like(total), partial_sums(total, programs, 3 * width, sums)
    with on(total):
        _add_norm_backward_kernel[(programs,)](
            *(d, partial, d_total, d_normed, total, weight, mean, inverse),
            *(rows, width),
            SUMS=sums,
            ROWS=tile,
            STEPS=NORM_STEPS,
            WIDTH=tile_width,
        )
    return d, add_up(partial, total.dtype).view(3, width) if sums else None


def bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu_reference` in one pass."""
    rows, width = x.shape
    out = torch.empty_like(x)
    with on(x):
        _bias_gelu_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))](
            out, x, bias, rows, width, ROWS=ROWS, COLUMNS=COLUMNS
        )
    return out


def bias_gelu_backward_triton(
    d: Tensor, x: Tensor, bias: Tensor, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """`bias_gelu_backward_reference` in one pass and that of the sums."""
    rows, width = x.shape
    programs = triton.cdiv(rows, ROWS * STEPS)
    dx, partial = torch.empty_like(x), partial_sums(x, programs, width, sums)
    with on(x):
        _bias_gelu_backward_kernel[(programs, triton.cdiv(width, COLUMNS))](
            *(dx, partial, d, x, bias, rows, width),
            SUMS=sums,
            ROWS=ROWS,
            STEPS=STEPS,
            COLUMNS=COLUMNS,
        )
    return dx, add_up(partial, x.dtype) if sums else None


def pack_triton(q: Tensor, k: Tensor, v: Tensor, sums: bool) -> tuple[Tensor, Tensor | None]:
    """`pack_reference` in one pass and that of the sums."""
    rows, width = q.shape
    programs = triton.cdiv(rows, ROWS * STEPS)
    packed, partial = q.new_empty(rows, 3 * width), partial_sums(q, programs, 3 * width, sums)
    with on(q):
        _pack_kernel[(programs, triton.cdiv(width, COLUMNS))](
            *(packed, partial, q, k, v, rows, width),
            SUMS=sums,
            ROWS=ROWS,
            STEPS=STEPS,
            COLUMNS=COLUMNS,
        )
    return packed, add_up(partial, q.dtype) if sums else None


def attention_triton(qkv: Tensor, heads: int, queries: int) -> tuple[Tensor, Tensor]:
    """`attention_reference` in one pass."""
    n, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    gathered = qkv.new_empty(n, queries, width)
    log_sums = qkv.new_empty(n, heads, queries, dtype=torch.float32)
    rows = min(QUERIES, tile_of(queries))
    with on(qkv):
        _attention_kernel[(triton.cdiv(queries, rows), heads, n)](
            *(gathered, log_sums, qkv, tokens, queries, heads),
            LOG2E / math.sqrt(width // heads),
            ROWS=rows,
            TOKENS=tile_of(tokens),
            WIDTH=width // heads,
            num_warps=4,
        )
    return gathered, log_sums


def attention_backward_triton(
    d: Tensor, qkv: Tensor, gathered: Tensor, log_sums: Tensor, heads: int, sums: bool
) -> tuple[Tensor, Tensor | None]:
    """`attention_backward_reference` in one pass and that of the sums."""
    (n, tokens, columns), queries = qkv.shape, d.shape[1]
    d_qkv, partial = torch.empty_like(qkv), partial_sums(qkv, n, columns, sums)
    keys = min(KEYS, tile_of(tokens))
    with on(qkv):
        _attention_backward_kernel[(heads, n)](
            *(d_qkv, partial, d, qkv, gathered, log_sums, tokens, queries, heads),
            LOG2E / math.sqrt(columns // 3 // heads),
            SUMS=sums,
            ROWS=tile_of(queries),
            KEYS=keys,
            STEPS=triton.cdiv(tokens, keys),
            WIDTH=columns // 3 // heads,
            num_warps=8 if queries > 128 else 4,  # 256 x 64 scores are 64 registers of a thread
            num_stages=2,
        )
    return d_qkv.view(-1, columns), add_up(partial, qkv.dtype) if sums else None


def tile_of(rows: int) -> int:
    """Return the rows of a tile that holds these."""
    return max(16, triton.next_power_of_2(rows))


def add_up(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sums (1, columns) over the rows of partial sums."""
    rows, columns = partial.shape
    sums = partial.new_empty(1, columns, dtype=dtype)
    with on(partial):
        _add_up_kernel[(triton.cdiv(columns, SUM_COLUMNS),)](
            *(sums, partial, rows, columns),
            ROWS=SUM_ROWS,
            STEPS=triton.cdiv(rows, SUM_ROWS),
            COLUMNS=SUM_COLUMNS,
        )
    return sums


def partial_sums(like: Tensor, programs: int, columns: int, wanted: bool) -> Tensor:
    """Return room for each program's sums in fp32; without any where none are wanted."""
    return like.new_empty(programs if wanted else 0, columns, dtype=torch.float32)


def norm_tile(width: int) -> tuple[int, int]:
    """Return rows and padded columns of a tile of whole rows."""
    padded = triton.next_power_of_2(width)
    return max(1, NORM_TILE // padded), padded


def on(x: Tensor) -> contextlib.AbstractContextManager:
    """Let kernels be launched on a tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


# ---------------------------------------------------------------------------- with gradients


def differentiable_once(backward: Callable) -> Callable:
    """Let a gradient refuse to be differentiated again, rather than leave terms out."""

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():  # as under create_graph=True alone
            raise RuntimeError("fused passes have no second derivative: take the model's own")
        return backward(ctx, *gradients)

    return checked


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, bias, weight, shift, eps, kernels):
        run = add_norm_triton if kernels else add_norm_reference
        total, normed, mean, inverse = run(x, branch, bias, weight, shift, eps)
        ctx.save_for_backward(total, weight, mean, inverse)
        ctx.kernels = kernels
        return total, normed

    @staticmethod
    @differentiable_once
    def backward(ctx, d_total, d_normed):
        run = add_norm_backward_triton if ctx.kernels else add_norm_backward_reference
        gradients = d_total.contiguous(), d_normed.contiguous()
        d, sums = run(*gradients, *ctx.saved_tensors, any(ctx.needs_input_grad[2:5]))
        return d, d, *(sums if sums is not None else (None,) * 3), None, None


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, kernels):
        ctx.save_for_backward(x, bias)
        ctx.kernels = kernels
        return (bias_gelu_triton if kernels else bias_gelu_reference)(x, bias)

    @staticmethod
    @differentiable_once
    def backward(ctx, d):
        run = bias_gelu_backward_triton if ctx.kernels else bias_gelu_backward_reference
        dx, sums = run(d.contiguous(), *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx, sums if sums is None else sums[0], None


class _QkvHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, heads, kernels):
        ctx.save_for_backward(x, weight)
        ctx.kernels = kernels
        n, t, d = x.shape
        parts = F.linear(x, weight, bias).view(n, t, 3, heads, d // heads)
        return tuple(part.transpose(1, 2) for part in parts.unbind(2))

    @staticmethod
    @differentiable_once
    def backward(ctx, *parts):
        x, weight = ctx.saved_tensors
        flat = [part.transpose(1, 2).reshape(-1, x.shape[-1]).contiguous() for part in parts]
        run = pack_triton if ctx.kernels else pack_reference
        d, sums = run(*flat, ctx.needs_input_grad[2])
        return *by_linear(d, sums, x, weight, ctx.needs_input_grad), None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, heads, queries, kernels):
        qkv = F.linear(x, weight, bias).contiguous()  # as kernels read it
        run = attention_triton if kernels else attention_reference
        gathered, log_sums = run(qkv, heads, queries)
        ctx.save_for_backward(x, weight, qkv, gathered, log_sums)
        ctx.heads, ctx.kernels = heads, kernels
        return gathered

    @staticmethod
    @differentiable_once
    def backward(ctx, d):
        x, weight, *saved = ctx.saved_tensors
        run = attention_backward_triton if ctx.kernels else attention_backward_reference
        d, sums = run(d.contiguous(), *saved, ctx.heads, ctx.needs_input_grad[2])
        return *by_linear(d, sums, x, weight, ctx.needs_input_grad), None, None, None


def by_linear(
    d: Tensor, sums: Tensor | None, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Return the gradients by x, weight and bias of a linear layer whose result's is d (R, O)."""
    d_x = (d @ weight).view(x.shape) if needed[0] else None
    d_weight = d.T @ x.reshape(-1, x.shape[-1]) if needed[1] else None
    return d_x, d_weight, sums if sums is None else sums[0]


def add_norm(
    x: Tensor, branch: Tensor, bias: Tensor, norm: nn.LayerNorm, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and normalise the sum.

    Args:
        x, branch: (..., D), of one dtype, as all operands.
        bias: (D,) of the linear layer that made `branch` without it.
        norm: over the last dimension, with weight and bias (D,).
        backend: "auto" takes Triton for CUDA tensors and PyTorch elsewhere; "reference" and
            "triton" force one of them.

    Returns:
        (x + branch + bias, its LayerNorm), (..., D) both.

    Raises:
        ValueError: an operand of another shape, a norm that computes something else, an unknown
            backend, or "triton" where it cannot run.
    """
    kernels, shape = chooses_kernels(backend, x), x.shape
    check_norm(norm, shape[-1])
    bias, weight, shift = dense(shape[-1:], bias=bias, weight=norm.weight, shift=norm.bias)
    rows = [operand.view(-1, shape[-1]) for operand in dense(shape, x=x, branch=branch)]
    total, normed = _AddNorm.apply(*rows, bias, weight, shift, norm.eps, kernels)
    return total.view(shape), normed.view(shape)


def bias_gelu(x: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Return GELU(x + bias), exact: x (..., F) of a linear layer without its bias (F,).

    backend, Raises: as in `add_norm`.
    """
    kernels = chooses_kernels(backend, x)
    (bias,) = dense(x.shape[-1:], bias=bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    return _BiasGelu.apply(rows, bias, kernels).view(x.shape)


def qkv_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, (N, heads, T, D / heads) each, of x (N, T, D).

    weight (3 D, D) and bias (3 D,) or None are the linear layer's. Under autocast the results have
    its dtype, as those of nn.Linear. backend, Raises: as in `add_norm`.
    """
    kernels = chooses_kernels(backend, x)
    return _QkvHeads.apply(*linear_operands(x, weight, bias, heads), heads, kernels)


def attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    queries: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return what the first `queries` tokens (None: all) gather from x (N, T, D): (N, queries, D).

    weight (3 D, D) and bias (3 D,) or None are those of the linear layer that makes q, k and v.
    backend: as in `add_norm`, but that "auto" takes PyTorch's attention wherever `attends` does not
    say "". Raises: as in `add_norm`, and where "triton" has more tokens or other heads than it
    takes.
    """
    kernels = chooses_kernels(backend, x)
    x, weight, bias = linear_operands(x, weight, bias, heads)
    tokens, width = x.shape[1:]
    queries = tokens if queries is None else queries
    if not 0 < queries <= tokens:
        raise ValueError(f"queries must be 1 to {tokens}, not {queries}")
    if backend == "triton" and (reason := too_large(width, heads, tokens)):
        raise ValueError(f"backend 'triton': {reason}")
    if backend == "auto" and attends(x.device, x.dtype, width, heads, tokens):
        q, k, v = _QkvHeads.apply(x, weight, bias, heads, kernels)
        gathered = F.scaled_dot_product_attention(q[:, :, :queries], k, v)
        return gathered.transpose(1, 2).flatten(2)
    return _Attention.apply(x, weight, bias, heads, queries, kernels)


def linear_operands(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int
) -> list[Tensor | None]:
    """Return the operands of the linear layer that makes q, k and v, checked, as autocast has
    them."""
    width = x.shape[-1]
    if x.dim() != 3 or width % heads:
        raise ValueError(f"x must be (N, T, D) with D a multiple of {heads}, not {tuple(x.shape)}")
    operands = [x, *dense((3 * width, width), weight=weight)]
    operands += [None] if bias is None else dense((3 * width,), bias=bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        operands = [operand if operand is None else operand.to(dtype) for operand in operands]
    return operands


def dense(shape: Sequence[int], **operands: Tensor) -> list[Tensor]:
    """Return operands contiguous, as kernels read them; ValueError names one of another shape."""
    for name, operand in operands.items():
        if getattr(operand, "shape", None) != shape:
            what = None if operand is None else tuple(operand.shape)
            raise ValueError(f"{name} must be {tuple(shape)}, not {what}")
    return [operand.contiguous() for operand in operands.values()]


def check_norm(norm: nn.LayerNorm, width: int) -> None:
    """Raise ValueError unless `norm` is LayerNorm over rows of this width, weight and bias too."""
    plain = type(norm).forward is nn.LayerNorm.forward and norm.normalized_shape == (width,)
    if not plain or norm.weight is None or norm.bias is None:
        needed = f"nn.LayerNorm({width}) with weight and bias, and its own forward"
        raise ValueError(f"norm must be an {needed}, not {norm}")


def chooses_kernels(backend: str, x: Tensor) -> bool:
    """Tell whether a backend runs a tensor's operation by Triton's kernels."""
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be auto, triton or reference, not {backend!r}")
    if backend != "triton":
        return backend == "auto" and triton is not None and x.is_cuda and x.dtype in DTYPES
    if triton is None:
        raise ValueError("backend 'triton': the triton package is not installed here")
    if x.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "backend 'triton' needs CUDA tensors; on a CPU it runs only in Triton's interpreter "
            "(set TRITON_INTERPRET=1 before this file is imported)"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"backend 'triton' takes fp16, bf16 and fp32, not {x.dtype}")
    return True


# ---------------------------------------------------------------------------- first use


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def serves(device: torch.device, dtype: torch.dtype, width: int, heads: int) -> str:
    """Compare kernels and reference once, on this device at a model's width.

    Returns:
        "" where they agree; else one sentence that says why the kernels do not serve.
    """
    if triton is None:
        return "the triton package is not installed here"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"they are for a GPU, and this is a {device}"
    draw = drawer(device, dtype)
    norm = nn.LayerNorm(width, eps=1e-6).to(device, dtype)
    norm.load_state_dict({"weight": draw(width), "bias": draw(width)})
    x, branch, bias = draw(2, 37, width), draw(2, 37, width), draw(width)
    hidden, hidden_bias = draw(2, 37, 4 * width), draw(4 * width)
    qkv, qkv_bias = draw(3 * width, width), draw(3 * width)
    leaves = [x.requires_grad_() for x in (x, branch, bias, hidden, hidden_bias, qkv, qkv_bias)]
    leaves += norm.parameters()
    upstream = [draw(2, 37, width), draw(2, 37, width), draw(2, 37, 4 * width)]
    upstream += [draw(2, 37, heads, width // heads).transpose(1, 2) for _ in range(3)]

    def outputs(backend: str) -> list[Tensor]:
        results = [*add_norm(x, branch, bias, norm, backend=backend)]
        results += [bias_gelu(hidden, hidden_bias, backend=backend)]
        return results + [*qkv_heads(x, qkv, qkv_bias, heads, backend=backend)]

    return compared(outputs, leaves, upstream)


@functools.cache
@torch.inference_mode(False)
@torch.enable_grad()
def attends(device: torch.device, dtype: torch.dtype, width: int, heads: int, tokens: int) -> str:
    """Compare attention's kernels and reference once, on this device at a model's sizes.

    Returns:
        "" where they agree; else one sentence that says why PyTorch's attention serves.
    """
    if not hopper(device) or dtype not in (torch.float16, torch.bfloat16):
        return "the kernels are for half precision on a Hopper GPU"
    if reason := too_large(width, heads, tokens):
        return reason
    draw = drawer(device, dtype)
    x, bias = draw(2, tokens, width), draw(3 * width)
    weight = draw(3 * width, width) / math.sqrt(width)  # scores near 1
    leaves = [x.requires_grad_() for x in (x, weight, bias)]

    def outputs(backend: str) -> list[Tensor]:
        asked = [tokens, 1]  # by all, and by the class token alone
        return [attention(*leaves, heads, queries, backend=backend) for queries in asked]

    return compared(outputs, leaves, [draw(*y.shape) for y in outputs("reference")])


def hopper(device: torch.device) -> bool:
    """Tell whether a device is of the generation that attention's kernels are for."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def too_large(width: int, heads: int, tokens: int) -> str:
    """Say why attention's kernels do not take these sizes; "" where they do."""
    if tokens <= TOKENS and width // heads in HEAD_WIDTHS:
        return ""
    widths = ", ".join(map(str, HEAD_WIDTHS))
    taken = f"up to {TOKENS} tokens and heads of {widths}"
    return f"attention's kernels take {taken}, not {tokens} tokens and heads of {width // heads}"


def drawer(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a function of sizes that draws normal values."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator).to(device, dtype)


def compared(
    outputs: Callable[[str], list[Tensor]], leaves: list[Tensor], upstream: list[Tensor]
) -> str:
    """Hold the kernels' outputs and gradients against the reference's, each over the largest value
    of its tensor; returns "" where they agree, else what is wrong."""
    device, dtype = leaves[0].device, leaves[0].dtype
    apart = []
    try:
        kernels, references = (
            [*results, *torch.autograd.grad(results, leaves, upstream)]
            for results in (outputs("triton"), outputs("reference"))
        )
        for a, b in zip(kernels, references, strict=True):
            apart.append((a - b).abs().max() / b.abs().max())
    except Exception as error:  # compilers fail in many ways, all of them before a launch
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        said = str(error).strip().partition("\n")[0]
        return f"Triton does not run on {device}: {type(error).__name__}: {said}"
    worst = torch.stack([x.float() for x in apart]).max().item()  # Python's max passes NaN over
    limit = TOLERANCE * max(torch.finfo(dtype).eps, ROUGH)
    return "" if worst <= limit else f"kernel and reference differ by {worst:.2g} on {device}"
