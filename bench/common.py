"""What every bench_X.py shares: input rotation, timing, ceilings, the table and the record.

A bench file defines, for its kernel, CASES, one `setup(case, device)` that draws a fresh set of inputs, one
`work(case)` that counts the bytes and operations which any implementation must spend, and PROVIDERS: name ->
build(case, inputs), which returns the call to be timed, without arguments. Either of them raises :class:`Absent` where
the provider cannot run. The first provider is ours. Then

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forward(bench, case, provider):
        bench(case, provider, PROVIDERS, setup, work)

`pytest bench/` times ours, `pytest bench/ --peers` everybody, on the same inputs in the same run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Call = Callable[[], Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROTATED_BYTES = (200 if DEVICE.type == "cuda" else 64) << 20  # several times the second-level cache
ROUNDS = 20
ROUND_SECONDS = 0.02  # one round of graph replays: far above the cost of launching them


class Absent(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Work:
    """The least that any implementation moves and computes."""

    bytes: int
    flops: int = 0

    def floor_seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bytes_per_s, self.flops / ceilings.flop_per_s)


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float  # a large copy, read and write counted
    flop_per_s: float  # a large matrix product on random data

    def line(self) -> str:
        return f"ceilings: copy {self.bytes_per_s / 1e9:.0f} GB/s, matrix product {self.flop_per_s / 1e12:.2f} TFLOP/s"


@functools.cache
def ceilings() -> Ceilings:
    """Measured on this machine, now."""
    gpu = DEVICE.type == "cuda"
    source = torch.empty((1 << 30) if gpu else (1 << 27), dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source))
    n = 8192 if gpu else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if gpu else torch.float32)
    product = seconds_of(lambda: a @ a)
    return Ceilings(2 * source.numel() / copy, 2 * n**3 / product)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Call, rounds: int = 7) -> float:
    """Median of a call's time: host clock around a synchronised call, for what lasts far longer than a launch."""
    call()
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class Timed:
    """What pytest-benchmark times: `target` runs `calls` calls and waits for them."""

    target: Call
    calls: int
    how: str


def rotations(work: Work) -> int:
    """How many input sets make a round trip larger than the cache."""
    return max(1, min(64, -(-ROTATED_BYTES // max(1, work.bytes))))


def timed(calls: list[Call]) -> Timed:
    """CUDA: replays of one graph of all calls or, where capture fails, the calls themselves. CPU: the calls in turn."""
    if DEVICE.type == "cpu":
        return Timed(lambda: [call() for call in calls], len(calls), "calls")
    once = max(seconds_of(lambda: [call() for call in calls], rounds=3), 1e-6)
    repeats = max(1, min(1000, int(ROUND_SECONDS / once)))
    try:
        replay, how = graph_of(calls).replay, "graph"
    except RuntimeError:
        torch.cuda.synchronize()
        replay, how = (lambda: [call() for call in calls]), "stream"

    def target() -> None:
        for _ in range(repeats):
            replay()
        torch.cuda.synchronize()

    target()
    return Timed(target, repeats * len(calls), how)


def graph_of(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """All calls in one CUDA graph, warmed up on a side stream as capture asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def peak_bytes(call: Call) -> int | None:
    """Everything allocated on the GPU during one call, beyond what was allocated before."""
    if DEVICE.type == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peer_module(path: str) -> ModuleType:
    """A Python file under PGOLF_PEER_DIR: somebody else's checkout, none of which is copied here."""
    folder = os.environ.get("PGOLF_PEER_DIR")
    if not folder:
        raise Absent("PGOLF_PEER_DIR is not set")
    file = Path(folder) / path
    if not file.is_file():
        raise Absent(f"no {path} in PGOLF_PEER_DIR")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def peer_package(name: str) -> ModuleType:
    """An installed package, or Absent."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed") from error


def environment(arguments: Sequence[str] = ()) -> dict[str, Any]:
    """What a result needs to be read later: hardware, versions, commit, command (of these arguments)."""
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "pytest", *arguments]),
    }


def commit() -> str | None:
    """The checkout's commit, with "-dirty" after changes; PGOLF_COMMIT where the sources lie outside git."""
    given = os.environ.get("PGOLF_COMMIT")
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return given or (answer.stdout.strip() if answer.returncode == 0 else None)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


@dataclass
class Row:
    """One line of the table."""

    suite: str
    case: str
    provider: str
    seconds: float | None = None
    how: str = ""
    peak_bytes: int | None = None
    bytes_per_s: float = 0.0
    flop_per_s: float = 0.0
    of_floor: float = 0.0
    absent: str = ""


@dataclass
class Table:
    """The rows of a session, printed at its end."""

    rows: list[Row] = field(default_factory=list)

    def lines(self) -> list[str]:
        out = []
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.suite, row.case), []).append(row)
        for (suite, case), rows in groups.items():
            ours = next((row.seconds for row in rows if row.seconds), None)
            out.append(f"{suite}  {case}")
            for row in rows:
                if row.seconds is None:
                    out.append(f"  {row.provider:<28} absent: {row.absent}")
                    continue
                ratio = f"{row.seconds / ours:6.2f}x" if ours else ""
                memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:9.0f} MB"
                out.append(
                    f"  {row.provider:<28}{row.seconds * 1e3:10.3f} ms {ratio} {row.bytes_per_s / 1e9:8.0f} GB/s "
                    f"{row.flop_per_s / 1e12:8.2f} TFLOP/s {row.of_floor:5.0%} of ceiling {memory}  {row.how}"
                )
        return out
