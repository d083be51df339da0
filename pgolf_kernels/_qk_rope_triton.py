"""Triton kernels of qk_rope.py: one program takes a few tokens, their query heads, key heads and (copied) values.

A tile is [tokens * heads, d]. The rotation needs each row's columns twice, in place and with the halves of the first
2 P swapped: the second load hits L1 and saves a shuffle through shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels import _triton_op

TOKENS = 8  # a tile; 4 warps then hold 32 values a thread
WARPS = 4


@triton.jit
def _tile(tile, tokens, length, cos_ptr, sin_ptr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM: tl.constexpr,
          DIM_PADDED: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """(token, head, column, swapped column, mask, cosine, sine with sign) of a tile's elements."""
    row = tl.arange(0, TOKENS * HEADS_PADDED)
    token = tile * TOKENS + row // HEADS_PADDED
    head = row % HEADS_PADDED
    column = tl.arange(0, DIM_PADDED)
    mask = ((token < tokens) & (head < HEADS))[:, None] & (column < DIM)[None, :]
    swapped = tl.where(column < PAIRS, column + PAIRS, tl.where(column < 2 * PAIRS, column - PAIRS, column))
    if PAIRS > 0:
        turns = mask & (column < 2 * PAIRS)[None, :]
        entry = (token % length)[:, None] * PAIRS + (column % PAIRS)[None, :]
        cos = tl.load(cos_ptr + entry, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + entry, mask=turns, other=0.0).to(tl.float32)
        sin = tl.where((column < PAIRS)[None, :], sin, -sin)
    else:
        cos = tl.full((TOKENS * HEADS_PADDED, DIM_PADDED), 1.0, tl.float32)
        sin = tl.zeros((TOKENS * HEADS_PADDED, DIM_PADDED), tl.float32)
    return token.to(tl.int64), head, column, swapped, mask, cos, sin


