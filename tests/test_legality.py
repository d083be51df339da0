"""`pgolf verify` on a run of the tiny pipeline: every line of the report, and its exit status."""

import json

import pytest
from click.testing import CliRunner

from model.legality import verify_artifact, verify_command
from model.pipeline import run_pipeline
from tests.tiny import tiny_config, tiny_data

CHECKS = (
    "causality",
    "normalisation",
    "score before update",
    "single pass",
    "warm-up",
    "no training data",
    "ledger",
    "documents apart",
    "bytes",
    "size",
    "train time",
    "evaluation time",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = tiny_data(tmp_path_factory.mktemp("tiny"))
    config = tiny_config(data, tmp_path_factory.mktemp("runs"), run_id="scored")
    run_pipeline(config, stages=("train", "quantize"))
    return tmp_path_factory.getbasetemp() / config.train.run_dir / config.train.run_id


def test_a_legal_run(run) -> None:
    result = CliRunner().invoke(verify_command, [str(run), "--mode", "plain", "--candidates", "8", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["legal"] and tuple(check["name"] for check in report["checks"]) == CHECKS
    assert {check["status"] for check in report["checks"]} == {"pass"}
    assert json.loads((run / "verify_plain.json").read_text()) == report
    figures = {check["name"]: check["figure"] for check in report["checks"]}
    assert "causal in stream order" in figures["ledger"]
    assert "by the tables" in figures["bytes"]


def test_too_large_and_a_cheat(run) -> None:
    report = verify_artifact(run, mode="plain", candidates=2, code_bytes=16_000_000)
    assert report.failed == ["size"]
    result = CliRunner().invoke(
        verify_command, [str(run), "--evaluator", "tests.cheats:peeks_one_ahead", "--candidates", "2"]
    )
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0].startswith("fail     causality") and "NOT legal" in result.stdout
