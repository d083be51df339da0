"""Sums of residual streams with per-channel coefficients, and their RMSNorm, in one pass.

    u = sum_k c_k * s_k          n = scale * u / sqrt(mean(u^2) + eps)

s_k [..., D] are the streams of a residual network: block outputs, skips, the input embedding; c_k [D] the products of
learned mixes and gates that weigh them. Every sum between two matrix products of the network is of this form, so that
one kernel reads each stream once and writes the sum and its norm, and one backward kernel reads them once more, writes
every stream's gradient and reduces every coefficient's over the tokens:

    g = du + scale * r * (dn - u * r^2 * mean(dn * u)),  r = 1 / sqrt(mean(u^2) + eps)
    ds_k = c_k * g + t_k          dc_k = sum over tokens of g * s_k

t_k is the gradient that a stream has from its later uses. The functions return their streams again; who reads those
instead of the originals has t_k added inside this kernel, not by a pass of its own. Gradients that nobody asked for, of
frozen coefficients or of an input that is not learnt, are neither computed nor written.

Streams in fp32, bf16 or fp16 (fp64 on CPU), all alike; coefficients fp32 (fp64 beside fp64 streams); sums in fp32. The
streams themselves are what is kept for the backward; u and r are computed again. The norm of one stream alone keeps n
and r instead, so that x may be written over. Given up: a kernel per form of sum, which could fold
coefficients known to be one, and would have to be written nine times.

Source: the residual mixing of openai/parameter-golf pull requests 1413, 1514 and 1530.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf_kernels import _triton_op
from pgolf_kernels._native_op import register_op

EPS = torch.finfo(torch.float32).eps  # what torch.nn.functional.rms_norm takes for eps=None, below fp64
MAX_STREAMS = 8
WIDTH = 512  # columns that launch shapes were measured with


def reference(streams: Sequence[Tensor], coefficients: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """(u, n) by the formula in the streams' dtype or fp32, whichever is wider; differentiable by PyTorch."""
    wide = torch.promote_types(streams[0].dtype, torch.float32)
    total = _weighted_sum([s.to(wide) for s in streams], coefficients.to(wide))
    normed = total * (scale * (total.square().mean(-1, keepdim=True) + eps).rsqrt())
    return total.to(streams[0].dtype), normed.to(streams[0].dtype)


