"""Softcap cross-entropy on given logits: against float64, against PyTorch, as an op, and what it refuses."""

import os
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor

from pgolf_kernels import softcap_cross_entropy, softcap_cross_entropy_with_grad
from pgolf_kernels.softcap_ce import (
    _backward_op,
    _forward_op,
    _gradient_reference,
    _mean_op,
    _with_grad_op,
    launch_backward,
    softcap_ce_reference,
)

CPU = torch.device("cpu")
DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)]
SOFTCAPS = [None, 1.0, 30.0, 50.0, 100.0]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOSS_ERROR = 1e-5  # of one token, against float64 on the same logits


def draw(rows: int, vocab: int, dtype: torch.dtype, device: torch.device = CPU, scale: float = 8.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[rows // 2] = -100
    upstream = torch.randn(rows, generator=generator)
    return logits.to(device).requires_grad_(), targets.to(device), upstream.to(device)


def exact(logits: Tensor, targets: Tensor, upstream: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Losses and gradient in float64, on the values that the logits have."""
    wide = logits.detach().double().requires_grad_()
    losses = softcap_ce_reference(wide, targets, None, softcap)[0]
    return losses.detach(), torch.autograd.grad((losses * upstream).sum(), wide)[0]


def torch_gradient(logits: Tensor, targets: Tensor, upstream: Tensor, softcap: float | None) -> Tensor:
    losses = softcap_ce_reference(logits, targets, None, softcap)[0]
    return torch.autograd.grad((losses * upstream).sum(), logits)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 17, 1000, 1024, 3001, 8192, 16384, 16392])
def test_against_float64(vocab: int, dtype: torch.dtype, softcap: float | None, device: torch.device) -> None:
    logits, targets, upstream = draw(9, vocab, dtype, device)
    expected, gradient = exact(logits, targets, upstream, softcap)
    losses = softcap_cross_entropy(logits, targets, softcap, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, atol=LOSS_ERROR, rtol=0)
    (own,) = torch.autograd.grad((losses * upstream).sum(), logits)
    one_pass_losses, one_pass = softcap_cross_entropy_with_grad(logits, targets, softcap, grad_scale=upstream)
    torch.testing.assert_close(one_pass_losses.double(), expected, atol=LOSS_ERROR, rtol=0)
    assert own.dtype == one_pass.dtype == dtype
    if vocab == 1:
        assert own.abs().max() < 1e-6
        return
    allowed = 2 * relative(torch_gradient(logits, targets, upstream, softcap), gradient) + 1e-7
    assert relative(own, gradient) <= allowed
    assert relative(one_pass, gradient) <= allowed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 60.0, 1e4])
def test_small_and_large_logits(scale: float, softcap: float | None, device: torch.device) -> None:
    for dtype in DTYPES[:2]:
        logits, targets, upstream = draw(5, 512, dtype, device, scale)
        expected, gradient = exact(logits, targets, upstream, softcap)
        losses = softcap_cross_entropy(logits, targets, softcap, reduction="none")
        torch.testing.assert_close(losses.double(), expected, atol=LOSS_ERROR, rtol=2e-7)
        (own,) = torch.autograd.grad((losses * upstream).sum(), logits)
        if gradient.norm() > 0:
            allowed = 2 * relative(torch_gradient(logits, targets, upstream, softcap), gradient) + 1e-6
            assert relative(own, gradient) <= allowed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_not_hidden_and_infinity_saturates(value: float, dtype: torch.dtype, device: torch.device) -> None:
    logits, targets, _ = draw(4, 512, dtype, device)
    with torch.no_grad():
        logits[1, 7] = value
    losses = softcap_cross_entropy(logits, targets, 30.0, reduction="none")
    expected = softcap_ce_reference(logits.detach().double(), targets, None, 30.0)[0]
    torch.testing.assert_close(losses.detach().double(), expected, atol=LOSS_ERROR, rtol=0, equal_nan=True)
    assert losses[1].isnan() == (value != value)


@pytest.mark.parametrize("softcap", [1.0, 30.0, 38.0, 38.9, 39.1, 44.0])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_least_probabilities_keep_their_gradient(dtype: torch.dtype, softcap: float) -> None:
    """One logit at the cap and the rest at its negative: exp(z - lse) comes near the least number that float32 has."""
    logits = torch.full((2, 1500), -3 * softcap)
    logits[:, 7] = 3 * softcap
    logits = logits.to(dtype).requires_grad_()
    targets, upstream = torch.tensor([7, 8]), torch.tensor([1.0, 1e-3])
    expected, gradient = exact(logits, targets, upstream, softcap)
    losses = softcap_cross_entropy(logits, targets, softcap, reduction="none")
    torch.testing.assert_close(losses.double(), expected, atol=LOSS_ERROR, rtol=0)
    own = torch.autograd.grad(losses, logits, upstream)[0]
    one_pass = softcap_cross_entropy_with_grad(logits, targets, softcap, grad_scale=upstream)[1]
    others = [j for j in range(1500) if j not in (7, 8)]
    for mine in (own, one_pass):
        rtol = 1e-4 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(mine.double()[:, others], gradient[:, others], rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("device", DEVICES)
def test_reductions_and_ignored_targets(device: torch.device) -> None:
    logits, targets, _ = draw(6, 100, torch.float32, device)
    expected = softcap_ce_reference(logits.detach(), targets, None, 30.0)[0]
    assert expected[3] == 0
    torch.testing.assert_close(softcap_cross_entropy(logits, targets), expected.sum() / 5)
    torch.testing.assert_close(softcap_cross_entropy(logits, targets, reduction="sum"), expected.sum())
    (gradient,) = torch.autograd.grad(softcap_cross_entropy(logits, targets), logits)
    assert torch.equal(gradient[3], torch.zeros_like(gradient[3]))
    ignored = torch.full_like(targets, 7)
    assert softcap_cross_entropy(logits, ignored, ignore_index=7).isnan()
    total = softcap_cross_entropy(logits, ignored, reduction="sum", ignore_index=7)
    assert total == 0
    assert not torch.autograd.grad(total, logits)[0].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 1023, 8192, 100_003])
def test_mean_of_many_rows(rows: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(rows)
    losses = (torch.rand(rows, generator=generator) * 20).to(device).requires_grad_()
    targets = torch.randint(8, (rows,), generator=generator)
    targets[0] = 1
    targets = targets.to(device)
    counted = targets != 3
    mean, weight = _mean_op(losses.where(counted, 0), targets, 3)
    expected = losses.detach().double()[counted].mean()
    torch.testing.assert_close(mean.detach().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(weight.detach(), 1 / counted.sum(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(mean / 8, losses)
    torch.testing.assert_close(gradient, counted * (weight.detach() / 8))
    assert torch.equal(mean, _mean_op(losses.where(counted, 0), targets, 3)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device: torch.device) -> None:
    logits = torch.empty(0, 50, device=device, requires_grad=True)
    targets = torch.empty(0, dtype=torch.long, device=device)
    assert softcap_cross_entropy(logits, targets).isnan()
    assert softcap_cross_entropy(logits, targets, reduction="none").shape == (0,)
    total = softcap_cross_entropy(logits, targets, reduction="sum")
    assert torch.autograd.grad(total, logits)[0].shape == (0, 50)
    losses, gradient = softcap_cross_entropy_with_grad(logits, targets, grad_scale=1.0)
    assert losses.shape == (0,) and gradient.shape == (0, 50)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_change_a_bit(dtype: torch.dtype, device: torch.device) -> None:
    dense, targets, upstream = draw(8, 1024, dtype, device)
    expected = softcap_cross_entropy_with_grad(dense, targets, grad_scale=upstream)
    store = torch.zeros(8, 3, 1040, dtype=dtype, device=device)
    views = [store[:, 1, 8:1032], store[:, 1, 3:1027], torch.zeros(1024, 8, dtype=dtype, device=device).T]
    for view in views:
        view.copy_(dense.detach())
        for own, wanted in zip(
            softcap_cross_entropy_with_grad(view, targets, grad_scale=upstream), expected, strict=True
        ):
            torch.testing.assert_close(own, wanted, atol=1e-6, rtol=1e-2 if dtype != torch.float32 else 1e-5)
    row = dense.detach()[:1].expand(8, 1024)
    losses = softcap_cross_entropy(row, targets, reduction="none")
    one = softcap_ce_reference(row.double(), targets)[0]
    torch.testing.assert_close(losses.double(), one, atol=LOSS_ERROR, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_upstream_gradients_and_retained_graph(device: torch.device) -> None:
    logits, targets, upstream = draw(7, 512, torch.bfloat16, device)
    before = logits.detach().clone()
    losses = softcap_cross_entropy(logits, targets, reduction="none")
    for scale in (1.0, -3.0, 1e-6, 1e4, 0.0):
        (own,) = torch.autograd.grad(losses, logits, upstream * scale, retain_graph=True)
        _, gradient = exact(logits, targets, upstream * scale, 30.0)
        torch.testing.assert_close(own.double(), gradient, rtol=2**-8, atol=float(gradient.abs().max()) * 1e-6)
    assert torch.equal(logits.detach(), before)
    assert torch.autograd.grad(losses.sum(), logits, torch.tensor(float("nan"), device=device))[0].isnan().any()


def test_gradient_by_finite_differences() -> None:
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 10, 3, -100, 7])
    for softcap in (None, 1.0, 30.0):
        for reduction in ("mean", "sum", "none"):
            assert torch.autograd.gradcheck(
                lambda x, c=softcap, r=reduction: softcap_cross_entropy(x, targets, c, reduction=r), logits
            )


def test_float64_stays_float64() -> None:
    logits, targets, upstream = draw(5, 300, torch.float64)
    expected, gradient = exact(logits, targets, upstream, 30.0)
    losses = softcap_cross_entropy(logits, targets, reduction="none")
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=1e-12)
    own = torch.autograd.grad(losses, logits, upstream.double())[0]
    torch.testing.assert_close(own, gradient, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    logits, targets, upstream = draw(4, 40, dtype, device)
    hints = torch.tensor([-1, 3, 39, 0], device=device)
    lse = softcap_ce_reference(logits.detach(), targets)[1]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(_forward_op, (logits, targets, hints, 30.0, 1.0, -100), test_utils=tests)
    torch.library.opcheck(_forward_op, (logits, targets, None, 0.0, 2.0, -100), test_utils=tests)
    plain = logits.detach()
    torch.library.opcheck(_backward_op, (upstream, plain, targets, lse, 30.0, 1.0, -100), test_utils=tests)
    wide = torch.randn(4, device=device, dtype=lse.dtype, requires_grad=True)
    torch.library.opcheck(_mean_op, (wide, targets, -100), test_utils=tests)
    torch.library.opcheck(_with_grad_op, (plain, targets, upstream, 30.0, 1.0, -100), test_utils=tests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_equals_eager(autocast: bool, device: torch.device) -> None:
    logits, targets, _ = draw(6, 64, torch.float32, device)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return softcap_cross_entropy(x * 2, targets) / 8

    compiled = torch.compile(loss, fullgraph=True)
    assert torch.equal(loss(logits), compiled(logits))
    assert torch.equal(torch.autograd.grad(loss(logits), logits)[0], torch.autograd.grad(compiled(logits), logits)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_double_backward_raises(device: torch.device) -> None:
    logits, targets, _ = draw(4, 32, torch.float32, device)
    (gradient,) = torch.autograd.grad(softcap_cross_entropy(logits, targets), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_one_pass_is_not_differentiable() -> None:
    logits, targets, _ = draw(4, 32, torch.float32)
    losses, gradient = softcap_cross_entropy_with_grad(logits, targets, grad_scale=1.0)
    assert not losses.requires_grad and not gradient.requires_grad


def test_refusals() -> None:
    logits, targets, _ = draw(4, 32, torch.float32)
    cases = [
        (TypeError, "logits: got dtype torch.int64", lambda: softcap_cross_entropy(logits.long(), targets)),
        (TypeError, "targets: got dtype torch.float32", lambda: softcap_cross_entropy(logits, targets.float())),
        (ValueError, r"logits: got shape \[4, 32, 1\]", lambda: softcap_cross_entropy(logits[..., None], targets)),
        (ValueError, r"logits: got shape \[4, 0\]", lambda: softcap_cross_entropy(logits[:, :0], targets)),
        (ValueError, r"targets: got shape \[3\], wanted \[4\]", lambda: softcap_cross_entropy(logits, targets[:3])),
        (ValueError, "targets: got device meta", lambda: softcap_cross_entropy(logits, targets.to("meta"))),
        (ValueError, "softcap: got 0", lambda: softcap_cross_entropy(logits, targets, 0)),
        (ValueError, "softcap: got -1", lambda: softcap_cross_entropy(logits, targets, -1.0)),
        (ValueError, "softcap: got inf", lambda: softcap_cross_entropy(logits, targets, float("inf"))),
        (ValueError, "softcap: got nan", lambda: softcap_cross_entropy(logits, targets, float("nan"))),
        (ValueError, "reduction: got 'max'", lambda: softcap_cross_entropy(logits, targets, reduction="max")),
        (
            ValueError,
            r"grad_scale: got shape \[3\]",
            lambda: softcap_cross_entropy_with_grad(logits, targets, grad_scale=torch.ones(3)),
        ),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()
    for bad in (32, -1):
        wrong = targets.clone()
        wrong[1] = bad
        with pytest.raises(IndexError, match=rf"targets: got {bad}.*wanted indices in \[0, 32\)"):
            softcap_cross_entropy(logits, wrong)
        with pytest.raises(IndexError, match="targets"):
            softcap_cross_entropy_with_grad(logits, wrong, grad_scale=1.0)


DIGEST = """
import torch
from pgolf_kernels import _native, softcap_cross_entropy_with_grad
generator = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    logits = (torch.randn(7, 3001, generator=generator) * 9).to(dtype)
    targets = torch.randint(3001, (7,), generator=generator)
    for softcap in (None, 30.0):
        losses, gradient = softcap_cross_entropy_with_grad(logits, targets, softcap, grad_scale=1.0)
        print(_native.isa(), losses.double().sum().item(), gradient.double().abs().sum().item())
"""


def test_every_instruction_set_agrees() -> None:
    results = []
    for isa in ("avx512", "avx2", "baseline"):
        environment = os.environ | {"PGOLF_ISA": isa}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True
        )
        results.append([[float(x) for x in line.split()[1:]] for line in run.stdout.splitlines()])
    assert run.stdout.startswith("baseline")
    for other in results[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(results[0]), rtol=2e-6, atol=0)


def test_output_does_not_depend_on_threads() -> None:
    logits, targets, upstream = draw(300, 1000, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(softcap_cross_entropy_with_grad(logits, targets, grad_scale=upstream))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.long
def test_more_than_two_billion_logits() -> None:
    rows, vocab = 1 << 18, 8200
    row = torch.randn(vocab).bfloat16()
    storage = torch.empty(rows + vocab, dtype=torch.bfloat16)  # overlapping rows: row i begins at element i
    storage[:] = row.repeat(-(-len(storage) // vocab))[: len(storage)]
    logits = storage.as_strided((rows, vocab), (1, 1))
    targets = torch.randint(vocab, (rows,))
    losses = softcap_cross_entropy(logits, targets, reduction="none")
    expected = softcap_ce_reference(logits[-64:].double(), targets[-64:])[0]
    torch.testing.assert_close(losses[-64:].double(), expected, atol=LOSS_ERROR, rtol=0)


# GPU only ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [8192, 8191])
def test_more_than_two_billion_logits_on_cuda(vocab: int) -> None:
    rows = (1 << 31) // vocab + 1000
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.bfloat16).mul_(5)
    targets = torch.randint(vocab, (rows,), device="cuda")
    losses, gradient = softcap_cross_entropy_with_grad(logits, targets, grad_scale=1.0)
    for part in (slice(0, 64), slice(rows - 64, rows)):
        ones = torch.ones(64, device="cuda")
        expected, wanted = exact(logits[part], targets[part], ones, 30.0)
        torch.testing.assert_close(losses[part].double(), expected, atol=LOSS_ERROR, rtol=0)
        assert relative(gradient[part], wanted) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [4104, 6000, 8192])
@pytest.mark.parametrize("rows", [1, 5, 527, 2000, 7001])
def test_every_row_is_claimed_once(rows: int, vocab: int) -> None:
    """More and fewer rows than there are slots for; in place too, and more than once on two streams at a time."""
    logits, targets, upstream = draw(rows, vocab, torch.bfloat16, torch.device("cuda"))
    logits = logits.detach()
    expected = softcap_ce_reference(logits, targets, None, 30.0)[:2]
    slow = torch.empty_like(logits)
    for part in torch.arange(rows, device="cuda").split(512):
        slow[part] = _gradient_reference(
            upstream[part], logits[part], targets[part], expected[1][part], 30.0, 1.0, -100
        )
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for _ in range(3):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                losses, one_pass = softcap_cross_entropy_with_grad(logits, targets, grad_scale=upstream)
                results.append(
                    (losses, one_pass, _backward_op(upstream, logits, targets, expected[1], 30.0, 1.0, -100))
                )
    torch.cuda.synchronize()
    for losses, one_pass, own in results:
        torch.testing.assert_close(losses, expected[0], atol=2 * LOSS_ERROR, rtol=0)
        for gradient in (one_pass, own):
            torch.testing.assert_close(gradient, slow, rtol=2**-7, atol=1e-6)
        assert torch.equal(losses, results[0][0]) and torch.equal(one_pass, results[0][1])
        assert torch.equal(own, results[0][2])
    launch_backward(logits, targets, expected[1], upstream, (30.0, 1.0, -100), logits)
    assert torch.equal(logits, results[0][2])


@pytest.mark.gpu
def test_targets_out_of_range_on_cuda_give_nan() -> None:
    for vocab in (8192, 512, 511):
        logits, targets, _ = draw(6, vocab, torch.bfloat16, torch.device("cuda"))
        targets[1], targets[4] = vocab, -1
        losses, gradient = softcap_cross_entropy_with_grad(logits, targets, grad_scale=1.0)
        bad = torch.tensor([False, True, False, False, True, False], device="cuda")
        assert torch.equal(losses.isnan(), bad)
        assert torch.equal(gradient.isnan().all(1), bad) and torch.equal(gradient.isnan().any(1), bad)


@pytest.mark.gpu
def test_cuda_call_returns_at_once_and_follows_the_stream() -> None:
    logits, targets, _ = draw(256, 8192, torch.bfloat16, torch.device("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for cycles in (1, int(2e9)):  # the first round loads and allocates; the second sleeps for about a second
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles)
            with torch.no_grad():
                logits.copy_(logits.roll(1, 0))
            start = time.perf_counter()
            loss = softcap_cross_entropy(logits, targets)
            (gradient,) = torch.autograd.grad(loss, logits)
            queued = time.perf_counter() - start
            waited = stream.query()
    assert not waited
    assert queued < 0.2
    stream.synchronize()
    expected, wanted = exact(logits, targets, torch.full_like(targets, 1 / 255, dtype=torch.float32), 30.0)
    torch.testing.assert_close(loss.double(), expected.sum() / 255, atol=1e-5, rtol=0)
    assert relative(gradient, wanted) < 3e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph(dtype: torch.dtype) -> None:
    logits, targets, _ = draw(64, 4096, dtype, torch.device("cuda"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(softcap_cross_entropy(logits, targets) / 8, logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = softcap_cross_entropy(logits, targets) / 8
        (gradient,) = torch.autograd.grad(loss, logits)
    with torch.no_grad():
        logits.mul_(0.5)
    graph.replay()
    again = softcap_cross_entropy(logits, targets) / 8
    torch.testing.assert_close(loss, again, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(again, logits)[0])


@pytest.mark.gpu
def test_second_device(second_gpu: torch.device) -> None:
    logits, targets, upstream = draw(32, 8192, torch.bfloat16, second_gpu)
    expected, gradient = exact(logits, targets, upstream, 30.0)
    losses, own = softcap_cross_entropy_with_grad(logits, targets, grad_scale=upstream)
    torch.testing.assert_close(losses.double(), expected, atol=LOSS_ERROR, rtol=0)
    assert relative(own, gradient) < 3e-3
