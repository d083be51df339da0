"""One AdamW step over all adapters of a batch of documents, each document at its own step.

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    p = (1 - lr * decay) p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Tensors are [slots, documents, ...] in fp32; t is the document's own count, so that slots can be handed to new
documents while others go on. With beta1 = 0 (the public systems) m is g and no first moment exists: 20 bytes an
element move (read p, g, v; write p, v) instead of 28. A document with count 0 is left alone; one that is reset takes
no step, its moments become 0 and so do the tensors named in `zeroed` (B, whose zero makes an adapter neutral).
Source: AdamW as in torch.optim, used by the test-time training of pull requests 1530 and 1727.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from pgolf_kernels import _native
from pgolf_kernels._native_op import num_threads, register_mutating_op, runs_native
from pgolf_kernels._triton_op import kernels, runs_triton


def step_factors(steps: torch.Tensor, beta1: float, beta2: float, dtype: torch.dtype) -> torch.Tensor:
    """[documents, 2]: 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), 0 where the document takes no step.

    From expm1 in fp64: 1 - 0.999^t loses four digits when subtracted in fp32.
    """

    def corrected(beta: float) -> torch.Tensor:
        return -torch.expm1(counts * math.log(beta)) if beta > 0 else torch.ones_like(counts)

    counts = steps.double()
    table = torch.stack([corrected(beta1).reciprocal(), corrected(beta2).rsqrt()], dim=1)
    return torch.where(counts.unsqueeze(1) > 0, table, 0.0).to(dtype)


# ---- op --------------------------------------------------------------------------------------------------------------


def _step(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    steps: torch.Tensor,
    reset: torch.Tensor | None,
    zeroed: list[bool],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if not params:
        return
    factors = step_factors(steps, beta1, beta2, params[0].dtype)
    moments: Sequence[torch.Tensor | None] = exp_avgs or [None] * len(params)
    for p, g, v, m, zero in zip(params, grads, exp_avg_sqs, moments, zeroed, strict=True):
        if p.numel() == 0:
            continue
        arguments = (p, g, v, m, factors, reset, zero, lr, beta1, beta2, eps, weight_decay)
        if runs_triton(p):
            kernels("adapter_adamw").step(*arguments)
        elif not p.is_cuda and p.dtype == torch.float32 and runs_native(p):
            _step_native(*arguments)
        else:
            _step_one(*arguments)


def _step_native(
    p: torch.Tensor,
    g: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor | None,
    factors: torch.Tensor,
    reset: torch.Tensor | None,
    zero: bool,
    *numbers: float,
) -> None:
    """One float32 tensor on the CPU, in one pass over memory."""
    flags = None if reset is None else reset.contiguous()
    shape = (p.shape[0], p.shape[1], p[0, 0].numel())
    moment, clears = (0 if t is None else t.data_ptr() for t in (m, flags))
    _native.adapter_adamw_cpu(
        p.data_ptr(), g.data_ptr(), v.data_ptr(), moment, *shape, factors.data_ptr(), clears, zero, *numbers,
        num_threads(),
    )  # fmt: skip


def _step_one(
    p: torch.Tensor,
    g: torch.Tensor,
    v: torch.Tensor,
    m: torch.Tensor | None,
    factors: torch.Tensor,
    reset: torch.Tensor | None,
    zero: bool,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One tensor in PyTorch. Documents that stand alike are taken together: usually all of them, in one run."""
    cleared = torch.zeros_like(factors[:, 0], dtype=torch.bool) if reset is None else reset
    kinds, kind_of = torch.stack([factors[:, 0], factors[:, 1], cleared.to(factors.dtype)], 1).unique(
        dim=0, return_inverse=True
    )
    for kind, (inverse1, inverse2, fresh) in enumerate(kinds.tolist()):
        documents = (kind_of == kind).nonzero().flatten()
        whole = len(documents) == p.shape[1]
        part_p, part_g, part_v = (t if whole else t[:, documents] for t in (p, g, v))
        part_m = m if whole or m is None else m[:, documents]
        if fresh:
            for target in (part_v, part_m, part_p if zero else None):
                if target is not None:
                    target.zero_()
        elif inverse2 > 0:
            part_v.mul_(beta2).addcmul_(part_g, part_g, value=1 - beta2)
            mean = part_g if part_m is None else part_m.lerp_(part_g, 1 - beta1)
            denominator = part_v.sqrt().mul_(inverse2).add_(eps)
            part_p.mul_(1 - lr * weight_decay).addcdiv_(mean, denominator, value=-lr * inverse1)
        if not whole:
            p[:, documents], v[:, documents] = part_p, part_v
            if m is not None and part_m is not None:
                m[:, documents] = part_m


