"""A data set on disk, opened and checked: ours (`pgolf data build`) or the public layout (`pgolf data download`)."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.config import Config
from model.data.layout import PUBLIC_PREFIX, choose_variant, public_tokenizer_name
from model.data.manifest import MANIFEST, read_manifest
from model.data.shards import BOS_ID, check_ids, read_shard, shard_length
from model.data.tokenizer import ByteTables, Tokenizer
from model.errors import DataError
from model.files import sha256_bytes


@dataclass(frozen=True)
class Dataset:
    """What training and evaluation need. `manifest` is empty for the public layout, `variant` for ours."""

    name: str
    train_shards: list[Path]
    valid_shards: list[Path]
    tokenizer: Tokenizer
    byte_tables: ByteTables
    manifest: dict[str, Any] = field(default_factory=dict)
    variant: str = ""

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


def dataset_of(
    config: Config, data_dir: str | os.PathLike[str] | None = None, *, variant: str | None = None
) -> Dataset:
    """Opens the data set of a configuration, or that in `data_dir`; `variant` goes over the configuration's."""
    data = config.data
    chosen = data.variant if variant is None else variant
    return open_dataset(data.data_dir if data_dir is None else data_dir, chosen, config.model.vocab_size)


def open_dataset(data_dir: str | os.PathLike[str], variant: str = "", vocab_size: int = 0) -> Dataset:
    """Opens the data set in `data_dir`. In the public layout it is `variant`, or with "" as `choose_variant` says.

    Checks headers and sizes of all shards and that manifest, tokenizer and the head of each split fit together; `pgolf
    data verify` checks the rest. Raises DataError naming what is missing, damaged or does not fit.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder, wanted a data set (--data or --data-dir names it, pgolf data build or download "
            "makes one)"
        )
    dataset = (
        _open_built(folder)
        if (folder / MANIFEST).is_file()
        else _open_public(folder, choose_variant(folder, variant, vocab_size))
    )
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


def _open_public(folder: Path, variant: str) -> Dataset:
    name = f"{PUBLIC_PREFIX}{variant}"
    shards = folder / "datasets" / name
    train, valid = (sorted(shards.glob(f"fineweb_{split}_*.bin")) for split in ("train", "val"))
    for paths, split in ((train, "train"), (valid, "val")):
        if not paths:
            raise DataError(f"{shards}: no fineweb_{split}_*.bin")
    tokenizer = Tokenizer.load(folder / "tokenizers" / public_tokenizer_name(variant))
    return Dataset(name, train, valid, tokenizer, tokenizer.byte_tables(public_rule=True), variant=variant)
