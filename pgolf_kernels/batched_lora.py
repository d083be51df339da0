"""Linear layers with a low-rank adapter for each document of a batch.

    y_p = x W_p^T + scale * (x A_p[b]^T) B_p[b]^T (+ residual_p)

b is the document's adapter; p runs over the projections that share the input x (q, k, v, and the adapter of o). With
g_p = dy_p, s_p = scale * x A_p[b]^T and e_p = scale * g_p B_p[b]:

    dx = sum_p g_p W_p + e_p A_p[b],   dA_p[b] = e_p^T x,   dB_p[b] = g_p^T s_p,   dW_p = g_p^T x,
    dresidual_p = g_p

x [B, T, in] with a document a row, or packed [N, in] with `cu_seqlens`. The adapters' two products are the extra depth
of one matrix product, [x | s] [W | B]^T, so that neither direction makes a second pass over its output; saved beside
the inputs are s (rank columns a row) and the adapters as the products read them. Adapters in fp32 beside bf16
activations are cast inside and get fp32 gradients straight from the accumulators; a CPU rounds each document's to bf16
first, as the expression below does. Source: the test-time training of pull requests 1530 and 1727, which does this with
a linear and two bmm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf_kernels._native_op import register_op
from pgolf_kernels._triton_op import kernels, product_as, runs_narrow_triton

MAX_RANK = 128


def reference(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The formula in PyTorch for x [B, T, in], differentiable: the linear and two bmm of the public systems."""
    y = torch.bmm(torch.bmm(x, lora_a.to(x.dtype).mT) * scale, lora_b.to(x.dtype).mT)
    if weight is not None:
        y = y + F.linear(x, weight.to(x.dtype))
    return y if residual is None else y + residual


# ---- documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Whose rows they are: `rows` a document, or the bounds `cu_seqlens`; `index` None: document i has adapter i."""

    rows: int
    cu_seqlens: Tensor | None
    index: Tensor | None

    def planes(self, tensor: Tensor, adapters: int) -> Tensor:
        """[N, columns] as [documents, rows, columns]; documents with no row count too."""
        return tensor.view(adapters if self.index is None else len(self.index), self.rows, tensor.shape[1])

    def spans(self) -> list[tuple[slice, int]]:
        """(rows, adapter) of every packed document that has rows. Reads the bounds, so it waits for a GPU."""
        assert self.cu_seqlens is not None
        bounds = self.cu_seqlens.tolist()
        adapters = range(len(bounds) - 1) if self.index is None else self.index.tolist()
        spans = zip(bounds, bounds[1:], adapters, strict=False)
        return [(slice(a, b), adapter) for a, b, adapter in spans if b > a]


def _times(x: Tensor, matrices: Tensor, layout: Layout, addend: Tensor | None = None) -> Tensor:
    """x_b M_b of every document, x [N, k], M [adapters, k, n] -> [N, n]; added to `addend` in place if there is one."""
    if layout.cu_seqlens is None:
        picked = matrices if layout.index is None else matrices[layout.index]
        wide = layout.planes(x, len(matrices))
        if addend is None:
            out = x.new_empty((x.shape[0], matrices.shape[2]))  # not a view, on which autograd would let nobody write
            torch.bmm(wide, picked, out=layout.planes(out, len(matrices)))
            return out
        layout.planes(addend, len(matrices)).baddbmm_(wide, picked)
        return addend
    out = x.new_zeros((x.shape[0], matrices.shape[2])) if addend is None else addend
    for rows, adapter in layout.spans():
        out[rows].addmm_(x[rows], matrices[adapter])
    return out


def _outer(u: Tensor, v: Tensor, count: int, dtype: torch.dtype, layout: Layout) -> Tensor:
    """sum over each adapter's documents of u_b^T v_b: u [N, m], v [N, n] -> [count, m, n]."""
    wide = torch.promote_types(u.dtype, dtype)
    # A CPU multiplies bfloat16 several times as fast as float32, with the same accumulators, and rounds the result; its
    # float16 products are the slow ones.
    if u.dtype != torch.bfloat16:
        u, v = u.to(wide), v.to(wide)
    if layout.cu_seqlens is None:
        products = torch.bmm(layout.planes(u, count).mT, layout.planes(v, count))
        if layout.index is None:
            return products.to(dtype)
        out = products.new_zeros((count, *products.shape[1:]), dtype=wide)
        return out.index_add_(0, layout.index, products.to(wide)).to(dtype)
    out = u.new_zeros((count, u.shape[1], v.shape[1]), dtype=wide)
    for rows, adapter in layout.spans():
        out[adapter] += u[rows].t() @ v[rows]
    return out.to(dtype)


