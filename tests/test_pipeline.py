"""From a configuration to a score, and the public systems' own commands at toy size."""

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from model.artifact import load_model, read_header
from model.cli import cli
from model.config import Config
from model.convert import to_reference
from model.data.dataset import open_dataset
from model.distributed import Dist
from model.errors import ArtifactError, ConfigError, DataError
from model.pipeline import (
    Interrupted,
    _seeded,
    agree_run_id,
    calibration_batches,
    load_weights,
    main,
    run_pipeline,
    train_command,
)
from model.presets import get_preset
from model.run import RunDir
from model.score import PATIENCE_SECONDS
from model.settings import Settings
from model.train import Trainer
from tests.systems import PUBLISHED
from tests.tiny import tiny_config, tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that went through every stage, and its result."""
    config = tiny_config(data, tmp_path_factory.mktemp("runs"), run_id="whole")
    return config, run_pipeline(config)


def folder(config: Config) -> Path:
    return Path(config.train.run_dir) / config.train.run_id


def test_every_stage_leaves_its_result(finished):
    config, result = finished
    assert json.loads((folder(config) / "result.json").read_text()) == result
    assert set(result["bpb"]) == {"float", "plain", "sliding"}
    assert result["val_bpb"] == result["bpb"]["sliding"]
    assert result["val_loss"] == result["evaluation"]["sliding"]["val_loss"]
    assert result["bpb"]["plain"] == pytest.approx(result["bpb"]["float"], rel=0.05)
    assert result["artifact"]["bytes"] == (folder(config) / "model.pgolf").stat().st_size
    assert {"train", "evaluate_float", "quantize", "artifact", "evaluate_plain"} <= set(result["seconds"])
    assert 0 < result["seconds"]["calibrate"] < result["seconds"]["quantize"]
    header = read_header(folder(config) / "model.pgolf")
    assert header.config.model == config.model
    assert header.provenance["seed"] == config.train.seed


def test_stages_can_be_run_one_by_one(finished, data, tmp_path):
    config, whole = finished
    config = config.replace(run_dir=str(tmp_path))
    run_pipeline(config, stages=("train",))
    assert not (folder(config) / "model.pgolf").exists()
    run_pipeline(config, stages=("quantize",))
    assert "sliding" not in RunDir(folder(config)).result()["bpb"]
    result = run_pipeline(config, stages=("evaluate",))
    assert result["bpb"] == whole["bpb"]


def test_evaluations_show_their_progress(data, tmp_path, capsys):
    config = tiny_config(data, tmp_path)
    run_pipeline(config)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines if line.endswith(" bpb")] == [
        "evaluating float",
        "evaluating plain",
        "evaluating sliding",
    ]
    run_pipeline(config, stages=("quantize", "evaluate"), quiet=True)
    assert capsys.readouterr().err == ""


def test_ranks_wait_longer_for_each_other_after_training(data, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(Dist, "set_timeout", lambda self, seconds: waits.append(seconds))
    run_pipeline(tiny_config(data, tmp_path, timeout_seconds=60.0), stages=("train",))
    assert waits == [60.0, PATIENCE_SECONDS]
    run_pipeline(tiny_config(data, tmp_path, timeout_seconds=9000.0), stages=("quantize",))
    assert waits[2:] == [9000.0]


def test_a_finished_run_is_not_overwritten(finished):
    with pytest.raises(ConfigError, match="holds a trained run already, wanted another run_id or --resume"):
        run_pipeline(finished[0])


def test_unknown_stages_are_refused(finished):
    with pytest.raises(ConfigError, match="stages: got pack"):
        run_pipeline(finished[0], stages=("pack",))


def test_interrupted_training_ends_the_pipeline(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path)
    one_step = Trainer._one_step

    def interrupted_step(self, settings, elapsed):
        os.kill(os.getpid(), 15)
        one_step(self, settings, elapsed)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", interrupted_step)
        with pytest.raises(Interrupted, match="signal 15; --run-id tiny --resume goes on") as raised:
            run_pipeline(config)
    assert raised.value.number == 15
    result = run_pipeline(config, resume=True)
    assert result["train"]["steps"] == 6
    assert result["val_bpb"] > 0


def test_finished_training_is_not_run_again(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path)
    run_pipeline(config, stages=("train",))
    before = (folder(config) / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", lambda *_: pytest.fail("trained again"))
        result = run_pipeline(config, resume=True)
    assert (folder(config) / "model.safetensors").read_bytes() == before
    assert "training is finished" in (folder(config) / "log.txt").read_text()
    assert result["val_bpb"] > 0 and result["train"]["steps"] == 6
    run_pipeline(config.replace(max_wallclock_seconds=99.0), stages=("train",), resume=True)
    assert (folder(config) / "log.txt").read_text().count("trained 6 steps") == 2


def test_a_new_artifact_has_no_scores_of_the_old_one(data, tmp_path):
    config = tiny_config(data, tmp_path)
    run_pipeline(config)
    (folder(config) / "verify_plain.json").write_text("{}")
    result = run_pipeline(config.replace(matrix_bits=3), stages=("quantize",))
    assert set(result["bpb"]) == set(result["evaluation"]) == {"float"}
    assert not {"val_bpb", "val_loss"} & set(result)
    assert not [name for name in result["seconds"] if name.startswith("evaluate_") and name != "evaluate_float"]
    assert not [*folder(config).glob("ledger_*.npz"), *folder(config).glob("verify_*.json")]


def test_quantising_the_folder_one_is_in(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path)
    run_pipeline(config, stages=("train",))
    monkeypatch.chdir(folder(config))
    done = CliRunner().invoke(cli, ["quantize", "."])
    assert done.exit_code == 0, done.output
    assert (folder(config) / "model.pgolf").is_file()
    assert not [path.name for path in folder(config).iterdir() if path.is_dir() and path.name != "checkpoints"]


def test_an_attempt_without_a_checkpoint_leaves_no_metrics(data, tmp_path):
    config = tiny_config(data, tmp_path)
    run_pipeline(config, stages=("train",))
    (folder(config) / "model.safetensors").unlink()
    with open(folder(config) / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    run_pipeline(config, stages=("train",), resume=True)
    assert [record["step"] for record in RunDir(folder(config)).metrics() if "loss" in record] == [1, 2, 3, 4, 5, 6]


def test_resuming_needs_a_name(monkeypatch, capsys, data):
    monkeypatch.setattr("sys.argv", ["train", "--preset", "demo", "--data-dir", str(data), "--resume"])
    with pytest.raises(SystemExit):
        main()
    assert "resume: got no run_id, wanted --run-id NAME" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["run", "safetensors", "checkpoint", "public", "public-banked"])
def test_weights_from_every_source(finished, data, tmp_path, form):
    config, _ = finished
    model = load_weights(folder(config), config, torch.device("cpu"))
    if form == "run":
        path = folder(config)
    elif form == "safetensors":
        path = folder(config) / "model.safetensors"
    elif form == "checkpoint":
        again = config.replace(run_dir=str(tmp_path), checkpoint_every=6)
        run_pipeline(again, stages=("train",))
        path = folder(again) / "checkpoints" / "step_00000006"
    else:
        path = tmp_path / "final_model.pt"
        torch.save(to_reference(model.state_dict(), config.model, banked=form == "public-banked"), path)
    loaded = load_weights(path, config, torch.device("cpu"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


class _Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_public_file_executes_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(ArtifactError, match=r"evil\.pt: no state dict of tensors"):
        load_weights(tmp_path / "evil.pt", finished[0], torch.device("cpu"))
    assert not (tmp_path / "executed").exists()


def test_weights_that_do_not_fit_are_refused(finished, tmp_path):
    config, _ = finished
    with pytest.raises(ArtifactError, match="shape"):
        load_weights(folder(config), config.replace(model_dim=16), torch.device("cpu"))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"bad\.safetensors: cannot be read"):
        load_weights(tmp_path / "bad.safetensors", config, torch.device("cpu"))


def test_calibration_draws_other_windows_on_every_rank(data):
    config = tiny_config(data, Path("unused"), calibration_batches=3)
    dataset = open_dataset(data)
    batches = [list(calibration_batches(config, dataset, Dist(r, 2, r, torch.device("cpu")))) for r in range(2)]
    assert [len(b) for b in batches] == [3, 3]
    assert batches[0][0].inputs.shape == (4, 64)
    assert not torch.equal(batches[0][0].inputs, batches[1][0].inputs)
    many = list(calibration_batches(config, dataset, Dist(7, 8, 7, torch.device("cpu"))))  # two shards only
    assert torch.equal(many[0].inputs, next(calibration_batches(config, dataset, Dist.single())).inputs)


def test_a_rerun_loop_that_training_never_reached_is_left_out(data, tmp_path):
    config = tiny_config(
        data, tmp_path, loop_form="rerun", loop_start_step=1000, enable_looping_at=1.0, skip_form="additive",
        parallel_lanes=1, eval_mode="plain",
    )  # fmt: skip
    result = run_pipeline(config)
    assert result["trained_with_loop"] is False
    assert load_model(folder(config) / "model.pgolf").config.num_loops == 0
    assert result["bpb"]["plain"] == pytest.approx(result["bpb"]["float"], rel=0.05)


def test_run_ids(monkeypatch):
    config = tiny_config(Path("d"), Path("r"), run_id="", seed=3)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0123456789abcdef")
    assert agree_run_id(config, Dist.single()) == "demo-seed3-01234567"  # the same after a restart
    assert agree_run_id(config.replace(run_id="mine"), Dist.single()) == "mine"


# Sizes that a CPU can do.
TOY = {
    "VOCAB_SIZE": "512",
    "MODEL_DIM": "32",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "ROPE_DIMS": "8",
    "MLP_MULT": "2",
    "TRAIN_SEQ_LEN": "64",
    "EVAL_SEQ_LEN": "64",
    "TTT_EVAL_SEQ_LEN": "64",
    "TTT_BATCH_SIZE": "8",
    "TTT_LORA_RANK": "2",
    "TTT_CHUNK_TOKENS": "256",
    "NGRAM_OPEN_TABLE_BITS": "12",
    "TRAIN_BATCH_TOKENS": "512",
    "ITERATIONS": "2",
    "MAX_WALLCLOCK_SECONDS": "0",
    "WARMUP_STEPS": "1",
    "VAL_LOSS_EVERY": "0",
    "GPTQ_CALIBRATION_BATCHES": "1",
    "BIGRAM_VOCAB_SIZE": "0",
    "SEED": "5",
}
MODES = {
    "pr1413": "sgd_ttt",
    "pr1499": "plain",
    "pr1514": "sgd_ttt_ngram_tilt",
    "pr1530": "lora_ttt",
    "pr1727": "phased",
}


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("small"), documents=60)


@pytest.mark.parametrize("system", PUBLISHED)
def test_published_commands(system, small_data, tmp_path):
    environ = {**TOY, **PUBLISHED[system], "DATA_DIR": str(small_data), "ARTIFACT_DIR": str(tmp_path), "RUN_ID": "it"}
    if system == "pr1499":
        environ |= {"BIGRAM_VOCAB_SIZE": "64", "BIGRAM_DIM": "8", "EVAL_STRIDE": "0"}
    arguments = ["--preset", system, "--device", "cpu", "--calibration-tokens", "256"]
    done = CliRunner().invoke(train_command, arguments, env=environ, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "it" / "result.json").read_text())
    assert result["val_bpb"] == result["bpb"][MODES[system]]
    assert f"val_loss: {result['val_loss']:.8f}  val_bpb: {result['val_bpb']:.8f}" in done.output
    assert f"artifact: {result['artifact']['bytes']:,} bytes" in done.output
    assert "environment: SEED -> seed=5" in done.output
    assert all(f"environment: {name} -> " in done.output for name in PUBLISHED[system])
    times = done.output.rpartition("\nseconds: ")[2]
    assert all(f"{stage} " in times for stage in ("train", "quantize", "artifact", f"evaluate_{MODES[system]}"))
    stored = RunDir(tmp_path / "it").config()
    assert stored.preset == system
    assert stored.model.num_layers == 11


def test_eval_only_path_skips_training(finished, data, tmp_path):
    config, whole = finished
    flags = []
    for name, value in ((name, value) for section, name, value in config.items() if section != "data"):
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
        elif not isinstance(value, tuple):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    flags += ["--run-dir", str(tmp_path), "--train-seq-len", "64", "--cu-bucket-size", "16"]
    environ = {"EVAL_ONLY_PATH": str(folder(config) / "model.safetensors"), "DATA_DIR": str(data)}
    done = CliRunner().invoke(train_command, ["--preset", "demo", "--device", "cpu", *flags], env=environ)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert "train" not in result
    assert result["bpb"] == whole["bpb"]


def test_seeds_are_run_in_turn():
    settings = Settings(get_preset("demo"))
    assert [c.train.seed for c in _seeded(settings, None)] == [settings.config.train.seed]
    runs = _seeded(Settings(get_preset("demo").replace(run_id="x")), "42,0")
    assert [(c.train.seed, c.train.run_id) for c in runs] == [(42, "x-seed42"), (0, "x-seed0")]


def run_main(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["model.train", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    return raised.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data-dir", "nowhere"), "model.train: nowhere: no such folder"),
        (("--preset", "pr9"), "pr9"),
        (("--seeds", "1,x"), "seeds: got '1,x', wanted integers"),
        (("--reserve-seconds", "700"), "reserve_seconds: got 700"),
        (("--eval-mode", "phazed"), "eval_mode: got 'phazed', wanted one of plain"),
        (("--matrix-lr", "-1"), "matrix_lr: got -1.0, wanted at least 0"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, data, tmp_path, arguments, message):
    defaults = ("--preset", "pr1530", "--data-dir", str(data), "--device", "cpu", "--run-dir", str(tmp_path))
    status, text = run_main(monkeypatch, capsys, *defaults, *arguments)
    assert status != 0
    assert message in text
    assert "Traceback" not in text


def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_written(data, tmp_path):
    with pytest.raises(DataError, match="512 pieces"):
        run_pipeline(tiny_config(data, tmp_path, vocab_size=128))
    assert not (tmp_path / "tiny" / "config.json").exists()
