"""The main job: at a tiny size on a little text, and (long) as a user runs it."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch._dynamo  # noqa: F401, an import that Ctrl-C cuts short leaves half a module to the next test
from click.testing import CliRunner

from model import demo
from model.cli import cli, main
from model.data.dataset import open_dataset
from model.data.verify import verify_dataset
from model.errors import PgolfError
from model.pipeline import run_pipeline
from model.presets import get_preset
from model.run import RunDir
from model.score import score_artifact

ROOT = Path(__file__).parent.parent
TINY = {
    "vocab_size": 400, "num_layers": 3, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8,
    "xsa_last_n": 3, "loop_start": 1, "loop_end": 1, "parallel_start": 2, "train_seq_len": 64,
    "train_batch_tokens": 256, "iterations": 8, "calibration_batches": 2, "calibration_tokens": 256,
    "eval_seq_len": 64, "eval_stride": 32, "ttt_eval_seq_len": 64, "ttt_chunk_size": 64, "ttt_lora_rank": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def small_text(tmp_path_factory):
    """The 60 shortest documents of the bundled text."""
    from model.data.text import SAMPLE, read_documents

    texts = sorted((document.text for document in read_documents([SAMPLE])), key=len)[:60]
    path = tmp_path_factory.mktemp("text") / "small.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tiny(small_text, tmp_path_factory):
    """The demo with a tiny network on that text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SAMPLE", small_text)
        patch.setattr(demo, "get_preset", lambda name: get_preset(name).replace(**TINY))
        return demo.run_demo(tmp_path_factory.mktemp("demo"), seed=3, quiet=True)


def test_result_has_every_figure(tiny):
    result = tiny.result()
    assert tiny.config().train.seed == 3
    assert set(result["bpb"]) >= {"float", "plain", "sliding", "lora_ttt", "lora_ttt_lr0"}
    assert all(0 < value < 16 for value in result["bpb"].values())
    assert set(result["baselines"]) == {"gzip", "xz", "brotli"}
    assert result["artifact"]["bytes"] == tiny.artifact_path.stat().st_size
    weights = result["artifact"]["weights"]
    assert result["artifact"]["bits_per_weight"] == 8 * result["artifact"]["bytes"] / weights
    assert result["val_loss"] == result["evaluation"]["lora_ttt"]["val_loss"]
    stages = {
        "data",
        "train",
        "quantize",
        "artifact",
        "evaluate_plain",
        "evaluate_lora_ttt",
        "baselines",
        "report",
        "total",
    }
    assert stages <= set(result["seconds"])
    assert all(result["evaluation"][name]["legal"] for name in ("plain", "sliding", "lora_ttt"))


def test_folder_holds_the_run(tiny):
    for name in ("config.json", "metrics.jsonl", "model.pgolf", "model.safetensors", "result.json", "report.html"):
        assert (tiny.path / name).stat().st_size > 0, name
    assert not list(tiny.path.glob(".*")), "something half-written"
    assert len(list(tiny.metrics())) >= TINY["iterations"]
    assert verify_dataset(tiny.path / "data", quiet=True) == []


def test_loss_and_bytes_give_the_bits_per_byte(tiny):
    """bpb = nats per token x tokens / ln 2 / bytes, with the bytes of the text itself."""
    dataset = open_dataset(tiny.path / "data")
    valid_bytes = dataset.manifest["splits"]["valid"]["bytes"]
    for name, values in tiny.result()["evaluation"].items():
        assert values["bytes"] == valid_bytes
        assert values["tokens"] == len(dataset.valid_tokens) - 1
        bits = values["val_loss"] * values["tokens"] / math.log(2)
        assert tiny.result()["bpb"][name] == pytest.approx(bits / valid_bytes, rel=1e-12)


def test_paired_gain_is_the_difference_of_the_scores(tiny):
    result = tiny.result()
    gain = result["ttt_gain"]
    assert gain["bpb"] == pytest.approx(result["bpb"]["lora_ttt_lr0"] - result["bpb"]["lora_ttt"], abs=1e-9)
    assert gain["documents"] == demo.VALID_DOCUMENTS
    assert gain["standard_error"] > 0


def test_paired_standard_error(monkeypatch):
    """Against the variance of a sum of independent differences, written out."""
    frozen = np.array([[5.0, 4, 2], [7.0, 6, 3], [9.0, 2, 2]])
    adapted = np.array([[4.0, 4, 2], [6.5, 6, 3], [7.0, 2, 2]])
    losses = iter([frozen, adapted])
    monkeypatch.setattr(demo, "_document_losses", lambda path, dataset: next(losses))
    gain, error, documents = demo.paired_gain(RunDir("unused", writes=False), None)
    bits = [1 / math.log(2), 0.5 / math.log(2), 2 / math.log(2)]
    mean = sum(bits) / 3
    variance = sum((value - mean) ** 2 for value in bits) / 2
    assert documents == 3
    assert gain == pytest.approx(sum(bits) / 12)
    assert error == pytest.approx(math.sqrt(3 * variance) / 12)


def test_same_seed_same_result(tiny, tmp_path):
    """From random weights to the artifact, on the data set that is there."""
    run_pipeline(tiny.config().replace(run_dir=str(tmp_path), run_id="again"), stages=("train", "quantize"))
    again = RunDir(tmp_path / "again")
    assert again.result()["bpb"]["float"] == tiny.result()["bpb"]["float"]
    assert again.artifact_path.read_bytes() == tiny.artifact_path.read_bytes()


def test_table_shows_the_figures(tiny, capsys):
    demo.print_result(tiny)
    output = capsys.readouterr().out
    for value in (*tiny.result()["bpb"].values(), *tiny.result()["baselines"].values()):
        assert f"{value:.4f}" in output
    assert "report.html" in output


