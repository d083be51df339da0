"""What the evaluation modes share: the stream on the device, scoring a batch of windows, progress and resuming."""

from __future__ import annotations

import glob
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.compilations import Compilations
from model.config import EvalConfig
from model.data.tokenizer import ByteTables
from model.errors import DataError
from model.evaluate.bpb import Score
from model.evaluate.documents import document_boundaries, pad_boundaries, ranges_to_positions
from model.evaluate.ledger import Ledger
from model.evaluate.ngram_tilt import Tilt
from model.gpt import GPT, Tail
from model.signals import Terminated, stop_signals

Progress = Callable[[Score, int, int], None]
SAVE_SECONDS = 60.0
REPORT_SECONDS = 0.5
CU_SEQLENS_MULTIPLE = 64


class _Stop(Exception):
    """Leaves a mode at a pause, after a signal."""


@dataclass
class Session:
    """One evaluation of `model` on the stream `tokens` (uint16 [T]) under `config`.

    `targets` stands in for `tokens` where losses are taken: the verifier puts other candidates there. `documents_apart`
    says whether attention stops at BOS. `tables` are what hints need of the tokenizer. `loop` is the layer order;
    `graphs` allows CUDA graphs. `progress(score so far, tokens scored, tokens in all)` is called now and then: the
    score is that of the tokens this rank knows of, their number an estimate for all ranks. `ledger_path` is where the
    ledger is saved: by rank 0 there, by the others beside it. `started` is when the evaluation began
    (`time.monotonic`), put back by what it took before an interruption. `compilations` counts what is compiled where
    the evaluation enters it, `late` what is in steps for which graphs were recorded before.
    """

    model: GPT
    config: EvalConfig
    tokens: np.ndarray
    token_bytes: np.ndarray
    ledger: Ledger
    device: torch.device
    documents_apart: bool
    targets: np.ndarray | None = None
    tables: ByteTables | None = None
    tilt: Tilt | None = None
    loop: bool = True
    graphs: bool = True
    progress: Progress | None = None
    ledger_path: Path | None = None
    rank: int = 0
    world: int = 1
    started: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)  # of parts of the evaluation that are reported apart

    def __post_init__(self) -> None:
        if len(self.tokens) < 2:
            raise DataError(f"validation stream: {len(self.tokens)} tokens, wanted at least 2 (the first has no score)")
        if int(self.tokens.max()) >= self.model.config.vocab_size:
            raise DataError(
                f"validation stream: token {int(self.tokens.max())}, wanted ids below the model's vocabulary of "
                f"{self.model.config.vocab_size}: the artifact and the data have different tokenizers"
            )
        if not self.token_bytes.any():
            raise DataError("validation stream: no bytes, wanted text")
        self.input_ids = torch.from_numpy(self.tokens.astype(np.int64)).to(self.device)
        self.target_ids = self.input_ids
        if self.targets is not None:
            self.target_ids = torch.from_numpy(self.targets.astype(np.int64)).to(self.device)
        self.compilations, self.late = Compilations(self.device), Compilations(self.device)
        self._received = [0]  # the number of a signal that asks to stop
        self._saved = time.monotonic()
        self._next_report = self._saved + REPORT_SECONDS

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def mine(self, count: int) -> range:
        """This rank's share of `count` things in order."""
        return range(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def losses(
        self, input_ids: Tensor, targets: Tensor, positions: Tensor | Tail, token_index: Tensor, **inputs: object
    ) -> tuple[Tensor, Tensor]:
        """(differentiable nll, score) in nats of the flat `positions`, or of a Tail, from one forward pass, each [n].

        Their targets are the tokens `token_index` of the stream. The score has the n-gram tilt (then it is fp64); the
        nll that adapters learn from never has. Other arguments go to the model.
        """
        options: dict[str, Any] = {"loop": self.loop, **inputs}
        nll: Any
        if self.tilt is None:
            nll = self.model.loss(input_ids, targets, positions=positions, reduction="none", **options)
            return nll, nll.detach()
        hints = self.tilt.hints[token_index]
        nll, log_p_hint = self.model.loss(
            input_ids, targets, positions=positions, reduction="none", hints=hints, **options
        )
        chosen = targets.reshape(-1)[positions.positions if isinstance(positions, Tail) else positions]
        return nll, self.tilt.apply(nll.detach(), log_p_hint, chosen, token_index)

    def window_scores(self, windows: np.ndarray, **inputs: object) -> Tensor:
        """Scores in nats of windows of the stream from one forward pass, window after window.

        windows: int64 [n, 3] of (first input, inputs, inputs at the front whose predictions are not scored).
        """
        starts, lengths, skips = windows.T
        batch = self._packed(starts, lengths) if self.documents_apart else self._rows(starts, lengths)
        input_ids, targets, first, extra = batch
        positions = self._to_device(ranges_to_positions(first + skips, first + lengths))
        token_index = self._to_device(ranges_to_positions(starts + skips + 1, starts + lengths + 1))
        with torch.no_grad():
            return self.losses(input_ids, targets, positions, token_index, **extra, **inputs)[1]

    def score_windows(self, state: int, windows: np.ndarray) -> None:
        """Scores windows in one forward pass and enters them; leaves out those that the ledger has already."""
        windows = self.not_scored(windows)
        if len(windows):
            starts, lengths, skips = windows.T
            self.ledger.score(state, starts + skips + 1, starts + lengths + 1, self.window_scores(windows))

    def not_scored(self, windows: np.ndarray) -> np.ndarray:
        """The windows that an interrupted evaluation has not scored yet (a compatible one starts over)."""
        if not self.ledger.legal:
            return windows
        done = [self.ledger.is_scored(start + skip + 1, start + length + 1) for start, length, skip in windows]
        return windows[~np.array(done, dtype=bool)]

    @contextmanager
    def random_tokens(self) -> Iterator[None]:
        """Random tokens in the stream's place, for warming up: nothing is learnt or timed on those to be scored."""
        streams = [self.input_ids] if self.target_ids is self.input_ids else [self.input_ids, self.target_ids]
        aside = [stream.clone() for stream in streams]
        generator = torch.Generator(self.device).manual_seed(0)
        for stream in streams:
            stream.random_(0, self.model.config.vocab_size, generator=generator)
        try:
            yield
        finally:
            for stream, tokens in zip(streams, aside, strict=True):
                stream.copy_(tokens)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the seconds of the block to those of a part of the evaluation, without those of compiling in it."""
        started, compiling = time.monotonic(), self.compilations.seconds
        yield
        compiling = self.compilations.seconds - compiling
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - started - compiling

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the block at its next pause, with the ledger saved; a second one ends it at once.

        One of several ranks does not wait for a pause: another rank may be gone for which it would wait in vain, and
        what it saved last is there to go on from.
        """
        if self.ledger_path is None or self.world > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            with stop_signals() as self._received:
                yield
        except _Stop:
            pass
        if number := self._received[0]:
            self._save(self.ledger_path)
            signal.raise_signal(number)  # to the handler from before the block
            raise Terminated(128 + number)  # that one went on

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal waits for the next pause."""
        return self._received[0] != 0

    def pause(self, *, last: bool = False) -> None:
        """A point where nothing is half done: reports progress, saves this rank's ledger when it is time, may stop."""
        if self.asked_to_stop:
            raise _Stop
        now = time.monotonic()
        if self.progress is not None and (last or now >= self._next_report):
            ledger, total = self.ledger, self.num_tokens - 1
            done = ledger.num_shared + self.world * (ledger.num_scored - ledger.num_shared)
            self.progress(ledger.totals(self.token_bytes), min(done, total), total)
            # Adding up a large ledger takes a while: at most a twentieth of the time.
            self._next_report = now + max(REPORT_SECONDS, 20 * (time.monotonic() - now))
        if self.ledger_path is not None and not last and now - self._saved >= SAVE_SECONDS:
            self._save(rank_path(self.ledger_path, self.rank))
            self._saved = time.monotonic()

    def exchange(self) -> None:
        """Makes every rank's ledger whole; rank 0 saves it."""
        self.ledger.synchronise()
        if self.ledger_path is not None and self.rank == 0:
            self._save(self.ledger_path)

    def _save(self, path: Path) -> None:
        self.ledger.seconds = time.monotonic() - self.started
        self.ledger.save(path)

    def packed(self, bounds: np.ndarray) -> dict[str, Any]:
        """What the model needs to read a packed row cut at `bounds`, padded so that few shapes occur."""
        cu_seqlens = self._to_device(pad_boundaries(bounds.astype(np.int32), CU_SEQLENS_MULTIPLE))
        return {"cu_seqlens": cu_seqlens, "max_seqlen": self.config.eval_seq_len}

    def _packed(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray, dict[str, object]]:
        """One row of windows, cut at each window, at BOS and every eval_seq_len tokens within a document."""
        inputs = self._to_device(ranges_to_positions(starts, starts + lengths))
        first = np.cumsum(lengths) - lengths
        seq_len = self.config.eval_seq_len
        cuts = [
            document_boundaries(self.tokens[start : start + length], seq_len)[:-1] + begin
            for start, length, begin in zip(starts, lengths, first, strict=True)
        ]
        extra = self.packed(np.append(np.concatenate(cuts), lengths.sum()))
        return self.input_ids[inputs][None], self.target_ids[inputs + 1][None], first, extra

    def _rows(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray, dict[str, object]]:
        """A row each, padded at the end with whatever follows in the stream: nothing looks ahead."""
        longest = int(lengths.max())
        inputs = self._to_device(starts[:, None] + np.arange(longest)).clamp_(max=self.num_tokens - 2)
        first = np.arange(len(starts)) * longest
        return self.input_ids[inputs], self.target_ids[inputs + 1], first, {}

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def rank_path(path: Path, rank: int) -> Path:
    """Where a rank saves its own part of the ledger `path`; rank 0's is the ledger itself."""
    return path.with_name(f".{path.stem}.rank{rank}.npz") if rank else path


def rank_paths(path: Path) -> list[Path]:
    """Parts that ranks other than the first have left beside the ledger `path`."""
    return sorted(path.parent.glob(f".{glob.escape(path.stem)}.rank*.npz"))


def gradient(tensor: Tensor) -> Tensor:
    """The tensor's gradient, zero where it has none yet."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


def all_reduce_sum(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its sum over the ranks; nothing to do with one rank."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
