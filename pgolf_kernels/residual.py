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

Streams in fp32, bf16 or fp16 (fp64 on CPU), all alike; coefficients fp32 (fp64 beside fp64 streams); sums in fp32.
Where coefficients are learnt the streams are kept for the backward, which reads them for dc anyway; u and r are
computed again. Where none are, n and r are kept instead: one tensor to read in place of all streams, which a product
behind it mostly keeps as well. Given up: a kernel per form of sum, which could fold coefficients known to be one, and
would have to be written nine times.

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
    total = _total(streams, coefficients)
    normed = total * (scale * _inverse_rms(total, eps))
    return total.to(streams[0].dtype), normed.to(streams[0].dtype)


def _total(streams: Sequence[Tensor], coefficients: Tensor | None) -> Tensor:
    """u unrounded. Without coefficients there is one stream, which is u."""
    wide = torch.promote_types(streams[0].dtype, torch.float32)
    inputs = [s.to(wide) for s in streams]
    return inputs[0] if coefficients is None else _weighted_sum(inputs, coefficients.to(wide))


def _inverse_rms(total: Tensor, eps: float) -> Tensor:
    return (total.square().mean(-1, keepdim=True) + eps).rsqrt()


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

    Measured on an H200 at 98,304 x 512 in bf16. Backward with learnt coefficients: there is an accumulator as wide as a
    tile for each stream. Tiles of two tokens are fastest up to three streams (188 against 262 us for two), of one
    beyond (328 against 430 for four). All programs must fit at a time, or the last ones run alone (eight streams: 6
    take 523 us, 8 take 680). With frozen ones there are none: three streams, of which two want a gradient, take 171 us
    at 131,072 rows, with other shapes 172 to 191. Tiles of four tokens spill registers with five streams.
    """

    norm: Launch = Launch(4, 2, 16)
    forwards: tuple[tuple[int, Launch], ...] = ((3, Launch(2, 2, 16)), (MAX_STREAMS, Launch(4, 2, 16)))
    backwards: tuple[tuple[int, Launch], ...] = (
        (2, Launch(2, 2, 8)),
        (3, Launch(2, 2, 6)),
        (5, Launch(1, 4, 8)),
        (MAX_STREAMS, Launch(1, 4, 6)),
    )
    frozen_backwards: tuple[tuple[int, Launch], ...] = ((3, Launch(4, 2, 16)), (MAX_STREAMS, Launch(2, 2, 16)))

    def forward(self, streams: int) -> Launch:
        return next(launch for most, launch in self.forwards if streams <= most)

    def backward(self, streams: int) -> Launch:
        return next(launch for most, launch in self.backwards if streams <= most)

    def frozen_backward(self, streams: int) -> Launch:
        return next(launch for most, launch in self.frozen_backwards if streams <= most)


CONFIG = ResidualConfig()


# ---- ops -------------------------------------------------------------------------------------------------------------


def _forward(
    streams: list[Tensor],
    coefficients: Tensor | None,
    scale: float,
    eps: float,
    with_total: bool,
    with_norm: bool,
    with_inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(u, n, 1 / rms [rows]), empty where unwanted; 1 / rms comes beside n alone. Without coefficients there is one
    stream, which is u and is not returned."""
    first = streams[0]
    if _triton_op.runs_triton(first):
        launch = CONFIG.norm if coefficients is None else CONFIG.forward(len(streams))
        forward = _triton_op.kernels("residual").forward
        return forward(streams, coefficients, scale, eps, with_total, with_norm, with_inverse, launch)
    total = _total(streams, coefficients)
    normed = inverse = total.new_empty(0)
    if with_norm:
        inverse = _inverse_rms(total, eps)
        normed = total * (scale * inverse)
    return (
        total.to(first.dtype) if with_total else first.new_empty(0),
        normed.to(first.dtype),
        inverse.flatten() if with_inverse else inverse.new_empty(0),
    )


