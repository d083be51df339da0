"""What stands around attention: norm, rotary embedding and gain of queries and keys, with the projections before them
and for several readers behind them; XSA. Beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import expressions
from bench.common import DEVICE, Call, Work, beside_pytorch
from pgolf_kernels import qk_rope, qk_rope_readers, qkv_rope, xsa
from pgolf_kernels.qk_rope import EPS
from pgolf_kernels.qk_rope import reference as qk_rope_reference
from pgolf_kernels.xsa import reference as xsa_reference

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
PAIRS = 8  # of rotated dimensions
KEY_READERS, VALUE_READERS = 2, 3  # a member of the head groups each; XSA reads the values too


@dataclass(frozen=True)
class Case:
    rows: int = 48
    length: int = 2048
    heads: int = 8
    kv_heads: int = 4
    dim: int = 64
    width: int = 512  # of the block's input

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
    return {name: direction(by(function)) for name, function in beside_pytorch(kernel, reference).items()}


ROPE_FORWARD = providers(rope_by, qk_rope, qk_rope_reference, forward_by)
ROPE_BOTH = providers(rope_by, qk_rope, qk_rope_reference, both_by)
XSA_FORWARD = providers(xsa_by, xsa, xsa_reference, forward_by)
XSA_BOTH = providers(xsa_by, xsa, xsa_reference, both_by)


def work_of(large: int, small: int) -> Callable[[Case], Work]:
    """So many passes over the tensor with all heads, and over that with the key/value heads."""
    return lambda case: Work(
        bytes=case.rows * case.length * case.dim * DTYPE.itemsize * (large * case.heads + small * case.kv_heads)
    )


# ---- with the projections, and for several readers -------------------------------------------------------------------


def setup_projected(case: Case, device: torch.device) -> dict[str, Any]:
    def draw(scale: float, *size: int) -> Tensor:
        return (torch.randn(size, device=device) * scale).to(DTYPE)

    x, shape = setup(case, device), (case.rows, case.length, case.kv_heads, case.dim)
    out = (case.heads + 2 * case.kv_heads) * case.dim
    return x | {
        "x": draw(1.0, case.rows, case.length, case.width).requires_grad_(),
        "weight": draw(case.width**-0.5, out, case.width).requires_grad_(),
        "gain": x["gain"].requires_grad_(),
        "value": draw(1.0, *shape).requires_grad_(),
        "upstream": [x["upstream"][0], *(draw(1.0, *shape) for _ in range(KEY_READERS + VALUE_READERS))],
    }


def readers_in_pytorch(
    q: Tensor, k: Tensor, v: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, *, key_readers: int, value_readers: int
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    q, k = qk_rope_reference(q, k, gain, cos, sin)
    return q, (k,) * key_readers, (v,) * value_readers


def qkv_in_pytorch(*inputs: Tensor, **options: int) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    return expressions.qkv_rope(*inputs, **options, eps=EPS)


def read_by(names: Sequence[str], differentiable: Sequence[str], **options: int) -> Callable[..., Any]:
    """Directions of a function of these inputs whose keys and values are returned once for each reader."""

    def by(function: Callable[..., Any], backward: bool) -> Callable[[Case, dict[str, Any]], Call]:
        def build(case: Case, x: dict[str, Any]) -> Call:
            inputs = [x[name] if backward else x[name].detach() for name in names]

            def call() -> tuple[Tensor, ...]:
                q, keys, values = function(*inputs, key_readers=KEY_READERS, value_readers=VALUE_READERS, **options)
                outputs = (q, *keys, *values)
                if not backward:
                    return outputs
                return torch.autograd.grad(outputs, [x[name] for name in differentiable], x["upstream"])

            return call

        return build

    return by


def reader_providers(by: Callable[..., Any], kernel: Any, expression: Any, backward: bool) -> dict[str, Any]:
    return {name: by(function, backward) for name, function in beside_pytorch(kernel, expression).items()}


BY_READERS = read_by(("large", "small", "value", "gain", "cos", "sin"), ("large", "small", "value", "gain"))
BY_QKV = read_by(("x", "weight", "gain", "cos", "sin"), ("x", "weight", "gain"), kv_heads=Case.kv_heads)
READERS = reader_providers(BY_READERS, qk_rope_readers, readers_in_pytorch, True)
QKV_FORWARD = reader_providers(BY_QKV, qkv_rope, qkv_in_pytorch, False)
QKV_BOTH = reader_providers(BY_QKV, qkv_rope, qkv_in_pytorch, True)


def qkv_forward_work(case: Case) -> Work:
    tokens, out = case.rows * case.length, (case.heads + 2 * case.kv_heads) * case.dim
    return Work(tokens * (case.width + out) * DTYPE.itemsize, 2 * tokens * case.width * out)


def qkv_both_work(case: Case) -> Work:
    """And for the backward pass: read x again, the projections and all readers' gradients, write dx; three products."""
    forward, tokens = qkv_forward_work(case), case.rows * case.length
    heads = 2 * case.heads + case.kv_heads * (1 + KEY_READERS + VALUE_READERS)
    backward = tokens * (2 * case.width + heads * case.dim) * DTYPE.itemsize
    return Work(forward.bytes + backward, 3 * forward.flops)


@pytest.mark.parametrize("provider", ROPE_FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qk_rope_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, ROPE_FORWARD, setup, work_of(2, 2))


@pytest.mark.parametrize("provider", ROPE_BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qk_rope_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, ROPE_BOTH, setup, work_of(5, 5))


@pytest.mark.parametrize("provider", READERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qk_rope_readers_forward_backward(bench: Any, case: Case, provider: str) -> None:
    """As qk_rope's, with a gradient from each reader; of the values nothing else moves but their gradient."""
    bench(case, provider, READERS, setup_projected, work_of(5, 5 + KEY_READERS - 1 + VALUE_READERS + 1))


@pytest.mark.parametrize("provider", QKV_FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qkv_rope_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, QKV_FORWARD, setup_projected, qkv_forward_work)


@pytest.mark.parametrize("provider", QKV_BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_qkv_rope_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, QKV_BOTH, setup_projected, qkv_both_work)


@pytest.mark.parametrize("provider", XSA_FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xsa_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, XSA_FORWARD, setup, work_of(2, 1))


@pytest.mark.parametrize("provider", XSA_BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_xsa_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, XSA_BOTH, setup, work_of(5, 3))
