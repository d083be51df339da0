"""N-gram hints: golden vectors, plain Python, causality, edges, refusals, the op's contract."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden import load_npz

from pgolf_kernels import ngram_hints
from pgolf_kernels.ngram import ngram_hints_reference

GOLDEN = load_npz("ngram.npz")
CASES = {
    "main": {"tokens": 300000},
    "bits12": {"table_bits": 12},
    "stride1": {"orders": range(8, 17)},
    "experts": {"within_beta": 0.92, "word_beta": 0.5},
    "scale": {"tokens": 50000, "threshold_scale": 1.25, "base_beta": 1.5, "agree_bonus": 0.3},
}
HASHES = ["compatible", "full"]
# Packed entries need a large table; small ones, and long orders of large tokens, use the wide form.
TABLES = [((8, 10, 12, 14, 16), 26), ((8, 10, 12, 14, 16), 10), ((1, 2, 5, 32), 9), ((3,), 16), ((9, 24), 25)]


def flags(prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(GOLDEN[prefix + name]) for name in ("has_leading_space", "is_boundary")}


def stream(length: int, vocabulary: int, seed: int = 0) -> list[int]:
    """Random tokens with many repeated passages."""
    choose = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < length:
        start = choose.randrange(len(tokens) + 1)
        if choose.random() < 0.15:
            tokens += tokens[start : start + choose.randrange(1, 60)]
        else:
            tokens.append(choose.randrange(vocabulary))
    return tokens[:length]


def assert_same(first, second) -> None:
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    settings = {"tokens": 100000, "table_bits": 20} | CASES[case]
    tokens = torch.from_numpy(GOLDEN["tokens"][: settings.pop("tokens")])
    hints, betas = ngram_hints(tokens, **settings, **flags())
    assert np.array_equal(hints.numpy(), GOLDEN[f"{case}.hints"])
    assert np.array_equal(betas.numpy(), GOLDEN[f"{case}.beta_values"][GOLDEN[f"{case}.beta_index"]])


def test_golden_tilt_stream():
    hints, betas = ngram_hints(torch.from_numpy(GOLDEN["tilt.tokens"]), table_bits=20, **flags("tilt."))
    assert np.array_equal(hints.numpy(), GOLDEN["tilt.hints"])
    assert np.array_equal(betas.numpy(), GOLDEN["tilt.betas"])


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize(("orders", "bits"), TABLES)
@pytest.mark.parametrize("vocabulary", [2, 40, 8000, 65536])
def test_against_plain_python(vocabulary, orders, bits, hash):
    tokens = stream(3000, vocabulary, seed=vocabulary)
    settings = {"orders": orders, "table_bits": bits, "threshold_scale": 0.9, "base_beta": 1.7, "hash": hash}
    expected_hints, expected_betas = ngram_hints_reference(tokens, **settings)
    hints, betas = ngram_hints(torch.tensor(tokens), **settings)
    assert hints.tolist() == expected_hints
    assert betas.tolist() == expected_betas
    assert vocabulary == 65536 or max(expected_hints) >= 0


@pytest.mark.parametrize("bits", [8, 26])
def test_dropped_probes_and_wrapping_count(bits):
    """70,000 repeats wrap the best count and pass what a packed entry holds; at 8 bits keys are dropped."""
    tokens = stream(2000, 3000) + [7] * 70000 + [5, 6] * 2000 + stream(2000, 3000)
    expected = ngram_hints_reference(tokens, orders=(8,), table_bits=bits)
    hints, betas = ngram_hints(torch.tensor(tokens), orders=(8,), table_bits=bits)
    assert hints.tolist() == expected[0] and betas.tolist() == expected[1]
    if bits == 26:
        assert hints[60000] == 7 and hints[69000] == -1  # wrapped: confidence near zero


@pytest.mark.parametrize("hash", HASHES)
def test_threads_do_not_change_the_result(hash):
    tokens = torch.from_numpy(np.tile(GOLDEN["tokens"], 4)).roll(3)  # more than one block and more than one part
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ngram_hints(tokens, table_bits=22, hash=hash, **flags()))
    finally:
        torch.set_num_threads(before)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_narrower_instruction_sets(isa):
    command = [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "plain_python and 8000"]
    result = subprocess.run(command, env=os.environ | {"PGOLF_ISA": isa}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("hash", HASHES)
@pytest.mark.parametrize("voters", [False, True])
def test_causality(hash, voters):
    """Hint and beta at p stay bit for bit the same whatever the token at p and those after it are."""
    tokens = torch.from_numpy(GOLDEN["tokens"][:20000].astype(np.int64))
    settings = {"table_bits": 18, "hash": hash, "within_beta": 0.9, "word_beta": 0.5} | (flags() if voters else {})
    hints, betas = ngram_hints(tokens, **settings)
    generator = torch.Generator().manual_seed(0)
    for p in (1, 8, 17, 500, 9999, 10000, 19999):
        noise = torch.randint(8192, (len(tokens) - p,), generator=generator)
        for future in (noise, torch.ones_like(noise), tokens[p:].flip(0), (tokens[p:] + 1) % 8192):
            changed = torch.cat([tokens[:p], future])
            assert_same([x[: p + 1] for x in ngram_hints(changed, **settings)], (hints[: p + 1], betas[: p + 1]))
        only_this = tokens.clone()
        only_this[p] = (tokens[p] + 4000) % 8192
        assert_same([x[: p + 1] for x in ngram_hints(only_this, **settings)], (hints[: p + 1], betas[: p + 1]))


def test_prefix_property():
    """Hints of a prefix are a prefix of the hints."""
    tokens = torch.from_numpy(GOLDEN["tokens"][:30000])
    for hash in HASHES:
        hints, betas = ngram_hints(tokens, hash=hash, table_bits=16, **flags())
        for length in (0, 1, 2, 7, 9, 100, 12345):
            assert_same(
                ngram_hints(tokens[:length], hash=hash, table_bits=16, **flags()), (hints[:length], betas[:length])
            )


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.int32, torch.int64])
def test_token_types(dtype):
    tokens = torch.from_numpy(GOLDEN["tokens"][:5000].astype(np.int64))
    strided = torch.stack([tokens, tokens], 1).to(dtype)[:, 0]
    assert_same(ngram_hints(strided, table_bits=14), ngram_hints(tokens, table_bits=14))


def test_modes_differ():
    """In crowded tables the published form drops contexts, and its hash takes some for others."""
    tokens = torch.from_numpy(GOLDEN["tokens"])
    compatible, full = (ngram_hints(tokens, table_bits=12, hash=hash)[0] for hash in HASHES)
    assert not torch.equal(compatible, full)


def test_refusals():
    tokens = torch.arange(100)
    for arguments, settings, error, message in (
        ((tokens.float(),), {}, TypeError, "tokens: got torch.float32"),
        ((tokens[None],), {}, ValueError, r"tokens: got shape \(1, 100\)"),
        ((tokens - 1,), {}, IndexError, "tokens: got values from -1 to 98"),
        ((tokens + 65500,), {}, IndexError, "tokens: got values from 65500 to 65599"),
        ((tokens,), {"orders": ()}, ValueError, r"orders: got \(\)"),
        ((tokens,), {"orders": (8, 8)}, ValueError, "orders"),
        ((tokens,), {"orders": (0, 8)}, ValueError, "orders"),
        ((tokens,), {"orders": (33,)}, ValueError, "orders"),
        ((tokens,), {"table_bits": 3}, ValueError, "table_bits: got 3"),
        ((tokens,), {"table_bits": 33}, ValueError, "table_bits: got 33"),
        ((tokens,), {"base_beta": float("nan")}, ValueError, "base_beta: got nan"),
        ((tokens,), {"hash": "best"}, ValueError, "hash: got 'best'"),
        ((tokens,), {"is_boundary": torch.zeros(100, dtype=torch.bool)}, ValueError, "has_leading_space: got None"),
        ((tokens,), {"has_leading_space": torch.zeros(100)}, TypeError, "has_leading_space: got torch.float32"),
        ((tokens,), {"has_leading_space": torch.zeros(99, dtype=torch.bool)}, IndexError, "has_leading_space: got 99"),
    ):
        with pytest.raises(error, match=message):
            ngram_hints(*arguments, **settings)


@pytest.mark.gpu
def test_refuses_cuda():
    with pytest.raises(ValueError, match="tokens: got device cuda:0, wanted a CPU tensor"):
        ngram_hints(torch.arange(100, device="cuda"))


def test_opcheck_and_compile():
    tokens = torch.tensor(stream(500, 30))
    arguments = (tokens, [4, 8], 12, [1.0, 2.0, 0.1, 0.25, 0.0, 0.8, 0.0], torch.rand(30) < 0.5, None, False)
    torch.library.opcheck(torch.ops.pgolf.ngram_hints.default, arguments)
    eager = ngram_hints(tokens, orders=(4, 8), table_bits=12)
    compiled = torch.compile(lambda t: ngram_hints(t, orders=(4, 8), table_bits=12), fullgraph=True)(tokens)
    assert_same(eager, compiled)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(eager, ngram_hints(tokens, orders=(4, 8), table_bits=12))


@pytest.mark.long
def test_memory_of_forty_million_tokens():
    """Five orders over 40.5 M tokens stay below 6 GB, in the worst case for table space: few repeats."""
    program = """
import resource, torch
from pgolf_kernels import ngram_hints
tokens = torch.randint(8192, (40_540_161,), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
ngram_hints(tokens, hash=HASH)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    for hash in HASHES:
        command = [sys.executable, "-c", program.replace("HASH", repr(hash))]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(result.stdout) * 1024 <= 6e9
