"""The training loop: schedule, clock, warm-up, validation, stopping, and errors that say what to do."""

import json
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from model import schedule
from model.checkpoint import list_checkpoints, load_checkpoint
from model.data.dataset import open_dataset
from model.data.loaders import LOADERS
from model.distributed import Dist, local_micro_batches
from model.errors import DataError, DeviceMemoryError, TrainError
from model.monitor import InFlight, StepRecord
from model.presets import get_preset
from model.run import RunDir
from model.schedule import StepSettings
from model.signals import stop_signals
from model.train import Trainer, attention_pairs, more_micro_batches, train
from tests.tiny import tiny_config, tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def dataset(data):
    return open_dataset(data)


def run_of(config, name="run"):
    return RunDir(f"{config.train.run_dir}/{name}")


def test_it_learns_and_writes_down_what_it_did(data, dataset, tmp_path, capsys):
    config = tiny_config(data, tmp_path, iterations=24, matrix_lr=0.02, val_loss_every=12)
    run = run_of(config)
    run.start(config, dataset.fingerprint)
    result = train(config, dataset, run, Dist.single(), started=time.perf_counter())
    records = list(run.metrics())
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 25))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [r["loop"] for r in steps] == [False] * 12 + [True] * 12
    assert [r["step"] for r in records if "val_bpb" in r] == [0, 12, 24]
    assert steps[-1]["lr_scale"] < steps[0]["lr_scale"] == 1.0
    assert steps[3]["muon_momentum"] == pytest.approx(schedule.muon_momentum(config.train, 3))
    assert all(r["tokens_per_second"] > 0 and r["mfu"] is None for r in steps)
    stored = run.result()
    assert stored["train"]["steps"] == 24
    assert stored["train"]["tokens"] == 24 * 256 == result.tokens
    assert stored["seconds"]["start_to_first_step"] > 0
    assert {"config.json", "provenance.json", "source.zip", "model.safetensors", "log.txt"} <= set(os.listdir(run.path))
    assert run.config() == config
    assert json.loads((run.path / "provenance.json").read_text())["data_sha256"] == dataset.fingerprint
    assert "step 24/24" in capsys.readouterr().out


def test_waiting_for_data_shows(data, dataset, tmp_path, monkeypatch):
    """In the steps, in their sum over an interruption, and as a share of the training time without the warm-up."""
    config = tiny_config(data, tmp_path, warmup_steps=2, checkpoint_every=2, iterations=2)
    quick = train(config, dataset, run_of(config, "quick"), Dist.single())
    loader = LOADERS[config.data.loader]
    source = loader._make_source
    read = source.next
    monkeypatch.setattr(source, "next", lambda self: time.sleep(0.1) or read(self))
    run = run_of(config)
    train(config, dataset, run, Dist.single())
    slow = train(config.replace(iterations=4), dataset, run, Dist.single(), resume=True)
    steps = [record for record in run.metrics() if "loss" in record]
    waits = [record["data_wait_ms"] / 1000 for record in steps]
    assert len(waits) == 4 and all(0 <= wait <= step["step_ms"] / 1000 for wait, step in zip(waits, steps, strict=True))
    assert sum(waits) > 0.1 and quick.data_wait < slow.data_wait <= 1
    assert slow.data_wait == pytest.approx(sum(waits) / slow.seconds) == run.result()["train"]["data_wait"]
    assert f"{slow.data_wait:.2%} waiting for data" in (run.path / "log.txt").read_text()


def test_one_seed_twice_gives_the_same_weights(data, dataset, tmp_path):
    config = tiny_config(data, tmp_path)
    one, two = (train(config, dataset, run_of(config, name), Dist.single()).model.state_dict() for name in "ab")
    other = train(config.replace(seed=4), dataset, run_of(config, "c"), Dist.single()).model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["tok_emb"], other["tok_emb"])


