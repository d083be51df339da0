"""The head's contract: ops as PyTorch checks and compiles them, second derivatives, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pgolf_kernels import linear_softcap_cross_entropy
from pgolf_kernels.linear_softcap_ce import _backward_op, _forward_op, _keep_op, _learn_op, _recompute_op, _scaled_op
from tests.head import DEVICES, LORAS, MODES, draw


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lora", LORAS)
def test_opcheck(lora: bool | str, device: torch.device) -> None:
    p = draw(torch.float32, device, lora=lora, rows=12)
    inputs = (p.hidden, p.weight, p.targets, p.lora_a, p.lora_b, p.doc_ids)
    scalars = (30.0, 1.0, -100)
    for op in (_forward_op, _keep_op):
        torch.library.opcheck(op, (*inputs, p.hints, *scalars))
        torch.library.opcheck(op, (*inputs, None, *scalars))
    plain = tuple(t if t is None else t.detach() for t in inputs)
    needs = [True, True, bool(lora), bool(lora)]
    # Its backward pass multiplies results of the op where they lie, and opcheck compares them afterwards: by 1 here.
    torch.library.opcheck(_learn_op, (*inputs, p.hints, needs, "sum", *scalars))
    torch.library.opcheck(_learn_op, (*plain, None, [False, True, False, bool(lora)], "mean", *scalars))
    for factor in (p.upstream, p.upstream[0]):
        torch.library.opcheck(_scaled_op, (p.hidden.detach(), factor, torch.bfloat16))
    needs = [True, False, bool(lora), bool(lora)]
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
        (ValueError, "wanted lora_a and lora_b", lambda: call(p.hidden, p.weight, p.targets, lora_a=p.lora_a)),
        (ValueError, "wanted lora_a and lora_b", lambda: call(p.hidden, p.weight, p.targets, doc_ids=p.doc_ids)),
        (
            ValueError,
            "hidden: got 96 rows without doc_ids, wanted as many for each of 5 documents",
            lambda: call(p.hidden, p.weight, p.targets, **{**adapters, "doc_ids": None}),
        ),
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
            r"hints: got 203, wanted indices in \[0, 203\) or -1 for no hint",
            lambda: call(p.hidden, p.weight, p.targets, hints=torch.full_like(p.hints, 203)),
        ),
    ]
    for error, message, refused in cases:
        with pytest.raises(error, match=message):
            refused()
