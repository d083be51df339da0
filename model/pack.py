"""What a size-limited submission ships: one self-extracting script, the artifact, and papers.

    train_gpt.py     what training and scoring need of every module, minified, brotli; unpacks itself and runs
    model.pgolf      the artifact, in the static mode, which the script decodes with NumPy alone
    submission.json  sizes and results        README.md  how to run it        train.log  what the run printed

The script needs Python, PyTorch and the libraries in requirements.txt, and no compiled part of this project: native
kernels are replaced by their PyTorch references, and what launches them is left out with all else that the entry cannot
reach (model/prune.py). The script of a run that scores with n-gram hints carries their C++ sources and compiles them
where it runs. Every file in the folder counts against the budget.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import brotli
import python_minifier

from model.artifact import encode_artifact, read_artifact
from model.config import Config
from model.errors import PgolfError
from model.files import atomic_folder, check_replaceable, resolved
from model.prune import prune
from model.rules import SIZE_BUDGET
from model.run import RunDir

SCRIPT, ARTIFACT, FACTS = "train_gpt.py", "model.pgolf", "submission.json"
ROOT_MODULES = ("model.packed_entry", "model.packed_native")
_HINTS = "from model.packed_ngram import ngram_hints_cpu\n"  # ends the stand-in where it has hints
LIBRARIES = ("torch", "numpy", "sentencepiece", "brotli", "zstandard", "safetensors", "click", "rich")
_PACKAGES = ("model", "pgolf_kernels")
_SOURCE = Path(__file__).resolve().parent.parent
_NATIVE = "pgolf_kernels._native"
_DEVICE = ("_triton_tile", "_triton_lora")  # modules of device code that modules of Triton kernels import
# Modules of the network and of operators that it alone calls: neither a file nor a user decides what they are given.
# Only PGOLF_ATTENTION is a user's: a wrong name there ends the script with a KeyError that quotes it.
_UNCHECKED = (
    "model.adapters", "model.gpt",
    *(f"pgolf_kernels.{name}" for name in (
        "adapter_adamw", "attention", "batched_lora", "embedding", "fused_mlp", "linear_softcap_ce",
        "_linear_softcap_ce_head", "muon", "qk_rope", "residual", "softcap_ce", "stepped_lora", "xsa",
    )),
)  # fmt: skip
_LEFT_OUT = ("_fp8_mlp_triton",)  # and with them what `_is_left_out` guards: a script has no room for the FP8 MLP
_KERNELS = "_triton"  # ending of the modules of Triton kernels, which are imported by name where they run

_STUB = b'''# coding: latin-1
"""Self-extracting: python train_gpt.py --help"""
import atexit,brotli,pathlib,shutil,sys,tempfile
d=tempfile.mkdtemp()
atexit.register(shutil.rmtree,d,True)
f=brotli.decompress("""%s""".encode("latin-1")).split(b"\\0")
for n,t in zip(f,f[len(f)//2:]):
 p=pathlib.Path(d,n.decode())
 p.parent.mkdir(parents=True,exist_ok=True)
 p.write_bytes(t)
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
    budget: int = SIZE_BUDGET,
    replace: bool = False,
) -> Submission:
    """Writes the submission of a run to the folder `out`, which appears when it is complete.

    The artifact is coded anew in the static mode. `replace` admits a submission that is already there, unless the run
    lies in its folder. Raises PgolfError when `out` cannot be written or replaced, ArtifactError when the run
    has no artifact. Whether the submission fits is in the result.
    """
    run = RunDir(run_dir, writes=False)
    replaceable = replace and FACTS
    check_replaceable(resolved(out), replace=replaceable, inputs=[run.path])
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
        SCRIPT: entry_script(ngram=uses_ngram(artifact.config)),
        ARTIFACT: data,
        "requirements.txt": "".join(f"{library}\n" for library in LIBRARIES).encode(),
        "train.log": log.read_bytes() if log.is_file() else b"",
    }
    result = run.result()
    files["README.md"] = _readme(artifact.config, result, files).encode()
    facts = {
        "author": author,
        "name": artifact.config.preset,
        "seed": artifact.config.train.seed,
        "val_bpb": result.get("bpb", {}),
        "bytes_model": len(data),
        "bytes_code": len(files[SCRIPT]),
    }
    files[FACTS] = _with_total(facts, sum(map(len, files.values())))
    with atomic_folder(out, replace=replaceable) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
    return Submission(Path(out), {name: len(content) for name, content in files.items()}, budget)


@functools.cache
def entry_script(*, ngram: bool = False) -> bytes:
    """train_gpt.py: the modules that ROOT_MODULES reach, minified and compressed, and what unpacks them.

    ngram: with the C++ sources of the n-gram hints, which the script compiles when a mode asks for hints. Raises
    PgolfError when they are not there (an installation without the sources).
    """
    files = packed_files(ngram=ngram)
    names = sorted(files)
    content = "\0".join([*names, *(files[name] for name in names)]).encode()  # smaller than in pairs
    return _STUB % latin1_literal(brotli.compress(content, mode=brotli.MODE_TEXT))


def packed_files(*, ngram: bool) -> dict[str, str]:
    """What `entry_script` unpacks: path -> text."""
    paths = reachable_modules([*_roots(), *(["model.packed_ngram"] if ngram else [])])
    paths[_NATIVE] = paths.pop("model.packed_native")
    sources = {name: path.read_text(encoding="utf-8") for name, path in paths.items()}
    sources[_NATIVE] += _HINTS if ngram else ""
    missing = _missing_native(sources[_NATIVE])
    pruned = prune(
        sources,
        ("model.packed_entry", _NATIVE),
        false=lambda node: missing(node) or _is_left_out(node),
        by_name=_KERNELS,
        unchecked=_UNCHECKED,
    )
    own = _own_names(pruned)
    files = {}
    for name, source in pruned.items():
        suffix = "/__init__.py" if paths[name].name == "__init__.py" else ".py"
        kernels = name.endswith((_KERNELS, *_DEVICE))
        files[name.replace(".", "/") + suffix] = minified(source, kernels=kernels, own=own[name])
    if ngram:
        files |= {path.relative_to(_SOURCE).as_posix(): without_comments(path) for path in _ngram_sources()}
    return files


def uses_ngram(config: Config) -> bool:
    """Whether the run's own evaluation mode asks for n-gram hints."""
    return config.eval.eval_mode.endswith("+ngram-tilt")


