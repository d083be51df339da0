"""What every bench_X.py shares: input rotation, timing and ceilings.

A bench file defines, for its kernel, CASES, one `setup(case, device)` that draws a fresh set of inputs, one
`work(case)` that counts the bytes and operations which any implementation must spend, and PROVIDERS: name ->
build(case, inputs), which returns the call to be timed, without arguments. Either of them raises `peers.Absent` where
the provider cannot run. The first provider is ours. Then

    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forward(bench, case, provider):
        bench(case, provider, PROVIDERS, setup, work)

`pytest bench/` times ours, `pytest bench/ --peers` everybody, on the same inputs in the same run.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROTATED_BYTES = (200 if DEVICE.type == "cuda" else 64) << 20  # several times the second-level cache
ROTATED_SECONDS = 1.0  # at most so long is one way through all input sets
ROUND_SECONDS = 0.02  # one round of graph replays: far above the cost of launching them
ROUNDS, ROW_SECONDS = 20, 6.0  # rounds of a row: so many, or as fill that time, at least one


@dataclass(frozen=True)
class Work:
    """The least that any implementation moves and computes."""

    bytes: int
    flops: int = 0

    def floor_seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bytes_per_s, self.flops / ceilings.flop_per_s)


def beside_pytorch(kernel: Call, expression: Call) -> dict[str, Call]:
    """A kernel and what one would write without it: as it is, and compiled."""
    return {
        "pgolf_kernels": kernel,
        "eager": expression,
        "torch.compile": torch.compile(expression, dynamic=False),
    }


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float  # a large copy, read and write counted
    flop_per_s: float  # a large matrix product on random data


@functools.cache
def ceilings() -> Ceilings:
    """Measured on this machine, now; or as __main__.py hands them from one of a run's processes to the next."""
    if known := os.environ.get("PGOLF_BENCH_CEILINGS"):
        return Ceilings(**json.loads(known))
    gpu = DEVICE.type == "cuda"
    source = torch.empty((1 << 30) if gpu else (1 << 27), dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source))
    n = 8192 if gpu else 2048
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if gpu else torch.float32)
    product = best_seconds(lambda: a @ a)
    return Ceilings(2 * source.numel() / copy, 2 * n**3 / product)


def best_seconds(call: Call, rounds: int = 10) -> float:
    """The fastest of some calls: what the machine can do, not what it did on the average."""
    call()
    return min(elapsed(call) for _ in range(rounds))


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def elapsed(call: Call) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return max(time.perf_counter() - start, 1e-6)


@dataclass(frozen=True)
class Timed:
    """What pytest-benchmark times: `target` runs `calls` calls and waits for them."""

    target: Call
    calls: int
    rounds: int
    how: str


def seconds_once(call: Call) -> float:
    """Seconds of a call that has run before; of the first one, with what it compiles, where that is long on a CPU."""
    first = elapsed(call)
    return first if DEVICE.type == "cpu" and first > ROW_SECONDS / 2 else elapsed(call)


def rotations(work: Work, seconds: float) -> int:
    """How many input sets make a round trip larger than the cache; fewer where a call is too slow for it to matter."""
    return max(1, min(64, -(-ROTATED_BYTES // max(1, work.bytes)), int(ROTATED_SECONDS / seconds)))


def timed(calls: list[Call], once: float) -> Timed:
    """CUDA: replays of one graph of all calls or, where they cannot be captured, the calls themselves. CPU: the calls.

    They have run before, so that nothing is compiled here, and take `once` seconds together.
    """
    if DEVICE.type == "cpu":
        rounds = max(1, min(ROUNDS, int(ROW_SECONDS / once)))
        return Timed(lambda: [call() for call in calls], len(calls), rounds, "")
    repeats = max(1, min(1000, int(ROUND_SECONDS / once)))
    try:
        replay, how = graph_of(calls).replay, "graph"
    except RuntimeError as error:
        torch.cuda.synchronize()
        replay, how = (lambda: [call() for call in calls]), f"stream ({first_line(error)})"

    def target() -> None:
        for _ in range(repeats):
            replay()
        torch.cuda.synchronize()

    target()
    rounds = max(1, min(ROUNDS, int(ROW_SECONDS / (once * repeats))))
    return Timed(target, repeats * len(calls), rounds, how)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def graph_of(calls: list[Call]) -> torch.cuda.CUDAGraph:
    """All calls in one CUDA graph, warmed up on a side stream as capture asks for.

    Raises RuntimeError where they cannot be captured. A call that waits for the device is found before: waiting ends a
    capture in an error after which torch's generator stays in its capturing state, and every later random number in
    this process fails (`random_numbers_work` says whether that has happened).
    """
    gc.collect()  # a graph of autograd still alive would keep its accumulators on the default stream
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for call in calls:
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def random_numbers_work() -> bool:
    """Whether torch can still draw on the GPU; see graph_of."""
    try:
        torch.rand(1, device=DEVICE)
    except RuntimeError:
        return False
    return True


def launch_seconds(call: Call) -> float | None:
    """What a call costs the host while it hands work to the GPU; None on a CPU. The call has run before."""
    if DEVICE.type == "cpu":
        return None
    return host_seconds(call)


def host_seconds(call: Call, calls: int = 5, rounds: int = 25) -> float:
    """Median of rounds of a few calls each: so few that none waits for room in the device's queue."""
    found = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
    synchronize()
    return statistics.median(found)


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


def graph_bytes() -> int:
    """What the private pools of all CUDA graphs hold: a replay works there and allocates nothing that would be seen."""
    if DEVICE.type == "cpu":
        return 0
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) != (0, 0))
