"""A quantised model in memory: integer codes with a scale per row, and the tensors that stay floating point.

    W = codes * scales[:, None]        codes int8 [R, C], scales fp16 [R], the product in fp32

Both `quantize_with_hessians` and `read_artifact` give this object, and its `state_dict` is the only dequantisation
there is: a model loaded from an artifact has the bits of the one that was quantised.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import ArtifactError


@dataclass(frozen=True)
class QuantizedMatrix:
    """One matrix. `name` is its own (`GPT.matrix_names`); it is entry `index` of the bank `parameter`, or all of it."""

    name: str
    parameter: str
    index: int | None
    bits: int
    codes: Tensor  # int8 [R, C]
    scales: Tensor  # float16 [R]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def check_codes(self) -> None:
        """Raises ArtifactError when a code is not one of -2^(bits-1) .. 2^(bits-1) - 1."""
        limit = 2 ** (self.bits - 1)
        if self.codes.numel() and not -limit <= int(self.codes.min()) <= int(self.codes.max()) < limit:
            raise ArtifactError(f"tensor {self.name!r}: a code does not fit its {self.bits} bits")

    def dequantize(self) -> Tensor:
        """codes * scales[:, None] in fp32, [R, C]."""
        return self.codes.float() * self.scales.float()[:, None]


@dataclass(frozen=True)
class PlainTensor:
    """A tensor that is stored as it is, in fp16, bf16 or fp32; placed like a QuantizedMatrix."""

    name: str
    parameter: str
    index: int | None
    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def dequantize(self) -> Tensor:
        return self.value.float()


@dataclass(frozen=True)
class QuantizedModel:
    matrices: tuple[QuantizedMatrix, ...]
    tensors: tuple[PlainTensor, ...]

    def state_dict(self) -> dict[str, Tensor]:
        """fp32 tensors by parameter name, banks put together.

        Raises ArtifactError for a bank whose entries are missing, doubled or of different shapes.
        """
        parts: dict[str, dict[int | None, Tensor]] = defaultdict(dict)
        stored: tuple[QuantizedMatrix | PlainTensor, ...] = (*self.matrices, *self.tensors)
        for entry in stored:
            if entry.index in parts[entry.parameter]:
                raise ArtifactError(f"tensor {entry.name!r}: a second entry {entry.index} of {entry.parameter!r}")
            parts[entry.parameter][entry.index] = entry.dequantize()
        return {name: _assemble(name, entries) for name, entries in parts.items()}


def _assemble(name: str, entries: dict[int | None, Tensor]) -> Tensor:
    if None in entries and len(entries) == 1:
        return entries[None]
    wanted = range(len(entries))
    if None in entries or set(entries) != set(wanted):
        raise ArtifactError(f"parameter {name!r}: got bank entries {sorted(map(str, entries))}, wanted 0 to n - 1")
    if len({tensor.shape for tensor in entries.values()}) != 1:
        raise ArtifactError(f"parameter {name!r}: its bank entries have different shapes")
    return torch.stack([entries[index] for index in wanted])
