"""Bytes near the entropy: byte shuffle, and an entropy coder for quantised weights. CPU only.

`byte_shuffle` transposes an array of `stride`-byte items into planes (out = data[0::s], data[1::s], ...), the filter
that the public systems put before brotli (openai/parameter-golf, pull requests 1530 with header, 1499 without).

`encode_codes` codes int8 matrices. Rows of quantised weights are near to Gaussian with one deviation; what is left to
gain lies in the columns, whose deviations and means differ, and (in embeddings) in correlations between columns. All
models are integers, so that every machine decodes the same bits.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from pgolf_kernels import _native
from pgolf_kernels._native_op import num_threads

if TYPE_CHECKING:
    from typing_extensions import Buffer

Tail = Literal["strided", "appended"]
Mode = Literal["static", "context"]

SHUFFLE_MAGIC = b"BSHF"
MAX_STRIDE = 16

_CODES_MAGIC = b"PGC1"
_MODES = {"static": b"S", "context": b"C"}
MAX_MATRICES = 1 << 12  # a matrix of another shape than the last has models of its own: milliseconds and megabytes
_FREE_CODES, _CODES_PER_BYTE = 1 << 22, 1 << 10


def byte_shuffle_reference(data: bytes, stride: int, tail: Tail = "strided") -> bytes:
    """The definition of `byte_shuffle` without header."""
    whole = len(data) if tail == "strided" else len(data) // stride * stride
    return b"".join(data[plane:whole:stride] for plane in range(stride)) + data[whole:]


def byte_shuffle(
    data: Buffer, stride: int = 2, *, header: bool = False, tail: Tail = "strided", out: Buffer | None = None
) -> bytes | memoryview:
    """Bytes of every item at position 0, then those at position 1, and so on.

    data: any contiguous buffer of n bytes, read in place. stride: 1 to 16 bytes an item. tail: the n % stride last
    bytes join their planes ("strided", pull request 1530) or follow the planes ("appended", pull request 1499).
    header: put "BSHF" and the stride before it, as pull request 1530 does; data shorter than the stride then comes
    back unchanged, without header. Returns bytes, or with `out` (a writable contiguous buffer, large enough, that does
    not overlap data) a memoryview of the part of `out` that was written. The GIL is released meanwhile.

    Raises ValueError (stride, tail, size or overlap of out), TypeError or BufferError (not a contiguous buffer).
    """
    source = _bytes_view("data", data)
    _check_stride(stride)
    _check_tail(tail)
    plain = header and len(source) < stride
    prefix = SHUFFLE_MAGIC + bytes([stride]) if header and not plain else b""
    target = _target(out, len(prefix) + len(source))
    return _native.byte_shuffle(target, source, prefix, 1 if plain else stride, tail == "appended")


def byte_unshuffle(
    data: Buffer, stride: int | None = None, *, tail: Tail = "strided", out: Buffer | None = None
) -> bytes | memoryview:
    """The inverse of `byte_shuffle`; arguments and errors as there.

    stride None reads the header. Data without one comes back unchanged, as in pull request 1530: original data that is
    shorter than the stride and begins with "BSHF" cannot be told from a header. Raises ValueError for a header with a
    stride outside 1 to 16.
    """
    source = _bytes_view("data", data)
    _check_tail(tail)
    skip = 0
    if stride is None:
        if len(source) > len(SHUFFLE_MAGIC) and source[: len(SHUFFLE_MAGIC)] == SHUFFLE_MAGIC:
            stride, skip = source[len(SHUFFLE_MAGIC)], len(SHUFFLE_MAGIC) + 1
        else:
            stride = 1
    _check_stride(stride)
    target = _target(out, len(source) - skip)
    return _native.byte_unshuffle(target, source[skip:], stride, tail == "appended")


def _bytes_view(name: str, data: Buffer) -> memoryview:
    view = memoryview(data)
    if not view.c_contiguous:
        raise BufferError(f"{name}: got a buffer that is not contiguous, wanted a C-contiguous one")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _target(out: Buffer | None, size: int) -> memoryview | None:
    if out is None:
        return None
    view = _bytes_view("out", out)
    if view.readonly and size:
        raise TypeError("out: got a read-only buffer, wanted a writable one")
    if len(view) < size:
        raise ValueError(f"out: got {len(view)} bytes, wanted at least {size}")
    return view[:size]


def _check_stride(stride: int) -> None:
    if not 1 <= stride <= MAX_STRIDE:
        raise ValueError(f"stride: got {stride}, wanted 1 to {MAX_STRIDE}")


def _check_tail(tail: str) -> None:
    if tail not in ("strided", "appended"):
        raise ValueError(f"tail: got {tail!r}, wanted 'strided' or 'appended'")


# --- entropy coding of quantised weights ---


def encode_codes(matrices: Sequence[np.ndarray], *, mode: Mode = "static", threads: int | None = None) -> bytes:
    """Codes int8 [R, C] matrices to bytes, losslessly. docs/packing.md has the format.

    mode "static": columns of equal distribution share a table, and interleaved rANS codes with it; "context": adaptive
    models mixed bit by bit, smaller and slower. Put matrices of one kind side by side: consecutive ones of equal shape
    share their models. The bytes do not depend on `threads` (None: PyTorch's number). Raises TypeError or ValueError
    for anything but two-dimensional int8 arrays.
    """
    _check_mode(mode)
    arrays = [_int8_matrix(f"matrices[{i}]", m) for i, m in enumerate(matrices)]
    if len(arrays) > MAX_MATRICES:
        raise ValueError(f"matrices: got {len(arrays)}, wanted at most {MAX_MATRICES}")
    body = _pack_shapes([a.shape for a in arrays]) + getattr(_native, f"encode_{mode}")(
        _addresses(arrays), _threads(threads)
    )
    if not can_hold(len(body), (a.shape for a in arrays)):
        raise ValueError(f"matrices: {len(body)} bytes would stand for all of them; constant ones need no coding")
    return _CODES_MAGIC + _MODES[mode] + zlib.crc32(body).to_bytes(4, "little") + body


def can_hold(size: int, shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether so many bytes of any codec may claim to stand for matrices of these shapes.

    Nearly constant matrices shrink without limit, so that a few bytes could ask a reader for any amount of memory and
    time: beyond the first 2^22 entries each 1024 want a byte. Rows and columns count as 1 at least.
    """
    return sum(math.prod(max(n, 1) for n in shape) for shape in shapes) <= _FREE_CODES + size * _CODES_PER_BYTE


def decode_codes(
    data: Buffer, *, shapes: Sequence[tuple[int, int]] | None = None, threads: int | None = None
) -> list[np.ndarray]:
    """The matrices of `encode_codes`, int8 [R, C].

    With `shapes` the data must hold matrices of exactly these. Raises ValueError for data that is damaged or was not
    written by `encode_codes`; nothing is allocated before the sizes are plausible.
    """
    source = _bytes_view("data", data)
    start = len(_CODES_MAGIC) + 5
    if len(source) < start or source[: len(_CODES_MAGIC)] != _CODES_MAGIC:
        raise ValueError("coded matrices: the data does not begin as encode_codes' does")
    mode = next((m for m, byte in _MODES.items() if source[start - 5 : start - 4] == byte), None)
    if mode is None:
        raise ValueError(
            f"coded matrices: got mode {bytes(source[start - 5 : start - 4])!r}, this release knows {_MODES}"
        )
    body = source[start:]
    if zlib.crc32(body) != int.from_bytes(source[start - 4 : start], "little"):
        raise ValueError("coded matrices: the checksum does not match; the data is damaged or cut short")
    found, position = _unpack_shapes(body)
    if shapes is not None and found != [tuple(shape) for shape in shapes]:
        raise ValueError(f"coded matrices: got {len(found)} matrices of other shapes than the {len(shapes)} wanted")
    if not can_hold(len(body), found):
        raise ValueError(f"coded matrices: {len(body)} bytes cannot hold matrices of these shapes")
    arrays = [np.empty(shape, np.int8) for shape in found]
    try:
        getattr(_native, f"decode_{mode}")(body[position:], _addresses(arrays), _threads(threads))
    except ValueError as error:
        raise ValueError(f"coded matrices: {error}") from error
    return arrays


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ValueError(f"threads: got {threads}, wanted at least 1")
    return threads or num_threads()


def _check_mode(mode: str) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode: got {mode!r}, wanted one of {', '.join(_MODES)}")


def _int8_matrix(name: str, matrix: np.ndarray) -> np.ndarray:
    array = np.asarray(matrix)
    if array.dtype != np.int8:
        raise TypeError(f"{name}: got {array.dtype}, wanted int8")
    if array.ndim != 2:
        raise ValueError(f"{name}: got shape {array.shape}, wanted [R, C]")
    return np.ascontiguousarray(array)


def _addresses(arrays: Sequence[np.ndarray]) -> list[tuple[int, int, int]]:
    return [(a.ctypes.data, *a.shape) for a in arrays]


def _pack_shapes(shapes: Sequence[tuple[int, int]]) -> bytes:
    """Runs of equal shapes: their number, then (rows, columns, repeats) of each, as LEB128 integers."""
    runs = [(*shape, len(list(group))) for shape, group in itertools.groupby(shapes)]
    return b"".join(map(_varint, [len(runs), *itertools.chain.from_iterable(runs)]))


def _unpack_shapes(data: memoryview) -> tuple[list[tuple[int, int]], int]:
    """(shapes, bytes read)."""
    position = 0

    def read() -> int:
        nonlocal position
        value = 0
        for shift in range(0, 42, 7):
            if position >= len(data):
                break
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("coded matrices: a shape is damaged")

    shapes: list[tuple[int, int]] = []
    for _ in range(read()):
        rows, cols, repeats = read(), read(), read()
        if repeats > MAX_MATRICES - len(shapes):
            raise ValueError(f"coded matrices: more than {MAX_MATRICES} of them")
        shapes += [(rows, cols)] * repeats
    return shapes, position


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
