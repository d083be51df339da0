"""Checkpoints: atomic, checked, pruned; and a resumed run equal to one that was never interrupted."""

import json
import os

import pytest
import torch

from model import schedule
from model.checkpoint import latest_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from model.data.dataset import open_dataset
from model.distributed import Dist
from model.errors import ArtifactError, ConfigError
from model.run import RunDir
from model.train import Trainer, train
from tests.tiny import tiny_config, tiny_data

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.bfloat16)}


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, 7, TENSORS, {"seconds": 1.5, "nested": {"x": [1, 2]}}, keep=2)
    checkpoint = load_checkpoint(path)
    assert checkpoint.step == 7
    assert checkpoint.state == {"seconds": 1.5, "nested": {"x": [1, 2]}}
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in TENSORS.items())
    assert checkpoint.tensors["b"].dtype == torch.bfloat16


def test_old_ones_are_pruned_and_nothing_else_is_left(tmp_path):
    for step in (1, 5, 20, 100):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000020", "step_00000100"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    for name in (".step_00000007.0a1b2c3d.tmp", ".step_00000005.0a1b2c3d.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors.safetensors").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == (None, [])
    save_checkpoint(tmp_path, 8, TENSORS, {}, keep=2)
    assert os.listdir(tmp_path) == ["step_00000008"]


@pytest.mark.parametrize("loader", ["documents", "stream"])
def test_another_number_of_ranks_can_go_on(data, tmp_path, loader):
    """Here the state that two ranks would have written; tests/test_distributed.py has real ones."""
    trainer = saved_by_two(data, tmp_path, loader)
    trainer.resume()
    assert trainer.step == 3
    assert trainer.loader.state_dict()["position"]["token"] > 0
    trainer.close()


def test_another_number_of_ranks_is_refused_where_each_has_its_own_order(data, tmp_path):
    trainer = saved_by_two(data, tmp_path, "shuffled")
    with pytest.raises(ArtifactError, match=r"step_00000003: written by 2 ranks.*--loader shuffled.*again; got 1"):
        trainer.resume()
    assert trainer.step == 0
    trainer.close()


def saved_by_two(data, tmp_path, loader):
    config = tiny_config(data, tmp_path, loader=loader, warmup_steps=0)
    trainer = Trainer(config, open_dataset(data), run_of(config), Dist.single())
    trainer._start_clock()
    for _ in range(3):
        trainer._one_step(schedule.settings_at(config.train, trainer.step, 0.0, has_loop=True), 0.0)
    checkpoint = load_checkpoint(trainer.save())
    trainer.close()
    state = {**checkpoint.state, "ranks": checkpoint.state["ranks"] * 2}
    save_checkpoint(checkpoint.path.parent, checkpoint.step, checkpoint.tensors, state, keep=1)
    return Trainer(config, open_dataset(data), run_of(config), Dist.single())


def test_the_latest_whole_one_is_taken(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, TENSORS, {}, keep=3)
    damaged = tmp_path / "step_00000003" / "tensors.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    checkpoint, problems = latest_checkpoint(tmp_path)
    assert checkpoint.step == 2
    assert len(problems) == 1
    assert "damaged" in problems[0]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 99, "step": 1, "sha256": "", "state": {}}'])
def test_a_bad_state_file_is_refused(tmp_path, content):
    path = save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)
    (path / "state.json").write_text(content)
    with pytest.raises(ArtifactError, match="step_00000001"):
        load_checkpoint(path)
    assert latest_checkpoint(tmp_path)[0] is None


def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, TENSORS, {}, keep=1)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.checkpoint.save_file", fail)
    with pytest.raises(Exception, match="space"):
        save_checkpoint(tmp_path, 2, TENSORS, {}, keep=1)
    assert os.listdir(tmp_path) == ["step_00000001"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny"))


def run_of(config, name="run"):
    return RunDir(f"{config.train.run_dir}/{name}")


@pytest.mark.parametrize("loader", ["documents", "shuffled", "stream"])
def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path, loader):
    dataset = open_dataset(data)
    config = tiny_config(data, tmp_path, loader=loader)
    whole = train(config, dataset, run_of(config, "whole"), Dist.single())

    # Three steps, a checkpoint, and a process that forgets everything: even its random state.
    interrupted = Trainer(config, dataset, run_of(config), Dist.single())
    interrupted.prepare()
    interrupted._start_clock()
    for _ in range(3):
        settings = schedule.settings_at(config.train, interrupted.step, 0.0, has_loop=True)
        interrupted._one_step(settings, 0.0)
    interrupted.save()
    interrupted.close()
    torch.manual_seed(999)
    resumed = train(config, dataset, run_of(config), Dist.single(), resume=True)

    assert resumed.step == whole.step == 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    losses = [[r["loss"] for r in run_of(config, name).metrics() if "loss" in r] for name in ("whole", "run")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_checkpoints_are_written_while_training(data, tmp_path):
    config = tiny_config(data, tmp_path, checkpoint_every=2, keep_checkpoints=2)
    train(config, open_dataset(data), run_of(config), Dist.single())
    assert [path.name for path in list_checkpoints(run_of(config).checkpoints)] == ["step_00000004", "step_00000006"]


def test_elapsed_time_goes_on(data, tmp_path):
    config = tiny_config(data, tmp_path, max_wallclock_seconds=1000.0, reserve_seconds=0.0)
    dataset = open_dataset(data)
    first = Trainer(config, dataset, run_of(config), Dist.single())
    first.seconds = 123.0
    first._start_clock()
    first.save()
    first.close()
    second = Trainer(config, dataset, run_of(config), Dist.single())
    second.resume()
    second._start_clock()
    assert 123.0 < second._elapsed() < 140.0
    second.close()


def test_resume_without_a_checkpoint_starts_anew(data, tmp_path):
    config = tiny_config(data, tmp_path, iterations=1)
    assert train(config, open_dataset(data), run_of(config), Dist.single(), resume=True).step == 1


def test_a_run_with_other_settings_is_not_continued(data, tmp_path):
    config = tiny_config(data, tmp_path)
    run = run_of(config)
    run.start(config, "hash")
    run.start(config.replace(train_log_every=1, ttt_lora_lr=0.5), "hash")  # neither changes a training step
    with pytest.raises(ConfigError, match=r"matrix_lr: 0.022 -> 0.5"):
        run.start(config.replace(matrix_lr=0.5), "hash")


def test_metrics_after_the_checkpoint_are_forgotten(tmp_path):
    run = RunDir(tmp_path)
    run.append_metrics([{"step": n, "loss": 1.0} for n in range(1, 6)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a line that a kill cut off
    run.forget_metrics_after(3)
    assert [record["step"] for record in run.metrics()] == [1, 2, 3]


def test_results_are_merged(tmp_path):
    run = RunDir(tmp_path)
    run.merge_result({"seconds": {"train": 1.0}, "bpb": {"plain": 2.0}})
    run.merge_result({"seconds": {"quantize": 3.0}})
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "seconds": {"train": 1.0, "quantize": 3.0},
        "bpb": {"plain": 2.0},
    }


def test_only_the_main_process_writes(tmp_path):
    run = RunDir(tmp_path / "other", writes=False)
    run.append_metrics([{"step": 1}])
    run.merge_result({"a": 1})
    run.say("nothing")
    assert not (tmp_path / "other").exists()
