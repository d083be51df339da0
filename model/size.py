"""What an artifact weighs, tensor by tensor: an existing one, or the one that a run's weights would give.

For weights that are not quantised yet, codes come from plain rounding with the recipe's scales: GPTQ moves codes, but
hardly their distribution. They are then coded in the static mode, which takes half a second; the context mode that
artifacts use by default is a few tenths of a per cent below it (docs/packing.md).
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from safetensors import SafetensorError, safe_open

from model.artifact import Header, decode_artifact, encode_artifact, read_artifact
from model.codecs import get_codec
from model.config import Config
from model.errors import ArtifactError, ConfigError
from model.gpt import GPT
from model.quantize import quantize_with_hessians
from model.quantized import QuantizedModel
from model.rules import SIZE_BUDGET
from model.run import RunDir


@dataclass(frozen=True)
class SizeRow:
    """A tensor, or a part of the file. `entropy` is that of the codes (order 0) in bits a weight.

    The bytes of a section are shared out to its tensors: codes to each class by what it takes when it is coded alone
    (general compressors: by entropy) and within a class by entropy; scales and the rest by length.
    """

    name: str
    kind: str  # class: embed, attn, mlp, bigram, other; or file
    shape: tuple[int, ...]
    bits: int
    entropy: float
    bytes: float

    @property
    def stored(self) -> float:
        """Bits a weight in the file, scales included."""
        return 8 * self.bytes / max(_size(self.shape), 1)


@dataclass(frozen=True)
class SizeReport:
    rows: tuple[SizeRow, ...]
    predicted: bool  # from unquantised weights
    artifact_bytes: int
    code_bytes: int  # of the packed entry script; 0 when it was not asked for

    @property
    def total(self) -> int:
        return self.artifact_bytes + self.code_bytes

    def classes(self) -> list[SizeRow]:
        """One row a class and kind of bits, with the average entropy."""
        groups: dict[tuple[str, int], list[SizeRow]] = {}
        for row in self.rows:
            groups.setdefault((row.kind, row.bits), []).append(row)
        result = []
        for (kind, bits), rows in groups.items():
            if kind == "file":
                result += rows
                continue
            weights = sum(_size(row.shape) for row in rows)
            entropy = sum(row.entropy * _size(row.shape) for row in rows) / max(weights, 1)
            name = f"{len(rows)} tensor{'s' if len(rows) > 1 else ''}"
            result.append(SizeRow(name, kind, (weights,), bits, entropy, sum(row.bytes for row in rows)))
        return result


def size_report(path: str | os.PathLike[str], *, code: bool = True) -> SizeReport:
    """The sizes of `path`: an artifact, a run's folder (its artifact, else its weights), a checkpoint or weights.

    Weights are taken as the run's configuration says. `code` adds the entry script that `pgolf pack` would ship. Raises
    ArtifactError or ConfigError for anything else.
    """
    path = Path(path)
    artifact_path = RunDir(path, writes=False).artifact_path if path.is_dir() else path
    predicted = not artifact_path.is_file() or path.suffix in (".safetensors", ".pt")
    if predicted:
        config, model = _load_weights(path)
        data, header = encode_artifact(round_to_nearest(model, config), config.replace(codec="static"))
        quantized = decode_artifact(data).quantized
    else:
        artifact = read_artifact(artifact_path)
        header, quantized = artifact.header, artifact.quantized
    code_bytes = code_size(header.config) if code else 0
    return SizeReport(tuple(size_rows(quantized, header)), predicted, header.file_size, code_bytes)


def code_size(config: Config) -> int:
    """Bytes of the entry script that `pgolf pack` would ship with a run of this configuration; takes seconds, once.

    Raises PgolfError where the sources of the n-gram hints are wanted and not installed.
    """
    from model.pack import entry_script, uses_ngram

    return len(entry_script(ngram=uses_ngram(config)))


def size_rows(quantized: QuantizedModel, header: Header) -> list[SizeRow]:
    """The tensors of an artifact, the largest first, and what belongs to none of them."""
    sections = {section.name: section.size for section in header.sections}
    entropies = {matrix.name: entropy_of(matrix.codes) for matrix in quantized.matrices}
    information = {m.name: max(entropies[m.name], 1e-6) * m.codes.numel() for m in quantized.matrices}
    coded = _bytes_by_class(quantized, header, information)
    scales = sum(matrix.scales.numel() for matrix in quantized.matrices) or 1
    stored = sum(tensor.value.numel() * tensor.value.element_size() for tensor in quantized.tensors) or 1
    rows = []
    for matrix in quantized.matrices:
        entropy = entropies[matrix.name]
        size = coded[_class_of(matrix.name)] * information[matrix.name]
        size += sections["scales"] * matrix.scales.numel() / scales
        rows.append(SizeRow(matrix.name, _class_of(matrix.name), matrix.shape, matrix.bits, entropy, size))
    for tensor in quantized.tensors:
        width = 8 * tensor.value.element_size()
        size = sections["tensors"] * tensor.value.numel() * width / 8 / stored
        rows.append(SizeRow(tensor.name, _class_of(tensor.name), tensor.shape, width, float(width), size))
    rows.sort(key=lambda row: -row.bytes)
    return [*rows, SizeRow("header", "file", (), 0, 0.0, float(header.size))]


def _bytes_by_class(quantized: QuantizedModel, header: Header, information: dict[str, float]) -> dict[str, float]:
    """Bytes of the codes' section for each bit of information (by matrix), by class."""
    section = next(section for section in header.sections if section.name == "codes")
    bits: dict[str, float] = {}
    members: dict[str, list[np.ndarray]] = {}
    for matrix in quantized.matrices:
        kind = _class_of(matrix.name)
        bits[kind] = bits.get(kind, 0.0) + information[matrix.name]
        members.setdefault(kind, []).append(matrix.codes.numpy())
    alone = bits
    if section.codec in ("static", "context"):
        alone = {kind: float(len(get_codec(section.codec).encode(codes))) for kind, codes in members.items()}
    whole = sum(alone.values()) or 1.0
    return {kind: section.size * alone[kind] / whole / bits[kind] for kind in bits}


