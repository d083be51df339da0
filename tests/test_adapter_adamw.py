"""The adapters' AdamW: against torch's, with documents at their own steps, resets, its Triton kernel."""

import pytest
import torch

from pgolf_kernels import _native, adapter_adamw
from pgolf_kernels._triton_op import interpreting
from tests import triton_aot

SHAPES = [(2, 3, 64, 64), (2, 3, 5, 7), (1, 3, 9)]
SETTINGS = {"lr": 0.01, "beta2": 0.99, "eps": 1e-10, "weight_decay": 0.5}


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_adamw(beta1, dtype):
    theirs = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    ours = [p.detach().clone() for p in theirs]
    squares = [torch.zeros_like(p) for p in ours]
    means = [torch.zeros_like(p) for p in ours] if beta1 else None
    settings = {key: value for key, value in SETTINGS.items() if key != "beta2"}
    optimizer = torch.optim.AdamW(theirs, betas=(beta1, SETTINGS["beta2"]), **settings)
    for step in range(1, 6):
        grads = [torch.randn_like(p) for p in ours]
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        optimizer.step()
        adapter_adamw(ours, grads, squares, torch.full((3,), step), exp_avgs=means, beta1=beta1, **SETTINGS)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.detach())


def _documents_apart(beta1, device):
    """Document 0 at step 3, document 1 idle, document 2 handed over; compared with each alone in PyTorch."""
    torch.manual_seed(0)
    for shape in SHAPES:
        for zero in (False, True):
            p, g, m = (torch.randn(shape) for _ in range(3))
            v = torch.rand(shape)
            expected = [t.double() for t in (p, v, m)]
            mean = beta1 * m[:, 0].double() + (1 - beta1) * g[:, 0].double()
            square = SETTINGS["beta2"] * v[:, 0].double() + (1 - SETTINGS["beta2"]) * g[:, 0].double() ** 2
            denominator = (square / (1 - SETTINGS["beta2"] ** 3)).sqrt() + SETTINGS["eps"]
            keep = 1 - SETTINGS["lr"] * SETTINGS["weight_decay"]
            moved = SETTINGS["lr"] * mean / (1 - beta1**3) / denominator
            expected[0][:, 0] = keep * expected[0][:, 0] - moved
            expected[1][:, 0], expected[2][:, 0] = square, mean
            expected[1][:, 2], expected[2][:, 2] = 0, 0
            if zero:
                expected[0][:, 2] = 0
            g[:, 1:] = float("nan")  # not to be read
            p, g, v, m = (t.to(device) for t in (p, g, v, m))
            adapter_adamw(
                [p], [g], [v], torch.tensor([3, 0, 7], device=device), exp_avgs=[m] if beta1 else None,
                reset=torch.tensor([False, False, True], device=device), zeroed=[zero], beta1=beta1, **SETTINGS,
            )  # fmt: skip
            for got, want in zip((p, v, m) if beta1 else (p, v), expected, strict=False):
                torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_documents_step_rest_and_restart_on_their_own(beta1, native, monkeypatch):
    """In the compiled step and, as where nothing is compiled, in PyTorch."""
    if not native:
        monkeypatch.setattr(_native, "STANDS_IN", True, raising=False)
        monkeypatch.setattr(_native, "adapter_adamw_cpu", None)
    _documents_apart(beta1, "cpu")


