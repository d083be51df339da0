"""Artifacts from and to other files: safetensors, for tools that do not know the container, and the public systems'.

A quantised matrix becomes "<name>.codes" (int8 [R, C]) and "<name>.scales" (fp16 [R]), W = codes * scales[:, None];
other tensors keep their names. The metadata entry "pgolf" holds the rest of the artifact's header as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from model.artifact import (
    MAGIC,
    Artifact,
    Header,
    build_model,
    decode_artifact,
    encode_artifact,
    header_document,
    read_artifact,
    read_document,
    write_artifact,
)
from model.errors import ArtifactError, ConfigError
from model.files import atomic_write
from model.presets import get_preset
from model.public_artifact import import_public, read_public_artifact
from model.quantized import PlainTensor, QuantizedMatrix, QuantizedModel

METADATA_KEY = "pgolf"


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    preset: str | None = None,
    codec: str | None = None,
) -> None:
    """Writes the model of `source` to `target`, without loss.

    source: an artifact, a file of `export_safetensors` (its name ends in .safetensors), or a public system's artifact
    file, whose network is that of `preset`. target: a safetensors file if its name says so, else an artifact, coded
    with `codec` (None: as the configuration says). Raises ArtifactError; ConfigError for a public file with no preset.
    """
    artifact = _read(Path(source), preset)
    config = artifact.config.replace(codec=codec) if codec else artifact.config
    if Path(target).suffix == ".safetensors":
        export_safetensors(target, artifact)
    else:
        header = artifact.header
        write_artifact(target, artifact.quantized, config, header.provenance, tokenizer_sha256=header.tokenizer_sha256)


def _read(path: Path, preset: str | None) -> Artifact:
    if path.suffix == ".safetensors":
        return import_safetensors(path)
    with open(path, "rb") as file:
        ours = file.read(len(MAGIC)) == MAGIC
    if ours:
        return read_artifact(path)
    if preset is None:
        raise ConfigError(f"{path}: not an artifact of this package; wanted --preset for a public system's file")
    config = get_preset(preset)
    quantized = import_public(read_public_artifact(path), config.model)
    build_model(config, quantized.state_dict())
    return decode_artifact(encode_artifact(quantized, config.replace(codec="static"), {"from": path.name})[0])


def export_safetensors(path: str | os.PathLike[str], artifact: Artifact) -> None:
    """Writes codes, scales and tensors of an artifact, without loss."""
    tensors: dict[str, Tensor] = {}
    for matrix in artifact.quantized.matrices:
        tensors[f"{matrix.name}.codes"] = matrix.codes.contiguous()
        tensors[f"{matrix.name}.scales"] = matrix.scales.contiguous()
    for tensor in artifact.quantized.tensors:
        tensors[tensor.name] = tensor.value.contiguous()
    header = artifact.header
    document = header_document(
        artifact.quantized, artifact.config, header.sections, header.tokenizer_sha256, header.provenance
    )
    with atomic_write(path, "wb") as file:
        file.write(save(tensors, metadata={METADATA_KEY: json.dumps(document)}))


def import_safetensors(path: str | os.PathLike[str]) -> Artifact:
    """The artifact that `export_safetensors` wrote. Raises ArtifactError for any other file."""
    try:
        with safe_open(Path(path), framework="pt") as file:
            metadata = (file.metadata() or {}).get(METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata is None:
            raise ArtifactError("it has no 'pgolf' metadata; wanted a file of `export_safetensors`")
        document: Any = json.loads(metadata)
        if not isinstance(document, dict):
            raise ArtifactError("its 'pgolf' metadata is not a JSON object")
        return _from_tensors(document, tensors)
    except (SafetensorError, OSError, ValueError, RecursionError, ArtifactError) as error:
        raise ArtifactError(f"{path}: {error}") from error


def _from_tensors(document: dict[str, Any], tensors: dict[str, Tensor]) -> Artifact:
    config, entries, sections, tokenizer, provenance = read_document(document)

    def take(name: str, shape: tuple[int, ...], kind: str) -> Tensor:
        tensor = tensors.pop(name, None)
        if tensor is None or tuple(tensor.shape) != shape or str(tensor.dtype) != f"torch.{kind}":
            got = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ArtifactError(f"tensor {name!r}: got {got}, wanted {kind} {shape}")
        return tensor

    matrices, plain = [], []
    for e in entries:
        if e.bits:
            codes = take(f"{e.name}.codes", e.shape, "int8")
            scales = take(f"{e.name}.scales", e.shape[:1], "float16")
            matrices.append(QuantizedMatrix(e.name, e.parameter, e.index, e.bits, codes, scales))
            matrices[-1].check_codes()
        else:
            plain.append(PlainTensor(e.name, e.parameter, e.index, take(e.name, e.shape, e.kind)))
    if tensors:
        raise ArtifactError(f"tensor {min(tensors)!r} is not listed in the metadata")
    quantized = QuantizedModel(tuple(matrices), tuple(plain))
    header = Header(config, entries, sections, tokenizer, provenance, size=0)
    return Artifact(header, quantized, quantized.state_dict())
