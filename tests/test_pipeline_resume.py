"""A pipeline stopped after its training: what is finished stays, and the evaluation goes on from its ledger."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model import pipeline
from model.config import Config
from model.evaluate.ledger import Ledger
from model.evaluate.session import Session, rank_path
from model.pipeline import run_pipeline
from model.presets import get_preset
from model.run import RunDir
from tests.evaluation import count_scores
from tests.tiny import tiny_config, tiny_data

ROOT = Path(__file__).parent.parent


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
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_quantize", lambda *_, **__: pytest.fail("quantised again"))
        scored = count_scores(patch)
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
        patch.setattr(pipeline, "_quantize", lambda *_, **__: pytest.fail("quantised again"))
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


# `python -m model.train`, whose sliding evaluation takes its time and says how far it is.
SLOW = """
import time
from model.evaluate.session import Session
from model.pipeline import main

def slowly(self, windows, **inputs):
    if self.ledger.meta.get("mode") == "sliding":
        print("a window", flush=True)
        time.sleep(0.2)
    return window_scores(self, windows, **inputs)

window_scores, Session.window_scores = Session.window_scores, slowly
main()
"""


def flags_of(config: Config) -> list[str]:
    """The command line of a configuration, from the preset "demo"."""
    base = get_preset("demo").to_dict()
    flags = ["--preset", "demo", "--device", "cpu", "--no-cuda-graphs"]
    for section, name, value in config.items():
        if value != base[section][name] and not isinstance(value, bool):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGTERM, "stopped by SIGTERM"),
        pytest.param(signal.SIGINT, "stopped by Ctrl-C", marks=pytest.mark.long),
    ],
)
def test_a_signal_during_an_evaluation_leaves_its_ledger(number, message, data, tmp_path):
    config = tiny_config(data, tmp_path, eval_batch_seqs=1, cuda_graphs=False)
    run = run_of(config)
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *flags_of(config)],
        env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    windows = 0
    for line in process.stdout:
        windows += line == "a window\n"
        if windows == 3:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + number, errors
    assert errors.splitlines()[-1] == f"model.train: {message}" and "Traceback" not in errors
    before = Ledger.load(run.path / "ledger_sliding.npz")
    assert 0 < before.missing() < before.num_tokens - 1
    result = run_pipeline(run.config(), resume=True)
    after = Ledger.load(run.path / "ledger_sliding.npz")
    assert np.array_equal(after.nll[~np.isnan(before.nll)], before.nll[~np.isnan(before.nll)])
    whole = run_pipeline(run.config().replace(run_id="whole"))
    assert result["bpb"] == whole["bpb"]


@pytest.fixture
def _handlers():
    """Handlers that a command installs are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("stage", ["train", "_quantize"])
@pytest.mark.usefixtures("_handlers")
def test_sigterm_outside_of_steps_and_evaluations(stage, data, tmp_path, monkeypatch, capsys):
    config = tiny_config(data, tmp_path, cuda_graphs=False)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, stage, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        patch.setattr("sys.argv", ["model.train", *flags_of(config)])
        with pytest.raises(SystemExit) as done:
            pipeline.main()
    assert done.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "model.train: stopped by SIGTERM\n"
    run = run_of(config)
    assert run_pipeline(run.config(), resume=True)["val_bpb"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait_for_the_pause(number, data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path)
    run_pipeline(config, stages=("train", "quantize"))
    handled = []

    def handler(number, frame):
        handled.append(number)
        raise Stopped

    def twice(self, windows, **inputs):
        signal.raise_signal(number)
        assert not handled
        signal.raise_signal(number)

    before = signal.signal(number, handler)
    try:
        monkeypatch.setattr(Session, "window_scores", twice)
        with pytest.raises(Stopped):
            run_pipeline(config, stages=("evaluate",))
        assert handled == [number] and signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert not (run_of(config).path / "ledger_plain.npz").exists()