@triton.jit
def _turn(x_ptr, out_ptr, gain_ptr, cos_ptr, sin_ptr, tile, tokens, stride, length, eps, GAIN: tl.constexpr,
          HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
          PAIRS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    token, head, column, swapped, mask, cos, sin = _tile(
        tile, tokens, length, cos_ptr, sin_ptr, HEADS, HEADS_PADDED, DIM, DIM_PADDED, PAIRS, TOKENS
    )
    base = (token * stride + head * DIM)[:, None]
    x = tl.load(x_ptr + base + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + base + swapped[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
    if GAIN:
        factor *= tl.load(gain_ptr + head, mask=head < HEADS, other=0.0).to(tl.float32)
    out = (x * cos + other * sin) * factor[:, None]
    target = (token * (HEADS * DIM) + head * DIM)[:, None] + column[None, :]
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy(x_ptr, out_ptr, tile, tokens, stride, out_stride, WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr,
          TOKENS: tl.constexpr):  # fmt: skip
    """Rows of WIDTH values from one stride to another."""
    token = tile * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH_PADDED)
    mask = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    token = token.to(tl.int64)[:, None]
    tl.store(out_ptr + token * out_stride + column[None, :],
             tl.load(x_ptr + token * stride + column[None, :], mask=mask), mask=mask)  # fmt: skip


@triton.jit
def _forward_kernel(q, k, v, gain, cos, sin, out_q, out_k, out_v, tokens, q_stride, k_stride, length, eps,
                    COPY: tl.constexpr, H: tl.constexpr, H_PADDED: tl.constexpr, HKV: tl.constexpr,
                    HKV_PADDED: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PAIRS: tl.constexpr,
                    TOKENS: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    _turn(q, out_q, gain, cos, sin, tile, tokens, q_stride, length, eps, True, H, H_PADDED, DIM, DIM_PADDED, PAIRS,
          TOKENS)  # fmt: skip
    _turn(k, out_k, gain, cos, sin, tile, tokens, k_stride, length, eps, False, HKV, HKV_PADDED, DIM, DIM_PADDED,
          PAIRS, TOKENS)  # fmt: skip
    if COPY:
        _copy(v, out_v, tile, tokens, q_stride, HKV * DIM, HKV * DIM, HKV_PADDED * DIM_PADDED, TOKENS)


@triton.jit
def _turn_back(grad_ptr, x_ptr, d_ptr, gain_ptr, d_gain, cos_ptr, sin_ptr, tile, tokens, stride, d_stride, length, eps,
               GAIN: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM: tl.constexpr,
               DIM_PADDED: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    token, head, column, swapped, mask, cos, sin = _tile(
        tile, tokens, length, cos_ptr, sin_ptr, HEADS, HEADS_PADDED, DIM, DIM_PADDED, PAIRS, TOKENS
    )
    packed = (token * (HEADS * DIM) + head * DIM)[:, None]
    x = tl.load(x_ptr + (token * stride + head * DIM)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + packed + column[None, :], mask=mask, other=0.0).to(tl.float32)
    other = tl.load(grad_ptr + packed + swapped[None, :], mask=mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
    normed = x * inverse[:, None]
    back = g * cos - other * sin
    inner = tl.sum(back * normed, axis=1)
    factor = inverse
    if GAIN:
        d_gain += inner
        factor *= tl.load(gain_ptr + head, mask=head < HEADS, other=0.0).to(tl.float32)
    d = factor[:, None] * (back - normed * (inner / DIM)[:, None])
    target = (token * d_stride + head * DIM)[:, None] + column[None, :]
    tl.store(d_ptr + target, d.to(d_ptr.dtype.element_ty), mask=mask)
    return d_gain


@triton.jit
def _backward_kernel(grad_q, grad_k, grad_v, q, k, gain, cos, sin, d_q, d_k, d_v, partial, tokens, q_stride, k_stride,
                     d_q_stride, d_k_stride, length, eps, COPY: tl.constexpr, H: tl.constexpr, H_PADDED: tl.constexpr,
                     HKV: tl.constexpr, HKV_PADDED: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
                     PAIRS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    d_gain = tl.zeros((TOKENS * H_PADDED,), tl.float32)
    unused = tl.zeros((TOKENS * HKV_PADDED,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        d_gain = _turn_back(grad_q, q, d_q, gain, d_gain, cos, sin, tile, tokens, q_stride, d_q_stride, length, eps,
                            True, H, H_PADDED, DIM, DIM_PADDED, PAIRS, TOKENS)  # fmt: skip
        unused = _turn_back(grad_k, k, d_k, gain, unused, cos, sin, tile, tokens, k_stride, d_k_stride, length, eps,
                            False, HKV, HKV_PADDED, DIM, DIM_PADDED, PAIRS, TOKENS)  # fmt: skip
        if COPY:
            _copy(grad_v, d_v, tile, tokens, HKV * DIM, d_q_stride, HKV * DIM, HKV_PADDED * DIM_PADDED, TOKENS)
    row = tl.arange(0, TOKENS * H_PADDED)
    tl.store(partial + tl.program_id(0) * (TOKENS * H_PADDED) + row, d_gain)


def _shape(q: Tensor, k: Tensor, cos: Tensor) -> dict[str, int]:
    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    return {
        "H": heads,
        "H_PADDED": triton.next_power_of_2(heads),
        "HKV": kv_heads,
        "HKV_PADDED": triton.next_power_of_2(kv_heads),
        "DIM": dim,
        "DIM_PADDED": triton.next_power_of_2(dim),
        "PAIRS": cos.shape[1],
        "TOKENS": TOKENS,
    }


def forward(q: Tensor, k: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(q', k') of q [N, H, d] and k [N, Hkv, d]."""
    q, k = _triton_op.packed_heads(q), _triton_op.packed_heads(k)
    return _forward(q, k, None, gain, cos, sin, eps)[:2]


def forward_packed(
    raw: Tensor, heads: int, kv_heads: int, gain: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(q', k', v) of raw [N, (H + 2 Hkv) d], the three projections side by side."""
    return _forward(*_split(raw, heads, kv_heads), gain, cos, sin, eps)


def backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and gain."""
    q, k = _triton_op.packed_heads(q), _triton_op.packed_heads(k)
    d_q, d_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    d_gain = _backward(grad_q, grad_k, None, q, k, gain, cos, sin, d_q, d_k, None, eps)
    return d_q, d_k, d_gain


def backward_packed(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, raw: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of raw (written in place of a concatenation) and gain."""
    d_raw = torch.empty_like(raw)
    heads, kv_heads = grad_q.shape[1], grad_k.shape[1]
    q, k, _ = _split(raw, heads, kv_heads)
    d_gain = _backward(grad_q, grad_k, grad_v.contiguous(), q, k, gain, cos, sin, *_split(d_raw, heads, kv_heads), eps)
    return d_raw, d_gain


def _split(raw: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    dim = raw.shape[1] // (heads + 2 * kv_heads)
    q, k, v = raw.view(raw.shape[0], -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def _forward(
    q: Tensor, k: Tensor, v: Tensor | None, gain: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    gain, cos, sin = gain.contiguous(), cos.contiguous(), sin.contiguous()
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    out_v = torch.empty_like(out_k) if v is not None else out_k
    tokens = q.shape[0]
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(tokens, TOKENS),)](
            q, k, k if v is None else v, gain, cos, sin, out_q, out_k, out_v, tokens, q.stride(0), k.stride(0),
            cos.shape[0], eps, COPY=v is not None, **_shape(q, k, cos), num_warps=WARPS,
        )  # fmt: skip
    return out_q, out_k, out_v


def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    q: Tensor,
    k: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor | None,
    eps: float,
) -> Tensor:
    """Writes d_q, d_k and d_v; returns gain's gradient."""
    grad_q, grad_k, gain, cos, sin = (t.contiguous() for t in (grad_q, grad_k, gain, cos, sin))
    shape = _shape(q, k, cos)
    tokens = q.shape[0]
    programs = min(triton.cdiv(tokens, TOKENS), 8 * _triton_op.grid_size(q))
    partial = torch.empty(programs, TOKENS, shape["H_PADDED"], dtype=torch.float32, device=q.device)
    copy = grad_v is not None
    with torch.cuda.device_of(q):
        _backward_kernel[(programs,)](
            grad_q, grad_k, grad_v if copy else grad_k, q, k, gain, cos, sin, d_q, d_k, d_v if copy else d_k, partial,
            tokens, q.stride(0), k.stride(0), d_q.stride(0), d_k.stride(0), cos.shape[0], eps, COPY=copy,
            **shape, num_warps=WARPS,
        )  # fmt: skip
    return partial.sum((0, 1))[: gain.numel()].to(gain.dtype)
