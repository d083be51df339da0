"""Recorded benchmark results: pytest-benchmark's storage, and the documentation made of them."""

import copy
import json
import re

import matplotlib
import pytest
import torch

from bench import __main__ as runner
from bench import common, loss_curves, machine, render, storage
from bench.table import Printer, Row, rate_text

ENVIRONMENT = {
    "device": "NVIDIA H200",
    "cpu": "Some CPU @ 2.0",
    "threads": 4,
    "load_at_start": 0.3,
    "torch": "2.11",
    "cuda": "13.0",
    "command": "python -m bench",
}


CEILINGS = {"bytes_per_s": 4e12, "flop_per_s": 7e14}


def benchmark(row):
    """A row as pytest-benchmark stores it."""
    extra = {name: value for name, value in vars(row).items() if name != "seconds"}
    name = f"test_{row.suite.split('/')[1]}[{row.case}-{row.provider}]"
    stats = dict.fromkeys(("min", "max", "mean", "median"), row.seconds)
    return {"group": row.group, "name": name, "fullname": f"bench/x.py::{name}", "extra_info": extra, "stats": stats}


def a_run(*rows):
    return {
        "machine_info": {"pgolf": dict(ENVIRONMENT)},
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "benchmarks": [benchmark(row) for row in rows if row.seconds is not None],
        "absent": [copy.copy(vars(row)) for row in rows if row.seconds is None],
        "ceilings": dict(CEILINGS),
    }


NGRAM = (
    Row("ngram/stream", "10 tokens", "pgolf_kernels", 1e-3, bytes_per_s=2e12, of_floor=0.5, launch=8.5e-5),
    Row("ngram/stream", "10 tokens", "peer", 3e-3, how="12 bytes", others=0.4),
    Row("ngram/stream", "10 tokens", "other", absent="ImportError: other is not installed"),
)
GPTQ = (Row("gptq/model", "all", "pgolf_kernels", 0.5, how="stream (it waits)"),)


def test_a_run_is_stored_where_pytest_benchmark_looks(tmp_path):
    file = storage.save(tmp_path, a_run(*NGRAM, *GPTQ), "first")
    assert file.parent.parent == tmp_path / "nvidia-h200" and file.name == "0001_first.json"
    assert storage.rows_of(json.loads(file.read_text())) == [*NGRAM, *GPTQ]
    found = storage.read_results(tmp_path)
    assert [record.rows for record in found["ngram"]] == [list(NGRAM)]
    assert found["gptq"][0].environment == ENVIRONMENT and found["gptq"][0].commit["dirty"]


def test_a_group_measured_again_leaves_its_older_file(tmp_path):
    first = storage.save(tmp_path, a_run(*NGRAM, *GPTQ), "first")
    again = copy.copy(NGRAM[0])
    again.seconds = 2e-3
    second = storage.save(tmp_path, a_run(again), "second")
    assert second.name == "0002_second.json"
    assert storage.rows_of(json.loads(first.read_text())) == list(GPTQ)
    assert [row.seconds for record in storage.read_results(tmp_path)["ngram"] for row in record.rows] == [2e-3]
    storage.save(tmp_path, a_run(*GPTQ), "third")
    assert not first.exists()
    assert [path for path in tmp_path.rglob("*") if "tmp" in path.name] == []


ON_CPU = {**ENVIRONMENT, "device": "Some CPU @ 2.0", "cuda": None}
ON_GPU = {**ENVIRONMENT, "attention": "fa3"}


@pytest.mark.parametrize(
    ("recorded", "name", "value"),
    [
        (ON_CPU, "cpu", "Another CPU"),
        (ON_CPU, "threads", 8),
        (ON_GPU, "device", "NVIDIA H100"),
        (ON_GPU, "torch", "2.12"),
    ],
)
def test_results_of_another_machine_are_refused(recorded, name, value):
    machine.refuse_another(recorded, {**recorded, "cpu_model": "6/7/8"})  # what an old record does not say
    with pytest.raises(machine.Refused, match=f"recorded with {name} .*, this machine has {value!r}"):
        machine.refuse_another(recorded, {**recorded, name: value})


def test_a_gpu_may_have_another_host():
    machine.refuse_another(ON_GPU, {**ON_GPU, "threads": 64, "cpu": "Another CPU"})


