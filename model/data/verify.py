"""`pgolf data verify`: is a data set what it says it is?

Checked: headers and sizes, hashes, ids below the vocabulary size, documents behind BOS and their number, that decoding
gives back the very bytes that were encoded, that the byte tables sum to the UTF-8 length of every document, and that
no document is in both splits. What the manifest records is compared with it; the public layout has none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.data.dataset import Dataset, open_dataset
from model.data.manifest import document_digest
from model.data.progress import progress
from model.data.shards import BOS_ID, check_ids, document_starts, read_shard, shard_length, whole_documents
from model.errors import DataError
from model.files import sha256_file

_BATCH_TOKENS = 1 << 20


class Finding(NamedTuple):
    """Something that is not as it should be: where, and what."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def verify_dataset(
    data_dir: str | os.PathLike[str], variant: str = "", *, threads: int | None = None, quiet: bool = False
) -> list[Finding]:
    """Checks a data set from end to end and returns what is wrong, an empty list if nothing is.

    Reads every token. Damage that hides the rest (a shard's header, the manifest, the tokenizer) is returned alone.
    """
    folder = Path(data_dir)
    damaged = [_finding(error) for path in sorted(folder.rglob("*.bin")) for error in _errors(shard_length, path)]
    if damaged:
        return damaged
    try:
        dataset = open_dataset(folder, variant)
    except DataError as error:
        return [_finding(error)]
    findings: list[Finding] = []
    threads = threads or os.cpu_count() or 1
    valid_documents: set[bytes] = set()
    in_both: set[bytes] = set()
    for split, paths in (("valid", dataset.valid_shards), ("train", dataset.train_shards)):
        record = dataset.manifest.get("splits", {}).get(split, {})
        findings += _check_shards(paths, record)
        beyond = [_finding(e) for path in paths for e in _errors(check_ids, read_shard(path), dataset.vocab_size, path)]
        findings += beyond
        if beyond:
            continue  # such ids cannot be decoded
        check = _SplitCheck(dataset, threads)
        with progress(f"verifying {split}", sum(map(shard_length, paths)), "tokens", quiet=quiet) as task:
            for documents in _document_batches(paths):
                digests = check.add(documents)
                if split == "valid":
                    valid_documents.update(digests)
                else:
                    in_both.update(valid_documents.intersection(digests))
                task.advance(sum(document.size for document in documents))
        findings += check.findings(split, record)
    known = dataset.manifest.get("documents_in_both_splits", 0)
    if len(in_both) != known:
        findings.append(Finding(dataset.name, f"{len(in_both)} documents are in both splits, wanted {known}"))
    return findings


def _check_shards(paths: list[Path], record: dict[str, Any]) -> list[Finding]:
    """Each shard by itself: its hash and its documents."""
    findings = []
    recorded = {shard["file"]: shard for shard in record.get("shards", [])}
    for path in paths:
        wanted = recorded.get(path.name, {})
        if wanted and sha256_file(path) != wanted["sha256"]:
            findings.append(Finding(str(path), "the contents are not those that the manifest's hash names"))
        tokens = read_shard(path)
        starts = document_starts(tokens)
        if wanted and starts.size != wanted["documents"]:
            findings.append(Finding(str(path), f"{starts.size} BOS, wanted {wanted['documents']} as in the manifest"))
        elif not starts.size:
            findings.append(Finding(str(path), f"no BOS (id {BOS_ID}), wanted documents that start with one"))
        elif wanted and starts[0] != 0:
            findings.append(Finding(str(path), f"{starts[0]} tokens before the first BOS, wanted none"))
    return findings


class _SplitCheck:
    """Decodes a split's documents, counts their bytes in two ways and hashes their text."""

    def __init__(self, dataset: Dataset, threads: int) -> None:
        self._dataset, self._threads = dataset, threads
        self._text_digest = hashlib.sha256()
        self._documents = self._bytes = self._miscounted = 0
        self._example = ""

    def add(self, documents: list[np.ndarray]) -> list[bytes]:
        """Takes the next documents, BOS included; returns the digests of their texts."""
        digests = []
        for tokens, text in zip(documents, self._dataset.tokenizer.decode_batch(documents, self._threads), strict=True):
            length = len(text.encode())
            counted = int(self._dataset.byte_tables.stream_bytes(tokens).sum())
            if counted != length:
                self._miscounted += 1
                self._example = self._example or f"document {self._documents}: {counted} for {length}"
            self._documents += 1
            self._bytes += counted
            digests.append(document_digest(text))
            self._text_digest.update(digests[-1])
        return digests

    def findings(self, split: str, record: dict[str, Any]) -> list[Finding]:
        where = f"{self._dataset.name}, {split}"
        findings = []
        if self._miscounted:
            problem = f"the byte tables miscount {self._miscounted} documents ({self._example} bytes)"
            findings.append(Finding(where, problem))
        for name, found in (("documents", self._documents), ("bytes", self._bytes)):
            if record and found != record[name]:
                findings.append(Finding(where, f"{found} {name}, wanted {record[name]} as in the manifest"))
        if record and self._text_digest.hexdigest() != record["text_sha256"]:
            findings.append(Finding(where, "decoding does not give back the text that was encoded"))
        return findings


def _document_batches(paths: list[Path]) -> Iterator[list[np.ndarray]]:
    """A split's documents in batches."""
    batch: list[np.ndarray] = []
    size = 0
    for tokens in whole_documents(paths):
        for piece in np.split(tokens, document_starts(tokens)):
            if piece.size:
                batch.append(piece)
                size += piece.size
            if size >= _BATCH_TOKENS:
                yield batch
                batch, size = [], 0
    yield batch


def _errors(check: Any, *arguments: Any) -> list[DataError]:
    try:
        check(*arguments)
    except DataError as error:
        return [error]
    return []


def _finding(error: DataError) -> Finding:
    where, _, problem = str(error).partition(": ")
    return Finding(where, problem)
