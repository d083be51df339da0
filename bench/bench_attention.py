"""Attention over packed documents, every backend that is installed, beside torch's with keys and values repeated."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.common import DEVICE, Call, Work
from bench.peers import Absent
from pgolf_kernels import set_attention_backend, varlen_attention
from pgolf_kernels.attention import attention_backend, reference

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
HEADS, KV_HEADS, DIM, LONGEST = 8, 4, 64, 2048


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}, {sum(self.lengths)} tokens"


def documents(count: int, tokens: int) -> tuple[int, ...]:
    """Lengths between 1 and LONGEST that sum up to `tokens`, spread evenly at random with a fixed seed."""
    cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(0))[: count - 1].sort().values + 1
    bounds = [0, *cuts.tolist(), tokens]
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    return tuple(part for n in lengths for part in [LONGEST] * (n // LONGEST) + [n % LONGEST] * (n % LONGEST > 0))


CASES = (
    [Case("128 documents", documents(128, 98304)), Case("rows of 2048", (2048,) * 48)]
    if GPU
    else [Case("8 documents", documents(8, 2048))]
)


def setup(case: Case, device: torch.device) -> dict[str, Tensor]:
    tokens = sum(case.lengths)
    q, k, v, grad = (torch.randn(tokens, heads, DIM, device=device).to(DTYPE) for heads in (8, 4, 4, 8))
    bounds = torch.tensor([0, *case.lengths]).cumsum(0).int().to(device)
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_(), "grad": grad, "bounds": bounds}


def forward_work(case: Case) -> Work:
    pairs = sum(n * (n + 1) // 2 for n in case.lengths)
    tokens = sum(case.lengths)
    return Work(tokens * DIM * DTYPE.itemsize * 2 * (HEADS + KV_HEADS), 4 * HEADS * DIM * pairs)


def both_work(case: Case) -> Work:
    forward = forward_work(case)
    return Work(4 * forward.bytes, 7 * forward.flops // 2)


@contextlib.contextmanager
def forced(backend: str) -> Iterator[None]:
    try:
        set_attention_backend(backend)
    except RuntimeError as error:
        raise Absent(str(error)) from error
    try:
        yield
    finally:
        set_attention_backend("auto")


def chosen(x: dict[str, Tensor]) -> Tensor:
    return varlen_attention(x["q"], x["k"], x["v"], x["bounds"], LONGEST)


def through(backend: str) -> Callable[[dict[str, Tensor]], Tensor]:
    def call(x: dict[str, Tensor]) -> Tensor:
        if not GPU:
            raise Absent("needs a GPU")
        with forced(backend):
            return chosen(x)

    return call


def torch_repeated(x: dict[str, Tensor]) -> Tensor:
    """torch.nn.attention.varlen on keys and values repeated to one per query head, as its callers without GQA do."""
    if not GPU:
        raise Absent("needs a GPU")
    from torch.nn.attention.varlen import varlen_attn

    k, v = (x[name].repeat_interleave(HEADS // KV_HEADS, dim=1) for name in ("k", "v"))
    bounds = x["bounds"]
    return varlen_attn(x["q"], k, v, bounds, bounds, LONGEST, LONGEST, window_size=(-1, 0))


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def block_mask(bounds: Tensor) -> Any:
    """Causal within documents. It is made once an input and not timed: all layers of a step share it."""
    positions = torch.arange(int(bounds[-1]), device=bounds.device, dtype=bounds.dtype)
    document = torch.searchsorted(bounds, positions, right=True)

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[query] == document[key]) & (query >= key)

    return compiled(create_block_mask)(visible, None, None, len(positions), len(positions), device=bounds.device)


def flex(x: dict[str, Any]) -> Tensor:
    if not GPU and x["q"].requires_grad:
        raise Absent("flex_attention has no backward pass on the CPU")
    if "mask" not in x:
        x["mask"] = block_mask(x["bounds"])
    q, k, v = (x[name].transpose(0, 1).unsqueeze(0) for name in ("q", "k", "v"))
    return compiled(flex_attention)(q, k, v, block_mask=x["mask"], enable_gqa=True).squeeze(0).transpose(0, 1)


def by_document(x: dict[str, Tensor]) -> Tensor:
    if GPU:
        raise Absent("holds whole score matrices: for the CPU")
    return reference(x["q"], x["k"], x["v"], x["bounds"], x["bounds"], True, DIM**-0.5)


FUNCTIONS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    f"pgolf_kernels ({attention_backend(DEVICE)})": chosen,
    "FlashAttention 3": through("fa3"),
    "torch, grouped": through("torch"),
    "torch, repeated": torch_repeated,
    "flex_attention, torch.compile": flex,
    "softmax by document": by_document,
}


def forward_by(function: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[Case, dict[str, Tensor]], Call]:
    def build(case: Case, x: dict[str, Tensor]) -> Call:
        inputs = x | {name: x[name].detach() for name in ("q", "k", "v")}
        return lambda: function(inputs)

    return build


def both_by(function: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[Case, dict[str, Tensor]], Call]:
    def build(case: Case, x: dict[str, Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(x), [x["q"], x["k"], x["v"]], x["grad"])

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
