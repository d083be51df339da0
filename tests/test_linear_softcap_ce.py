"""Values of the output head with its loss: against float64, per dtype, with adapters, hints and either memory mode."""

from typing import Any

import pytest
import torch
from torch import Tensor

import pgolf_kernels.linear_softcap_ce as face
from pgolf_kernels import linear_softcap_cross_entropy, score_tokens
from tests.head import DEVICES, DTYPES, LORAS, MODES, draw, reference, relative


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype, lora: bool | str, recompute: bool, device: torch.device) -> None:
    problem = draw(dtype, device, lora=lora)
    for softcap, temperature in ((30.0, 1.0), (None, 0.7), (5.0, 1.3)):
        wide, wide_hints, gradients = reference(problem.converted(torch.float64), softcap, temperature)
        plain, _, plain_gradients = reference(problem, softcap, temperature)
        losses, hinted = problem.each(softcap, temperature=temperature, recompute=recompute)
        assert losses.dtype == torch.float32 and not hinted.requires_grad
        scale = max(1e-6, float((plain.double() - wide).abs().max()))
        assert (losses.double() - wide).abs().max() <= 2 * scale + 1e-5
        none = problem.hints < 0
        assert (hinted[none] == float("-inf")).all()
        assert (hinted - wide_hints)[~none].abs().max() <= 3 * scale + 1e-5
        own = torch.autograd.grad(losses, problem.leaves(), problem.upstream)
        for leaf, mine, theirs, wanted in zip(problem.leaves(), own, plain_gradients, gradients, strict=True):
            assert mine.dtype == leaf.dtype
            assert relative(mine, wanted) <= 2 * relative(theirs, wanted) + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", MODES)
def test_wide_weights_beside_narrow_activations(recompute: bool, device: torch.device) -> None:
    problem = draw(torch.bfloat16, device, weight_dtype=torch.float32, lora=True, shuffled=True)
    _, _, gradients = reference(problem.converted(torch.float64), 30.0, 1.0)
    losses = linear_softcap_cross_entropy(
        problem.hidden, problem.weight, problem.targets, **problem.adapters(), reduction="none", recompute=recompute
    )
    own = torch.autograd.grad(losses, problem.leaves(), problem.upstream)
    assert [g.dtype for g in own] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    for mine, wanted in zip(own, gradients, strict=True):
        assert relative(mine, wanted) < 1.5e-2  # what rounding weight and logits to bfloat16 costs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", MODES)