def _forward_fake(streams: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    first = streams[0]
    shapes = first.shape, first.shape, (first.shape[:-1].numel(),)
    dtypes = first.dtype, first.dtype, torch.promote_types(first.dtype, torch.float32)
    return tuple(
        first.new_empty(shape if asked else (0,), dtype=dtype)
        for asked, shape, dtype in zip(rest[-3:], shapes, dtypes, strict=True)
    )


_op = register_op(
    "combine_norm(Tensor[] streams, Tensor? coefficients, float scale, float eps, bool with_total, bool with_norm,"
    " bool with_inverse) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    not_differentiable="pgolf_kernels.combine_norm, combine and norm_residual differentiate",
)


def wanted_like(like: Tensor, wanted: list[bool]) -> list[Tensor]:
    """A tensor for each gradient, empty where it is not wanted."""
    return [like.new_empty(like.shape if want else 0) for want in wanted]


def _spread(
    g: Tensor, weights: Tensor | None, through: list[Tensor | None], wanted: list[bool], dtype: torch.dtype
) -> list[Tensor]:
    """The streams' gradients from the sum's; without weights that of the one stream."""
    found = []
    for c, t, want in zip([None] if weights is None else weights, through, wanted, strict=True):
        if not want:
            found.append(g.new_empty(0, dtype=dtype))
        elif t is None:
            found.append((g if c is None else c * g).to(dtype))
        else:
            found.append((g + t if c is None else torch.addcmul(t.to(g.dtype), c, g)).to(dtype))
    return found


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
    """[gradient of each stream..., of the coefficients]; a stream's that is not `wanted` is empty."""
    first = streams[0]
    if _triton_op.runs_triton(first):
        launch = CONFIG.backward(len(streams))
        backward = _triton_op.kernels("residual").backward
        return backward(streams, coefficients, d_total, d_normed, through, scale, eps, wanted, launch)
    wide = torch.promote_types(first.dtype, torch.float32)
    inputs = [s.to(wide) for s in streams]
    weights = coefficients.to(wide)
    if d_normed is None:
        assert d_total is not None, "no gradient at all never comes here"
        g = d_total.to(wide)
    else:
        total, d = _weighted_sum(inputs, weights), d_normed.to(wide)
        r = _inverse_rms(total, eps)
        along = r.square() * (d * total).mean(-1, keepdim=True)
        g = total.mul_(-along).add_(d).mul_(scale * r)
        if d_total is not None:
            g.add_(d_total)
    d_coefficients = torch.stack([(g * s).flatten(0, -2).sum(0) for s in inputs]).to(coefficients.dtype)
    return [*_spread(g, weights, through, wanted, first.dtype), d_coefficients]


_backward_op = register_op(
    "combine_norm_backward(Tensor[] streams, Tensor coefficients, Tensor? d_total, Tensor? d_normed,"
    " Tensor?[] through, float scale, float eps, bool[] wanted) -> Tensor[]",
    _backward,
    fake=lambda streams, coefficients, *rest: [
        *wanted_like(streams[0], rest[-1]),
        coefficients.new_empty(coefficients.shape),
    ],
    not_differentiable="double backward is not supported",
)


def _frozen_backward(
    d_total: Tensor | None,
    d_normed: Tensor | None,
    normed: Tensor,
    inverse: Tensor,
    coefficients: Tensor | None,
    through: list[Tensor | None],
    scale: float,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradient of each stream, from n and 1 / rms in place of the streams; one that is not `wanted` is empty."""
    first = d_total if d_normed is None else d_normed
    assert first is not None, "no gradient at all never comes here"
    if _triton_op.runs_triton(first):
        launch = CONFIG.frozen_backward(len(wanted))
        backward = _triton_op.kernels("residual").frozen_backward
        return backward(d_total, d_normed, normed, inverse, coefficients, through, scale, wanted, launch)
    wide = inverse.dtype
    g = first.to(wide)
    if d_normed is not None:
        unit = normed.to(wide) * (1 / scale)
        g = scale * inverse.view(*normed.shape[:-1], 1) * (g - unit * (g * unit).mean(-1, keepdim=True))
        if d_total is not None:
            g = g + d_total
    weights = None if coefficients is None else coefficients.to(wide)
    return _spread(g, weights, through, wanted, first.dtype)


_frozen_backward_op = register_op(
    "combine_norm_frozen_backward(Tensor? d_total, Tensor? d_normed, Tensor normed, Tensor inverse,"
    " Tensor? coefficients, Tensor?[] through, float scale, bool[] wanted) -> Tensor[]",
    _frozen_backward,
    fake=lambda d_total, d_normed, *rest: wanted_like(d_total if d_normed is None else d_normed, rest[-1]),
    not_differentiable="double backward is not supported",
)


class _Through(torch.autograd.Function):
    """The op with its streams returned as they came, for others to read or, `overwritten`, to write on: an op's schema
    cannot say that, an autograd function can."""

    @staticmethod
    def forward(
        ctx: Any,
        coefficients: Tensor | None,
        scale: float,
        eps: float,
        with_total: bool,
        with_norm: bool,
        overwritten: bool,
        *streams: Tensor,
    ) -> tuple[Tensor, ...]:
        frozen = not ctx.needs_input_grad[0]
        total, normed, inverse = _op(
            list(streams), coefficients, scale, eps, with_total, with_norm, frozen and with_norm
        )
        ctx.save_for_backward(coefficients, *((normed, inverse) if frozen else streams))
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.eps, ctx.with_total, ctx.with_norm, ctx.frozen = scale, eps, with_total, with_norm, frozen
        if overwritten:
            ctx.mark_dirty(*streams)
        return total, normed, *streams

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, *through: Tensor | None) -> tuple[Any, ...]:
        # A compiled graph sends gradients of empty results, too.
        d_total, d_normed = d_total if ctx.with_total else None, d_normed if ctx.with_norm else None
        if d_total is None and d_normed is None:
            return *[None] * 6, *through
        coefficients, *kept = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[6:])
        d_total, d_normed, *later = (None if t is None else t.contiguous() for t in (d_total, d_normed, *through))
        d_coefficients = None
        if ctx.frozen:
            found = _frozen_backward_op(d_total, d_normed, *kept, coefficients, later, ctx.scale, wanted)
        else:
            *found, d_coefficients = _backward_op(
                kept, coefficients, d_total, d_normed, later, ctx.scale, ctx.eps, wanted
            )
        return d_coefficients, *[None] * 5, *(d if want else None for d, want in zip(found, wanted, strict=True))


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
    Before the backward nobody may write over the streams where coefficients are learnt, over n where they are not.
    Raises ValueError for a wrong number or shape and for a scale of zero, TypeError for mixed dtypes and for integers.
    See the module's docstring for the formula.
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
    a gradient. n may not be written over before the backward. Raises ValueError for a scale of zero and for a shape
    without a D of at least 1, TypeError for integers.
    """
    _check_float("x", x)
    _check_width("x", x)
    _, normed, same = _through([x], None, scale, eps, False, True, overwritten)
    return normed, same


def _through(
    streams: Sequence[Tensor],
    coefficients: Tensor | None,
    scale: float,
    eps: float | None,
    with_total: bool,
    with_norm: bool,
    overwritten: bool = False,
) -> tuple[Tensor, ...]:
    if scale == 0:
        raise ValueError("scale: got 0, wanted another number")
    inputs = [s.contiguous() for s in streams]
    eps = _eps(streams[0]) if eps is None else float(eps)
    weights = None if coefficients is None else coefficients.contiguous()
    total, normed, *again = _Through.apply(weights, float(scale), eps, with_total, with_norm, overwritten, *inputs)
    # An autograd function lets all its outputs ask for gradients: a frozen stream's would be computed for nobody.
    return total, normed, *(new if old.requires_grad else old for old, new in zip(inputs, again, strict=True))


def _eps(x: Tensor) -> float:
    return torch.finfo(torch.float64).eps if x.dtype == torch.float64 else EPS


def _check_float(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name}: got {tensor.dtype}, wanted a floating-point dtype")


def _check_width(name: str, tensor: Tensor) -> None:
    if not tensor.shape or not tensor.shape[-1]:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted [..., D] with D at least 1")


def _check(streams: Sequence[Tensor], coefficients: Tensor) -> None:
    if not 1 <= len(streams) <= MAX_STREAMS:
        raise ValueError(f"streams: got {len(streams)}, wanted 1 to {MAX_STREAMS}")
    _check_width("streams[0]", streams[0])
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
