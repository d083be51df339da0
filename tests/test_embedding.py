"""Rows by index and their summed gradient: against fp64, contract, Triton kernels."""

import pytest
import torch

from pgolf_kernels import embedding
from pgolf_kernels._triton_op import interpreting
from pgolf_kernels.embedding import _backward_op, _forward_op, reference
from tests import triton_aot

# (positions, rows, columns, how often row 3 comes): none, one, less than a tile, runs over many tiles, one row alone
SHAPES = [(0, 5, 8, 0), (1, 5, 8, 0), (100, 9, 24, 0), (300, 70, 48, 0), (1000, 50, 64, 600), (700, 4, 16, 700)]


def _case(shape, dtype, device="cpu"):
    """(ids, fp32 table, upstream gradient in dtype)."""
    positions, rows, columns, frequent = shape
    generator = torch.Generator().manual_seed(positions)
    ids = torch.randint(rows, (positions,), generator=generator)
    ids[torch.randperm(positions, generator=generator)[:frequent]] = 3
    table = torch.randn(rows, columns, generator=generator)
    grad = torch.randn(positions, columns, generator=generator).to(dtype)
    return ids.to(device), table.to(device), grad.to(device)


def _assert_no_worse_than_pytorch(shape, dtype, device="cpu"):
    ids, table, grad = _case(shape, dtype, device)
    ours = table.clone().requires_grad_()
    y = embedding(ids, ours, dtype=dtype)
    assert torch.equal(y, reference(ids, table, dtype)) and y.dtype == dtype
    y.backward(grad)
    exact = torch.zeros_like(table, dtype=torch.float64).index_add_(0, ids, grad.double())
    plain = table.clone().requires_grad_()
    torch.nn.functional.embedding(ids, plain).backward(grad.float())
    assert ours.grad.dtype == torch.float32
    scale = exact.norm().clamp_min(1e-30)
    error, allowed = ((t.grad.double() - exact).norm() / scale for t in (ours, plain))
    assert error <= 2 * allowed + 1e-7, f"{shape} in {dtype}: {error:.2e}, PyTorch's {allowed:.2e}"
    first = ours.grad.clone()
    ours.grad = None
    embedding(ids, ours, dtype=dtype).backward(grad)
    assert torch.equal(first, ours.grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_no_worse_than_pytorch(shape, dtype):
    _assert_no_worse_than_pytorch(shape, dtype)


def test_gradient_by_finite_differences():
    ids = torch.tensor([[1, 0, 1], [4, 4, 1]])
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: embedding(ids, t), [table])


def test_op_contract():
    ids, table, _ = _case(SHAPES[2], torch.float32)
    torch.library.opcheck(_forward_op, (ids, table.requires_grad_(), torch.float16))
    grad = torch.randn(*ids.shape, table.shape[1])
    torch.library.opcheck(_backward_op, (grad, ids, len(table), torch.float64))


def test_compiled_equals_eager_also_under_autocast():
    ids, table, _ = _case(SHAPES[2], torch.float32)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(embedding(ids, table), compiled(ids, table))


def test_shapes_and_strides():
    table = torch.randn(12, 9)[::2, 1:]
    ids = torch.randint(6, (4, 10), dtype=torch.int32).T
    assert torch.equal(embedding(ids, table), table[ids.long()])


def test_double_backward_raises():
    table = torch.randn(4, 3, requires_grad=True)
    y = embedding(torch.tensor([1, 2]), table)
    (gradient,) = torch.autograd.grad(y.square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.ones(3)}, TypeError, "ids: got dtype torch.float32"),
        ({"table": torch.ones(3)}, ValueError, r"table: got shape \(3,\), wanted \[V, D\]"),
        ({"table": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "table: got torch.int64"),
        ({"dtype": torch.int32}, TypeError, "to be read as torch.int32"),
        ({"table": torch.empty(3, 2, device="meta")}, ValueError, "ids: got device cpu, wanted the table's meta"),
        ({"ids": torch.tensor([3])}, IndexError, "index out of range"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"ids": torch.tensor([0, 2]), "table": torch.ones(3, 2), "dtype": None}
    with pytest.raises(error, match=message):
        embedding(**(arguments | change))


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_embedding")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (98304, 8192, 512, 6000), (5000, 40000, 512, 900)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_kernels_on_a_gpu(shape, dtype):
    _assert_no_worse_than_pytorch(shape, dtype, "cuda")


if __name__ == "__main__":
    with interpreting():
        for case in SHAPES:
            for precision in (torch.float32, torch.float16):
                _assert_no_worse_than_pytorch(case, precision)
