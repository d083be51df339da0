"""Training on a GPU: nothing in a step waits for the device, and nothing is compiled after the warm-up."""

import time

import pytest
import torch

from model.data.dataset import open_dataset
from model.distributed import Dist
from model.run import RunDir
from model.schedule import StepSettings
from model.train import Trainer, train
from tests.tiny import tiny_config, tiny_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
SLEEP_CYCLES = 2_000_000_000  # more than half a second on any GPU


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny"))


def gpu_config(data, folder, **changes):
    options = {"model_dim": 128, "dtype": "bfloat16", "train_batch_tokens": 1024, "cu_bucket_size": 4, **changes}
    return tiny_config(data, folder, **options)


def test_a_step_does_not_wait_for_the_device(data, tmp_path):
    config = gpu_config(data, tmp_path)
    trainer = Trainer(config, open_dataset(data), RunDir(tmp_path / "run"), Dist.single("cuda"))
    for loop in (False, True):
        settings = StepSettings(0.0, 1.0, 0.9, loop, False)
        for _ in range(3):
            trainer.train_step(settings)
            trainer.average.update()
        torch.cuda.synchronize()
        start = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start[0].record()
        torch.cuda._sleep(SLEEP_CYCLES)
        start[1].record()
        before = time.perf_counter()
        trainer.train_step(settings)
        trainer.average.update()
        queued = time.perf_counter() - before
        torch.cuda.synchronize()
        assert queued < start[0].elapsed_time(start[1]) / 1000 / 2
    trainer.close()


def test_nothing_is_compiled_after_the_warm_up(data, tmp_path):
    """Batches have between 9 and some 30 documents here, so lengths of cu_seqlens differ."""
    config = gpu_config(data, tmp_path, cuda_graphs=True, iterations=12)
    dataset = open_dataset(data)
    trainer = Trainer(config, dataset, RunDir(tmp_path / "probe"), Dist.single("cuda"))
    lengths = {trainer.loader.next_batch().cu_seqlens.numel() for _ in range(20)}
    trainer.close()
    assert len(lengths) > 1
    result = train(config, dataset, RunDir(tmp_path / "run"), Dist.single("cuda"))
    assert result.recordings == result.compilations == 0
    assert result.looped


def test_gpu_and_cpu_train_alike(data, tmp_path):
    dataset = open_dataset(data)
    config = gpu_config(data, tmp_path, iterations=4, warmup_steps=0)
    losses = {}
    for device in ("cpu", "cuda"):
        run = RunDir(tmp_path / device)
        train(config, dataset, run, Dist.single(device))
        losses[device] = [record["loss"] for record in run.metrics() if "loss" in record]
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=0.05)  # bf16 on both; the loss falls by about 3
