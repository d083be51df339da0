"""The artifact: a container for a quantised model, checked before it is believed. docs/artifact.md has the bytes.

    preamble  36 bytes   magic, version, lengths of the header, digest of all this and of the header
    header               JSON (zlib): configuration, tensors, sections with codec, length and digest, provenance
    sections             "codes" | "scales" | "tensors", one after the other, nothing between or behind them

Nothing in it is executed. The reader checks digests and sizes before it allocates what they describe; every defect
raises ArtifactError that names the section.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.codecs import get_codec
from model.config import Config
from model.errors import ArtifactError, ConfigError
from model.files import atomic_write
from model.gpt import GPT
from model.memory import memory_for
from model.planes import (
    FILTERS,
    best_filter,
    byte_planes,
    from_byte_planes,
    pack_scales,
    scale_plane_shapes,
    unpack_scales,
)
from model.quantized import PlainTensor, QuantizedMatrix, QuantizedModel
from pgolf_kernels.packing import can_hold

MAGIC = b"PGOLF\x1a\r\n"
VERSION = 1
SECTIONS = ("codes", "scales", "tensors")

_PREAMBLE = struct.Struct("<8sHHII")  # magic, version, flags (0), stored and plain length of the header
_DIGEST_BYTES = 16
_HEADER_LIMIT = 1 << 24
_ELEMENT_LIMIT = 1 << 31
_TENSOR_LIMIT = 1 << 11  # the public networks have some 80; a tensor of its own shape takes milliseconds to decode
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_CODE_KINDS = tuple(f"int{bits}" for bits in range(2, 9))
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Section:
    name: str
    codec: str
    size: int  # stored bytes
    digest: str  # BLAKE2b-128 of the stored bytes, hexadecimal


@dataclass(frozen=True)
class Entry:
    """A tensor of the header: `kind` is "int2" to "int8" for codes with scales, or a floating-point type.

    `filter` is that of the scales (model/planes.py), None without.
    """

    name: str
    parameter: str
    index: int | None
    kind: str
    shape: tuple[int, ...]
    filter: str | None

    @property
    def bits(self) -> int:
        """Of the codes; 0 for a floating-point tensor."""
        return int(self.kind.removeprefix("int")) if self.kind.startswith("int") else 0


@dataclass(frozen=True)
class Header:
    config: Config
    entries: tuple[Entry, ...]
    sections: tuple[Section, ...]
    tokenizer_sha256: str | None
    provenance: dict[str, Any]
    size: int  # bytes before the first section

    @property
    def file_size(self) -> int:
        return self.size + sum(section.size for section in self.sections)


@dataclass(frozen=True)
class Artifact:
    """What `read_artifact` gives: `state_dict` holds the dequantised fp32 tensors by parameter name."""

    header: Header
    quantized: QuantizedModel
    state_dict: dict[str, Tensor]

    @property
    def config(self) -> Config:
        return self.header.config


def digest_of(data: bytes | memoryview) -> str:
    """BLAKE2b with a digest of 16 bytes, hexadecimal."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def write_artifact(
    path: str | os.PathLike[str],
    quantized: QuantizedModel,
    config: Config,
    provenance: Mapping[str, Any] | None = None,
    *,
    tokenizer_sha256: str | None = None,
) -> Header:
    """Writes `quantized` with the codec `config.codec`, atomically, and returns the header.

    provenance: anything JSON can hold (run, seed, data hash, versions). Raises ArtifactError for tensors that the
    format cannot hold, PgolfError when the place cannot be written.
    """
    data, header = encode_artifact(quantized, config, provenance, tokenizer_sha256=tokenizer_sha256)
    with atomic_write(path, "wb") as file:
        file.write(data)
    return header


