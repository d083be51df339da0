"""Where the time of a training step goes, as a table: `python -m bench.step_breakdown [--record]`.

One micro-step of 98,304 tokens and one optimiser step of pull request 1530's preset are profiled, and their kernels'
times are summed by kind, told by the kernels' names. Idle is the measured time of back-to-back steps minus all kernels;
where that is negative, kernels overlap: those that are launched as programmatic dependents, as most of "norms, mixing,
RoPE, XSA" are, count the time in which they wait for the kernel before.
`--record` keeps both columns in bench/runs, from where bench.render writes them into the documentation.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import time
from collections import Counter
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.bench_train_step import CASES, DEVICE, config, our_micro_step, our_model, setup
from bench.real_runs import RECORDS
from model.distributed import Dist
from model.optim import Optimizer, WeightAverage
from model.run import commit
from pgolf_kernels import attention_backend_info

STEPS = 5
# The first pattern that is found in a kernel's name decides.
KINDS = (
    ("attention", r"flash|fmha|attn|attention"),
    ("MLP's products with an activation", r"mlp|product_kernel|_up_kernel|grad_pre"),
    ("loss", r"softcap|cross_entropy|powers|finish|scale_rows|loss"),
    ("norms, mixing, RoPE, XSA", r"_forward_kernel|_backward_kernel|norm|sum_rows"),
    ("other matrix products", r"nvjet|gemm|cutlass|xmma|cublas|matmul"),
    ("embedding", r"_tiles_kernel|_joins_kernel|radix|gather"),
    ("copies and the rest", r""),
)


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def kernel_seconds(call: Callable[[], None]) -> Counter[str]:
    """Seconds of GPU time a call by kernel name."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            call()
        torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA and not event.key.startswith("Optimizer."):
            seconds[event.key] += event.self_device_time_total / 1e6 / STEPS
    return seconds


def wall_seconds(call: Callable[[], None]) -> float:
    """Seconds a call, back to back."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def keep(column: Counter[str], loop: bool) -> None:
    """A record in the form of a run's, of this column alone."""
    record = {
        "machine": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
        "changed": {},
        "note": f"attention: {attention_backend_info()['backend']}; `python -m bench.step_breakdown --record`",
        "breakdown": {name: round(seconds, 6) for name, seconds in column.items()},
    }
    file = RECORDS / f"micro_step_loop_{'on' if loop else 'off'}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step_breakdown")
    parser.add_argument("--record", action="store_true", help="keep the columns in bench/runs")
    options = parser.parse_args()
    if DEVICE.type != "cuda":
        raise SystemExit("step_breakdown: needs an NVIDIA GPU")
    console = Console()
    model = our_model()
    params = dict(model.named_parameters())
    optimizer = Optimizer(params, config().train, Dist.single(DEVICE))
    average = WeightAverage(params, config().train)

    def finish() -> None:
        optimizer.step(0.01, 0.97)
        average.update()

    table = Table(title=f"milliseconds, {torch.cuda.get_device_name()}", title_justify="left")
    table.add_column("")
    columns = []
    for case in CASES:
        micro_step = our_micro_step(case, setup(case, DEVICE))

        def step(micro_step: Callable[[], None] = micro_step) -> None:
            micro_step()
            finish()

        for _ in range(3):
            step()
        column: Counter[str] = Counter()
        for kernel, seconds in kernel_seconds(micro_step).items():
            column[kind_of(kernel)] += seconds
        column["optimiser and average"] = sum(kernel_seconds(finish).values())
        total = wall_seconds(step)
        kernels = sum(column.values())
        column["idle"] = max(total - kernels, 0.0)
        column["overlap"] = min(total - kernels, 0.0)
        column["total"] = total
        columns.append(column)
        if options.record:
            keep(column, case.loop)
        table.add_column(str(case), justify="right")
    for name in [kind for kind, _ in KINDS] + ["optimiser and average", "idle", "overlap", "total"]:
        table.add_row(name, *(f"{1000 * column[name]:.2f}" for column in columns))
    console.print(table)


if __name__ == "__main__":
    main()
