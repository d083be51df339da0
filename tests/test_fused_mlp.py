"""Fused MLP: the op against fp64, its gradients and contract, its Triton kernels interpreted, compiled and on a GPU."""

import sys

import pytest
import torch

from pgolf_kernels import fused_mlp
from pgolf_kernels._triton_op import interpreting
from pgolf_kernels.fused_mlp import _backward_op, _forward_op, _grad_pre, _hidden_op, _runs_native, _up, reference
from tests import triton_aot
from tests.gpu import assert_returns_at_once, replayed

SHAPES = [(37, 24, 40, 16), (130, 33, 261, 19), (200, 64, 512, 48)]  # rows, D, F, D_out


def _case(shape, dtype, device="cpu", weight_dtype=torch.float32):
    rows, dim, hidden, out = shape
    generator = torch.Generator().manual_seed(rows)

    def draw(scale, *size):
        return (torch.randn(size, generator=generator) * scale).to(device)

    x = draw(1.0, rows, dim).to(dtype)
    w_up, w_down = draw(dim**-0.5, hidden, dim).to(weight_dtype), draw(hidden**-0.5, out, hidden).to(weight_dtype)
    return [x, w_up, w_down], draw(1.0, rows, out).to(dtype)


def _run(function, inputs, grad, convert):
    leaves = [convert(t.detach().clone()).requires_grad_() for t in inputs]
    y = function(*leaves)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def _assert_no_worse_than_pytorch(shape, dtype, device="cpu", weight_dtype=torch.float32, slope=0.3):
    inputs, grad = _case(shape, dtype, device, weight_dtype)
    exact = _run(lambda *a: reference(*a, slope), inputs, grad, lambda t: t.double())
    plain = _run(lambda x, u, d: reference(x, u.to(dtype), d.to(dtype), slope), inputs, grad, lambda t: t)
    ours = _run(lambda *a: fused_mlp(*a, negative_slope=slope), inputs, grad, lambda t: t)
    for name, mine, theirs, truth in zip(("y", "dx", "dw_up", "dw_down"), ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        assert error <= 2 * allowed + 1e-6, f"{name} of {shape} in {dtype}: error {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_no_worse_than_pytorch(shape, dtype):
    _assert_no_worse_than_pytorch(shape, dtype)


def test_gradients_by_finite_differences():
    def draw(*size):
        return torch.randn(size, dtype=torch.float64, requires_grad=True)

    inputs = (draw(2, 3, 8), draw(12, 8), draw(5, 12), draw(12))
    assert torch.autograd.gradcheck(lambda x, u, d, g: fused_mlp(x, u, d, hidden_gain=g), inputs)
    assert torch.autograd.gradcheck(lambda x, u, d: fused_mlp(x, u, d, negative_slope=0.0), inputs[:3])


def test_return_hidden_is_the_input_of_the_second_matrix():
    (x, w_up, w_down), _ = _case(SHAPES[0], torch.float32)
    gain = torch.rand(w_up.shape[0])
    y, hidden = fused_mlp(x, w_up, w_down, hidden_gain=gain, return_hidden=True)
    expected = torch.nn.functional.leaky_relu(x @ w_up.t(), 0.5).square() * gain
    torch.testing.assert_close(hidden, expected)
    torch.testing.assert_close(y, hidden @ w_down.t())
    assert not hidden.requires_grad


def test_frozen_weights_get_no_gradient_and_cost_none():
    (x, w_up, w_down), grad = _case(SHAPES[0], torch.float32)
    x.requires_grad_()
    fused_mlp(x, w_up, w_down).backward(grad)
    assert w_up.grad is None and w_down.grad is None and x.grad is not None
    _, hidden, pre = _forward_op(x, w_up, w_down, None, 0.5)
    d_x, d_up, d_down = _backward_op(grad, x, w_up, w_down, hidden, pre, 0.5, [True, False, False])
    torch.testing.assert_close(d_x, x.grad)
    assert d_up.numel() == d_down.numel() == 0


def test_backward_honours_any_upstream_gradient_twice():
    (x, w_up, w_down), grad = _case(SHAPES[0], torch.float32)
    x.requires_grad_()
    y = fused_mlp(x, w_up, w_down)
    (first,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, 3 * grad)
    torch.testing.assert_close(again, 3 * first)


def test_residual_joins_the_output_and_gets_its_gradient():
    x, w_up, w_down = torch.randn(3, 5, 8), torch.randn(16, 8), torch.randn(6, 16)
    residual = torch.randn(3, 5, 6, requires_grad=True)
    y = fused_mlp(x, w_up, w_down, residual=residual)
    torch.testing.assert_close(y, fused_mlp(x, w_up, w_down) + residual)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert torch.equal(residual.grad, upstream)
    with pytest.raises(ValueError, match="residual: got shape"):
        fused_mlp(x, w_up, w_down, residual=residual[0])


def test_in_place_is_the_same_sum_and_gradient_on_the_residual_itself():
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 5, 8), (16, 8), (6, 16))]
    start = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    gain = torch.rand(16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, 6, dtype=torch.float64)
    found = []
    for in_place in (False, True):
        residual = start * 2
        y = fused_mlp(*leaves, hidden_gain=gain, residual=residual, in_place=in_place)
        assert (y.data_ptr() == residual.data_ptr()) is in_place
        found.append([y.detach().clone(), *torch.autograd.grad(y, [*leaves, start, gain], upstream)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"in_place: got residual none .* wanted a contiguous residual"):
        fused_mlp(*leaves, in_place=True)
    both = torch.zeros(residual.numel() + leaves[0].numel())
    beside, within = both[: residual.numel()].view_as(residual), both[residual.numel() :].view_as(leaves[0])
    with pytest.raises(ValueError, match="in_place: got a residual in x's memory"):
        fused_mlp(within, *leaves[1:], residual=beside, in_place=True)


def test_op_contract():
    (x, w_up, w_down), _ = _case(SHAPES[0], torch.float32)
    torch.library.opcheck(_hidden_op, (x, w_up, 0.5))
    kept, upstream = _hidden_op(x, w_up, 0.5), torch.randn(x.shape[0], w_down.shape[0])
    for wanted in ([True] * 3, [False, True, False]):
        torch.library.opcheck(_backward_op, (upstream, x, w_up, w_down, *kept, 0.5, wanted))
    for tensor in (x, w_up, w_down):
        tensor.requires_grad_()
    torch.library.opcheck(_forward_op, (x, w_up, w_down, None, 0.5))
    torch.library.opcheck(_forward_op, (x[:0], w_up, w_down, None, 0.5))


def test_compiled_equals_eager_also_under_autocast():
    (x, w_up, w_down), _ = _case(SHAPES[0], torch.float32)
    compiled = torch.compile(fused_mlp, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            eager, traced = fused_mlp(x, w_up, w_down), compiled(x, w_up, w_down)
        assert eager.dtype == torch.float32 and torch.equal(eager, traced)


def test_strided_and_empty_inputs():
    (_, w_up, w_down), _ = _case(SHAPES[0], torch.float32)
    wide = torch.randn(4, 5, 48)[..., ::2]
    torch.testing.assert_close(fused_mlp(wide, w_up, w_down), reference(wide, w_up, w_down))
    _assert_empty_has_gradients_of_zero(torch.float32)


def _assert_empty_has_gradients_of_zero(dtype, device="cpu"):
    leaves = [t.to(device, dtype).requires_grad_() for t in (torch.empty(0, 3, 24), *_case(SHAPES[0], dtype)[0][1:])]
    y = fused_mlp(*leaves)
    assert y.shape == (0, 3, 16)
    for grad, leaf in zip(torch.autograd.grad(y, leaves, y), leaves, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_in_place_compiles_and_takes_any_upstream_gradient():
    (x, w_up, w_down), _ = _case(SHAPES[0], torch.float32)
    total = torch.zeros(*x.shape[:-1], w_down.shape[0])
    compiled = torch.compile(
        lambda *tensors: fused_mlp(*tensors, residual=total + 1, in_place=True), fullgraph=True, backend="aot_eager"
    )
    weight = w_up.clone().requires_grad_()
    found = compiled(x, weight, w_down)
    torch.testing.assert_close(found, fused_mlp(x, w_up, w_down) + 1)
    found.sum().backward()  # a gradient with strides of 0
    other = w_up.clone().requires_grad_()
    fused_mlp(x, other, w_down).backward(torch.ones_like(found))
    torch.testing.assert_close(weight.grad, other.grad)


def test_double_backward_raises():
    (x, w_up, w_down), _ = _case(SHAPES[0], torch.float32)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(fused_mlp(x, w_up, w_down).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 7)}, ValueError, r"w_up: got shape \(12, 8\), wanted \[F, 7\]"),
        ({"x": torch.ones(3, 8, dtype=torch.int32)}, TypeError, "x: got torch.int32"),
        ({"w_down": torch.randn(5, 11)}, ValueError, r"w_down: got shape \(5, 11\)"),
        ({"w_up": torch.randn(12, 8, dtype=torch.float16)}, TypeError, "w_up: got torch.float16"),
        ({"w_up": torch.empty(12, 8, device="meta")}, ValueError, "w_up: got device meta"),
        ({"hidden_gain": torch.randn(3)}, ValueError, r"hidden_gain: got shape \(3,\)"),
        ({"x": torch.randn(3, 8, dtype=torch.float64)}, TypeError, "w_up: got torch.float32, wanted x's torch.float64"),
        ({"w_up": torch.randn(12, 8, dtype=torch.complex64)}, TypeError, "w_up: got torch.complex64"),
        ({"negative_slope": -0.1}, ValueError, "negative_slope: got -0.1"),
        ({"negative_slope": float("inf")}, ValueError, "negative_slope: got inf"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"x": torch.randn(3, 8), "w_up": torch.randn(12, 8), "w_down": torch.randn(5, 12)} | change
    with pytest.raises(error, match=message):
        fused_mlp(**arguments)


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_fused_mlp")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 512, 2048, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wide_weights", [False, True])
def test_triton_kernels_on_a_gpu(shape, dtype, wide_weights):
    _assert_empty_has_gradients_of_zero(dtype, "cuda")
    _assert_no_worse_than_pytorch(shape, dtype, "cuda", torch.float32 if wide_weights else dtype)


