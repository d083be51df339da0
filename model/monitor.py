"""What a running training shows: numbers of each step without waiting for the GPU, log lines, a progress bar."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor

from model.config import Config
from model.flops import peak_flops, train_flops
from model.run import RunDir
from model.schedule import StepSettings

_FIRST_LINES = 5  # steps that always get a line


@dataclass
class StepRecord:
    """One step: what the host knew when it queued it, and what came back from the device."""

    step: int  # counted from 1
    settings: StepSettings
    elapsed: float
    tokens: int
    data_wait: float = 0.0  # seconds until the step's batches were ready
    loss: float = math.nan
    grad_norm: float = math.nan
    pairs: float = 0.0
    seconds: float = 0.0


class InFlight:
    """Steps that were queued but may not have finished. Their numbers reach host memory behind the step itself.

    The host may be `depth` steps ahead of the device: enough that the device never waits, little enough that clocks,
    stopping and the check for finite losses follow closely. On a CPU every step is finished when it is pushed.
    """

    def __init__(self, device: torch.device, depth: int = 2) -> None:
        self._depth = depth if device.type == "cuda" else 0
        self._queue: deque[tuple[StepRecord, Tensor, torch.cuda.Event | None]] = deque()
        self._last = time.perf_counter()

    def __len__(self) -> int:
        return len(self._queue)

    def restart_clock(self) -> None:
        """The next step's duration counts from now."""
        self._last = time.perf_counter()

    def push(self, record: StepRecord, values: Tensor) -> list[StepRecord]:
        """Adds a step with values (loss, gradient norm, attention pairs); returns steps that have finished."""
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._queue.append((record, values, event))
        return self._finish(self._depth - 1)

    def drain(self) -> list[StepRecord]:
        """Waits for every step."""
        return self._finish(0)

    def _finish(self, leave: int) -> list[StepRecord]:
        finished = []
        while len(self._queue) > max(leave, 0):
            record, values, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            now = time.perf_counter()
            record.loss, record.grad_norm, record.pairs = values.tolist()
            record.seconds, self._last = now - self._last, now
            finished.append(record)
        return finished


class Monitor:
    """Turns finished steps into metrics.jsonl, log lines and a progress bar; knows the recent speed."""

    def __init__(self, config: Config, run: RunDir, world: int, device: torch.device, budget: float | None) -> None:
        self._config, self._run, self._world, self._budget = config, run, world, budget
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._recent: deque[StepRecord] = deque(maxlen=50)
        self._pending: list[dict[str, Any]] = []
        self._window: list[StepRecord] = []
        self._bar: tuple[Progress, TaskID] | None = None
        if run.writes and sys.stdout.isatty():
            columns = (TextColumn("train"), BarColumn(), TextColumn("{task.fields[text]}"))
            progress = Progress(*columns, console=Console(), transient=True)
            self._bar = progress, progress.add_task("train", total=1.0, text="")
            progress.start()

    @property
    def recent(self) -> list[StepRecord]:
        return list(self._recent)

    def step_seconds(self) -> float:
        """Median duration of recent steps, 0 before the first."""
        durations = sorted(record.seconds for record in self._recent)
        return durations[len(durations) // 2] if durations else 0.0

    def add(self, records: list[StepRecord]) -> None:
        for record in records:
            self._recent.append(record)
            self._window.append(record)
            self._pending.append(self._as_metrics(record))
            every = self._config.train.train_log_every
            if record.step <= _FIRST_LINES or (every > 0 and record.step % every == 0):
                self._log(record)
                self.flush()
        if records and self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=self._progress(records[-1]), text=self._bar_text(records[-1]))

    def flush(self) -> None:
        """Writes the metrics gathered so far."""
        self._run.append_metrics(self._pending)
        self._pending = []

    def close(self) -> None:
        self.flush()
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None

    def say(self, text: str) -> None:
        self._run.say(text)

    def _as_metrics(self, record: StepRecord) -> dict[str, Any]:
        settings = record.settings
        return {
            "step": record.step,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "fraction": settings.fraction,
            "lr_scale": settings.lr_scale,
            "muon_momentum": settings.muon_momentum,
            "loop": settings.loop,
            "late_qat": settings.late_qat,
            "elapsed": record.elapsed,
            "step_ms": 1000 * record.seconds,
            "data_wait_ms": 1000 * record.data_wait,
            "tokens_per_second": record.tokens / record.seconds if record.seconds else None,
            "mfu": self._mfu([record]),
        }

    def _mfu(self, records: list[StepRecord]) -> float | None:
        seconds = sum(record.seconds for record in records)
        if self._peak is None or not seconds:
            return None
        flops = sum(train_flops(self._config.model, r.settings.loop, r.tokens, r.pairs) for r in records)
        return flops / seconds / self._world / self._peak

    def _log(self, record: StepRecord) -> None:
        train = self._config.train
        seconds = sum(r.seconds for r in self._window)
        rate = sum(r.tokens for r in self._window) / seconds if seconds else 0.0
        mfu = self._mfu(self._window)
        limit = f"{record.elapsed:.1f}/{self._budget:.0f} s" if self._budget else f"{record.elapsed:.1f} s"
        self.say(
            f"step {record.step}/{train.iterations}  loss {record.loss:.4f}  lr x{record.settings.lr_scale:.3f}  "
            f"{1000 * seconds / len(self._window):.1f} ms/step  {rate:,.0f} tokens/s"
            + (f"  MFU {100 * mfu:.1f} %" if mfu is not None else "")
            + f"  {limit}"
        )
        self._window = []

    def _progress(self, record: StepRecord) -> float:
        by_steps = record.step / max(self._config.train.iterations, 1)
        return max(by_steps, record.elapsed / self._budget) if self._budget else by_steps

    def _bar_text(self, record: StepRecord) -> str:
        share = self._progress(record)
        left = record.elapsed * (1 - share) / share if share > 0 else 0.0
        rate = record.tokens / record.seconds if record.seconds else 0.0
        mfu = self._mfu([record])
        text = f"step {record.step}  loss {record.loss:.3f}  {rate:,.0f} tokens/s"
        return text + (f"  MFU {100 * mfu:.0f} %" if mfu is not None else "") + f"  {left:.0f} s left"
