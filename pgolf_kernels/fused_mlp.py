"""Two-layer perceptron with a squared leaky ReLU, fused forward and backward.

    u = x W_up^T                        [N, F]
    h = leaky_relu(u, slope)^2          [N, F]     (times hidden_gain, folded into W_down)
    y = (h * gain) W_down^T             [N, D_out]     (+ residual, added to the product's accumulator)

x [..., D], W_up [F, D], W_down [D_out, F]. With g = dy:

    du = (g (W_down * gain)) * act'(u),   act'(u) = 2 u where u > 0, 2 slope^2 u elsewhere
    dx = du W_up,   dW_up = du^T x,   d(W_down * gain) = g^T h

On a GPU the first product applies the activation to its accumulator and stores h alone, u's sign in the last bit of the
mantissa: of the bfloat16 numbers with that bit, the one closest to h. The backward recovers act'(u) = 2 sqrt(h) or
-2 slope sqrt(h) and never sees u. This halves what the public kernel of pull request 1530 saves (u and h). Given up:
h's relative rounding error grows from 0.17 to 0.33 % rms, unbiased; PyTorch in bfloat16, which rounds u before it
squares, has 0.38 %. float16 has too few exponents for squares (|u| < 2^-12 would be lost), so there u itself is saved
as well. These two products are CUDA for Hopper where the shapes allow it, else Triton; those that have no activation to
carry are the vendor library's. Source of the activation: pull requests 1413 to 1727.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pgolf_kernels import _native
from pgolf_kernels._native_op import register_op, stream_of
from pgolf_kernels._triton_op import compute_capability, kernels, product_as, runs_narrow_triton


def reference(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    negative_slope: float = 0.5,
    hidden_gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula in PyTorch, differentiable."""
    hidden = F.leaky_relu(F.linear(x, w_up), negative_slope).square()
    return F.linear(hidden if hidden_gain is None else hidden * hidden_gain, w_down)


# ---- op --------------------------------------------------------------------------------------------------------------


def _keeps_sign(x: torch.Tensor) -> bool:
    """Whether a bit of h stands for u. float16 keeps u: its squares underflow below |u| = 2^-12."""
    return runs_narrow_triton(x) and x.dtype != torch.float16


def _runs_native(x: torch.Tensor, hidden_dim: int) -> bool:
    """Whether the CUDA kernels take x [N, D]: they keep a [128, D] part of a weight in shared memory."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.shape[0] < 2**30
        and 8 <= x.shape[1] <= 512
        and x.shape[1] % 8 == 0
        and hidden_dim > 0
        and hidden_dim % 128 == 0
        and hasattr(_native, "fused_mlp_up_cuda")
        and compute_capability(x.device.index) == 90
    )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous from a multiple of 16 bytes on."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _up(x: torch.Tensor, w_up: torch.Tensor, slope: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden, u) on a GPU; with the sign in hidden's last bit u is empty."""
    rows, hidden_dim = x.shape[0], w_up.shape[0]
    if not _runs_native(x, hidden_dim):
        return kernels("fused_mlp").up(x, w_up, slope, _keeps_sign(x))
    x, w_up = _aligned(x), _aligned(w_up)
    hidden = x.new_empty((rows, hidden_dim))
    addresses = (t.data_ptr() for t in (x, w_up, hidden))
    _native.fused_mlp_up_cuda(*addresses, rows, hidden_dim, x.shape[1], slope, *stream_of(x))
    return hidden, x.new_empty((rows, 0))


def _grad_pre(
    grad: torch.Tensor, w_down: torch.Tensor, hidden: torch.Tensor, pre: torch.Tensor, slope: float
) -> torch.Tensor:
    """The gradient of u on a GPU, from w_down in any dtype."""
    rows, hidden_dim = hidden.shape
    if not _runs_native(grad, hidden_dim):
        keeps_sign = _keeps_sign(grad)
        kept = hidden if keeps_sign else pre
        return kernels("fused_mlp").grad_pre(grad, w_down.to(grad.dtype), kept, slope, keeps_sign)
    # Columns of the weight become rows: where it is wider than grad, its cast does this in passing.
    transposed = w_down.t().to(grad.dtype, memory_format=torch.contiguous_format)
    grad, transposed, hidden = _aligned(grad), _aligned(transposed), _aligned(hidden)
    out = torch.empty_like(hidden)
    addresses = (t.data_ptr() for t in (grad, transposed, hidden, out))
    _native.fused_mlp_grad_pre_cuda(*addresses, rows, hidden_dim, grad.shape[1], slope, *stream_of(grad))
    return out


