"""The network: one GPT for training, scoring and test-time training of all five reference systems.

    x0 = RMSNorm(E[t])                                              (+ bigram embedding, smear gate: pull request 1499)
    block l:  h = m0 x + m1 x0;  n = RMSNorm(h) / sqrt(l + 1)
              y = h + a * Attention(n);  x' = y + b * MLP(RMSNorm(y) / sqrt(l + 1))
    loss = cross entropy of softcap * tanh(RMSNorm(x) E^T / softcap)

Layers run in `ModelConfig.layer_order(loop)`: the first half pushes its outputs on a stack, the second half pops one
before each block (`skip_form`). From block `parallel_start` on, attention and MLP read the same input (one lane,
pull request 1514) or a lane each (two lanes, pull requests 1530 and 1727). Weights of a kind are stacked into one
parameter ("bank"), so that the optimiser sees a few large tensors.

Activations have the dtype of `compute_dtype`; parameters stay fp32 and are cast once a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.adapters import Adapters
from model.config import ModelConfig
from model.layers import (
    add_linear_,
    attention_without_self,
    bigram_index,
    document_starts,
    fake_quantize,
    norm_epsilon,
    rms_norm,
    rope_tables,
    smear,
)
from model.stream import Stream
from pgolf_kernels import (
    embedding,
    fp8_mlp,
    fused_mlp,
    linear_softcap_cross_entropy,
    norm_residual,
    qk_rope_readers,
    qkv_rope,
    varlen_attention,
    xsa,
)
from pgolf_kernels.qk_rope import split_projections

Collect = Callable[[tuple[str, ...], Tensor], None]
LANE_RESIDUAL_INIT = 1.1
VALUE_RESIDUAL_INIT = (0.95, 0.05)
QAT_MIN_ELEMENTS = 8192


@dataclass
class _Weights:
    """One layer's matrices in the compute dtype; o and down carry the branch's scale in their rows."""

    qkv: Tensor  # one below the other
    o: Tensor
    up: Tensor
    down: Tensor


@dataclass
class Operands:
    """What a call makes of the parameters' matrices: calls between which these rest may share one."""

    table: Tensor  # rows that tokens read
    head: Tensor
    layers: list[_Weights]

    def __iter__(self) -> Iterator[Tensor]:
        yield from (self.table, self.head)
        for weights in self.layers:
            yield from vars(weights).values()

    @torch.no_grad()
    def copy_(self, other: Operands) -> None:
        """Takes the other's values, where this one's lie: recorded calls read them there."""
        torch._foreach_copy_(list(self), list(other))


@dataclass
class _Mixing:
    """Coefficients of the residual stream, one row a stream, and gains, in fp32."""

    reads: tuple[Tensor, ...]  # by layer [2, D]: of the input embedding and of the stream
    gates: tuple[Tensor, ...]  # by skip [D]: of the stream where a skip joins; none for additive skips
    skips: tuple[Tensor, ...]  # by skip [D]: of the skip
    lanes: tuple[Tensor, ...]  # by layer [2, 3, D]: for each lane, of itself, attention and MLP
    gains: tuple[Tensor, ...]  # by layer [H]: of the queries


@dataclass(frozen=True)
class Tail:
    """The last rows of each document of a packed row, where a call wants nothing of the others.

    Then the last block asks for attention, and computes its output and the MLP, for these alone; what comes before
    attention it computes for all rows, which give keys and values.
    """

    positions: Tensor  # int64 [n], of the rows, document by document
    cu_seqlens: Tensor  # int32, bounds of the documents on `positions`, as many as on the rows
    max_seqlen: int

    def is_even(self, documents: int) -> bool:
        """Whether it has as many rows of each of so many documents: of none are there more than max_seqlen."""
        return len(self.positions) == documents * self.max_seqlen

    def of(self, x: Tensor) -> Tensor:
        """These rows of x [1, N, ...]: [1, n, ...]."""
        return x.index_select(1, self.positions)


