"""How benches run: what happens to rows that fail, hang or end the process; pytest-benchmark's comparison."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch._inductor.test_operators  # pytester forgets modules, torch not what they registered

import pgolf_kernels  # noqa: F401  # likewise
from bench import __main__ as runner
from bench import common, machine, storage

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parent.parent
CEILINGS = '{"bytes_per_s": 1e10, "flop_per_s": 1e11}'
SUITE = textwrap.dedent(
    """
    import os, signal, time
    import pytest
    from bench.common import Work
    from bench.peers import Absent

    def quick(case, x):
        return lambda: time.sleep(float(os.environ.get("TOY_SECONDS", "0.002")))

    def blank(case, x):
        raise AssertionError

    def missing(case, x):
        raise Absent("not here")

    def ends(case, x):
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(case, x):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)

    def sleeps(case, x):
        time.sleep(60)

    PROVIDERS = {"pgolf_kernels": quick, "blank": blank, "missing": missing, "ends": ends, "hangs": hangs,
                 "sleeps": sleeps, "peer": quick}

    @pytest.mark.timeout(2)
    @pytest.mark.parametrize("provider", PROVIDERS)
    @pytest.mark.parametrize("case", os.environ.get("TOY_CASES", "toy").split())
    def test_part(bench, case, provider):
        bench(case, provider, PROVIDERS, lambda case, device: None, lambda case: Work(bytes=1 << 27))
    """
)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A bench file outside bench/, whose fixtures it takes as a plugin; ceilings that need no measuring."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # else pytest-benchmark measures nothing
    monkeypatch.setenv("PGOLF_BENCH_CEILINGS", CEILINGS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    file = tmp_path / "bench_toy.py"
    file.write_text(SUITE)
    return file


def test_a_run_goes_on_after_rows_that_fail_hang_or_end_the_process(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE", 2.0)
    lines, file = [], tmp_path / "run.json"
    arguments = ["-p", "bench.conftest", f"--rootdir={tmp_path}", str(toy), "--peers"]
    run = runner.Runner(arguments, tmp_path / "log", json_file=file, say=lines.append)
    run.measure()
    stored = json.loads(file.read_text())
    rows = {row.provider: row for row in storage.rows_of(stored)}
    assert set(rows) == {"pgolf_kernels", "blank", "missing", "ends", "hangs", "sleeps", "peer"}, lines
    assert rows["blank"].absent == "AssertionError"
    assert rows["missing"].absent == "not here"
    assert rows["ends"].absent == "its process was ended by SIGKILL"
    assert rows["hangs"].absent == "no result in 4 s"
    assert "Timeout" in rows["sleeps"].absent
    assert 0.002 <= rows["pgolf_kernels"].seconds < 0.2 and 0.002 <= rows["peer"].seconds < 0.2
    assert run.failed == 0  # peers alone
    assert stored["ceilings"] == json.loads(CEILINGS)
    assert stored["machine_info"]["pgolf"]["threads"] > 0 and stored["machine_info"]["node"] == ""
    assert "GB/s" in lines[1] and lines[1].startswith("ceilings") and lines[2] == "toy/part  toy"


def test_no_peers_unless_asked_for_and_an_end_to_the_time(toy, tmp_path):
    lines = []
    arguments = ["-p", "bench.conftest", f"--rootdir={tmp_path}", str(toy)]
    run = runner.Runner(arguments, tmp_path / "log", until=0.0, say=lines.append)
    run.measure()
    assert run.run["benchmarks"] == []


def run_toy(pytester, toy, *options):
    return pytester.runpytest_inprocess("-p", "bench.conftest", str(toy), *options)


def test_pytest_benchmark_compares(toy, pytester, tmp_path, monkeypatch):
    saved = tmp_path / "results" / "here"
    stored = f"--benchmark-storage=file://{saved}"
    assert run_toy(pytester, toy, stored, "--benchmark-save=toy").ret == 0
    (file,) = saved.glob("*/0001_toy.json")
    record = json.loads(file.read_text())
    device = record["machine_info"]["pgolf"]["device"]
    saved.rename(saved.parent / runner.storage.machine_name(device))
    options = storage.compare_options(tmp_path / "results", device)
    monkeypatch.setenv("TOY_CASES", "toy new")
    with_new = run_toy(pytester, toy, *options)
    assert with_new.ret == 0
    assert "not compared, without a record: toy/part (new), pgolf_kernels\n" in with_new.stdout.str() + "\n"
    monkeypatch.delenv("TOY_CASES")

    monkeypatch.setenv("TOY_SECONDS", "0.01")
    slower = run_toy(pytester, toy, *options)
    assert slower.ret != 0
    assert "Performance has regressed" in slower.stdout.str() + slower.stderr.str()
    monkeypatch.delenv("TOY_SECONDS")

    (file,) = (tmp_path / "results").glob("*/*/0001_toy.json")
    cpu, record["machine_info"]["pgolf"]["cpu"] = record["machine_info"]["pgolf"]["cpu"], "Another CPU"
    file.write_text(json.dumps(record))
    refused = run_toy(pytester, toy, *options)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert "refused: recorded with cpu 'Another CPU'" in refused.stderr.str()

    other = file.with_name("0002_toy.json")
    other.write_text(json.dumps(record | {"machine_info": json.loads(file.read_text())["machine_info"]}))
    record["machine_info"]["pgolf"]["cpu"] = cpu
    file.write_text(json.dumps(record))
    beside = run_toy(pytester, toy, *options)
    assert beside.ret == 0, beside.stderr.str()  # the file of another machine is left out
    assert "Left out: recorded with cpu 'Another CPU'" in beside.stderr.str()
    other.unlink()

    row = record["benchmarks"][0]["extra_info"]
    record["benchmarks"][0]["extra_info"] = {**row, "suite": "evaluate/whole_set"}
    record["machine_info"]["pgolf"]["given"] = {"PGOLF_BENCH_TOKENS": "aa"}
    file.write_text(json.dumps(record))
    another_text = run_toy(pytester, toy, *options)
    assert another_text.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "1 of 1 rows, measured on another text" in another_text.stderr.str()

    record["benchmarks"][0]["extra_info"] = row
    record["benchmarks"][0]["fullname"] = "bench/bench_other.py::test_part"
    file.write_text(json.dumps(record))
    assert run_toy(pytester, toy, *options).ret != 0  # nothing was compared


COMPILED = textwrap.dedent(
    """
    import pytest, torch
    from bench.common import Work

    sizes = set()

    def backend(graph, inputs):
        sizes.add(len(inputs[0]))
        return graph.forward

    plus_one = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    PROVIDERS = {"pgolf_kernels": lambda case, x: lambda: plus_one(x)}

    @pytest.mark.parametrize("case", range(2, 3 + torch._dynamo.config.recompile_limit))
    def test_part(bench, case):
        bench(case, "pgolf_kernels", PROVIDERS, lambda case, device: torch.ones(case), lambda case: Work(bytes=1 << 27))
        assert case in sizes
    """
)


def test_each_row_is_compiled_however_many_there_are(toy, pytester):
    toy.write_text(COMPILED)
    assert run_toy(pytester, toy).ret == 0


def test_what_cannot_be_captured_is_called_and_says_why(monkeypatch):
    def waits(calls):
        raise RuntimeError("called a synchronizing CUDA operation\nand more")

    monkeypatch.setattr(common, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(common, "graph_of", waits)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made = []
    timed = common.timed([lambda: made.append(1), lambda: made.append(2)], once=0.01)
    assert timed.how == "stream (called a synchronizing CUDA operation)"
    assert timed.calls == 4 and timed.rounds == common.ROUNDS
    assert made == [1, 2, 1, 2]


@pytest.mark.gpu
def test_a_call_that_waits_leaves_random_numbers_working():
    x = torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError):
        common.graph_of([lambda: x.sum().item()])
    assert common.random_numbers_work()
    common.graph_of([lambda: x * 2]).replay()
    torch.cuda.synchronize()


def test_what_a_call_costs_the_host(monkeypatch):
    ran = []

    def call() -> None:
        ran.append(None)
        time.sleep(0.002)

    assert 0.002 <= common.host_seconds(call, calls=3, rounds=3) < 0.1 and len(ran) == 9
    monkeypatch.setattr(common, "DEVICE", torch.device("cpu"))
    assert common.launch_seconds(call) is None and len(ran) == 9


@pytest.mark.gpu
def test_a_launch_does_not_wait_for_the_device():
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    call = lambda: x @ x  # noqa: E731
    call()
    launch = common.launch_seconds(call)
    assert launch is not None and launch < common.elapsed(call) / 2


def test_slow_calls_get_fewer_input_sets():
    assert common.rotations(common.Work(bytes=1 << 20), 1e-3) == min(64, common.ROTATED_BYTES >> 20)
    assert common.rotations(common.Work(bytes=1 << 20), 0.3) == 3
    assert common.rotations(common.Work(bytes=1 << 40), 1e-3) == 1
    assert common.rotations(common.Work(bytes=1), 50.0) == 1


def test_neighbours_see_another_process():
    with machine.Neighbours() as alone:
        sum(range(1 << 20))
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with machine.Neighbours() as beside:
            time.sleep(1.0)
    finally:
        busy.kill()
        busy.wait()
    assert alone.cores >= 0.0 and beside.cores > 0.05


def test_every_bench_is_collected():
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q", "--peers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for name, file in runner.bench_files().items():
        assert f"{file}::test_" in done.stdout, name


def test_the_command_line(capsys):
    with pytest.raises(SystemExit):
        runner.main(["nothing_of_that_name"])
    assert "wanted one of softcap_ce" in capsys.readouterr().err
