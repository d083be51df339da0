"""Triton without a GPU: kernels compiled for sm_90 from the launches that the package makes on meta tensors, or run by
the interpreter."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch

from pgolf_kernels._triton_op import has_triton

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")

_ACCESS = re.compile(r"\b(?:ld|st|red|atom|cp\.async\S*)\.global|cp\.async\.bulk")
SHARED_LIMIT = 232448  # bytes of shared memory a block may have on sm_90
_POINTERS = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.int16: "i16", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    name: str
    registers: int
    stack: int
    local: int
    shared: int
    serial: bool  # ptxas found that accumulators are touched between products, and waits for each wgmma
    races: bool  # launched as a programmatic dependent, and touches memory before it waits for the kernel before


class _Recorder:
    def __init__(self, kernel: Any, seen: list[Compiled]) -> None:
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        return self._compile

    def _compile(self, *args: Any, **named: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        options = {name: named.pop(name) for name in ("num_warps", "num_stages", "launch_pdl") if name in named}
        parameters = inspect.signature(self._kernel.fn).parameters
        bound = inspect.signature(self._kernel.fn).bind(*args, **named)
        bound.apply_defaults()
        signature, constants, attributes = {}, {}, {}
        frozen = set(self._kernel.do_not_specialize or ())
        for position, (name, value) in enumerate(bound.arguments.items()):
            kind, aligned = _kind(value)
            one = isinstance(value, int) and value == 1 and name not in frozen
            if "constexpr" in str(parameters[name].annotation) or kind is None or one:
                signature[name], constants[name] = "constexpr", value
                continue
            signature[name] = kind
            if aligned and name not in frozen:
                attributes[(position,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self._kernel, signature=signature, constexprs=constants, attrs=attributes)
        result = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        early = _ACCESS.search(result.asm["ptx"].partition("griddepcontrol.wait")[0])
        races = bool(options.get("launch_pdl") and early)
        self._seen.append(_usage(self._kernel.fn.__name__, result, races))


def _kind(value: Any) -> tuple[str | None, bool]:
    """(type in a Triton signature, whether it is known to be a multiple of 16); None for a constant."""
    if isinstance(value, torch.Tensor):
        return f"*{_POINTERS[value.dtype]}", True
    if hasattr(value, "block_shape"):
        return f"tensordesc<{_POINTERS[value.base.dtype]}{list(value.block_shape)}>", False
    if isinstance(value, bool) or value is None:
        return None, False
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    return None, False


def _usage(name: str, compiled: Any, races: bool) -> Compiled:
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    # Products, and waits for all of them: where these alternate, no product runs beside another.
    products = [bool(product) for product in re.findall(r"([HQ]GMMA)|WARPGROUP\.DEPBAR\.LE gsb0, 0x0", code)]
    serial = any(products) and not any(a and b for a, b in pairwise(products))
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK", "LOCAL"))
    return Compiled(name, registers, stack, local, compiled.metadata.shared, serial, races)


def record(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[Compiled]:
    """Makes every kernel launch of a `_X_triton` module, and of what all share, compile instead of run; the list fills
    as launches happen."""
    from pgolf_kernels import _triton_tile

    seen: list[Compiled] = []
    for place in (module, _triton_tile):
        for name, value in list(vars(place).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(place, name, _Recorder(value, seen))
    return seen


def assert_sound(seen: list[Compiled]) -> None:
    assert seen, "no launch was recorded"
    for kernel in seen:
        assert kernel.stack == 0 and kernel.local == 0, f"{kernel}: spills"
        assert kernel.shared <= SHARED_LIMIT, f"{kernel}: more shared memory than sm_90 has"
        assert not kernel.serial, f"{kernel}: waits for each wgmma"
        assert not kernel.races, f"{kernel}: memory before wait_for_previous"


def run_interpreted(module: str) -> None:
    """Runs a test module's main part with Triton's interpreter, which Triton chooses when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
