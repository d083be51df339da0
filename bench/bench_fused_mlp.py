"""The two-layer perceptron of the public systems, forward and backward, beside its six matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import DEVICE, Call, Work
from bench.peers import Absent, script_1530
from pgolf_kernels import fp8_mlp, fused_mlp
from pgolf_kernels.fp8_mlp import runs_fp8

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Case:
    rows: int
    dim: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.dim}-{self.hidden}-{self.dim}"


CASES = [Case(98304, 512, 2048)] if GPU else [Case(4096, 256, 1024)]


def setup(case: Case, device: torch.device) -> dict[str, Tensor]:
    def draw(scale: float, *size: int) -> Tensor:
        return (torch.randn(size, device=device) * scale).to(DTYPE)

    leaves = {
        "x": draw(1.0, case.rows, case.dim),
        "up": draw(case.dim**-0.5, case.hidden, case.dim),
        "down": draw(case.hidden**-0.5, case.dim, case.hidden),
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()} | {"grad": draw(1.0, case.rows, case.dim)}


def forward_work(case: Case) -> Work:
    activations = case.rows * (2 * case.dim + 2 * case.hidden)  # x, y; h written and read
    return Work(activations * DTYPE.itemsize, 4 * case.rows * case.dim * case.hidden)


def both_work(case: Case) -> Work:
    activations = case.rows * (5 * case.dim + 7 * case.hidden)
    return Work(activations * DTYPE.itemsize, 12 * case.rows * case.dim * case.hidden)


def eager(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.leaky_relu(F.linear(x, up), 0.5).square(), down)


def in_fp8(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """With products in FP8, which a CPU emulates."""
    if not GPU or not runs_fp8(DEVICE):
        raise Absent("needs a GPU of compute capability 9.0")
    return fp8_mlp(x, up, down)


def pull_request_1530(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """That script's Triton MLP."""
    if not GPU:
        raise Absent("needs a GPU")
    return script_1530().FusedLinearLeakyReLUSquareFunction.apply(x, up, down)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "pgolf_kernels": fused_mlp,
    "pgolf_kernels fp8": in_fp8,
    "eager": eager,
    "torch.compile": torch.compile(eager),
    "pull request 1530": pull_request_1530,
}


def forward_by(function: Callable[..., Tensor]) -> Callable[[Case, dict[str, Tensor]], Call]:
    def build(case: Case, x: dict[str, Tensor]) -> Call:
        def call() -> Tensor:
            with torch.no_grad():
                return function(x["x"], x["up"], x["down"])

        return call

    return build


def both_by(function: Callable[..., Tensor]) -> Callable[[Case, dict[str, Tensor]], Call]:
    def build(case: Case, x: dict[str, Tensor]) -> Call:
        leaves = [x["x"], x["up"], x["down"]]
        return lambda: torch.autograd.grad(function(*leaves), leaves, x["grad"])

    return build


def two_products(case: Case, x: dict[str, Tensor]) -> Call:
    plain, up, down = (x[name].detach() for name in ("x", "up", "down"))
    hidden = torch.randn(case.rows, case.hidden, device=DEVICE).to(DTYPE)
    return lambda: (plain @ up.t(), hidden @ down.t())


def six_products(case: Case, x: dict[str, Tensor]) -> Call:
    plain, up, down = (x[name].detach() for name in ("x", "up", "down"))
    hidden, grad = torch.randn(case.rows, case.hidden, device=DEVICE).to(DTYPE), x["grad"]
    return lambda: (
        plain @ up.t(), hidden @ down.t(), grad @ down, grad.t() @ hidden, hidden @ up, hidden.t() @ plain,
    )  # fmt: skip


FORWARD = {name: forward_by(function) for name, function in FUNCTIONS.items()} | {"two products alone": two_products}
BOTH = {name: both_by(function) for name, function in FUNCTIONS.items()} | {"six products alone": six_products}


@pytest.mark.parametrize("provider", FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, FORWARD, setup, forward_work)


@pytest.mark.parametrize("provider", BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, BOTH, setup, both_work)
