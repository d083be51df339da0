"""Training: from a configuration and a data set to averaged weights.

    torchrun --standalone --nproc_per_node=8 -m model.train --preset pr1727 --seed 42

One step on every rank: `micro_batches / world` forward and backward passes, clipping, the reduction over ranks and the
optimiser (model/optim.py), the moving average. The host queues up to two steps ahead of the GPU and never waits for the
one that it queues. Ranks agree once a step, through host memory, on the time that has passed; all that depends on it
(learning rate, loop, stopping) is then the same everywhere.

The clock starts after the warm-up steps, whose effects are undone, and stands still during validation.
"""

from __future__ import annotations

import base64
import json
import signal
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from model import schedule
from model.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from model.compilations import Compilations
from model.config import Config
from model.data.dataset import Dataset
from model.data.loaders import LOADERS, Batch, Loader
from model.distributed import Dist, local_micro_batches, restarts_workers
from model.errors import ArtifactError, ConfigError, DataError, TrainError
from model.files import atomic_write
from model.gpt import GPT
from model.memory import lower, memory_for
from model.micro_step import MicroStep
from model.monitor import InFlight, Monitor, StepRecord
from model.optim import Optimizer, WeightAverage
from model.run import RunDir
from model.schedule import StepSettings
from model.signals import stop_signals
from pgolf_kernels.fp8_mlp import MULTIPLE as FP8_MULTIPLE
from pgolf_kernels.fp8_mlp import runs_fp8

RESTART_SECONDS = 60.0  # between checkpoints where torchrun replaces workers and `checkpoint_every` says nothing
RECORDED_BUCKETS = range(1, 5)  # cu_seqlens lengths recorded before the first step, as in pull request 1530's warm-up


@dataclass(frozen=True)
class TrainResult:
    """`model` has the averaged weights. `interrupted` is the signal that ended training early, or None."""

    model: GPT
    step: int
    seconds: float
    tokens: int
    recordings: int  # micro-steps recorded after the warm-up: 0 unless a batch held more documents than any before
    compilations: int  # kernels that Triton compiled in steps after the warm-up
    data_wait: float  # share of `seconds` in which the host waited for a batch, on the rank that waited longest
    looped: bool  # whether the layer loop was ever active
    interrupted: int | None


def train(
    config: Config, dataset: Dataset, run: RunDir, ranks: Dist, *, resume: bool = False, started: float | None = None
) -> TrainResult:
    """Trains and writes metrics, checkpoints and at the end model.safetensors into the run's folder.

    With `resume` it goes on from the newest whole checkpoint there, or starts anew where there is none. `started` is
    the `time.perf_counter()` from which "time to first step" counts. Raises TrainError (a loss that is not finite, a
    batch that does not divide), DeviceMemoryError, DataError and ConfigError; always on every rank.
    """
    unit = config.model.num_heads * max(config.model.rope_dims, 2)
    smaller = partial(lower, "model_dim", config.model.model_dim, unit)
    with memory_for("while building the network and its optimiser", ranks.device, smaller):
        trainer = Trainer(config, dataset, run, ranks)
    try:
        if resume:
            trainer.resume()
        trainer.prepare()
        if started is not None and run.writes:
            run.merge_result({"seconds": {"start_to_first_step": time.perf_counter() - started}})
        return trainer.run()
    finally:
        trainer.close()


