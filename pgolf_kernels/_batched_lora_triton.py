"""Launches of the Triton kernels of batched_lora.py and stepped_lora.py, which lie in `_triton_lora.py`.

Dense batches are described as [documents, T, columns]: the copy engine then fills rows past a document's end with zeros
and drops them when storing, whatever T is. Packed batches take their tiles from a map that one small kernel computes,
so that no length reaches the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pgolf_kernels._triton_lora import (
    cast_kernel,
    map_kernel,
    outer_kernel,
    project_kernel,
    project_three_kernel,
    shrink_kernel,
    shrink_outer_kernel,
    step_kernel,
    sum_kernel,
)
from pgolf_kernels._triton_op import block_at_least, can_describe, cdiv, descriptor, grid_size, pdl
from pgolf_kernels._triton_tile import described, launch, new_described
from pgolf_kernels.batched_lora import MAX_RANK, Layout, low_size, padded
from pgolf_kernels.stepped_lora import AdamStep, Moments

MAX_SHARED = 3  # pairs of shared operands in one product
STEPPED = 4  # projections whose adapters one launch steps


@dataclass(frozen=True)
class LoraConfig:
    """Launch knobs: rows and columns of a tile, depth a step, strips a tile is written in, pipeline stages, warps, and
    programs a multiprocessor where the grid is persistent."""

    rows: int = 128
    columns: int = 256
    depth: int = 64
    strips: int = 2
    stages: int = 4
    warps: int = 8
    programs: int = 1


PROJECT = LoraConfig()
# Products with the adapters alone. Where a tile holds all columns, each row is read once, and only the copy engine
# counts; otherwise, and where the depth is a rank, one program's tile is written while another's products run. H200, 64
# documents of 2048 rows: e of q, k, v and o 222 us as SHRINK, 169 as SHRINK_MANY; 96 -> 512 with a residual 116 us as
# PROJECT, 99 with two programs of 128 columns, 90 as EXPAND; 512 -> 96 44 us as SHRINK, 45 as SHRINK_MANY (6.7 and 8.8
# where they have 96 rows).
SHRINK = LoraConfig(columns=128, depth=128, strips=1, stages=3)
SHRINK_MANY = LoraConfig(columns=128, strips=1, stages=3, warps=4, programs=2)
EXPAND = LoraConfig(columns=64, depth=32, strips=1, stages=3, warps=4, programs=3)
# H200, forward and backward of 64 documents of 256 rows, 512 -> 8192: 743 us; 8 warps 790.
OUTER = LoraConfig(columns=128, stages=3, warps=4)
# The same for dense documents of at most SHORT_TILE rows, of which a higher tile would be half empty. H200, the head
# with adapters and its loss, forward and backward, 64 documents of 48 rows, 512 -> 8192: 476 us without these; with the
# first alone 440, with the second 463, with the third 459.
SHORT_TILE = 64
SHORT = {
    EXPAND: replace(EXPAND, rows=SHORT_TILE, columns=128, programs=4),
    SHRINK: replace(SHRINK, rows=SHORT_TILE, stages=4),
    OUTER: replace(OUTER, stages=2),
}
# All rows of a document, ranks a part, columns of the gradient a step.
SHRINK_OUTER = LoraConfig(rows=256, columns=64, strips=1, stages=3)
# Bytes of a call's gradients from which on e and dB share one pass over them: more than the second-level cache keeps
# from one kernel to the next. H200, e, dA and dB of 64 documents of 256 rows: 512 columns 29 us apart and 40 in one
# pass, 8192 columns 229 and 186 (what lies between was not measured); there 2 stages take 248, 16 warps 217, ranks in
# one part 246, 4 programs a document 195.
ONCE_BYTES = 1 << 26
SHARED_BYTES = 232448 - 256  # that a block may have on Hopper, without the pipeline's barriers
MAX_SPLITS = 32  # programs a document, each of which writes its share of e in fp32
# H200, q, k, v and o of 64 documents of 480, 1024 and 2048 rows in one launch: STEP 191, 236 and 371 us, with 8 warps
# 213, 257 and 399. At 96 rows it takes 174 with 8 warps; SHORT_STEP, with values and averages fetched ahead, 133.
STEP = LoraConfig(rows=64, columns=128, strips=4, stages=3, warps=4)
SHORT_STEP = LoraConfig(rows=64, columns=128, depth=32, strips=4)
SHORT_ROWS = 256  # rows a document, on the average, up to which a step is short
# Strips of a tile where a packed batch's output has no multiple of 16: each element then has an address and a mask of
# its own, for which a whole tile leaves no registers.
MASKED_STRIPS = 8
CAST_TILE = 8192  # elements a program casts
MAP_TILE = 4096  # tiles times documents that a program of the map compares
# Elements of the widest output from which on launches are no programmatic dependents. H200, forward and backward of 64
# documents of 256 rows: they gain 1.5 % with 512 columns and lose 3 % with 8192.
LAST_DEPENDENT = 1 << 27


# ---- tiles -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiles:
    """Where a batch's rows lie, as the kernels want it."""

    length: int  # rows a document, or all rows of a packed batch
    documents: int
    cu_seqlens: Tensor | None
    index: Tensor | None
    map: Tensor | None
    count: Tensor | None
    options: dict[str, bool]  # of launches

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def planes(self, tensor: Tensor, block: tuple[int, int, int]) -> Any:
        """A descriptor of [N, columns] as [documents, rows, columns]; a packed batch is one plane."""
        planes, stride = 1 if self.packed else self.documents, tensor.stride(0)
        return descriptor(tensor, block, (planes, self.length, tensor.shape[1]), (self.length * stride, stride, 1))

    def fitted(self, config: LoraConfig) -> LoraConfig:
        """The launch knobs for documents of this length."""
        return config if self.packed or self.length > SHORT_TILE else SHORT.get(config, config)

    def blocks(self, rows: int) -> int:
        """Upper bound of the tiles of so many rows."""
        if self.packed:
            return cdiv(self.length, rows) + self.documents + 1
        return self.documents * cdiv(self.length, rows)


