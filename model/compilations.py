"""Triton's compilations: counted, with the time that they take, and made side by side.

A kernel is compiled on its first launch with a combination of dtypes, constants, alignments and options. One that lies
in Triton's cache on the disk counts as well: loading it is not a step's work either.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from pgolf_kernels._triton_op import has_triton

_Hook = Callable[..., "bool | None"]


class Compilations:
    """What Triton compiles for a GPU while this is entered; it adds up when it is entered again.

    kernels: their names, in the order in which they were done. seconds: of wall-clock time in which at least one was
    under way. Blocks may lie in one another, each counts all within it. On other devices, and without Triton, nothing
    is compiled.
    """

    def __init__(self, device: torch.device) -> None:
        self.kernels: list[str] = []
        self.seconds = 0.0
        self._hooks: Any = None
        self._before: tuple[_Hook | None, _Hook | None] = (None, None)
        self._under_way = 0
        self._since = 0.0
        self._lock = threading.Lock()
        if device.type == "cuda" and has_triton():
            from triton import knobs

            self._hooks = knobs.runtime

    def __enter__(self) -> Compilations:
        if self._hooks is not None:
            self._before = self._hooks.jit_cache_hook, self._hooks.jit_post_compile_hook
            self._hooks.jit_cache_hook, self._hooks.jit_post_compile_hook = self._begin, self._end
        return self

    def __exit__(self, *_: object) -> None:
        if self._hooks is not None:
            self._hooks.jit_cache_hook, self._hooks.jit_post_compile_hook = self._before
            self._count(-self._under_way)  # one that failed has no end

    def _begin(self, **facts: Any) -> bool | None:
        """Before a kernel is compiled; True from a hook that was there before keeps Triton from it."""
        outer = self._before[0]
        if outer and outer(**facts):
            return True
        self._count(1)
        return None

    def _end(self, **facts: Any) -> None:
        outer = self._before[1]
        if outer:
            outer(**facts)
        self.kernels.append(facts["fn"].name)
        self._count(-1)

    def _count(self, more: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._under_way:
                self.seconds += now - self._since
            self._under_way, self._since = self._under_way + more, now


@contextmanager
def compiled_together(device: torch.device) -> Iterator[None]:
    """Leaves launches of kernels that are not compiled out of the block; compiles and loads them at its end, together.

    What they would have written keeps what its memory held: nobody may read it, nor take an address from it. Every
    launch must come in the block whatever the tensors hold: one that a value decides may be missed. On other devices,
    and without Triton, nothing is left out.
    """
    if device.type != "cuda" or not has_triton():
        yield
        return
    from triton import knobs

    waiting: dict[tuple[Any, ...], str] = {}

    def put_off(**facts: Any) -> bool:
        waiting[facts["fn"].jit_function, facts["key"]] = facts["compile"]["specialization_data"]
        return True

    def compile_one(item: tuple[tuple[Any, ...], str]) -> Any:
        (kernel, _), specialization = item
        with torch.cuda.device(device):
            compiled = kernel.preload(specialization)
            return compiled and compiled.run  # which Triton makes by another compiler, loading the kernel, when asked

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, put_off
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = before
    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, waiting.items()))