@pytest.mark.gpu
def test_second_device(second_gpu):
    for shape in ((300, 96, 200, 72), (1000, 512, 2048, 512)):  # in Triton, in CUDA
        _assert_no_worse_than_pytorch(shape, torch.bfloat16, second_gpu, torch.bfloat16)


NATIVE_SHAPES = [(1, 8, 128), (130, 64, 384), (300, 512, 256), (1037, 200, 1536), (20000, 512, 2048)]  # rows, D, F


@pytest.mark.gpu
@pytest.mark.parametrize("shape", NATIVE_SHAPES)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_cuda_kernels_agree_with_triton(monkeypatch, shape, weight_dtype):
    rows, dim, hidden_dim = shape
    (x, w_up, w_down), grad = _case((rows, dim, hidden_dim, dim), torch.bfloat16, "cuda", weight_dtype)
    if not _runs_native(x, hidden_dim):
        pytest.skip("needs a Hopper GPU and a native module built for sm_90a")

    def both():
        hidden, pre = _up(x, w_up.to(x.dtype), 0.3)
        return hidden, _grad_pre(grad, w_down, hidden, pre, 0.3)

    poison = [torch.full((rows, hidden_dim), float("nan"), dtype=x.dtype, device="cuda") for _ in range(4)]
    del poison  # the kernels get this memory: what they do not write shows
    ours = both()
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["pgolf_kernels.fused_mlp"], "_runs_native", lambda *_: False
        )  # the name is a function
        theirs = both()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.isfinite(mine).all()
        assert (mine.double() - other.double()).norm() <= 1e-3 * other.double().norm()