_op = register_mutating_op(
    "adapter_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg_sqs, Tensor(c!)[] exp_avgs, "
    "Tensor steps, Tensor? reset, bool[] zeroed, float lr, float beta1, float beta2, float eps, float weight_decay) "
    "-> ()",
    _step,
    fake=lambda *args: None,
)


# ---- public function -------------------------------------------------------------------------------------------------


@torch.no_grad()
def adapter_adamw(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: torch.Tensor,
    *,
    exp_avgs: Sequence[torch.Tensor] | None = None,
    reset: torch.Tensor | None = None,
    zeroed: Sequence[bool] | None = None,
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """One AdamW step in place over adapters [slots, documents, ...]; see the module's docstring.

    params, grads, exp_avg_sqs and, exactly when beta1 > 0, exp_avgs: lists of contiguous float32 (CPU: also float64)
    tensors, alike in shape. steps: integers [documents], the count of this step (1 for a document's first), 0 for a
    document that takes none. reset: bool [documents], slots that are being handed over. zeroed: for each parameter,
    whether a reset sets it to 0 (default: none). steps and reset live on the parameters' device and are not read on the
    host. Gradients of documents that take no step are not read.

    Raises ValueError for shapes, strides, devices and coefficients, TypeError for dtypes.
    """
    zeroed = [False] * len(params) if zeroed is None else list(zeroed)
    check_step(steps, lr, beta1, beta2, eps, weight_decay)
    _check(params, grads, exp_avg_sqs, steps, exp_avgs, reset, zeroed, beta1)
    _op(
        list(params), list(grads), list(exp_avg_sqs), list(exp_avgs or []), steps, reset, zeroed,
        float(lr), float(beta1), float(beta2), float(eps), float(weight_decay),
    )  # fmt: skip
    for tensor in (*params, *exp_avg_sqs, *(exp_avgs or [])):
        torch.autograd.graph.increment_version(tensor)  # a backward pass that has kept a parameter must notice


def check_step(steps: torch.Tensor, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """Raises ValueError for numbers that are no step's."""
    for name, number in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name}: got {number}, wanted a finite number of at least 0")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: got {beta}, wanted a number in [0, 1)")
    if steps.dim() != 1 or steps.dtype.is_floating_point or steps.dtype == torch.bool:
        raise ValueError(f"steps: got shape {tuple(steps.shape)} of {steps.dtype}, wanted integers [documents]")


def _check(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: torch.Tensor,
    exp_avgs: Sequence[torch.Tensor] | None,
    reset: torch.Tensor | None,
    zeroed: list[bool],
    beta1: float,
) -> None:
    if (exp_avgs is not None) != (beta1 > 0):
        raise ValueError(
            f"exp_avgs: got {'none' if exp_avgs is None else 'some'} with beta1={beta1}, wanted them where beta1 > 0"
        )
    lists = {"params": params, "grads": grads, "exp_avg_sqs": exp_avg_sqs}
    if exp_avgs is not None:
        lists["exp_avgs"] = exp_avgs
    for name, count in (("zeroed", len(zeroed)), *((name, len(entries)) for name, entries in lists.items())):
        if count != len(params):
            raise ValueError(f"{name}: got {count} entries, wanted {len(params)}, one a parameter")
    documents = len(steps)
    if reset is not None and (reset.shape != steps.shape or reset.dtype != torch.bool):
        raise ValueError(f"reset: got shape {tuple(reset.shape)} of {reset.dtype}, wanted bool {tuple(steps.shape)}")
    for i, p in enumerate(params):
        if p.dim() < 2 or p.shape[1] != documents:
            raise ValueError(f"params[{i}]: got shape {tuple(p.shape)}, wanted [slots, {documents}, ...]")
        if p.dtype != torch.float32 and not (p.dtype == torch.float64 and p.device.type == "cpu"):
            raise TypeError(f"params[{i}]: got {p.dtype} on {p.device}, wanted torch.float32")
        for name, entries in lists.items():
            t = entries[i]
            if t.shape != p.shape or t.dtype != p.dtype or t.device != p.device:
                raise ValueError(
                    f"{name}[{i}]: got {tuple(t.shape)} {t.dtype} {t.device}, "
                    f"wanted {tuple(p.shape)} {p.dtype} {p.device}"
                )
            if not t.is_contiguous():
                raise ValueError(f"{name}[{i}]: got strides {t.stride()}, wanted a contiguous tensor")
        for name, tensor in (("steps", steps), ("reset", reset)):
            if tensor is not None and tensor.device != p.device:
                raise ValueError(f"{name}: got device {tensor.device}, wanted params[{i}]'s {p.device}")
