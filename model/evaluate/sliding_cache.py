"""Sliding evaluation with shared adapters and an n-gram cache (pull request 1499), as published and as it should be.

Windows are read in batches. With adapters on q and v, one AdamW step on the mean loss of its windows follows each
batch; after `cache_reset_every` batches adapters and optimiser start anew. The cache gives c(t), the relative frequency
of token t behind the longest context that it has seen.

- As published (`compat`): p'(t) = (1 - a) p(t) + a c(t) with a = min(1/2, alpha (1 - ln p(t) / 3)). The weight a
  depends on the very token that is scored, so the p' of all tokens do not sum to 1: this is not a distribution, and
  its logarithm not a score in bits per byte. The cache starts from training tokens, and the last `eval_stride` targets
  are scored once for each window that ends with the stream, after the cache has learnt them. The ledger says so.
- As it should be: the same with a = alpha, an empty cache that has learnt every token before the position, and each
  target scored once. Then p' is a distribution that is fixed before the token is seen.

Logits of adapted weights are divided by 0.98, in both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.adapters import Adapters
from model.errors import ConfigError
from model.evaluate.adapter_bank import document_keys, uniform
from model.evaluate.documents import ranges_to_positions
from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.ngram_cache import CacheCounts
from model.evaluate.session import Session, all_reduce_sum, gradient
from model.evaluate.sliding import sliding_windows

DEFECTS = (
    "blends with a weight that depends on the target: not a distribution (pull request 1499)",
    "scores the last stride once for each window that ends with the stream",
    "fills its cache from training tokens",
)
ADAPTED_TEMPERATURE = 0.98
INITIAL_DEVIATION = 0.01
MAX_ALPHA = 0.5
_KINDS = ("q", "v")
_LEAST_PROBABILITY = 1e-40


def published_windows(num_tokens: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows as in `sliding_windows`, but each that has `stride` inputs or more scores its last `stride`."""
    total = num_tokens - 1
    starts = np.arange(0, total, stride)
    lengths = np.minimum(starts + seq_len, total) - starts
    skips = np.where(starts == 0, 0, np.maximum(lengths - stride, 0))
    return np.stack([starts, lengths, skips], axis=1)[(lengths >= stride) | (starts == 0)].astype(np.int64)


class SharedAdapters:
    """Adapters on q and v that every window shares, and AdamW (betas 0.9, 0.999; no decay) on them."""

    def __init__(self, session: Session, initial_a: Tensor | None) -> None:
        """`initial_a` [2 L, rank, in] in the order q, v of each layer stands in for N(0, 0.01^2)."""
        config, model = session.config, session.model
        slots = sum(len(part) for part in model.config.layer_order(session.loop))
        dtype = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
        self._adapters = Adapters.zeros(
            model.config, slots, 1, config.ttt_lora_rank, _KINDS, session.device, dtype
        ).requires_grad_()
        self._rate, self._initial_a, self._device = config.ttt_lora_lr, initial_a, session.device
        self.resets = 0
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draws A anew (the same way on every rank), B = 0; a new optimiser."""
        for offset, kind in enumerate(_KINDS):
            a = self._adapters.a[kind]
            if self._initial_a is not None:
                a[:, 0] = self._initial_a[offset::2]
            else:
                a[:, 0] = self._normal(kind, a[:, 0])
            self._adapters.b[kind].zero_()
        self._optimizer = torch.optim.AdamW(list(self._adapters.tensors()), lr=self._rate, weight_decay=0.0)
        self.steps = 0
        self.resets += 1

    def inputs(self) -> dict[str, Any]:
        """What the model needs to read with them: the adapters and the temperature of adapted weights."""
        return {"adapters": self._adapters, "temperature": ADAPTED_TEMPERATURE if self.steps else 1.0}

    def step(self, loss: Tensor | None) -> None:
        """One step on this rank's share of the loss (None: no share)."""
        tensors = list(self._adapters.tensors())
        if loss is not None:
            loss.backward()
        all_reduce_sum([gradient(tensor) for tensor in tensors])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def _normal(self, kind: str, like: Tensor) -> Tensor:
        layers = torch.arange(like.size(0), device=self._device)
        keys = document_keys(self.resets, layers, _KINDS.index(kind))
        u = uniform(keys, 2 * like[0].numel()).double().view(like.size(0), 2, -1)
        gauss = torch.sqrt(-2.0 * torch.log1p(-u[:, 0])) * torch.cos(2 * torch.pi * u[:, 1])
        return INITIAL_DEVIATION * gauss.view_as(like).to(like)


