"""Every Triton kernel, at the launches that training and test-time training make, compiled for sm_90 without spills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from pgolf_kernels._triton_op import kernels
from pgolf_kernels.batched_lora import Layout
from pgolf_kernels.qk_rope import split_heads
from pgolf_kernels.residual import CONFIG
from pgolf_kernels.stepped_lora import Moments
from tests import triton_aot

ROWS, WIDTH, HIDDEN, VOCAB = 98304, 512, 2048, 8192
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = torch.finfo(FP32).eps


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fused_mlp(module: ModuleType, dtype: torch.dtype, width: int = WIDTH, hidden_dim: int = HIDDEN) -> None:
    shapes = (ROWS, width), (hidden_dim, width), (width, hidden_dim)
    x, w_up, w_down = (empty(*shape, dtype=dtype) for shape in shapes)
    keeps_sign = dtype == BF16
    hidden, pre = module.up(x, w_up, 0.5, keeps_sign)
    module.grad_pre(x, w_down, hidden if keeps_sign else pre, 0.5, keeps_sign)


def fp8_mlp(module: ModuleType, dtype: torch.dtype, rows: int, width: int, hidden_dim: int) -> None:
    x, w_up, w_down = (
        empty(*shape, dtype=dtype) for shape in ((rows, width), (hidden_dim, width), (width, hidden_dim))
    )
    (x8, _, facts), (up, *_) = module.operand(x), module.operand(w_up)
    down_turned, down, _ = module.operand(w_down.t())
    hidden, _, negative, _ = module.up(x8, facts, up, facts, 0.5)
    module.grad_pre(x8, facts, down_turned, facts, hidden, negative, facts, 0.5)
    module.add_product(x, hidden, down, facts, facts)


def linear_softcap_ce(module: ModuleType, vocab: int) -> None:
    hidden, weight, powers = empty(ROWS, WIDTH), empty(vocab, WIDTH), empty(ROWS, vocab)
    index, value = empty(ROWS, dtype=torch.int64), empty(ROWS, dtype=FP32)
    scalars, results = (30.0, 1.0, -100), (value, value, value)
    for hints in (None, index):
        for kept in ((None, None), (powers, None), (powers, hidden)):
            module.losses(hidden, weight, index, hints, *scalars, *results, *kept)
    module.gradient(hidden, weight, index, 30.0, 1.0, value, value, powers)
    for rows in (hidden, empty(ROWS, WIDTH, dtype=FP32), empty(ROWS, 96)):
        module.scale_rows(rows, value, rows)
    module.by_document(index[:3072], 64)


def batched_lora(
    module: ModuleType, packed: bool, dtype: torch.dtype, outs: tuple[int, ...], width: int = WIDTH
) -> None:
    """Three projections of one input, with adapters picked by an index and one residual; or the head's."""
    documents, length = 64, 2048
    x = empty(documents * length, width, dtype=dtype)
    weights = [empty(out, width, dtype=dtype) for out in outs]
    a = [empty(documents, 96, width, dtype=FP32) for _ in outs]
    b = [empty(documents, out, 96, dtype=FP32) for out in outs]
    index = empty(documents, dtype=torch.int64)
    bounds = empty(documents + 1, dtype=torch.int32)
    layout = Layout(0, bounds, index) if packed else Layout(length, None, index)
    grads = [empty(len(x), out, dtype=dtype) for out in outs]
    *_, s, low = module.forward(x, weights, a, b, [grads[0], *[None] * (len(outs) - 1)], layout, 1.0)
    module.backward(grads, x, weights, a, b, s, low, layout, 1.0, True)


