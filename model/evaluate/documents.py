"""Documents of a token stream, the windows they are read through, and who reads which of them.

A document is [BOS ... next BOS], both ends included: its last prediction is that the document is over. Token t of the
stream is scored once, as a target; the first token has nothing before it and is never one. A document of n tokens has
n - 1 predictions, read in chunks: chunk c predicts up to `chunk_size` tokens behind a context of at most `seq_len`
(pull request 1530).
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np

from model.data.shards import BOS_ID

# A chunk of a document costs what its window holds, plus its share of one step over its adapters: the traffic of one
# document's fp32 adapters (rank 96) takes about as long as so many tokens through the network.
CHUNK_OVERHEAD_TOKENS = 256


def find_documents(tokens: np.ndarray) -> np.ndarray:
    """Start and length of each document of the stream, int64 [n, 2], in stream order.

    Length includes the next document's BOS. Documents without a prediction (a lone BOS at the end) are left out;
    tokens before the first BOS, or a stream without any, form a document of their own, so that none stays unscored.
    """
    bounds = np.flatnonzero(np.asarray(tokens) == BOS_ID)
    if len(tokens) and (not len(bounds) or bounds[0] != 0):
        bounds = np.concatenate([[0], bounds])
    ends = np.concatenate([bounds[1:] + 1, [len(tokens)]])[: len(bounds)]
    documents = np.stack([bounds, ends - bounds], axis=1).astype(np.int64).reshape(-1, 2)
    return documents[documents[:, 1] >= 2]


def num_chunks(predictions: Any, chunk_size: int) -> Any:
    """Chunks of a document with so many predictions; an array gives an array."""
    return -(-predictions // chunk_size)


def document_costs(documents: np.ndarray, chunk_size: int, seq_len: int) -> np.ndarray:
    """Inputs read for each document over all its chunks, plus the chunks' overhead, int64 [n]: a measure of time."""
    predictions = documents[:, 1] - 1
    chunks = num_chunks(predictions, chunk_size)
    full = predictions // chunk_size
    # Windows of the full chunks end at chunk_size, 2 chunk_size, ... and stop growing at seq_len.
    growing = np.minimum(full, seq_len // chunk_size)
    read = chunk_size * growing * (growing + 1) // 2 + (full - growing) * seq_len
    read = read + np.where(chunks > full, np.minimum(predictions, seq_len), 0)
    return read + chunks * CHUNK_OVERHEAD_TOKENS


def length_groups(documents: np.ndarray, group_size: int) -> list[np.ndarray]:
    """Indices of the documents in groups of `group_size`, the group with the longest documents first.

    Sorted by length (ties in stream order), cut from the short end, so that only the last cut, with the longest
    documents, may be smaller; groups of equal length keep that order (pull request 1530).
    """
    order = np.argsort(documents[:, 1], kind="stable")
    groups = [order[i : i + group_size] for i in range(0, len(order), group_size)]
    return sorted(groups, key=lambda group: -int(documents[group, 1].max()))


def balance(costs: np.ndarray, parts: int) -> list[np.ndarray]:
    """Indices of `costs` in `parts` lists of nearly equal sums, each with its largest first.

    The largest goes first, to the part with the least so far: known in advance, the same on every rank, and at most
    4/3 of the best possible (Graham 1969). Parts may be empty.
    """
    loads = [(0, part) for part in range(parts)]
    chosen: list[list[int]] = [[] for _ in range(parts)]
    for index in np.argsort(-np.asarray(costs), kind="stable"):
        load, part = heapq.heappop(loads)
        chosen[part].append(int(index))
        heapq.heappush(loads, (load + int(costs[index]), part))
    return [np.array(part, dtype=np.int64) for part in chosen]


def document_boundaries(input_ids: np.ndarray, max_length: int) -> np.ndarray:
    """Cumulative lengths that cut a row at each BOS and every `max_length` tokens within a document: int32 [n + 1].

    The row's first token opens a document whatever it is.
    """
    starts = np.flatnonzero(input_ids == BOS_ID)
    if not len(starts) or starts[0] != 0:
        starts = np.concatenate([[0], starts])
    lengths = np.diff(np.append(starts, len(input_ids)))
    pieces = -(-lengths // max_length)
    within = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cuts = np.repeat(starts, pieces) + within * max_length
    return np.append(cuts, len(input_ids)).astype(np.int32)


def pad_boundaries(boundaries: np.ndarray, multiple: int) -> np.ndarray:
    """`boundaries` with its end repeated up to a multiple of `multiple` entries, so that few shapes occur."""
    return np.pad(boundaries, (0, -len(boundaries) % multiple), mode="edge")


def ranges_to_positions(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The integers of the half-open ranges, one range after the other: int64."""
    starts, lengths = np.asarray(starts, dtype=np.int64), np.asarray(ends, dtype=np.int64) - starts
    offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(starts, lengths) + offsets
