"""Weighted sums of residual streams: the op against fp64, its gradients, and its Triton kernels."""

import pytest
import torch

from pgolf_kernels import combine, combine_norm, norm_residual
from pgolf_kernels import residual as op_module
from pgolf_kernels._triton_op import interpreting
from pgolf_kernels.residual import EPS, Launch, reference
from tests import triton_aot

SHAPES = [(3, (10, 64)), (8, (7, 48)), (1, (2, 5, 512)), (5, (33, 96))]


def _case(streams, shape, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator).to(device)

    inputs = [draw(*shape).to(dtype).requires_grad_() for _ in range(streams)]
    coefficients = draw(streams, shape[-1]).requires_grad_()
    return inputs, coefficients, draw(*shape).to(dtype), draw(*shape).to(dtype)


def _errors(streams, shape, dtype, device="cpu"):
    """Relative errors (u, n, worst stream gradient, coefficient gradient) of the op and of PyTorch in `dtype`."""
    inputs, coefficients, du, dn = _case(streams, shape, dtype, device)
    exact_inputs = [s.detach().double().requires_grad_() for s in inputs]
    exact_coefficients = coefficients.detach().double().requires_grad_()
    exact = reference(exact_inputs, exact_coefficients, 0.7, EPS)
    torch.autograd.backward(exact, [du.double(), dn.double()])

    def measure(outputs, leaves):
        torch.autograd.backward(outputs, [du, dn])
        pairs = [
            *zip(outputs, exact, strict=True),
            *zip((leaf.grad for leaf in leaves), (e.grad for e in [*exact_inputs, exact_coefficients]), strict=True),
        ]
        return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]

    ours = measure(combine_norm(inputs, coefficients, scale=0.7)[:2], [*inputs, coefficients])
    plain_inputs = [s.detach().clone().requires_grad_() for s in inputs]
    plain_coefficients = coefficients.detach().clone().requires_grad_()
    total = sum(c.to(dtype) * s for c, s in zip(plain_coefficients, plain_inputs, strict=True))
    normed = torch.nn.functional.rms_norm(total, shape[-1:], eps=EPS) * 0.7
    theirs = measure((total, normed), [*plain_inputs, plain_coefficients])
    return ours, theirs


def _assert_no_worse_than_pytorch(streams, shape, dtype, device="cpu"):
    ours, theirs = _errors(streams, shape, dtype, device)
    for position, (mine, plain) in enumerate(zip(ours, theirs, strict=True)):
        assert mine <= 2 * plain + 1e-7, f"result {position}: error {mine:.2e}, PyTorch's {plain:.2e}"


def _assert_later_uses_add_their_gradients(shape, dtype, device="cpu"):
    """Gradients of what reads the returned streams, against plain PyTorch in fp64."""
    inputs, coefficients, du, dn = _case(3, shape, dtype, device)
    exact = [t.detach().double().requires_grad_() for t in (*inputs, coefficients)]

    def run(streams, coefficients, du, dn, through):
        if through:
            total, streams = combine(streams, coefficients)
            _, normed, streams = combine_norm(streams, coefficients, scale=0.7, with_total=False)
            again, last = norm_residual(streams[2], scale=0.3)
        else:
            total, normed = reference(streams, coefficients, 0.7, EPS)
            again = torch.nn.functional.rms_norm(streams[2], shape[-1:], eps=EPS) * 0.3
            last = streams[2]
        torch.autograd.backward([total, normed, streams[0], again, last], [du, dn, dn, du, dn])

    run(inputs, coefficients, du, dn, True)
    run(exact[:3], exact[3], du.double(), dn.double(), False)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for position, (mine, wanted) in enumerate(zip((*inputs, coefficients), exact, strict=True)):
        error = (mine.grad.double() - wanted.grad).norm() / wanted.grad.norm()
        assert error < tolerance, f"gradient {position}: relative error {error:.1e}"


