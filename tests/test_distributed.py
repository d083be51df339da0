"""Several processes: agreement, errors on every rank, and the same weights as one process with the same batch."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from model import schedule
from model.checkpoint import list_checkpoints, load_checkpoint
from model.config import Config
from model.data.dataset import open_dataset
from model.distributed import Dist, distributed
from model.errors import TrainError
from model.presets import get_preset, preset_names
from model.run import RunDir
from model.train import Trainer, make_loader, train
from tests.tiny import tiny_config, tiny_data

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny"))


def torchrun(*arguments: object, processes: int = 2, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}", "-m", *map(str, arguments)]
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


def emulated(config, dataset, world: int) -> dict[str, torch.Tensor]:
    """The weights after `world` ranks' training, in one process: each rank's loader, gradients and clipping."""
    per_rank = config.train.grad_clip == "per_rank"
    alone = config.replace(grad_clip_norm=0.0 if per_rank else config.train.grad_clip_norm)
    trainer = Trainer(alone, dataset, RunDir(config.train.run_dir), Dist.single())
    trainer.loader.close()
    loaders = [make_loader(config, dataset, Dist(rank, world, rank, torch.device("cpu"))) for rank in range(world)]
    model, params, accumulate = trainer.model, trainer.params, config.train.micro_batches // world
    for step in range(config.train.iterations):
        settings = schedule.settings_at(config.train, step, 0.0, has_loop=True)
        model.late_qat = settings.late_qat
        mean = {name: torch.zeros_like(p) for name, p in params.items()}
        for loader in loaders:
            for _ in range(accumulate):
                batch = loader.next_batch()
                options = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
                loss = model.loss(batch.inputs, batch.targets, loop=settings.loop, **options)
                (loss / accumulate).backward()
            if per_rank:
                nn.utils.clip_grad_norm_(params.values(), config.train.grad_clip_norm)
            for name, param in params.items():
                mean[name] += param.grad / world
            trainer.optimizer.zero_grad()
        for name, param in params.items():
            param.grad = mean[name]
        trainer.optimizer.step(settings.lr_scale, settings.muon_momentum)
    for loader in loaders:
        loader.close()
    return {name: p.detach().clone() for name, p in params.items()}


def weights_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}


def write_config(folder: Path, name: str, config: Config) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config.to_dict()))


def test_two_processes_train_as_one(data, tmp_path):
    """Both ways of clipping; and a checkpoint of one process goes on in two, one of two in one."""
    dataset = open_dataset(data)
    base = tiny_config(data, tmp_path, checkpoint_every=3, warmup_steps=0, grad_clip_norm=0.05)
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    train(base.replace(grad_clip="global"), dataset, RunDir(alone), Dist.single())
    for name in ("global", "per_rank", "from_one"):
        write_config(pair, name, base.replace(grad_clip="per_rank" if name == "per_rank" else "global"))
    shutil.copytree(alone / "checkpoints/step_00000003", pair / "from_one/checkpoints/step_00000003")
    check(torchrun("tests.distributed_worker", "weights", pair))
    one, two = final_state(alone), {name: final_state(pair / name) for name in ("global", "per_rank", "from_one")}
    assert_same(one, two["global"], 2e-4)
    assert_same(one, two["from_one"], 2e-4)
    assert [r["step"] for r in RunDir(pair / "from_one").metrics() if "loss" in r] == [4, 5, 6]

    shutil.copytree(pair / "global/checkpoints/step_00000003", tmp_path / "from_two/checkpoints/step_00000003")
    train(base.replace(grad_clip="global"), dataset, RunDir(tmp_path / "from_two"), Dist.single(), resume=True)
    assert_same(one, final_state(tmp_path / "from_two"), 2e-4)

    expected = emulated(base, dataset, 2)
    assert_same(expected, weights_of(two["per_rank"]), 2e-4)
    with pytest.raises(AssertionError):  # the two ways of clipping are told apart
        assert_same(expected, weights_of(one), 2e-4)


def toy(name: str, data: Path, run_dir: Path, **changes: object) -> Config:
    """A preset with its own optimiser, loader, clipping and parts of the network, at a size for tests."""
    config = get_preset(name).replace(
        data_dir=str(data), run_dir=str(run_dir), vocab_size=512, model_dim=32, num_heads=2, num_kv_heads=1,
        rope_dims=8, mlp_mult=2.0, train_seq_len=64, rope_train_seq_len=64, cu_bucket_size=16, train_batch_tokens=512,
        micro_batches=4, iterations=4, max_wallclock_seconds=0.0, enable_looping_at=0.5, warmup_steps=1,
        val_loss_every=0, dtype="float32", timeout_seconds=60.0, checkpoint_every=4, grad_clip_norm=0.1,
    )  # fmt: skip
    if name == "pr1499":
        config = config.replace(bigram_vocab_size=64, bigram_dim=8, loop_start_step=2, warmdown_iters=4)
    return config.replace(**changes)


@pytest.mark.long
def test_every_preset_trains_alike_on_two_processes(data, tmp_path):
    dataset = open_dataset(data)
    names = [name for name in preset_names() if name != "demo"]
    configs = {name: toy(name, data, tmp_path) for name in names}
    assert {config.data.loader for config in configs.values()} == {"documents", "shuffled", "stream"}
    assert {config.train.grad_clip for config in configs.values()} == {"global", "per_rank"}
    for name, config in configs.items():
        write_config(tmp_path / "pair", name, config)
    check(torchrun("tests.distributed_worker", "weights", tmp_path / "pair"))
    for name, config in configs.items():
        assert_same(emulated(config, dataset, 2), weights_of(final_state(tmp_path / "pair" / name)), 2e-4)


@pytest.mark.long
def test_four_processes_train_alike(data, tmp_path):
    """More ranks than some banks have matrices' shares: padding is exchanged too."""
    config = toy("pr1727", data, tmp_path)
    write_config(tmp_path / "four", "pr1727", config)
    check(torchrun("tests.distributed_worker", "weights", tmp_path / "four", processes=4))
    trained = weights_of(final_state(tmp_path / "four" / "pr1727"))
    assert_same(emulated(config, open_dataset(data), 4), trained, 2e-4)


