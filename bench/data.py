"""What the benches measure on: text and codes of one's own, so that everything runs from a checkout alone.

PGOLF_BENCH_TOKENS names a token shard to measure on (beside or instead of the bundled text), PGOLF_CODES an artifact
(any run's model.pgolf), or brotli-packed int8 codes, matrix after matrix, with a list of their
`rows` and `cols` in a .json beside them.
What has to be made once is kept in runs/bench.
"""

from __future__ import annotations

import functools
import json
import math
import os
from pathlib import Path

import numpy as np

from bench.peers import Absent
from model.data.dataset import Dataset, open_dataset
from model.data.shards import read_shard
from model.demo import build_sample
from model.presets import get_preset

RUNS = Path(__file__).parent.parent / "runs"


@functools.cache
def bundled_text() -> Dataset:
    """The demo's shards and tokenizer."""
    folder = RUNS / "bench" / "data"
    if not folder.is_dir():
        build_sample(get_preset("demo").replace(data_dir=str(folder)), quiet=True)
    return open_dataset(folder)


def given_tokens() -> np.ndarray | None:
    """The shard in PGOLF_BENCH_TOKENS, if it names one."""
    path = os.environ.get("PGOLF_BENCH_TOKENS")
    return read_shard(path) if path else None


@functools.cache
def bundled_tokens() -> np.ndarray:
    """All of the bundled text: uint16, every document behind BOS."""
    dataset = bundled_text()
    return np.concatenate([*(read_shard(path) for path in dataset.train_shards), dataset.valid_tokens])


def tokens() -> np.ndarray:
    """The given shard, or the bundled text."""
    given = given_tokens()
    return bundled_tokens() if given is None else given


def codes_files() -> dict[str, Path]:
    """{what the table calls it: file} of what there is to code: PGOLF_CODES, and the newest artifact in runs/."""
    found = {}
    if path := os.environ.get("PGOLF_CODES"):
        found["given"] = Path(path)
    if own := sorted(RUNS.glob("*/model.pgolf"), key=lambda file: file.stat().st_mtime):
        found["own run"] = own[-1]
    return found


@functools.cache
def codes(name: str) -> list[np.ndarray]:
    """int8 [R, C] matrices. Raises Absent where there is no run: random codes would say nothing about a coder."""
    file = codes_files().get(name)
    if file is None:
        raise Absent("no runs/*/model.pgolf: `pgolf demo` makes one, or PGOLF_CODES names one")
    if file.suffix == ".br":
        return _packed_codes(file)
    from model.artifact import read_artifact

    return [matrix.codes.numpy() for matrix in read_artifact(file).quantized.matrices]


def _packed_codes(file: Path) -> list[np.ndarray]:
    import brotli

    shapes = [(entry["rows"], entry["cols"]) for entry in json.loads(file.with_suffix(".json").read_text())]
    flat = np.frombuffer(brotli.decompress(file.read_bytes()), np.int8)
    sizes = [math.prod(shape) for shape in shapes]
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
