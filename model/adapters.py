"""Low-rank adapters of a batch of documents, for test-time training.

An adapter of kind k at slot s adds (x A^T) B^T to a projection's output, with its own A [r, in] and B [out, r] for
each document. A slot is a position in the layer order (a looped layer has one per pass). Adapters of q, k and v join
their projections; "o" and "mlp" read the branch's normed input and join its output; "lm_head" joins the logits before
the softcap (pull request 1530). One adapter may also serve every row of the batch (pull request 1499).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.config import ModelConfig
from pgolf_kernels import batched_lora, batched_lora_multi

KINDS = ("q", "k", "v", "o", "mlp", "lm_head")


def adapter_shapes(config: ModelConfig, kind: str) -> tuple[int, int]:
    """(in, out) features of an adapter."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
    out = {"k": config.kv_dim, "v": config.kv_dim, "lm_head": config.vocab_size}.get(kind, config.model_dim)
    return config.model_dim, out


@dataclass
class Adapters:
    """`a[kind]` [slots, B, r, in] and `b[kind]` [slots, B, out, r]; "lm_head" has one slot.

    `index` [documents], int64, picks the adapter of each row of the batch when rows are fewer than adapters or in
    another order; None: row i has adapter i, or all rows share the one there is.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    index: Tensor | None = None
    cu_seqlens: Tensor | None = field(default=None)  # documents of a packed row; None: one document per row
    tail_cu_seqlens: Tensor | None = field(default=None)  # the same of the rows that a pass wants results of

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        slots: int,
        batch: int,
        rank: int,
        kinds: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
    ) -> Adapters:
        """All-zero adapters; `draw` gives A its initial values."""
        a, b = {}, {}
        for kind in kinds:
            features, out = adapter_shapes(config, kind)
            count = 1 if kind == "lm_head" else slots
            a[kind] = torch.zeros(count, batch, rank, features, device=device, dtype=dtype)
            b[kind] = torch.zeros(count, batch, out, rank, device=device, dtype=dtype)
        return cls(a, b)

    def tensors(self) -> Iterator[Tensor]:
        """Every A and B, in a fixed order."""
        for kind in self.a:
            yield self.a[kind]
            yield self.b[kind]

    def draw(self, row: int, generator: torch.Generator) -> None:
        """A of one document ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0; `generator` lives on the CPU."""
        for kind, a in self.a.items():
            bound = 1.0 / math.sqrt(a.size(-1))
            for slot in range(a.size(0)):
                values = torch.empty(a.shape[2:], dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                a[slot, row].copy_(values)
            self.b[kind][:, row].zero_()

    def requires_grad_(self, value: bool = True) -> Adapters:
        for tensor in self.tensors():
            tensor.requires_grad_(value)
        return self

    def pair(self, kind: str, slot: int) -> tuple[Tensor, Tensor]:
        return self.a[kind][slot], self.b[kind][slot]

    def attention(
        self,
        slot: int,
        x: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        residual: Tensor | None,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(q, k, v, total): the three projections of x, each with its adapter where there is one, and `residual` plus
        `scale` [out] times the share that "o" has of x; total is `residual` itself without that adapter.

        total may come with x's leading dimensions as one.
        """
        places = dict(zip("qkv", weights, strict=True)) | ({"o": None} if "o" in self.a else {})
        pairs = [self.pair(kind, slot) if kind in self.a else (None, None) for kind in places]
        flat = self._flatten(x)
        added = {} if residual is None else {"o": residual.reshape(*flat.shape[:-1], -1)}
        factors = {"o": scale}
        outputs = batched_lora_multi(
            flat,
            list(places.values()),
            [a for a, _ in pairs],
            [None if b is None else _scaled(b, factors.get(kind)) for kind, (_, b) in zip(places, pairs, strict=True)],
            residuals=[added.get(kind) for kind in places],
            cu_seqlens=self.cu_seqlens,
            adapter_index=self.index,
        )
        q, k, v, *total = (y.view(*x.shape[:-1], y.size(-1)) for y in outputs)
        return q, k, v, total[0] if total else residual

    def mlp(
        self, slot: int, x: Tensor, residual: Tensor | None, scale: Tensor, *, tail: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        """(total, x): `residual` plus `scale` [out] times the share that "mlp" has of x, or `residual` itself without
        that adapter; and x for the branch. Both may come with x's leading dimensions as one. `tail`: x holds the rows
        of `tail_cu_seqlens`."""
        if "mlp" not in self.a:
            return residual, x
        bounds = self.tail_cu_seqlens if tail else self.cu_seqlens
        return self._add("mlp", slot, x, residual, scale, bounds), x

    def logits(self, x: Tensor, raw: Tensor) -> Tensor:
        """`raw`, the logits of x, plus their adapter's share where there is one."""
        return self._add("lm_head", 0, x, raw, None, self.cu_seqlens) if "lm_head" in self.a else raw

    def _add(
        self, kind: str, slot: int, x: Tensor, residual: Tensor | None, scale: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        a, b = self.pair(kind, slot)
        flat = self._flatten(x)
        if residual is not None:
            residual = residual.reshape(*flat.shape[:-1], residual.size(-1))
        y = batched_lora(
            flat, None, a, _scaled(b, scale), residual=residual, cu_seqlens=cu_seqlens, adapter_index=self.index
        )
        return y.view(*x.shape[:-1], y.size(-1))

    def head(self) -> tuple[Tensor | None, Tensor | None]:
        """(A [B, r, D], B [B, V, r]) of the logits' adapter, or (None, None)."""
        return self.pair("lm_head", 0) if "lm_head" in self.a else (None, None)

    def document_ids(self, rows: int, length: int, device: torch.device) -> Tensor:
        """Adapter of every position of a [rows, length] batch, flattened: int64 [rows * length]."""
        if self.cu_seqlens is not None:
            positions = torch.arange(rows * length, device=device)
            documents = torch.searchsorted(self.cu_seqlens[1:].long().contiguous(), positions, right=True)
        else:
            documents = torch.arange(rows, device=device).repeat_interleave(length)
            if self._shared:
                documents = torch.zeros_like(documents)
        return documents if self.index is None else self.index[documents]

    @property
    def _shared(self) -> bool:
        return self.index is None and self.cu_seqlens is None and next(iter(self.a.values())).size(1) == 1

    def _flatten(self, x: Tensor) -> Tensor:
        if self.cu_seqlens is not None:
            return x.reshape(-1, x.size(-1))
        return x.reshape(1, -1, x.size(-1)) if self._shared else x


def _scaled(b: Tensor, scale: Tensor | None) -> Tensor:
    """B with a factor for each output."""
    return b if scale is None else b * scale.to(b.dtype).unsqueeze(-1)