def _assert_norm_no_worse_than_pytorch(shape, dtype, device="cpu"):
    """`norm_residual` with its input written over afterwards, and the gradient that comes back through it."""
    (x,), _, through, dn = _case(1, shape, dtype, device)

    def run(x, function, convert):
        leaf = convert(x.detach()).requires_grad_()
        normed, again = function(leaf * 1)
        torch.autograd.backward([normed, again], [dn.to(normed.dtype), through.to(normed.dtype)])
        return normed.detach(), leaf.grad

    def ours(x):
        normed, again = norm_residual(x, scale=0.3, overwritten=True)
        assert again.data_ptr() == x.data_ptr()
        return normed, again.mul_(1.0).add_(1.0)

    def plain(x):
        return torch.nn.functional.rms_norm(x, shape[-1:], eps=EPS) * 0.3, x

    results = run(x, ours, lambda t: t), run(x, plain, lambda t: t), run(x, plain, lambda t: t.double())
    for name, mine, theirs, truth in zip(("n", "dx"), *results, strict=True):
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
        assert error <= 2 * allowed + 1e-7, f"{name}: error {error:.2e}, PyTorch's {allowed:.2e}"


def _assert_unwanted_gradients_change_no_other(shape, dtype, device="cpu"):
    """A frozen stream: gradients of all else are those of the unfrozen call, whether coefficients are learnt or not."""
    inputs, coefficients, du, dn = _case(3, shape, dtype, device)
    part = [inputs[0], inputs[1].detach(), inputs[2]]
    for weights, learnt in ((coefficients, [coefficients]), (coefficients.detach(), [])):
        _, normed, again = combine_norm(inputs, weights, with_total=False)
        everything = torch.autograd.grad([normed, again[2]], [*inputs, *learnt], [dn, du])
        total, normed, again = combine_norm(part, weights, with_total=False)
        assert total.numel() == 0
        found = torch.autograd.grad([normed, again[2]], [part[0], part[2], *learnt], [dn, du])
        for a, b in zip(found, (everything[0], *everything[2:]), strict=True):
            assert torch.equal(a, b)


