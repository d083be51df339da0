"""The `bench` fixture, and what pytest-benchmark's records hold beyond its own; see common.py and __main__.py."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.utils import safe_dumps

from bench import common, machine, table
from bench.headline import HEADLINE
from bench.peers import Absent

ORDER = {entry.part: number for number, entry in enumerate(HEADLINE)}


@dataclass
class Run:
    """What this session has found so far. `events` is where __main__.py listens; `recorded` what it compares with."""

    rows: list[table.Row] = field(default_factory=list)
    recorded: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)  # why files on record are not of this machine
    matched: bool = False  # whether one is
    alone: list[str] = field(default_factory=list)  # rows that nothing on record could be compared with
    events: int | None = None
    peers: bool = False

    def tell(self, event: str, **data: Any) -> None:
        if self.events is not None:
            os.write(self.events, (safe_dumps({"event": event, **data}) + "\n").encode())


RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peers", action="store_true", help="time the peers too, beside ours")
    parser.addoption("--events", type=int, help="file descriptor for one JSON line a row (for python -m bench)")
    parser.addoption("--done", type=Path, help="file of test ids, one a line, to leave out (for python -m bench)")


def pytest_configure(config: pytest.Config) -> None:
    machine.load_at_start()
    config.stash[RUN] = Run(events=config.getoption("--events"), peers=config.getoption("--peers"))


def suite_of(item: pytest.Item) -> str:
    """ "FILE/PART" of a test: bench_FILE.py::test_PART."""
    name = item.name.split("[")[0].removeprefix("test_")
    return f"{item.path.stem.removeprefix('bench_')}/{name}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Headline rows first, evaluation last and provider by provider; without what is done and peers not asked for."""
    items.sort(key=_rank)
    done = set(config.getoption("--done").read_text().splitlines()) if config.getoption("--done") else set()
    left_out = [item for item in items if item.nodeid in done or (is_peer(item) and not config.stash[RUN].peers)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _rank(item: pytest.Item) -> tuple[bool, int]:
    suite = suite_of(item)
    last = suite.startswith("evaluate/")
    return last, is_peer(item) if last else ORDER.get(suite, len(ORDER))


def is_peer(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and not str(callspec.params.get("provider", "pgolf")).startswith("pgolf")


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    if config.stash[RUN].events is None or not session.items:
        return
    info = config.hook.pytest_benchmark_generate_machine_info(config=config)
    config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=info)
    commit = config.hook.pytest_benchmark_generate_commit_info(config=config)
    config.hook.pytest_benchmark_update_commit_info(config=config, commit_info=commit)
    config.stash[RUN].tell("machine", machine_info=info, commit_info=commit, tests=len(session.items))
    config.stash[RUN].tell("ceilings", ceilings=asdict(common.ceilings()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("timeout")
    limit = marker.args[0] if marker else None
    params = item.callspec.params if hasattr(item, "callspec") else {}
    of_row = {name: str(params.get(name, default)) for name, default in (("case", ""), ("provider", "pgolf"))}
    item.config.stash[RUN].tell("start", test=item.nodeid, suite=suite_of(item), limit=limit, **of_row)


@dataclass
class Recorder:
    """One row in the making: what a test gives its numbers to."""

    benchmark: Any
    row: table.Row

    def measure(self, target: Callable[[], Any], *, calls: int = 1, rounds: int = 1) -> float:
        """Times rounds of `target`, which makes so many calls; the median time of a call, also left in the row."""

        def per_call() -> None:  # pytest-benchmark divides a round's time by its iterations
            if self.benchmark.disabled:
                pytest.skip("benchmarks are disabled")
            self.benchmark.stats.iterations = calls

        with machine.Neighbours() as neighbours:
            self.benchmark.pedantic(target, setup=per_call, rounds=rounds)
        self.row.seconds = self.benchmark.stats.stats.median
        self.row.others = round(neighbours.cores, 2)
        return self.row.seconds

    def against(self, work: common.Work) -> None:
        """The rates and the part of the ceiling that the row's time means for this work."""
        assert self.row.seconds is not None
        self.row.bytes_per_s = work.bytes / self.row.seconds
        self.row.flop_per_s = work.flops / self.row.seconds
        self.row.of_floor = work.floor_seconds(common.ceilings()) / self.row.seconds
        self.benchmark.extra_info.update(work=asdict(work))


@pytest.fixture
def recording(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Any]:
    """`with recording(case, provider) as recorder: ...`: whatever comes out of the block becomes one row."""

    @contextlib.contextmanager
    def record(case: Any, provider: str) -> Iterator[Recorder]:
        run = request.config.stash[RUN]
        row = table.Row(suite_of(request.node), str(case), provider)
        run.rows.append(row)
        if request.node.nodeid not in run.recorded:
            run.alone.append(f"{row.suite} ({row.case}), {provider}")
        benchmark.group = row.group
        failed = False
        try:
            yield Recorder(benchmark, row)
        except Absent as absent:
            row.absent = str(absent)
            pytest.skip(f"absent: {absent}")
        except BaseException as error:  # a time-out is none of Exception's kinds
            row.seconds, row.absent = None, table.why(error)
            benchmark.has_error = True
            failed = provider.startswith("pgolf")
            raise
        else:
            found = asdict(row)
            del found["seconds"]  # that is the statistics' median
            benchmark.extra_info.update(found)
        finally:
            result = benchmark.stats.as_dict(include_data=False) if row.seconds is not None else None
            run.tell("row", test=request.node.nodeid, row=asdict(row), benchmark=result, failed=failed)

    return record


@pytest.fixture
def bench(request: pytest.FixtureRequest, recording: Any) -> Iterator[Callable[..., None]]:
    """bench(case, provider, providers, setup, work): times one provider on one case and records it."""

    def run(
        case: Any,
        provider: str,
        providers: dict[str, Callable[..., common.Call]],
        setup: Callable[..., Any],
        work: Callable[[Any], common.Work],
    ) -> None:
        with recording(case, provider) as recorder:
            amount = work(case)

            def draw() -> common.Call:
                return providers[provider](case, setup(case, common.DEVICE))

            graphs_before = common.graph_bytes()
            calls = [draw()]
            once = common.seconds_once(calls[0])
            graph_bytes = common.graph_bytes() - graphs_before
            calls += [draw() for _ in range(common.rotations(amount, once) - 1)]
            for call in calls[1:]:
                call()
            peak_bytes = common.peak_bytes(calls[0])
            if peak_bytes is not None:
                recorder.row.peak_bytes, recorder.row.graph_bytes = peak_bytes + graph_bytes, graph_bytes
            timed = common.timed(calls, once * len(calls))
            recorder.row.how = timed.how
            if timed.how == "graph":
                recorder.row.launch = common.launch_seconds(calls[0])
            recorder.measure(timed.target, calls=timed.calls, rounds=timed.rounds)
            recorder.against(amount)

    yield run
    torch._dynamo.reset()  # a function compiled for more cases than dynamo keeps would run eagerly from there on
    if common.DEVICE.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        if not common.random_numbers_work():
            request.session.shouldstop = "torch's generator is unusable after a failed capture: a new process is needed"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["node"] = ""  # a host's name says nothing to others
    machine_info.get("cpu", {}).pop("flags", None)
    machine_info["pgolf"] = machine.environment(config.invocation_params.args)


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """The commit alone; PGOLF_COMMIT names it where the sources lie outside git."""
    given = os.environ.get("PGOLF_COMMIT")
    found = (
        {"id": given, "dirty": False} if given else {name: commit_info.get(name) for name in ("id", "time", "dirty")}
    )
    commit_info.clear()
    commit_info.update(found)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    rows = config.stash[RUN].rows
    output_json["ceilings"] = asdict(common.ceilings())
    output_json["absent"] = [asdict(row) for row in rows if row.seconds is None and row.absent]


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    """Leaves out a file of another machine, and rows measured on another text, other codes or with other attention."""
    run, here = config.stash[RUN], machine_info["pgolf"]
    recorded = compared_benchmark["machine_info"].get("pgolf", {})
    found, kept = compared_benchmark["benchmarks"], []
    try:
        machine.refuse_another(recorded, here)
    except machine.Refused as refused:
        run.refused.append(str(refused))
        benchmarksession.logger.info(f"Left out: {refused}")
    else:
        for each in found:
            row = each["extra_info"]
            if machine.comparable(row["suite"], row["case"], recorded, here):
                kept.append(each)
        if len(kept) < len(found):
            count = f"{len(found) - len(kept)} of {len(found)} rows"
            benchmarksession.logger.info(f"Left out: {count}, measured on another text, other codes or other attention")
        run.matched = True
    compared_benchmark["benchmarks"] = kept
    run.recorded.update(each["fullname"] for each in kept)
    # pytest-benchmark's own hook comes next and would print both in full: the commands and loads always differ.
    compared_benchmark["machine_info"] = machine_info


def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuses a comparison for which no file is of this machine; by now pytest-benchmark has loaded all of them."""
    run = session.config.stash[RUN]
    if run.refused and not run.matched:
        raise pytest.UsageError(f"refused: {run.refused[0]}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A comparison in which nothing was compared has not been passed."""
    session.config.stash[RUN].tell("end")
    if session.config.getoption("benchmark_compare") and exitstatus == pytest.ExitCode.OK:
        recorded = session.config.stash[RUN].recorded
        if not any(item.nodeid in recorded for item in session.items):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[RUN]
    if run.events is not None or not any(row.seconds for row in run.rows):
        return
    terminalreporter.section("kernels")
    ceilings = asdict(common.ceilings())
    terminalreporter.write_line(table.ceilings_line(ceilings))
    printer = table.Printer()
    for row in run.rows:
        for line in printer.lines(row, ceilings):
            terminalreporter.write_line(line)
    if config.getoption("benchmark_compare") and run.alone:
        terminalreporter.write_line(f"not compared, without a record: {'; '.join(run.alone)}")
