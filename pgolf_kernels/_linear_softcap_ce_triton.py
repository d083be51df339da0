"""Triton kernels of linear_softcap_ce.py: the head's product without logits.

softcap / temperature <= 40 bounds exp(z), so that no maximum is needed and the row's sum factors out of its gradient:

    dloss[i] / da[i, j] = (G[i, j] - [j = y_i] S[i] slope[i, j]) / S[i],
    G = exp(z) slope,  slope = 1 - tanh(a / softcap)^2,  S[i] = sum_j exp(z[i, j])

(times 1 / temperature). `_powers_kernel` is the matrix product with that in its epilogue: it writes G in bfloat16 from
the float32 accumulators and the sums of exp(z) over each tile's columns. Training on Hopper has the same in CUDA where
its shapes allow it (csrc/linear_softcap_ce). `_finish_kernel` adds the sums up, computes the logits of targets (and
hints) as dot products of their own, writes losses and 1 / S, and mends G at each row's target. The logits are never
stored, nor rounded. `_order_kernel` sorts rows by document, for a head with adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels import _native
from pgolf_kernels._native_op import stream_of
from pgolf_kernels._triton_op import block_at_least, can_describe, cdiv, compute_capability, descriptor, grid_size, pdl
from pgolf_kernels._triton_tile import product_tile, strip, wait_for_previous

LOG2E = 1.4426950408889634
PLAIN, APPROXIMATE, EXACT = 0, 1, 2  # forms of the hyperbolic tangent; PLAIN is EXACT without instructions of the GPU
LARGEST_TOP = 40.0  # of softcap / temperature: beyond it a sum of exponentials could leave float32


@dataclass(frozen=True)
class PowersConfig:
    """Launch knobs: outputs a tile, depth a step, strips a tile's epilogue goes by, stages, warps, programs an SM."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    strips: int = 2
    stages: int = 3
    warps: int = 4
    programs: int = 2  # two programs an SM: one's epilogue runs under the other's products
    form: int = EXACT  # of the hyperbolic tangent


SCORE = PowersConfig()
# With the gradient, a tangent that is 5e-4 off: the loss moves by 1.5e-4 a token at most, G's rounding hides the rest.
TRAIN = PowersConfig(form=APPROXIMATE)
FINISH_ROWS = 4
MOST_COMPARED = 8192  # rows of `by_document`, which compares each with all: beyond, a radix sort has less to do
ORDER_ROWS, ORDER_OTHERS = 16, 256  # rows a program, and others it compares them with at a time


