"""The artifact: round trips, what load_model refuses, and every kind of damage."""

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.artifact import (
    build_model,
    decode_artifact,
    encode_artifact,
    load_model,
    read_artifact,
    read_header,
    write_artifact,
)
from model.codecs import CODECS, get_codec
from model.data.loaders import Batch
from model.errors import ArtifactError
from model.exchange import convert, export_safetensors, import_safetensors
from model.planes import FILTERS, best_filter, pack_scales, scale_plane_shapes, unpack_scales
from model.presets import get_preset
from model.quantized import PlainTensor, QuantizedModel
from tests.artifacts import (
    calibrated,
    resigned,
    same,
    small_artifact,
    small_model_config,
    small_quantized,
    with_section,
)
from tests.systems import golden_model


@pytest.mark.parametrize("codec", CODECS)
def test_round_trip_of_every_codec(tmp_path: Path, codec: str) -> None:
    config = small_model_config(codec)
    header = write_artifact(tmp_path / "a", small_quantized(), config, {"seed": 1}, tokenizer_sha256="ab" * 32)
    assert (tmp_path / "a").stat().st_size == header.file_size
    artifact = read_artifact(tmp_path / "a")
    assert artifact.header == header == read_header(tmp_path / "a")
    assert artifact.config == config
    assert artifact.header.provenance == {"seed": 1} and artifact.header.tokenizer_sha256 == "ab" * 32
    assert {section.codec for section in header.sections} <= {codec, "brotli"}
    assert same(artifact.state_dict, small_quantized().state_dict())


