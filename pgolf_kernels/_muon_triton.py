"""Triton kernels of muon.py.

A program of `_direction_kernel` takes some rows of one matrix whole, some columns at a time: it steps the momentum,
writes u as it is, wide, and each row's sum of squares. `_scale_kernel` makes both norms of those and divides by them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels._triton_op import block_at_least, pdl
from pgolf_kernels._triton_tile import wait_for_previous
from pgolf_kernels.muon import EPSILON

# Tiles: rows, and columns (at most the bank's). Wide ones read 2 KiB of a row at a time; tall ones write 64 contiguous
# elements of X, 128 bytes, and read 256 of a row. With these the loads in flight on a multiprocessor of sm_90 are some
# 90 KB, and all programs of [11, 2048, 512] are resident at a time. H200: of 28 other shapes none takes more than 1 %
# off.
DIRECTION, APPLY, TALL, SCALE = (4, 512), (8, 512), (64, 64), (32, 256)
WARPS = 4
CHUNK = 1024  # rows whose squares are read at a time


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(matrix, first row, first column) of this program's tile of stacked matrices [n, rows, columns]."""
    across = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * across
    tile = tl.program_id(0) % tiles
    return (tl.program_id(0) // tiles).to(tl.int64), tile // across * ROWS, tile % across * COLUMNS


@triton.jit
def _offsets(stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a tile's elements from its first one: 32 bits suffice, and leave registers."""
    return tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _inverse_norm(squares, EPSILON: tl.constexpr):
    return 1.0 / tl.maximum(tl.sqrt(squares), EPSILON)


@triton.jit
def _direction_kernel(
    g_ptr, m_ptr, factor_ptr, u_ptr, square_ptr, rows, columns, momentum,
    FACTOR: tl.constexpr, TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    matrix, first_row, _ = _tile(rows, 1, ROWS, 1)
    row = first_row + tl.arange(0, ROWS)
    bank = (matrix * rows + first_row) * columns
    factor = 1.0
    if FACTOR:
        factor = tl.load(factor_ptr).to(tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        inside = _offsets(columns, ROWS, COLUMNS)
        g = factor * tl.load(g_ptr + (bank + first) + inside, mask=mask, other=0.0)
        m = momentum * tl.load(m_ptr + (bank + first) + inside, mask=mask, other=0.0) + g
        tl.store(m_ptr + (bank + first) + inside, m, mask=mask)
        u = g + momentum * m
        squares += tl.sum(u * u, axis=1)
        u = u.to(u_ptr.dtype.element_ty)
        if TALL:
            wide = (matrix * columns + first) * rows + first_row
            tl.store(u_ptr + wide + _offsets(rows, COLUMNS, ROWS), tl.trans(u), mask=tl.trans(mask))
        else:
            tl.store(u_ptr + (bank + first) + inside, u, mask=mask)
    tl.store(square_ptr + matrix * rows + row, squares, mask=row < rows)


@triton.jit
def _scale_kernel(
    u_ptr, square_ptr, x_ptr, rows, columns,
    ROW_NORMALIZE: tl.constexpr, TALL: tl.constexpr, EPSILON: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of wide matrices [rows, columns]; TALL: the squares are those of their columns, the bank's rows."""
    wait_for_previous(PDL)
    matrix, first_row, first_column = _tile(rows, columns, ROWS, COLUMNS)
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    first = (matrix * rows + first_row) * columns + first_column
    inside = _offsets(columns, ROWS, COLUMNS)
    u = tl.load(u_ptr + first + inside, mask=mask, other=0.0).to(tl.float32)
    count = columns if TALL else rows
    square_ptr += matrix * count
    total = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, count, CHUNK):
        i = start + tl.arange(0, CHUNK)
        squares = tl.load(square_ptr + i, mask=i < count, other=0.0)
        if ROW_NORMALIZE:
            inverse = _inverse_norm(squares, EPSILON)
            squares = squares * inverse * inverse
        total += squares
    u *= 1.0 / (tl.sqrt(tl.sum(total, axis=0)) + EPSILON)
    if ROW_NORMALIZE:
        if TALL:
            u *= _inverse_norm(tl.load(square_ptr + column, mask=column < columns, other=0.0), EPSILON)[None, :]
        else:
            u *= _inverse_norm(tl.load(square_ptr + row, mask=row < rows, other=0.0), EPSILON)[:, None]
    tl.store(x_ptr + first + inside, u.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _apply_kernel(
    w_ptr, x_ptr, rows, columns, keep, rate,
    TALL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_previous(PDL)
    matrix, first_row, first_column = _tile(rows, columns, ROWS, COLUMNS)
    row, column = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    first = (matrix * rows + first_row) * columns + first_column
    inside = _offsets(columns, ROWS, COLUMNS)
    w = tl.load(w_ptr + first + inside, mask=mask, other=0.0).to(tl.float32)
    if TALL:
        wide = (matrix * columns + first_column) * rows + first_row
        x = tl.trans(tl.load(x_ptr + wide + _offsets(rows, COLUMNS, ROWS), mask=tl.trans(mask), other=0.0))
    else:
        x = tl.load(x_ptr + first + inside, mask=mask, other=0.0)
    tl.store(w_ptr + first + inside, (keep * w - rate * x.to(tl.float32)).to(w_ptr.dtype.element_ty), mask=mask)


def _columns(tile: tuple[int, int], columns: int) -> int:
    return block_at_least(columns, 16, tile[1])


def _tiles(shape: torch.Size, tile: tuple[int, int]) -> tuple[int]:
    count, rows, columns = shape
    return (count * triton.cdiv(rows, tile[0]) * triton.cdiv(columns, _columns(tile, columns)),)


def direction(
    gradient: Tensor, buffer: Tensor, momentum: float, factor: Tensor | None, row_normalize: bool, out: Tensor
) -> None:
    """One bank [n, rows, cols]: steps its momentum and fills `out` [n, min(rows, cols), max(rows, cols)]."""
    count, rows, columns = gradient.shape
    tall = rows > columns
    # Raw gradients may be too small for fp16, not for bf16.
    u = torch.empty_like(out, dtype=torch.float32) if out.dtype == torch.float16 else out
    squares = gradient.new_empty((count, rows))
    tile = TALL if tall else DIRECTION
    with torch.cuda.device_of(gradient):
        _direction_kernel[(count * triton.cdiv(rows, tile[0]),)](
            gradient, buffer, factor, u, squares, rows, columns, momentum,
            FACTOR=factor is not None, TALL=tall, ROWS=tile[0], COLUMNS=_columns(tile, columns),
            num_warps=WARPS, **pdl(gradient),
        )  # fmt: skip
        _scale_kernel[_tiles(out.shape, SCALE)](
            u, squares, out, *out.shape[1:], ROW_NORMALIZE=row_normalize, TALL=tall, EPSILON=EPSILON,
            ROWS=SCALE[0], COLUMNS=_columns(SCALE, out.shape[2]), CHUNK=CHUNK, num_warps=WARPS, **pdl(out),
        )  # fmt: skip


def apply(weight: Tensor, update: Tensor, keep: float, rate: float) -> None:
    """One bank, in place."""
    _, rows, columns = weight.shape
    tall = rows > columns
    tile = TALL if tall else APPLY
    with torch.cuda.device_of(weight):
        _apply_kernel[_tiles(weight.shape, tile)](
            weight, update, rows, columns, keep, rate,
            TALL=tall, ROWS=tile[0], COLUMNS=_columns(tile, columns), num_warps=WARPS, **pdl(weight),
        )  # fmt: skip