def _hidden(x: torch.Tensor, w_up: torch.Tensor, slope: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, u); u is empty where a bit of h stands for it."""
    w_up = w_up.to(x.dtype)
    if runs_narrow_triton(x) and x.numel():
        return _up(x, w_up, slope)
    pre = x @ w_up.t()
    hidden = F.leaky_relu(pre, slope).square()
    return hidden, pre[:, :0] if _keeps_sign(x) else pre


def _forward(
    x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, residual: torch.Tensor | None, slope: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, pre = _hidden(x, w_up, slope)
    w_down = w_down.to(x.dtype).t()
    return hidden @ w_down if residual is None else torch.addmm(residual, hidden, w_down), hidden, pre


def _forward_fake(
    x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, residual: torch.Tensor | None, slope: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, hidden_dim = x.shape[0], w_up.shape[0]
    pre = x.new_empty((rows, 0 if _keeps_sign(x) else hidden_dim))
    return x.new_empty((rows, w_down.shape[0])), x.new_empty((rows, hidden_dim)), pre


def _backward_kernel(
    grad: torch.Tensor,
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    hidden: torch.Tensor,
    pre: torch.Tensor,
    slope: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, ...]:
    if not x.shape[0]:  # u may stand for the sign of an h that is empty, too
        return tuple(t.new_zeros(t.shape if want else (0,)) for t, want in zip((x, w_up, w_down), wanted, strict=True))
    d_x, d_up, d_down = (x.new_empty(0, dtype=t.dtype) for t in (x, w_up, w_down))
    if wanted[2]:
        d_down = product_as(grad.t(), hidden, w_down.dtype)
    if wanted[0] or wanted[1]:
        if runs_narrow_triton(x) and x.numel():
            d_pre = _grad_pre(grad, w_down, hidden, pre, slope)
        else:
            d_pre = (grad @ w_down.to(x.dtype)) * torch.where(pre > 0, 2 * pre, 2 * slope * slope * pre)
        if wanted[0]:
            d_x = d_pre @ w_up.to(x.dtype)
        if wanted[1]:
            d_up = product_as(d_pre.t(), x, w_up.dtype)
    return d_x, d_up, d_down


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    hidden: torch.Tensor,
    pre: torch.Tensor,
    slope: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, ...]:
    return tuple(t.new_empty(t.shape if want else (0,)) for t, want in zip((x, w_up, w_down), wanted, strict=True))


_backward_op = register_op(
    "fused_mlp_backward(Tensor grad, Tensor x, Tensor w_up, Tensor w_down, Tensor hidden, Tensor pre, float slope, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake=_backward_fake,
    not_differentiable="double backward is not supported",
)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, w_up, w_down, _, ctx.slope = inputs
    _, hidden, pre = output
    ctx.save_for_backward(x, w_up, w_down, hidden, pre)
    ctx.mark_non_differentiable(hidden, pre)
    ctx.set_materialize_grads(False)  # zeros in hidden's shape would be 4 N D bytes written for nothing


def _backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, None, None
    wanted = list(ctx.needs_input_grad[:3])
    grads = _backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.slope, wanted)
    d_weights = (g if want else None for g, want in zip(grads, wanted, strict=True))
    return *d_weights, grad if ctx.needs_input_grad[3] else None, None


_forward_op = register_op(
    "fused_mlp(Tensor x, Tensor w_up, Tensor w_down, Tensor? residual, float slope) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)


# ---- added in place --------------------------------------------------------------------------------------------------
# Out of place the library copies the residual before its product adds to it: two passes over the activations.


_hidden_op = register_op(
    "fused_mlp_hidden(Tensor x, Tensor w_up, float slope) -> (Tensor, Tensor)",
    _hidden,
    fake=lambda x, w_up, slope: _forward_fake(x, w_up, w_up.t(), None, slope)[1:],
    not_differentiable="pgolf_kernels.fused_mlp differentiates",
)


class _AddMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, total: torch.Tensor, x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, slope: float
    ) -> torch.Tensor:
        hidden, pre = _hidden_op(x, w_up, slope)
        total.view(-1, w_down.shape[0]).addmm_(hidden, w_down.to(x.dtype).t())
        ctx.mark_dirty(total)
        ctx.save_for_backward(x, w_up, w_down, hidden, pre)
        ctx.slope = slope
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[1:4])
        flat = grad.reshape(-1, grad.shape[-1]).contiguous()
        grads = _backward_op(flat, *ctx.saved_tensors, ctx.slope, wanted)
        return grad, *(g if want else None for g, want in zip(grads, wanted, strict=True)), None


# ---- public function -------------------------------------------------------------------------------------------------


def fused_mlp(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    *,
    negative_slope: float = 0.5,
    hidden_gain: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    in_place: bool = False,
    return_hidden: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """W_down ((leaky_relu(W_up x, negative_slope))^2 * hidden_gain) (+ residual).

    x [..., D] in bfloat16 or float16 (float32 and float64 too, without the fused kernels on a GPU); w_up [F, D] and
    w_down [D_out, F] in x's dtype or a wider one (cast inside; their gradients come in their own dtype, from fp32
    accumulators); hidden_gain [F] or None; residual [..., D_out] in x's dtype or None. D, F and D_out are
    free; a GPU's copy engine wants rows of 16 bytes, other sizes are copied to padded tensors. Returns y [..., D_out],
    with `return_hidden` also the input of W_down [..., F], which carries no gradient (it serves Hessian collection).
    `in_place` adds to a contiguous residual where it lies and returns that, which spares the GPU a copy of it; x must
    lie in other memory.

    Frozen weights cost no weight gradient. Saved for the backward beside the inputs: F elements of x's dtype a row
    (float16 and unfused dtypes: 2 F). Raises ValueError for shapes, devices and slopes, TypeError for
    dtypes.
    """
    check_mlp(x, w_up, w_down, negative_slope, hidden_gain)
    check_residual(x, w_down, residual, in_place, return_hidden)
    if hidden_gain is not None:
        # (h * gain) W^T = h (W * gain)^T: a pass over the small matrix instead of one over the activations. Both
        # gradients follow from d(W * gain), which PyTorch derives.
        w_down = w_down * hidden_gain.to(w_down.dtype)
    flat = x.reshape(-1, x.shape[-1])
    if in_place:
        return _AddMlp.apply(residual, flat, w_up, w_down, float(negative_slope))
    flat_residual = None if residual is None else residual.reshape(-1, residual.shape[-1])
    y, hidden, _ = _forward_op(flat, w_up, w_down, flat_residual, float(negative_slope))
    y = y.view(*x.shape[:-1], y.shape[-1])
    if not return_hidden:
        return y
    hidden = hidden.detach().view(*x.shape[:-1], hidden.shape[-1])
    return y, hidden if hidden_gain is None else hidden * hidden_gain.detach().to(hidden.dtype)


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def check_residual(
    x: torch.Tensor, w_down: torch.Tensor, residual: torch.Tensor | None, in_place: bool, return_hidden: bool = False
) -> None:
    """Raises ValueError for a residual that `fused_mlp` or `fp8_mlp` does not take."""
    wanted = (*x.shape[:-1], w_down.shape[0])
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (wanted, x.dtype, x.device):
        raise ValueError(
            f"residual: got shape {tuple(residual.shape)} of {residual.dtype} on {residual.device}, "
            f"wanted {wanted} of {x.dtype} on {x.device}"
        )
    if in_place:
        if residual is None or return_hidden or not residual.is_contiguous():
            found = "none" if residual is None else f"one with strides {residual.stride()}"
            raise ValueError(
                f"in_place: got residual {found} and return_hidden={return_hidden}, "
                "wanted a contiguous residual and no return_hidden"
            )
        if not torch.compiler.is_compiling() and x.numel() and _share_memory(residual, x):  # no graph knows addresses
            raise ValueError("in_place: got a residual in x's memory, wanted one of its own: x is read once more")


def check_mlp(
    x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor, slope: float, gain: torch.Tensor | None
) -> None:
    """Raises TypeError or ValueError for what neither `fused_mlp` nor `fp8_mlp` takes."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: got {x.dtype}, wanted a floating-point dtype")
    if x.dim() < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., D]")
    if w_up.dim() != 2 or w_up.shape[1] != x.shape[-1]:
        raise ValueError(f"w_up: got shape {tuple(w_up.shape)}, wanted [F, {x.shape[-1]}] (x's last dimension)")
    if w_down.dim() != 2 or w_down.shape[1] != w_up.shape[0]:
        raise ValueError(f"w_down: got shape {tuple(w_down.shape)}, wanted [D_out, {w_up.shape[0]}] (w_up's rows)")
    if gain is not None and gain.shape != w_up.shape[:1]:
        raise ValueError(f"hidden_gain: got shape {tuple(gain.shape)}, wanted ({w_up.shape[0]},)")
    if not 0 <= slope < float("inf"):
        raise ValueError(f"negative_slope: got {slope}, wanted a finite number of at least 0")
    for name, tensor in (("w_up", w_up), ("w_down", w_down), ("hidden_gain", gain)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, wanted x's {x.device}")
        if not tensor.dtype.is_floating_point or torch.promote_types(x.dtype, tensor.dtype) != tensor.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted x's {x.dtype} or a wider floating-point dtype")
