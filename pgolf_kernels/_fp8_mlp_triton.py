"""Triton kernels of fp8_mlp.py: casts that write a matrix as it lies and transposed, and the products that carry the
activation.

The products are persistent, as those of _fused_mlp_triton.py. Their accumulators have a thread hold rows r, r + 8,
r + 64 and r + 72 of a tile of 128 by 128, and columns c, c + 1, c + 8, c + 9 and so on. in_order of
_fp8_mlp_torch.py puts numbers 0, 8, 64 and 72 of 128 side by side: a thread then has whole words of four numbers to
write, along rows and along columns. In the products Triton never moves bytes from thread to thread, only words: of
bytes it makes more instructions, and 3.6 made wrong ones. The casts turn bytes, of those layouts alone for which 3.6
does so rightly (_laid_out).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels._fp8_mlp_torch import BLOCK, E4M3, LIMIT, MOST, SMALLEST_SCALE, Operand, padded
from pgolf_kernels._triton_op import block_at_least, cdiv, descriptor, grid_size, machine_code
from pgolf_kernels._triton_tile import product_tile, strip

STATISTICS_TILE, STATISTICS_PROGRAMS = 8192, 2  # elements a step; programs a multiprocessor
CAST_COLUMNS, CAST_PROGRAMS = 64, 4
# Of the products that carry the activation: depth a step first. Other values were slower on an H200.
STEP, STAGES, WARPS, PROGRAMS = 64, 5, 4, 2
ADD_ROWS, ADD_COLUMNS, ADD_STEP, ADD_STRIPS = 128, 256, 128, 4
ADD_STAGES, ADD_WARPS, ADD_PROGRAMS = 4, 8, 1

_BLOCK, _LIMIT = tl.constexpr(BLOCK), tl.constexpr(LIMIT)
_MOST, _SMALLEST_SCALE = tl.constexpr(MOST), tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _scale_of(largest):
    """The power of two whose MOST multiples reach `largest`."""
    bits = tl.maximum(largest / _MOST, _SMALLEST_SCALE).to(tl.int32, bitcast=True)
    return ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def _bound_of_squares(a_facts, b_facts, DEPTH: tl.constexpr):
    """As _fp8_mlp_torch's."""
    means = tl.load(a_facts + 2) * tl.load(b_facts + 2)
    return tl.minimum(tl.load(a_facts + 1) * tl.load(b_facts + 1), means * means * (_LIMIT / DEPTH))


