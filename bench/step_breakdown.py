"""Where the time of a training step goes, as a table.

    python -m bench.step_breakdown [--record]
    torchrun --standalone --nproc_per_node=8 -m bench.step_breakdown [--record]

One micro-step of 98,304 tokens and one optimiser step of pull request 1530's preset are profiled, and their kernels'
times are summed by kind, told by the kernels' names: those of the optimiser step are the optimiser's, but for
communication. Of that only what no other kernel runs beside is part of the step; the rest has a line of its own, which
the sum leaves out. One GPU has no communication. The kernels are those of the first rank, the total is the slowest's.

Idle is the measured time of back-to-back steps minus all kernels; where that is negative, kernels overlap: those that
are launched as programmatic dependents, as most of "norms, mixing, RoPE, XSA" are, count the time in which they wait
for the kernel before. `--record` keeps both columns in bench/runs, from where bench.render writes them into the
documentation.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.bench_train_step import CASES, DEVICE, config, our_micro_step, our_model, setup
from bench.real_runs import RECORDS
from model.distributed import Dist, distributed
from model.optim import Optimizer, WeightAverage
from model.run import commit
from pgolf_kernels import attention_backend_info

STEPS = 5
COMMUNICATION, HIDDEN = "communication", "communication behind other kernels"
OPTIMISER = "optimiser and average"
# The first pattern that is found in a kernel's name decides.
KINDS = (
    (COMMUNICATION, r"nccl"),
    ("attention", r"flash|fmha|attn|attention"),
    ("MLP's products with an activation", r"mlp|product_kernel|_up_kernel|grad_pre"),
    ("loss", r"softcap|cross_entropy|powers|finish|scale_rows|loss"),
    ("norms, mixing, RoPE, XSA", r"_forward_kernel|_backward_kernel|norm|sum_rows"),
    ("other matrix products", r"nvjet|gemm|cutlass|xmma|cublas|matmul|project_kernel"),
    ("embedding", r"_tiles_kernel|_joins_kernel|radix|gather"),
    ("copies and the rest", r""),
)
ROWS = (*(kind for kind, _ in KINDS[1:]), OPTIMISER, COMMUNICATION, "idle", "overlap", "total", HIDDEN)
ANNOTATIONS = ("Optimizer.", "nccl:")  # what torch puts around kernels, with their time


class Span(NamedTuple):
    """A kernel's run on the GPU's clock, in seconds."""

    kernel: str
    start: float
    end: float


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def spans_of(call: Callable[[], None]) -> list[Span]:
    """Every kernel of STEPS calls."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
    return [
        Span(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.name.startswith(ANNOTATIONS)
    ]


def covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the kernels runs."""
    seconds, reached = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        seconds += max(span.end - max(span.start, reached), 0.0)
        reached = max(reached, span.end)
    return seconds


def breakdown(micro_step: list[Span], finish: list[Span], total: float) -> dict[str, float]:
    """Seconds a step by row, from the kernels of STEPS micro-steps and STEPS optimiser steps.

    `total` is the measured time of a step; all rows but the last two add up to it.
    """
    column = dict.fromkeys(ROWS, 0.0)
    for span in micro_step:
        column[kind_of(span.kernel)] += (span.end - span.start) / STEPS
    others = [span for span in finish if kind_of(span.kernel) != COMMUNICATION]
    column[OPTIMISER] = sum(span.end - span.start for span in others) / STEPS
    exposed = (covered(finish) - covered(others)) / STEPS
    column[COMMUNICATION] += exposed
    kernels = sum(column.values())
    column["idle"], column["overlap"] = max(total - kernels, 0.0), min(total - kernels, 0.0)
    column["total"] = total
    column[HIDDEN] = sum(span.end - span.start for span in finish) / STEPS - column[OPTIMISER] - exposed
    return column


def wall_seconds(call: Callable[[], None]) -> float:
    """Seconds a call, back to back."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def keep(column: dict[str, float], loop: bool, world: int) -> None:
    """A record in the form of a run's, of this column alone."""
    gpu = torch.cuda.get_device_name()
    launcher = "python" if world == 1 else f"torchrun --standalone --nproc_per_node={world}"
    record = {
        "machine": gpu if world == 1 else f"{world} x {gpu}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
        "changed": {},
        "note": f"attention: {attention_backend_info()['backend']}; `{launcher} -m bench.step_breakdown --record`",
        "breakdown": {name: round(seconds, 6) for name, seconds in column.items()},
    }
    ranks = "" if world == 1 else f"_gpus_{world}"
    file = RECORDS / f"micro_step_loop_{'on' if loop else 'off'}{ranks}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")


def measure(ranks: Dist, *, record: bool) -> Table:
    """A column for each case. Every rank takes part; the first one keeps the records."""
    model = our_model()
    params = dict(model.named_parameters())
    optimizer = Optimizer(params, config().train, ranks)
    average = WeightAverage(params, config().train)

    def finish() -> None:
        optimizer.step(0.01, 0.97)
        average.update()

    gpus = f"{ranks.world} x " if ranks.world > 1 else ""
    table = Table(title=f"milliseconds, {gpus}{torch.cuda.get_device_name()}", title_justify="left")
    table.add_column("")
    columns = []
    for case in CASES:
        micro_step = our_micro_step(case, setup(case, DEVICE))

        def step(micro_step: Callable[[], None] = micro_step) -> None:
            micro_step()
            finish()

        for _ in range(3):
            step()
        of_micro_step, of_finish = spans_of(micro_step), spans_of(finish)
        ranks.barrier()
        (total,) = ranks.agree_max(wall_seconds(step))
        columns.append(breakdown(of_micro_step, of_finish, total))
        if record and ranks.is_main:
            keep(columns[-1], case.loop, ranks.world)
        table.add_column(str(case), justify="right")
    for name in ROWS:
        table.add_row(name, *(f"{1000 * column[name]:.2f}" for column in columns))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_breakdown")
    parser.add_argument("--record", action="store_true", help="keep the columns in bench/runs")
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        raise SystemExit("step_breakdown: needs an NVIDIA GPU")
    with distributed("cuda") as ranks:
        table = measure(ranks, record=options.record)
        if ranks.is_main:
            Console().print(table)


if __name__ == "__main__":
    main()
