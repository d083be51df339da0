"""The checks of `pgolf verify` that need no scorer: the data set, its bytes, and the files that a submission weighs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.checks import FAIL, PASS, SKIPPED, Check
from model.data.dataset import Dataset
from model.data.progress import progress
from model.data.shards import BOS_ID, shard_length, whole_documents, write_shard
from model.errors import DataError
from model.evaluate.bpb import check_bytes
from model.evaluate.documents import find_documents
from model.rules import SIZE_BUDGET

SHORTEST_DOCUMENT = 32  # tokens; shorter ones repeat by chance ("Yes.")
_SCRIPT = "train_gpt.py"
_SCRIPT_TOKENS = 512  # that a packed script scores to show which files it opens


def data_files(dataset: Dataset, folder: Path, *needed: Path) -> list[Path]:
    """What a scorer may not read: the data set's folder, which may hold its text in other forms too, and shards that
    lie elsewhere; the shards alone where the folder holds Python, this code or what is `needed` as well."""
    shards = [*dataset.train_shards, *dataset.valid_shards]
    folder = folder.resolve()
    places = [Path(place) for place in (*sys.path, sys.prefix, os.getcwd(), tempfile.gettempdir()) if place]
    if any(place.resolve().is_relative_to(folder) for place in (*places, Path(__file__), *needed)):
        return shards
    return [folder, *(shard for shard in shards if not shard.resolve().is_relative_to(folder))]


def check_documents_apart(dataset: Dataset, *, quiet: bool = True) -> Check:
    """Whether a validation document stands in a training shard, token for token."""
    name = "documents apart"
    if not dataset.train_shards:
        return Check(name, SKIPPED, "no training shards here")
    tokens = dataset.valid_tokens
    held_out = _bodies(tokens)
    keys = np.unique(_keys(tokens, held_out))
    digests = {_digest(tokens, *row) for row in held_out.tolist()}
    shared: set[bytes] = set()
    compared = 0
    total = sum(map(shard_length, dataset.train_shards))
    with progress("comparing documents", total, "tokens", quiet=quiet) as task:
        for training in whole_documents(dataset.train_shards):
            bodies = _bodies(training)
            compared += len(bodies)
            alike = bodies[np.isin(_keys(training, bodies), keys)]
            shared |= {_digest(training, *row) for row in alike.tolist()} & digests
            task.advance(len(training))
    if shared:
        return Check(name, FAIL, f"{len(shared)} validation documents stand in the training shards")
    return Check(name, PASS, f"{len(digests):,} validation documents, none among {compared:,} of training")


def _bodies(tokens: np.ndarray) -> np.ndarray:
    """(start, end) of the documents' tokens without the BOS at either end, those of some length: int64 [n, 2]."""
    documents = find_documents(tokens)
    ends = documents.sum(axis=1)
    bodies = np.stack([documents[:, 0] + 1, ends - (tokens[ends - 1] == BOS_ID)], axis=1)
    return bodies[bodies[:, 1] - bodies[:, 0] >= SHORTEST_DOCUMENT]


def _keys(tokens: np.ndarray, bodies: np.ndarray) -> np.ndarray:
    """Length and some tokens of each body in one number: equal for equal bodies, and seldom for others."""
    starts, lengths = bodies[:, 0], bodies[:, 1] - bodies[:, 0]
    keys = lengths.copy()
    for part in range(1, 9):
        keys = keys * 1_000_003 + tokens[starts + lengths * part // 9]
    return keys


def _digest(tokens: np.ndarray, start: int, end: int) -> bytes:
    return hashlib.blake2b(tokens[start:end].tobytes(), digest_size=16).digest()


def check_decoded_bytes(dataset: Dataset, *, documents: int | None = None, seed: int = 0) -> Check:
    """The byte tables against the decoded text, of so many documents drawn by `seed` (None: of all)."""
    tokens = dataset.valid_tokens
    every = find_documents(tokens)
    chosen = every
    if documents is not None and documents < len(every):
        chosen = every[np.sort(np.random.default_rng(seed).choice(len(every), documents, replace=False))]
    try:
        counted, decoded = check_bytes(tokens, chosen, dataset.byte_tables, dataset.tokenizer)
    except DataError as error:
        return Check("bytes", FAIL, str(error))
    kind = "the text" if dataset.tokenizer.exact else "the normalised text"
    of = f" of {len(every):,}" if chosen is not every else ""
    return Check("bytes", PASS, f"{counted:,} by the tables, {decoded:,} of {kind}, {len(chosen):,}{of} documents")


def check_size(
    path: Path,
    artifact: Path,
    dataset: Dataset,
    mode: str,
    other_files: dict[str, int],
    *,
    hide: Sequence[Path] = (),
) -> Check:
    """Artifact and code against the budget: a packed submission's files, or the script that packing would add.

    `other_files`: bytes of what an evaluator reads beside them, its own code included. `hide`: what a packed script may
    not read.
    """
    artifact_bytes = artifact.stat().st_size
    if (path / _SCRIPT).is_file():
        files = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        try:
            other_files = {**other_files, **files_of_script(path / _SCRIPT, dataset, hide)}
        except DataError as error:
            return Check("size", FAIL, str(error))
        parts = f"{len(files)} files of the submission {sum(files.values()):,}"
        total = sum(files.values())
    else:
        try:
            from model.pack import entry_script
        except ImportError as error:
            return Check("size", SKIPPED, f"artifact {artifact_bytes:,} bytes, code not counted ({error})")
        code_bytes = len(entry_script(ngram=mode.endswith("+ngram-tilt")))
        parts = f"artifact {artifact_bytes:,}, code {code_bytes:,}"
        total = artifact_bytes + code_bytes
    if other_files:
        largest = max(other_files, key=lambda name: other_files[name])
        parts += f", {len(other_files)} other files {sum(other_files.values()):,} such as {Path(largest).name}"
        total += sum(other_files.values())
    return Check("size", PASS if total <= SIZE_BUDGET else FAIL, f"{total:,} of {SIZE_BUDGET:,} bytes ({parts})")


def files_of_script(script: Path, dataset: Dataset, hide: Sequence[Path]) -> dict[str, int]:
    """Bytes of the files outside its folder that a packed script opens when it scores, Python's own left out.

    It runs in a fresh process on the beginning of the validation set, without network. Raises DataError when it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = folder / "data"
        shards = small / "datasets" / f"fineweb10B_sp{dataset.vocab_size}"
        shards.mkdir(parents=True)
        (small / "tokenizers").mkdir()
        (small / "tokenizers" / f"fineweb_{dataset.vocab_size}_bpe.model").write_bytes(dataset.tokenizer.model)
        for split in ("train", "val"):
            write_shard(shards / f"fineweb_{split}_000000.bin", dataset.valid_tokens[:_SCRIPT_TOKENS])
        request = {
            "script": str(script.resolve()),
            "arguments": ["--data", str(small), "--mode", "plain", "--device", "cpu"],
            "hide": [str(path) for path in hide],
            "folder": str(folder),
        }
        (folder / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("isolation.py")), str(folder / "request.json")],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        answer = folder / "answer.json"
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            raise DataError(f"{script.name} does not score: {last}")
        found: dict[str, int] = json.loads(answer.read_text())["other_files"]
        return found
