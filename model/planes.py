"""Floating-point tensors as int8 columns, which is what the codecs of an artifact take (docs/artifact.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

OFFSET, DELTA = 0, 1  # filters of a row of scales: against the first one, or each against the one before


def byte_planes(tensor: Tensor) -> list[np.ndarray]:
    """The bytes of a tensor's numbers, lowest first: int8 [n, 1] each."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    raw = raw.reshape(-1, tensor.element_size())
    return [np.ascontiguousarray(raw[:, byte : byte + 1]).view(np.int8) for byte in range(raw.shape[1])]


def from_byte_planes(planes: Sequence[np.ndarray], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `byte_planes`."""
    raw = np.ascontiguousarray(np.concatenate(planes, axis=1)).view(np.uint8)
    return torch.from_numpy(raw.reshape(-1)).view(dtype).reshape(shape)


def scale_planes(scales: Tensor) -> tuple[int, np.ndarray, np.ndarray]:
    """(filter, high, low) of fp16 [R] scales; high and low are int8 [R, 1].

    The bits of positive fp16 numbers, read as integers, are in the order of the numbers, so that scales near each
    other have small differences. Residual = 256 * high + low, low in -128 .. 127, all modulo 2^16.
    """
    bits = scales.cpu().view(torch.int16).numpy().astype(np.uint16)
    residuals = [_filter(bits, kind) for kind in (OFFSET, DELTA)]
    sizes = [np.log2(1.0 + np.abs(residual[1:].astype(np.int16).astype(float))).sum() for residual in residuals]
    kind = int(np.argmin(sizes))
    residual = residuals[kind]
    high = ((residual + np.uint16(128)) >> 8).astype(np.uint8).view(np.int8)
    low = (residual & np.uint16(255)).astype(np.uint8).view(np.int8)
    return kind, high.reshape(-1, 1), low.reshape(-1, 1)


def from_scale_planes(kind: int, high: np.ndarray, low: np.ndarray) -> Tensor:
    """The inverse of `scale_planes`. Raises ValueError for an unknown filter."""
    residual = (high.reshape(-1).astype(np.int32) * 256 + low.reshape(-1)).astype(np.uint16)
    if kind == DELTA:
        bits = np.cumsum(residual, dtype=np.uint16)
    elif kind == OFFSET:
        bits = residual + residual[:1]
        bits[:1] = residual[:1]
    else:
        raise ValueError(f"filter: got {kind}, wanted {OFFSET} or {DELTA}")
    return torch.from_numpy(bits.view(np.int16)).view(torch.float16)


def _filter(bits: np.ndarray, kind: int) -> np.ndarray:
    residual = bits.copy()
    residual[1:] -= bits[:-1] if kind == DELTA else bits[:1]
    return residual
