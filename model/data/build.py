"""Text files to a data set: tokenizer, shards and a manifest that says what they hold.

    DIR/manifest.json        what is below, with hashes
    DIR/tokenizer.model      SentencePiece
    DIR/train_000000.bin ... shards; documents are whole, each behind BOS
    DIR/valid_000000.bin ...

The same input gives the same bytes. The folder appears in one step at the end; nothing is left when a build is stopped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.data.manifest import FORMAT, FORMAT_VERSION, MANIFEST, TOKENIZER, document_digest, write_manifest
from model.data.progress import progress
from model.data.shards import BOS_ID, write_shard
from model.data.text import Document, find_inputs, read_documents
from model.data.tokenizer import ByteTables, Tokenizer, train_tokenizer
from model.errors import DataError
from model.files import atomic_folder, atomic_write, check_replaceable, resolved, sha256_bytes, sha256_file

DEFAULT_SHARD_TOKENS = 100_000_000  # as the public shards
TOKENIZER_TEXT_BYTES = 25_000_000  # the tokenizer is trained on so much, taken evenly from the training text
_BATCH_BYTES = 4 << 20


def build_dataset(
    inputs: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    normalization: str = "identity",
    valid_docs: int | None = None,
    valid_inputs: Iterable[str | os.PathLike[str]] = (),
    tokenizer: str | os.PathLike[str] | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    shuffle_seed: int | None = None,
    allow_overlap: bool = False,
    replace: bool = False,
    threads: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Builds the data set `out` from text files or folders and returns its manifest.

    Either `vocab_size` (a tokenizer is trained on the training text, with this `normalization`) or `tokenizer` (an
    existing SentencePiece model) is needed. Validation is `valid_inputs` if there are any, else the first `valid_docs`
    documents (default: one in twenty, at most 50,000). `shuffle_seed` brings the training documents into a random order
    (the document loader draws none; wanted where the text is sorted by source). `allow_overlap` admits documents that
    are in both splits (as the tokens hold them: normalised, if the tokenizer does that), `replace` a data set that is
    already there, unless an input lies in its folder. Empty documents are left out and counted.

    Raises DataError for text that cannot be read or kept, an empty split, documents in both splits, a tokenizer that
    does not fit; PgolfError when `out` cannot be written.
    """
    if (vocab_size is None) == (tokenizer is None):
        raise DataError("build: wanted either a vocabulary size or an existing tokenizer")
    if shard_tokens < 2:
        raise DataError(f"shard_tokens: got {shard_tokens}, wanted at least 2")
    out = resolved(out)
    replaceable = replace and MANIFEST
    train_files, valid_files = find_inputs(inputs), find_inputs(valid_inputs) if valid_inputs else []
    check_replaceable(out, replace=replaceable, inputs=[*train_files, *valid_files])
    threads = threads or os.cpu_count() or 1
    corpus = _survey(train_files, valid_files, valid_docs, quiet=quiet)
    if not allow_overlap:
        corpus.check_same_text()

    with atomic_folder(out, replace=replaceable) as folder:
        if tokenizer is not None:
            used = Tokenizer.load(tokenizer)
            source = f"given: {Path(tokenizer).name}"
        elif vocab_size is not None:
            sample = corpus.tokenizer_text(quiet=quiet)
            used = Tokenizer(train_tokenizer(sample, vocab_size, normalization=normalization))
            source = f"trained on one in {corpus.tokenizer_stride} of the training documents"
        with atomic_write(folder / TOKENIZER) as file:
            file.write(used.model)
        tables = used.byte_tables()
        splits: dict[str, Any] = {"train": {}, "valid": {}}
        for split in ("valid", "train"):  # in this order `in_both` is found
            documents = _encode(corpus, split, used, tables, threads, quiet=quiet)
            if split == "train" and shuffle_seed is not None:
                documents = _shuffled(documents, shuffle_seed, folder / "spool.bin")
            splits[split] = _write_split(folder, split, documents, shard_tokens)
        if corpus.in_both and not allow_overlap:
            raise _in_both_error(len(corpus.in_both), next(iter(corpus.in_both.values())), " once normalised")
        manifest = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": sha256_bytes(used.model),
                "vocab_size": used.vocab_size,
                "source": source,
                "normalization": "identity" if used.exact else "nmt_nfkc" if tokenizer is None else "the tokenizer's",
            },
            "bytes_counted_on": "the original text" if used.exact else "the normalised text",
            "leading_space_is_text": tables.leading_space_is_text,
            "splits": splits,
            "validation": corpus.valid_rule,
            "shuffle_seed": shuffle_seed,
            "documents_in_both_splits": len(corpus.in_both),
            "empty_documents_left_out": corpus.empty,
            "inputs": corpus.describe_inputs(),
        }
        write_manifest(folder, manifest)
    return manifest


