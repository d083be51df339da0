"""GPTQ: integer codes for a weight matrix that lose little under the inputs it will see.

Minimises tr((W - Q) H (W - Q)^T) greedily, column by column, where Q = scale * code and H = sum x x^T is the Hessian
of the matrix's inputs (Frantar et al., arXiv:2210.17323; the recipes are those of openai/parameter-golf pull requests
1530 and 1499). With columns in the order in which they are quantised, and the damped H = M M^T with M upper triangular,

    x_j = w_j + sum_{k before j} d_k M_kj / M_jj,    d_k = w_k - scale * q_k,    q_j = clamp(round(x_j / scale), -R, R)

which is Babai's nearest plane and gives GPTQ's codes without any inverse: the upper triangular factor is the Cholesky
factor of the matrix with its columns in reverse. Rounding is half to even, R = 2^(bits - 1) - 1.

Shapes: weight [R, C] in fp32, bf16, fp16 (computed in fp32) or, on CPU, fp64; hessian [C, C]; codes int8 [R, C]; scales
fp16 [R]. Given up: grids that are not symmetric, groups of columns with their own scales.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from pgolf_kernels import _native
from pgolf_kernels._native_op import (
    has_native_cuda,
    num_threads,
    reference_on_cuda,
    register_op,
    runs_native,
    stream_of,
)

ScaleRule = Literal["sigma", "absmax", "search"]
RoundScales = Literal["before", "after"]
ColumnOrder = Literal["descending", "ascending", "natural"]
DeadColumns = Literal["zero", "keep"]
ErrorFeedback = Literal["cholesky", "inverse"]
OnSingular = Literal["raise", "diagonal"]

_SEARCH_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
_SMALLEST_HALF, _LARGEST_HALF = 2.0**-24, 65504.0
# A clip range below this share of a row's largest weight cannot hold the row: it has no spread (a constant row).
_LEAST_RANGE = 2.0**-10


# --- reference -------------------------------------------------------------------------------------------------------


def gptq_factor_reference(
    hessian: torch.Tensor, diagonal: torch.Tensor, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lower Cholesky factor [B, C, C], status int32 [B]) of hessian[order][:, order] with the diagonal replaced."""
    batch = torch.arange(len(hessian), device=hessian.device)[:, None, None]
    order = order.long()
    permuted = hessian[batch, order[:, :, None], order[:, None, :]]
    permuted.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    factor, status = torch.linalg.cholesky_ex(permuted)
    return factor.contiguous(), status


def gptq_columns_reference(
    weights: Sequence[torch.Tensor],
    factors: Sequence[torch.Tensor],
    orders: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    status: Sequence[torch.Tensor],
    max_codes: Sequence[int],
    residual: bool,
    block_size: int,
) -> list[torch.Tensor]:
    """The column pass in plain PyTorch; the arguments are those of the op `pgolf::gptq_columns`."""
    results = []
    for weight, factor, order, scale, failed, limit in zip(
        weights, factors, orders, scales, status, max_codes, strict=True
    ):
        gain = factor.diagonal().reciprocal()
        factor = factor * (gain[:, None] if residual else gain[None, :])
        factor = torch.where(failed != 0, torch.zeros_like(factor), factor)
        column = torch.where(order < 0, -1 - order, order).long()
        original = torch.where(order < 0, torch.zeros_like(weight[:, :1]), weight[:, column])
        error = torch.zeros_like(original)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for j in reversed(range(weight.shape[1])):
            corrected = original[:, j] + error[:, j + 1 :] @ factor[j + 1 :, j]
            code = (corrected / scale).clamp(-limit, limit).round()
            error[:, j] = code * scale - corrected if residual else original[:, j] - code * scale
            codes[:, column[j]] = code.to(torch.int8)
        results.append(codes)
    return results


