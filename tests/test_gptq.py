"""GPTQ: golden vectors, fp64 PyTorch, edges, refusals, and the op's contract on CPU and GPU."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from golden import load_safetensors

from pgolf_kernels import GptqRecipe, gptq_quantize, gptq_quantize_many
from pgolf_kernels.gptq import gptq_columns, gptq_columns_reference, gptq_factor, gptq_factor_reference

GOLDEN = load_safetensors("gptq.safetensors")
CASE = re.compile(r"(\d+x\d+)(_dead)?\.pr(1530|1499)\.R(\d+)\.k([\d.]+)\.q")
CASES = sorted(key for key in GOLDEN if CASE.fullmatch(key))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
RECIPES = [GptqRecipe(), GptqRecipe.pr1499(bits=5), GptqRecipe(bits=8, clip_sigmas=20.0, column_order="natural")]


def golden_case(key: str) -> tuple[torch.Tensor, torch.Tensor, GptqRecipe]:
    shape, dead, recipe, limit, sigmas = CASE.fullmatch(key).groups()
    make = GptqRecipe.pr1499 if recipe == "1499" else GptqRecipe
    recipe = make(bits=int(limit).bit_length() + 1, clip_sigmas=float(sigmas))
    return GOLDEN[f"{shape}.W"], GOLDEN[f"{shape}{dead or ''}.H"], recipe


def proxy(weight: torch.Tensor, hessian: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in fp64."""
    error = weight.double() - codes.double() * scales.double()[:, None]
    return float((error @ hessian.double() * error).sum())


