"""Plain evaluation: the stream in windows that do not overlap, every token scored once.

A model trained on packed documents (pull requests 1530 and 1727) reads rows of `eval_batch_seqs` windows as one packed
row, cut at each BOS and every `eval_seq_len` tokens within a document; the others read windows of `eval_seq_len` that
know no documents. The published scorer of 1530 and 1727 leaves out the sequences of a rank that do not fill a batch;
`compat` does the same.
"""

from __future__ import annotations

import numpy as np

from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.session import Session

DROPPED_SEQUENCES = "leaves out the sequences that do not fill a batch (pull requests 1530, 1727)"


def plain_windows(
    num_tokens: int, seq_len: int, batch_seqs: int, rank: int, world: int, *, drop: bool
) -> list[np.ndarray]:
    """Batches of this rank: int64 [n, 3] of (first input, inputs, 0), n windows of `seq_len` or less.

    Without `drop` whole batches are dealt to the ranks, so that no window depends on their number. With it the
    sequences are dealt, and those of a rank that do not fill a batch are left out.
    """
    total = num_tokens - 1
    if drop:
        sequences = total // seq_len
        first, last = sequences * rank // world, sequences * (rank + 1) // world
        last = first + (last - first) // batch_seqs * batch_seqs
        starts = np.arange(first, last) * seq_len
        batches = [starts[i : i + batch_seqs] for i in range(0, len(starts), batch_seqs)]
    else:
        starts = np.arange(0, total, seq_len)
        batches = [starts[i : i + batch_seqs] for i in range(0, len(starts), batch_seqs)]
        batches = batches[len(batches) * rank // world : len(batches) * (rank + 1) // world]
    return [
        np.stack([b, np.minimum(b + seq_len, total) - b, np.zeros(len(b), np.int64)], axis=1).astype(np.int64)
        for b in batches
    ]


def evaluate_plain(session: Session) -> None:
    """Scores this rank's batches; with `documents_apart` each batch is one row of the stream."""
    config = session.config
    drop = config.compat and session.documents_apart
    batches = plain_windows(
        session.num_tokens, config.eval_seq_len, config.eval_batch_seqs, session.rank, session.world, drop=drop
    )
    for batch in batches:
        if session.documents_apart:
            batch = np.array([[batch[0, 0], batch[:, 1].sum(), 0]])
        session.score_windows(ARTIFACT_STATE, batch)
        session.pause()
