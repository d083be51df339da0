"""`pgolf verify` on a run of the tiny pipeline and on a packed submission: every line, and its exit status."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from model import legality, legality_files
from model.checks import Check, Report
from model.data.dataset import open_dataset
from model.errors import ConfigError, DataError, NotVerified, PgolfError
from model.evaluate.ledger import Ledger
from model.legality import verify_artifact, verify_command
from model.pack import entry_script, pack_submission
from model.pipeline import run_pipeline
from model.run import RunDir
from model.score import score_artifact
from tests import cheats
from tests.test_verify import files_can_be_hidden
from tests.tiny import tiny_config, tiny_data

CHECKS = (
    "causality",
    "normalisation",
    "score before update",
    "single pass",
    "warm-up",
    "full scale",
    "no training data",
    "ledger",
    "documents apart",
    "bytes",
    "size",
    "train time",
    "evaluation time",
)
QUICK = {"candidates": 8, "seed": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tiny_data(tmp_path_factory.mktemp("tiny"))
    config = tiny_config(data, tmp_path_factory.mktemp("runs"), run_id="scored")
    run_pipeline(config, stages=("train", "quantize"))
    return Path(config.train.run_dir) / config.train.run_id


def figures(report: legality.Report) -> dict[str, str]:
    return {check.name: check.figure for check in report.checks}


def test_a_legal_run(run: Path) -> None:
    arguments = [str(run), "--mode", "plain", "--candidates", "8", "--seed", "3", "--json"]
    result = CliRunner().invoke(verify_command, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["legal"] and tuple(check["name"] for check in report["checks"]) == CHECKS
    assert report["seed"] == 3
    assert report["skipped"] == ([] if files_can_be_hidden() else ["no training data"])
    assert (report["verdict"] == "legal") == (report["skipped"] == [])
    assert {check["status"] for check in report["checks"]} <= {"pass", "skipped"}
    assert json.loads((run / "verify_plain.json").read_text()) == report
    shown = {check["name"]: check["figure"] for check in report["checks"]}
    assert "causal in stream order" in shown["ledger"]
    assert "by the tables" in shown["bytes"]
    assert f"code {len(entry_script()):,})" in shown["size"]
    assert "opening" in shown["evaluation time"]
    assert "verifying" in result.stderr and "bpb" in result.stderr


def test_the_ledger_of_an_evaluation_is_replayed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = score_artifact(run, ["plain"], quiet=True)["plain"]
    monkeypatch.setattr(legality, "evaluate", lambda *_, **__: pytest.fail("scored again"))
    report = verify_artifact(run, mode="plain", **QUICK)
    assert report.legal, report.lines()
    assert f"{scored.bpb:.5f} bpb, as `pgolf eval` left it" in figures(report)["ledger"]
    assert "tokens rescored, largest difference" in figures(report)["saved scores"]
    assert "as recorded" in figures(report)["evaluation time"] and "opening" in figures(report)["evaluation time"]
    with pytest.raises(pytest.fail.Exception, match="scored again"):  # another evaluation: nothing to replay
        verify_artifact(run, mode="plain", eval_seq_len=32, **QUICK)


def test_a_score_without_its_ledger_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality, "check_scorer", lambda *_, **__: Report())
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    score_artifact(copy, ["plain"], quiet=True)
    RunDir(copy).merge_result({"bpb": {"plain": 0.5}})
    assert verify_artifact(copy, mode="plain", seed=0).failed == ["saved scores"]
    (copy / "ledger_plain.npz").unlink()
    report = verify_artifact(copy, mode="plain", seed=0)
    assert "saved scores" in report.skipped and "result.json says 0.50000 bpb" in figures(report)["saved scores"]


def test_doctored_scores_are_not_legal(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check that is meant for them alone: in the ledger, in some places and everywhere, and in result.json."""
    monkeypatch.setattr(legality, "check_scorer", lambda *_, **__: Report())  # the mode itself is honest
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    score_artifact(copy, ["lora-ttt"], quiet=True)
    path = copy / "ledger_lora_ttt.npz"
    with np.load(path) as file:
        honest = dict(file)
    facts = RunDir(copy).result()
    assert verify_artifact(copy, mode="lora-ttt", seed=0).legal

    def failed_with(factors: np.ndarray, bpb: float | None = None) -> list[str]:
        np.savez(path, **{**honest, "nll": honest["nll"] * factors})
        ledger, dataset = Ledger.load(path), open_dataset(tiny_data_of(run))
        own = ledger.totals(dataset.byte_tables.stream_bytes(dataset.valid_tokens))
        summary = {**facts["evaluation"]["lora_ttt"], "bpb": own.bpb, "val_loss": own.val_loss}
        RunDir(copy).merge_result({"evaluation": {"lora_ttt": summary}, "bpb": {"lora_ttt": bpb or own.bpb}})
        return verify_artifact(copy, mode="lora-ttt", seed=0).failed

    factors = np.ones(len(honest["nll"]))
    assert failed_with(factors) == []
    assert failed_with(factors, bpb=0.5) == ["saved scores"]
    factors[10:13] = 0.5
    assert failed_with(factors) == ["saved scores"]
    assert failed_with(factors * 0 + 0.5) == ["saved scores"]
    assert failed_with(-factors) == ["ledger"]
    report = verify_artifact(copy, mode="lora-ttt", seed=0, whole=True)  # compares all of them
    assert report.failed == ["saved scores"], report.lines()
    assert failed_with(np.ones(len(honest["nll"]))) == []
    whole = verify_artifact(copy, mode="lora-ttt", seed=0, whole=True)
    assert whole.legal and "tokens rescored" in figures(whole)["saved scores"]
    np.savez(path, **{**honest, "nll": honest["nll"] * np.where(np.arange(len(factors)) < 9, np.nan, 1.0)})
    report = verify_artifact(copy, mode="lora-ttt", seed=0)
    assert report.failed == ["ledger"] and "nll is damaged" in figures(report)["ledger"]


