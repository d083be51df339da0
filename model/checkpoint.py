"""Checkpoints: everything that training needs to go on as if it had not stopped.

    checkpoints/step_00000600/tensors.safetensors   weights, averages, optimiser state
    checkpoints/step_00000600/state.json            step, clock, loader positions, random states, hash of the tensors

A checkpoint is built under another name and renamed, so that one that can be seen is whole; `latest` still checks the
hash and goes back to the one before when a disk has damaged it. No pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import ArtifactError, PgolfError
from model.files import atomic_folder, sha256_file

FORMAT_VERSION = 1
_NAME = re.compile(r"step_(\d{8})")
_UNFINISHED = ".step_*.*"  # what `atomic_folder` was building when a process was killed
_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: tensors on the CPU, `state` as it was given to `save_checkpoint`."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes checkpoint `step` into `folder` and removes all but the newest `keep`. `state` holds JSON types.

    Raises PgolfError when it cannot be written.
    """
    path = folder / f"step_{step:08d}"
    with atomic_folder(path, replace=True) as temporary:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / _TENSORS)
        except SafetensorError as error:  # what the library makes of a full disk
            raise PgolfError(f"{path}: cannot be written ({error}), wanted a disk with enough space") from error
        header = {"format": FORMAT_VERSION, "step": step, "sha256": sha256_file(temporary / _TENSORS), "state": state}
        (temporary / _STATE).write_text(json.dumps(header), encoding="utf-8")
    for old in [*list_checkpoints(folder)[: -max(keep, 1)], *folder.glob(_UNFINISHED)]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks one checkpoint. Raises ArtifactError when it is missing, damaged or from a newer version."""
    try:
        header = json.loads((path / _STATE).read_text(encoding="utf-8"))
        version, step, digest, state = (header[key] for key in ("format", "step", "sha256", "state"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a checkpoint ({type(error).__name__}: {error})") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{path}: checkpoint format {version}, wanted {FORMAT_VERSION}")
    try:
        if sha256_file(path / _TENSORS) != digest:
            raise ArtifactError(f"{path / _TENSORS}: damaged (its hash is not the one in {_STATE})")
        tensors = load_file(path / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path / _TENSORS}: cannot be read ({error})") from error
    return Checkpoint(path, int(step), tensors, state)


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, or None; and what was wrong with newer ones."""
    problems: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return load_checkpoint(path), problems
        except ArtifactError as error:
            problems.append(str(error))
    return None, problems
