"""`pgolf data download`: the public pre-tokenised sets, from a dataset repository of the Hugging Face hub.

In the repository, under a prefix (`datasets`):

    manifest.json                                          datasets[].name, .stats.files_train, .stats.files_val
    datasets/fineweb10B_sp8192/fineweb_{train,val}_%06d.bin
    tokenizers/fineweb_8192_bpe.model

Here, under `out`, the same without the prefix. A file gets its name once its header and size (and its hash, where the
manifest has one) were checked. A connection that breaks goes on at that byte; a download that was stopped goes on with
the file that it was in, from its start: huggingface_hub keeps no half file from one process for the next.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.data.dataset import Dataset, open_dataset
from model.data.layout import DEFAULT_VARIANT, PUBLIC_PREFIX, public_tokenizer_name
from model.data.progress import progress
from model.data.shards import shard_length
from model.data.tokenizer import Tokenizer
from model.errors import DataError
from model.files import sha256_file

DEFAULT_REPO = "kevclark/parameter-golf"
DEFAULT_PREFIX = "datasets"
_STAGING = ".download"  # unchecked and unfinished files, under `out`


def download_dataset(
    out: str | os.PathLike[str],
    *,
    repo: str | None = None,
    variant: str = DEFAULT_VARIANT,
    train_shards: int | None = None,
    prefix: str | None = None,
    endpoint: str | None = None,
    quiet: bool = False,
) -> Dataset:
    """Fetches all validation shards, the tokenizer and the first `train_shards` training shards (default: all).

    repo, prefix: default to MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, then to the public ones;
    endpoint: of the hub, defaults to HF_ENDPOINT. Files that are already there and whole are kept. Raises DataError for
    a repository, variant or shard that is not there and for a file that is not what it should be.
    """
    hub = _Hub(
        repo or os.environ.get("MATCHED_FINEWEB_REPO_ID") or DEFAULT_REPO,
        os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", DEFAULT_PREFIX) if prefix is None else prefix,
        endpoint or os.environ.get("HF_ENDPOINT") or None,
        Path(out),
    )
    entry = _find_variant(hub.manifest(), variant, hub.repo)
    name = entry["name"]
    available = _count(entry, "files_train", name)
    wanted = available if train_shards is None else train_shards
    if not 1 <= wanted <= available:
        raise DataError(f"train_shards: got {wanted}, wanted 1 to {available} (what {hub.repo} has of {name})")
    shards = [f"datasets/{name}/fineweb_val_{i:06d}.bin" for i in range(_count(entry, "files_val", name))]
    shards += [f"datasets/{name}/fineweb_train_{i:06d}.bin" for i in range(wanted)]
    hashes = _hashes(entry)
    with progress(f"downloading {name}", 1 + len(shards), "files", quiet=quiet) as task:
        hub.fetch(f"tokenizers/{public_tokenizer_name(variant)}", Tokenizer.load, hashes)
        task.advance()
        for path in shards:
            hub.fetch(path, shard_length, hashes)
            task.advance()
    shutil.rmtree(hub.out / _STAGING, ignore_errors=True)
    return open_dataset(hub.out, variant)


class _Hub:
    """One dataset repository, and the folder into which it is copied."""

    def __init__(self, repo: str, prefix: str, endpoint: str | None, out: Path) -> None:
        self.repo, self.prefix, self.endpoint, self.out = repo, prefix.strip("/"), endpoint, out

    def manifest(self) -> dict[str, Any]:
        path = self._download("manifest.json")
        try:
            manifest = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.repo}: manifest.json is not JSON ({error})") from error
        if not isinstance(manifest, dict) or not isinstance(manifest.get("datasets"), list):
            raise DataError(f"{self.repo}: manifest.json has no list of datasets")
        return manifest

    def fetch(self, path: str, check: Any, hashes: Mapping[str, str]) -> None:
        """Brings `path` into `out`, unless it is there already and passes `check` and its hash."""
        final = self.out / path
        digest = hashes.get(final.name)
        if final.exists():
            try:
                _check_file(final, check, digest)
                return
            except DataError:
                pass  # stays until there is a better one
        found = self._download(path)
        try:
            _check_file(found, check, digest)
        except DataError as error:
            found.unlink()
            raise DataError(f"{self.repo}: {path} arrived damaged: {str(error).partition(': ')[2]}") from error
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(found, final)

    def _download(self, path: str) -> Path:
        try:
            import huggingface_hub as hub
            from huggingface_hub import errors, utils
        except ImportError as error:
            raise DataError("downloading needs huggingface_hub: pip install 'pgolf_kernels[data]'") from error
        remote = f"{self.prefix}/{path}" if self.prefix else path
        staging = self.out / _STAGING
        bars_shown = not utils.are_progress_bars_disabled()
        utils.disable_progress_bars()  # they would run into ours
        try:
            found = hub.hf_hub_download(
                self.repo, remote, repo_type="dataset", local_dir=staging, endpoint=self.endpoint
            )
        except errors.RepositoryNotFoundError as error:
            raise DataError(f"{self.repo}: no such dataset repository (or it needs a token)") from error
        except errors.HFValidationError as error:
            raise DataError(f"repo: got {self.repo!r}, wanted the form owner/name") from error
        except Exception as error:  # the client's network errors share no base
            if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
                raise DataError(f"{self.repo}: {remote} is not in this repository") from error
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"{self.repo}: cannot fetch {remote} ({reason}); run again to go on from here") from error
        finally:
            if bars_shown:
                utils.enable_progress_bars()
        return Path(found)


def _find_variant(manifest: dict[str, Any], variant: str, repo: str) -> dict[str, Any]:
    wanted = f"{PUBLIC_PREFIX}{variant}"
    entries = {str(entry.get("name")): entry for entry in manifest["datasets"] if isinstance(entry, dict)}
    if wanted not in entries:
        raise DataError(f"variant: {repo} has no {wanted}, only {', '.join(sorted(entries)) or 'nothing'}")
    return entries[wanted]


def _count(entry: dict[str, Any], field: str, name: str) -> int:
    stats = entry.get("stats")
    count = stats.get(field) if isinstance(stats, dict) else None
    if not isinstance(count, int) or not 1 <= count <= 1_000_000:
        raise DataError(f"manifest.json: {name} has {field}={count!r}, wanted the number of its shards")
    return count


def _hashes(entry: dict[str, Any]) -> dict[str, str]:
    """SHA-256 by file name, from the entry's optional `files`: {name: digest} or [{"name", "sha256"}]."""
    files = entry.get("files", {})
    if isinstance(files, list):
        files = {str(file.get("name")): file.get("sha256") for file in files if isinstance(file, dict)}
    if not isinstance(files, dict):
        return {}
    return {Path(name).name: digest.lower() for name, digest in files.items() if isinstance(digest, str)}


def _check_file(path: Path, check: Any, digest: str | None) -> None:
    check(path)
    if digest is not None and sha256_file(path) != digest:
        raise DataError(f"{path}: not the contents that the manifest's SHA-256 {digest} names")
