"""Attention output without its component along the token's own value.

    out[i, h] = y[i, h] - (y[i, h] . w) w,   w = v[i, g(h)] / max(|v[i, g(h)]|, 1e-12),   g(h) = h // (H / Hkv)

y [..., H, d] is the attention output, v [..., Hkv, d] the values of the same positions. With g = dout and, a head,
p = y . w and c = g . w:

    dy = g - c w,     dv = -sum_h (p g + c y - 2 p c w) / |v|      (over the query heads of a key/value head)

Sums run in fp32 (fp64 for fp64). Source: pull requests 1413, 1514, 1530, 1727.
"""

from __future__ import annotations

from typing import Any

import torch

from pgolf_kernels._native_op import register_op
from pgolf_kernels._triton_op import kernels, runs_triton

MIN_NORM = 1e-12


def reference(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The formula in PyTorch, differentiable."""
    grouped = y.unflatten(-2, (v.shape[-2], -1))
    direction = torch.nn.functional.normalize(v, dim=-1, eps=MIN_NORM).unsqueeze(-2)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(-3, -2)


# ---- op --------------------------------------------------------------------------------------------------------------


def _parts(y: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y by key/value head [N, Hkv, G, d], unit values [N, Hkv, 1, d] and 1 / |v|, all in the accumulation dtype."""
    wide = torch.promote_types(y.dtype, torch.float32)
    inverse = v.to(wide).norm(dim=-1, keepdim=True).clamp_min(MIN_NORM).reciprocal().unsqueeze(-2)
    return y.to(wide).unflatten(1, (v.shape[1], -1)), v.to(wide).unsqueeze(-2) * inverse, inverse


def _forward(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    if runs_triton(y) and y.numel():
        return kernels("xsa").forward(y, v, MIN_NORM)
    grouped, unit, _ = _parts(y, v)
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).flatten(1, 2).to(y.dtype)


def _backward_kernel(grad: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_triton(y) and y.numel():
        return kernels("xsa").backward(grad, y, v, MIN_NORM)
    grouped, unit, inverse = _parts(y, v)
    upstream = grad.to(grouped.dtype).unflatten(1, (v.shape[1], -1))
    p = (grouped * unit).sum(-1, keepdim=True)
    c = (upstream * unit).sum(-1, keepdim=True)
    d_y = upstream - c * unit
    # Below the floor of the norm the direction is v / MIN_NORM, linear in v: its own projection term is gone.
    own = torch.where(inverse < 1 / MIN_NORM, 2 * p * c, p.new_zeros(()))
    d_v = (own * unit - p * upstream - c * grouped).sum(-2) * inverse.squeeze(-2)
    return d_y.flatten(1, 2).to(y.dtype), d_v.to(v.dtype)


_backward_op = register_op(
    "xsa_backward(Tensor grad, Tensor y, Tensor v) -> (Tensor, Tensor)",
    _backward_kernel,
    fake=lambda grad, y, v: (y.new_empty(y.shape), v.new_empty(v.shape)),
    not_differentiable="double backward is not supported",
)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward_op(grad, *ctx.saved_tensors)


_forward_op = register_op(
    "xsa(Tensor y, Tensor v) -> Tensor",
    _forward,
    fake=lambda y, v: y.new_empty(y.shape),
    backward=_backward,
    setup_context=_setup_context,
)


# ---- public function -------------------------------------------------------------------------------------------------


def xsa(y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """y minus its component along each position's own value; see the module's docstring.

    y [..., H, d], v [..., Hkv, d] of the same leading shape, dtype and device, H a multiple of Hkv. Returns y's shape
    and dtype. Raises ValueError for shapes and devices, TypeError for dtypes.
    """
    if y.dim() < 3 or v.dim() != y.dim() or v.shape[:-2] != y.shape[:-2] or v.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"v: got shape {tuple(v.shape)} beside y's {tuple(y.shape)}, wanted [..., Hkv, d] and [..., H, d]"
        )
    if v.shape[-2] == 0 or y.shape[-2] % v.shape[-2]:
        raise ValueError(f"v: got {v.shape[-2]} heads, wanted a divisor of y's {y.shape[-2]}")
    if v.dtype != y.dtype or not y.dtype.is_floating_point:
        raise TypeError(f"v: got {v.dtype} beside y's {y.dtype}, wanted one floating-point dtype")
    if v.device != y.device:
        raise ValueError(f"v: got device {v.device}, wanted y's {y.device}")
    return _forward_op(y.flatten(0, -3), v.flatten(0, -3)).view(y.shape)