@pytest.mark.parametrize("preset", ["pr1413", "pr1499", "pr1514", "pr1530", "pr1727"])
def test_the_loaded_model_scores_as_the_dequantised_weights_bit_for_bit(preset: str, tmp_path: Path) -> None:
    """Each system's network and recipe; from its artifact, and from that by way of safetensors."""
    model, golden = golden_model("pr1530" if preset == "pr1727" else preset)
    config = dataclasses.replace(get_preset(preset), model=model.config)
    inputs, targets = golden["input_ids"].long(), golden["target_ids"].long()
    quantized = calibrated(model, config, [Batch(inputs, targets, None, inputs.shape[1])])
    write_artifact(tmp_path / "a", quantized, config)
    convert(tmp_path / "a", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    model.load_state_dict(quantized.state_dict())
    loaded = load_model(tmp_path / "c")
    with torch.no_grad():
        expected = model.loss(inputs, targets, reduction="none")
        assert torch.equal(loaded.loss(inputs, targets, reduction="none"), expected)
        assert expected.mean() < 11
    assert not loaded.training


def test_other_types_and_banks_with_kept_entries() -> None:
    quantized = small_quantized()
    kept = next(m for m in quantized.matrices if m.name == "blocks.3.attn.k")
    extra = [
        PlainTensor(kept.name, kept.parameter, kept.index, kept.dequantize().half()),
        PlainTensor("a", "a", None, torch.randn(3, 2)),
        PlainTensor("b", "b", None, torch.randn(7).bfloat16()),
        PlainTensor("c", "c", None, torch.tensor(2.5)),
        PlainTensor("d", "d", None, torch.empty(0)),
    ]
    mixed = QuantizedModel(tuple(m for m in quantized.matrices if m is not kept), (*quantized.tensors, *extra))
    decoded = decode_artifact(encode_artifact(mixed, small_model_config())[0]).quantized
    assert same(decoded.state_dict(), mixed.state_dict())
    assert [t.value.dtype for t in decoded.tensors] == [t.value.dtype for t in mixed.tensors]
    assert [m.bits for m in decoded.matrices] == [m.bits for m in mixed.matrices]


def test_what_the_format_cannot_hold() -> None:
    first, *others = small_quantized().matrices
    for broken, message in (
        (dataclasses.replace(first, codes=first.codes.int()), "wanted int8"),
        (dataclasses.replace(first, scales=first.scales[:-1]), r"wanted int8 \[R, C\] and float16 \[R\]"),
    ):
        with pytest.raises(ArtifactError, match=message):
            encode_artifact(QuantizedModel((broken, *others), ()), small_model_config())
    with pytest.raises(ArtifactError, match=r"tensor 'x': got torch.int64"):
        encode_artifact(QuantizedModel((), (PlainTensor("x", "x", None, torch.arange(3)),)), small_model_config())


def test_every_truncation_and_a_longer_file_are_refused() -> None:
    data = small_artifact()
    for size in [*range(0, 60), *range(60, len(data), 997), len(data) - 1]:
        with pytest.raises(ArtifactError, match=r"preamble|header|section|sections"):
            decode_artifact(data[:size])
    with pytest.raises(ArtifactError, match="bytes follow the last section"):
        decode_artifact(data + b"\0")


def test_a_flipped_bit_anywhere_is_refused_and_named() -> None:
    data = small_artifact()
    header = decode_artifact(data).header
    ends = np.cumsum([header.size, *(section.size for section in header.sections)])
    names = ["preamble|header", *(f"section '{section.name}'" for section in header.sections)]
    places = [*range(60), *range(60, header.size, 13), *range(header.size, len(data), 499)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        with pytest.raises(ArtifactError, match=names[int(np.searchsorted(ends, place, side="right"))]):
            decode_artifact(bytes(damaged))


def test_a_newer_version_and_an_unknown_codec() -> None:
    data = bytearray(small_artifact())
    data[8:10] = struct.pack("<H", 2)
    with pytest.raises(ArtifactError, match=r"format version 2 .* reads version 1"):
        decode_artifact(bytes(data))

    def change(document: dict[str, Any]) -> None:
        document["sections"][1][1] = "paq"

    with pytest.raises(ArtifactError, match="section 'scales': codec: got 'paq', wanted one of context, static"):
        decode_artifact(resigned(small_artifact(), change))
    with pytest.raises(ArtifactError, match="not an artifact"):
        decode_artifact(b"PK\x03\x04" + bytes(100))


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(document: dict[str, Any]) -> None:
        target: Any = document
        for key in keys:
            target = target[key]
        target[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("tensors", 0, 4, [1 << 30, 1 << 30]), "header: tensor size"),
        (_set("tensors", 0, 4, [1 << 15, 1 << 15]), "section 'codes'"),
        (_set("tensors", 0, 4, [1 << 16, (1 << 15) - 1]), "section 'codes': .* cannot hold"),
        (_set("tensors", 0, 4, [0, 1 << 30]), "section 'codes': .* cannot hold"),
        (lambda document: document["tensors"].extend(document["tensors"] * 30), "header: tensors"),
        (_set("config", "model", "loop_start", 1.5), "header: configuration: loop_start: got 1.5, wanted .* int"),
        (_set("config", "model", "rope_base", float("nan")), "header: configuration: rope_base"),
        (_set("config", "quant", "keep_fp16", [1]), "header: configuration: keep_fp16"),
        (_set("config", "eval", "compat", 1), "header: configuration: compat: got 1, wanted .* bool"),
        (_set("tensors", 0, 4, [64, -1]), "header: tensor shape"),
        (_set("tensors", 0, 4, [64, 65]), "section 'codes'"),
        (_set("tensors", 0, 3, "int9"), "header: tensor kind"),
        (_set("tensors", 0, 3, ["int6"]), "header: tensor kind"),
        (_set("tensors", 0, 5, "none"), "header: filter of scales"),
        (_set("tensors", 0, 2, 1), "header: tensor .*a second entry|header: parameter"),
        (_set("tensors", 0, [1]), "header: tensor"),
        (_set("tensors", {}), "header: tensors"),
        (_set("sections", 0, 2, 1 << 40), "header: section size"),
        (_set("sections", 0, 2, 1 << 30), "section 'codes': it ends at byte"),
        (_set("sections", []), "header: got sections"),
        (_set("sections", 0, 3, "zz" * 16), "header: section digest"),
        (_set("config", {"model": {"num_layers": "eleven"}}), "header: configuration"),
        (_set("config", {"modle": {}}), "header: configuration"),
        (_set("config", []), "header: config"),
        (_set("provenance", 3), "header: provenance"),
        (_set("tokenizer_sha256", "AB" * 32), "header: tokenizer_sha256"),
        (_set("extra", 1), "header: got the fields"),
    ],
)
def test_a_signed_header_with_nonsense_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        decode_artifact(resigned(small_artifact(), change))