# --- config ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GptqRecipe:
    """The settings of :func:`gptq_quantize`; the defaults are the matrices of pull requests 1413, 1514, 1530.

    `GptqRecipe.pr1499(bits)` gives the other published recipe.
    """

    bits: int = 6
    clip_sigmas: float = 12.85
    scale_rule: ScaleRule = "sigma"
    scales: torch.Tensor | None = None
    round_scales: RoundScales = "before"
    scale_floor: float = 1e-10
    block_size: int = 128
    damping: float = 0.01
    column_order: ColumnOrder = "descending"
    dead_columns: DeadColumns = "zero"
    error_feedback: ErrorFeedback = "cholesky"
    on_singular: OnSingular = "raise"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits: got {self.bits!r}, wanted an integer from 2 to 8")
        for name, least in (("clip_sigmas", 0.0), ("scale_floor", 0.0), ("damping", 0.0)):
            value = getattr(self, name)
            if not least <= value < float("inf"):
                raise ValueError(f"{name}: got {value!r}, wanted a finite number that is not negative")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size: got {self.block_size!r}, wanted a positive integer")
        for name, choices in (
            ("scale_rule", ScaleRule),
            ("round_scales", RoundScales),
            ("column_order", ColumnOrder),
            ("dead_columns", DeadColumns),
            ("error_feedback", ErrorFeedback),
            ("on_singular", OnSingular),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted one of {get_args(choices)}")

    @property
    def max_code(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @classmethod
    def pr1499(cls, bits: int = 6, clip_sigmas: float = 12.85) -> GptqRecipe:
        """The recipe of pull request 1499: feedback by the full inverse, ascending order, scales >= 1/R."""
        return cls(
            bits=bits,
            clip_sigmas=clip_sigmas,
            round_scales="after",
            scale_floor=1.0 / (2 ** (bits - 1) - 1),
            column_order="ascending",
            dead_columns="keep",
            error_feedback="inverse",
            on_singular="diagonal",
        )


# --- op --------------------------------------------------------------------------------------------------------------


def _check_factor(hessian, diagonal, order) -> None:
    if hessian.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"hessian: got {hessian.dtype}, wanted torch.float32 or torch.float64")
    if hessian.ndim != 3 or hessian.shape[1] != hessian.shape[2]:
        raise ValueError(f"hessian: got shape {tuple(hessian.shape)}, wanted [batch, size, size]")
    for name, tensor, dtype in (("diagonal", diagonal, hessian.dtype), ("order", order, torch.int32)):
        if tensor.shape != hessian.shape[:2] or tensor.dtype != dtype or tensor.device != hessian.device:
            raise ValueError(
                f"{name}: got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"wanted {dtype} {tuple(hessian.shape[:2])} on {hessian.device}"
            )


def _check_permutation(name: str, order: torch.Tensor) -> None:
    if not torch.equal(order.sort().values, torch.arange(order.numel(), dtype=order.dtype)):
        raise IndexError(f"{name}: got {order.tolist()}, wanted a permutation of 0 to {order.numel() - 1}")


def _factor_cpu(hessian, diagonal, order):
    _check_factor(hessian, diagonal, order)
    if not runs_native(hessian):
        return gptq_factor_reference(hessian, diagonal, order)
    factor = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    status = torch.zeros(len(hessian), dtype=torch.int32)
    for i in range(len(hessian)):
        _check_permutation(f"order[{i}]", order[i])
        inputs = [hessian[i].contiguous(), diagonal[i].contiguous(), order[i].contiguous()]
        status[i] = _native.gptq_factor_cpu(
            *(tensor.data_ptr() for tensor in inputs),
            factor[i].data_ptr(),
            hessian.shape[1],
            hessian.dtype == torch.float64,
            num_threads(),
        )
    return factor, status


def _factor_cuda(hessian, diagonal, order):
    _check_factor(hessian, diagonal, order)
    return gptq_factor_reference(hessian, diagonal, order)


def _factor_fake(hessian, diagonal, order):
    _check_factor(hessian, diagonal, order)
    factor = torch.empty_like(hessian, memory_format=torch.contiguous_format)
    return factor, hessian.new_empty(hessian.shape[:1], dtype=torch.int32)


gptq_factor = register_op(
    "gptq_factor(Tensor hessian, Tensor diagonal, Tensor order) -> (Tensor, Tensor)",
    _factor_cpu,
    cuda=_factor_cuda,
    fake=_factor_fake,
    not_differentiable="not differentiable",
)


def _check_columns(weights, factors, orders, scales, status, max_codes, residual, block_size) -> None:
    for name, items in (
        ("factors", factors),
        ("orders", orders),
        ("scales", scales),
        ("status", status),
        ("max_codes", max_codes),
    ):
        if len(items) != len(weights):
            raise ValueError(f"{name}: got {len(items)} entries, wanted {len(weights)}, one for each of weights")
    for i, weight in enumerate(weights):
        if weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weights[{i}]: got {weight.dtype}, wanted torch.float32 or torch.float64")
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"weights[{i}]: got {weight.dtype}, wanted {weights[0].dtype}, that of weights[0]")
        if weight.ndim != 2:
            raise ValueError(f"weights[{i}]: got shape {tuple(weight.shape)}, wanted [rows, columns]")
        rows, cols = weight.shape
        for name, tensor, shape, dtype in (
            ("factors", factors[i], (cols, cols), weight.dtype),
            ("orders", orders[i], (cols,), torch.int32),
            ("scales", scales[i], (rows,), weight.dtype),
            ("status", status[i], (), torch.int32),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}[{i}]: got shape {tuple(tensor.shape)}, wanted {shape}")
            if tensor.dtype != dtype:
                raise TypeError(f"{name}[{i}]: got {tensor.dtype}, wanted {dtype}")
            if tensor.device != weights[0].device:
                raise ValueError(
                    f"{name}[{i}]: got device {tensor.device}, wanted {weights[0].device}, that of weights[0]"
                )
        if not 1 <= max_codes[i] <= 127:
            raise ValueError(f"max_codes[{i}]: got {max_codes[i]}, wanted 1 to 127")
    if block_size < 1:
        raise ValueError(f"block_size: got {block_size}, wanted a positive integer")