def test_evaluation_that_fails_is_an_error(tiny, tmp_path):
    """The fresh process refuses a damaged artifact; the demo says so."""
    shutil.copytree(tiny.path, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    run.artifact_path.write_bytes(run.artifact_path.read_bytes()[:-1])
    with pytest.raises(PgolfError, match="evaluation ended with exit status 1"):
        demo._evaluate_in_fresh_processes(run, quiet=True)


def test_eval_command_scores_the_artifact_again(tiny, tmp_path):
    """`pgolf eval` on the file alone gives the run's figure, and on data of another tokenizer one clear line."""
    shutil.copy(tiny.artifact_path, tmp_path / "model.pgolf")
    arguments = ["eval", str(tmp_path / "model.pgolf"), "--mode", "plain", "--quiet", "--data"]
    done = CliRunner().invoke(cli, [*arguments, str(tiny.path / "data")])
    assert done.exit_code == 0, done.output
    assert f"{tiny.result()['bpb']['plain']:.5f}" in done.output

    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"quite other text, number {i}"}) + "\n" for i in range(40)))
    from model.data.build import build_dataset

    build_dataset([text], tmp_path / "other", vocab_size=290, quiet=True)
    done = CliRunner().invoke(cli, [*arguments, str(tmp_path / "other")])
    assert isinstance(done.exception, PgolfError)
    assert "its tokenizer (SHA-256" in str(done.exception)


def test_quantize_command_writes_the_artifact_again(tiny, tmp_path):
    shutil.copytree(tiny.path, tmp_path / "run")
    run = RunDir(tmp_path / "run")
    before = run.artifact_path.read_bytes()
    done = CliRunner().invoke(cli, ["quantize", str(run.path), "--matrix-bits", "4", "--mlp-bits", "4"])
    assert done.exit_code == 0, done.output
    assert len(run.artifact_path.read_bytes()) < len(before)


@pytest.fixture
def tiny_demo(small_text, monkeypatch):
    monkeypatch.setattr(demo, "SAMPLE", small_text)
    monkeypatch.setattr(demo, "get_preset", lambda name: get_preset(name).replace(**TINY))


def score_here(run: RunDir, *, quiet: bool) -> None:
    score_artifact(run.path, ["plain", "sliding", "lora-ttt"], quiet=quiet)
    score_artifact(run.path, ["lora-ttt"], label="lora_ttt_lr0", quiet=quiet, ttt_lora_lr=0.0)


def scoring_processes() -> list[bytes]:
    """Command lines of `pgolf eval` among this process's children."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.exists():
        return []
    lines = [Path("/proc", number, "cmdline").read_bytes() for number in children.read_text().split()]
    return [line for line in lines if b"model.cli" in line]


@pytest.mark.parametrize("step", ["1/5", "2/5", "3/5", "4/5", "5/5"])
def test_ctrl_c_at_every_step(step, tiny_demo, tmp_path, monkeypatch, capsys):
    """While the data set is built, training runs, another process scores, brotli or matplotlib work."""
    say = RunDir.say
    delay = {"3/5": 4.0}.get(step, 0.1)  # seconds; the scoring process needs some to start

    def say_and_interrupt(run: RunDir, text: str) -> None:
        say(run, text)
        if text.startswith(step):
            signal.signal(signal.SIGALRM, lambda number, frame: signal.raise_signal(signal.SIGINT))
            signal.setitimer(signal.ITIMER_REAL, delay)

    monkeypatch.setattr(RunDir, "say", say_and_interrupt)
    if step in ("4/5", "5/5"):
        monkeypatch.setattr(demo, "_evaluate_in_fresh_processes", score_here)  # quicker
    gc.disable()  # an exception within a callback of its, such as test libraries have, would be ignored
    try:
        with pytest.raises(SystemExit) as done:
            main(["demo", "--quiet", "--runs", str(tmp_path)])
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert done.value.code == 130
    assert capsys.readouterr().err == "pgolf: stopped by Ctrl-C\n"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tmp", ".old")]
    assert scoring_processes() == []


def test_ctrl_c_as_a_user_presses_it(tmp_path):
    """To the process, at the demo's own size, while it trains."""
    command = [sys.executable, "-m", "model.cli", "demo", "--quiet", "--runs", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/metrics.jsonl")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130
    assert (output, errors) == ("", "pgolf: stopped by Ctrl-C\n")
    assert not list(tmp_path.rglob("*.tmp"))


def test_termination_ends_the_scoring_process_too(tmp_path, small_text):
    """SIGTERM, as a job scheduler sends it: no process and nothing half-written stays."""
    code = (
        "import sys; from model import cli, demo, presets; from tests.test_demo import TINY; from pathlib import Path;"
        "demo.SAMPLE = Path(sys.argv[1]); preset = presets.get_preset;"
        "demo.get_preset = lambda name: preset(name).replace(**TINY);"
        "cli.main(['demo', '--runs', sys.argv[2]])"
    )
    command = [sys.executable, "-c", code, str(small_text), str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("3/5"):
            break
    time.sleep(0.5)
    process.terminate()
    _, errors = process.communicate(timeout=100)  # both pipes are closed: the scoring process has gone, too
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "Traceback" not in errors
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_demo_reaches_its_targets(tmp_path):
    """What the README promises: better than 0.90 of primed xz, and test-time training that learns."""
    command = [sys.executable, "-m", "model.cli", "demo", "--quiet", "--runs", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True)
    (path,) = tmp_path.iterdir()
    result = RunDir(path).result()
    assert result["bpb"]["lora_ttt"] <= 0.90 * result["baselines"]["xz"]
    assert result["ttt_gain"]["bpb"] > 2 * result["ttt_gain"]["standard_error"]