def test_each_machine_has_an_environment_that_all_its_files_can_be_compared_in():
    for folder in sorted(storage.RESULTS.iterdir()):
        found = [json.loads(file.read_text())["machine_info"]["pgolf"] for file in folder.glob("*/*.json")]
        fullest = max(found, key=len)
        for environment in found:
            machine.refuse_another(environment, fullest)
        here = {**fullest, "given": {}}
        assert storage.suites_on_record(storage.RESULTS, here), folder.name


def test_suites_that_measure_on_tokens():
    sources = {name: file.read_text() for name, file in runner.bench_files().items()}
    assert {name for name, source in sources.items() if "data.tokens()" in source} == machine.ON_TOKENS


@pytest.mark.parametrize(
    ("suite", "case", "variable"),
    [
        ("train_step/step", "98304 tokens, loop on", "PGOLF_BENCH_TOKENS"),
        ("embedding/forward_backward", "98304 tokens", "PGOLF_BENCH_TOKENS"),
        ("evaluate/whole_set", "10 tokens", "PGOLF_BENCH_TOKENS"),
        ("ngram/stream", "five orders, given text of 10 tokens", "PGOLF_BENCH_TOKENIZER"),
        ("packing/codes", "given, 10 codes", "PGOLF_CODES"),
    ],
)
def test_rows_of_another_text_are_not_compared(suite, case, variable):
    given = {"given": {variable: "aa"}}
    assert machine.comparable(suite, case, given, given)
    assert not machine.comparable(suite, case, given, {"given": {variable: "bb"}})
    assert not machine.comparable(suite, case, given, {})
    assert not machine.comparable(suite, case, {}, given)


def test_rows_of_another_attention_are_not_compared():
    fa3, other = {"attention": "fa3"}, {"attention": "torch"}
    for suite in ("attention/forward", "train_step/step"):
        assert machine.comparable(suite, "98304 tokens", fa3, fa3)
        assert machine.comparable(suite, "98304 tokens", {}, fa3)  # what an old record does not say
        assert not machine.comparable(suite, "98304 tokens", fa3, other)
    assert machine.comparable("muon/update", "11 layers", fa3, other)


def test_suites_in_which_attention_runs():
    sources = {name: file.read_text() for name, file in runner.bench_files().items()}
    runs = re.compile(r"\b(varlen_attention|GPT\(|our_model)")
    assert {name for name, source in sources.items() if runs.search(source)} == machine.ON_ATTENTION


def test_rows_that_need_no_given_file_are_compared_whatever_was_given():
    given = {"given": dict.fromkeys(machine.GIVEN, "aa")}
    for suite, case in (("gptq/model", "all"), ("ngram/stream", "five orders, bundled text of 10 tokens")):
        assert machine.comparable(suite, case, given, {})


