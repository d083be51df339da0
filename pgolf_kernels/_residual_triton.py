"""Triton kernels of residual.py: persistent programs over tiles of whole rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels import _triton_op
from pgolf_kernels._triton_op import pdl
from pgolf_kernels._triton_tile import sum_rows, wait_for_previous
from pgolf_kernels.residual import wanted_like

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
    s0, s1, s2, s3, s4, s5, s6, s7, coefficients, total_ptr, normed_ptr, inverse_ptr, rows, eps, scale,
    STREAMS: tl.constexpr, WEIGHTED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TOTAL: tl.constexpr, NORM: tl.constexpr, INVERSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        offsets = row.to(tl.int64)[:, None] * DIM + columns[None, :]
        if WEIGHTED:
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            for k in tl.static_range(STREAMS):
                weight = _weight(coefficients, k, columns, inside, DIM)
                pointer = _pick(s0, s1, s2, s3, s4, s5, s6, s7, k)
                total += weight[None, :] * tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            total = tl.load(s0 + offsets, mask=mask, other=0.0).to(tl.float32)
        if TOTAL:
            tl.store(total_ptr + offsets, total.to(total_ptr.dtype.element_ty), mask=mask)
        if NORM:
            inverse = tl.rsqrt(tl.sum(total * total, axis=1) / DIM + eps)
            normed = total * (scale * inverse)[:, None]
            tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=mask)
            if INVERSE:
                tl.store(inverse_ptr + row, inverse, mask=row < rows)


@triton.jit
def _hand_out(grad, weight, target, later, offsets, mask, THROUGH: tl.constexpr):
    """A stream's gradient: the sum's times its coefficient, plus what comes from its later uses."""
    grad *= weight
    if THROUGH:
        grad += tl.load(later + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(target + offsets, grad.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    s0, s1, s2, s3, s4, s5, s6, s7, g0, g1, g2, g3, g4, g5, g6, g7, t0, t1, t2, t3, t4, t5, t6, t7,
    coefficients, d_total_ptr, d_normed_ptr, partial_ptr, rows, eps, scale,
    STREAMS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TOTAL: tl.constexpr, NORM: tl.constexpr, THROUGH: tl.constexpr, WANTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of the streams and of their coefficients, from the streams. THROUGH and WANTED have a bit for each
    stream: whether it has a gradient from later uses, and whether its own is asked for."""
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
                weight = _weight(coefficients, k, columns, inside, DIM)[None, :]
                target = _pick(g0, g1, g2, g3, g4, g5, g6, g7, k)
                later = _pick(t0, t1, t2, t3, t4, t5, t6, t7, k)
                _hand_out(grad, weight, target, later, offsets, mask, (THROUGH >> k) & 1)
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
    partial = partial_ptr + tl.program_id(0) * STREAMS * DIM + columns
    for k in tl.static_range(STREAMS):
        tl.store(partial + k * DIM, tl.sum(_pick(a0, a1, a2, a3, a4, a5, a6, a7, k), axis=0), mask=inside)


