"""The `bench` fixture and the table at the end of `pytest bench/`; see common.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from bench import common, record

TABLE = pytest.StashKey[common.Table]()
CHECK = pytest.StashKey[list[str]]()  # the lines of a comparison with recorded results


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peers", action="store_true", help="time the peers too, beside ours")
    parser.addoption("--results", type=Path, metavar="FOLDER", help="record this run as FOLDER/MACHINE/SUITE.json")
    parser.addoption(
        "--check",
        type=Path,
        metavar="FOLDER",
        help=f"fail where a call takes {record.MARGIN:.0%} longer than FOLDER's record of the same machine",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = common.Table()


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """bench(case, provider, providers, setup, work): times one provider on one case and records it."""

    def run(
        case: Any,
        provider: str,
        providers: dict[str, Callable[..., common.Call]],
        setup: Callable[..., Any],
        work: Callable[[Any], common.Work],
    ) -> None:
        if provider != next(iter(providers)) and not request.config.getoption("--peers"):
            pytest.skip("a peer; --peers times it")
        table = request.config.stash[TABLE]
        suite = request.node.name.split("[")[0].removeprefix("test_")
        row = common.Row(f"{request.module.__name__.removeprefix('bench.bench_')}/{suite}", str(case), provider)
        table.rows.append(row)
        amount = work(case)
        inputs = [setup(case, common.DEVICE) for _ in range(common.rotations(amount))]
        try:
            calls = [providers[provider](case, each) for each in inputs]
            for call in calls:
                call()
        except common.Absent as absent:
            row.absent = str(absent)
            pytest.skip(f"absent: {absent}")
        ceilings = common.ceilings()
        row.peak_bytes = common.peak_bytes(calls[0])
        timed = common.timed(calls)
        benchmark.pedantic(timed.target, rounds=common.ROUNDS if common.DEVICE.type == "cuda" else 5)
        row.seconds, row.how = benchmark.stats.stats.median / timed.calls, timed.how
        row.bytes_per_s, row.flop_per_s = amount.bytes / row.seconds, amount.flops / row.seconds
        row.of_floor = amount.floor_seconds(ceilings) / row.seconds
        benchmark.group = f"{row.suite} {row.case}"
        benchmark.extra_info.update(asdict(row), work=asdict(amount), ceilings=asdict(ceilings))

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["pgolf"] = environment(config)


def environment(config: pytest.Config) -> dict[str, Any]:
    return common.environment(config.invocation_params.args)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A call that became slower, or one that there is nothing to compare with, fails the run."""
    folder = session.config.getoption("--check")
    if folder is None or exitstatus != pytest.ExitCode.OK:
        return
    try:
        slower, compared = record.slower_than_recorded(
            folder, environment(session.config), session.config.stash[TABLE].rows
        )
        lines = slower or [f"{compared} calls, none {record.MARGIN:.0%} slower than recorded"]
    except record.Refused as refused:
        slower, compared, lines = [], 0, [f"refused: {refused}"]
    session.config.stash[CHECK] = lines
    if slower or not compared:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    table = config.stash[TABLE]
    if not any(row.seconds for row in table.rows):
        return
    terminalreporter.section("kernels")
    terminalreporter.write_line(common.ceilings().line())
    for line in table.lines():
        terminalreporter.write_line(line)
    found = {**environment(config), "ceilings": asdict(common.ceilings())}
    terminalreporter.write_line(json.dumps({"environment": found, "rows": [asdict(row) for row in table.rows]}))
    if folder := config.getoption("--results"):
        for file in record.write_results(folder, found, table.rows):
            terminalreporter.write_line(f"wrote {file}")
    for line in config.stash.get(CHECK, []):
        terminalreporter.write_line(line)