def test_warm_up_leaves_no_trace(data, dataset, tmp_path):
    warm = tiny_config(data, tmp_path, warmup_steps=3)
    cold = warm.replace(warmup_steps=0)
    weights = [
        train(config, dataset, run_of(config, name), Dist.single()).model.state_dict()
        for config, name in ((warm, "warm"), (cold, "cold"))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("loader", ["documents", "shuffled", "stream"])
def test_warm_up_restores_every_bit_of_state(data, dataset, tmp_path, monkeypatch, loader):
    """Also the random state, of which a network with dropout would take some."""
    config = tiny_config(data, tmp_path, loader=loader, warmup_steps=2)
    trainer = Trainer(config, dataset, run_of(config), Dist.single())
    step, steps = Trainer.train_step, []

    def drawing_step(self, settings):
        steps.append((settings.loop, torch.rand(3)))
        return step(self, settings)

    def state():
        tensors = {f"weight {name}": p for name, p in trainer.params.items()}
        tensors |= {f"average {name}": t for name, t in trainer.average.average.items()}
        tensors |= trainer.optimizer.state() | {"random": torch.get_rng_state()}
        return {name: t.detach().clone() for name, t in tensors.items()}, trainer.loader.state_dict()

    monkeypatch.setattr(Trainer, "train_step", drawing_step)
    before, loader_before = state()
    first = trainer.loader.next_batch()
    trainer.loader.load_state_dict(loader_before)
    trainer.prepare()
    after, loader_after = state()
    assert [loop for loop, _ in steps] == [False, False, True, True]
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert loader_after == loader_before
    assert torch.equal(trainer.loader.next_batch().inputs, first.inputs)
    assert trainer.step == 0 and not any(p.grad.any() for p in trainer.params.values())
    trainer.close()


def test_the_public_defect_of_the_warm_up_can_be_had(data, dataset, tmp_path):
    config = tiny_config(data, tmp_path, warmup_steps=2, restore_muon_momentum=False)
    trainer = Trainer(config, dataset, run_of(config), Dist.single())
    trainer.prepare()
    state = trainer.optimizer.state()
    assert state["momentum.qo_bank"].abs().sum() > 0
    assert not any(name.startswith("adamw") for name in state)
    trainer.close()


def test_the_result_has_the_averaged_weights(data, dataset, tmp_path):
    config = tiny_config(data, tmp_path, ema_decay=0.5)
    trainer = Trainer(config, dataset, run_of(config), Dist.single())
    trainer.prepare()
    result = trainer.run()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, trainer.average.average[name]), name
    trainer.close()


