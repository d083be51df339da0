"""What a size-limited submission ships: one self-extracting script, the artifact, and papers.

    train_gpt.py     every module that training and scoring need, minified, LZMA, base 85; unpacks itself and runs
    model.pgolf      the artifact, in the static mode, which the script decodes with NumPy alone
    submission.json  sizes and results        README.md  how to run it        train.log  what the run printed

The script needs Python, PyTorch and the libraries in requirements.txt, and no compiled part of this project: native
kernels are replaced by their PyTorch references. Every file in the folder counts against the budget.
"""

from __future__ import annotations

import ast
import base64
import functools
import io
import json
import lzma
import os
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import python_minifier

from model.artifact import encode_artifact, read_artifact
from model.files import atomic_folder
from model.run import RunDir
from model.size import BUDGET

SCRIPT, ARTIFACT = "train_gpt.py", "model.pgolf"
ROOT_MODULES = ("model.packed_entry", "model.packed_native")
LIBRARIES = ("torch", "numpy", "sentencepiece", "brotli", "zstandard", "safetensors", "click", "rich")
_PACKAGES = ("model", "pgolf_kernels")
_SOURCE = Path(__file__).resolve().parent.parent
_ZIP_TIME = (2020, 1, 1, 0, 0, 0)  # fixed, so that equal sources give equal scripts
_NATIVE = "pgolf_kernels._native"

_STUB = '''"""Self-extracting: python train_gpt.py --help"""
import atexit,base64,io,lzma,shutil,sys,tempfile,zipfile
d=tempfile.mkdtemp()
atexit.register(shutil.rmtree,d,True)
zipfile.ZipFile(io.BytesIO(lzma.decompress(base64.b85decode(%r)))).extractall(d)
sys.path.insert(0,d)
from model.packed_entry import main
if __name__=="__main__":main(__file__)
'''


@dataclass(frozen=True)
class Submission:
    """A packed folder: `sizes` has every file's bytes."""

    path: Path
    sizes: dict[str, int]
    budget: int

    @property
    def total(self) -> int:
        return sum(self.sizes.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.budget


def pack_submission(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    author: str = "",
    budget: int = BUDGET,
    replace: bool = False,
) -> Submission:
    """Writes the submission of a run to the folder `out`, which appears when it is complete.

    The artifact is coded anew in the static mode. Raises PgolfError when `out` cannot be written or is not empty (and
    `replace` is False), ArtifactError when the run has no artifact. Whether the submission fits is in the result.
    """
    run = RunDir(run_dir, writes=False)
    artifact = read_artifact(run.artifact_path)
    header = artifact.header
    data, _ = encode_artifact(
        artifact.quantized,
        artifact.config.replace(codec="static"),
        header.provenance,
        tokenizer_sha256=header.tokenizer_sha256,
    )
    log = run.path / "log.txt"
    files = {
        SCRIPT: entry_script(),
        ARTIFACT: data,
        "requirements.txt": "".join(f"{library}\n" for library in LIBRARIES).encode(),
        "train.log": log.read_bytes() if log.is_file() else b"",
    }
    result = run.result()
    files["README.md"] = _readme(artifact.config.preset, result, files).encode()
    facts = {
        "author": author,
        "name": artifact.config.preset,
        "seed": artifact.config.train.seed,
        "val_bpb": result.get("bpb", {}),
        "bytes_model": len(data),
        "bytes_code": len(files[SCRIPT]),
    }
    files["submission.json"] = _with_total(facts, sum(map(len, files.values())))
    with atomic_folder(out, replace=replace) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return Submission(Path(out), {name: len(content) for name, content in files.items()}, budget)


@functools.cache
def entry_script() -> bytes:
    """train_gpt.py: the modules that ROOT_MODULES reach, minified and compressed, and what unpacks them."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for name, path in sorted(reachable_modules(_roots()).items()):
            target = _NATIVE if name == "model.packed_native" else name
            place = target.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
            file.writestr(zipfile.ZipInfo(place, _ZIP_TIME), minified(path))
    packed = lzma.compress(archive.getvalue(), format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    return (_STUB % base64.b85encode(packed)).encode()


def minified(path: Path) -> str:
    """A module's source without comments, docstrings and annotations of functions; names stay as they are.

    Names stay because modules refer to each other's, and because Triton kernels are read from their source.
    """
    return python_minifier.minify(
        path.read_text(encoding="utf-8"),
        str(path),
        remove_literal_statements=True,
        rename_locals=False,
        rename_globals=False,
        hoist_literals=False,
    )


def reachable_modules(roots: Iterable[str]) -> dict[str, Path]:
    """Modules of this project that `roots` import, directly or not, also inside functions: name -> file."""
    found: dict[str, Path] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        path = _module_path(name)
        if path is None or name in found or name == _NATIVE:
            continue
        found[name] = path
        if "." in name:
            waiting.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def _roots() -> list[str]:
    """The entry, the stand-in for compiled code, and the Triton kernels, which are imported by name where they run."""
    kernels = sorted((_SOURCE / "pgolf_kernels").glob("_*_triton.py"))
    return [*ROOT_MODULES, *(f"pgolf_kernels.{path.stem}" for path in kernels)]


def _module_path(name: str) -> Path | None:
    if name.split(".")[0] not in _PACKAGES:
        return None
    base = _SOURCE.joinpath(*name.split("."))
    return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)


def _with_total(facts: dict[str, Any], others: int) -> bytes:
    """The facts as JSON with `bytes_total`, which counts the JSON's own bytes."""
    total = others
    while True:
        content = (json.dumps({**facts, "bytes_total": total}, indent=1) + "\n").encode()
        if others + len(content) == total:
            return content
        total = others + len(content)


def _readme(preset: str, result: dict[str, Any], files: dict[str, bytes]) -> str:
    lines = [
        f"# {preset}",
        "",
        "    pip install -r requirements.txt",
        f"    python {SCRIPT} --data DATA_DIR            # scores {ARTIFACT}",
        f"    python {SCRIPT} train --help               # trains",
        "",
        "| mode | bits per byte |",
        "|---|---|",
        *(f"| {mode} | {bpb:.5f} |" for mode, bpb in result.get("bpb", {}).items()),
        "",
        f"Code {len(files[SCRIPT]):,} bytes, artifact {len(files[ARTIFACT]):,} bytes. Made by `pgolf pack`.",
        "",
    ]
    return "\n".join(lines)
