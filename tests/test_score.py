"""`pgolf eval`: where its ledgers and results go, and that it goes on from them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from model import packed_entry, score
from model.cli import cli
from model.data.shards import BOS_ID, write_shard
from model.errors import ConfigError, DataError
from model.evaluate.ledger import Ledger
from model.evaluate.session import Session
from model.pipeline import run_pipeline
from model.score import ledger_path, score_artifact
from tests.evaluation import count_scores
from tests.tiny import tiny_config, tiny_data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    config = tiny_config(tiny_data(folder), folder / "runs", run_id="run", eval_batch_seqs=2)
    run_pipeline(config, stages=("train", "quantize"))
    return folder / "runs" / "run"


@pytest.fixture
def artifact(run, tmp_path):
    """An artifact on its own."""
    (tmp_path / "place").mkdir()
    return Path(shutil.copy(run / "model.pgolf", tmp_path / "place" / "mine.pgolf"))


@pytest.fixture
def packed(run, tmp_path):
    """What a packed submission's folder holds, with nothing in its script."""
    folder = tmp_path / "place" / "submission"
    folder.mkdir(parents=True)
    shutil.copy(run / "model.pgolf", folder)
    (folder / "train_gpt.py").write_text("")
    return folder


def data_of(run: Path) -> str:
    return str(run.parent.parent / "data")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Stopped(Exception):
    pass


def stop(self: Session, *, last: bool = False) -> None:
    if self.ledger.num_scored > 200:
        self.ledger.save(self.ledger_path)
        raise Stopped


@pytest.mark.parametrize("kind", ["artifact", "packed"])
def test_an_interrupted_evaluation_of_a_file_or_a_submission_goes_on(run, kind, request, monkeypatch):
    path = request.getfixturevalue(kind)
    whole = score_artifact(run, ["sliding"], quiet=True)["sliding"]
    arguments = ["eval", str(path), "--data", data_of(run), "--mode", "sliding", "--quiet"]
    before = names(path) if path.is_dir() else []
    with monkeypatch.context() as patch:
        patch.setattr(Session, "pause", stop)
        assert isinstance(CliRunner().invoke(cli, arguments).exception, Stopped)
    place = path.parent / f"{path.name}.ledger_sliding.npz"
    ledger = Ledger.load(place)
    assert 0 < ledger.missing() < ledger.num_tokens - 1

    with monkeypatch.context() as patch:
        scored = count_scores(patch)
        done = CliRunner().invoke(cli, [*arguments, "--resume"])
    assert done.exit_code == 0, done.output
    assert sum(scored) == ledger.missing()
    assert f"{whole.bpb:.5f}" in done.output
    assert np.array_equal(Ledger.load(place).nll, whole.ledger.nll, equal_nan=True)
    assert names(path.parent) == sorted([path.name, place.name])
    assert (names(path) if path.is_dir() else []) == before  # neither a ledger nor a result


def test_where_ledgers_are_kept(run, artifact, packed, monkeypatch):
    beside = packed.parent / "submission.ledger_plain.npz"
    assert ledger_path(run, "plain") == run / "ledger_plain.npz"
    assert ledger_path(artifact, "plain") == artifact.parent / "mine.pgolf.ledger_plain.npz"
    assert ledger_path(packed, "plain") == ledger_path(packed / "model.pgolf", "plain") == beside
    monkeypatch.chdir(packed)
    assert ledger_path(Path(), "plain") == ledger_path(Path("model.pgolf"), "plain") == beside


def test_a_run_has_its_result_and_ledger_in_its_folder(run):
    result = score_artifact(run, ["plain"], quiet=True)["plain"]
    assert json.loads((run / "result.json").read_text())["bpb"]["plain"] == result.bpb
    assert Ledger.load(run / "ledger_plain.npz").missing() == 0


def test_the_script_of_a_submission_leaves_no_file(run, packed, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_gpt.py", "--data", data_of(run), "--mode", "plain", "--device", "cpu"])
    packed_entry.main(str(packed / "train_gpt.py"))
    assert "bpb" in capsys.readouterr().out
    assert names(packed.parent) == ["submission"] and names(packed) == ["model.pgolf", "train_gpt.py"]


def test_a_folder_that_cannot_be_written(run, artifact, monkeypatch, capsys):
    monkeypatch.setattr(score.os, "access", lambda path, kind: not (path == artifact.parent and kind == os.W_OK))
    result = score_artifact(artifact, ["plain"], data_dir=data_of(run), quiet=True)
    assert result["plain"].ledger.missing() == 0
    assert capsys.readouterr().err == f"no ledger is kept: {artifact.parent} cannot be written\n"
    assert names(artifact.parent) == ["mine.pgolf"]
    with pytest.raises(ConfigError, match=r"resume: .*place cannot be written, wanted a folder in which"):
        score_artifact(artifact, ["plain"], data_dir=data_of(run), quiet=True, resume=True)


def test_a_run_that_cannot_be_written(run, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("ledger_*")))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    monkeypatch.setattr(score.os, "access", lambda path, kind: not (path == folder and kind == os.W_OK))
    done = CliRunner().invoke(cli, ["eval", str(folder), "--mode", "plain", "--quiet"])
    assert done.exit_code == 0, done.output
    assert done.stderr == f"no ledger or result.json is kept: {folder} cannot be written\n"
    assert done.stdout.split("\n")[1].startswith("plain  ")
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_an_artifact_without_its_data_names_the_option(artifact, monkeypatch):
    monkeypatch.chdir(artifact.parent)
    done = CliRunner().invoke(cli, ["eval", str(artifact), "--mode", "plain", "--quiet"])
    assert isinstance(done.exception, DataError)
    assert "data: no such folder, wanted a data set (--data or --data-dir names it" in str(done.exception)


def change_validation(folder: Path, tokens: np.ndarray) -> None:
    write_shard(folder / "valid_000000.bin", tokens)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["splits"]["valid"]["shards"][0]["tokens"] = len(tokens)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_validation_text_of_empty_documents(run, artifact, tmp_path):
    """Where some documents have bytes there is a score."""
    data = Path(shutil.copytree(data_of(run), tmp_path / "data"))
    change_validation(data, np.full(40, BOS_ID, np.uint16))
    with pytest.raises(DataError, match="validation stream: no bytes, wanted text"):
        score_artifact(artifact, ["plain"], data_dir=str(data), quiet=True)
    change_validation(data, np.array([BOS_ID] * 20 + [300, 301, BOS_ID, BOS_ID], np.uint16))
    assert np.isfinite(score_artifact(artifact, ["plain"], data_dir=str(data), quiet=True)["plain"].bpb)