def batched_lora_short(module: ModuleType, dtype: torch.dtype, length: int) -> None:
    """The head's adapters, whose share joins the logits, of dense documents with few rows."""
    documents = 64
    x, grad = (empty(documents * length, n, dtype=dtype) for n in (WIDTH, VOCAB))
    a, b = (empty(documents, *shape, dtype=FP32) for shape in ((96, WIDTH), (VOCAB, 96)))
    layout = Layout(length, None, None)
    _, s, low = module.forward(x, [None], [a], [b], [grad], layout, 1.0)
    module.backward([grad], x, [None], [a], [b], s, low, layout, 1.0, True)


def batched_lora_once(module: ModuleType, dtype: torch.dtype, documents: int, length: int, rank: int) -> None:
    """The backward of a head whose gradient is read once: two documents by several programs each, three by one."""
    x, grad = (empty(documents * length, n, dtype=dtype) for n in (WIDTH, 64 * VOCAB))
    weight = empty(64 * VOCAB, WIDTH, dtype=dtype)
    a, b = (empty(documents, *shape, dtype=FP32) for shape in ((rank, WIDTH), (64 * VOCAB, rank)))
    s, low = (empty(*shape, dtype=dtype) for shape in ((len(x), rank), (documents * rank * (WIDTH + 64 * VOCAB),)))
    module.backward([grad], x, [weight], [a], [b], s, low, Layout(length, None, None), 1.0, True)


def stepped_lora(module: ModuleType, length: int, outs: tuple[int, ...], adds: bool, mean: bool) -> None:
    """q, k, v and o, or an adapter that joins a branch's output, packed, with a step in the backward."""
    documents = 64
    x = empty(documents * length, WIDTH)
    grads = [empty(len(x), out) for out in outs]
    joins = [adds or i == 3 for i in range(len(outs))]
    weights = [None if join else empty(out, WIDTH) for join, out in zip(joins, outs, strict=True)]
    a, b = (
        [Moments(t, t, t if mean else None) for t in (empty(documents, *shape, dtype=FP32) for shape in shapes)]
        for shapes in ([(96, WIDTH)] * len(outs), [(out, 96) for out in outs])
    )
    low = empty(documents, 96 * len(outs), WIDTH), [empty(documents, out, 96) for out in outs]
    # On the meta device the table of factors cannot be computed.
    step = SimpleNamespace(
        steps=empty(documents, dtype=torch.int64), factors=empty(documents, 2, dtype=FP32), lr=1e-4, beta1=0.9 * mean,
        beta2=0.999, eps=1e-10, weight_decay=0.5,
    )  # fmt: skip
    tiles = module.tiles_of(x, Layout(0, empty(documents + 1, dtype=torch.int32), None))
    residuals, scales = (
        [t if join else None for t, join in zip(ts, joins, strict=True)]
        for ts in (grads, [empty(out, dtype=FP32) for out in outs])
    )
    _, s = module.products(x, weights, *low, residuals, tiles, 1.0)
    for later in (None, x):
        module.backward_step(grads, x, weights, a, b, *low, s, scales, later, tiles, True, step)


def adapter_adamw(module: ModuleType, moment: bool) -> None:
    p = empty(17, 64, 96, WIDTH, dtype=FP32)
    factors, reset = empty(64, 2, dtype=FP32), empty(64, dtype=torch.bool)
    for flags, zero in ((None, False), (reset, False), (reset, True)):
        module.step(p, p, p, p if moment else None, factors, flags, zero, 1e-4, 0.9 * moment, 0.999, 1e-10, 0.5)


def muon(module: ModuleType, n: int, rows: int, columns: int) -> None:
    bank, factor = empty(n, rows, columns, dtype=FP32), empty(dtype=FP32)
    for dtype in (BF16, FP16, FP32):
        x = empty(n, *sorted((rows, columns)), dtype=dtype)
        for scalar, row_normalize in ((factor, True), (None, False)):
            module.direction(bank, bank, 0.97, scalar, row_normalize, x)
        module.apply(bank, x, 0.99, 0.02)


