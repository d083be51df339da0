"""Batched LoRA: dense and packed batches against fp64, its contract, its Triton kernels interpreted and compiled."""

import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from pgolf_kernels import batched_lora, batched_lora_multi
from pgolf_kernels._triton_op import interpreting, kernels
from pgolf_kernels.batched_lora import _backward_op, _forward_op, reference
from tests import triton_aot
from tests.gpu import assert_returns_at_once


@dataclass(frozen=True)
class Case:
    documents: int
    length: int  # rows a document (packed: at most)
    features: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    packed: bool = False
    indexed: bool = False
    scale: float = 0.7


CASES = [
    Case(3, 70, 24, (40,), (8,)),
    Case(2, 150, 33, (40, 19, 70), (5, 16, 3)),
    Case(3, 70, 24, (40,), (8,), indexed=True),
    Case(4, 70, 24, (40,), (1,), packed=True),
    Case(2, 150, 33, (40, 19, 70), (5, 16, 3), packed=True, indexed=True),
]
# With the constant that says when e and dB share one pass over the gradient lowered.
ONCE = [
    Case(2, 70, 24, (150,), (8,)),
    Case(2, 200, 33, (40, 19, 130), (5, 96, 16)),
    Case(3, 256, 24, (65,), (1,)),
    Case(1, 3, 24, (200, 64), (128, 70)),
]


def _make(case, dtype, device="cpu"):
    """(x, weights, A, B, residuals), upstream gradients, other arguments. Projection 1 has a residual and no weight."""
    generator = torch.Generator().manual_seed(case.length + case.features)

    def draw(scale, *size):
        return (torch.randn(size, generator=generator) * scale).to(device)

    adapters = case.documents + 1 if case.indexed else case.documents
    options = {"scale": case.scale}
    if case.packed:
        lengths = torch.randint(0, case.length, (case.documents,), generator=generator)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        options["cu_seqlens"] = torch.cat([bounds, bounds[-1:]]).int().to(device)  # one repeated end
        lead = (int(bounds[-1]) + 5,)  # and five rows of no document
    else:
        lead = (case.documents, case.length)
    if case.indexed:
        count = case.documents + case.packed
        options["adapter_index"] = torch.randint(0, adapters, (count,), generator=generator).to(device)
    features = case.features
    weights = [None if i == 1 else draw(features**-0.5, out, features) for i, out in enumerate(case.outs)]
    a = [draw(features**-0.5, adapters, rank, features) for rank in case.ranks]
    b = [draw(rank**-0.5, adapters, out, rank) for out, rank in zip(case.outs, case.ranks, strict=True)]
    residuals = [draw(1.0, *lead, out).to(dtype) if i == 1 else None for i, out in enumerate(case.outs)]
    grads = [draw(1.0, *lead, out).to(dtype) for out in case.outs]
    return [draw(1.0, *lead, features).to(dtype), *weights, *a, *b, *residuals], grads, options


def _run(inputs, grads, options, convert=lambda t: t):
    leaves = [None if t is None else convert(t.detach().clone()).requires_grad_() for t in inputs]
    count = len(grads)
    x, weights, a, b, residuals = leaves[0], *(leaves[1 + i * count : 1 + (i + 1) * count] for i in range(4))
    outputs = batched_lora_multi(x, weights, a, b, residuals=residuals, **options)
    torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    return [*(y.detach() for y in outputs), *(leaf.grad for leaf in leaves if leaf is not None)]