@dataclass
class _Pass:
    """What every block of one forward call shares."""

    weights: list[_Weights]
    mixing: _Mixing
    cos: Tensor
    sin: Tensor
    starts: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    adapters: Adapters | None
    collect: Collect | None
    tail: Tail | None
    tail_slot: int  # of the block that is computed for the tail alone
    fp8: bool
    first_value: Tensor | None = field(default=None)

    def tail_at(self, slot: int) -> Tail | None:
        return self.tail if slot == self.tail_slot else None

    def wanted(self, x: Tensor, slot: int) -> Tensor:
        """The rows of x [1, N, ...] for which this block is computed."""
        tail = self.tail_at(slot)
        return x if tail is None else tail.of(x)


class GPT(nn.Module):
    """See the module's docstring. `config` is a ModelConfig; parameters start as the reference systems' do.

    Initial values: E ~ N(0, tied_embed_init_std); q, k, v and up matrices orthogonal; o and down matrices zero; scales
    and mixes such that each block starts as the identity.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.compute_dtype = torch.float32
        self.late_qat = False  # fake-quantise the matrices (pull request 1499)
        layers, dim, hidden = config.num_layers, config.model_dim, config.hidden_dim

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        def full(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, value))

        self.tok_emb = empty(config.vocab_size, dim)
        self.qo_bank = empty(2 * layers, dim, dim)
        self.kv_bank = empty(2 * layers, config.kv_dim, dim)
        self.up_bank = empty(layers, hidden, dim)
        self.down_bank = empty(layers, dim, hidden)
        self.q_gain = full(config.qk_gain_init, layers, config.num_heads)
        self.attn_scale = full(1.0, layers, dim)
        self.mlp_scale = full(1.0, layers, dim)
        self.resid_mix = nn.Parameter(torch.stack([torch.ones(layers, dim), torch.zeros(layers, dim)], dim=1))
        self.skip_weights = full(1.0, config.num_skips, dim)
        if config.skip_form == "gated":
            self.skip_gates = full(0.0, config.num_skips, dim)
        if config.parallel_lanes == 2 and config.parallel_start >= 0:
            self.lane_mix = full(1.0, layers, 2, 2)
            self.lane_resid = full(LANE_RESIDUAL_INIT, layers, 2)
        if config.bigram_vocab_size:
            self.bigram_embed = empty(config.bigram_vocab_size, config.bigram_dim)
            self.bigram_proj = empty(dim, config.bigram_dim)
            self.bigram_scale = nn.Parameter(torch.tensor(0.05))
        if config.smear_gate:
            self.smear = full(-1.5, dim)
        if config.value_residual:
            self.v_lambda = nn.Parameter(torch.tensor(VALUE_RESIDUAL_INIT).repeat(layers - 1, 1))
        if config.hidden_gain:
            self.hidden_gain = full(1.0, layers, hidden)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the matrices from torch's default generator."""
        layers = self.config.num_layers
        nn.init.normal_(self.tok_emb, std=self.config.tied_embed_init_std)
        for layer in range(layers):
            nn.init.orthogonal_(self.qo_bank[layer])
            nn.init.orthogonal_(self.kv_bank[layer])
            nn.init.orthogonal_(self.kv_bank[layers + layer])
            nn.init.orthogonal_(self.up_bank[layer])
        nn.init.zeros_(self.qo_bank[layers:])
        nn.init.zeros_(self.down_bank)
        if self.config.bigram_vocab_size:
            nn.init.normal_(self.bigram_embed, std=0.02)
            nn.init.orthogonal_(self.bigram_proj)
            self.bigram_proj.mul_(1.0 / math.sqrt(2 * layers))

    def matrix_names(self) -> list[tuple[str, str, int | None]]:
        """(name, parameter, index in its bank) of every matrix that is quantised, the embedding last (index None)."""
        layers = self.config.num_layers
        names: list[tuple[str, str, int | None]] = []
        for i in range(layers):
            names += [
                (f"blocks.{i}.attn.q", "qo_bank", i),
                (f"blocks.{i}.attn.k", "kv_bank", i),
                (f"blocks.{i}.attn.v", "kv_bank", layers + i),
                (f"blocks.{i}.attn.o", "qo_bank", layers + i),
                (f"blocks.{i}.mlp.up", "up_bank", i),
                (f"blocks.{i}.mlp.down", "down_bank", i),
            ]
        if self.config.bigram_vocab_size:
            names.append(("bigram_proj", "bigram_proj", None))
        return [*names, ("tok_emb", "tok_emb", None)]

    def hidden(
        self,
        input_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        loop: bool = True,
        adapters: Adapters | None = None,
        collect: Collect | None = None,
        tail: Tail | None = None,
        operands: Operands | None = None,
        fp8: bool = False,
    ) -> Tensor:
        """Final normed hidden states, [..., D] for input_ids [...], or [n, D] of a `tail` of n rows.

        input_ids: [B, T], each row one causal sequence, or with `cu_seqlens` (int32, from 0, padded with repeated
        ends) one packed row [N] or [1, N] of documents no longer than `max_seqlen`. Positions run on through a packed
        row: only their differences matter. `loop` chooses the layer order. `collect(names, x)` is called with the
        input x of the matrices `names`, for Hessians. `operands`: what :meth:`operands` gave for these parameters.
        `fp8`: the MLPs multiply in FP8, for training.
        """
        config = self.config
        operands = operands or self.operands()
        ids = input_ids.view(1, -1) if input_ids.dim() == 1 else input_ids
        if cu_seqlens is not None and (ids.size(0) != 1 or max_seqlen is None):
            raise ValueError(
                f"input_ids: got shape {tuple(input_ids.shape)} with cu_seqlens, wanted [N] or [1, N] and max_seqlen"
            )
        if tail is not None and (cu_seqlens is None or collect is not None):
            raise ValueError("tail: got one without cu_seqlens or with collect, wanted a packed row and no collect")
        if fp8 and (adapters is not None or collect is not None):
            raise ValueError("fp8: got it with adapters or collect, wanted it in training alone")
        if tail is not None and adapters is not None and adapters.tail_cu_seqlens is None:
            raise ValueError("adapters: got none for the tail's rows, wanted tail_cu_seqlens beside a tail")
        rows, length = ids.shape
        needs_starts = config.bigram_vocab_size > 0 or config.smear_gate or config.xsa_form == "self_weight"
        starts = document_starts(cu_seqlens, rows, length, ids.device) if needs_starts else None
        cos, sin = rope_tables(length, config, ids.device, self.compute_dtype)
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=ids.device)
            max_seqlen = length
        state = _Pass(
            operands.layers, self._mixing(), cos, sin, starts, cu_seqlens, int(max_seqlen), adapters, collect,
            tail, self._tail_slot(loop), fp8,
        )  # fmt: skip

        x = embedding(ids, operands.table, dtype=self.compute_dtype)
        if config.bigram_vocab_size:
            pair = nn.functional.embedding(bigram_index(ids, starts, config.bigram_vocab_size), self.bigram_embed)
            projection = self._maybe_fake_quantize(self.bigram_proj.to(self.compute_dtype), 31)
            if collect is not None:
                collect(("bigram_proj",), pair.to(x.dtype))
            x = rms_norm(x + nn.functional.linear(pair.to(x.dtype), projection) * self.bigram_scale.to(x.dtype))
        if config.smear_gate:
            x = smear(x, self.smear, starts)
        x = self._layers(x, state, loop)
        if tail is not None:
            return x.view(-1, config.model_dim)
        if collect is not None:
            collect(("tok_emb",), x)
        return x.view(*input_ids.shape, config.model_dim)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        *,
        reduction: str = "mean",
        positions: Tensor | Tail | None = None,
        temperature: float = 1.0,
        hints: Tensor | None = None,
        adapters: Adapters | None = None,
        operands: Operands | None = None,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Cross entropy in nats of `targets` (shape of input_ids); other arguments as in `hidden`.

        `positions` (int64, flat, or a Tail) selects the positions that go through the head: the result then has one
        entry a position. `reduction` "none" gives fp32 losses in the shape of the (selected) targets. With `hints`
        (int64, one a scored position, -1: none) the result is (nll, log p(hint)).
        """
        tail, chosen = (positions, positions.positions) if isinstance(positions, Tail) else (None, positions)
        operands = operands or self.operands()
        hidden = self.hidden(input_ids, adapters=adapters, tail=tail, operands=operands, **inputs)
        hidden = hidden.reshape(-1, self.config.model_dim)
        flat_targets = targets.reshape(-1)
        lora_a, lora_b = adapters.head() if adapters is not None else (None, None)
        documents = None
        if lora_a is not None and not (tail is not None and adapters.index is None and tail.is_even(len(lora_a))):
            rows, length = input_ids.shape if input_ids.dim() == 2 else (1, input_ids.numel())
            documents = adapters.document_ids(rows, length, hidden.device)
        if chosen is not None:
            # index_select: the backward of x[positions] sorts them.
            hidden = hidden if tail is not None else hidden.index_select(0, chosen)
            flat_targets = flat_targets[chosen]
            documents = documents[chosen] if documents is not None else None
        result: Any = linear_softcap_cross_entropy(
            hidden,
            operands.head,
            flat_targets,
            self.config.logit_softcap,
            lora_a=lora_a,
            lora_b=lora_b,
            doc_ids=documents,
            temperature=temperature,
            hints=hints,
            reduction=reduction,
        )
        if reduction == "none" and positions is None and hints is None:
            return result.view(targets.shape)
        return result

    def forward(self, input_ids: Tensor, targets: Tensor, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """`loss`; the entry that torch.compile and distributed wrappers see."""
        return self.loss(input_ids, targets, **options)

    def logits(
        self, input_ids: Tensor, *, adapters: Adapters | None = None, temperature: float = 1.0, **inputs: Any
    ) -> Tensor:
        """softcap * tanh(x E^T / softcap) / temperature, fp32 (fp64 for an fp64 model), [..., V]."""
        operands = self.operands()
        x = self.hidden(input_ids, adapters=adapters, operands=operands, **inputs)
        raw = nn.functional.linear(x, operands.head)
        if adapters is not None:
            rows = (1, -1) if x.dim() == 2 else x.shape[:-1]
            raw = adapters.logits(x.view(*rows, x.size(-1)), raw.view(*rows, raw.size(-1))).view_as(raw)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        return self.config.logit_softcap * torch.tanh(raw / self.config.logit_softcap) / temperature

    def operands(self) -> Operands:
        """What a call makes of the matrices, good until one changes. Where no cast is needed some are the parameters.

        The branches' scales go into the matrices of their outputs, so that no activation is scaled.
        """
        layers, dtype = self.config.num_layers, self.compute_dtype
        q, o = self._maybe_fake_quantize(self.qo_bank, 31).split(layers)
        k, v = self._maybe_fake_quantize(self.kv_bank, 31).split(layers)
        up, down = self._maybe_fake_quantize(self.up_bank, 15), self._maybe_fake_quantize(self.down_bank, 15)
        o, down = o * self.attn_scale.unsqueeze(-1), down * self.mlp_scale.unsqueeze(-1)
        parts = [part.to(dtype).unbind() for part in (torch.cat([q, k, v], dim=1), o, up, down)]
        table = self.tok_emb if self.config.bigram_vocab_size else rms_norm(self.tok_emb)
        return Operands(table, self.tok_emb.to(dtype), [_Weights(*matrices) for matrices in zip(*parts, strict=True)])

    def _mixing(self) -> _Mixing:
        """Computed for all layers at once: one by one, gradients of their slices would cost a launch or two each."""
        config = self.config
        gates: tuple[Tensor, ...] = ()
        skips: Tensor = self.skip_weights
        if config.skip_form == "gated":
            open_gates = torch.sigmoid(self.skip_gates)
            gates, skips = open_gates.unbind(), (1 - open_gates) * skips
        lanes: tuple[Tensor, ...] = ()
        if config.parallel_lanes == 2 and config.parallel_start >= 0:
            of_lanes = torch.cat([self.lane_resid.unsqueeze(1), self.lane_mix], dim=1).mT
            lanes = of_lanes.unsqueeze(-1).expand(-1, -1, -1, config.model_dim).unbind()
        return _Mixing(self.resid_mix.flip(1).unbind(), gates, skips.unbind(), lanes, self.q_gain.unbind())

    def _tail_slot(self, loop: bool) -> int:
        """The last block's slot; -1 where later passes go through blocks again, under the slots they had."""
        encoder, decoder = self.config.layer_order(loop)
        reruns = loop and self.config.loop_form == "rerun" and self.config.num_loops > 0
        return -1 if reruns else len(encoder) + len(decoder) - 1

    def _maybe_fake_quantize(self, weight: Tensor, clip_range: int) -> Tensor:
        per_matrix = weight.shape[-1] * weight.shape[-2]
        return fake_quantize(weight, clip_range) if self.late_qat and per_matrix > QAT_MIN_ELEMENTS else weight

    def _layers(self, x0: Tensor, state: _Pass, loop: bool) -> Tensor:
        """The normed output of all blocks in order; the input embedding x0 stays available to every block."""
        config = self.config
        encoder, decoder = config.layer_order(loop)
        x = x0
        skips: list[Tensor] = []
        for slot, layer in enumerate(encoder):
            x, before, x0 = self._block(Stream.of(x), x0, layer, slot, state)
            if slot > 0:
                skips.append(before)
        skips.append(x)
        lanes: tuple[Stream, Stream] | None = None
        for position, layer in enumerate(decoder):
            slot = len(encoder) + position
            if config.parallel_lanes == 2 and 0 <= config.parallel_start <= layer and lanes is None:
                lanes = (Stream.of(x), Stream.of(x))
            stream = Stream.of(x) if lanes is None else lanes[0]
            if skips and position < config.num_skips:
                stream = self._join_skip(stream, skips.pop(), position, state.mixing)
            if lanes is None:
                x, _, x0 = self._block(stream, x0, layer, slot, state)
            else:
                lanes, x0 = self._lane_block((stream, lanes[1]), x0, layer, slot, state)
        if lanes is not None:
            return lanes[0].scaled(0.5).plus(lanes[1].scaled(0.5)).norm(1.0, with_total=False)[1]
        if loop and config.loop_form == "rerun":
            for _ in range(config.num_loops):
                for layer in range(config.loop_start, config.loop_end + 1):
                    x, _, x0 = self._block(Stream.of(x), x0, layer, layer, state)
        normed = norm_residual(x)[0]
        return normed if state.tail is None or state.tail_slot >= 0 else state.tail.of(normed)

    def _join_skip(self, x: Stream, skip: Tensor, position: int, mixing: _Mixing) -> Stream:
        joined = x.scaled(mixing.gates[position]) if mixing.gates else x
        return joined.plus(Stream.of(skip, mixing.skips[position]))

    def _norm_scale(self, layer: int) -> float:
        return 1.0 / math.sqrt(layer + 1) if self.config.ln_scale else 1.0

    def _read(
        self, x: Stream, x0: Tensor, layer: int, mixing: _Mixing, *, with_total: bool = True
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(h, n, again): the stream mixed with the input embedding, its norm, and x0 and the stream's activations."""
        mix = mixing.reads[layer]
        if x.coefficients is None:
            mixed = Stream((x0, *x.tensors), mix)
        else:
            of_x0, of_x = mix.unbind()
            mixed = Stream.of(x0, of_x0).plus(x.scaled(of_x))
        return mixed.norm(self._norm_scale(layer), with_total=with_total)

    def _block(self, x: Stream, x0: Tensor, layer: int, slot: int, state: _Pass) -> tuple[Tensor, Tensor, Tensor]:
        """(output, the stream's last activation, x0); the latter two for later uses, see Stream."""
        h, normed, again = self._read(x, x0, layer, state.mixing)
        y = self._attention(normed, layer, slot, state, residual=h)
        if self.config.parallel_lanes == 1 and 0 <= self.config.parallel_start <= layer:
            normed = state.wanted(normed, slot)
        else:
            normed, y = norm_residual(y, scale=self._norm_scale(layer), overwritten=state.adapters is None)
        return self._mlp(normed, layer, slot, state, residual=y), again[-1], again[0]

    def _lane_block(
        self, lanes: tuple[Stream, Stream], x0: Tensor, layer: int, slot: int, state: _Pass
    ) -> tuple[tuple[Stream, Stream], Tensor]:
        """Attention reads lane 0 (mixed with x0), the MLP lane 1; both write to both (pull request 1530). Each lane
        becomes one activation first: it would be read once more by every later block otherwise."""
        lane1, fed, again = lanes[1].norm(self._norm_scale(layer))
        lane0, _ = lanes[0].replaced(lanes[1].tensors, again).sum()
        _, attended, (x0, lane0) = self._read(Stream.of(lane0), x0, layer, state.mixing, with_total=False)
        attended = self._attention(attended, layer, slot, state)
        lane0, lane1, fed = (state.wanted(x, slot) for x in (lane0, lane1, fed))
        fed = self._mlp(fed, layer, slot, state)
        first, second = state.mixing.lanes[layer].unbind()
        return (Stream((lane0, attended, fed), first), Stream((lane1, attended, fed), second)), x0

    def _attention(
        self, normed: Tensor, layer: int, slot: int, state: _Pass, *, residual: Tensor | None = None
    ) -> Tensor:
        """attn_scale * attention(normed), plus `residual`: at the last block for its tail alone, where there is one."""
        config, weights, tail = self.config, state.weights[layer], state.tail_at(slot)
        if state.collect is not None:
            state.collect(tuple(f"blocks.{layer}.attn.{name}" for name in "qkv"), normed)
        epsilon = norm_epsilon(normed.dtype)
        group = config.num_heads // config.num_kv_heads
        rope: dict[str, Any] = {"gain": state.mixing.gains[layer], "cos": state.cos, "sin": state.sin, "eps": epsilon}
        rope |= {"key_readers": group, "value_readers": group + 1}
        total = residual
        if state.adapters is None:
            q, ks, vs = qkv_rope(normed, weights.qkv, kv_heads=config.num_kv_heads, **rope)
        else:
            projections = split_projections(weights.qkv, config.num_heads, config.num_kv_heads)
            # The adapter of "o" reads what q, k and v do: its share joins the residual before the projection's.
            *raw, total = state.adapters.attention(slot, normed, projections, residual, self.attn_scale[layer])
            q, ks, vs = qk_rope_readers(*(y.unflatten(-1, (-1, config.head_dim)) for y in raw), **rope)
        if config.value_residual:
            if layer == 0:
                state.first_value = vs[0]
            else:
                share = torch.softmax(self.v_lambda[layer - 1].to(vs[0].dtype), dim=0)
                vs = (share[0] * vs[0] + share[1] * state.first_value,) * len(vs)
        subtract_self = layer >= config.num_layers - config.xsa_last_n
        if subtract_self and config.xsa_form == "self_weight":
            y = state.wanted(attention_without_self(q, ks[0], vs[0], state.starts), slot)
        else:
            asks, q, own_value = tail or state, state.wanted(q, slot), state.wanted(vs[-1], slot)
            keys, values = ([t.flatten(0, 1) for t in aliases] for aliases in (ks, vs[:-1]))
            every = (state.cu_seqlens, state.max_seqlen)
            y = varlen_attention(q.flatten(0, 1), keys, values, asks.cu_seqlens, asks.max_seqlen, *every).view(q.shape)
            if subtract_self:
                y = xsa(y, own_value)
        y = y.flatten(-2)
        if state.collect is not None:
            state.collect((f"blocks.{layer}.attn.o",), y)
        if total is None:
            return nn.functional.linear(y, weights.o)
        total = total if tail is None else tail.of(total.view(normed.shape))
        output = add_linear_(total, y, weights.o)
        return output if state.adapters is None else output.view(y.shape)

    def _mlp(self, normed: Tensor, layer: int, slot: int, state: _Pass, *, residual: Tensor | None = None) -> Tensor:
        """mlp_scale * MLP(normed), plus `residual`."""
        config, weights = self.config, state.weights[layer]
        gain = self.hidden_gain[layer] if config.hidden_gain else None
        total, shape, in_place = residual, normed.shape, residual is not None and state.adapters is None
        if state.adapters is not None:
            tail = state.tail_at(slot) is not None
            total, normed = state.adapters.mlp(slot, normed, residual, self.mlp_scale[layer], tail=tail)
            in_place = total is not residual  # the sum with the adapter's share is nobody else's
        options: dict[str, Any] = {"negative_slope": config.negative_slope, "hidden_gain": gain, "residual": total}
        if state.fp8:
            return fp8_mlp(normed, weights.up, weights.down, in_place=in_place, **options)
        if state.collect is None:
            output: Any = fused_mlp(normed, weights.up, weights.down, in_place=in_place, **options)
            return output if state.adapters is None else output.view(shape)
        output, hidden = fused_mlp(normed, weights.up, weights.down, return_hidden=True, **options)
        state.collect((f"blocks.{layer}.mlp.up",), normed)
        state.collect((f"blocks.{layer}.mlp.down",), hidden)
        return output