def test_upstream_gradients_and_retained_graph(recompute: bool, device: torch.device) -> None:
    problem = draw(torch.float32, device, lora=True)
    losses = linear_softcap_cross_entropy(
        problem.hidden, problem.weight, problem.targets, **problem.adapters(), reduction="none", recompute=recompute
    )
    first = torch.autograd.grad(losses, problem.leaves(), problem.upstream, retain_graph=True)
    again = torch.autograd.grad(losses, problem.leaves(), problem.upstream * -3, retain_graph=True)
    scalar = torch.autograd.grad((losses / 8).sum(), problem.leaves(), retain_graph=True)
    ones = torch.autograd.grad(losses, problem.leaves(), torch.ones_like(losses))
    for a, b, c, d in zip(first, again, scalar, ones, strict=True):
        torch.testing.assert_close(a * -3, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(c * 8, d, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scalar_losses_expand_their_upstream_gradient(
    dtype: torch.dtype, recompute: bool, device: torch.device
) -> None:
    problem = draw(dtype, device)
    for softcap in (30.0, None):
        call = (problem.hidden, problem.weight, problem.targets, softcap)
        total = linear_softcap_cross_entropy(*call, reduction="sum", recompute=recompute)
        expanded = torch.autograd.grad(total, problem.leaves(), torch.tensor(0.5, device=device))
        losses = linear_softcap_cross_entropy(*call, reduction="none", recompute=recompute)
        dense = torch.autograd.grad(losses, problem.leaves(), torch.full_like(losses, 0.5))
        for a, b in zip(expanded, dense, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_come_with_the_sum(dtype: torch.dtype, lora: bool | str, device: torch.device) -> None:
    problem = draw(dtype, device, lora=lora, shuffled=True)
    for softcap, temperature in ((30.0, 1.0), (None, 0.7), (5.0, 1.3)):
        scalars = (softcap, temperature)
        wide = problem.converted(torch.float64)
        problem.upstream = wide.upstream = torch.full_like(problem.upstream, -0.3)
        losses, wide_hints, gradients = reference(wide, *scalars)
        _, _, plain_gradients = reference(problem, *scalars)
        options = {**problem.adapters(), "temperature": temperature, "reduction": "sum", "recompute": True}
        inputs = (problem.hidden, problem.weight, problem.targets, softcap)
        total, hinted = linear_softcap_cross_entropy(*inputs, **options, hints=problem.hints)
        assert relative(total, losses.sum()) < (1e-5 if dtype == torch.float32 else 1e-2)
        known = problem.hints >= 0
        assert (hinted[~known] == float("-inf")).all()
        assert relative(hinted[known], wide_hints[known]) < (1e-5 if dtype == torch.float32 else 1e-2)
        own = torch.autograd.grad(total, problem.leaves(), torch.tensor(-0.3, device=device))
        for leaf, mine, theirs, wanted in zip(problem.leaves(), own, plain_gradients, gradients, strict=True):
            assert mine.dtype == leaf.dtype and not mine.requires_grad
            assert relative(mine, wanted) <= 2 * relative(theirs, wanted) + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", LORAS)
def test_a_retained_graph_keeps_the_gradients_that_came_with_the_sum(
    lora: bool | str, weight_dtype: torch.dtype, device: torch.device
) -> None:
    problem = draw(torch.bfloat16, device, weight_dtype=weight_dtype, lora=lora)
    total = linear_softcap_cross_entropy(
        problem.hidden, problem.weight, problem.targets, **problem.adapters(), reduction="sum", recompute=True
    )
    scales = [torch.tensor(scale, device=device) for scale in (0.3, -7.0, 0.3)]
    first, other = (torch.autograd.grad(total, problem.leaves(), s, retain_graph=True) for s in scales[:2])
    for gradient in first + other:
        gradient.detach().clone()
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # the caller's own
    last = torch.autograd.grad(total, problem.leaves(), scales[2])
    for a, b, c in zip(kept, last, other, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.float() * (-7 / 0.3), c.float(), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", MODES)
def test_reductions(recompute: bool, device: torch.device) -> None:
    problem = draw(torch.float32, device)
    inputs = (problem.hidden, problem.weight)
    each = linear_softcap_cross_entropy(*inputs, problem.targets, reduction="none")
    counted = problem.targets != -100
    mean = linear_softcap_cross_entropy(*inputs, problem.targets, recompute=recompute)
    torch.testing.assert_close(mean, each.sum() / counted.sum())
    total = linear_softcap_cross_entropy(*inputs, problem.targets, reduction="sum", recompute=recompute)
    torch.testing.assert_close(total, each.sum())
    (gradient,) = torch.autograd.grad(mean, problem.hidden)
    assert not gradient[~counted].any()
    ignored = torch.full_like(problem.targets, -100)
    assert linear_softcap_cross_entropy(*inputs, ignored, recompute=recompute).isnan()
    assert linear_softcap_cross_entropy(*inputs, ignored, reduction="sum", recompute=recompute) == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", MODES)
def test_gradients_only_where_wanted(recompute: bool, device: torch.device) -> None:
    for chosen in range(4):
        problem = draw(torch.float32, device, lora=True)
        for index, leaf in enumerate(problem.leaves()):
            leaf.requires_grad_(index == chosen)
        wide = problem.converted(torch.float64)
        expected = reference(wide, 30.0, 1.0)[2][chosen]
        losses = linear_softcap_cross_entropy(
            problem.hidden, problem.weight, problem.targets, **problem.adapters(), reduction="none", recompute=recompute
        )
        (own,) = torch.autograd.grad(losses, problem.leaves()[chosen], problem.upstream)
        assert relative(own, expected) < 1e-5
        total, ones = (
            linear_softcap_cross_entropy(
                problem.hidden, problem.weight, problem.targets, **problem.adapters(), reduction="sum", recompute=mode
            )
            for mode in (recompute, False)
        )
        (own,) = torch.autograd.grad(total, problem.leaves()[chosen])
        assert relative(own, torch.autograd.grad(ones, problem.leaves()[chosen])[0]) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_scoring_equals_the_loss_and_keeps_no_graph(device: torch.device) -> None:
    problem = draw(torch.bfloat16, device, lora=True)
    inputs = (problem.hidden, problem.weight, problem.targets)
    own, hinted = score_tokens(*inputs, **problem.adapters(), hints=problem.hints, temperature=1.2)
    losses, hints = linear_softcap_cross_entropy(
        *inputs, **problem.adapters(), hints=problem.hints, temperature=1.2, reduction="none"
    )
    assert not own.requires_grad
    torch.testing.assert_close(own, losses.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(hinted, hints, rtol=0, atol=2e-5)
    assert torch.equal(score_tokens(*inputs), score_tokens(problem.hidden, problem.weight, problem.targets))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", LORAS[1:])
@pytest.mark.parametrize("recompute", MODES)
def test_no_rows(recompute: bool, lora: bool | str, device: torch.device) -> None:
    problem = draw(torch.float32, device, lora=lora)
    empty = problem.hidden.detach()[:0].requires_grad_()
    ids = problem.doc_ids
    adapters = {"lora_a": problem.lora_a, "lora_b": problem.lora_b, "doc_ids": None if ids is None else ids[:0]}
    call: dict[str, Any] = {"recompute": recompute, **adapters}
    total = linear_softcap_cross_entropy(empty, problem.weight, problem.targets[:0], reduction="sum", **call)
    assert total == 0
    grads = torch.autograd.grad(total, [empty, problem.weight])
    assert grads[0].shape == (0, 32) and not grads[1].any()
    assert linear_softcap_cross_entropy(empty, problem.weight, problem.targets[:0], **call).isnan()


def test_gradients_by_finite_differences() -> None:
    problem = draw(torch.float64, lora=True, shuffled=True, rows=6, width=3, vocab=7, docs=2, rank=2)
    for recompute, reduction in ((False, "none"), (True, "none"), (True, "mean")):

        def loss(*leaves: Tensor, recompute: bool = recompute, reduction: str = reduction) -> Tensor:
            hidden, weight, a, b = leaves
            return linear_softcap_cross_entropy(
                hidden,
                weight,
                problem.targets,
                3.0,
                lora_a=a,
                lora_b=b,
                doc_ids=problem.doc_ids,
                temperature=0.8,
                reduction=reduction,
                recompute=recompute,
            )

        assert torch.autograd.gradcheck(loss, problem.leaves())


@pytest.mark.parametrize("lora", LORAS[1:])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, lora: bool | str) -> None:
    problem = draw(torch.float32, lora=lora, shuffled=True)

    def run(recompute: bool | None) -> list[Tensor]:
        call, rest = (problem.hidden, problem.weight, problem.targets), {**problem.adapters(), "recompute": recompute}
        losses = linear_softcap_cross_entropy(*call, reduction="none", **rest)
        mean = linear_softcap_cross_entropy(*call, **rest)
        gradients = torch.autograd.grad(losses, problem.leaves(), problem.upstream)
        return [losses.detach(), *gradients, mean.detach(), *torch.autograd.grad(mean, problem.leaves())]

    whole = run(False)
    small = face.HeadConfig(keep=0, kept_chunk=7 * 203 * 4, chunk=5 * 203 * 4)
    monkeypatch.setattr(face, "CPU_CONFIG", small)
    for recompute in (False, True, None):
        for a, b in zip(run(recompute), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
