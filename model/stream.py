"""The residual stream as a weighted sum that is computed only when a norm reads it.

Between two matrix products every step of the network (mixing with the input embedding, joining a gated skip, crossing
lanes) is linear in its activations with one coefficient per channel. `Stream` keeps the list of activations and the
products of their coefficients; :meth:`Stream.norm` hands both to one kernel, which reads each activation once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_kernels import combine, combine_norm, norm_residual
from pgolf_kernels.residual import MAX_STREAMS


@dataclass(frozen=True)
class Stream:
    """sum_k coefficients[k] * tensors[k]; tensors [..., D], coefficients [k, D] in fp32, or None for one tensor alone.

    Activations that are used once more are best taken from what `sum` and `norm` return again (in the order of
    `tensors`): gradients of those uses are then added by the kernel that computes this sum's.
    """

    tensors: tuple[Tensor, ...]
    coefficients: Tensor | None = None

    @classmethod
    def of(cls, tensor: Tensor, coefficient: Tensor | None = None) -> Stream:
        """One activation times `coefficient` [D], or itself."""
        return cls((tensor,), None if coefficient is None else coefficient.unsqueeze(0))

    def scaled(self, factor: Tensor | float) -> Stream:
        """`factor` ([D], [] or a number) times the stream."""
        if self.coefficients is None and isinstance(factor, Tensor) and factor.dim() == 1:
            return Stream(self.tensors, factor.unsqueeze(0))
        return Stream(self.tensors, self._weights() * factor)

    def plus(self, other: Stream) -> Stream:
        """The sum of two streams; an activation that both hold is kept once."""
        mine, theirs = self._weights(), other._weights()
        places = [next((i for i, t in enumerate(self.tensors) if t is tensor), None) for tensor in other.tensors]
        if all(place is None for place in places):
            return Stream(self.tensors + other.tensors, torch.cat([mine, theirs]))
        tensors, rows = list(self.tensors), list(mine.unbind())
        for tensor, place, row in zip(other.tensors, places, theirs.unbind(), strict=True):
            if place is None:
                tensors.append(tensor)
                rows.append(row)
            else:
                rows[place] = rows[place] + row
        return Stream(tuple(tensors), torch.stack(rows))

    def replaced(self, old: Sequence[Tensor], new: Sequence[Tensor]) -> Stream:
        """The stream with those of its activations that are in `old` taken from `new`."""
        found = {id(before): after for before, after in zip(old, new, strict=True)}
        return Stream(tuple(found.get(id(tensor), tensor) for tensor in self.tensors), self.coefficients)

    def sum(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(u, again): the stream as one activation, and its activations for later uses."""
        if self.coefficients is None:
            return self.tensors[0], self.tensors
        head, again = self._short()
        total, kept = combine(head.tensors, head._weights())
        return total, (again or kept)

    def norm(self, scale: float, *, with_total: bool = True) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(u, n, again): the stream as one activation (empty without `with_total`), scale * RMSNorm of it, and the
        stream's activations for later uses."""
        if self.coefficients is None:
            normed, same = norm_residual(self.tensors[0], scale=scale)
            return same, normed, (same,)
        head, again = self._short()
        total, normed, kept = combine_norm(head.tensors, head._weights(), scale=scale, with_total=with_total)
        return total, normed, (again or kept)

    def _short(self) -> tuple[Stream, tuple[Tensor, ...]]:
        """(the stream with as many activations as a kernel takes, what `sum` and `norm` return again if it is cut)."""
        stream = self
        while len(stream.tensors) > MAX_STREAMS:
            weights = stream._weights()
            head, _ = combine(stream.tensors[:MAX_STREAMS], weights[:MAX_STREAMS])
            rest = torch.cat([torch.ones_like(weights[:1]), weights[MAX_STREAMS:]])
            stream = Stream((head, *stream.tensors[MAX_STREAMS:]), rest)
        return stream, () if stream is self else self.tensors

    def _weights(self) -> Tensor:
        if self.coefficients is not None:
            return self.coefficients
        tensor = self.tensors[0]
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        return torch.ones(1, tensor.size(-1), dtype=wide, device=tensor.device)
