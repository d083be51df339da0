"""Triton kernels of batched_lora.py.

`_project_kernel` is one persistent matrix product whose depth runs through several pairs of operands: up to three
shared ones (x W^T in the forward, g_p W_p in the backward) and at last one pair by document, [s][B_b]^T or [e][A_b].
Which pair a step reads is a select between tensor-map descriptors, so that the copy engine's pipeline never drains
between them. With no shared pair it is the product that shrinks x to the ranks. `_outer_kernel` sums u^T v over each
adapter's rows, or takes the optimiser's step with that sum instead of writing it (stepped_lora.py).

Dense batches are described as [documents, T, columns]: the copy engine then fills rows past a document's end with zeros
and drops them when storing, whatever T is. Packed batches take their tiles from a map that one small kernel computes,
so that no length reaches the host.
"""

# Conditions on constants are folded when a kernel is compiled and may not be joined with conditions on values.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels._adapter_adamw_triton import adamw
from pgolf_kernels._triton_op import block_at_least, descriptor, grid_size
from pgolf_kernels._triton_tile import described, new_described, strip
from pgolf_kernels.batched_lora import Layout, low_size, padded
from pgolf_kernels.stepped_lora import AdamStep, Moments

MAX_SHARED = 3  # pairs of shared operands in one product


