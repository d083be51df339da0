"""Token shards in the public format of openai/parameter-golf.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, zeros) and then that many little-endian
uint16 token ids. Every document starts with BOS = 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from model.errors import DataError
from model.files import atomic_write

MAGIC = 20240520
VERSION = 1
BOS_ID = 1
MAX_VOCAB_SIZE = 65536  # ids are uint16
HEADER_BYTES = 256 * 4
_TOKEN = np.dtype("<u2")


def shard_length(path: str | os.PathLike[str]) -> int:
    """The token count of a shard, after checking its header against the size of the file.

    Raises DataError for a missing file, a wrong magic or version, a negative count, a truncated or an overlong file.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), wanted a token shard") from error
    if len(raw) < HEADER_BYTES:
        raise DataError(f"{path}: {len(raw)} bytes, wanted a shard header of {HEADER_BYTES} bytes")
    magic, version, count = (int(value) for value in np.frombuffer(raw, dtype="<i4", count=3))
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard: magic {magic}, wanted {MAGIC}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, wanted {VERSION}")
    wanted = HEADER_BYTES + count * _TOKEN.itemsize
    if count < 0 or size != wanted:
        raise DataError(f"{path}: {size} bytes, wanted {wanted} for the {count} tokens that its header names")
    return count


def read_shard(path: str | os.PathLike[str]) -> np.ndarray:
    """The tokens of a shard as a read-only uint16 array, mapped from the file. Raises DataError as `shard_length`."""
    count = shard_length(path)
    if count == 0:
        return np.empty(0, dtype=_TOKEN)
    try:
        return np.memmap(path, dtype=_TOKEN, mode="r", offset=HEADER_BYTES, shape=(count,))
    except (OSError, ValueError) as error:  # gone or shortened since
        raise DataError(f"{path}: cannot be read ({error})") from error


def write_shard(path: str | os.PathLike[str], tokens: np.ndarray) -> None:
    """Writes a one-dimensional array of ids from 0 to 65535 as a shard, atomically.

    Raises ValueError for another shape, dtype or range, and PgolfError when the place cannot be written.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens: got {tokens.dtype} of shape {tokens.shape}, wanted a vector of integers")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= MAX_VOCAB_SIZE):
        raise ValueError(f"tokens: ids from {tokens.min()} to {tokens.max()}, wanted 0 to {MAX_VOCAB_SIZE - 1}")
    if tokens.size > np.iinfo(np.int32).max:
        raise ValueError(f"tokens: {tokens.size} of them, wanted at most {np.iinfo(np.int32).max} (the header's int32)")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic_write(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, dtype=_TOKEN).data)


def check_ids(tokens: np.ndarray, vocab_size: int, where: object) -> None:
    """Raises DataError, naming `where`, when an id is not below `vocab_size`."""
    if tokens.size and int(tokens.max()) >= vocab_size:
        position = int(np.argmax(tokens >= vocab_size))
        raise DataError(
            f"{where}: id {int(tokens[position])} at token {position}, wanted ids below the vocabulary size "
            f"{vocab_size} (do tokenizer, model and shards belong together?)"
        )


def document_starts(tokens: np.ndarray) -> np.ndarray:
    """Positions (int64) of BOS, where documents start."""
    return np.flatnonzero(tokens == BOS_ID)


def whole_documents(paths: Iterable[str | os.PathLike[str]]) -> Iterator[np.ndarray]:
    """The tokens of shards in their order, cut between documents only: uint16 arrays of one document or many.

    Public shards cut documents at their ends: the rest comes with what the next shard has of it, copied, and the others
    as they are mapped. Tokens before the first BOS come first. Raises DataError as `shard_length`.
    """
    rest: list[np.ndarray] = []
    for path in paths:
        tokens = read_shard(path)
        starts = document_starts(tokens)
        if not starts.size:
            rest.append(tokens)
            continue
        head = np.concatenate([*rest, tokens[: starts[0]]])
        if head.size:
            yield head
        if starts[-1] > starts[0]:
            yield tokens[starts[0] : starts[-1]]
        rest = [tokens[starts[-1] :]]
    tail = np.concatenate([np.empty(0, dtype=_TOKEN), *rest])
    if tail.size:
        yield tail