# ---- op --------------------------------------------------------------------------------------------------------------

# Lists of optional tensors do not pass a schema's autograd, so `weights` and `residuals` hold the present ones only and
# `parts` says for each projection which it has: bit 0 a weight, bit 1 a residual.
_WEIGHT, _RESIDUAL = 1, 2


def padded(columns: int, dtype: torch.dtype) -> int:
    """Columns rounded up to 16 bytes, as the copy engine wants its rows."""
    return columns + -columns % (16 // dtype.itemsize)


def low_size(lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Elements of all adapters in the activations' dtype, ranks and columns padded."""
    depth = padded(lora_as[0].shape[2], dtype)
    ranks = [padded(a.shape[1], dtype) for a in lora_as]
    return sum(b.shape[0] * rank * (depth + b.shape[1]) for b, rank in zip(lora_bs, ranks, strict=True))


def _kept_size(x: Tensor, lora_as: Sequence[Tensor], lora_bs: Sequence[Tensor]) -> int:
    """Elements that a forward keeps of the adapters as its products read them: all for the kernels, or what is cast."""
    if runs_narrow_triton(x):
        return low_size(lora_as, lora_bs, x.dtype)
    return sum(t.numel() for t in (*lora_as, *lora_bs) if t.dtype != x.dtype)


def _kept(adapters: Sequence[Tensor], low: Tensor) -> list[Tensor]:
    """The adapters where they have low's dtype, and the places of the others in `low`, one behind the other."""
    parts = low.split([t.numel() * (t.dtype != low.dtype) for t in adapters])
    return [t if t.dtype == low.dtype else part.view(t.shape) for t, part in zip(adapters, parts, strict=True)]


def _spread(present: Sequence[Tensor], parts: Sequence[int], bit: int) -> list[Tensor | None]:
    iterator = iter(present)
    return [next(iterator) if part & bit else None for part in parts]


def _forward(
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    residuals: list[Tensor],
    parts: list[int],
    cu_seqlens: Tensor | None,
    index: Tensor | None,
    rows: int,
    scale: float,
) -> list[Tensor]:
    layout = Layout(rows, cu_seqlens, index)
    per_weight, per_residual = _spread(weights, parts, _WEIGHT), _spread(residuals, parts, _RESIDUAL)
    if runs_narrow_triton(x) and x.numel():
        return kernels("batched_lora").forward(x, per_weight, lora_as, lora_bs, per_residual, layout, scale)
    low = x.new_empty(_kept_size(x, lora_as, lora_bs))
    adapters = _kept([*lora_as, *lora_bs], low)
    for place, adapter in zip(adapters, (*lora_as, *lora_bs), strict=True):
        if place is not adapter:
            place.copy_(adapter)
    lora_as, lora_bs = adapters[: len(lora_as)], adapters[len(lora_as) :]
    ys, shrunk = [], []
    for weight, a, b, residual in zip(per_weight, lora_as, lora_bs, per_residual, strict=True):
        s = _times(x, a.mT, layout)
        s = s if scale == 1.0 else s.mul_(scale)
        y = None
        if weight is not None:
            transposed = weight.to(x.dtype).t()
            y = x @ transposed if residual is None else torch.addmm(residual, x, transposed)
        elif residual is not None:
            y = residual.clone(memory_format=torch.contiguous_format)
        ys.append(_times(s, b.mT, layout, y))
        missing = padded(s.shape[1], x.dtype) - s.shape[1]
        shrunk.append(F.pad(s, (0, missing)) if missing else s)
    return [*ys, torch.cat(shrunk, dim=1) if len(shrunk) > 1 else shrunk[0], low]


def _forward_fake(
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    *_: Any,
) -> list[Tensor]:
    ys = [x.new_empty((x.shape[0], b.shape[1])) for b in lora_bs]
    shrunk = x.new_empty((x.shape[0], sum(padded(a.shape[1], x.dtype) for a in lora_as)))
    return [*ys, shrunk, x.new_empty(_kept_size(x, lora_as, lora_bs))]


def _backward_kernel(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    shrunk: Tensor,
    low: Tensor,
    parts: list[int],
    cu_seqlens: Tensor | None,
    index: Tensor | None,
    rows: int,
    scale: float,
    wants_x: bool,
    wants_weights: list[bool],
) -> list[Tensor]:
    layout = Layout(rows, cu_seqlens, index)
    per_weight = _spread(weights, parts, _WEIGHT)
    d_weights = [
        product_as(grad.t(), x, weight.dtype) if want else weight.new_empty(0)
        for grad, weight, want in zip(
            [g for g, part in zip(grads, parts, strict=True) if part & _WEIGHT], weights, wants_weights, strict=True
        )
    ]
    if runs_narrow_triton(x) and x.numel():
        d_x, d_as, d_bs = kernels("batched_lora").backward(
            grads, x, per_weight, lora_as, lora_bs, shrunk, low, layout, scale, wants_x
        )
        return [d_x, *d_weights, *d_as, *d_bs]
    d_x = None
    d_as, d_bs = [], []
    columns = shrunk.split([padded(a.shape[1], x.dtype) for a in lora_as], dim=1)
    dtypes, adapters = [a.dtype for a in lora_as], [*lora_as, *lora_bs]
    adapters = _kept(adapters, low) if low.numel() else [t.to(x.dtype) for t in adapters]
    lora_as, lora_bs = adapters[: len(grads)], adapters[len(grads) :]
    for grad, weight, a, b, s, dtype in zip(grads, per_weight, lora_as, lora_bs, columns, dtypes, strict=True):
        e = _times(grad, b, layout)
        e = e if scale == 1.0 else e.mul_(scale)
        d_as.append(_outer(e, x, a.shape[0], dtype, layout))
        d_bs.append(_outer(grad, s[:, : a.shape[1]], b.shape[0], dtype, layout))
        if wants_x:
            if weight is not None:
                weight = weight.to(x.dtype)
                d_x = grad @ weight if d_x is None else d_x.addmm_(grad, weight)
            d_x = _times(e, a, layout, d_x)
    return [x.new_empty(0) if d_x is None else d_x, *d_weights, *d_as, *d_bs]


def _backward_fake(
    grads: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    lora_as: list[Tensor],
    lora_bs: list[Tensor],
    shrunk: Tensor,
    low: Tensor,
    parts: list[int],
    cu_seqlens: Tensor | None,
    index: Tensor | None,
    rows: int,
    scale: float,
    wants_x: bool,
    wants_weights: list[bool],
) -> list[Tensor]:
    d_x = x.new_empty(x.shape if wants_x else (0,))
    d_weights = [w.new_empty(w.shape if want else (0,)) for w, want in zip(weights, wants_weights, strict=True)]
    return [d_x, *d_weights, *(t.new_empty(t.shape) for t in (*lora_as, *lora_bs))]


_backward_op = register_op(
    "batched_lora_backward(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, "
    "Tensor shrunk, Tensor low, int[] parts, Tensor? cu_seqlens, Tensor? adapter_index, SymInt rows, float scale, "
    "bool wants_x, bool[] wants_weights) -> Tensor[]",
    _backward_kernel,
    fake=_backward_fake,
    not_differentiable="double backward is not supported",
)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, lora_as, lora_bs, residuals, ctx.parts, cu_seqlens, index, ctx.rows, ctx.scale = inputs
    ctx.counts = (len(weights), len(lora_as), len(residuals))
    ctx.set_materialize_grads(False)  # nobody differentiates the saved outputs: no zeros in their shapes
    ctx.mark_non_differentiable(*output[-2:])
    ctx.optional = (cu_seqlens is not None, index is not None)
    ctx.save_for_backward(
        x, *weights, *lora_as, *lora_bs, *output[-2:], *(t for t in (cu_seqlens, index) if t is not None)
    )


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    weight_count, count, _ = ctx.counts
    x, *rest = ctx.saved_tensors
    weights, rest = rest[:weight_count], rest[weight_count:]
    lora_as, lora_bs, rest = rest[:count], rest[count : 2 * count], rest[2 * count :]
    shrunk, low, *rest = rest
    cu_seqlens = rest.pop(0) if ctx.optional[0] else None
    index = rest.pop(0) if ctx.optional[1] else None
    grads = [
        torch.zeros((x.shape[0], b.shape[1]), dtype=x.dtype, device=x.device) if g is None else g.contiguous()
        for g, b in zip(grads[:-2], lora_bs, strict=True)
    ]
    needs = ctx.needs_input_grad
    wants_weights = list(needs[1])
    results = _backward_op(
        grads, x, weights, lora_as, lora_bs, shrunk, low, ctx.parts, cu_seqlens, index, ctx.rows, ctx.scale, needs[0],
        wants_weights,
    )  # fmt: skip
    d_x, results = results[0], results[1:]
    d_weights = [d if want else None for d, want in zip(results[:weight_count], wants_weights, strict=True)]
    results = results[weight_count:]
    d_residuals = [grad for grad, part in zip(grads, ctx.parts, strict=True) if part & _RESIDUAL]
    return (
        d_x if needs[0] else None, d_weights, results[:count], results[count:], d_residuals,
        None, None, None, None, None,
    )  # fmt: skip


_forward_op = register_op(
    "batched_lora(Tensor x, Tensor[] weights, Tensor[] lora_as, Tensor[] lora_bs, Tensor[] residuals, int[] parts, "
    "Tensor? cu_seqlens, Tensor? adapter_index, SymInt rows, float scale) -> Tensor[]",
    _forward,
    fake=_forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)


# ---- public functions ------------------------------------------------------------------------------------------------


def batched_lora(
    x: Tensor,
    weight: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scale: float = 1.0,
    residual: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """x W^T + scale * (x A_b^T) B_b^T (+ residual), with an adapter for each document.

    x [B, T, in], or packed [N, in] with `cu_seqlens` (int32 [documents + 1] from 0, may be padded with repeated
    ends; rows past the last bound get no adapter). weight [out, in] or None; lora_a [adapters, r, in] and lora_b
    [adapters, out, r] with 1 <= r <= 128; residual in y's shape. Without `adapter_index` (int64 [documents]) document i
    has adapter i; with it several documents may share one, and some adapters may have none. Activations in bfloat16,
    float16, float32 or float64; weight and adapters in the same dtype or float32 (cast inside). Returns [..., out] in
    x's dtype.

    Raises ValueError for shapes and devices, TypeError for dtypes. The kernels do not read the values of `cu_seqlens`
    and `adapter_index` on the host: out of range is the caller's error. Where PyTorch computes instead of them (a CPU;
    on a GPU float32 and float64) it goes document by document, and has to read them.
    """
    return batched_lora_multi(
        x, [weight], [lora_a], [lora_b], scale=scale, residuals=[residual], cu_seqlens=cu_seqlens,
        adapter_index=adapter_index,
    )[0]  # fmt: skip


def batched_lora_multi(
    x: Tensor,
    weights: Sequence[Tensor | None],
    lora_as: Sequence[Tensor | None],
    lora_bs: Sequence[Tensor | None],
    *,
    scale: float = 1.0,
    residuals: Sequence[Tensor | None] | None = None,
    cu_seqlens: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> list[Tensor]:
    """:func:`batched_lora` for several projections of one input, in one node of the graph: they share passes over x.

    Lists of equal length; where both adapters are None the projection is a plain linear. Ranks may differ. Raises what
    :func:`batched_lora` raises, with the number of the projection.
    """
    residuals = [None] * len(weights) if residuals is None else residuals
    if not len(weights) == len(lora_as) == len(lora_bs) == len(residuals):
        raise ValueError(
            f"weights, lora_as, lora_bs, residuals: got lengths {len(weights)}, {len(lora_as)}, {len(lora_bs)}, "
            f"{len(residuals)}, wanted the same"
        )
    outputs: dict[int, Tensor] = {}
    adapted: list[_Projection] = []
    for i, (weight, a, b, residual) in enumerate(zip(weights, lora_as, lora_bs, residuals, strict=True)):
        if a is not None and b is not None:
            adapted.append(_Projection(i, weight, a, b, residual))
        elif a is None and b is None and weight is not None:
            if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
                raise ValueError(
                    f"weight of projection {i}: got shape {tuple(weight.shape)}, wanted [out, {x.shape[-1]}]"
                )
            _check_residual(i, residual, x, weight.shape[0])
            y = F.linear(x, weight.to(x.dtype))
            outputs[i] = y if residual is None else y + residual
        else:
            raise ValueError(f"projection {i}: got only one of lora_a and lora_b, or neither and no weight")
    if adapted:
        documents = _check_input(x, cu_seqlens, adapter_index)
        for projection in adapted:
            projection.check(x, adapter_index, documents)
            if projection.a.shape[0] != adapted[0].a.shape[0]:
                raise ValueError(
                    f"lora_a of projection {projection.number}: got {projection.a.shape[0]} adapters, wanted "
                    f"{adapted[0].a.shape[0]} as projection {adapted[0].number} has"
                )
        if x.device.type == "cpu" and cu_seqlens is None and adapter_index is None and not runs_narrow_triton(x):
            # An op in Python costs small calls more than PyTorch's own expression takes altogether.
            with torch.autocast("cpu", enabled=False):
                results = [reference(x, p.weight, p.a, p.b, scale, p.residual) for p in adapted]
        else:
            flat = x.reshape(-1, x.shape[-1])
            bounds, index = (None if t is None else t.contiguous() for t in (cu_seqlens, adapter_index))
            results = _forward_op(
                flat,
                [p.weight for p in adapted if p.weight is not None],
                [p.a for p in adapted],
                [p.b for p in adapted],
                [p.residual.reshape(-1, p.b.shape[1]) for p in adapted if p.residual is not None],
                [_WEIGHT * (p.weight is not None) | _RESIDUAL * (p.residual is not None) for p in adapted],
                bounds,
                index,
                x.shape[1] if cu_seqlens is None else 0,
                float(scale),
            )
        for projection, y in zip(adapted, results, strict=False):
            outputs[projection.number] = y.view(*x.shape[:-1], y.shape[-1])
    return [outputs[i] for i in range(len(weights))]


def _check_residual(number: int, residual: Tensor | None, x: Tensor, out: int) -> None:
    if residual is None:
        return
    if residual.shape != (*x.shape[:-1], out) or residual.device != x.device:
        raise ValueError(
            f"residual of projection {number}: got shape {tuple(residual.shape)} on {residual.device}, "
            f"wanted {(*x.shape[:-1], out)} on x's {x.device}"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"residual of projection {number}: got {residual.dtype}, wanted x's {x.dtype}")


@dataclass(frozen=True)
class _Projection:
    """One adapted projection of a call."""

    number: int
    weight: Tensor | None
    a: Tensor
    b: Tensor
    residual: Tensor | None

    def check(self, x: Tensor, index: Tensor | None, documents: int | None) -> None:
        name_a, name_b = f"lora_a of projection {self.number}", f"lora_b of projection {self.number}"
        a, b, features = self.a, self.b, x.shape[-1]
        if a.dim() != 3 or a.shape[2] != features:
            raise ValueError(f"{name_a}: got shape {tuple(a.shape)}, wanted [adapters, r, {features}]")
        adapters, rank = a.shape[:2]
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"{name_a}: got rank {rank}, wanted 1 to {MAX_RANK}")
        if index is None and documents is not None and adapters != documents:
            raise ValueError(
                f"{name_a}: got {adapters} adapters for {documents} documents, wanted as many (or adapter_index)"
            )
        if b.dim() != 3 or b.shape[0] != adapters or b.shape[2] != rank:
            raise ValueError(f"{name_b}: got shape {tuple(b.shape)}, wanted [{adapters}, out, {rank}]")
        out = b.shape[1]
        if self.weight is not None and self.weight.shape != (out, features):
            raise ValueError(
                f"weight of projection {self.number}: got shape {tuple(self.weight.shape)}, wanted ({out}, {features})"
            )
        _check_residual(self.number, self.residual, x, out)
        for name, tensor in (
            (name_a, self.a),
            (name_b, self.b),
            (f"weight of projection {self.number}", self.weight),
        ):
            if tensor is None:
                continue
            if tensor.device != x.device:
                raise ValueError(f"{name}: got device {tensor.device}, wanted x's {x.device}")
            if tensor.dtype not in (x.dtype, torch.float32):
                raise TypeError(f"{name}: got {tensor.dtype}, wanted x's {x.dtype} or torch.float32")
        if b.dtype != a.dtype:
            raise TypeError(f"{name_b}: got {b.dtype}, wanted lora_a's {a.dtype}")


def _check_input(x: Tensor, cu_seqlens: Tensor | None, index: Tensor | None) -> int | None:
    """Checks what the projections share; the number of documents (None: packed, where padding may add empty ones)."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"x: got {x.dtype}, wanted a floating-point dtype")
    if cu_seqlens is None:
        if x.dim() != 3:
            raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [B, T, in] (or [N, in] with cu_seqlens)")
        documents = x.shape[0]
    else:
        if x.dim() != 2:
            raise ValueError(f"x: got shape {tuple(x.shape)} with cu_seqlens, wanted [N, in]")
        if cu_seqlens.dtype != torch.int32:
            raise TypeError(f"cu_seqlens: got {cu_seqlens.dtype}, wanted torch.int32")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, wanted [documents + 1]")
        documents = cu_seqlens.shape[0] - 1
    if index is not None:
        if index.dtype != torch.int64:
            raise TypeError(f"adapter_index: got {index.dtype}, wanted torch.int64")
        if index.shape != (documents,):
            raise ValueError(f"adapter_index: got shape {tuple(index.shape)}, wanted ({documents},), one a document")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("adapter_index", index)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, wanted x's {x.device}")
    return documents if cu_seqlens is None else None
