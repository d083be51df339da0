"""The public systems' artifact files: genuine ones, others written here as they write them, and what is refused.

tests/golden/public_artifacts.json says how the genuine ones were made.
"""

import io
import lzma
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch
import zstandard
from torch import Tensor

from model.artifact import build_model, decode_artifact, encode_artifact, read_artifact
from model.convert import from_reference, to_reference
from model.errors import ArtifactError, ConfigError
from model.exchange import convert
from model.files import sha256_bytes
from model.presets import get_preset
from model.public_artifact import (
    PickleMachine,
    import_public,
    parse_public_artifact,
    read_public_artifact,
    read_torch_file,
)
from pgolf_kernels.packing import byte_shuffle
from tests.artifacts import same, small_model_config, small_quantized
from tests.golden import FOLDER, load_json, load_safetensors
from tests.systems import golden_model


def public_content() -> dict[str, Any]:
    """What the public systems give to torch.save, from our quantised model."""
    quantized = small_quantized()
    config = small_model_config().model
    state = to_reference(quantized.state_dict(), config, banked=False)
    codes = {m.name: m for m in quantized.matrices}
    names = {"q": "attn.c_q", "k": "attn.c_k", "v": "attn.c_v", "o": "attn.proj", "up": "mlp.fc", "down": "mlp.proj"}
    stored: dict[str, Tensor] = OrderedDict()
    notes = {}
    for name, tensor in state.items():
        parts = name.split(".")
        ours = next(
            (
                f"blocks.{parts[1]}.{parts[2]}.{short}"
                for short, long in names.items()
                if name.endswith(f"{long}.weight")
            ),
            "tok_emb" if name == "tok_emb.weight" else None,
        )
        if ours:
            stored[f"{name}.q"], stored[f"{name}.scale"] = codes[ours].codes, codes[ours].scales
            notes[name] = "gptq (int6)"
        else:
            stored[name], notes[name] = tensor.half(), "passthrough (float16)"
    return {"w": stored, "m": notes}


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


