"""Muon's update of a model's matrices: Newton-Schulz, and in one pass each what stands before and behind it.

    m <- mu m + f g,   u = f g + mu m                          (Nesterov)
    u <- u / max(|u_row|, 1e-7), row by row, unless asked not to
    X = u / (|u|_F + 1e-7)                                     muon_direction
    steps times: A = X X^T;  X <- a X + (b A + c A A) X        orthogonalize
    W <- keep W - rate X                                       muon_apply

Weights, gradients g and momenta m are banks of stacked matrices [n, rows, cols], g and m in fp32 (CPU: also fp64); f is
a scalar on the device, the factor of clipping. X is wide: a tall bank's matrices are transposed on the way, so that up
and down projections, of one shape then, share the products of one Newton-Schulz, in training in bf16.

An element costs 14 bytes before the products (read g and m, write m and u), 4 to scale u, 10 behind them (read X, read
and write W): 28, where PyTorch's passes move 78, and 86 with the gradients' multiplication. The row norms come out of
the first pass and make |u|_F too, |u_row| / max(|u_row|, 1e-7) being a row's share of it, so that one scaling of u does
both divisions. Sums are fp32, in a fixed order. Given up: an X that is scaled within the first product, whose alpha
cuBLAS takes for a whole batch only.

Source: Keller Jordan's Muon, with the row normalisation of openai/parameter-golf pull requests 1413 to 1727.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf_kernels._native_op import register_mutating_op
from pgolf_kernels._triton_op import kernels, runs_triton

NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
EPSILON = 1e-7
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # of X


def reference(
    gradients: list[Tensor],
    momenta: list[Tensor],
    momentum: float,
    factor: Tensor | None,
    row_normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`muon_direction` in PyTorch; writes the momenta."""
    if factor is not None:
        gradients = list(torch._foreach_mul(gradients, factor))
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, gradients)
    updates = torch._foreach_add(gradients, momenta, alpha=momentum)
    if row_normalize:
        norms = [torch.linalg.vector_norm(update, dim=-1, keepdim=True).clamp_min_(EPSILON) for update in updates]
        torch._foreach_div_(updates, norms)
    # Raw gradients may be too small for fp16, not for bf16.
    first = updates[0].dtype if dtype == torch.float16 else dtype
    wide = [_wide(update).to(first) for update in updates]
    return _normalized(wide[0] if len(wide) == 1 else torch.cat(wide)).contiguous().to(dtype)


def _wide(matrices: Tensor) -> Tensor:
    return matrices.mT if _is_tall(matrices) else matrices


def _is_tall(matrices: Tensor) -> bool:
    return matrices.size(-2) > matrices.size(-1)


def _normalized(matrices: Tensor) -> Tensor:
    return matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + EPSILON)


# ---- ops -------------------------------------------------------------------------------------------------------------