@dataclass
class _Corpus:
    """Which documents belong to which split, and how much there is; then, as they are encoded, which are in both."""

    train_files: list[Path]
    valid_files: list[Path]
    valid_docs: int  # this many documents at the head of train_files are validation; 0 with valid_files
    valid_rule: str
    digests: dict[str, list[bytes]] = field(default_factory=lambda: {"train": [], "valid": []})
    train_bytes: int = 0  # of train_files
    empty: int = 0
    valid_texts: set[bytes] = field(default_factory=set)  # digests of what validation's tokens decode to
    in_both: dict[bytes, str] = field(default_factory=dict)  # those of them in training -> where the first one is

    @property
    def tokenizer_stride(self) -> int:
        return max(1, -(-self.train_bytes // TOKENIZER_TEXT_BYTES))

    def documents(self, split: str) -> Iterator[Document]:
        """The split's documents that are not empty, in order."""
        for name, document in self.all_documents():
            if name == split and document.text:
                yield document

    def all_documents(self) -> Iterator[tuple[str, Document]]:
        for document in read_documents(self.valid_files):
            yield "valid", document
        seen = 0
        for document in read_documents(self.train_files):
            seen += bool(document.text)
            yield ("valid" if seen <= self.valid_docs else "train"), document

    def tokenizer_text(self, *, quiet: bool) -> Iterator[str]:
        with progress("tokenizer text", len(self.digests["train"]), quiet=quiet) as task:
            for number, document in enumerate(self.documents("train")):
                task.advance()
                if number % self.tokenizer_stride == 0:
                    yield document.text

    def check_same_text(self) -> None:
        """Raises DataError, before anything is encoded, when the very same text is in both splits."""
        both = set(self.digests["valid"]).intersection(self.digests["train"])
        if both:
            example = next(d.where for d in self.documents("train") if document_digest(d.text) in both)
            raise _in_both_error(len(both), example)

    def note_decoded(self, split: str, digest: bytes, where: str) -> None:
        """Takes the digest of the text that a document's tokens decode to, all of validation first."""
        if split == "valid":
            self.valid_texts.add(digest)
        elif digest in self.valid_texts:
            self.in_both.setdefault(digest, where)

    def describe_inputs(self) -> list[dict[str, Any]]:
        return [
            {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in [*self.valid_files, *self.train_files]
        ]


def _survey(train_files: list[Path], valid_files: list[Path], valid_docs: int | None, *, quiet: bool) -> _Corpus:
    """Reads everything once: checks that it is text, counts it and takes each document's digest."""
    if valid_files and valid_docs is not None:
        raise DataError("build: wanted either a number of validation documents or validation files")
    corpus = _Corpus(train_files, valid_files, 0, "the files given for it")
    with progress("reading", quiet=quiet) as task:
        for split, document in corpus.all_documents():
            task.advance()
            if not document.text:
                corpus.empty += 1
                continue
            corpus.digests[split].append(document_digest(document.text))
            if split == "train":
                corpus.train_bytes += len(document.text.encode())
    if not valid_files:
        found = corpus.digests["train"]
        count = min(50_000, -(-len(found) // 20)) if valid_docs is None else valid_docs
        if not 0 < count < len(found):
            raise DataError(f"validation: {count} of {len(found)} documents, wanted at least one in each split")
        corpus.valid_docs = count
        corpus.valid_rule = f"the first {count} documents"
        corpus.digests = {"valid": found[:count], "train": found[count:]}
    for split in ("train", "valid"):
        if not corpus.digests[split]:
            raise DataError(f"{split}: no document with text in it, wanted at least one")
    return corpus


def _in_both_error(count: int, example: str, when: str = "") -> DataError:
    return DataError(
        f"{count} documents are in both training and validation{when}, wanted none ({example} is one); remove them or "
        "allow the overlap"
    )


class _Encoded(NamedTuple):
    """A document's tokens behind BOS, the bytes they count for, and the digest of the text they decode to."""

    tokens: np.ndarray
    size: int
    digest: bytes


def _encode(
    corpus: _Corpus, split: str, tokenizer: Tokenizer, tables: ByteTables, threads: int, *, quiet: bool
) -> Iterator[_Encoded]:
    with progress(f"encoding {split}", len(corpus.digests[split]), quiet=quiet) as task:
        for batch in _batches(corpus.documents(split)):
            encoded = tokenizer.encode_batch([document.text for document in batch], threads)
            decoded = tokenizer.decode_batch(encoded, threads)
            for document, ids, text in zip(batch, encoded, decoded, strict=True):
                tokens = np.array([BOS_ID, *ids], dtype=np.uint16)
                count = _check_document(document, tokens, text, tokenizer, tables)
                digest = document_digest(text)
                corpus.note_decoded(split, digest, document.where)
                yield _Encoded(tokens, count, digest)
            task.advance(len(batch))


def _shuffled(documents: Iterable[_Encoded], seed: int, spool: Path) -> Iterator[_Encoded]:
    """The documents in a random order. Their tokens wait in a file, so that memory holds little."""
    lengths: list[int] = []
    rest: list[tuple[int, bytes]] = []
    try:
        with atomic_write(spool) as file:
            for document in documents:
                file.write(document.tokens.data)
                lengths.append(document.tokens.size)
                rest.append((document.size, document.digest))
        tokens = np.memmap(spool, dtype=np.uint16, mode="r")
        ends = np.cumsum(lengths)
        for number in np.random.Generator(np.random.PCG64(seed)).permutation(len(lengths)):
            yield _Encoded(np.array(tokens[ends[number] - lengths[number] : ends[number]]), *rest[number])
    finally:
        spool.unlink(missing_ok=True)


def _write_split(folder: Path, split: str, documents: Iterable[_Encoded], shard_tokens: int) -> dict[str, Any]:
    """Writes a split's shards; returns its part of the manifest."""
    shards: list[dict[str, Any]] = []
    pending: list[np.ndarray] = []
    size = total_bytes = 0
    text_digest = hashlib.sha256()

    def flush() -> None:
        nonlocal size
        path = folder / f"{split}_{len(shards):06d}.bin"
        write_shard(path, np.concatenate(pending))
        shards.append({"file": path.name, "tokens": size, "documents": len(pending), "sha256": sha256_file(path)})
        pending.clear()
        size = 0

    for document in documents:
        if pending and size + document.tokens.size > shard_tokens:
            flush()
        pending.append(document.tokens)
        size += document.tokens.size
        total_bytes += document.size
        text_digest.update(document.digest)
    flush()
    return {
        "documents": sum(shard["documents"] for shard in shards),
        "tokens": sum(shard["tokens"] for shard in shards),
        "bytes": total_bytes,
        "text_sha256": text_digest.hexdigest(),
        "shards": shards,
    }


def _check_document(document: Document, tokens: np.ndarray, text: str, tokenizer: Tokenizer, tables: ByteTables) -> int:
    """The document's bytes, after making sure that the tokens hold its text and the tables count it exactly."""
    if tokenizer.exact and text != document.text:
        raise DataError(
            f"{document.where}: {tokenizer.name} does not give this text back, wanted one with byte fallback"
        )
    counted = int(tables.stream_bytes(tokens).sum())
    if counted != len(text.encode()):
        raise DataError(
            f"{document.where}: the byte tables of {tokenizer.name} count {counted} bytes, wanted {len(text.encode())}"
        )
    return counted


def _batches(documents: Iterator[Document]) -> Iterator[Sequence[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
