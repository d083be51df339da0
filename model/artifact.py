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
from model.planes import byte_planes, from_byte_planes, from_scale_planes, scale_planes
from model.quantized import PlainTensor, QuantizedMatrix, QuantizedModel

MAGIC = b"PGOLF\x1a\r\n"
VERSION = 1
SECTIONS = ("codes", "scales", "tensors")

_PREAMBLE = struct.Struct("<8sHHII")  # magic, version, flags (0), stored and plain length of the header
_DIGEST_BYTES = 16
_HEADER_LIMIT = 1 << 24
_ELEMENT_LIMIT = 1 << 31
_EXPANSION_LIMIT = 1 << 18  # elements a stored byte can stand for; codecs reach less
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Section:
    name: str
    codec: str
    size: int  # stored bytes
    digest: str  # BLAKE2b-128 of the stored bytes, hexadecimal


@dataclass(frozen=True)
class Entry:
    """A tensor of the header: `kind` is "int2" to "int8" for codes with scales, or a floating-point type."""

    name: str
    parameter: str
    index: int | None
    kind: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Of the codes; 0 for a floating-point tensor."""
        return int(self.kind.removeprefix("int")) if self.kind.startswith("int") else 0


@dataclass(frozen=True)
class Header:
    version: int
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
    codec = get_codec(config.quant.codec)
    bodies = [codec.encode(planes) if planes else b"" for planes in _planes(quantized)]
    sections = tuple(
        Section(name, codec.name, len(body), digest_of(body)) for name, body in zip(SECTIONS, bodies, strict=True)
    )
    document = {
        "config": config.to_dict(),
        "tensors": [[e.name, e.parameter, e.index, e.kind, list(e.shape)] for e in _entries(quantized)],
        "sections": [[s.name, s.codec, s.size, s.digest] for s in sections],
        "tokenizer_sha256": tokenizer_sha256,
        "provenance": dict(provenance or {}),
    }
    prefix = _pack_header(document)
    data = b"".join([prefix, *bodies])
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
    position = header.size
    planes: dict[str, list[np.ndarray]] = {}
    view = memoryview(data)
    shapes = _plane_shapes(header.entries)
    for section in header.sections:
        body = view[position : position + section.size]
        position += section.size
        with _naming(section.name):
            if digest_of(body) != section.digest:
                raise ArtifactError("its bytes do not have the digest that the header names; the file is damaged")
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
    model = model.to_empty(device=device)
    model.load_state_dict(state_dict)
    if device.type == "cuda" and config.train.dtype == "bfloat16":
        model.compute_dtype = torch.bfloat16
    return model.eval()


def _check_against(config: Config, state_dict: dict[str, Tensor]) -> None:
    """The sizes that make a network large, before one is built: the configuration may be anything."""
    model = config.model
    wanted = {
        "tok_emb": (model.vocab_size, model.model_dim),
        "qo_bank": (2 * model.num_layers, model.model_dim, model.model_dim),
        "up_bank": (model.num_layers, model.hidden_dim, model.model_dim),
    }
    for name, shape in wanted.items():
        got = tuple(state_dict[name].shape) if name in state_dict else None
        if got != shape:
            raise ArtifactError(f"tensors: parameter {name!r} has shape {got}, the configuration wants {shape}")


# --- sections: each is a list of int8 matrices ---


def _planes(quantized: QuantizedModel) -> tuple[list[np.ndarray], ...]:
    """The int8 matrices of each section.

    codes: the matrices. scales: the filter of every matrix, then the high bytes of all scales, then the low ones.
    tensors: the bytes of every tensor, lowest first.
    """
    filtered = [scale_planes(matrix.scales) for matrix in quantized.matrices]
    kinds = np.array([kind for kind, _, _ in filtered], np.int8).reshape(-1, 1)
    return (
        [matrix.codes.cpu().numpy() for matrix in quantized.matrices],
        [kinds, *(high for _, high, _ in filtered), *(low for _, _, low in filtered)] if filtered else [],
        [plane for tensor in quantized.tensors for plane in byte_planes(tensor.value)],
    )


def _plane_shapes(entries: Sequence[Entry]) -> dict[str, list[tuple[int, int]]]:
    """What `_planes` gives for these entries."""
    coded = [entry.shape for entry in entries if entry.bits]
    columns = [(rows, 1) for rows, _ in coded]
    return {
        "codes": list(coded),
        "scales": [(len(coded), 1), *columns, *columns] if coded else [],
        "tensors": [(math.prod(e.shape), 1) for e in entries if not e.bits for _ in range(_DTYPES[e.kind].itemsize)],
    }


def _from_planes(entries: Sequence[Entry], planes: dict[str, list[np.ndarray]]) -> QuantizedModel:
    matrices, plain = [], []
    coded = [entry for entry in entries if entry.bits]
    scales = planes["scales"]
    for i, e in enumerate(coded):
        with _naming("codes"):
            codes = torch.from_numpy(planes["codes"][i])
            limit = 2 ** (e.bits - 1)
            if codes.numel() and not -limit <= int(codes.min()) <= int(codes.max()) < limit:
                raise ArtifactError(f"tensor {e.name!r}: a code does not fit its {e.bits} bits")
        with _naming("scales"):
            try:
                scale = from_scale_planes(int(scales[0][i, 0]), scales[1 + i], scales[1 + len(coded) + i])
            except ValueError as error:
                raise ArtifactError(f"tensor {e.name!r}: {error}") from error
        matrices.append(QuantizedMatrix(e.name, e.parameter, e.index, e.bits, codes, scale))
    position = 0
    for e in (entry for entry in entries if not entry.bits):
        dtype = _DTYPES[e.kind]
        value = from_byte_planes(planes["tensors"][position : position + dtype.itemsize], dtype, e.shape)
        position += dtype.itemsize
        plain.append(PlainTensor(e.name, e.parameter, e.index, value))
    return QuantizedModel(tuple(matrices), tuple(plain))


# --- header ---


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
        entries.append(Entry(m.name, m.parameter, m.index, f"int{m.bits}", m.shape))
    for t in quantized.tensors:
        if t.value.dtype not in _DTYPE_NAMES:
            raise ArtifactError(f"tensor {t.name!r}: got {t.value.dtype}, wanted one of {', '.join(_DTYPES)}")
        entries.append(Entry(t.name, t.parameter, t.index, _DTYPE_NAMES[t.value.dtype], t.shape))
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
        header = Header(VERSION, *_read_document(document), size)
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


def _read_document(document: dict[str, Any]) -> tuple[Any, ...]:
    wanted = {"config", "tensors", "sections", "tokenizer_sha256", "provenance"}
    if set(document) != wanted:
        raise ArtifactError(f"got the fields {', '.join(sorted(document))}, wanted {', '.join(sorted(wanted))}")
    provenance, tokenizer = document["provenance"], document["tokenizer_sha256"]
    _require(isinstance(document["config"], dict), "config", document["config"])
    _require(isinstance(provenance, dict), "provenance", provenance)
    _require(tokenizer is None or _is_hex(tokenizer, 64), "tokenizer_sha256", tokenizer)
    for name in ("tensors", "sections"):
        _require(isinstance(document[name], list), name, document[name])
    try:
        config = Config.from_dict(document["config"])
    except (ConfigError, TypeError, ValueError) as error:
        raise ArtifactError(f"configuration: {error}") from error
    entries = tuple(_read_entry(values) for values in document["tensors"])
    sections = tuple(_read_section(values) for values in document["sections"])
    return config, entries, sections, tokenizer, provenance


def _read_entry(values: Any) -> Entry:
    _require(isinstance(values, list) and len(values) == 5, "tensor", values)
    name, parameter, index, kind, shape = values
    _require(isinstance(name, str) and isinstance(parameter, str), "tensor name", values)
    _require(index is None or _is_count(index), "tensor index", values)
    _require(kind in _DTYPES or kind in [f"int{bits}" for bits in range(2, 9)], "tensor kind", values)
    _require(isinstance(shape, list) and len(shape) <= 4 and all(map(_is_count, shape)), "tensor shape", values)
    _require(kind in _DTYPES or len(shape) == 2, "tensor shape", values)
    _require(math.prod(shape) <= _ELEMENT_LIMIT, "tensor size", values)
    return Entry(name, parameter, index, kind, tuple(shape))


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
            if elements > min(_ELEMENT_LIMIT, section.size * _EXPANSION_LIMIT) or (section.size and not elements):
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
