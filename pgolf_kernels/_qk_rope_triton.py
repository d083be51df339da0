"""Triton kernels of qk_rope.py: one program takes a few tokens, their query heads, key heads and gradients of values.

A tile is [tokens * heads, d]. The rotation needs each row's columns twice, in place and with the halves of the first
2 P swapped: the second load hits L1 and saves a shuffle through shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels import _triton_op
from pgolf_kernels._triton_op import pdl
from pgolf_kernels._triton_tile import dividing, sum_rows, wait_for_previous

TOKENS = 4  # a tile; 4 warps then hold 16 values a thread
WARPS = 4
PROGRAMS = 6  # a multiprocessor, of the backward's persistent grid: so many fit at a time
# The same of the backward that reads what the forward pass gave, and holds more. Other values were slower on an H200.
TURNED_TOKENS, TURNED_WARPS, TURNED_PROGRAMS = 2, 4, 7


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
def _gather(x_ptr, y_ptr, z_ptr, out_ptr, tile, tokens, out_stride, COUNT: tl.constexpr, WIDTH: tl.constexpr,
            WIDTH_PADDED: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Packed rows of x, of x + y or of x + y + z into rows of another stride."""
    token = tile * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH_PADDED)
    mask = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    token = token.to(tl.int64)[:, None]
    offsets = token * WIDTH + column[None, :]
    value = tl.load(x_ptr + offsets, mask=mask).to(tl.float32)
    if COUNT > 1:
        value += tl.load(y_ptr + offsets, mask=mask).to(tl.float32)
    if COUNT > 2:
        value += tl.load(z_ptr + offsets, mask=mask).to(tl.float32)
    tl.store(out_ptr + token * out_stride + column[None, :], value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(q, k, gain, cos, sin, out_q, out_k, tokens, q_stride, k_stride, length, eps,
                    H: tl.constexpr, H_PADDED: tl.constexpr, HKV: tl.constexpr, HKV_PADDED: tl.constexpr,
                    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PAIRS: tl.constexpr,
                    TOKENS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait_for_previous(PDL)
    tile = tl.program_id(0)
    _turn(q, out_q, gain, cos, sin, tile, tokens, q_stride, length, eps, True, H, H_PADDED, DIM, DIM_PADDED, PAIRS,
          TOKENS)  # fmt: skip
    _turn(k, out_k, gain, cos, sin, tile, tokens, k_stride, length, eps, False, HKV, HKV_PADDED, DIM, DIM_PADDED,
          PAIRS, TOKENS)  # fmt: skip


@triton.jit
def _turn_back(grad_ptr, grad2_ptr, x_ptr, d_ptr, gain_ptr, d_gain, cos_ptr, sin_ptr, inverse_ptr, tile, tokens,
               stride, d_stride, inverse_stride, length, eps, TWO: tl.constexpr, GAIN: tl.constexpr, SUMS: tl.constexpr,
               TURNED: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, DIM: tl.constexpr,
               DIM_PADDED: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    token, head, column, swapped, mask, cos, sin = _tile(
        tile, tokens, length, cos_ptr, sin_ptr, HEADS, HEADS_PADDED, DIM, DIM_PADDED, PAIRS, TOKENS
    )
    packed = (token * (HEADS * DIM) + head * DIM)[:, None]
    own = (token * stride + head * DIM)[:, None]
    x = tl.load(x_ptr + own + column[None, :], mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + packed + column[None, :], mask=mask, other=0.0).to(tl.float32)
    turns = mask
    if TURNED:  # otherwise fewer loads would want more registers
        turns = mask & (column < 2 * PAIRS)[None, :]
    other = tl.load(grad_ptr + packed + swapped[None, :], mask=turns, other=0.0).to(tl.float32)
    if TWO:
        g += tl.load(grad2_ptr + packed + column[None, :], mask=mask, other=0.0).to(tl.float32)
        other += tl.load(grad2_ptr + packed + swapped[None, :], mask=turns, other=0.0).to(tl.float32)
    if TURNED:
        # The rotation keeps inner products; its result over the gain is what was normed, turned.
        factor = tl.load(inverse_ptr + token * inverse_stride + head, mask=(token < tokens) & (head < HEADS), other=0.0)
        inner = tl.sum(g * x, axis=1)
        share = inner / DIM
        if GAIN:
            gain = dividing(tl.load(gain_ptr + head, mask=head < HEADS, other=1.0).to(tl.float32))
            inner /= gain
            share = inner / (DIM * gain)
            factor *= gain
        other_x = tl.load(x_ptr + own + swapped[None, :], mask=turns, other=0.0).to(tl.float32)
        centred = (g - x * share[:, None]) * cos - (other - other_x * share[:, None]) * sin
    else:
        factor = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
        normed = x * factor[:, None]
        back = g * cos - other * sin
        inner = tl.sum(back * normed, axis=1)
        centred = back - normed * (inner / DIM)[:, None]
        if GAIN:
            factor *= tl.load(gain_ptr + head, mask=head < HEADS, other=0.0).to(tl.float32)
    if SUMS:
        d_gain += inner
    d = factor[:, None] * centred
    target = (token * d_stride + head * DIM)[:, None] + column[None, :]
    tl.store(d_ptr + target, d.to(d_ptr.dtype.element_ty), mask=mask)
    return d_gain


@triton.jit
def _backward_kernel(grad_q, grad_k, grad_k2, grad_v, grad_v2, grad_v3, q, k, gain, cos, sin, inverse, d_q, d_k, d_v,
                     partial, tokens, q_stride, k_stride, d_q_stride, d_k_stride, d_v_stride, length, eps,
                     KEYS: tl.constexpr, VALUES: tl.constexpr, SUMS: tl.constexpr, TURNED: tl.constexpr,
                     H: tl.constexpr, H_PADDED: tl.constexpr, HKV: tl.constexpr, HKV_PADDED: tl.constexpr,
                     DIM: tl.constexpr, DIM_PADDED: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
                     PDL: tl.constexpr):  # fmt: skip
    """KEYS and VALUES: how many gradients of keys (1 or 2) and of values (0 to 3) there are to be added. SUMS: the
    gain's gradient is asked for. TURNED: q and k are what the forward pass gave, `inverse` of their norms."""
    wait_for_previous(PDL)
    d_gain = tl.zeros((TOKENS * H_PADDED,), tl.float32)
    unused = tl.zeros((TOKENS * HKV_PADDED,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(tokens, TOKENS), tl.num_programs(0)):
        d_gain = _turn_back(grad_q, grad_q, q, d_q, gain, d_gain, cos, sin, inverse, tile, tokens, q_stride, d_q_stride,
                            H + HKV, length, eps, False, True, SUMS, TURNED, H, H_PADDED, DIM, DIM_PADDED, PAIRS,
                            TOKENS)  # fmt: skip
        unused = _turn_back(grad_k, grad_k2, k, d_k, gain, unused, cos, sin, inverse + H, tile, tokens, k_stride,
                            d_k_stride, H + HKV, length, eps, KEYS > 1, False, False, TURNED, HKV, HKV_PADDED, DIM,
                            DIM_PADDED, PAIRS, TOKENS)  # fmt: skip
        if VALUES > 0:
            _gather(grad_v, grad_v2, grad_v3, d_v, tile, tokens, d_v_stride, VALUES, HKV * DIM,
                    HKV_PADDED * DIM_PADDED, TOKENS)  # fmt: skip
    if SUMS:
        total = tl.sum(tl.reshape(d_gain, (TOKENS, H_PADDED)), axis=0)
        tl.store(partial + tl.program_id(0) * H_PADDED + tl.arange(0, H_PADDED), total)


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
    gain, cos, sin = gain.contiguous(), cos.contiguous(), sin.contiguous()
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    tokens = q.shape[0]
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(tokens, TOKENS),)](
            q, k, gain, cos, sin, out_q, out_k, tokens, q.stride(0), k.stride(0), cos.shape[0], eps,
            **_shape(q, k, cos), num_warps=WARPS, **pdl(q),
        )  # fmt: skip
    return out_q, out_k


def backward(
    grad_q: Tensor, grad_k: Tensor, q: Tensor, k: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and gain."""
    d_q, d_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    d_gain = backward_into(grad_q, [grad_k], [], q, k, gain, cos, sin, eps, d_q, d_k, None)
    return d_q, d_k, d_gain


def backward_into(
    grad_q: Tensor, grad_ks: list[Tensor], grad_vs: list[Tensor], q: Tensor, k: Tensor, gain: Tensor, cos: Tensor,
    sin: Tensor, eps: float, d_q: Tensor, d_k: Tensor, d_v: Tensor | None, wants_gain: bool = True,
    inverse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Writes d_q, d_k from the sum of k's gradients, and the sum of v's into d_v; returns gain's, empty if unwanted.

    With `inverse` [N, H + Hkv], 1 / norms, q and k are what the forward pass made of them.
    """
    q, k = _triton_op.packed_heads(q), _triton_op.packed_heads(k)
    grad_q, gain, cos, sin = (t.contiguous() for t in (grad_q, gain, cos, sin))
    grad_ks, grad_vs = _at_most(grad_ks, 2), _at_most(grad_vs, 3)
    shape = _shape(q, k, cos)
    tokens, warps, most = q.shape[0], WARPS, PROGRAMS
    if inverse is not None:
        shape["TOKENS"], warps, most = TURNED_TOKENS, TURNED_WARPS, TURNED_PROGRAMS
    programs = min(triton.cdiv(tokens, shape["TOKENS"]), most * _triton_op.grid_size(q))
    partial = torch.empty(programs if wants_gain else 0, shape["H_PADDED"], dtype=torch.float32, device=q.device)
    unused, written_v = grad_ks[0], d_k if d_v is None else d_v
    with torch.cuda.device_of(q):
        _backward_kernel[(programs,)](
            grad_q, *(*grad_ks, unused)[:2], *(*grad_vs, unused, unused, unused)[:3], q, k, gain, cos, sin,
            cos if inverse is None else inverse, d_q, d_k, written_v, partial,
            tokens, q.stride(0), k.stride(0), *(t.stride(0) for t in (d_q, d_k, written_v)), cos.shape[0], eps,
            KEYS=len(grad_ks), VALUES=len(grad_vs), SUMS=wants_gain, TURNED=inverse is not None,
            **shape, num_warps=warps, **pdl(q),
        )  # fmt: skip
    return sum_rows(partial)[: gain.numel()].to(gain.dtype) if wants_gain else gain.new_empty(0)


def _at_most(grads: list[Tensor], count: int) -> list[Tensor]:
    """The same sum in so many contiguous terms."""
    rest = [torch.stack(grads[count - 1 :]).sum(0)] if len(grads) > count else grads[count - 1 :]
    return [grad.contiguous() for grad in (*grads[: count - 1], *rest)]
