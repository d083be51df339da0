"""Adapters of the documents that adapt at the same time, with their optimiser, in a fixed set of slots.

A slot is handed to the next document when one is finished: A gets that document's own initial values, B and the
moments become zero. The initial values depend on (seed, document, kind, layer slot) alone, through a counter-based
generator in integer arithmetic, so they are the same on every device and for every schedule:

    A ~ U(-1/sqrt(in), 1/sqrt(in)),  B = 0                      (pull request 1530)

With AdamW the layers' adapters are stepped in the backward pass (pgolf_kernels/stepped_lora.py). What remains, the
logits' adapter and everything under SGD, gets gradients and a step after the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import KINDS, Adapters
from model.config import EvalConfig, ModelConfig
from pgolf_kernels import AdamStep, LoraPass, SteppedLora, adapter_adamw, stepped_lora

ADAM_EPS = 1e-10  # of the public systems' test-time optimiser
InitialA = Callable[[str, np.ndarray], Tensor]  # (kind, documents [n]) -> A [slots, n, r, in]

# splitmix64 (Steele, Lea, Flood 2014), as signed 64-bit integers
_STEP = -7046029254386353131
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685
_DOCUMENTS_AT_ONCE = 8
_GROUPS = (("q", "k", "v", "o"), ("mlp",))  # adapters of one input


def adapter_kinds(config: EvalConfig) -> tuple[str, ...]:
    """The adapters that are switched on."""
    off = {"k": not config.ttt_k_lora, "o": not config.ttt_o_lora, "mlp": not config.ttt_mlp_lora}
    return tuple(kind for kind in KINDS if not off.get(kind, False))


def uniform(keys: Tensor, count: int) -> Tensor:
    """Uniform fp32 values in [0, 1) from a counter: [*keys.shape, count] for int64 `keys`."""
    state = keys.unsqueeze(-1) + _STEP * torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    return (_mix(state) >> 40 & 0xFFFFFF).float() * 2.0**-24


def document_keys(seed: int, documents: Tensor, *parts: Tensor | int) -> Tensor:
    """One int64 key for each combination of a document and the further numbers (broadcast against each other)."""
    key = documents
    for part in (seed, *parts):
        number = torch.as_tensor(part, dtype=torch.int64, device=documents.device)
        key = _mix(key + _STEP * (number + 1))  # as tensors, so that the product wraps
    return key


def _mix(z: Tensor) -> Tensor:
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * _MIX1
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * _MIX2
    return z ^ (z >> 31 & 0x1FFFFFFFF)


class SteppingAdapters(Adapters):
    """Adapters of which those in `groups` (kinds -> their SteppedLora) take their step in the backward pass."""

    def __init__(
        self,
        a: dict[str, Any],
        b: dict[str, Any],
        groups: dict[tuple[str, ...], SteppedLora],
        through: LoraPass,
        tail: LoraPass,
    ) -> None:
        super().__init__(a, b, cu_seqlens=through.cu_seqlens, tail_cu_seqlens=tail.cu_seqlens)
        self._groups, self._through, self._tail = groups, through, tail

    def attention(
        self,
        slot: int,
        x: Tensor,
        weights: tuple[Tensor, Tensor, Tensor],
        residual: Tensor | None,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        kinds = next((kinds for kinds in self._groups if "q" in kinds), None)
        if kinds is None:
            return super().attention(slot, x, weights, residual, scale)
        flat = x.reshape(-1, x.size(-1))
        by_kind: dict[str, Tensor] = dict(zip("qkv", weights, strict=True))
        added = None if residual is None else residual.reshape(-1, residual.size(-1))
        adapted, _ = stepped_lora(
            flat,
            [by_kind.get(kind) for kind in kinds],
            self._groups[kinds][slot],
            self._through,
            residuals=[added if kind == "o" else None for kind in kinds],
            out_scales=[scale if kind == "o" else None for kind in kinds],
        )
        outputs = {kind: F.linear(flat, by_kind[kind]) for kind in by_kind if kind not in kinds}
        outputs.update(zip(kinds, adapted, strict=True))
        q, k, v = (outputs[kind].view(*x.shape[:-1], -1) for kind in by_kind)
        return q, k, v, outputs.get("o", residual)

    def mlp(
        self, slot: int, x: Tensor, residual: Tensor | None, scale: Tensor, *, tail: bool = False
    ) -> tuple[Tensor | None, Tensor]:
        group, through = self._groups.get(("mlp",)), self._tail if tail else self._through
        if group is None:
            return super().mlp(slot, x, residual, scale, tail=tail)
        added = None if residual is None else residual.reshape(-1, residual.size(-1))
        flat = x.reshape(-1, x.size(-1))
        (y,), again = stepped_lora(flat, [None], group[slot], through, residuals=[added], out_scales=[scale])
        return y, again


class AdapterBank:
    """`slots` sets of adapters for a model in layer order of `layer_slots` positions, and one optimiser for all.

    `dtype` is the adapters', `compute_dtype` the activations'.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EvalConfig,
        *,
        layer_slots: int,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        seed: int = 0,
        initial_a: InitialA | None = None,
    ) -> None:
        self.config, self.slots, self.device, self.seed = config, slots, device, seed
        self._initial_a = initial_a
        kinds = adapter_kinds(config)
        zeros = Adapters.zeros(model, layer_slots, slots, config.ttt_lora_rank, kinds, device, dtype)
        self.a, self.b = zeros.a, zeros.b  # [layer slots, slots, r, in] and [layer slots, slots, out, r]
        keeps_mean = config.ttt_beta1 > 0
        # A rerun loop passes layers twice with the same adapters: their gradient is whole only after the backward pass.
        steps_inside = config.ttt_optimizer == "adam" and model.loop_form != "rerun"
        groups = [tuple(kind for kind in group if kind in kinds) for group in _GROUPS] if steps_inside else []
        self._groups = {
            group: SteppedLora(
                [self.a[kind] for kind in group], [self.b[kind] for kind in group], dtype=compute_dtype, mean=keeps_mean
            )
            for group in groups
            if group
        }
        own = [kind for kind in kinds if not any(kind in group for group in groups)]
        # One leaf for each layer slot: the gradient of a stacked tensor would be assembled from full-size pieces.
        self._leaves_a: dict[str, Any] = {**self.a, **{kind: _leaves(self.a[kind]) for kind in own}}
        self._leaves_b: dict[str, Any] = {**self.b, **{kind: _leaves(self.b[kind]) for kind in own}}
        self.leaves = [leaf for kind in own for leaf in (*self._leaves_a[kind], *self._leaves_b[kind])]
        stacked = [tensor for kind in own for tensor in (self.a[kind], self.b[kind])]
        squares = [torch.zeros_like(tensor) for tensor in stacked] if config.ttt_optimizer == "adam" else []
        means = [torch.zeros_like(tensor) for tensor in stacked] if keeps_mean else []
        self._zeroed = [*(self.b[kind] for kind in own), *squares, *means]  # on handing a slot over
        self._squares = [part for tensor in squares for part in tensor]
        self._means = [part for tensor in means for part in tensor]

    def open_pass(self, cu_seqlens: Tensor, steps: Tensor | None) -> LoraPass:
        """A pass over a packed row whose document i is read by slot i; None: without an optimiser step.

        `steps` int64 [slots] counts a slot's steps from 1, 0 where it takes none.
        """
        if steps is None:
            return LoraPass(cu_seqlens)
        config = self.config
        numbers = {
            "lr": config.ttt_lora_lr, "beta1": config.ttt_beta1, "beta2": config.ttt_beta2, "eps": ADAM_EPS,
            "weight_decay": config.ttt_weight_decay,
        }  # fmt: skip
        return LoraPass(cu_seqlens, AdamStep(steps, **numbers))

    def adapters(self, through: LoraPass, tail_cu_seqlens: Tensor) -> Adapters:
        """The adapters for a pass; indexed by layer slot, as stacked tensors are. `tail_cu_seqlens`: see model.gpt."""
        tail = through.over(tail_cu_seqlens)
        return SteppingAdapters(self._leaves_a, self._leaves_b, self._groups, through, tail)

    @torch.no_grad()
    def hand_over(self, slots: np.ndarray, documents: np.ndarray) -> None:
        """Gives slots to documents: fresh A, zero B and moments."""
        for first in range(0, len(slots), _DOCUMENTS_AT_ONCE):
            part = slice(first, first + _DOCUMENTS_AT_ONCE)
            rows = torch.from_numpy(slots[part]).to(self.device)
            for kind, values in self._first_a(documents[part]).items():
                self.a[kind][:, rows] = values.to(self.a[kind])
            for group in self._groups.values():
                group.hand_over(rows)
        rows = torch.from_numpy(slots).to(self.device)
        for tensor in self._zeroed:
            tensor.index_fill_(1, rows, 0.0)

    def learn(self, loss: Tensor, through: LoraPass) -> None:
        """The backward pass of a loss that came through `adapters(through)`, and one optimiser step."""
        step = through.step
        assert step is not None, "opened without steps"
        grads = through.backward(loss, self.leaves)
        with torch.no_grad():
            if self.config.ttt_optimizer == "adam":
                self._adam(grads, step)
            else:
                self._sgd(grads, step.steps)

    def _adam(self, grads: tuple[Tensor, ...], step: AdamStep) -> None:
        adapter_adamw(
            [leaf.detach().unsqueeze(0) for leaf in self.leaves],
            [grad.unsqueeze(0) for grad in grads],
            [square.unsqueeze(0) for square in self._squares],
            step.steps,
            exp_avgs=[mean.unsqueeze(0) for mean in self._means] if step.beta1 > 0 else None,
            lr=step.lr,
            beta1=step.beta1,
            beta2=step.beta2,
            eps=step.eps,
            weight_decay=step.weight_decay,
        )

    def _sgd(self, grads: tuple[Tensor, ...], steps: Tensor) -> None:
        config = self.config
        runs = (steps > 0).to(self.leaves[0].dtype).view(-1, 1, 1)
        for i, (leaf, grad) in enumerate(zip(self.leaves, grads, strict=True)):
            direction = torch.add(grad, leaf.detach(), alpha=config.ttt_weight_decay)
            if self._means:
                direction = self._means[i].mul_(config.ttt_beta1).add_(direction)
            leaf.detach().sub_(direction * (runs * config.ttt_lora_lr))

    def _first_a(self, documents: np.ndarray) -> dict[str, Tensor]:
        """A of each kind for new documents, [layer slots, n, r, in]; all kinds are drawn in one go."""
        if self._initial_a is not None:
            return {kind: self._initial_a(kind, documents) for kind in self.a}
        counts = [len(a) for a in self.a.values()]
        rank, features = next(iter(self.a.values())).shape[2:]  # every adapter reads the model's width
        kinds = torch.cat([torch.full((n,), KINDS.index(kind)) for kind, n in zip(self.a, counts, strict=True)])
        layers = torch.cat([torch.arange(n) for n in counts])
        document = torch.from_numpy(np.asarray(documents, np.int64)).to(self.device)
        keys = document_keys(self.seed, document, kinds.unsqueeze(1), layers.unsqueeze(1))
        values = (uniform(keys, rank * features) * 2 - 1).mul_(1.0 / math.sqrt(features))
        parts = values.view(-1, len(documents), rank, features).split(counts)
        return dict(zip(self.a, parts, strict=True))


def _leaves(stacked: Tensor) -> list[Tensor]:
    return [part.detach().requires_grad_() for part in stacked]
