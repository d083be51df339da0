"""The head on a GPU: its Triton kernels through the interpreter, and accuracy, memory and waiting on a device."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pgolf_kernels.linear_softcap_ce as face
from pgolf_kernels import linear_softcap_cross_entropy, score_tokens
from pgolf_kernels._triton_op import interpreting, kernels
from tests import triton_aot
from tests.gpu import replayed
from tests.head import LORAS, MODES, draw, reference, relative

# Triton kernels -------------------------------------------------------------------------------------------------------


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter() -> None:
    triton_aot.run_interpreted("tests.test_linear_softcap_ce_gpu")


def interpreted() -> None:
    """The fused head in float32: ragged rows and columns, hints, ignored targets, both memory modes."""
    problem = draw(torch.float32, rows=150, width=40, vocab=204)
    for softcap, temperature in ((30.0, 1.0), (5.0, 0.8)):
        expected, expected_hints, gradients = reference(problem, softcap, temperature)
        for recompute in (False, True):
            with interpreting():
                losses, hinted = problem.each(softcap, temperature=temperature, recompute=recompute)
                own = torch.autograd.grad(losses, problem.leaves(), problem.upstream)
            torch.testing.assert_close(losses.detach(), expected, rtol=0, atol=2e-5)
            torch.testing.assert_close(hinted, expected_hints, rtol=0, atol=2e-5)
            for mine, wanted in zip(own, gradients, strict=True):
                assert relative(mine, wanted) < 1e-5
            for reduction in ("sum", "mean"):
                call = (problem.hidden, problem.weight, problem.targets, softcap)
                options: dict[str, Any] = {"temperature": temperature, "reduction": reduction}
                loss = linear_softcap_cross_entropy(*call, **options)
                expected_gradients = torch.autograd.grad(loss, problem.leaves(), torch.tensor(0.7))
                with interpreting():
                    own_loss = linear_softcap_cross_entropy(*call, **options, recompute=recompute)
                    own = torch.autograd.grad(own_loss, problem.leaves(), torch.tensor(0.7))
                torch.testing.assert_close(own_loss, loss, rtol=1e-5, atol=0)
                for mine, wanted in zip(own, expected_gradients, strict=True):
                    assert relative(mine, wanted) < 1e-5
    # A scalar loss expands its upstream gradient: stride 0. With and without the fused product.
    for vocab, softcap, dtype in ((204, 30.0, torch.float32), (203, 30.0, torch.float32), (204, None, torch.float16)):
        problem = draw(dtype, rows=150, width=40, vocab=vocab)
        for recompute in (False, True):
            call = (problem.hidden, problem.weight, problem.targets, softcap)
            expected = torch.autograd.grad(linear_softcap_cross_entropy(*call, recompute=recompute), problem.leaves())
            with interpreting():
                own = torch.autograd.grad(linear_softcap_cross_entropy(*call, recompute=recompute), problem.leaves())
            for mine, wanted in zip(own, expected, strict=True):
                assert relative(mine, wanted) < (1e-5 if dtype == torch.float32 else 1e-3)
    problem = draw(torch.float32, rows=150, width=40, vocab=204)
    # Gradients that come with the loss, in chunks of 64 rows; a graph that is retained keeps them.
    call = (problem.hidden, problem.weight, problem.targets)
    expected_loss, expected_hints = linear_softcap_cross_entropy(*call, hints=problem.hints)
    expected = torch.autograd.grad(expected_loss, problem.leaves())
    face.CPU_CONFIG = face.HeadConfig(keep=0, kept_chunk=1 << 20, chunk=64 * 204 * 4)
    with interpreting():
        loss, hinted = linear_softcap_cross_entropy(*call, hints=problem.hints)
        for retain in (True, True, False):
            own = torch.autograd.grad(loss, problem.leaves(), torch.tensor(-3.0), retain_graph=retain)
            for mine, wanted in zip(own, expected, strict=True):
                assert relative(mine, -3 * wanted) < 1e-5
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(hinted, expected_hints, rtol=0, atol=2e-5)
    module = kernels("linear_softcap_ce")
    assert not module.takes(problem.hidden, problem.weight, 41.0, 1.0)
    assert not module.takes(problem.hidden, problem.weight, 0.0, 1.0)
    assert module.takes(problem.hidden, problem.weight, 80.0, 2.0)
    for rows, documents in ORDERS:
        with interpreting():
            check_order(rows, documents)


# GPU only -------------------------------------------------------------------------------------------------------------


def check_order(rows: int, documents: int, device: str = "cpu") -> None:
    """`by_document` of the kernels equals a stable sort, with rows of no document last."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(-2, documents + 2, (rows,), generator=generator)
    known = ids.where((ids >= 0) & (ids < documents), documents)
    order, bounds = kernels("linear_softcap_ce").by_document(ids.to(device), documents)
    torch.testing.assert_close(order.cpu(), known.sort(stable=True).indices)
    expected = [int((known < document).sum()) for document in range(documents + 1)]
    assert bounds.tolist() == expected and bounds.dtype == torch.int32


