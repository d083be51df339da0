"""Byte shuffle beside memcpy, blosc2 and bitshuffle; entropy coders beside general compressors on real codes.

The coders run on the codes of a run of one's own, and on those that PGOLF_CODES names (data.py): codes drawn at random
say nothing about what a coder can gain. A row's time is that of encoding; behind it stand bytes, bits a code, what is
above the matrices' order-0 entropy, and the time of decoding.
"""

from __future__ import annotations

import ctypes
import shutil
import statistics
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

from bench import data
from bench.common import Call, Work
from bench.peers import Absent, peer_package
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
    drawn = np.random.default_rng(0).integers(0, 256, BYTES, dtype=np.uint8)
    return {"data": drawn, "out": np.zeros_like(drawn)}


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
    """Its shuffle alone, from the library in its wheel: compress() at level 0 copies and does not shuffle."""
    package = peer_package("blosc2")
    file = next(Path(package.__file__).parent.glob("lib*/libblosc2.so*"), None)
    if file is None:
        raise Absent("no libblosc2.so in blosc2's wheel")
    shuffle = ctypes.CDLL(str(file)).blosc2_shuffle
    shuffle.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p]
    shuffle(case.stride, BYTES, x["data"].ctypes.data, x["out"].ctypes.data)
    assert np.array_equal(x["out"], np.frombuffer(byte_shuffle(x["data"], case.stride), np.uint8)), (
        "other bytes than ours"
    )
    return lambda: shuffle(case.stride, BYTES, x["data"].ctypes.data, x["out"].ctypes.data)


def bitshuffle(case: Case, x: dict[str, Any]) -> Call:
    """The bits of words, one thread; it returns a new array."""
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


# Codes ----------------------------------------------------------------------------------------------------------------

Matrices = Sequence[np.ndarray]
Frequencies = tuple[int, np.ndarray]  # the lowest code, and how often each one from there on occurs
Coder = tuple[Callable[[], Any], Callable[[Any], int], Callable[[Any], Any]]  # encode, size of that, decode and check


def codec(name: str) -> Callable[[Matrices, Path], Coder]:
    """One of the artifact's codecs, checked to give the codes back."""

    def build(matrices: Matrices, folder: Path) -> Coder:
        shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
        return lambda: CODECS[name].encode(matrices), len, lambda coded: CODECS[name].decode(coded, shapes)

    return build


def constriction(matrices: Matrices, folder: Path) -> Coder:
    """Its ANS coder with each matrix's own frequencies, for which two bytes a code that occurs are counted."""
    package = peer_package("constriction")

    def coder(counts: np.ndarray) -> Any:
        return package.stream.model.Categorical((counts / counts.sum()).astype(np.float32), perfect=False)

    def encode() -> list[tuple[Frequencies, np.ndarray]]:
        coded = []
        for matrix in matrices:
            codes = matrix.ravel().astype(np.int32)
            low = int(codes.min())
            counts = np.bincount(codes - low)
            stack = package.stream.stack.AnsCoder()
            stack.encode_reverse(codes - low, coder(counts))
            coded.append(((low, counts), stack.get_compressed()))
        return coded

    def decode(coded: list[tuple[Frequencies, np.ndarray]]) -> list[np.ndarray]:
        return [
            (package.stream.stack.AnsCoder(words).decode(coder(counts), m.size) + low).astype(np.int8).reshape(m.shape)
            for ((low, counts), words), m in zip(coded, matrices, strict=True)
        ]

    def size(coded: list[tuple[Frequencies, np.ndarray]]) -> int:
        return sum(words.nbytes + 2 * int((counts > 0).sum()) for (_, counts), words in coded)

    return encode, size, decode


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


def lrzip(matrices: Matrices, folder: Path) -> Coder:
    """`lrzip -z -L 9` a group of equal shapes, rows sorted and transposed, with the orders beside them; the sorting
    is counted as encoding, its undoing is not done.
    """
    program = shutil.which("lrzip")
    if program is None:
        raise Absent("no lrzip on the PATH")

    def run(*arguments: str) -> None:
        subprocess.run([program, "-q", "-f", *arguments], check=True, capture_output=True)

    def encode() -> list[Path]:
        files = []
        for number, (_, group) in enumerate(groupby(matrices, key=lambda m: m.shape)):
            for kind, pieces in zip(("codes", "order"), _sorted_rows(list(group)), strict=True):
                file = folder / f"{number}.{kind}"
                file.write_bytes(b"".join(pieces))
                run("-z", "-L", "9", str(file))
                files.append(file)
        return files

    def packed(file: Path) -> Path:
        return file.with_name(f"{file.name}.lrz")

    def decode(files: list[Path]) -> None:
        for file in files:
            back = file.with_name(f"{file.name}.back")
            run("-d", "-o", str(back), str(packed(file)))
            assert back.read_bytes() == file.read_bytes()

    return encode, lambda files: sum(packed(file).stat().st_size for file in files), decode


def _sorted_rows(matrices: list[np.ndarray]) -> tuple[list[bytes], list[bytes]]:
    orders = [nearest_row_order(matrix) for matrix in matrices]
    return [m[o].T.tobytes() for m, o in zip(matrices, orders, strict=True)], [o.tobytes() for o in orders]


CODERS = {f"pgolf, {name}": codec(name) for name in ("static", "context")} | {
    **{name: codec(name) for name in CODECS if name not in ("static", "context")},
    "constriction": constriction,
    "lrzip, rows sorted": lrzip,
}
REPEATED = ("pgolf, static", "pgolf, context", "constriction")  # the others take a minute


def seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


@pytest.mark.timeout(600)
@pytest.mark.parametrize("provider", CODERS)
@pytest.mark.parametrize("source", list(data.codes_files()) or ["own run"])
def test_codes(recording: Any, source: str, provider: str, tmp_path: Path) -> None:
    matrices = data.codes(source) if source in data.codes_files() else []
    number = sum(matrix.size for matrix in matrices)
    with recording(f"{source}, {number:,} codes", provider) as recorder:
        matrices = data.codes(source)
        rounds = 3 if provider in REPEATED else 1
        encode, size_of, decode = CODERS[provider](matrices, tmp_path)
        coded = encode() if rounds > 1 else None
        found: list[Any] = [coded]
        recorder.measure(lambda: found.__setitem__(0, encode()), rounds=rounds)
        decoded, times = None, []
        for _ in range(rounds):
            decoded, taken = seconds(lambda: decode(found[0]))
            times.append(taken)
        if decoded is not None:
            assert all(np.array_equal(a, b) for a, b in zip(decoded, matrices, strict=True))
        size = size_of(found[0])
        floor = sum(entropy_of(torch.from_numpy(matrix)) * matrix.size / 8 for matrix in matrices)
        recorder.row.how = (
            f"{size:,} bytes, {8 * size / number:.4f} bits a code, {size / floor - 1:+.2%} against the entropy, "
            f"decoded in {statistics.median(times):.2f} s"
        )
