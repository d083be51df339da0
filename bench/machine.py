"""Which machine a result belongs to, and whether anybody else was using it."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import resource
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pgolf_kernels.attention import attention_backend

# What two results must agree in for their times to be compared, where both say it. A GPU's hosts differ in their number
# of threads, which decides little there.
SAME_CPU = ("device", "cpu", "cpu_model", "threads")
SAME_GPU = ("device", "torch", "cuda")
GIVEN = ("PGOLF_BENCH_TOKENS", "PGOLF_BENCH_TOKENIZER", "PGOLF_CODES")  # files that a run was given, see data.py
ON_TOKENS = frozenset({"embedding", "evaluate", "train_step"})  # files that measure on data.tokens()
ON_ATTENTION = frozenset({"attention", "evaluate", "quantize", "train_step"})  # files in which attention runs


class Refused(Exception):
    """Results that cannot be compared; the message says why."""


@functools.cache
def load_at_start() -> float:
    """The load average (one minute) before this process had measured anything."""
    return os.getloadavg()[0]


def environment(arguments: Sequence[str]) -> dict[str, Any]:
    """What a result needs to be read later beside what pytest-benchmark notes: hardware, versions, command."""
    gpu = torch.cuda.is_available()
    name, model = _cpu()
    return {
        "device": torch.cuda.get_device_name() if gpu else name,
        "cpu": name,
        "cpu_model": model,
        "threads": torch.get_num_threads(),
        "load_at_start": round(load_at_start(), 2),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda if gpu else None,
        "attention": attention_backend(torch.device("cuda" if gpu else "cpu")),
        "given": {name: _sha256(os.environ[name]) for name in GIVEN if os.environ.get(name)},
        "command": os.environ.get("PGOLF_BENCH_COMMAND") or shlex.join(["python", "-m", "pytest", *arguments]),
    }


@functools.cache
def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine_name(device: str) -> str:
    """The folder of a machine's results: the device it computes on, in lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def refuse_another(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises Refused where the recorded environment is not that of this machine."""
    for name in SAME_GPU if here["cuda"] else SAME_CPU:
        if name in recorded and recorded[name] != here[name]:
            raise Refused(f"recorded with {name} {recorded[name]!r}, this machine has {here[name]!r}")


def given_to(suite: str, case: str) -> tuple[str, ...]:
    """Which of GIVEN decide what a row was measured on."""
    if suite.split("/")[0] in ON_TOKENS:
        return ("PGOLF_BENCH_TOKENS",)
    if suite == "ngram/stream" and "given text" in case:
        return ("PGOLF_BENCH_TOKENS", "PGOLF_BENCH_TOKENIZER")
    return ("PGOLF_CODES",) if suite == "packing/codes" and case.startswith("given") else ()


def text_of(suite: str, environment: Mapping[str, Any]) -> str:
    """Where a suite's tokens come from, if its cases do not say so."""
    if suite.split("/")[0] not in ON_TOKENS:
        return ""
    return "given text" if "PGOLF_BENCH_TOKENS" in environment.get("given", {}) else "bundled text"


def comparable(suite: str, case: str, recorded: Mapping[str, Any], here: Mapping[str, Any]) -> bool:
    """Whether a recorded row was measured on the text or the codes that it would be measured on here, and with the
    attention that would run here."""
    if suite == "packing/codes" and case.startswith("own run"):
        return False  # the newest run of whoever measured
    attention = recorded.get("attention"), here.get("attention")
    if suite.split("/")[0] in ON_ATTENTION and None not in attention and attention[0] != attention[1]:
        return False
    before, now = recorded.get("given", {}), here.get("given", {})
    return all(before.get(name) == now.get(name) for name in given_to(suite, case))


def _cpu() -> tuple[str, str]:
    """(name, "family/model/stepping"): a virtual machine's CPU has often no more than a general name."""
    found: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    numbers = (found.get(key, "?") for key in ("cpu family", "model", "stepping"))
    return found.get("model name") or platform.processor(), "/".join(numbers)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


class Neighbours:
    """`with Neighbours() as n: ...`; then n.cores is how many cores others kept busy meanwhile (nan: unknown)."""

    cores = float("nan")

    def __enter__(self) -> Neighbours:
        self._before = time.perf_counter(), _busy_seconds(), _own_seconds()
        return self

    def __exit__(self, *exception: object) -> None:
        wall, busy, own = (
            b - a for a, b in zip(self._before, (time.perf_counter(), _busy_seconds(), _own_seconds()), strict=True)
        )
        self.cores = max(0.0, (busy - own) / wall)


def _busy_seconds() -> float:
    """CPU seconds of all processes, what a hypervisor took included; nan where Linux's /proc is not there."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return float("nan")
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU seconds of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
