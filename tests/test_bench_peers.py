"""What benches time side by side: every provider of a case computes the same from the same inputs."""

import ast
import inspect

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

import pgolf_kernels
from bench import (
    bench_attention,
    bench_batched_lora,
    bench_embedding,
    bench_gptq,
    bench_head_ops,
    bench_residual,
    bench_softcap_ce,
    bench_stepped_lora,
)
from bench.__main__ import ROOT, bench_files
from bench.common import DEVICE
from bench.peers import Absent

# Settings; and what calls the same as a function that is timed: for one matrix, for coders.
UNTIMED = {"attention_backend_info", "set_attention_backend", "gptq_quantize", "encode_codes", "decode_codes"}
HEADS = bench_head_ops.Case(rows=2, length=24, dim=16, width=32)
SETS = [
    (bench_batched_lora, "FORWARD BOTH", "setup", bench_batched_lora.Case(3, 5, 16, (12,), 4, torch.float32)),
    (bench_batched_lora, "FORWARD BOTH", "setup", bench_batched_lora.Case(3, 5, 16, (12, 8), 4, torch.float32)),
    (bench_stepped_lora, "PROVIDERS", "setup", bench_stepped_lora.Case(3, 7, 16, 8, 4)),
    (bench_residual, "FORWARD BOTH SUM_FORWARD SUM_BOTH", "setup", bench_residual.Case(3, 6, 16)),
    (bench_residual, "NORM_FORWARD NORM_BOTH", "setup", bench_residual.Case(1, 6, 16)),
    (bench_embedding, "BOTH", "setup", bench_embedding.Case(60, 20, 8)),
    (bench_attention, "FORWARD BOTH", "setup", bench_attention.Case("three", (40, 1, 87))),
    (bench_head_ops, "ROPE_FORWARD ROPE_BOTH XSA_FORWARD XSA_BOTH", "setup", HEADS),
    (bench_head_ops, "READERS QKV_FORWARD QKV_BOTH", "setup_projected", HEADS),
    (bench_softcap_ce, "SCORE", "setup_score", bench_softcap_ce.Case(10, 30, 16)),
]
TABLES = [
    pytest.param(suite, table, setup, case, id=f"{suite.__name__.removeprefix('bench.bench_')} {table} {case}")
    for suite, tables, setup, case in SETS
    for table in tables.split()
]
IN_FLOAT32 = pytest.mark.skipif(DEVICE.type == "cuda", reason="benches take float32 on a CPU, and roundings on a GPU")


def results(build, setup, case):
    """Of the second call: a call that steps changes what the next one reads."""
    torch.manual_seed(0)
    call = build(case, setup(case, DEVICE))
    call()
    return tree_leaves(call())


@IN_FLOAT32
@pytest.mark.parametrize(("suite", "table", "setup", "case"), TABLES)
def test_providers_agree(suite, table, setup, case, monkeypatch):
    """What is compiled runs eagerly here: the expression is what can be wrong."""
    monkeypatch.setattr(bench_embedding.data, "tokens", lambda: np.arange(70) % 23)
    monkeypatch.setitem(bench_stepped_lora.SETTINGS, "lr", 0.1)
    providers = getattr(suite, table)
    wanted = results(next(iter(providers.values())), getattr(suite, setup), case)
    compared = 0
    with torch.compiler.set_stance("force_eager"):
        for name, build in list(providers.items())[1:]:
            try:
                found = results(build, getattr(suite, setup), case)
            except Absent:
                continue
            compared += 1
            torch.testing.assert_close(
                found, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert compared


@pytest.mark.parametrize("case", [bench_gptq.single(24, 40), bench_gptq.single(8, 200)], ids=str)
def test_loops_over_columns_agree_with_gptq(case):
    """Codes but for those on a rounding boundary; scales are theirs."""
    torch.manual_seed(0)
    inputs = bench_gptq.setup(case, DEVICE)
    with torch.compiler.set_stance("force_eager"):
        ours, plain, compiled = (
            getattr(bench_gptq, name)(case, inputs)()[0] for name in ("ours", "loop", "compiled_loop")
        )
    for codes, scales in (plain, compiled):
        assert (codes != ours[0]).sum() <= codes.numel() // 500
        torch.testing.assert_close(scales, ours[1])


def test_every_public_function_is_timed():
    functions = {name for name in pgolf_kernels.__all__ if inspect.isfunction(getattr(pgolf_kernels, name))}
    timed = {
        alias.name
        for file in bench_files().values()
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pgolf_kernels")
        for alias in node.names
    }
    assert functions >= UNTIMED
    assert functions - timed - UNTIMED == set()
