"""Norm, rotary embedding and gain of queries and keys: against fp64, gradients, contract, Triton kernels."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pgolf_kernels import qk_rope, qk_rope_readers, qkv_rope
from pgolf_kernels._triton_op import interpreting
from pgolf_kernels.qk_rope import (
    EPS,
    _backward_op,
    _forward_op,
    _project_backward_op,
    _project_op,
    _readers_backward_op,
    reference,
    split_heads,
)
from tests import triton_aot

SHAPES = [((5,), 4, 2, 16, 4), ((2, 37), 6, 3, 24, 5), ((70,), 8, 4, 64, 8), ((3,), 2, 2, 8, 0), ((4,), 2, 1, 8, 4)]

# What the kernel that projects and turns does otherwise: heads that turn as a whole, tiles of fewer columns.
TURNED_SHAPES = [((130,), 4, 1, 64, 32), ((2, 65), 6, 2, 32, 1)]


def _case(shape, dtype, device="cpu"):
    """(q, k, gain, cos, sin), upstream gradients."""
    lead, heads, kv_heads, dim, pairs = shape
    generator = torch.Generator().manual_seed(dim)

    def draw(*size):
        return torch.randn(size, generator=generator).to(device)

    angles = draw(lead[-1], pairs)
    inputs = [draw(*lead, heads, dim).to(dtype), draw(*lead, kv_heads, dim).to(dtype), draw(heads)]
    grads = [draw(*lead, heads, dim).to(dtype), draw(*lead, kv_heads, dim).to(dtype)]
    return [*inputs, angles.cos(), angles.sin()], grads


def _assert_no_worse_than_pytorch(shape, dtype, device="cpu"):
    inputs, grads = _case(shape, dtype, device)

    def run(function, convert):
        leaves = [convert(t.clone()).requires_grad_() for t in inputs[:3]]
        outputs = function(*leaves, *(convert(t) for t in inputs[3:]))
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
        return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves)]

    exact, plain, ours = run(reference, lambda t: t.double()), run(reference, lambda t: t), run(qk_rope, lambda t: t)
    for name, mine, theirs, truth in zip(("q", "k", "dq", "dk", "dgain"), ours, plain, exact, strict=True):
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        assert mine.dtype == theirs.dtype
        assert error <= 2 * allowed + 1e-6, f"{name} of {shape} in {dtype}: {error:.2e}, PyTorch's {allowed:.2e}"


def _assert_projections_no_worse_than_pytorch(shape, dtype, device="cpu", readers=1, apart=False, width=32):
    """`qkv_rope`, or three linears and `qk_rope_readers`, with so many readers of the keys and one more of the values,
    beside three linears and the formula."""
    lead, heads, kv_heads, dim, _ = shape
    (_, _, gain, cos, sin), (grad_q, grad_k) = _case(shape, dtype, device)
    generator = torch.Generator().manual_seed(1)

    def draw(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    weights = [draw(n * dim, width) / width**0.5 for n in (heads, kv_heads, kv_heads)]
    inputs = [draw(*lead, width), *weights, gain]
    grad_ks = [grad_k, *(draw(*grad_k.shape) for _ in range(readers - 1))]
    grad_vs = [draw(*grad_k.shape) for _ in range(readers + 1)]
    grads = [grad_q, *grad_ks, *grad_vs]

    def plainly(x, w_q, w_k, w_v, gain, cos, sin):
        q, k, v = (torch.nn.functional.linear(x, w).unflatten(-1, (-1, dim)) for w in (w_q, w_k, w_v))
        q, k = reference(q, k, gain, cos, sin)
        return q, *[k] * len(grad_ks), *[v] * len(grad_vs)

    def ours(x, *args):
        counts = {"key_readers": len(grad_ks), "value_readers": len(grad_vs)}
        if apart:
            raw = (torch.nn.functional.linear(x, w).unflatten(-1, (-1, dim)) for w in args[:3])
            q, ks, vs = qk_rope_readers(*raw, *args[3:], **counts)
        else:
            q, ks, vs = qkv_rope(x, torch.cat(args[:3]), *args[3:], kv_heads=kv_heads, **counts)
        return q, *ks, *vs

    def run(function, convert):
        leaves = [convert(t.clone()).requires_grad_() for t in inputs]
        outputs = function(*leaves, *(convert(t) for t in (cos, sin)))
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
        return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves)]

    results = run(ours, lambda t: t), run(plainly, lambda t: t), run(plainly, lambda t: t.double())
    names = ("q", *("k" for _ in grad_ks), *("v" for _ in grad_vs), "dx", "dw_q", "dw_k", "dw_v", "dgain")
    for name, mine, theirs, truth in zip(names, *results, strict=True):
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        # Gains are few numbers, in which PyTorch's roundings may cancel by chance: both have rounded projections.
        allowed = max(allowed, torch.finfo(dtype).eps / 4) if name == "dgain" else allowed
        assert mine.dtype == theirs.dtype
        assert error <= 2 * allowed + 1e-6, f"{name} of {shape} in {dtype}: {error:.2e}, PyTorch's {allowed:.2e}"


def _assert_frozen_gain_changes_nothing(shape, dtype, device="cpu"):
    (q, k, gain, cos, sin), _ = _case(shape, dtype, device)
    leaves = [t.requires_grad_() for t in (q, k, k.flip(0))]

    def gradients(gain):
        out, keys, values = qk_rope_readers(*leaves, gain, cos, sin, key_readers=2, value_readers=2)
        return torch.autograd.grad([out, *keys, *values], leaves, [t.detach() for t in (out, *keys, *values)])

    for mine, wanted in zip(gradients(gain), gradients(gain.clone().requires_grad_()), strict=True):
        assert torch.equal(mine, wanted)


def _assert_a_gain_of_zero_learns(dtype, device="cpu"):
    """Its queries are 0 to all scores, and its gradient is theirs times the turned ones."""
    (_, _, gain, cos, sin), (grad_q, grad_k) = _case(SHAPES[2], dtype, device)
    gain[1] = 0.0
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(n, 32, generator=generator).to(device, dtype) for n in (len(grad_q), 16 * 64))

    def run(function, convert):
        leaves = [convert(t.clone()).requires_grad_() for t in (x, weight, gain)]
        q, *rest = function(*leaves, convert(cos), convert(sin))
        torch.autograd.backward([q, *rest], [grad_q.to(q.dtype), *(grad_k.to(q.dtype) for _ in rest)])
        return [q.detach()[:, 1], leaves[0].grad, leaves[2].grad]

    def ours(*args):
        q, ks, vs = qkv_rope(*args, kv_heads=4)
        return q, *ks, *vs

    def plainly(x, weight, gain, cos, sin):
        q, k, v = split_heads(x @ weight.t(), 8, 4)
        return *reference(q, k, gain, cos, sin), v

    (q, *mine), (_, *truth) = run(ours, lambda t: t), run(plainly, lambda t: t.double())
    assert q.abs().max() <= 1e-10
    for got, want in zip(mine, truth, strict=True):
        assert (got.double() - want).norm() <= 4 * torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gain_of_zero_learns(dtype):
    _assert_a_gain_of_zero_learns(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_frozen_gain_changes_nothing(shape):
    _assert_frozen_gain_changes_nothing(shape, torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("apart", [False, True])
def test_projections_are_no_worse_than_pytorch(shape, dtype, readers, apart):
    _assert_projections_no_worse_than_pytorch(shape, dtype, readers=readers, apart=apart)


def test_gradients_of_readers_are_added():
    (q, k, gain, cos, sin), _ = _case(SHAPES[0], torch.float64)
    gain, cos, sin = (t.double() for t in (gain, cos, sin))
    leaves = [t.double().requires_grad_() for t in (q, k, k.flip(0), gain)]

    def call(picked, *args):
        q, ks, vs = qk_rope_readers(*args, cos, sin, key_readers=2, value_readers=3)
        return [(q, *ks, *vs)[i] for i in picked]

    for picked in ((0, 3), (1, 5), (1, 2, 3, 4, 5), (2,), (0,)):
        assert torch.autograd.gradcheck(lambda *a, picked=picked: call(picked, *a), leaves)


def test_one_reader_of_the_values_is_enough():
    (_, _, gain, cos, sin), _ = _case(SHAPES[0], torch.float64)
    gain, cos, sin = (t.double() for t in (gain, cos, sin))
    leaves = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in ((5, 8), (128, 8))]

    def call(picked, *args):
        q, ks, vs = qkv_rope(*args, gain, cos, sin, kv_heads=2, key_readers=2, value_readers=3)
        return [(q, *ks, *vs)[i] for i in picked]

    for picked in ((0, 3), (1, 5), (1, 2, 3, 4), (2,), (0,)):
        assert torch.autograd.gradcheck(lambda *a, picked=picked: call(picked, *a), leaves)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_no_worse_than_pytorch(shape, dtype):
    _assert_no_worse_than_pytorch(shape, dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_by_finite_differences(shape):
    (q, k, gain, cos, sin), _ = _case(((3,), *shape[1:]), torch.float64)
    leaves = [t.double().requires_grad_() for t in (q, k, gain)]
    assert torch.autograd.gradcheck(lambda *a: qk_rope(*a, cos.double(), sin.double()), leaves)


def test_scores_depend_on_the_distance_of_positions_only():
    q, k = (torch.randn(1, 1, 16, dtype=torch.float64).expand(12, 1, 16) for _ in range(2))
    angles = torch.outer(torch.arange(12, dtype=torch.float64), 1 / 10.0 ** torch.arange(4, dtype=torch.float64))
    turned_q, turned_k = qk_rope(q, k, torch.ones(1, dtype=torch.float64), angles.cos(), angles.sin())
    scores = turned_q[:, 0] @ turned_k[:, 0].t()
    for distance in range(12):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_rows_of_a_batch_share_the_table():
    (q, k, gain, cos, sin), _ = _case(((2, 37), 4, 2, 16, 4), torch.float32)
    both = qk_rope(q, k, gain, cos, sin)
    for row in range(2):
        for whole, part in zip(both, qk_rope(q[row], k[row], gain, cos, sin), strict=True):
            assert torch.equal(whole[row], part)


def test_op_contract():
    (q, k, gain, cos, sin), _ = _case(SHAPES[0], torch.float32)
    torch.library.opcheck(_forward_op, (*(t.requires_grad_() for t in (q, k, gain)), cos, sin, EPS))
    x, weight, gain = torch.randn(5, 8), torch.randn(128, 8), gain.detach()
    torch.library.opcheck(_project_op, (x, weight, gain, cos, sin, 2, EPS))
    q, k, raw = q.detach(), k.detach(), torch.randn(5, 128)
    torch.library.opcheck(_backward_op, (q, k, q, k, gain, cos, sin, EPS))
    for wanted in (True, False):
        torch.library.opcheck(_readers_backward_op, (q, [k, k], [k, k, k], q, k, gain, cos, sin, EPS, wanted))
        rest = (x, weight, raw, torch.empty(0), gain, cos, sin, EPS, [True, not wanted, wanted])
        torch.library.opcheck(_project_backward_op, (q, [k, k], [k, k, k], *rest))


@triton_aot.needs_triton
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.bfloat16, 8), (torch.float16, 64)])
def test_a_compiler_sees_the_projections_of_a_gpu(dtype, head_dim):
    """Shapes and dtypes alone say whether one kernel does it all: a traced tensor has no address."""
    with FakeTensorMode():
        x, weight = (torch.empty(n, 32, dtype=dtype, device="cuda") for n in (5, 8 * head_dim))
        gain, cos = torch.empty(4, device="cuda"), torch.empty(5, 4, device="cuda")
        q, k, raw, inverse = _project_op(x, weight, gain, cos, cos, 2, EPS)
        options = {"dtype": dtype, "device": "cuda"}
        strided = torch.empty_strided((5, 32), (33, 1), **options)
        turned = torch.empty_strided(tuple(weight.shape), (1, len(weight)), **options)
        assert _project_op(strided, turned, gain, cos, cos, 2, EPS)[3].shape == inverse.shape
        out, (key,), (value,) = qkv_rope(x, weight, gain, cos, cos, kv_heads=2)
    one_kernel = (dtype, head_dim) == (torch.bfloat16, 64)
    assert inverse.shape == ((5, 6) if one_kernel else (0,)) and raw.shape == (5, 8 * head_dim)
    assert q.numel() == (0 if one_kernel else 20 * head_dim) and k.numel() == q.numel() // 2
    assert (out.shape, key.shape, value.shape) == ((5, 4, head_dim), (5, 2, head_dim), (5, 2, head_dim))


def test_compiled_equals_eager_also_under_autocast():
    inputs, _ = _case(SHAPES[0], torch.float32)
    compiled = torch.compile(qk_rope, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for eager, traced in zip(qk_rope(*inputs), compiled(*inputs), strict=True):
                assert eager.dtype == torch.float32 and torch.equal(eager, traced)


def test_strided_and_empty_inputs():
    joined, angles = torch.randn(5, 48), torch.randn(5, 3)
    q, k = joined[:, :32].unflatten(1, (4, 8)), joined[:, 32:].unflatten(1, (2, 8))
    gain = torch.full((), 1.5).expand(4)  # stride 0
    tables = angles.T.contiguous().T.cos(), angles.T.contiguous().T.sin()
    for mine, wanted in zip(qk_rope(q, k, gain, *tables), reference(q, k, gain, *tables), strict=True):
        torch.testing.assert_close(mine, wanted)
    none = qk_rope(torch.empty(2, 0, 4, 8), torch.empty(2, 0, 2, 8), gain, torch.empty(0, 3), torch.empty(0, 3))
    assert [t.shape for t in none] == [(2, 0, 4, 8), (2, 0, 2, 8)]
    table = torch.empty(0, 3)
    q, keys, values = qkv_rope(torch.empty(0, 10), torch.randn(64, 10), torch.ones(4), table, table, kv_heads=2)
    assert [t.shape for t in (q, *keys, *values)] == [(0, 4, 8), (0, 2, 8), (0, 2, 8)]


def test_double_backward_raises():
    q, k, angles = torch.randn(5, 4, 8, requires_grad=True), torch.randn(5, 2, 8), torch.randn(5, 3)
    out, _ = qk_rope(q, k, torch.ones(4), angles.cos(), angles.sin())
    (gradient,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_tables_are_not_differentiable():
    (q, k, gain, cos, sin), _ = _case(SHAPES[0], torch.float32)
    with pytest.raises(RuntimeError, match="cos and sin are not differentiable"):
        qk_rope(q, k, gain, cos.requires_grad_(), sin)[0].sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(3, 8)}, ValueError, r"q: got shape \(3, 8\)"),
        ({"k": torch.randn(3, 2, 4)}, ValueError, r"k: got shape \(3, 2, 4\)"),
        ({"gain": torch.ones(3)}, ValueError, r"gain: got shape \(3,\), wanted \(4,\)"),
        ({"cos": torch.randn(2, 2)}, ValueError, r"cos: got shape \(2, 2\), wanted \[3, P\]"),
        ({"cos": torch.randn(3, 5)}, ValueError, "2 P at most 8"),
        ({"sin": torch.randn(3, 1)}, ValueError, r"sin: got shape \(3, 1\)"),
        ({"k": torch.randn(3, 2, 8).half()}, TypeError, "k: got torch.float16"),
        ({"gain": torch.ones(4, dtype=torch.int64)}, TypeError, "gain: got torch.int64"),
        ({"gain": torch.empty(4, device="meta")}, ValueError, "gain: got device meta"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "q": torch.randn(3, 4, 8), "k": torch.randn(3, 2, 8), "gain": torch.ones(4), "cos": torch.randn(3, 2),
        "sin": torch.randn(3, 2),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        qk_rope(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.ones(3, 8, dtype=torch.int64), "weight": torch.ones(64, 8, dtype=torch.int64)},
            TypeError,
            "x: got",
        ),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: got shape \(\), wanted \[..., T, D\]"),
        ({"gain": torch.ones(4, dtype=torch.int64)}, TypeError, "gain: got torch.int64"),
        ({"cos": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "cos: got torch.int64"),
        ({"sin": torch.empty(3, 2, device="meta")}, ValueError, "sin: got device meta, wanted cpu"),
    ],
)
def test_wrong_arguments_of_the_projection_are_named(change, error, message):
    arguments = {
        "x": torch.randn(3, 8), "weight": torch.randn(64, 8), "gain": torch.ones(4), "cos": torch.randn(3, 2),
        "sin": torch.randn(3, 2),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        qkv_rope(**(arguments | change), kv_heads=2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": torch.randn(3, 4, 8)}, ValueError, r"v: got shape \(3, 4, 8\) on cpu, wanted k's \(3, 2, 8\)"),
        ({"v": torch.randn(3, 2, 8).half()}, TypeError, "v: got torch.float16, wanted k's torch.float32"),
        ({"value_readers": 0}, ValueError, "got 1 and 0, wanted at least 1"),
    ],
)
def test_wrong_readers_are_named(change, error, message):
    arguments = {
        "q": torch.randn(3, 4, 8), "k": torch.randn(3, 2, 8), "v": torch.randn(3, 2, 8), "gain": torch.ones(4),
        "cos": torch.randn(3, 2), "sin": torch.randn(3, 2),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        qk_rope_readers(**(arguments | change))


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_qk_rope")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, ((4099,), 8, 4, 64, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_kernels_on_a_gpu(shape, dtype):
    _assert_no_worse_than_pytorch(shape, dtype, "cuda")
    _assert_frozen_gain_changes_nothing(shape, dtype, "cuda")
    for readers in (1, 2, 4):
        for apart in (False, True):
            _assert_projections_no_worse_than_pytorch(shape, dtype, "cuda", readers, apart)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", TURNED_SHAPES)
@pytest.mark.parametrize("width", [32, 33])
def test_other_projections_on_a_gpu(shape, width):
    _assert_projections_no_worse_than_pytorch(shape, torch.bfloat16, "cuda", readers=2, width=width)


@pytest.mark.gpu
def test_a_gain_of_zero_learns_on_a_gpu():
    _assert_a_gain_of_zero_learns(torch.bfloat16, "cuda")


if __name__ == "__main__":
    with interpreting():
        _assert_a_gain_of_zero_learns(torch.float32)
        for case in SHAPES:
            for precision in (torch.float32, torch.float16):
                _assert_no_worse_than_pytorch(case, precision)
                _assert_frozen_gain_changes_nothing(case, precision)
                for count in (1, 2, 4):
                    for separate in (False, True):
                        _assert_projections_no_worse_than_pytorch(case, precision, readers=count, apart=separate)
        for case in (*SHAPES, *TURNED_SHAPES):
            _assert_projections_no_worse_than_pytorch(case, torch.float32, width=33)  # rows of no multiple of 16 bytes
