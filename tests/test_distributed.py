"""Several processes: agreement, errors on every rank, and the same weights as one process with the same batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from model import schedule
from model.checkpoint import list_checkpoints, load_checkpoint
from model.data.dataset import open_dataset
from model.data.loaders import DocumentLoader
from model.distributed import Dist, distributed
from model.errors import TrainError
from model.run import RunDir
from model.train import Trainer, train
from tests.tiny import tiny_config, tiny_data

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny"))


def torchrun(*arguments: object, processes: int = 2, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [f"--max-restarts={restarts}", "-m", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=240)


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-4000:]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and optimiser state after the last step."""
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).tensors


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        error = (tensor.double() - other[name].double()).norm() / tensor.double().norm().clamp_min(1e-6)
        assert error < tolerance, (name, error.item())


def test_ranks_agree_and_fail_together(tmp_path):
    check(torchrun("tests.distributed_worker", "agreement", tmp_path))


def clipped_alone(config, dataset) -> dict[str, torch.Tensor]:
    """Two ranks in one process: each clips the gradient of its own micro-batch, the optimiser sees their mean."""
    trainer = Trainer(config.replace(grad_clip_norm=0.0), dataset, RunDir(config.train.run_dir), Dist.single())
    loaders = [
        DocumentLoader(
            dataset.train_shards,
            tokens=128,
            seq_len=64,
            vocab_size=512,
            rank=rank,
            world_size=2,
            bucket_size=16,
            prefetch=0,
        )
        for rank in range(2)
    ]
    params = trainer.params
    for step in range(config.train.iterations):
        settings = schedule.settings_at(config.train, step, 0.0, has_loop=True)
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for loader in loaders:
            batch = loader.next_batch()
            loss = trainer.model.loss(
                batch.inputs, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=64, loop=settings.loop
            )
            loss.backward()
            nn.utils.clip_grad_norm_(params.values(), config.train.grad_clip_norm)
            for name, param in params.items():
                total[name] += param.grad / 2
            trainer.optimizer.zero_grad()
        for name, param in params.items():
            param.grad = total[name]
        trainer.optimizer.step(settings.lr_scale, settings.muon_momentum)
    trainer.close()
    return {name: p.detach().clone() for name, p in params.items()}


def test_two_processes_train_as_one(data, tmp_path):
    dataset = open_dataset(data)
    base = tiny_config(data, tmp_path, checkpoint_every=6, warmup_steps=0, grad_clip_norm=0.05)
    for clip in ("global", "per_rank"):
        (tmp_path / f"{clip}.json").write_text(json.dumps(base.replace(grad_clip=clip).to_dict()))
    check(torchrun("tests.distributed_worker", "weights", tmp_path))

    alone = tmp_path / "alone"
    train(base.replace(grad_clip="global"), dataset, RunDir(alone), Dist.single())
    assert_same(final_state(alone), final_state(tmp_path / "global"), 2e-4)

    emulated = clipped_alone(base, dataset)
    state = final_state(tmp_path / "per_rank")
    trained = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
    assert_same(emulated, trained, 2e-4)
    # The two ways of clipping are told apart.
    with pytest.raises(AssertionError):
        assert_same(emulated, {n: final_state(alone)[f"model.{n}"] for n in emulated}, 2e-4)


@pytest.mark.long
def test_a_killed_worker_is_replaced_and_training_goes_on(data, tmp_path):
    config = tiny_config(data, tmp_path, checkpoint_every=2, warmup_steps=0)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    # One restart is wanted; more are allowed, since gloo now and then refuses to meet again on a busy machine.
    done = torchrun("tests.distributed_worker", "killed", tmp_path, restarts=5)
    check(done)
    assert "resumed after step 2" in done.stdout
    steps = [record["step"] for record in RunDir(tmp_path / "run").metrics()]
    assert steps == [1, 2, 3, 4, 5, 6]

    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "a.json").write_text(json.dumps(config.to_dict()))
    check(torchrun("tests.distributed_worker", "weights", tmp_path / "whole"))
    one, other = final_state(tmp_path / "run"), final_state(tmp_path / "whole" / "a")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_a_shard_missing_on_one_rank_ends_all_of_them(data, tmp_path):
    config = tiny_config(data, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    done = torchrun("tests.distributed_worker", "missing", tmp_path)
    assert done.returncode != 0
    assert "rank 0: opening the training data: rank 1 failed: " in done.stderr
    assert "gone.bin" in done.stderr


@pytest.mark.long
def test_a_batch_that_does_not_divide_is_refused_by_every_rank(data, tmp_path):
    done = torchrun(
        "model.train", "--preset", "demo", "--data-dir", data, "--run-dir", tmp_path, "--vocab-size", "512",
        "--micro-batches", "1", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode != 0
    for rank in (0, 1):
        assert f"model.train (rank {rank}): micro_batches: got 1 for 2 ranks" in done.stderr


def test_a_world_of_one():
    ranks = Dist.single()
    assert ranks.is_main
    assert ranks.agree_max(3.0, 4.0) == (3.0, 4.0)
    assert ranks.gather_json({"a": 1}) == [{"a": 1}]
    with pytest.raises(OSError), ranks.together("x"):
        raise OSError("as it is")


def test_cuda_without_a_gpu_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TrainError, match="sees no GPU"), distributed("cuda"):
        pass
