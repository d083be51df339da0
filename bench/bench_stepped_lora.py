"""Linears with a document's own adapter and its AdamW step: forward, backward and step of the projections around
attention in test-time training, beside the same in parts and in PyTorch under autocast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import DEVICE, Call, Work
from pgolf_kernels import AdamStep, LoraPass, SteppedLora, adapter_adamw, batched_lora_multi, stepped_lora

GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if GPU else torch.float32
SETTINGS = {"lr": 1e-4, "eps": 1e-10, "weight_decay": 0.5}
BETA2 = 0.999


@dataclass(frozen=True)
class Case:
    """q, k and v of x, and the adapter of o alone, which reads x too and is added to the residual stream."""

    documents: int
    length: int
    dim: int = 512
    kv_dim: int = 256
    rank: int = 96

    def __str__(self) -> str:
        return f"B{self.documents} T{self.length} {self.dim}->{'+'.join(map(str, self.outs))} r{self.rank}"

    @property
    def outs(self) -> tuple[int, ...]:
        return self.dim, self.kv_dim, self.kv_dim, self.dim

    @property
    def rows(self) -> int:
        return self.documents * self.length


CASES = [Case(64, 96), Case(64, 2048)] if GPU else [Case(4, 48, 256, 128, 32), Case(4, 256, 256, 128, 32)]


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    def draw(scale: float, *size: int) -> Tensor:
        return torch.randn(size, device=device) * scale

    documents, rank, dim = case.documents, case.rank, case.dim
    return {
        "x": draw(1.0, case.rows, dim).to(DTYPE).requires_grad_(),
        "weights": [draw(dim**-0.5, out, dim).to(DTYPE) for out in case.outs[:3]],
        "a": [draw(dim**-0.5, documents, rank, dim) for _ in case.outs],
        "b": [torch.zeros(documents, out, rank, device=device) for out in case.outs],
        "residual": draw(1.0, case.rows, dim).to(DTYPE).requires_grad_(),
        "scale": 1 + draw(0.1, dim),
        "grads": [draw(1.0, case.rows, out).to(DTYPE) for out in case.outs],
        "bounds": torch.arange(0, case.rows + 1, case.length, device=device, dtype=torch.int32),
        "steps": torch.ones(documents, device=device, dtype=torch.int64),
    }


def work(case: Case) -> Work:
    """x read twice and its gradient written, the residual read (its gradient is o's); outputs and their gradients; A
    and B with their averages read and written. Weights are frozen: no product for their gradient."""
    outs = sum(case.outs)
    adapters = case.documents * case.rank * (len(case.outs) * case.dim + outs)
    per_row = 2 * case.dim * sum(case.outs[:3]) + 3 * case.rank * (len(case.outs) * case.dim + outs)
    return Work(case.rows * (4 * case.dim + 2 * outs) * DTYPE.itemsize + 16 * adapters, 2 * case.rows * per_row)


def ours(case: Case, x: dict[str, Any]) -> Call:
    """A pass is opened for each call, as for each chunk: its map of tiles and the step's factors count."""
    values = [t.unsqueeze(0) for t in x["a"]], [t.unsqueeze(0) for t in x["b"]]
    adapters = SteppedLora(*values, dtype=DTYPE, mean=False)
    adapters.hand_over(torch.arange(case.documents, device=DEVICE))
    residuals, scales = ([None, None, None, x[name]] for name in ("residual", "scale"))

    def call() -> tuple[Tensor, ...]:
        through = LoraPass(x["bounds"], AdamStep(x["steps"], beta2=BETA2, **SETTINGS))
        ys, _ = stepped_lora(
            x["x"], [*x["weights"], None], adapters[0], through, residuals=residuals, out_scales=scales
        )
        inputs = [through.anchor, x["x"], x["residual"]]
        return torch.autograd.grad(ys, inputs, x["grads"], materialize_grads=True)[1:]

    return call


def scaled(b: list[Tensor], scale: Tensor) -> list[Tensor]:
    return [*b[:3], b[3] * scale.unsqueeze(-1)]


def in_parts(case: Case, x: dict[str, Any]) -> Call:
    """batched_lora_multi, its gradients, adapter_adamw."""
    leaves = [t.detach().requires_grad_() for t in (*x["a"], *x["b"])]
    a, b = leaves[: len(case.outs)], leaves[len(case.outs) :]
    squares = [torch.zeros_like(leaf) for leaf in leaves]

    def call() -> list[Tensor]:
        ys = batched_lora_multi(
            x["x"], [*x["weights"], None], a, scaled(b, x["scale"]), residuals=[None, None, None, x["residual"]],
            cu_seqlens=x["bounds"],
        )  # fmt: skip
        d_x, d_residual, *grads = torch.autograd.grad(ys, [x["x"], x["residual"], *leaves], x["grads"])
        stepped = [[t.detach().unsqueeze(0) for t in tensors] for tensors in (leaves, grads, squares)]
        adapter_adamw(*stepped, x["steps"], beta2=BETA2, **SETTINGS)
        return [d_x, d_residual]

    return call


def linear_and_bmm(
    x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor], residual: Tensor, scale: Tensor
) -> list[Tensor]:
    with torch.autocast(DEVICE.type, DTYPE, enabled=GPU):
        by_document = x.unflatten(0, (len(a[0]), -1))
        low = [torch.bmm(torch.bmm(by_document, a_p.mT), b_p.mT).flatten(0, 1) for a_p, b_p in zip(a, b, strict=True)]
        outputs = [F.linear(x, weight) + low_p for weight, low_p in zip(weights, low[:3], strict=True)]
        return [*outputs, residual + scale.to(x.dtype) * low[3]]


def in_pytorch(function: Callable[..., list[Tensor]]) -> Callable[[Case, dict[str, Any]], Call]:
    """Documents of one length, as their expression wants them, and torch's fused AdamW."""

    def build(case: Case, x: dict[str, Any]) -> Call:
        leaves = [torch.nn.Parameter(t) for t in (*x["a"], *x["b"])]
        a, b = leaves[: len(case.outs)], leaves[len(case.outs) :]
        optimizer = torch.optim.AdamW(leaves, betas=(0.0, BETA2), fused=True, capturable=GPU, **SETTINGS)

        inputs = [x["x"], x["residual"], *leaves]

        def call() -> list[Tensor | None]:
            for tensor in inputs:
                tensor.grad = None
            # By `backward`, which gives each gradient its parameter's strides: fused AdamW on a CPU relies on that.
            torch.autograd.backward(function(x["x"], x["weights"], a, b, x["residual"], x["scale"]), x["grads"])
            optimizer.step()
            return [x["x"].grad, x["residual"].grad]

        return call

    return build


PROVIDERS = {
    "pgolf_kernels": ours,
    "pgolf_kernels, step apart": in_parts,
    "linear, two bmm, AdamW": in_pytorch(linear_and_bmm),
    "linear, two bmm, AdamW, torch.compile": in_pytorch(torch.compile(linear_and_bmm, dynamic=False)),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, PROVIDERS, setup, work)
