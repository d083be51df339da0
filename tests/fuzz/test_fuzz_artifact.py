"""Mutated artifacts: every one is refused with ArtifactError or, where the mutation changed nothing, read as before.

Plain mutations (bits, bytes, cuts, repeats) meet the digests. Signed ones change a section, the codes behind the
checksum inside a section, or the header's JSON, and fit the digests again, so that the decoders and the checks behind
them are reached: the network of the file is one that its configuration builds. scripts/check.sh runs this folder under
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import json
import random
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.artifact import Artifact, build_model, decode_artifact, encode_artifact
from model.codecs import CODECS
from model.config import Config, ModelConfig
from model.errors import ArtifactError
from model.exchange import METADATA_KEY, export_safetensors, import_safetensors
from model.gpt import GPT
from model.quantized import QuantizedModel
from model.size import round_to_nearest
from tests.artifacts import header_of, same, with_header, with_section
from tests.fuzz.mutations import in_memory, in_time, mutate, mutate_json

FILES = 20_000


def little_config(codec: str = "static") -> Config:
    """Everything that a network can have, small enough to decode and build in milliseconds."""
    model = ModelConfig(
        vocab_size=80, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=2, xsa_last_n=2,
        loop_start=0, loop_end=1, num_loops=1, parallel_start=1, bigram_vocab_size=12, bigram_dim=4, smear_gate=True,
        value_residual=True, hidden_gain=True,
    )  # fmt: skip
    return Config(model=model).replace(codec=codec, keep_fp16=("blocks.1.attn.k",))


def little_model() -> QuantizedModel:
    torch.manual_seed(0)
    model = GPT(little_config().model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        model.tok_emb += 2 * torch.randn(80, 1)  # correlated columns: their rows are predicted
    return round_to_nearest(model, little_config())


def section_of(data: bytes, name: str) -> bytes:
    header = decode_artifact(data).header
    position = header.size
    for section in header.sections:
        if section.name == name:
            return data[position : position + section.size]
        position += section.size
    raise KeyError(name)


def mutate_codes(body: bytes, draw: random.Random) -> bytes:
    """A section, changed behind the coder's own checksum if it has one."""
    if body[:4] != b"PGC1":
        return mutate(body, draw)
    inner = mutate(body[9:], draw)
    return body[:5] + zlib.crc32(inner).to_bytes(4, "little") + inner


def check(data: bytes, original: dict[str, torch.Tensor], *, signed: bool) -> bool:
    """Whether the file was refused. A file without a fitting digest must be refused or be the same file."""
    with in_time():
        try:
            artifact = decode_artifact(data)
            if not signed:
                assert same(artifact.state_dict, original), "damage was accepted"
        except ArtifactError as error:
            assert any(word in str(error) for word in ("preamble", "header", "section")), error
            return True
        return not builds(artifact)


def builds(artifact: Artifact) -> bool:
    try:
        build_model(artifact.config, artifact.state_dict)
    except ArtifactError:
        return False
    return True


@pytest.mark.long
@pytest.mark.timeout(900)
def test_mutated_artifacts() -> None:
    draw = random.Random(20260401)
    files = {c: encode_artifact(little_model(), little_config(c), {"seed": 3})[0] for c in CODECS}
    original = decode_artifact(files["context"]).state_dict
    assert all(builds(decode_artifact(data)) for data in files.values())
    names = list(files)
    refused = accepted = 0
    with in_memory():
        for number in range(FILES):
            data = files[names[number % len(names)]]
            kind = number // len(names) % 4
            if kind == 0:
                mutated, signed = mutate(data, draw), False
                if mutated == data:
                    continue
            elif kind == 1:
                mutated, signed = with_header(data, mutate_json(header_of(data), draw)), True
            else:
                name = ("codes", "codes", "scales", "tensors")[number // 20 % 4]
                mutated, signed = with_section(data, name, mutate_codes(section_of(data, name), draw)), True
            result = check(mutated, original, signed=signed)
            refused += result
            accepted += not result
    # Other numbers in a signed file are another model: both answers must have occurred, often.
    assert refused > FILES // 2 and accepted > FILES // 100, (refused, accepted)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_mutated_safetensors(tmp_path: Path) -> None:
    draw = random.Random(20260403)
    path = tmp_path / "a.safetensors"
    artifact = decode_artifact(encode_artifact(little_model(), little_config(), {})[0])
    export_safetensors(path, artifact)
    data, tensors = path.read_bytes(), load_file(path)
    document = header_of(encode_artifact(little_model(), little_config(), {})[0])
    refused = 0
    with in_memory():
        for number in range(1500):
            if number % 2:
                path.write_bytes(mutate(data, draw))
            else:
                changed = json.dumps(mutate_json(document, draw))
                save_file(tensors, path, metadata={METADATA_KEY: changed})
            with in_time():
                try:
                    refused += not builds(import_safetensors(path))
                except ArtifactError:
                    refused += 1
    assert refused > 500