PACKINGS = {
    "brotli with header": lambda raw: brotli.compress(byte_shuffle(raw, 2, header=True), quality=5),
    "lzma with header": lambda raw: lzma.compress(byte_shuffle(raw, 2, header=True), preset=1),
    "brotli, appended tail": lambda raw: brotli.compress(byte_shuffle(raw, 2, tail="appended"), quality=5),
    "zstd, appended tail": lambda raw: zstandard.compress(byte_shuffle(raw, 2, tail="appended")),
    "zlib, appended tail": lambda raw: zlib.compress(byte_shuffle(raw, 2, tail="appended")),
    "brotli alone": lambda raw: brotli.compress(raw, quality=5),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_public_files_give_the_model(packing: str, tmp_path: Path) -> None:
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(PACKINGS[packing](saved(public_content())))
    config = small_model_config()
    imported = import_public(read_public_artifact(path), config.model)
    assert same(imported.state_dict(), small_quantized().state_dict())
    assert {m.name for m in imported.matrices} == {m.name for m in small_quantized().matrices}
    build_model(config, imported.state_dict())
    assert same(decode_artifact(encode_artifact(imported, config)[0]).state_dict, imported.state_dict())


GENUINE = load_json("public_artifacts.json")["files"]


@pytest.mark.parametrize("name", GENUINE)
def test_genuine_files_give_what_their_own_loaders_make_of_them(name: str) -> None:
    artifact = read_public_artifact(FOLDER / "public" / name)
    state = artifact.state_dict()
    assert state.keys() == GENUINE[name].keys()
    for tensor, (dtype, shape, digest) in GENUINE[name].items():
        value = state[tensor].to(getattr(torch, dtype))
        assert list(value.shape) == shape
        assert sha256_bytes(value.reshape(-1).view(torch.uint8).numpy().tobytes()) == digest, tensor
    system = name.split("_")[0]
    config = get_preset(system).replace(
        num_layers=3, vocab_size=260, model_dim=264, num_heads=4, num_kv_heads=2, mlp_mult=1.0, xsa_last_n=3,
        loop_start=1, loop_end=2, parallel_start=-1 if system == "pr1413" else 1, keep_fp16=(),
        **({"bigram_vocab_size": 600} if system == "pr1499" else {}),
    )  # fmt: skip
    quantized = import_public(artifact, config.model)
    assert len(quantized.matrices) == len(artifact.codes)
    assert same(quantized.state_dict(), from_reference(state, config.model))
    data, _ = encode_artifact(quantized, config.replace(codec="static"))
    decoded = decode_artifact(data)
    assert same(decoded.state_dict, quantized.state_dict())
    build_model(config, decoded.state_dict)


def test_the_machine_reads_what_torch_reads() -> None:
    base = torch.arange(24).reshape(4, 6)
    content = {
        "float": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "view": base[1:3, ::2],
        "same storage": base.T,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "values": [1, -1, 255, 256, 70000, 1 << 40, -(1 << 40), 1.5, None, True, "text", (1, 2, 3, 4), ()],
        "nested": OrderedDict(a={"b": torch.zeros(1)}),
    }
    wanted = torch.load(io.BytesIO(saved(content)), weights_only=True)
    got = read_torch_file(saved(content))
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    assert got["values"] == wanted["values"] and torch.equal(got["nested"]["a"]["b"], torch.zeros(1))
    model, _ = golden_model("pr1530")
    state = read_torch_file(saved(model.state_dict()))
    assert same(state, dict(model.state_dict()))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/pgolf_bomb_went_off",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_code_in_a_pickle_is_refused(protocol: int, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": {}, "m": Bomb()}, protocol=protocol))
    with pytest.raises(ArtifactError, match="not allowed"):
        parse_public_artifact(brotli.compress(byte_shuffle(buffer.getvalue(), 2, header=True)))
    assert not Path("/tmp/pgolf_bomb_went_off").exists()


def program(*pieces: bytes) -> Any:
    return PickleMachine(b"".join(pieces), lambda key: bytes(8)).run()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def storage(size: int = 2, kind: str = "FloatStorage") -> bytes:
    return (
        b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + b"K" + bytes([size]) + b"tQ"
    )