def test_the_time_in_the_ledger_counts(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    score_artifact(copy, ["plain"], quiet=True)
    ledger = Ledger.load(copy / "ledger_plain.npz")
    ledger.seconds = 700.0  # as after an interruption
    ledger.save(copy / "ledger_plain.npz")
    assert verify_artifact(copy, mode="plain", **QUICK).failed == ["evaluation time"]
    score_artifact(copy, ["plain"], quiet=True, resume=True)
    assert RunDir(copy).result()["evaluation"]["plain"]["seconds"] > 700.0


@pytest.mark.parametrize(
    "seconds, status, figure",
    [
        ({"train": 587.0, "calibrate": 9.0, "quantize": 90.0}, "pass", "596.0 of 600 s (train 587.0, calibrate 9.0)"),
        ({"train": 587.0, "calibrate": 14.0}, "fail", "601.0 of 600 s (train 587.0, calibrate 14.0)"),
        (
            {"train": 587.0, "quantize": 90.0},
            "pass",
            "587.0 of 600 s, training alone: the record has no calibration",
        ),
        ({"calibrate": 9.0}, "skipped", "no record of a training run here"),
    ],
)
def test_calibration_counts_as_training(seconds: dict[str, float], status: str, figure: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.merge_result({"seconds": seconds})
    check = legality._check_train_time(run)
    assert (check.status, check.figure) == (status, figure)


@pytest.mark.long
def test_a_part_of_the_set_is_scored_unless_the_whole_is_asked_for(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(legality, "EVALUATED_TOKENS", {"cpu": 200})
    report = verify_artifact(run, mode="sliding", device="cpu", **QUICK)
    assert report.legal, report.lines()
    assert "199 scores" in figures(report)["ledger"] and "of the first 200 of" in figures(report)["ledger"]
    assert "--whole times all of them" in figures(report)["evaluation time"]
    whole = figures(verify_artifact(run, mode="sliding", whole=True, seed=0, candidates=8))
    assert "of the first" not in whole["ledger"] and "of 600 s" in whole["evaluation time"]


def test_what_was_not_checked_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare artifact has no train time: its score is legal as far as that can be said, and the exit status 0."""
    monkeypatch.setattr(legality, "check_scorer", lambda *_, **__: Report([Check("causality", "pass", "")]))
    artifact = shutil.copy(run / "model.pgolf", tmp_path / "model.pgolf")
    arguments = [str(artifact), "--data", tiny_data_of(run), "--mode", "plain", "--device", "cpu", "--seed", "0"]
    result = CliRunner().invoke(verify_command, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "legal as far as checked; 1 skipped: train time (seed 0)"
    found = json.loads(CliRunner().invoke(verify_command, [*arguments, "--quiet", "--json"]).stdout)
    assert found["legal"] and found["skipped"] == ["train time"]
    assert found["verdict"] == "legal as far as checked; 1 skipped: train time"
    monkeypatch.setattr(legality_files, "SIZE_BUDGET", 10)
    result = CliRunner().invoke(verify_command, [*arguments, "--quiet"])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "NOT legal (seed 0)")


def test_a_cheat_fails_the_command(run: Path) -> None:
    arguments = [str(run), "--evaluator", "tests.cheats:peeks_one_ahead", "--candidates", "8", "--quiet"]
    result = CliRunner().invoke(verify_command, arguments)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0].startswith("fail     causality") and "NOT legal (seed " in result.stdout


def test_what_cannot_be_checked_has_an_exit_status_of_its_own(run: Path, tmp_path: Path) -> None:
    for options, why in (
        (["--mode", "plainn"], "eval_mode: got 'plainn'"),
        (["--evaluator", "plain"], "evaluator: got 'plain', wanted module:function"),
        (["--evaluator", "a:b", "--mode", "plain"], "mode, evaluator: got 'plain' and 'a:b'"),
    ):
        result = CliRunner().invoke(verify_command, [str(run), *options, "--quiet", "--json"])
        assert why in json.loads(result.stdout)["error"]
        assert isinstance(result.exception, NotVerified) and result.exception.status == 2


def test_a_run_that_cannot_be_written_is_verified_all_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: str) -> None:
        raise PgolfError(f"{path.name}: cannot be written")

    monkeypatch.setattr(legality, "atomic_write", refuse)
    monkeypatch.setattr(legality, "check_scorer", lambda *_, **__: Report())
    result = CliRunner().invoke(verify_command, [str(run), "--mode", "plain", "--quiet", "--device", "cpu"])
    assert result.exit_code == 0 and "legal" in result.stdout.splitlines()[-1]
    assert "not kept: verify_plain.json: cannot be written" in result.stderr


@pytest.fixture
def evaluated(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Report]:
    """`pgolf verify` of a scorer in tests/cheats.py without the checks that run it over and over."""
    monkeypatch.setattr(legality, "check_scorer", lambda *_, **__: Report())
    return lambda cheat: verify_artifact(run, evaluator=f"tests.cheats:{cheat}", seed=0, whole=True)


def test_an_own_scorer_is_timed_from_its_first_call_and_counts_no_bytes(evaluated: Callable[[str], Report]) -> None:
    late = evaluated("works_at_first")
    assert late.legal and float(figures(late)["evaluation time"].split()[0]) > 2.0
    assert figures(evaluated("counts_bytes_twice"))["ledger"] == figures(late)["ledger"]


@pytest.mark.parametrize(
    ("cheat", "said"), [("leaves", "SystemExit: 0"), ("ends_at_once", "its process ended without a score")]
)
def test_leaving_the_process_is_no_score(cheat: str, said: str, evaluated: Callable[[str], Report]) -> None:
    report = evaluated(cheat)
    assert report.failed == ["ledger"] and said in figures(report)["ledger"]


def test_an_own_scorer_that_cannot_be_run_is_no_cheat(evaluated: Callable[[str], Report]) -> None:
    with pytest.raises(ConfigError, match=r"evaluator: got 'tests\.cheats:nobody', wanted module:function"):
        evaluated("nobody")
    with pytest.raises(ConfigError, match="evaluator: its process was ended by SIGKILL"):
        evaluated("runs_out_of_memory")


def test_the_data_folder_is_hidden_where_nothing_else_lies_in_it(run: Path, tmp_path: Path) -> None:
    folder = Path(tiny_data_of(run))
    dataset = open_dataset(folder)
    assert legality_files.data_files(dataset, folder, run) == [folder.resolve()]
    shards = [*dataset.train_shards, *dataset.valid_shards]
    assert legality_files.data_files(dataset, tmp_path, run) == [tmp_path.resolve(), *shards]
    assert legality_files.data_files(dataset, folder.parent, folder / "code.py") == shards


def test_an_evaluator_is_scored_timed_and_weighed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = tmp_path / "answers.bin"
    monkeypatch.setenv(cheats.SHARD, str(answers))
    for size, failed in ((1_000, []), (legality_files.SIZE_BUDGET, ["size"])):
        with open(answers, "wb") as file:
            file.truncate(size)
        report = verify_artifact(run, evaluator="tests.cheats:brings_a_file_along", **QUICK)
        assert report.failed == failed, report.lines()
        assert "2 other files" in figures(report)["size"]
        assert "of 600 s" in figures(report)["evaluation time"]


@pytest.mark.long
def test_an_evaluator_whose_ledger_breaks_is_said_once(run: Path) -> None:
    report = verify_artifact(run, evaluator="tests.cheats:scores_twice", **QUICK)
    assert report.failed == ["single pass"], report.lines()
    assert "second time" in figures(report)["ledger"]


@pytest.mark.long
def test_a_packed_submission(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "submission"
    total = pack_submission(run, folder).total
    data = tiny_data_of(run)
    report = verify_artifact(folder, data_dir=data, mode="plain", **QUICK)
    assert report.failed == [], report.lines()
    assert figures(report)["size"].startswith(f"{total:,} of 16,000,000 bytes (6 files of the submission {total:,})")
    assert sum(file.stat().st_size for file in folder.iterdir()) == total  # nothing was written there

    elsewhere = tmp_path / "weights.bin"
    with open(elsewhere, "wb") as file:
        file.truncate(legality_files.SIZE_BUDGET)
    script = folder / "train_gpt.py"
    original = script.read_bytes()
    script.write_bytes(original + f"open({str(elsewhere)!r}, 'rb').read(1)\n".encode())
    size = legality_files.check_size(folder, folder / "model.pgolf", open_dataset(data), "plain", {})
    assert size.status == "fail" and "1 other files 16,000,000 such as weights.bin" in size.figure
    script.write_bytes(original)

    with open(folder / "more.bin", "wb") as file:
        file.truncate(legality_files.SIZE_BUDGET)
    size = legality_files.check_size(folder, folder / "model.pgolf", open_dataset(data), "plain", {})
    assert size.status == "fail" and "7 files of the submission" in size.figure

    script.write_bytes(b"raise ValueError('half a script')\n")
    size = legality_files.check_size(folder, folder / "model.pgolf", open_dataset(data), "plain", {})
    assert size.status == "fail" and "train_gpt.py does not score: ValueError: half a script" in size.figure


def tiny_data_of(run: Path) -> str:
    return json.loads((run / "config.json").read_text())["data"]["data_dir"]


def test_data_with_another_tokenizer_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its hash when scoring and when verifying; by its ids where an artifact has no hash."""
    other = tmp_path / "data"
    shutil.copytree(tiny_data_of(run), other)
    manifest = json.loads((other / "manifest.json").read_text())
    tokenizer = other / manifest["tokenizer"]["file"]
    header = legality.read_header(run / "model.pgolf")
    assert header.tokenizer_sha256 == manifest["tokenizer"]["sha256"]
    monkeypatch.setattr("model.score.sha256_bytes", lambda data: "0" * 64)
    assert tokenizer.is_file()
    for call in (score_artifact, verify_artifact):
        arguments = {"modes": ["plain"], "quiet": True} if call is score_artifact else {"mode": "plain"}
        with pytest.raises(DataError, match="is not the artifact's"):
            call(run, data_dir=str(other), **arguments)