def encode_artifact(
    quantized: QuantizedModel,
    config: Config,
    provenance: Mapping[str, Any] | None = None,
    *,
    tokenizer_sha256: str | None = None,
) -> tuple[bytes, Header]:
    """The bytes of `write_artifact`, and the header that describes them."""
    _entries(quantized)  # checks the tensors before any work is spent on them
    bodies = []
    for name, planes in zip(SECTIONS, _planes(quantized), strict=True):
        candidates = [config.quant.codec]
        if name != "codes" and config.quant.codec in ("context", "static"):
            candidates.append("brotli")  # a few kilobytes of mixed numbers: now the one, now the other is smaller
        coded = [(get_codec(codec).encode(planes) if planes else b"", codec) for codec in candidates]
        bodies.append(min(coded, key=lambda pair: len(pair[0])))
    sections = tuple(
        Section(name, codec, len(body), digest_of(body)) for name, (body, codec) in zip(SECTIONS, bodies, strict=True)
    )
    document = header_document(quantized, config, sections, tokenizer_sha256, dict(provenance or {}))
    prefix = _pack_header(document)
    data = b"".join([prefix, *(body for body, _ in bodies)])
    return data, _parse_header(data)


def read_header(path: str | os.PathLike[str]) -> Header:
    """The checked header of an artifact, without reading its sections. Raises ArtifactError."""
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            start = file.read(_PREAMBLE.size + _DIGEST_BYTES)
            stored = _check_preamble(start, size)[0]
            header = _parse_header(start + file.read(stored), size)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return header


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Reads and checks an artifact. Raises ArtifactError naming the file, the section and the defect."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return decode_artifact(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def decode_artifact(data: bytes) -> Artifact:
    """`read_artifact` of bytes."""
    header = _parse_header(data)
    bodies, position, view = [], header.size, memoryview(data)
    for section in header.sections:
        bodies.append(view[position : position + section.size])
        position += section.size
        with _naming(section.name):
            if digest_of(bodies[-1]) != section.digest:
                raise ArtifactError("its bytes do not have the digest that the header names; the file is damaged")
    shapes = _plane_shapes(header.entries)
    planes: dict[str, list[np.ndarray]] = {}
    for section, body in zip(header.sections, bodies, strict=True):
        with _naming(section.name):
            planes[section.name] = get_codec(section.codec).decode(body, shapes[section.name]) if body else []
    quantized = _from_planes(header.entries, planes)
    with _naming("header"):
        return Artifact(header, quantized, quantized.state_dict())


