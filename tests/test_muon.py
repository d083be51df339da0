"""Muon's passes around Newton-Schulz: against fp64, contract, Triton kernels."""

import pytest
import torch

from pgolf_kernels import muon as op_module
from pgolf_kernels import muon_apply, muon_direction, orthogonalize
from pgolf_kernels._triton_op import interpreting
from tests import triton_aot
from tests.gpu import assert_returns_at_once

# Banks [n, rows, cols] that share an X: tall beside wide, single, smaller and larger than a tile, with none.
BANKS = [
    [(2, 48, 20), (3, 20, 48)],
    [(1, 7, 5)],
    [(1, 5, 1030)],
    [(2, 1100, 9)],
    [(2, 70, 33), (0, 33, 70), (1, 33, 70)],
    [(3, 16, 16)],
    [(0, 4, 8)],
]
MODEL = [[(22, 512, 512)], [(22, 256, 512)], [(11, 2048, 512), (11, 512, 2048)]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOMENTUM, KEEP, RATE = 0.93, 0.99, 0.02


def _case(banks, device="cpu", dtype=torch.float32):
    """(gradients, momenta, factor): some rows zero or below the norms' floor, some gradients below fp16's range."""
    generator = torch.Generator().manual_seed(len(banks))
    gradients, momenta = ([torch.randn(shape, generator=generator) for shape in banks] for _ in range(2))
    for g, m in zip(gradients, momenta, strict=True):
        for t in (g, m):
            t[:, 0] = 0.0
            t[:, 1] *= 1e-9
            t[:, -1] *= 1e-5
            t[1:2] = 0.0
    return *([t.to(device, dtype) for t in ts] for ts in (gradients, momenta)), torch.tensor(0.3, device=device)


def _exact(gradients, momenta, factor, row_normalize):
    """(momenta, X) by the formula, a matrix at a time, in fp64."""
    scale = 1.0 if factor is None else factor.double()
    stepped = [MOMENTUM * m.double() + scale * g.double() for g, m in zip(gradients, momenta, strict=True)]
    found = []
    for g, m in zip(gradients, stepped, strict=True):
        for u in scale * g.double() + MOMENTUM * m:
            if row_normalize:
                u = u / u.square().sum(1, keepdim=True).sqrt().clamp(min=1e-7)
            u = u / (u.square().sum().sqrt() + 1e-7)
            found.append(u.T if u.size(0) > u.size(1) else u)
    rows, cols = sorted(gradients[0].shape[1:])
    return stepped, torch.stack(found) if found else torch.empty(0, rows, cols).to(gradients[0])


def _error(found, exact):
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def _assert_no_worse_than_pytorch(banks, dtype, device="cpu"):
    for row_normalize in (True, False):
        for clipped in (True, False):
            gradients, momenta, factor = _case(banks, device)
            factor = factor if clipped else None
            stepped, exact = _exact(gradients, momenta, factor, row_normalize)
            plain = [m.clone() for m in momenta]
            theirs = op_module.reference(gradients, plain, MOMENTUM, factor, row_normalize, dtype)
            options = {"factor": factor, "row_normalize": row_normalize, "dtype": dtype}
            again = [m.clone() for m in momenta]
            ours = muon_direction(gradients, momenta, MOMENTUM, **options)
            assert ours.dtype == dtype and ours.shape == exact.shape and ours.is_contiguous()
            error, allowed = _error(ours, exact), _error(theirs, exact)
            assert error <= 2 * allowed + 1e-7, f"{banks} in {dtype}: {error:.2e}, PyTorch's {allowed:.2e}"
            assert allowed <= 4 * torch.finfo(dtype).eps, f"{banks} in {dtype}: PyTorch's {allowed:.2e}"
            for m, p, e in zip(momenta, plain, stepped, strict=True):
                assert _error(m, e) <= 2 * _error(p, e) + 1e-7
            assert torch.equal(muon_direction(gradients, again, MOMENTUM, **options), ours)
            assert all(map(torch.equal, again, momenta))
    _assert_applied(banks, dtype, device)


def _assert_applied(banks, dtype, device):
    for shape in banks:
        weight = torch.randn(shape, device=device)
        update = torch.randn(shape[0], *sorted(shape[1:]), device=device).to(dtype)
        turned = update.mT if shape[1] > shape[2] else update
        exact = KEEP * weight.double() - RATE * turned.double()
        theirs = weight.clone().mul_(KEEP).add_(turned, alpha=-RATE)
        muon_apply(weight, update, keep=KEEP, rate=RATE)
        assert _error(weight, exact) <= 2 * _error(theirs, exact) + 1e-7


@pytest.mark.parametrize("banks", BANKS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_are_no_worse_than_pytorch(banks, dtype):
    _assert_no_worse_than_pytorch(banks, dtype)


@pytest.mark.parametrize("banks", BANKS, ids=str)
@pytest.mark.parametrize("row_normalize", [True, False])
def test_formula_in_fp64(banks, row_normalize):
    gradients, momenta, factor = _case(banks, dtype=torch.float64)
    stepped, exact = _exact(gradients, momenta, factor, row_normalize)
    found = muon_direction(
        gradients, momenta, MOMENTUM, factor=factor, row_normalize=row_normalize, dtype=torch.float64
    )
    torch.testing.assert_close(found, exact.double(), rtol=1e-12, atol=1e-14)
    for mine, wanted in zip(momenta, stepped, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-14, atol=0)


def test_what_is_zero_stays_zero_and_finite():
    for dtype in DTYPES:
        g, m = torch.zeros(2, 6, 3), torch.zeros(2, 6, 3)
        assert not muon_direction([g], [m], MOMENTUM, dtype=dtype).any() and not m.any()


@pytest.mark.parametrize("shape", [(3, 24, 8), (2, 8, 24), (1, 16, 16)])
def test_orthogonalised_singular_values_are_near_one(shape):
    """What follows muon_direction equals what one call does with a matrix as it is; 5 steps reach 0.68 to 1.21."""
    u = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = muon_direction([u], [torch.zeros_like(u)], 0.0, row_normalize=False, dtype=u.dtype)
    found = orthogonalize(x, 5, u.dtype, normalized=True)
    whole = orthogonalize(u, 5, u.dtype)
    assert whole.shape == u.shape
    torch.testing.assert_close(found, whole.mT if shape[1] > shape[2] else whole, rtol=1e-9, atol=1e-12)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.25


def test_inputs_may_have_any_stride():
    g, m, _ = _case([(2, 12, 20)])
    wanted_m = [m[0].clone()]
    strided = g[0].mT.contiguous().mT
    wanted = muon_direction(g, wanted_m, MOMENTUM, dtype=torch.float32)
    torch.testing.assert_close(muon_direction([strided], m, MOMENTUM, dtype=torch.float32), wanted)
    weight, other = torch.zeros(2, 12, 20), torch.zeros(2, 12, 20)
    muon_apply(weight, wanted.mT.contiguous().mT, keep=1.0, rate=1.0)
    muon_apply(other, wanted, keep=1.0, rate=1.0)
    assert torch.equal(weight, other)


def test_op_contract():
    gradients, momenta, factor = _case(BANKS[0])
    for options in ((factor, True, torch.bfloat16), (None, False, torch.float32)):
        torch.library.opcheck(op_module._direction_op, (gradients, momenta, MOMENTUM, *options))
    lone, _, _ = _case(BANKS[1])
    torch.library.opcheck(
        op_module._direction_op, (lone, [t.clone() for t in lone], MOMENTUM, None, True, lone[0].dtype)
    )
    update = torch.randn(2, 20, 48, dtype=torch.bfloat16)
    torch.library.opcheck(op_module._apply_op, (gradients[0], update, KEEP, RATE))


def test_compiled_equals_eager_also_under_autocast():
    def call(gradients, momenta, weight, factor):
        x = muon_direction(gradients, momenta, MOMENTUM, factor=factor, dtype=torch.float32)
        muon_apply(weight, x[: len(weight)], keep=KEEP, rate=RATE)
        return x

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for autocast in (False, True):
        results = []
        for function in (call, compiled):
            gradients, momenta, factor = _case(BANKS[0])
            weight = gradients[0].clone()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                results.append([function(gradients, momenta, weight, factor), *momenta, weight])
        assert all(map(torch.equal, *results))


def test_a_weight_that_is_kept_for_a_backward_pass_is_known_to_have_changed():
    weight = torch.randn(1, 4, 6, requires_grad=True)
    loss = weight.square().sum()
    muon_apply(weight, torch.randn(1, 4, 6), keep=KEEP, rate=RATE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gradients": [], "momenta": []}, ValueError, "gradients: got 0 banks, wanted at least 1"),
        ({"momenta": []}, ValueError, "momenta: got 0 banks, wanted 2"),
        ({"gradients": [torch.zeros(3, 4)] * 2}, ValueError, r"gradients\[0\]: got shape \(3, 4\), wanted \[n, rows"),
        ({"gradients": [torch.zeros(1, 4, 3), torch.zeros(1, 4, 4)]}, ValueError, r"gradients\[1\]: .*matrices of \(3"),
        ({"gradients": [torch.zeros(1, 4, 3).half()] * 2}, TypeError, r"gradients\[0\]: got torch.float16 on cpu"),
        (
            {"gradients": [torch.zeros(1, 4, 3), torch.zeros(1, 3, 4).double()]},
            TypeError,
            r"gradients\[1\]: got torch.float64, wanted torch.float32",
        ),
        ({"momenta": [torch.zeros(1, 4, 3), torch.zeros(2, 3, 4)]}, ValueError, r"momenta\[1\]: got shape \(2, 3, 4\)"),
        (
            {"momenta": [torch.zeros(1, 4, 3).double()] * 2},
            TypeError,
            r"momenta\[0\]: got torch.float64, wanted torch.float32",
        ),
        (
            {"momenta": [torch.zeros(1, 4, 3, device="meta")] * 2},
            ValueError,
            r"momenta\[0\]: got device meta",
        ),
        ({"momenta": [torch.zeros(1, 3, 4).mT] * 2}, ValueError, r"momenta\[0\]: got strides"),
        ({"factor": torch.ones(1)}, ValueError, r"factor: got shape \(1,\) on cpu, wanted a scalar"),
        ({"factor": torch.ones((), device="meta")}, ValueError, "factor: .* on meta"),
        ({"factor": torch.ones((), dtype=torch.int32)}, TypeError, "factor: got torch.int32"),
        ({"dtype": torch.int8}, TypeError, "dtype: got torch.int8, wanted one of torch.bfloat16, torch.float16"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype: got torch.float8_e4m3fn, wanted one of"),
    ],
)
def test_wrong_arguments_of_the_direction_are_named(change, error, message):
    banks = {name: [torch.zeros(1, 4, 3), torch.zeros(1, 3, 4)] for name in ("gradients", "momenta")}
    arguments = banks | {"momentum": 0.9, "dtype": torch.float32} | change
    with pytest.raises(error, match=message):
        muon_direction(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(4, 3)}, ValueError, r"weight: got shape \(4, 3\), wanted \[n, rows, cols\]"),
        ({"weight": torch.zeros(1, 4, 3, dtype=torch.int32)}, TypeError, "weight: got torch.int32"),
        ({"weight": torch.zeros(1, 3, 4).mT}, ValueError, "weight: got strides"),
        ({"update": torch.zeros(1, 4, 3)}, ValueError, r"update: got shape \(1, 4, 3\) on cpu, wanted \(1, 3, 4\)"),
        ({"update": torch.zeros(1, 3, 4, device="meta")}, ValueError, "update: .* on meta, wanted .* on cpu"),
        ({"update": torch.zeros(1, 3, 4, dtype=torch.int32)}, TypeError, "update: got torch.int32"),
    ],
)
def test_wrong_arguments_of_the_update_are_named(change, error, message):
    arguments = {"weight": torch.zeros(1, 4, 3), "update": torch.zeros(1, 3, 4)} | change
    with pytest.raises(error, match=message):
        muon_apply(**arguments, keep=1.0, rate=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(4, 3), 5, torch.float32), ValueError, r"update: got shape \(4, 3\), wanted \[n, rows, cols\]"),
        ((torch.zeros(1, 4, 3).int(), 5, torch.float32), TypeError, "update: got torch.int32"),
        ((torch.zeros(1, 4, 3), 5, torch.int8), TypeError, "dtype: got torch.int8"),
        ((torch.zeros(1, 4, 3), -1, torch.float32), ValueError, "steps: got -1, wanted at least 0"),
    ],
)
def test_wrong_arguments_of_newton_schulz_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        orthogonalize(*arguments)


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_muon")