def _plain(inputs, grads, options, dtype):
    """The same by documents in PyTorch: a linear, two products with the document's adapter, additions."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    count = len(grads)
    x, weights, a, b, residuals = leaves[0], *(leaves[1 + i * count : 1 + (i + 1) * count] for i in range(4))
    rows = x.flatten(0, -2)
    if "cu_seqlens" in options:
        bounds = options["cu_seqlens"].tolist()
    else:
        bounds = list(range(0, rows.shape[0] + 1, x.shape[1]))
    index = options.get("adapter_index", torch.arange(len(bounds) - 1)).clamp(max=len(a[0]) - 1).tolist()
    outputs = []
    for weight, a_p, b_p, residual in zip(weights, a, b, residuals, strict=True):
        parts = [
            (rows[start:end] @ a_p[i].to(dtype).t()) @ b_p[i].to(dtype).t() * options["scale"]
            for start, end, i in zip(bounds, bounds[1:], index, strict=False)
        ]
        y = torch.cat([*parts, rows.new_zeros(rows.shape[0] - bounds[-1], b_p.shape[1])])
        y = y if weight is None else y + rows @ weight.to(dtype).t()
        y = y.view(*x.shape[:-1], -1)
        outputs.append(y if residual is None else y + residual)
    torch.autograd.backward(outputs, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    return [*(y.detach() for y in outputs), *(leaf.grad for leaf in leaves if leaf is not None)]


def _assert_no_worse_than_pytorch(case, dtype, device="cpu"):
    inputs, grads, options = _make(case, dtype, device)
    wide = [None if t is None else t.double() for t in inputs]
    exact = _plain(wide, grads, options, torch.float64)
    plain = _plain(inputs, grads, options, dtype)
    ours = _run(inputs, grads, options)
    for position, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        assert error <= 2 * allowed + 1e-6, f"result {position} of {case}: {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("case", [case for case in CASES if not case.packed and not case.indexed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_op_where_a_cpu_has_an_expression(case, dtype):
    """Dense batches with an adapter a document: the op's own PyTorch path, which a GPU takes in float32."""

    def op(x, weights, a, b, *, residuals, scale):
        present = [[t for t in ts if t is not None] for ts in (weights, residuals)]
        parts = [(w is not None) + 2 * (r is not None) for w, r in zip(weights, residuals, strict=True)]
        rows = [t.flatten(0, 1) for t in (x, *present[1])]
        *ys, _, _ = _forward_op(rows[0], present[0], a, b, rows[1:], parts, None, None, x.shape[1], scale)
        return [y.unflatten(0, x.shape[:2]) for y in ys]

    with mock.patch(f"{__name__}.batched_lora_multi", op):
        _assert_no_worse_than_pytorch(case, dtype)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_no_worse_than_pytorch(case, dtype):
    _assert_no_worse_than_pytorch(case, dtype)


@pytest.mark.parametrize("case", CASES)
def test_fp64_equals_the_formula(case):
    inputs, grads, options = _make(case, torch.float64)
    wide = [None if t is None else t.double() for t in inputs]
    for mine, truth in zip(_run(wide, grads, options), _plain(wide, grads, options, torch.float64), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)


def test_one_projection_equals_the_public_expression():
    x, a, b = torch.randn(3, 5, 8), torch.randn(3, 2, 8), torch.randn(3, 6, 2)
    weight, residual = torch.randn(6, 8), torch.randn(3, 5, 6)
    torch.testing.assert_close(
        batched_lora(x, weight, a, b, scale=0.5, residual=residual), reference(x, weight, a, b, 0.5, residual)
    )


def test_projections_without_adapters_are_plain_linears():
    x, weight = torch.randn(2, 3, 8), torch.randn(6, 8)
    a, b = torch.randn(2, 2, 8), torch.randn(2, 6, 2)
    first, second = batched_lora_multi(x, [weight, weight], [None, a], [None, b])
    torch.testing.assert_close(first, x @ weight.t())
    torch.testing.assert_close(second, batched_lora(x, weight, a, b))


@triton_aot.needs_triton
def test_which_gradients_are_read_once():
    module = kernels("batched_lora")
    shape = {"documents": 64, "cu_seqlens": None, "index": None, "map": None, "count": None, "options": {}}

    def once(length, columns, **changes):
        grad = torch.empty(64 * length, columns, dtype=torch.bfloat16, device="meta")
        return module._shares_pass([grad], module._Tiles(length=length, **shape | changes))

    assert once(256, 8192) and once(256, 2048) and once(200, 4096)
    assert not once(256, 2040) and not once(257, 8192)  # in the cache; longer than a tile
    some = torch.empty(65, dtype=torch.int32)
    assert not once(256, 8192, cu_seqlens=some) and not once(256, 8192, index=some)


