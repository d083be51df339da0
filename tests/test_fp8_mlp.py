"""FP8 MLP: error against fp64, gradients and contract, training with it, its kernels interpreted and on a GPU."""

import pytest
import torch

from model.adapters import Adapters
from model.config import Config
from model.data.loaders import Batch
from model.errors import ConfigError
from model.gpt import GPT
from model.micro_step import MicroStep
from model.pipeline import run_pipeline
from model.train import Trainer
from pgolf_kernels import _fp8_mlp_torch as emulation
from pgolf_kernels import fp8_mlp
from pgolf_kernels._triton_op import interpreting, kernels
from pgolf_kernels.fp8_mlp import _add_op, _backward_op, _hidden_op, _output_op, runs_fp8
from pgolf_kernels.fused_mlp import reference
from tests import triton_aot
from tests.gpu import assert_returns_at_once, replayed
from tests.tiny import tiny_config, tiny_data

SHAPES = [(37, 32, 48, 16), (130, 48, 272, 32), (256, 64, 512, 48)]  # rows, D, F, D_out
ERROR = 0.08  # of a result's norm: e4m3's rounding errors, 2.6 % rms, of two factors or three


def _case(shape, dtype=torch.float32, device="cpu", gradient=1e-6):
    rows, dim, hidden, out = shape
    generator = torch.Generator().manual_seed(rows)

    def draw(scale, *size):
        return (torch.randn(size, generator=generator) * scale).to(device, dtype)

    inputs = [draw(1.0, rows, dim), draw(dim**-0.5, hidden, dim), draw(hidden**-0.5, out, hidden)]
    return inputs, draw(gradient, rows, out)


def _run(function, inputs, grad, convert=lambda t: t):
    leaves = [convert(t.detach().clone()).requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y.dtype))]


def _errors(inputs, grad, slope=0.3):
    exact = _run(lambda *a: reference(*a, slope), inputs, grad, lambda t: t.double())
    ours = _run(lambda *a: fp8_mlp(*a, negative_slope=slope), inputs, grad)
    for mine, leaf in zip(ours, (inputs[0], *inputs), strict=True):
        assert mine.dtype == leaf.dtype
    return ours, exact, [((m.double() - e).norm() / e.norm()).item() for m, e in zip(ours, exact, strict=True)]


def _assert_close(inputs, grad, slope=0.3):
    ours, exact, errors = _errors(inputs, grad, slope)
    assert max(errors) < ERROR, errors
    for mine, truth in zip(ours, exact, strict=True):  # as long as the truth: rounding shortens nothing
        assert abs((mine.double() * truth).sum() / truth.square().sum() - 1) < 0.03


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.5])
def test_results_and_gradients_against_fp64(shape, dtype, slope):
    _assert_close(*_case(shape, dtype), slope)


@pytest.mark.parametrize("size", [1e-3, 1e3])
@pytest.mark.parametrize("gradient", [1e-12, 1.0])
def test_the_scale_of_inputs_and_gradients_does_not_matter(size, gradient):
    inputs, grad = _case(SHAPES[1], gradient=gradient)
    _assert_close([inputs[0] * size, *inputs[1:]], grad)


@pytest.mark.parametrize("factor", [30, 300])
def test_outliers_leave_the_other_rows_what_they_are(factor):
    """Rows of a far larger norm, as of a token that all attend to, and of its gradient."""
    inputs, grad = _case((4096, 64, 256, 64))
    inputs[0][7] *= factor
    grad[9] *= factor
    ours, exact, _ = _errors(inputs, grad)
    others = torch.arange(4096) > 9
    for mine, truth in zip(ours[:2], exact[:2], strict=True):
        assert torch.isfinite(mine).all()
        assert (mine[others].double() - truth[others]).norm() < 1.5 * ERROR * truth[others].norm()
    if factor == 30:  # 300 is beyond what the scale of h lets through: that row saturates
        for mine, truth in zip(ours[:2], exact[:2], strict=True):
            assert (mine[7].double() - truth[7]).norm() < 1.5 * ERROR * truth[7].norm()