@pytest.mark.gpu
@pytest.mark.parametrize("banks", [*BANKS, *MODEL], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_kernels_on_a_gpu(banks, dtype):
    _assert_no_worse_than_pytorch(banks, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2049, 1024, 1024), (1025, 2048, 1024)])
def test_more_elements_than_32_bits_count(shape):
    """More than 2^31 of them; the last matrix is looked at."""
    gradient = torch.zeros(shape, device="cuda")
    gradient[-1].normal_()
    momentum = torch.zeros_like(gradient)
    exact = _exact([gradient[-1:]], [momentum[-1:]], None, True)[1]
    x = muon_direction([gradient], [momentum], MOMENTUM, dtype=torch.bfloat16)
    assert _error(x[-1:], exact) < 4e-3
    before = gradient[-1].clone()
    muon_apply(gradient, x, keep=KEEP, rate=RATE)
    turned = x[-1].mT if shape[1] > shape[2] else x[-1]
    torch.testing.assert_close(gradient[-1], KEEP * before - RATE * turned.float())


def _step(gradients, momenta, weights, factor):
    x = muon_direction(gradients, momenta, MOMENTUM, factor=factor, dtype=torch.bfloat16)
    for weight, update in zip(weights, x.split([len(w) for w in weights]), strict=True):
        muon_apply(weight, update, keep=KEEP, rate=RATE)
    return x


@pytest.mark.gpu
def test_returns_before_the_gpu_is_done():
    gradients, momenta, factor = _case(MODEL[2], "cuda")
    weights = [g.clone() for g in gradients]
    _step(gradients, momenta, weights, factor)
    assert_returns_at_once(lambda: _step(gradients, momenta, weights, factor))


@pytest.mark.gpu
def test_captures_into_a_graph():
    gradients, momenta, factor = _case(MODEL[2], "cuda")
    weights = [g.clone() for g in gradients]
    before = [t.clone() for t in (*momenta, *weights)]
    expected = [_step(gradients, momenta, weights, factor), *(t.clone() for t in (*momenta, *weights))]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(gradients, momenta, weights, factor)
    for tensor, value in zip((*momenta, *weights), before, strict=True):
        tensor.copy_(value)
    graph.replay()
    for found, wanted in zip((captured, *momenta, *weights), expected, strict=True):
        assert torch.equal(found, wanted)


if __name__ == "__main__":
    with interpreting():
        test_what_is_zero_stays_zero_and_finite()
        test_inputs_may_have_any_stride()
        for case in BANKS:
            for precision in (torch.float32, torch.float16):  # bfloat16 is cut off there, not rounded
                _assert_no_worse_than_pytorch(case, precision)
