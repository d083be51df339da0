"""Floating-point tensors as int8 columns, which is what the codecs of an artifact take (docs/artifact.md).

Scales are filtered first. The bits of positive fp16 numbers, read as integers, are in the order of the numbers, so that
scales near each other have small differences. "offset" takes the differences to the matrix's first scale, "delta"
those to the scale before (for sorted ones), both modulo 2^16 = 256 * high + low with low in -128 .. 127.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FILTERS = ("offset", "delta")


def byte_planes(tensor: Tensor) -> list[np.ndarray]:
    """The bytes of the numbers of a tensor [n], highest first: int8 [n, 1] each."""
    raw = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1, tensor.element_size())
    return [np.ascontiguousarray(raw[:, [byte]]).view(np.int8) for byte in reversed(range(raw.shape[1]))]


def from_byte_planes(planes: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """The inverse of `byte_planes`."""
    raw = np.ascontiguousarray(np.concatenate(planes[::-1], axis=1)).view(np.uint8)
    return torch.from_numpy(raw.reshape(-1)).view(dtype)


def best_filter(scales: Tensor) -> str:
    """The filter that leaves the smaller residuals of fp16 [R] scales."""
    sizes = [np.log2(1.0 + np.abs(_residual(scales, name)[1:].view(np.int16).astype(float))).sum() for name in FILTERS]
    return FILTERS[int(np.argmin(sizes))]


def pack_scales(scales: Sequence[Tensor], filters: Sequence[str]) -> list[np.ndarray]:
    """fp16 [R] scales with a filter each: for each filter in use the high and the low bytes of all residuals.

    The first residual of a matrix is the difference to the first scale of the matrix before it in the same filter.
    """
    planes = []
    for name in FILTERS:
        residuals, before = [], np.uint16(0)
        for s, chosen in zip(scales, filters, strict=True):
            if chosen == name and s.numel():
                residual = _residual(s, name)
                first = residual[0]
                residual[:1] -= before
                before = first
                residuals.append(residual)
        if name in filters:
            joined = np.concatenate([np.empty(0, np.uint16), *residuals])
            for half in (joined + np.uint16(128) >> 8, joined & np.uint16(255)):
                planes.append(half.astype(np.uint8).view(np.int8).reshape(-1, 1))
    return planes


def scale_plane_shapes(rows: Sequence[int], filters: Sequence[str]) -> list[tuple[int, int]]:
    """The shapes of what `pack_scales` gives for matrices of so many rows."""
    sums = [sum(n for n, chosen in zip(rows, filters, strict=True) if chosen == name) for name in FILTERS]
    return [(total, 1) for name, total in zip(FILTERS, sums, strict=True) if name in filters for _ in range(2)]


def unpack_scales(planes: Sequence[np.ndarray], rows: Sequence[int], filters: Sequence[str]) -> list[Tensor]:
    """The inverse of `pack_scales`."""
    halves = iter(planes)
    joined, before = {}, dict.fromkeys(FILTERS, np.uint16(0))
    for name in FILTERS:
        if name in filters:
            high, low = next(halves).reshape(-1), next(halves).reshape(-1)
            joined[name] = (high.astype(np.int32) * 256 + low).astype(np.uint16)
    result = []
    for n, name in zip(rows, filters, strict=True):
        bits, joined[name] = joined[name][:n].copy(), joined[name][n:]
        if n:
            bits[:1] += before[name]
            before[name] = bits[0]
            bits = np.cumsum(bits, dtype=np.uint16) if name == "delta" else np.append(bits[:1], bits[1:] + bits[0])
        result.append(torch.from_numpy(bits.view(np.int16)).view(torch.float16))
    return result


def _residual(scales: Tensor, name: str) -> np.ndarray:
    """uint16 [R]; the first entry is the first scale itself."""
    bits = scales.cpu().contiguous().view(torch.int16).numpy().view(np.uint16)
    residual = bits.copy()
    residual[1:] -= bits[:-1] if name == "delta" else bits[:1]
    return residual