@dataclass(frozen=True)
class LoraConfig:
    """Launch knobs: rows and columns of a tile, depth a step, strips a tile is written in, pipeline stages, warps."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    strips: int = 2
    stages: int = 4
    warps: int = 8


PROJECT = LoraConfig()
SHRINK = LoraConfig(columns=128, depth=128, strips=1, stages=3)
OUTER = LoraConfig(columns=128, stages=3)
# H200, a layer's adapters of 64 documents of 96 rows: 227 us; 128 rows and 8 warps 276, 16 columns a strip 299.
STEP = LoraConfig(rows=64, columns=128, strips=4, stages=3, warps=4)
CAST_TILE = 8192  # elements a program casts


@triton.jit(do_not_specialize=["rows", "documents"])
def _map_kernel(cu_ptr, index_ptr, map_ptr, count_ptr, rows, documents,
                INDEX: tl.constexpr, DOCUMENTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """For each tile of BM rows that no document shares: (first row, end of its document, adapter).

    Rows past the last bound are one more document, with adapter -1.
    """
    document = tl.arange(0, DOCUMENTS)
    start = tl.load(cu_ptr + document, mask=document <= documents, other=0)
    end = tl.load(cu_ptr + document + 1, mask=document < documents, other=0)
    end = tl.where(document == documents, rows, end)
    tiles = tl.where(document <= documents, (end - start + BM - 1) // BM, 0)
    upto = tl.cumsum(tiles, 0)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = (upto[None, :] > tile[:, None]) & (upto[None, :] - tiles[None, :] <= tile[:, None])
    first = tl.sum(tl.where(mine, start[None, :] + (tile[:, None] - upto[None, :] + tiles[None, :]) * BM, 0), axis=1)
    last = tl.sum(tl.where(mine, end[None, :], 0), axis=1)
    owner = tl.sum(tl.where(mine, document[None, :], 0), axis=1)
    adapter = owner
    if INDEX:
        adapter = tl.load(index_ptr + owner, mask=owner < documents, other=0).to(tl.int32)
    adapter = tl.where(owner == documents, -1, adapter)
    total = tl.sum(tiles)
    tl.store(map_ptr + tile * 3, first, mask=tile < total)
    tl.store(map_ptr + tile * 3 + 1, last, mask=tile < total)
    tl.store(map_ptr + tile * 3 + 2, adapter, mask=tile < total)
    tl.store(count_ptr, total)


@triton.jit(do_not_specialize=["length", "documents"])
def _project_kernel(
    a0_desc, w0_desc, a1_desc, w1_desc, a2_desc, w2_desc, s_desc, l_desc, y_desc, residual_desc,
    y_ptr, residual_ptr, map_ptr, count_ptr, index_ptr, length, documents, columns, y_stride, s_column, scale,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr, INDEX: tl.constexpr, RESIDUAL: tl.constexpr, STRIPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y = sum_i a_i w_i^T + s l_b^T (+ residual); TRANSPOSED: w_i and l_b instead of their transposes."""
    S0: tl.constexpr = (D0 + BK - 1) // BK
    S1: tl.constexpr = S0 + (D1 + BK - 1) // BK
    S2: tl.constexpr = S1 + (D2 + BK - 1) // BK
    tiles_n = tl.cdiv(columns, BN)
    per_document = tl.cdiv(length, BM)
    if PACKED:
        tiles = tl.load(count_ptr) * tiles_n
    else:
        tiles = documents * per_document * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        n = (tile % tiles_n) * BN
        block = tile // tiles_n
        if PACKED:
            document = 0
            m = tl.load(map_ptr + block * 3)
            end = tl.load(map_ptr + block * 3 + 1)
            adapter = tl.load(map_ptr + block * 3 + 2)
        else:
            document = block // per_document
            m = (block % per_document) * BM
            end = length
            adapter = document
            if INDEX:
                adapter = tl.load(index_ptr + document).to(tl.int32)
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, S2 + (RANK + BK - 1) // BK):
            a_desc, w_desc, k, column, plane = s_desc, l_desc, (step - S2) * BK, s_column, tl.maximum(adapter, 0)
            if D2 > 0:
                if step < S2:
                    a_desc, w_desc, k, column, plane = a2_desc, w2_desc, (step - S1) * BK, 0, 0
            if D1 > 0:
                if step < S1:
                    a_desc, w_desc, k, column, plane = a1_desc, w1_desc, (step - S0) * BK, 0, 0
            if D0 > 0:
                if step < S0:
                    a_desc, w_desc, k, column, plane = a0_desc, w0_desc, step * BK, 0, 0
            a = tl.reshape(a_desc.load([document, m, column + k]), (BM, BK))
            if TRANSPOSED:
                acc = tl.dot(a, tl.reshape(w_desc.load([plane, k, n]), (BK, BN)), acc)
            else:
                acc = tl.dot(a, tl.reshape(w_desc.load([plane, n, k]), (BN, BK)).T, acc)
        if D0 == 0:  # the factor belongs to a product by document alone; rows of no document get 0
            acc *= tl.where(adapter < 0, 0.0, scale)
        if PACKED:
            row = m + tl.arange(0, BM)
            column_n = n + tl.arange(0, BN)
            offsets = row.to(tl.int64)[:, None] * y_stride + column_n[None, :]
            mask = (row < end)[:, None] & (column_n < columns)[None, :]
            if RESIDUAL:
                acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            for i in tl.static_range(STRIPS):
                part = strip(acc, i, STRIPS, BM, BN)
                place = [document, m, n + i * (BN // STRIPS)]
                if RESIDUAL:
                    part += tl.reshape(residual_desc.load(place), (BM, BN // STRIPS)).to(tl.float32)
                y_desc.store(place, tl.reshape(part.to(y_desc.dtype), (1, BM, BN // STRIPS)))


@triton.jit(do_not_specialize=["columns0", "columns1", "columns2", "stride0", "stride1", "stride2",
                               "s_column1", "s_column2"])  # fmt: skip
def _project_three_kernel(
    a_desc, w0_desc, w1_desc, w2_desc, s_desc, l0_desc, l1_desc, l2_desc, y0_ptr, y1_ptr, y2_ptr, map_ptr, count_ptr,
    columns0, columns1, columns2, stride0, stride1, stride2, s_column1, s_column2,
    D: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y_p = a w_p^T + s_p l_p,b^T of three projections of a packed batch, whose tiles lie side by side.

    RANK is the largest: past a narrower l_p's end its descriptor reads zeros.
    """
    first1 = tl.cdiv(columns0, BN)
    first2 = first1 + tl.cdiv(columns1, BN)
    tiles_n = first2 + tl.cdiv(columns2, BN)
    S: tl.constexpr = (D + BK - 1) // BK
    tiles = tl.load(count_ptr) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block, number = tile // tiles_n, tile % tiles_n
        second, third = number >= first1, number >= first2
        n = (number - tl.where(third, first2, tl.where(second, first1, 0))) * BN
        m = tl.load(map_ptr + block * 3)
        end = tl.load(map_ptr + block * 3 + 1)
        own = tl.maximum(tl.load(map_ptr + block * 3 + 2), 0)
        s_column = tl.where(third, s_column2, tl.where(second, s_column1, 0))
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, S + (RANK + BK - 1) // BK):
            left_desc, right_desc, k, column, plane = s_desc, l0_desc, (step - S) * BK, s_column, own
            if third:
                right_desc = l2_desc
            elif second:
                right_desc = l1_desc
            if step < S:
                left_desc, right_desc, k, column, plane = a_desc, w0_desc, step * BK, 0, 0
                if third:
                    right_desc = w2_desc
                elif second:
                    right_desc = w1_desc
            left = tl.reshape(left_desc.load([0, m, column + k]), (BM, BK))
            acc = tl.dot(left, tl.reshape(right_desc.load([plane, n, k]), (BN, BK)).T, acc)
        y_ptr, columns, stride = y0_ptr, columns0, stride0
        if third:
            y_ptr, columns, stride = y2_ptr, columns2, stride2
        elif second:
            y_ptr, columns, stride = y1_ptr, columns1, stride1
        row, column_n = m + tl.arange(0, BM), n + tl.arange(0, BN)
        offsets = row.to(tl.int64)[:, None] * stride + column_n[None, :]
        mask = (row < end)[:, None] & (column_n < columns)[None, :]
        tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate(u_desc, v_desc, acc, document, start, end, u_column, v_column, MASKED: tl.constexpr, BK: tl.constexpr,
                BI: tl.constexpr, BJ: tl.constexpr):  # fmt: skip
    """acc + u^T v over rows [start, end); rows past the end are zero in a dense batch, masked in a packed one."""
    full = end
    if MASKED:
        full = start + (end - start) // BK * BK
    for row in range(start, full, BK):
        u = tl.reshape(u_desc.load([document, row, u_column]), (BK, BI))
        v = tl.reshape(v_desc.load([document, row, v_column]), (BK, BJ))
        acc = tl.dot(u.T, v, acc)
    if MASKED:
        if full < end:
            inside = (full + tl.arange(0, BK) < end)[:, None]
            u = tl.reshape(u_desc.load([document, full, u_column]), (BK, BI))
            v = tl.reshape(v_desc.load([document, full, v_column]), (BK, BJ))
            zero_u, zero_v = tl.zeros((BK, BI), u.dtype), tl.zeros((BK, BJ), v.dtype)
            acc = tl.dot(tl.where(inside, u, zero_u).T, tl.where(inside, v, zero_v), acc)
    return acc


@triton.jit
def _adamw_tile(
    acc, i, j, p_ptr, square_ptr, mean_ptr, low_ptr, rows, columns, stride, scale_ptr, is_b, inverse1, inverse2,
    lr, beta1, beta2, eps, keep,
    MOMENT: tl.constexpr, SCALED: tl.constexpr, STRIPS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """One AdamW step of a tile of A or B [rows, columns] with the gradient acc, strip by strip of its columns.

    `low` gets the new values in the activations' dtype. B's rows have a factor there, and so has B's gradient.
    """
    row = i + tl.arange(0, BI)
    if SCALED:
        factor = tl.load(scale_ptr + row, mask=(row < rows) & is_b, other=1.0)[:, None]
    for part in tl.static_range(STRIPS):
        gradient = strip(acc, part, STRIPS, BI, BJ)
        if SCALED:
            gradient *= factor
        column = j + part * (BJ // STRIPS) + tl.arange(0, BJ // STRIPS)
        offsets = row[:, None] * columns + column[None, :]
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        p = tl.load(p_ptr + offsets, mask=mask, other=0.0)
        square = tl.load(square_ptr + offsets, mask=mask, other=0.0)
        mean = gradient
        if MOMENT:
            mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
        p, square, mean = adamw(p, gradient, square, mean, inverse1, inverse2, lr, beta1, beta2, eps, keep, MOMENT)
        if MOMENT:
            tl.store(mean_ptr + offsets, mean, mask=mask)
        tl.store(square_ptr + offsets, square, mask=mask)
        tl.store(p_ptr + offsets, p, mask=mask)
        if SCALED:
            p *= factor
        tl.store(low_ptr + row[:, None] * stride + column[None, :], p.to(low_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["length", "documents", "rows0", "rows1", "u_column0", "v_column1", "tiles0"])
def _outer_kernel(
    u0_desc, v0_desc, out0_ptr, square0_ptr, mean0_ptr, low0_ptr, plane0, stride0, rows0, columns0, u_column0,
    u1_desc, v1_desc, out1_ptr, square1_ptr, mean1_ptr, low1_ptr, plane1, stride1, rows1, columns1, v_column1,
    tiles0, cu_ptr, index_ptr, length, documents, scale_ptr, step_ptr, factor_ptr, lr, beta1, beta2, eps, keep,
    PACKED: tl.constexpr, INDEX: tl.constexpr, STEP: tl.constexpr, MOMENT: tl.constexpr, SCALED: tl.constexpr,
    STRIPS: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[adapter] = sum of u^T v over the rows of the adapter's documents, [rows, columns]; two such sums at once.

    The first reads u from a column on, the second v: e and s hold the ranks of several projections. STEP: the sum is
    the gradient of a step of `out`, which an adapter whose count is 0 does not take; packed and without an index.
    """
    tile, adapter = tl.program_id(0), tl.program_id(1)
    works = True
    if STEP:
        works = tl.load(step_ptr + adapter) > 0
    if works:
        is_b = tile >= tiles0
        if is_b:
            u_desc, v_desc, out_ptr, rows, columns = u1_desc, v1_desc, out1_ptr, rows1, columns1
            u_column, v_column = 0, v_column1
            tile -= tiles0
        else:
            u_desc, v_desc, out_ptr, rows, columns = u0_desc, v0_desc, out0_ptr, rows0, columns0
            u_column, v_column = u_column0, 0
        tiles_j = tl.cdiv(columns, BJ)
        i = tile // tiles_j * BI
        j = tile % tiles_j * BJ
        first, last = adapter, tl.minimum(adapter + 1, documents)
        if INDEX:
            first, last = 0, documents
        acc = tl.zeros((BI, BJ), tl.float32)
        for d in range(first, last):
            document, start, end = d, 0, length
            if PACKED:
                document, start, end = 0, tl.load(cu_ptr + d), tl.load(cu_ptr + d + 1)
            if INDEX:
                if tl.load(index_ptr + d) != adapter:
                    end = start
            acc = _accumulate(u_desc, v_desc, acc, document, start, end, u_column + i, v_column + j, PACKED, BK, BI, BJ)
        out_ptr += adapter.to(tl.int64) * rows * columns
        if STEP:
            if is_b:
                square_ptr, low_ptr, plane, stride = square1_ptr, low1_ptr, plane1, stride1
            else:
                square_ptr, low_ptr, plane, stride = square0_ptr, low0_ptr, plane0, stride0
            square_ptr += adapter.to(tl.int64) * rows * columns
            mean_ptr = square_ptr
            if MOMENT:
                if is_b:
                    mean_ptr = mean1_ptr + adapter.to(tl.int64) * rows * columns
                else:
                    mean_ptr = mean0_ptr + adapter.to(tl.int64) * rows * columns
            inverse1, inverse2 = tl.load(factor_ptr + 2 * adapter), tl.load(factor_ptr + 2 * adapter + 1)
            _adamw_tile(
                acc, i, j, out_ptr, square_ptr, mean_ptr, low_ptr + adapter.to(tl.int64) * plane, rows, columns, stride,
                scale_ptr, is_b, inverse1, inverse2, lr, beta1, beta2, eps, keep, MOMENT, SCALED, STRIPS, BI, BJ,
            )  # fmt: skip
        else:
            row, column = i + tl.arange(0, BI), j + tl.arange(0, BJ)
            offsets = row[:, None] * columns + column[None, :]
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _cast_rows(
    source, target, tile, planes, rows, columns, padded_rows, padded_columns, plane_stride,
    BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Some rows of [planes, rows, columns] into planes of padded rows, zeros in the padding."""
    line = tile * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK)
    plane, row = (line // padded_rows).to(tl.int64), line % padded_rows
    for first in range(0, padded_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        exists = (line < planes * padded_rows)[:, None] & (column < padded_columns)[None, :]
        inside = exists & (row < rows)[:, None] & (column < columns)[None, :]
        value = tl.load(source + ((plane * rows + row) * columns)[:, None] + column[None, :], mask=inside, other=0.0)
        offsets = (plane * plane_stride + row * padded_columns)[:, None] + column[None, :]
        tl.store(target + offsets, value.to(target.dtype.element_ty), mask=exists)


@triton.jit
def _cast_kernel(
    a_ptr, b_ptr, low_a_ptr, low_b_ptr, tiles_a, adapters, rank, depth, padded_rank, padded_depth, plane_stride,
    out, rank_b, padded_rank_b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One projection's A and B in the activations' dtype."""
    tile = tl.program_id(0)
    if tile < tiles_a:
        _cast_rows(
            a_ptr, low_a_ptr, tile, adapters, rank, depth, padded_rank, padded_depth, plane_stride, BLOCK_A, TILE
        )
    else:
        _cast_rows(
            b_ptr,
            low_b_ptr,
            tile - tiles_a,
            adapters,
            out,
            rank_b,
            out,
            padded_rank_b,
            out * padded_rank_b,
            BLOCK_B,
            TILE,
        )


# ---- launches --------------------------------------------------------------------------------------------------------


def _views(lora_as: list[Tensor], lora_bs: list[Tensor], low: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A stacked [adapters, sum of padded ranks, in] and each projection's B [adapters, out, padded rank] in `low`."""
    adapters = lora_as[0].shape[0]
    ranks = [padded(a.shape[1], low.dtype) for a in lora_as]
    shapes = [(adapters, sum(ranks), padded(lora_as[0].shape[2], low.dtype))]
    shapes += [(adapters, b.shape[1], rank) for b, rank in zip(lora_bs, ranks, strict=True)]
    stacked, *own = (
        part.view(shape) for part, shape in zip(low.split([math.prod(n) for n in shapes]), shapes, strict=True)
    )
    return stacked, own


def _cast(lora_as: list[Tensor], lora_bs: list[Tensor], low: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Fills `low`, one launch a projection: ranks and columns are padded to 16 bytes with zeros. Returns its views."""
    stacked, own = _views(lora_as, lora_bs, low)
    (adapters, _, depth), row = stacked.shape, 0
    for a, b, target in zip(lora_as, lora_bs, own, strict=True):
        rank = target.shape[2]
        # B without padding may as well have long rows, which are copied in whole blocks.
        (_, out, width), padded_width = b.shape, rank
        if width == rank and out * width % 512 == 0:
            out, width, padded_width = out * width // 512, 512, 512
        blocks = [block_at_least(columns, 16, 512) for columns in (depth, padded_width)]
        tiles = [triton.cdiv(adapters * n, CAST_TILE // block) for n, block in zip((rank, out), blocks, strict=True)]
        _cast_kernel[(sum(tiles),)](
            a.contiguous(), b.contiguous(), stacked[:, row:], target, tiles[0], adapters,
            a.shape[1], a.shape[2], rank, depth, stacked.stride(0), out, width, padded_width,
            BLOCK_A=blocks[0], BLOCK_B=blocks[1], TILE=CAST_TILE, num_warps=8,
        )  # fmt: skip
        row += rank
    return stacked, own


@dataclass(frozen=True)
class _Tiles:
    """Where a batch's rows lie, as the kernels want it."""

    length: int  # rows a document, or all rows of a packed batch
    documents: int
    cu_seqlens: Tensor | None
    index: Tensor | None
    map: Tensor | None
    count: Tensor | None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def planes(self, tensor: Tensor) -> Tensor:
        """[N, columns] as [documents, rows, columns]; a packed batch is one plane."""
        return tensor.unsqueeze(0) if self.packed else tensor.unflatten(0, (self.documents, self.length))

    def blocks(self, rows: int) -> int:
        """Upper bound of the tiles of so many rows."""
        if self.packed:
            return triton.cdiv(self.length, rows) + self.documents + 1
        return self.documents * triton.cdiv(self.length, rows)


def tiles_of(x: Tensor, layout: Layout) -> _Tiles:
    if layout.cu_seqlens is None:
        return _Tiles(layout.rows, x.shape[0] // layout.rows, None, layout.index, None, None)
    rows, documents = x.shape[0], layout.cu_seqlens.shape[0] - 1
    most = triton.cdiv(rows, PROJECT.rows) + documents + 1
    table = torch.empty((most, 3), dtype=torch.int32, device=x.device)
    count = torch.empty((), dtype=torch.int32, device=x.device)
    block = 32
    _map_kernel[(triton.cdiv(most, block),)](
        layout.cu_seqlens, layout.index, table, count, rows, documents, INDEX=layout.index is not None,
        DOCUMENTS=block_at_least(documents + 1, 128, 1 << 20), BM=PROJECT.rows, BLOCK=block,
    )  # fmt: skip
    return _Tiles(rows, documents, layout.cu_seqlens, layout.index, table, count)


def _project(
    shared: list[tuple[Tensor, Tensor]], s: Tensor, s_column: int, rank: int, own: Tensor, out: Tensor, tiles: _Tiles,
    *, scale: float = 1.0, residual: Tensor | None = None, transposed: bool = False, config: LoraConfig = PROJECT,
) -> None:  # fmt: skip
    """out [N, columns] (a view with rows of 16 bytes) = sum of a w^T + s[:, s_column:][:rank] own_b^T + residual."""
    bm, bn, bk = config.rows, config.columns, config.depth
    strips = config.strips if residual is None else 2 * config.strips  # one of the residual lies beside the output's
    columns = out.shape[1]
    w_block = (1, bk, bn) if transposed else (1, bn, bk)
    s_desc, own_desc = descriptor(tiles.planes(s), (1, bm, bk)), descriptor(own, w_block)
    pairs = [(descriptor(tiles.planes(a), (1, bm, bk)), descriptor(w.unsqueeze(0), w_block)) for a, w in shared]
    pairs += [(None, None)] * (MAX_SHARED - len(pairs))  # a descriptor costs the host some microseconds a launch
    depths = [a.shape[1] for a, _ in shared] + [0] * (MAX_SHARED - len(shared))
    y_desc, residual_desc = (
        None if tiles.packed or t is None else descriptor(tiles.planes(t), (1, bm, bn // strips))
        for t in (out, residual)
    )
    grid = min(grid_size(s), tiles.blocks(bm) * triton.cdiv(columns, bn))
    _project_kernel[(grid,)](
        *pairs[0], *pairs[1], *pairs[2], s_desc, own_desc, y_desc, residual_desc, out, residual,
        tiles.map, tiles.count, tiles.index, tiles.length, tiles.documents, columns, out.stride(0), s_column, scale,
        D0=depths[0], D1=depths[1], D2=depths[2], RANK=rank, TRANSPOSED=transposed, PACKED=tiles.packed,
        INDEX=tiles.index is not None and not tiles.packed, RESIDUAL=residual is not None, STRIPS=strips,
        BM=bm, BN=bn, BK=bk,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _project_three(
    a: Tensor, weights: list[Tensor], s: Tensor, own: list[Tensor], outs: list[Tensor], tiles: _Tiles
) -> None:
    """out_p = a w_p^T + s_p own_p,b^T of a packed batch, without residuals; s_p lie side by side in s."""
    bm, bn, bk = PROJECT.rows, PROJECT.columns, PROJECT.depth
    columns, ranks = [out.shape[1] for out in outs], [b.shape[2] for b in own]
    grid = min(grid_size(a), tiles.blocks(bm) * sum(triton.cdiv(n, bn) for n in columns))
    _project_three_kernel[(grid,)](
        descriptor(tiles.planes(a), (1, bm, bk)), *(descriptor(w.unsqueeze(0), (1, bn, bk)) for w in weights),
        descriptor(tiles.planes(s), (1, bm, bk)), *(descriptor(b, (1, bn, bk)) for b in own), *outs,
        tiles.map, tiles.count, *columns, *(out.stride(0) for out in outs), ranks[0], ranks[0] + ranks[1],
        D=a.shape[1], RANK=max(ranks), BM=bm, BN=bn, BK=bk, num_warps=PROJECT.warps, num_stages=PROJECT.stages,
    )  # fmt: skip


_Target = tuple[Tensor, Tensor | None, Tensor | None]  # the sum, or Moments to step with it


def _outer(
    e: Tensor, x: Tensor, grad: Tensor, s: Tensor, column: int, a: _Target, b: _Target, tiles: _Tiles,
    stepped: tuple[AdamStep, Tensor, Tensor, Tensor | None] | None = None,
) -> None:  # fmt: skip
    """a = sum over each adapter's rows of e[:, column:]^T x, b the same of grad^T s[:, column:].

    stepped: a step (step, copy of all A, copy of B, B's factor) with these sums as gradients instead.
    """
    config = OUTER if stepped is None else STEP
    bi, bj, bk = config.rows, config.columns, config.depth
    shapes = [t[0].shape for t in (a, b)]
    count_a, count_b = (triton.cdiv(shape[1], bi) * triton.cdiv(shape[2], bj) for shape in shapes)
    e_desc, grad_desc = (descriptor(tiles.planes(t), (1, bk, bi)) for t in (e, grad))
    x_desc, s_desc = (descriptor(tiles.planes(t), (1, bk, bj)) for t in (x, s))
    copies: list[tuple[Any, ...]] = [(None, 0, 0)] * 2
    rest: tuple[Any, ...] = (None, None, None, 0.0, 0.0, 0.0, 0.0, 0.0)
    out_scale = None
    if stepped is not None:
        step, low_a, low_b, out_scale = stepped
        copies = [(low, *low.stride()[:2]) for low in (low_a[:, column:], low_b)]
        keep = 1.0 - step.lr * step.weight_decay
        rest = (out_scale, step.steps, step.factors, step.lr, step.beta1, step.beta2, step.eps, keep)
    _outer_kernel[(count_a + count_b, shapes[0][0])](
        e_desc, x_desc, *a, *copies[0], *shapes[0][1:], column,
        grad_desc, s_desc, *b, *copies[1], *shapes[1][1:], column,
        count_a, tiles.cu_seqlens, tiles.index, tiles.length, tiles.documents, *rest,
        PACKED=tiles.packed, INDEX=tiles.index is not None, STEP=stepped is not None, MOMENT=a[2] is not None,
        SCALED=out_scale is not None, STRIPS=config.strips, BI=bi, BJ=bj, BK=bk,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _whole(y: Tensor) -> Tensor:
    """A result without its padding. Autograd lets nobody write on a view that was made out of its sight."""
    return y if y.stride(0) == y.shape[1] else y.clone(memory_format=torch.contiguous_format)


def _with_strides(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device).copy_(tensor)


def products(
    x: Tensor, weights: list[Tensor | None], stacked: Tensor, own: list[Tensor], residuals: list[Tensor | None],
    tiles: _Tiles, scale: float,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """(y of each projection, s = scale * x A^T) with the adapters in x's dtype, each rank padded to 16 bytes."""
    rows, dtype = x.shape[0], x.dtype
    x = described(x)
    s = x.new_empty((rows, stacked.shape[1]))
    ys = [new_described(x, rows, b.shape[1]) for b in own]
    residuals = [
        None if residual is None else _with_strides(residual, y) for residual, y in zip(residuals, ys, strict=True)
    ]
    _project([], x, 0, x.shape[1], stacked, s, tiles, scale=scale, config=SHRINK)
    whole = [None if weight is None else described(weight.to(dtype)) for weight in weights]
    three = [w for w, residual in zip(whole[:3], residuals, strict=False) if w is not None and residual is None]
    first = 3 if tiles.packed and len(three) == 3 else 0
    if first:
        _project_three(x, three, s, own[:3], ys[:3], tiles)
    column = sum(b.shape[2] for b in own[:first])
    for y, weight, b, residual in list(zip(ys, whole, own, residuals, strict=True))[first:]:
        shared = [] if weight is None else [(x, weight)]
        _project(shared, s, column, b.shape[2], b, y, tiles, residual=residual)
        column += b.shape[2]
    return [_whole(y) for y in ys], s


def data_gradients(
    grads: list[Tensor], x: Tensor, weights: list[Tensor | None], stacked: Tensor, own: list[Tensor], tiles: _Tiles,
    scale: float, wants_x: bool, later: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(e = scale * g B of all projections side by side, dx plus `later` or an empty tensor)."""
    rows, depth = x.shape
    e = x.new_empty((rows, stacked.shape[1]))
    parts = list(e.split([b.shape[2] for b in own], dim=1))
    for grad, b, part in zip(grads, own, parts, strict=True):
        _project([], grad, 0, b.shape[1], b, part, tiles, scale=scale, transposed=True, config=SHRINK)
    if not wants_x:
        return e, x.new_empty(0)
    shared = [(g, described(w.to(x.dtype))) for g, w in zip(grads, weights, strict=True) if w is not None]
    d_x = new_described(x, rows, depth)
    later = None if later is None else _with_strides(later, d_x)
    _project(shared[:MAX_SHARED], e, 0, stacked.shape[1], stacked, d_x, tiles, residual=later, transposed=True)
    for grad, weight in shared[MAX_SHARED:]:
        d_x += (grad @ weight)[:, :depth]
    return e, d_x.contiguous()


def forward(
    x: Tensor, weights: list[Tensor | None], lora_as: list[Tensor], lora_bs: list[Tensor],
    residuals: list[Tensor | None], layout: Layout, scale: float,
) -> list[Tensor]:  # fmt: skip
    """[y of each projection..., s, the adapters in x's dtype]; s holds scale * x A^T, each rank padded to 16 bytes."""
    with torch.cuda.device_of(x):
        low = x.new_empty(low_size(lora_as, lora_bs, x.dtype))
        ys, s = products(x, weights, *_cast(lora_as, lora_bs, low), residuals, tiles_of(x, layout), scale)
    return [*ys, s, low]


def backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor | None], lora_as: list[Tensor], lora_bs: list[Tensor],
    s: Tensor, low: Tensor, layout: Layout, scale: float, wants_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """(dx or an empty tensor, dA of each projection, dB of each). An empty `low` is computed again."""
    with torch.cuda.device_of(x):
        tiles = tiles_of(x, layout)
        if low.numel():
            stacked, own = _views(lora_as, lora_bs, low)
        else:
            stacked, own = _cast(lora_as, lora_bs, x.new_empty(low_size(lora_as, lora_bs, x.dtype)))
        grads = [described(grad) for grad in grads]
        e, d_x = data_gradients(grads, x, weights, stacked, own, tiles, scale, wants_x)
        x = described(x)
        d_as, d_bs = (
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in ts] for ts in (lora_as, lora_bs)
        )
        column = 0
        for grad, b, d_a, d_b in zip(grads, own, d_as, d_bs, strict=True):
            _outer(e, x, grad, s, column, (d_a, None, None), (d_b, None, None), tiles)
            column += b.shape[2]
    return d_x, d_as, d_bs


def backward_step(
    grads: list[Tensor], x: Tensor, weights: list[Tensor | None], lora_as: list[Moments], lora_bs: list[Moments],
    stacked: Tensor, own: list[Tensor], s: Tensor, out_scales: list[Tensor | None], later: Tensor | None, tiles: _Tiles,
    wants_x: bool, step: AdamStep,
) -> Tensor:  # fmt: skip
    """dx plus `later`, what x's next reader sends back, or an empty tensor; then a step of the adapters, of which dx
    has read the values before it."""
    with torch.cuda.device_of(x):
        grads = [described(grad) for grad in grads]
        e, d_x = data_gradients(grads, x, weights, stacked, own, tiles, 1.0, wants_x, later)
        x, column = described(x), 0
        for grad, a, b, low_b, out_scale in zip(grads, lora_as, lora_bs, own, out_scales, strict=True):
            _outer(e, x, grad, s, column, a, b, tiles, (step, stacked, low_b, out_scale))
            column += low_b.shape[2]
    return d_x
