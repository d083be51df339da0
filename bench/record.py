"""Results on file: bench/results/MACHINE/SUITE.json, written by `--results FOLDER` and compared by `--check FOLDER`.

A suite's file is what one run measured, all providers on the same inputs: {"environment": {...}, "rows": [...]}. A new
run of a suite takes the old one's place. pytest-benchmark's own storage would not do: its times are those of a target
that repeats a call as often as a first measurement suggests, so two runs' times are not of the same work.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.common import Row

RESULTS = Path(__file__).parent / "results"
MARGIN = 0.15  # a provider of ours that takes this much longer than on record has become slower
SAME = ("device", "cpu", "threads")  # what two environments must agree in for their times to be compared


class Refused(Exception):
    """Results that cannot be compared; the message says why."""


def machine_name(environment: dict[str, Any]) -> str:
    """The folder of a machine's results: the device it computes on, in lower-case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")


def suites_of(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by file: what stands before the "/" of their suite."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.suite.split("/")[0], []).append(row)
    return found


def write_results(folder: Path, environment: dict[str, Any], rows: list[Row]) -> list[Path]:
    """Writes each suite that has a time; returns the files."""
    written = []
    for suite, of_suite in suites_of(rows).items():
        if not any(row.seconds for row in of_suite):
            continue
        file = folder / machine_name(environment) / f"{suite}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        record = {"environment": environment, "rows": [asdict(row) for row in of_suite]}
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, file)
        written.append(file)
    return written


def read_results(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{suite: {machine: record}} of everything in the folder."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*/*.json")):
        found.setdefault(file.stem, {})[file.parent.name] = json.loads(file.read_text())
    return found


def slower_than_recorded(folder: Path, environment: dict[str, Any], rows: list[Row]) -> tuple[list[str], int]:
    """(a line for each call of ours that became slower by more than MARGIN, number of calls compared).

    Raises Refused where nothing is on record for a suite, or where it was recorded on another machine.
    """
    slower, compared = [], 0
    for suite, of_suite in suites_of(rows).items():
        file = folder / machine_name(environment) / f"{suite}.json"
        if not file.is_file():
            raise Refused(f"{suite}: nothing recorded on {machine_name(environment)}, wanted {file}")
        record = json.loads(file.read_text())
        for name in SAME:
            if record["environment"].get(name) != environment[name]:
                wanted = record["environment"].get(name)
                raise Refused(f"{suite}: recorded with {name} {wanted}, this machine has {environment[name]}")
        before = {(row["suite"], row["case"], row["provider"]): row["seconds"] for row in record["rows"]}
        for row in of_suite:
            known = before.get((row.suite, row.case, row.provider))
            if not row.seconds or not known:
                continue
            compared += 1
            if row.seconds > known * (1 + MARGIN):
                slower.append(
                    f"{row.suite} {row.case}, {row.provider}: {row.seconds * 1e3:.3f} ms, "
                    f"{row.seconds / known - 1:.0%} above the recorded {known * 1e3:.3f} ms"
                )
    return slower, compared
