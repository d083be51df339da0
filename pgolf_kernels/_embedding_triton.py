"""Triton kernels of embedding.py: sums of gradient rows by segment of the sorted indices.

`_tiles_kernel` takes CHUNK sorted positions and some columns. Segment s of the tile is the s-th run of equal indices;
the matrix [s = segment of position] times the gradient rows gives all segments' sums at once, exact products summed in
fp32. A segment that lies within the tile is written; one that reaches beyond it leaves its part for `_joins_kernel`,
whose programs take a segment each, where it begins, and add its parts in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # sorted positions a tile
COLUMNS = {2: 128, 4: 16}  # of a tile, by bytes an element: fp32 products without rounding use no matrix units
PARTS = 16  # parts of a segment that are added at a time


@triton.jit(do_not_specialize=["count"])
def _tiles_kernel(
    grad_ptr, ids_ptr, order_ptr, out_ptr, part_ptr, count, grad_stride,
    DIM: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    i = tl.arange(0, CHUNK)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = first + i < count
    index = tl.load(ids_ptr + first + i, mask=inside, other=-1).to(tl.int32)
    before = tl.load(ids_ptr + first + i - 1, mask=inside & (first + i > 0), other=-1).to(tl.int32)
    after = tl.load(ids_ptr + first + CHUNK, mask=first + CHUNK < count, other=-1).to(tl.int32)
    segment = tl.cumsum((inside & ((index != before) | (i == 0))).to(tl.int32), 0) - 1
    member = (segment[None, :] == i[:, None]) & inside[None, :]
    order = tl.load(order_ptr + first + i, mask=inside, other=0)
    rows = tl.load(
        grad_ptr + order[:, None] * grad_stride + column[None, :],
        mask=inside[:, None] & (column < DIM)[None, :],
        other=0.0,
    )
    sums = tl.dot(member.to(rows.dtype), rows, input_precision="ieee")
    row = tl.max(tl.where(member, index[None, :], -1), axis=1)  # of each segment; -1: there is none
    begins_before = (i == 0) & (tl.max(tl.where(i == 0, before, -1), axis=0) == row)
    goes_on = row == after
    whole = (row >= 0) & ~begins_before & ~goes_on
    columns = (column < DIM)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * DIM + column[None, :], sums, mask=whole[:, None] & columns)
    slot = (2 * chunk + tl.where(begins_before, 0, 1)).to(tl.int64)
    cut = (row >= 0) & (begins_before | goes_on)
    tl.store(part_ptr + slot[:, None] * DIM + column[None, :], sums, mask=cut[:, None] & columns)


@triton.jit(do_not_specialize=["count"])
def _joins_kernel(
    ids_ptr, out_ptr, part_ptr, count, DIM: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """The segment that begins in this chunk and reaches beyond it, if there is one."""
    chunk = tl.program_id(0)
    end = (chunk + 1) * CHUNK
    last = tl.load(ids_ptr + end - 1, mask=end < count, other=-1).to(tl.int32)
    after = tl.load(ids_ptr + end, mask=end < count, other=-2).to(tl.int32)
    head = tl.load(ids_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1).to(tl.int32)
    if (last == after) & (head != last):
        column = tl.arange(0, BLOCK)
        inside = column < DIM
        total = tl.load(part_ptr + (2 * chunk + 1).to(tl.int64) * DIM + column, mask=inside, other=0.0)
        first = chunk + 1
        more = 1
        while more > 0:
            k = first + tl.arange(0, PARTS)
            mine = tl.load(ids_ptr + k * CHUNK, mask=k * CHUNK < count, other=-1).to(tl.int32) == last
            parts = part_ptr + (2 * k).to(tl.int64)[:, None] * DIM + column[None, :]
            total += tl.sum(tl.load(parts, mask=mine[:, None] & inside[None, :], other=0.0), axis=0)
            more = tl.min(mine.to(tl.int32), axis=0)
            first += PARTS
        tl.store(out_ptr + last.to(tl.int64) * DIM + column, total, mask=inside)


def backward(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """[rows, D] in fp32: the sums of grad [N, D] by ids [N], int64."""
    count, dim = grad.shape
    narrow = torch.int16 if rows <= 1 << 15 else torch.int32  # a radix sort costs a pass a byte
    keys, order = ids.to(narrow).sort(stable=True)
    chunks, columns = triton.cdiv(count, CHUNK), COLUMNS[grad.element_size()]
    out = torch.zeros((rows, dim), dtype=torch.float32, device=grad.device)
    parts = torch.empty((2 * chunks, dim), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        _tiles_kernel[(chunks, triton.cdiv(dim, columns))](
            grad, keys, order, out, parts, count, grad.stride(0), DIM=dim, CHUNK=CHUNK, COLUMNS=columns, num_warps=4
        )
        _joins_kernel[(chunks,)](
            keys, out, parts, count, DIM=dim, CHUNK=CHUNK, BLOCK=triton.next_power_of_2(dim), PARTS=PARTS, num_warps=4
        )
    return out