def problem(rows: int, cols: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0):
    """A weight matrix and the Hessian of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mix = torch.randn(cols, cols, generator=generator, dtype=torch.float64) / cols**0.5
    mix += torch.diag(torch.rand(cols, generator=generator, dtype=torch.float64) + 0.2)
    inputs = torch.randn(2 * cols, cols, generator=generator, dtype=torch.float64) @ mix
    return weight.to(device, dtype), (inputs.T @ inputs).to(device, dtype)


def column_arguments(shapes, dtype=torch.float32, device="cpu", *, residual=False, failed=0):
    """Arguments of the column op: factors with a dead column each."""
    columns = [[] for _ in range(6)]
    for seed, (rows, cols) in enumerate(shapes):
        weight, hessian = problem(rows, cols, dtype, device, seed)
        order = torch.randperm(cols, generator=torch.Generator().manual_seed(seed)).to(device, torch.int32)
        factor, status = gptq_factor(hessian[None], hessian.diagonal()[order.long()][None] * 1.01, order[None])
        order[cols // 3] = -1 - order[cols // 3]
        factor = torch.cholesky_inverse(factor[0]) if residual else factor[0]
        scales = weight.abs().amax(1) / 31
        for column, item in zip(columns, (weight, factor, order, scales, status[0] + failed, 31), strict=True):
            column.append(item)
    return (*columns, residual, 128)


# --- golden vectors --------------------------------------------------------------------------------------------------


def test_golden_cases_are_all_there():
    assert len(CASES) == 37


@pytest.mark.parametrize("key", CASES)
def test_golden_fp64(key):
    weight, hessian, recipe = golden_case(key)
    codes, scales = gptq_quantize_many([weight.double()], [hessian.double()], recipe)[0]
    assert torch.equal(codes, GOLDEN[key])
    assert torch.equal(scales, GOLDEN[key[:-1] + "s"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("key", CASES)
def test_golden_fp32(key, device):
    weight, hessian, recipe = golden_case(key)
    if device == "cuda" and hessian.diagonal().unique().numel() < hessian.shape[0]:
        # torch.argsort breaks ties in another order there: other codes, about the same loss.
        codes, scales = gptq_quantize_many([weight.float().cuda()], [hessian.float().cuda()], recipe)[0]
        loss = proxy(weight, hessian, codes.cpu(), scales.cpu())
        assert loss == pytest.approx(float(GOLDEN[key[:-1] + "proxy"]), rel=0.15)
        return
    codes, scales = gptq_quantize_many([weight.float().to(device)], [hessian.float().to(device)], recipe)[0]
    codes, scales = codes.cpu(), scales.cpu()
    assert torch.equal(scales, GOLDEN[key[:-1] + "s"])
    assert (codes == GOLDEN[key]).double().mean() >= 0.99
    assert proxy(weight, hessian, codes, scales) == pytest.approx(float(GOLDEN[key[:-1] + "proxy"]), rel=1e-3)


# --- against fp64 PyTorch --------------------------------------------------------------------------------------------


def textbook(weight, hessian, scales, limit, damping=0.01):
    """GPTQ as it is written in the papers: invert, factorise the inverse, update all later columns after each."""
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    order = torch.argsort(hessian.diagonal(), descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    work, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.int8)
    for j in range(work.shape[1]):
        code = (work[:, j] / scales).round().clamp(-limit, limit)
        codes[:, order[j]] = code.to(torch.int8)
        work[:, j:] -= torch.outer((work[:, j] - code * scales) / upper[j, j], upper[j, j:])
    return codes


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 300), (70, 1), (50, 127), (97, 129), (30, 530)])
def test_textbook(rows, cols):
    weight, hessian = problem(rows, cols, torch.float64)
    codes, scales = gptq_quantize(weight, hessian, bits=4, scale_rule="absmax")
    assert torch.equal(codes, textbook(weight, hessian, scales.double(), 7))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 5, 47, 96, 97, 300, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor(size, dtype, device):
    hessian = torch.stack([problem(1, size, dtype, device, seed)[1] for seed in (0, 1)])
    diagonal = hessian.diagonal(dim1=1, dim2=2) * 1.05
    order = torch.stack([torch.randperm(size) for _ in range(2)]).to(device, torch.int32)
    arguments = (hessian, diagonal.gather(1, order.long()), order)
    factor, status = gptq_factor(*arguments)
    exact, _ = gptq_factor_reference(*(x.double() if x.is_floating_point() else x for x in arguments))
    plain, _ = gptq_factor_reference(*arguments)
    assert status.tolist() == [0, 0]
    slack = 1e-6 if dtype == torch.float32 else 1e-14
    assert (factor - exact).norm() <= 2 * (plain - exact).norm() + slack * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("failed", [0, 3])
def test_columns_against_reference(residual, failed, device):
    shapes = [(1, 1), (7, 40), (100, 128), (33, 129), (70, 300)]
    arguments = column_arguments(shapes, device=device, residual=residual, failed=failed)
    wide = [[x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in row] for row in arguments[:6]]
    exact = gptq_columns_reference(*wide, residual, 128)
    for own, expected, shape in zip(gptq_columns(*arguments), exact, shapes, strict=True):
        assert own.shape == shape and own.dtype == torch.int8
        assert (own != expected).double().mean() <= (0 if failed else 2e-3)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("block", [1, 7, 64, 128, 1000])
def test_columns_fp64_any_block(residual, block):
    arguments = column_arguments([(50, 131), (3, 700)], torch.float64, residual=residual)
    for own, expected in zip(gptq_columns(*arguments[:7], block), gptq_columns_reference(*arguments), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets(isa):
    chosen = "textbook or fp64_any_block or test_factor or R31"
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", chosen]
    result = subprocess.run(command, env=os.environ | {"PGOLF_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_threads_do_not_change_codes():
    weight, hessian = problem(300, 200)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gptq_quantize(weight, hessian)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("device", DEVICES)
def test_many_equals_one_by_one(device):
    shared = problem(1, 96, device=device)[1]
    weights = [
        problem(rows, cols, device=device, seed=rows)[0] for rows, cols in ((64, 96), (32, 96), (10, 50), (64, 96))
    ]
    hessians = [shared, shared, problem(1, 50, device=device)[1], problem(1, 96, device=device, seed=9)[1]]
    recipes = [GptqRecipe(), GptqRecipe.pr1499(), {"bits": 8, "clip_sigmas": 20.0}, GptqRecipe()]
    for i, (codes, scales) in enumerate(gptq_quantize_many(weights, hessians, recipes)):
        alone = gptq_quantize_many([weights[i]], [hessians[i]], [recipes[i]])[0]
        assert (codes == alone[0]).double().mean() >= (1.0 if device == "cpu" else 0.999)
        assert torch.equal(scales, alone[1])
    assert gptq_quantize_many([], [], GptqRecipe()) == []


def test_half_precision_weights():
    weight, hessian = problem(40, 80)
    for dtype in (torch.bfloat16, torch.float16):
        codes, scales = gptq_quantize(weight.to(dtype), hessian)
        expected = gptq_quantize(weight.to(dtype).float(), hessian)
        assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])


# --- settings and edges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("rule", ["sigma", "absmax", "search"])
def test_bits_and_rules(bits, rule):
    weight, hessian = problem(30, 60)
    codes, scales = gptq_quantize(weight, hessian, bits=bits, clip_sigmas=3.0, scale_rule=rule)
    limit = 2 ** (bits - 1) - 1
    assert int(codes.abs().max()) <= limit
    rounded = (weight / scales.float()[:, None]).round().clamp(-limit, limit)
    assert proxy(weight, hessian, codes, scales) < proxy(weight, hessian, rounded, scales)
    ranges = {"sigma": 3.0 * weight.std(1), "absmax": weight.abs().amax(1)}
    if rule in ranges:
        torch.testing.assert_close(scales, (ranges[rule] / limit).half(), rtol=1e-3, atol=0)
    else:
        quantiles = torch.quantile(weight.abs(), torch.tensor([0.999, 0.9995, 0.9999, 0.99999, 1.0]), dim=1) / limit
        errors = [
            ((weight - (weight / s[:, None]).round().clamp(-limit, limit) * s[:, None]) ** 2).sum(1) for s in quantiles
        ]
        best = quantiles.gather(0, torch.stack(errors).argmin(0)[None])[0]
        torch.testing.assert_close(scales.float(), best, rtol=2e-3, atol=0)


def test_given_scales_and_rounding():
    weight, hessian = problem(20, 40, torch.float64)
    given = weight.abs().amax(1) / 31 * 1.0003
    before, stored = gptq_quantize(weight, hessian, scales=given)
    assert torch.equal(stored, given.half())
    assert torch.equal(before, textbook(weight, hessian, given.half().double(), 31))
    after, stored = gptq_quantize(weight, hessian, scales=given, round_scales="after")
    assert torch.equal(stored, given.half())
    assert torch.equal(after, textbook(weight, hessian, given, 31))


def test_rows_without_spread():
    """A constant row comes back as itself, a zero row as zero; the published code loses the first."""
    weight, hessian = problem(5, 64)
    weight[0], weight[1], weight[2], weight[3] = 3.7, 0.0, -1e-6, 30000.0
    codes, scales = gptq_quantize(weight, hessian)
    back = codes.float() * scales.float()[:, None]
    assert torch.all(scales > 0) and torch.all(scales.isfinite())
    torch.testing.assert_close(back[0], weight[0], rtol=1e-3, atol=0)
    assert torch.all(codes[1] == 0)
    torch.testing.assert_close(back[2], weight[2], rtol=0.3, atol=0)
    torch.testing.assert_close(back[3], weight[3], rtol=1e-3, atol=0)


def test_dead_columns():
    weight, hessian = problem(20, 50)
    hessian[7] = hessian[:, 7] = 0
    codes, _ = gptq_quantize(weight, hessian)
    kept, scales = gptq_quantize(weight, hessian, dead_columns="keep")
    assert torch.all(codes[:, 7] == 0)
    assert torch.equal(kept[:, 7], (weight[:, 7] / scales.float()).round().to(torch.int8))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("feedback", ["cholesky", "inverse"])
def test_not_positive_definite(feedback, device):
    weight, hessian = problem(20, 150, device=device)
    hessian[120, 120] = -hessian.diagonal().max() * 150
    settings = {"error_feedback": feedback, "damping": 0.0}
    with pytest.raises(ValueError, match=r"hessians\[0\]: not positive definite"):
        gptq_quantize(weight, hessian, **settings)
    codes, scales = gptq_quantize(weight, hessian, on_singular="diagonal", **settings)
    assert torch.equal(codes, (weight / scales.float()[:, None]).round().clamp(-31, 31).to(torch.int8))


@pytest.mark.parametrize("device", DEVICES)
def test_not_finite(device):
    weight, hessian = problem(4, 8, device=device)
    bad = weight.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"weights\[0\].*not finite"):
        gptq_quantize(bad, hessian)
    bad = hessian.clone()
    bad[1, 2] = bad[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"hessians\[0\]"):
        gptq_quantize(weight, bad)
    with pytest.raises(ValueError, match=r"scales of weights\[0\]"):
        gptq_quantize(weight, hessian, scales=torch.zeros(4, device=device))


def test_refusals():
    weight, hessian = problem(4, 8)
    for settings, error in (
        ({"bits": 1}, "bits: got 1"),
        ({"bits": 9}, "bits: got 9"),
        ({"clip_sigmas": -1.0}, "clip_sigmas"),
        ({"damping": float("nan")}, "damping"),
        ({"block_size": 0}, "block_size"),
        ({"scale_rule": "best"}, "scale_rule: got 'best', wanted one of"),
        ({"column_order": "random"}, "column_order"),
        ({"scales": torch.ones(3)}, r"scales of weights\[0\]: got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=error):
            gptq_quantize(weight, hessian, **settings)
    with pytest.raises(TypeError, match=r"weights\[0\]: got torch.int32"):
        gptq_quantize(weight.int(), hessian)
    with pytest.raises(ValueError, match=r"hessians\[0\]: got shape \(7, 7\)"):
        gptq_quantize(weight, hessian[:7, :7])
    with pytest.raises(ValueError, match=r"weights\[0\]: got shape \(0, 8\)"):
        gptq_quantize(weight[:0], hessian)
    with pytest.raises(ValueError, match="recipes: got 2 entries, wanted 1"):
        gptq_quantize_many([weight], [hessian], [GptqRecipe(), GptqRecipe()])
    arguments = list(column_arguments([(4, 8)]))
    arguments[2] = [torch.zeros(8, dtype=torch.int32)]
    with pytest.raises(IndexError, match=r"orders\[0\]: got \[0, 0, .*wanted a permutation of 0 to 7"):
        gptq_columns(*arguments)


# --- the op's contract -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    arguments = column_arguments([(5, 40), (3, 130)], device=device)
    torch.library.opcheck(torch.ops.pgolf.gptq_columns.default, arguments)
    hessian = problem(1, 40, device=device)[1][None]
    order = torch.arange(40, dtype=torch.int32, device=device)[None]
    diagonal = hessian.diagonal(dim1=1, dim2=2).clone()
    torch.library.opcheck(torch.ops.pgolf.gptq_factor.default, (hessian, diagonal, order))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_and_autocast(device):
    arguments = column_arguments([(5, 40), (3, 130)], device=device)
    eager = gptq_columns(*arguments)
    compiled = torch.compile(lambda *a: gptq_columns(*a), fullgraph=True)(*arguments)
    with torch.autocast(device, torch.bfloat16):
        under_autocast = gptq_columns(*arguments)
    for a, b, c in zip(eager, compiled, under_autocast, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_not_differentiable():
    arguments = column_arguments([(5, 40)])
    arguments[0][0].requires_grad_()
    assert not gptq_columns(*arguments)[0].requires_grad  # integers carry no gradient
    hessian = problem(1, 8)[1][None].requires_grad_()
    factor, _ = gptq_factor(
        hessian, hessian.detach().diagonal(dim1=1, dim2=2), torch.arange(8, dtype=torch.int32)[None]
    )
    with pytest.raises(RuntimeError, match="not differentiable"):
        factor.sum().backward()


@pytest.mark.gpu
def test_columns_in_a_cuda_graph_without_waiting():
    arguments = column_arguments([(300, 512), (64, 700), (1, 3)], device="cuda")
    expected = gptq_columns(*arguments)
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)
    start = time.perf_counter()
    gptq_columns(*arguments)
    assert time.perf_counter() - start < 0.1
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = gptq_columns(*arguments)
    for code in captured:
        code.fill_(99)
    graph.replay()
    torch.cuda.synchronize()
    for own, code in zip(captured, expected, strict=True):
        assert torch.equal(own, code)


@pytest.mark.gpu
def test_other_stream(device="cuda:0"):
    arguments = column_arguments([(70, 300)], device=device)
    expected = gptq_columns(*arguments)[0]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        weight = arguments[0][0] * 1.0
        codes = gptq_columns([weight], *arguments[1:])[0]
    stream.synchronize()
    assert torch.equal(codes, expected)


@pytest.mark.gpu
def test_second_device(second_gpu):
    test_other_stream(second_gpu)


@pytest.mark.gpu
def test_more_matrices_than_one_launch_takes():
    arguments = column_arguments([(3, 20)], device="cuda")
    many = [row * 450 for row in arguments[:6]]
    expected = gptq_columns(*arguments)[0]
    assert all(torch.equal(codes, expected) for codes in gptq_columns(*many, False, 128))
