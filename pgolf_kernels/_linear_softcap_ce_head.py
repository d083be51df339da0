"""What linear_softcap_ce.py multiplies: the head's operands, a chunk of rows at a time, and sums of their gradients.

    logits = x @ W.T + (x A.T) B.T        u = dloss / dlogits = scale[i] * dlogits[i]
    dx = u @ W + (u B) A        dW = u.T @ x        dA = (u B).T @ x        dB = u.T @ (x A.T)

with the document's own A [r, D] and B [V, r] in each row. x, W and u have one compute dtype, that of the hidden states;
sums over rows are float32 (float64 for float64). `check_head` is for the public function; the classes run inside the
ops, refuse only numbers that are out of range, and wait for no device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pgolf_kernels._triton_op import kernels, runs_triton
from pgolf_kernels.batched_lora import _RESIDUAL as RESIDUAL
from pgolf_kernels.batched_lora import MAX_RANK
from pgolf_kernels.batched_lora import _backward_kernel as lora_backward
from pgolf_kernels.batched_lora import _forward as lora_forward
from pgolf_kernels.softcap_ce import check_float, check_indices, loss_dtype


def check_head(
    hidden: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, doc_ids: Tensor | None
) -> Tensor | None:
    """doc_ids as the ops take them, int64 and contiguous; None where there are none.

    Raises TypeError for a dtype and ValueError for a shape or device that :class:`Head` does not take.
    """
    check_float("hidden", hidden)
    if hidden.dim() != 2:
        raise ValueError(f"hidden: got shape {list(hidden.shape)}, wanted [N, D]")
    rows, width = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != width or not len(weight):
        raise ValueError(f"weight: got shape {list(weight.shape)}, wanted [V, {width}] with V > 0")
    given = [tensor is not None for tensor in (lora_a, lora_b, doc_ids)]
    if given not in ([False] * 3, [True] * 3, [True, True, False]):
        raise ValueError(
            f"lora_a, lora_b, doc_ids: got {given} (given or not), wanted lora_a and lora_b, with or without doc_ids, "
            "or none"
        )
    for name, tensor in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b)):
        if tensor is None:
            continue
        check_float(name, tensor)
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: got device {tensor.device}, wanted {hidden.device}")
    if lora_a is None or lora_b is None:
        return None
    if lora_a.dim() != 3 or lora_a.shape[2] != width or not 1 <= lora_a.shape[1] <= MAX_RANK:
        raise ValueError(f"lora_a: got shape {list(lora_a.shape)}, wanted [B, r, {width}] with 1 <= r <= {MAX_RANK}")
    wanted = (lora_a.shape[0], weight.shape[0], lora_a.shape[1])
    if lora_b.shape != wanted:
        raise ValueError(f"lora_b: got shape {list(lora_b.shape)}, wanted {list(wanted)}")
    if doc_ids is not None:
        return check_indices("doc_ids", doc_ids, rows, hidden.device)
    if rows % len(lora_a) if len(lora_a) else rows:
        raise ValueError(f"hidden: got {rows} rows without doc_ids, wanted as many for each of {len(lora_a)} documents")
    return None


class Head:
    """Hidden states and weight in the compute dtype, adapters, and the products that a chunk of rows needs.

    hidden [N, D], weight [V, D]; lora_a [B, r, D], lora_b [B, V, r] and doc_ids [N], or None each. With doc_ids the
    rows are sorted by document (`order`), for batched_lora.py's products by document; with adapters alone they lie so
    already, as many of each. Raises IndexError for a document outside [0, B) on the CPU; on CUDA, where a look would
    wait for the device, such a row goes without adapters.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, doc_ids: Tensor | None
    ):
        self.hidden = hidden
        self.weight = weight.to(hidden.dtype)
        self.dtypes = dtypes_of(hidden, weight, lora_a, lora_b)
        self.order: Tensor | None = None
        self.adapters: tuple[list[Tensor], list[Tensor]] = [], []
        if lora_a is None or lora_b is None:
            return
        self.adapters = [lora_a], [lora_b]
        documents = len(lora_a)
        if doc_ids is None:
            self.each = len(hidden) // max(1, documents)
            return
        if (
            not doc_ids.is_cuda
            and len(doc_ids)
            and not 0 <= (extremes := doc_ids.aminmax()).min <= extremes.max < documents
        ):
            raise IndexError(
                f"doc_ids: got {extremes.min.item()} to {extremes.max.item()}, wanted indices in [0, {documents})"
            )
        self.order, self.bounds = by_document(doc_ids, documents)
        self.hidden = hidden[self.order]

    def fused(self, softcap: float, temperature: float) -> Any:
        """The module of Triton kernels if they take this head, else None."""
        if self.adapters[0] or not runs_triton(self.hidden):
            return None
        module = kernels("linear_softcap_ce")
        return module if module.takes(self.hidden, self.weight, softcap, temperature) else None

    def sorted(self, rows: Tensor) -> Tensor:
        """rows [N, ...] from the caller's order into the head's."""
        return rows if self.order is None else rows[self.order]

    def unsorted(self, rows: Tensor) -> Tensor:
        """rows [N, ...] from the head's order into the caller's; an empty tensor, of results nobody wants, as it is."""
        return (
            rows if self.order is None or not rows.numel() else torch.empty_like(rows).index_copy_(0, self.order, rows)
        )

    def chunks(self, chunk_bytes: int) -> Iterator[slice]:
        """Ranges of rows, each of as many as have their logits in so many bytes, or one; an empty range if N is 0."""
        count = max(1, chunk_bytes // (self.weight.shape[0] * self.hidden.element_size()))
        for start in range(0, max(1, len(self.hidden)), count):
            yield slice(start, min(start + count, len(self.hidden)))

    def layout(self, rows: slice) -> tuple[Tensor | None, int]:
        """Where each document begins and the last one ends among these rows, int32 [B + 1], or how many each has."""
        whole = rows == slice(0, len(self.hidden))
        if self.order is not None:
            bounds = self.bounds
        elif whole:
            return None, self.each
        else:
            count = len(self.adapters[0][0]) + 1
            bounds = self.each * torch.arange(count, dtype=torch.int32, device=self.hidden.device)
        return bounds if whole else (bounds - rows.start).clamp(0, rows.stop - rows.start), 0

    def logits(self, rows: slice, out: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """A chunk's logits, and what the adapters' gradients need: x A^T and the adapters in hidden's dtype."""
        hidden = self.hidden[rows]
        if not self.adapters[0]:
            return torch.mm(hidden, self.weight.T, out=out), []
        base = hidden @ self.weight.T
        bounds, each = self.layout(rows)
        logits, *kept = lora_forward(hidden, [], *self.adapters, [base], [RESIDUAL], bounds, None, each, 1.0)
        return logits if out is None else out.copy_(logits), kept


def by_document(doc_ids: Tensor, documents: int) -> tuple[Tensor, Tensor]:
    """(rows in the order of their documents, int64 [N]; bounds of the documents therein, int32 [B + 1]).

    Rows of a document keep their order; those of none in [0, documents) go last.
    """
    if runs_triton(doc_ids) and len(doc_ids) <= (module := kernels("linear_softcap_ce")).MOST_COMPARED:
        return module.by_document(doc_ids, documents)
    ids, order = doc_ids.where((doc_ids >= 0) & (doc_ids < documents), documents).sort(stable=True)
    bounds = torch.arange(documents + 1, device=ids.device)
    return order, torch.searchsorted(ids, bounds, out_int32=True)


class Gradients:
    """The inputs' gradients, summed over chunks of rows in float32 at least; None where none is wanted.

    `needs`: whether those of hidden, weight, lora_a and lora_b are wanted. `chunks`: how many; None if the sums
    themselves are wanted and not the rounded ones.
    """

    def __init__(self, head: Head, needs: list[bool], chunks: int | None):
        self.head, self.needs = head, needs
        wide, own = loss_dtype(head.hidden), head.dtypes[1] or torch.float32
        self.sum_dtype = own if chunks == 1 and own in (head.hidden.dtype, wide) else wide
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.lora_a: Tensor | None = None
        self.lora_b: Tensor | None = None

    def add(
        self, dlogits: Tensor, scale: Tensor | None, rows: slice, kept: list[Tensor], scaled: Tensor | None = None
    ) -> None:
        """Adds a chunk whose logits have the gradients scale[i] * dlogits[i]; `kept` is what `logits` gave.

        `scaled`, without adapters and scale: the chunk's hidden states times the factors that dlogits lack. dweight
        gets them from there, dhidden goes without.
        """
        head = self.head
        scaled = times(head.hidden[rows], scale) if scaled is None else scaled
        if self.needs[1]:
            self.weight = add_product(self.weight, dlogits.T, scaled, self.sum_dtype)
        dhidden = None
        if kept:
            inner, low = kept
            bounds, each = head.layout(rows)
            low_rank: tuple[Any, ...] = (times(inner, scale), low, [0], bounds, None, each, 1.0, self.needs[0], [])
            dhidden, d_a, d_b = lora_backward([dlogits], scaled, [], *head.adapters, *low_rank)
            self.lora_a = d_a if self.lora_a is None else self.lora_a + d_a
            self.lora_b = d_b if self.lora_b is None else self.lora_b + d_b
        del scaled  # as large as what comes next
        if self.needs[0]:
            self.hidden = torch.empty_like(head.hidden) if self.hidden is None else self.hidden
            own = torch.mm(dlogits, head.weight, out=self.hidden[rows])
            if dhidden is not None:
                own += dhidden
            times(own, scale, own)

    def sums(self) -> tuple[Tensor, ...]:
        """As they were summed; an empty tensor where no gradient was wanted (an op returns no optional tensors)."""
        hidden = None if self.hidden is None else self.head.unsorted(self.hidden)
        return tuple(
            total if need and total is not None else self.head.hidden.new_empty(0)
            for total, need in zip((hidden, self.weight, self.lora_a, self.lora_b), self.needs, strict=True)
        )

    def outputs(self) -> tuple[Tensor, ...]:
        """In the inputs' dtypes."""
        return tuple(
            total.to(dtype) if need else total
            for total, need, dtype in zip(self.sums(), self.needs, self.head.dtypes, strict=True)
        )


def times(rows: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """rows * scale[:, None] with one rounding, to the rows' dtype; the rows themselves without a scale."""
    if scale is None:
        return rows
    out = torch.empty_like(rows) if out is None else out
    if runs_triton(rows):
        # The kernel reads one number after the other; an upstream gradient expanded from a scalar has stride 0.
        return kernels("linear_softcap_ce").scale_rows(rows, scale.contiguous(), out)
    return torch.mul(rows, scale[:, None], out=out)


def times_factor(sums: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """sums * factor, one number or one for each row, with one rounding to out's dtype; `out` may be `sums`."""
    if sums.dim() == 2:
        return times(sums, factor.expand(len(sums)), out)
    return torch.mul(sums, factor, out=out)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b with float32 accumulators, as `dtype` without a rounding in between."""
    if not a.is_cuda:
        wide = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(wide), b.to(wide)
    if a.dtype == dtype or not a.is_cuda:
        return a @ b if total is None else total.addmm_(a, b)
    return torch.mm(a, b, dtype) if total is None else torch.addmm(total, a, b, dtype, out=total)


def dtypes_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)
