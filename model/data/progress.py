"""Progress of a long job: a bar on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 5.0


class Task:
    """One job's counter. `advance` adds to it; whoever made it decides how it is shown."""

    def __init__(self, title: str, total: float | None, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0.0

    def advance(self, amount: float = 1) -> None:
        self.done += amount

    def describe(self) -> str:
        return (
            f"{self.title}: {_amount(self.done)}"
            + (f" of {_amount(self.total)}" if self.total else "")
            + f" {self.unit}"
        )


class _BarTask(Task):
    def __init__(self, title: str, total: float | None, unit: str, progress: Progress) -> None:
        super().__init__(title, total, unit)
        self._progress = progress
        self._id = progress.add_task(title, total=total, amount="")

    def advance(self, amount: float = 1) -> None:
        super().advance(amount)
        text = _amount(self.done) + (f" of {_amount(self.total)}" if self.total else "") + f" {self.unit}"
        self._progress.update(self._id, completed=self.done, amount=text)


class _LineTask(Task):
    def __init__(self, title: str, total: float | None, unit: str) -> None:
        super().__init__(title, total, unit)
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._printed = ""

    def advance(self, amount: float = 1) -> None:
        super().advance(amount)
        if time.monotonic() >= self._next:
            self.print()

    def print(self) -> None:
        """Where the job is, unless the last line said just that."""
        if self.describe() != self._printed:
            self._printed = self.describe()
            print(self._printed, file=sys.stderr, flush=True)
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES


@contextmanager
def progress(title: str, total: float | None = None, unit: str = "documents", *, quiet: bool = False) -> Iterator[Task]:
    """A counter that is shown on stderr while the block runs: a bar on a terminal, otherwise plain lines."""
    if quiet:
        yield Task(title, total, unit)
    elif sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task: Task = _BarTask(title, total, unit, bars)
            yield task
        print(task.describe(), file=sys.stderr, flush=True)
    else:
        lines = _LineTask(title, total, unit)
        yield lines
        lines.print()


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"