ORDERS = [(0, 3), (1, 1), (300, 7), (31, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "documents"), [*ORDERS, (2048, 64), (8192, 100)])
def test_order_by_document(rows: int, documents: int) -> None:
    check_order(rows, documents, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", MODES)
def test_second_device(second_gpu: torch.device, recompute: bool) -> None:
    test_fused_head_is_no_less_accurate_than_rounded_logits(recompute, str(second_gpu))


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", MODES)
def test_fused_head_is_no_less_accurate_than_rounded_logits(recompute: bool, device: str = "cuda") -> None:
    problem = draw(torch.bfloat16, torch.device(device), rows=3000, width=512, vocab=8192)
    exact, _, gradients = reference(problem.converted(torch.float64), 30.0, 1.0)
    plain, _, plain_gradients = reference(problem, 30.0, 1.0)
    losses = linear_softcap_cross_entropy(
        problem.hidden, problem.weight, problem.targets, reduction="none", recompute=recompute
    )
    assert (losses.double() - exact).abs().max() < 3e-4
    assert abs(float((losses.double() - exact).mean())) < 3e-5
    assert (losses.double() - exact).norm() <= (plain.double() - exact).norm()
    own = torch.autograd.grad(losses, problem.leaves(), problem.upstream)
    for mine, theirs, wanted in zip(own, plain_gradients, gradients, strict=True):
        assert relative(mine, wanted) <= relative(theirs, wanted)
    scored = score_tokens(problem.hidden, problem.weight, problem.targets)
    assert (scored.double() - exact).abs().max() < 2e-5


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(4500, 512, 8192), (8200, 256, 8320), (1000, 512, 1024), (2, 512, 128)]
)
def test_gradients_that_come_with_the_loss_of_the_fused_head(
    rows: int, width: int, vocab: int, wanted: tuple[bool, bool], reduction: str
) -> None:
    """Whole and ragged chunks, with the product in CUDA and in Triton."""
    problem = draw(torch.bfloat16, torch.device("cuda"), rows=rows, width=width, vocab=vocab)
    for leaf, needed in zip(problem.leaves(), wanted, strict=True):
        leaf.requires_grad_(needed)
    leaves = [leaf for leaf, needed in zip(problem.leaves(), wanted, strict=True) if needed]
    call = (problem.hidden, problem.weight, problem.targets)
    kept, loss = (linear_softcap_cross_entropy(*call, reduction=reduction, recompute=mode) for mode in (False, True))
    torch.testing.assert_close(loss, kept, rtol=1e-5, atol=0)
    upstream = torch.tensor(-0.3, device="cuda")
    expected, own = (torch.autograd.grad(total, leaves, upstream) for total in (kept, loss))
    for mine, theirs in zip(own, expected, strict=True):
        assert relative(mine, theirs) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [128, 1152, 8192])
@pytest.mark.parametrize("rows", [1, 65, 300, 2049, 40000])
def test_cuda_powers_agree_with_triton(monkeypatch: pytest.MonkeyPatch, rows: int, vocab: int) -> None:
    """Ragged rows, one target ignored and one out of range; all is written, and nothing past the last row."""
    problem = draw(torch.bfloat16, torch.device("cuda"), rows=rows, width=512, vocab=vocab)
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    module = kernels("linear_softcap_ce")
    if not module._runs_native(hidden, weight, hidden):
        pytest.skip("needs a Hopper GPU and a native module built for sm_90a")
    problem.targets[-1] = vocab

    def run() -> list[Tensor]:
        room = [torch.full((rows + 70, size), 7.0, dtype=torch.bfloat16, device="cuda") for size in (vocab, 512)]
        powers, scaled = (tensor[:rows] for tensor in room)
        losses, inverse = torch.full((2, rows), 7.0, device="cuda")
        poison = torch.full((rows, vocab // 128), float("nan"), device="cuda")
        del poison  # the sums get this memory
        scalars, none = (30.0, 1.0, -100), losses.new_empty(0)
        module.losses(hidden, weight, problem.targets, None, *scalars, losses, none, inverse, powers, scaled)
        assert all((tensor[rows:] == 7).all() for tensor in room)
        return [losses, inverse, powers, scaled]

    ours = run()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_runs_native", lambda *_: False)
        theirs = run()
    assert ours[0][-1].isnan() and ours[1][-1].isnan() and ours[3][-1].isnan().all()
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=5e-5, equal_nan=True)
    torch.testing.assert_close(ours[1], theirs[1], rtol=5e-5, atol=0, equal_nan=True)
    for mine, other in ((ours[2], theirs[2]), (ours[3][:-1], theirs[3][:-1])):
        assert torch.isfinite(mine).all()
        assert (mine.double() - other.double()).norm() <= 1e-3 * other.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("recompute", "limit"), [(False, 1.8e9), (True, 200e6)])
def test_memory(recompute: bool, limit: float) -> None:
    hidden = torch.randn(98304, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8192, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(8192, (98304,), device="cuda")

    def step() -> None:
        torch.autograd.grad(
            linear_softcap_cross_entropy(hidden, weight, targets, recompute=recompute) / 8, [hidden, weight]
        )

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("lora", LORAS)
def test_cuda_graph_and_no_waiting(lora: bool | str, width: int, reduction: str, recompute: bool) -> None:
    problem = draw(torch.bfloat16, torch.device("cuda"), lora=lora, shuffled=True, rows=1024, width=width, vocab=1024)
    upstream = problem.upstream if reduction == "none" else problem.upstream[0]

    def step() -> list[Tensor]:
        losses = linear_softcap_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.targets,
            **problem.adapters(),
            hints=problem.hints,
            reduction=reduction,
            recompute=recompute,
        )[0]
        return [losses.detach(), *torch.autograd.grad(losses, problem.leaves(), upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for cycles in (1, 1, int(1e9)):
            side.synchronize()
            torch.cuda._sleep(cycles)
            expected = step()
            finished = side.query()
    assert not finished
    torch.cuda.synchronize()
    for a, b in zip(replayed(step), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


if __name__ == "__main__":
    interpreted()
