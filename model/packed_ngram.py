"""N-gram hints in a packed submission: no array operations give them in time, so they are compiled where they run, from
sources that the submission carries."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

from model.errors import PgolfError

_SOURCES = Path(__file__).resolve().parent.parent / "csrc"


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
