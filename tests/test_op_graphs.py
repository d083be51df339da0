"""Ops whose launches a CUDA graph of the model holds: recorded forward and backward, then replayed on other values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pgolf_kernels import (
    adapter_adamw,
    batched_lora_multi,
    combine_norm,
    embedding,
    norm_residual,
    qk_rope,
    qkv_rope,
    xsa,
)

ROWS, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 300, 256, 8, 4, 32
Q, K, X = (ROWS, HEADS, HEAD_DIM), (ROWS, KV_HEADS, HEAD_DIM), (ROWS, WIDTH)


def _tables(device: str) -> tuple[Tensor, Tensor, Tensor]:
    angles = torch.linspace(0, 9, ROWS * 4, device=device).view(ROWS, 4)
    return torch.ones(HEADS, device=device), angles.cos(), angles.sin()


def _qk(device: str) -> Callable[..., object]:
    tables = _tables(device)
    return lambda q, k: qk_rope(q, k, *tables)


def _qkv(device: str) -> Callable[..., list[Tensor]]:
    tables, readers = _tables(device), {"kv_heads": KV_HEADS, "key_readers": 2, "value_readers": 3}

    def call(x: Tensor, weight: Tensor) -> list[Tensor]:
        q, keys, values = qkv_rope(x, weight, *tables, **readers)
        return [q, *keys, *values]

    return call


def _packed_lora(device: str) -> Callable[..., list[Tensor]]:
    bounds = torch.tensor([0, 100, 100, 280], dtype=torch.int32, device=device)
    return lambda x, w, a, b: batched_lora_multi(x, [w, w], [a, a], [b, b], cu_seqlens=bounds)


def _embedding(device: str) -> Callable[..., list[Tensor]]:
    ids = torch.arange(ROWS, device=device) % 64
    return lambda table: [embedding(ids, table, dtype=table.dtype)]


def _plain(function: Callable[..., object]) -> Callable[[str], Callable[..., object]]:
    return lambda device: function


CASES = {
    "qk_rope": (_qk, [Q, K]),
    "qkv_rope": (_qkv, [X, ((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH)]),
    "xsa": (_plain(lambda y, v: [xsa(y, v)]), [Q, K]),
    "combine_norm": (_plain(lambda x, y, c: combine_norm([x, y], c)[:2]), [X, X, (2, WIDTH)]),
    "norm_residual": (_plain(lambda x: norm_residual(x, scale=0.5)), [X]),
    "embedding": (_embedding, [(64, WIDTH)]),
    "batched_lora": (_packed_lora, [X, (WIDTH, WIDTH), (3, 16, WIDTH), (3, WIDTH, 16)]),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_recorded_call_is_the_call(name: str) -> None:
    make, shapes = CASES[name]
    function = make("cuda")
    leaves = [torch.randn(shape, device="cuda").to(torch.bfloat16).requires_grad_() for shape in shapes]

    def call() -> list[Tensor]:
        outputs = list(function(*leaves))
        upstream = [torch.ones_like(y) for y in outputs]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]

    call()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = call()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(torch.randn(leaf.shape, device="cuda"))
    graph.replay()
    for mine, wanted in zip(recorded, call(), strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, wanted)


@pytest.mark.gpu
def test_a_recorded_optimiser_step_is_the_step() -> None:
    def fresh() -> list[Tensor]:
        return [torch.full((2, 3, 16, 64), value, device="cuda") for value in (1.0, 0.5, 0.0)]

    steps = torch.tensor([1, 0, 2], device="cuda")
    (p, g, v), (q, h, w) = fresh(), fresh()
    graph = torch.cuda.CUDAGraph()
    adapter_adamw([t.clone() for t in (p,)], [g], [v.clone()], steps, lr=0.1)
    with torch.cuda.graph(graph):
        adapter_adamw([p], [g], [v], steps, lr=0.1)
    for _ in range(3):
        steps.add_((steps > 0).long())
        graph.replay()
        adapter_adamw([q], [h], [w], steps, lr=0.1)
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(v, w)
    assert not torch.equal(p, torch.ones_like(p))
    assert torch.equal(p[:, 1], torch.ones_like(p[:, 1]))