def _assert_frozen_coefficients(streams, shape, dtype, device="cpu"):
    """Frozen coefficients, whose backward has the norm in place of the streams, so that these may be written over:
    results are the same bits, gradients no worse than PyTorch's, with and without a gradient of the total, of the norm
    and from later uses."""
    inputs, coefficients, du, dn = _case(streams, shape, dtype, device)
    frozen = coefficients.detach()
    learnt, ours = (combine_norm(inputs, c, scale=0.7) for c in (coefficients, frozen))
    for a, b in zip(learnt[:2], ours[:2], strict=True):
        assert torch.equal(a, b)

    def plain(streams):
        total = sum(c.to(streams[0].dtype) * s for c, s in zip(frozen, streams, strict=True))
        return total, torch.nn.functional.rms_norm(total, shape[-1:], eps=EPS) * 0.7, streams

    exact_inputs, plain_inputs = ([s.detach().to(d).requires_grad_() for s in inputs] for d in (torch.float64, dtype))
    for uses in ((0, 1, 2), (0, 1), (1, 2), (0, 2), (1,), (0,)):

        def gradients(call, leaves, uses=uses, spoil=False):
            total, normed, again = call([leaf * 1 for leaf in leaves] if spoil else leaves)
            outputs = [(total, normed, 2 * again[-1])[use] for use in uses]
            if spoil:
                for stream in again:
                    stream.detach().zero_()
            upstream = [(du, dn, du)[use].to(leaves[0].dtype) for use in uses]
            return torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)

        exact = gradients(plain, exact_inputs)
        theirs = gradients(plain, plain_inputs)
        mine = gradients(lambda streams: combine_norm(streams, frozen, scale=0.7), inputs, spoil=True)
        for position, (a, b, truth) in enumerate(zip(mine, theirs, exact, strict=True)):
            error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (a, b))
            assert error <= 2 * allowed + 1e-7, f"{uses}, stream {position}: {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("shape", [shape for _, shape in SHAPES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_is_no_worse_than_pytorch_and_does_without_its_input(shape, dtype):
    _assert_norm_no_worse_than_pytorch(shape, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unwanted_gradients_change_no_other(dtype):
    _assert_unwanted_gradients_change_no_other((9, 48), dtype)


@pytest.mark.parametrize(("streams", "shape"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_frozen_coefficients(streams, shape, dtype):
    _assert_frozen_coefficients(streams, shape, dtype)


@pytest.mark.parametrize("call", [combine, combine_norm])
def test_a_frozen_stream_comes_back_frozen(call):
    inputs, coefficients, *_ = _case(2, (9, 48), torch.float32)
    frozen, learnt = inputs[0].detach(), inputs[1]
    *_, again = call([frozen, learnt], coefficients.detach())
    assert [stream.requires_grad for stream in again] == [False, True]
    for before, after in zip((frozen, learnt), again, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_later_uses_add_their_gradients(dtype):
    _assert_later_uses_add_their_gradients((9, 48), dtype)


@pytest.mark.parametrize(("streams", "shape"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_no_worse_than_pytorch(streams, shape, dtype):
    _assert_no_worse_than_pytorch(streams, shape, dtype)


def test_gradients_by_finite_differences():
    inputs = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    coefficients = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def call(coefficients, *streams):
        total, normed, again = combine_norm(streams, coefficients, scale=0.3)
        return total, normed, *(position * stream for position, stream in enumerate(again))

    assert torch.autograd.gradcheck(call, (coefficients, *inputs))
    assert torch.autograd.gradcheck(lambda c, *s: combine(s, c)[0], (coefficients, *inputs))
    assert torch.autograd.gradcheck(lambda *s: call(coefficients.detach(), *s), inputs)
    assert torch.autograd.gradcheck(lambda *s: combine(s, coefficients.detach())[0], inputs)
    assert torch.autograd.gradcheck(lambda x: norm_residual(x, scale=0.3), inputs[:1])


def test_op_contract():
    inputs, coefficients, _, _ = _case(3, (4, 16), torch.float32)
    x, *_ = inputs = [t.detach() for t in inputs]
    coefficients = coefficients.detach()
    for flags in ((True, True, False), (False, True, True), (True, False, False)):
        torch.library.opcheck(op_module._op, (inputs, coefficients, 0.5, EPS, *flags))
    torch.library.opcheck(op_module._op, ([x], None, 0.5, EPS, False, True, True))
    _, *kept = op_module._op([x], None, 0.5, EPS, False, True, True)
    for d_total, through in ((None, [None] * 3), (x, [x, None, x])):
        learnt = inputs, coefficients, d_total, x, through, 0.5, EPS, [True, False, True]
        torch.library.opcheck(op_module._backward_op, learnt)
        frozen = d_total, x, *kept, coefficients, through, 0.5, [True, False, True]
        torch.library.opcheck(op_module._frozen_backward_op, frozen)
        torch.library.opcheck(op_module._frozen_backward_op, (d_total, x, *kept, None, through[:1], 0.5, [True]))


@pytest.mark.parametrize("learnt", [True, False])
def test_compiled_equals_eager_also_under_autocast(learnt):
    inputs, coefficients, du, dn = _case(3, (4, 16), torch.float32)
    weights = coefficients if learnt else coefficients.detach()

    def call():
        total, normed, _ = combine_norm(inputs, weights, scale=0.5)
        return total, normed, norm_residual(total * 2)[0]

    def results(function):
        outputs = function()
        return *outputs, *torch.autograd.grad(outputs, inputs + [coefficients] * learnt, [du, dn, dn])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for a, b in zip(results(call), results(compiled), strict=True):
                assert a.dtype == torch.float32 and torch.equal(a, b)


def test_strided_and_empty_inputs():
    wide = torch.randn(5, 32)
    coefficients = torch.randn(1, 16)
    torch.testing.assert_close(combine([wide[:, ::2]], coefficients)[0], wide[:, ::2] * coefficients[0])
    total, normed, _ = combine_norm([torch.empty(0, 16)], coefficients)
    assert total.shape == normed.shape == (0, 16)


def test_the_epsilon_can_be_given():
    x = torch.full((3, 16), 1e-3)
    wanted = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt()
    torch.testing.assert_close(norm_residual(x, eps=0.01)[0], wanted)
    torch.testing.assert_close(combine_norm([x], torch.ones(1, 16), eps=0.01)[1], wanted)


def test_wide_rows_have_no_larger_share_for_a_thread():
    for launch in (Launch(2, 2, 6), Launch(4, 2, 16), Launch(1, 4, 8)):
        assert launch.for_width(256) == launch.for_width(512) == launch
        for columns in (1024, 2048, 4096):
            wide = launch.for_width(columns)
            assert wide.rows * columns / wide.warps <= launch.rows * 512 / launch.warps


def test_double_backward_raises():
    inputs, coefficients, _, _ = _case(2, (3, 8), torch.float32)
    calls = (
        lambda: combine_norm(inputs, coefficients)[1],
        lambda: combine_norm(inputs, coefficients.detach())[1],
        lambda: combine(inputs, coefficients.detach())[0],
        lambda: norm_residual(inputs[0])[0],
    )
    for call in calls:
        (gradient,) = torch.autograd.grad(call().square().sum(), inputs[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not supported"):
            gradient.sum().backward()


def test_wrong_arguments_are_named():
    good = torch.randn(4, 8)
    with pytest.raises(ValueError, match="streams: got 9"):
        combine([good] * 9, torch.randn(9, 8))
    with pytest.raises(ValueError, match=r"streams\[1\]: got shape"):
        combine([good, good[:2]], torch.randn(2, 8))
    with pytest.raises(TypeError, match=r"streams\[1\]: got torch.float64"):
        combine([good, good.double()], torch.randn(2, 8))
    with pytest.raises(ValueError, match="coefficients: got shape"):
        combine([good], torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"streams\[0\]: got shape \(\), wanted \[..., D\] with D at least 1"):
        combine([torch.tensor(1.0)], torch.randn(1, 8))
    with pytest.raises(ValueError, match=r"x: got shape \(4, 0\)"):
        norm_residual(good[:, :0])
    for call in (lambda: norm_residual(good, scale=0.0), lambda: combine_norm([good], torch.ones(1, 8), scale=0.0)):
        with pytest.raises(ValueError, match="scale: got 0"):
            call()


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_residual")


@pytest.mark.gpu
@pytest.mark.parametrize(("streams", "shape"), [*SHAPES, (3, (4099, 512))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_triton_kernels_on_a_gpu(streams, shape, dtype):
    _assert_no_worse_than_pytorch(streams, shape, dtype, "cuda")
    _assert_later_uses_add_their_gradients(shape, dtype, "cuda")
    _assert_unwanted_gradients_change_no_other(shape, dtype, "cuda")
    _assert_frozen_coefficients(streams, shape, dtype, "cuda")
    _assert_norm_no_worse_than_pytorch(shape, dtype, "cuda")


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: norm_residual(torch.ones(2, 4, dtype=torch.int32))),
        (r"streams\[0\]", lambda: combine([torch.ones(2, 4, dtype=torch.int64)], torch.ones(1, 4))),
        ("coefficients", lambda: combine_norm([torch.ones(2, 4)], torch.ones(1, 4, dtype=torch.int32))),
    ],
)
def test_integers_are_refused(name, call):
    with pytest.raises(TypeError, match=f"{name}: got torch.int"):
        call()


if __name__ == "__main__":
    with interpreting():
        for case in SHAPES:
            for precision in (torch.float32, torch.float16):
                _assert_no_worse_than_pytorch(*case, precision)
                _assert_later_uses_add_their_gradients(case[1], precision)
                _assert_unwanted_gradients_change_no_other(case[1], precision)
                _assert_frozen_coefficients(*case, precision)
                _assert_norm_no_worse_than_pytorch(case[1], precision)
