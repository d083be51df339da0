"""Out of memory: every stage says which one it is and which flag to set lower."""

import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from model import cli, pipeline
from model.config import Config
from model.data.dataset import Dataset, dataset_of
from model.errors import DeviceMemoryError
from model.evaluate import MODES, evaluate
from model.gpt import GPT
from model.memory import lower, memory_for
from model.pipeline import run_pipeline
from tests.tiny import tiny_config, tiny_data

REASON = "CUDA out of memory. Tried to allocate 3 GiB"


def fail(*args: Any, **kwargs: Any) -> NoReturn:
    raise torch.OutOfMemoryError(f"{REASON}\nand more lines")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny_config(data, tmp_path_factory.mktemp("runs"), iterations=1, warmup_steps=0, eval_mode="plain")
    run_pipeline(config, stages=("train", "quantize"))
    return config


@pytest.fixture(scope="module")
def dataset(data: Path) -> Dataset:
    return dataset_of(tiny_config(data, data))


def test_stage_detail_advice_and_reason() -> None:
    with (
        pytest.raises(DeviceMemoryError) as caught,
        memory_for("in a step", "cpu", lambda: lower("ttt_batch_size", 9, 2), detail="of 9"),
    ):
        fail()
    wanted = "out of memory on cpu in a step of 9; --ttt-batch-size 4 in place of 9 needs less"
    assert str(caught.value) == f"{wanted} ({REASON})"


def test_what_is_in_use_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 4 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * 2**29)
    with pytest.raises(DeviceMemoryError, match=r"; 2\.50 GiB in use here, 1\.00 of 4\.00 GiB free \(CUDA"):  # noqa: SIM117
        with memory_for("there", "cuda:0"):
            fail()


def test_nothing_that_could_be_lower() -> None:
    assert lower("ttt_batch_size", 1) == "" and lower("calibration_tokens", 2048, 2048) == ""
    for advice in (None, lambda: lower("ttt_batch_size", 1)):
        with (
            pytest.raises(DeviceMemoryError, match="no setting of this stage needs less"),
            memory_for("", "cpu", advice),
        ):
            fail()


def test_an_error_that_follows_from_it() -> None:
    """A CUDA graph whose recording ran out of memory cannot be ended."""
    with pytest.raises(DeviceMemoryError, match="Tried to allocate"), memory_for("while recording", "cpu"):
        try:
            fail()
        finally:
            raise RuntimeError("capture failed")


def test_the_innermost_stage_is_named_and_other_errors_pass() -> None:
    with pytest.raises(DeviceMemoryError, match="inside"), memory_for("outside", "cpu"), memory_for("inside", "cpu"):
        fail()
    with pytest.raises(RuntimeError, match="shapes"), memory_for("outside", "cpu"):
        raise RuntimeError("shapes")


MICRO_BATCHES = r"with 128 tokens a micro-batch; --micro-batches 4 makes them fewer"


@pytest.mark.parametrize(
    ("place", "changes", "message"),
    [
        ("model.train.Optimizer", {}, "while building the network and its optimiser; --model-dim 16 in place of 32"),
        ("model.train.Trainer._record", {}, f"while recording micro-steps {MICRO_BATCHES}"),
        ("model.train.Trainer.train_step", {}, f"in the warm-up {MICRO_BATCHES}"),
        ("model.train.Trainer.train_step", {"warmup_steps": 0}, f"in a training step {MICRO_BATCHES}"),
        ("model.train.Trainer.train_step", {"micro_batches": 4, "loader": "stream"}, "64 tokens .*; no setting of"),
        ("model.evaluate.run_mode", {"val_loss_every": 1}, r"while evaluating \(plain\); --eval-batch-seqs 16"),
        ("model.pipeline.collect_hessians", {}, "while collecting Hessians; --calibration-tokens 128 in place of 256"),
        ("model.pipeline.quantize_with_hessians", {}, "in GPTQ; no setting of this stage needs less"),
    ],
)
def test_training_and_quantising(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(place, fail)
    with pytest.raises(DeviceMemoryError, match=message):
        run_pipeline(tiny_config(data, tmp_path, **changes), stages=("train", "quantize"))


SETTINGS = {
    "plain": "--eval-batch-seqs 16 in place of 32",
    "sliding": "--eval-batch-seqs 16 in place of 32",
    "sgd-ttt": "--sgd-ttt-batch-seqs 16 in place of 32",
    "lora-ttt": "--ttt-batch-size 2 in place of 4",
    "phased": "--ttt-batch-size 2 in place of 4",
    "sliding-cache": "--eval-batch-seqs 16 in place of 32",
}


@pytest.mark.parametrize("mode", MODES)
def test_evaluating(data: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    config = tiny_config(data, data)
    model = GPT(config.model)
    monkeypatch.setattr(GPT, "loss", fail)
    with pytest.raises(DeviceMemoryError) as caught:
        evaluate(model, dataset, mode, config, device="cpu")
    assert f"while evaluating ({mode}); {SETTINGS[mode]} needs less" in str(caught.value)
    assert all(parameter.requires_grad for parameter in model.parameters())  # as it came


def test_between_phases(data: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(data, data, phased_num_phases=2, phased_prefix_docs=4, global_ttt_chunk_tokens=64)
    monkeypatch.setattr("model.evaluate.phased_ttt.WholeModelSGD.step", fail)
    with pytest.raises(DeviceMemoryError, match=r"between phases; --global-ttt-batch-seqs 16 in place of 32"):
        evaluate(GPT(config.model), dataset, "phased", config, device="cpu")


@pytest.mark.parametrize(
    ("command", "place", "message"),
    [
        (["eval"], "model.evaluate.run_mode", "while evaluating (plain); --eval-batch-seqs 16 in place of 32"),
        (["eval"], "model.gpt.GPT.load_state_dict", "while loading the network; no setting"),
        (["quantize"], "model.pipeline.collect_hessians", "while collecting Hessians; --calibration-tokens 128"),
    ],
)
def test_commands_say_it_in_one_line(
    trained: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    place: str,
    message: str,
) -> None:
    monkeypatch.setattr(place, fail)
    with pytest.raises(SystemExit) as left:
        cli.main([*command, str(Path(trained.train.run_dir) / trained.train.run_id)])
    errors = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 1
    assert errors[-1].startswith(f"pgolf: out of memory on cpu {message}")
    assert not any("Traceback" in line for line in errors)


def test_the_training_command_says_it_too(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--preset", "demo", "--data-dir", trained.data.data_dir, "--run-dir", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["model.train", *arguments])
    monkeypatch.setattr("model.train.Optimizer", fail)
    with pytest.raises(SystemExit) as left:
        pipeline.main()
    errors = capsys.readouterr().err
    assert left.value.code == 1 and "Traceback" not in errors
    assert "out of memory on cpu while building the network and its optimiser; --model-dim" in errors