def _direction(
    gradients: list[Tensor],
    momenta: list[Tensor],
    momentum: float,
    factor: Tensor | None,
    row_normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    if not runs_triton(momenta[0]) or dtype == torch.float64:
        return reference(gradients, momenta, momentum, factor, row_normalize, dtype)
    out = _direction_fake(gradients, momenta, momentum, factor, row_normalize, dtype)
    shares = out.split([len(g) for g in gradients])
    for gradient, buffer, share in zip(gradients, momenta, shares, strict=True):
        if share.numel():
            kernels("muon").direction(gradient.contiguous(), buffer, momentum, factor, row_normalize, share)
    return out


def _direction_fake(
    gradients: list[Tensor],
    momenta: list[Tensor],
    momentum: float,
    factor: Tensor | None,
    row_normalize: bool,
    dtype: torch.dtype,
) -> Tensor:
    first = gradients[0]
    return first.new_empty((sum(len(g) for g in gradients), *_wide(first).shape[1:]), dtype=dtype)


def _apply(weight: Tensor, update: Tensor, keep: float, rate: float) -> None:
    if runs_triton(weight) and runs_triton(update):
        if weight.numel():
            kernels("muon").apply(weight, update.contiguous(), keep, rate)
    else:
        weight.mul_(keep).add_(update.mT if _is_tall(weight) else update, alpha=-rate)


_direction_op = register_mutating_op(
    "muon_direction_(Tensor[] gradients, Tensor(a!)[] momenta, float momentum, Tensor? factor, bool row_normalize, "
    "ScalarType dtype) -> Tensor",
    _direction,
    fake=_direction_fake,
)
_apply_op = register_mutating_op(
    "muon_apply_(Tensor(a!) weight, Tensor update, float keep, float rate) -> ()", _apply, fake=lambda *args: None
)


# ---- public functions ------------------------------------------------------------------------------------------------


@torch.no_grad()
def muon_direction(
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    momentum: float,
    *,
    factor: Tensor | None = None,
    row_normalize: bool = True,
    dtype: torch.dtype,
) -> Tensor:
    """X [sum of n, min(rows, cols), max(rows, cols)] in `dtype`, contiguous, for :func:`orthogonalize`; see the module.

    gradients: banks [n, rows, cols] of one shape, n apart, after the tall ones' matrices are transposed; float32 (CPU:
    also float64). momenta: alike, contiguous, written in place. factor: a scalar tensor that multiplies the gradients
    (None: 1), not read on the host. The banks' matrices follow one another in X.

    Raises ValueError for shapes, strides, devices and an empty list, TypeError for dtypes.
    """
    _check_direction(gradients, momenta, factor, dtype)
    return _direction_op(list(gradients), list(momenta), float(momentum), factor, row_normalize, dtype)


def orthogonalize(update: Tensor, steps: int, dtype: torch.dtype, *, normalized: bool = False) -> Tensor:
    """Newton-Schulz on matrices [n, rows, cols]: all singular values towards 1. Result in `dtype`, same shape.

        X <- X / (|X| + 1e-7), |X| the Frobenius norm of a matrix, then `steps` times
        X <- a X + (b X X^T + c (X X^T)^2) X    with a, b, c of NEWTON_SCHULZ, tall matrices transposed

    update: floating point. `normalized`: each matrix has a norm of at most 1 already, as :func:`muon_direction` leaves
    it. Plain PyTorch, which differentiates it. Raises ValueError for shapes and for less than 0 steps, TypeError for
    dtypes. Source: Keller Jordan's Muon, https://kellerjordan.github.io/posts/muon.
    """
    _check_bank("update", update)
    _check_float("update", update.dtype)
    _check_float("dtype", dtype)
    if steps < 0:
        raise ValueError(f"steps: got {steps}, wanted at least 0")
    a, b, c = NEWTON_SCHULZ
    x = _wide(update.to(dtype))
    if not normalized:
        x = _normalized(x)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if _is_tall(update) else x


@torch.no_grad()
def muon_apply(weight: Tensor, update: Tensor, *, keep: float, rate: float) -> None:
    """W <- keep W - rate X in place, for a bank W [n, rows, cols], contiguous, of any floating-point dtype.

    update: X [n, min(rows, cols), max(rows, cols)], wide also where the bank is tall, of any floating-point dtype.
    Raises ValueError for shapes, strides and devices, TypeError for dtypes.
    """
    _check_bank("weight", weight)
    _check_float("weight", weight.dtype)
    _check_float("update", update.dtype)
    _check_contiguous("weight", weight)
    wanted = _wide(weight).shape
    if update.shape != wanted or update.device != weight.device:
        raise ValueError(
            f"update: got shape {tuple(update.shape)} on {update.device}, wanted {tuple(wanted)} on {weight.device}"
        )
    _apply_op(weight, update, float(keep), float(rate))
    torch.autograd.graph.increment_version(weight)  # a backward pass that has kept the weight must notice


def _check_direction(
    gradients: Sequence[Tensor], momenta: Sequence[Tensor], factor: Tensor | None, dtype: torch.dtype
) -> None:
    if not gradients:
        raise ValueError("gradients: got 0 banks, wanted at least 1")
    if len(momenta) != len(gradients):
        raise ValueError(f"momenta: got {len(momenta)} banks, wanted {len(gradients)}, one a gradient")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype}, wanted one of {', '.join(map(str, DTYPES))}")
    first = gradients[0]
    for i, (g, m) in enumerate(zip(gradients, momenta, strict=True)):
        _check_bank(f"gradients[{i}]", g)
        if _wide(g).shape[1:] != _wide(first).shape[1:]:
            raise ValueError(
                f"gradients[{i}]: got shape {tuple(g.shape)}, wanted matrices of {tuple(_wide(first).shape[1:])} "
                "or transposed as the first bank's"
            )
        if g.dtype != torch.float32 and not (g.dtype == torch.float64 and g.device.type == "cpu"):
            raise TypeError(f"gradients[{i}]: got {g.dtype} on {g.device}, wanted torch.float32")
        for name, tensor, like in ((f"gradients[{i}]", g, first), (f"momenta[{i}]", m, g)):
            if tensor.dtype != like.dtype:
                raise TypeError(f"{name}: got {tensor.dtype}, wanted {like.dtype}")
            if tensor.device != like.device:
                raise ValueError(f"{name}: got device {tensor.device}, wanted {like.device}")
        if m.shape != g.shape:
            raise ValueError(f"momenta[{i}]: got shape {tuple(m.shape)}, wanted the gradient's {tuple(g.shape)}")
        _check_contiguous(f"momenta[{i}]", m)
    if factor is None:
        return
    if factor.dim() or factor.device != first.device:
        raise ValueError(
            f"factor: got shape {tuple(factor.shape)} on {factor.device}, wanted a scalar tensor on {first.device}"
        )
    _check_float("factor", factor.dtype)


def _check_bank(name: str, tensor: Tensor) -> None:
    if tensor.dim() != 3:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted [n, rows, cols]")


def _check_float(name: str, dtype: torch.dtype) -> None:
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: got {dtype}, wanted a floating-point dtype")


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: got strides {tensor.stride()}, wanted a contiguous tensor")
