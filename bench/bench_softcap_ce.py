"""Softcap cross-entropy on given logits, and with the output head, in training and in scoring, beside what else one
could call."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import DEVICE, Call, Work
from bench.peers import Absent, peer_package
from pgolf_kernels import (
    linear_softcap_cross_entropy,
    score_tokens,
    softcap_cross_entropy,
    softcap_cross_entropy_with_grad,
)

SOFTCAP = 30.0
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Case:
    rows: int
    vocab: int
    width: int = 512
    softcap: float | None = SOFTCAP

    def __str__(self) -> str:
        plain = "" if self.softcap else ", no softcap"
        return f"{self.rows}x{self.vocab}x{self.width} {str(DTYPE).removeprefix('torch.')}{plain}"


CASES = [Case(98304, 8192)] if GPU else [Case(4096, 8192)]
PLAIN = [dataclasses.replace(case, softcap=None) for case in CASES]  # for peers that know no softcap
ELEMENT = DTYPE.itemsize


def loss_of(logits: Tensor, targets: Tensor, softcap: float | None = SOFTCAP) -> Tensor:
    logits = logits.float()
    return F.cross_entropy(logits if softcap is None else softcap * torch.tanh(logits / softcap), targets)


def head_loss_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return loss_of(hidden @ weight.T, targets)


@functools.cache
def compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Under an upstream gradient other than one, as with gradient accumulation."""
    return torch.autograd.grad(loss / 8, inputs)


# Logits that exist ----------------------------------------------------------------------------------------------------


def setup_logits(case: Case, device: torch.device) -> dict[str, Tensor]:
    logits = torch.randn(case.rows, case.vocab, device=device, dtype=DTYPE) * 5
    return {"logits": logits.requires_grad_(), "targets": torch.randint(case.vocab, (case.rows,), device=device)}


def one_pass(case: Case, x: dict[str, Tensor]) -> Call:
    scale = torch.full((), 1 / (8 * case.rows), device=DEVICE)
    logits = x["logits"].detach()
    return lambda: softcap_cross_entropy_with_grad(logits, x["targets"], SOFTCAP, grad_scale=scale)


def gpu_package(name: str) -> Any:
    if not GPU:
        raise Absent("needs a GPU")
    return peer_package(name)


