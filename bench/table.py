"""One line of results, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DISTURBED = 0.1  # cores that others kept busy while a row was timed: from here on it is said


@dataclass
class Row:
    """One provider's result for one case. `suite` is "FILE/PART"; `how` is what else came out, or how it was timed."""

    suite: str
    case: str
    provider: str
    seconds: float | None = None
    how: str = ""
    peak_bytes: int | None = None  # memory during a call beyond its inputs, graph_bytes included
    graph_bytes: int | None = None  # of it the pools of graphs that the provider had recorded; None: not counted
    bytes_per_s: float = 0.0
    flop_per_s: float = 0.0
    of_floor: float = 0.0
    absent: str = ""  # why there is no time: "Exception: first line" where the provider failed
    others: float = 0.0  # cores that other processes kept busy meanwhile
    launch: float | None = None  # seconds a call costs the host, where a graph of calls was timed

    @property
    def group(self) -> str:
        return f"{self.suite} {self.case}"


def why(error: BaseException) -> str:
    """The exception's kind and the first line of what it says, never blank."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def ceilings_line(ceilings: dict[str, float]) -> str:
    copy, product = ceilings["bytes_per_s"] / 1e9, ceilings["flop_per_s"] / 1e12
    return f"ceilings: copy {copy:.0f} GB/s, matrix product {product:.2f} TFLOP/s"


def environment_line(environment: dict[str, Any], commit: dict[str, Any]) -> str:
    cuda = f", CUDA {environment['cuda']}" if environment["cuda"] else ""
    return (
        f"{environment['device']}, {environment['threads']} threads, load {environment['load_at_start']}; "
        f"torch {environment['torch']}{cuda}; commit {commit_name(commit)}"
        + "".join(f"; {name} {value[:12]}" for name, value in environment["given"].items())
    )


def commit_name(commit: dict[str, Any]) -> str:
    """Twelve digits of pytest-benchmark's commit_info, and whether there were changes."""
    return str(commit.get("id") or "unknown")[:12] + ("-dirty" if commit.get("dirty") else "")


def seconds_text(value: float) -> str:
    """In the unit that suits, four digits or so."""
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:9.3f} {unit}"
    return f"{value * 1e6:9.2f} µs"


def significant(value: float) -> str:
    """Three significant digits, all of them before the point where the number is large."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def shares(row: Row, ceilings: dict[str, float]) -> tuple[float, float]:
    """How much of each ceiling the row reaches: bytes, operations."""
    return row.bytes_per_s / ceilings["bytes_per_s"], row.flop_per_s / ceilings["flop_per_s"]


def rate_text(row: Row, ceilings: dict[str, float]) -> str:
    """In the unit of the ceiling that is nearer."""
    of_copy, of_product = shares(row, ceilings)
    if of_copy < of_product:
        return f"{significant(row.flop_per_s / 1e12)} TFLOP/s"
    return f"{significant(row.bytes_per_s / 1e9)} GB/s" if row.bytes_per_s else ""


def share_text(share: float) -> str:
    """In whole per cent; blank where that would be none."""
    return f"{share:.0%}" if share >= 0.005 else ""


class Printer:
    """Lines of a table, row by row: a headline before each new group, the ratio to the group's first time."""

    def __init__(self) -> None:
        self.group = ""
        self.ours: dict[str, float] = {}

    def lines(self, row: Row, ceilings: dict[str, float]) -> Iterator[str]:
        if row.group != self.group:
            self.group = row.group
            yield f"{row.suite}  {row.case}"
        if row.seconds is None:
            yield f"  {row.provider:<38} absent: {row.absent}"
            return
        ratio = row.seconds / self.ours.setdefault(row.group, row.seconds)
        parts = [
            rate_text(row, ceilings),
            f"{share_text(row.of_floor)} of ceiling" if share_text(row.of_floor) else "",
            f"{row.peak_bytes / 1e6:.0f} MB" if row.peak_bytes is not None else "",
            row.how,
            f"launched in {seconds_text(row.launch).strip()}" if row.launch else "",
            f"disturbed: others took {row.others:.1f} cores" if row.others >= DISTURBED else "",
        ]
        yield f"  {row.provider:<38}{seconds_text(row.seconds)} {ratio:7.2f}x  {', '.join(filter(None, parts))}"
