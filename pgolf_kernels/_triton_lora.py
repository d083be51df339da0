"""Device code of batched_lora.py's and stepped_lora.py's Triton kernels; `_batched_lora_triton.py` launches them.

`project_kernel` is one persistent matrix product whose depth runs through several pairs of operands: up to three
shared ones (x W^T in the forward, g_p W_p in the backward) and at last one pair by document, [s][B_b]^T or [e][A_b].
Which pair a step reads is a select between tensor-map descriptors, so that the copy engine's pipeline never drains
between them. With no shared pair it is the product that shrinks x to the ranks. `project_three_kernel` and
`shrink_kernel` do what it does for several projections of a packed batch in one launch. `outer_kernel` sums u^T v over
each adapter's rows; `step_kernel` takes the optimiser's step with such sums instead of writing them (stepped_lora.py).
`shrink_outer_kernel` makes both products of a wide gradient in one pass over it.
"""

# Conditions on constants are folded when a kernel is compiled and may not be joined with conditions on values.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

import triton
import triton.language as tl

from pgolf_kernels._adapter_adamw_triton import adamw
from pgolf_kernels._triton_tile import prefetch, strip, wait_for_previous


@triton.jit(do_not_specialize=["rows", "documents"])
def map_kernel(cu_ptr, index_ptr, map_ptr, count_ptr, rows, documents,
                INDEX: tl.constexpr, DOCUMENTS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr,
                PDL: tl.constexpr):  # fmt: skip
    """For each tile of BM rows that no document shares: (first row, end of its document, adapter).

    Rows past the last bound are one more document, with adapter -1.
    """
    wait_for_previous(PDL)
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
def project_kernel(
    a0_desc, w0_desc, a1_desc, w1_desc, a2_desc, w2_desc, s_desc, l_desc, y_desc, residual_desc,
    y_ptr, residual_ptr, map_ptr, count_ptr, index_ptr, length, documents, columns, y_stride, s_column, scale,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr, INDEX: tl.constexpr, RESIDUAL: tl.constexpr, STRIPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = sum_i a_i w_i^T + s l_b^T (+ residual); TRANSPOSED: w_i and l_b instead of their transposes."""
    wait_for_previous(PDL)
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
            for i in tl.static_range(STRIPS):
                part = strip(acc, i, STRIPS, BM, BN)
                column_n = n + i * (BN // STRIPS) + tl.arange(0, BN // STRIPS)
                offsets = row.to(tl.int64)[:, None] * y_stride + column_n[None, :]
                mask = (row < end)[:, None] & (column_n < columns)[None, :]
                if RESIDUAL:
                    part += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                tl.store(y_ptr + offsets, part.to(y_ptr.dtype.element_ty), mask=mask)
        else:
            for i in tl.static_range(STRIPS):
                part = strip(acc, i, STRIPS, BM, BN)
                place = [document, m, n + i * (BN // STRIPS)]
                if RESIDUAL:
                    part += tl.reshape(residual_desc.load(place), (BM, BN // STRIPS)).to(tl.float32)
                y_desc.store(place, tl.reshape(part.to(y_desc.dtype), (1, BM, BN // STRIPS)))


@triton.jit(do_not_specialize=["columns0", "columns1", "columns2", "stride0", "stride1", "stride2",
                               "s_column1", "s_column2"])  # fmt: skip
def project_three_kernel(
    a_desc, w0_desc, w1_desc, w2_desc, s_desc, l0_desc, l1_desc, l2_desc, y0_ptr, y1_ptr, y2_ptr, map_ptr, count_ptr,
    columns0, columns1, columns2, stride0, stride1, stride2, s_column1, s_column2,
    D: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y_p = a w_p^T + s_p l_p,b^T of three projections of a packed batch, whose tiles lie side by side.

    RANK is the largest: past a narrower l_p's end its descriptor reads zeros.
    """
    wait_for_previous(PDL)
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


@triton.jit(do_not_specialize=["depth0", "depth1", "depth2", "depth3", "rank0", "rank1", "rank2", "rank3"])
def shrink_kernel(
    g0_desc, g1_desc, g2_desc, g3_desc, b0_desc, b1_desc, b2_desc, b3_desc, e_ptr, map_ptr, count_ptr,
    depth0, depth1, depth2, depth3, rank0, rank1, rank2, rank3, e_stride, scale,
    COUNT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """e_p = scale * g_p b_p,b of three or four projections of a packed batch, side by side in e.

    Rows of no document get 0. Each tile has the depth of its own projection, and holds all its ranks.
    """
    wait_for_previous(PDL)
    tiles = tl.load(count_ptr) * COUNT
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        block, number = tile // COUNT, tile % COUNT
        g_desc, b_desc, depth, rank, first = g0_desc, b0_desc, depth0, rank0, 0
        if number == 1:
            g_desc, b_desc, depth, rank, first = g1_desc, b1_desc, depth1, rank1, rank0
        elif number == 2:
            g_desc, b_desc, depth, rank, first = g2_desc, b2_desc, depth2, rank2, rank0 + rank1
        if COUNT > 3:
            if number == 3:
                g_desc, b_desc, depth, rank, first = g3_desc, b3_desc, depth3, rank3, rank0 + rank1 + rank2
        m = tl.load(map_ptr + block * 3)
        end = tl.load(map_ptr + block * 3 + 1)
        adapter = tl.load(map_ptr + block * 3 + 2)
        own = tl.maximum(adapter, 0)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, depth, BK):
            g = tl.reshape(g_desc.load([0, m, k]), (BM, BK))
            acc = tl.dot(g, tl.reshape(b_desc.load([own, k, 0]), (BK, BN)), acc)
        acc *= tl.where(adapter < 0, 0.0, scale)
        row, column = m + tl.arange(0, BM), tl.arange(0, BN)
        offsets = row.to(tl.int64)[:, None] * e_stride + (first + column)[None, :]
        tl.store(e_ptr + offsets, acc.to(e_ptr.dtype.element_ty), mask=(row < end)[:, None] & (column < rank)[None, :])


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
def _tile_of(i, j, rows, columns, stride, BI: tl.constexpr, BJ: tl.constexpr, EVERY: tl.constexpr):
    """Where a tile of a matrix [rows, columns] with rows `stride` apart lies, and what of it exists: one column in
    EVERY."""
    row, column = i + tl.arange(0, BI), j + EVERY * tl.arange(0, BJ // EVERY)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return row[:, None] * stride + column[None, :], mask


@triton.jit(do_not_specialize=["length", "documents", "rows0", "rows1", "u_column0", "v_column1", "tiles0"])
def outer_kernel(
    u0_desc, v0_desc, out0_ptr, rows0, columns0, u_column0, u1_desc, v1_desc, out1_ptr, rows1, columns1, v_column1,
    tiles0, cu_ptr, index_ptr, length, documents,
    PACKED: tl.constexpr, INDEX: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[adapter] = sum of u^T v over the rows of the adapter's documents, [rows, columns]; two such sums at once.

    The first reads u from a column on, the second v: e and s hold the ranks of several projections.
    """
    wait_for_previous(PDL)
    tile, adapter = tl.program_id(0), tl.program_id(1)
    if tile >= tiles0:
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
    offsets, mask = _tile_of(i, j, rows, columns, columns, BI, BJ, 1)
    out_ptr += adapter.to(tl.int64) * rows * columns
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pick(number, first, second, third, fourth, COUNT: tl.constexpr):
    """What belongs to one of up to four projections: a tensor-map descriptor, a pointer or a number."""
    found = first
    if COUNT > 1:
        if number == 1:
            found = second
    if COUNT > 2:
        if number == 2:
            found = third
    if COUNT > 3:
        if number == 3:
            found = fourth
    return found


@triton.jit
def _number_of(tile, first1, first2, first3, COUNT: tl.constexpr):
    """The projection that a tile belongs to, and its place among that one's."""
    number = 0
    if COUNT > 1:
        number = (tile >= first1).to(tl.int32)
    if COUNT > 2:
        number += (tile >= first2).to(tl.int32)
    if COUNT > 3:
        number += (tile >= first3).to(tl.int32)
    return number, tile - _pick(number, 0, first1, first2, first3, COUNT)


@triton.jit(do_not_specialize=["column0", "out0", "out1", "out2", "out3", "first1", "first2", "first3", "scaled"])
def step_kernel(
    e_desc, x_desc, s_desc, column0, g0_desc, g1_desc, g2_desc, g3_desc,
    a0_ptr, a1_ptr, a2_ptr, a3_ptr, a_square0_ptr, a_square1_ptr, a_square2_ptr, a_square3_ptr,
    a_mean0_ptr, a_mean1_ptr, a_mean2_ptr, a_mean3_ptr, low_a_ptr, low_a_plane, low_a_stride,
    b0_ptr, b1_ptr, b2_ptr, b3_ptr, b_square0_ptr, b_square1_ptr, b_square2_ptr, b_square3_ptr,
    b_mean0_ptr, b_mean1_ptr, b_mean2_ptr, b_mean3_ptr, low_b0_ptr, low_b1_ptr, low_b2_ptr, low_b3_ptr,
    scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr, scaled, rank0, rank1, rank2, rank3, width0, width1, width2, width3,
    out0, out1, out2, out3, depth, first1, first2, first3, cu_ptr, step_ptr, factor_ptr,
    lr, beta1, rest1, beta2, rest2, eps, keep,
    COUNT: tl.constexpr, MOMENT: tl.constexpr, SCALED: tl.constexpr, PREFETCH: tl.constexpr, STRIPS: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One AdamW step of A and B of one to four projections, document i's with the gradients that its rows give:
    e_p^T x for A_p and g_p^T s_p for B_p. A document whose count is 0 takes none.

    The tiles lie projection by projection, those of A before those of B; the second's begin at first1. The widths are
    the ranks with their padding, as they lie side by side in e and s from column0 on. B of projection p has a factor
    where bit p of `scaled` is set.

    PREFETCH: values and averages are on their way while the product runs, of which they are most of what is read where
    documents are short. A tile is stepped strip by strip of its columns, so that registers leave room for several
    programs.
    """
    wait_for_previous(PDL)
    tile, adapter = tl.program_id(0), tl.program_id(1)
    if tl.load(step_ptr + adapter) > 0:
        number, tile = _number_of(tile, first1, first2, first3, COUNT)
        column = column0 + _pick(number, 0, width0, width0 + width1, width0 + width1 + width2, COUNT)
        rank = _pick(number, rank0, rank1, rank2, rank3, COUNT)
        tiles_a = tl.cdiv(rank, BI) * tl.cdiv(depth, BJ)
        is_b = tile >= tiles_a
        if is_b:
            tile -= tiles_a
            u_desc, v_desc = _pick(number, g0_desc, g1_desc, g2_desc, g3_desc, COUNT), s_desc
            rows, columns, u_column, v_column = _pick(number, out0, out1, out2, out3, COUNT), rank, 0, column
            p_ptr = _pick(number, b0_ptr, b1_ptr, b2_ptr, b3_ptr, COUNT)
            square_ptr = _pick(number, b_square0_ptr, b_square1_ptr, b_square2_ptr, b_square3_ptr, COUNT)
            low_ptr = _pick(number, low_b0_ptr, low_b1_ptr, low_b2_ptr, low_b3_ptr, COUNT)
            stride = _pick(number, width0, width1, width2, width3, COUNT)
            plane = rows * stride
        else:
            u_desc, v_desc, rows, columns, u_column, v_column = e_desc, x_desc, rank, depth, column, 0
            p_ptr = _pick(number, a0_ptr, a1_ptr, a2_ptr, a3_ptr, COUNT)
            square_ptr = _pick(number, a_square0_ptr, a_square1_ptr, a_square2_ptr, a_square3_ptr, COUNT)
            low_ptr, stride, plane = low_a_ptr + column * low_a_stride, low_a_stride, low_a_plane
        tiles_j = tl.cdiv(columns, BJ)
        i = tile // tiles_j * BI
        j = tile % tiles_j * BJ
        before = adapter.to(tl.int64) * rows * columns
        p_ptr += before
        square_ptr += before
        mean_ptr = square_ptr
        if MOMENT:
            if is_b:
                mean_ptr = _pick(number, b_mean0_ptr, b_mean1_ptr, b_mean2_ptr, b_mean3_ptr, COUNT) + before
            else:
                mean_ptr = _pick(number, a_mean0_ptr, a_mean1_ptr, a_mean2_ptr, a_mean3_ptr, COUNT) + before
        if PREFETCH:
            lines, exists = _tile_of(i, j, rows, columns, columns, BI, BJ, 32)
            lines = tl.where(exists, lines, 0)
            prefetch(p_ptr + lines)
            prefetch(square_ptr + lines)
            if MOMENT:
                prefetch(mean_ptr + lines)
        acc = tl.zeros((BI, BJ), tl.float32)
        start, end = tl.load(cu_ptr + adapter), tl.load(cu_ptr + adapter + 1)
        acc = _accumulate(u_desc, v_desc, acc, 0, start, end, u_column + i, v_column + j, True, BK, BI, BJ)
        inverse1, inverse2 = tl.load(factor_ptr + 2 * adapter), tl.load(factor_ptr + 2 * adapter + 1)
        if SCALED:
            row = i + tl.arange(0, BI)
            scale_ptr = _pick(number, scale0_ptr, scale1_ptr, scale2_ptr, scale3_ptr, COUNT)
            has_factor = is_b & ((scaled >> number) % 2 == 1)
            factor = tl.load(scale_ptr + row, mask=(row < rows) & has_factor, other=1.0)[:, None]
        low_ptr += adapter.to(tl.int64) * plane
        for part in tl.static_range(STRIPS):
            gradient = strip(acc, part, STRIPS, BI, BJ)
            if SCALED:
                gradient *= factor
            first = j + part * (BJ // STRIPS)
            offsets, mask = _tile_of(i, first, rows, columns, columns, BI, BJ // STRIPS, 1)
            p = tl.load(p_ptr + offsets, mask=mask, other=0.0)
            square = tl.load(square_ptr + offsets, mask=mask, other=0.0)
            mean = gradient
            if MOMENT:
                mean = tl.load(mean_ptr + offsets, mask=mask, other=0.0)
            p, square, mean = adamw(
                p, gradient, square, mean, inverse1, inverse2, lr, beta1, rest1, beta2, rest2, eps, keep, MOMENT
            )
            if MOMENT:
                tl.store(mean_ptr + offsets, mean, mask=mask)
            tl.store(square_ptr + offsets, square, mask=mask)
            tl.store(p_ptr + offsets, p, mask=mask)
            if SCALED:
                p *= factor
            offsets, _ = _tile_of(i, first, rows, columns, stride, BI, BJ // STRIPS, 1)
            tl.store(low_ptr + offsets, p.to(low_ptr.dtype.element_ty), mask=mask)


@triton.jit
def shrink_outer_kernel(
    g_desc, b0_desc, b1_desc, s0_desc, s1_desc, e0_desc, e1_desc, out0_desc, out1_desc, columns, scale,
    BM: tl.constexpr, BN: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """e = scale * g b_b and out_b = g^T s in one pass over g, for documents of at most BM rows with an adapter each.

    A program takes a range of one document's columns, as many programs a document as the grid is wide; each stores its
    share of e in a plane of its own. The ranks come in two parts of R0 and R1, whose sizes are powers of two and whose
    sum need not be one; R1 may be 0.
    """
    wait_for_previous(PDL)
    split, document, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    s0, e0 = tl.reshape(s0_desc.load([document, 0, 0]), (BM, R0)), tl.zeros((BM, R0), tl.float32)
    if R1 > 0:
        s1, e1 = tl.reshape(s1_desc.load([document, 0, 0]), (BM, R1)), tl.zeros((BM, R1), tl.float32)
    chunks = tl.cdiv(columns, BN)
    for chunk in range(chunks * split // splits, chunks * (split + 1) // splits):
        n = chunk * BN
        g = tl.reshape(g_desc.load([document, 0, n]), (BM, BN))
        # The last product of a step has to be one that is waited for: an accumulator still in use where the loop turns
        # makes ptxas wait for every single wgmma.
        if R1 > 0:
            out1 = tl.dot(g.T, s1)
            out1_desc.store([document, n, 0], tl.reshape(out1.to(out1_desc.dtype), (1, BN, R1)))
            e1 = tl.dot(g, tl.reshape(b1_desc.load([document, n, 0]), (BN, R1)), e1)
        e0 = tl.dot(g, tl.reshape(b0_desc.load([document, n, 0]), (BN, R0)), e0)
        out0 = tl.dot(g.T, s0)
        out0_desc.store([document, n, 0], tl.reshape(out0.to(out0_desc.dtype), (1, BN, R0)))
    plane = split * tl.num_programs(1) + document
    e0_desc.store([plane, 0, 0], tl.reshape((e0 * scale).to(e0_desc.dtype), (1, BM, R0)))
    if R1 > 0:
        e1_desc.store([plane, 0, 0], tl.reshape((e1 * scale).to(e1_desc.dtype), (1, BM, R1)))


@triton.jit(do_not_specialize=["size"])
def sum_kernel(
    part_ptr, out_ptr, size, columns, stride, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """out [rows, columns], its rows `stride` apart, = the sum of PARTS contiguous matrices of `size` elements."""
    wait_for_previous(PDL)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(part_ptr + part * size + place, mask=place < size, other=0.0)
    offsets = place // columns * stride + place % columns
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=place < size)


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
def cast_kernel(
    a_ptr, b_ptr, low_a_ptr, low_b_ptr, tiles_a, adapters, rank, depth, padded_rank, padded_depth, plane_stride,
    out, rank_b, padded_rank_b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One projection's A and B in the activations' dtype."""
    wait_for_previous(PDL)
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