@triton.jit
def _frozen_backward_kernel(
    d_total_ptr, d_normed_ptr, normed_ptr, inverse_ptr, coefficients,
    g0, g1, g2, g3, g4, g5, g6, g7, t0, t1, t2, t3, t4, t5, t6, t7, rows, scale, unscale,
    STREAMS: tl.constexpr, WEIGHTED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    TOTAL: tl.constexpr, NORM: tl.constexpr, THROUGH: tl.constexpr, WANTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gradients of the streams, from the norm and 1 / rms."""
    wait_for_previous(PDL)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        offsets = row.to(tl.int64)[:, None] * DIM + columns[None, :]
        grad = tl.zeros((ROWS, BLOCK), tl.float32)
        if NORM:
            unit = tl.load(normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * unscale
            grad = tl.load(d_normed_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            factor = scale * tl.load(inverse_ptr + row, mask=row < rows, other=0.0)
            grad = factor[:, None] * (grad - unit * (tl.sum(grad * unit, axis=1) / DIM)[:, None])
        if TOTAL:
            grad += tl.load(d_total_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        for k in tl.static_range(STREAMS):
            if (WANTED >> k) & 1:
                weight = 1.0
                if WEIGHTED:
                    weight = _weight(coefficients, k, columns, inside, DIM)[None, :]
                target = _pick(g0, g1, g2, g3, g4, g5, g6, g7, k)
                later = _pick(t0, t1, t2, t3, t4, t5, t6, t7, k)
                _hand_out(grad, weight, target, later, offsets, mask, (THROUGH >> k) & 1)


def _pad(tensors: Sequence[Tensor | None], stand_in: Tensor) -> list[Tensor]:
    """Eight tensors, `stand_in` where there is none: `_pick` takes no None."""
    return [stand_in if t is None else t for t in (*tensors, *[None] * (8 - len(tensors)))]


def _programs(rows: int, tile: int, tensor: Tensor, per_multiprocessor: int) -> int:
    return max(1, min(triton.cdiv(rows, tile), _triton_op.grid_size(tensor) * per_multiprocessor))


def forward(
    streams: list[Tensor],
    coefficients: Tensor | None,
    scale: float,
    eps: float,
    with_total: bool,
    with_norm: bool,
    with_inverse: bool,
    launch: Launch,
) -> tuple[Tensor, Tensor, Tensor]:
    first = streams[0]
    dim = first.shape[-1]
    rows = first.numel() // dim
    total, normed = (torch.empty_like(first) if wanted else first.new_empty(0) for wanted in (with_total, with_norm))
    inverse = first.new_empty(rows if with_inverse else 0, dtype=torch.float32)
    if rows:
        block = triton.next_power_of_2(dim)
        launch = launch.for_width(block)
        with torch.cuda.device_of(first):
            _forward_kernel[(_programs(rows, launch.rows, first, launch.programs),)](
                *_pad(streams, first), coefficients, total, normed, inverse, rows, eps, scale,
                STREAMS=len(streams), WEIGHTED=coefficients is not None, DIM=dim, BLOCK=block, ROWS=launch.rows,
                TOTAL=with_total, NORM=with_norm, INVERSE=with_inverse, num_warps=launch.warps, **pdl(first),
            )  # fmt: skip
    return total, normed, inverse


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
) -> list[Tensor]:
    """[gradient of each stream..., of the coefficients]."""
    first = streams[0]
    dim = first.shape[-1]
    rows = first.numel() // dim
    d_streams = wanted_like(first, wanted)
    if rows == 0:
        return [*d_streams, torch.zeros_like(coefficients)]
    block = triton.next_power_of_2(dim)
    launch = launch.for_width(block)
    programs = _programs(rows, launch.rows, first, launch.programs)
    partial = first.new_empty((programs, len(streams), dim), dtype=torch.float32)
    with torch.cuda.device_of(first):
        _backward_kernel[(programs,)](
            *_pad(streams, first), *_pad(d_streams, first), *_pad(through, first),
            coefficients, d_total, d_normed, partial, rows, eps, scale,
            STREAMS=len(streams), DIM=dim, BLOCK=block, ROWS=launch.rows,
            TOTAL=d_total is not None, NORM=d_normed is not None, **_bits(through, wanted),
            num_warps=launch.warps, **pdl(first),
        )  # fmt: skip
    return [*d_streams, sum_rows(partial.flatten(1)).view_as(coefficients).to(coefficients.dtype)]


def frozen_backward(
    d_total: Tensor | None,
    d_normed: Tensor | None,
    normed: Tensor,
    inverse: Tensor,
    coefficients: Tensor | None,
    through: list[Tensor | None],
    scale: float,
    wanted: list[bool],
    launch: Launch,
) -> list[Tensor]:
    """The gradient of each stream."""
    first = d_total if d_normed is None else d_normed
    dim = first.shape[-1]
    rows = first.numel() // dim
    d_streams = wanted_like(first, wanted)
    if rows:
        block = triton.next_power_of_2(dim)
        launch = launch.for_width(block)
        with torch.cuda.device_of(first):
            _frozen_backward_kernel[(_programs(rows, launch.rows, first, launch.programs),)](
                d_total, d_normed, normed, inverse, coefficients, *_pad(d_streams, first), *_pad(through, first),
                rows, scale, 1.0 / scale,
                STREAMS=len(wanted), WEIGHTED=coefficients is not None, DIM=dim, BLOCK=block, ROWS=launch.rows,
                TOTAL=d_total is not None, NORM=d_normed is not None, **_bits(through, wanted),
                num_warps=launch.warps, **pdl(first),
            )  # fmt: skip
    return d_streams


def _bits(through: list[Tensor | None], wanted: list[bool]) -> dict[str, int]:
    flags = {"THROUGH": [t is not None for t in through], "WANTED": wanted}
    return {name: sum(flag << k for k, flag in enumerate(bits)) for name, bits in flags.items()}
