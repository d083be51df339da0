"""Mutated code streams behind checksums that fit: an answer of the right shapes, or ValueError; and the two decoders of
the static mode, in C++ and in NumPy, give the same answers and refuse the same streams."""

import random
import zlib

import numpy as np
import pytest

from model.static_decoder import decode_static
from pgolf_kernels.packing import decode_codes, encode_codes
from tests.fuzz.mutations import in_memory, in_time, mutate

STREAMS = 2000


def little_matrices() -> list[list[np.ndarray]]:
    draw = np.random.default_rng(5)

    def gaussian(rows: int, cols: int, deviation: float = 2.5) -> np.ndarray:
        spread = np.exp(draw.normal(0, 0.5, cols))
        return (draw.normal(0, deviation, (rows, cols)) * spread).round().clip(-128, 127).astype(np.int8)

    correlated = (draw.normal(0, 6, (150, 1)) + draw.normal(0, 2, (150, 12))).round().astype(np.int8)
    tiny_and_large = np.where(np.arange(12) == 0, draw.choice([-128, 127], (150, 1)), correlated > 6).astype(np.int8)
    return [
        [gaussian(24, 40), gaussian(24, 40), gaussian(9, 31)],
        [gaussian(300, 1, 30)],
        [correlated],
        [tiny_and_large],
        [np.zeros((64, 64), np.int8), gaussian(3, 2)],
        [gaussian(60, 30)],
    ]


def signed(prefix: bytes, body: bytes) -> bytes:
    return prefix + zlib.crc32(body).to_bytes(4, "little") + body


def answer(decode: object, data: bytes) -> list[np.ndarray] | None:
    with in_time():
        try:
            return decode(data)  # type: ignore[operator]
        except ValueError:
            return None


def same(left: list[np.ndarray] | None, right: list[np.ndarray] | None) -> bool:
    if left is None or right is None:
        return left is right
    return len(left) == len(right) and all(
        a.shape == b.shape and np.array_equal(a, b) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["static", "context"])
def test_mutated_streams(mode: str) -> None:
    draw = random.Random(20260404)
    files = [encode_codes(matrices, mode=mode) for matrices in little_matrices()]
    answers = 0
    with in_memory():
        for number in range(STREAMS):
            data = files[number % len(files)]
            body = data[9:]
            size = 60 if number % 3 == 0 else len(body)  # headers and tables, where most of the decisions are
            mutated = signed(data[:5], mutate(body[:size], draw) + body[size:])
            got = answer(decode_codes, mutated)
            answers += got is not None
            if mode == "static":
                assert same(got, answer(decode_static, mutated)), number
    assert 0 < answers < STREAMS * 9 // 10, answers


@pytest.mark.long
@pytest.mark.timeout(300)
def test_streams_of_nothing_but_noise() -> None:
    draw = random.Random(20260405)
    with in_memory():
        for number in range(2000):
            mode = b"PGC1S" if number % 2 else b"PGC1C"
            shapes = bytes([draw.randint(1, 3)]) + bytes(draw.choice((0, 1, 2, 40, 129, 255)) for _ in range(9))
            mutated = signed(mode, shapes + draw.randbytes(draw.choice((0, 5, 50, 2000))))
            got = answer(decode_codes, mutated)
            if number % 2:
                assert same(got, answer(decode_static, mutated)), number
