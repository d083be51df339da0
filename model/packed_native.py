"""Takes the place of pgolf_kernels._native in a packed submission, where nothing is compiled.

`register_op` gives CPU tensors the PyTorch references while this module is in place; matrices in the static mode are
decoded with NumPy. N-gram hints, which no array operations give in time, are compiled where they run, from sources that
the submission carries. Everything else that only compiled code can do says so.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

from model.errors import PgolfError
from model.static_decoder import decode_matrices

STANDS_IN = True
_SOURCES = Path(__file__).resolve().parent.parent / "csrc"


def has_cuda() -> bool:
    return False


def has_openmp() -> bool:
    return False


def isa() -> str:
    return "none"


def decode_static(body: memoryview, addresses: list[tuple[int, int, int]], threads: int) -> None:
    """Decodes to (address, rows, columns) each, as the compiled function does; one thread."""
    matrices = decode_matrices(bytes(body), [(rows, cols) for _, rows, cols in addresses])
    for matrix, (address, _, _) in zip(matrices, addresses, strict=True):
        ctypes.memmove(address, matrix.ctypes.data, matrix.nbytes)


class NgramSettings(ctypes.Structure):
    """pgolf::NgramSettings of csrc/ngram/ngram.h."""

    _fields_ = (
        ("orders", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("order_count", "table_bits", "token_bits")),
        *((name, ctypes.c_double) for name in ("threshold_scale", "base_beta", "agree_bonus")),
        *((name, ctypes.c_double) for name in ("within_threshold", "within_beta", "word_threshold", "word_beta")),
        *((name, ctypes.c_void_p) for name in ("has_leading_space", "is_boundary")),
        ("full_hash", ctypes.c_bool),
    )


def ngram_hints_cpu(tokens: int, n: int, *rest: Any) -> None:
    """As the compiled module's: addresses and numbers, the settings between the tokens and the results."""
    *settings, threads, hints, betas = rest
    pointer = ctypes.c_void_p
    if _ngram_library().pgolf_ngram_hints(
        pointer(tokens),
        ctypes.c_int64(n),
        ctypes.byref(NgramSettings(*settings)),
        ctypes.c_int(threads),
        pointer(hints),
        pointer(betas),
    ):
        raise MemoryError("n-gram hints: not enough memory for the tables")


@functools.cache
def _ngram_library() -> ctypes.CDLL:
    """Compiles the sources beside this package; the library goes where they are."""
    if not _SOURCES.is_dir():
        raise PgolfError("n-gram hints: this submission was packed from a run that does not use them")
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise PgolfError(
            "n-gram hints: no C++ compiler on the PATH, wanted c++, g++ or clang++ (Debian: apt install g++)"
        )
    library = _SOURCES / "ngram.so"
    flags = ("-std=c++17", "-O3", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-I", str(_SOURCES))
    sources = sorted(map(str, _SOURCES.rglob("*.cpp")))
    done = subprocess.run([compiler, *flags, *sources, "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise PgolfError(f"n-gram hints: {compiler} failed: {done.stderr.strip()[:500]}")
    return ctypes.CDLL(str(library))


def __getattr__(name: str) -> Any:
    raise AttributeError(f"{name}: this packed submission runs without compiled kernels")