def latin1_literal(data: bytes) -> bytes:
    """What stands between three double quotes a side for Latin-1 bytes `data`, in a file of that encoding.

    One byte in eighty grows, where base 85 makes every four bytes five.
    """
    last = b'\\"' if data.endswith(b'"') else b""
    data = data.removesuffix(b'"')
    data = data.replace(b"\\", b"\\\\").replace(b"\r", b"\\r").replace(b'""', b'"\\"')
    return re.sub(rb"\0(?=[0-7])", rb"\\x00", data).replace(b"\0", b"\\0") + last


def _own_names(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> its global names that begin with an underscore and stand in no other module, nor in its own strings."""
    words = {module: re.findall(r"\w+", source) for module, source in sources.items()}
    modules_of = Counter(word for found in words.values() for word in set(found))
    own = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
        defined |= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
        own[module] = {name for name in defined - texts if re.match("_[^_]", name) and modules_of[name] == 1}
    return own


def minified(source: str, *, kernels: bool, own: Collection[str] = ()) -> str:
    """A module's source without comments, docstrings and annotations of functions, with short names of locals and of
    `own`, the global names that nobody else knows.

    Assertions go: they tell a type checker what is known. Other global names stay because other modules refer to them.
    Triton reads its kernels' source, where names of arguments are those of launches and annotations say what is
    constant: there only other locals get short names.
    """
    tree = ast.parse(source)
    _make_positional(tree, own)
    arguments = {each.arg for node in ast.walk(tree) if isinstance(node, ast.arguments) for each in node.args}
    return python_minifier.minify(
        ast.unparse(tree),
        remove_annotations=not kernels,
        remove_literal_statements=True,
        preserve_locals=sorted(arguments) if kernels else None,
        rename_globals=not kernels,
        preserve_globals=sorted({*re.findall(r"\w+", source)} - {*own}),
        hoist_literals=False,
        combine_imports=False,  # shorter before compression alone
        remove_asserts=True,
    )


def _make_positional(tree: ast.Module, own: Collection[str]) -> None:
    """Makes the arguments positional of functions in `own` that are only called, and without keywords.

    Nobody says their names then, and they get short ones too.
    """
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call) and not node.keywords]
    others = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    others.subtract(call.func.id for call in calls if isinstance(call.func, ast.Name))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in own and not (others[node.name] or node.decorator_list):
            node.args.posonlyargs, node.args.args = node.args.args, []


def _missing_native(stand_in: str) -> Callable[[ast.expr], bool]:
    """Whether an expression asks for compiled code that the stand-in does not have."""
    nodes = list(ast.walk(ast.parse(stand_in)))
    names = {node.name for node in nodes if isinstance(node, ast.alias | ast.FunctionDef)}
    names |= {node.id for node in nodes if isinstance(node, ast.Name)}

    def missing(node: ast.expr) -> bool:
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            return False
        if node.func.id in ("runs_native", "has_native_cuda"):
            return True
        match node.func.id, node.args:
            case "hasattr", [ast.Name("_native"), ast.Constant(name)]:
                return name not in names
        return False

    return missing


def _is_left_out(node: ast.expr) -> bool:
    """Whether an expression asks for FP8: a script refuses to train in it, as on a GPU that has none."""
    match node:
        case ast.Call(ast.Name("runs_fp8")) | ast.Attribute(ast.Name("state"), "fp8", ast.Load()):
            return True
    return False


def without_comments(path: Path) -> str:
    """C++ without comments and indentation. Only for sources whose literals hold no double slash."""
    lines = (re.sub("//.*", "", line).strip() for line in path.read_text(encoding="utf-8").splitlines())
    return "\n".join(line for line in lines if line) + "\n"


def _ngram_sources() -> list[Path]:
    """csrc/ngram with what it includes, without Python's bindings."""
    folder = _SOURCE / "csrc"
    common = [folder / "common" / name for name in ("isa.cpp", "parallel.h", "system.h")]
    sources = [path for path in folder.glob("ngram/*") if path.name != "bindings.cpp"]
    missing = next((path for path in common if not path.is_file()), None)
    if missing or not sources:
        raise PgolfError(f"{folder}: the sources of the n-gram hints are not here; pack this run from a checkout")
    return [*common, *sources]


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
    kernels = sorted((_SOURCE / "pgolf_kernels").glob(f"_*{_KERNELS}.py"))
    return [*ROOT_MODULES, *(f"pgolf_kernels.{path.stem}" for path in kernels if path.stem not in _LEFT_OUT)]


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


def _readme(config: Config, result: dict[str, Any], files: dict[str, bytes]) -> str:
    other = f"This run's training steps multiplied in FP8 in the MLPs; those of {SCRIPT} do not."
    lines = [
        f"# {config.preset}",
        "",
        "    pip install -r requirements.txt",
        f"    python {SCRIPT} --data DATA_DIR            # scores {ARTIFACT}",
        f"    python {SCRIPT} train --help               # trains",
        "",
        "| mode | bits per byte |",
        "|---|---|",
        *(f"| {mode} | {bpb:.5f} |" for mode, bpb in result.get("bpb", {}).items()),
        "",
        *([other, ""] if config.train.fp8_mlp else []),
        f"Code {len(files[SCRIPT]):,} bytes, artifact {len(files[ARTIFACT]):,} bytes. Made by `pgolf pack`.",
        "",
    ]
    return "\n".join(lines)
