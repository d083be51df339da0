"""Triton kernels of fused_mlp.py: the two matrix products that carry the activation.

Both are persistent: a program takes tiles of 128 x 256 outputs until none is left, operands through the copy engine,
the loops over tiles and depth flattened into one, so that the next tile's operands arrive while this one is written.

Sign bits: within each group of 256 columns, word l (of 8) holds in bit j the sign of column 8 j + l. In the tensor
cores' accumulator layout the 32 elements of a word belong to one thread, so that packing needs no exchange between
threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels._triton_op import can_describe, descriptor, grid_size

COLUMNS = 256  # a tile's width: one group of sign words


@dataclass(frozen=True)
class MlpConfig:
    """Launch knobs of one kernel: rows of outputs a tile, depth a step, pipeline stages, warps."""

    rows: int = 128
    depth: int = 64
    stages: int = 3
    warps: int = 8


UP = MlpConfig()
GRAD_PRE = MlpConfig()


@triton.jit
def _sign_offsets(m, n, rows, hidden_dim, BM: tl.constexpr, BN: tl.constexpr):
    """Where a tile's sign words lie, [BM, 8], and which of them exist."""
    row = m + tl.arange(0, BM)
    words = tl.cdiv(hidden_dim, BN) * 8
    offsets = row.to(tl.int64)[:, None] * words + (n // BN) * 8 + tl.arange(0, 8)[None, :]
    return offsets, (row < rows)[:, None]


@triton.jit
def _halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns: written one after the other, they share one buffer."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["rows"])
def _up_kernel(
    x_desc, w_desc, hidden_desc, kept_desc, sign_ptr, rows, hidden_dim, slope,
    DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """hidden = leaky_relu(x W^T)^2; kept: its signs (SIGN) or the product itself."""
    tiles_n = tl.cdiv(hidden_dim, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * BM
        n = (tile % tiles_n) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, DEPTH, BK):
            acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
        if SIGN:
            bits = tl.arange(0, 32)[None, :, None]
            words = tl.sum((tl.reshape(acc, (BM, 32, 8)) > 0).to(tl.int32) << bits, axis=1)
            offsets, mask = _sign_offsets(m, n, rows, hidden_dim, BM, BN)
            tl.store(sign_ptr + offsets, words, mask=mask)
        left, right = _halves(acc, BM, BN)
        if not SIGN:
            kept_desc.store([m, n], left.to(kept_desc.dtype))
            kept_desc.store([m, n + BN // 2], right.to(kept_desc.dtype))
        left = tl.where(left > 0, left, slope * left)
        hidden_desc.store([m, n], (left * left).to(hidden_desc.dtype))
        right = tl.where(right > 0, right, slope * right)
        hidden_desc.store([m, n + BN // 2], (right * right).to(hidden_desc.dtype))


@triton.jit
def _through_activation(product, kept, slope, SIGN: tl.constexpr):
    """product * act'(u), up to the factor by u's sign where kept is the hidden value, |leaky(u)| = sqrt(kept)."""
    kept = kept.to(tl.float32)
    if SIGN:
        return product * tl.sqrt(kept)
    else:
        return product * tl.where(kept > 0, 2.0, 2.0 * slope * slope) * kept


@triton.jit(do_not_specialize=["rows"])
def _grad_pre_kernel(
    grad_desc, w_desc, kept_desc, sign_ptr, out_desc, rows, hidden_dim, slope,
    DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """out = (grad W) * act'(u); kept: the hidden values, with signs beside them (SIGN), or u."""
    tiles_n = tl.cdiv(hidden_dim, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * BM
        n = (tile % tiles_n) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, DEPTH, BK):
            acc = tl.dot(grad_desc.load([m, k]), w_desc.load([k, n]), acc)
        if SIGN:
            offsets, mask = _sign_offsets(m, n, rows, hidden_dim, BM, BN)
            words = tl.load(sign_ptr + offsets, mask=mask, other=0)
            positive = ((words[:, None, :] >> tl.arange(0, 32)[None, :, None]) & 1) != 0
            acc = tl.reshape(tl.reshape(acc, (BM, 32, 8)) * tl.where(positive, 2.0, -2.0 * slope), (BM, BN))
        left, right = _halves(acc, BM, BN)
        left = _through_activation(left, kept_desc.load([m, n]), slope, SIGN)
        out_desc.store([m, n], left.to(out_desc.dtype))
        right = _through_activation(right, kept_desc.load([m, n + BN // 2]), slope, SIGN)
        out_desc.store([m, n + BN // 2], right.to(out_desc.dtype))


# ---- launches --------------------------------------------------------------------------------------------------------


def _described(tensor: Tensor) -> Tensor:
    """A copy with rows of a multiple of 16 bytes where the copy engine cannot address the tensor itself."""
    if can_describe(tensor):
        return tensor
    step = 16 // tensor.element_size()
    return F.pad(tensor, (0, -tensor.shape[1] % step)).contiguous()


def _new_described(tensor: Tensor, rows: int, columns: int) -> Tensor:
    """An empty [rows, columns] whose rows the copy engine can write; past the columns lies padding."""
    step = 16 // tensor.element_size()
    return tensor.new_empty((rows, columns + -columns % step))[:, :columns]


def _grid(tensor: Tensor, rows: int, columns: int, config: MlpConfig) -> tuple[int]:
    return (min(grid_size(tensor), triton.cdiv(rows, config.rows) * triton.cdiv(columns, COLUMNS)),)


def up(x: Tensor, w_up: Tensor, slope: float, keeps_sign: bool) -> tuple[Tensor, Tensor]:
    """(hidden, kept) of x [N, D] and w_up [F, D] in one dtype; kept is sign words or the pre-activation."""
    (rows, depth), hidden_dim = x.shape, w_up.shape[0]
    x, w_up = _described(x), _described(w_up)
    hidden = _new_described(x, rows, hidden_dim)
    if keeps_sign:
        kept = torch.empty((rows, triton.cdiv(hidden_dim, COLUMNS) * 8), dtype=torch.int32, device=x.device)
    else:
        kept = _new_described(x, rows, hidden_dim)
    out_block = (UP.rows, COLUMNS // 2)
    hidden_desc = descriptor(hidden, out_block)
    with torch.cuda.device_of(x):
        _up_kernel[_grid(x, rows, hidden_dim, UP)](
            descriptor(x, (UP.rows, UP.depth)), descriptor(w_up, (COLUMNS, UP.depth)), hidden_desc,
            hidden_desc if keeps_sign else descriptor(kept, out_block), kept if keeps_sign else None,
            rows, hidden_dim, slope,
            DEPTH=depth, BM=UP.rows, BN=COLUMNS, BK=UP.depth, SIGN=keeps_sign,
            num_warps=UP.warps, num_stages=UP.stages,
        )  # fmt: skip
    return hidden.contiguous(), kept.contiguous()


def grad_pre(grad: Tensor, w_down: Tensor, hidden: Tensor, kept: Tensor, slope: float, keeps_sign: bool) -> Tensor:
    """The pre-activation's gradient [N, F] of grad [N, D_out] and w_down [D_out, F]."""
    (rows, depth), hidden_dim = grad.shape, w_down.shape[1]
    grad, w_down = _described(grad), _described(w_down)
    signs, kept = (kept, _described(hidden)) if keeps_sign else (None, _described(kept))
    out = _new_described(grad, rows, hidden_dim)
    out_block = (GRAD_PRE.rows, COLUMNS // 2)
    with torch.cuda.device_of(grad):
        _grad_pre_kernel[_grid(grad, rows, hidden_dim, GRAD_PRE)](
            descriptor(grad, (GRAD_PRE.rows, GRAD_PRE.depth)), descriptor(w_down, (GRAD_PRE.depth, COLUMNS)),
            descriptor(kept, out_block), signs, descriptor(out, out_block), rows, hidden_dim, slope,
            DEPTH=depth, BM=GRAD_PRE.rows, BN=COLUMNS, BK=GRAD_PRE.depth, SIGN=keeps_sign,
            num_warps=GRAD_PRE.warps, num_stages=GRAD_PRE.stages,
        )  # fmt: skip
    return out.contiguous()
