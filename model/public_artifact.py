"""Reads the artifact files of the public systems, and executes nothing in them.

Those files (openai/parameter-golf pull requests 1413, 1499, 1514, 1530, 1727) are what torch.save wrote for
{"w": tensors, "m": how each was quantised}: a zip of stored entries with a pickle, byte-shuffled and compressed. The
pickle is read by a small machine of its own that knows the few opcodes in question, builds dictionaries, lists,
tuples, numbers, strings and tensors, and refuses everything else; Python's pickle module is not involved.
"""

from __future__ import annotations

import io
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import brotli
import numpy as np
import torch
import zstandard
from torch import Tensor

from model.codecs import LZMA_MEMORY_LIMIT, ZSTD_WINDOW_LIMIT, brotli_decompress
from model.config import ModelConfig
from model.convert import from_reference
from model.errors import ArtifactError
from model.gpt import GPT
from model.quantized import PlainTensor, QuantizedMatrix, QuantizedModel
from pgolf_kernels.packing import SHUFFLE_MAGIC, byte_unshuffle

SIZE_LIMIT = 1 << 28  # unpacked; the public files unpack to some 36 MB
_DEPTH_LIMIT = 1 << 20  # entries on the machine's stack

_STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
_MATRIX_NAMES = {
    "attn.c_q": "attn.q",
    "attn.c_k": "attn.k",
    "attn.c_v": "attn.v",
    "attn.proj": "attn.o",
    "mlp.fc": "mlp.up",
    "mlp.proj": "mlp.down",
    "bigram.embed": "bigram_embed",
    "bigram.proj": "bigram_proj",
}


@dataclass(frozen=True)
class PublicArtifact:
    """`codes` and `scales` by the reference's tensor name, and the tensors stored as they are."""

    codes: dict[str, Tensor]
    scales: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def state_dict(self) -> dict[str, Tensor]:
        """Dequantised fp32 tensors under the reference's names."""
        state = {name: tensor.float() for name, tensor in self.tensors.items()}
        for name, codes in self.codes.items():
            state[name] = codes.float() * self.scales[name].float().reshape(-1, *[1] * (codes.dim() - 1))
        return state


