"""Document-wise test-time training: every document has low-rank adapters of its own, scored first, then trained.

A document is read in chunks. For each chunk: score its tokens with the adapters as they are; then, unless it is the
last, one optimiser step on the mean loss of the chunk. Scoring and gradient share one forward pass (pull request 1530),
in which only the chunk's positions go through the head, and through the last block from its attention on.

Documents do not see each other, so neither the order nor the company in which they are read changes a result. That
leaves the schedule free: the longest start first, a slot goes to the next document the moment one is finished, and the
windows of a step lie packed behind one another, each as long as its own document needs. It is known before the first
step, the same on every rank, and its step sizes are rounded up to a few, so that on a GPU every step replays one of a
few CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.evaluate.adapter_bank import AdapterBank, InitialA
from model.evaluate.documents import balance, document_costs, find_documents, num_chunks, ranges_to_positions
from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.session import Session
from model.evaluate.step_graphs import StepGraphs
from model.gpt import Operands, Tail

PAUSE_STEPS = 32  # between fetches of scores from the device
SIZE_MULTIPLE = 256  # tokens of a step on a GPU are rounded up to a multiple of this ...
MAX_SIZES = 12  # ... and to one of so many sizes, each of which is a CUDA graph


@dataclass
class Step:
    """One forward pass: slot i reads a window of document `document[i]` (-1: it is free). All arrays int64 [slots]."""

    document: np.ndarray
    chunk: np.ndarray
    new: np.ndarray  # bool: the slot was handed over before this step
    start: np.ndarray  # first input of the window, a token of the stream
    length: np.ndarray  # inputs of the window
    offset: np.ndarray  # of the chunk in the window
    count: np.ndarray  # predictions of the chunk
    trains: np.ndarray  # bool: a later chunk follows

    @property
    def size(self) -> int:
        return int(self.length.sum())


def plan_steps(
    documents: np.ndarray, order: np.ndarray, *, slots: int, chunk_size: int, seq_len: int
) -> Iterator[Step]:
    """The steps that read documents [n, 2] (start, length) in `order`, `slots` at a time."""
    document = np.full(slots, -1)
    chunk = np.zeros(slots, dtype=np.int64)
    queue = iter(order.tolist())
    predictions = documents[:, 1] - 1
    chunks = num_chunks(predictions, chunk_size)
    while True:
        free = (document < 0) | (chunk >= chunks[document])
        for slot in np.flatnonzero(free):
            document[slot], chunk[slot] = next(queue, -1), 0
        busy = document >= 0
        if not busy.any():
            return
        first = chunk * chunk_size
        end = np.where(busy, np.minimum(first + chunk_size, predictions[document]), 0)
        start = np.maximum(0, end - seq_len)
        yield Step(
            document=document.copy(),
            chunk=chunk.copy(),
            new=free & busy,
            start=np.where(busy, documents[document, 0] + start, 0),
            length=end - start,
            offset=np.where(busy, first - start, 0),
            count=np.where(busy, end - first, 0),
            trains=busy & (chunk + 1 < chunks[document]),
        )
        chunk += 1


def choose_sizes(sizes: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the values in `sizes` that the others are rounded up to at the least total cost, ascending.

    Exact, by dynamic programming over the distinct values.
    """
    values, weights = np.unique(sizes, return_counts=True)
    n = len(values)
    if n <= count:
        return values
    below = np.concatenate([[0], np.cumsum(weights)])
    # cost[j]: the least sum of rounded sizes for the first j values with the buckets used so far
    cost = values * below[1:]
    cost = np.concatenate([[0], cost]).astype(np.float64)
    choice = np.zeros((count, n + 1), dtype=np.int64)
    for bucket in range(1, count):
        total = cost[None, :] + (below[1:, None] - below[None, :]) * values[:, None]
        total[np.arange(n + 1)[None, :] > np.arange(n)[:, None]] = np.inf
        choice[bucket, 1:] = total.argmin(axis=1)
        cost = np.concatenate([[0], total.min(axis=1)])
    chosen, end = [], n
    for bucket in range(count - 1, -1, -1):
        if end == 0:
            break
        chosen.append(values[end - 1])
        end = int(choice[bucket, end])
    return np.array(chosen[::-1])