def _weighted_sum(streams: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """One pass a stream on a CPU, where a sum of products takes two."""
    total = coefficients[0] * streams[0]
    for c, s in zip(coefficients[1:], streams[1:], strict=True):
        total = torch.addcmul(total, c, s)
    return total


@dataclass(frozen=True)
class Launch:
    """Tokens a tile, warps, and programs a multiprocessor of the persistent grid."""

    rows: int
    warps: int
    programs: int

    def for_width(self, columns: int) -> Launch:
        """The same share of a tile for each thread where rows are wider than what it was measured with."""
        rows = max(1, self.rows * WIDTH // max(columns, WIDTH))
        more = max(1, rows * columns // (self.rows * WIDTH))
        return Launch(rows, min(self.warps * more, 32), max(1, self.programs // more))


@dataclass(frozen=True)
class ResidualConfig:
    """Launch shapes by direction and number of streams: those of the first entry that is not below the number.

    Measured on an H200 at 98,304 x 512 in bf16. Backward: there is an accumulator as wide as a tile for each stream.
    Tiles of two tokens are fastest up to three streams (188 against 262 us for two), of one beyond (328 against 430 for
    four). All programs must fit at a time, or the last ones run alone (eight streams: 6 take 523 us, 8 take 680).
    Where coefficients are frozen, and no accumulator is needed, Launch(1, 4, 16) takes 5 to 13 % less time; but then a
    gradient's last bit would depend on what else is asked for, since a row is summed in another order.
    """

    norm: Launch = Launch(4, 2, 16)
    forwards: tuple[tuple[int, Launch], ...] = ((3, Launch(2, 2, 16)), (MAX_STREAMS, Launch(4, 2, 16)))
    backwards: tuple[tuple[int, Launch], ...] = (
        (2, Launch(2, 2, 8)),
        (3, Launch(2, 2, 6)),
        (5, Launch(1, 4, 8)),
        (MAX_STREAMS, Launch(1, 4, 6)),
    )

    def forward(self, streams: int) -> Launch:
        return next(launch for most, launch in self.forwards if streams <= most)

    def backward(self, streams: int) -> Launch:
        return next(launch for most, launch in self.backwards if streams <= most)


CONFIG = ResidualConfig()


# ---- weighted sums ---------------------------------------------------------------------------------------------------


def _forward(
    streams: list[Tensor], coefficients: Tensor, scale: float, eps: float, with_total: bool, with_norm: bool
) -> tuple[Tensor, Tensor]:
    first = streams[0]
    if _triton_op.runs_triton(first):
        return _triton_op.kernels("residual").forward(
            streams, coefficients, scale, eps, with_total, with_norm, CONFIG.forward(len(streams))
        )
    total, normed = reference(streams, coefficients, scale, eps)
    return total if with_total else first.new_empty(0), normed if with_norm else first.new_empty(0)


def _forward_fake(
    streams: list[Tensor], coefficients: Tensor, scale: float, eps: float, with_total: bool, with_norm: bool
) -> tuple[Tensor, Tensor]:
    first = streams[0]
    return first.new_empty(first.shape if with_total else 0), first.new_empty(first.shape if with_norm else 0)


def _backward(
    streams: list[Tensor],
    coefficients: Tensor,
    d_total: Tensor | None,
    d_normed: Tensor | None,
    through: list[Tensor | None],
    scale: float,
    eps: float,
    wanted: list[bool],
) -> list[Tensor]:
    """[gradient of each stream..., of the coefficients]; `wanted`: whether the coefficients' and each stream's is, an
    unwanted one is empty."""
    first = streams[0]
    if _triton_op.runs_triton(first):
        launch = CONFIG.backward(len(streams))
        backward = _triton_op.kernels("residual").backward
        d_streams, d_coefficients = backward(
            streams, coefficients, d_total, d_normed, through, scale, eps, wanted, launch
        )
        return [*d_streams, d_coefficients]
    wide = torch.promote_types(first.dtype, torch.float32)
    inputs = [s.to(wide) for s in streams]
    weights = coefficients.to(wide)
    if d_normed is None:
        assert d_total is not None, "no gradient at all never comes here"
        g = d_total.to(wide)
    else:
        total, d = _weighted_sum(inputs, weights), d_normed.to(wide)
        r = (total.square().mean(-1, keepdim=True) + eps).rsqrt()
        along = r.square() * (d * total).mean(-1, keepdim=True)
        g = total.mul_(-along).add_(d).mul_(scale * r)
        if d_total is not None:
            g.add_(d_total)
    d_streams = [
        (c * g if t is None else torch.addcmul(t.to(wide), c, g)).to(first.dtype) if want else first.new_empty(0)
        for c, t, want in zip(weights, through, wanted[1:], strict=True)
    ]
    if not wanted[0]:
        return [*d_streams, coefficients.new_empty(0)]
    return [*d_streams, torch.stack([(g * s).flatten(0, -2).sum(0) for s in inputs]).to(coefficients.dtype)]


def _backward_fake(streams: list[Tensor], coefficients: Tensor, *rest: Any) -> list[Tensor]:
    wanted = rest[-1]
    d_streams = [s.new_empty(s.shape if want else 0) for s, want in zip(streams, wanted[1:], strict=True)]
    return [*d_streams, coefficients.new_empty(coefficients.shape if wanted[0] else 0)]


_backward_op = register_op(
    "combine_norm_backward(Tensor[] streams, Tensor coefficients, Tensor? d_total, Tensor? d_normed,"
    " Tensor?[] through, float scale, float eps, bool[] wanted) -> Tensor[]",
    _backward,
    fake=_backward_fake,
    not_differentiable="double backward is not supported",
)


def _remember(ctx: Any, streams: Sequence[Tensor], coefficients: Tensor, scale: float, eps: float) -> None:
    ctx.save_for_backward(coefficients, *streams)
    ctx.set_materialize_grads(False)
    ctx.scale, ctx.eps = scale, eps


def _gradients(
    ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, through: Sequence[Tensor | None], wanted: list[bool]
) -> tuple[list[Tensor | None], Tensor | None]:
    """(stream gradients, coefficient gradient) from what `_remember` kept; None for what is not wanted."""
    coefficients, *streams = ctx.saved_tensors
    if d_total is None and d_normed is None:
        return list(through), None
    *d_streams, d_coefficients = _backward_op(
        streams,
        coefficients,
        None if d_total is None else d_total.contiguous(),
        None if d_normed is None else d_normed.contiguous(),
        [None if t is None else t.contiguous() for t in through],
        ctx.scale,
        ctx.eps,
        wanted,
    )
    kept = [d if want else None for d, want in zip(d_streams, wanted[1:], strict=True)]
    return kept, d_coefficients if wanted[0] else None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    streams, coefficients, scale, eps, ctx.with_total, ctx.with_norm = inputs
    _remember(ctx, streams, coefficients, scale, eps)


def _differentiate(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Any, ...]:
    streams = ctx.saved_tensors[1:]
    d_streams, d_coefficients = _gradients(
        ctx,
        d_total if ctx.with_total else None,
        d_normed if ctx.with_norm else None,
        [None] * len(streams),
        [ctx.needs_input_grad[1], *ctx.needs_input_grad[0]],
    )
    return d_streams, d_coefficients, None, None, None, None


_op = register_op(
    "combine_norm(Tensor[] streams, Tensor coefficients, float scale, float eps, bool with_total, bool with_norm)"
    " -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    backward=_differentiate,
    setup_context=_setup_context,
)


class _CombineNormThrough(torch.autograd.Function):
    """The op with its streams returned as they came: an op's schema cannot say that, an autograd function can."""

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor,
        scale: float,
        eps: float,
        with_total: bool,
        with_norm: bool,
        *streams: Tensor,
    ) -> tuple[Tensor, ...]:
        _remember(ctx, streams, coefficients, scale, eps)
        ctx.with_total, ctx.with_norm = with_total, with_norm
        return *_op(list(streams), coefficients, scale, eps, with_total, with_norm), *streams

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, *through: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        d_streams, d_coefficients = _gradients(
            ctx,
            d_total if ctx.with_total else None,
            d_normed if ctx.with_norm else None,
            through,
            [needs[0], *needs[5:]],
        )
        return d_coefficients, None, None, None, None, *d_streams


# ---- the norm of one stream ------------------------------------------------------------------------------------------
# It keeps n, as whoever reads n does anyway, and not x: x may be written over.


def _norm(x: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """(n, 1 / rms [rows])."""
    if _triton_op.runs_triton(x):
        return _triton_op.kernels("residual").norm(x, scale, eps, CONFIG.norm)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * inverse * scale).to(x.dtype), inverse.flatten()


def _norm_backward(d_normed: Tensor, normed: Tensor, inverse: Tensor, through: Tensor | None, scale: float) -> Tensor:
    if _triton_op.runs_triton(normed):
        return _triton_op.kernels("residual").norm_backward(d_normed, normed, inverse, through, scale, CONFIG.norm)
    unit, d = normed.to(inverse.dtype) * (1 / scale), d_normed.to(inverse.dtype)
    d_x = scale * inverse.view(*normed.shape[:-1], 1) * (d - unit * (d * unit).mean(-1, keepdim=True))
    return (d_x if through is None else d_x + through.to(d_x.dtype)).to(normed.dtype)


_norm_backward_op = register_op(
    "norm_residual_backward(Tensor d_normed, Tensor normed, Tensor inverse, Tensor? through, float scale) -> Tensor",
    _norm_backward,
    fake=lambda d_normed, normed, *_: normed.new_empty(normed.shape),
    not_differentiable="double backward is not supported",
)


def _norm_fake(x: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=torch.promote_types(x.dtype, torch.float32))


_norm_op = register_op(
    "norm_residual(Tensor x, float scale, float eps) -> (Tensor, Tensor)",
    _norm,
    fake=_norm_fake,
    not_differentiable="pgolf_kernels.norm_residual differentiates",
)


class _NormThrough(torch.autograd.Function):
    """The op with its input returned, for others to read or, `overwritten`, to write on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, eps: float, overwritten: bool) -> tuple[Tensor, Tensor]:
        normed, inverse = _norm_op(x, scale, eps)
        ctx.save_for_backward(normed, inverse)
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        if overwritten:
            ctx.mark_dirty(x)
        return normed, x

    @staticmethod
    def backward(ctx: Any, d_normed: Tensor | None, through: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_normed is None:
            return through, None, None, None
        later = None if through is None else through.contiguous()
        return _norm_backward_op(d_normed.contiguous(), *ctx.saved_tensors, later, ctx.scale), None, None, None


# ---- public functions ------------------------------------------------------------------------------------------------


def combine_norm(
    streams: Sequence[Tensor],
    coefficients: Tensor,
    *,
    scale: float = 1.0,
    eps: float | None = None,
    with_total: bool = True,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(u, n, streams): the weighted sum of `streams`, `scale` times its RMSNorm, and the streams again.

    streams: 1 to 8 tensors [..., D] of one shape and dtype; coefficients [len(streams), D]. Read the returned streams
    in later uses: their gradients are then added within this function's backward kernel. `eps` is that of the norm
    (None: 1.19e-7, for float64 2.2e-16, as PyTorch takes it). Without `with_total` u is empty, which saves a pass.
    Raises ValueError for a wrong number or shape and TypeError for mixed dtypes and for integers. See the module's
    docstring for the formula.
    """
    _check(streams, coefficients)
    total, normed, *again = _through(streams, coefficients, scale, eps, with_total, True)
    return total, normed, tuple(again)


def combine(streams: Sequence[Tensor], coefficients: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(u, streams), where no norm follows. Arguments and the returned streams as in :func:`combine_norm`."""
    _check(streams, coefficients)
    total, _, *again = _through(streams, coefficients, 1.0, None, True, False)
    return total, tuple(again)


def norm_residual(
    x: Tensor, *, scale: float = 1.0, eps: float | None = None, overwritten: bool = False
) -> tuple[Tensor, Tensor]:
    """(n, x): `scale` times the RMSNorm of x [..., D], and x again for the residual connection around what reads n.

    `eps` as in :func:`combine_norm`.
    The gradient that comes back through the returned x is added within the norm's backward kernel. With `overwritten`
    the returned x may be written to: nobody but the caller may need x as it was, and it may not be a leaf that requires
    a gradient. Raises ValueError for a scale of zero and TypeError for integers.
    """
    _check_float("x", x)
    if scale == 0:
        raise ValueError("scale: got 0, wanted another number")
    return _NormThrough.apply(x.contiguous(), float(scale), _eps(x) if eps is None else float(eps), overwritten)


def _through(
    streams: Sequence[Tensor],
    coefficients: Tensor,
    scale: float,
    eps: float | None,
    with_total: bool,
    with_norm: bool,
) -> tuple[Tensor, ...]:
    inputs = [s.contiguous() for s in streams]
    eps = _eps(streams[0]) if eps is None else float(eps)
    total, normed, *again = _CombineNormThrough.apply(
        coefficients.contiguous(), float(scale), eps, with_total, with_norm, *inputs
    )
    # An autograd function lets all its outputs ask for gradients: a frozen stream's would be computed for nobody.
    return total, normed, *(new if old.requires_grad else old for old, new in zip(inputs, again, strict=True))


def _eps(x: Tensor) -> float:
    return torch.finfo(torch.float64).eps if x.dtype == torch.float64 else EPS


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: got {tensor.dtype}, wanted a floating-point dtype")


def _check(streams: Sequence[Tensor], coefficients: Tensor) -> None:
    if any(stream.dim() < 1 for stream in streams):
        raise ValueError("streams: got a scalar, wanted tensors [..., D]")
    if not 1 <= len(streams) <= MAX_STREAMS:
        raise ValueError(f"streams: got {len(streams)}, wanted 1 to {MAX_STREAMS}")
    _check_float("streams[0]", streams[0])
    _check_float("coefficients", coefficients)
    shape, dtype, device = streams[0].shape, streams[0].dtype, streams[0].device
    for position, stream in enumerate(streams):
        if stream.shape != shape:
            raise ValueError(
                f"streams[{position}]: got shape {tuple(stream.shape)}, wanted {tuple(shape)} as the first"
            )
        if stream.dtype != dtype or stream.device != device:
            raise TypeError(f"streams[{position}]: got {stream.dtype} on {stream.device}, wanted {dtype} on {device}")
    if coefficients.shape != (len(streams), shape[-1]) or coefficients.device != device:
        raise ValueError(
            f"coefficients: got shape {tuple(coefficients.shape)} on {coefficients.device}, "
            f"wanted {(len(streams), shape[-1])} on {device}"
        )
