"""Chunked test-time training: score a chunk of the stream, then train the whole model on it with SGD.

Scoring is the sliding one; a window belongs to the chunk of its first scored prediction. After all windows of a chunk
are scored, its whole sequences of `eval_seq_len` are trained on for some epochs; the last chunk is not. With C chunks,
chunk c has the rate lr (1 + cos(pi c / (C - 1))) / 2 (pull requests 1413 and 1514).

A batch of sequences is shared by the ranks and its gradient is that of its mean loss, clipped after the exchange, so
that the number of ranks does not change the result beyond rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.errors import ConfigError
from model.evaluate.documents import document_boundaries
from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.session import Session, all_reduce_sum, gradient
from model.evaluate.sliding import sliding_windows

# Where the rows of block 0 begin in each parameter that has rows for every block, in units of the number of layers.
_FIRST_ROWS = {name: (0, 1) for name in ("qo_bank", "kv_bank")} | {
    name: (0,) for name in ("up_bank", "down_bank", "q_gain", "attn_scale", "mlp_scale", "resid_mix", "hidden_gain")
}


def cosine_rate(chunk: int, chunks: int, rate: float, warmup_chunks: int = 0, warmup_start: float = 0.0) -> float:
    """Learning rate of a chunk: linear from `warmup_start` over the first chunks, then half a cosine down to 0.

    The last chunk, where the cosine is 0, is never trained on.
    """
    warmup_chunks = max(0, min(warmup_chunks, chunks - 1))
    if chunk < warmup_chunks:
        return warmup_start + (rate - warmup_start) * chunk / max(warmup_chunks - 1, 1)
    done = (chunk - warmup_chunks) / max(chunks - 1 - warmup_chunks, 1)
    return rate * 0.5 * (1.0 + math.cos(math.pi * done))


def sequence_batches(start: int, end: int, seq_len: int, batch_seqs: int) -> Iterator[np.ndarray]:
    """First inputs of the whole sequences in the inputs [start, end), `batch_seqs` at a time."""
    starts = np.arange(start, end - seq_len + 1, seq_len)
    for first in range(0, len(starts), batch_seqs):
        yield starts[first : first + batch_seqs]


def chunk_numbers(windows: np.ndarray, total: int, chunk_tokens: int) -> np.ndarray:
    """The chunk of each window [n, 3], that of its first scored prediction, in a stream of `total` predictions."""
    last = -(-total // chunk_tokens) - 1
    return np.minimum((windows[:, 0] + windows[:, 2]) // chunk_tokens, last)


class WholeModelSGD:
    """SGD with momentum on the model's parameters in place, its batches shared by the ranks.

    `frozen_blocks`: so many blocks from the front keep their weights.
    """

    def __init__(self, session: Session, *, rate: float, momentum: float, clip: float, frozen_blocks: int = 0) -> None:
        self.session, self.clip, self.frozen_blocks = session, clip, frozen_blocks
        self.parameters = list(session.model.parameters())
        self._optimizer = torch.optim.SGD(self.parameters, lr=rate, momentum=momentum)

    def step(self, starts: np.ndarray, seq_len: int, rate: float, *, stream: Tensor, documents_apart: bool) -> None:
        """One step at learning rate `rate` on the sequences that begin at `starts` of `stream` (int64 tokens).

        The sequences follow one another. With `documents_apart` they are one row, cut at each BOS and every
        eval_seq_len tokens within a document; ranks share its pieces, otherwise the sequences.
        """
        session, count = self.session, len(starts) * seq_len
        row = stream[int(starts[0]) : int(starts[0]) + count + 1]
        if documents_apart:
            bounds = document_boundaries(row[:-1].cpu().numpy(), session.config.eval_seq_len)
            shares = np.searchsorted(bounds, [count * (session.rank + i) / session.world for i in (0, 1)])
            pieces = bounds[shares[0] : shares[1] + 1]
            first, last = int(pieces[0]), int(pieces[-1])
        else:
            mine = session.mine(len(starts))
            first, last = mine.start * seq_len, mine.stop * seq_len
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        if last > first:
            shape = (1, -1) if documents_apart else (-1, seq_len)
            inputs, targets = row[first:last].view(shape), row[first + 1 : last + 1].view(shape)
            packed = session.packed(pieces - first) if documents_apart else {}
            with torch.enable_grad():
                loss: Any = session.model.loss(inputs, targets, loop=session.loop, **packed)
                (loss * ((last - first) / count)).backward()
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        all_reduce_sum([gradient(parameter) for parameter in self.parameters])
        self._freeze()
        if self.clip > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _freeze(self) -> None:
        for name, parameter in self.session.model.named_parameters():
            for first in _FIRST_ROWS.get(name, ()):
                row = first * self.session.model.config.num_layers
                gradient(parameter)[row : row + self.frozen_blocks] = 0.0


def evaluate_sgd_ttt(session: Session) -> None:
    """Scores chunk after chunk and trains on each but the last."""
    config = session.config
    seq_len, chunk_tokens = config.eval_seq_len, config.sgd_ttt_chunk_tokens
    if chunk_tokens < 1:
        raise ConfigError(f"sgd_ttt_chunk_tokens: got {chunk_tokens}, wanted at least 1")
    windows = sliding_windows(session.num_tokens, seq_len, config.eval_stride)
    total = session.num_tokens - 1
    chunks = -(-total // chunk_tokens)
    chunk_of = chunk_numbers(windows, total, chunk_tokens)
    trainer = WholeModelSGD(
        session,
        rate=config.sgd_ttt_lr,
        momentum=config.sgd_ttt_momentum,
        clip=config.sgd_ttt_grad_clip,
        frozen_blocks=config.sgd_ttt_freeze_blocks,
    )
    state = ARTIFACT_STATE
    for chunk in range(chunks):
        mine = windows[chunk_of == chunk]
        share = session.mine(len(mine))
        for first in range(share.start, share.stop, config.sgd_ttt_batch_seqs):
            session.score_windows(state, mine[first : min(first + config.sgd_ttt_batch_seqs, share.stop)])
        start, end = chunk * chunk_tokens, min((chunk + 1) * chunk_tokens, total)
        sequences = (end - start) // seq_len
        if chunk == chunks - 1 or config.sgd_ttt_epochs < 1 or not sequences or not len(mine):
            session.pause()
            continue
        state = session.ledger.update_together(state, start + 1, start + sequences * seq_len + 1)
        rate = cosine_rate(chunk, chunks, config.sgd_ttt_lr)
        for _ in range(config.sgd_ttt_epochs):
            for starts in sequence_batches(start, end, seq_len, config.sgd_ttt_batch_seqs):
                trainer.step(starts, seq_len, rate, stream=session.input_ids, documents_apart=session.documents_apart)
        session.pause()