@pytest.mark.long
def test_a_killed_worker_is_replaced_and_training_goes_on(data, tmp_path):
    config = tiny_config(data, tmp_path, checkpoint_every=2, warmup_steps=0)
    write_config(tmp_path, "config", config)
    done = torchrun("tests.distributed_worker", "killed", tmp_path, restarts=2)
    check(done)
    assert "resumed after step 2" in done.stdout
    assert "rank 0: another rank ended without a word" in done.stderr
    steps = [record["step"] for record in RunDir(tmp_path / "run").metrics() if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]

    write_config(tmp_path / "whole", "a", config)
    check(torchrun("tests.distributed_worker", "weights", tmp_path / "whole"))
    one, other = final_state(tmp_path / "run"), final_state(tmp_path / "whole" / "a")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.long
def test_errors_end_training_on_every_rank(data, tmp_path):
    """All in one pair of processes: none of these failures leaves a rank waiting for the other."""
    config = tiny_config(data, tmp_path, warmup_steps=0)
    write_config(tmp_path, "config", config)
    with_shuffled = config.replace(loader="shuffled", checkpoint_every=6)
    train(with_shuffled, open_dataset(data), RunDir(tmp_path / "other_ranks"), Dist.single())
    train(config.replace(checkpoint_every=6), open_dataset(data), RunDir(tmp_path / "folders"), Dist.single())
    check(torchrun("tests.distributed_worker", "everywhere", tmp_path))
    outcomes = [json.loads((tmp_path / f"outcomes.{rank}").read_text()) for rank in range(2)]
    both = {
        "tokenizer": "its tokenizer has 512 pieces, wanted at most vocab_size=256",
        "division": "micro_batches: got 1 for 2 ranks, wanted a multiple of the ranks",
        "not finite": "step 3: loss nan",
        "signal": f"interrupted by {signal.SIGTERM.value} after step 3",
        "other ranks": "written by 1 ranks, each with its own order of the data (--loader shuffled)",
        "folders": "resume: ranks see different checkpoints (steps [6, None])",
    }
    for name, text in both.items():
        assert text in outcomes[0][name] and text in outcomes[1][name]
    assert "opening the training data: rank 1 failed: " in outcomes[0]["missing shard"]
    assert "gone.bin" in outcomes[0]["missing shard"] and "gone.bin" in outcomes[1]["missing shard"]
    assert outcomes[0].keys() == outcomes[1].keys() == {*both, "missing shard"}
    assert [path.name for path in list_checkpoints(tmp_path / "signal" / "checkpoints")] == ["step_00000003"]
    assert (tmp_path / "not_finite" / "not_finite.json").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("scenario", "heard"),
    [
        (
            "alone",
            "rank 0: rank 1 failed: out of memory on cpu in a training step with 128 tokens a micro-batch",
        ),
        ("vanished", "rank 0: another rank ended without a word: killed from outside, or out of host memory"),
    ],
)
def test_a_rank_that_fails_alone_leaves_no_other_waiting(data, tmp_path, scenario, heard):
    write_config(tmp_path, "config", tiny_config(data, tmp_path, warmup_steps=0))
    started = time.monotonic()
    done = torchrun("tests.distributed_worker", scenario, tmp_path)
    assert done.returncode != 0
    assert heard in done.stderr
    if scenario == "alone":
        assert "rank 1: out of memory on cpu" in done.stderr
    assert time.monotonic() - started < 150  # less than the ranks' own limit of 200 s


@pytest.mark.long
def test_the_command_runs_every_stage_on_two_processes(data, tmp_path):
    """And ends as a program does: nothing aborts while the interpreter goes."""
    base = get_preset("demo").to_dict()
    toys = tiny_config(data, tmp_path, eval_mode="lora-ttt", run_id="it", cuda_graphs=False)
    flags = []
    for section, name, value in toys.items():
        if value != base[section][name]:
            flags += [f"--{name.replace('_', '-')}", value]
    done = torchrun("model.train", "--preset", "demo", "--device", "cpu", *flags)
    check(done)
    assert "terminate" not in done.stderr
    result = RunDir(tmp_path / "it").result()
    assert f"val_bpb: {result['bpb']['lora_ttt']:.8f}" in done.stdout
    assert f"artifact: {result['artifact']['bytes']:,} bytes" in done.stdout


@pytest.mark.long
def test_the_command_refuses_a_batch_that_does_not_divide_on_every_rank(data, tmp_path):
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


@pytest.mark.parametrize("rank", range(4))
def test_too_few_gpus_are_refused_by_every_rank(monkeypatch, rank):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    message = "device: 4 ranks on this machine, which shows 2 GPUs; wanted --nproc_per_node=2 or less"
    with pytest.raises(TrainError, match=message), distributed("cuda"):
        pass
