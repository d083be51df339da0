"""The kernels of a training step as one writes them in PyTorch: ablation.py puts them in the kernels' place.

They take what a training step passes, and work in the activations' dtype as the public systems do, with the statistics
of norms and the loss in fp32. Nothing is written in place and nothing is returned as an alias: sums of gradients that a
kernel makes in passing are autograd's here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.bench_softcap_ce import loss_of
from model.layers import rms_norm
from model.stream import Stream
from pgolf_kernels import fused_mlp, varlen_attention
from pgolf_kernels.qk_rope import reference as qk_rope

# ---- MLP -------------------------------------------------------------------------------------------------------------


def mlp(
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    negative_slope: float,
    hidden_gain: Tensor | None,
    residual: Tensor | None,
    in_place: bool,
) -> Tensor:
    hidden = F.leaky_relu(F.linear(x, w_up), negative_slope).square()
    if hidden_gain is not None:
        hidden = hidden * hidden_gain.to(hidden.dtype)
    y = F.linear(hidden, w_down)
    return y if residual is None else residual + y


# ---- head ------------------------------------------------------------------------------------------------------------


def head(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, **options: Any) -> Tensor:
    rest = {"reduction": "mean", "temperature": 1.0, "lora_a": None, "lora_b": None, "doc_ids": None, "hints": None}
    assert options == rest, "a training step has no adapters, hints or temperature"
    return loss_of(F.linear(hidden, weight), targets, softcap)


# ---- residual stream -------------------------------------------------------------------------------------------------


def combine(streams: Sequence[Tensor], coefficients: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    first, *rest = (c * s for c, s in zip(coefficients.to(streams[0].dtype), streams, strict=True))
    return sum(rest, start=first), tuple(streams)


def combine_norm(
    streams: Sequence[Tensor], coefficients: Tensor, *, scale: float, with_total: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    total, again = combine(streams, coefficients)
    return total, norm_residual(total, scale=scale)[0], again


def norm_residual(x: Tensor, *, scale: float = 1.0, overwritten: bool = False) -> tuple[Tensor, Tensor]:
    normed = rms_norm(x)
    return normed if scale == 1 else scale * normed, x


def replaced(stream: Stream, old: Sequence[Tensor], new: Sequence[Tensor]) -> Stream:
    """Activations come back as they were: there is nothing to replace (and torch.compile knows no `id`)."""
    return stream


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Not in place: autograd keeps what the plain norm has read, which is `total`."""
    return total + F.linear(x, weight)


def fused_mlp_beside(*inputs: Tensor, in_place: bool, **options: Any) -> Any:
    """The kernel, its sum not in place for the same reason."""
    return fused_mlp(*inputs, **options)


# ---- attention -------------------------------------------------------------------------------------------------------


def qkv_rope(
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    kv_heads: int,
    key_readers: int,
    value_readers: int,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    heads = [gain.numel(), kv_heads, kv_heads]
    q, k, v = F.linear(x, weight).unflatten(-1, (sum(heads), -1)).split(heads, dim=-2)
    q, k = qk_rope(q, k, gain, cos, sin, eps)
    return q, (k,) * key_readers, (v,) * value_readers


def attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *bounds: Any) -> Tensor:
    """Keys and values once for grouped heads, as the backends take them."""
    return varlen_attention(q, keys[0], values[0], *bounds)


# ---- embedding -------------------------------------------------------------------------------------------------------


def embedding(ids: Tensor, table: Tensor, *, dtype: Any) -> Tensor:
    return F.embedding(ids, table.to(dtype))
