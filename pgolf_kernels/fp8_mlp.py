"""fused_mlp's perceptron with its six matrix products in FP8, for training on Hopper.

    u = x W_up^T,   h = leaky_relu(u, slope)^2,   y = h W_down^T     (+ residual)
    du = (g W_down) act'(u),   dx = du W_up,   dW_up = du^T x,   dW_down = g^T h

What is rounded how: x, g and the weights are rounded to bfloat16 where they are wider. They, h and du are e4m3 numbers
(3 bits of mantissa, 2^-9 to 448) times one scale a matrix, a power of two. Products add up in the tensor core, and
results are written in the dtypes of fused_mlp. Nothing else is rounded: not u, and not g W_down. act'(u) = 2 sqrt(h) or
-2 slope sqrt(h) comes from the rounded h, whose relative error the root halves, and from one bit an element, u's sign.

e4m3 for gradients, too: e5m2 has one bit of mantissa less, twice the error, and its range is not missed. With one scale
a matrix e4m3 has its 3 bits over the 2^14 below the largest magnitude and goes on for 2^3 below these; a gradient whose
root mean square lies 2^10 below its largest magnitude still has most of its numbers in the former.

Scales. Of x, g and the weights: from the largest magnitude, which takes a pass over them on the device. h and du are
written by the product that makes them, before anybody could know their largest. By Cauchy and Schwarz u^2 is at most
the largest |row of x|^2 |row of W_up|^2, and du accordingly. Where rows are alike in norm this wastes as much range as
a row has elements (2^9 at 512), which e4m3 has to spare in h, whose small values add little. One row of x of far larger
norm must not push everybody else's values below the smallest number. So the bound is at most LIMIT = 2^13 times the
mean of u^2, as it would be with rows that do not know of each other: values of u above 90 times the root mean square
saturate, and the mean of h is some 2^5 times the smallest number. du's bound is the product of two such.

A wgmma on FP8 wants both operands with the common dimension contiguous. So what enters two products, one along rows and
one along columns, is written twice, as it lies and transposed: as many bytes as bfloat16 once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pgolf_kernels import _fp8_mlp_torch
from pgolf_kernels._fp8_mlp_torch import BLOCK, E4M3, padded
from pgolf_kernels._native_op import register_mutating_op, register_op
from pgolf_kernels._triton_op import can_describe, compute_capability, has_triton, kernels, runs_triton
from pgolf_kernels.fused_mlp import check_mlp, check_residual, fused_mlp

MULTIPLE = 16  # of every dimension but x's rows: the vendor library's, and the copy engine's


def runs_fp8(device: torch.device) -> bool:
    """Whether `fp8_mlp` runs on the device: on a CPU (emulated) or a GPU of compute capability 9.0 or more."""
    if device.type != "cuda":
        return device.type == "cpu"
    index = torch.cuda.current_device() if device.index is None else device.index
    return has_triton() and compute_capability(index) >= 90


# ---- ops -------------------------------------------------------------------------------------------------------------


def _implementation(x: Tensor) -> ModuleType:
    return kernels("fp8_mlp") if runs_triton(x) else _fp8_mlp_torch


def _product(a: Tensor, b: Tensor, a_facts: Tensor, b_facts: Tensor, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a b^T of e4m3 a [M, K] and b [N, K], times their scales. fast: partial sums keep fewer bits than fp32."""
    if a.is_cuda:
        return torch._scaled_mm(a, b.t(), a_facts[0], b_facts[0], out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() @ b.float().t()) * (a_facts[0] * b_facts[0])).to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, a_facts: Tensor, b_facts: Tensor) -> None:
    """Adds the product to `total` [M, N]. The vendor library's FP8 products add to nothing."""
    if total.is_cuda and total.dtype == torch.bfloat16 and can_describe(total):
        kernels("fp8_mlp").add_product(total, a, b, a_facts, b_facts)
    else:
        total.add_(_product(a, b, a_facts, b_facts, total.dtype, fast=True))


