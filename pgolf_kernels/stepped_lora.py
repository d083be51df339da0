"""Linear layers with a low-rank adapter for each document, whose backward takes the optimiser's step.

    y_p = x W_p^T + c_p * ((x A_p[b]^T) B_p[b]^T) (+ residual_p)

as in batched_lora.py, with frozen weights W_p, a frozen factor c_p [out] for each output (or none), and b the document
of a packed row. The backward gives dx and, instead of returning dA and dB, does with them at once what
adapter_adamw.py does:

    dA_p[b] = e_p^T x,   dB_p[b] = c_p * (g_p^T s_p),   (A_p, B_p) <- AdamW(A_p, B_p; dA_p, dB_p)

On a GPU the accumulator of a gradient's tile is the input of the step: no gradient is written, and the same pass writes
what the next forward reads, A and c * B in the activations' dtype. The 30 bytes an element that a gradient, a step and
a cast would move beside each other become 18.

A step in a backward is right only where a pass uses an adapter once; :class:`LoraPass` sees to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf_kernels._triton_op import kernels, runs_narrow_triton
from pgolf_kernels.adapter_adamw import adapter_adamw, check_step, step_factors
from pgolf_kernels.batched_lora import _RESIDUAL, _WEIGHT, MAX_RANK, Layout, _backward_kernel, _forward, padded


@dataclass(frozen=True)
class AdamStep:
    """One AdamW step; `steps` and the numbers are those of :func:`adapter_adamw`. Raises ValueError as it does."""

    steps: Tensor  # integers [documents], from 1; 0: the document takes no step
    lr: float
    beta1: float = 0.0
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    factors: Tensor = field(init=False)

    def __post_init__(self) -> None:
        check_step(self.steps, self.lr, self.beta1, self.beta2, self.eps, self.weight_decay)
        object.__setattr__(self, "steps", self.steps.contiguous())
        object.__setattr__(self, "factors", step_factors(self.steps, self.beta1, self.beta2, torch.float32))


class Moments(NamedTuple):
    """A or B of one projection [documents, rows, columns] with the averages of its gradient and of its square."""

    value: Tensor
    square: Tensor
    mean: Tensor | None


class Adapters(NamedTuple):
    """What one call reads and steps: A and B of its projections, and their copies in the activations' dtype.

    `low`: A of all projections side by side [documents, ranks, in], and each one's B times its factor [documents, out,
    rank]; ranks and `in` are padded with zeros to 16 bytes. None where the products read A and B themselves.
    """

    a: list[Moments]
    b: list[Moments]
    low: tuple[Tensor, list[Tensor]] | None


class SteppedLora:
    """Adapters of projections that share an input, at every layer slot, with what an optimiser keeps of them."""

    def __init__(self, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], *, dtype: torch.dtype, mean: bool) -> None:
        """lora_as [slots, documents, r, in] and lora_bs [slots, documents, out, r] (B zero), contiguous and in float32
        or float64, are stepped in place. `dtype` is that of the activations; `mean`: whether beta1 > 0.

        Raises ValueError for lengths, shapes, strides and devices, TypeError for dtypes.
        """
        if not 1 <= len(lora_as) == len(lora_bs):
            raise ValueError(
                f"lora_as, lora_bs: got lengths {len(lora_as)}, {len(lora_bs)}, wanted the same, at least 1"
            )
        for i, (a, b) in enumerate(zip(lora_as, lora_bs, strict=True)):
            fits = a.dim() == b.dim() == 4 and (*a.shape[:2], a.shape[2]) == (*b.shape[:2], b.shape[3])
            if not fits or not 1 <= a.shape[2] <= MAX_RANK or not (a.is_contiguous() and b.is_contiguous()):
                raise ValueError(
                    f"adapters {i}: got A {tuple(a.shape)} and B {tuple(b.shape)}, wanted [slots, documents, r, in] "
                    f"and [slots, documents, out, r] with 1 <= r <= {MAX_RANK}, contiguous"
                )
            slots, documents, _, features = lora_as[0].shape
            if (*a.shape[:2], a.shape[3]) != (slots, documents, features):
                raise ValueError(
                    f"adapters {i}: got A {tuple(a.shape)}, wanted [{slots}, {documents}, r, {features}] as adapters 0"
                )
            for t in (a, b):
                if t.dtype not in (torch.float32, torch.float64) or t.dtype != lora_as[0].dtype:
                    raise TypeError(f"adapters {i}: got {t.dtype}, wanted torch.float32 or torch.float64 throughout")
                if t.device != lora_as[0].device:
                    raise ValueError(f"adapters {i}: got device {t.device}, wanted {lora_as[0].device} as adapters 0")
        self._tensors = [*lora_as], [*lora_bs]
        self._moments = [
            [(torch.zeros_like(t), torch.zeros_like(t) if mean else None) for t in ts] for ts in self._tensors
        ]
        self._low: tuple[Tensor, list[Tensor]] | None = None
        first = lora_as[0]
        if runs_narrow_triton(first.new_empty(0, dtype=dtype)):
            ranks = [padded(a.shape[2], dtype) for a in lora_as]
            shape = (*first.shape[:2], sum(ranks), padded(first.shape[3], dtype))
            self._low = (
                first.new_zeros(shape, dtype=dtype),
                [b.new_zeros((*b.shape[:3], rank), dtype=dtype) for b, rank in zip(lora_bs, ranks, strict=True)],
            )
        self._slots = [self._slot(i) for i in range(len(first))]

    def _slot(self, slot: int) -> Adapters:
        a, b = (
            [
                Moments(t[slot], square[slot], None if mean is None else mean[slot])
                for t, (square, mean) in zip(tensors, moments, strict=True)
            ]
            for tensors, moments in zip(self._tensors, self._moments, strict=True)
        )
        low = None if self._low is None else (self._low[0][slot], [t[slot] for t in self._low[1]])
        return Adapters(a, b, low)

    def __getitem__(self, slot: int) -> Adapters:
        return self._slots[slot]

    @torch.no_grad()
    def hand_over(self, documents: Tensor) -> None:
        """After new values have been written to A of the documents (int64 indices): zero B and moments."""
        lora_as, lora_bs = self._tensors
        zeroed = [*lora_bs, *(t for moments in self._moments for pair in moments for t in pair if t is not None)]
        if self._low is not None:
            stacked, own = self._low
            zeroed += own
            row = 0
            for a, b in zip(lora_as, own, strict=True):
                stacked[:, documents, row : row + a.shape[2], : a.shape[3]] = a[:, documents].to(stacked.dtype)
                row += b.shape[3]
        for tensor in zeroed:
            tensor.index_fill_(1, documents, 0.0)


class LoraPass:
    """One forward pass over documents packed one behind the other, document i with adapter i, and the step after it.

    cu_seqlens: int32 [documents + 1], from 0; rows past the last bound are no document's. Without `step` the pass is
    forward only.
    """

    def __init__(self, cu_seqlens: Tensor, step: AdamStep | None = None) -> None:
        self.cu_seqlens, self.step = cu_seqlens, step
        # What every call depends on, so that autograd comes to each, also where x needs no gradient. It gets none.
        self.anchor = torch.zeros((), device=cu_seqlens.device, requires_grad=step is not None)
        self._tiles: Any = None
        self._rows: int | None = None
        self._seen: set[int] = set()

    def over(self, cu_seqlens: Tensor) -> LoraPass:
        """The same pass for calls over other rows of the documents: the backward of either steps both's adapters."""
        other = LoraPass(cu_seqlens, self.step)
        other.anchor, other._seen = self.anchor, self._seen
        return other

    def tiles(self, x: Tensor) -> Any:
        """Where the rows lie, for the kernels: computed by the first call for all of them, forward and backward."""
        if self._tiles is None:
            self._tiles = kernels("batched_lora").tiles_of(x, Layout(0, self.cu_seqlens, None))
        return self._tiles

    def enter(self, adapters: Adapters, x: Tensor) -> None:
        """Checks that a call belongs to this pass, and that no other has used its adapters."""
        documents, bounds = adapters.a[0].value.shape[0], self.cu_seqlens
        if bounds.dtype != torch.int32 or bounds.shape != (documents + 1,) or bounds.device != x.device:
            raise ValueError(
                f"cu_seqlens: got {bounds.dtype} of shape {tuple(bounds.shape)} on {bounds.device}, wanted torch.int32 "
                f"of shape ({documents + 1},) on x's {x.device}"
            )
        if self._rows not in (None, x.shape[0]):
            raise ValueError(f"x: got {x.shape[0]} rows, wanted {self._rows} as in the pass's other calls")
        self._rows = x.shape[0]
        if self.step is None:
            return
        steps = self.step.steps
        if steps.shape != (documents,) or steps.device != x.device:
            raise ValueError(
                f"steps: got shape {tuple(steps.shape)} on {steps.device}, wanted ({documents},) on x's {x.device}"
            )
        if (self.step.beta1 > 0) != (adapters.a[0].mean is not None):
            raise ValueError(
                f"beta1: got {self.step.beta1}, wanted it to fit the adapters' mean={self.step.beta1 <= 0}"
            )
        if id(adapters) in self._seen:
            raise RuntimeError(
                "stepped_lora: got the same adapters twice in one pass, wanted each once: its gradient is a sum then"
            )
        self._seen.add(id(adapters))

    def backward(self, loss: Tensor, others: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Steps every adapter that the loss has come through; returns the gradients of `others`, 0 where unused.

        Raises RuntimeError for a pass without a step.
        """
        if self.step is None:
            raise RuntimeError("LoraPass.backward: got a pass without step, wanted one with an AdamStep")
        return torch.autograd.grad(loss, [self.anchor, *others], materialize_grads=True)[1:]


# ---- autograd --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    weights: list[Tensor | None]
    adapters: Adapters
    out_scales: list[Tensor | None]
    through: LoraPass

    def parts(self, residuals: Sequence[Tensor | None]) -> list[int]:
        pairs = zip(self.weights, residuals, strict=True)
        return [_WEIGHT * (w is not None) | _RESIDUAL * (r is not None) for w, r in pairs]

    def low(self, x: Tensor) -> tuple[Tensor, list[Tensor]] | None:
        """What the kernels read, where they run."""
        return self.adapters.low if runs_narrow_triton(x) and x.numel() else None

    def values(self) -> tuple[list[Tensor], list[Tensor]]:
        """A and factor * B of each projection."""
        bs = [b.value for b in self.adapters.b]
        return [a.value for a in self.adapters.a], [
            b if scale is None else b * scale.to(b.dtype).unsqueeze(-1)
            for b, scale in zip(bs, self.out_scales, strict=True)
        ]


class _Stepped(torch.autograd.Function):
    """Not a registered op: its backward changes its inputs, which no functional graph can say."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, x: Tensor, *residuals: Tensor | None) -> tuple[Tensor, ...]:
        present = [t for t in call.weights if t is not None]
        low = call.low(x)
        if low is not None:
            with torch.cuda.device_of(x):
                tiles = call.through.tiles(x)
                ys, shrunk = kernels("batched_lora").products(x, call.weights, *low, list(residuals), tiles, 1.0)
        else:
            added, parts = [t for t in residuals if t is not None], call.parts(residuals)
            *ys, shrunk, _ = _forward(x, present, *call.values(), added, parts, call.through.cu_seqlens, None, 0, 1.0)
        ctx.call, ctx.has_residual = call, [t is not None for t in residuals]
        ctx.save_for_backward(x, shrunk)
        ctx.set_materialize_grads(False)
        return *ys, x

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        call, (x, shrunk), wants_x = ctx.call, ctx.saved_tensors, ctx.needs_input_grad[2]
        *found, later = upstream
        if all(grad is None for grad in found):  # the loss has come past the adapters, not through them
            return None, None, later, *found
        grads = [
            x.new_zeros((x.shape[0], b.value.shape[1])) if grad is None else grad.contiguous()
            for grad, b in zip(found, call.adapters.b, strict=True)
        ]
        step = call.through.step
        low = call.low(x)
        if low is not None:
            a, b = call.adapters.a, call.adapters.b
            d_x = kernels("batched_lora").backward_step(
                grads, x, call.weights, a, b, *low, shrunk, call.out_scales, later, call.through.tiles(x), wants_x, step
            )
        else:
            d_x = _backward_step(grads, x, shrunk, call, later, wants_x, step)
        d_residuals = [grad if has else None for grad, has in zip(grads, ctx.has_residual, strict=True)]
        return None, None, d_x if wants_x else None, *d_residuals


def _backward_step(
    grads: list[Tensor], x: Tensor, shrunk: Tensor, call: _Call, later: Tensor | None, wants_x: bool, step: AdamStep
) -> Tensor:
    """The same in PyTorch: gradients first, then one step with all of them."""
    present, (lora_as, lora_bs), count = [t for t in call.weights if t is not None], call.values(), len(grads)
    d_x, *results = _backward_kernel(
        grads, x, present, lora_as, lora_bs, shrunk, x.new_empty(0), call.parts([None] * count),
        call.through.cu_seqlens, None, 0, 1.0, wants_x, [False] * len(present),
    )  # fmt: skip
    d_as, d_bs = results[len(present) :][:count], results[len(present) :][count:]
    d_bs = [
        d_b if scale is None else d_b * scale.to(d_b.dtype).unsqueeze(-1)
        for d_b, scale in zip(d_bs, call.out_scales, strict=True)
    ]
    stepped = [*call.adapters.a, *call.adapters.b]
    adapter_adamw(
        [t.value.unsqueeze(0) for t in stepped],
        [grad.unsqueeze(0) for grad in (*d_as, *d_bs)],
        [t.square.unsqueeze(0) for t in stepped],
        step.steps,
        exp_avgs=[t.mean.unsqueeze(0) for t in stepped if t.mean is not None] or None,
        lr=step.lr,
        beta1=step.beta1,
        beta2=step.beta2,
        eps=step.eps,
        weight_decay=step.weight_decay,
    )
    return d_x.add_(later) if wants_x and later is not None else d_x


# ---- public function -------------------------------------------------------------------------------------------------


def stepped_lora(
    x: Tensor,
    weights: Sequence[Tensor | None],
    adapters: Adapters,
    through: LoraPass,
    *,
    residuals: Sequence[Tensor | None] | None = None,
    out_scales: Sequence[Tensor | None] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """(ys, x): y_p = x W_p^T + c_p * (x A_p^T) B_p^T (+ residual_p) of each projection p, and x again for whoever reads
    it next: that gradient is then added within this function's dx. :meth:`LoraPass.backward` steps A and B.

    x [N, in]; weights [out, in] or None, frozen; `adapters` one slot of a SteppedLora; residuals [N, out]; out_scales
    [out], frozen, which must stay as they are from a document's handing over to its end. The ys are [N, out], in x's
    dtype and in memory of their own: they may be written on. Between a call and its pass's backward nobody else may
    change A and B: autograd does not watch them.

    Raises ValueError for shapes, lengths and tensors that are not frozen, TypeError for dtypes, RuntimeError where a
    pass that steps uses the same adapters again.
    """
    count = len(adapters.a)
    residuals = [None] * count if residuals is None else list(residuals)
    out_scales = [None] * count if out_scales is None else list(out_scales)
    if not count == len(weights) == len(residuals) == len(out_scales):
        raise ValueError(
            f"weights, residuals, out_scales: got lengths {len(weights)}, {len(residuals)}, {len(out_scales)}, "
            f"wanted {count}, one a projection"
        )
    if x.dim() != 2 or x.shape[1] != adapters.a[0].value.shape[2]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [N, {adapters.a[0].value.shape[2]}]")
    if adapters.low is not None and x.dtype != adapters.low[0].dtype:
        raise TypeError(f"x: got {x.dtype}, wanted the adapters' {adapters.low[0].dtype}")
    for i, (weight, residual, scale, b) in enumerate(zip(weights, residuals, out_scales, adapters.b, strict=True)):
        out = b.value.shape[1]
        for name, tensor, shape in (
            ("weights", weight, (out, x.shape[1])),
            ("residuals", residual, (x.shape[0], out)),
            ("out_scales", scale, (out,)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}[{i}]: got shape {tuple(tensor.shape)}, wanted {shape}")
            if tensor is not None and tensor.requires_grad and name != "residuals" and torch.is_grad_enabled():
                raise ValueError(f"{name}[{i}]: got a tensor that requires a gradient, wanted a frozen one")
    through.enter(adapters, x)
    rows_of_b = [None if scale is None else scale.contiguous() for scale in out_scales]
    call = _Call(list(weights), adapters, rows_of_b, through)
    *ys, again = _Stepped.apply(through.anchor, call, x.contiguous(), *residuals)
    # Every result of a function that depends on the anchor requires a gradient, also what needs none.
    return ys, again if x.requires_grad else x
