"""What the Triton kernels share: whether they can run here, and cached tensor-map descriptors.

The kernels themselves lie in `_X_triton.py` beside `X.py` and are imported on first use, so that the package imports
where Triton is absent. On a CPU tensor every op runs PyTorch; only tests send CPU tensors through the kernels, with
Triton's interpreter (:func:`interpreting`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

_interpreting = False
_MAX_DESCRIPTORS = 4096


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def compute_capability(device_index: int) -> int:
    """10 * major + minor of a CUDA device: 90 is Hopper."""
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor


@functools.cache
def multiprocessors(device_index: int) -> int:
    """Number of streaming multiprocessors: the size of a persistent grid."""
    return torch.cuda.get_device_properties(device_index).multi_processor_count


def grid_size(tensor: torch.Tensor) -> int:
    """Programs of a persistent kernel on the tensor's device (interpreted: 3, so that each takes several tiles)."""
    return multiprocessors(tensor.device.index) if tensor.is_cuda else 3


def pdl(tensor: torch.Tensor) -> dict[str, bool]:
    """Launch options of a kernel that begins with `_triton_tile.wait_for_previous`: programmatic dependent launch.

    On Hopper and later its blocks are then placed while the kernel before still runs. Meta tensors, with which kernels
    are compiled ahead of time, stand for those GPUs.
    """
    if _interpreting or (tensor.is_cuda and compute_capability(tensor.device.index) < 90):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def machine_code() -> bool:
    """Whether kernels may hold instructions of the machine: all but interpreted ones."""
    return not _interpreting


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether this tensor's op runs its Triton kernel: on a CUDA device with Triton, or under :func:`interpreting`.

    The kernels accumulate in fp32: float64 is left to PyTorch.
    """
    return tensor.dtype != torch.float64 and ((tensor.is_cuda and has_triton()) or _interpreting)


def runs_narrow_triton(tensor: torch.Tensor) -> bool:
    """The same for kernels built on 16-bit products; on a GPU fp32 stays with cuBLAS, the interpreter takes any."""
    return runs_triton(tensor) and (tensor.dtype in (torch.bfloat16, torch.float16) or not tensor.is_cuda)


def product_as(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """a @ b with fp32 accumulation, written as `dtype` without a rounding in between."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


@functools.cache
def kernels(name: str) -> ModuleType:
    """The module of Triton kernels `pgolf_kernels._<name>_triton`."""
    return importlib.import_module(f"pgolf_kernels._{name}_triton")


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Runs the Triton kernels on CPU tensors, through Triton's interpreter. For tests.

    Raises RuntimeError without TRITON_INTERPRET=1, which Triton reads when it is first imported.
    """
    global _interpreting
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET: the interpreter needs TRITON_INTERPRET=1 before Triton is imported")
    previous, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = previous


_descriptors: dict[tuple[Any, ...], Any] = {}
_thread = threading.local()


def descriptor(
    tensor: torch.Tensor, block: tuple[int, ...], shape: tuple[int, ...] = (), strides: tuple[int, ...] = ()
) -> Any:
    """A host-side tensor-map descriptor of a tensor whose last stride is 1, cached.

    `shape` and `strides`: of a view with the same first element, which is thus described without being made. The key is
    pointer, shape, strides, dtype and block: PyTorch's allocator returns the same few addresses step after step, so
    nearly every call hits. A descriptor holds its tensor alive only through the base it was made from; the cache
    therefore keeps an alias-free stand-in that carries the pointer alone.
    """
    if tensor.is_cuda and not hasattr(_thread, "has_context"):
        # Triton encodes descriptors before anything makes a context current, which a thread of autograd may lack where
        # the allocator had its memory at hand. This query makes one current.
        torch.cuda.mem_get_info(tensor.device)
        _thread.has_context = True
    shape, strides = shape or tensor.shape, strides or tensor.stride()
    key = (tensor.data_ptr(), tensor.dtype, shape, strides, block)
    found = _descriptors.get(key)
    if found is None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        if len(_descriptors) >= _MAX_DESCRIPTORS:
            _descriptors.clear()
        base = tensor if _interpreting else _Address(tensor)
        found = TensorDescriptor(base, list(shape), list(strides), list(block))
        found.kind = (tensor.dtype, tensor.get_device(), block)  # for `_triton_tile.launch`
        _descriptors[key] = found
    return found


class _Address:
    """A tensor's address and dtype without its storage: what a launch needs of a descriptor's base."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._pointer = tensor.data_ptr()
        self.dtype = tensor.dtype

    def data_ptr(self) -> int:
        return self._pointer


def can_describe(tensor: torch.Tensor) -> bool:
    """Whether the copy engine can address a tensor: last stride 1, other strides and the base multiples of 16 bytes."""
    if tensor.stride(-1) != 1 or tensor.data_ptr() % 16:
        return False
    step = 16 // tensor.element_size()
    return not any([stride % step for stride in tensor.stride()[:-1]])


def cdiv(size: int, tile: int) -> int:
    """Tiles that cover `size`. Triton's own function of the name takes the host over a microsecond."""
    return -(-size // tile)


def block_at_least(size: int, smallest: int, largest: int) -> int:
    """The power of two that covers `size`, within [smallest, largest]."""
    return min(max(1 << (max(size, 1) - 1).bit_length(), smallest), largest)


def packed_heads(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, d] with its heads side by side in each token, whatever the tokens' stride."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