@triton.jit
def _special(x, NAME: tl.constexpr):
    return tl.inline_asm_elementwise(NAME + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _power_and_slope(a, rate, height, FORM: tl.constexpr):
    """(exp(z), slope) of accumulators."""
    if FORM == 1:
        t = _special(a * (0.34657359 * rate), "tanh.approx.f32")
        return tl.exp2(height * t), 1.0 - t * t
    else:
        u = 1.0 + tl.exp2(a * rate)
        r = 1.0 / u if FORM == 0 else _special(u, "rcp.approx.ftz.f32")
        return tl.exp2(height - 2.0 * height * r), 4.0 * (r - r * r)  # tanh = 1 - 2 r


@triton.jit(do_not_specialize=["rows"])
def _powers_kernel(
    x_desc, w_desc, g_desc, sums_ptr, targets_ptr, factor_ptr, at_target_ptr, rows, vocab, rate, height,
    DEPTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STRIPS: tl.constexpr,
    STORE: tl.constexpr, SUMS: tl.constexpr, RAGGED: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """SUMS: the sums of exp(z) over each tile's columns, and with STORE G. Otherwise the sums are known already:
    the logits' gradient itself, factor * G less at_target * slope at the target.

    rate = 2 log2(e) / softcap, height = top of z * log2(e).
    """
    tiles_n = tl.cdiv(vocab, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, BM) * tiles_n, tl.num_programs(0), flatten=True):
        m = (tile // tiles_n) * BM
        n = (tile % tiles_n) * BN
        acc = product_tile(x_desc, w_desc, m, n, DEPTH, BM, BN, BK)
        row = m + tl.arange(0, BM)
        total = tl.zeros((BM,), tl.float32)
        if not SUMS:
            target = tl.load(targets_ptr + row, mask=row < rows, other=-1).to(tl.int32)
            factor = tl.load(factor_ptr + row, mask=row < rows, other=0.0)
            at_target = tl.load(at_target_ptr + row, mask=row < rows, other=0.0)
        for i in tl.static_range(STRIPS):
            column = n + i * (BN // STRIPS)
            a = strip(acc, i, STRIPS, BM, BN)
            power, slope = _power_and_slope(a, rate, height, FORM)
            if SUMS:
                if RAGGED:
                    power = tl.where((column + tl.arange(0, BN // STRIPS) < vocab)[None, :], power, 0.0)
                total += tl.sum(power, axis=1)
                value = power * slope
            else:
                mine = (target - column)[:, None] == tl.arange(0, BN // STRIPS)[None, :]
                value = (power * factor[:, None] - tl.where(mine, at_target[:, None], 0.0)) * slope
            if STORE:
                g_desc.store([m, column], value.to(g_desc.dtype))
        if SUMS:
            tl.store(sums_ptr + row.to(tl.int64) * tiles_n + tile % tiles_n, total, mask=row < rows)


@triton.jit
def _capped(a, softcap, scale):
    """(z, slope) of a logit, exact."""
    r = 1.0 / (1.0 + tl.exp(2.0 * a / softcap))
    return softcap * scale * (1.0 - 2.0 * r), 4.0 * (r - r * r)


@triton.jit
def _picked_logits(x, w_ptr, index, valid, k, inside, w_stride):
    """x[i] . weight[index[i]] of a block of rows."""
    w = tl.load(w_ptr + index[:, None] * w_stride + k[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
    return tl.sum(x * w.to(tl.float32), axis=1)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def _finish_kernel(
    x_ptr, w_ptr, targets_ptr, hints_ptr, sums_ptr, losses_ptr, hint_ptr, inverse_ptr, g_ptr, scaled_ptr,
    rows, vocab, tiles, x_stride, w_stride, g_stride, ignore_index, softcap, scale,
    DEPTH: tl.constexpr, DEPTH_BLOCK: tl.constexpr, TILES_BLOCK: tl.constexpr, ROWS: tl.constexpr, STORE: tl.constexpr,
    SCALED: tl.constexpr, HINTS: tl.constexpr,
):  # fmt: skip
    """Losses, log p(hint), scale / S (0 for ignored rows, nan for targets out of range); mends G at the targets;
    with SCALED also x * scale / S."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    wide = row.to(tl.int64)
    k = tl.arange(0, DEPTH_BLOCK)
    inside = k < DEPTH
    x = tl.load(x_ptr + wide[:, None] * x_stride + k[None, :], mask=mask[:, None] & inside[None, :], other=0.0)
    x = x.to(tl.float32)
    tile = tl.arange(0, TILES_BLOCK)
    parts = tl.load(sums_ptr + wide[:, None] * tiles + tile[None, :], mask=mask[:, None] & (tile < tiles)[None, :],
                    other=0.0)  # fmt: skip
    total = tl.sum(parts, axis=1)
    lse = tl.log(total)
    target = tl.load(targets_ptr + row, mask=mask, other=0)
    counted = target != ignore_index
    valid = counted & (target >= 0) & (target < vocab)
    z, slope = _capped(_picked_logits(x, w_ptr, tl.where(valid, target, 0), mask & valid, k, inside, w_stride),
                       softcap, scale)  # fmt: skip
    loss = tl.where(counted, tl.where(valid, lse - z, float("nan")), 0.0)
    tl.store(losses_ptr + row, loss, mask=mask)
    if HINTS:
        hint = tl.load(hints_ptr + row, mask=mask, other=-1)
        known = (hint >= 0) & (hint < vocab)
        z_hint, _ = _capped(_picked_logits(x, w_ptr, tl.where(known, hint, 0), mask & known, k, inside, w_stride),
                            softcap, scale)  # fmt: skip
        missing = tl.where(hint < 0, float("-inf"), float("nan"))
        tl.store(hint_ptr + row, tl.where(known, z_hint - lse, missing), mask=mask)
    inverse = tl.where(counted, tl.where(valid, scale / total, float("nan")), 0.0)
    tl.store(inverse_ptr + row, inverse, mask=mask)
    if STORE:
        power = tl.minimum(tl.exp(z), total)
        mended = ((power - total) * slope).to(g_ptr.dtype.element_ty)
        tl.store(g_ptr + wide * g_stride + tl.where(valid, target, 0), mended, mask=mask & valid)
    if SCALED:
        scaled = (x * inverse[:, None]).to(scaled_ptr.dtype.element_ty)
        tl.store(scaled_ptr + wide[:, None] * DEPTH + k[None, :], scaled, mask=mask[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def _scale_rows_kernel(x_ptr, scale_ptr, out_ptr, rows, x_stride, out_stride,
                       DEPTH: tl.constexpr, DEPTH_BLOCK: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH_BLOCK)
    wide, mask = row.to(tl.int64)[:, None], (row < rows)[:, None] & (k < DEPTH)[None, :]
    x = tl.load(x_ptr + wide * x_stride + k[None, :], mask=mask).to(tl.float32)
    x *= tl.load(scale_ptr + row, mask=row < rows)[:, None]
    tl.store(out_ptr + wide * out_stride + k[None, :], x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keys(ids_ptr, item, rows, documents):
    """int32: a row's document, or `documents` for one that has none."""
    key = tl.load(ids_ptr + item, mask=item < rows, other=-1)
    return tl.where((key >= 0) & (key < documents), key, documents).to(tl.int32)


@triton.jit(do_not_specialize=["rows", "documents"])
def _order_kernel(ids_ptr, order_ptr, bounds_ptr, rows, documents, ROWS: tl.constexpr, OTHERS: tl.constexpr,
                  PDL: tl.constexpr):  # fmt: skip
    """A row's place is the number of rows before it. Items behind the rows are bounds: b counts the rows below b."""
    wait_for_previous(PDL)
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = item < rows
    key = tl.where(is_row, _keys(ids_ptr, item, rows, documents), item - rows)
    place = tl.zeros((ROWS,), tl.int32)
    for first in range(0, rows, OTHERS):
        other = first + tl.arange(0, OTHERS)
        others = _keys(ids_ptr, other, rows, documents)
        equal = (others[None, :] == key[:, None]) & (other[None, :] < item[:, None]) & is_row[:, None]
        before = ((others[None, :] < key[:, None]) | equal) & (other < rows)[None, :]
        place += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order_ptr + place, item.to(tl.int64), mask=is_row)
    tl.store(bounds_ptr + item - rows, place, mask=(item >= rows) & (item <= rows + documents))


# ---- launches --------------------------------------------------------------------------------------------------------


def takes(hidden: Tensor, weight: Tensor, softcap: float, temperature: float) -> bool:
    """Whether the kernels take this head: bfloat16 on Hopper or later (float32 through the interpreter), bounded z."""
    if not 0.0 < softcap <= LARGEST_TOP * temperature or not len(hidden):
        return False
    fits = can_describe(hidden) and can_describe(weight) and weight.shape[0] * hidden.element_size() % 16 == 0
    if not hidden.is_cuda:
        return fits and hidden.dtype == torch.float32
    return fits and hidden.dtype == torch.bfloat16 and compute_capability(hidden.device.index) >= 90


def _runs_native(hidden: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Whether the CUDA kernel takes G [N, V] and its sums, of what :func:`takes` has taken."""
    return (
        hidden.is_cuda
        and hidden.shape[1] == 512
        and weight.shape[0] % 128 == 0
        and hidden.is_contiguous()
        and weight.is_contiguous()
        and out.is_contiguous()
        and hasattr(_native, "linear_softcap_ce_powers_cuda")
        and compute_capability(hidden.device.index) == 90
    )


def _launch_powers(
    hidden: Tensor, weight: Tensor, out: Tensor | None, sums: Tensor | None, targets: Tensor | None,
    factor: Tensor | None, at_target: Tensor | None, softcap: float, temperature: float,
) -> None:  # fmt: skip
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    config = SCORE if out is None else TRAIN
    height = softcap / temperature * LOG2E
    if out is not None and sums is not None and _runs_native(hidden, weight, out):
        addresses = (t.data_ptr() for t in (hidden, weight, out, sums))
        _native.linear_softcap_ce_powers_cuda(*addresses, rows, vocab, 1.0 / softcap, height, *stream_of(hidden))
        return
    x_desc = descriptor(hidden, (config.rows, config.depth))
    g_desc = x_desc if out is None else descriptor(out, (config.rows, config.columns // config.strips))
    tiles = cdiv(rows, config.rows) * cdiv(vocab, config.columns)
    form = PLAIN if hidden.device.type == "cpu" else config.form  # the interpreter knows no instructions
    _powers_kernel[(min(grid_size(hidden) * config.programs, tiles),)](
        x_desc, descriptor(weight, (config.columns, config.depth)), g_desc, sums, targets, factor, at_target, rows,
        vocab, 2.0 * LOG2E / softcap, height, DEPTH=depth, BM=config.rows, BN=config.columns,
        BK=config.depth, STRIPS=config.strips, STORE=out is not None, SUMS=sums is not None,
        RAGGED=vocab % config.columns != 0, FORM=form, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, hints: Tensor | None, softcap: float, temperature: float,
    ignore_index: int, out: Tensor, hint_log_probs: Tensor, inverse: Tensor, powers: Tensor | None = None,
    scaled: Tensor | None = None,
) -> None:  # fmt: skip
    """Losses [N] into `out`, log p(hint) into `hint_log_probs`, 1 / (S temperature) into `inverse`; with `powers`
    [N, V] also G, which times `inverse` is the gradient of the logits; with `scaled` [N, D] also hidden * inverse."""
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    tiles = cdiv(vocab, (SCORE if powers is None else TRAIN).columns)
    with torch.cuda.device_of(hidden):
        sums = hidden.new_empty((rows, tiles), dtype=torch.float32)
        _launch_powers(hidden, weight, powers, sums, None, None, None, softcap, temperature)
        _finish_kernel[(cdiv(rows, FINISH_ROWS),)](
            hidden, weight, targets, hints, sums, out, hint_log_probs, inverse, powers, scaled, rows, vocab, tiles,
            hidden.stride(0), weight.stride(0), vocab, ignore_index, softcap, 1.0 / temperature,
            DEPTH=depth, DEPTH_BLOCK=block_at_least(depth, 16, 1 << 20), TILES_BLOCK=block_at_least(tiles, 16, 1 << 20),
            ROWS=FINISH_ROWS, STORE=powers is not None, SCALED=scaled is not None, HINTS=hints is not None,
            num_warps=1,
        )  # fmt: skip


def gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, temperature: float, factor: Tensor,
    at_target: Tensor, out: Tensor,
) -> None:  # fmt: skip
    """The logits' gradient [N, V] of rows whose sums are known: factor = upstream * inverse, at_target = upstream /
    temperature."""
    with torch.cuda.device_of(hidden):
        _launch_powers(hidden, weight, out, None, targets, factor, at_target, softcap, temperature)


def by_document(doc_ids: Tensor, documents: int) -> tuple[Tensor, Tensor]:
    """As `by_document` of the head's module, for up to MOST_COMPARED rows, in one launch."""
    # Addresses also where the launch is left out because others are compiled first.
    order = torch.zeros_like(doc_ids)
    bounds = torch.zeros(documents + 1, dtype=torch.int32, device=doc_ids.device)
    rows = len(doc_ids)
    with torch.cuda.device_of(doc_ids):
        _order_kernel[(cdiv(rows + documents + 1, ORDER_ROWS),)](
            doc_ids, order, bounds, rows, documents, ROWS=ORDER_ROWS, OTHERS=ORDER_OTHERS, num_warps=4, **pdl(doc_ids)
        )
    return order, bounds


def scale_rows(rows: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out = rows * scale[:, None], scale [N] contiguous; `out` may be `rows`."""
    count, depth = rows.shape
    block = block_at_least(depth, 16, 1 << 16)
    per_program = max(1, 4096 // block)
    if rows.numel():
        with torch.cuda.device_of(rows):
            _scale_rows_kernel[(cdiv(count, per_program),)](
                rows, scale, out, count, rows.stride(0), out.stride(0), DEPTH=depth, DEPTH_BLOCK=block,
                ROWS=per_program, num_warps=4,
            )  # fmt: skip
    return out