@pytest.mark.gpu
def test_cuda_kernels_take_strided_and_misaligned_inputs():
    (x, w_up, w_down), grad = _case((300, 64, 256, 64), torch.bfloat16, "cuda", torch.bfloat16)
    wide = torch.zeros(300, 129, dtype=x.dtype, device="cuda")
    wide[:, 1:65] = x
    flat = torch.zeros(w_up.numel() + 1, dtype=x.dtype, device="cuda")
    flat[1:] = w_up.flatten()
    results = []
    for leaves in ([x, w_up, w_down], [wide[:, 1:65], flat[1:].view_as(w_up), w_down.t().contiguous().t()]):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = fused_mlp(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.gpu
def test_saves_one_activation():
    (x, w_up, w_down), _ = _case((8192, 512, 2048, 512), torch.bfloat16, "cuda", torch.bfloat16)
    for tensor in (x, w_up, w_down):
        tensor.requires_grad_()
    fused_mlp(x, w_up, w_down)  # allocates whatever stays, a workspace say
    before = torch.cuda.memory_allocated()
    y = fused_mlp(x, w_up, w_down)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    assert kept <= 8192 * 2048 * 2 * 1.01


@pytest.mark.gpu
def test_backward_returns_before_the_gpu_is_done():
    (x, w_up, w_down), grad = _case((4096, 512, 2048, 512), torch.bfloat16, "cuda", torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, w_up, w_down)]
    torch.autograd.grad(fused_mlp(*leaves), leaves, grad)
    assert_returns_at_once(lambda: torch.autograd.grad(fused_mlp(*leaves), leaves, grad))


@pytest.mark.gpu
def test_captures_into_a_graph():
    (x, w_up, w_down), grad = _case((4096, 512, 2048, 512), torch.bfloat16, "cuda", torch.bfloat16)
    leaves = [t.requires_grad_() for t in (x, w_up, w_down)]
    expected = torch.autograd.grad(fused_mlp(*leaves), leaves, grad)
    captured = replayed(lambda: torch.autograd.grad(fused_mlp(*leaves), leaves, grad))
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b)


if __name__ == "__main__":
    with interpreting():
        for precision in (torch.float32, torch.float16, torch.bfloat16):
            _assert_empty_has_gradients_of_zero(precision)
        for case in SHAPES:
            for precision in (torch.float32, torch.float16):
                _assert_no_worse_than_pytorch(case, precision)
