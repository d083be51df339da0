"""Cross-entropy of softcapped logits, on logits that exist.

    z[i, j] = softcap * tanh(a[i, j] / softcap) / temperature        (softcap None: z = a / temperature)
    loss[i] = log(sum_j exp(z[i, j])) - z[i, target[i]]
    dloss[i] / da[i, j] = (exp(z[i, j] - lse[i]) - [j = target[i]]) * (1 - tanh(a[i, j] / softcap)^2) / temperature

Logits a are [N, V] in float32, bfloat16, float16 (float64 on the CPU) with any row stride; targets are [N] integers.
Losses are float32 whatever the logits are (float64 for float64). Logit softcapping is Gemma 2's (arXiv:2408.00118).

The forward pass reads the logits once and keeps one number a row, lse; the backward pass reads them again and writes
the gradient. Callers that know the upstream gradient beforehand save one of the two reads with
`softcap_cross_entropy_with_grad`. What was given up: second derivatives, and exactness beyond float32 in the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pgolf_kernels import _native
from pgolf_kernels._native_op import (
    DTYPE_CODES,
    has_native_cuda,
    num_threads,
    reference_on_cuda,
    register_op,
    runs_native,
    stream_of,
)

REDUCTIONS = ("mean", "sum", "none")

# --- reference -------------------------------------------------------------------------------------------------------


def softcapped(logits: Tensor, softcap: float | None, temperature: float = 1.0) -> Tensor:
    """softcap * tanh(logits / softcap) / temperature, in float32 at least."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature


