"""What the kernels of fp8_mlp.py compute, in PyTorch: the same numbers in the same places, for the CPU and for tests.

A matrix in FP8 is e4m3 numbers times one scale, a power of two, so that scaling rounds nothing. A facts tensor [4] has
the scale first; of an operand then the largest squared norm and the mean norm of its rows, of hidden values then the
bound that their scale was chosen for. What else it holds nobody reads, and on a GPU nobody writes.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
MOST = 448.0  # the largest e4m3 number
SMALLEST_SCALE = 2.0**-80  # of a matrix of zeros; its root and its inverse are numbers
BLOCK = 128
LIMIT = 2.0**13  # of a product's squares, in units of their mean where rows do not know of each other

Operand: TypeAlias = tuple[Tensor, Tensor, Tensor]  # as it lies [R, C], transposed [C, R'], facts


def padded(size: int) -> int:
    """The multiple of BLOCK that covers `size`."""
    return -(-size // BLOCK) * BLOCK


def in_order(x: Tensor) -> Tensor:
    """The last dimension, filled up with zeros to a multiple of 128, with each 128 in the kernels' order.

    Number 64 b + 16 a + 8 j + i (a < 4, i < 8) stands at place 32 a + 4 i + 2 b + j. Where it is used, both operands
    of a product have their common dimension in this order, so that no result does.
    """
    x = F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, 2, 4, 2, 8))
    return x.movedim((-3, -1), (-4, -3)).flatten(-5)


def out_of_order(x: Tensor) -> Tensor:
    """The inverse of in_order; the zeros stay."""
    return x.unflatten(-1, (-1, 4, 8, 2, 2)).movedim((-4, -3), (-3, -1)).flatten(-5)


def scale_of(largest: Tensor) -> Tensor:
    """The power of two whose MOST multiples reach `largest`."""
    bits = (largest / MOST).clamp_min(SMALLEST_SCALE).view(torch.int32)
    return ((bits + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def _cast(x: Tensor) -> Tensor:
    """Saturating, as the GPU casts; not a number stays none."""
    return x.clamp(-MOST, MOST).to(E4M3).contiguous()


def _both(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, F] along rows [N, F'] and transposed [F, N'], each in order."""
    return _cast(in_order(x)), _cast(in_order(x.t()))


def operand(x: Tensor) -> Operand:
    """x [R, C] as it lies [R, C] and transposed [C, R'], the latter with rows in order, and facts."""
    x = x.to(torch.bfloat16).float()
    norms = x.square().sum(1)
    largest, longest = (t.nan_to_num(0.0, torch.inf).amax() for t in (x.abs(), norms))  # as the kernels' maximum
    facts = torch.stack([scale_of(largest), longest, norms.sqrt().mean(), norms.new_zeros(())])
    x = x / facts[0]
    return _cast(x), _cast(in_order(x.t())), facts


def bound_of_squares(a_facts: Tensor, b_facts: Tensor, depth: int) -> Tensor:
    """Of the squares of a product's elements: what the longest rows can reach, or what is let through at most."""
    return torch.fmin(a_facts[1] * b_facts[1], (a_facts[2] * b_facts[2]).square() * (LIMIT / depth))


def _bits() -> Tensor:
    """Place 32 a + 8 q + 4 e + k of 128 has its sign in word q: the number of the bit, [4, 1, 2, 4] (a, q, e, k)."""
    a, e, k = torch.arange(4), torch.arange(2), torch.arange(4)
    return 8 * k + 7 - 2 * a.view(4, 1, 1, 1) - e.view(2, 1)


def up(x: Tensor, x_facts: Tensor, w: Tensor, w_facts: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden [N, F'], the same transposed [F, N'], signs [F' / 128, N, 4], facts) of x [N, D] and W_up [F, D]."""
    bound = max(slope, 1.0) ** 2 * bound_of_squares(x_facts, w_facts, x.shape[1])
    scale = scale_of(bound)
    u = x.float() @ w.float().t()
    leaky = F.leaky_relu(u, slope) * (x_facts[0] * w_facts[0] * scale.rsqrt())
    negative = in_order((u < 0).long()).view(len(u), -1, 4, 4, 2, 4)
    words = (negative << _bits()).sum((2, 4, 5))
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    facts = torch.stack([scale, bound, *bound.new_zeros(2)])
    return *_both(leaky.square()), words.transpose(0, 1).contiguous(), facts


def grad_pre(
    g: Tensor, g_facts: Tensor, w: Tensor, w_facts: Tensor, hidden: Tensor, negative: Tensor, hidden_facts: Tensor,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(gradient of u [N, F'], the same transposed [F, N'], facts) of g [N, D_out], W_down^T [F, D_out] and what up
    gave."""
    bound = hidden_facts[1].sqrt() * bound_of_squares(g_facts, w_facts, g.shape[1]).sqrt()
    scale = scale_of(2 * max(slope, 1.0) * bound)
    factor = 2 * hidden_facts[0].sqrt() * (g_facts[0] * w_facts[0] / scale)
    signs = (negative.transpose(0, 1)[:, :, None, :, None, None] >> _bits()).bitwise_and(1).bool().flatten(1)
    root = out_of_order(hidden.float().sqrt() * torch.where(signs, -slope * factor, factor))
    product = g.float() @ w.float().t()
    facts = torch.stack([scale, *scale.new_zeros(3)])
    return *_both(product * root[:, : product.shape[1]]), facts
