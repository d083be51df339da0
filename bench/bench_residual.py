"""Weighted sums of residual streams with their RMSNorm, beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import DEVICE, Call, Work
from pgolf_kernels import combine_norm

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Case:
    streams: int
    rows: int = 98304 if GPU else 4096
    width: int = 512

    def __str__(self) -> str:
        plural = "s" if self.streams > 1 else ""
        return f"{self.streams} stream{plural}, {self.rows}x{self.width} {str(DTYPE).removeprefix('torch.')}"


CASES = [Case(1), Case(3), Case(5)]


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    shape = (case.rows, case.width)
    return {
        "streams": [torch.randn(shape, device=device, dtype=DTYPE).requires_grad_() for _ in range(case.streams)],
        "coefficients": torch.rand(case.streams, case.width, device=device).requires_grad_(),
        "upstream": [torch.randn(shape, device=device, dtype=DTYPE) for _ in range(2)],
    }


def eager(streams: list[Tensor], coefficients: Tensor) -> tuple[Tensor, Tensor]:
    total = sum(c.to(s.dtype) * s for c, s in zip(coefficients, streams, strict=True))
    return total, F.rms_norm(total, total.shape[-1:])


def ours(streams: list[Tensor], coefficients: Tensor) -> tuple[Tensor, Tensor]:
    return combine_norm(streams, coefficients)[:2]


def forward_by(function: Callable[..., Any]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        streams, coefficients = [s.detach() for s in x["streams"]], x["coefficients"].detach()
        return lambda: function(streams, coefficients)

    return build


def both_by(function: Callable[..., Any]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        inputs = [*x["streams"], x["coefficients"]]
        return lambda: torch.autograd.grad(function(x["streams"], x["coefficients"]), inputs, x["upstream"])

    return build


FUNCTIONS = {"pgolf_kernels": ours, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
FORWARD = {name: forward_by(function) for name, function in FUNCTIONS.items()}
BOTH = {name: both_by(function) for name, function in FUNCTIONS.items()}


def forward_work(case: Case) -> Work:
    """Read every stream, write the sum and its norm."""
    return Work(bytes=(case.streams + 2) * case.rows * case.width * DTYPE.itemsize)


def both_work(case: Case) -> Work:
    """And for the backward pass: read every stream and two gradients, write every stream's gradient."""
    backward = (2 * case.streams + 2) * case.rows * case.width * DTYPE.itemsize
    return Work(bytes=forward_work(case).bytes + backward)


@pytest.mark.parametrize("provider", FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, FORWARD, setup, forward_work)


@pytest.mark.parametrize("provider", BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, BOTH, setup, both_work)
