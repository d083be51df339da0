"""What this installation can do, and the exact command for what it cannot: `pgolf doctor`.

Each finding is `ok`, `note` (works, but something more could be had; `fix` says how) or `broken` (an installed part
does not work). Only `broken` makes the exit status non-zero.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Status = Literal["ok", "note", "broken"]

CHECKOUT = Path(__file__).resolve().parent.parent
PIP = f"{sys.executable} -m pip install"
NVIDIA_COMPILER = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-nvvm")
# Used by parts of the package only: (distribution, what for, how to get it).
OPTIONAL = (
    ("triton", "the Triton kernels", f"{PIP} 'triton>=3.6'"),
    ("huggingface_hub", "`pgolf data download`", f"{PIP} 'huggingface_hub>=0.30'"),
    ("pyarrow", "`pgolf data download`", f"{PIP} 'pyarrow>=17'"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    part: str
    status: Status
    text: str
    fix: str = ""


def examine() -> list[Finding]:
    """Everything `pgolf doctor` reports, in its order. Never raises for a part that does not work."""
    findings = [*_versions()]
    try:
        import torch
    except Exception as error:
        return [*findings, Finding("PyTorch", "broken", _reason(error), f"{PIP} torch==2.13.0")]
    gpus = _driver_gpus()
    findings += _gpu(torch, gpus)
    findings += _native(has_gpu=bool(gpus))
    findings += _attention()
    findings += _threads(torch)
    findings += _optional()
    return findings


def print_findings(findings: list[Finding], console: Console) -> None:
    """Prints the findings as a table, then the commands."""
    colour = {"ok": "green", "note": "yellow", "broken": "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        status = f"[{colour[finding.status]}]{finding.status}[/]"
        table.add_row(finding.part, status, escape(finding.text))
    console.print(table)
    for finding in findings:
        if finding.fix:
            # Commands are printed unwrapped, to be copied.
            console.print(f"\n{finding.part}:\n    {escape(finding.fix)}", soft_wrap=True, highlight=False)


def _versions() -> Iterator[Finding]:
    yield Finding(
        "pgolf_kernels", "ok", f"{_version('pgolf_kernels')}, Python {platform.python_version()}, {sys.executable}"
    )
    for name in ("torch", "numpy", "sentencepiece", "safetensors"):
        version = _version(name)
        if version:
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "broken", "not installed", f"{PIP} {name}")


def _gpu(torch: Any, gpus: list[str]) -> Iterator[Finding]:
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            architecture = f"sm_{properties.major}{properties.minor}"
            memory = properties.total_memory / 2**30
            yield Finding(
                f"GPU {index}", "ok", f"{properties.name}, {architecture}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
            )
    elif not gpus:
        yield Finding("GPU", "ok", "none: everything runs on the CPU")
    elif torch.version.cuda is None:
        fix = f"{PIP} --force-reinstall torch==2.13.0"
        yield Finding("GPU", "note", f"{gpus[0]}, but this PyTorch is built for the CPU alone", fix)
    else:
        fix = f"update NVIDIA's driver to one for CUDA {torch.version.cuda}; `nvidia-smi` shows the driver's version"
        yield Finding("GPU", "broken", f"{gpus[0]}, but PyTorch (CUDA {torch.version.cuda}) cannot use it", fix)


def _native(*, has_gpu: bool) -> Iterator[Finding]:
    try:
        native = importlib.import_module("pgolf_kernels._native")
    except ImportError as error:
        yield Finding("native module", "broken", _reason(error), _rebuild())
        return
    openmp = "OpenMP" if native.has_openmp() else "no OpenMP (one thread)"
    cuda = native.has_cuda()
    for device in _devices(cuda=cuda):
        try:
            _check_kernel(device)
        except Exception as error:
            fix = _rebuild("" if device == "cpu" else "1")
            if "driver version is insufficient" in str(error):
                fix = f"update NVIDIA's driver to CUDA 13's (580 or newer), or build without CUDA: {_rebuild('0')}"
            yield Finding("native module", "broken", f"{native.__file__} on {device}: {_reason(error)}", fix)
            return
    text = f"{'CUDA and CPU' if cuda else 'CPU only'}, instruction set {native.isa()}, {openmp}"
    if has_gpu and not cuda:
        fix = _rebuild("1")
        yield Finding("native module", "note", f"{text}: on the GPU its kernels run as PyTorch references", fix)
    else:
        yield Finding("native module", "ok", text)


def _devices(*, cuda: bool) -> list[str]:
    """Where the native module has kernels to run."""
    import torch

    return ["cpu", "cuda"] if cuda and torch.cuda.is_available() else ["cpu"]


def _check_kernel(device: str) -> None:
    """Runs one native kernel on eight numbers: a module that imports may still be one of another machine."""
    import torch

    from pgolf_kernels import softcap_ce

    logits = torch.linspace(-40, 40, 8, device=device).view(2, 4)
    targets = torch.tensor([1, 2], device=device)
    got = softcap_ce.softcap_cross_entropy(logits, targets, softcap=30.0)
    capped = 30.0 * torch.tanh(logits / 30.0)
    want = torch.nn.functional.cross_entropy(capped, targets)
    if not torch.allclose(got, want, rtol=1e-5, atol=1e-5):
        raise RuntimeError(f"softcap cross-entropy gave {got.item():.6f}, wanted {want.item():.6f}")


def _attention() -> Iterator[Finding]:
    try:
        from pgolf_kernels.attention import attention_backend_info

        info = attention_backend_info()
    except Exception as error:
        yield Finding("attention", "broken", _reason(error))
        return
    why = {
        "fa3": "FlashAttention 3, a Hopper GPU",
        "torch": "PyTorch's FlashAttention 2",
        "cpu": "PyTorch's scaled dot product, no GPU",
    }[info["backend"]]
    if info["backend"] == "fa3" and info["left_out"]:
        why += f", built without {info['left_out']}: there torch's runs"
    if info["forced"] != "auto":
        why += f" (forced by PGOLF_ATTENTION={info['forced']})"
    hopper = info["backend"] == "torch" and info["forced"] == "auto" and _is_hopper()
    if hopper:
        lack = f"was built without {info['left_out']}" if info["left_out"] else "does not import"
        text = f"{info['backend']}: {why}; FlashAttention 3 is faster here but flash_attn_interface {lack}"
        yield Finding("attention", "note", text, f"{info['wheel']}\n    or from source: {info['source']}")
    else:
        yield Finding("attention", "ok", f"{info['backend']}: {why}")


def _threads(torch: Any) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("threads", "ok", f"{torch.get_num_threads()} (OMP_NUM_THREADS changes it), {usable} cores usable")


def _optional() -> Iterator[Finding]:
    for name, use, fix in OPTIONAL:
        version = _version(name)
        if version:
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "note", f"not installed: no {use}", fix)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver_gpus() -> list[str]:
    """Names of the GPUs that NVIDIA's driver lists, whatever PyTorch can use."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line.replace(", ", ", driver ") for line in done.stdout.splitlines() if line] if done.returncode == 0 else []
    )


def _rebuild(cuda: Literal["", "0", "1"] = "") -> str:
    """The command that builds the native module again; for "1" (with CUDA) it brings nvcc along where there is none."""
    editable = (CHECKOUT / "setup.py").is_file()
    where = f"cd {shlex.quote(str(CHECKOUT))} && " if editable else "in a checkout of pgolf_kernels: "
    build = f"{PIP} --force-reinstall --no-deps {'-e ' if editable else ''}."
    if cuda != "1":
        return f"{where}{'PGOLF_CUDA=0 ' if cuda else ''}{build}"
    nvcc = shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").is_file()
    compiler = "" if nvcc else f"{PIP} {' '.join(f'{name}==13.0.*' for name in NVIDIA_COMPILER)} && "
    return f"{where}{compiler}PGOLF_CUDA=1 {build}"


def _is_hopper() -> bool:
    import torch

    return torch.cuda.get_device_capability() == (9, 0)


def _reason(error: BaseException) -> str:
    """The error's kind and first line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