def read_public_artifact(path: str | os.PathLike[str]) -> PublicArtifact:
    """Reads a public artifact file (brotli, lzma, zstd or zlib; shuffled with or without the "BSHF" header).

    Raises ArtifactError for anything that is not one, is damaged, or asks for more than it may.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return parse_public_artifact(data)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error


def parse_public_artifact(data: bytes) -> PublicArtifact:
    """`read_public_artifact` of bytes."""
    if len(data) > SIZE_LIMIT:
        raise ArtifactError(f"public artifact: it has more than {SIZE_LIMIT:,} bytes")
    content = read_torch_file(_unshuffled(_decompressed(data)))
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("w"), dict)
        or not isinstance(content.get("m"), dict)
    ):
        raise ArtifactError("public artifact: wanted a dictionary with the entries 'w' and 'm'")
    stored = content["w"]
    for name, value in stored.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ArtifactError(f"public artifact: entry {str(name)[:100]!r} is not a tensor with a name")
    if sum(tensor.numel() for tensor in stored.values()) > SIZE_LIMIT:
        raise ArtifactError("public artifact: its entries repeat a tensor to become far more than the file holds")
    codes, scales, tensors = {}, {}, {}
    for name, tensor in stored.items():
        base = name.removesuffix(".q")
        if base != name and f"{base}.scale" in stored:
            scale = stored[f"{base}.scale"]
            if tensor.dtype != torch.int8 or tensor.dim() == 0 or scale.numel() not in (1, tensor.shape[0]):
                raise ArtifactError(f"public artifact: tensor {name!r} and its scales do not fit each other")
            codes[base] = tensor
            scales[base] = scale.reshape(-1).expand(tensor.shape[0])
        elif not (name.endswith(".scale") and f"{name.removesuffix('.scale')}.q" in stored):
            tensors[name] = tensor
    return PublicArtifact(codes, scales, tensors)


def import_public(artifact: PublicArtifact, config: ModelConfig) -> QuantizedModel:
    """The same codes and scales as a model of ours. Raises ArtifactError when they do not fit the configuration.

    Scales that the file holds in fp32 are not fp16 numbers in general: their matrices become fp32 tensors.
    """
    state = from_reference(artifact.state_dict(), config)
    with torch.device("meta"):
        places = GPT(config).matrix_names()
    if config.bigram_vocab_size:
        places.append(("bigram_embed", "bigram_embed", None))
    reference_names = {_our_name(name): name for name in artifact.codes}
    matrices, tensors, banks = [], [], set()
    for name, parameter, index in places:
        banks.add(parameter)
        reference = reference_names.get(name)
        value = state[parameter] if index is None else state[parameter][index]
        codes, scales = artifact.codes.get(reference or ""), artifact.scales.get(reference or "")
        if codes is not None and scales is not None and scales.dtype == torch.float16 and codes.shape == value.shape:
            bits = max(2, int(codes.to(torch.int16).abs().max()).bit_length() + 1) if codes.numel() else 2
            matrices.append(QuantizedMatrix(name, parameter, index, min(bits, 8), codes, scales.contiguous()))
        else:
            tensors.append(PlainTensor(name, parameter, index, _smallest_type(value)))
    for name, value in state.items():
        if name not in banks:
            tensors.append(PlainTensor(name, name, None, _smallest_type(value)))
    return QuantizedModel(tuple(matrices), tuple(tensors))


def _our_name(reference: str) -> str:
    name = reference.removesuffix(".weight")
    for theirs, ours in _MATRIX_NAMES.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + ours
    return name


def _smallest_type(value: Tensor) -> Tensor:
    """fp16 where that loses nothing."""
    half = value.to(torch.float16)
    return half if torch.equal(half.float(), value) else value


# --- containers ---


def _decompressed(data: bytes) -> bytes:
    known: tuple[tuple[bytes, Callable[[bytes, int], bytes]], ...] = (
        (b"\xfd7zXZ", _lzma_stream),
        (b"\x5d\x00\x00", _lzma_stream),
        (b"\x28\xb5\x2f\xfd", _zstd_stream),
        (b"\x78", _zlib_stream),
    )
    unpack = next((stream for magic, stream in known if data.startswith(magic)), brotli_decompress)
    try:
        raw = unpack(data, SIZE_LIMIT)
    except (brotli.error, lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError, MemoryError) as error:
        raise ArtifactError(f"public artifact: cannot be decompressed ({error})") from error
    if len(raw) > SIZE_LIMIT:
        raise ArtifactError(f"public artifact: unpacks to more than {SIZE_LIMIT:,} bytes")
    return raw


# Each gives at most size + 1 bytes, so that the caller sees data that holds more.


def _lzma_stream(data: bytes, size: int) -> bytes:
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_AUTO, memlimit=LZMA_MEMORY_LIMIT)
    return _whole(unpacker.decompress(data, size + 1), unpacker.eof, size)


def _zlib_stream(data: bytes, size: int) -> bytes:
    unpacker = zlib.decompressobj()
    return _whole(unpacker.decompress(data, size + 1), unpacker.eof, size)


def _zstd_stream(data: bytes, size: int) -> bytes:
    unpacker = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_LIMIT)
    pieces: list[bytes] = []
    with unpacker.stream_reader(data) as reader:
        while (left := size + 1 - sum(map(len, pieces))) > 0 and (piece := reader.read(min(left, 1 << 24))):
            pieces.append(piece)
    return b"".join(pieces)


def _whole(raw: bytes, ended: bool, size: int) -> bytes:
    if len(raw) <= size and not ended:
        raise EOFError("the stream ends early")
    return raw


def _unshuffled(raw: bytes) -> bytes:
    try:
        plain = bytes(byte_unshuffle(raw)) if raw.startswith(SHUFFLE_MAGIC) else raw
    except ValueError as error:
        raise ArtifactError(f"public artifact: {error}") from error
    if plain.startswith(b"PK"):
        return plain
    without_header = bytes(byte_unshuffle(raw, 2, tail="appended"))
    if not without_header.startswith(b"PK"):
        raise ArtifactError("public artifact: no file of torch.save inside")
    return without_header


def read_torch_file(data: bytes) -> Any:
    """What torch.save wrote, as far as it consists of containers, numbers, strings and tensors."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = {}
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                    raise ArtifactError(f"torch file: entry {info.filename[:100]!r} is compressed or too long")
                entries[info.filename] = info
            names = [name for name in entries if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise ArtifactError(f"torch file: got {len(names)} entries data.pkl, wanted one")
            prefix = names[0].removesuffix("data.pkl")
            order = f"{prefix}byteorder"
            if order in entries and archive.read(order) != b"little":
                raise ArtifactError("torch file: its numbers are not little-endian")

            def storage(key: str) -> bytes:
                name = f"{prefix}data/{key}"
                if name not in entries:
                    raise ArtifactError(f"torch file: storage {key[:100]!r} is missing")
                return archive.read(name)

            return PickleMachine(archive.read(names[0]), storage).run()
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, ValueError) as error:
        raise ArtifactError(f"torch file: damaged ({error})") from error


