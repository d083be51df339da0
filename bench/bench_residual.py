"""Weighted sums of residual streams with their RMSNorm, and either alone, beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import expressions
from bench.common import DEVICE, Call, Work, beside_pytorch
from pgolf_kernels import combine, combine_norm, norm_residual

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
SUMS, NORMS = [Case(3)], [Case(1)]


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


def sum_by(function: Callable[..., Any]) -> Callable[..., tuple[Tensor]]:
    return lambda streams, coefficients: (function(streams, coefficients)[0],)


def norm_by(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Both outputs have a gradient: that of x is of the residual connection around what reads the norm."""
    return lambda streams, coefficients: function(streams[0])


def forward_by(function: Callable[..., Any]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        streams, coefficients = [s.detach() for s in x["streams"]], x["coefficients"].detach()
        return lambda: function(streams, coefficients)

    return build


def both_by(function: Callable[..., Any], *, frozen: bool = False) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        coefficients = x["coefficients"].detach() if frozen else x["coefficients"]
        inputs = [*x["streams"], *([] if frozen else [coefficients])]

        def call() -> tuple[Tensor | None, ...]:
            outputs = function(x["streams"], coefficients)
            return torch.autograd.grad(outputs, inputs, x["upstream"][: len(outputs)], allow_unused=True)

        return call

    return build


FUNCTIONS = beside_pytorch(ours, eager)
SUM = {name: sum_by(function) for name, function in beside_pytorch(combine, expressions.combine).items()}
NORM = {name: norm_by(function) for name, function in beside_pytorch(norm_residual, expressions.norm_residual).items()}
FORWARD, SUM_FORWARD, NORM_FORWARD = (
    {name: forward_by(function) for name, function in each.items()} for each in (FUNCTIONS, SUM, NORM)
)
BOTH, SUM_BOTH, NORM_BOTH = (
    {name: both_by(function) for name, function in each.items()} for each in (FUNCTIONS, SUM, NORM)
)
FROZEN_BOTH = {name: both_by(function, frozen=True) for name, function in FUNCTIONS.items()}


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


def passes(count: Callable[[Case], int]) -> Callable[[Case], Work]:
    """So many passes over one stream."""
    return lambda case: Work(bytes=count(case) * case.rows * case.width * DTYPE.itemsize)


@pytest.mark.parametrize("provider", FROZEN_BOTH)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_frozen_coefficients_forward_backward(bench: Any, case: Case, provider: str) -> None:
    """Forward as above; backward: the norm and two gradients read, every stream's gradient written."""
    bench(case, provider, FROZEN_BOTH, setup, passes(lambda case: 2 * case.streams + 5))


@pytest.mark.parametrize("provider", SUM_FORWARD)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_combine_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, SUM_FORWARD, setup, passes(lambda case: case.streams + 1))


@pytest.mark.parametrize("provider", SUM_BOTH)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_combine_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, SUM_BOTH, setup, passes(lambda case: 3 * case.streams + 2))


@pytest.mark.parametrize("provider", NORM_FORWARD)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm_residual_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, NORM_FORWARD, setup, passes(lambda case: 2))


@pytest.mark.parametrize("provider", NORM_BOTH)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm_residual_forward_backward(bench: Any, case: Case, provider: str) -> None:
    """Forward as above; backward: x or its norm and two gradients read, one written."""
    bench(case, provider, NORM_BOTH, setup, passes(lambda case: 6))