class DocumentTrainer:
    """Reads documents with adapters of their own. One for a whole evaluation: buffers and graphs are kept."""

    def __init__(
        self, session: Session, documents: np.ndarray, *, initial_a: InitialA | None = None, seed: int = 0
    ) -> None:
        config, model = session.config, session.model
        self.session, self.documents = session, documents
        encoder, decoder = model.config.layer_order(session.loop)
        self.slots = max(1, min(config.ttt_batch_size, len(documents)))
        self.bank = AdapterBank(
            model.config,
            config,
            layer_slots=len(encoder) + len(decoder),
            slots=self.slots,
            device=session.device,
            dtype=torch.float64 if model.compute_dtype == torch.float64 else torch.float32,
            compute_dtype=model.compute_dtype,
            seed=seed,
            initial_a=initial_a,
        )
        self._operands = self._cast()
        chunk = config.ttt_chunk_size
        self._columns = torch.arange(chunk, device=session.device)
        self._tail_bounds = torch.arange(self.slots + 1, dtype=torch.int32, device=session.device) * chunk
        self._graphs: StepGraphs | None = None

    def prepare(self, parts: list[np.ndarray]) -> None:
        """On a GPU: one CUDA graph for each step size that reading the `parts` in turn will need.

        Kernels are compiled, side by side, and warmed up on random tokens; the stream's own are put aside meanwhile.
        """
        if self.session.device.type != "cuda" or not self.session.graphs:
            return
        multiple = max(SIZE_MULTIPLE, self.slots)
        sizes = np.array([step.size for part in parts for step in self._plan(self._open(part))], dtype=np.int64)
        if not len(sizes):
            return
        chosen = choose_sizes(-(-sizes // multiple) * multiple, MAX_SIZES)
        with self.session.timed("recording"), self.session.random_tokens():
            self._graphs = StepGraphs(self.step, [self._warm_up_control(int(size)) for size in chosen], chosen)
            # The first steps ran on what had not been written: every slot, also one that waits, gets finite values.
            self.bank.hand_over(np.arange(self.slots), np.arange(self.slots))

    def read(self, part: np.ndarray, state: int) -> None:
        """Scores this rank's share of the documents `part`, each starting from the base weights' `state`.

        Documents that the ledger has already are left out; one that was interrupted is read again from its start, and
        what it has scores for is trained on but not scored again.
        """
        self._operands.copy_(self._cast())
        states = np.full(self.slots, state)
        with self.session.late if self._graphs is not None else nullcontext():
            for number, step in enumerate(self._plan(self._open(part)), start=1):
                states[step.new] = state
                self._run(step, states)
                if number % PAUSE_STEPS == 0 or self.session.asked_to_stop:
                    self.session.pause()
        self.session.pause()

    @torch.no_grad()
    def _cast(self) -> Operands:
        """The base weights as a step reads them: they rest while documents are read."""
        return self.session.model.operands()

    def _open(self, part: np.ndarray) -> np.ndarray:
        """This rank's share of the documents `part` that have no full score yet, the most costly first."""
        config, session = self.session.config, self.session
        costs = document_costs(self.documents[part], config.ttt_chunk_size, config.ttt_eval_seq_len)
        mine = part[balance(costs, session.world)[session.rank]]
        starts, ends = self.documents[mine, 0] + 1, self.documents[mine].sum(axis=1)
        done = [session.ledger.is_scored(start, end) for start, end in zip(starts, ends, strict=True)]
        return mine[~np.array(done, dtype=bool)]

    def _plan(self, order: np.ndarray) -> Iterator[Step]:
        config = self.session.config
        return plan_steps(
            self.documents, order, slots=self.slots, chunk_size=config.ttt_chunk_size, seq_len=config.ttt_eval_seq_len
        )

    def _run(self, step: Step, states: np.ndarray) -> None:
        config, ledger = self.session.config, self.session.ledger
        if step.new.any():
            slots = np.flatnonzero(step.new)
            self.bank.hand_over(slots, step.document[slots])
        score = self._forward(step, 0)
        # The targets of a window's inputs start one token later.
        first = step.start + step.offset + 1
        end = first + step.count
        fresh = np.flatnonzero((step.count > 0) & ~ledger.has(first))
        ends = (fresh + 1) * config.ttt_chunk_size
        select = ranges_to_positions(ends - step.count[fresh], ends)
        ledger.score(states[fresh], first[fresh], end[fresh], score, select)
        if step.trains.any():
            slots = np.flatnonzero(step.trains)
            states[slots] = ledger.update(states[slots], first[slots], end[slots], separate=True)
            for repeat in range(1, config.ttt_grad_steps):
                self._forward(step, repeat)

    def _forward(self, step: Step, repeat: int) -> Tensor:
        """Runs one step, the `repeat`-th time on its windows; scores [slots * chunk], a slot's chunk at its end."""
        count = np.where(step.trains, step.chunk * self.session.config.ttt_grad_steps + repeat + 1, 0)
        control = torch.from_numpy(np.stack([step.start, step.length, count]))
        if self._graphs is not None:
            return self._graphs.run(step.size, control)
        return self.step(step.size, control.to(self.session.device), train=bool(step.trains.any()))

    def step(self, size: int, control: Tensor, train: bool = True) -> Tensor:
        """A forward pass over a packed row of `size` inputs, then an optimiser step if asked for.

        control: int64 [3, slots] of first input in the stream, inputs, and the number of the slot's optimiser step
        (0: none). Inputs beyond their sum fill the row and are nobody's.
        """
        session, config = self.session, self.session.config
        start, length, steps = control
        bounds = torch.cat([length.new_zeros(1), length.cumsum(0)])
        rows = torch.arange(size, device=session.device)
        slot = torch.searchsorted(bounds[1:], rows, right=True).clamp_(max=self.slots - 1)
        inputs = (start[slot] + rows - bounds[slot]).clamp_(max=session.num_tokens - 2)
        # The last positions of each window, one line a slot. A chunk that is not full has others before it, and before
        # a window's start that one again: nobody reads what comes of them.
        columns = (length.unsqueeze(1) - len(self._columns) + self._columns).clamp(min=0)
        positions = bounds[:-1].unsqueeze(1).add(columns).clamp_(max=size - 1).view(-1)
        attention_bounds = self._attention_bounds(bounds, size)
        fillings = len(attention_bounds) - len(bounds)
        tail = Tail(positions, F.pad(self._tail_bounds, (0, fillings), value=len(positions)), len(self._columns))
        through = self.bank.open_pass(bounds.int(), steps if train else None)
        with torch.set_grad_enabled(train):
            nll, score = session.losses(
                session.input_ids[inputs][None],
                session.target_ids[inputs + 1][None],
                tail,
                inputs[positions] + 1,
                cu_seqlens=attention_bounds,
                max_seqlen=config.ttt_eval_seq_len,
                operands=self._operands,
                adapters=self.bank.adapters(through, self._tail_bounds),
            )
            if train:
                means = nll.view(self.slots, -1).mean(dim=1)
                self.bank.learn((means * (steps > 0)).sum(), through)
        return score

    def _attention_bounds(self, bounds: Tensor, size: int) -> Tensor:
        """`bounds` and, where the row is filled up, further ones that cut the filling into windows: int32."""
        if self.session.device.type != "cuda":
            return bounds.int()
        seq_len = self.session.config.ttt_eval_seq_len
        filling = torch.arange(1, -(-size // seq_len) + 1, device=bounds.device) * seq_len
        return torch.cat([bounds, (bounds[-1:] + filling).clamp_(max=size)]).int()

    def _warm_up_control(self, size: int) -> Tensor:
        """Every slot reads as many random tokens as fit, and trains."""
        config = self.session.config
        length = max(1, min(size // self.slots, config.ttt_eval_seq_len, self.session.num_tokens - 1))
        return torch.tensor([0, length, 1]).unsqueeze(1).repeat(1, self.slots)


def evaluate_lora_ttt(session: Session, *, initial_a: InitialA | None = None, seed: int = 0) -> None:
    """Scores every document of the stream with adapters of its own."""
    documents = find_documents(session.tokens)
    trainer = DocumentTrainer(session, documents, initial_a=initial_a, seed=seed)
    every = np.arange(len(documents))
    trainer.prepare([every])
    trainer.read(every, ARTIFACT_STATE)
