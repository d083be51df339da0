"""Linears with a document's own adapter, beside a linear and two bmm under autocast, as the public systems do it,
eagerly and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import DEVICE, Call, Work
from pgolf_kernels import batched_lora, batched_lora_multi

GPU = DEVICE.type == "cuda"


@dataclass(frozen=True)
class Case:
    documents: int
    length: int
    dim: int
    outs: tuple[int, ...]
    rank: int = 96
    dtype: torch.dtype = torch.bfloat16  # of activations and weights; the adapters are float32

    def __str__(self) -> str:
        dtype = "" if GPU else f" {str(self.dtype).removeprefix('torch.')}"
        return f"B{self.documents} T{self.length} {self.dim}->{'+'.join(map(str, self.outs))} r{self.rank}{dtype}"

    @property
    def rows(self) -> int:
        return self.documents * self.length


CASES = [
    Case(64, 2048, 512, (512,)), Case(64, 256, 512, (512,)), Case(64, 256, 512, (8192,)), Case(64, 2048, 512, (256,)),
    Case(64, 2048, 512, (512, 256, 256)),
]  # fmt: skip
if not GPU:
    CASES = [
        Case(documents, length, 512, outs, rank, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for documents, length, outs, rank in (
            (8, 128, (512,), 16), (64, 64, (512,), 96), (64, 256, (512,), 96), (8, 128, (512, 256, 256), 16),
        )
    ]  # fmt: skip


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    def draw(scale: float, *size: int) -> Tensor:
        return torch.randn(size, device=device) * scale

    documents, rank = case.documents, case.rank
    return {
        "x": draw(1.0, documents, case.length, case.dim).to(case.dtype).requires_grad_(),
        "weights": [draw(case.dim**-0.5, out, case.dim).to(case.dtype) for out in case.outs],
        "a": [draw(case.dim**-0.5, documents, rank, case.dim).requires_grad_() for _ in case.outs],
        "b": [draw(rank**-0.5, documents, out, rank).requires_grad_() for out in case.outs],
        "grads": [draw(1.0, documents, case.length, out).to(case.dtype) for out in case.outs],
    }


def _sizes(case: Case) -> tuple[int, int, int]:
    """(elements of x, of all outputs, of all adapters)."""
    outs = sum(case.outs)
    adapters = case.documents * case.rank * (len(case.outs) * case.dim + outs)
    return case.rows * case.dim, case.rows * outs, adapters


def _work(case: Case, moved: int, flops: int) -> Work:
    """A CPU's ceilings are float32's: other dtypes have no share of them."""
    return Work(moved, flops) if GPU or case.dtype == torch.float32 else Work(0, 0)


def forward_work(case: Case) -> Work:
    x, y, adapters = _sizes(case)
    per_row = sum(case.dim * out + case.rank * (case.dim + out) for out in case.outs)
    return _work(case, (x + y) * case.dtype.itemsize + 4 * adapters, 2 * case.rows * per_row)


def both_work(case: Case) -> Work:
    """The base weights are frozen: no product for their gradient."""
    x, y, adapters = _sizes(case)
    per_row = sum(2 * case.dim * out + 3 * case.rank * (case.dim + out) for out in case.outs)
    return _work(case, (3 * x + 2 * y) * case.dtype.itemsize + 12 * adapters, 2 * case.rows * per_row)


def ours(x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    if len(a) == 1:
        return [batched_lora(x, weights[0], a[0], b[0])]
    return batched_lora_multi(x, weights, a, b)


def linear_and_bmm(x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        return [
            F.linear(x, weight) + torch.bmm(torch.bmm(x, lora_a.mT), lora_b.mT)
            for weight, lora_a, lora_b in zip(weights, a, b, strict=True)
        ]


FUNCTIONS: dict[str, Callable[..., list[Tensor]]] = {
    "pgolf_kernels": ours,
    "linear and two bmm": linear_and_bmm,
    "linear and two bmm, torch.compile": torch.compile(linear_and_bmm, dynamic=False),
}


def forward_by(function: Callable[..., list[Tensor]]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        def call() -> list[Tensor]:
            with torch.no_grad():
                return function(x["x"], x["weights"], x["a"], x["b"])

        return call

    return build


def both_by(function: Callable[..., list[Tensor]]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        inputs = [x["x"], *x["a"], *x["b"]]
        return lambda: torch.autograd.grad(function(x["x"], x["weights"], x["a"], x["b"]), inputs, x["grads"])

    return build


FORWARD = {name: forward_by(function) for name, function in FUNCTIONS.items()}
BOTH = {name: both_by(function) for name, function in FUNCTIONS.items()}


@pytest.mark.parametrize("provider", FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, FORWARD, setup, forward_work)


@pytest.mark.parametrize("provider", BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, BOTH, setup, both_work)