def test_frozen_inputs_and_weights_get_no_gradient():
    x, weight = torch.randn(2, 3, 8), torch.randn(6, 8)
    a, b = torch.randn(2, 2, 8, requires_grad=True), torch.randn(2, 6, 2, requires_grad=True)
    batched_lora(x, weight, a, b).sum().backward()
    assert x.grad is None and weight.grad is None and a.grad is not None and b.grad is not None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_contract(case, dtype):
    inputs, grads, options = _make(case, dtype)
    count = len(grads)
    leaves = [None if t is None else t.requires_grad_() for t in inputs]
    weights, a, b, residuals = (leaves[1 + i * count : 1 + (i + 1) * count] for i in range(4))
    parts = [(w is not None) + 2 * (r is not None) for w, r in zip(weights, residuals, strict=True)]
    flat = [t.detach().flatten(0, -2).requires_grad_() for t in residuals if t is not None]
    arguments = (
        leaves[0].detach().flatten(0, -2).requires_grad_(), [w for w in weights if w is not None], a, b, flat, parts,
        options.get("cu_seqlens"), options.get("adapter_index"), 0 if case.packed else case.length, case.scale,
    )  # fmt: skip
    torch.library.opcheck(_forward_op, arguments)
    with torch.no_grad():
        *_, shrunk, low = _forward_op(*arguments)
    x, present, a, b = ([t.detach() for t in ts] for ts in ([arguments[0]], arguments[1], a, b))
    upstream = [g.flatten(0, -2) for g in grads]
    for wanted in (True, False):
        saved = (upstream, *x, present, a, b, shrunk, low, *arguments[5:])
        torch.library.opcheck(_backward_op, (*saved, wanted, [wanted] * len(present)))