def print_table(report: SizeReport, budget: int = SIZE_BUDGET) -> Table:
    """The report as a table: classes, then tensors, then the totals against the budget. Entropy and what is stored
    (scales included) are bits a weight."""
    title = "predicted from the weights" if report.predicted else None
    table = Table(title=title, box=None, padding=(0, 1, 0, 0))  # fits 80 columns
    table.add_column("tensor", min_width=18, overflow="fold")  # cut short, the names of q and o look alike
    table.add_column("class")
    for title in ("shape", "bits", "entropy", "stored", "bytes", "share"):
        table.add_column(title, justify="right")
    classes = report.classes()
    for rows in (classes, report.rows):
        for row in rows:
            share = f"{row.bytes / report.artifact_bytes:.2%}"
            shape = " x ".join(f"{n:,}" if rows is classes else str(n) for n in row.shape)
            bits = str(row.bits or "")
            measures = (f"{row.entropy:.3f}", f"{row.stored:.3f}") if bits else ("", "")
            table.add_row(row.name, row.kind, shape, bits, *measures, f"{row.bytes:,.0f}", share)
        table.add_section()
    table.add_row("artifact", "", "", "", "", "", f"{report.artifact_bytes:,}", "")
    if report.code_bytes:
        table.add_row("code", "", "", "", "", "", f"{report.code_bytes:,}", "")
    left = budget - report.total
    table.add_row("total", "", "", "", "", "", f"{report.total:,}", "")
    table.add_row("left" if left >= 0 else "over", "", "", "", "", "", f"{abs(left):,}", "")
    return table


def entropy_of(codes: torch.Tensor) -> float:
    """Order-0 entropy of int8 codes in bits each."""
    if codes.numel() == 0:
        return 0.0
    counts = torch.bincount(codes.reshape(-1).to(torch.int64) + 128, minlength=256)
    shares = counts[counts > 0].double() / codes.numel()
    return float(-(shares * shares.log2()).sum())


def round_to_nearest(model: GPT, config: Config) -> QuantizedModel:
    """The quantised model without calibration data: with unit Hessians, GPTQ is rounding to nearest."""
    hessians = {}
    units: dict[int, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, parameter, _ in model.matrix_names():
        width = parameters[parameter].shape[-1]
        hessians[name] = units.setdefault(width, torch.eye(width))
    return quantize_with_hessians(model, dataclasses.replace(config.quant, gptq_damping=0.0), hessians, "cpu")


def _load_weights(path: Path) -> tuple[Config, GPT]:
    from model.pipeline import load_weights

    if path.is_file() and path.suffix == ".safetensors":
        config = _stored_config(path)
    else:
        folder = next((f for f in (path, *path.parents) if (f / "config.json").is_file()), path)
        config = RunDir(folder, writes=False).config()
    return config, load_weights(path, config, torch.device("cpu"))


def _stored_config(path: Path) -> Config:
    """The configuration in the metadata of a run's model.safetensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return Config.from_dict(json.loads((file.metadata() or {})["config"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, ConfigError) as error:
        raise ArtifactError(
            f"{path}: no configuration in its metadata ({error}); wanted the weights of a run"
        ) from error


def _class_of(name: str) -> str:
    if name.startswith("tok_emb"):
        return "embed"
    classes = {".attn.": "attn", ".mlp.": "mlp", "bigram_": "bigram"}
    return next((kind for part, kind in classes.items() if part in name), "other")


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
