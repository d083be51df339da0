"""Byte shuffle beside memcpy, blosc2 and bitshuffle; entropy coders beside general compressors on real codes.

The coders run on the codes of an artifact named by PGOLF_CODES (any run's model.pgolf): codes drawn at random say
nothing about what a coder can gain. A row's time is that of encoding; behind it stand bytes, bits a code, what is
above the order-0 entropy, and the time of decoding.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.common import Absent, Call, Row, Work, peer_package
from bench.conftest import TABLE
from model.artifact import read_artifact
from model.codecs import CODECS
from model.size import entropy_of
from pgolf_kernels.packing import byte_shuffle, byte_unshuffle

BYTES = 35_913_728  # codes of the 35.9 M-parameter model


@dataclass(frozen=True)
class Case:
    stride: int

    def __str__(self) -> str:
        return f"stride {self.stride}, {BYTES / 1e6:.1f} MB"


CASES = [Case(2), Case(4), Case(8)]


def setup(case: Case, device: torch.device) -> dict[str, Any]:
    data = np.random.default_rng(0).integers(0, 256, BYTES, dtype=np.uint8)
    return {"data": data, "out": np.zeros_like(data)}


def work(case: Case) -> Work:
    return Work(bytes=2 * BYTES)


def ours(case: Case, x: dict[str, Any]) -> Call:
    return lambda: byte_shuffle(x["data"], case.stride, out=x["out"])


def unshuffle(case: Case, x: dict[str, Any]) -> Call:
    return lambda: byte_unshuffle(x["data"], case.stride, out=x["out"])


def memcpy(case: Case, x: dict[str, Any]) -> Call:
    return lambda: np.copyto(x["out"], x["data"])


def numpy_slices(case: Case, x: dict[str, Any]) -> Call:
    return lambda: np.copyto(x["out"].reshape(case.stride, -1), x["data"].reshape(-1, case.stride).T)


def blosc2(case: Case, x: dict[str, Any]) -> Call:
    """Its shuffle filter without compression, on one thread; it also writes its own frame."""
    package = peer_package("blosc2")
    package.set_nthreads(1)
    options = {"typesize": case.stride, "clevel": 0, "filter": package.Filter.SHUFFLE}
    return lambda: package.compress(x["data"], **options)


def bitshuffle(case: Case, x: dict[str, Any]) -> Call:
    package = peer_package("bitshuffle")
    words = x["data"].view(f"u{case.stride}")
    return lambda: package.bitshuffle(words)


SHUFFLES = {
    "pgolf": ours,
    "pgolf, unshuffle": unshuffle,
    "memcpy": memcpy,
    "numpy": numpy_slices,
    "blosc2": blosc2,
    "bitshuffle": bitshuffle,
}


@pytest.mark.parametrize("provider", SHUFFLES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_byte_shuffle(bench: Any, case: Case, provider: str) -> None:
    bench(case, provider, SHUFFLES, setup, work)


@pytest.fixture(scope="module")
def codes() -> list[np.ndarray]:
    path = os.environ.get("PGOLF_CODES")
    if not path:
        pytest.skip("PGOLF_CODES does not name an artifact; random codes would say nothing")
    return [matrix.codes.numpy() for matrix in read_artifact(path).quantized.matrices]


def nearest_row_order(matrix: np.ndarray) -> np.ndarray:
    """Greedy: after each row the one left with the least L1 distance to it (pull request 1855)."""
    rows = matrix.astype(np.int16)
    left = np.arange(1, len(rows))
    order = [0]
    while len(left):
        nearest = int(np.abs(rows[left] - rows[order[-1]]).sum(axis=1, dtype=np.int32).argmin())
        order.append(int(left[nearest]))
        left = np.delete(left, nearest)
    return np.array(order, np.uint16)


def lrzip(matrices: Sequence[np.ndarray], folder: Path) -> int:
    """Bytes of `lrzip -z -L 9` a group of equal shapes, rows sorted and transposed, with the orders beside them."""
    program = shutil.which("lrzip")
    if program is None:
        raise Absent("no lrzip on the PATH")
    total = 0
    for number, (_, group) in enumerate(groupby(matrices, key=lambda m: m.shape)):
        for kind, pieces in zip(("codes", "order"), _sorted_rows(list(group)), strict=True):
            file = folder / f"{number}.{kind}"
            file.write_bytes(b"".join(pieces))
            subprocess.run([program, "-q", "-f", "-z", "-L", "9", str(file)], check=True, capture_output=True)
            total += file.with_name(f"{file.name}.lrz").stat().st_size
    return total


def _sorted_rows(matrices: list[np.ndarray]) -> tuple[list[bytes], list[bytes]]:
    orders = [nearest_row_order(matrix) for matrix in matrices]
    return [m[o].T.tobytes() for m, o in zip(matrices, orders, strict=True)], [o.tobytes() for o in orders]


def seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


@pytest.mark.parametrize("name", [*CODECS, "lrzip"])
def test_codes(codes: list[np.ndarray], name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if name not in ("context", "static") and not request.config.getoption("--peers"):
        pytest.skip("a peer; --peers times it")
    number = sum(matrix.size for matrix in codes)
    row = Row("packing/codes", f"{number:,} codes", name)
    request.config.stash[TABLE].rows.append(row)
    floor = sum(entropy_of(torch.from_numpy(matrix)) * matrix.size / 8 for matrix in codes)
    decoding = ""
    if name == "lrzip":
        try:
            size, encode_time = seconds(lambda: lrzip(codes, tmp_path))
        except Absent as absent:
            row.absent = str(absent)
            pytest.skip(f"absent: {absent}")
    else:
        codec = CODECS[name]
        data, encode_time = seconds(lambda: codec.encode(codes))
        shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in codes]
        decoded, decode_time = seconds(lambda: codec.decode(data, shapes))
        decoding = f", decoded in {decode_time:.2f} s"
        assert all(np.array_equal(a, b) for a, b in zip(decoded, codes, strict=True))
        size = len(data)
    row.seconds = encode_time
    row.how = f"{size:,} bytes, {8 * size / number:.4f} bits a code, {size / floor - 1:+.2%} of the entropy{decoding}"
