"""Sliding evaluation: windows of `eval_seq_len` every `eval_stride` tokens; each scores what the one before did not.

The first window scores all of its predictions, every other its last `eval_stride`; a window is kept when it has a
prediction behind its context of eval_seq_len - eval_stride (pull requests 1413, 1514, 1530 and 1727).
"""

from __future__ import annotations

import numpy as np

from model.errors import ConfigError
from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.session import Session


def sliding_windows(num_tokens: int, seq_len: int, stride: int) -> np.ndarray:
    """int64 [n, 3] of (first input, inputs, predictions not scored), in stream order; each target is in one.

    Raises ConfigError unless 1 <= stride <= seq_len.
    """
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"eval_stride: got {stride}, wanted 1 to eval_seq_len={seq_len}")
    total, context = num_tokens - 1, seq_len - stride
    starts = np.arange(0, total, stride)
    starts = starts[(starts + context < total) | (starts == 0)].astype(np.int64)
    skips = np.where(starts == 0, 0, context)
    return np.stack([starts, np.minimum(starts + seq_len, total) - starts, skips], axis=1)


def evaluate_sliding(session: Session) -> None:
    """Scores this rank's share of the windows in batches of `eval_batch_seqs`."""
    config = session.config
    windows = sliding_windows(session.num_tokens, config.eval_seq_len, config.eval_stride)
    share = session.mine(len(windows))
    for first in range(share.start, share.stop, config.eval_batch_seqs):
        session.score_windows(ARTIFACT_STATE, windows[first : min(first + config.eval_batch_seqs, share.stop)])
        session.pause()
