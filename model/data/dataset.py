"""A data set on disk, opened and checked: ours (`pgolf data build`) or the public layout (`pgolf data download`).

The public layout: DATA_DIR/datasets/fineweb10B_sp8192/fineweb_{train,val}_*.bin and
DATA_DIR/tokenizers/fineweb_8192_bpe.model (`sp8192` is the variant).
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.data.manifest import MANIFEST, read_manifest
from model.data.shards import BOS_ID, check_ids, read_shard, shard_length
from model.data.tokenizer import ByteTables, Tokenizer
from model.errors import DataError
from model.files import sha256_bytes

DEFAULT_VARIANT = "sp8192"
_PUBLIC_PREFIX = "fineweb10B_"


@dataclass(frozen=True)
class Dataset:
    """What training and evaluation need. `manifest` is empty for the public layout."""

    name: str
    train_shards: list[Path]
    valid_shards: list[Path]
    tokenizer: Tokenizer
    byte_tables: ByteTables
    manifest: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @cached_property
    def valid_tokens(self) -> np.ndarray:
        """All validation tokens, uint16 [N], each document behind BOS. Raises DataError for an id out of range."""
        tokens = np.concatenate([read_shard(path) for path in self.valid_shards])
        check_ids(tokens, self.vocab_size, f"{self.name}, validation")
        return tokens

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the data set is: of the manifest, or of the tokenizer and the shards' names and lengths."""
        parts: Any = self.manifest or {
            "tokenizer": sha256_bytes(self.tokenizer.model),
            "shards": [[path.name, shard_length(path)] for path in [*self.train_shards, *self.valid_shards]],
        }
        return sha256_bytes(json.dumps(parts, sort_keys=True).encode())


def open_dataset(data_dir: str | os.PathLike[str], variant: str | None = None) -> Dataset:
    """Opens the data set in `data_dir`; `variant` (default sp8192, or the only one there) matters to the public layout.

    Checks headers and sizes of all shards and that manifest, tokenizer and the head of each split fit together; `pgolf
    data verify` checks the rest. Raises DataError naming what is missing, damaged or does not fit.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, wanted a data set (pgolf data build or download makes one)")
    dataset = _open_built(folder) if (folder / MANIFEST).is_file() else _open_public(folder, variant)
    for shards, split in ((dataset.train_shards, "training"), (dataset.valid_shards, "validation")):
        if not any(shard_length(path) for path in shards):
            raise DataError(f"{dataset.name}: the {split} split is empty")
        head = read_shard(shards[0])[: 1 << 20]
        check_ids(head, dataset.vocab_size, shards[0])
        if head.size and head[0] != BOS_ID:
            raise DataError(f"{shards[0]}: starts with id {head[0]}, wanted BOS = {BOS_ID}")
    return dataset


def _open_built(folder: Path) -> Dataset:
    manifest = read_manifest(folder)
    tokenizer = Tokenizer.load(folder / _plain_name(manifest["tokenizer"]["file"]))
    if sha256_bytes(tokenizer.model) != manifest["tokenizer"]["sha256"]:
        raise DataError(f"{tokenizer.name}: not the tokenizer of these shards (its hash is not the manifest's)")
    paths: dict[str, list[Path]] = {"train": [], "valid": []}
    for split, found in paths.items():
        for shard in manifest["splits"][split]["shards"]:
            path = folder / _plain_name(shard["file"])
            count = shard_length(path)
            if count != shard["tokens"]:
                raise DataError(f"{path}: {count} tokens, wanted {shard['tokens']} as in the manifest")
            found.append(path)
        if not found:
            raise DataError(f"{folder / MANIFEST}: no shards in the {split} split, wanted at least one")
    return Dataset(folder.name, paths["train"], paths["valid"], tokenizer, tokenizer.byte_tables(), manifest)


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise DataError(f"manifest: file {name!r}, wanted a plain name in the data set's own folder")
    return name


def _open_public(folder: Path, variant: str | None) -> Dataset:
    found = sorted(path.name.removeprefix(_PUBLIC_PREFIX) for path in folder.glob(f"datasets/{_PUBLIC_PREFIX}*"))
    if variant is None:
        variant = found[0] if len(found) == 1 else DEFAULT_VARIANT
    if variant not in found:
        here = f"there are {', '.join(found)}" if found else "there is neither that nor a manifest.json"
        raise DataError(f"{folder}: wanted datasets/{_PUBLIC_PREFIX}{variant}, {here}")
    shards = folder / "datasets" / f"{_PUBLIC_PREFIX}{variant}"
    train, valid = (sorted(shards.glob(f"fineweb_{split}_*.bin")) for split in ("train", "val"))
    for paths, split in ((train, "train"), (valid, "val")):
        if not paths:
            raise DataError(f"{shards}: no fineweb_{split}_*.bin")
    tokenizer = Tokenizer.load(folder / "tokenizers" / public_tokenizer_name(variant))
    return Dataset(f"{_PUBLIC_PREFIX}{variant}", train, valid, tokenizer, tokenizer.byte_tables(public_rule=True))


def public_tokenizer_name(variant: str) -> str:
    """The tokenizer's file name for a public variant: sp8192 -> fineweb_8192_bpe.model (DataError for another form)."""
    match = re.fullmatch(r"sp(\d+)", variant)
    if not match:
        raise DataError(f"variant: got {variant!r}, wanted the form sp8192")
    return f"fineweb_{match[1]}_bpe.model"
