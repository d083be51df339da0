"""General compressors on the same held-out text, for scale.

    bpb = 8 (C(train + valid) - C(train)) / bytes of valid

C is the compressed size. The compressor is primed: it has read the training text, as the model has. Windows cover the
training text wherever the format allows it; gzip's reaches 32 KiB back and no further.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable

import brotli
import numpy as np

from model.data.dataset import Dataset
from model.data.shards import document_starts, read_shard
from model.errors import DataError

BROTLI_WINDOW_BITS = 24  # the largest of the standard format
_LIMIT = 1 << BROTLI_WINDOW_BITS


def compressors() -> dict[str, Callable[[bytes], int]]:
    """The compressed size in bytes, by name: gzip -9, xz -9e, brotli -11."""
    return {
        "gzip": lambda text: len(gzip.compress(text, 9)),
        "xz": lambda text: len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
        "brotli": lambda text: len(brotli.compress(text, quality=11, lgwin=BROTLI_WINDOW_BITS)),
    }


def primed_bits_per_byte(size: Callable[[bytes], int], train: bytes, valid: bytes) -> float:
    """The formula of the module's docstring. Raises DataError for a text that the windows do not cover."""
    if not valid:
        raise DataError("baselines: the validation text is empty")
    if len(train) + len(valid) > _LIMIT:
        raise DataError(
            f"baselines: {len(train) + len(valid):,} bytes of text, wanted at most {_LIMIT:,} (brotli's window)"
        )
    return 8 * (size(train + valid) - size(train)) / len(valid)


def baselines(dataset: Dataset) -> dict[str, float]:
    """Bits per byte of each compressor on the validation documents, one to a line, after the training documents."""
    train = _text(dataset, np.concatenate([read_shard(path) for path in dataset.train_shards]))
    valid = _text(dataset, dataset.valid_tokens)
    return {name: primed_bits_per_byte(size, train, valid) for name, size in compressors().items()}


def _text(dataset: Dataset, tokens: np.ndarray) -> bytes:
    starts = document_starts(tokens)
    bodies = [tokens[start + 1 : end] for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]
    return "".join(f"{text}\n" for text in dataset.tokenizer.decode_batch(bodies)).encode()