class Trainer:
    """The state of one training run on one rank."""

    def __init__(self, config: Config, dataset: Dataset, run: RunDir, ranks: Dist) -> None:
        self.config, self.dataset, self.run_dir, self.ranks = config, dataset, run, ranks
        self.accumulate = local_micro_batches(config.train.micro_batches, ranks.world)
        self.budget = schedule.budget_seconds(config.train)
        check_dataset(config, dataset)
        if config.train.fp8_mlp and not runs_fp8(ranks.device):
            raise ConfigError(
                f"fp8_mlp: got True on {ranks.device}, wanted False in a packed script and on a GPU without Triton or "
                "of compute capability below 9.0"
            )
        if config.train.fp8_mlp and runs_fp8(ranks.device):  # again: a packed script, without FP8, leaves this out
            for name, size in (("model_dim", config.model.model_dim), ("mlp_mult", config.model.hidden_dim)):
                if size % FP8_MULTIPLE:
                    raise ConfigError(f"{name}: got {size} features, wanted a multiple of {FP8_MULTIPLE} with fp8_mlp")
        torch.manual_seed(config.train.seed)
        torch.set_float32_matmul_precision("high")
        self.model = GPT(config.model).to(ranks.device)
        self.model.compute_dtype = getattr(torch, config.train.dtype)
        self.params = dict(self.model.named_parameters())
        for param in self.params.values():
            ranks.broadcast_(param.data)
        with ranks.together("opening the training data"):
            self.loader = make_loader(config, dataset, ranks)
        self.optimizer = Optimizer(self.params, config.train, ranks)
        self.average = WeightAverage(self.params, config.train)
        self.monitor = Monitor(config, run, ranks.world, ranks.device, self.budget)
        self.in_flight = InFlight(ranks.device)
        self.has_loop = config.model.num_loops > 0
        tokens = config.train.train_batch_tokens // config.train.micro_batches
        # The configured length, not the batch's longest: attention's grid is part of a recording.
        longest = config.data.train_seq_len or tokens
        self.micro_step = MicroStep(
            self.model, weight=1 / self.accumulate, max_seqlen=longest, record=config.train.cuda_graphs,
            fp8=config.train.fp8_mlp,
        )  # fmt: skip
        self.step, self.seconds, self._clock_started = 0, 0.0, 0.0
        self.data_wait = 0.0  # of `seconds`, those in which this rank's host waited for a batch
        self.looped = self.late_qat = False  # whether the last step was
        self._saved_at = 0.0  # the time, as agreed, of the step with the last checkpoint
        self._resumed = False
        self._warm_recordings = 0
        self.late_compilations = Compilations(ranks.device)

    # One step

    def train_step(self, settings: StepSettings) -> Tensor:
        """Micro-batches, optimiser, average. Returns (loss, gradient norm, attention pairs), fp64, on the device.

        Loss and norm are means over the ranks, pairs their sum. Nothing here waits for the device.
        """
        self.model.late_qat = settings.late_qat
        losses, pairs = [], []
        for _ in range(self.accumulate):
            batch = self.loader.next_batch()
            losses.append(self.micro_step(batch, loop=settings.loop))
            pairs.append(attention_pairs(batch))
        loss = torch.stack(losses).mean()
        norm = self.optimizer.step(settings.lr_scale, settings.muon_momentum)
        self.model.late_qat = False
        world = self.ranks.world
        return self.ranks.sum_(torch.stack([loss.double() / world, norm.double() / world, torch.stack(pairs).sum()]))

    # Before the first step

    def prepare(self) -> None:
        """Records the micro-steps, then runs the preset's warm-up steps and undoes them completely."""
        with self._memory("while recording micro-steps"):
            self._record()
        if not self._resumed:
            self.run_dir.forget_metrics()  # of an attempt that left no checkpoint
            self._warm_up()
        self._warm_recordings = self.micro_step.recordings

    def _modes(self) -> list[tuple[bool, bool]]:
        """(loop, late QAT) of every recording that may be needed."""
        loops = [False, True] if self.has_loop else [False]
        late_qats = [False, True] if self.config.train.late_qat_threshold > 0 else [False]
        return [(loop, late_qat) for late_qat in late_qats for loop in loops]

    def _record(self) -> None:
        """Every mode, with room for one to four buckets of documents."""
        device = self.ranks.device
        if not self.micro_step.records(device):
            return
        state = self.loader.state_dict()
        batch = self.loader.next_batch()
        self.loader.load_state_dict(state)
        batches = [batch]
        if batch.cu_seqlens is not None:
            bucket, tokens = self.config.data.cu_bucket_size, batch.inputs.numel()
            bounds = torch.arange(0, tokens, self.micro_step.max_seqlen, dtype=torch.int32)
            sizes = [bucket * k for k in RECORDED_BUCKETS if bucket * k > len(bounds)]
            batches = [
                batch._replace(
                    cu_seqlens=torch.nn.functional.pad(bounds, (0, size - len(bounds)), value=tokens).to(device)
                )
                for size in sizes
            ]
        for loop, late_qat in self._modes():
            self.model.late_qat = late_qat
            for example in batches:
                self.micro_step(example, loop=loop)
        self.model.late_qat = False
        self.optimizer.zero_grad()

    def _warm_up(self) -> None:
        steps = self.config.train.warmup_steps
        if steps <= 0:
            return
        weights = {name: p.detach().clone() for name, p in self.params.items()}
        loader, random = self.loader.state_dict(), random_state(self.ranks.device)
        for loop in [False, True] if self.has_loop else [False]:
            for step in range(steps):
                momentum = schedule.muon_momentum(self.config.train, step)
                with self._memory("in the warm-up"):
                    self.train_step(StepSettings(0.0, 1.0, momentum, loop, late_qat=False))
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(weights[name])
        self.optimizer.reset(momentum=self.config.train.restore_muon_momentum)
        self.average.reset()
        self.loader.load_state_dict(loader)
        set_random_state(random, self.ranks.device)
        self.monitor.say(f"warm-up: {steps} steps a graph, undone")

    # The loop

    def run(self) -> TrainResult:
        """Steps until the budget or `iterations` is used up, or a signal comes."""
        train = self.config.train
        interrupted = None
        with stop_signals() as received:
            self._start_clock()
            while True:
                ahead = len(self.in_flight) * self.monitor.step_seconds()
                elapsed, signal_number = self.ranks.agree_max(self._elapsed() + ahead, float(received[0]))
                interrupted = int(signal_number) or None
                done = self.step >= train.iterations or (self.budget is not None and elapsed >= self.budget)
                if interrupted or done:
                    break
                if train.val_loss_every > 0 and self.step % train.val_loss_every == 0:
                    self._validate()
                settings = schedule.settings_at(
                    train, self.step, elapsed, has_loop=self.has_loop, late_qat=self.late_qat
                )
                self._one_step(settings, elapsed)
                if self._checkpoint_is_due(elapsed):
                    self.save()
                    self._saved_at = elapsed
            if not interrupted:
                self._validate()
            self._finish(self.in_flight.drain())
            self._stop_clock()
        if interrupted:
            path = self.save()
            self.monitor.say(f"{signal.Signals(interrupted).name}: stopped after step {self.step}, saved {path}")
        return self._result(interrupted)

    def _checkpoint_is_due(self, elapsed: float) -> bool:
        """Decided by what the ranks have agreed on alone: saving is a collective."""
        every = self.config.train.checkpoint_every
        if every > 0:
            return self.step % every == 0
        return restarts_workers() and elapsed - self._saved_at >= RESTART_SECONDS

    def _one_step(self, settings: StepSettings, elapsed: float) -> None:
        waited = self.loader.waited
        with self._memory("in a training step"), self.late_compilations:
            values = self.train_step(settings)
            self.average.update()
        waited = self.loader.waited - waited
        self.data_wait += waited
        self.step += 1
        self.looped, self.late_qat = settings.loop, settings.late_qat
        record = StepRecord(self.step, settings, elapsed, self.config.train.train_batch_tokens, waited)
        self._finish(self.in_flight.push(record, values))

    def _finish(self, records: list[StepRecord]) -> None:
        """Books finished steps. A loss that is not finite, the same on every rank, ends the run."""
        self.monitor.add(records)
        for record in records:
            if not torch.isfinite(torch.tensor([record.loss, record.grad_norm])).all():
                raise TrainError(self._explain_not_finite(record))

    def _explain_not_finite(self, record: StepRecord) -> str:
        recent = [
            {"step": r.step, "loss": r.loss, "grad_norm": r.grad_norm, "lr_scale": r.settings.lr_scale}
            for r in self.monitor.recent
        ]
        path = self.run_dir.path / "not_finite.json"
        if self.run_dir.writes:
            report = {"step": record.step, "recent": recent, "loader_after": self.loader.state_dict()}
            with atomic_write(path, "w") as file:
                json.dump(report, file, indent=1)
        losses = ", ".join(f"{r['loss']:.3f}" for r in recent[-5:])
        return (
            f"step {record.step}: loss {record.loss}, gradient norm {record.grad_norm} (last losses: {losses}; lr "
            f"x{record.settings.lr_scale:.3f}, loop {'on' if record.settings.loop else 'off'}); wanted finite numbers. "
            f"{path} has the steps before; smaller --matrix-lr, --tied-embed-lr or --scalar-lr may help"
        )

    def _memory(self, stage: str) -> AbstractContextManager[None]:
        train = self.config.train

        def advice() -> str:
            more = more_micro_batches(self.config, self.loader.rows)
            if more:
                return f"--micro-batches {more} makes them fewer and leaves the step as it is"
            unit = train.micro_batches * (max(self.config.data.train_seq_len, 1) if self.loader.rows else 1)
            return lower("train_batch_tokens", train.train_batch_tokens, unit)

        tokens = train.train_batch_tokens // train.micro_batches
        return memory_for(stage, self.ranks.device, advice, detail=f"with {tokens:,} tokens a micro-batch")

    def _validate(self) -> None:
        from model.evaluate import evaluate

        self._finish(self.in_flight.drain())
        self._stop_clock()
        started = time.perf_counter()
        result = evaluate(self.model, self.dataset, "plain", self.config, device=self.ranks.device)
        seconds = time.perf_counter() - started
        self.monitor.flush()
        self.run_dir.append_metrics(
            [{"step": self.step, "val_loss": result.val_loss, "val_bpb": result.bpb, "val_seconds": seconds}]
        )
        self.monitor.say(
            f"step {self.step}  val_loss {result.val_loss:.5f}  val_bpb {result.bpb:.5f}  ({seconds:.1f} s)"
        )
        self._start_clock()

    def _result(self, interrupted: int | None) -> TrainResult:
        recordings = self.micro_step.recordings - self._warm_recordings
        compilations = len(self.late_compilations.kernels)
        (waited,) = self.ranks.agree_max(self.data_wait)
        data_wait = waited / self.seconds if self.seconds else 0.0
        tokens = self.step * self.config.train.train_batch_tokens
        peak = torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda" else None
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(self.average.average[name])
                param.grad = None
        if interrupted is None:
            self.run_dir.save_model(self.model.state_dict(), self.config)
            self.monitor.say(
                f"trained {self.step} steps, {tokens:,} tokens in {self.seconds:.1f} s, "
                f"{data_wait:.2%} waiting for data"
                + (
                    f", {recordings} late recordings, {compilations} late compilations, "
                    f"peak memory {peak / 2**30:.1f} GiB"
                    if peak is not None
                    else ""
                )
            )
        self.run_dir.merge_result(
            {
                "train": {
                    "steps": self.step,
                    "tokens": tokens,
                    "late_recordings": recordings,
                    "late_compilations": compilations,
                    "data_wait": data_wait,
                    "peak_gpu_bytes": peak,
                },
                "seconds": {"train": self.seconds},
            }
        )
        return TrainResult(
            self.model, self.step, self.seconds, tokens, recordings, compilations, data_wait, self.looped, interrupted
        )

    # The clock

    def _elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self._clock_started

    def _start_clock(self) -> None:
        self.ranks.barrier()
        self._clock_started = time.perf_counter()
        self.in_flight.restart_clock()

    def _stop_clock(self) -> None:
        self.seconds, self._clock_started = self._elapsed(), time.perf_counter()

    # Checkpoints

    def save(self) -> Path:
        """Writes a checkpoint of the present step. A collective; returns when it is on the disk."""
        self._finish(self.in_flight.drain())
        self.monitor.flush()
        tensors: dict[str, Tensor] = {f"model.{name}": p for name, p in self.params.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.average.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state().items()}
        mine = {"loader": self.loader.state_dict(), "random": random_state(self.ranks.device)}
        (data_wait,) = self.ranks.agree_max(self.data_wait)
        state = {
            "seconds": self._elapsed(), "data_wait": data_wait, "looped": self.looped, "late_qat": self.late_qat,
            "ranks": self.ranks.gather_json(mine),
        }  # fmt: skip
        path = self.run_dir.checkpoints / f"step_{self.step:08d}"
        with self.ranks.together("writing a checkpoint"):
            if self.run_dir.writes:
                save_checkpoint(self.run_dir.checkpoints, self.step, tensors, state, self.config.train.keep_checkpoints)
        return path

    def resume(self) -> None:
        """Goes on from the newest whole checkpoint of the run, if there is one."""
        with self.ranks.together("reading a checkpoint"):
            checkpoint, problems = latest_checkpoint(self.run_dir.checkpoints)
        for problem in problems:
            self.monitor.say(f"checkpoint passed over: {problem}")
        steps = self.ranks.gather_json(checkpoint.step if checkpoint else None)
        if len(set(steps)) != 1:
            raise TrainError(f"resume: ranks see different checkpoints (steps {steps}), wanted one folder for all")
        if checkpoint is not None:
            self._load(checkpoint)
            self.monitor.say(f"resumed after step {self.step}, {self.seconds:.1f} s, from {checkpoint.path}")

    @torch.no_grad()
    def _load(self, checkpoint: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        states = checkpoint.state["ranks"]
        if self.loader.own_order and len(states) != self.ranks.world:
            raise ArtifactError(
                f"{checkpoint.path}: written by {len(states)} ranks, each with its own order of the data "
                f"(--loader {self.loader.kind}), wanted as many again; got {self.ranks.world}"
            )
        # Positions of the other loaders and the random states are the same on every rank.
        mine = states[self.ranks.rank % len(states)]
        self.model.load_state_dict(parts["model"])
        self.average.load_state(parts["average"])
        self.optimizer.load_state(parts["optimizer"])
        self.loader.load_state_dict(mine["loader"])
        set_random_state(mine["random"], self.ranks.device)
        self.step, self.seconds = checkpoint.step, float(checkpoint.state["seconds"])
        self.data_wait = float(checkpoint.state.get("data_wait", 0.0))
        self._saved_at = self.seconds
        self.looped, self.late_qat = bool(checkpoint.state["looped"]), bool(checkpoint.state.get("late_qat"))
        self.run_dir.forget_metrics_after(self.step)
        self._resumed = True

    def close(self) -> None:
        self.monitor.close()
        self.loader.close()


def make_loader(config: Config, dataset: Dataset, ranks: Dist) -> Loader:
    """The preset's training loader for this rank."""
    return LOADERS[config.data.loader](
        dataset.train_shards,
        tokens=config.train.train_batch_tokens // config.train.micro_batches,
        seq_len=config.data.train_seq_len,
        vocab_size=config.model.vocab_size,
        rank=ranks.rank,
        world_size=ranks.world,
        bucket_size=config.data.cu_bucket_size,
        device=ranks.device,
    )


def more_micro_batches(config: Config, rows: bool) -> int | None:
    """The next larger number of micro-batches that the same ranks and the same step can have, or None."""
    train, unit = config.train, max(config.data.train_seq_len, 1) if rows else 1
    for count in range(2 * train.micro_batches, train.train_batch_tokens // unit + 1, train.micro_batches):
        if train.train_batch_tokens % (count * unit) == 0:
            return count
    return None


def check_dataset(config: Config, dataset: Dataset) -> None:
    """Raises DataError when the tokenizer has more pieces than the network has embeddings."""
    if dataset.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{dataset.name}: its tokenizer has {dataset.vocab_size} pieces, wanted at most "
            f"vocab_size={config.model.vocab_size}; set --vocab-size {dataset.vocab_size} or use other data"
        )


def attention_pairs(batch: Batch) -> Tensor:
    """Sum of n (n + 1) / 2 over the batch's sequences, fp64, on the batch's device."""
    if batch.cu_seqlens is None:
        rows, length = batch.inputs.shape
        return torch.full((), rows * length * (length + 1) / 2, dtype=torch.float64, device=batch.inputs.device)
    lengths = batch.cu_seqlens.diff().double()
    return (lengths * (lengths + 1)).sum() / 2


def random_state(device: torch.device) -> dict[str, str]:
    """States of torch's generators, as JSON."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in states.items()}


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    decoded = {name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()}
    torch.set_rng_state(decoded["cpu"])
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)


if __name__ == "__main__":
    from model.pipeline import main

    main()
