"""Triton kernels of batched_lora.py.

`_project_kernel` is one persistent matrix product whose depth runs through several pairs of operands: up to three
shared ones (x W^T in the forward, g_p W_p in the backward) and at last one pair by document, [s][B_b]^T or [e][A_b].
Which pair a step reads is a select between tensor-map descriptors, so that the copy engine's pipeline never drains
between them. With no shared pair it is the product that shrinks x to the ranks. `_outer_kernel` sums u^T v over each
adapter's rows.

Dense batches are described as [documents, T, columns]: the copy engine then fills rows past a document's end with zeros
and drops them when storing, whatever T is. Packed batches take their tiles from a map that one small kernel computes,
so that no length reaches the host.
"""

# Conditions on constants are folded when a kernel is compiled and may not be joined with conditions on values.
# ruff: noqa: SIM102, SIM108

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels._triton_op import block_at_least, can_describe, descriptor, grid_size

if TYPE_CHECKING:
    from pgolf_kernels.batched_lora import Layout

MAX_SHARED = 3  # pairs of shared operands in one product


@dataclass(frozen=True)
class LoraConfig:
    """Launch knobs: rows and columns of a tile, depth a step, pipeline stages, warps."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    stages: int = 3
    warps: int = 8


PROJECT = LoraConfig()
SHRINK = LoraConfig(columns=128, stages=4)
OUTER = LoraConfig()


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
    a0_desc, w0_desc, a1_desc, w1_desc, a2_desc, w2_desc, s_desc, l_desc, y_desc,
    y_ptr, residual_ptr, map_ptr, count_ptr, index_ptr, length, documents, columns, y_stride, s_column, scale,
    D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, RANK: tl.constexpr, TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr, INDEX: tl.constexpr, RESIDUAL: tl.constexpr,
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
        if PACKED or RESIDUAL:
            row = m + tl.arange(0, BM)
            column_n = n + tl.arange(0, BN)
            offsets = (document * length + row).to(tl.int64)[:, None] * y_stride + column_n[None, :]
            mask = (row < end)[:, None] & (column_n < columns)[None, :]
            if RESIDUAL:
                acc += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if PACKED:
                tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)
        if not PACKED:
            if BN == 256:
                left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
                y_desc.store([document, m, n], tl.reshape(left.to(y_desc.dtype), (1, BM, BN // 2)))
                y_desc.store([document, m, n + BN // 2], tl.reshape(right.to(y_desc.dtype), (1, BM, BN // 2)))
            else:
                y_desc.store([document, m, n], tl.reshape(acc.to(y_desc.dtype), (1, BM, BN)))


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


@triton.jit(do_not_specialize=["length", "documents"])
def _outer_kernel(
    u_desc, v_desc, out_ptr, cu_ptr, index_ptr, length, documents, out_rows, out_columns, u_column, v_column,
    PACKED: tl.constexpr, INDEX: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[adapter] = sum of u^T v over the rows of the adapter's documents, [out_rows, out_columns]."""
    tiles_j = tl.cdiv(out_columns, BJ)
    i = tl.program_id(0) // tiles_j * BI
    j = tl.program_id(0) % tiles_j * BJ
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
    offsets = (adapter.to(tl.int64) * out_rows + row)[:, None] * out_columns + column[None, :]
    mask = (row < out_rows)[:, None] & (column < out_columns)[None, :]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


# ---- launches --------------------------------------------------------------------------------------------------------


def takes(x: Tensor) -> bool:
    """Whether the kernels take this input: 16-bit on a GPU, any dtype through the interpreter."""
    return x.numel() > 0 and (x.dtype in (torch.bfloat16, torch.float16) or not x.is_cuda)


def _step(dtype: torch.dtype) -> int:
    """Elements in 16 bytes: rows of what the copy engine reads are a multiple of it."""
    return 16 // dtype.itemsize


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """Columns that a rank takes among the saved ones."""
    return rank + -rank % _step(dtype)


def _described(tensor: Tensor) -> Tensor:
    if can_describe(tensor):
        return tensor
    return F.pad(tensor, (0, -tensor.shape[-1] % _step(tensor.dtype))).contiguous()


