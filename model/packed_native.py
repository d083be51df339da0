"""Takes the place of pgolf_kernels._native in a packed submission, where nothing is compiled.

`register_op` gives CPU tensors the PyTorch references while this module is in place; matrices in the static mode are
decoded with NumPy. A submission that scores with n-gram hints has `ngram_hints_cpu` of packed_ngram.py here too.
Everything else that only compiled code can do says so.
"""

from __future__ import annotations

import ctypes
from typing import Any

from model.static_decoder import decode_matrices

STANDS_IN = True


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


def __getattr__(name: str) -> Any:
    raise AttributeError(f"{name}: this packed submission runs without compiled kernels")