def load_model(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> GPT:
    """The model of an artifact on `device`, in eval mode, computing in `config.train.dtype` on CUDA and fp32 elsewhere.

    Raises ArtifactError, also when the tensors do not fit the configuration.
    """
    artifact = read_artifact(path)
    return build_model(artifact.config, artifact.state_dict, device)


def build_model(config: Config, state_dict: dict[str, Tensor], device: torch.device | str = "cpu") -> GPT:
    """A GPT of `config` with exactly these tensors; ArtifactError naming the first that does not fit."""
    _check_against(config, state_dict)
    device = torch.device(device)
    with torch.device("meta"):
        model = GPT(config.model)
    for name, parameter in model.named_parameters():
        if name not in state_dict:
            raise ArtifactError(f"tensors: parameter {name!r} is missing")
        if state_dict[name].shape != parameter.shape:
            got, wanted = tuple(state_dict[name].shape), tuple(parameter.shape)
            raise ArtifactError(f"tensors: parameter {name!r} has shape {got}, the configuration wants {wanted}")
    unknown = sorted(set(state_dict) - {name for name, _ in model.named_parameters()})
    if unknown:
        raise ArtifactError(f"tensors: no parameter {unknown[0]!r} in this configuration")
    with memory_for("while loading the network", device):
        model = model.to_empty(device=device)
        model.load_state_dict(state_dict)
    if device.type == "cuda" and config.train.dtype == "bfloat16":
        model.compute_dtype = torch.bfloat16
    return model.eval()


def _check_against(config: Config, state_dict: dict[str, Tensor]) -> None:
    """The sizes that make a network or its list of layers large, before one is built: they may be anything."""
    model = config.model
    wanted = {
        "tok_emb": (model.vocab_size, model.model_dim),
        "qo_bank": (2 * model.num_layers, model.model_dim, model.model_dim),
        "up_bank": (model.num_layers, model.hidden_dim, model.model_dim),
    }
    passes = model.num_layers
    if model.loop_form == "inline":
        passes += model.num_loops * (model.loop_end - model.loop_start + 1)
    wanted["skip_weights"] = (passes // 2, model.model_dim)
    for name, shape in wanted.items():
        got = tuple(state_dict[name].shape) if name in state_dict else None
        if got != shape:
            raise ArtifactError(f"tensors: parameter {name!r} has shape {got}, the configuration wants {shape}")


# --- sections: each is a list of int8 matrices ---


def _planes(quantized: QuantizedModel) -> tuple[list[np.ndarray], ...]:
    """The int8 matrices of each section.

    codes: the matrices. scales: see model/planes.py. tensors: for each type in use the bytes of all its numbers,
    highest first.
    """
    tensors: list[np.ndarray] = []
    for dtype in _DTYPE_NAMES:
        values = [tensor.value.reshape(-1) for tensor in quantized.tensors if tensor.value.dtype == dtype]
        tensors += byte_planes(torch.cat(values)) if values else []
    return (
        [matrix.codes.cpu().numpy() for matrix in quantized.matrices],
        pack_scales([m.scales for m in quantized.matrices], [best_filter(m.scales) for m in quantized.matrices]),
        tensors,
    )


def _plane_shapes(entries: Sequence[Entry]) -> dict[str, list[tuple[int, int]]]:
    """What `_planes` gives for these entries."""
    coded = [entry for entry in entries if entry.bits]
    tensors: list[tuple[int, int]] = []
    for name, dtype in _DTYPES.items():
        sizes = [math.prod(entry.shape) for entry in entries if entry.kind == name]
        tensors += [(sum(sizes), 1)] * (dtype.itemsize if sizes else 0)
    return {
        "codes": [(entry.shape[0], entry.shape[1]) for entry in coded],
        "scales": scale_plane_shapes([entry.shape[0] for entry in coded], [entry.filter for entry in coded]),
        "tensors": tensors,
    }


def _from_planes(entries: Sequence[Entry], planes: dict[str, list[np.ndarray]]) -> QuantizedModel:
    matrices, plain = [], []
    coded = [entry for entry in entries if entry.bits]
    scales = unpack_scales(planes["scales"], [e.shape[0] for e in coded], [e.filter for e in coded])
    for e, codes, scale in zip(coded, map(torch.from_numpy, planes["codes"]), scales, strict=True):
        matrices.append(QuantizedMatrix(e.name, e.parameter, e.index, e.bits, codes, scale))
        with _naming("codes"):
            matrices[-1].check_codes()
    position, flat = 0, {}
    for name, dtype in _DTYPES.items():
        if any(entry.kind == name for entry in entries):
            flat[name] = from_byte_planes(planes["tensors"][position : position + dtype.itemsize], dtype)
            position += dtype.itemsize
    for e in (entry for entry in entries if not entry.bits):
        value, flat[e.kind] = flat[e.kind].tensor_split([math.prod(e.shape)])
        plain.append(PlainTensor(e.name, e.parameter, e.index, value.reshape(e.shape).clone()))
    return QuantizedModel(tuple(matrices), tuple(plain))


# --- header ---


def header_document(
    quantized: QuantizedModel,
    config: Config,
    sections: Sequence[Section],
    tokenizer_sha256: str | None,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The header as JSON; `read_document` is its inverse."""
    return {
        "config": config.to_dict(),
        "tensors": [[e.name, e.parameter, e.index, e.kind, list(e.shape), e.filter] for e in _entries(quantized)],
        "sections": [[s.name, s.codec, s.size, s.digest] for s in sections],
        "tokenizer_sha256": tokenizer_sha256,
        "provenance": provenance,
    }


def _entries(quantized: QuantizedModel) -> list[Entry]:
    """Matrices first, then tensors: the order of their planes."""
    entries = []
    for m in quantized.matrices:
        rows = tuple(m.scales.shape)
        if m.codes.dtype != torch.int8 or m.codes.dim() != 2 or m.scales.dtype != torch.float16 or rows != m.shape[:1]:
            raise ArtifactError(
                f"tensor {m.name!r}: got codes {m.codes.dtype} {m.shape} and scales {m.scales.dtype} {rows}, "
                "wanted int8 [R, C] and float16 [R]"
            )
        entries.append(Entry(m.name, m.parameter, m.index, f"int{m.bits}", m.shape, best_filter(m.scales)))
    for t in quantized.tensors:
        if t.value.dtype not in _DTYPE_NAMES:
            raise ArtifactError(f"tensor {t.name!r}: got {t.value.dtype}, wanted one of {', '.join(_DTYPES)}")
        entries.append(Entry(t.name, t.parameter, t.index, _DTYPE_NAMES[t.value.dtype], t.shape, None))
    return entries


def _pack_header(document: dict[str, Any]) -> bytes:
    plain = json.dumps(document, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    stored = zlib.compress(plain, 9)
    start = _PREAMBLE.pack(MAGIC, VERSION, 0, len(stored), len(plain))
    return start + hashlib.blake2b(start + stored, digest_size=_DIGEST_BYTES).digest() + stored


def _check_preamble(data: bytes | memoryview, file_size: int) -> tuple[int, int]:
    """(stored, plain) length of the header."""
    start = bytes(data[: _PREAMBLE.size])
    if len(data) < _PREAMBLE.size + _DIGEST_BYTES:
        raise ArtifactError(f"preamble: got {len(data)} bytes, wanted at least {_PREAMBLE.size + _DIGEST_BYTES}")
    magic, version, flags, stored, plain = _PREAMBLE.unpack(start)
    if magic != MAGIC:
        raise ArtifactError("preamble: this is not an artifact (the first 8 bytes are others)")
    if version != VERSION or flags != 0:
        raise ArtifactError(
            f"preamble: got format version {version} (flags {flags}), this release reads version {VERSION}; "
            "the file is from a newer release, or damaged"
        )
    if not 0 < plain <= _HEADER_LIMIT or not 0 < stored <= file_size - len(start) - _DIGEST_BYTES:
        raise ArtifactError(f"header: its length ({stored} bytes, {plain} unpacked) does not fit the file; truncated?")
    return stored, plain


def _parse_header(data: bytes, file_size: int | None = None) -> Header:
    """Checks everything that can be checked without the sections."""
    file_size = len(data) if file_size is None else file_size
    stored, plain = _check_preamble(data, file_size)
    size = _PREAMBLE.size + _DIGEST_BYTES + stored
    packed = data[_PREAMBLE.size + _DIGEST_BYTES : size]
    digest = hashlib.blake2b(data[: _PREAMBLE.size] + packed, digest_size=_DIGEST_BYTES).digest()
    with _naming("header"):
        if digest != data[_PREAMBLE.size : _PREAMBLE.size + _DIGEST_BYTES]:
            raise ArtifactError("its bytes do not have the digest of the preamble; the file is damaged")
        document = _unpack_json(packed, plain)
        header = Header(*read_document(document), size)
    _check_sections(header, file_size)
    return header


def _unpack_json(packed: bytes, plain: int) -> dict[str, Any]:
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(packed, plain + 1)
        if len(text) != plain or not unpacker.eof or unpacker.unused_data:
            raise ArtifactError(f"it does not unpack to {plain} bytes")
        document = json.loads(text)
    except (zlib.error, ValueError, RecursionError) as error:
        raise ArtifactError(f"it cannot be unpacked ({error})") from error
    if not isinstance(document, dict):
        raise ArtifactError("it is not a JSON object")
    return document


def read_document(
    document: dict[str, Any],
) -> tuple[Config, tuple[Entry, ...], tuple[Section, ...], str | None, dict[str, Any]]:
    """(config, entries, sections, tokenizer_sha256, provenance), every field checked. Raises ArtifactError."""
    wanted = {"config", "tensors", "sections", "tokenizer_sha256", "provenance"}
    if set(document) != wanted:
        raise ArtifactError(f"got the fields {', '.join(sorted(document))}, wanted {', '.join(sorted(wanted))}")
    provenance, tokenizer = document["provenance"], document["tokenizer_sha256"]
    _require(isinstance(document["config"], dict), "config", document["config"])
    _require(isinstance(provenance, dict), "provenance", provenance)
    _require(tokenizer is None or _is_hex(tokenizer, 64), "tokenizer_sha256", tokenizer)
    for name in ("tensors", "sections"):
        _require(isinstance(document[name], list) and len(document[name]) <= _TENSOR_LIMIT, name, document[name])
    try:
        config = Config.from_dict(document["config"])
    except (ConfigError, TypeError, ValueError) as error:
        raise ArtifactError(f"configuration: {error}") from error
    entries = tuple(_read_entry(values) for values in document["tensors"])
    sections = tuple(_read_section(values) for values in document["sections"])
    return config, entries, sections, tokenizer, provenance


def _read_entry(values: Any) -> Entry:
    _require(isinstance(values, list) and len(values) == 6, "tensor", values)
    name, parameter, index, kind, shape, scale_filter = values
    _require(isinstance(name, str) and isinstance(parameter, str), "tensor name", values)
    _require(index is None or _is_count(index), "tensor index", values)
    _require(isinstance(kind, str) and kind in (*_DTYPES, *_CODE_KINDS), "tensor kind", values)
    _require(isinstance(shape, list) and len(shape) <= 4 and all(map(_is_count, shape)), "tensor shape", values)
    _require(kind in _DTYPES or len(shape) == 2, "tensor shape", values)
    _require(math.prod(shape) <= _ELEMENT_LIMIT, "tensor size", values)
    _require(scale_filter is None if kind in _DTYPES else scale_filter in FILTERS, "filter of scales", values)
    return Entry(name, parameter, index, kind, tuple(shape), scale_filter)


def _read_section(values: Any) -> Section:
    _require(isinstance(values, list) and len(values) == 4, "section", values)
    name, codec, size, digest = values
    _require(isinstance(codec, str), "section codec", values)
    _require(_is_count(size), "section size", values)
    _require(_is_hex(digest, 2 * _DIGEST_BYTES), "section digest", values)
    return Section(name, codec, size, digest)


def _check_sections(header: Header, file_size: int) -> None:
    names = [section.name for section in header.sections]
    if names != list(SECTIONS):
        raise ArtifactError(f"header: got sections {names}, wanted {list(SECTIONS)}")
    shapes = _plane_shapes(header.entries)
    end = header.size
    for section in header.sections:
        end += section.size
        with _naming(section.name):
            get_codec(section.codec)
            elements = sum(math.prod(shape) for shape in shapes[section.name])
            fits = elements <= _ELEMENT_LIMIT and can_hold(section.size, shapes[section.name])
            if not fits or (elements > 0) != (section.size > 0):
                raise ArtifactError(f"{section.size} bytes cannot hold the {elements} elements that the header lists")
            if end > file_size:
                raise ArtifactError(f"it ends at byte {end}, the file at {file_size}; truncated?")
    if end != file_size:
        raise ArtifactError(f"sections end at byte {end}, the file at {file_size}: bytes follow the last section")


class _naming:
    """Puts the section's name before an ArtifactError's message."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ArtifactError):
            prefix = self.name if self.name == "header" else f"section {self.name!r}"
            raise ArtifactError(f"{prefix}: {error}") from error


def _require(condition: bool, what: str, value: Any) -> None:
    if not condition:
        raise ArtifactError(f"{what}: {str(value)[:200]!r} is not valid")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _ELEMENT_LIMIT


def _is_hex(value: Any, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and all(c in "0123456789abcdef" for c in value)
