"""Bits per byte from a ledger, in float64.

    val_loss = sum of nll / number of scored tokens                 (nats per token)
    bpb      = sum of nll / ln 2 / sum of bytes                     (bits per byte of UTF-8 text)

The bytes of a token depend on the token before it (model/data/tokenizer.py). The tables are checked against the decoded
text, document by document, so that a wrong denominator cannot go unseen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model.data.tokenizer import ByteTables, Tokenizer
from model.errors import DataError

_BLOCK = 1 << 20  # documents are decoded in batches of about so many tokens


@dataclass(frozen=True)
class Score:
    """A sum of losses (nats) over `tokens` scored tokens that stand for `bytes` bytes of text."""

    loss_sum: float
    tokens: int
    bytes: int

    @property
    def val_loss(self) -> float:
        """Nats per token; nan when nothing was scored."""
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per byte; nan when the scored tokens stand for no byte."""
        return self.loss_sum / math.log(2.0) / self.bytes if self.bytes else math.nan


def score_per_document(nll: np.ndarray, token_bytes: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Loss sum (nats), bytes and scored tokens of each document, float64 [documents, 3].

    nll: float64 [T], nan where a token has no score. token_bytes: int64 [T]. documents: int64 [n, 2] of start and
    length as `find_documents` gives them; a document's first token belongs to the one before it.
    """
    scored = ~np.isnan(nll)
    columns = (np.where(scored, nll, 0.0), np.where(scored, token_bytes, 0), scored)
    starts, ends = documents[:, 0] + 1, documents[:, 0] + documents[:, 1]
    result = np.empty((len(documents), 3))
    for column, values in enumerate(columns):
        # Summed within each document: a difference of running sums would lose digits.
        result[:, column] = [values[start:end].sum(dtype=np.float64) for start, end in zip(starts, ends, strict=True)]
    return result


def check_bytes(tokens: np.ndarray, documents: np.ndarray, tables: ByteTables, tokenizer: Tokenizer) -> tuple[int, int]:
    """(bytes by the tables, bytes of the decoded text) of a stream of documents.

    Raises DataError naming the first document for which the two differ: its bits per byte would be wrong.
    """
    by_tables = decoded = 0
    for batch in _batches(documents):
        bodies = [tokens[start + 1 : start + length] for start, length in batch]
        for (start, length), text in zip(batch, tokenizer.decode_batch(bodies), strict=True):
            piece = tokens[start : start + length]
            counted = int(tables.token_bytes(piece[:-1], piece[1:]).sum())
            actual = len(text.encode())
            if counted != actual:
                raise DataError(
                    f"bytes: the document at token {start} has {actual} bytes of text, the byte tables count "
                    f"{counted}; wanted tables and tokens of one tokenizer"
                )
            by_tables += counted
            decoded += actual
    return by_tables, decoded


def _batches(documents: np.ndarray) -> list[np.ndarray]:
    if not len(documents):
        return []
    cuts = np.flatnonzero(np.diff(np.cumsum(documents[:, 1]) // _BLOCK)) + 1
    return np.split(documents, cuts)
