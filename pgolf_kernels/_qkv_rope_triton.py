"""Triton kernel of qk_rope.py: the projections of queries, keys and values, turned before they are written.

Persistent, as the kernels of _fused_mlp_triton.py. A strip of a tile is one head's columns. In the accumulators of a
product one thread holds a row's columns c and c + 8, c + 16 and so on: where PAIRS is a
multiple of 8 the rotation needs no other thread.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels._triton_op import cdiv, descriptor, grid_size
from pgolf_kernels._triton_tile import described, dividing, product_tile, strip

ROWS, COLUMNS, STEP, STRIPS = 128, 128, 64, 2  # outputs a tile, depth a step, parts in which a head is written
STAGES, WARPS, PROGRAMS = 3, 4, 2
# Of a head: the copy engine writes 16 bytes of a row or more, and of wider heads that turn as a whole registers spill.
LEAST_DIM, MOST_DIM = 16, 64


@triton.jit(do_not_specialize=["rows", "length"])
def _project_kernel(x_desc, w_desc, out_desc, gain_ptr, cos_ptr, sin_ptr, inverse_ptr, rows, length, eps,
                    H: tl.constexpr, HKV: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, DEPTH: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STRIPS: tl.constexpr):  # fmt: skip
    """out = x W^T, its first H + HKV heads normed and turned, the first H times their gain. inverse: of their norms."""
    tiles_n: tl.constexpr = (H + 2 * HKV) * DIM // BN
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * BM
        n = (tile % tiles_n) * BN
        acc = product_tile(x_desc, w_desc, m, n, DEPTH, BM, BN, BK)
        row = m + tl.arange(0, BM)
        entry = (row % length)[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]
        cos = tl.load(cos_ptr + entry).to(tl.float32)[:, None, :]
        sin = tl.load(sin_ptr + entry).to(tl.float32)[:, None, :]
        for i in tl.static_range(BN // DIM):
            part = strip(acc, i, BN // DIM, BM, BN)
            head = n // DIM + i
            turned = head < H + HKV
            inverse = tl.rsqrt(tl.sum(part * part, axis=1) / DIM + eps)
            tl.store(inverse_ptr + row.to(tl.int64) * (H + HKV) + head, inverse, mask=(row < rows) & turned)
            gain = tl.load(gain_ptr + head, mask=head < H, other=1.0).to(tl.float32)
            part *= tl.where(turned, inverse * dividing(gain), 1.0)[:, None]
            turns = (tl.arange(0, DIM // 2 // PAIRS) == 0)[None, :, None] & turned
            first, second = tl.split(tl.permute(tl.reshape(part, (BM, DIM // 2 // PAIRS, 2, PAIRS)), (0, 1, 3, 2)))
            c, s = tl.where(turns, cos, 1.0), tl.where(turns, sin, 0.0)
            both = tl.join(first * c + second * s, second * c - first * s)
            part = tl.reshape(tl.permute(both, (0, 1, 3, 2)), (BM, DIM))
            for j in tl.static_range(STRIPS):
                out = strip(part, j, STRIPS, BM, DIM).to(out_desc.dtype)
                out_desc.store([m, n + i * DIM + j * (DIM // STRIPS)], out)


def takes(x: Tensor, weight: Tensor, heads: int, kv_heads: int, pairs: int) -> bool:
    """Whether the kernel computes this projection: a matter of shapes and dtypes, which a compiler knows too.

    fp16 has no number for a tiny gain's queries.
    """
    dim = weight.shape[0] // (heads + 2 * kv_heads)
    powers = dim & (dim - 1) == 0 and pairs & (pairs - 1) == 0
    return x.dtype != torch.float16 and powers and pairs > 0 and LEAST_DIM <= dim <= MOST_DIM


def project(
    x: Tensor, weight: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """(q', k' and v side by side [N, (H + 2 Hkv) d], 1 / norms fp32 [N, H + Hkv]) of x [N, D]."""
    (rows, depth), heads, width = x.shape, gain.numel(), weight.shape[0]
    dim = width // (heads + 2 * kv_heads)
    columns = math.gcd(COLUMNS, heads * dim, kv_heads * dim)  # whole heads, of queries, of keys or of values alone
    x, weight = described(x), described(weight)
    gain, cos, sin = gain.contiguous(), cos.contiguous(), sin.contiguous()
    out = x.new_empty(rows, width)
    inverse = x.new_empty((rows, heads + kv_heads), dtype=torch.float32)
    tiles = cdiv(rows, ROWS) * (width // columns)
    with torch.cuda.device_of(x):
        _project_kernel[(min(grid_size(x) * PROGRAMS, tiles),)](
            descriptor(x, (ROWS, STEP)), descriptor(weight, (columns, STEP)), descriptor(out, (ROWS, dim // STRIPS)),
            gain, cos, sin, inverse, rows, cos.shape[0], eps, H=heads, HKV=kv_heads, DIM=dim, PAIRS=cos.shape[1],
            DEPTH=depth, BM=ROWS, BN=columns, BK=STEP, STRIPS=STRIPS, num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out, inverse
