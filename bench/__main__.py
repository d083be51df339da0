"""`python -m bench` (or `pgolf bench`): measures, prints each row as it comes, keeps what it has when interrupted.

pytest runs in a process of its own and tells this one, through a pipe, of each row. A row that outlasts its limit or
brings the process down is noted as such, and a new process goes on with the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import storage, table
from bench.headline import HEADLINE

ROOT = Path(__file__).parent.parent
ROW_LIMIT = 90.0  # seconds; @pytest.mark.timeout gives a row another limit
GRACE = 15.0  # pytest-timeout ends a row at its limit from within; this much later the process is killed
START_LIMIT = 180.0  # until the first row: imports, ceilings


@dataclass
class Runner:
    """Collects one run in pytest-benchmark's format, whatever becomes of the processes that measure."""

    pytest_arguments: list[str]
    log: Path
    json_file: Path | None = None
    until: float = float("inf")  # a time.monotonic() after which nothing is started
    say: Callable[[str], None] = print
    run: dict[str, Any] = field(default_factory=lambda: {"benchmarks": [], "absent": []})
    done: list[str] = field(default_factory=list)
    tests: int = 0
    failed: int = 0
    running: dict[str, Any] | None = None
    printer: table.Printer = field(default_factory=table.Printer)

    def measure(self) -> None:
        """Runs pytest until every test is done, the time is over or a process fails before its first test."""
        while True:
            before = len(self.done)
            ended = self._one_process()
            if self.running is not None:
                self._lost(ended)
            left = self.tests - len(self.done)
            if left <= 0 or len(self.done) == before or time.monotonic() >= self.until:
                break
        if left > 0:
            self.say(f"{left} rows not measured")

    def _one_process(self) -> str:
        """One pytest over what is not done yet; how it ended."""
        done = self.log.with_name("done.txt")
        done.write_text("\n".join(self.done))
        receive, send = os.pipe()
        command = [sys.executable, "-m", "pytest", *self.pytest_arguments, f"--events={send}", f"--done={done}"]
        command += ["-q", "-p", "no:cacheprovider", "--benchmark-quiet", "-o", f"timeout={ROW_LIMIT}"]
        known = {"PGOLF_BENCH_CEILINGS": json.dumps(self.run["ceilings"])} if "ceilings" in self.run else {}
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **known}, stdout=log, stderr=log, pass_fds=[send],
                start_new_session=True,
            )  # fmt: skip
        os.close(send)
        how = "interrupted"
        try:
            how = self._listen(receive)
            if not how:
                process.wait(timeout=GRACE)  # what pytest started may outlive it
        except subprocess.TimeoutExpired:
            pass
        finally:
            os.close(receive)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
        return how or (f"its process was ended by {signal.Signals(-status).name}" if status < 0 else f"exit {status}")

    def _listen(self, pipe: int) -> str:
        """Takes in events until the last one or the pipe's end (""), or until a limit passes (what happened)."""
        rest, limit, since = b"", START_LIMIT, time.monotonic()
        while True:
            now = time.monotonic()
            wait = min(since + limit, self.until) - now
            ready = select.select([pipe], [], [], max(0.0, wait))[0]
            if not ready:
                return (
                    "the time given for all rows was over"
                    if now + wait >= self.until
                    else f"no result in {limit:.0f} s"
                )
            data = os.read(pipe, 1 << 16)
            if not data:
                return ""
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                self._take(event)
                since = time.monotonic()
                if event["event"] == "end":
                    return ""
                if event["event"] == "start":
                    limit = (event["limit"] or ROW_LIMIT) + GRACE

    def _take(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "machine":
            self.tests = max(self.tests, len(self.done) + event["tests"])
            if "machine_info" not in self.run:
                self.run.update({name: event[name] for name in ("machine_info", "commit_info")})
                self.run.update(datetime=datetime.now(UTC).isoformat(), version=_version())
                self.say(table.environment_line(event["machine_info"]["pgolf"], event["commit_info"]))
        elif kind == "ceilings" and "ceilings" not in self.run:
            self.run["ceilings"] = event["ceilings"]
            self.say(table.ceilings_line(event["ceilings"]))
        elif kind == "start":
            if self.running is not None:
                self._lost("it ended without a result")
            self.running = event
        elif kind == "row":
            self.running = None
            self.done.append(event["test"])
            self.failed += event["failed"]
            self._keep(table.Row(**event["row"]), event["benchmark"])

    def _keep(self, row: table.Row, benchmark: dict[str, Any] | None) -> None:
        if benchmark is not None:
            self.run["benchmarks"].append(benchmark)
        else:
            self.run["absent"].append(asdict(row))
        for line in self.printer.lines(row, self.run["ceilings"]):
            self.say(line)
        if self.json_file is not None:
            storage.write(self.json_file, self.run)

    def _lost(self, how: str) -> None:
        """The row that was being measured when the process ended."""
        assert self.running is not None
        event, self.running = self.running, None
        self.done.append(event["test"])
        self.failed += event["provider"].startswith("pgolf")
        self._keep(table.Row(event["suite"], event["case"], event["provider"], absent=how), None)


def _version() -> str:
    import pytest_benchmark

    return str(pytest_benchmark.__version__)


def bench_files() -> dict[str, Path]:
    """Every bench_NAME.py by its name, those with headline rows first and in their order."""
    order = {name: i for i, name in enumerate(dict.fromkeys(entry.part.split("/")[0] for entry in HEADLINE))}
    names = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    return {
        name: Path("bench") / f"bench_{name}.py" for name in sorted(names, key=lambda name: order.get(name, len(order)))
    }


def absolute(path: str) -> Path:
    return Path(path).absolute()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of bench_NAME.py (default: all)")
    parser.add_argument("-k", metavar="EXPRESSION", help="only tests that match, as pytest's -k")
    parser.add_argument(
        "--from", dest="source", type=absolute, metavar="FILE", help="--record what --json wrote to FILE"
    )
    parser.add_argument("--peers", action="store_true", help="time the peers too, on the same inputs in the same run")
    parser.add_argument("--json", type=absolute, metavar="FILE", help="write the run here, anew after each row")
    parser.add_argument(
        "--record", metavar="NAME", help="keep the run in bench/results under this name, with the peers"
    )
    parser.add_argument(
        "--check", action="store_true", help=f"fail where a median is {storage.MARGIN} %% above the record's"
    )
    parser.add_argument(
        "--within", type=float, metavar="SECONDS", help="end after that many seconds with what there is"
    )
    return parser


def check(files: dict[str, Path], names: Sequence[str], extra: list[str]) -> int:
    """A plain pytest with pytest-benchmark's comparison, on the suites that this machine has on record."""
    from bench.machine import Refused, environment

    here = environment([])
    try:
        options = storage.compare_options(storage.RESULTS, here["device"])
        known = storage.suites_on_record(storage.RESULTS, here)
    except (FileNotFoundError, Refused) as error:
        print(f"refused: {error}", file=sys.stderr)
        return 1
    missing = [name for name in names if name not in known]
    if missing or not known:
        print(
            f"refused: {', '.join(missing[:1]) or 'any suite'}: not on record for {here['device']} with this text and "
            f"these codes, there is: {', '.join(sorted(known)) or 'nothing'}",
            file=sys.stderr,
        )
        return 1
    paths = [str(files[name]) for name in names or files if name in known]
    command = [sys.executable, "-m", "pytest", *paths, *extra, "-o", "timeout=0", *options]
    print(shlex.join(command[1:]), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def record(run: dict[str, Any], name: str) -> int:
    written = os.path.relpath(storage.save(storage.RESULTS, run, name))
    print(f"wrote {written}; python -m bench.render brings it into the documentation")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    files = bench_files()
    if unknown := [name for name in options.names if name not in files]:
        parser.error(f"got {unknown[0]!r}, wanted one of {', '.join(files)}")
    if options.source:
        if not options.record:
            parser.error("--from: wanted --record NAME beside it")
        return record(json.loads(options.source.read_text()), options.record)
    extra = ["-k", options.k] if options.k else []
    os.chdir(ROOT)
    if options.check:
        return check(files, options.names, extra)
    peers = ["--peers"] if options.peers or options.record else []
    os.environ["PGOLF_BENCH_COMMAND"] = shlex.join(["pgolf", "bench", *options.names, *extra, *peers])
    paths = [str(files[name]) for name in options.names or files]
    folder = Path(tempfile.mkdtemp(prefix="pgolf-bench-"))
    runner = Runner(
        [*paths, *extra, *peers],
        folder / "pytest.log",
        json_file=options.json,
        until=time.monotonic() + options.within if options.within else float("inf"),
        say=lambda line: print(line, flush=True),
    )
    interrupted = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        runner.measure()
    except KeyboardInterrupt:
        interrupted = True
    if options.json and runner.done:
        print(f"wrote {options.json}")
    elif runner.done:
        rows = [asdict(row) for row in storage.rows_of(runner.run)]
        print(json.dumps({"environment": runner.run["machine_info"]["pgolf"], "rows": rows}))
    if options.record and runner.run["benchmarks"]:
        record(runner.run, options.record)
    if runner.failed or not runner.run["benchmarks"]:
        reason = f"{runner.failed} rows of this package failed" if runner.failed else "nothing was measured"
        print(f"{reason}; pytest's lines are in {runner.log}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
