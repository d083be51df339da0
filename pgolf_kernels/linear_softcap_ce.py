"""The output head and its loss in one call: logits are made, used and dropped inside.

    a[i] = hidden[i] @ weight.T + (hidden[i] @ lora_a[doc[i]].T) @ lora_b[doc[i]].T      (the second term with adapters)
    z = softcap * tanh(a / softcap) / temperature,   loss[i] = log(sum_j exp(z[i, j])) - z[i, target[i]]

hidden [N, D] decides the dtype that is computed with (float32, bfloat16, float16; float64 on the CPU); weight [V, D],
lora_a [B, r, D] and lora_b [B, V, r] may be float32 beside it. Losses are float32, gradients have their tensor's dtype
and come from float32 accumulators. The adapters are those of test-time training, one pair a document
(openai/parameter-golf pull request 1530).

With the loss of a row goes the gradient of its logits, u[i] = dloss[i] / da[i], which does not depend on the upstream
gradient g. While all of u is small enough it is written over the logits and kept for the backward pass, where g folds
into the small operands: dhidden = g * (u @ weight), dweight = u.T @ (g * hidden). Three matrix products, any upstream
gradient, nothing saved is changed. Beyond that size, or with `recompute=True`, the rows go through in chunks and only a
chunk of logits exists at a time. Of a sum or a mean g is one number: the forward pass makes the gradients at g = 1, and
the backward pass multiplies them by g, still three products. Of losses that are not reduced the backward pass makes the
logits again: four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from pgolf_kernels._linear_softcap_ce_head import Gradients, Head, check_head, dtypes_of, times_factor
from pgolf_kernels._native_op import register_op
from pgolf_kernels.batched_lora import _forward_fake as lora_forward_fake
from pgolf_kernels.softcap_ce import (
    check_indices,
    check_reduction,
    check_softcap,
    launch_backward,
    launch_forward,
    launch_mean,
    launch_with_grad,
    loss_dtype,
    reduce,
    softcap_ce_reference,
)

# --- reference -------------------------------------------------------------------------------------------------------


def head_reference(
    hidden: Tensor,
    weight: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    doc_ids: Tensor | None = None,
) -> Tensor:
    """The logits [N, V] in hidden's dtype, in plain PyTorch."""
    dtype = hidden.dtype
    logits = hidden @ weight.to(dtype).T
    if lora_a is not None and lora_b is not None:
        if doc_ids is None:
            documents = torch.arange(len(lora_a), device=hidden.device)
            doc_ids = documents.repeat_interleave(len(hidden) // max(1, len(documents)))
        inner = torch.einsum("nd,nrd->nr", hidden, lora_a.to(dtype)[doc_ids])
        logits = logits + torch.einsum("nr,nvr->nv", inner, lora_b.to(dtype)[doc_ids])
    return logits


def linear_softcap_ce_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    doc_ids: Tensor | None = None,
    hints: Tensor | None = None,
    softcap: float | None = 30.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """(losses [N], log p(hint) [N] or [0]) in plain PyTorch, differentiable."""
    logits = head_reference(hidden, weight, lora_a, lora_b, doc_ids)
    losses, _, hint_log_probs = softcap_ce_reference(logits, targets, hints, softcap, temperature, ignore_index)
    return losses, hint_log_probs


# --- config ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadConfig:
    """How much of the logits exists at a time, in bytes."""

    keep: int  # logits' gradient kept between forward and backward; beyond it the backward pass recomputes
    kept_chunk: int  # rows that are made at a time when all are kept
    chunk: int  # rows that are made at a time otherwise


# CPU: logits that are still in the last-level cache when the loss reads them.
CPU_CONFIG = HeadConfig(keep=512 << 20, kept_chunk=16 << 20, chunk=16 << 20)
# CUDA: 98,304 x 8192 bfloat16 logits are 1.5 GiB: kept, in one piece. Chunks of 4096 rows hold a pass under 200 MB.
CUDA_CONFIG = HeadConfig(keep=2 << 30, kept_chunk=2 << 30, chunk=64 << 20)


def config_of(tensor: Tensor) -> HeadConfig:
    return CUDA_CONFIG if tensor.device.type == "cuda" else CPU_CONFIG


# --- ops --------------------------------------------------------------------------------------------------------------

_INPUTS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? lora_a, Tensor? lora_b, Tensor? doc_ids"
_SCALARS = "float softcap, float temperature, int ignore_index"


def _part(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _new_losses(hidden: Tensor, hints: Tensor | None) -> tuple[Tensor, Tensor]:
    losses = hidden.new_empty(len(hidden), dtype=loss_dtype(hidden))
    return losses, torch.empty_like(losses) if hints is not None else losses.new_empty(0)


def _prepared(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """An op over `_INPUTS` and hints from a `kernel` over the head and what goes with its rows, in the head's order.

    `kernel` gets targets [N], hints [N] or None, room for losses [N] and log p(hint) [N] or [0], and the op's other
    arguments. It puts into the caller's order what it returns by row and the caller reads by row.
    """

    def op(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        doc_ids: Tensor | None,
        hints: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        head = Head(hidden, weight, lora_a, lora_b, doc_ids)
        targets, hints = head.sorted(targets), None if hints is None else head.sorted(hints)
        return kernel(head, targets, hints, *_new_losses(hidden, hints), *rest)

    return op


@_prepared
def _forward(
    head: Head, targets: Tensor, hints: Tensor | None, losses: Tensor, hint_log_probs: Tensor, *scalars: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if fused := head.fused(*scalars[:2]):
        inverse = torch.empty_like(losses)
        fused.losses(head.hidden, head.weight, targets, hints, *scalars, losses, hint_log_probs, inverse)
        return losses, hint_log_probs, inverse
    lse = torch.empty_like(losses)
    for rows in head.chunks(config_of(head.hidden).chunk):
        logits, _ = head.logits(rows)
        out = (losses[rows], lse[rows], hint_log_probs[rows])
        launch_forward(logits, targets[rows], _part(hints, rows), scalars, *out)
    return head.unsorted(losses), head.unsorted(hint_log_probs), lse


@_prepared
def _keep(
    head: Head, targets: Tensor, hints: Tensor | None, losses: Tensor, hint_log_probs: Tensor, *scalars: Any
) -> tuple[Tensor, ...]:
    hidden, weight = head.hidden, head.weight
    scale = torch.ones_like(losses)
    if fused := head.fused(*scalars[:2]):
        powers = hidden.new_empty(len(hidden), len(weight))
        fused.losses(hidden, weight, targets, hints, *scalars, losses, hint_log_probs, scale, powers)
        return losses, hint_log_probs, powers, scale, hidden.new_empty(0), hidden.new_empty(0)
    lse = torch.empty_like(losses)
    chunks = list(head.chunks(config_of(hidden).kept_chunk))
    dlogits = None if len(chunks) == 1 else hidden.new_empty(len(hidden), len(weight))
    inner, low = [], hidden.new_empty(0)
    for rows in chunks:
        logits, kept = head.logits(rows, None if dlogits is None else dlogits[rows])
        if kept:
            inner.append(kept[0])
            low = kept[1]
        out = (losses[rows], lse[rows], hint_log_probs[rows])
        launch_with_grad(logits, targets[rows], _part(hints, rows), scale[rows], scalars, *out, logits)
    dlogits = logits if dlogits is None else dlogits
    inner_rows = inner[0] if len(inner) == 1 else torch.cat(inner) if inner else hidden.new_empty(0)
    return head.unsorted(losses), head.unsorted(hint_log_probs), dlogits, scale, inner_rows, low


@_prepared
def _learn(
    head: Head,
    targets: Tensor,
    hints: Tensor | None,
    losses: Tensor,
    hint_log_probs: Tensor,
    needs: list[bool],
    reduction: str,
    *scalars: Any,
) -> tuple[Tensor, ...]:
    """The losses' sum or mean, log p(hint), the weight of a loss therein, and the gradients of the sum, of which
    dhidden[i] is to be multiplied by the fourth result [N]."""
    hidden, weight = head.hidden, head.weight
    scale, lse = torch.ones_like(losses), torch.empty_like(losses)
    chunks = list(head.chunks(config_of(hidden).chunk))
    grads = Gradients(head, needs, None)
    fused = head.fused(*scalars[:2])
    buffer = hidden.new_empty(chunks[0].stop, len(weight))
    room = torch.empty_like(hidden[chunks[0]]) if fused else hidden
    # With many small chunks the launching thread is what may fall behind: slices are made at once.
    parts = zip(*(t.split(len(buffer)) for t in (hidden, targets, losses, lse, scale)), strict=True)
    pairs: Any = [(None, hint_log_probs)] * len(chunks)
    if hints is not None:
        pairs = zip(hints.split(len(buffer)), hint_log_probs.split(len(buffer)), strict=True)
    for rows, part, (hint, hint_log_prob) in zip(chunks, parts, pairs, strict=True):
        x, target, loss, own_lse, own_scale = part
        full = len(x) == len(buffer)
        logits = buffer if full else buffer[: len(x)]
        if fused:
            scaled = room if full else room[: len(x)]
            results = (loss, hint_log_prob, own_scale, logits, scaled)
            fused.losses(x, weight, target, hint, *scalars, *results)
            grads.add(logits, None, rows, [], scaled)
        else:
            _, kept = head.logits(rows, logits)
            launch_with_grad(logits, target, hint, own_scale, scalars, loss, own_lse, hint_log_prob, logits)
            grads.add(logits, None, rows, kept)
    # Where logits are made, `scale` was the upstream gradient of their pass: 1 in any order.
    if reduction == "mean":
        total, share = launch_mean(losses, targets, scalars[2])
    else:
        total, share = losses.sum(), losses.new_ones(())
    del buffer, logits
    return total, head.unsorted(hint_log_probs), share, scale, *grads.sums()


def _backward(
    upstream: Tensor,
    dlogits: Tensor,
    scale: Tensor,
    inner: Tensor,
    low: Tensor,
    hidden: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    doc_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    head = Head(hidden, weight, lora_a, lora_b, doc_ids)
    factor = head.sorted(upstream) * scale
    chunks = list(head.chunks(config_of(hidden).kept_chunk))
    grads = Gradients(head, needs, len(chunks))
    for rows in chunks:
        grads.add(dlogits[rows], factor[rows], rows, [] if lora_a is None else [inner[rows], low])
    return grads.outputs()


def _recompute(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    doc_ids: Tensor | None,
    sums: Tensor,
    needs: list[bool],
    *scalars: Any,
) -> tuple[Tensor, ...]:
    """`sums`: what the forward op kept of each row's sum, 1 / (S temperature) when fused and lse otherwise."""
    head = Head(hidden, weight, lora_a, lora_b, doc_ids)
    targets, upstream = head.sorted(targets), head.sorted(upstream)
    chunks = list(head.chunks(config_of(hidden).chunk))
    grads = Gradients(head, needs, len(chunks))
    softcap, temperature, _ = scalars
    fused = head.fused(softcap, temperature)
    factor, at_target, one = upstream * sums, upstream / temperature, upstream.new_ones(1)
    buffer = hidden.new_empty(chunks[0].stop, len(weight))
    for rows in chunks:
        logits = buffer[: rows.stop - rows.start]
        if fused:
            values = factor[rows], at_target[rows]
            fused.gradient(head.hidden[rows], head.weight, targets[rows], softcap, temperature, *values, logits)
            grads.add(logits, None, rows, [])
        else:  # without the upstream gradient: float16 could lose small ones
            _, kept = head.logits(rows, logits)
            launch_backward(logits, targets[rows], sums[rows], one.expand(len(logits)), scalars, logits)
            grads.add(logits, upstream[rows], rows, kept)
    del buffer, logits
    return grads.outputs()


def _gradients_fake(tensors: tuple[Tensor | None, ...], needs: list[bool]) -> tuple[Tensor, ...]:
    hidden = tensors[0]
    assert hidden is not None
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else hidden.new_empty(0)
        for need, tensor in zip(needs, tensors, strict=True)
    )


def _forward_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, a: Any, b: Any, doc_ids: Any, hints: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    losses, hint_log_probs = _new_losses(hidden, hints)
    return losses, hint_log_probs, torch.empty_like(losses)


def _keep_fake(hidden: Tensor, weight: Tensor, targets: Tensor, a: Any, b: Any, *rest: Any) -> tuple[Tensor, ...]:
    losses, hint_log_probs, scale = _forward_fake(hidden, weight, targets, a, b, *rest)
    dlogits, none = hidden.new_empty(len(hidden), len(weight)), hidden.new_empty(0)
    inner, low = (none, torch.empty_like(none)) if a is None else lora_forward_fake(hidden, [], [a], [b])[1:]
    return losses, hint_log_probs, dlogits, scale, inner, low


def _learn_fake(
    hidden: Tensor, weight: Tensor, targets: Tensor, a: Any, b: Any, _doc_ids: Any, hints: Any, needs: Any, *_: Any
) -> tuple[Tensor, ...]:
    losses, hint_log_probs = _new_losses(hidden, hints)
    d_hidden, d_weight, d_a, d_b = _gradients_fake((hidden, weight, a, b), needs)
    d_weight = d_weight.new_empty(d_weight.shape, dtype=losses.dtype if needs[1] else hidden.dtype)
    return losses.new_empty(()), hint_log_probs, losses.new_empty(()), losses, d_hidden, d_weight, d_a, d_b


def _scaled(sums: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return times_factor(sums, factor, torch.empty_like(sums, dtype=dtype))


def _scaled_fake(sums: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(sums, dtype=dtype)


def _backward_fake(*inputs: Any) -> tuple[Tensor, ...]:
    hidden, weight, a, b, _doc_ids, needs = inputs[5:]
    return _gradients_fake((hidden, weight, a, b), needs)


def _recompute_fake(
    upstream: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    a, b, _doc_ids, _sums, needs = rest[:5]
    return _gradients_fake((hidden, weight, a, b), needs)


_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
_NO_DOUBLE = "double backward is not supported"
_backward_op = register_op(
    f"linear_softcap_ce_backward(Tensor upstream, Tensor dlogits, Tensor scale, Tensor inner, Tensor low, "
    f"{_INPUTS.replace('Tensor targets, ', '')}, bool[] needs) -> {_GRADIENTS}",
    _backward,
    fake=_backward_fake,
    not_differentiable=_NO_DOUBLE,
)
_scaled_op = register_op(
    "linear_softcap_ce_scaled(Tensor sums, Tensor factor, ScalarType dtype) -> Tensor",
    _scaled,
    fake=_scaled_fake,
    not_differentiable=_NO_DOUBLE,
)
_recompute_op = register_op(
    f"linear_softcap_ce_recompute(Tensor upstream, {_INPUTS}, Tensor sums, bool[] needs, {_SCALARS}) -> {_GRADIENTS}",
    _recompute,
    fake=_recompute_fake,
    not_differentiable=_NO_DOUBLE,
)

# --- autograd ---------------------------------------------------------------------------------------------------------

_DIFFERENTIABLE = (0, 1, 3, 4)  # hidden, weight, lora_a, lora_b among the forward ops' ten inputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, targets, lora_a, lora_b, doc_ids, _hints, *ctx.scalars = inputs
    kept = output[2:]
    ctx.save_for_backward(hidden, weight, targets, lora_a, lora_b, doc_ids, *kept)
    ctx.set_materialize_grads(False)


def _autograd(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 10
    if upstream is None:
        return tuple(grads)
    hidden, weight, targets, lora_a, lora_b, doc_ids, *kept = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    if len(kept) > 1:
        results = _backward_op(upstream, *kept, hidden, weight, lora_a, lora_b, doc_ids, needs)
    else:
        inputs = (hidden, weight, targets, lora_a, lora_b, doc_ids, *kept)
        results = _recompute_op(upstream, *inputs, needs, *ctx.scalars)
    for i, need, result in zip(_DIFFERENTIABLE, needs, results, strict=True):
        grads[i] = result if need else None
    return tuple(grads)


def _setup_learn_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = dtypes_of(*(inputs[i] for i in _DIFFERENTIABLE))
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


def _learn_autograd(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 12
    if upstream is None:
        return tuple(grads)
    share, scale, *saved = ctx.saved_tensors
    factor = upstream * share
    # What a graph saved dies with it unless the graph is retained: those gradients are scaled where they lie. Tracers,
    # whose tensors are of types of their own, get the op that changes nothing.
    dies = type(upstream) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    for i, dtype, sums in zip(_DIFFERENTIABLE, ctx.dtypes, saved, strict=True):
        if ctx.needs_input_grad[i]:
            own = factor * scale if i == 0 else factor
            if dies and sums.dtype == dtype:
                grads[i] = times_factor(sums.detach(), own, sums.detach())
            else:
                grads[i] = _scaled_op(sums, own, dtype)
    return tuple(grads)


_forward_op = register_op(
    f"linear_softcap_ce_forward({_INPUTS}, Tensor? hints, {_SCALARS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    backward=_autograd,
    setup_context=_setup_context,
)
_keep_op = register_op(
    f"linear_softcap_ce_keep({_INPUTS}, Tensor? hints, {_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _keep,
    fake=_keep_fake,
    backward=_autograd,
    setup_context=_setup_context,
)

_learn_op = register_op(
    f"linear_softcap_ce_learn({_INPUTS}, Tensor? hints, bool[] needs, str reduction, {_SCALARS}) "
    f"-> ({', '.join(['Tensor'] * 8)})",
    _learn,
    fake=_learn_fake,
    backward=_learn_autograd,
    setup_context=_setup_learn_context,
)

# --- public ----------------------------------------------------------------------------------------------------------


def linear_softcap_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = 30.0,
    *,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    doc_ids: Tensor | None = None,
    temperature: float = 1.0,
    hints: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    recompute: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the softcapped logits hidden @ weight.T (plus adapters), over a temperature.

    Args:
        hidden: [N, D], float32, bfloat16 or float16 (float64 on the CPU); its dtype is computed with.
        weight: [V, D], of any of these dtypes.
        targets: [N], integers in [0, V) or `ignore_index`. Out of range: IndexError on the CPU, a nan loss on CUDA.
        softcap: positive, or None for none.
        lora_a, lora_b: adapters [B, r, D] and [B, V, r]; both or none.
        doc_ids: each row's document in [0, B) [N]. Out of range: IndexError on the CPU; on CUDA the row goes without
            adapters. None with adapters: the rows are those of the B documents in turn, N / B of each, which spares
            the device sorting them.
        temperature: positive; divides the softcapped logits.
        hints: [N], integers in [0, V) or -1 (none): the call then returns a pair.
        reduction: "mean" (over the targets not ignored; nan when all are), "sum" or "none".
        ignore_index: a target to skip: loss 0, gradient 0.
        recompute: True: only a chunk of the logits ever exists. The forward pass of a sum or a mean makes the gradients
            too, and the backward pass scales them; of "none" the backward pass makes the logits again (one matrix
            product more). False: the logits' gradient is kept for it. None: kept while it is small (2 GiB on CUDA).

    Returns:
        The loss: a scalar, or [N] for "none"; float32 (float64 for float64 input), in nats. With hints: (loss,
        log p(hint) [N], -inf where there is no hint, detached). Gradients reach hidden, weight, lora_a and lora_b, each
        in its own dtype; double backward raises RuntimeError.

    Raises:
        TypeError, ValueError: a dtype, shape, device, softcap, temperature or reduction that is not as above.
    """
    check_reduction(reduction)
    cap = check_softcap(softcap)
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}, wanted a positive number")
    doc_ids = check_head(hidden, weight, lora_a, lora_b, doc_ids)
    targets = check_indices("targets", targets, len(hidden), hidden.device)
    if hints is not None:
        hints = check_indices("hints", hints, len(hidden), hidden.device)
    inputs = (hidden.contiguous(), weight, targets, lora_a, lora_b, doc_ids, hints)
    scalars = (cap, float(temperature), ignore_index)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (hidden, weight, lora_a, lora_b)
    )
    if recompute is None:
        recompute = len(hidden) * len(weight) * hidden.element_size() > config_of(hidden).keep
    if learns and recompute and reduction != "none":
        needs = [t is not None and t.requires_grad for t in (hidden, weight, lora_a, lora_b)]
        loss, hint_log_probs = _learn_op(*inputs, needs, reduction, *scalars)[:2]
        return loss if hints is None else (loss, hint_log_probs.detach())
    op = _keep_op if learns and not recompute else _forward_op
    losses, hint_log_probs = op(*inputs, *scalars)[:2]
    loss = reduce(losses, targets, reduction, ignore_index)
    return loss if hints is None else (loss, hint_log_probs.detach())


class ScoreOptions(TypedDict, total=False):
    """The keywords of :func:`score_tokens`: those of :func:`linear_softcap_cross_entropy` that bear on a score."""

    lora_a: Tensor | None
    lora_b: Tensor | None
    doc_ids: Tensor | None
    temperature: float
    hints: Tensor | None
    ignore_index: int


def score_tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = 30.0, **options: Unpack[ScoreOptions]
) -> Tensor | tuple[Tensor, Tensor]:
    """Per-token losses [N] for scoring: :func:`linear_softcap_cross_entropy` with reduction "none" under no_grad.

    Exact: hyperbolic tangent and exponential to float32 accuracy, a per-token loss within 1e-5 of float64 on the same
    logits. `options`: lora_a, lora_b, doc_ids, temperature, hints and ignore_index, as there. With hints: (losses,
    log p(hint)). Raises what that function raises, and TypeError for another keyword.
    """
    with torch.no_grad():
        return linear_softcap_cross_entropy(hidden, weight, targets, softcap, reduction="none", **options)
