"""The manifest of a built data set: what its tokenizer and shards are, with hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from model.errors import DataError
from model.files import atomic_write

FORMAT = "pgolf-dataset"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"

_SPLIT = {
    "documents": int,
    "tokens": int,
    "bytes": int,
    "text_sha256": str,
    "shards": [{"file": str, "tokens": int, "documents": int, "sha256": str}],
}
_FORM = {
    "tokenizer": {"file": str, "sha256": str},
    "splits": {"train": _SPLIT, "valid": _SPLIT},
    "documents_in_both_splits": int,
}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes `manifest` into a data set's folder."""
    with atomic_write(folder / MANIFEST, "w") as file:
        file.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a built data set. Raises DataError when it is not one that this version reads."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path}: not the manifest of a data set, wanted format {FORMAT!r}")
    if manifest.get("version") != FORMAT_VERSION:
        raise DataError(f"{path}: version {manifest.get('version')!r}, wanted {FORMAT_VERSION}")
    _check(manifest, _FORM, str(path), "manifest")
    return manifest


def _check(value: Any, form: Any, path: str, name: str) -> None:
    """Raises DataError unless `value` has the fields and kinds of `form` (more fields may be there)."""
    if isinstance(form, type):
        if not isinstance(value, form):
            raise DataError(f"{path}: {name} is {value!r}, wanted {form.__name__}")
    elif isinstance(form, list):
        _check(value, list, path, name)
        for number, item in enumerate(value):
            _check(item, form[0], path, f"{name}[{number}]")
    else:
        _check(value, dict, path, name)
        for key, part in form.items():
            if key not in value:
                raise DataError(f"{path}: {name}.{key} is missing")
            _check(value[key], part, path, f"{name}.{key}")


def document_digest(text: str) -> bytes:
    """SHA-256 of a document's UTF-8; a split's `text_sha256` is the SHA-256 of these, one after the other."""
    return hashlib.sha256(text.encode()).digest()
