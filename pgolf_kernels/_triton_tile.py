"""Device code and host helpers that Triton kernels with tiles in the accumulator layout share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pgolf_kernels._triton_op import can_describe, pdl


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """The first statement of a kernel launched with `pdl`: nothing before it may touch memory.

    The kernel after may come on now, up to its own call of this; all that the kernels before wrote is seen after it.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def prefetch(pointers):
    """Brings the lines of 128 bytes that the pointers are in into the second-level cache; nothing waits for them.

    Triton's interpreter knows no such instruction: callers leave it out there.
    """
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def product_tile(x_desc, w_desc, m, n, DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The tile [BM, BN] of x W^T from row m and column n on, fp32; descriptors of x [N, DEPTH] and W [F, DEPTH]."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, DEPTH, BK):
        acc = tl.dot(x_desc.load([m, k]), w_desc.load([n, k]).T, acc)
    return acc


@triton.jit
def dividing(gain):
    """The gain, and 1e-12 for one of 0: a backward pass divides by it, and a query times either changes no score."""
    return tl.where(gain == 0.0, 1e-12, gain)


@triton.jit
def strip(acc, i: tl.constexpr, STRIPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The i-th of STRIPS equal ranges of a tile's columns."""
    if STRIPS == 1:
        return acc
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
        if i < STRIPS // 2:
            return strip(left, i, STRIPS // 2, BM, BN // 2)
        else:
            return strip(right, i - STRIPS // 2, STRIPS // 2, BM, BN // 2)


def described(tensor: Tensor) -> Tensor:
    """The tensor, or a copy with rows padded to a multiple of 16 bytes where the copy engine cannot address it."""
    if can_describe(tensor):
        return tensor
    step = 16 // tensor.element_size()
    return F.pad(tensor, (0, -tensor.shape[-1] % step)).contiguous()


def new_described(like: Tensor, rows: int, columns: int) -> Tensor:
    """An empty [rows, columns] whose rows the copy engine can write; past the columns lies padding."""
    missing = -columns % (16 // like.element_size())
    whole = like.new_empty((rows, columns + missing))
    return whole[:, :columns] if missing else whole


_compiled: dict[tuple[Any, ...], Any] = {}
_MAX_COMPILED = 4096


def _kind(value: Any) -> Any:
    """What a kernel is compiled for of an argument that is no integer."""
    if isinstance(value, Tensor):
        return value.dtype, value.get_device(), value.data_ptr() % 16
    return float if isinstance(value, float) else value.kind  # of a descriptor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants) of a kernel whose constants come last, at half its cost for the host.

    Triton looks into every argument at every launch to find what it has compiled. All that it may look at is the key
    here: of a tensor dtype, device and alignment, of a descriptor dtype, device and block, integers and constants
    themselves, which is more than it needs.
    """
    kinds = [value if value is None or type(value) is int else _kind(value) for value in args]
    key = (kernel, *kinds, *constants.values())
    found = _compiled.get(key)
    if found is not None:
        compiled, unread = found
        compiled[(*grid, 1, 1)](*args, *unread)
        return
    compiled = kernel[grid](*args, **constants)
    if compiled is not None:  # as Triton's interpreter gives
        if len(_compiled) >= _MAX_COMPILED:
            _compiled.clear()
        _compiled[key] = compiled, [None] * (len(kernel.arg_names) - len(args))


@triton.jit(do_not_specialize=["rows", "columns"])
def _sum_rows_kernel(x_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0), mask=column < columns)


def sum_rows(x: Tensor) -> Tensor:
    """The sum over rows of contiguous fp32 x [rows, columns], [columns]: what persistent programs leave to be added.

    A program sums 8 columns, so that a few hundred columns fill the device; always in the same order.
    """
    rows, columns = x.shape
    out = x.new_empty(columns)
    with torch.cuda.device_of(x):
        _sum_rows_kernel[(triton.cdiv(columns, 8),)](x, out, rows, columns, ROWS=256, COLUMNS=8, num_warps=4, **pdl(x))
    return out