def test_compiled_equals_eager_also_under_autocast():
    x, weight, a, b = torch.randn(2, 3, 8), torch.randn(6, 8), torch.randn(2, 2, 8), torch.randn(2, 6, 2)
    compiled = torch.compile(batched_lora, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            eager, traced = batched_lora(x, weight, a, b), compiled(x, weight, a, b)
        assert eager.dtype == torch.float32 and torch.equal(eager, traced)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_projections_and_gradients_equal_eager(packed):
    inputs, grads, options = _make(Case(2, 6, 8, (12, 5, 7), (4, 2, 3), packed=packed), torch.bfloat16)
    compiled = torch.compile(batched_lora_multi, fullgraph=True, backend="aot_eager")
    with mock.patch(f"{__name__}.batched_lora_multi", compiled):
        traced = _run(inputs, grads, options)
    for mine, wanted in zip(traced, _run(inputs, grads, options), strict=True):
        assert torch.equal(mine, wanted)


def test_adapters_of_another_dtype_are_kept_as_the_products_read_them():
    x, a, b = torch.randn(6, 8), torch.randn(2, 4, 8), torch.randn(2, 5, 4).mT.contiguous().mT
    for dtype, kept in ((torch.float32, 0), (torch.bfloat16, a.numel() + b.numel())):
        *_, low = _forward_op(x.to(dtype), [], [a], [b], [], [0], None, None, 3, 1.0)
        assert low.dtype == dtype and low.shape == (kept,)
    assert torch.equal(low, torch.cat([a.flatten(), b.flatten()]).bfloat16())


def test_strided_and_empty_inputs():
    wide, w, a, b = torch.randn(2, 3, 16), torch.randn(5, 8), torch.randn(2, 4, 8), torch.randn(2, 5, 4)
    strided = batched_lora(wide[..., ::2], w, a, b)
    torch.testing.assert_close(strided, reference(wide[..., ::2], w, a, b))
    one = torch.zeros(1, dtype=torch.long).expand(2)  # stride 0
    torch.testing.assert_close(batched_lora(wide[..., ::2], w, a, b, adapter_index=one)[0], strided[0])
    bounds = torch.zeros(3, dtype=torch.int32)
    for empty, options in (
        (torch.empty(0, 8), {"cu_seqlens": bounds}),
        (torch.empty(2, 0, 8), {}),
        (torch.empty(0, 3, 8), {"adapter_index": torch.empty(0, dtype=torch.long)}),
    ):
        leaves = [t.clone().requires_grad_() for t in (empty, w, a, b)]
        y = batched_lora(*leaves, **options)
        assert y.shape == (*empty.shape[:-1], 5)
        grads = torch.autograd.grad(y.sum(), leaves)
        assert grads[0].shape == empty.shape and not any(g.any() for g in grads[1:])
        assert batched_lora(*leaves, residual=torch.empty_like(y), **options).shape == y.shape


def test_double_backward_raises():
    x, a, b = torch.randn(6, 8, requires_grad=True), torch.randn(2, 2, 8), torch.randn(2, 6, 2)
    packed = batched_lora(x, None, a, b, cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32))
    (gradient,) = torch.autograd.grad(packed.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_a_kept_graph_may_be_walked_twice():
    x, a, b = torch.randn(6, 8, requires_grad=True), torch.randn(2, 2, 8), torch.randn(2, 6, 2, requires_grad=True)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    loss = torch.stack(batched_lora_multi(x, [torch.randn(6, 8), None], [a, a], [b, b], cu_seqlens=bounds)).sum()
    first, second = (torch.autograd.grad(loss, (x, b), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


_GOOD = {
    "x": torch.randn(2, 3, 8), "weight": torch.randn(6, 8), "lora_a": torch.randn(2, 4, 8),
    "lora_b": torch.randn(2, 6, 4),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 8)}, ValueError, r"x: got shape \(3, 8\), wanted \[B, T, in\]"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, TypeError, "x: got torch.int64"),
        ({"weight": torch.randn(5, 8)}, ValueError, r"weight of projection 0: got shape \(5, 8\)"),
        ({"lora_a": torch.randn(3, 4, 8), "lora_b": torch.randn(3, 6, 4)}, ValueError, "got 3 adapters for 2"),
        ({"lora_a": torch.randn(2, 129, 8)}, ValueError, "got rank 129, wanted 1 to 128"),
        ({"lora_b": torch.randn(2, 6, 3)}, ValueError, r"lora_b of projection 0: got shape \(2, 6, 3\)"),
        ({"lora_b": None}, ValueError, "projection 0: got only one of lora_a and lora_b"),
        ({"residual": torch.randn(2, 3, 5)}, ValueError, "residual of projection 0: got shape"),
        ({"lora_a": torch.randn(2, 4, 8).half()}, TypeError, "lora_a of projection 0: got torch.float16"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, r"x: got shape \(2, 3, 8\) with cu_seqlens"),
        ({"x": torch.randn(3, 8), "cu_seqlens": torch.tensor([0, 3])}, TypeError, "cu_seqlens: got torch.int64"),
        ({"adapter_index": torch.tensor([0])}, ValueError, r"adapter_index: got shape \(1,\), wanted \(2,\)"),
        ({"adapter_index": torch.tensor([0, 1], dtype=torch.int32)}, TypeError, "adapter_index: got torch.int32"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        batched_lora(**(_GOOD | change))


def test_projections_that_do_not_fit_each_other_are_named():
    x, weight = torch.randn(2, 3, 8), torch.randn(6, 8)
    a, b = ([torch.randn(n, *shape) for n in (2, 3)] for shape in ((4, 8), (6, 4)))
    index = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="lora_a of projection 1: got 3 adapters, wanted 2 as projection 0 has"):
        batched_lora_multi(x, [weight, weight], a, b, adapter_index=index)
    with pytest.raises(ValueError, match=r"weight of projection 1: got shape \(6, 7\), wanted \[out, 8\]"):
        batched_lora_multi(x, [weight, torch.randn(6, 7)], [a[0], None], [b[0], None])
    for residual, error in ((torch.randn(6), ValueError), (torch.randn(2, 3, 6).double(), TypeError)):
        with pytest.raises(error, match="residual of projection 1: got"):
            batched_lora_multi(x, [weight, weight], [a[0], None], [b[0], None], residuals=[None, residual])


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_batched_lora")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, Case(3, 200, 512, (512, 256), (96, 96)), Case(2, 48, 512, (1000,), (128,))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_kernels_on_a_gpu(case, dtype):
    _assert_no_worse_than_pytorch(case, dtype, "cuda")


def _assert_once_no_worse_than_pytorch(case, splits, dtype, device="cpu"):
    module = kernels("batched_lora")
    with (
        mock.patch.multiple(module, ONCE_BYTES=0, _splits=lambda programs, documents, most: min(splits, most)),
        mock.patch.object(module, "_shrink_outer", wraps=module._shrink_outer) as shared,
    ):
        _assert_no_worse_than_pytorch(case, dtype, device)
    assert shared.call_count == len(case.outs)


@triton_aot.needs_triton
def test_programs_of_a_document_fill_the_device():
    splits = kernels("batched_lora")._splits
    assert [splits(132, documents, 32) for documents in (1000, 132, 100, 64, 33, 16)] == [1, 1, 5, 2, 4, 8]
    assert splits(132, 64, 1) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*ONCE, Case(3, 256, 512, (8192, 256), (96, 128))])
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_pass_over_the_gradient_on_a_gpu(case, splits, dtype):
    _assert_once_no_worse_than_pytorch(case, splits, dtype, "cuda")


