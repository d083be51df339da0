"""Primed compressors: the formula, and that they are primed."""

import lzma
import random

import pytest

from model.baselines import baselines, compressors, primed_bits_per_byte
from model.data.build import build_dataset
from model.data.dataset import open_dataset
from model.errors import DataError


def words(seed: int, count: int) -> str:
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(generator.choices(letters, k=6)) for _ in range(count))


def test_formula():
    sizes = {b"train": 50, b"trainvalid": 70}
    assert primed_bits_per_byte(sizes.__getitem__, b"train", b"valid") == 8 * 20 / 5


@pytest.mark.parametrize("name", ["gzip", "xz", "brotli"])
def test_text_seen_in_training_costs_next_to_nothing(name):
    text = words(0, 300).encode()
    size = compressors()[name]
    unseen = primed_bits_per_byte(size, words(1, 300).encode(), text)
    assert primed_bits_per_byte(size, text, text) < 0.1 * unseen


def test_windows_reach_further_than_gzips():
    """xz and brotli find a repeat behind 280 kB of other text, gzip cannot."""
    text = words(0, 300).encode()
    train = text + words(2, 40_000).encode()
    sizes = compressors()
    costs = {name: primed_bits_per_byte(sizes[name], train, text) for name in sizes}
    assert max(costs["xz"], costs["brotli"]) < costs["gzip"] / 3


def test_data_set(tmp_path):
    """The text that is compressed is the documents' own, one to a line."""
    documents = [words(seed, 40) for seed in range(12)]
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in documents))
    build_dataset([tmp_path / "text.jsonl"], tmp_path / "data", vocab_size=300, valid_docs=2, quiet=True)
    valid = "".join(f"{text}\n" for text in documents[:2]).encode()
    train = "".join(f"{text}\n" for text in documents[2:]).encode()
    got = baselines(open_dataset(tmp_path / "data"))
    preset = 9 | lzma.PRESET_EXTREME
    xz = len(lzma.compress(train + valid, preset=preset)) - len(lzma.compress(train, preset=preset))
    assert got["xz"] == 8 * xz / len(valid)
    assert set(got) == {"gzip", "xz", "brotli"}


def test_text_beyond_the_window_is_refused():
    with pytest.raises(DataError, match="baselines: 16,777,217 bytes"):
        primed_bits_per_byte(len, bytes(1 << 24), b"x")
    with pytest.raises(DataError, match="validation text is empty"):
        primed_bits_per_byte(len, b"x", b"")
