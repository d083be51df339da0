"""Signals that end a process: as exceptions, or noted for the next place where nothing is half done."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(SystemExit):
    """A signal that ends the process, as an exception: what is open is closed, and nothing half-written stays."""


def terminate(number: int, frame: FrameType | None) -> None:
    """The handler that raises Terminated."""
    raise Terminated(128 + number)


def terminate_by_exception() -> None:
    """SIGTERM and SIGHUP raise Terminated from now on, where they would have ended the process at once."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup
            signal.signal(number, terminate)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C put their number into the list; a second one of them ends the process as usual."""
    received = [0]
    previous: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        if received[0]:
            signal.signal(number, previous[number])
            signal.raise_signal(number)
        received[0] = number

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