def _stacked(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A's [adapters, r_p, in] as one [adapters, sum of padded ranks, in], rows of zeros between them."""
    ranks = [padded_rank(t.shape[1], dtype) for t in tensors]
    if len(tensors) == 1 and ranks[0] == tensors[0].shape[1]:
        return _described(tensors[0].to(dtype))
    depth = tensors[0].shape[2] + -tensors[0].shape[2] % _step(dtype)
    stacked = tensors[0].new_empty((tensors[0].shape[0], sum(ranks), depth), dtype=dtype)
    if depth != tensors[0].shape[2] or any(r != t.shape[1] for r, t in zip(ranks, tensors, strict=True)):
        stacked.zero_()
    for part, tensor in zip(stacked.split(ranks, dim=1), tensors, strict=True):
        part[:, : tensor.shape[1], : tensor.shape[2]].copy_(tensor)
    return stacked


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


def _tiles(x: Tensor, layout: Layout) -> _Tiles:
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
    pairs += [(s_desc, own_desc)] * (MAX_SHARED - len(pairs))
    depths = [a.shape[1] for a, _ in shared] + [0] * (MAX_SHARED - len(shared))
    y_desc = s_desc if tiles.packed else descriptor(tiles.planes(out), (1, bm, min(bn, 128)))
    grid = min(grid_size(s), tiles.blocks(bm) * triton.cdiv(columns, bn))
    _project_kernel[(grid,)](
        *pairs[0], *pairs[1], *pairs[2], s_desc, own_desc, y_desc, out, residual,
        tiles.map, tiles.count, tiles.index, tiles.length, tiles.documents, columns, out.stride(0), s_column, scale,
        D0=depths[0], D1=depths[1], D2=depths[2], RANK=rank, TRANSPOSED=transposed, PACKED=tiles.packed,
        INDEX=tiles.index is not None and not tiles.packed, RESIDUAL=residual is not None, BM=bm, BN=bn, BK=bk,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _outer(u: Tensor, u_column: int, v: Tensor, v_column: int, out: Tensor, tiles: _Tiles) -> None:
    """out [adapters, m, n] = sum over each adapter's rows of u[:, u_column:][:m]^T v[:, v_column:][:n]."""
    bi, bk = OUTER.rows, OUTER.depth
    bj = block_at_least(out.shape[2], 128, OUTER.columns)
    grid = (triton.cdiv(out.shape[1], bi) * triton.cdiv(out.shape[2], bj), out.shape[0])
    _outer_kernel[grid](
        descriptor(tiles.planes(u), (1, bk, bi)), descriptor(tiles.planes(v), (1, bk, bj)), out,
        tiles.cu_seqlens, tiles.index, tiles.length, tiles.documents, out.shape[1], out.shape[2], u_column, v_column,
        PACKED=tiles.packed, INDEX=tiles.index is not None, BI=bi, BJ=bj, BK=bk,
        num_warps=OUTER.warps, num_stages=OUTER.stages,
    )  # fmt: skip


def _new_described(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty((rows, columns + -columns % _step(like.dtype)))[:, :columns]


def forward(
    x: Tensor, weights: list[Tensor | None], lora_as: list[Tensor], lora_bs: list[Tensor],
    residuals: list[Tensor | None], layout: Layout, scale: float,
) -> list[Tensor]:  # fmt: skip
    """[y of each projection..., s]; s holds scale * x A^T, each rank padded to 16 bytes."""
    dtype, rows = x.dtype, x.shape[0]
    ranks = [padded_rank(a.shape[1], dtype) for a in lora_as]
    with torch.cuda.device_of(x):
        tiles = _tiles(x, layout)
        x = _described(x)
        s = x.new_empty((rows, sum(ranks)))
        _project([], x, 0, x.shape[1], _stacked(lora_as, dtype), s, tiles, scale=scale, config=SHRINK)
        ys, column = [], 0
        for weight, b, residual, rank in zip(weights, lora_bs, residuals, ranks, strict=True):
            y = _new_described(x, rows, b.shape[1])
            shared = [] if weight is None else [(x, _described(weight.to(dtype)))]
            if residual is not None and residual.stride() != y.stride():
                residual = torch.empty_strided(y.shape, y.stride(), dtype=dtype, device=x.device).copy_(residual)
            _project(shared, s, column, b.shape[2], _described(b.to(dtype)), y, tiles, residual=residual)
            ys.append(y.contiguous())
            column += rank
    return [*ys, s]


def backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor | None], lora_as: list[Tensor], lora_bs: list[Tensor],
    s: Tensor, layout: Layout, scale: float, wants_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """(dx or an empty tensor, dA of each projection, dB of each)."""
    dtype, (rows, depth) = x.dtype, x.shape
    ranks = [padded_rank(a.shape[1], dtype) for a in lora_as]
    with torch.cuda.device_of(x):
        tiles = _tiles(x, layout)
        x = _described(x)
        grads = [_described(grad) for grad in grads]
        e = torch.empty_like(s)
        d_as, d_bs, column = [], [], 0
        for grad, a, b, rank in zip(grads, lora_as, lora_bs, ranks, strict=True):
            own = _described(b.to(dtype))
            _project(
                [], grad, 0, b.shape[1], own, e[:, column : column + rank], tiles, scale=scale, transposed=True,
                config=SHRINK,
            )  # fmt: skip
            d_as.append(torch.empty_like(a, memory_format=torch.contiguous_format))
            d_bs.append(torch.empty_like(b, memory_format=torch.contiguous_format))
            _outer(e, column, x, 0, d_as[-1], tiles)
            _outer(grad, 0, s, column, d_bs[-1], tiles)
            column += rank
        d_x = x.new_empty(0)
        if wants_x:
            stacked = _stacked(lora_as, dtype)
            shared = [(g, _described(w.to(dtype))) for g, w in zip(grads, weights, strict=True) if w is not None]
            d_x = _new_described(x, rows, depth)
            _project(shared[:MAX_SHARED], e, 0, stacked.shape[1], stacked, d_x, tiles, transposed=True)
            for grad, weight in shared[MAX_SHARED:]:
                d_x += (grad @ weight)[:, :depth]
            d_x = d_x.contiguous()
    return d_x, d_as, d_bs