def tensor(offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    def counts(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"

    call = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return call + storage() + b"J" + struct.pack("<i", offset) + counts(shape) + counts(stride) + b"\x89}tR."


def test_programs_that_torch_would_not_write() -> None:
    assert torch.equal(program(tensor(0, (2,), (1,))), torch.zeros(2))
    for pieces, message in (
        ((b"",), "ends early"),
        ((b".",), "ends with 0 values"),
        ((b"0",), "opcode b'0' is not allowed"),
        ((b"cos\nsystem\n",), "'os.system' is not allowed"),
        ((b"ctorch\nload\n",), "'torch.load' is not allowed"),
        ((b"cbuiltins\neval\n",), "not allowed"),
        ((b"ccollections\nOrderedDict\n(K\x01tR",), "not allowed"),
        ((b"ctorch\nFloatStorage\n)R",), "not allowed"),
        ((b"K\x01)R",), "no known function"),
        ((b"R",), "empty stack"),
        ((b"(u",), "wanted a dict"),
        ((b"}K\x01K\x02K\x03(u",), "wanted a dict"),
        ((b"}(K\x01u",), "key without a value"),
        ((b"}(]K\x02u",), "keys"),
        ((b"t",), "mark is missing"),
        ((b"h\x05",), "not remembered"),
        ((b"q\x00",), "empty stack"),
        ((b"X\xff\xff\xff\x7fabc",), "ends early"),
        ((b"\x80\x09",), "protocol 9"),
        ((storage(3),), "not 3 numbers"),
        ((storage(2, "QInt8Storage"),), "not allowed"),
        ((b"K\x01Q",), "wanted .'storage'"),
        ((tensor(1, (2,), (1,)),), "reaches entry 2"),
        ((tensor(0, (3,), (0,)),), "does not fit"),
        ((tensor(0, (2,), (2,)),), "reaches entry 2"),
        ((tensor(-1, (2,), (1,)),), "other types"),
        ((tensor(0, (1 << 30, 1 << 30), (1, 1)),), "other types"),
        ((tensor(0, (2,), (1, 1)),), "does not fit"),
    ):
        with pytest.raises(ArtifactError, match=message):
            program(*pieces)


def test_files_that_are_none() -> None:
    raw = saved(public_content())
    for data, message in (
        (b"", "cannot be decompressed"),
        (b"\x00" * 100, "public artifact|torch file"),
        (brotli.compress(b"hello"), "no file of torch.save"),
        (brotli.compress(b"BSHF\xffhello"), "stride: got 255"),
        (brotli.compress(raw[:-100]), "damaged"),
        (brotli.compress(saved([1, 2])), "wanted a dictionary"),
        (brotli.compress(saved({"w": {"a": 3}, "m": {}})), "not a tensor"),
        (brotli.compress(saved({"w": {"a.q": torch.zeros(2), "a.scale": torch.zeros(2)}, "m": {}})), "do not fit"),
    ):
        with pytest.raises(ArtifactError, match=message):
            parse_public_artifact(data)
    packed = PACKINGS["brotli with header"](raw)
    stream = PACKINGS["zlib, appended tail"](raw)
    with pytest.raises(ArtifactError, match="the stream ends early"):
        parse_public_artifact(stream[:-4])
    for size in range(0, len(packed), 9973):
        with pytest.raises(ArtifactError):
            parse_public_artifact(packed[:size])
    with pytest.raises(ArtifactError, match="unpacks to more than"):
        parse_public_artifact(brotli.compress(bytes((1 << 28) + 1), quality=1))


def test_converting_a_public_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "final_model.int6.ptz"
    path.write_bytes(PACKINGS["brotli with header"](saved(public_content())))
    with pytest.raises(ConfigError, match="wanted --preset"):
        convert(path, tmp_path / "model.pgolf")
    with pytest.raises(ArtifactError, match=r"tok_emb|has shape"):
        convert(path, tmp_path / "model.pgolf", preset="pr1530")
    monkeypatch.setattr("model.exchange.get_preset", lambda name: small_model_config())
    convert(path, tmp_path / "model.pgolf", preset="pr1530", codec="static")
    artifact = read_artifact(tmp_path / "model.pgolf")
    assert same(artifact.state_dict, small_quantized().state_dict())
    assert artifact.header.sections[0].codec == "static" and artifact.header.provenance == {"from": path.name}


def test_a_small_file_cannot_ask_for_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.public_artifact.SIZE_LIMIT", 4096)
    shared = torch.ones(300)
    with pytest.raises(ArtifactError, match="repeat a tensor"):
        parse_public_artifact(zlib.compress(saved({"w": {str(i): shared for i in range(14)}, "m": {}})))
    pieces = b"".join(storage(2, "DoubleStorage").replace(b"X\x01\x00\x00\x000", text(str(i))) for i in range(300))
    with pytest.raises(ArtifactError, match="storages overlap"):
        PickleMachine(pieces.replace(b"K\x02", b"K\x04"), lambda key: bytes(32)).run()


def test_a_row_scale_or_one_scale(tmp_path: Path) -> None:
    golden = load_safetensors("gptq.safetensors")
    codes, scales = golden["rowwise.absmax.R31.q"], golden["rowwise.absmax.R31.s"]
    content = {"w": {"a.q": codes, "a.scale": scales, "b.q": codes[0], "b.scale": torch.tensor(0.5)}, "m": {}}
    state = parse_public_artifact(brotli.compress(saved(content))).state_dict()
    assert torch.equal(state["a"], codes.float() * scales.float()[:, None])
    assert torch.equal(state["b"], codes[0].float() * 0.5)
