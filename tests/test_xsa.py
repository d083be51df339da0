"""XSA: the op against fp64, its gradients and contract, its Triton kernels interpreted, compiled and on a GPU."""

import pytest
import torch

from pgolf_kernels import xsa
from pgolf_kernels._triton_op import interpreting
from pgolf_kernels.xsa import MIN_NORM, _backward_op, _forward_op, reference
from tests import triton_aot

SHAPES = [((5,), 4, 2, 16), ((2, 37), 6, 3, 24), ((70,), 8, 4, 64), ((3,), 2, 2, 8)]  # lead, H, Hkv, d


def _assert_no_worse_than_pytorch(shape, dtype, device="cpu"):
    lead, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(dim)
    y, v, grad = (
        torch.randn(*lead, h, dim, generator=generator).to(dtype).to(device) for h in (heads, kv_heads, heads)
    )

    def run(function, convert):
        leaves = [convert(t.clone()).requires_grad_() for t in (y, v)]
        out = function(*leaves)
        out.backward(grad.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact, plain, ours = run(reference, lambda t: t.double()), run(reference, lambda t: t), run(xsa, lambda t: t)
    for name, mine, theirs, truth in zip(("out", "dy", "dv"), ours, plain, exact, strict=True):
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        assert mine.dtype == dtype
        assert error <= 2 * allowed + 1e-6, f"{name} of {shape} in {dtype}: {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_no_worse_than_pytorch(shape, dtype):
    _assert_no_worse_than_pytorch(shape, dtype)


def test_gradients_by_finite_differences():
    y = torch.randn(2, 3, 4, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(xsa, (y, v))


def test_result_is_orthogonal_to_the_value_and_projecting_twice_changes_nothing():
    y, v = torch.randn(7, 4, 16, dtype=torch.float64), torch.randn(7, 2, 16, dtype=torch.float64)
    out = xsa(y, v)
    inner = (out.unflatten(1, (2, 2)) * v.unsqueeze(2)).sum(-1)
    assert inner.abs().max() < 1e-12
    torch.testing.assert_close(xsa(out, v), out)


def test_a_value_of_zero_leaves_the_output_alone():
    y, v = torch.randn(3, 2, 8), torch.zeros(3, 1, 8)
    y.requires_grad_()
    v.requires_grad_()
    out = xsa(y, v)
    torch.testing.assert_close(out, y)
    out.sum().backward()
    assert v.grad.isfinite().all() and torch.equal(y.grad, torch.ones_like(y))
    assert MIN_NORM < 1e-10


def test_op_contract():
    torch.library.opcheck(
        _forward_op, (torch.randn(5, 4, 8, requires_grad=True), torch.randn(5, 2, 8, requires_grad=True))
    )
    torch.library.opcheck(_backward_op, (torch.randn(5, 4, 8), torch.randn(5, 4, 8), torch.randn(5, 2, 8)))


def test_compiled_equals_eager_also_under_autocast():
    y, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    compiled = torch.compile(xsa, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(xsa(y, v), compiled(y, v))


def test_double_backward_raises():
    y, v = torch.randn(5, 4, 8, requires_grad=True), torch.randn(5, 2, 8)
    (gradient,) = torch.autograd.grad(xsa(y, v).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_strided_and_empty_inputs():
    joined = torch.randn(5, 48)
    y, v = joined[:, :32].unflatten(1, (4, 8)), joined[:, 32:].unflatten(1, (2, 8))
    torch.testing.assert_close(xsa(y, v), reference(y, v))
    assert xsa(torch.empty(0, 4, 8), torch.empty(0, 2, 8)).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("y", "v", "error", "message"),
    [
        (torch.randn(3, 8), torch.randn(3, 8), ValueError, r"v: got shape \(3, 8\)"),
        (torch.randn(3, 4, 8), torch.randn(2, 4, 8), ValueError, r"v: got shape \(2, 4, 8\)"),
        (torch.randn(3, 4, 8), torch.randn(3, 3, 8), ValueError, "v: got 3 heads, wanted a divisor of y's 4"),
        (torch.randn(3, 4, 8), torch.randn(3, 2, 8).half(), TypeError, "v: got torch.float16"),
        (torch.randn(3, 4, 8), torch.empty(3, 2, 8, device="meta"), ValueError, "v: got device meta"),
    ],
)
def test_wrong_arguments_are_named(y, v, error, message):
    with pytest.raises(error, match=message):
        xsa(y, v)


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_xsa")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, ((4099,), 8, 4, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_kernels_on_a_gpu(shape, dtype):
    _assert_no_worse_than_pytorch(shape, dtype, "cuda")


if __name__ == "__main__":
    with interpreting():
        for case in SHAPES:
            for precision in (torch.float32, torch.float16):
                _assert_no_worse_than_pytorch(case, precision)
