"""The output head and its loss in one call: against float64, per dtype, with adapters, hints and either memory mode."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import pgolf_kernels.linear_softcap_ce as face
from pgolf_kernels import linear_softcap_cross_entropy, score_tokens
from pgolf_kernels._triton_op import interpreting, kernels
from pgolf_kernels.linear_softcap_ce import (
    _backward_op,
    _forward_op,
    _keep_op,
    _learn_op,
    _recompute_op,
    _scaled_op,
    linear_softcap_ce_reference,
)
from tests import triton_aot

CPU = torch.device("cpu")
DEVICES = [pytest.param(CPU, id="cpu"), pytest.param(torch.device("cuda"), id="cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MODES = [pytest.param(False, id="keep"), pytest.param(True, id="recompute")]


@dataclass
class Problem:
    """Inputs of one call; `wide` holds them in float64."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    doc_ids: Tensor | None
    hints: Tensor
    upstream: Tensor

    def adapters(self) -> dict[str, Tensor | None]:
        return {"lora_a": self.lora_a, "lora_b": self.lora_b, "doc_ids": self.doc_ids}

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.lora_a, self.lora_b) if t is not None]

    def converted(self, dtype: torch.dtype) -> "Problem":
        def leaf(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

        hidden, weight, a, b = map(leaf, (self.hidden, self.weight, self.lora_a, self.lora_b))
        assert hidden is not None and weight is not None
        return Problem(hidden, weight, self.targets, a, b, self.doc_ids, self.hints, self.upstream)


def draw(
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    *,
    weight_dtype: torch.dtype | None = None,
    lora: bool = False,
    shuffled: bool = False,
    rows: int = 96,
    width: int = 32,
    vocab: int = 203,
    docs: int = 5,
    rank: int = 8,
) -> Problem:
    generator = torch.Generator().manual_seed(rows + vocab)

    def normal(*shape: int, scale: float, of: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(of).to(device).requires_grad_()

    weights = weight_dtype or dtype
    hidden = normal(rows, width, scale=1.0, of=dtype)
    weight = normal(vocab, width, scale=5 / width**0.5, of=weights)
    a = normal(docs, rank, width, scale=1 / width**0.5, of=weights) if lora else None
    b = normal(docs, vocab, rank, scale=3 / rank**0.5, of=weights) if lora else None
    ids = torch.randint(docs, (rows,), generator=generator)
    ids = ids if shuffled else ids.sort().values
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[rows // 3] = -100
    hints = torch.randint(-1, vocab, (rows,), generator=generator)
    hints[0] = -1
    upstream = torch.randn(rows, generator=generator).to(device)
    ids = ids.to(device) if lora else None
    return Problem(hidden, weight, targets.to(device), a, b, ids, hints.to(device), upstream)


def reference(problem: Problem, softcap: float | None, temperature: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses, hint log-probabilities and gradients in plain PyTorch, in the problem's dtype."""
    p = problem
    losses, hinted = linear_softcap_ce_reference(
        p.hidden, p.weight, p.targets, p.lora_a, p.lora_b, p.doc_ids, p.hints, softcap, temperature
    )
    grads = torch.autograd.grad((losses * p.upstream.to(losses.dtype)).sum(), p.leaves())
    return losses.detach(), hinted, list(grads)


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype: torch.dtype, lora: bool, recompute: bool, device: torch.device) -> None:
    problem = draw(dtype, device, lora=lora)
    for softcap, temperature in ((30.0, 1.0), (None, 0.7), (5.0, 1.3)):
        wide, wide_hints, gradients = reference(problem.converted(torch.float64), softcap, temperature)
        plain, _, plain_gradients = reference(problem, softcap, temperature)
        losses, hinted = linear_softcap_cross_entropy(
            problem.hidden,
            problem.weight,
            problem.targets,
            softcap,
            **problem.adapters(),
            temperature=temperature,
            hints=problem.hints,
            reduction="none",
            recompute=recompute,
        )
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
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_come_with_the_sum(dtype: torch.dtype, lora: bool, device: torch.device) -> None:
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
@pytest.mark.parametrize("lora", [False, True])
def test_a_retained_graph_keeps_the_gradients_that_came_with_the_sum(
    lora: bool, weight_dtype: torch.dtype, device: torch.device
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
@pytest.mark.parametrize("recompute", MODES)
def test_no_rows(recompute: bool, device: torch.device) -> None:
    problem = draw(torch.float32, device, lora=True)
    empty = problem.hidden.detach()[:0].requires_grad_()
    ids = problem.doc_ids
    assert ids is not None
    adapters = {"lora_a": problem.lora_a, "lora_b": problem.lora_b, "doc_ids": ids[:0]}
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


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = draw(torch.float32, lora=True, shuffled=True)

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", [False, True])
def test_opcheck(lora: bool, device: torch.device) -> None:
    p = draw(torch.float32, device, lora=lora, rows=12)
    inputs = (p.hidden, p.weight, p.targets, p.lora_a, p.lora_b, p.doc_ids)
    scalars = (30.0, 1.0, -100)
    for op in (_forward_op, _keep_op):
        torch.library.opcheck(op, (*inputs, p.hints, *scalars))
        torch.library.opcheck(op, (*inputs, None, *scalars))
    plain = tuple(t if t is None else t.detach() for t in inputs)
    needs = [True, True, lora, lora]
    # Its backward pass multiplies results of the op where they lie, and opcheck compares them afterwards: by 1 here.
    torch.library.opcheck(_learn_op, (*inputs, p.hints, needs, "sum", *scalars))
    torch.library.opcheck(_learn_op, (*plain, None, [False, True, False, lora], "mean", *scalars))
    for factor in (p.upstream, p.upstream[0]):
        torch.library.opcheck(_scaled_op, (p.hidden.detach(), factor, torch.bfloat16))
    needs = [True, False, lora, lora]
    dlogits = torch.randn(12, 203, device=device)
    torch.library.opcheck(_recompute_op, (p.upstream, *plain, p.upstream.abs(), needs, *scalars))
    inner = torch.randn(12, 8, device=device) if lora else torch.empty(0, device=device)
    torch.library.opcheck(
        _backward_op,
        (p.upstream, dlogits, p.upstream.abs(), inner, torch.empty(0, device=device), *plain[:2], *plain[3:], needs),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", MODES)
def test_compiled_equals_eager(recompute: bool, autocast: bool, device: torch.device) -> None:
    problem = draw(torch.float32, device, lora=not autocast)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            return linear_softcap_cross_entropy(
                hidden * 1.5, weight, problem.targets, **problem.adapters(), recompute=recompute
            )

    inputs = (problem.hidden, problem.weight)
    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(loss(*inputs), compiled(*inputs), rtol=1e-6, atol=0)
    own = torch.autograd.grad(loss(*inputs), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), own, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", MODES)
def test_double_backward_raises(recompute: bool, device: torch.device) -> None:
    problem = draw(torch.float32, device)
    loss = linear_softcap_cross_entropy(problem.hidden, problem.weight, problem.targets, recompute=recompute)
    (gradient,) = torch.autograd.grad(loss, problem.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


def test_refusals() -> None:
    p = draw(torch.float32, lora=True)
    assert p.lora_a is not None and p.lora_b is not None and p.doc_ids is not None
    call = linear_softcap_cross_entropy
    adapters = p.adapters()
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "hidden: got dtype torch.int64", lambda: call(p.hidden.long(), p.weight, p.targets)),
        (ValueError, r"hidden: got shape \[96\]", lambda: call(p.hidden[:, 0], p.weight, p.targets)),
        (ValueError, r"weight: got shape \[203, 31\]", lambda: call(p.hidden, p.weight[:, 1:], p.targets)),
        (TypeError, "weight: got dtype", lambda: call(p.hidden, p.weight.long(), p.targets)),
        (ValueError, "weight: got device meta", lambda: call(p.hidden, p.weight.to("meta"), p.targets)),
        (ValueError, r"targets: got shape \[95\]", lambda: call(p.hidden, p.weight, p.targets[1:])),
        (ValueError, r"hints: got shape \[95\]", lambda: call(p.hidden, p.weight, p.targets, hints=p.hints[1:])),
        (ValueError, "temperature: got 0", lambda: call(p.hidden, p.weight, p.targets, temperature=0)),
        (ValueError, "softcap: got -2", lambda: call(p.hidden, p.weight, p.targets, -2)),
        (ValueError, "reduction: got", lambda: call(p.hidden, p.weight, p.targets, reduction="avg")),
        (ValueError, "all three or none", lambda: call(p.hidden, p.weight, p.targets, lora_a=p.lora_a)),
        (
            ValueError,
            r"lora_b: got shape \[5, 202, 8\], wanted \[5, 203, 8\]",
            lambda: call(p.hidden, p.weight, p.targets, **{**adapters, "lora_b": p.lora_b[:, 1:]}),
        ),
        (
            ValueError,
            r"lora_a: got shape \[5, 8, 31\], wanted \[B, r, 32\] with 1 <= r <= 128",
            lambda: call(p.hidden, p.weight, p.targets, **{**adapters, "lora_a": p.lora_a[..., 1:]}),
        ),
        (
            TypeError,
            "doc_ids: got dtype torch.float32",
            lambda: call(p.hidden, p.weight, p.targets, **{**adapters, "doc_ids": p.doc_ids.float()}),
        ),
        (
            IndexError,
            r"doc_ids: got 2 to 6, wanted indices in \[0, 5\)",
            lambda: call(p.hidden, p.weight, p.targets, **{**adapters, "doc_ids": p.doc_ids + 2}),
        ),
        (IndexError, "targets: got 203", lambda: call(p.hidden, p.weight, torch.full_like(p.targets, 203))),
        (
            IndexError,
            r"hint 203",
            lambda: call(p.hidden, p.weight, p.targets, hints=torch.full_like(p.hints, 203)),
        ),
    ]
    for error, message, refused in cases:
        with pytest.raises(error, match=message):
            refused()


# Triton kernels -------------------------------------------------------------------------------------------------------


@triton_aot.needs_triton
def test_triton_kernels_through_the_interpreter() -> None:
    triton_aot.run_interpreted("tests.test_linear_softcap_ce")


def interpreted() -> None:
    """The fused head in float32: ragged rows and columns, hints, ignored targets, both memory modes."""
    problem = draw(torch.float32, rows=150, width=40, vocab=204)
    for softcap, temperature in ((30.0, 1.0), (5.0, 0.8)):
        expected, expected_hints, gradients = reference(problem, softcap, temperature)
        for recompute in (False, True):
            with interpreting():
                losses, hinted = linear_softcap_cross_entropy(
                    problem.hidden,
                    problem.weight,
                    problem.targets,
                    softcap,
                    temperature=temperature,
                    hints=problem.hints,
                    reduction="none",
                    recompute=recompute,
                )
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


# GPU only -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", MODES)
def test_fused_head_is_no_less_accurate_than_rounded_logits(recompute: bool) -> None:
    problem = draw(torch.bfloat16, torch.device("cuda"), rows=3000, width=512, vocab=8192)
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
@pytest.mark.parametrize("lora", [False, True])
def test_cuda_graph_and_no_waiting(lora: bool, width: int, reduction: str, recompute: bool) -> None:
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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


if __name__ == "__main__":
    interpreted()
