"""N-gram hints over a token stream, beside the public kernel (pull request 1514), its table set-up counted.

Two streams: the bundled text, and the shard that PGOLF_BENCH_TOKENS names (with it PGOLF_BENCH_TOKENIZER, the
SentencePiece model whose word boundaries the voters use; made-up boundaries without it). The public kernel is compiled
from PGOLF_PEER_DIR, as it compiles itself; at five orders its tables take 10.7 GB.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import data
from bench.common import Call, Work
from bench.peers import peer_file
from model.data.tokenizer import Tokenizer
from pgolf_kernels import ngram_hints

ORDERS = (8, 10, 12, 14, 16)
BUNDLED, GIVEN = "bundled text", "given text"
PEER_SOURCE = "pr1514/ngram/fused_expert_kernel.cpp"


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int

    def __str__(self) -> str:
        return f"five orders, {self.name} of {self.tokens} tokens"


@functools.cache
def stream(name: str) -> Tensor:
    found = data.given_tokens() if name == GIVEN else data.bundled_tokens()
    return torch.from_numpy(np.array(found))


@functools.cache
def flags(name: str) -> dict[str, Tensor]:
    """Which tokens start a word, and which none may cross."""
    path = os.environ.get("PGOLF_BENCH_TOKENIZER")
    if name == GIVEN and not path:
        vocabulary = int(stream(name).max()) + 1
        starts = torch.rand(vocabulary, generator=torch.Generator().manual_seed(0)) < 0.6
        return {"has_leading_space": starts, "is_boundary": torch.arange(vocabulary) < 3}
    tables = Tokenizer.load(path).byte_tables() if name == GIVEN and path else data.bundled_text().byte_tables
    return {n: torch.from_numpy(np.asarray(getattr(tables, n), bool)) for n in ("has_leading_space", "is_boundary")}


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    return {"tokens": stream(case.name), "flags": flags(case.name)}


def work(case: Case) -> Work:
    """A token read, a hint and a beta written; what tables cost beyond that is each implementation's own."""
    return Work(bytes=case.tokens * (2 + 4 + 8))


def ours(hash: str, *, voters: bool = True) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        return lambda: ngram_hints(x["tokens"], hash=hash, **(x["flags"] if voters else {}))

    return build


@functools.cache
def public_kernel() -> ctypes.CDLL:
    source, library = peer_file(PEER_SOURCE), Path(tempfile.mkdtemp()) / "public.so"
    options = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared"]
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    kernel = ctypes.CDLL(str(library))
    pointer, number = ctypes.c_void_p, ctypes.c_double
    kernel.ctxmixer_new.restype = pointer
    kernel.ctxmixer_new.argtypes = [*[number] * 6, ctypes.c_int, number, ctypes.c_int]
    kernel.ctxmixer_set_tokens.argtypes = [pointer, pointer, ctypes.c_int64]
    kernel.ctxmixer_set_luts.argtypes = [pointer] * 4
    kernel.ctxmixer_get_hints_batch.argtypes = [pointer, pointer, ctypes.c_int, pointer, pointer]
    kernel.ctxmixer_delete.argtypes = [pointer]
    return kernel


def public(case: Case, x: dict[str, Any]) -> Call:
    kernel = public_kernel()

    def call() -> tuple[np.ndarray, np.ndarray]:
        tokens = x["tokens"].numpy().astype(np.int64)
        positions = np.arange(1, len(tokens), dtype=np.int64)
        hints, betas = np.full(len(positions), -1, np.int32), np.zeros(len(positions))
        starts, boundary = (x["flags"][name].numpy().astype(np.uint8) for name in ("has_leading_space", "is_boundary"))
        lengths = np.zeros(len(starts), np.int16)
        mixer = kernel.ctxmixer_new(2.0, 0.1, 0.25, 0.0, 0.8, 0.0, 26, 1.0, 2)
        kernel.ctxmixer_set_tokens(mixer, tokens.ctypes.data, len(tokens))
        kernel.ctxmixer_set_luts(mixer, lengths.ctypes.data, starts.ctypes.data, boundary.ctypes.data)
        kernel.ctxmixer_get_hints_batch(
            mixer, positions.ctypes.data, len(positions), hints.ctypes.data, betas.ctypes.data
        )
        kernel.ctxmixer_delete(mixer)
        return hints, betas

    return call


PROVIDERS = {
    "pgolf_kernels, compatible": ours("compatible"),
    "pgolf_kernels, full": ours("full"),
    "pgolf_kernels, compatible, no voters": ours("compatible", voters=False),
    "pgolf_kernels, full, no voters": ours("full", voters=False),
    "pull request 1514": public,
}


STREAMS = [BUNDLED] + [GIVEN] * (data.given_tokens() is not None)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", STREAMS)
def test_stream(bench: Any, name: str, provider: str) -> None:
    bench(Case(name, len(stream(name))), provider, PROVIDERS, setup, work)
