"""Codecs behind one interface: lists of int8 matrices of known shapes, to bytes and back.

`context` and `static` are the project's entropy coder (pgolf_kernels/packing.py); `brotli` at quality 11 is what the
public systems use, `lzma` and `zstd` are there to compare. A decoder never allocates more than the shapes ask for,
whatever the bytes say.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import brotli
import numpy as np
import zstandard

from model.errors import ArtifactError
from pgolf_kernels.packing import decode_codes, encode_codes

Bytes = bytes | memoryview
Shapes = Sequence[tuple[int, int]]
LZMA_MEMORY_LIMIT = 1 << 30
ZSTD_WINDOW_LIMIT = 1 << 27


@dataclass(frozen=True)
class Codec:
    """`encode(matrices)` and `decode(data, shapes)`; decode raises ArtifactError for data that cannot be right."""

    name: str
    encode: Callable[[Sequence[np.ndarray]], bytes]
    decode: Callable[[Bytes, Shapes], list[np.ndarray]]


def get_codec(name: str) -> Codec:
    """The codec of that name; ArtifactError for one that this version does not know."""
    if name not in CODECS:
        raise ArtifactError(f"codec: got {name!r}, wanted one of {', '.join(CODECS)}")
    return CODECS[name]


def _entropy_codec(mode: Literal["static", "context"]) -> Codec:
    def decode(data: Bytes, shapes: Shapes) -> list[np.ndarray]:
        try:
            return decode_codes(data, shapes=list(shapes))
        except ValueError as error:
            raise ArtifactError(str(error)) from error

    return Codec(mode, lambda matrices: encode_codes(matrices, mode=mode), decode)


def _general_codec(name: str, compress: Callable[[bytes], bytes], decompress: Callable[[bytes, int], bytes]) -> Codec:
    """A general compressor over the concatenated codes."""

    def encode(matrices: Sequence[np.ndarray]) -> bytes:
        return compress(b"".join(np.ascontiguousarray(m).tobytes() for m in matrices))

    def decode(data: Bytes, shapes: Shapes) -> list[np.ndarray]:
        total = sum(math.prod(shape) for shape in shapes)
        try:
            raw = decompress(bytes(data), total)
        except (brotli.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
            raise ArtifactError(f"{name} data is damaged ({error})") from error
        if len(raw) != total:
            raise ArtifactError(f"{name} data holds {len(raw)} bytes or more, wanted {total}")
        flat = np.frombuffer(bytearray(raw), np.int8)
        ends = np.cumsum([math.prod(shape) for shape in shapes], dtype=np.int64)
        return (
            [part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), shapes, strict=True)]
            if shapes
            else []
        )

    return Codec(name, encode, decode)


def brotli_decompress(data: bytes, size: int) -> bytes:
    """At most size + 1 bytes, so that the caller sees data that holds more; brotli.error for damage."""
    decompressor = brotli.Decompressor()
    pieces = [decompressor.process(data, output_buffer_limit=size + 1)]
    while (length := sum(map(len, pieces))) <= size and not decompressor.is_finished():
        piece = decompressor.process(b"", output_buffer_limit=size + 1 - length)
        if not piece:
            raise brotli.error("the stream ends early")
        pieces.append(piece)
    return b"".join(pieces)[: size + 1]


def _lzma_decompress(data: bytes, size: int) -> bytes:
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY_LIMIT)
    raw = decompressor.decompress(data, max_length=size + 1)
    if len(raw) <= size and not decompressor.eof:
        raw += decompressor.decompress(b"", max_length=size + 1 - len(raw))
    if len(raw) <= size and (not decompressor.eof or decompressor.unused_data):
        raise EOFError("the stream ends early or has bytes behind it")
    return raw


def _zstd_decompress(data: bytes, size: int) -> bytes:
    frame = zstandard.get_frame_parameters(data)
    if frame.content_size != size:
        raise EOFError(f"the frame declares {frame.content_size} bytes, wanted {size}")
    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_LIMIT)
    return decompressor.decompress(data, max_output_size=size, allow_extra_data=False)


CODECS = {
    codec.name: codec
    for codec in (
        _entropy_codec("context"),
        _entropy_codec("static"),
        _general_codec("brotli", lambda raw: brotli.compress(raw, quality=11), brotli_decompress),
        _general_codec("lzma", lambda raw: lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME), _lzma_decompress),
        _general_codec("zstd", lambda raw: zstandard.ZstdCompressor(level=22).compress(raw), _zstd_decompress),
    )
}