@pytest.mark.parametrize("codec", CODECS)
def test_signed_sections_that_do_not_decode(codec: str) -> None:
    data = small_artifact(codec)
    shapes = [(40, 40)]
    other = get_codec(codec).encode([np.zeros(shape, np.int8) for shape in shapes])
    for body in (b"x", b"\0" * 100, other, other[:-1]):
        with pytest.raises(ArtifactError, match="section 'codes'"):
            decode_artifact(with_section(data, "codes", body))


def test_codes_beyond_their_bits_are_refused() -> None:
    with pytest.raises(ArtifactError, match="does not fit its 2 bits"):
        decode_artifact(resigned(small_artifact(), _set("tensors", 0, 3, "int2")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 12}, "'qo_bank' has shape"),
        ({"num_layers": 10_000_000}, "'qo_bank' has shape"),
        ({"num_loops": 10**9}, "'skip_weights' has shape"),
        ({"vocab_size": 65536}, "'tok_emb' has shape"),
        ({"smear_gate": True}, "parameter 'smear' is missing"),
        ({"parallel_lanes": 1}, "no parameter 'lane_mix'"),
        ({"num_kv_heads": 4}, "'kv_bank' has shape"),
    ],
)
def test_tensors_that_do_not_fit_the_configuration(changes: dict[str, Any], message: str) -> None:
    config = small_model_config()
    if changes.get("num_layers", 0) > 1000:  # too large for Config's own checks of the layer order to be worth running
        model = dataclasses.replace(config.model, **changes)
        config = dataclasses.replace(config, model=model)
    else:
        config = config.replace(**changes)
    with pytest.raises(ArtifactError, match=message):
        build_model(config, small_quantized().state_dict())


@pytest.mark.parametrize("seed", range(3))
def test_scale_planes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = [torch.rand(n, generator=generator).mul(10.0 ** -int(n % 4)).half() for n in (5, 0, 1, 300)]
    scales += [scales[3].sort().values, torch.full((9,), 65504.0).half(), torch.zeros(4).half()]
    chosen = [best_filter(s) for s in scales]
    assert chosen[3:5] == ["offset", "delta"]
    for filters in (chosen, ["delta"] * len(scales), [FILTERS[i % 2] for i in range(len(scales))]):
        planes = pack_scales(scales, filters)
        rows = [len(s) for s in scales]
        assert [plane.shape for plane in planes] == scale_plane_shapes(rows, filters)
        for got, wanted in zip(unpack_scales(planes, rows, filters), scales, strict=True):
            assert torch.equal(got, wanted)


def test_safetensors_export_and_import(tmp_path: Path) -> None:
    artifact = decode_artifact(small_artifact())
    export_safetensors(tmp_path / "model.safetensors", artifact)
    imported = import_safetensors(tmp_path / "model.safetensors")
    assert (
        encode_artifact(imported.quantized, imported.config, imported.header.provenance, tokenizer_sha256="ab" * 32)[0]
        == small_artifact()
    )
    wide = dataclasses.replace(artifact.quantized.matrices[0], bits=2)
    broken = QuantizedModel((wide, *artifact.quantized.matrices[1:]), artifact.quantized.tensors)
    export_safetensors(tmp_path / "broken.safetensors", dataclasses.replace(artifact, quantized=broken))
    with pytest.raises(ArtifactError, match="does not fit its 2 bits"):
        import_safetensors(tmp_path / "broken.safetensors")
    (tmp_path / "other").write_bytes(b"\xff" * 200)
    with pytest.raises(ArtifactError, match="other"):
        import_safetensors(tmp_path / "other")


def test_missing_files_are_named(tmp_path: Path) -> None:
    for read in (read_artifact, read_header, load_model):
        with pytest.raises(ArtifactError, match=r"nothing\.pgolf: cannot be read"):
            read(tmp_path / "nothing.pgolf")