@pytest.mark.gpu
def test_one_pass_over_the_gradient_repeats_itself_on_a_gpu():
    inputs, grads, options = _make(Case(64, 256, 512, (4096,), (96,)), torch.bfloat16, "cuda")
    module = kernels("batched_lora")
    with mock.patch.object(module, "_shrink_outer", wraps=module._shrink_outer) as shared:
        for first, second in zip(*(_run(inputs, grads, options) for _ in range(2)), strict=True):
            assert torch.equal(first, second)
    assert shared.call_count == 2


@pytest.mark.gpu
def test_second_device(second_gpu):
    _assert_no_worse_than_pytorch(Case(3, 200, 512, (512, 256), (96, 96)), torch.bfloat16, second_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_returns_before_the_gpu_is_done(packed):
    case = Case(8, 256, 512, (512,), (96,), packed=packed)
    inputs, grads, options = _make(case, torch.bfloat16, "cuda")
    _run(inputs, grads, options)
    assert_returns_at_once(lambda: _run(inputs, grads, options))


BACKWARD_IN_A_NEW_THREAD = """
import sys
import torch
from pgolf_kernels import batched_lora
from pgolf_kernels.batched_lora import _backward_op, _forward_op

def draw(*size, dtype=torch.float32):
    return torch.randn(size, device=sys.argv[1], dtype=dtype).requires_grad_()

x, w, grad = (draw(*size, dtype=torch.bfloat16) for size in ((2, 64, 64), (32, 64), (2, 64, 32)))
a, b = draw(2, 16, 64), draw(2, 32, 16)
with torch.no_grad():  # in this thread first: the allocator then has all that the other one asks for
    flat = x.flatten(0, 1)
    _, shrunk, low = _forward_op(flat, [w], [a], [b], [], [1], None, None, 64, 1.0)
    rest = (flat, [w], [a], [b], shrunk, low, [1], None, None, 64, 1.0, True, [False])
    wanted = _backward_op([grad.flatten(0, 1)], *rest)
found = torch.autograd.grad(batched_lora(x, w.detach(), a, b), [x, a, b], grad)
for mine, expected in zip(found, (wanted[0].view_as(x), *wanted[2:]), strict=True):
    if x.is_cuda:
        assert torch.equal(mine, expected)
    else:  # by PyTorch's own expression, which rounds elsewhere
        assert (mine - expected).norm() < 2**-7 * expected.norm()
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_backward_in_a_thread_without_a_context(device):
    subprocess.run([sys.executable, "-c", BACKWARD_IN_A_NEW_THREAD, device], check=True, timeout=120)


@pytest.mark.gpu
def test_captures_into_a_graph():
    inputs, grads, options = _make(Case(8, 256, 512, (512,), (96,)), torch.bfloat16, "cuda")
    expected = _run(inputs, grads, options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(inputs, grads, options)
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b)


if __name__ == "__main__":
    with interpreting():
        for small in CASES:
            for precision in (torch.float32, torch.float16):
                _assert_no_worse_than_pytorch(small, precision)
        for small in ONCE:
            for parts in (1, 2):
                for precision in (torch.float32, torch.float16):
                    _assert_once_no_worse_than_pytorch(small, parts, precision)