def _column_table(weights, factors, orders, scales, status, max_codes):
    """(table of the native call, codes, what must outlive the call)."""
    inputs = [
        [tensor.contiguous() for tensor in row] for row in zip(weights, factors, orders, scales, status, strict=True)
    ]
    codes = [torch.empty(weight.shape, dtype=torch.int8, device=weight.device) for weight in weights]
    rows = [
        [*(tensor.data_ptr() for tensor in row), code.data_ptr(), *code.shape, limit]
        for row, code, limit in zip(inputs, codes, max_codes, strict=True)
        if code.numel() > 0
    ]
    return torch.tensor(rows, dtype=torch.int64), codes, inputs


def _columns_cpu(weights, factors, orders, scales, status, max_codes, residual, block_size):
    _check_columns(weights, factors, orders, scales, status, max_codes, residual, block_size)
    for i, order in enumerate(orders):
        _check_permutation(f"orders[{i}]", torch.where(order < 0, -1 - order, order))
    if len(weights) > 0 and not runs_native(weights[0]):
        return gptq_columns_reference(weights, factors, orders, scales, status, max_codes, residual, block_size)
    table, codes, inputs = _column_table(weights, factors, orders, scales, status, max_codes)
    double = len(weights) > 0 and weights[0].dtype == torch.float64
    _native.gptq_columns_cpu(table.data_ptr(), len(table), double, residual, block_size, num_threads())
    del inputs
    return codes


def _columns_cuda(weights, factors, orders, scales, status, max_codes, residual, block_size):
    _check_columns(weights, factors, orders, scales, status, max_codes, residual, block_size)
    if weights[0].dtype != torch.float32:
        raise TypeError(f"weights[0]: got {weights[0].dtype}, wanted torch.float32 on CUDA")
    table, codes, inputs = _column_table(weights, factors, orders, scales, status, max_codes)
    size = sum(_native.gptq_scratch(*code.shape) for code in codes)
    scratch = torch.empty(size, dtype=torch.float32, device=weights[0].device)
    _native.gptq_columns_cuda(table.data_ptr(), len(table), residual, scratch.data_ptr(), *stream_of(weights[0]))
    del inputs
    return codes


def _columns_fake(weights, factors, orders, scales, status, max_codes, residual, block_size):
    _check_columns(weights, factors, orders, scales, status, max_codes, residual, block_size)
    return [torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format) for weight in weights]


gptq_columns = register_op(
    "gptq_columns(Tensor[] weights, Tensor[] factors, Tensor[] orders, Tensor[] scales, Tensor[] status, "
    "int[] max_codes, bool residual, int block_size) -> Tensor[]",
    _columns_cpu,
    cuda=_columns_cuda if has_native_cuda() else reference_on_cuda("gptq_columns", gptq_columns_reference),
    fake=_columns_fake,
    not_differentiable="not differentiable: rounding has no useful derivative",
)


# --- public ----------------------------------------------------------------------------------------------------------


