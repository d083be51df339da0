"""Results on file: pytest-benchmark's own storage, one for each machine.

    bench/results/MACHINE/Linux-CPython-3.12-64bit/0001_NAME.json

is what `--benchmark-storage=file://bench/results/MACHINE --benchmark-save=NAME` would write: its machine_info holds
this package's environment under "pgolf" (hardware, versions, command), its benchmarks a row's figures in extra_info,
and their times are seconds a call. Beside them stand "ceilings" and "absent", the rows without a time.

A group (a part of a suite and a case, all providers) stands in one file only: recording it again takes it out of the
older ones, so that all its rows are of one run.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pytest_benchmark.storage.file import FileStorage
from pytest_benchmark.utils import get_machine_id, safe_dumps

from bench.machine import Refused, comparable, machine_name, refuse_another
from bench.table import Row

RESULTS = Path(__file__).parent / "results"
MARGIN = 15  # per cent: a call whose median is more above the record's has become slower


@dataclass(frozen=True)
class Record:
    """One run's rows of one suite."""

    machine: str
    environment: dict[str, Any]
    commit: dict[str, Any]
    ceilings: dict[str, float]
    best: dict[str, float]  # the best ceilings that any run on this machine has measured
    rows: list[Row]


class _Silent:
    """FileStorage tells a pytest logger what it does."""

    def info(self, *text: Any, **options: Any) -> None:
        pass

    def warning(self, text: str, **options: Any) -> None:
        raise ValueError(text)


def _storage(folder: Path, run: dict[str, Any]) -> FileStorage:
    """The storage of the machine that measured the run: its Python may be another than this one."""
    here, there = platform.python_version(), run["machine_info"].get("python_version", platform.python_version())
    versions = (".".join(version.split(".")[:2]) for version in (here, there))
    return FileStorage(folder, _Silent(), default_machine_id=get_machine_id().replace(*versions, 1))


def save(results: Path, run: dict[str, Any], name: str) -> Path:
    """Stores a run in pytest-benchmark's format and takes its groups out of this machine's older files."""
    folder = results / machine_name(run["machine_info"]["pgolf"]["device"])
    older = list(_files(folder))
    groups = {row.group for row in rows_of(run) if row.seconds is not None}
    storage = _storage(folder, run)
    before = set(folder.glob("*/*.json"))
    storage.save(run, name)
    for file in older:
        _forget(file, groups)
    (written,) = set(folder.glob("*/*.json")) - before
    return written


def _forget(file: Path, groups: set[str]) -> None:
    """Takes the groups out of a file; a file that holds nothing else is removed."""
    run = json.loads(file.read_text())
    benchmarks = [each for each in run["benchmarks"] if each["group"] not in groups]
    absent = [each for each in run["absent"] if Row(**each).group not in groups]
    if not benchmarks:
        file.unlink()
    elif len(benchmarks) + len(absent) < len(run["benchmarks"]) + len(run["absent"]):
        write(file, {**run, "benchmarks": benchmarks, "absent": absent})


def write(file: Path, run: dict[str, Any]) -> None:
    """As pytest-benchmark writes it, but never by halves."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    temporary.write_text(safe_dumps(run, ensure_ascii=True, indent=4))
    os.replace(temporary, file)


def rows_of(run: dict[str, Any]) -> list[Row]:
    """A stored run's rows: those with a time, then those without, of each group."""
    known = {field.name for field in fields(Row)}
    rows = [
        Row(**{name: value for name, value in each["extra_info"].items() if name in known})
        for each in run["benchmarks"]
    ]
    for row, each in zip(rows, run["benchmarks"], strict=True):
        row.seconds = each["stats"]["median"]
    rows += [Row(**each) for each in run.get("absent", [])]
    order = {group: number for number, group in enumerate(dict.fromkeys(row.group for row in rows))}
    return sorted(rows, key=lambda row: order[row.group])


def read_results(results: Path) -> dict[str, list[Record]]:
    """{suite: its records, by machine and age} of everything that is stored."""
    found: dict[str, list[Record]] = {}
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        runs = [json.loads(file.read_text()) for file in _files(folder)]
        best = {name: max(run["ceilings"][name] for run in runs) for name in (runs[0]["ceilings"] if runs else ())}
        for run in runs:
            by_suite: dict[str, list[Row]] = {}
            for row in rows_of(run):
                by_suite.setdefault(row.suite.split("/")[0], []).append(row)
            for suite, rows in by_suite.items():
                if any(row.seconds is not None for row in rows):
                    record = Record(
                        folder.name, run["machine_info"]["pgolf"], run["commit_info"], run["ceilings"], best, rows
                    )
                    found.setdefault(suite, []).append(record)
    return found


def _files(folder: Path) -> Iterable[Path]:
    return sorted(folder.glob("*/[0-9]*_*.json"), key=lambda file: (file.name, file.parent))


def compare_options(results: Path, device: str) -> list[str]:
    """pytest-benchmark's own options for a comparison with what this device has on record. Raises FileNotFoundError."""
    folder = results / machine_name(device)
    if not any(_files(folder)):
        known = ", ".join(sorted(path.name for path in results.glob("*") if path.is_dir())) or "nothing"
        raise FileNotFoundError(f"nothing on record for {folder.name} in {results}, there is: {known}")
    return [
        f"--benchmark-storage=file://{os.path.relpath(folder)}",
        "--benchmark-compare=*/*",
        f"--benchmark-compare-fail=median:{MARGIN}%",
        "--benchmark-columns=median,iqr,rounds,iterations",
    ]


def suites_on_record(results: Path, here: dict[str, Any]) -> set[str]:
    """Suites with rows that can be compared in this environment. Raises Refused where no file is of this machine."""
    machine, refused = machine_name(here["device"]), []
    matching: list[tuple[str, Record]] = []
    for suite, records in read_results(results).items():
        for record in records:
            if record.machine != machine:
                continue
            try:
                refuse_another(record.environment, here)
            except Refused as error:
                refused.append(error)
            else:
                matching.append((suite, record))
    if refused and not matching:
        raise refused[0]
    return {
        suite
        for suite, record in matching
        if any(row.seconds and comparable(row.suite, row.case, record.environment, here) for row in record.rows)
    }
