"""Mutated artifacts: every one is refused with ArtifactError or, where the mutation changed nothing, read as before.

Mutations are drawn with fixed seeds. Plain ones (bits, bytes, cuts, repeats) meet the digests. Signed ones change a
section or the header's JSON and fit the digests again, so that the decoders and the checks behind them are reached.
scripts/check.sh runs this file under AddressSanitizer.
"""

import random
import time
from typing import Any

import pytest
import torch

from model.artifact import build_model, decode_artifact, encode_artifact
from model.codecs import CODECS
from model.errors import ArtifactError
from model.public_artifact import parse_public_artifact, read_torch_file
from model.quantized import PlainTensor, QuantizedMatrix, QuantizedModel
from tests.artifacts import header_of, same, small_model_config, with_header, with_section
from tests.test_public_artifact import PACKINGS, saved

FILES = 20_000
SLOWEST = 5.0  # seconds that one file may take on a busy machine: far above any honest time, far below a hang


def little_model() -> QuantizedModel:
    """Enough of everything, small enough to decode in a millisecond."""
    draw = torch.Generator().manual_seed(0)
    matrices = [
        QuantizedMatrix(
            f"blocks.0.attn.{name}",
            "qo_bank",
            index,
            6,
            torch.randint(-9, 10, (12, 8), generator=draw, dtype=torch.int8),
            torch.rand(12, generator=draw).half(),
        )
        for index, name in enumerate("qo")
    ]
    correlated = torch.randint(-5, 6, (80, 1), generator=draw) + torch.randint(-2, 3, (80, 6), generator=draw)
    matrices.append(
        QuantizedMatrix("tok_emb", "tok_emb", None, 8, correlated.to(torch.int8), torch.rand(80, generator=draw).half())
    )
    tensors = (
        PlainTensor("a", "a", None, torch.randn(9, generator=draw)),
        PlainTensor("b", "b", None, torch.ones(5).half()),
    )
    return QuantizedModel(tuple(matrices), tensors)


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to four changes of one kind each."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(out)) if out else 0
        length = draw.choice((1, 2, 4, 8, 33))
        kind = draw.randrange(7)
        if kind == 0 and out:
            out[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and out:
            out[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            out[place : place + length] = b""
        elif kind == 3:
            out[place:place] = out[place : place + length]
        elif kind == 4:
            out[place:place] = draw.randbytes(length)
        elif kind == 5:
            del out[place:]
        else:
            out[place : place + length] = draw.choice((b"\xff", b"\x00")) * length
    return bytes(out)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """The document with one value somewhere in it replaced."""
    odd = (None, -1, 0, 1 << 31, 1 << 70, 1.5, float("1e300"), "", "int6", "x" * 300, [], {}, [[]], True)
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate_json(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        place = draw.randrange(len(value))
        if draw.random() < 0.1:
            return value[:place] + value[place + 1 :]
        return [*value[:place], mutate_json(value[place], draw), *value[place + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.5:
        return value + draw.choice((-1, 1, 8, 1000, 1 << 20))
    return draw.choice(odd)


def section_of(data: bytes, name: str) -> bytes:
    header = decode_artifact(data).header
    position = header.size
    for section in header.sections:
        if section.name == name:
            return data[position : position + section.size]
        position += section.size
    raise KeyError(name)


def check(data: bytes, original: dict[str, torch.Tensor], *, signed: bool) -> bool:
    """Whether the file was refused. A file without a fitting digest must be refused or be the same file."""
    started = time.monotonic()
    try:
        artifact = decode_artifact(data)
        if not signed:
            assert same(artifact.state_dict, original), "damage was accepted"
        try:
            build_model(artifact.config, artifact.state_dict)
        except ArtifactError:
            return True
        return False
    except ArtifactError as error:
        assert any(word in str(error) for word in ("preamble", "header", "section")), error
        return True
    finally:
        assert time.monotonic() - started < SLOWEST


@pytest.mark.long
@pytest.mark.timeout(900)
def test_mutated_artifacts() -> None:
    draw = random.Random(20260401)
    files = {c: encode_artifact(little_model(), small_model_config(c), {"seed": 3})[0] for c in CODECS}
    original = decode_artifact(files["context"]).state_dict
    names = list(files)
    refused = 0
    for number in range(FILES):
        data = files[names[number % len(names)]]
        kind = number % 4
        if kind == 0:
            mutated, signed = mutate(data, draw), False
            if mutated == data:
                continue
        elif kind == 1:
            mutated, signed = with_header(data, mutate_json(header_of(data), draw)), True
        else:
            name = ("codes", "codes", "scales", "tensors")[number // 4 % 4]
            mutated, signed = with_section(data, name, mutate(section_of(data, name), draw)), True
        refused += check(mutated, original, signed=signed)
    assert refused > 0.9 * FILES


@pytest.mark.long
@pytest.mark.timeout(600)
def test_mutated_public_artifacts() -> None:
    draw = random.Random(20260402)
    content = {
        "w": {"a.q": torch.ones(4, 3, dtype=torch.int8), "a.scale": torch.ones(4).half(), "b": torch.randn(7)},
        "m": {"a": "gptq (int6)", "b": "passthrough"},
    }
    raw = saved(content)
    packed = [pack(raw) for pack in PACKINGS.values()]
    refused = 0
    for number in range(4000):
        data = mutate(raw if number % 2 else packed[number // 2 % len(packed)], draw)
        started = time.monotonic()
        try:
            read_torch_file(data) if number % 2 else parse_public_artifact(data)
        except ArtifactError:
            refused += 1
        assert time.monotonic() - started < SLOWEST
    assert refused > 2000
