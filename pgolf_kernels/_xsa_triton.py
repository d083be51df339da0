"""Triton kernels of xsa.py: a tile holds key/value heads of a few tokens and meets their query heads one by one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels import _triton_op
from pgolf_kernels._triton_op import pdl
from pgolf_kernels._triton_tile import wait_for_previous

TOKENS = 4
WARPS = 4


@triton.jit
def _values(v_ptr, tile, tokens, stride, HKV: tl.constexpr, HKV_PADDED: tl.constexpr, DIM: tl.constexpr,
            DIM_PADDED: tl.constexpr, TOKENS: tl.constexpr, MIN_NORM: tl.constexpr):  # fmt: skip
    """(token, head, column, mask, unit value, 1 / |v|, whether |v| is above its floor) of a tile."""
    row = tl.arange(0, TOKENS * HKV_PADDED)
    token = tile * TOKENS + row // HKV_PADDED
    head = row % HKV_PADDED
    column = tl.arange(0, DIM_PADDED)
    mask = ((token < tokens) & (head < HKV))[:, None] & (column < DIM)[None, :]
    token = token.to(tl.int64)
    v = tl.load(v_ptr + (token * stride + head * DIM)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(v * v, axis=1))
    inverse = 1.0 / tl.maximum(norm, MIN_NORM)
    return token, head, column, mask, v * inverse[:, None], inverse, norm > MIN_NORM


@triton.jit
def _forward_kernel(y_ptr, v_ptr, out_ptr, tokens, stride, HKV: tl.constexpr, HKV_PADDED: tl.constexpr,
                    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, TOKENS: tl.constexpr,
                    MIN_NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait_for_previous(PDL)
    token, head, column, mask, unit, _, _ = _values(
        v_ptr, tl.program_id(0), tokens, stride, HKV, HKV_PADDED, DIM, DIM_PADDED, TOKENS, MIN_NORM
    )
    for member in tl.static_range(GROUP):
        offsets = ((token * HKV + head) * GROUP + member)[:, None] * DIM + column[None, :]
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        out = y - tl.sum(y * unit, axis=1)[:, None] * unit
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(grad_ptr, y_ptr, v_ptr, d_y_ptr, d_v_ptr, tokens, stride, HKV: tl.constexpr,
                     HKV_PADDED: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr,
                     TOKENS: tl.constexpr, MIN_NORM: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait_for_previous(PDL)
    token, head, column, mask, unit, inverse, above = _values(
        v_ptr, tl.program_id(0), tokens, stride, HKV, HKV_PADDED, DIM, DIM_PADDED, TOKENS, MIN_NORM
    )
    d_v = tl.zeros((TOKENS * HKV_PADDED, DIM_PADDED), tl.float32)
    for member in tl.static_range(GROUP):
        offsets = ((token * HKV + head) * GROUP + member)[:, None] * DIM + column[None, :]
        y = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        p = tl.sum(y * unit, axis=1)
        c = tl.sum(g * unit, axis=1)
        tl.store(d_y_ptr + offsets, (g - c[:, None] * unit).to(d_y_ptr.dtype.element_ty), mask=mask)
        own = tl.where(above, 2 * p * c, 0.0)  # below the floor the direction is linear in v
        d_v += own[:, None] * unit - p[:, None] * g - c[:, None] * y
    target = ((token * HKV + head) * DIM)[:, None] + column[None, :]
    tl.store(d_v_ptr + target, (d_v * inverse[:, None]).to(d_v_ptr.dtype.element_ty), mask=mask)


def _shape(y: Tensor, v: Tensor, min_norm: float) -> dict[str, int | float]:
    kv_heads, dim = v.shape[1:]
    return {
        "HKV": kv_heads,
        "HKV_PADDED": triton.next_power_of_2(kv_heads),
        "GROUP": y.shape[1] // kv_heads,
        "DIM": dim,
        "DIM_PADDED": triton.next_power_of_2(dim),
        "TOKENS": TOKENS,
        "MIN_NORM": min_norm,
    }


def forward(y: Tensor, v: Tensor, min_norm: float) -> Tensor:
    y, v = y.contiguous(), _triton_op.packed_heads(v)
    out = torch.empty_like(y)
    grid = (triton.cdiv(y.shape[0], TOKENS),)
    with torch.cuda.device_of(y):
        _forward_kernel[grid](y, v, out, y.shape[0], v.stride(0), **_shape(y, v, min_norm), num_warps=WARPS, **pdl(y))
    return out


def backward(grad: Tensor, y: Tensor, v: Tensor, min_norm: float) -> tuple[Tensor, Tensor]:
    grad, y, v = grad.contiguous(), y.contiguous(), _triton_op.packed_heads(v)
    d_y, d_v = torch.empty_like(y), torch.empty(v.shape, dtype=v.dtype, device=v.device)
    grid = (triton.cdiv(y.shape[0], TOKENS),)
    with torch.cuda.device_of(y):
        _backward_kernel[grid](
            grad, y, v, d_y, d_v, y.shape[0], v.stride(0), **_shape(y, v, min_norm), num_warps=WARPS, **pdl(y)
        )  # fmt: skip
    return d_y, d_v
