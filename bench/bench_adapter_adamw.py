"""One AdamW step over the adapters of a batch of documents, beside torch's fused AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import DEVICE, Call, Work
from pgolf_kernels import adapter_adamw

SETTINGS = {"lr": 1e-4, "eps": 1e-10, "weight_decay": 0.5}


@dataclass(frozen=True)
class Case:
    """The adapters of pull request 1727: q, k, v, o and mlp in every slot, one for the logits."""

    slots: int
    documents: int
    dim: int
    kv_dim: int
    vocab: int
    rank: int

    def shapes(self) -> list[tuple[int, ...]]:
        outs = [self.dim, self.kv_dim, self.kv_dim, self.dim, self.dim]
        pairs = [(self.slots, out) for out in outs] + [(1, self.vocab)]
        return [
            shape
            for slots, out in pairs
            for shape in ((slots, self.documents, self.rank, self.dim), (slots, self.documents, out, self.rank))
        ]

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes())

    def __str__(self) -> str:
        return f"{self.elements / 1e6:.1f} M parameters"


CASES = [Case(17, 64, 512, 256, 8192, 96) if DEVICE.type == "cuda" else Case(4, 4, 256, 128, 1024, 32)]


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    params = [torch.randn(shape, device=device) for shape in case.shapes()]
    return {"params": params, "grads": [torch.randn_like(p) for p in params]}


def work(case: Case) -> Work:
    """p, g, v read and p, v written, fp32."""
    return Work(20 * case.elements, 10 * case.elements)


def ours(case: Case, x: dict[str, list[Tensor]]) -> Call:
    squares = [torch.zeros_like(p) for p in x["params"]]
    steps = torch.ones(case.documents, dtype=torch.long, device=DEVICE)
    return lambda: adapter_adamw(x["params"], x["grads"], squares, steps, beta2=0.999, **SETTINGS)


def torch_fused(case: Case, x: dict[str, list[Tensor]]) -> Call:
    leaves = [torch.nn.Parameter(p) for p in x["params"]]
    for leaf, grad in zip(leaves, x["grads"], strict=True):
        leaf.grad = grad
    gpu = DEVICE.type == "cuda"
    return torch.optim.AdamW(leaves, betas=(0.0, 0.999), fused=True, capturable=gpu, **SETTINGS).step


PROVIDERS = {"pgolf_kernels": ours, "torch fused AdamW": torch_fused}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, PROVIDERS, setup, work)
