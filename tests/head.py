"""What the tests of linear_softcap_ce share: inputs of the head, drawn, and its results in plain PyTorch."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_kernels.linear_softcap_ce import linear_softcap_ce_reference, linear_softcap_cross_entropy

CPU = torch.device("cpu")
DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LORAS = [False, True, "even"]  # without adapters; with each row's document; with as many rows of each, one by one
MODES = [pytest.param(False, id="keep"), pytest.param(True, id="recompute")]


@dataclass
class Problem:
    """Inputs of one call; `wide` holds them in float64."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    doc_ids: Tensor | None
    hints: Tensor
    upstream: Tensor

    def adapters(self) -> dict[str, Tensor | None]:
        return {"lora_a": self.lora_a, "lora_b": self.lora_b, "doc_ids": self.doc_ids}

    def each(self, softcap: float | None, **options: Any) -> tuple[Tensor, Tensor]:
        """Losses and hint log-probabilities by the call under test."""
        call = (self.hidden, self.weight, self.targets, softcap)
        return linear_softcap_cross_entropy(*call, **self.adapters(), hints=self.hints, reduction="none", **options)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.lora_a, self.lora_b) if t is not None]

    def converted(self, dtype: torch.dtype) -> "Problem":
        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        hidden, weight, a, b = map(leaf, (self.hidden, self.weight, self.lora_a, self.lora_b))
        assert hidden is not None and weight is not None
        return Problem(hidden, weight, self.targets, a, b, self.doc_ids, self.hints, self.upstream)


def draw(
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    *,
    weight_dtype: torch.dtype | None = None,
    lora: bool | str = False,
    shuffled: bool = False,
    rows: int = 96,
    width: int = 32,
    vocab: int = 203,
    docs: int = 5,
    rank: int = 8,
) -> Problem:
    generator = torch.Generator().manual_seed(rows + vocab)

    def normal(*shape: int, scale: float, of: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(of).to(device).requires_grad_()

    docs = 4 if lora == "even" else docs
    weights = weight_dtype or dtype
    hidden = normal(rows, width, scale=1.0, of=dtype)
    weight = normal(vocab, width, scale=5 / width**0.5, of=weights)
    a = normal(docs, rank, width, scale=1 / width**0.5, of=weights) if lora else None
    b = normal(docs, vocab, rank, scale=3 / rank**0.5, of=weights) if lora else None
    ids = torch.randint(docs, (rows,), generator=generator)
    ids = ids if shuffled else ids.sort().values
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[rows // 3] = -100
    hints = torch.randint(-1, vocab, (rows,), generator=generator)
    hints[0] = -1
    upstream = torch.randn(rows, generator=generator).to(device)
    ids = ids.to(device) if lora is True else None
    return Problem(hidden, weight, targets.to(device), a, b, ids, hints.to(device), upstream)


def reference(problem: Problem, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses, hint log-probabilities and gradients in plain PyTorch, in the problem's dtype."""
    p = problem
    losses, hinted = linear_softcap_ce_reference(
        p.hidden, p.weight, p.targets, p.lora_a, p.lora_b, p.doc_ids, p.hints, softcap, temperature
    )
    grads = torch.autograd.grad((losses * p.upstream.to(losses.dtype)).sum(), p.leaves())
    return losses.detach(), hinted, list(grads)


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())
