"""Rows of a table by index, with a gradient that is summed in order.

    y[i] = table[ids[i]]                    dtable[v] = sum over the i with ids[i] = v of dy[i]

ids [...] integers in [0, V), table [V, D], y [..., D] in any floating-point dtype (`dtype`; the table is cast first).
The gradient has the table's dtype and comes straight from fp32 sums (fp64 for fp64), with the same bits each time where
the kernel runs (not fp64 on a GPU).

On a GPU positions are sorted by index; tiles of the sorted positions are summed by segment as a product with a matrix
of zeros and ones, and what of a segment lies in several tiles is added in a second pass. No atomics, no gradient in
fp32 for every position. A function of each row alone, such as its norm, is best applied to the table before: V rows
instead of all positions, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pgolf_kernels._native_op import register_op
from pgolf_kernels._triton_op import kernels, runs_triton


def reference(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """The formula in PyTorch, differentiable."""
    return table.to(dtype)[ids]


# ---- op --------------------------------------------------------------------------------------------------------------


def _forward(ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.embedding(ids, table.to(dtype))


def _backward_kernel(grad: Tensor, ids: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    if runs_triton(grad) and grad.numel():
        return kernels("embedding").backward(grad, ids, rows).to(dtype)
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.new_zeros((rows, grad.shape[1]), dtype=wide).index_add_(0, ids, grad.to(wide)).to(dtype)


_backward_op = register_op(
    "embedding_backward(Tensor grad, Tensor ids, SymInt rows, ScalarType dtype) -> Tensor",
    _backward_kernel,
    fake=lambda grad, ids, rows, dtype: grad.new_empty((rows, grad.shape[1]), dtype=dtype),
    not_differentiable="double backward is not supported",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, table, _ = inputs
    ctx.save_for_backward(ids)
    ctx.rows, ctx.dtype = table.shape[0], table.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
    (ids,) = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    return None, _backward_op(rows, ids.reshape(-1), ctx.rows, ctx.dtype), None


_forward_op = register_op(
    "embedding(Tensor ids, Tensor table, ScalarType dtype) -> Tensor",
    _forward,
    fake=lambda ids, table, dtype: table.new_empty((*ids.shape, table.shape[1]), dtype=dtype),
    backward=_backward,
    setup_context=_setup_context,
)


# ---- public function -------------------------------------------------------------------------------------------------


def embedding(ids: Tensor, table: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """table[ids] in `dtype` (default: the table's); see the module's docstring.

    ids: integers of any shape; out of range is an IndexError on the CPU, PyTorch's device-side assertion on CUDA.
    table: [V, D]. Returns [*ids.shape, D]. Raises ValueError for shapes and devices, TypeError for dtypes.
    """
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids: got dtype {ids.dtype}, wanted an integer dtype")
    if table.dim() != 2:
        raise ValueError(f"table: got shape {tuple(table.shape)}, wanted [V, D]")
    if ids.device != table.device:
        raise ValueError(f"ids: got device {ids.device}, wanted the table's {table.device}")
    dtype = table.dtype if dtype is None else dtype
    if not table.dtype.is_floating_point or not dtype.is_floating_point:
        raise TypeError(f"table: got {table.dtype} to be read as {dtype}, wanted floating-point dtypes")
    return _forward_op(ids.to(torch.int64), table, dtype)
