"""Watching an evaluation from outside: its ledger, its model's weights, and what it feeds to the model.

The observer believes nothing it is told. It notes every score and update, compares the weights before and after, and
recognises the validation stream by its runs of `RUN` tokens in whatever is looked up in a table of embeddings, by the
model or by a copy of it. It does not stop a scorer that breaks a rule; it writes down which.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.data.shards import BOS_ID
from model.evaluate.ledger import ARTIFACT_STATE, CERTAIN, Ledger
from model.gpt import GPT

RUN = 8  # inputs are recognised by so many tokens in a row
ORDER = "score before update"
ONCE = "single pass"
WARM_UP = "warm-up"
NORMALISATION = "normalisation"
# Where lookups have their table and their indices.
_LOOKUPS = {
    torch.ops.pgolf.embedding.default: (1, 0),
    torch.ops.aten.embedding.default: (0, 1),
    torch.ops.aten.index_select.default: (0, 2),
    torch.ops.aten.index.Tensor: (0, 1),
}
_MULTIPLIER = 1000003
_NO_RUN = 0


class Enough(Exception):
    """Raised through the scorer when the score that was asked for is there."""


class ObservedLedger(Ledger):
    """A ledger that lets a scorer do what it wants, and keeps a record of what it must not do in `violations`.

    With `stop_at` the scorer is ended (Enough) as soon as that token has its score; with `model` its weights are hashed
    before every score.
    """

    def __init__(self, tokens: np.ndarray, *, model: GPT | None = None, stop_at: int | None = None) -> None:
        super().__init__(len(tokens))
        self.violations: dict[str, list[str]] = defaultdict(list)
        self.event_of = np.full(len(tokens), -1)  # when a token was scored, counted in score events
        self.first_state = np.zeros(len(tokens), dtype=bool)  # scored by the artifact, by the scorer's own account
        self._model, self._stop_at = model, stop_at
        self._stream = _Runs(tokens)
        self._reads = np.zeros(len(tokens), dtype=np.int64)  # forward passes that predicted a token before its score
        self._early_reads = np.zeros(len(tokens), dtype=np.int64)  # of which before anything was scored
        self._events = 0
        self._artifact = self._weights = hash_weights(model) if model is not None else None
        self._named_update = False
        self._repeats_later = self._repeats_early = 0
        self.entered = np.full(len(tokens), np.nan)  # the scores as they came

    def read(self, input_ids: Tensor) -> None:
        """Notes a forward pass on these inputs."""
        targets = self._stream.targets(input_ids.detach().cpu().numpy())
        targets = targets[self.event_of[targets] < 0]
        self._reads[targets] += 1
        if self._events == 0:
            self._early_reads[targets] += 1

    def score(self, state: Any, starts: Any, ends: Any, nll: Any, select: Any = None) -> None:
        starts, ends = np.atleast_1d(starts), np.atleast_1d(ends)
        positions = self._positions(state, starts, ends, "score")
        states = np.repeat(np.broadcast_to(state, starts.shape), ends - starts)
        self._compare_weights(positions, positions[states == ARTIFACT_STATE])
        taken = torch.as_tensor(nll).detach().to(torch.float64).cpu().numpy()
        values = taken if select is None else taken[select]
        if len(values) != len(positions):
            raise ValueError(f"nll: got {len(values)} values, wanted one for each of {len(positions)} tokens")
        fresh = np.zeros(len(positions), dtype=bool)
        fresh[np.unique(positions, return_index=True)[1]] = True
        fresh &= self.event_of[positions] < 0
        if not fresh.all():
            self.violations[ONCE].append(f"token {positions[~fresh][0]} is scored a second time")
        again = np.maximum(self._reads[positions] - 1, 0)
        early = np.minimum(again, self._early_reads[positions])
        self._repeats_early += int((early > 0).sum())
        self._repeats_later += int((again > early).sum())
        self.first_state[positions[fresh]] = states[fresh] == ARTIFACT_STATE
        kept = positions[fresh]
        self._scored[kept] = True
        self._nll[kept] = self.entered[kept] = values[fresh]
        wrong = kept[~(self.entered[kept] >= CERTAIN) | np.isinf(self.entered[kept])]
        if len(wrong):
            self.violations[NORMALISATION].append(f"token {wrong[0]} has a loss of {self.entered[wrong[0]]:.4g} nats")
        if len(kept):
            self.event_of[kept] = self._events
            self._events += 1
        if self._stop_at is not None and self.event_of[self._stop_at] >= 0:
            raise Enough

    def update(self, state: Any, starts: Any, ends: Any, *, separate: bool = False) -> Any:
        positions = self._positions(state, np.atleast_1d(starts), np.atleast_1d(ends), "update")
        missing = positions[self.event_of[positions] < 0]
        if len(missing):
            self.violations[ORDER].append(f"token {missing[0]} is learnt from before it has its score")
        self._named_update = True
        self._num_states += len(np.atleast_1d(starts)) if separate else 1
        last = self._num_states - 1
        return np.arange(last - len(np.atleast_1d(starts)) + 1, last + 1) if separate else last

    def close(self) -> None:
        """Draws the conclusions that need the whole run."""
        unscored = int((self.event_of[1:] < 0).sum())
        if unscored:
            self.violations[ONCE].append(f"{unscored} tokens have no score")
        altered = int((~((self._nll == self.entered) | (np.isnan(self._nll) & np.isnan(self.entered)))).sum())
        if altered:
            self.violations[ONCE].append(f"{altered} scores were altered after they were entered")
        if self._repeats_later:
            count = self._repeats_early + self._repeats_later
            self.violations[ONCE].append(f"{count} tokens went through the model more than once before their score")
        elif self._repeats_early:
            self.violations[WARM_UP].append(
                f"{self._repeats_early} validation tokens went through the model before the evaluation began"
            )

    def _compare_weights(self, tokens: np.ndarray, by_artifact: np.ndarray) -> None:
        """`by_artifact`: those of the tokens that the scorer says the artifact scores."""
        now = hash_weights(self._model) if self._model is not None else None
        if now != self._weights and not self._named_update:
            token = tokens[0] if len(tokens) else 0
            self.violations[ORDER].append(f"the weights changed before token {token} without an update in the ledger")
        if now != self._artifact and len(by_artifact):
            self.violations[ORDER].append(f"token {by_artifact[0]} is scored as by the artifact, with other weights")
        self._weights, self._named_update = now, False


class _Runs:
    """Where in the stream a run of tokens stands, for those runs that stand in it once and in one document."""

    def __init__(self, tokens: np.ndarray) -> None:
        hashes = _hashes(tokens.astype(np.int64)[None])[0]
        values, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        known = (counts == 1) & (values != _NO_RUN)
        self._hashes, self._positions = values[known], first[known]
        self._length = len(tokens)

    def targets(self, input_ids: np.ndarray) -> np.ndarray:
        """Tokens of the stream that a forward pass on these inputs predicts."""
        rows = input_ids.reshape(1, -1) if input_ids.ndim == 1 else input_ids
        hashes = _hashes(rows.astype(np.int64)).reshape(-1)
        if not len(hashes) or not len(self._hashes):
            return np.empty(0, dtype=np.int64)
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        starts = np.unique(self._positions[place[self._hashes[place] == hashes]])
        targets = np.unique(starts[:, None] + np.arange(1, RUN + 1))
        return targets[targets < self._length]


def _hashes(rows: np.ndarray) -> np.ndarray:
    """A polynomial of each run of RUN tokens, _NO_RUN where a document begins within it: [rows, columns - RUN + 1].

    Documents that follow one another in a packed row need not do so in the stream.
    """
    if rows.shape[1] < RUN:
        return np.empty((rows.shape[0], 0), dtype=np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(rows + 1, RUN, axis=1)
    powers = np.array([pow(_MULTIPLIER, i, 1 << 62) for i in range(RUN)], dtype=np.int64)
    hashes = (windows * powers).sum(axis=-1)
    return np.where((windows[..., 1:] == BOS_ID + 1).any(axis=-1), _NO_RUN, hashes)


def hash_weights(model: GPT) -> str:
    """SHA-256 over the model's parameters, in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Watch(TorchDispatchMode):
    """Reports to a ledger every lookup in a table like the model's token embedding, or with more rows, by whoever."""

    def __init__(self, model: GPT, ledger: ObservedLedger) -> None:
        super().__init__()
        self._shape, self._ledger = model.tok_emb.shape, ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = _LOOKUPS.get(func)
        if found is not None:
            table, ids = (args[place] for place in found)
            ids = ids[0] if isinstance(ids, list | tuple) else ids
            looks_like_it = table.shape[1:] == self._shape[1:] and len(table) >= self._shape[0]
            if looks_like_it and ids is not None and not ids.dtype.is_floating_point:
                self._ledger.read(ids)
        return func(*args, **(kwargs or {}))
