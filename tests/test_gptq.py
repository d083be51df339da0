"""GPTQ against the golden vectors, against plain PyTorch in fp64, and at its edges."""

import re

import pytest
import torch
from golden import load_safetensors

from pgolf_kernels.gptq import GptqRecipe, gptq_quantize_many

GOLDEN = load_safetensors("gptq.safetensors")
CASE = re.compile(r"(\d+x\d+)(_dead)?\.pr(1530|1499)\.R(\d+)\.k([\d.]+)\.q")
CASES = sorted(key for key in GOLDEN if CASE.fullmatch(key))


def golden_case(key: str) -> tuple[torch.Tensor, torch.Tensor, GptqRecipe]:
    shape, dead, recipe, limit, sigmas = CASE.fullmatch(key).groups()
    bits = int(limit).bit_length() + 1
    make = GptqRecipe.pr1499 if recipe == "1499" else GptqRecipe
    return GOLDEN[f"{shape}.W"], GOLDEN[f"{shape}{dead or ''}.H"], make(bits=bits, clip_sigmas=float(sigmas))


def proxy(weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in fp64."""
    error = weight.double() - codes.double() * scales.double()[:, None]
    return float((error @ hessian.double() * error).sum())


def problem(rows: int, cols: int, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight matrix and a Hessian with correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64) / cols**0.5
    mix += torch.diag(torch.rand(cols, generator=generator, dtype=torch.float64) + 0.2)
    inputs = torch.randn(2 * cols, cols, generator=generator, dtype=torch.float64) @ mix
    return weight.to(dtype), (inputs.T @ inputs).to(dtype)


def test_golden_cases_are_all_there():
    assert len(CASES) == 37


@pytest.mark.parametrize("key", CASES)
def test_golden_fp64(key):
    weight, hessian, recipe = golden_case(key)
    codes, scales = gptq_quantize_many([weight.double()], [hessian.double()], recipe)[0]
    assert torch.equal(codes, GOLDEN[key])
    assert torch.equal(scales, GOLDEN[key[:-1] + "s"])


@pytest.mark.parametrize("key", CASES)
def test_golden_fp32(key):
    weight, hessian, recipe = golden_case(key)
    codes, scales = gptq_quantize_many([weight.float()], [hessian.float()], recipe)[0]
    assert torch.equal(scales, GOLDEN[key[:-1] + "s"])
    assert (codes == GOLDEN[key]).double().mean() >= 0.99
    assert proxy(weight, hessian, codes, scales) == pytest.approx(float(GOLDEN[key[:-1] + "proxy"]), rel=1e-3)
