"""Recorded benchmark results: writing, comparing, and the documentation made of them."""

import json

import pytest

from bench import record, render
from bench.common import Row

ENVIRONMENT = {
    "device": "NVIDIA H200",
    "cpu": "Some CPU @ 2.0",
    "threads": 4,
    "torch": "2.11",
    "cuda": "13.0",
    "commit": "0123456789abcdef",
    "command": "python -m pytest bench",
    "ceilings": {"bytes_per_s": 4e12, "flop_per_s": 7e14},
}


def rows(milliseconds=1.0):
    return [
        Row("ngram/stream", "10 tokens", "pgolf_kernels", milliseconds / 1e3, bytes_per_s=2e12, of_floor=0.5),
        Row("ngram/stream", "10 tokens", "peer", 3e-3),
        Row("ngram/stream", "10 tokens", "other", absent="other is not installed"),
        Row("gptq/model", "all", "pgolf_kernels", absent="no GPU"),
    ]


def test_a_file_for_each_suite_that_ran(tmp_path):
    written = record.write_results(tmp_path, ENVIRONMENT, rows())
    assert written == [tmp_path / "nvidia-h200" / "ngram.json"]
    stored = json.loads(written[0].read_text())
    assert stored["environment"] == ENVIRONMENT
    assert [row["provider"] for row in stored["rows"]] == ["pgolf_kernels", "peer", "other"]
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize(("milliseconds", "slower"), [(1.1, 0), (0.5, 0), (1.2, 1)])
def test_slower_than_recorded(tmp_path, milliseconds, slower):
    record.write_results(tmp_path, ENVIRONMENT, rows())
    lines, compared = record.slower_than_recorded(tmp_path, ENVIRONMENT, rows(milliseconds)[:3])
    assert len(lines) == slower and compared == 2
    assert all("20% above the recorded 1.000 ms" in line for line in lines)


@pytest.mark.parametrize(("name", "value"), [("cpu", "Another CPU"), ("threads", 8), ("device", "NVIDIA H100")])
def test_results_of_another_machine_are_refused(tmp_path, name, value):
    record.write_results(tmp_path, ENVIRONMENT, rows())
    with pytest.raises(record.Refused, match=r"ngram: (recorded with|nothing recorded on)"):
        record.slower_than_recorded(tmp_path, {**ENVIRONMENT, name: value}, rows()[:3])


def test_a_page_is_filled_and_checked(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(
        "# A\n\n<!-- results:ngram -->\nold\n<!-- /results -->\n\nb\n\n<!-- results:gptq --><!-- /results -->\n"
        "<!-- results:packing -->\n<!-- /results -->\n<!-- results:headline -->\n<!-- /results -->\nend\n"
    )
    results = tmp_path / "results"
    record.write_results(results, ENVIRONMENT, rows())
    assert render.main(["--check"], tmp_path, results) == 1
    assert "old" in page.read_text()
    assert render.main([], tmp_path, results) == 0
    assert render.main(["--check"], tmp_path, results) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("# A\n") and text.endswith("end\n") and "\n\nb\n\n" in text
    assert "| pgolf_kernels | 1.00 ms | 1.00 | 2000 GB/s | 50% |" in text
    assert "| peer | 3.00 ms | 3.00 |" in text
    assert "absent: other is not installed" in text
    assert "| n-gram hints | 10 tokens; NVIDIA H200 | 1.00 ms | 50% | peer: 3.00 ms | 3.00 |" in text
    assert "`0123456789ab`" in text
    assert f"<!-- results:packing -->\n\n{render.NOT_RECORDED}\n" in text


def test_committed_pages_are_up_to_date(capsys):
    status = render.main(["--check"])
    assert status == 0, f"python -m bench.render mends this: {capsys.readouterr().out}"