def _hidden(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> list[Tensor]:
    """[W_down, then what the backward takes: x^T, facts; W_up^T, facts; W_down^T, facts; h; h^T; signs; facts]."""
    implementation = _implementation(x)
    as_it_lies, x_turned, x_facts = implementation.operand(x)
    up, up_turned, up_facts = implementation.operand(w_up)
    down_turned, down, down_facts = implementation.operand(w_down.t())
    hidden, turned, negative, facts = implementation.up(as_it_lies, x_facts, up, up_facts, slope)
    return [
        down, x_turned, x_facts, up_turned, up_facts, down_turned, down_facts, hidden, turned, negative, facts
    ]  # fmt: skip


def _hidden_fake(x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> list[Tensor]:
    (rows, dim), (hidden_dim, _), out = x.shape, w_up.shape, w_down.shape[0]
    length, width = padded(rows), padded(hidden_dim)

    def fp8(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=E4M3)

    def facts() -> Tensor:
        return x.new_empty(4, dtype=torch.float32)

    return [
        fp8(out, width), fp8(dim, length), facts(), fp8(dim, width), facts(), fp8(hidden_dim, out), facts(),
        fp8(rows, width), fp8(hidden_dim, length), x.new_empty((width // BLOCK, rows, 4), dtype=torch.int32), facts(),
    ]  # fmt: skip


def _backward(
    grad: Tensor, w_up: Tensor, w_down: Tensor, kept: list[Tensor], slope: float, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    x_turned, x_facts, up_turned, up_facts, down_turned, down_facts, hidden, turned, negative, facts = kept
    implementation = _implementation(grad)
    d_x, d_up, d_down = (grad.new_empty(0, dtype=t.dtype) for t in (grad, w_up, w_down))
    g, g_turned, g_facts = implementation.operand(grad)
    if wanted[2]:
        d_down = _product(g_turned, turned, g_facts, facts, w_down.dtype, fast=False)
    if wanted[0] or wanted[1]:
        d_pre, d_turned, d_facts = implementation.grad_pre(
            g, g_facts, down_turned, down_facts, hidden, negative, facts, slope
        )
        if wanted[0]:
            d_x = _product(d_pre, up_turned, d_facts, up_facts, grad.dtype, fast=True)
        if wanted[1]:
            d_up = _product(d_turned, x_turned, d_facts, x_facts, w_up.dtype, fast=False)
    return d_x, d_up, d_down


def _backward_fake(
    grad: Tensor, w_up: Tensor, w_down: Tensor, kept: list[Tensor], slope: float, wanted: list[bool]
) -> tuple[Tensor, ...]:
    shapes = (grad.shape[0], w_up.shape[1]), w_up.shape, w_down.shape
    return tuple(
        t.new_empty(shape if want else (0,))
        for t, shape, want in zip((grad, w_up, w_down), shapes, wanted, strict=True)
    )


_hidden_op = register_op(
    "fp8_mlp_hidden(Tensor x, Tensor w_up, Tensor w_down, float slope) -> Tensor[]",
    _hidden,
    fake=_hidden_fake,
    not_differentiable="pgolf_kernels.fp8_mlp differentiates",
)
_output_op = register_op(
    "fp8_mlp_output(Tensor hidden, Tensor w_down, Tensor facts, Tensor w_facts, ScalarType dtype) -> Tensor",
    lambda *operands: _product(*operands, fast=True),
    fake=lambda hidden, w_down, facts, _, dtype: facts.new_empty((hidden.shape[0], w_down.shape[0]), dtype=dtype),
    not_differentiable="pgolf_kernels.fp8_mlp differentiates",
)
_add_op = register_mutating_op(
    "fp8_mlp_add(Tensor(a!) total, Tensor a, Tensor b, Tensor a_facts, Tensor b_facts) -> ()",
    _add_product,
    fake=lambda *_: None,
)
_backward_op = register_op(
    "fp8_mlp_backward(Tensor grad, Tensor w_up, Tensor w_down, Tensor[] kept, float slope, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
    not_differentiable="double backward is not supported",
)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor | None, x: Tensor, w_up: Tensor, w_down: Tensor, slope: float) -> Tensor:
        down, *kept = _hidden_op(x, w_up, w_down, slope)
        operands = kept[6], down, kept[9], kept[5]
        ctx.save_for_backward(w_up, w_down, *kept)
        ctx.slope = slope
        if total is None:
            return _output_op(*operands, x.dtype)
        _add_op(total.view(-1, total.shape[-1]), *operands)
        ctx.mark_dirty(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        w_up, w_down, *kept = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[1:4])
        grads = _backward_op(grad.reshape(-1, grad.shape[-1]), w_up, w_down, kept, ctx.slope, wanted)
        of_total = grad if ctx.needs_input_grad[0] else None
        return of_total, *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


# ---- public function -------------------------------------------------------------------------------------------------


def fp8_mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    negative_slope: float = 0.5,
    hidden_gain: Tensor | None = None,
    residual: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """W_down ((leaky_relu(W_up x, negative_slope))^2 * hidden_gain) (+ residual), products in FP8.

    The arguments, their dtypes and the result are `fused_mlp`'s, but for float64 and for sizes: D, F and D_out are
    multiples of 16. The module's docstring says what is rounded and how; the error of a result is below 8 % of its
    norm, and so is its gradients'. The product is rounded to x's dtype before the residual is added. A call without
    gradients writes the backward's copies all the same. On a CPU the same numbers are computed in PyTorch, slowly.
    Needs Triton and compute capability 9.0 or more on a GPU (`runs_fp8`).

    Saved for the backward, a row: 2 F + D bytes and F bits; neither x nor the residual. Source: e4m3 as in
    arXiv:2209.05433. Raises ValueError for shapes, devices and slopes, TypeError for dtypes.
    """
    check_mlp(x, w_up, w_down, negative_slope, hidden_gain)
    shaped = ("x", x, "[..., D]", -1), ("w_up", w_up, "[F, D]", 0), ("w_down", w_down, "[D_out, F]", 0)
    for name, tensor, sizes, at in shaped:
        if tensor.dtype == torch.float64:
            raise TypeError(f"{name}: got torch.float64, wanted torch.float32, torch.bfloat16 or torch.float16")
        if tensor.shape[at] % MULTIPLE or not tensor.shape[at]:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, wanted {sizes} with D, F and D_out multiples of {MULTIPLE}"
            )
    if not runs_fp8(x.device):
        raise ValueError(f"x: got one on {x.device}, wanted Triton and a GPU of compute capability 9.0 or more")
    check_residual(x, w_down, residual, in_place)
    if not x.numel():  # as many numbers to round
        options: dict[str, Any] = {"hidden_gain": hidden_gain, "residual": residual, "in_place": in_place}
        empty: Any = fused_mlp(x, w_up, w_down, negative_slope=negative_slope, **options)
        return empty
    if hidden_gain is not None:
        w_down = w_down * hidden_gain.to(w_down.dtype)
    total = residual if in_place or residual is None else residual.clone(memory_format=torch.contiguous_format)
    y = _Mlp.apply(total, x.reshape(-1, x.shape[-1]), w_up, w_down, float(negative_slope))
    return y.view(*x.shape[:-1], y.shape[-1])