def test_flags_with_any_stride_and_any_number_of_threads():
    p, g, v = (torch.rand(2, 6, 40_003) for _ in range(3))
    steps = torch.full((6,), 2)
    results = []
    threads = torch.get_num_threads()
    try:
        for count, reset in ((1, torch.zeros(6, dtype=torch.bool)), (3, torch.zeros((), dtype=torch.bool).expand(6))):
            torch.set_num_threads(count)
            mine, square = p.clone(), v.clone()
            adapter_adamw([mine], [g], [square], steps, reset=reset, **SETTINGS)
            results.append((mine, square))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"beta1": 1.0}, ValueError, "beta1: got 1.0"),
        ({"lr": float("nan")}, ValueError, "lr: got nan, wanted a finite number of at least 0"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay: got inf"),
        ({"steps": torch.ones(3, dtype=torch.long, device="meta")}, ValueError, r"steps: .*wanted params\[0\]'s cpu"),
        ({"beta1": 0.5}, ValueError, "exp_avgs: got none with beta1=0.5"),
        ({"steps": torch.ones(2, dtype=torch.long)}, ValueError, r"params\[0\]: got shape \(1, 3, 4\)"),
        ({"steps": torch.ones(3)}, ValueError, "steps: got shape"),
        ({"grads": []}, ValueError, "grads: got 0 entries, wanted 1"),
        ({"grads": [torch.zeros(1, 3, 5)]}, ValueError, r"grads\[0\]: got \(1, 3, 5\)"),
        ({"exp_avg_sqs": [torch.zeros(1, 4, 3).mT]}, ValueError, r"exp_avg_sqs\[0\]: got strides"),
        ({"reset": torch.ones(3)}, ValueError, "reset: got shape"),
        ({"params": [torch.zeros(1, 3, 4, dtype=torch.bfloat16)]}, TypeError, r"params\[0\]: got torch.bfloat16"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {name: [torch.zeros(1, 3, 4)] for name in ("params", "grads", "exp_avg_sqs")}
    arguments |= {"steps": torch.ones(3, dtype=torch.long), "lr": 0.1} | change
    with pytest.raises(error, match=message):
        adapter_adamw(**arguments)


def test_a_backward_that_has_kept_a_parameter_notices_the_step():
    p = torch.rand(1, 3, 4, requires_grad=True)
    loss = p.square().sum()
    adapter_adamw([p], [torch.rand(1, 3, 4)], [torch.zeros(1, 3, 4)], torch.ones(3, dtype=torch.long), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _assert_small_shares_of_a_gradient_count(device):
    """The default beta2: 1 - 0.999 in fp32 would be off by 1e-5, far above fp32's rounding."""
    p, g, v = (torch.zeros(1, 3, 4, device=device) for _ in range(3))
    g.fill_(2.0)
    adapter_adamw([p], [g], [v], torch.ones(3, dtype=torch.long, device=device), lr=0.0, beta2=0.999)
    torch.testing.assert_close(v.double(), torch.full_like(v, 4 * (1 - 0.999), dtype=torch.float64), rtol=2e-7, atol=0)


def test_small_shares_of_a_gradient_count():
    _assert_small_shares_of_a_gradient_count("cpu")


def test_op_contract():
    p, g, v = (torch.rand(2, 3, 4) for _ in range(3))
    arguments = ([p], [g], [v], [], torch.ones(3, dtype=torch.long), None, [False], 0.1, 0.0, 0.9, 1e-8, 0.0)
    torch.library.opcheck(torch.ops.pgolf.adapter_adamw_.default, arguments)


def test_compiled_equals_eager():
    g, steps = torch.rand(2, 3, 4), torch.tensor([1, 0, 2])
    compiled = torch.compile(adapter_adamw, fullgraph=True, backend="aot_eager")
    found = []
    for step in (adapter_adamw, compiled):
        p, v = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
        step([p], [g], [v], steps, lr=0.1)
        found.append((p, v))
    for mine, wanted in zip(*found, strict=True):
        assert torch.equal(mine, wanted) and mine.var() > 0


@triton_aot.needs_triton
def test_triton_kernel_through_the_interpreter():
    triton_aot.run_interpreted("tests.test_adapter_adamw")


@pytest.mark.gpu
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_triton_kernel_on_a_gpu(beta1):
    _assert_small_shares_of_a_gradient_count("cuda")
    _documents_apart(beta1, "cuda")


if __name__ == "__main__":
    with interpreting():
        _documents_apart(0.0, "cpu")
        _documents_apart(0.9, "cpu")
