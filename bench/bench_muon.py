"""Muon's update of a model's matrices, and its passes around Newton-Schulz alone, beside PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import DEVICE, Call, Work
from bench.peers import Absent
from pgolf_kernels import muon_apply, muon_direction, orthogonalize
from pgolf_kernels.muon import reference

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
MOMENTUM, KEEP, RATE, STEPS = 0.97, 0.998, 0.02, 5


@dataclass(frozen=True)
class Case:
    """The banks of a model; each group shares the products of a Newton-Schulz."""

    layers: int
    dim: int
    kv_dim: int
    hidden: int

    def groups(self) -> list[list[tuple[int, int, int]]]:
        return [
            [(self.layers, self.hidden, self.dim), (self.layers, self.dim, self.hidden)],
            [(2 * self.layers, self.dim, self.dim)],
            [(2 * self.layers, self.kv_dim, self.dim)],
        ]

    def shapes(self) -> list[tuple[int, int, int]]:
        return [shape for group in self.groups() for shape in group]

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes())

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.elements / 1e6:.1f} M parameters"


CASES = [Case(11, 512, 256, 2048) if GPU else Case(4, 128, 64, 512)]

Groups = list[list[Tensor]]


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    def draw() -> Groups:
        return [[torch.randn(shape, device=device) for shape in group] for group in case.groups()]

    return {
        "gradients": draw(),
        "momenta": draw(),
        "weights": draw(),
        "updates": [
            [torch.randn(n, *sorted(sides), device=device, dtype=DTYPE) for n, *sides in group]
            for group in case.groups()
        ],
        "factor": torch.tensor(0.5, device=device),
    }


# ---- providers -------------------------------------------------------------------------------------------------------


def direction(gradients: list[Tensor], momenta: list[Tensor], factor: Tensor) -> Tensor:
    return muon_direction(gradients, momenta, MOMENTUM, factor=factor, dtype=DTYPE)


def plain_direction(gradients: list[Tensor], momenta: list[Tensor], factor: Tensor) -> Tensor:
    return reference(gradients, momenta, MOMENTUM, factor, True, DTYPE)


def apply(weight: Tensor, update: Tensor) -> None:
    muon_apply(weight, update, keep=KEEP, rate=RATE)


def plain_apply(weight: Tensor, update: Tensor) -> None:
    weight.mul_(KEEP).add_(update.mT if weight.size(-2) > weight.size(-1) else update, alpha=-RATE)


def direction_by(function: Callable[..., Tensor]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        groups = list(zip(x["gradients"], x["momenta"], strict=True))
        return lambda: [function(*group, x["factor"]) for group in groups]

    return build


def apply_by(function: Callable[..., None]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        banks = [pair for group in zip(x["weights"], x["updates"], strict=True) for pair in zip(*group, strict=True)]
        return lambda: [function(*bank) for bank in banks]

    return build


def update_by(direction: Callable[..., Tensor], apply: Callable[..., None]) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        def call() -> None:
            for gradients, momenta, weights in zip(x["gradients"], x["momenta"], x["weights"], strict=True):
                start = direction(gradients, momenta, x["factor"])
                updates = orthogonalize(start, STEPS, DTYPE, normalized=True)
                for weight, update in zip(weights, updates.split([len(w) for w in weights]), strict=True):
                    apply(weight, update)

        return call

    return build


def torch_muon(case: Case, x: dict[str, Any]) -> Call:
    """A matrix at a time, its momentum an average, without row norms and without the factor."""
    if not GPU:
        raise Absent("multiplies in bfloat16, the others here in float32")
    leaves = []
    for weights, gradients in zip(x["weights"], x["gradients"], strict=True):
        for bank, gradient in zip(weights, gradients, strict=True):
            for matrix, grad in zip(bank, gradient, strict=True):
                leaves.append(torch.nn.Parameter(matrix))
                leaves[-1].grad = grad
    return torch.optim.Muon(leaves, lr=RATE, momentum=MOMENTUM, ns_steps=STEPS).step


compiled_direction = torch.compile(plain_direction, dynamic=False)
compiled_apply = torch.compile(plain_apply, dynamic=False)
DIRECTION = {
    "pgolf_kernels": direction_by(direction),
    "eager": direction_by(plain_direction),
    "torch.compile": direction_by(compiled_direction),
}
APPLY = {
    "pgolf_kernels": apply_by(apply),
    "eager": apply_by(plain_apply),
    "torch.compile": apply_by(compiled_apply),
}
UPDATE = {
    "pgolf_kernels": update_by(direction, apply),
    "eager": update_by(plain_direction, plain_apply),
    "torch.compile": update_by(compiled_direction, compiled_apply),
    "torch.optim.Muon": torch_muon,
}


# ---- work ------------------------------------------------------------------------------------------------------------


def direction_work(case: Case) -> Work:
    """g and m read, m and X written."""
    return Work((12 + DTYPE.itemsize) * case.elements)


def apply_work(case: Case) -> Work:
    """W and X read, W written."""
    return Work((8 + DTYPE.itemsize) * case.elements)


def update_work(case: Case) -> Work:
    """Both, X once written and read, and three products a step: X X^T, A A, and theirs with X."""
    flops = 0
    for count, *sides in case.shapes():
        small, large = sorted(sides)
        flops += count * STEPS * 2 * small * small * (2 * large + small)
    return Work(direction_work(case).bytes + apply_work(case).bytes, flops)


@pytest.mark.parametrize("provider", UPDATE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_update(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, UPDATE, setup, update_work)


@pytest.mark.parametrize("provider", DIRECTION)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_direction(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, DIRECTION, setup, direction_work)


@pytest.mark.parametrize("provider", APPLY)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_apply(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, APPLY, setup, apply_work)
