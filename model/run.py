"""A run's folder: what was run, with what, and what came out.

    config.json        the whole configuration
    provenance.json    versions, machine, data hash, source hash, command; those of later stages under "later"
    source.zip         the Python, C++ and CUDA sources of both packages as they were; source-HASH.zip of later stages
    metrics.jsonl      one line a training step or validation
    log.txt            what was printed
    result.json        results, merged in by each stage
    checkpoints/       see model/checkpoint.py
    model.safetensors  the averaged weights at the end of training

Only the main process writes; in the others every method does nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from model.config import Config
from model.errors import ConfigError
from model.files import append_text, atomic_write

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("model", "pgolf_kernels", "csrc")
_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh", ".inl"}
_PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "safetensors", "brotli", "pgolf_kernels")
_ZIP_TIME = (2020, 1, 1, 0, 0, 0)  # fixed, so that equal sources give equal archives
# Settings that may change when a run goes on: none of them changes what a training step does, or an artifact's weights.
FREE_ON_RESUME = frozenset(
    {
        "data_dir",
        "variant",
        "run_dir",
        "run_id",
        "train_log_every",
        "val_loss_every",
        "checkpoint_every",
        "keep_checkpoints",
    }
    | {"max_wallclock_seconds", "cuda_graphs", "timeout_seconds"}
)


class RunDir:
    """The folder `path`. `writes` is False in processes other than the main one."""

    def __init__(self, path: str | os.PathLike[str], *, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        if writes:
            self.path.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model_path(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def artifact_path(self) -> Path:
        return self.path / "model.pgolf"

    def start(self, config: Config, data_hash: str) -> None:
        """Writes config, provenance and the source snapshot. For a run that goes on, checks its configuration.

        Where the run began stays: a later stage or a resumed training is added to provenance.json under "later", and
        sources that differ are kept beside the first ones.
        """
        before = self._read("config.json")
        if before is not None:
            check_same_run(Config.from_dict(before), config)
        if not self.writes:
            return
        archive = _source_archive()
        digest = hashlib.sha256(archive).hexdigest()
        origin, first = provenance(data_hash, digest), self._read("provenance.json")
        self._write_json("config.json", config.to_dict())
        if first is None:
            self._write_json("provenance.json", origin)
            self._write_sources("source.zip", archive)
            return
        self._write_json("provenance.json", {**first, "later": [*first.get("later", []), origin]})
        if digest != first["source_sha256"]:
            self._write_sources(f"source-{digest[:12]}.zip", archive)

    def _write_sources(self, name: str, archive: bytes) -> None:
        with atomic_write(self.path / name) as file:
            file.write(archive)

    def config(self) -> Config:
        """The stored configuration. Raises ConfigError where there is none."""
        values = self._read("config.json")
        if values is None:
            raise ConfigError(f"{self.path}: no config.json, wanted the folder of a run")
        return Config.from_dict(values)

    def append_metrics(self, records: list[dict[str, Any]]) -> None:
        if self.writes and records:
            append_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def metrics(self) -> Iterator[dict[str, Any]]:
        path = self.path / "metrics.jsonl"
        if path.is_file():
            with open(path, encoding="utf-8") as file:
                for line in file:
                    if line.endswith("\n"):  # not a line that an interruption cut off
                        yield json.loads(line)

    def forget_metrics(self) -> None:
        if self.writes:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)

    def forget_metrics_after(self, step: int) -> None:
        """Drops the lines of steps after `step`: a resumed run writes them again."""
        if self.writes:
            kept = [record for record in self.metrics() if record.get("step", 0) <= step]
            with atomic_write(self.path / "metrics.jsonl", "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in kept)

    def result(self) -> dict[str, Any]:
        return self._read("result.json") or {}

    def merge_result(self, values: dict[str, Any]) -> dict[str, Any]:
        """Merges nested `values` into result.json and returns the whole."""
        merged = _merge(self.result(), values)
        if self.writes:
            self._write_json("result.json", merged)
        return merged

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Keeps what the block takes as the stage's seconds, where it ends without an error."""
        started = time.perf_counter()
        yield
        self.merge_result({"seconds": {stage: time.perf_counter() - started}})

    def forget_scores(self) -> None:
        """Drops what earlier artifacts scored, ledgers and verdicts too; the unquantised weights' scores stay."""
        if not self.writes:
            return
        result = self.result()
        for section in ("evaluation", "bpb"):
            result[section] = {name: value for name, value in result.get(section, {}).items() if name == "float"}
        result["seconds"] = {
            name: value
            for name, value in result.get("seconds", {}).items()
            if name == "evaluate_float" or not name.startswith("evaluate_")
        }
        for name in ("val_loss", "val_bpb", "ttt_gain"):
            result.pop(name, None)
        self._write_json("result.json", result)
        # Ledgers of the run, of model.pgolf as a file (model/score.py), and the parts of either that ranks have left.
        for pattern in ("*ledger_*.npz", "verify_*.json"):
            for file in self.path.glob(pattern):
                file.unlink()

    def say(self, text: str) -> None:
        """One line to the log and to standard output."""
        if self.writes:
            print(text, flush=True)
            append_text(self.path / "log.txt", f"{time.strftime('%H:%M:%S')} {text}\n")

    def save_model(self, state: dict[str, Tensor], config: Config) -> None:
        """Weights as fp32 safetensors, with the configuration in the metadata."""
        if self.writes:
            tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
            with atomic_write(self.model_path) as file:
                file.write(save(tensors, metadata={"config": json.dumps(config.to_dict())}))

    def _read(self, name: str) -> Any:
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON ({error})") from error

    def _write_json(self, name: str, value: Any) -> None:
        with atomic_write(self.path / name, "w") as file:
            json.dump(value, file, indent=1)
            file.write("\n")


def check_same_run(before: Config, now: Config) -> None:
    """Raises ConfigError naming settings of network, data and training that differ, where that would matter."""
    old = {name: value for section, name, value in before.items() if section in ("model", "data", "train")}
    new = {name: value for section, name, value in now.items() if section in ("model", "data", "train")}
    changed = [name for name in old if old[name] != new[name] and name not in FREE_ON_RESUME]
    if changed:
        described = "; ".join(f"{name}: {old[name]!r} -> {new[name]!r}" for name in changed)
        raise ConfigError(f"this run was started with other settings ({described}), wanted the same or another run_id")


def provenance(data_hash: str, source_hash: str) -> dict[str, Any]:
    """Everything needed to tell two runs apart."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "commit": commit(),
        "source_sha256": source_hash,
        "data_sha256": data_hash,
    }


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def commit() -> str | None:
    """PGOLF_COMMIT, or the checkout's commit, with "+" where files were changed; None without either."""
    if given := os.environ.get("PGOLF_COMMIT"):
        return given
    git = ["git", "-C", str(_ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


@functools.cache  # what this process has imported: several runs of one process share it
def _source_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder in _SOURCES:
            for path in sorted((_ROOT / folder).rglob("*")):
                if path.suffix in _SUFFIXES and path.is_file():
                    archive.writestr(zipfile.ZipInfo(str(path.relative_to(_ROOT)), _ZIP_TIME), path.read_bytes())
    return buffer.getvalue()