def gptq_quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int = 6,
    clip_sigmas: float = 12.85,
    scale_rule: ScaleRule = "sigma",
    scales: torch.Tensor | None = None,
    round_scales: RoundScales = "before",
    scale_floor: float = 1e-10,
    block_size: int = 128,
    damping: float = 0.01,
    column_order: ColumnOrder = "descending",
    dead_columns: DeadColumns = "zero",
    error_feedback: ErrorFeedback = "cholesky",
    on_singular: OnSingular = "raise",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [R, C] and scales fp16 [R] of one matrix.

    weight: [R, C]; hessian: [C, C], symmetric, sum or mean of x x^T over the inputs x of the matrix.
    bits: 2 to 8; codes lie in -(2^(bits-1) - 1) .. 2^(bits-1) - 1 =: -R .. R.
    scale_rule: "sigma": clip_sigmas * (unbiased deviation of the row) / R; "absmax": largest magnitude / R; "search":
        quantile / R for that quantile of the row's magnitudes (of .999, .9995, .9999, .99999 and 1) which has the least
        squared error of plain rounding.
    scales: [R] given scales; the rule is then not used.
    round_scales: "before" rounds the scales to fp16 before the loop (1530), "after" quantises with unrounded ones
        (1499).
    scale_floor: least scale before the rounding. Scales never round to zero, and a row whose clip range cannot hold it
        (a constant row under "sigma") gets the "absmax" scale.
    block_size: columns per lazy update on CPU; it changes speed and rounding only. The CUDA kernel has its own.
    damping: this share of the mean of H's diagonal is added to the diagonal.
    column_order: by the damped diagonal, ties as torch.argsort leaves them (the published order).
    dead_columns: "zero": a column whose diagonal entry is 0 gets code 0; "keep": it is quantised like any other.
    error_feedback: "cholesky" is GPTQ; "inverse" spreads errors by the rows of H^-1 itself, as 1499 does (more loss).
    on_singular: where the damped H is not positive definite, "raise" or "diagonal": round to nearest, without feedback.

    Raises ValueError or TypeError naming the argument; ValueError where the Hessian is not positive definite (and
    `on_singular="raise"`) or weights, Hessian or scales are not finite.
    """
    recipe = GptqRecipe(
        bits,
        clip_sigmas,
        scale_rule,
        scales,
        round_scales,
        scale_floor,
        block_size,
        damping,
        column_order,
        dead_columns,
        error_feedback,
        on_singular,
    )
    return gptq_quantize_many([weight], [hessian], recipe)[0]


def gptq_quantize_many(
    weights: Sequence[torch.Tensor],
    hessians: Sequence[torch.Tensor],
    recipes: GptqRecipe | Mapping[str, Any] | Sequence[GptqRecipe | Mapping[str, Any]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """:func:`gptq_quantize` for a whole model: [(codes, scales), ...] in the order of `weights`.

    weights: matrices [R, C] of any sizes, hessians: a [C, C] for each; all on one device, in fp32, bf16 or fp16 (CPU:
    also fp64). recipes: one for all matrices, or one each; a GptqRecipe or a mapping of its fields. Matrices that are
    given the same Hessian tensor (query, key and value do) share one factorisation. On CUDA, Hessians of one size are
    factorised in one batch, all columns run in one kernel, and the host waits once, to read the status.

    Raises what :func:`gptq_quantize` raises, with the index of the matrix, and ValueError for lengths that differ.
    """
    weights, hessians = list(weights), list(hessians)
    if isinstance(recipes, GptqRecipe | Mapping):
        recipes = [recipes] * len(weights)
    settings = [recipe if isinstance(recipe, GptqRecipe) else GptqRecipe(**recipe) for recipe in recipes]
    for name, items in (("hessians", hessians), ("recipes", settings)):
        if len(items) != len(weights):
            raise ValueError(f"{name}: got {len(items)} entries, wanted {len(weights)}, one for each of weights")
    for i in range(len(weights)):
        _check_matrix(i, weights[i], hessians[i], settings[i], weights[0])
    if not weights:
        return []
    with torch.no_grad():
        return _quantize(weights, hessians, settings)


def _check_matrix(i: int, weight: torch.Tensor, hessian: torch.Tensor, recipe: GptqRecipe, first: torch.Tensor) -> None:
    allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for name, tensor in (("weights", weight), ("hessians", hessian)):
        if tensor.dtype not in allowed:
            raise TypeError(f"{name}[{i}]: got {tensor.dtype}, wanted one of {allowed}")
        if tensor.device != first.device:
            raise ValueError(f"{name}[{i}]: got device {tensor.device}, wanted {first.device}, that of weights[0]")
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(f"weights[{i}]: got shape {tuple(weight.shape)}, wanted [rows, columns], neither of them 0")
    if weight.dtype == torch.float64 and weight.is_cuda:
        raise TypeError(f"weights[{i}]: got torch.float64 on {weight.device}, wanted a CPU tensor for float64")
    rows, cols = weight.shape
    if tuple(hessian.shape) != (cols, cols):
        raise ValueError(
            f"hessians[{i}]: got shape {tuple(hessian.shape)}, wanted {(cols, cols)} for weight [{rows}, {cols}]"
        )
    given = recipe.scales
    if given is not None and (tuple(given.shape) != (rows,) or given.device != first.device):
        raise ValueError(
            f"scales of weights[{i}]: got {tuple(given.shape)} on {given.device}, wanted {(rows,)} on {first.device}"
        )


def _quantize(weights, hessians, recipes) -> list[tuple[torch.Tensor, torch.Tensor]]:
    compute = [torch.float64 if weight.dtype == torch.float64 else torch.float32 for weight in weights]
    everything = range(len(weights))
    factors = _factorise_all(hessians, recipes, compute)
    scales = _scale_all([weight.to(dtype) for weight, dtype in zip(weights, compute, strict=True)], recipes)
    codes: list[Any] = [None] * len(weights)
    for key, members in _group(everything, lambda i: (recipes[i].error_feedback, recipes[i].block_size, compute[i])):
        results = gptq_columns(
            [weights[i].to(compute[i]) for i in members],
            [factors[i].factor for i in members],
            [factors[i].order for i in members],
            [scales[i].used for i in members],
            [factors[i].status for i in members],
            [recipes[i].max_code for i in members],
            key[0] == "inverse",
            key[1],
        )
        for i, result in zip(members, results, strict=True):
            codes[i] = result
    checks = [check for i in everything for check in (factors[i].status, factors[i].finite, scales[i].good)]
    _raise_on_failure(recipes, torch.stack(checks).view(-1, 3).tolist())
    return [(codes[i], scales[i].stored) for i in everything]


def _group(items, key) -> list[tuple[Any, list[int]]]:
    groups: dict[Any, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())


@dataclasses.dataclass(frozen=True)
class _Factor:
    factor: torch.Tensor  # [C, C]
    order: torch.Tensor  # int32 [C]
    status: torch.Tensor  # int32, 0 when the Hessian is positive definite
    finite: torch.Tensor  # int32, 1 when the factor is


def _factorise_all(hessians, recipes, compute) -> list[_Factor]:
    """The factor of each matrix, computed once for each Hessian tensor and setting."""

    def settings(i: int) -> tuple[Any, ...]:
        recipe = recipes[i]
        return (compute[i], recipe.damping, recipe.column_order, recipe.dead_columns, recipe.error_feedback)

    def identity(i: int) -> tuple[Any, ...]:
        hessian = hessians[i]
        return (hessian.data_ptr(), hessian.shape, hessian.stride(), hessian.dtype, settings(i))

    shared = [members for _, members in _group(range(len(hessians)), identity)]
    # CUDA factorises one size at a time in a batch; on CPU a batch would only cost memory.
    batches = _group(range(len(shared)), lambda j: (hessians[shared[j][0]].shape, settings(shared[j][0])))
    if not hessians[0].is_cuda:
        batches = [(key, [j]) for key, members in batches for j in members]
    # The GPU works on the largest while the host prepares the others.
    batches.sort(key=lambda batch: batch[0][0], reverse=True)
    factors: list[Any] = [None] * len(hessians)
    for (_, (dtype, *_)), jobs in batches:
        stacked = torch.stack([hessians[shared[j][0]].to(dtype) for j in jobs]) if len(jobs) > 1 else None
        first = shared[jobs[0]][0]
        batch = _factorise(hessians[first].to(dtype)[None] if stacked is None else stacked, recipes[first])
        for j, *fields in zip(jobs, *batch, strict=True):
            for i in shared[j]:
                factors[i] = _Factor(*fields)
    return factors


def _factorise(hessians: torch.Tensor, recipe: GptqRecipe) -> tuple[torch.Tensor, ...]:
    """(factor, order, status, finite) of a batch [B, C, C]; factor and order have the first column to quantise last."""
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0 if recipe.dead_columns == "zero" else torch.zeros_like(diagonal, dtype=torch.bool)
    diagonal = diagonal.masked_fill(dead, 1.0)
    diagonal = diagonal + recipe.damping * diagonal.mean(-1, keepdim=True)
    if recipe.column_order == "natural":
        order = torch.arange(diagonal.shape[-1], device=diagonal.device).expand_as(diagonal)
    else:
        order = torch.argsort(diagonal, descending=recipe.column_order == "descending")
    order = order.flip(-1)
    factor, status = gptq_factor(hessians, diagonal.gather(-1, order), order.to(torch.int32))
    finite = factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    if recipe.error_feedback == "inverse":
        factor = torch.cholesky_inverse(factor)
        factor.diagonal(dim1=-2, dim2=-1).clamp_min_(1e-8)
    marked = torch.where(dead.gather(-1, order), -1 - order, order).to(torch.int32)
    return factor, marked, status, finite.to(torch.int32)


@dataclasses.dataclass(frozen=True)
class _Scales:
    used: torch.Tensor  # [R], by the column pass
    stored: torch.Tensor  # fp16 [R]
    good: torch.Tensor  # int32, 1 when all are positive and finite


def _scale_all(weights, recipes) -> list[_Scales]:
    """The row scales of each matrix; on CUDA, matrices of one shape and recipe share their launches."""
    result: list[Any] = [None] * len(weights)

    def key(i: int) -> Any:
        return (weights[i].shape, recipes[i]) if weights[i].is_cuda and recipes[i].scales is None else i

    for _, members in _group(range(len(weights)), key):
        recipe, weight = recipes[members[0]], weights[members[0]]
        stacked = torch.stack([weights[i] for i in members]) if len(members) > 1 else weight[None]
        scales = _row_scales(stacked, recipe) if recipe.scales is None else recipe.scales.to(weight.dtype)[None]
        stored = scales.to(torch.float16)
        used = stored.to(weight.dtype) if recipe.round_scales == "before" else scales
        good = ((used > 0) & (used < float("inf"))).all(-1).to(torch.int32)
        for i, *fields in zip(members, used, stored, good, strict=True):
            result[i] = _Scales(*fields)
    return result


def _row_scales(weight: torch.Tensor, recipe: GptqRecipe) -> torch.Tensor:
    """[..., R] scales, unrounded, that fp16 can hold; weight [..., R, C]."""
    limit = recipe.max_code
    largest = weight.abs().amax(-1)
    if recipe.scale_rule == "sigma":
        scales = recipe.clip_sigmas * _row_deviation(weight) / limit
    elif recipe.scale_rule == "absmax":
        scales = largest / limit
    else:
        scales = _searched_scales(weight, limit)
    scales = scales.clamp_min(recipe.scale_floor)
    scales = torch.where(scales * limit < _LEAST_RANGE * largest, largest / limit, scales)
    return scales.clamp(_SMALLEST_HALF, _LARGEST_HALF)


def _row_deviation(weight: torch.Tensor) -> torch.Tensor:
    """torch.std(-1), ten times faster on CPU; 0 for a single column."""
    centred = weight - weight.mean(-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1) / max(1, weight.shape[-1] - 1) ** 0.5


def _searched_scales(weight: torch.Tensor, limit: int) -> torch.Tensor:
    ordered = weight.abs().sort(-1).values
    best = torch.full_like(ordered[..., 0], float("inf"))
    scales = torch.zeros_like(best)
    for quantile in _SEARCH_QUANTILES:
        place = quantile * (ordered.shape[-1] - 1)
        low, high = ordered[..., int(place)], ordered[..., min(int(place) + 1, ordered.shape[-1] - 1)]
        candidate = (torch.lerp(low, high, place - int(place)) / limit).clamp(_SMALLEST_HALF, _LARGEST_HALF)
        codes = (weight / candidate[..., None]).clamp(-limit, limit).round()
        error = (weight - codes * candidate[..., None]).square().sum(-1)
        scales = torch.where(error < best, candidate, scales)
        best = torch.minimum(error, best)
    return scales


def _raise_on_failure(recipes: Sequence[GptqRecipe], checks: list[list[int]]) -> None:
    for i, (recipe, (failed, finite, good)) in enumerate(zip(recipes, checks, strict=True)):
        if not good:
            if recipe.scales is None:
                raise ValueError(f"weights[{i}]: got numbers that are not finite")
            raise ValueError(f"scales of weights[{i}]: got numbers that are not finite and positive in fp16")
        if failed and recipe.on_singular == "raise":
            raise ValueError(
                f"hessians[{i}]: not positive definite with damping {recipe.damping} (pivot {failed} of the "
                "factorisation fails); wanted a larger damping, or on_singular='diagonal' to round without feedback"
            )
        if not failed and not finite:
            raise ValueError(f"hessians[{i}]: got numbers that are not finite")