def test_no_comparison_without_a_record(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing on record for nvidia-h100 .*there is: nothing"):
        storage.compare_options(tmp_path, "NVIDIA H100")
    storage.save(tmp_path, a_run(*GPTQ), "first")
    assert f"--benchmark-compare-fail=median:{storage.MARGIN}%" in storage.compare_options(tmp_path, "NVIDIA H200")


def test_suites_that_can_be_compared(tmp_path):
    run = a_run(*GPTQ, Row("train_step/step", "10 tokens", "pgolf", 1.0))
    run["machine_info"]["pgolf"]["given"] = {"PGOLF_BENCH_TOKENS": "aa"}
    storage.save(tmp_path, run, "first")
    run = a_run(*NGRAM)
    run["machine_info"]["pgolf"]["torch"] = "2.12"
    storage.save(tmp_path, run, "second")
    assert storage.suites_on_record(tmp_path, ENVIRONMENT) == {"gptq"}
    assert storage.suites_on_record(tmp_path, {**ENVIRONMENT, "given": {"PGOLF_BENCH_TOKENS": "aa"}}) == {
        "gptq",
        "train_step",
    }
    with pytest.raises(machine.Refused, match=r"torch '2\.1."):
        storage.suites_on_record(tmp_path, {**ENVIRONMENT, "torch": "2.13"})


def test_tables_say_which_text(tmp_path):
    case = "98304 tokens, loop on"
    run = a_run(Row("train_step/step", case, "pgolf", 1.0))
    storage.save(tmp_path / "bundled", run, "first")
    run["machine_info"]["pgolf"]["given"] = {"PGOLF_BENCH_TOKENS": "a" * 64}
    storage.save(tmp_path / "given", run, "first")
    for name in ("bundled", "given"):
        results = storage.read_results(tmp_path / name)
        lines = render.render_suite(results, "train_step")
        assert f"step, {case}, {name} text" in lines
        assert ("PGOLF_BENCH_TOKENS sha256 aaaa" in lines[0]) == (name == "given")
        assert f"| {case}; {name} text; NVIDIA H200 |" in "".join(render.render_headline(results))


def test_a_printed_table():
    printer = Printer()
    lines = [line for row in (*NGRAM, *GPTQ) for line in printer.lines(row, CEILINGS)]
    assert lines[0] == "ngram/stream  10 tokens"
    assert "1.000 ms" in lines[1] and "1.00x" in lines[1] and "50% of ceiling" in lines[1]
    assert lines[1].endswith("launched in 85.00 µs") and "launched" not in lines[2]
    assert "3.00x" in lines[2] and "12 bytes" in lines[2] and "disturbed: others took 0.4 cores" in lines[2]
    assert lines[3].endswith("absent: ImportError: other is not installed")
    assert lines[4] == "gptq/model  all"
    assert "500.000 ms" in lines[5] and "1.00x" in lines[5]


def test_a_rate_is_in_the_unit_of_the_nearer_ceiling():
    both = {"bytes_per_s": 3.8e12, "flop_per_s": 2e12}
    assert rate_text(Row("a/b", "c", "d", 1.0, **both), CEILINGS) == "3800 GB/s"
    assert rate_text(Row("a/b", "c", "d", 1.0, **(both | {"flop_per_s": 7e14})), CEILINGS) == "700 TFLOP/s"
    assert rate_text(Row("a/b", "c", "d", 1.0), CEILINGS) == ""


def test_shares_are_of_the_best_ceilings_on_record(tmp_path):
    disturbed = a_run(*NGRAM)
    disturbed["ceilings"] = {"bytes_per_s": 2e12, "flop_per_s": 8e14}
    storage.save(tmp_path, disturbed, "first")
    storage.save(tmp_path, a_run(*GPTQ), "second")
    results = storage.read_results(tmp_path)
    assert results["ngram"][0].best == {"bytes_per_s": 4e12, "flop_per_s": 8e14}
    assert "| pgolf_kernels | 1.00 ms | 1.00 | 2000 GB/s | 50% |" in "".join(render.render_suite(results, "ngram"))
    assert "| 1.00 ms | 50% |" in "".join(render.render_headline(results))


@pytest.mark.parametrize(("rate", "cell"), [(1e9, ""), (3.9e10, "| 1% |")])
def test_shares_that_round_to_nothing_are_blank(tmp_path, rate, cell):
    storage.save(tmp_path, a_run(Row("gptq/model", "all", "pgolf_kernels", 0.5, bytes_per_s=rate)), "first")
    text = "".join(render.render_suite(storage.read_results(tmp_path), "gptq"))
    assert "%" not in text if not cell else cell in text


def test_a_row_that_was_not_captured_says_so():
    assert render.result(GPTQ[0]) == "stream (it waits)"
    assert [render.result(Row("a/b", "c", "d", 1.0, how=how)) for how in ("", "graph", "calls", "8 bytes")] == [
        "",
        "",
        "",
        "8 bytes",
    ]


@pytest.mark.parametrize(
    ("suite", "graph_bytes", "shown"),
    [("gptq/model", None, "161 MB"), ("train_step/step", None, ""), ("train_step/step", 150_000_000, "161 MB")],
)
def test_memory_without_that_of_graphs_is_not_shown(suite, graph_bytes, shown):
    row = Row(suite, "all", "pgolf", 1.0, peak_bytes=161_000_000, graph_bytes=graph_bytes)
    assert render.memory(row) == shown


def test_private_pools_of_graphs_are_counted(monkeypatch):
    segments = [
        {"total_size": 5, "segment_pool_id": (0, 0)},
        {"total_size": 7, "segment_pool_id": (0, 1)},
        {"total_size": 9, "segment_pool_id": (1, 0)},
    ]
    assert common.DEVICE.type == "cuda" or common.graph_bytes() == 0
    monkeypatch.setattr(common, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert common.graph_bytes() == 16


def test_a_page_is_filled_and_checked(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(
        "# A\n\n<!-- results:ngram -->\nold\n<!-- /results -->\n\nb\n\n<!-- results:gptq --><!-- /results -->\n"
        "<!-- results:packing -->\n<!-- /results -->\n<!-- results:headline -->\n<!-- /results -->\nend\n"
    )
    results = tmp_path / "results"
    storage.save(results, a_run(*NGRAM), "first")
    assert render.main(["--check"], tmp_path, results) == 1
    assert "old" in page.read_text()
    assert render.main([], tmp_path, results) == 0
    assert render.main(["--check"], tmp_path, results) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("# A\n") and text.endswith("end\n") and "\n\nb\n\n" in text
    assert "| pgolf_kernels | 1.00 ms | 1.00 | 2000 GB/s | 50% | 85.0 µs |" in text
    assert "| peer | 3.00 ms | 3.00 |" in text and "12 bytes; others took 0.4 cores" in text
    assert "absent: ImportError: other is not installed" in text
    assert "| n-gram hints | 10 tokens; NVIDIA H200 | 1.00 ms | 50% | peer: 3.00 ms" in text
    assert "`0123456789ab-dirty`" in text and "load average at the start 0.3" in text
    assert f"<!-- results:packing -->\n\n{render.NOT_RECORDED}\n" in text


def test_a_page_that_shows_the_losses_gets_them_drawn(tmp_path, capsys):
    page, picture = tmp_path / "docs" / "x.md", tmp_path / "docs" / "losses.svg"
    page.parent.mkdir()
    page.write_text("![losses](losses.svg)\n")
    assert render.main(["--check"], tmp_path) == 1 and not picture.exists()
    assert render.main([], tmp_path) == 0
    assert "docs/losses.svg: written" in capsys.readouterr().out
    assert render.main(["--check"], tmp_path) == 0
    drawn = picture.read_text()
    picture.write_text(drawn.replace("stroke-dasharray", "dasharray"))
    assert render.main(["--check"], tmp_path) == 1
    by_another = drawn.replace(f"Matplotlib v{matplotlib.__version__},", "Matplotlib v3.0.0,").replace(
        "<path", "<path "
    )
    picture.write_text(by_another)
    assert render.main(["--check"], tmp_path) == 0
    picture.write_text(by_another.replace(loss_curves.digest(loss_curves.read_curves()), "0" * 64))
    assert render.main(["--check"], tmp_path) == 1


def test_committed_pages_are_up_to_date(capsys):
    status = render.main(["--check"])
    assert status == 0, f"python -m bench.render mends this: {capsys.readouterr().out}"


def test_every_suite_on_record_is_on_a_page():
    pages = "".join(page.read_text() for pattern in render.PAGES for page in render.ROOT.glob(pattern))
    shown = {match[2] for match in render.MARKED.finditer(pages)}
    assert set(storage.read_results(storage.RESULTS)) <= shown


def test_committed_results_say_where_they_come_from():
    found = storage.read_results(storage.RESULTS)
    assert found
    for records in found.values():
        for record in records:
            assert machine.machine_name(record.environment["device"]) == record.machine
            assert record.commit["id"] and record.environment["command"] and record.environment["torch"]
            assert all(row.seconds is not None or row.absent for row in record.rows)


def test_files_that_a_run_was_given_are_named_by_hash(tmp_path, monkeypatch):
    file = tmp_path / "tokens.bin"
    file.write_bytes(b"abc")
    monkeypatch.setenv("PGOLF_BENCH_TOKENS", str(file))
    monkeypatch.delenv("PGOLF_CODES", raising=False)
    given = machine.environment([])["given"]
    assert given["PGOLF_BENCH_TOKENS"].startswith("ba7816bf8f01cfea") and "PGOLF_CODES" not in given
    run = a_run(Row("ngram/stream", "given text of 3 tokens", "pgolf_kernels", 1e-3))
    run["machine_info"]["pgolf"]["given"] = given
    storage.save(tmp_path, run, "first")
    lines = render.render_suite(storage.read_results(tmp_path), "ngram")
    assert "PGOLF_BENCH_TOKENS sha256 ba7816bf8f01cfea" in lines[0] and str(tmp_path) not in "".join(lines)


def test_a_run_measured_elsewhere_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(storage, "RESULTS", tmp_path / "results")
    file = tmp_path / "run.json"
    file.write_text(json.dumps(a_run(*NGRAM)))
    monkeypatch.chdir(tmp_path)
    assert runner.main(["--from", str(file), "--record", "h200"]) == 0
    assert storage.read_results(tmp_path / "results")["ngram"][0].rows == list(NGRAM)
    with pytest.raises(SystemExit):
        runner.main(["--from", str(file)])
    assert "wanted --record" in capsys.readouterr().err
