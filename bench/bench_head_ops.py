"""What stands around attention: norm, rotary embedding and gain of queries and keys; XSA. Beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import DEVICE, Call, Work
from pgolf_kernels import qk_rope, xsa
from pgolf_kernels.qk_rope import reference as qk_rope_reference
from pgolf_kernels.xsa import reference as xsa_reference

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
PAIRS = 8  # of rotated dimensions


@dataclass(frozen=True)
class Case:
    rows: int = 48
    length: int = 2048
    heads: int = 8
    kv_heads: int = 4
    dim: int = 64

    def __str__(self) -> str:
        dtype = str(DTYPE).removeprefix("torch.")
        return f"{self.rows * self.length} tokens, {self.heads} and {self.kv_heads} heads of {self.dim} {dtype}"


CASES = [Case() if GPU else Case(rows=2)]


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    def draw(heads: int) -> Tensor:
        return torch.randn(case.rows, case.length, heads, case.dim, device=device, dtype=DTYPE)

    angles = torch.arange(case.length, device=device)[:, None] * 0.1 ** torch.arange(PAIRS, device=device)
    return {
        "large": draw(case.heads).requires_grad_(),
        "small": draw(case.kv_heads).requires_grad_(),
        "gain": torch.ones(case.heads, device=device),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "upstream": (draw(case.heads), draw(case.kv_heads)),
    }


def rope_by(function: Callable[..., Any]) -> Callable[..., Sequence[Tensor]]:
    return lambda q, k, x: function(q, k, x["gain"], x["cos"], x["sin"])


def xsa_by(function: Callable[..., Any]) -> Callable[..., Sequence[Tensor]]:
    return lambda y, v, x: (function(y, v),)


def forward_by(function: Callable[..., Any]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        large, small = x["large"].detach(), x["small"].detach()
        return lambda: function(large, small, x)

    return build


def both_by(function: Callable[..., Any]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        inputs = [x["large"], x["small"]]

        def call() -> tuple[Tensor, ...]:
            outputs = function(*inputs, x)
            return torch.autograd.grad(outputs, inputs, x["upstream"][: len(outputs)])

        return call

    return build


def providers(by: Callable[..., Any], kernel: Any, reference: Any, direction: Callable[..., Any]) -> dict[str, Any]:
    functions = {"pgolf_kernels": kernel, "eager": reference, "torch.compile": torch.compile(reference, dynamic=False)}
    return {name: direction(by(function)) for name, function in functions.items()}


ROPE_FORWARD = providers(rope_by, qk_rope, qk_rope_reference, forward_by)
ROPE_BOTH = providers(rope_by, qk_rope, qk_rope_reference, both_by)
XSA_FORWARD = providers(xsa_by, xsa, xsa_reference, forward_by)
XSA_BOTH = providers(xsa_by, xsa, xsa_reference, both_by)


def work_of(large: int, small: int) -> Callable[[Case], Work]:
    """So many passes over the tensor with all heads, and over that with the key/value heads."""
    return lambda case: Work(
        bytes=case.rows * case.length * case.dim * DTYPE.itemsize * (large * case.heads + small * case.kv_heads)
    )


@pytest.mark.parametrize("provider", ROPE_FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qk_rope_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, ROPE_FORWARD, setup, work_of(2, 2))


@pytest.mark.parametrize("provider", ROPE_BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qk_rope_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, ROPE_BOTH, setup, work_of(5, 5))


@pytest.mark.parametrize("provider", XSA_FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xsa_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, XSA_FORWARD, setup, work_of(2, 1))


@pytest.mark.parametrize("provider", XSA_BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xsa_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, XSA_BOTH, setup, work_of(5, 3))
