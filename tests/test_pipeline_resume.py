"""A pipeline stopped after its training: what is finished stays, and the evaluation goes on from its ledger."""

from pathlib import Path

import numpy as np
import pytest

from model import pipeline
from model.config import Config
from model.evaluate.ledger import Ledger
from model.evaluate.session import Session, rank_path
from model.pipeline import run_pipeline
from model.run import RunDir
from tests.tiny import tiny_config, tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny"))


class Stopped(Exception):
    pass


def stop_evaluating(monkeypatch, mode: str, pauses: int) -> None:
    """Evaluations in `mode` save their ledger and stop at that pause."""
    left = [pauses]

    def pause(self: Session, *, last: bool = False) -> None:
        if self.ledger.meta.get("mode") == mode:
            left[0] -= 1
            if left[0] == 0:
                self.ledger.save(self.ledger_path)
                raise Stopped

    monkeypatch.setattr(Session, "pause", pause)


@pytest.fixture
def stopped(data, tmp_path, monkeypatch) -> Config:
    """The configuration of a run whose sliding evaluation was stopped."""
    config = tiny_config(data, tmp_path, eval_batch_seqs=2)
    with monkeypatch.context() as patch:
        stop_evaluating(patch, "sliding", 3)
        with pytest.raises(Stopped):
            run_pipeline(config)
    return config


def run_of(config: Config) -> RunDir:
    return RunDir(Path(config.train.run_dir) / config.train.run_id)


def test_a_stopped_evaluation_goes_on_from_its_ledger(stopped, data, tmp_path, monkeypatch):
    run = run_of(stopped)
    artifact, before = run.artifact_path.read_bytes(), Ledger.load(run.path / "ledger_sliding.npz")
    assert 0 < before.missing() < before.num_tokens - 1
    scored = []
    window_scores = Session.window_scores

    def counted(self, windows, **inputs):
        scored.append((windows[:, 1] - windows[:, 2]).sum())
        return window_scores(self, windows, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_quantize", lambda *_: pytest.fail("quantised again"))
        patch.setattr(Session, "window_scores", counted)
        result = run_pipeline(stopped, resume=True)
    assert sum(scored) == before.missing()  # nothing that had a score, and nothing of the plain evaluation
    after = Ledger.load(run.path / "ledger_sliding.npz")
    had_score = ~np.isnan(before.nll)
    assert np.array_equal(after.nll[had_score], before.nll[had_score])
    assert run.artifact_path.read_bytes() == artifact
    assert result["seconds"]["evaluate_sliding"] == result["evaluation"]["sliding"]["seconds"] > before.seconds

    whole = run_pipeline(stopped.replace(run_id="whole"))
    assert result["bpb"] == whole["bpb"] and result["val_bpb"] == whole["val_bpb"]
    # Settings that do not shape the artifact may change in between.
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_quantize", lambda *_: pytest.fail("quantised again"))
        run_pipeline(stopped.replace(timeout_seconds=90.0, checkpoint_every=2), resume=True)


@pytest.mark.parametrize("change", ["settings", "artifact", "weights"])
def test_another_artifact_is_made_and_scored_anew(stopped, change, monkeypatch):
    run, config = run_of(stopped), stopped
    before = run.result()["artifact"]
    if change != "artifact":
        Ledger(5).save(rank_path(run.path / "ledger_plain.npz", 1))  # another rank's part of the old scores
    if change == "settings":
        config = config.replace(matrix_bits=3)
    elif change == "artifact":
        run.artifact_path.write_bytes(run.artifact_path.read_bytes()[:-1])
    else:
        model = pipeline.load_weights(run.path, config, "cpu")
        model.tok_emb.data.mul_(0.5)
        run.save_model(model.state_dict(), config)
    result = run_pipeline(config, resume=True)
    after = run.result()["artifact"]
    assert (after["sha256"] == before["sha256"]) == (change == "artifact")
    assert result["val_bpb"] == result["bpb"]["sliding"]
    for name in ("plain", "sliding"):
        assert Ledger.load(run.path / f"ledger_{name}.npz").missing() == 0


def test_the_same_artifact_written_again_keeps_its_scores(stopped):
    run = run_of(stopped)
    run_pipeline(stopped, stages=("quantize",))
    assert "plain" in run.result()["bpb"] and (run.path / "ledger_sliding.npz").is_file()
