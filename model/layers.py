"""Small pieces of the network that have no kernel of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig

BIGRAM_MULTIPLIERS = (36313, 27191)  # of the token and of the one before it (pull request 1499)


def norm_epsilon(dtype: torch.dtype) -> float:
    """The epsilon of every RMSNorm: 1.19e-7 in every dtype but fp64, where it is fp64's own.

    That is what `torch.nn.functional.rms_norm` takes for `eps=None` since torch 2.8; older versions took bf16's own.
    """
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, with no weight."""
    return F.rms_norm(x, (x.size(-1),), eps=norm_epsilon(x.dtype))


def add_linear_(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total + x W^T, written over `total`: the product's accumulator starts from it without a copy.

    total [..., out] and x [..., in], not in one memory, weight [out, in]. In place on a view, autograd would copy the
    gradient three times.
    """
    return _AddLinear.apply(total, x, weight)


class _AddLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mark_dirty(total)
        total.view(-1, weight.size(0)).addmm_(x.reshape(-1, weight.size(1)), weight.t())
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, weight.size(0))
        d_x = (flat @ weight).view_as(x) if ctx.needs_input_grad[1] else None
        d_weight = flat.t() @ x.reshape(-1, weight.size(1)) if ctx.needs_input_grad[2] else None
        return grad, d_x, d_weight


def rope_tables(length: int, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [length, rope_dims / 2] of position * base^(-2i / rope_dims).

    With `rope_rescale`, a length over `rope_train_seq_len` by a factor s takes base * s^(d / (d - 2)), d = rope_dims.
    """
    dims = config.rope_dims
    base = config.rope_base
    if config.rope_rescale and length > config.rope_train_seq_len and dims > 2:
        base *= (length / config.rope_train_seq_len) ** (dims / (dims - 2))
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, dims, 2, dtype=table_dtype, device=device) / dims
    angles = torch.outer(torch.arange(length, dtype=table_dtype, device=device), 1.0 / base**exponents)
    return angles.cos(), angles.sin()


def document_starts(cu_seqlens: Tensor | None, rows: int, length: int, device: torch.device) -> Tensor:
    """Mask [rows, length]: True where a document begins (`cu_seqlens` cuts the one packed row) or a row does."""
    if cu_seqlens is None:
        return (torch.arange(length, device=device) == 0).expand(rows, length)
    mask = torch.zeros(rows * length + 1, dtype=torch.bool, device=device)  # padded ends fall on the extra element
    mask[cu_seqlens.long()] = True
    return mask[:-1].view(rows, length)


def bigram_index(input_ids: Tensor, starts: Tensor, table_size: int) -> Tensor:
    """Row of the bigram table for each token: (36313 t_i xor 27191 t_{i-1}) mod (size - 1); the last row at starts.

    Products wrap as int32 ones do (pull request 1499).
    """
    ids = input_ids.to(torch.int32)
    previous = torch.roll(ids, 1, dims=-1)
    hashed = (BIGRAM_MULTIPLIERS[0] * ids) ^ (BIGRAM_MULTIPLIERS[1] * previous)
    return torch.where(starts, table_size - 1, torch.remainder(hashed, table_size - 1)).long()


def smear(x: Tensor, gate: Tensor, starts: Tensor) -> Tensor:
    """(1 - g) x_t + g x_{t-1} with g = sigmoid(gate) per dimension and x_{-1} = 0 (pull request 1499)."""
    g = torch.sigmoid(gate).to(x.dtype)
    previous = torch.roll(x, 1, dims=-2).masked_fill(starts.unsqueeze(-1), 0.0)
    return (1 - g) * x + g * previous


def fake_quantize(weight: Tensor, clip_range: int) -> Tensor:
    """Straight-through round to `clip_range` levels of |row|_max (late QAT of pull request 1499)."""
    exact = weight.float() if weight.dtype in (torch.bfloat16, torch.float16) else weight
    scale = (exact.abs().amax(dim=-1, keepdim=True) / clip_range).clamp_min(1e-12)
    rounded = (torch.round(exact / scale).clamp(-clip_range, clip_range) * scale).to(weight.dtype)
    return weight + (rounded - weight).detach()


def attention_without_self(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Causal attention with the token's own share taken out: sum over s < t of p_ts v_s (pull request 1499).

    q [B, T, H, d], k and v [B, T, Hkv, d], starts [B, T] marks where documents begin. The softmax still runs over
    s <= t, so the weights sum to less than one. T x T weights are held: this is the legacy form.
    """
    group = q.size(2) // k.size(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    document = starts.cumsum(dim=-1)
    visible = (document.unsqueeze(-1) == document.unsqueeze(-2)).tril().unsqueeze(1)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    accumulate = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1, dtype=accumulate).to(v.dtype)
    own = torch.diagonal(weights, dim1=-2, dim2=-1).unsqueeze(-1)
    return (weights @ v - own * v).transpose(1, 2)