def test_zeros_and_what_is_no_number():
    inputs, grad = _case(SHAPES[0])
    for at in range(3):
        zeroed = [t * (i != at) for i, t in enumerate(inputs)]
        assert all(torch.isfinite(t).all() for t in _run(fp8_mlp, zeroed, grad))
    assert all(torch.isfinite(t).all() for t in _run(fp8_mlp, inputs, grad * 0))
    inputs[0][3, 5] = float("nan")
    y = fp8_mlp(*inputs)
    assert y[3].isnan().all() and y[torch.arange(37) != 3].isfinite().all()


def test_residual_in_place_or_not_and_hidden_gain():
    inputs, _ = _case(SHAPES[1])
    upstream = torch.randn(130, 32)
    gain = torch.rand(272).requires_grad_()
    start = torch.randn(130, 32, requires_grad=True)
    found = []
    for in_place in (False, True):
        leaves = [t.clone().requires_grad_() for t in inputs]
        residual = start * 2
        y = fp8_mlp(*leaves, hidden_gain=gain, residual=residual, in_place=in_place)
        assert (y.data_ptr() == residual.data_ptr()) is in_place
        found.append([y.detach().clone(), *torch.autograd.grad(y, [*leaves, start, gain], upstream)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[0][0], fp8_mlp(*inputs, hidden_gain=gain) + 2 * start)
    assert torch.equal(found[0][4], 2 * upstream)
    with pytest.raises(ValueError, match="in_place: got residual none"):
        fp8_mlp(*inputs, in_place=True)


def test_strided_empty_and_leading_dimensions():
    (x, w_up, w_down), grad = _case(SHAPES[1])
    wide = torch.zeros(130, 96)
    wide[:, ::2] = x
    turned = w_up.t().contiguous().t()
    for a, b in zip(
        _run(fp8_mlp, [x, w_up, w_down], grad), _run(lambda y: fp8_mlp(y, turned, w_down), [wide[:, ::2]], grad),
        strict=False,
    ):  # fmt: skip
        assert torch.equal(a, b)
    assert torch.equal(fp8_mlp(x.view(2, 65, 48), w_up, w_down).flatten(0, 1), fp8_mlp(x, w_up, w_down))
    leaves = [t.clone().requires_grad_() for t in (x[:0].view(0, 3, 48), w_up, w_down)]
    y = fp8_mlp(*leaves)
    assert y.shape == (0, 3, 32)
    for gradient, leaf in zip(torch.autograd.grad(y, leaves, y), leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_frozen_weights_get_no_gradient_and_twice_through_one_graph():
    (x, w_up, w_down), grad = _case(SHAPES[0])
    x.requires_grad_()
    y = fp8_mlp(x, w_up, w_down)
    (first,) = torch.autograd.grad(y, x, grad, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, 4 * grad)
    torch.testing.assert_close(again, 4 * first)
    assert w_up.grad is None and w_down.grad is None
    kept = _hidden_op(x.detach(), w_up, w_down, 0.5)[1:]
    d_x, d_up, d_down = _backward_op(grad, w_up, w_down, kept, 0.5, [True, False, False])
    assert torch.equal(d_x, first) and d_up.numel() == d_down.numel() == 0


def test_op_contract():
    (x, w_up, w_down), grad = _case(SHAPES[1])
    torch.library.opcheck(_hidden_op, (x, w_up, w_down, 0.5))
    down, *kept = _hidden_op(x, w_up, w_down, 0.5)
    # Without test_schema, which compares inputs by arithmetic that PyTorch does not have for e4m3.
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    total = torch.zeros(130, 32)
    operands = kept[6], down, kept[9], kept[5]
    torch.library.opcheck(_output_op, (*operands, torch.float32), test_utils=utilities)
    torch.library.opcheck(_add_op, (total, *operands), test_utils=utilities)
    for wanted in ([True] * 3, [False, True, False]):
        torch.library.opcheck(_backward_op, (grad, w_up, w_down, kept, 0.5, wanted), test_utils=utilities)


def test_compiled_equals_eager():
    (x, w_up, w_down), _ = _case(SHAPES[0])
    start = torch.zeros(37, 16)
    compiled = torch.compile(
        lambda *tensors: fp8_mlp(*tensors, residual=start + 1, in_place=True), fullgraph=True, backend="aot_eager"
    )
    found = []
    for function in (compiled, lambda *t: fp8_mlp(*t, residual=start + 1)):
        weight = w_up.clone().requires_grad_()
        y = function(x, weight, w_down)
        y.sum().backward()
        found.append((y.detach(), weight.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    plain = fp8_mlp(x, w_up, w_down)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fp8_mlp(x, w_up, w_down), plain)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.randn(3, 24), "w_up": torch.randn(32, 24)},
            ValueError,
            r"x: got shape \(3, 24\), wanted .* of 16",
        ),
        ({"w_up": torch.randn(40, 16), "w_down": torch.randn(16, 40)}, ValueError, r"w_up: got shape \(40, 16\)"),
        ({"w_down": torch.randn(17, 32)}, ValueError, r"w_down: got shape \(17, 32\), wanted \[D_out, F\]"),
        ({"x": torch.randn(3, 16, dtype=torch.float64)}, TypeError, "x: got torch.float64"),
        ({"w_up": torch.randn(32, 16, dtype=torch.float64)}, TypeError, "w_up: got torch.float64"),
        ({"w_down": torch.randn(16, 31)}, ValueError, r"w_down: got shape \(16, 31\)"),
        ({"residual": torch.randn(2, 16)}, ValueError, "residual: got shape"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {"x": torch.randn(3, 16), "w_up": torch.randn(32, 16), "w_down": torch.randn(16, 32)} | change
    if arguments["x"].dtype == torch.float64:
        arguments |= {name: arguments[name].double() for name in ("w_up", "w_down")}
    with pytest.raises(error, match=message):
        fp8_mlp(**arguments)


def test_order_and_its_inverse():
    x = torch.arange(300.0).view(1, 300)
    assert emulation.in_order(x)[0, :5].tolist() == [0, 8, 64, 72, 1]
    assert torch.equal(emulation.out_of_order(emulation.in_order(x))[:, :300], x)


# ---- training --------------------------------------------------------------------------------------------------------


def _model():
    torch.manual_seed(0)
    config = Config().replace(
        vocab_size=64, num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=8,
        xsa_last_n=4, loop_start=1, loop_end=2, num_loops=1, parallel_start=3,
    )  # fmt: skip
    model = GPT(config.model)
    torch.nn.init.normal_(model.down_bank, std=0.1)
    return model


def test_training_steps_multiply_in_fp8_and_nothing_else_does():
    model = _model()
    ids = torch.randint(0, 64, (2, 65))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, 64)
    losses, gradients = [], []
    for fp8 in (False, True):
        model.zero_grad()
        losses.append(MicroStep(model, weight=1.0, max_seqlen=64, fp8=fp8)(batch, loop=True))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert losses[0] == model.loss(batch.inputs, batch.targets) != losses[1]
    assert abs(losses[0] - losses[1]) < 0.01
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99
    with pytest.raises(ValueError, match="fp8: got it with adapters or collect"):
        model.loss(batch.inputs, batch.targets, fp8=True, collect=lambda *_: None)
    adapters = Adapters.zeros(model.config, 6, 2, 2, ("q",), torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="fp8: got it with adapters or collect"):
        model.loss(batch.inputs, batch.targets, fp8=True, adapters=adapters)


def test_it_learns_as_without():
    model, ends = _model(), []
    ids = torch.randint(0, 64, (2, 65), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids[:, :-1], ids[:, 1:], None, 64)
    start = {name: t.clone() for name, t in model.state_dict().items()}
    for fp8 in (False, True):
        model.load_state_dict(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        step = MicroStep(model, weight=1.0, max_seqlen=64, fp8=fp8)
        for _ in range(30):
            optimizer.zero_grad()
            loss = step(batch, loop=True)
            optimizer.step()
        ends.append(loss.item())
    assert ends[0] < 3.0 and abs(ends[0] - ends[1]) < 0.1


def test_a_device_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr("model.train.check_dataset", lambda *_: None)
    monkeypatch.setattr("model.train.runs_fp8", lambda _: False)

    class Ranks:
        world, device = 1, torch.device("cpu")

    with pytest.raises(ConfigError, match="fp8_mlp: got True on cpu"):
        Trainer(Config().replace(fp8_mlp=True), None, None, Ranks())


def test_sizes_that_fp8_does_not_take_are_refused_before_a_step(monkeypatch):
    monkeypatch.setattr("model.train.check_dataset", lambda *_: None)

    class Ranks:
        world, device = 1, torch.device("cpu")

    sizes = {"model_dim": 40, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 4}
    with pytest.raises(ConfigError, match="model_dim: got 40 features, wanted a multiple of 16 with fp8_mlp"):
        Trainer(Config().replace(fp8_mlp=True, **sizes), None, None, Ranks())


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_multiplies_in_fp8_if_it_is_asked_to(tmp_path, monkeypatch, asked):
    calls = []
    monkeypatch.setattr("model.gpt.fp8_mlp", lambda *a, **o: calls.append(1) or fp8_mlp(*a, **o))
    run_pipeline(tiny_config(tiny_data(tmp_path), tmp_path / "runs", eval_mode="plain", fp8_mlp=asked))
    assert bool(calls) is asked


# ---- kernels ---------------------------------------------------------------------------------------------------------


def _kernels_agree(shape, dtype, device, allowed):
    """What the kernels write and what PyTorch writes in their place, from the same operands: the share that differs."""
    (x, w_up, w_down), grad = _case(shape, dtype, device)
    module = kernels("fp8_mlp")
    operands = []
    for tensor in (x, w_up, w_down.t(), grad):
        ours, theirs = module.operand(tensor), emulation.operand(tensor.cpu())
        for mine, other in zip(ours[:2], theirs[:2], strict=True):
            assert torch.equal(mine.cpu().float(), other.float())
        torch.testing.assert_close(ours[2][:3].cpu(), theirs[2][:3])
        operands.append(ours)
    (x8, _, x_facts), (up8, _, up_facts), (down8, _, down_facts), (g8, _, g_facts) = operands
    hidden = x8, x_facts, up8, up_facts
    kept = module.up(*hidden, 0.3)
    before = g8, g_facts, down8, down_facts, kept[0], kept[2], kept[3]
    emulated = emulation.up(*(t.cpu() for t in hidden), 0.3)
    torch.testing.assert_close(kept[3][:2].cpu(), emulated[3][:2])  # the scale, and the bound that grad_pre reads
    pairs = [
        *zip(kept, emulated, strict=True),
        *zip(module.grad_pre(*before, 0.3), emulation.grad_pre(*(t.cpu() for t in before), 0.3), strict=True),
    ]
    for mine, other in pairs:
        mine = mine.cpu()
        if mine.dtype == torch.float32:  # facts
            assert torch.equal(mine[:1], other[:1])
        elif mine.dtype == torch.int32:
            differ = torch.stack([(mine ^ other) >> i & 1 for i in range(32)])
            assert differ.double().mean() <= allowed
        else:
            assert (mine.float() != other.float()).double().mean() <= allowed  # none is not a number
            assert (mine.float() - other.float()).norm() <= 0.02 * other.float().norm()


@triton_aot.needs_triton
def test_kernels_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_fp8_mlp")


def _right_casts():
    """Triton's interpreter loses the carry where rounding to e4m3 reaches the next power of two."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def replaced(values, of, to, rounding):
        if (of, to) != (tl.float32, tl.float8e4nv):
            return convert(values, of, to, rounding)
        numbers = torch.from_numpy(values.view("float32")).clamp(-emulation.MOST, emulation.MOST)
        return numbers.to(emulation.E4M3).view(torch.uint8).numpy().reshape(values.shape)

    interpreter._convert_float = replaced


gpu_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or not runs_fp8(torch.device("cuda", 0)), reason="needs compute capability 9.0"
)


@pytest.mark.gpu
@gpu_fp8
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 512, 2048, 512), (20000, 512, 2048, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_on_a_gpu(shape, dtype):
    # The tensor core adds up with fewer bits than fp32: numbers near the middle of two may fall to either side.
    _kernels_agree(shape, dtype, "cuda", 0.01)
    _assert_close(*_case(shape, dtype, "cuda"))


@pytest.mark.gpu
@gpu_fp8
def test_strides_and_alignment_on_a_gpu():
    (x, w_up, w_down), grad = _case((300, 64, 256, 64), torch.bfloat16, "cuda")
    wide = torch.zeros(300, 129, dtype=x.dtype, device="cuda")
    wide[:, 1:65] = x
    flat = torch.zeros(w_up.numel() + 1, dtype=x.dtype, device="cuda")
    flat[1:] = w_up.flatten()
    plain = _run(fp8_mlp, [x, w_up, w_down], grad)
    turned = _run(lambda a, b, c: fp8_mlp(a, b.t().contiguous().t(), c.t().contiguous().t()), [x, w_up, w_down], grad)
    for mine, other in zip(turned, plain, strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(fp8_mlp(wide[:, 1:65], flat[1:].view_as(w_up), w_down), plain[0])


@pytest.mark.gpu
@gpu_fp8
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_residual_on_a_gpu(dtype):
    inputs, _ = _case((3000, 512, 2048, 512), dtype, "cuda")
    start = torch.randn(3000, 512, device="cuda", dtype=dtype)
    expected = start + fp8_mlp(*inputs)
    residual = start.clone()
    assert fp8_mlp(*inputs, residual=residual, in_place=True).data_ptr() == residual.data_ptr()
    odd = torch.empty(start.numel() + 1, device="cuda", dtype=dtype)[1:].view_as(start).copy_(start)
    fp8_mlp(*inputs, residual=odd, in_place=True)
    for found in (residual, odd, fp8_mlp(*inputs, residual=start)):
        assert (found - expected).double().norm() < 0.005 * expected.double().norm()


@pytest.mark.gpu
@gpu_fp8
def test_weight_gradients_of_a_micro_step_on_a_gpu():
    """98,304 terms, in which a sum with few bits would drift."""
    inputs, grad = _case((98304, 512, 2048, 512), torch.bfloat16, "cuda")
    _assert_close(inputs, grad)


@pytest.mark.gpu
@gpu_fp8
def test_it_returns_before_the_gpu_is_done_and_captures_into_a_graph():
    inputs, grad = _case((4096, 512, 2048, 512), torch.bfloat16, "cuda")
    leaves = [t.requires_grad_() for t in inputs]

    def call():
        return torch.autograd.grad(fp8_mlp(*leaves), leaves, grad)

    expected = call()
    assert_returns_at_once(call)
    for a, b in zip(replayed(call), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@gpu_fp8
def test_saves_two_bytes_a_hidden_value():
    inputs, _ = _case((8192, 512, 2048, 512), torch.bfloat16, "cuda")
    for tensor in inputs:
        tensor.requires_grad_()
    fp8_mlp(*inputs)  # allocates whatever stays, a workspace say
    before = torch.cuda.memory_allocated()
    y = fp8_mlp(*inputs)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    assert kept <= 8192 * (2 * 2048 + 512 + 2048 // 8) + 3 * 2048 * 512


if __name__ == "__main__":
    _right_casts()
    with interpreting():
        for case in (*SHAPES, (300, 272, 144, 80)):
            for precision in (torch.float32, torch.float16):
                _kernels_agree(case, precision, "cpu", 1e-4)
                _assert_close(*_case(case, precision, gradient=1e-2))