def evaluate_sliding_cache(
    session: Session, *, initial_a: Tensor | None = None, train_tokens: np.ndarray | None = None
) -> None:
    """Scores the windows, blended with the cache; `train_tokens` fill it first (`compat` only).

    Raises ConfigError for `compat` on more than one rank.
    """
    config = session.config
    if config.compat and session.world > 1:
        raise ConfigError("compat: got sliding-cache on several ranks, where it gives each a cache; wanted one process")
    make_windows = published_windows if config.compat else sliding_windows
    windows = make_windows(session.num_tokens, config.eval_seq_len, config.eval_stride)
    blend = Blend(session, windows, train_tokens if config.compat else None)
    adapters = SharedAdapters(session, initial_a) if config.cache_adapters else None
    state = ARTIFACT_STATE
    for first in range(0, len(windows), config.eval_batch_seqs):
        batch = windows[first : first + config.eval_batch_seqs]
        share = session.mine(len(batch))
        mine = batch[share.start : share.stop]
        if len(mine):
            blend.score(state, mine, adapters.inputs() if adapters else {})
        if adapters is not None:
            state = session.ledger.update_together(state, batch[:, 0] + 1, batch[:, 0] + batch[:, 1] + 1)
            adapters.step(_window_loss(session, batch, mine, adapters.inputs()) if len(mine) else None)
            if adapters.steps >= config.cache_reset_every:
                adapters.reset()
                state = ARTIFACT_STATE
        session.pause()


def _window_loss(session: Session, batch: np.ndarray, mine: np.ndarray, inputs: dict[str, Any]) -> Tensor:
    """This rank's part of the mean loss over a batch of windows, at temperature 1.

    As published, windows at the end of the stream are filled with predictions of token 0 from token 0.
    """
    longest = int(batch[:, 1].max())
    columns = torch.arange(longest, device=session.device)
    starts = torch.from_numpy(mine[:, :1]).to(session.device)
    lengths = torch.from_numpy(mine[:, 1:2]).to(session.device)
    inside = columns < lengths
    index = (starts + columns).clamp_(max=session.num_tokens - 2)
    ids = torch.where(inside, session.input_ids[index], 0)
    targets = torch.where(inside, session.target_ids[index + 1], 0)
    count = len(batch) * longest
    if not session.config.compat:
        targets = torch.where(inside, targets, -100)
        count = int(batch[:, 1].sum())
    adapters = inputs["adapters"]
    losses: Any = session.model.loss(ids, targets, reduction="none", loop=session.loop, adapters=adapters)
    return losses.sum() / count


class Blend:
    """Scores windows with the model and blends in the cache."""

    def __init__(self, session: Session, windows: np.ndarray, train_tokens: np.ndarray | None = None) -> None:
        """`windows` are all of the evaluation, in their order; `train_tokens` fill the cache first (`compat`)."""
        self._session = session
        streams = [session.tokens] if train_tokens is None else [train_tokens, session.tokens]
        self._offset = sum(len(stream) for stream in streams[:-1])
        learnt_before = np.arange(1, self._offset)
        if session.config.compat:
            # The targets of a window are learnt when all of it is scored.
            targets = [np.arange(start + skip + 1, start + length + 1) for start, length, skip in windows]
            learnt = np.concatenate(targets) if targets else np.empty(0, dtype=np.int64)
            ends = np.cumsum([len(t) for t in targets])
            self._known = {int(s): int(e - len(t)) for s, e, t in zip(windows[:, 0], ends, targets, strict=True)}
        else:
            learnt = np.arange(1, session.num_tokens)
        events = np.concatenate([learnt_before, learnt + self._offset])
        self._counts = CacheCounts(streams, session.config.cache_order, events)

    def score(self, state: int, windows: np.ndarray, inputs: dict[str, Any]) -> None:
        """Scores windows of one batch in one pass and enters them into the ledger, window by window."""
        session = self._session
        windows = session.not_scored(windows)
        if not len(windows):
            return
        starts, lengths, skips = windows.T
        targets = ranges_to_positions(starts + skips + 1, starts + lengths + 1)
        nll = session.window_scores(windows, **inputs).to(torch.float64).cpu().numpy()
        session.ledger.score(
            state, starts + skips + 1, starts + lengths + 1, self._blended(nll, targets, starts, lengths - skips)
        )

    def _blended(self, nll: np.ndarray, targets: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        session, config = self._session, self._session.config
        known = targets - 1
        if config.compat:
            known = np.repeat([self._known[start] for start in starts.tolist()], counts)
        learnt_before = max(self._offset - 1, 0)
        tokens = session.tokens if session.targets is None else session.targets
        frequency = self._counts.frequency(
            targets + self._offset, tokens[targets].astype(np.int64), known + learnt_before
        )
        alpha = np.full(len(nll), config.cache_alpha)
        if config.compat:
            alpha = np.minimum(MAX_ALPHA, config.cache_alpha * (1.0 + nll / 3.0))
        mixed = (1.0 - alpha) * np.exp(-nll) + alpha * np.nan_to_num(frequency)
        return np.where(np.isnan(frequency), nll, -np.log(np.maximum(mixed, _LEAST_PROBABILITY)))
