"""GPTQ of single matrices and of a whole model, beside the public code and a plain loop over columns, whose step is
eager or compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.common import DEVICE, Call, Work
from bench.peers import script_1530
from pgolf_kernels import GptqRecipe, gptq_quantize_many

LAYERS = 11
BLOCK = 128  # columns whose updates are applied to each other at once, to the rest at the block's end


@dataclass(frozen=True)
class Case:
    """`matrices`: (rows, columns, bits, number of the Hessian)."""

    name: str
    matrices: tuple[tuple[int, int, int, int], ...]

    def __str__(self) -> str:
        return self.name


def single(rows: int, cols: int) -> Case:
    return Case(f"{rows}x{cols}", ((rows, cols, 6, 0),))


def whole_model() -> Case:
    """The 66 matrices and the embedding of the 35.9 M-parameter model; query, key and value share their inputs."""
    matrices = []
    for layer in range(0, 4 * LAYERS, 4):
        matrices += [(512, 512, 6, layer), (256, 512, 6, layer), (256, 512, 6, layer), (512, 512, 6, layer + 1)]
        matrices += [(2048, 512, 6, layer + 2), (512, 2048, 6, layer + 3)]
    return Case("67 matrices, 35.9 M weights", (*matrices, (8192, 512, 8, 4 * LAYERS)))


SINGLES = [single(2048, 512), single(512, 2048)]


def setup(case: Case, device: torch.device) -> dict[str, list[Any]]:
    hessians: dict[int, Tensor] = {}
    for _, cols, _, number in case.matrices:
        if number not in hessians:
            mix = torch.randn(cols, cols, device=device) / cols**0.5 + torch.diag(torch.rand(cols, device=device) + 0.2)
            inputs = torch.randn(2 * cols, cols, device=device) @ mix
            hessians[number] = inputs.T @ inputs
    return {
        "weights": [torch.randn(rows, cols, device=device) * 0.04 for rows, cols, _, _ in case.matrices],
        "hessians": [hessians[number] for _, _, _, number in case.matrices],
        "recipes": [GptqRecipe(bits=bits, clip_sigmas=20.0 if bits == 8 else 12.85) for _, _, bits, _ in case.matrices],
    }


def work(case: Case) -> Work:
    """Weights and Hessians read once, codes written; one Cholesky factorisation each, one triangle of updates."""
    sizes = {number: cols for _, cols, _, number in case.matrices}
    return Work(
        bytes=sum(5 * rows * cols for rows, cols, _, _ in case.matrices) + sum(4 * n * n for n in sizes.values()),
        flops=sum(rows * cols**2 for rows, cols, _, _ in case.matrices) + sum(n**3 // 3 for n in sizes.values()),
    )


def ours(case: Case, x: dict[str, list[Any]]) -> Call:
    return lambda: gptq_quantize_many(x["weights"], x["hessians"], x["recipes"])


def quantize_column(
    part: Tensor, errors: Tensor, codes: Tensor, upper: Tensor, wide: Tensor, most: float, j: int
) -> None:
    """Column j of a block: its codes and its error, which the columns behind it take on."""
    row = upper[j]
    code = (part[:, j] / wide).round().clamp(-most, most)
    errors[:, j] = (part[:, j] - code * wide) / row[j]
    part[:, j:] -= errors[:, j : j + 1] * row[j:]
    codes[:, j] = code.to(torch.int8)


def quantize_column_whole(
    part: Tensor, errors: Tensor, codes: Tensor, upper: Tensor, wide: Tensor, most: float, j: Tensor
) -> None:
    """The same in one shape for every column, as a compiler wants it: j [1] is on the device, and all columns take the
    error on, those in front with the zeros that a triangular factor has there."""
    row, x = upper.index_select(0, j), part.index_select(1, j)
    code = (x / wide.unsqueeze(1)).round().clamp(-most, most)
    error = (x - code * wide.unsqueeze(1)) / row.index_select(1, j)
    errors.index_copy_(1, j, error)
    codes.index_copy_(1, j, code.to(torch.int8))
    part.sub_(error * row)


def column_loop(
    weight: Tensor, hessian: Tensor, recipe: GptqRecipe, quantize: Callable[..., None], columns: Any
) -> tuple[Tensor, Tensor]:
    """GPTQ as public scripts run it: factorise, invert, factorise again; one column after the other in PyTorch."""
    cols = weight.shape[1]
    damped = hessian + torch.eye(cols, device=weight.device) * (0.01 * hessian.diagonal().mean())
    order = damped.diagonal().argsort(descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    scales = (recipe.clip_sigmas * weight.std(1) / recipe.max_code).half()
    wide = scales.float()
    rest = weight[:, order]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for begin in range(0, cols, BLOCK):
        end = min(begin + BLOCK, cols)
        part, errors = rest[:, begin:end].clone(), torch.empty_like(rest[:, begin:end])
        triangle, own = upper[begin:end, begin:end], codes[:, begin:end]
        for j in columns[: end - begin]:
            quantize(part, errors, own, triangle, wide, recipe.max_code, j)
        rest[:, end:] -= errors @ upper[begin:end, end:]
    return codes[:, order.argsort()], scales


def loop(case: Case, x: dict[str, list[Any]]) -> Call:
    return loop_of(x, quantize_column, range(BLOCK))


def compiled_loop(case: Case, x: dict[str, list[Any]]) -> Call:
    columns = [torch.full((1,), j, device=DEVICE) for j in range(BLOCK)]
    return loop_of(x, torch.compile(quantize_column_whole, dynamic=False), columns)


def loop_of(x: dict[str, list[Any]], quantize: Callable[..., None], columns: Any) -> Call:
    matrices = list(zip(x["weights"], x["hessians"], x["recipes"], strict=True))
    return lambda: [column_loop(*each, quantize, columns) for each in matrices]


def public(case: Case, x: dict[str, list[Any]]) -> Call:
    """The function of pull request 1530. It works on the CPU, where its script brings weights and Hessians first."""
    quantize = script_1530().gptq_quantize_weight
    matrices = [
        (weight.cpu(), hessian.cpu(), recipe.clip_sigmas, recipe.max_code)
        for weight, hessian, recipe in zip(x["weights"], x["hessians"], x["recipes"], strict=True)
    ]
    return lambda: [quantize(*each) for each in matrices]


PROVIDERS = {
    "pgolf_kernels": ours,
    "pull request 1530, on the CPU": public,
    "PyTorch loop over columns": loop,
    "loop over columns, torch.compile": compiled_loop,
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", SINGLES, ids=str)
def test_matrix(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, PROVIDERS, setup, work)


@pytest.mark.parametrize("provider", ["pgolf_kernels", "pull request 1530, on the CPU"])
@pytest.mark.parametrize("case", [whole_model()], ids=str)
def test_model(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, PROVIDERS, setup, work)
