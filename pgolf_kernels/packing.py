"""Bytes near the entropy: byte shuffle, and an entropy coder for quantised weights. CPU only, bit for bit everywhere.

`byte_shuffle` transposes an array of `stride`-byte items into planes (out = data[0::s], data[1::s], ...), the filter
that the public systems put before brotli (openai/parameter-golf, pull requests 1530 with header, 1499 without).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pgolf_kernels import _native

if TYPE_CHECKING:
    from typing_extensions import Buffer

Tail = Literal["strided", "appended"]

SHUFFLE_MAGIC = b"BSHF"
MAX_STRIDE = 16


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