def softcap_ce_reference(
    logits: Tensor,
    targets: Tensor,
    hints: Tensor | None = None,
    softcap: float | None = 30.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """(losses [N], lse [N], log p(hint) [N] or [0]) in plain PyTorch, differentiable."""
    z = softcapped(logits, softcap, temperature)
    lse = torch.logsumexp(z, dim=-1)
    counted = targets != ignore_index
    at_target = z.gather(-1, targets.where(counted, 0).long()[:, None])[:, 0]
    losses = (lse - at_target).where(counted, 0)
    if hints is None:
        return losses, lse, losses.new_empty(0)
    hinted = hints >= 0
    at_hint = z.gather(-1, hints.where(hinted, 0).long()[:, None])[:, 0]
    return losses, lse, (at_hint - lse).detach().where(hinted, float("-inf"))


def _gradient_reference(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    softcap: float,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    z = softcapped(logits, softcap, temperature)
    slope = 1 - (z * (temperature / softcap)) ** 2 if softcap else torch.ones_like(z)
    counted = targets != ignore_index
    p = torch.exp(z - lse[:, None])
    p.scatter_add_(1, targets.where(counted, 0).long()[:, None], p.new_full((len(p), 1), -1.0))
    return (p * slope * (upstream / temperature).where(counted, 0)[:, None]).to(logits.dtype)


# --- native launches -------------------------------------------------------------------------------------------------


def loss_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def rows_of(logits: Tensor) -> Tensor:
    """The logits with unit stride along the vocabulary: themselves, or a copy."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _problem(logits: Tensor, targets: Tensor, softcap: float, temperature: float, ignore_index: int) -> Any:
    place = (logits.data_ptr(), logits.stride(0), *logits.shape, DTYPE_CODES[logits.dtype])
    return _native.SoftcapCE(*place, targets.data_ptr(), ignore_index, softcap, temperature)


def _losses(losses: Tensor, lse: Tensor, hints: Tensor | None, hint_log_probs: Tensor) -> Any:
    hinted = (0, 0) if hints is None else (hints.data_ptr(), hint_log_probs.data_ptr())
    return _native.SoftcapCELosses(losses.data_ptr(), lse.data_ptr(), *hinted)


def _gradient(upstream: Tensor, dlogits: Tensor) -> Any:
    return _native.SoftcapCEGradient(upstream.data_ptr(), upstream.stride(0), dlogits.data_ptr(), dlogits.stride(0))


def _launch(name: str, logits: Tensor, targets: Tensor, hints: Tensor | None, *args: Any) -> None:
    """Calls a native function. On the CPU it returns the first row with a bad target or hint, if any."""
    if not len(logits):
        return
    if logits.is_cuda:
        # Those that write a gradient hand out their rows by a counter, which has to live until they are queued.
        counters = [] if name == "softcap_ce_forward" else [logits.new_empty(1, dtype=torch.int32)]
        getattr(_native, f"{name}_cuda")(*args, *(counter.data_ptr() for counter in counters), *stream_of(logits))
        return
    row = getattr(_native, f"{name}_cpu")(*args, num_threads())
    if row is not None and row >= 0:
        name, indices, none = "targets", targets, "ignore_index"
        if hints is not None and not -1 <= hints[row] < logits.shape[1]:
            name, indices, none = "hints", hints, "-1 for no hint"
        raise IndexError(f"{name}: got {indices[row].item()}, wanted indices in [0, {logits.shape[1]}) or {none}")


def _copy(targets: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


def launch_forward(
    logits: Tensor,
    targets: Tensor,
    hints: Tensor | None,
    scalars: tuple[Any, ...],
    losses: Tensor,
    lse: Tensor,
    hint_log_probs: Tensor,
) -> None:
    """Losses, lse and hint log-probabilities of contiguous int64 targets and hints into the tensors given.

    `scalars`: softcap (0: none), temperature, ignore_index.
    """
    if not runs_native(logits):
        _copy((losses, lse, hint_log_probs), softcap_ce_reference(logits, targets, hints, *scalars))
        return
    problem = _problem(logits, targets, *scalars)
    _launch("softcap_ce_forward", logits, targets, hints, problem, _losses(losses, lse, hints, hint_log_probs))


def launch_backward(
    logits: Tensor, targets: Tensor, lse: Tensor, upstream: Tensor, scalars: tuple[Any, ...], dlogits: Tensor
) -> None:
    """The gradient into `dlogits`, which may be the logits themselves. `upstream` [N] may have stride 0."""
    if not runs_native(logits):
        dlogits.copy_(_gradient_reference(upstream, logits, targets, lse, *scalars))
        return
    problem = _problem(logits, targets, *scalars)
    _launch("softcap_ce_backward", logits, targets, None, problem, lse.data_ptr(), _gradient(upstream, dlogits))


def launch_with_grad(
    logits: Tensor,
    targets: Tensor,
    hints: Tensor | None,
    upstream: Tensor,
    scalars: tuple[Any, ...],
    losses: Tensor,
    lse: Tensor,
    hint_log_probs: Tensor,
    dlogits: Tensor,
) -> None:
    """Both of the above in one pass."""
    if not runs_native(logits):
        launch_forward(logits, targets, hints, scalars, losses, lse, hint_log_probs)
        launch_backward(logits, targets, lse, upstream, scalars, dlogits)
        return
    problem = _problem(logits, targets, *scalars)
    out = _losses(losses, lse, hints, hint_log_probs)
    _launch("softcap_ce_with_grad", logits, targets, hints, problem, out, _gradient(upstream, dlogits))


def launch_mean(losses: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(mean of the losses [N] whose targets count, weight of each in it), in one launch on CUDA."""
    if not (losses.is_cuda and runs_native(losses)):
        counted = (targets != ignore_index).sum()
        return losses.sum() / counted, counted.to(losses.dtype).reciprocal()
    losses = losses.contiguous()
    mean, weight = losses.new_empty(()), losses.new_empty(())
    places = (losses.data_ptr(), targets.data_ptr(), len(losses), ignore_index, mean.data_ptr(), weight.data_ptr())
    _native.softcap_ce_mean_cuda(*places, *stream_of(losses))
    return mean, weight


# --- ops -------------------------------------------------------------------------------------------------------------


def _new_losses(logits: Tensor, hints: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], loss_dtype(logits)
    losses = logits.new_empty(rows, dtype=dtype)
    return losses, torch.empty_like(losses), logits.new_empty(0 if hints is None else rows, dtype=dtype)


def _forward(logits: Tensor, targets: Tensor, hints: Tensor | None, *scalars: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits = rows_of(logits)
    out = _new_losses(logits, hints)
    launch_forward(logits, targets, hints, scalars, *out)
    return out


def _forward_fake(logits: Tensor, targets: Tensor, hints: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_losses(logits, hints)


def _backward(upstream: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, *scalars: Any) -> Tensor:
    logits = rows_of(logits)
    dlogits = logits.new_empty(logits.shape)
    launch_backward(logits, targets, lse, upstream, scalars, dlogits)
    return dlogits


def _backward_fake(upstream: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _with_grad(logits: Tensor, targets: Tensor, upstream: Tensor, *scalars: Any) -> tuple[Tensor, Tensor]:
    logits = rows_of(logits)
    out = _new_losses(logits, None)
    dlogits = logits.new_empty(logits.shape)
    launch_with_grad(logits, targets, None, upstream, scalars, *out, dlogits)
    return out[0], dlogits


def _with_grad_fake(logits: Tensor, targets: Tensor, upstream: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new_losses(logits, None)[0], logits.new_empty(logits.shape)


def _mean_fake(losses: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    return losses.new_empty(()), losses.new_empty(())


def _forward_on_cuda(logits: Tensor, targets: Tensor, hints: Tensor | None, *scalars: Any) -> tuple[Tensor, ...]:
    return softcap_ce_reference(logits, targets, hints, *scalars)


def _with_grad_on_cuda(logits: Tensor, targets: Tensor, upstream: Tensor, *scalars: Any) -> tuple[Tensor, Tensor]:
    losses, lse, _ = softcap_ce_reference(logits, targets, None, *scalars)
    return losses, _gradient_reference(upstream, logits, targets, lse, *scalars)


_backward_op = register_op(
    "softcap_ce_backward(Tensor upstream, Tensor logits, Tensor targets, Tensor lse, float softcap, float temperature, "
    "int ignore_index) -> Tensor",
    _backward,
    cuda=_backward if has_native_cuda() else reference_on_cuda("softcap_ce_backward", _gradient_reference),
    fake=_backward_fake,
    not_differentiable="double backward is not supported",
)

_with_grad_op = register_op(
    "softcap_ce_with_grad(Tensor logits, Tensor targets, Tensor upstream, float softcap, float temperature, "
    "int ignore_index) -> (Tensor, Tensor)",
    _with_grad,
    cuda=_with_grad if has_native_cuda() else reference_on_cuda("softcap_ce_with_grad", _with_grad_on_cuda),
    fake=_with_grad_fake,
    not_differentiable="not differentiable: it returns the gradient itself",
)

# --- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, _hints, *ctx.scalars = inputs
    ctx.save_for_backward(logits, targets, output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, upstream: Tensor | None, _lse: Any, _hint_log_probs: Any) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 6
    logits, targets, lse = ctx.saved_tensors
    return (_backward_op(upstream, logits, targets, lse, *ctx.scalars), *(None,) * 5)


_forward_op = register_op(
    "softcap_ce_forward(Tensor logits, Tensor targets, Tensor? hints, float softcap, float temperature, "
    "int ignore_index) -> (Tensor, Tensor, Tensor)",
    _forward,
    cuda=_forward if has_native_cuda() else reference_on_cuda("softcap_ce_forward", _forward_on_cuda),
    fake=_forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
)


def _setup_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.rows = inputs[0].shape[0]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _mean_autograd(ctx: Any, upstream: Tensor | None, _weight: Any) -> tuple[Tensor | None, ...]:
    (weight,) = ctx.saved_tensors
    return None if upstream is None else (upstream * weight).expand(ctx.rows), None, None


_mean_op = register_op(
    "softcap_ce_mean(Tensor losses, Tensor targets, int ignore_index) -> (Tensor, Tensor)",
    launch_mean,
    fake=_mean_fake,
    backward=_mean_autograd,
    setup_context=_setup_mean,
)

# --- public ----------------------------------------------------------------------------------------------------------


def check_softcap(softcap: float | None) -> float:
    """The softcap as ops take it: 0 for None."""
    if softcap is None:
        return 0.0
    if not 0 < softcap < float("inf"):
        raise ValueError(f"softcap: got {softcap}, wanted a finite positive number or None")
    return float(softcap)


def check_indices(name: str, indices: Tensor, rows: int, device: torch.device) -> Tensor:
    """A contiguous int64 index tensor of shape [rows] on the device."""
    if indices.dtype.is_floating_point or indices.dtype.is_complex or indices.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {indices.dtype}, wanted an integer dtype")
    if indices.shape != (rows,):
        raise ValueError(f"{name}: got shape {list(indices.shape)}, wanted [{rows}]")
    if indices.device != device:
        raise ValueError(f"{name}: got device {indices.device}, wanted {device}")
    return indices.to(torch.int64).contiguous()


def check_float(name: str, tensor: Tensor) -> None:
    """Float32, bfloat16 or float16; float64 on the CPU alone."""
    allowed = (torch.float32, torch.bfloat16, torch.float16) + ((torch.float64,) if not tensor.is_cuda else ())
    if tensor.dtype not in allowed:
        wanted = ", ".join(str(dtype) for dtype in allowed)
        raise TypeError(f"{name}: got dtype {tensor.dtype} on {tensor.device.type}, wanted one of {wanted}")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, wanted one of {REDUCTIONS}")


def reduce(losses: Tensor, targets: Tensor, reduction: str, ignore_index: int) -> Tensor:
    """ "none": the losses [N]; "sum"; "mean" over the targets that are not ignored (nan when there are none)."""
    if reduction == "mean":
        return _mean_op(losses, targets, ignore_index)[0]
    return losses if reduction == "none" else losses.sum()


def _check_logits(logits: Tensor, targets: Tensor) -> Tensor:
    check_float("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits: got shape {list(logits.shape)}, wanted [N, V] with V > 0")
    return check_indices("targets", targets, logits.shape[0], logits.device)


def softcap_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None = 30.0,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of softcap * tanh(logits / softcap), without ever storing the softcapped logits.

    Args:
        logits: [N, V], float32, bfloat16 or float16 (float64 on the CPU), any row stride.
        targets: [N], integers in [0, V) or `ignore_index`. Out of range: IndexError on the CPU; on CUDA that row's loss
            and gradient are nan (nothing outside the tensors is read).
        softcap: positive, or None for plain cross-entropy.
        reduction: "mean" (over the targets not ignored; nan when all are), "sum" or "none".
        ignore_index: a target to skip: loss 0, gradient 0.

    Returns:
        A scalar, or [N] for "none"; float32 (float64 for float64 logits), in nats. The gradient has the logits' dtype;
        any upstream gradient is honoured; double backward raises RuntimeError.

    Raises:
        TypeError, ValueError: a dtype, shape, device, softcap or reduction that is not as above.
    """
    check_reduction(reduction)
    cap = check_softcap(softcap)
    targets = _check_logits(logits, targets)
    losses = _forward_op(logits, targets, None, cap, 1.0, ignore_index)[0]
    return reduce(losses, targets, reduction, ignore_index)


def softcap_cross_entropy_with_grad(
    logits: Tensor,
    targets: Tensor,
    softcap: float | None = 30.0,
    *,
    grad_scale: float | Tensor,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Losses and gradient in one pass over the logits, for callers that know the upstream gradient beforehand.

    Args:
        logits, targets, softcap, ignore_index: as for :func:`softcap_cross_entropy`.
        grad_scale: upstream gradient of the per-token losses: one number, or a tensor of shape [] or [N] on the logits'
            device. For the mean loss over N tokens divided by 8: 1 / (8 * N).

    Returns:
        (losses [N] float32, dlogits [N, V] in the logits' dtype); nothing here is differentiable.

    Raises:
        TypeError, ValueError, IndexError: as for :func:`softcap_cross_entropy`.
    """
    cap = check_softcap(softcap)
    targets = _check_logits(logits, targets)
    rows = logits.shape[0]
    if not isinstance(grad_scale, Tensor):
        grad_scale = logits.new_full((), grad_scale, dtype=loss_dtype(logits))
    if grad_scale.shape not in ((), (rows,)) or grad_scale.device != logits.device:
        raise ValueError(
            f"grad_scale: got shape {list(grad_scale.shape)} on {grad_scale.device}, "
            f"wanted [] or [{rows}] on {logits.device}"
        )
    upstream = grad_scale.to(loss_dtype(logits)).expand(rows)
    return _with_grad_op(logits.detach(), targets, upstream.detach(), cap, 1.0, ignore_index)
