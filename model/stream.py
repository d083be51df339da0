"""The residual stream as a weighted sum that is computed only when a norm reads it.

Between two matrix products every step of the network (mixing with the input embedding, adding a scaled branch, joining
a gated skip, crossing lanes) is linear in its activations with one coefficient per channel. `Stream` keeps the list of
activations and the products of their coefficients; :meth:`Stream.norm` hands both to one kernel, which reads each
activation once.
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

    def scaled(self, factor: Tensor) -> Stream:
        """`factor` [D] or scalar times the stream."""
        dim = self.tensors[0].size(-1)
        scaled = (factor.expand(dim) if c is None else factor * c for c in self.coefficients)
        return Stream(self.tensors, tuple(scaled))

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

    def norm(self, scale: float) -> tuple[Stream, Tensor]:
        """(the stream as one activation, scale * RMSNorm of it)."""
        stream = self
        while len(stream.tensors) > MAX_STREAMS:
            head = combine(stream.tensors[:MAX_STREAMS], stream._stack(slice(0, MAX_STREAMS)))
            stream = Stream((head, *stream.tensors[MAX_STREAMS:]), (None, *stream.coefficients[MAX_STREAMS:]))
        total, normed = combine_norm(stream.tensors, stream._stack(slice(None)), scale=scale)
        return Stream.of(total), normed

    def _stack(self, part: slice) -> Tensor:
        return torch.stack([_one(c, t) for c, t in zip(self.coefficients[part], self.tensors[part], strict=True)])


def _one(coefficient: Tensor | None, tensor: Tensor) -> Tensor:
    if coefficient is not None:
        return coefficient
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.ones(tensor.size(-1), dtype=wide, device=tensor.device)
