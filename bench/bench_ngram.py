"""N-gram hints over a token stream, beside the public kernel (pull request 1514), its table set-up counted.

PGOLF_BENCH_TOKENS names a file of uint16 tokens; PGOLF_BENCH_TOKENIZER the SentencePiece model whose word boundaries
the voters use. Without them a synthetic stream is timed. The public kernel is compiled from PGOLF_PEER_DIR, as it
compiles itself; at five orders its tables take 10.7 GB.
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

from bench.common import Absent, Call, Work
from pgolf_kernels import ngram_hints

ORDERS = (8, 10, 12, 14, 16)
VOCABULARY = 8192
SYNTHETIC_TOKENS = 4_000_000
PEER_SOURCE = "pr1514/ngram/fused_expert_kernel.cpp"


@dataclass(frozen=True)
class Case:
    name: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.name}, {self.tokens} tokens"


@functools.cache
def stream() -> Tensor:
    path = os.environ.get("PGOLF_BENCH_TOKENS")
    if path:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint16))
    # Words by Zipf's law, with passages that come again.
    draw = np.random.default_rng(0)
    tokens = (draw.zipf(1.2, SYNTHETIC_TOKENS) % VOCABULARY).astype(np.uint16)
    for start in draw.integers(0, SYNTHETIC_TOKENS - 200, SYNTHETIC_TOKENS // 400):
        source = draw.integers(0, max(1, start))
        tokens[start : start + 60] = tokens[source : source + 60]
    return torch.from_numpy(tokens)


@functools.cache
def flags() -> dict[str, Tensor]:
    path = os.environ.get("PGOLF_BENCH_TOKENIZER")
    if not path:
        starts = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)) < 0.6
        return {"has_leading_space": starts, "is_boundary": torch.arange(VOCABULARY) < 3}
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    boundary = [pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i) for i in range(len(pieces))]
    starts = [pieces.id_to_piece(i).startswith("\u2581") for i in range(len(pieces))]
    return {"has_leading_space": torch.tensor(starts), "is_boundary": torch.tensor(boundary)}


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    return {"tokens": stream(), "flags": flags()}


def work(case: Case) -> Work:
    """Two table lines for each order and token."""
    return Work(bytes=case.tokens * len(ORDERS) * 2 * 64)


def ours(hash: str, *, voters: bool = True) -> Callable[[Case, dict[str, Any]], Call]:
    def build(case: Case, x: dict[str, Any]) -> Call:
        return lambda: ngram_hints(x["tokens"], hash=hash, **(x["flags"] if voters else {}))

    return build


@functools.cache
def public_kernel() -> ctypes.CDLL:
    folder = os.environ.get("PGOLF_PEER_DIR")
    if not folder or not (Path(folder) / PEER_SOURCE).is_file():
        raise Absent(f"no {PEER_SOURCE} in PGOLF_PEER_DIR")
    library = Path(tempfile.mkdtemp()) / "public.so"
    command = [
        "g++",
        "-O3",
        "-march=native",
        "-std=c++17",
        "-fPIC",
        "-shared",
        Path(folder) / PEER_SOURCE,
        "-o",
        library,
    ]
    subprocess.run(command, check=True)
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


@pytest.mark.parametrize("provider", PROVIDERS)
def test_stream(bench: Any, provider: str) -> None:
    bench(Case("five orders", len(stream())), provider, PROVIDERS, setup, work)
