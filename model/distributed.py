"""Processes that train together: start-up, agreement between ranks, errors that reach every rank.

Tensors on GPUs go through NCCL. What ranks must agree on (elapsed time, stopping, errors) are a few numbers in host
memory: they go through a second, gloo group, so that agreeing never waits for a GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import PgolfError, TrainError
from model.signals import Terminated, terminate

# torch 2.13 renamed these two; 2.11 has the old names alone.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Dist:
    """This process among `world`: its rank, device and groups. `Dist.single(device)` is a world of one."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    host_group: dist.ProcessGroup | None = None  # collectives on host tensors

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Dist:
        return cls(0, 1, 0, torch.device(device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.host_group)

    def set_timeout(self, seconds: float) -> None:
        """From now on a rank gives up waiting for the others after so long."""
        if self.world > 1:
            for group in (None, self.host_group):  # None: the default one
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def agree_max(self, *values: float) -> tuple[float, ...]:
        """Each value's maximum over the ranks, the same bits everywhere; does not touch a GPU."""
        if self.world == 1:
            return values
        packed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=self.host_group)
        return tuple(packed.tolist())

    def gather_json(self, value: Any) -> list[Any]:
        """`value` (JSON types) of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        payload = json.dumps(value).encode()
        length = torch.tensor([len(payload)], dtype=torch.int64)
        lengths = [torch.empty_like(length) for _ in range(self.world)]
        dist.all_gather(lengths, length, group=self.host_group)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        rows = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(rows, padded, group=self.host_group)
        return [json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place, on the tensor's own device."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_async(self, tensor: Tensor) -> dist.Work:
        """`sum_` that runs on; only in a world of several ranks."""
        return dist.all_reduce(tensor, async_op=True)

    def reduce_scatter_async(self, output: Tensor, source: Tensor) -> dist.Work:
        """output [n / world, ...] = this rank's rows of the sum over the ranks of source [n, ...]."""
        return _reduce_scatter(output, source, async_op=True)

    def all_gather_async(self, output: Tensor, source: Tensor) -> dist.Work:
        """output [n, ...] = the ranks' source [n / world, ...], one after the other."""
        return _all_gather(output, source, async_op=True)

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, in place."""
        if self.world > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block that fails on every rank when it fails on one, instead of leaving the others waiting.

        Only for blocks without collectives of their own that could stop half-way, such as opening files. A user's
        error (PgolfError, OSError) on another rank becomes a TrainError here that names that rank.
        """
        failure: Exception | None = None
        try:
            yield
        except (PgolfError, OSError, ValueError) as error:
            failure = error
        messages = self.gather_json(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise TrainError(f"{what}: rank {rank} failed: {message}")


@contextmanager
def distributed(device: str | None = None, timeout_seconds: float = 600.0) -> Iterator[Dist]:
    """Joins the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or a world of one without it.

    `device` is "cuda" or "cpu"; None takes CUDA where there is one. Groups are torn down at the end, unless by an
    error. Raises TrainError when there are more ranks on this machine than GPUs, and when a collective fails or
    torchrun ends this process because another rank failed: with that rank's message.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    target = torch.device(device)
    if target.type == "cuda":
        target = _own_gpu(local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))
        torch.cuda.set_device(target)
    if world == 1:
        yield Dist(0, 1, local_rank, target)
        return
    # Some functions there have the default group of the time of their import as default arguments, and torch.optim
    # imports them. Imported with a group present they would keep it, and gloo's threads with it, beyond
    # destroy_process_group: one that frees its last tensor while the interpreter ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    timeout = timedelta(seconds=timeout_seconds)
    store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=timeout))
    # After a restart torchrun's store still has the keys of the processes before: each attempt has its own.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    on_gpu = target.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timeout,
        device_id=target if on_gpu else None,
    )
    host_group = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else dist.group.WORLD
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield Dist(rank, world, local_rank, target, host_group)
    except (Exception, Terminated) as error:
        # Groups stay: another rank may be inside a collective, and tearing down would wait for it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would cut the message off
        failure = _failure_elsewhere(store, rank, error)
        if failure is not None:
            raise failure from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _own_gpu(local_rank: int, local_world: int) -> torch.device:
    """This rank's GPU. Raises TrainError on every rank when there are too few for one of them."""
    if not torch.cuda.is_available():
        raise TrainError("device: got 'cuda', but this process sees no GPU; `pgolf doctor` says why")
    if local_world > torch.cuda.device_count():
        raise TrainError(
            f"device: {local_world} ranks on this machine, which shows {torch.cuda.device_count()} GPUs; "
            f"wanted --nproc_per_node={torch.cuda.device_count()} or less"
        )
    return torch.device("cuda", local_rank)


_FAILURE = "failure"  # the store's key for the message of the first rank that failed
_PATIENCE = 3.0  # seconds that a rank whose collective failed waits for that message


def _failure_elsewhere(store: dist.Store, rank: int, error: BaseException) -> TrainError | None:
    """The failure of another rank that `error` follows from. For a failure of this rank's own: None, and it is told."""
    collective = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    try:
        if not collective and not isinstance(error, Terminated):
            store.compare_set(_FAILURE, "", f"rank {rank} failed: {str(error) or type(error).__name__}")
            return None
        deadline = time.monotonic() + _PATIENCE
        while not store.check([_FAILURE]):
            if time.monotonic() > deadline or isinstance(error, Terminated):
                return None if isinstance(error, Terminated) else TrainError(_WORDLESS)
            time.sleep(0.05)
        return TrainError(store.get(_FAILURE).decode())
    except dist.DistError:  # the store itself is gone, with torchrun
        return None


_WORDLESS = "another rank ended without a word: killed from outside, or out of host memory"


def restarts_workers() -> bool:
    """Whether a launcher replaces workers that die: `torchrun --max-restarts`."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def local_micro_batches(micro_batches: int, world: int) -> int:
    """Micro-batches of one rank a step. Raises TrainError when they do not divide."""
    if micro_batches % world:
        fitting = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
        raise TrainError(
            f"micro_batches: got {micro_batches} for {world} ranks, wanted a multiple of the ranks; "
            f"use {', '.join(map(str, fitting))} ranks or set --micro-batches"
        )
    return micro_batches // world
