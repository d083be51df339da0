"""The residual stream as a weighted sum that is computed only when a norm reads it.

Between two matrix products every step of the network (mixing with the input embedding, joining a gated skip, crossing
lanes) is linear in its activations with one coefficient per channel. `Stream` keeps the list of activations and the
products of their coefficients; :meth:`Stream.norm` hands both to one kernel, which reads each activation once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf_kernels import combine, combine_norm
from pgolf_kernels.residual import MAX_STREAMS


@dataclass(frozen=True)
class Stream:
    """sum_k coefficients[k] * tensors[k]; tensors [..., D], each coefficient [D] in fp32, or None for one."""

    tensors: tuple[Tensor, ...]
    coefficients: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, tensor: Tensor, coefficient: Tensor | None = None) -> Stream:
        return cls((tensor,), (coefficient,))

    def scaled(self, factor: Tensor | float) -> Stream:
        """`factor` ([D], [] or a number) times the stream."""
        return Stream(
            self.tensors, tuple(_one(c, t) * factor for c, t in zip(self.coefficients, self.tensors, strict=True))
        )

    def plus(self, other: Stream) -> Stream:
        """The sum of two streams; an activation that both hold is kept once."""
        tensors, coefficients = list(self.tensors), list(self.coefficients)
        for tensor, coefficient in zip(other.tensors, other.coefficients, strict=True):
            position = next((i for i, present in enumerate(tensors) if present is tensor), None)
            if position is None:
                tensors.append(tensor)
                coefficients.append(coefficient)
            else:
                coefficients[position] = _one(coefficients[position], tensor) + _one(coefficient, tensor)
        return Stream(tuple(tensors), tuple(coefficients))

    def norm(self, scale: float) -> tuple[Tensor, Tensor, Stream]:
        """(u, n, again): the stream as one activation, scale * RMSNorm of it, and the stream itself.

        Activations that are used once more are best taken from `again` (in the order of `tensors`): gradients of those
        uses are then added by the kernel that computes this sum's.
        """
        stream = self
        while len(stream.tensors) > MAX_STREAMS:
            head = combine(stream.tensors[:MAX_STREAMS], stream._stack(slice(0, MAX_STREAMS)))
            stream = Stream((head, *stream.tensors[MAX_STREAMS:]), (None, *stream.coefficients[MAX_STREAMS:]))
        total, normed, again = combine_norm(stream.tensors, stream._stack(slice(None)), scale=scale)
        kept = Stream(again, stream.coefficients) if stream is self else self
        return total, normed, kept

    def _stack(self, part: slice) -> Tensor:
        return torch.stack([_one(c, t) for c, t in zip(self.coefficients[part], self.tensors[part], strict=True)])


def _one(coefficient: Tensor | None, tensor: Tensor) -> Tensor:
    if coefficient is not None:
        return coefficient
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.ones(tensor.size(-1), dtype=wide, device=tensor.device)