def liger_loss(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Its backward pass writes the gradient over the logits: the next call finds other values, of the same shape."""
    functional = gpu_package("liger_kernel.transformers.functional")
    return functional.liger_cross_entropy(logits, targets, softcap=softcap)


def quack_loss(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    assert softcap is None, "quack knows no softcap"
    return gpu_package("quack").cross_entropy(logits, targets, reduction="mean")


def forward_by(function: Any) -> Any:
    def build(case: Case, x: dict[str, Tensor]) -> Call:
        logits = x["logits"].detach()
        return lambda: function(logits, x["targets"], case.softcap)

    return build


def both_by(function: Any) -> Any:
    return lambda case, x: lambda: gradients(function(x["logits"], x["targets"], case.softcap), x["logits"])


LOGIT_LOSSES = {
    "pgolf_kernels": softcap_cross_entropy,
    "eager": loss_of,
    "torch.compile": lambda *inputs: compiled(loss_of)(*inputs),
    "liger_kernel": liger_loss,
}
FORWARD = {name: forward_by(function) for name, function in LOGIT_LOSSES.items()}
BOTH = {name: both_by(function) for name, function in LOGIT_LOSSES.items()}
PLAIN_BOTH = BOTH | {"quack": both_by(quack_loss)}
ONE_PASS = {"pgolf_kernels": one_pass} | {name: build for name, build in BOTH.items() if name != "pgolf_kernels"}


def forward_work(case: Case) -> Work:
    return Work(bytes=case.rows * case.vocab * ELEMENT)


def one_pass_work(case: Case) -> Work:
    return Work(bytes=2 * case.rows * case.vocab * ELEMENT)


def both_work(case: Case) -> Work:
    return Work(bytes=3 * case.rows * case.vocab * ELEMENT)


@pytest.mark.parametrize("provider", FORWARD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, FORWARD, setup_logits, forward_work)


@pytest.mark.parametrize("provider", ONE_PASS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_pass(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, ONE_PASS, setup_logits, one_pass_work)


@pytest.mark.parametrize("provider", BOTH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, BOTH, setup_logits, both_work)


@pytest.mark.parametrize("provider", PLAIN_BOTH)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_no_softcap(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, PLAIN_BOTH, setup_logits, both_work)


# The head and its loss ------------------------------------------------------------------------------------------------


def setup_head(case: Case, device: torch.device) -> dict[str, Tensor]:
    hidden = torch.randn(case.rows, case.width, device=device, dtype=DTYPE)
    weight = torch.randn(case.vocab, case.width, device=device, dtype=DTYPE) * (5 / case.width**0.5)
    targets = torch.randint(case.vocab, (case.rows,), device=device)
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "targets": targets}


def liger_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    functional = gpu_package("liger_kernel.transformers.functional")
    return functional.liger_fused_linear_cross_entropy(hidden, weight, targets, softcap=SOFTCAP)


def cce_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    package = gpu_package("cut_cross_entropy")
    # Its filter leaves out small gradients, which training from the start cannot do without.
    return package.linear_cross_entropy(hidden, weight, targets, softcap=SOFTCAP, impl="cce", filter_eps=None)


def head_by(function: Any) -> Any:
    def build(case: Case, x: dict[str, Tensor]) -> Call:
        inputs = x["hidden"], x["weight"]
        return lambda: gradients(function(*inputs, x["targets"]), *inputs)

    return build


def recomputing_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    return linear_softcap_cross_entropy(hidden, weight, targets, SOFTCAP, recompute=True)


HEAD = {
    name: head_by(function)
    for name, function in {
        "pgolf_kernels": linear_softcap_cross_entropy,
        "pgolf_kernels, recompute": recomputing_head,
        "eager": head_loss_of,
        "torch.compile": lambda *inputs: compiled(head_loss_of)(*inputs),
        "liger_kernel": liger_head,
        "cut_cross_entropy": cce_head,
    }.items()
}


def head_work(case: Case) -> Work:
    return Work(bytes=2 * case.rows * case.width * ELEMENT, flops=6 * case.rows * case.vocab * case.width)


@pytest.mark.parametrize("provider", HEAD)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_head(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, HEAD, setup_head, head_work)


# Scores of tokens, with the probabilities of hints ------------------------------------------------------------------


def setup_score(case: Case, device: torch.device) -> dict[str, Tensor]:
    """Every second token has a hint."""
    hints = torch.randint(case.vocab, (case.rows,), device=device)
    hints[::2] = -1
    return {name: t.detach() for name, t in setup_head(case, device).items()} | {"hints": hints}


def scores_of(hidden: Tensor, weight: Tensor, targets: Tensor, hints: Tensor) -> tuple[Tensor, Tensor]:
    logits = (hidden @ weight.T).float()
    log_probs = F.log_softmax(SOFTCAP * torch.tanh(logits / SOFTCAP), dim=1)
    of_hints = log_probs.gather(1, hints.clamp(min=0).unsqueeze(1)).squeeze(1)
    return F.nll_loss(log_probs, targets, reduction="none"), of_hints.masked_fill(hints < 0, -torch.inf)


def our_scores(hidden: Tensor, weight: Tensor, targets: Tensor, hints: Tensor) -> Any:
    return score_tokens(hidden, weight, targets, SOFTCAP, hints=hints)


def score_by(function: Any) -> Any:
    return lambda case, x: lambda: function(x["hidden"], x["weight"], x["targets"], x["hints"])


SCORE = {
    name: score_by(function)
    for name, function in {
        "pgolf_kernels": our_scores,
        "eager": scores_of,
        "torch.compile": lambda *inputs: compiled(scores_of)(*inputs),
    }.items()
}


def score_work(case: Case) -> Work:
    return Work(bytes=case.rows * case.width * ELEMENT, flops=2 * case.rows * case.vocab * case.width)


@pytest.mark.parametrize("provider", SCORE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_score(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, SCORE, setup_score, score_work)


# The head with adapters, as test-time training calls it ---------------------------------------------------------------


@dataclass(frozen=True)
class AdapterCase:
    documents: int
    positions: int
    rank: int
    vocab: int
    width: int = 512

    def __str__(self) -> str:
        return f"{self.documents}x{self.positions} r{self.rank} {self.width}->{self.vocab}"


ADAPTER_CASES = [AdapterCase(64, 48, 96, 8192)] if GPU else [AdapterCase(8, 48, 96, 1024)]


def setup_adapters(case: AdapterCase, device: torch.device) -> dict[str, Tensor]:
    rows = case.documents * case.positions
    hidden = torch.randn(rows, case.width, device=device, dtype=DTYPE)
    weight = torch.randn(case.vocab, case.width, device=device, dtype=DTYPE) * (5 / case.width**0.5)
    a = torch.randn(case.documents, case.rank, case.width, device=device) / case.width**0.5
    b = torch.randn(case.documents, case.vocab, case.rank, device=device) / case.rank**0.5
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight,
        "targets": torch.randint(case.vocab, (rows,), device=device),
        "lora_a": a.requires_grad_(),
        "lora_b": b.requires_grad_(),
    }


def adapters_loss(hidden: Tensor, weight: Tensor, targets: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    x = hidden.view(len(lora_a), -1, hidden.shape[1])
    low = torch.bmm(torch.bmm(x, lora_a.to(x.dtype).mT), lora_b.to(x.dtype).mT)
    return loss_of((F.linear(x, weight) + low).flatten(0, 1), targets)


def our_adapters(case: AdapterCase, x: dict[str, Tensor]) -> Call:
    return lambda: gradients(linear_softcap_cross_entropy(**x), x["hidden"], x["lora_a"], x["lora_b"])


def adapters_by(function: Any) -> Any:
    def build(case: AdapterCase, x: dict[str, Tensor]) -> Call:
        inputs = [x[name] for name in ("hidden", "weight", "targets", "lora_a", "lora_b")]
        return lambda: gradients(function(*inputs), x["hidden"], x["lora_a"], x["lora_b"])

    return build


ADAPTERS = {
    "pgolf_kernels": our_adapters,
    "linear + two bmm, eager": adapters_by(adapters_loss),
    "linear + two bmm, torch.compile": adapters_by(lambda *inputs: compiled(adapters_loss)(*inputs)),
}


def adapters_work(case: AdapterCase) -> Work:
    """The adapters' B and its gradient, both float32; three products of the head and of each adapter."""
    rows, b = case.documents * case.positions, case.documents * case.vocab * case.rank
    return Work(bytes=2 * 4 * b, flops=rows * case.vocab * (4 * case.width + 6 * case.rank))


@pytest.mark.parametrize("provider", ADAPTERS)
@pytest.mark.parametrize("case", ADAPTER_CASES, ids=str)
def test_adapters(bench: Any, case: AdapterCase, provider: str) -> None:
    bench(case, provider, ADAPTERS, setup_adapters, adapters_work)
