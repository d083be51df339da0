"""The gradient of the embedding table, fp32 sums of bf16 gradients, beside PyTorch.

"Cast first" is what ablation.py puts in the kernel's place: its gradient is rounded to bf16 on its way to the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import data
from bench.common import DEVICE, Call, Work
from bench.expressions import embedding as cast_first
from pgolf_kernels import embedding

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int = 8192
    dim: int = 512

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.vocab}x{self.dim} {str(DTYPE).removeprefix('torch.')}"


CASES = [Case(98304), Case(24576)] if GPU else [Case(4096)]


def setup(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Tokens of text: their frequencies are what the kernel has to live with."""
    ids = torch.from_numpy(np.resize(data.tokens(), case.tokens).astype(np.int64)) % case.vocab
    return {
        "ids": ids.to(device),
        "table": torch.randn(case.vocab, case.dim, device=device).requires_grad_(),
        "upstream": torch.randn(case.tokens, case.dim, device=device, dtype=DTYPE),
    }


def plain(ids: Tensor, table: Tensor, *, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.embedding(ids, table).to(dtype)


def both_by(function: Any) -> Any:
    def build(case: Case, x: dict[str, Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(x["ids"], x["table"], dtype=DTYPE), x["table"], x["upstream"])

    return build


FUNCTIONS = {
    "pgolf_kernels": embedding,
    "eager": plain,
    "eager, cast first": cast_first,
    "torch.compile": torch.compile(plain, dynamic=False),
}
BOTH = {name: both_by(function) for name, function in FUNCTIONS.items()}


def work(case: Case) -> Work:
    """Table and its gradient once, output and upstream gradient once."""
    return Work(bytes=2 * case.vocab * case.dim * 4 + 2 * case.tokens * case.dim * DTYPE.itemsize)


@pytest.mark.parametrize("provider", BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, BOTH, setup, work)
