"""Triton kernels of residual.py: persistent programs over tiles of whole rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels import _triton_op
from pgolf_kernels._triton_op import pdl
from pgolf_kernels._triton_tile import sum_rows, wait_for_previous

if TYPE_CHECKING:
    from pgolf_kernels.residual import Launch


@triton.jit
def _pick(p0, p1, p2, p3, p4, p5, p6, p7, k: tl.constexpr):
    """The k-th of eight values, chosen when the kernel is compiled."""
    if k == 0:  # noqa: SIM116, a kernel has no dictionaries
        return p0
    elif k == 1:
        return p1
    elif k == 2:
        return p2
    elif k == 3:
        return p3
    elif k == 4:
        return p4
    elif k == 5:
        return p5
    elif k == 6:
        return p6
    else:
        return p7


@triton.jit
def _weight(coefficients, k: tl.constexpr, columns, inside, DIM: tl.constexpr):
    """Row k of the coefficients."""
    return tl.load(coefficients + k * DIM + columns, mask=inside, other=0.0)


@triton.jit
def _forward_kernel(
    s0, s1, s2, s3, s4, s5, s6, s7, coefficients, total_ptr, normed_ptr, rows, eps, scale,
    STREAMS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TOTAL: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        offsets = row.to(tl.int64)[:, None] * DIM + columns[None, :]
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in tl.static_range(STREAMS):
            weight = _weight(coefficients, k, columns, inside, DIM)
            pointer = _pick(s0, s1, s2, s3, s4, s5, s6, s7, k)
            total += weight[None, :] * tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        if TOTAL:
            tl.store(total_ptr + offsets, total.to(total_ptr.dtype.element_ty), mask=mask)
        if NORM:
            factor = scale * tl.rsqrt(tl.sum(total * total, axis=1) / DIM + eps)
            tl.store(normed_ptr + offsets, (total * factor[:, None]).to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    s0, s1, s2, s3, s4, s5, s6, s7, g0, g1, g2, g3, g4, g5, g6, g7, t0, t1, t2, t3, t4, t5, t6, t7,
    coefficients, d_total_ptr, d_normed_ptr, partial_ptr, rows, eps, scale,
    STREAMS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TOTAL: tl.constexpr, NORM: tl.constexpr, THROUGH: tl.constexpr, WANTED: tl.constexpr, SUMS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """THROUGH and WANTED have a bit for each stream: whether it has a gradient from later uses, and whether its own is
    asked for. SUMS: the coefficients' are."""
    wait_for_previous(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    # One accumulator a coefficient row; unused ones are dropped by the compiler.
    a0 = tl.zeros((ROWS, BLOCK), tl.float32)
    a1 = tl.zeros((ROWS, BLOCK), tl.float32)
    a2 = tl.zeros((ROWS, BLOCK), tl.float32)
    a3 = tl.zeros((ROWS, BLOCK), tl.float32)
    a4 = tl.zeros((ROWS, BLOCK), tl.float32)
    a5 = tl.zeros((ROWS, BLOCK), tl.float32)
    a6 = tl.zeros((ROWS, BLOCK), tl.float32)
    a7 = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        offsets = row.to(tl.int64)[:, None] * DIM + columns[None, :]
        grad = tl.zeros((ROWS, BLOCK), tl.float32)
        if TOTAL:
            grad += tl.load(d_total_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if NORM:
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for k in tl.static_range(STREAMS):
                weight = _weight(coefficients, k, columns, inside, DIM)
                pointer = _pick(s0, s1, s2, s3, s4, s5, s6, s7, k)
                total += weight[None, :] * tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
            d_normed = tl.load(d_normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            r = tl.rsqrt(tl.sum(total * total, axis=1) / DIM + eps)
            inner = tl.sum(d_normed * total, axis=1) / DIM
            grad += scale * r[:, None] * (d_normed - total * (r * r * inner)[:, None])
        for k in tl.static_range(STREAMS):
            if (WANTED >> k) & 1:
                d_stream = _weight(coefficients, k, columns, inside, DIM)[None, :] * grad
                if (THROUGH >> k) & 1:
                    later = _pick(t0, t1, t2, t3, t4, t5, t6, t7, k)
                    d_stream += tl.load(later + offsets, mask=mask, other=0.0).to(tl.float32)
                target = _pick(g0, g1, g2, g3, g4, g5, g6, g7, k)
                tl.store(target + offsets, d_stream.to(target.dtype.element_ty), mask=mask)
            if SUMS:
                # Read again rather than kept: the tile is in L1, and registers decide how many rows are in flight.
                source = _pick(s0, s1, s2, s3, s4, s5, s6, s7, k)
                product = grad * tl.load(source + offsets, mask=mask, other=0.0).to(tl.float32)
                if k == 0:
                    a0 += product
                elif k == 1:
                    a1 += product
                elif k == 2:
                    a2 += product
                elif k == 3:
                    a3 += product
                elif k == 4:
                    a4 += product
                elif k == 5:
                    a5 += product
                elif k == 6:
                    a6 += product
                else:
                    a7 += product
    if SUMS:
        partial = partial_ptr + tl.program_id(0) * STREAMS * DIM + columns
        for k in tl.static_range(STREAMS):
            tl.store(partial + k * DIM, tl.sum(_pick(a0, a1, a2, a3, a4, a5, a6, a7, k), axis=0), mask=inside)


@triton.jit
def _norm_kernel(x_ptr, normed_ptr, inverse_ptr, rows, eps, scale,
                 DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait_for_previous(PDL)
    columns = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (columns < DIM)[None, :]
        offsets = row.to(tl.int64)[:, None] * DIM + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
        tl.store(normed_ptr + offsets, (x * (scale * inverse)[:, None]).to(normed_ptr.dtype.element_ty), mask=mask)
        tl.store(inverse_ptr + row, inverse, mask=row < rows)


@triton.jit
def _norm_backward_kernel(d_normed_ptr, normed_ptr, inverse_ptr, through_ptr, d_ptr, rows, scale, unscale,
                          THROUGH: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
                          ROWS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    wait_for_previous(PDL)
    columns = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (columns < DIM)[None, :]
        offsets = row.to(tl.int64)[:, None] * DIM + columns[None, :]
        unit = tl.load(normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * unscale
        d = tl.load(d_normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        factor = scale * tl.load(inverse_ptr + row, mask=row < rows, other=0.0)
        d = factor[:, None] * (d - unit * (tl.sum(d * unit, axis=1) / DIM)[:, None])
        if THROUGH:
            d += tl.load(through_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_ptr + offsets, d.to(d_ptr.dtype.element_ty), mask=mask)


def _pad(tensors: list[Tensor]) -> list[Tensor]:
    return tensors + [tensors[0]] * (8 - len(tensors))


def _programs(rows: int, tile: int, tensor: Tensor, per_multiprocessor: int) -> int:
    return max(1, min(triton.cdiv(rows, tile), _triton_op.grid_size(tensor) * per_multiprocessor))


def forward(
    streams: list[Tensor],
    coefficients: Tensor,
    scale: float,
    eps: float,
    with_total: bool,
    with_norm: bool,
    launch: Launch,
) -> tuple[Tensor, Tensor]:
    first = streams[0]
    dim = first.shape[-1]
    rows = first.numel() // dim
    total, normed = (torch.empty_like(first) if wanted else first.new_empty(0) for wanted in (with_total, with_norm))
    if rows == 0:
        return total, normed
    block = triton.next_power_of_2(dim)
    launch = launch.for_width(block)
    grid = (_programs(rows, launch.rows, first, launch.programs),)
    with torch.cuda.device_of(first):
        _forward_kernel[grid](
            *_pad(streams), coefficients, total, normed, rows, eps, scale,
            STREAMS=len(streams), DIM=dim, BLOCK=block, ROWS=launch.rows,
            TOTAL=with_total, NORM=with_norm, num_warps=launch.warps, **pdl(first),
        )  # fmt: skip
    return total, normed


def backward(
    streams: list[Tensor],
    coefficients: Tensor,
    d_total: Tensor | None,
    d_normed: Tensor | None,
    through: list[Tensor | None],
    scale: float,
    eps: float,
    wanted: list[bool],
    launch: Launch,
) -> tuple[list[Tensor], Tensor]:
    first = streams[0]
    dim = first.shape[-1]
    rows = first.numel() // dim
    sums = wanted[0]
    d_streams = [torch.empty_like(s) if want else s.new_empty(0) for s, want in zip(streams, wanted[1:], strict=True)]
    if rows == 0:
        return d_streams, torch.zeros_like(coefficients) if sums else coefficients.new_empty(0)
    block = triton.next_power_of_2(dim)
    launch = launch.for_width(block)
    programs = _programs(rows, launch.rows, first, launch.programs)
    partial = first.new_empty((programs, len(streams), dim) if sums else 1, dtype=torch.float32)
    with torch.cuda.device_of(first):
        _backward_kernel[(programs,)](
            *_pad(streams), *_pad(d_streams), *_pad([first if t is None else t for t in through]),
            coefficients, first if d_total is None else d_total,
            first if d_normed is None else d_normed, partial, rows, eps, scale,
            STREAMS=len(streams), DIM=dim, BLOCK=block, ROWS=launch.rows,
            TOTAL=d_total is not None, NORM=d_normed is not None,
            THROUGH=_bits(t is not None for t in through), WANTED=_bits(wanted[1:]), SUMS=sums,
            num_warps=launch.warps, **pdl(first),
        )  # fmt: skip
    if not sums:
        return d_streams, coefficients.new_empty(0)
    return d_streams, sum_rows(partial.flatten(1)).view_as(coefficients).to(coefficients.dtype)


def _bits(flags: Iterable[bool]) -> int:
    return sum(1 << k for k, flag in enumerate(flags) if flag)


def norm(x: Tensor, scale: float, eps: float, launch: Launch) -> tuple[Tensor, Tensor]:
    """(n, 1 / rms [rows] in fp32)."""
    dim = x.shape[-1]
    rows, block = x.numel() // dim, triton.next_power_of_2(dim)
    launch = launch.for_width(block)
    normed, inverse = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    if rows:
        with torch.cuda.device_of(x):
            _norm_kernel[(_programs(rows, launch.rows, x, launch.programs),)](
                x, normed, inverse, rows, eps, scale, DIM=dim, BLOCK=block,
                ROWS=launch.rows, num_warps=launch.warps, **pdl(x),
            )  # fmt: skip
    return normed, inverse


def norm_backward(
    d_normed: Tensor, normed: Tensor, inverse: Tensor, through: Tensor | None, scale: float, launch: Launch
) -> Tensor:
    """The gradient of x, plus `through`."""
    dim, rows = normed.shape[-1], len(inverse)
    block = triton.next_power_of_2(dim)
    launch = launch.for_width(block)
    d_x = torch.empty_like(normed)
    if rows:
        with torch.cuda.device_of(normed):
            _norm_backward_kernel[(_programs(rows, launch.rows, normed, launch.programs),)](
                d_normed, normed, inverse, normed if through is None else through, d_x, rows, scale, 1.0 / scale,
                THROUGH=through is not None, DIM=dim, BLOCK=block, ROWS=launch.rows,
                num_warps=launch.warps, **pdl(normed),
            )  # fmt: skip
    return d_x
