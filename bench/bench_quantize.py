"""Hessians of every matrix in one pass, forward included, and the whole quantisation of the 35.9 M-parameter model.

On a GPU 16 batches of 98,304 tokens; on a CPU two of 2,048.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.common import DEVICE, Call, Work
from model.config import Config
from model.data.loaders import Batch
from model.gpt import GPT
from model.quantize import HessianSums, collect_hessians, quantize_with_hessians

CONFIG = Config()


@dataclass(frozen=True)
class Case:
    batches: int
    rows: int
    length: int

    def __str__(self) -> str:
        return f"{self.batches} batches of {self.rows * self.length} tokens"

    @property
    def tokens(self) -> int:
        return self.batches * self.rows * self.length


CASE = Case(16, 48, 2048) if DEVICE.type == "cuda" else Case(2, 2, 1024)


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    model = GPT(CONFIG.model).to(device)
    with torch.no_grad():
        for bank in (model.qo_bank, model.down_bank):
            bank.normal_(std=0.02)
    if device.type == "cuda":
        model.compute_dtype = torch.bfloat16
    ids = torch.randint(0, CONFIG.model.vocab_size, (case.batches, case.rows, case.length), device=device)
    return {"model": model, "batches": [Batch(rows, rows, None, case.length) for rows in ids]}


def work(case: Case) -> Work:
    """Two operations a weight and use, and half a symmetric product for each distinct input."""
    model = CONFIG.model
    encoder, decoder = model.layer_order(loop=True)
    passes = len(encoder) + len(decoder)
    block = 2 * model.model_dim * (model.model_dim + model.kv_dim + model.hidden_dim)
    products = 3 * model.model_dim**2 + model.hidden_dim**2
    flops = passes * (2 * block + products) + model.model_dim**2
    return Work(bytes=4 * 35_944_602, flops=case.tokens * flops)


def hessians(case: Case, x: dict[str, Any]) -> Call:
    return lambda: collect_hessians(x["model"], x["batches"])


def forward_only(case: Case, x: dict[str, Any]) -> Call:
    """The same forward with the inputs handed out and nothing done with them."""

    def call() -> None:
        with torch.no_grad():
            for batch in x["batches"]:
                x["model"].hidden(batch.inputs, collect=lambda names, inputs: None)

    return call


def separate(case: Case, x: dict[str, Any]) -> Call:
    """As the public systems do: every matrix its own product, in fp32."""

    class Separate(HessianSums):
        def __call__(self, names: tuple[str, ...], inputs: torch.Tensor) -> None:
            rows = inputs.reshape(-1, inputs.shape[-1]).float()
            for name in names:
                product = rows.mT @ rows
                self.sums[name,] = self.sums[name,] + product if (name,) in self.sums else product

    def call() -> None:
        sums = Separate()
        with torch.no_grad():
            for batch in x["batches"]:
                x["model"].hidden(batch.inputs, collect=sums)

    return call


def quantize(case: Case, x: dict[str, Any]) -> Call:
    found = collect_hessians(x["model"], x["batches"][:1])
    return lambda: quantize_with_hessians(x["model"], CONFIG.quant, found)


HESSIANS = {"pgolf": hessians, "forward only": forward_only, "a product a matrix, fp32": separate}


@pytest.mark.parametrize("provider", HESSIANS)
def test_hessians(bench: Any, provider: str) -> None:
    bench(CASE, provider, HESSIANS, setup, work)


def test_quantize(bench: Any) -> None:
    bench(CASE, "pgolf", {"pgolf": quantize}, setup, lambda case: Work(bytes=5 * 35_944_602))