# --- the pickle machine ---


@dataclass(frozen=True)
class _Global:
    """A name in the pickle: never looked up, only compared with those that are known."""

    module: str
    name: str


_MARK = object()


class PickleMachine:
    """Runs the opcodes that torch.save writes for dictionaries of tensors; ArtifactError for every other one."""

    def __init__(self, program: bytes, storage: Callable[[str], bytes]) -> None:
        self.program = program
        self.position = 0
        self.storage = storage
        self.storages: dict[str, Tensor] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storage_bytes = self.tensor_bytes = 0

    def run(self) -> Any:
        while True:
            opcode = self._take(1)
            if opcode == b".":
                if len(self.stack) != 1:
                    raise ArtifactError(f"pickle: ends with {len(self.stack)} values, wanted one")
                return self.stack[0]
            operation = self._OPERATIONS.get(opcode)
            if operation is None:
                raise ArtifactError(f"pickle: opcode {opcode!r} is not allowed")
            operation(self)
            if len(self.stack) > _DEPTH_LIMIT:
                raise ArtifactError("pickle: too many values")

    # Reading.

    def _take(self, size: int) -> bytes:
        piece = self.program[self.position : self.position + size]
        if len(piece) != size:
            raise ArtifactError("pickle: ends early")
        self.position += size
        return piece

    def _number(self, code: str) -> int:
        return int(struct.unpack(code, self._take(struct.calcsize(code)))[0])

    def _line(self) -> str:
        end = self.program.find(b"\n", self.position)
        if end < 0:
            raise ArtifactError("pickle: ends early")
        line = self.program[self.position : end]
        self.position = end + 1
        return line.decode("utf-8")

    # The stack.

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise ArtifactError("pickle: takes a value from an empty stack")
        return self.stack.pop()

    def _top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ArtifactError(f"pickle: wanted a {kind.__name__} on the stack")
        return self.stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise ArtifactError("pickle: a mark is missing")

    # Operations.

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _protocol(self) -> None:
        version = self._number("B")
        if version > 5:
            raise ArtifactError(f"pickle: protocol {version}, wanted at most 5")

    def _text(self, code: str) -> None:
        self._push(self._take(self._number(code)).decode("utf-8"))

    def _long(self) -> None:
        self._push(int.from_bytes(self._take(self._number("B")), "little", signed=True))

    def _tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(values)))

    def _put(self, code: str) -> None:
        index = self._number(code)
        if not self.stack or self.stack[-1] is _MARK:
            raise ArtifactError("pickle: remembers a value from an empty stack")
        self.memo[index] = self.stack[-1]

    def _get(self, code: str) -> None:
        index = self._number(code)
        if index not in self.memo:
            raise ArtifactError(f"pickle: value {index} was not remembered")
        self._push(self.memo[index])

    def _set(self, values: list[Any]) -> None:
        target = self._top(dict)
        if len(values) % 2:
            raise ArtifactError("pickle: a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int):
                raise ArtifactError("pickle: wanted strings or integers as keys")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def _append(self, values: list[Any]) -> None:
        self._top(list).extend(values)

    def _append_one(self) -> None:
        value = self._pop()
        self._append([value])

    def _build(self) -> None:
        """State of an object: torch adds a `_metadata` attribute to state dicts, which nothing here needs."""
        self._pop()
        self._top(dict)

    def _global(self) -> None:
        module, name = self._line(), self._line()
        known = (
            (module == "torch" and name in _STORAGES)
            or (module, name) == ("torch._utils", "_rebuild_tensor_v2")
            or (module, name) == ("collections", "OrderedDict")
        )
        if not known:
            raise ArtifactError(f"pickle: {f'{module}.{name}'[:100]!r} is not allowed")
        self._push(_Global(module, name))

    def _persistent(self) -> None:
        value = self._pop()
        if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
            raise ArtifactError("pickle: wanted ('storage', type, key, place, size)")
        _, kind, key, _, size = value
        if not isinstance(kind, _Global) or kind.name not in _STORAGES or not isinstance(key, str):
            raise ArtifactError("pickle: a storage of unknown type")
        if key not in self.storages:
            content = bytearray(self.storage(key))
            self.storage_bytes += len(content)
            if self.storage_bytes > 2 * SIZE_LIMIT:
                raise ArtifactError("pickle: its storages overlap to become far more than the file holds")
            self.storages[key] = torch.from_numpy(np.frombuffer(content, np.uint8))
        raw, dtype = self.storages[key], _STORAGES[kind.name]
        if type(size) is not int or size < 0 or size * dtype.itemsize != raw.numel():
            raise ArtifactError(f"pickle: storage {key[:100]!r} has {raw.numel()} bytes, not {size} numbers of {dtype}")
        self._push(raw.view(dtype))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ArtifactError("pickle: calls something that is no known function")
        if function.name == "OrderedDict" and not arguments:
            self._push({})
        elif function.name == "_rebuild_tensor_v2":
            tensor = _strided(arguments)
            self.tensor_bytes += tensor.numel() * tensor.element_size()
            if self.tensor_bytes > 2 * SIZE_LIMIT:
                raise ArtifactError("pickle: its tensors share storages to become far more than the file holds")
            self._push(tensor)
        else:
            raise ArtifactError(f"pickle: {function.name} with these arguments is not allowed")

    _OPERATIONS: ClassVar[dict[bytes, Callable[[PickleMachine], None]]] = {
        b"\x80": _protocol,
        b"(": lambda self: self._push(_MARK),
        b"}": lambda self: self._push({}),
        b"]": lambda self: self._push([]),
        b")": lambda self: self._push(()),
        b"t": lambda self: self._push(tuple(self._pop_to_mark())),
        b"\x85": lambda self: self._tuple(1),
        b"\x86": lambda self: self._tuple(2),
        b"\x87": lambda self: self._tuple(3),
        b"N": lambda self: self._push(None),
        b"\x88": lambda self: self._push(True),
        b"\x89": lambda self: self._push(False),
        b"J": lambda self: self._push(self._number("<i")),
        b"K": lambda self: self._push(self._number("<B")),
        b"M": lambda self: self._push(self._number("<H")),
        b"\x8a": _long,
        b"G": lambda self: self._push(struct.unpack(">d", self._take(8))[0]),
        b"X": lambda self: self._text("<I"),
        b"q": lambda self: self._put("<B"),
        b"r": lambda self: self._put("<I"),
        b"h": lambda self: self._get("<B"),
        b"j": lambda self: self._get("<I"),
        b"s": _set_item,
        b"u": lambda self: self._set(self._pop_to_mark()),
        b"a": _append_one,
        b"e": lambda self: self._append(self._pop_to_mark()),
        b"b": _build,
        b"c": _global,
        b"Q": _persistent,
        b"R": _reduce,
    }


def _strided(arguments: tuple[Any, ...]) -> Tensor:
    """torch's (storage, offset, size, stride, requires_grad, hooks) as a tensor of its own, bounds checked."""
    if len(arguments) < 4:
        raise ArtifactError("pickle: a tensor with too few arguments")
    storage, offset, size, stride = arguments[:4]
    counts = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [None]
    if not isinstance(storage, Tensor) or not all(type(n) is int and 0 <= n <= SIZE_LIMIT for n in counts):
        raise ArtifactError("pickle: a tensor with arguments of other types than torch writes")
    if len(size) != len(stride) or len(size) > 8 or math.prod(size) > storage.numel():
        shape = str(size)[:100]
        raise ArtifactError(f"pickle: a tensor of shape {shape} does not fit its storage of {storage.numel()} numbers")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= storage.numel():
        raise ArtifactError(f"pickle: a tensor reaches entry {last} of a storage of {storage.numel()} numbers")
    return storage.as_strided(size, stride, offset).clone() if math.prod(size) else storage.new_empty(size)