def _plane(matrix: Tensor, block: tuple[int, int, int]) -> Any:
    """A descriptor of one matrix as the only plane."""
    (rows, columns), stride = matrix.shape, matrix.stride(0)
    return descriptor(matrix, block, (1, rows, columns), (rows * stride, stride, 1))


def tiles_of(x: Tensor, layout: Layout, widest: int = 0) -> _Tiles:
    """`widest`: columns of the widest output, where that is known."""
    options = pdl(x) if x.shape[0] * widest < LAST_DEPENDENT else {"PDL": False}
    if layout.cu_seqlens is None:
        return _Tiles(layout.rows, x.shape[0] // layout.rows, None, layout.index, None, None, options)
    rows, documents = x.shape[0], layout.cu_seqlens.shape[0] - 1
    most = cdiv(rows, PROJECT.rows) + documents + 1
    table = torch.empty((most, 3), dtype=torch.int32, device=x.device)
    count = torch.zeros((), dtype=torch.int32, device=x.device)  # no tile where the launch is left out
    among = block_at_least(documents + 1, 128, 1 << 20)
    block = max(1, MAP_TILE // among)
    launch(
        map_kernel, (cdiv(most, block),),
        layout.cu_seqlens, layout.index, table, count, rows, documents, INDEX=layout.index is not None,
        DOCUMENTS=among, BM=PROJECT.rows, BLOCK=block, num_warps=4 if among <= MAP_TILE else 16, **pdl(x),
    )  # fmt: skip
    return _Tiles(rows, documents, layout.cu_seqlens, layout.index, table, count, options)


# ---- launches --------------------------------------------------------------------------------------------------------


def _views(lora_as: list[Tensor], lora_bs: list[Tensor], low: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A stacked [adapters, sum of padded ranks, in] and each projection's B [adapters, out, padded rank] in `low`."""
    (adapters, _, depth), dtype, place = lora_as[0].shape, low.dtype, low.storage_offset()
    ranks = [padded(a.shape[1], dtype) for a in lora_as]
    shapes = [(adapters, sum(ranks), padded(depth, dtype))]
    shapes += [(adapters, b.shape[1], rank) for b, rank in zip(lora_bs, ranks, strict=True)]
    views = []
    for planes, rows, columns in shapes:
        views.append(low.as_strided((planes, rows, columns), (rows * columns, columns, 1), place))
        place += planes * rows * columns
    return views[0], views[1:]


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
        tiles = [cdiv(adapters * n, CAST_TILE // block) for n, block in zip((rank, out), blocks, strict=True)]
        launch(
            cast_kernel, (sum(tiles),),
            a.contiguous(), b.contiguous(), stacked[:, row:], target, tiles[0], adapters,
            a.shape[1], a.shape[2], rank, depth, stacked.stride(0), out, width, padded_width,
            BLOCK_A=blocks[0], BLOCK_B=blocks[1], TILE=CAST_TILE, num_warps=8, **pdl(a),
        )  # fmt: skip
        row += rank
    return stacked, own


def _project(
    shared: list[tuple[Tensor, Tensor]], s: Tensor, s_column: int, rank: int, own: Tensor, out: Tensor, tiles: _Tiles,
    *, scale: float = 1.0, residual: Tensor | None = None, transposed: bool = False,
) -> None:  # fmt: skip
    """out [N, columns] (a view with rows of 16 bytes) = sum of a w^T + s[:, s_column:][:rank] own_b^T + residual."""
    if shared:
        config = PROJECT
    elif rank <= MAX_RANK:
        config = EXPAND
    else:
        config = SHRINK if out.shape[1] <= SHRINK.columns else SHRINK_MANY
    config = tiles.fitted(config)
    bm, bn, bk = config.rows, config.columns, config.depth
    columns = out.shape[1]
    if tiles.packed:
        strips = 1 if columns % 16 == out.stride(0) % 16 == 0 else MASKED_STRIPS
    else:
        # A strip of the residual lies beside the output's.
        strips = config.strips if residual is None else 2 * config.strips
    w_block = (1, bk, bn) if transposed else (1, bn, bk)
    missing = MAX_SHARED - len(shared)  # None there: a descriptor costs the host some microseconds a launch
    pairs = [desc for a, w in shared for desc in (tiles.planes(a, (1, bm, bk)), _plane(w, w_block))]
    depths = [a.shape[1] for a, _ in shared] + [0] * missing
    y_desc, residual_desc = (
        None if tiles.packed or t is None else tiles.planes(t, (1, bm, bn // strips)) for t in (out, residual)
    )
    grid = min(config.programs * grid_size(s), tiles.blocks(bm) * cdiv(columns, bn))
    launch(
        project_kernel, (grid,),
        *pairs, *[None] * (2 * missing), tiles.planes(s, (1, bm, bk)), descriptor(own, w_block), y_desc, residual_desc,
        out, residual, tiles.map, tiles.count, tiles.index, tiles.length, tiles.documents, columns, out.stride(0),
        s_column, scale,
        D0=depths[0], D1=depths[1], D2=depths[2], RANK=rank, TRANSPOSED=transposed, PACKED=tiles.packed,
        INDEX=tiles.index is not None and not tiles.packed, RESIDUAL=residual is not None, STRIPS=strips,
        BM=bm, BN=bn, BK=bk,
        num_warps=config.warps, num_stages=config.stages, **tiles.options,
    )  # fmt: skip


def _project_three(
    a: Tensor, weights: list[Tensor], s: Tensor, own: list[Tensor], outs: list[Tensor], tiles: _Tiles
) -> None:
    """out_p = a w_p^T + s_p own_p,b^T of a packed batch, without residuals; s_p lie side by side in s."""
    bm, bn, bk = PROJECT.rows, PROJECT.columns, PROJECT.depth
    columns, ranks = [out.shape[1] for out in outs], [b.shape[2] for b in own]
    grid = min(grid_size(a), tiles.blocks(bm) * sum(cdiv(n, bn) for n in columns))
    launch(
        project_three_kernel, (grid,),
        tiles.planes(a, (1, bm, bk)), *(_plane(w, (1, bn, bk)) for w in weights),
        tiles.planes(s, (1, bm, bk)), *(descriptor(b, (1, bn, bk)) for b in own), *outs,
        tiles.map, tiles.count, *columns, *(out.stride(0) for out in outs), ranks[0], ranks[0] + ranks[1],
        D=a.shape[1], RANK=max(ranks), BM=bm, BN=bn, BK=bk,
        num_warps=PROJECT.warps, num_stages=PROJECT.stages, **tiles.options,
    )  # fmt: skip


def _shrink(grads: list[Tensor], own: list[Tensor], e: Tensor, tiles: _Tiles, scale: float) -> None:
    """e_p = scale * g_p own_p,b of three or four projections of a packed batch, which lie side by side in e."""
    config = SHRINK_MANY
    bm, bn, bk = config.rows, config.columns, config.depth
    missing = 4 - len(own)
    depths, ranks = [b.shape[1] for b in own], [b.shape[2] for b in own]
    grid = min(config.programs * grid_size(e), tiles.blocks(bm) * len(own))
    launch(
        shrink_kernel, (grid,),
        *(tiles.planes(g, (1, bm, bk)) for g in grads), *[None] * missing,
        *(descriptor(b, (1, bk, bn)) for b in own), *[None] * missing, e, tiles.map, tiles.count,
        *depths, *[0] * missing, *ranks, *[0] * missing, e.stride(0), scale,
        COUNT=len(own), BM=bm, BN=bn, BK=bk, num_warps=config.warps, num_stages=config.stages, **tiles.options,
    )  # fmt: skip


def _outer(
    e: Tensor, x: Tensor, column: int, a: Tensor, other: tuple[Tensor, Tensor, Tensor] | None, tiles: _Tiles
) -> None:
    """a = sum over each adapter's rows of e[:, column:]^T x; with `other` (grad, s, b) b of grad^T s[:, column:]."""
    config = tiles.fitted(OUTER)
    bi, bj, bk = config.rows, config.columns, config.depth
    grad, s, b = other or (e, x, a)  # stand where there is none, unread
    count_a, count_b = (cdiv(t.shape[1], bi) * cdiv(t.shape[2], bj) for t in (a, b))
    e_desc, grad_desc = (tiles.planes(t, (1, bk, bi)) for t in (e, grad))
    x_desc, s_desc = (tiles.planes(t, (1, bk, bj)) for t in (x, s))
    launch(
        outer_kernel, (count_a + (count_b if other else 0), len(a)),
        e_desc, x_desc, a, *a.shape[1:], column, grad_desc, s_desc, b, *b.shape[1:], column,
        count_a, tiles.cu_seqlens, tiles.index, tiles.length, tiles.documents,
        PACKED=tiles.packed, INDEX=tiles.index is not None, BI=bi, BJ=bj, BK=bk,
        num_warps=config.warps, num_stages=config.stages, **tiles.options,
    )  # fmt: skip


def _shares_pass(grads: list[Tensor], tiles: _Tiles) -> bool:
    """Whether `_shrink_outer` takes the place of a product for e and one for dB."""
    own_rows = not tiles.packed and tiles.index is None and tiles.length <= SHRINK_OUTER.rows
    return own_rows and sum(grad.numel() * grad.element_size() for grad in grads) >= ONCE_BYTES


def _splits(programs: int, documents: int, most: int) -> int:
    """Programs a document, at most so many: the fewest whose rounds fill the device nearly as well as any."""

    def filled(splits: int) -> float:
        return splits * documents / (cdiv(splits * documents, programs) * programs)

    fullest = max(map(filled, range(1, most + 1)))
    return next(splits for splits in range(1, most + 1) if filled(splits) >= 0.9 * fullest)


def _shrink_outer(grad: Tensor, own: Tensor, s: Tensor, e: Tensor, b: Tensor, tiles: _Tiles, scale: float) -> None:
    """e = scale * grad own_b, b = grad^T s, both by document, of the columns of s and e that are one projection's."""
    config = SHRINK_OUTER
    documents, out, rank = own.shape
    bm, bn = block_at_least(tiles.length, 64, config.rows), config.depth
    r0 = block_at_least(rank, 16, config.columns)
    r1 = block_at_least(rank - r0, 16, MAX_RANK) if rank > r0 else 0
    stage = (bm + r0 + r1) * bn * own.element_size()
    room = SHARED_BYTES - (r0 + r1) * (bm * own.element_size() + bn * b.element_size())
    splits = _splits(grid_size(e), documents, min(MAX_SPLITS, cdiv(out, bn)))
    shares = e if splits == 1 else e.new_empty((splits * e.shape[0], rank), dtype=torch.float32)
    # The copy engine writes no rows that are not multiples of 16 bytes.
    whole = b if can_describe(b) else new_described(b, documents * out, b.shape[2]).unflatten(0, (documents, out))

    def parts(tensor: Tensor, rows: int) -> list[Any]:
        """Descriptors of the first r0 ranks and of the rest."""
        describe = descriptor if tensor.dim() == 3 else tiles.planes
        return [describe(tensor[..., a : a + n], (1, rows, n)) if n else None for a, n in ((0, r0), (r0, r1))]

    launch(
        shrink_outer_kernel, (splits, documents),
        tiles.planes(grad, (1, bm, bn)), *parts(own, bn), *parts(s, bm),
        *parts(shares.unflatten(0, (-1, tiles.length)), bm), *parts(whole, bn), out, scale, BM=bm, BN=bn, R0=r0, R1=r1,
        num_warps=config.warps, num_stages=max(2, min(config.stages, room // stage)), **tiles.options,
    )  # fmt: skip
    if splits > 1:
        block = 1024
        launch(
            sum_kernel, (cdiv(e.numel(), block),), shares, e, e.numel(), rank, e.stride(0),
            PARTS=splits, BLOCK=block, **tiles.options,
        )  # fmt: skip
    if whole is not b:
        b.copy_(whole)


def _step(
    e: Tensor, x: Tensor, grads: list[Tensor], s: Tensor, column: int, lora_as: list[Moments], lora_bs: list[Moments],
    stacked: Tensor, own: list[Tensor], out_scales: list[Tensor | None], tiles: _Tiles, step: AdamStep,
) -> None:  # fmt: skip
    """A step of A and B of up to STEPPED projections, whose ranks begin at `column`, with the sums that `_outer` would
    write as gradients. `stacked` and `own`: their copies. Packed batches without an index."""
    documents, _, depth = lora_as[0].value.shape
    short = tiles.length <= SHORT_ROWS * documents
    config = SHORT_STEP if short else STEP
    bi, bj, bk = config.rows, config.columns, config.depth
    outs, ranks = [b.value.shape[1] for b in lora_bs], [a.value.shape[1] for a in lora_as]
    counts = [
        cdiv(rank, bi) * cdiv(depth, bj) + cdiv(out, bi) * cdiv(rank, bj) for out, rank in zip(outs, ranks, strict=True)
    ]
    first = [sum(counts[:i]) for i in range(1, STEPPED)]
    some = next((scale for scale in out_scales if scale is not None), None)  # stands where there is none, unread
    scales = [some if scale is None else scale for scale in out_scales]
    scaled = sum((scale is not None) << i for i, scale in enumerate(out_scales))

    def four(values: Sequence[Any], missing: Any = None) -> list[Any]:
        return [*values, *[missing] * (STEPPED - len(values))]

    launch(
        step_kernel, (sum(counts), documents),
        tiles.planes(e, (1, bk, bi)), *(tiles.planes(t, (1, bk, bj)) for t in (x, s)), column,
        *four([tiles.planes(grad, (1, bk, bi)) for grad in grads]),
        *(t for ts in zip(*lora_as, strict=True) for t in four(ts)), stacked, *stacked.stride()[:2],
        *(t for ts in zip(*lora_bs, strict=True) for t in four(ts)), *four(own), *four(scales), scaled,
        *four(ranks, 0), *four([b.shape[2] for b in own], 0), *four(outs, 0), depth, *first, tiles.cu_seqlens,
        step.steps, step.factors, step.lr, step.beta1, 1.0 - step.beta1, step.beta2, 1.0 - step.beta2, step.eps,
        1.0 - step.lr * step.weight_decay,
        COUNT=len(own), MOMENT=lora_as[0].mean is not None, SCALED=some is not None,
        PREFETCH=short and x.device.type != "cpu", STRIPS=config.strips, BI=bi, BJ=bj, BK=bk,
        num_warps=config.warps, num_stages=config.stages, **tiles.options,
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
    _project([], x, 0, x.shape[1], stacked, s, tiles, scale=scale)
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


def _shrunk(grads: list[Tensor], own: list[Tensor], e: Tensor, tiles: _Tiles, scale: float) -> None:
    """e = scale * g B of all projections side by side."""
    if tiles.packed and 3 <= len(own) <= 4:
        _shrink(grads, own, e, tiles, scale)
    else:
        for grad, b, part in zip(grads, own, _by_projection(e, own), strict=True):
            _project([], grad, 0, b.shape[1], b, part, tiles, scale=scale, transposed=True)


def _by_projection(ranks: Tensor, own: list[Tensor]) -> Sequence[Tensor]:
    """The columns of e or s that are each projection's."""
    return ranks.split_with_sizes([b.shape[2] for b in own], dim=1)


def _data_gradient(
    grads: list[Tensor], x: Tensor, weights: list[Tensor | None], e: Tensor, stacked: Tensor, tiles: _Tiles,
    later: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dx plus `later`."""
    rows, depth = x.shape
    shared = [(g, described(w.to(x.dtype))) for g, w in zip(grads, weights, strict=True) if w is not None]
    d_x = new_described(x, rows, depth)
    later = None if later is None else _with_strides(later, d_x)
    _project(shared[:MAX_SHARED], e, 0, stacked.shape[1], stacked, d_x, tiles, residual=later, transposed=True)
    for grad, weight in shared[MAX_SHARED:]:
        d_x += (grad @ weight)[:, :depth]
    return d_x.contiguous()


def forward(
    x: Tensor, weights: list[Tensor | None], lora_as: list[Tensor], lora_bs: list[Tensor],
    residuals: list[Tensor | None], layout: Layout, scale: float,
) -> list[Tensor]:  # fmt: skip
    """[y of each projection..., s, the adapters in x's dtype]; s holds scale * x A^T, each rank padded to 16 bytes."""
    with torch.cuda.device_of(x):
        low = x.new_empty(low_size(lora_as, lora_bs, x.dtype))
        tiles = tiles_of(x, layout, max(b.shape[1] for b in lora_bs))
        ys, s = products(x, weights, *_cast(lora_as, lora_bs, low), residuals, tiles, scale)
    return [*ys, s, low]


def backward(
    grads: list[Tensor], x: Tensor, weights: list[Tensor | None], lora_as: list[Tensor], lora_bs: list[Tensor],
    s: Tensor, low: Tensor, layout: Layout, scale: float, wants_x: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    """(dx or an empty tensor, dA of each projection, dB of each). An empty `low` is computed again."""
    with torch.cuda.device_of(x):
        tiles = tiles_of(x, layout, max(b.shape[1] for b in lora_bs))
        if low.numel():
            stacked, own = _views(lora_as, lora_bs, low)
        else:
            stacked, own = _cast(lora_as, lora_bs, x.new_empty(low_size(lora_as, lora_bs, x.dtype)))
        grads = [described(grad) for grad in grads]
        d_as, d_bs = (
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in ts] for ts in (lora_as, lora_bs)
        )
        e = x.new_empty((x.shape[0], stacked.shape[1]))
        shares = _shares_pass(grads, tiles)
        if shares:
            s_parts, e_parts = (_by_projection(t, own) for t in (s, e))
            for grad, b, s_part, e_part, d_b in zip(grads, own, s_parts, e_parts, d_bs, strict=True):
                _shrink_outer(grad, b, s_part, e_part, d_b, tiles, scale)
        else:
            _shrunk(grads, own, e, tiles, scale)
        d_x = _data_gradient(grads, x, weights, e, stacked, tiles) if wants_x else x.new_empty(0)
        x = described(x)
        column = 0
        for grad, b, d_a, d_b in zip(grads, own, d_as, d_bs, strict=True):
            _outer(e, x, column, d_a, None if shares else (grad, s, d_b), tiles)
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
        e = x.new_empty((x.shape[0], stacked.shape[1]))
        _shrunk(grads, own, e, tiles, 1.0)
        d_x = _data_gradient(grads, x, weights, e, stacked, tiles, later) if wants_x else x.new_empty(0)
        x = described(x)
        column = 0
        for i in range(0, len(own), STEPPED):
            some = slice(i, i + STEPPED)
            _step(
                e, x, grads[some], s, column, lora_as[some], lora_bs[some], stacked, own[some], out_scales[some],
                tiles, step,
            )  # fmt: skip
            column += sum(b.shape[2] for b in own[some])
    return d_x
