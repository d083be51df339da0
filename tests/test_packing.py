"""Byte shuffle and the entropy coder for quantised weights."""

import numpy as np
import pytest

from pgolf_kernels.packing import byte_shuffle, byte_shuffle_reference, byte_unshuffle
from tests.golden import load_npz

GOLDEN = load_npz("byte_shuffle.npz")
SHUFFLED = [name for name in GOLDEN if name.startswith("pr")]


@pytest.mark.parametrize("name", SHUFFLED)
def test_byte_shuffle_golden(name: str) -> None:
    system, length, stride = name.split(".")
    data = GOLDEN[f"in.{length}"].tobytes()
    header = system == "pr1530"
    options = {"tail": "strided" if header else "appended"}
    expected = GOLDEN[name].tobytes()
    assert byte_shuffle(data, int(stride[1:]), header=header, **options) == expected
    assert byte_unshuffle(expected, None if header else int(stride[1:]), **options) == data


@pytest.mark.parametrize("name", [n for n in GOLDEN if n.startswith("odd.") and n.endswith(".in")])
def test_byte_unshuffle_golden_of_odd_input(name: str) -> None:
    assert byte_unshuffle(GOLDEN[name].tobytes()) == GOLDEN[name.replace(".in", ".out")].tobytes()


@pytest.mark.parametrize("tail", ["strided", "appended"])
@pytest.mark.parametrize("stride", range(1, 17))
def test_byte_shuffle_every_stride_and_length(stride: int, tail: str) -> None:
    generator = np.random.default_rng(stride)
    for size in [*range(0, 70), 16 * stride - 1, 32 * stride, 33 * stride + 5, 4099]:
        data = generator.integers(0, 256, size, dtype=np.uint8).tobytes()
        shuffled = byte_shuffle(data, stride, tail=tail)
        assert shuffled == byte_shuffle_reference(data, stride, tail)
        assert byte_unshuffle(shuffled, stride, tail=tail) == data


def test_byte_shuffle_reads_any_buffer_and_writes_into_out() -> None:
    source = np.arange(1000, dtype=np.uint16)
    expected = byte_shuffle_reference(source.tobytes(), 2)
    out = np.full(2100, 7, np.uint8)
    written = byte_shuffle(memoryview(source), 2, out=out)
    assert isinstance(written, memoryview) and written == expected
    assert out[:2000].tobytes() == expected and (out[2000:] == 7).all()
    assert byte_unshuffle(written, 2, out=bytearray(2000)) == source.tobytes()
    with_header = byte_shuffle(source, 2, header=True, out=bytearray(2005))
    assert byte_unshuffle(with_header) == source.tobytes()


def test_byte_shuffle_refuses() -> None:
    data = bytes(100)
    for stride in (0, 17, -1):
        with pytest.raises(ValueError, match="stride"):
            byte_shuffle(data, stride)
    with pytest.raises(ValueError, match="tail"):
        byte_shuffle(data, 2, tail="cut")
    with pytest.raises(ValueError, match=r"out: got 99 bytes, wanted at least 100"):
        byte_shuffle(data, 2, out=bytearray(99))
    with pytest.raises(TypeError, match="read-only"):
        byte_shuffle(data, 2, out=bytes(100))
    both = bytearray(200)
    with pytest.raises(ValueError, match="overlaps"):
        byte_shuffle(memoryview(both)[:100], 2, out=memoryview(both)[50:150])
    with pytest.raises(BufferError, match="contiguous"):
        byte_shuffle(np.zeros((8, 8), np.uint8)[:, ::2])
    with pytest.raises(ValueError, match="stride: got 200"):
        byte_unshuffle(b"BSHF\xc8data")