def qk_rope(module: ModuleType) -> None:
    q, k = (empty(ROWS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    gain, cos = empty(HEADS, dtype=FP32), empty(2048, 8, dtype=FP32)
    parts = split_heads(empty(ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM), HEADS, KV_HEADS)
    module.forward(q, k, gain, cos, cos, EPS)
    module.forward(*parts[:2], gain, cos, cos, EPS)
    module.backward(q, k, q, k, gain, cos, cos, EPS)
    for keys, values in ((1, 1), (1, 2), (2, 3)):
        module.backward_into(q, [k] * keys, [k] * values, *parts[:2], gain, cos, cos, EPS, *parts)
    for wants_gain in (True, False):
        module.backward_into(q, [k] * 2, [k] * 3, q, k, gain, cos, cos, EPS, q, k, k, wants_gain)
    inverse = empty(ROWS, HEADS + KV_HEADS, dtype=FP32)
    module.backward_into(q, [k] * 2, [k] * 3, *parts[:2], gain, cos, cos, EPS, *parts, True, inverse)


def qkv_rope(module: ModuleType) -> None:
    """The systems', other heads and rotations, and rows that the copy engine cannot address."""
    gain = empty(HEADS, dtype=FP32)
    for dim, pairs, width in ((HEAD_DIM, 8, WIDTH), (HEAD_DIM, 32, WIDTH), (32, 1, WIDTH), (16, 4, 33)):
        weight, cos = empty((HEADS + 2 * KV_HEADS) * dim, width), empty(2048, pairs, dtype=FP32)
        module.project(empty(ROWS, width), weight, gain, cos, cos, KV_HEADS, EPS)


def embedding(module: ModuleType, dtype: torch.dtype, vocab: int) -> None:
    module.backward(empty(ROWS, WIDTH, dtype=dtype), empty(ROWS, dtype=torch.int64), vocab)


def xsa(module: ModuleType) -> None:
    y, v = (empty(ROWS, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    module.forward(y, v, 1e-12)
    module.backward(y, y, v, 1e-12)


def document_map(module: ModuleType, documents: int) -> None:
    module.tiles_of(empty(ROWS, WIDTH), Layout(0, empty(documents + 1, dtype=torch.int32), None))


def residual(module: ModuleType, count: int, width: int) -> None:
    """`count` streams with their norm, all read again later or none; a sum without norm; the norm alone. Coefficients
    learnt and frozen."""
    streams = [empty(ROWS, width) for _ in range(count)]
    x, coefficients = streams[0], empty(count, width, dtype=FP32)
    every, some = [True] * count, [*[True] * (count - 1), False]
    alone = [None] * count
    for flags in ((False, True, False), (True, True, False), (True, False, False), (False, True, True)):
        module.forward(streams, coefficients, 1.0, EPS, *flags, CONFIG.forward(count))
    for d_total, d_normed, through, wanted in (
        *((x, x, through, wanted) for through in (alone, streams) for wanted in (every, some)),
        (x, None, alone, every),
    ):
        gradients = d_total, d_normed, through, 1.0, EPS, wanted, CONFIG.backward(count)
        module.backward(streams, coefficients, *gradients)
    _, normed, inverse = module.forward(streams, coefficients, 1.0, EPS, True, True, True, CONFIG.forward(count))
    module.forward([x], None, 1.0, EPS, False, True, True, CONFIG.norm)
    kept = normed, inverse, coefficients
    launch = CONFIG.frozen_backward(count)
    for d_total, d_normed, through, wanted in (
        (None, x, alone, every),
        (x, x, streams, every),
        (x, None, streams, every),
        *([(x, x, alone, some)] if any(some) else []),
    ):
        module.frozen_backward(d_total, d_normed, *kept, through, 1.0, wanted, launch)
    for later in (None, x):
        module.frozen_backward(None, x, normed, inverse, None, [later], 1.0, [True], CONFIG.frozen_backward(1))


LAUNCHES: dict[str, list[tuple[Callable[..., None], tuple]]] = {
    "adapter_adamw": [(adapter_adamw, (False,)), (adapter_adamw, (True,))],
    "batched_lora": [
        (batched_lora, (False, BF16, (512, 256, 256))),
        (batched_lora, (True, BF16, (512, 256, 256))),
        (batched_lora, (False, FP16, (512, 256, 256))),
        (batched_lora, (True, FP16, (512, 256, 256))),
        (batched_lora, (True, BF16, (VOCAB,))),
        (batched_lora, (True, BF16, (520,))),
        (batched_lora, (True, BF16, (500, 264, 264), 33)),
        (batched_lora_short, (BF16, 48)),
        (batched_lora_short, (FP16, 48)),
        *((batched_lora_once, (BF16, 2, 256, rank)) for rank in (96, 128, 64, 8)),
        (batched_lora_once, (FP16, 3, 256, 96)),
        (batched_lora_once, (BF16, 3, 96, 96)),
        (stepped_lora, (2048, (512, 256, 256, 512), False, False)),
        (stepped_lora, (96, (512, 256, 256, 512), False, True)),
        (stepped_lora, (96, (512, 256, 256), False, False)),
        (stepped_lora, (96, (512, 256, 256), True, True)),
        (stepped_lora, (96, (512,), True, False)),
        (stepped_lora, (96, (264,), True, False)),
        (stepped_lora, (2048, (512,), True, True)),
        *((document_map, (documents,)) for documents in (600, 3000)),
    ],
    "embedding": [(embedding, (dtype, vocab)) for dtype, vocab in ((BF16, VOCAB), (FP32, VOCAB), (BF16, 65536))],
    "fused_mlp": [
        (fused_mlp, (BF16,)),
        (fused_mlp, (FP16,)),
        *((fused_mlp, (BF16, *shape)) for shape in ((768, 3072), (520, 2042), (500, 2000), (33, 70), (8, 8))),
        (fused_mlp, (FP16, 500, 2042)),
    ],
    "fp8_mlp": [
        (fp8_mlp, shape) for shape in ((BF16, ROWS, WIDTH, HIDDEN), (BF16, ROWS, 768, 3072), (FP32, 1000, 48, 272))
    ],
    "linear_softcap_ce": [(linear_softcap_ce, (VOCAB,)), (linear_softcap_ce, (8200,))],
    "muon": [
        (muon, shape)
        for shape in ((22, 512, 512), (22, 256, 512), (11, 2048, 512), (11, 512, 2048), (1, 512, 128), (1, 33, 70))
    ],
    "qk_rope": [(qk_rope, ())],
    "qkv_rope": [(qkv_rope, ())],
    "residual": [
        *((residual, (count, WIDTH)) for count in range(1, 9)),
        *((residual, shape) for shape in ((3, 768), (3, 2048), (8, 2048))),
    ],
    "xsa": [(xsa, ())],
}
SLOW = ("batched_lora", "residual")


def _modules() -> set[str]:
    import pgolf_kernels

    folder = Path(pgolf_kernels.__file__).parent
    return {path.stem[1 : -len("_triton")] for path in folder.glob("_*_triton.py")}


def test_every_module_of_kernels_is_compiled() -> None:
    assert set(LAUNCHES) == _modules()


@triton_aot.needs_triton
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in SLOW else []) for name in LAUNCHES]
)
def test_kernels_compile_for_hopper_without_spills(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = kernels(name)
    kernel_names = {kernel for kernel in vars(module) if kernel.endswith("_kernel")}
    seen = triton_aot.record(monkeypatch, module)
    for launch, arguments in LAUNCHES[name]:
        launch(module, *arguments)
    assert kernel_names <= {kernel.name for kernel in seen}
    triton_aot.assert_sound(seen)


@triton_aot.needs_triton
def test_memory_before_the_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    import triton.language as tl

    from pgolf_kernels._triton_op import pdl
    from pgolf_kernels._triton_tile import wait_for_previous

    @triton.jit
    def early_kernel(x_ptr, EARLY: tl.constexpr, PDL: tl.constexpr):
        x = 1.0
        if EARLY:
            x = tl.load(x_ptr)
        wait_for_previous(PDL)
        tl.store(x_ptr, x + 1.0)

    module = ModuleType("module")
    module.early_kernel = early_kernel  # type: ignore[attr-defined]
    seen = triton_aot.record(monkeypatch, module)
    x = empty(16, dtype=FP32)
    for early in (False, True):
        module.early_kernel[(1,)](x, EARLY=early, **pdl(x))
    assert [kernel.races for kernel in seen] == [False, True]


@triton_aot.needs_triton
def test_products_that_wait_for_each_other_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accumulator that a loop turns with, behind a product that is waited for: ptxas then waits for every wgmma."""
    import triton
    import triton.language as tl

    from pgolf_kernels._triton_op import descriptor

    @triton.jit
    def two_kernel(g_desc, b_desc, s_desc, out_desc, e_desc, columns, LAST: tl.constexpr):
        s = s_desc.load([0, 0])
        e = tl.zeros((256, 64), tl.float32)
        for n in range(0, columns, 64):
            g = g_desc.load([0, n])
            if not LAST:
                e = tl.dot(g, b_desc.load([n, 0]), e)
            out_desc.store([n, 0], tl.dot(g.T, s))
            if LAST:
                e = tl.dot(g, b_desc.load([n, 0]), e)
        e_desc.store([0, 0], e)

    module = ModuleType("module")
    module.two_kernel = two_kernel  # type: ignore[attr-defined]
    seen = triton_aot.record(monkeypatch, module)
    g, b, s = (descriptor(empty(rows, columns), (rows, 64)) for rows, columns in ((256, 512), (64, 64), (256, 64)))
    out, e = (descriptor(empty(rows, 64, dtype=FP32), (rows, 64)) for rows in (64, 256))
    for last in (False, True):
        module.two_kernel[(1,)](g, b, s, out, e, 512, LAST=last, num_warps=8, num_stages=3)
    assert [kernel.serial for kernel in seen] == [False, True]


@triton_aot.needs_triton
def test_a_launch_compiles_anew_for_whatever_a_kernel_is_compiled_for() -> None:
    from pgolf_kernels._triton_op import descriptor
    from pgolf_kernels._triton_tile import launch

    log: list[str] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert grid[:3] == (2, 1, 1)

            def run(*args: object) -> None:
                assert len(args) == len(Kernel.arg_names)
                log.append("again")

            return run

    class Kernel:
        arg_names = ("x_ptr", "x_desc", "rows", "scale", "other_ptr", "BM", "BN")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            return lambda *_, **__: log.append("anew") or Compiled()

    kernel, memory = Kernel(), torch.zeros(64, dtype=BF16)
    first = (memory, descriptor(memory.view(4, 16), (2, 16)), 3, 0.5, None)

    def seen(at: int | None = None, value: object = None, block: int = 16) -> str:
        args = [value if i == at else argument for i, argument in enumerate(first)]
        launch(kernel, (2,), *args, BM=block, BN=8, num_warps=4)
        return log[-1]

    assert [seen(), seen(), seen(0, memory[8:]), seen(3, 0.25)] == ["anew", "again", "again", "again"]
    assert seen(1, descriptor(memory.view(2, 32), (2, 16))) == "again"
    for at, value in (
        (0, memory[1:]), (0, memory.half()), (1, descriptor(memory.view(4, 16), (4, 16))),
        (1, descriptor(memory.half().view(4, 16), (2, 16))), (2, 1), (2, 16), (4, memory),
    ):  # fmt: skip
        assert [seen(at, value), seen(at, value)] == ["anew", "again"]
    assert [seen(block=32), seen()] == ["anew", "again"]
