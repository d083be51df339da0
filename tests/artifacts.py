"""A small quantised model and its artifact, and headers signed anew after a change, for tests of the container."""

import functools
import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import torch

from model.artifact import encode_artifact
from model.config import Config
from model.data.loaders import Batch
from model.gpt import GPT
from model.quantize import collect_hessians, quantize_with_hessians
from model.quantized import QuantizedModel
from tests.systems import golden_model

PREAMBLE = struct.Struct("<8sHHII")
DIGEST = 16


def small_model_config(codec: str = "context") -> Config:
    return Config(model=golden_model("pr1530")[0].config).replace(codec=codec)


def calibrated(model: GPT, config: Config, batches: list[Batch]) -> QuantizedModel:
    """`model`, quantised by `config` with Hessians of the batches."""
    per_token = config.quant.quant_recipe == "pr1499"
    return quantize_with_hessians(model, config.quant, collect_hessians(model, batches, per_token=per_token))


@functools.cache
def small_quantized() -> QuantizedModel:
    """The golden network of pull request 1530, quantised by its own recipe on its own inputs."""
    model, golden = golden_model("pr1530")
    inputs = golden["input_ids"].long()
    return calibrated(model, small_model_config(), [Batch(inputs, inputs, None, inputs.shape[1])])


@functools.cache
def small_artifact(codec: str = "context") -> bytes:
    data, _ = encode_artifact(small_quantized(), small_model_config(codec), {"seed": 1}, tokenizer_sha256="ab" * 32)
    return data


def header_of(data: bytes) -> dict[str, Any]:
    stored = PREAMBLE.unpack(data[: PREAMBLE.size])[3]
    start = PREAMBLE.size + DIGEST
    document: dict[str, Any] = json.loads(zlib.decompress(data[start : start + stored]))
    return document


def with_header(data: bytes, document: Any) -> bytes:
    """The artifact with another header, and a digest that fits."""
    magic, version, flags, stored, _ = PREAMBLE.unpack(data[: PREAMBLE.size])
    plain = json.dumps(document).encode()
    packed = zlib.compress(plain)
    preamble = PREAMBLE.pack(magic, version, flags, len(packed), len(plain))
    digest = hashlib.blake2b(preamble + packed, digest_size=DIGEST).digest()
    return preamble + digest + packed + data[PREAMBLE.size + DIGEST + stored :]


def resigned(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The artifact with `change` applied to its header's JSON, and a digest that fits."""
    document = header_of(data)
    change(document)
    return with_header(data, document)


def with_section(data: bytes, name: str, body: bytes) -> bytes:
    """The artifact with another body for a section, signed."""
    document = header_of(data)
    position = PREAMBLE.size + DIGEST + PREAMBLE.unpack(data[: PREAMBLE.size])[3]
    start, pieces = data[:position], []
    for section in document["sections"]:
        end = position + section[2]
        pieces.append(body if section[0] == name else data[position:end])
        position = end
        if section[0] == name:
            section[2:] = [len(body), hashlib.blake2b(body, digest_size=DIGEST).hexdigest()]
    return with_header(start, document) + b"".join(pieces)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
