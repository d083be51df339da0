"""Triton kernels of fused_mlp.py: the two matrix products that carry the activation.

Both are persistent: a program takes tiles of outputs until none is left, operands through the copy engine, the loops
over tiles and depth flattened into one, so that the next tile's operands arrive while this one is written. A tile is
written in strips of its columns that share one buffer; the shared memory this frees holds another stage of operands.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels._triton_op import descriptor, grid_size
from pgolf_kernels._triton_tile import described, new_described, product_tile, strip


@dataclass(frozen=True)
class MlpConfig:
    """Launch knobs: outputs a tile, depth a step, strips a tile, stages, warps, programs a multiprocessor."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    strips: int = 2
    stages: int = 3
    warps: int = 4
    programs: int = 2


UP = MlpConfig()
GRAD_PRE = MlpConfig(depth=32, strips=4, stages=4)
# Depths whose number of steps is no power of two, and those of one or two steps, want two more registers a thread.
GRAD_PRE_ODD = replace(GRAD_PRE, strips=2)


@triton.jit
def _with_sign(value, negative, target: tl.constexpr):
    """The number of type `target` (bf16 or fp32) closest to value >= 0 among those whose last bit is `negative`."""
    bits = value.to(tl.int32, bitcast=True)
    if target == tl.bfloat16:
        sign = negative.to(tl.int32) << 16
        bits = ((bits - sign + 0x10000) & -0x20000) + sign
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        return ((bits & -2) | negative.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _is_negative(hidden):
    """The bit that _with_sign hid."""
    if hidden.dtype == tl.bfloat16:
        return (hidden.to(tl.int16, bitcast=True) & 1) != 0
    else:
        return (hidden.to(tl.int32, bitcast=True) & 1) != 0


@triton.jit(do_not_specialize=["rows"])
def _up_kernel(
    x_desc, w_desc, hidden_desc, pre_desc, rows, hidden_dim, slope,
    DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STRIPS: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    """hidden = leaky_relu(x W^T)^2, with the sign in its last bit (SIGN) or the product beside it."""
    tiles_n = tl.cdiv(hidden_dim, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * BM
        n = (tile % tiles_n) * BN
        acc = product_tile(x_desc, w_desc, m, n, DEPTH, BM, BN, BK)
        for i in tl.static_range(STRIPS):
            column = n + i * (BN // STRIPS)
            u = strip(acc, i, STRIPS, BM, BN)
            leaky = tl.where(u > 0, u, slope * u)
            if SIGN:
                hidden_desc.store([m, column], _with_sign(leaky * leaky, u <= 0, hidden_desc.dtype))
            else:
                pre_desc.store([m, column], u.to(pre_desc.dtype))
                hidden_desc.store([m, column], (leaky * leaky).to(hidden_desc.dtype))


@triton.jit(do_not_specialize=["rows"])
def _grad_pre_kernel(
    grad_desc, w_desc, kept_desc, out_desc, rows, hidden_dim, slope,
    DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STRIPS: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    """out = (grad W) * act'(u); kept: the hidden values with u's sign in the last bit (SIGN), or u."""
    tiles_n = tl.cdiv(hidden_dim, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * BM
        n = (tile % tiles_n) * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, DEPTH, BK):
            acc = tl.dot(grad_desc.load([m, k]), w_desc.load([k, n]), acc)
        kept = kept_desc.load([m, n])  # at once: a load by strips would wait for each of them
        for i in tl.static_range(STRIPS):
            part = strip(kept, i, STRIPS, BM, BN)
            if SIGN:
                factor = tl.where(_is_negative(part), -2.0 * slope, 2.0) * tl.sqrt(part.to(tl.float32))
            else:
                u = part.to(tl.float32)
                factor = tl.where(u > 0, 2.0, 2.0 * slope * slope) * u
            product = strip(acc, i, STRIPS, BM, BN) * factor
            out_desc.store([m, n + i * (BN // STRIPS)], product.to(out_desc.dtype))


# ---- launches --------------------------------------------------------------------------------------------------------


def _grid(tensor: Tensor, rows: int, columns: int, config: MlpConfig) -> tuple[int]:
    tiles = triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns)
    return (min(grid_size(tensor) * config.programs, tiles),)


def _constants(depth: int, sign: bool, config: MlpConfig) -> dict[str, int]:
    return {
        "DEPTH": depth, "BM": config.rows, "BN": config.columns, "BK": config.depth, "STRIPS": config.strips,
        "SIGN": sign, "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def up(x: Tensor, w_up: Tensor, slope: float, keeps_sign: bool) -> tuple[Tensor, Tensor]:
    """(hidden, u) of x [N, D] and w_up [F, D] in one dtype; with the sign in hidden's last bit u is empty."""
    (rows, depth), hidden_dim = x.shape, w_up.shape[0]
    x, w_up = described(x), described(w_up)
    hidden = new_described(x, rows, hidden_dim)
    pre = x.new_empty((rows, 0)) if keeps_sign else new_described(x, rows, hidden_dim)
    strip_block = (UP.rows, UP.columns // UP.strips)
    with torch.cuda.device_of(x):
        _up_kernel[_grid(x, rows, hidden_dim, UP)](
            descriptor(x, (UP.rows, UP.depth)), descriptor(w_up, (UP.columns, UP.depth)),
            descriptor(hidden, strip_block), None if keeps_sign else descriptor(pre, strip_block),
            rows, hidden_dim, slope, **_constants(depth, keeps_sign, UP),
        )  # fmt: skip
    return hidden.contiguous(), pre.contiguous()


def grad_pre(grad: Tensor, w_down: Tensor, kept: Tensor, slope: float, keeps_sign: bool) -> Tensor:
    """The gradient of u [N, F] from grad [N, D_out], w_down [D_out, F] and the signed hidden values, or u."""
    (rows, depth), hidden_dim = grad.shape, w_down.shape[1]
    grad, w_down, kept = described(grad), described(w_down), described(kept)
    out = new_described(grad, rows, hidden_dim)
    steps = triton.cdiv(depth, GRAD_PRE.depth)
    config = GRAD_PRE if steps > 2 and steps & (steps - 1) == 0 else GRAD_PRE_ODD
    strip_block = (config.rows, config.columns // config.strips)
    with torch.cuda.device_of(grad):
        _grad_pre_kernel[_grid(grad, rows, hidden_dim, config)](
            descriptor(grad, (config.rows, config.depth)), descriptor(w_down, (config.depth, config.columns)),
            descriptor(kept, (config.rows, config.columns)), descriptor(out, strip_block), rows, hidden_dim, slope,
            **_constants(depth, keeps_sign, config),
        )  # fmt: skip
    return out.contiguous()