class FakeClock:
    """Stands in for the module `time`: a step takes 0.1 s, a validation 5 s."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        step, clock = Trainer.train_step, self

        def timed_step(self, settings):
            clock.now += 0.1
            return step(self, settings)

        def validate(*arguments, **options):
            clock.now += 5.0
            return SimpleNamespace(val_loss=2.0, bpb=1.0)

        monkeypatch.setattr("model.train.time", self)
        monkeypatch.setattr("model.evaluate.evaluate", validate)
        monkeypatch.setattr(Trainer, "train_step", timed_step)

    def perf_counter(self):
        return self.now


def test_the_wall_clock_stops_training_and_leaves_out_validation(data, dataset, tmp_path, monkeypatch):
    FakeClock(monkeypatch)
    config = tiny_config(
        data,
        tmp_path,
        iterations=10_000,
        max_wallclock_seconds=3.0,
        reserve_seconds=1.05,
        val_loss_every=8,
        warmup_steps=2,
    )
    result = train(config, dataset, run_of(config), Dist.single())
    assert result.step == 20  # 19 steps take 1.9 s of 1.95, warm-up and validation not counted
    assert result.seconds == pytest.approx(2.0)
    records = list(run_of(config).metrics())
    assert [r["step"] for r in records if "val_loss" in r] == [0, 8, 16, 20]
    steps = [r for r in records if "loss" in r]
    assert [r["elapsed"] for r in steps] == pytest.approx([0.1 * n for n in range(20)])
    assert [r["loop"] for r in steps] == [n / 10 / 1.95 >= 0.5 for n in range(20)]
    assert steps[-1]["lr_scale"] == pytest.approx((1 - 1.9 / 1.95) / config.train.warmdown_frac)


@pytest.mark.parametrize(("restarts", "saved"), [("0", []), ("2", ["step_00000011", "step_00000021"])])
def test_checkpoints_are_written_where_workers_may_be_replaced(data, dataset, tmp_path, monkeypatch, restarts, saved):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    FakeClock(monkeypatch)
    monkeypatch.setattr("model.train.RESTART_SECONDS", 0.95)
    config = tiny_config(data, tmp_path, iterations=24, max_wallclock_seconds=100.0)
    train(config, dataset, run_of(config), Dist.single())
    assert [path.name for path in list_checkpoints(run_of(config).checkpoints)] == saved


def test_late_qat_stays_on_also_beyond_a_checkpoint(data, dataset, tmp_path, monkeypatch):
    """Where the warm-down is foreseen from step times, the multiplier can rise again (pull request 1499)."""
    monkeypatch.setattr(schedule, "lr_multiplier", lambda config, step, elapsed: 0.3 if step == 1 else 0.9)
    config = tiny_config(data, tmp_path, iterations=3, late_qat_threshold=0.5, checkpoint_every=3)
    train(config, dataset, run_of(config), Dist.single())
    train(config.replace(iterations=5), dataset, run_of(config), Dist.single(), resume=True)
    flags = [record["late_qat"] for record in run_of(config).metrics() if "loss" in record]
    assert flags == [False, True, True, True, True]


def test_late_qat_changes_training_and_not_the_result(data, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("model.gpt.QAT_MIN_ELEMENTS", 100)
    config = tiny_config(data, tmp_path)
    plain = train(config, dataset, run_of(config, "plain"), Dist.single())
    quantised = train(config.replace(late_qat_threshold=0.9), dataset, run_of(config, "qat"), Dist.single())
    flags = [[r["late_qat"] for r in run_of(config, name).metrics() if "loss" in r] for name in ("plain", "qat")]
    assert not any(flags[0])
    assert any(flags[1])
    assert not all(flags[1])
    assert not torch.equal(plain.model.up_bank, quantised.model.up_bank)
    assert quantised.model.late_qat is False


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_led_to_it(data, dataset, tmp_path):
    config = tiny_config(data, tmp_path)
    trainer = Trainer(config, dataset, run_of(config), Dist.single())
    trainer.prepare()
    trainer._start_clock()
    settings = StepSettings(0.0, 1.0, 0.9, False, False)
    trainer._one_step(settings, 0.0)
    with torch.no_grad():
        trainer.model.tok_emb[5:].fill_(math.nan)
    with pytest.raises(TrainError, match=r"step 2: loss nan.*--matrix-lr"):
        trainer._one_step(settings, 0.0)
    report = json.loads((run_of(config).path / "not_finite.json").read_text())
    assert [r["step"] for r in report["recent"]] == [1, 2]
    trainer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_training_with_a_checkpoint_that_resumes(data, dataset, tmp_path, monkeypatch, number):
    config = tiny_config(data, tmp_path)
    whole = train(config, dataset, run_of(config, "whole"), Dist.single())
    one_step = Trainer._one_step

    def interrupted_step(self, settings, elapsed):
        if self.step == 3:
            os.kill(os.getpid(), number)
        one_step(self, settings, elapsed)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", interrupted_step)
        result = train(config, dataset, run_of(config), Dist.single())
    assert result.interrupted == number
    assert result.step == 4  # the step that was running is finished
    assert not run_of(config).model_path.exists()
    (saved,) = list_checkpoints(run_of(config).checkpoints)
    assert load_checkpoint(saved).state["seconds"] == pytest.approx(result.seconds, rel=0.05)
    again = train(config, dataset, run_of(config), Dist.single(), resume=True)
    assert again.interrupted is None
    assert all(torch.equal(t, again.model.state_dict()[n]) for n, t in whole.model.state_dict().items())


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before


def test_out_of_memory_names_the_setting(data, dataset, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path, warmup_steps=0)
    trainer = Trainer(config, dataset, run_of(config), Dist.single())

    def fail(settings):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(
        DeviceMemoryError,
        match=r"in a training step with 128 tokens a micro-batch; --micro-batches 4 makes them fewer.*3 GiB",
    ):
        trainer._one_step(StepSettings(0.0, 1.0, 0.9, False, False), 0.0)
    trainer.close()


@pytest.mark.parametrize(
    ("preset", "changes", "wanted"),
    [
        ("pr1530", {}, 16),
        ("pr1413", {}, 16),
        ("pr1413", {"micro_batches": 128}, 384),  # rows of 2048: 256 micro-batches would cut one
        ("pr1413", {"micro_batches": 384}, None),
        ("pr1413", {"micro_batches": 24, "train_batch_tokens": 24 * 2048 * 3}, 72),
        ("pr1530", {"micro_batches": 5, "train_batch_tokens": 5}, None),
    ],
)
def test_more_micro_batches_that_fit(preset, changes, wanted):
    config = get_preset(preset).replace(**changes)
    found = more_micro_batches(config, rows=LOADERS[config.data.loader].rows)
    assert found == wanted
    if found is not None:
        assert found % config.train.micro_batches == 0
        config.replace(micro_batches=found)


def test_batches_that_do_not_divide_are_refused():
    assert local_micro_batches(8, 4) == 2
    with pytest.raises(TrainError, match=r"micro_batches: got 8 for 3 ranks.*use 1, 2, 4, 8 ranks"):
        local_micro_batches(8, 3)


def test_a_tokenizer_that_does_not_fit_is_refused(data, dataset, tmp_path):
    config = tiny_config(data, tmp_path, vocab_size=256)
    with pytest.raises(DataError, match=r"512 pieces, wanted at most vocab_size=256; set --vocab-size 512"):
        Trainer(config, dataset, run_of(config), Dist.single())


def test_a_missing_shard_is_named(data, dataset, tmp_path):
    config = tiny_config(data, tmp_path)
    missing = dataset.train_shards[0].with_name("gone.bin")
    dataset.train_shards[0] = missing
    with pytest.raises((DataError, OSError), match=r"gone\.bin"):
        Trainer(config, dataset, run_of(config), Dist.single())


def test_attention_pairs_by_real_lengths(data, dataset, tmp_path):
    config = tiny_config(data, tmp_path)
    trainer = Trainer(config, dataset, run_of(config), Dist.single())
    batch = trainer.loader.next_batch()
    lengths = batch.cu_seqlens.diff().tolist()
    assert sum(lengths) == 128
    assert attention_pairs(batch).item() == sum(n * (n + 1) // 2 for n in lengths)
    dense = batch._replace(inputs=batch.inputs.view(2, 64), cu_seqlens=None)
    assert attention_pairs(dense).item() == 2 * 64 * 65 // 2
    trainer.close()


def test_cpu_steps_are_finished_when_they_are_pushed():
    in_flight = InFlight(torch.device("cpu"))
    record = StepRecord(1, StepSettings(0.0, 1.0, 0.9, False, False), 0.0, 10)
    assert in_flight.push(record, torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)) == [record]
    assert (record.loss, record.grad_norm, record.pairs) == (2.0, 3.0, 4.0)
    assert len(in_flight) == 0
