"""Triton kernels of batched_lora.py.

`_project_kernel` is one persistent matrix product whose depth runs through several pairs of operands: up to three
shared ones (x W^T in the forward, g_p W_p in the backward) and at last one pair by document, [s][B_b]^T or [e][A_b].
Which pair a step reads is a select between tensor-map descriptors, so that the copy engine's pipeline never drains
between them. With no shared pair it is the product that shrinks x to the ranks. `_outer_kernel` sums u^T v over each
adapter's rows; `_outer_step_kernel` takes the optimiser's step with that sum instead of writing it (stepped_lora.py).

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
    strips: int = 4
    stages: int = 4
    warps: int = 8


PROJECT = LoraConfig()
SHRINK = LoraConfig(columns=128, depth=128, strips=1, stages=3)
OUTER = LoraConfig(columns=128, stages=3)
STEP = LoraConfig(columns=128, strips=8, stages=3)  # 16 columns a strip: few enough registers for two programs
BOTH = LoraConfig(rows=64, columns=64, stages=3, warps=4)
BOTH_ROWS, BOTH_WIDTH = 256, 1024  # rows a document and columns up to which both products of an adapter are one launch
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
def _project_many_kernel(
    a_desc, w0_desc, w1_desc, w2_desc, s0_desc, s1_desc, s2_desc, l0_desc, l1_desc, l2_desc, y0_ptr, y1_ptr, y2_ptr,
    map_ptr, count_ptr, columns0, columns1, columns2, stride0, stride1, stride2, s_column1, s_column2, scale,
    D: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y_p = a w_p^T + s_p l_p,b^T of three projections of a packed batch, whose tiles lie side by side; see above.

    Depth past the end of a narrower s_p reads zeros.
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
        adapter = tl.load(map_ptr + block * 3 + 2)
        s_column = tl.where(third, s_column2, tl.where(second, s_column1, 0))
        acc = tl.zeros((BM, BN), tl.float32)
        for step in range(0, S + (RANK + BK - 1) // BK):
            left_desc, right_desc, k, column = s0_desc, l0_desc, (step - S) * BK, s_column
            plane = tl.maximum(adapter, 0)
            if third:
                left_desc, right_desc = s2_desc, l2_desc
            elif second:
                left_desc, right_desc = s1_desc, l1_desc
            if D > 0:
                if step < S:
                    left_desc, right_desc, k, column, plane = a_desc, w0_desc, step * BK, 0, 0
                    if third:
                        right_desc = w2_desc
                    elif second:
                        right_desc = w1_desc
            left = tl.reshape(left_desc.load([0, m, column + k]), (BM, BK))
            if TRANSPOSED:
                acc = tl.dot(left, tl.reshape(right_desc.load([plane, k, n]), (BK, BN)), acc)
            else:
                acc = tl.dot(left, tl.reshape(right_desc.load([plane, n, k]), (BN, BK)).T, acc)
        if D == 0:
            acc *= tl.where(adapter < 0, 0.0, scale)
        y_ptr, columns, stride = y0_ptr, columns0, stride0
        if third:
            y_ptr, columns, stride = y2_ptr, columns2, stride2
        elif second:
            y_ptr, columns, stride = y1_ptr, columns1, stride1
        row, column_n = m + tl.arange(0, BM), n + tl.arange(0, BN)
        offsets = row.to(tl.int64)[:, None] * stride + column_n[None, :]
        mask = (row < end)[:, None] & (column_n < columns)[None, :]
        tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["columns", "s_stride", "y_stride"])
def _both_kernel(
    x_desc, first_desc, second_desc, s_ptr, residual_ptr, y_ptr, map_ptr, count_ptr, columns, rank, s_stride, y_stride,
    scale, D: tl.constexpr, TRANSPOSED: tl.constexpr, RESIDUAL: tl.constexpr, PIECES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """s = scale * x m_b^T and y = s n_b^T (+ residual) of a packed batch; TRANSPOSED: m_b and n_b instead.

    A program takes one of the PIECES of a tile of the map; s stays in its registers.
    """
    block = tl.program_id(0) // PIECES
    if block < tl.load(count_ptr):
        m = tl.load(map_ptr + block * 3) + tl.program_id(0) % PIECES * BM
        end = tl.load(map_ptr + block * 3 + 1)
        adapter = tl.load(map_ptr + block * 3 + 2)
        plane = tl.maximum(adapter, 0)
        if m < end:
            acc = tl.zeros((BM, BR), tl.float32)
            for k in range(0, D, BK):
                x = tl.reshape(x_desc.load([0, m, k]), (BM, BK))
                if TRANSPOSED:
                    acc = tl.dot(x, tl.reshape(first_desc.load([plane, k, 0]), (BK, BR)), acc)
                else:
                    acc = tl.dot(x, tl.reshape(first_desc.load([plane, 0, k]), (BR, BK)).T, acc)
            s = (acc * tl.where(adapter < 0, 0.0, scale)).to(s_ptr.dtype.element_ty)
            row, column = tl.arange(0, BM), tl.arange(0, BR)
            inside = (m + row < end)[:, None]
            s_ptr += m.to(tl.int64) * s_stride
            y_ptr += m.to(tl.int64) * y_stride
            if RESIDUAL:
                residual_ptr += m.to(tl.int64) * y_stride
            tl.store(s_ptr + row[:, None] * s_stride + column[None, :], s, mask=inside & (column < rank)[None, :])
            for n in range(0, columns, BN):
                if TRANSPOSED:
                    y = tl.dot(s, tl.reshape(second_desc.load([plane, 0, n]), (BR, BN)))
                else:
                    y = tl.dot(s, tl.reshape(second_desc.load([plane, n, 0]), (BN, BR)).T)
                column_n = n + tl.arange(0, BN)
                offsets = row[:, None] * y_stride + column_n[None, :]
                mask = inside & (column_n < columns)[None, :]
                if RESIDUAL:
                    y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


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


@triton.jit(do_not_specialize=["length", "documents", "rows0", "rows1", "u_column0", "v_column1", "tiles0"])
def _outer_kernel(
    u0_desc, v0_desc, out0_ptr, rows0, columns0, u_column0, u1_desc, v1_desc, out1_ptr, rows1, columns1, v_column1,
    tiles0, cu_ptr, index_ptr, length, documents,
    PACKED: tl.constexpr, INDEX: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[adapter] = sum of u^T v over the rows of the adapter's documents, [rows, columns]; two such sums at once.

    The first reads u from a column on, the second v: e and s hold the ranks of several projections.
    """
    tile = tl.program_id(0)
    if tile < tiles0:
        u_desc, v_desc, out_ptr, rows, columns, u_column, v_column = (
            u0_desc,
            v0_desc,
            out0_ptr,
            rows0,
            columns0,
            u_column0,
            0,
        )
    else:
        u_desc, v_desc, out_ptr, rows, columns, u_column, v_column = (
            u1_desc,
            v1_desc,
            out1_ptr,
            rows1,
            columns1,
            0,
            v_column1,
        )
        tile -= tiles0
    tiles_j = tl.cdiv(columns, BJ)
    i = tile // tiles_j * BI
    j = tile % tiles_j * BJ
    adapter = tl.program_id(1)
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
    row, column = i + tl.arange(0, BI), j + tl.arange(0, BJ)
    offsets = (adapter.to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows0", "rows1", "u_column0", "v_column1", "tiles0"])
def _outer_step_kernel(
    u0_desc, v0_desc, p0_ptr, square0_ptr, mean0_ptr, low0_ptr, rows0, columns0, plane0, stride0, u_column0,
    u1_desc, v1_desc, p1_ptr, square1_ptr, mean1_ptr, low1_ptr, rows1, columns1, plane1, stride1, v_column1,
    scale_ptr, tiles0, cu_ptr, step_ptr, factor_ptr, lr, beta1, beta2, eps, keep,
    MOMENT: tl.constexpr, SCALED: tl.constexpr, STRIPS: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One AdamW step of A and B [documents, rows, columns] with the gradients e^T x and g^T s, a tile a program.

    `low` gets the new values in the activations' dtype. B's rows have a factor there, and so has B's gradient.
    """
    tile, document = tl.program_id(0), tl.program_id(1)
    if tl.load(step_ptr + document) > 0:
        is_b = tile >= tiles0
        if is_b:
            u_desc, v_desc, p_ptr, square_ptr, low_ptr = u1_desc, v1_desc, p1_ptr, square1_ptr, low1_ptr
            rows, columns, plane, stride, u_column, v_column = rows1, columns1, plane1, stride1, 0, v_column1
            tile -= tiles0
        else:
            u_desc, v_desc, p_ptr, square_ptr, low_ptr = u0_desc, v0_desc, p0_ptr, square0_ptr, low0_ptr
            rows, columns, plane, stride, u_column, v_column = rows0, columns0, plane0, stride0, u_column0, 0
        tiles_j = tl.cdiv(columns, BJ)
        i, j = tile // tiles_j * BI, tile % tiles_j * BJ
        start, end = tl.load(cu_ptr + document), tl.load(cu_ptr + document + 1)
        acc = tl.zeros((BI, BJ), tl.float32)
        acc = _accumulate(u_desc, v_desc, acc, 0, start, end, u_column + i, v_column + j, True, BK, BI, BJ)
        row = i + tl.arange(0, BI)
        inverse1, inverse2 = tl.load(factor_ptr + 2 * document), tl.load(factor_ptr + 2 * document + 1)
        own = document.to(tl.int64) * rows * columns
        p_ptr += own
        square_ptr += own
        low_ptr += document.to(tl.int64) * plane
        if MOMENT:
            if is_b:
                mean_ptr = mean1_ptr + own
            else:
                mean_ptr = mean0_ptr + own
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
    columns = out.shape[1]
    w_block = (1, bk, bn) if transposed else (1, bn, bk)
    s_desc, own_desc = descriptor(tiles.planes(s), (1, bm, bk)), descriptor(own, w_block)
    pairs = [(descriptor(tiles.planes(a), (1, bm, bk)), descriptor(w.unsqueeze(0), w_block)) for a, w in shared]
    pairs += [(None, None)] * (MAX_SHARED - len(pairs))  # a descriptor costs the host some microseconds a launch
    depths = [a.shape[1] for a, _ in shared] + [0] * (MAX_SHARED - len(shared))
    y_desc, residual_desc = (
        None if tiles.packed or t is None else descriptor(tiles.planes(t), (1, bm, bn // config.strips))
        for t in (out, residual)
    )
    grid = min(grid_size(s), tiles.blocks(bm) * triton.cdiv(columns, bn))
    _project_kernel[(grid,)](
        *pairs[0], *pairs[1], *pairs[2], s_desc, own_desc, y_desc, residual_desc, out, residual,
        tiles.map, tiles.count, tiles.index, tiles.length, tiles.documents, columns, out.stride(0), s_column, scale,
        D0=depths[0], D1=depths[1], D2=depths[2], RANK=rank, TRANSPOSED=transposed, PACKED=tiles.packed,
        INDEX=tiles.index is not None and not tiles.packed, RESIDUAL=residual is not None, STRIPS=config.strips,
        BM=bm, BN=bn, BK=bk,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _fits_both(x: Tensor, own: list[Tensor], weights: list[Tensor | None], tiles: _Tiles) -> bool:
    """An adapter alone, few rows a document: one launch, as its two products are too short to fill the device."""
    return (
        tiles.packed and len(own) == 1 and weights[0] is None and len(x) <= BOTH_ROWS * tiles.documents
        and max(x.shape[1], own[0].shape[1]) <= BOTH_WIDTH
    )  # fmt: skip


def _both(
    x: Tensor, first: Tensor, second: Tensor, s: Tensor, out: Tensor, tiles: _Tiles, *, scale: float = 1.0,
    residual: Tensor | None = None, transposed: bool = False,
) -> None:  # fmt: skip
    """s = scale * x first_b^T, out = s second_b^T + residual in one launch; transposed: first_b and second_b."""
    bm, bn, bk, br = BOTH.rows, BOTH.columns, BOTH.depth, block_at_least(s.shape[1], 16, 128)
    blocks = ((1, bk, br), (1, br, bn)) if transposed else ((1, br, bk), (1, bn, br))
    pieces = PROJECT.rows // bm
    _both_kernel[(tiles.blocks(PROJECT.rows) * pieces,)](
        descriptor(tiles.planes(x), (1, bm, bk)), descriptor(first, blocks[0]), descriptor(second, blocks[1]),
        s, residual, out, tiles.map, tiles.count, out.shape[1], s.shape[1], s.stride(0), out.stride(0), scale,
        D=x.shape[1], TRANSPOSED=transposed, RESIDUAL=residual is not None, PIECES=pieces, BM=bm, BN=bn, BK=bk, BR=br,
        num_warps=BOTH.warps, num_stages=BOTH.stages,
    )  # fmt: skip


def _fits_many(own: list[Tensor], tiles: _Tiles) -> bool:
    return tiles.packed and len(own) == MAX_SHARED


def _project_many(
    a: Tensor | None, weights: list[Tensor], s: list[Tensor], s_columns: list[int], ranks: list[int],
    own: list[Tensor], outs: list[Tensor], tiles: _Tiles, *, scale: float = 1.0, transposed: bool = False,
    config: LoraConfig = PROJECT,
) -> None:  # fmt: skip
    """Three outputs at once: out_p = a w_p^T + s_p[:, s_columns[p]:][:ranks[p]] own_p,b^T, packed, no residuals."""
    bm, bn, bk = config.rows, config.columns, config.depth
    w_block = (1, bk, bn) if transposed else (1, bn, bk)
    columns = [out.shape[1] for out in outs]
    grid = min(grid_size(outs[0]), tiles.blocks(bm) * sum(triton.cdiv(n, bn) for n in columns))
    _project_many_kernel[(grid,)](
        None if a is None else descriptor(tiles.planes(a), (1, bm, bk)),
        *([descriptor(w.unsqueeze(0), w_block) for w in weights] or [None] * 3),
        *(descriptor(tiles.planes(t), (1, bm, bk)) for t in s), *(descriptor(b, w_block) for b in own), *outs,
        tiles.map, tiles.count, *columns, *(out.stride(0) for out in outs), *s_columns[1:], scale,
        D=0 if a is None else a.shape[1], RANK=max(ranks), TRANSPOSED=transposed, BM=bm, BN=bn, BK=bk,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _outer(e: Tensor, x: Tensor, d_a: Tensor, grad: Tensor, s: Tensor, d_b: Tensor, column: int, tiles: _Tiles) -> None:
    """d_a = sum over each adapter's rows of e[:, column:]^T x, d_b the same of grad^T s[:, column:]."""
    bi, bj, bk = OUTER.rows, OUTER.columns, OUTER.depth
    tiles_a, tiles_b = (triton.cdiv(t.shape[1], bi) * triton.cdiv(t.shape[2], bj) for t in (d_a, d_b))
    e_desc, grad_desc = (descriptor(tiles.planes(t), (1, bk, bi)) for t in (e, grad))
    x_desc, s_desc = (descriptor(tiles.planes(t), (1, bk, bj)) for t in (x, s))
    _outer_kernel[(tiles_a + tiles_b, d_a.shape[0])](
        e_desc, x_desc, d_a, *d_a.shape[1:], column, grad_desc, s_desc, d_b, *d_b.shape[1:], column,
        tiles_a, tiles.cu_seqlens, tiles.index, tiles.length, tiles.documents,
        PACKED=tiles.packed, INDEX=tiles.index is not None, BI=bi, BJ=bj, BK=bk,
        num_warps=OUTER.warps, num_stages=OUTER.stages,
    )  # fmt: skip


def _step(
    e: Tensor, x: Tensor, grad: Tensor, s: Tensor, column: int, a: Moments, b: Moments, low_a: Tensor, low_b: Tensor,
    out_scale: Tensor | None, step: AdamStep, tiles: _Tiles,
) -> None:  # fmt: skip
    """One step of a projection's adapters, whose columns of e and s begin at `column`, as do low_a's rows."""
    bi, bj, bk = STEP.rows, STEP.columns, STEP.depth
    count_a, count_b = (triton.cdiv(t.value.shape[1], bi) * triton.cdiv(t.value.shape[2], bj) for t in (a, b))
    e_desc, grad_desc = (descriptor(tiles.planes(t), (1, bk, bi)) for t in (e, grad))
    x_desc, s_desc = (descriptor(tiles.planes(t), (1, bk, bj)) for t in (x, s))
    _outer_step_kernel[(count_a + count_b, len(a.value))](
        e_desc, x_desc, *a, low_a[:, column:], *a.value.shape[1:], *low_a.stride()[:2], column,
        grad_desc, s_desc, *b, low_b, *b.value.shape[1:], *low_b.stride()[:2], column,
        out_scale, count_a, tiles.cu_seqlens, step.steps, step.factors,
        step.lr, step.beta1, step.beta2, step.eps, 1.0 - step.lr * step.weight_decay,
        MOMENT=a.mean is not None, SCALED=out_scale is not None, STRIPS=STEP.strips, BI=bi, BJ=bj, BK=bk,
        num_warps=STEP.warps, num_stages=STEP.stages,
    )  # fmt: skip


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
    if _fits_both(x, own, weights, tiles):
        _both(x, stacked, own[0], s, ys[0], tiles, scale=scale, residual=residuals[0])
        return [ys[0].contiguous()], s
    _project([], x, 0, x.shape[1], stacked, s, tiles, scale=scale, config=SHRINK)
    ranks = [b.shape[2] for b in own]
    columns = [sum(ranks[:i]) for i in range(len(ranks))]
    whole = [None if weight is None else described(weight.to(dtype)) for weight in weights]
    present = [weight for weight in whole if weight is not None]
    if _fits_many(own, tiles) and len(present) == MAX_SHARED and all(r is None for r in residuals):
        _project_many(x, present, [s] * 3, columns, ranks, own, ys, tiles)
        return [y.contiguous() for y in ys], s
    for y, weight, b, column, residual in zip(ys, whole, own, columns, residuals, strict=True):
        shared = [] if weight is None else [(x, weight)]
        _project(shared, s, column, b.shape[2], b, y, tiles, residual=residual)
    return [y.contiguous() for y in ys], s


def data_gradients(
    grads: list[Tensor], x: Tensor, weights: list[Tensor | None], stacked: Tensor, own: list[Tensor], tiles: _Tiles,
    scale: float, wants_x: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(e = scale * g B of all projections side by side, dx or an empty tensor)."""
    rows, depth = x.shape
    e = x.new_empty((rows, stacked.shape[1]))
    if wants_x and _fits_both(x, own, weights, tiles):
        d_x = new_described(x, rows, depth)
        _both(grads[0], own[0], stacked, e, d_x, tiles, scale=scale, transposed=True)
        return e, d_x.contiguous()
    parts = list(e.split([b.shape[2] for b in own], dim=1))
    options: dict[str, Any] = {"scale": scale, "transposed": True, "config": SHRINK}
    if _fits_many(own, tiles):
        _project_many(None, [], grads, [0, 0, 0], [b.shape[1] for b in own], own, parts, tiles, **options)
    else:
        for grad, b, part in zip(grads, own, parts, strict=True):
            _project([], grad, 0, b.shape[1], b, part, tiles, **options)
    if not wants_x:
        return e, x.new_empty(0)
    shared = [(g, described(w.to(x.dtype))) for g, w in zip(grads, weights, strict=True) if w is not None]
    d_x = new_described(x, rows, depth)
    _project(shared[:MAX_SHARED], e, 0, stacked.shape[1], stacked, d_x, tiles, transposed=True)
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
            _outer(e, x, d_a, grad, s, d_b, column, tiles)
            column += b.shape[2]
    return d_x, d_as, d_bs


def backward_step(
    grads: list[Tensor], x: Tensor, weights: list[Tensor | None], lora_as: list[Moments], lora_bs: list[Moments],
    stacked: Tensor, own: list[Tensor], s: Tensor, out_scales: list[Tensor | None], tiles: _Tiles, wants_x: bool,
    step: AdamStep,
) -> Tensor:  # fmt: skip
    """dx or an empty tensor; then a step of the adapters, of which dx has read the values before it."""
    with torch.cuda.device_of(x):
        grads = [described(grad) for grad in grads]
        e, d_x = data_gradients(grads, x, weights, stacked, own, tiles, 1.0, wants_x)
        x, column = described(x), 0
        for grad, a, b, low_b, out_scale in zip(grads, lora_as, lora_bs, own, out_scales, strict=True):
            _step(e, x, grad, s, column, a, b, stacked, low_b, out_scale, step, tiles)
            column += low_b.shape[2]
    return d_x
