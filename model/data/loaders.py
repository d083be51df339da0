"""Training batches from token shards, in the exact order of the public systems.

Three loaders, one interface: `next_batch()` gives a `Batch` on the device; `state_dict()` and `load_state_dict()` stop
and go on at any batch with exactly the sequence that would have followed. A background thread reads ahead.

| loader | rows | order | source |
|---|---|---|---|
| DocumentLoader | one row of packed documents, `cu_seqlens` | the shards' own | pull requests 1530, 1727 |
| ShuffledLoader | windows of `seq_len` | PCG64(rank), no seed | pull requests 1413, 1514; calibration in all |
| StreamLoader | windows of `seq_len` | the shards' own | pull request 1499 |
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from model.data.shards import check_ids, document_starts, read_shard, shard_length
from model.errors import ConfigError, DataError
from model.files import sha256_bytes

_DEFAULT_PREFETCH = 2


class Batch(NamedTuple):
    """inputs, targets: int64 [rows, length], targets one token later. cu_seqlens: int32 [multiple of the bucket size],
    where attention starts anew in a packed row, ended by repeats of the length (None: every row is one sequence).
    max_seqlen: the longest such sequence."""

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int


class HostBatch(NamedTuple):
    """A batch before it goes to the device: uint16 [rows, length + 1], or [tokens + 1] to be cut into rows."""

    tokens: np.ndarray
    cu_seqlens: np.ndarray | None
    max_seqlen: int


@dataclass(frozen=True)
class Share:
    """What one rank of `world` takes: `tokens` a micro-batch, in sequences of at most `seq_len`."""

    shards: list[Path]
    rank: int
    world: int
    tokens: int
    seq_len: int
    vocab: int
    bucket: int

    @property
    def folder(self) -> Path:
        return self.shards[0].parent


class Source(Protocol):
    """Makes one batch after the other; `position` (JSON) is what makes the next one."""

    def next(self) -> HostBatch: ...

    def position(self) -> dict[str, Any]: ...

    def seek(self, position: dict[str, Any]) -> None: ...


def build_cu_seqlens(starts: np.ndarray, total: int, max_len: int, bucket: int) -> tuple[np.ndarray, int]:
    """Where the sequences of a packed row of `total` tokens start: at each document and every `max_len` tokens in one.

    starts: sorted document starts, 0 is added. max_len 0: documents are not cut. Returns int32 boundaries from 0 to
    `total`, padded with `total` to a multiple of `bucket`, and the longest sequence.
    """
    if not starts.size or starts[0] != 0:
        starts = np.concatenate(([0], starts))
    if max_len > 0:
        pieces = -(-np.diff(starts, append=total) // max_len)
        first_piece = np.cumsum(pieces) - pieces
        starts = np.repeat(starts - first_piece * max_len, pieces) + np.arange(pieces.sum()) * max_len
    result = np.full(-(-(starts.size + 1) // bucket) * bucket, total, dtype=np.int32)
    result[: starts.size] = starts
    return result, int(np.diff(starts, append=total).max())


class _DocumentSource:
    """Spans of `tokens` + 1 a rank from the shards in order, from the first BOS on; a shard's rest is dropped."""

    def __init__(self, share: Share) -> None:
        self._share, self._shards, self._span = share, share.shards, share.tokens + 1
        self._step = self._span * share.world
        if all(shard_length(path) < self._step for path in self._shards):
            raise DataError(
                f"{share.folder}: no training shard holds the {self._step} tokens of one micro-batch "
                f"({share.world} ranks of {share.tokens} + 1), wanted larger shards or a smaller train_batch_tokens"
            )
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="shard")
        self._opened: dict[int, Future[tuple[np.ndarray, np.ndarray]]] = {}
        self._go_to(0)

    def _open(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = read_shard(self._shards[index])
        starts = document_starts(tokens)
        check_ids(tokens, self._share.vocab, self._shards[index])
        if not starts.size:
            raise DataError(f"{self._shards[index]}: no BOS, wanted documents that start with one")
        return tokens, starts

    def _go_to(self, index: int, cursor: int | None = None) -> None:
        """Makes shard `index` the current one and starts reading the one behind it."""
        wanted = (index, (index + 1) % len(self._shards))
        self._opened = {i: self._opened.get(i) or self._opener.submit(self._open, i) for i in wanted}
        self._index = index
        self._tokens, self._starts = self._opened[index].result()
        self._cursor = int(self._starts[0]) if cursor is None else cursor

    def next(self) -> HostBatch:
        skipped = 0
        while self._cursor + self._step > self._tokens.size:
            if skipped == len(self._shards):
                raise DataError(
                    f"{self._share.folder}: no training shard holds {self._step} tokens from its first BOS on"
                )
            self._go_to((self._index + 1) % len(self._shards))
            skipped += 1
        start = self._cursor + self._share.rank * self._span
        self._cursor += self._step
        low, high = np.searchsorted(self._starts, (start, start + self._span - 1))
        cu_seqlens, longest = build_cu_seqlens(
            self._starts[low:high] - start, self._share.tokens, self._share.seq_len, self._share.bucket
        )
        return HostBatch(np.array(self._tokens[start : start + self._span]), cu_seqlens, longest)

    def position(self) -> dict[str, Any]:
        return {"shard": self._index, "token": self._cursor}

    def seek(self, position: dict[str, Any]) -> None:
        self._go_to(int(position["shard"]), int(position["token"]))


class _ShuffledSource:
    """Windows of `seq_len` + 1 from every world-th shard, drawn without replacement from PCG64(rank).

    Each shard's windows start at a random phase and lie in random order. A draw picks the shard with a probability
    proportional to its windows left; when none is left all shards are shuffled anew.
    """

    def __init__(self, share: Share) -> None:
        count = len(share.shards)
        if count < share.world:
            raise DataError(f"{share.folder}: {count} training shards, wanted one for each of {share.world} ranks")
        self._share, self._seq_len = share, share.seq_len
        self._shards = share.shards[share.rank :: share.world]
        self._lengths = [shard_length(path) for path in self._shards]
        if max(self._lengths) <= self._seq_len:
            raise DataError(f"{self._shards[0]}: {max(self._lengths)} tokens, wanted more than seq_len={self._seq_len}")
        self._maps: list[np.ndarray | None] = [None] * len(self._shards)
        self._rng = np.random.Generator(np.random.PCG64(share.rank))
        self._shuffle()

    def _shuffle(self) -> None:
        self._state_at_shuffle = json.dumps(self._rng.bit_generator.state)
        self._orders = []
        for length in self._lengths:
            max_phase = min(self._seq_len - 1, max(0, length - self._seq_len - 1))
            phase = int(self._rng.integers(max_phase + 1)) if max_phase > 0 else 0
            windows = max(0, (length - 1 - phase) // self._seq_len)
            self._orders.append(phase + self._rng.permutation(windows) * self._seq_len)
        self._left = np.array([order.size for order in self._orders], dtype=np.float64)

    def next(self) -> HostBatch:
        windows = np.empty((self._share.tokens // self._seq_len, self._seq_len + 1), dtype=np.uint16)
        for row in range(len(windows)):
            total = self._left.sum()
            if total <= 0:
                self._shuffle()
                total = self._left.sum()
            shard = int(self._rng.choice(self._left.size, p=self._left / total))
            self._left[shard] -= 1
            start = self._orders[shard][int(self._left[shard])]
            windows[row] = self._map(shard)[start : start + self._seq_len + 1]
        check_ids(windows.reshape(-1), self._share.vocab, f"{self._share.folder}, a training batch")
        return HostBatch(windows, None, self._seq_len)

    def _map(self, shard: int) -> np.ndarray:
        found = self._maps[shard]
        if found is None:
            found = self._maps[shard] = read_shard(self._shards[shard])
        return found

    def position(self) -> dict[str, Any]:
        return {
            "shuffled_from": self._state_at_shuffle,
            "random_state": json.dumps(self._rng.bit_generator.state),
            "windows_left": [int(left) for left in self._left],
        }

    def seek(self, position: dict[str, Any]) -> None:
        self._rng.bit_generator.state = json.loads(position["shuffled_from"])
        self._shuffle()
        self._left[:] = position["windows_left"]
        self._rng.bit_generator.state = json.loads(position["random_state"])


class _StreamSource:
    """One endless stream over the shards; each micro-batch takes `tokens` + 1 for every rank, one after the other."""

    def __init__(self, share: Share) -> None:
        if not any(shard_length(path) for path in share.shards):
            raise DataError(f"{share.folder}: all training shards are empty")
        self._share, self._shards, self._span = share, share.shards, share.tokens + 1
        self.seek({"shard": 0, "token": 0})

    def next(self) -> HostBatch:
        parts = []
        missing = self._span * self._share.world
        while missing > 0:
            if self._cursor == self._tokens.size:
                self.seek({"shard": (self._index + 1) % len(self._shards), "token": 0})
                continue
            part = self._tokens[self._cursor : self._cursor + missing]
            parts.append(part)
            self._cursor += part.size
            missing -= part.size
        local = np.concatenate(parts)[self._share.rank * self._span :][: self._span]
        check_ids(local, self._share.vocab, f"{self._shards[self._index]} or the one before, a training batch")
        return HostBatch(local, None, self._share.seq_len)

    def position(self) -> dict[str, Any]:
        return {"shard": self._index, "token": self._cursor}

    def seek(self, position: dict[str, Any]) -> None:
        self._index, self._cursor = int(position["shard"]), int(position["token"])
        self._tokens = read_shard(self._shards[self._index])


class Loader:
    """Batches of a source on a device, read ahead by a thread. Use one of the subclasses.

    Not thread-safe itself. `close()` ends the thread; so does dropping the loader. `waited` are the seconds that
    `next_batch` has spent until a batch was ready, all calls together.
    """

    kind: str
    rows = True  # sequences lie in rows of `seq_len`; otherwise one row is cut by `cu_seqlens`
    own_order = False  # each rank has an order of its own, so that a position fits one rank of one world
    _make_source: Callable[[Share], Source]

    def __init__(
        self,
        shards: Sequence[str | os.PathLike[str]],
        *,
        tokens: int,
        seq_len: int,
        vocab_size: int,
        rank: int = 0,
        world_size: int = 1,
        bucket_size: int = 64,
        device: torch.device | str = "cpu",
        prefetch: int = _DEFAULT_PREFETCH,
    ) -> None:
        """tokens: of one rank's micro-batch. bucket_size: `cu_seqlens` is padded to a multiple of it (documents only).

        Raises ConfigError for sizes that cannot be, DataError for the shards.
        """
        share = Share([Path(path) for path in shards], rank, world_size, tokens, seq_len, vocab_size, bucket_size)
        self._check(share)
        self._identity: dict[str, Any] = {
            "loader": self.kind,
            "tokens": tokens,
            "seq_len": seq_len,
            "shards": sha256_bytes(json.dumps([[path.name, shard_length(path)] for path in share.shards]).encode()),
        }
        if self.own_order:
            self._identity |= {"rank": rank, "world_size": world_size}
        self._source = type(self)._make_source(share)
        self._row = seq_len if self.rows else tokens
        self._device = torch.device(device)
        self._pin = self._device.type == "cuda"
        self._prefetch = prefetch
        self._reader: _Reader | None = None
        self._position = self._source.position()
        self.waited = 0.0

    def _check(self, share: Share) -> None:
        tokens, seq_len = share.tokens, share.seq_len
        if not share.shards:
            raise DataError("training: no shards, wanted at least one")
        if not 0 <= share.rank < share.world:
            raise ConfigError(f"rank: got {share.rank} of world_size={share.world}, wanted 0 to {share.world - 1}")
        if tokens < 1 or seq_len < 0:
            raise ConfigError(f"tokens, seq_len: got {tokens}, {seq_len}, wanted at least 1 and at least 0")
        if self.rows and (seq_len < 1 or tokens % seq_len):
            raise ConfigError(f"tokens: got {tokens} a micro-batch and rank, wanted a multiple of seq_len={seq_len}")
        if share.bucket < 1:
            raise ConfigError(f"bucket_size: got {share.bucket}, wanted at least 1")

    def next_batch(self) -> Batch:
        """The next batch, on the device. Raises DataError for a damaged shard or ids beyond the vocabulary."""
        started = time.perf_counter()
        if self._prefetch > 0 and self._reader is None:
            self._reader = _Reader(self._source, self._prefetch, self._pin)
            self._stop = weakref.finalize(self, self._reader.stop)
        ready = _read(self._source, self._pin) if self._reader is None else self._reader.get()
        self.waited += time.perf_counter() - started
        tokens, cu_seqlens, max_seqlen, self._position = ready
        tokens = tokens.to(self._device, non_blocking=True)
        # Converted on the device, into tensors of their own: slices of one would not be aligned.
        inputs = tokens[..., :-1].to(torch.int64).view(-1, self._row)
        targets = tokens[..., 1:].to(torch.int64).view(-1, self._row)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(self._device, non_blocking=True)
        return Batch(inputs, targets, cu_seqlens, max_seqlen)

    def state_dict(self) -> dict[str, Any]:
        """What goes on with the batch after the last one that `next_batch` gave: strings and integers, fit for JSON.

        For DocumentLoader and StreamLoader it is the same on every rank and fits any number of ranks; for
        ShuffledLoader each rank has its own, which fits no other.
        """
        return {**self._identity, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there. Raises DataError when the state is of another loader, batch shape or set of shards."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise DataError(f"loader state: {key} is {state.get(key)!r}, wanted {value!r} as in this run")
        self.close()
        self._source.seek(state["position"])
        self._position = self._source.position()

    def close(self) -> None:
        """Ends the thread that reads ahead and forgets what it has read."""
        if self._reader is not None:
            self._stop()
            self._reader = None
            self._source.seek(self._position)


class DocumentLoader(Loader):
    """Packed documents: inputs [1, tokens] with `cu_seqlens` cut at every BOS and every `seq_len` tokens (0: not)."""

    kind = "documents"
    rows = False
    _make_source = _DocumentSource


class ShuffledLoader(Loader):
    """Shuffled windows: inputs [tokens / seq_len, seq_len]. The order depends on the rank alone, not on any seed.

    Every rank needs a shard of its own.
    """

    kind = "shuffled"
    own_order = True
    _make_source = _ShuffledSource


class StreamLoader(Loader):
    """One sequential stream: inputs [tokens / seq_len, seq_len]."""

    kind = "stream"
    _make_source = _StreamSource


LOADERS: dict[str, type[Loader]] = {cls.kind: cls for cls in (DocumentLoader, ShuffledLoader, StreamLoader)}


_HostTensors = tuple[torch.Tensor, torch.Tensor | None, int, dict[str, Any]]


def _read(source: Source, pin: bool) -> _HostTensors:
    """The source's next batch as (pinned) tensors, with the position behind it."""
    batch = source.next()
    tokens = torch.from_numpy(batch.tokens)
    cu_seqlens = None if batch.cu_seqlens is None else torch.from_numpy(batch.cu_seqlens)
    if pin:
        tokens = tokens.pin_memory()
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.pin_memory()
    return tokens, cu_seqlens, batch.max_seqlen, source.position()


class _Reader:
    """A thread that keeps up to `depth` batches of a source ready. It refers to the source alone, not to the loader."""

    def __init__(self, source: Source, depth: int, pin: bool) -> None:
        self._ready: queue.Queue[_HostTensors | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(source, pin), name="batches", daemon=True)
        self._thread.start()

    def _run(self, source: Source, pin: bool) -> None:
        item: _HostTensors | BaseException
        while not self._stop.is_set():
            try:
                item = _read(source, pin)
            except BaseException as error:
                item = error
            self._ready.put(item)
            if isinstance(item, BaseException):
                return

    def get(self) -> _HostTensors:
        if self._failure is None:
            item = self._ready.get()
            if not isinstance(item, BaseException):
                return item
            self._failure = item
        raise self._failure

    def stop(self) -> None:
        self._stop.set()
        while self._thread.is_alive() and self._thread is not threading.current_thread():
            with suppress(queue.Empty):
                self._ready.get_nowait()  # makes room, should the thread be waiting for some
            self._thread.join(timeout=0.01)