@triton.jit
def _quarters_of_columns(tile, COLUMNS: tl.constexpr):
    """Of a tile [128, COLUMNS] with numbers (b, a, j, i < 8) those of b, j = 0, 0; 0, 1; 1, 0; 1, 1."""
    tile = tl.permute(tl.reshape(tile, (_BLOCK, 2, COLUMNS // 32, 2, 8)), (0, 2, 4, 3, 1))
    left, right = tl.split(tile)
    first, second = tl.split(left)
    third, fourth = tl.split(right)
    shape: tl.constexpr = (_BLOCK, COLUMNS // 4)
    return tl.reshape(first, shape), tl.reshape(second, shape), tl.reshape(third, shape), tl.reshape(fourth, shape)


@triton.jit
def _byte(value, place: tl.constexpr):
    return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * place)


@triton.jit
def _words(a, b, c, d, ASM: tl.constexpr):
    """Four numbers a word, in e4m3, the first lowest. The interpreter knows no instruction of the machine."""
    if ASM:
        asm: tl.constexpr = """{ .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high}; }"""
        return tl.inline_asm_elementwise(asm, "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return _byte(a, 0) | _byte(b, 1) | _byte(c, 2) | _byte(d, 3)


@triton.jit
def _number(words, place: tl.constexpr):
    return ((words >> (8 * place)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _numbers(words, ASM: tl.constexpr):
    """The inverse of _words."""
    if ASM:
        asm: tl.constexpr = """{ .reg .b16 low, high, a, b, c, d; .reg .b32 first, second;
            mov.b32 {low, high}, $4;
            cvt.rn.f16x2.e4m3x2 first, low;
            cvt.rn.f16x2.e4m3x2 second, high;
            mov.b32 {a, b}, first; mov.b32 {c, d}, second;
            cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; cvt.f32.f16 $2, c; cvt.f32.f16 $3, d; }"""
        kinds: tl.constexpr = (tl.float32, tl.float32, tl.float32, tl.float32)
        return tl.inline_asm_elementwise(asm, "=f,=f,=f,=f,r", [words], dtype=kinds, is_pure=True, pack=1)
    else:
        return _number(words, 0), _number(words, 1), _number(words, 2), _number(words, 3)


@triton.jit
def _gathered(a, b, c, d, place: tl.constexpr):
    """The words' bytes at `place`, a word."""
    low = ((a >> (8 * place)) & 0xFF) | (((b >> (8 * place)) & 0xFF) << 8)
    return low | (((c >> (8 * place)) & 0xFF) << 16) | (((d >> (8 * place)) & 0xFF) << 24)


@triton.jit
def _turned(a, b, c, d, ASM: tl.constexpr):
    """Four words as a matrix of bytes, transposed."""
    if ASM:
        asm: tl.constexpr = """{ .reg .b32 p, q, r, s;
            prmt.b32 p, $4, $5, 0x5140; prmt.b32 q, $4, $5, 0x7362;
            prmt.b32 r, $6, $7, 0x5140; prmt.b32 s, $6, $7, 0x7362;
            prmt.b32 $0, p, r, 0x5410; prmt.b32 $1, p, r, 0x7632;
            prmt.b32 $2, q, s, 0x5410; prmt.b32 $3, q, s, 0x7632; }"""
        kinds: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
        words = [a, b, c, d]
        return tl.inline_asm_elementwise(asm, "=&r,=&r,=&r,=&r,r,r,r,r", words, dtype=kinds, is_pure=True, pack=1)
    else:
        return _gathered(a, b, c, d, 0), _gathered(a, b, c, d, 1), _gathered(a, b, c, d, 2), _gathered(a, b, c, d, 3)


@triton.jit
def _store_both(words, out_desc, turned_desc, m, n, ASM: tl.constexpr):
    """A tile of words [128, 32], four columns each, as it lies and transposed. Descriptors count words, too."""
    out_desc.store([m, n // 4], words)
    words = tl.permute(tl.reshape(words, (2, 4, 2, 8, _BLOCK // 4)), (1, 3, 4, 2, 0))
    left, right = tl.split(words)
    a, b = tl.split(left)
    c, d = tl.split(right)
    p, q, r, s = _turned(a, b, c, d, ASM)
    both = tl.join(tl.join(p, q), tl.join(r, s))  # [4, 8, 32, j, b]
    both = tl.permute(tl.reshape(both, (_BLOCK // 4, 4, 8, 2, 2)), (4, 1, 3, 2, 0))
    turned_desc.store([n, m // 4], tl.reshape(both, (_BLOCK, _BLOCK // 4)))


@triton.jit(do_not_specialize=["rows"])
def _statistics_kernel(x_ptr, parts_ptr, rows, columns, row_stride, column_stride,
                       BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """parts [3, programs]: largest magnitude, largest squared norm and summed norms of rows.

    From the last row to the first: what was written last may still be in the cache.
    """
    largest = tl.zeros((BR, BC), tl.float32)
    norms, total = tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
    tiles = tl.cdiv(rows, BR)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = ((tiles - 1 - tile) * BR + tl.arange(0, BR))[:, None]
        squares = tl.zeros((BR,), tl.float32)
        for first in range(0, columns, BC):
            column = (first + tl.arange(0, BC))[None, :]
            place = x_ptr + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
            x = tl.load(place, mask=(row < rows) & (column < columns), other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(x))
            squares += tl.sum(x * x, axis=1)
        norms = tl.maximum(norms, squares)
        total += tl.sqrt(squares)
    program, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(parts_ptr + program, tl.max(tl.max(largest, axis=1), axis=0))
    tl.store(parts_ptr + programs + program, tl.max(norms, axis=0))
    tl.store(parts_ptr + 2 * programs + program, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["rows", "parts"])
def _cast_kernel(x_ptr, parts_ptr, rows_ptr, columns_ptr, facts_ptr, rows, columns, row_stride, column_stride,
                 length, parts, PARTS: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Writes x / scale as it lies and transposed, there with rows in order and zeros up to `length`."""
    part = tl.arange(0, PARTS)
    known = part < parts
    scale = _scale_of(tl.max(tl.load(parts_ptr + part, mask=known, other=0.0), axis=0))
    inverse = 1.0 / scale
    if tl.program_id(0) == 0:
        norm = tl.max(tl.load(parts_ptr + parts + part, mask=known, other=0.0), axis=0)
        total = tl.sum(tl.load(parts_ptr + 2 * parts + part, mask=known, other=0.0), axis=0)
        tl.store(facts_ptr, scale)
        tl.store(facts_ptr + 1, norm)
        tl.store(facts_ptr + 2, total / rows)
    tiles_c = tl.cdiv(columns, BC)
    place = tl.arange(0, _BLOCK)
    inner = ((place >> 1) & 1) * 64 + (place >> 5) * 16 + (place & 1) * 8 + ((place >> 2) & 7)
    for tile in range(tl.program_id(0), length // _BLOCK * tiles_c, tl.num_programs(0)):
        first = tile // tiles_c * _BLOCK
        row = (first + inner)[:, None].to(tl.int64)
        column = (tile % tiles_c * BC + tl.arange(0, BC))[None, :].to(tl.int64)
        inside = (row < rows) & (column < columns)
        x = tl.load(x_ptr + row * row_stride + column * column_stride, mask=inside, other=0.0).to(tl.float32)
        cast = (x * inverse).to(tl.float8e4nv)
        tl.store(rows_ptr + row * columns + column, cast, mask=inside)
        below = tl.trans(column) * length + (first + place)[None, :]
        tl.store(columns_ptr + below, tl.trans(cast), mask=tl.trans(column) < columns)


@triton.jit
def _shifts():
    """By how much a word's four signs are shifted in the word of signs that it shares with seven others, [1, 4, 1, 2].

    These are a thread's: words 8 a + 2 q + e of a row, for one q.
    """
    return (2 * tl.arange(0, 4)[:, None, None] + tl.arange(0, 2)[None, None, :])[None, :, :, :]


@triton.jit
def _sign_places(m, n, rows):
    """(offsets, mask) [128, 4] of a tile's signs."""
    row = (m + tl.arange(0, _BLOCK))[:, None]
    return (n // _BLOCK * rows.to(tl.int64) + row) * 4 + tl.arange(0, 4)[None, :], row < rows


@triton.jit(do_not_specialize=["rows", "tiles_m"])
def _up_kernel(x_desc, w_desc, hidden_desc, turned_desc, negative_ptr, x_facts, w_facts, facts_ptr, rows, tiles_m,
               tiles_n, slope, DEPTH: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """hidden = leaky_relu(x W^T)^2 / scale as it lies and transposed; 32 signs of the product a word."""
    steep = tl.maximum(slope, 1.0)
    bound = steep * steep * _bound_of_squares(x_facts, w_facts, DEPTH)
    scale = _scale_of(bound)
    if tl.program_id(0) == 0:
        tl.store(facts_ptr, scale)
        tl.store(facts_ptr + 1, bound)
    factor = tl.load(x_facts) * tl.load(w_facts) * tl.rsqrt(scale)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * _BLOCK
        n = (tile % tiles_n) * _BLOCK
        acc = product_tile(x_desc, w_desc, m, n, DEPTH, _BLOCK, _BLOCK, BK)
        leaky = acc * tl.where(acc < 0, factor * slope, factor)
        a, b, c, d = _quarters_of_columns(leaky * tl.abs(leaky), _BLOCK)  # e4m3 keeps u's sign
        words = _words(a, b, c, d, ASM)
        signs = tl.reshape(words & -0x7F7F7F80, (_BLOCK, 4, 4, 2)).to(tl.uint32, bitcast=True) >> _shifts()
        signs = tl.sum(tl.sum(signs, axis=3), axis=1).to(tl.int32, bitcast=True)
        places, inside = _sign_places(m, n, rows)
        tl.store(negative_ptr + places, signs, mask=inside)
        _store_both(words & 0x7F7F7F7F, hidden_desc, turned_desc, m, n, ASM)


@triton.jit
def _times_slope(acc, signed, positive, negative):
    return acc * tl.sqrt(tl.abs(signed)) * tl.where(signed < 0, negative, positive)


@triton.jit
def _gradient_words(acc, signed, positive, negative, ASM: tl.constexpr):
    """Half a tile of _grad_pre_kernel, a < 2 or a >= 2: all at once would be more than there are registers for."""
    p, q, r, s = _numbers(signed, ASM)
    a, b, c, d = _quarters_of_columns(acc, _BLOCK // 2)
    a, b = _times_slope(a, p, positive, negative), _times_slope(b, q, positive, negative)
    c, d = _times_slope(c, r, positive, negative), _times_slope(d, s, positive, negative)
    return _words(a, b, c, d, ASM)


@triton.jit(do_not_specialize=["rows", "tiles_m"])
def _grad_pre_kernel(g_desc, w_desc, hidden_desc, out_desc, turned_desc, negative_ptr, g_facts, w_facts, hidden_facts,
                     facts_ptr, rows, tiles_m, tiles_n, slope, DEPTH: tl.constexpr, BK: tl.constexpr,
                     ASM: tl.constexpr):  # fmt: skip
    """out = (g W^T) act'(u) / scale as it lies and transposed, with act' from hidden and the signs."""
    steep = tl.maximum(slope, 1.0)
    product = tl.sqrt(_bound_of_squares(g_facts, w_facts, DEPTH))
    scale = _scale_of(2 * steep * tl.sqrt(tl.load(hidden_facts + 1)) * product)
    if tl.program_id(0) == 0:
        tl.store(facts_ptr, scale)
    positive = 2 * tl.sqrt(tl.load(hidden_facts)) * (tl.load(g_facts) * tl.load(w_facts) / scale)
    negative = -slope * positive
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * _BLOCK
        n = (tile % tiles_n) * _BLOCK
        acc = product_tile(g_desc, w_desc, m, n, DEPTH, _BLOCK, _BLOCK, BK)
        places, inside = _sign_places(m, n, rows)
        signs = tl.load(negative_ptr + places, mask=inside, other=0)[:, None, :, None] << _shifts()
        signs = tl.reshape(signs & -0x7F7F7F80, (_BLOCK, _BLOCK // 4))
        signed = hidden_desc.load([m, n // 4]) | signs
        left, right = tl.split(tl.permute(tl.reshape(acc, (_BLOCK, 2, 2, _BLOCK // 4)), (0, 1, 3, 2)))
        left = _gradient_words(left, strip(signed, 0, 2, _BLOCK, _BLOCK // 4), positive, negative, ASM)
        right = _gradient_words(right, strip(signed, 1, 2, _BLOCK, _BLOCK // 4), positive, negative, ASM)
        words = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (_BLOCK, _BLOCK // 4))
        _store_both(words, out_desc, turned_desc, m, n, ASM)


@triton.jit(do_not_specialize=["rows"])
def _add_product_kernel(a_desc, b_desc, total_desc, a_facts, b_facts, rows, columns, DEPTH: tl.constexpr,
                        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STRIPS: tl.constexpr):  # fmt: skip
    """total += a b^T, added in the second-level cache: no program reads the total."""
    tiles_n = tl.cdiv(columns, BN)
    factor = tl.load(a_facts) * tl.load(b_facts)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * BM
        n = (tile % tiles_n) * BN
        acc = product_tile(a_desc, b_desc, m, n, DEPTH, BM, BN, BK)
        for i in tl.static_range(STRIPS):
            part = strip(acc, i, STRIPS, BM, BN) * factor
            total_desc.atomic_add([m, n + i * (BN // STRIPS)], part.to(total_desc.dtype))


# ---- launches --------------------------------------------------------------------------------------------------------


def _laid_out(x: Tensor) -> Tensor:
    """bfloat16 along rows or columns, of strides that let a thread read 16 bytes.

    Of the tiles that other dtypes and strides lead to, Triton 3.6 turns the bytes wrongly.
    """
    x = x.to(torch.bfloat16)
    inner, outer = sorted(x.stride())
    suits = inner == 1 and outer % 16 == 0 and x.data_ptr() % 16 == 0
    return x if suits else x.clone(memory_format=torch.contiguous_format)


def operand(x: Tensor) -> Operand:
    """x [R, C], of any strides, in both orders."""
    x = _laid_out(x)
    (rows, columns), strides, length = x.shape, x.stride(), padded(x.shape[0])
    block = block_at_least(columns, 16, STATISTICS_TILE)
    programs = min(grid_size(x) * STATISTICS_PROGRAMS, cdiv(rows, STATISTICS_TILE // block))
    parts = x.new_empty((3, programs), dtype=torch.float32)
    as_it_lies = x.new_empty((rows, columns), dtype=E4M3)
    transposed = x.new_empty((columns, length), dtype=E4M3)
    facts = x.new_empty(4, dtype=torch.float32)
    tiles = length // BLOCK * cdiv(columns, CAST_COLUMNS)
    with torch.cuda.device_of(x):
        _statistics_kernel[(programs,)](
            x, parts, rows, columns, *strides, BR=STATISTICS_TILE // block, BC=block, num_warps=4
        )
        _cast_kernel[(min(grid_size(x) * CAST_PROGRAMS, tiles),)](
            x, parts, as_it_lies, transposed, facts, rows, columns, *strides, length, programs,
            PARTS=block_at_least(programs, 16, 1024), BC=CAST_COLUMNS, num_warps=4,
        )  # fmt: skip
    return as_it_lies, transposed, facts


def _of_words(x: Tensor) -> Any:
    """Of tiles of 128 by 128 e4m3 numbers, four a word."""
    return descriptor(x.view(torch.int32), (BLOCK, BLOCK // 4))


def _grid(x: Tensor, tiles: int) -> tuple[int]:
    return (min(grid_size(x) * PROGRAMS, tiles),)


def up(x: Tensor, x_facts: Tensor, w: Tensor, w_facts: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden [N, F'], the same transposed [F, N'], signs [F' / 128, N, 4], facts) of x [N, D] and W_up [F, D]."""
    (rows, depth), hidden_dim = x.shape, w.shape[0]
    tiles_m, tiles_n = cdiv(rows, BLOCK), cdiv(hidden_dim, BLOCK)
    hidden = x.new_empty((rows, tiles_n * BLOCK))
    turned = x.new_empty((hidden_dim, tiles_m * BLOCK))
    negative = x.new_empty((tiles_n, rows, 4), dtype=torch.int32)
    facts = torch.empty_like(x_facts)
    with torch.cuda.device_of(x):
        _up_kernel[_grid(x, tiles_m * tiles_n)](
            descriptor(x, (BLOCK, STEP)), descriptor(w, (BLOCK, STEP)), _of_words(hidden),
            _of_words(turned), negative, x_facts, w_facts, facts, rows, tiles_m, tiles_n, slope,
            DEPTH=depth, BK=STEP, ASM=machine_code(), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return hidden, turned, negative, facts


def grad_pre(
    g: Tensor, g_facts: Tensor, w: Tensor, w_facts: Tensor, hidden: Tensor, negative: Tensor, hidden_facts: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient of u [N, F'], the same transposed [F, N'], facts) of g [N, D_out], W_down^T [F, D_out] and what up
    gave."""
    (rows, depth), hidden_dim = g.shape, w.shape[0]
    tiles_m, tiles_n = cdiv(rows, BLOCK), cdiv(hidden_dim, BLOCK)
    out, turned = torch.empty_like(hidden), g.new_empty((hidden_dim, tiles_m * BLOCK))
    facts = torch.empty_like(g_facts)
    with torch.cuda.device_of(g):
        _grad_pre_kernel[_grid(g, tiles_m * tiles_n)](
            descriptor(g, (BLOCK, STEP)), descriptor(w, (BLOCK, STEP)), _of_words(hidden),
            _of_words(out), _of_words(turned), negative, g_facts, w_facts, hidden_facts, facts,
            rows, tiles_m, tiles_n, slope, DEPTH=depth, BK=STEP, ASM=machine_code(), num_warps=WARPS,
            num_stages=STAGES,
        )  # fmt: skip
    return out, turned, facts


def add_product(total: Tensor, a: Tensor, b: Tensor, a_facts: Tensor, b_facts: Tensor) -> None:
    """total [R, C] += a [R, K] b [C, K]^T, times the scales."""
    rows, columns = total.shape
    tiles = cdiv(rows, ADD_ROWS) * cdiv(columns, ADD_COLUMNS)
    with torch.cuda.device_of(a):
        _add_product_kernel[(min(grid_size(a) * ADD_PROGRAMS, tiles),)](
            descriptor(a, (ADD_ROWS, ADD_STEP)), descriptor(b, (ADD_COLUMNS, ADD_STEP)),
            descriptor(total, (ADD_ROWS, ADD_COLUMNS // ADD_STRIPS)), a_facts, b_facts, rows, columns,
            DEPTH=a.shape[1], BM=ADD_ROWS, BN=ADD_COLUMNS, BK=ADD_STEP, STRIPS=ADD_STRIPS, num_warps=ADD_WARPS,
            num_stages=ADD_STAGES,
        )  # fmt: skip
