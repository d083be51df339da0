"""The ledger of an evaluation: what was scored, by which state, and what each state had learned from.

Every target token of the stream is scored exactly once. A state is the model at some moment; state 0 is the artifact.
An update makes a new state from an old one and names the tokens whose losses it used, all of which must have their
scores already. So a score can never depend on the token it is for, and whoever reads the ledger can check that without
trusting the code that wrote it.

The ranks of one evaluation have a ledger each and exchange what they entered (`synchronise`). Each can save its own at
any time: `load` makes one of what all of them saved, so that an interrupted evaluation goes on from there, on as many
ranks as there are then.

Scores may still be on their way from a GPU when they are entered: the ledger takes the claim at once, so that an
illegal step raises where it happens, and fetches the values in `flush`, without waiting for the device in between.

A compatible ledger (`defects` not empty) belongs to a faithful copy of a published scorer that breaks these rules. It
keeps the repeated scores and the gaps, counts them as that scorer did, and is not a legal score.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.errors import LegalityError
from model.evaluate.bpb import Score
from model.evaluate.documents import ranges_to_positions
from model.files import atomic_write

ARTIFACT_STATE = 0
CERTAIN = -1e-3  # nats; a loss below says that a probability is above 1 by more than rounding
_FORMAT_VERSION = 1
_COLUMNS = (("state", np.int32), ("new_state", np.int32), ("start", np.int64), ("end", np.int64))
_NAMES = tuple(name for name, _ in _COLUMNS)
_ARRAYS = {"nll": np.float64, "scored": np.bool_, "repeat_position": np.int64, "repeat_nll": np.float64}


@dataclass
class Rows:
    """Scores and updates in the order in which they happened, one range of tokens [start, end) each.

    A score has `new_state` -1 and was made by `state`. Update rows with one `new_state` form one update of `state`.
    """

    state: np.ndarray
    new_state: np.ndarray
    start: np.ndarray
    end: np.ndarray

    @property
    def is_score(self) -> np.ndarray:
        return self.new_state < 0

    def __len__(self) -> int:
        return len(self.state)

    def slice(self, first: int, last: int | None = None) -> Rows:
        return Rows(*(getattr(self, name)[first:last] for name, _ in _COLUMNS))

    @classmethod
    def joined(cls, parts: list[Rows]) -> Rows:
        """One table of several, in their order."""
        return cls(
            *(np.concatenate([np.empty(0, kind), *(getattr(p, name) for p in parts)]) for name, kind in _COLUMNS)
        )


@dataclass
class Ledger:
    """Scores in nats of the targets 1 .. num_tokens - 1 of a stream, and the updates between them.

    `defects`: in words, the rules that this run is allowed to break (then `legal` is False); empty for a legal one.
    `meta`: what identifies the evaluation (mode, hashes, settings); saved with the ledger, compared on resuming.
    `seconds`: what the evaluation took up to the last save, over all its interruptions.
    """

    num_tokens: int
    defects: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._nll = np.full(self.num_tokens, np.nan)
        self._scored = np.zeros(self.num_tokens, dtype=bool)  # claimed; the value may still be pending
        self._parts: list[Rows] = []
        self._num_rows = 0
        self._num_states = 1
        self._pending: list[tuple[np.ndarray, np.ndarray, torch.Tensor]] = []  # tokens, which values, values
        self._repeats: list[tuple[np.ndarray, np.ndarray]] = []  # positions and nll (compatible ledgers only)
        self._shared = (0, 1, 0)  # rows, states and repeats that every rank has
        self._shared_scores = 0

    @property
    def nll(self) -> np.ndarray:
        """Scores in nats by token, float64 [num_tokens], nan where there is none (yet). Read-only."""
        view = self._nll.view()
        view.flags.writeable = False
        return view

    @property
    def legal(self) -> bool:
        return not self.defects

    @property
    def num_states(self) -> int:
        return self._num_states

    @property
    def rows(self) -> Rows:
        """Everything that happened, in order."""
        if len(self._parts) != 1:
            self._parts = [Rows.joined(self._parts)]
        return self._parts[0]

    @property
    def num_scored(self) -> int:
        """Tokens with a score, on this rank's account."""
        return int(self._scored.sum())

    @property
    def num_shared(self) -> int:
        """Tokens with a score that every rank knew of when the ranks last exchanged theirs."""
        return self._shared_scores

    def is_scored(self, starts: np.ndarray | int, ends: np.ndarray | int) -> bool:
        """Whether every token of the ranges [start, end) has its score (the value may still be on its way)."""
        return bool(self._scored[ranges_to_positions(np.atleast_1d(starts), np.atleast_1d(ends))].all())

    def has(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each of the tokens has its score: bool."""
        return self._scored[tokens]

    def score(
        self,
        state: np.ndarray | int,
        starts: np.ndarray | int,
        ends: np.ndarray | int,
        nll: torch.Tensor | np.ndarray,
        select: np.ndarray | None = None,
    ) -> None:
        """Enters the scores of the target ranges [start, end), each made by its `state` (or all by one).

        nll: one value in nats for each token, range after range, any float dtype; a tensor on a device is read at the
        next flush. `select` (int64) picks those values out of a longer `nll`. Raises LegalityError when a state does
        not exist or a token is no target, was scored before or stands there twice, ValueError when the number of values
        is another one.
        """
        starts, ends = _ranges(starts, ends)
        positions = self._positions(state, starts, ends, "score")
        if select is None:
            select = np.arange(len(nll))
        if nll.ndim != 1 or len(select) != len(positions):
            raise ValueError(f"nll: got {len(select)} values, wanted one for each of {len(positions)} tokens")
        order = np.argsort(starts, kind="stable")
        overlaps = starts[order][1:][ends[order][:-1] > starts[order][1:]]
        again = np.concatenate([positions[self._scored[positions]], overlaps])
        if len(again) and self.legal:
            raise LegalityError(f"score: token {again[0]} would be scored a second time; wanted each token once")
        self._append(state, -1, starts, ends)
        if len(again):
            values = torch.as_tensor(nll).detach().to(torch.float64).cpu().numpy()
            self._enter_repeats(positions, _checked(positions, values[select]))
            return
        self._scored[positions] = True
        self._pending.append((positions, select, torch.as_tensor(nll).detach()))

    def update(
        self, state: np.ndarray | int, starts: np.ndarray | int, ends: np.ndarray | int, *, separate: bool = False
    ) -> Any:
        """Enters an update on the losses of the target ranges and returns the new state.

        With `separate` each range is an update of its own state (`state` has one entry a range) and the result is an
        array with one new state for each: the documents of a batch adapt independently. Raises LegalityError when a
        state does not exist or a token of the ranges has no score yet.
        """
        starts, ends = _ranges(starts, ends)
        if not (separate or len(starts)):
            starts = ends = np.ones(1, np.int64)  # learns from nothing; each state has a row that made it
        positions = self._positions(state, starts, ends, "update")
        missing = positions[~self._scored[positions]]
        if len(missing):
            raise LegalityError(
                f"update: token {missing[0]} is used before it has its score; wanted scores for all "
                f"{len(positions)} tokens of the update"
            )
        new = self._num_states + (np.arange(len(starts)) if separate else 0)
        self._num_states += len(starts) if separate else 1
        self._append(state, new, starts, ends)
        return new

    def update_together(self, state: int, starts: np.ndarray | int, ends: np.ndarray | int) -> int:
        """`synchronise`, then an update that all ranks make together: one entry, one new state, the same everywhere."""
        self.synchronise()
        new = int(self.update(state, starts, ends))
        self._shared = self._extent()
        return new

    def flush(self) -> None:
        """Fetches the values that are still on a device.

        Raises LegalityError for one that is not a number, or so low that the probability would be above 1.
        """
        if not self._pending:
            return
        positions = np.concatenate([p for p, _, _ in self._pending])
        values = torch.cat([v.to(torch.float64) for _, _, v in self._pending]).cpu().numpy()
        begins = np.cumsum([0, *(len(v) for _, _, v in self._pending)])
        values = values[np.concatenate([s + b for (_, s, _), b in zip(self._pending, begins, strict=False)])]
        self._pending.clear()
        self._nll[positions] = _checked(positions, values)

    def totals(self, token_bytes: np.ndarray) -> Score:
        """The score of what has been entered so far; `token_bytes` int64 [num_tokens].

        A compatible ledger counts repeated scores as often as they were made.
        """
        self.flush()
        scored = ~np.isnan(self._nll)
        loss, tokens, count = self._nll[scored].sum(), scored.sum(), token_bytes[scored].sum()
        for positions, nll in self._repeats:
            loss, tokens, count = loss + nll.sum(), tokens + len(nll), count + token_bytes[positions].sum()
        return Score(float(loss), int(tokens), int(count))

    def missing(self) -> int:
        """Targets without a score."""
        return int((~self._scored[1:]).sum())

    def repeated(self) -> int:
        """Scores beyond the first, over all tokens (compatible ledgers only)."""
        return sum(len(positions) for positions, _ in self._repeats)

    def finish(self) -> None:
        """Fetches the last values. Raises LegalityError when a token was left out (unless a defect is declared)."""
        self.flush()
        if self.legal and self.missing():
            token = int(np.flatnonzero(~self._scored[1:])[0]) + 1
            raise LegalityError(f"score: {self.missing()} tokens were left out, the first is token {token}")

    def synchronise(self) -> None:
        """Exchanges what each rank entered since the last time, so that every rank has the whole ledger.

        States that ranks made on their own in between are renumbered; only those of `update_together` may be held
        across this call. Every rank must call it. Raises LegalityError when two ranks scored one token.
        """
        self.flush()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            rows, states, repeats = self._shared
            mine = self.rows.slice(rows)
            positions = ranges_to_positions(mine.start[mine.is_score], mine.end[mine.is_score])
            positions = np.unique(positions)
            sent = (mine, self._num_states - states, positions, self._nll[positions], self._repeats[repeats:])
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, sent)
            self._parts, self._num_rows, self._num_states = [self.rows.slice(0, rows)], rows, states
            del self._repeats[repeats:]
            self._scored[positions] = False
            for theirs, new_states, *scores in gathered:
                self._adopt(theirs, states, new_states, *scores)
        self._shared, self._shared_scores = self._extent(), self.num_scored

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the ledger to an .npz file in one step."""
        self.flush()
        repeats = [(np.empty(0, np.int64), np.empty(0)), *self._repeats]
        header = {
            "version": _FORMAT_VERSION,
            "defects": self.defects,
            "states": self._num_states,
            "shared": self._shared[:2],
            "meta": self.meta,
            "seconds": float(self.seconds),
        }
        with atomic_write(path, "wb") as file:
            np.savez(
                file,
                header=np.frombuffer(json.dumps(header).encode(), np.uint8),
                nll=self._nll,
                scored=self._scored,
                repeat_position=np.concatenate([p for p, _ in repeats]),
                repeat_nll=np.concatenate([v for _, v in repeats]),
                **self.rows.__dict__,  # in a module that calls vars() no packed script shortens names
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], *others: str | os.PathLike[str]) -> Ledger:
        """Reads what `save` wrote: one ledger, or one of what the ranks of an interrupted evaluation saved each.

        The rank that saved after the last exchange has everything from before it; of the others counts what they
        entered after the same one. The time is the longest of theirs. Raises LegalityError for a file that is damaged,
        not a ledger, at odds with itself, or of another evaluation than the first.
        """
        parts = [cls._read(name) for name in (path, *others)]
        ledger = max(parts, key=lambda part: part._shared)
        for part, name in zip(parts, (path, *others), strict=True):
            if (part.num_tokens, part.defects, part.meta) != (ledger.num_tokens, ledger.defects, ledger.meta):
                raise LegalityError(f"{name}: ledger of another evaluation than those beside it")
            if part is not ledger and part._shared == ledger._shared:
                rows, states, repeats = part._shared
                mine = part.rows.slice(rows)
                positions = np.unique(ranges_to_positions(mine.start[mine.is_score], mine.end[mine.is_score]))
                new_states, nll = part._num_states - states, part._nll[positions]
                ledger._adopt(mine, states, new_states, positions, nll, part._repeats[repeats:])
        ledger._shared, ledger._shared_scores = ledger._extent(), ledger.num_scored
        ledger.seconds = max(part.seconds for part in parts)
        return ledger

    @classmethod
    def _read(cls, path: str | os.PathLike[str]) -> Ledger:
        wanted = {**_ARRAYS, **dict(_COLUMNS)}
        try:
            with open(path, "rb") as stream, np.lib.npyio.NpzFile(stream) as file:  # never unpickles
                header = json.loads(file["header"].tobytes())
                arrays = {name: np.asarray(file[name]) for name in wanted}
            if header["version"] != _FORMAT_VERSION:
                raise ValueError(f"version {header['version']!r:.40}, wanted {_FORMAT_VERSION}")
            ledger = cls(len(arrays["nll"]), tuple(header["defects"]), dict(header["meta"]))
            ledger._num_states = int(header["states"])
            shared_rows, shared_states = (int(n) for n in header.get("shared", (0, 1)))
            seconds = header.get("seconds", 0.0)  # 0 in files from before it was kept
        except Exception as error:  # a damaged archive raises nearly anything
            raise LegalityError(f"{path}: not a ledger ({error})") from error
        if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
            raise LegalityError(f"{path}: seconds is {seconds!r:.40}, wanted a finite float of at least 0")
        ledger.seconds = seconds
        for name, kind in wanted.items():
            if arrays[name].dtype != kind or arrays[name].ndim != 1:
                raise LegalityError(f"{path}: {name} has dtype {arrays[name].dtype}, wanted {np.dtype(kind)}")
        for first, second in (("nll", "scored"), ("repeat_position", "repeat_nll"), *itertools.pairwise(_NAMES)):
            if len(arrays[first]) != len(arrays[second]):
                raise LegalityError(f"{path}: {len(arrays[first])} {first}, wanted {len(arrays[second])} as {second}")
        rows = Rows(*(arrays[name] for name in _NAMES))
        ledger._parts, ledger._num_rows = [rows], len(rows)
        ledger._nll, ledger._scored = arrays["nll"], arrays["scored"]
        positions = arrays["repeat_position"]
        if len(positions):
            ledger._repeats = [(positions, arrays["repeat_nll"])]
        ledger._shared = (shared_rows, shared_states, len(ledger._repeats))
        ledger._check_rows(str(path))
        return ledger

    def _check_rows(self, path: str) -> None:
        """Raises LegalityError where what was read from `path` is nothing that `save` wrote."""
        rows, states, (shared_rows, shared_states, _) = self.rows, self._num_states, self._shared
        made, size = rows.new_state[~rows.is_score], self.num_tokens + 1
        if not 1 <= states <= len(made) + 1:
            raise LegalityError(f"{path}: got {states} states, wanted 1 to {len(made) + 1}")
        self._check(rows.state, rows.start, rows.end, path)
        for repeated, _ in self._repeats:
            self._check(ARTIFACT_STATE, repeated, repeated + 1, path)
        begun, ended = (np.bincount(part[rows.is_score], minlength=size) for part in (rows.start, rows.end))
        claims = np.cumsum(begun - ended)[:-1]
        for name, holds, wanted in (
            ("new_state", ((made > rows.state[~rows.is_score]) & (made < states)).all(), "a later state there is"),
            ("scored", np.array_equal(claims if self.legal else claims > 0, self._scored), "what rows say, once each"),
            ("nll", np.array_equal(~np.isnan(self._nll), self._scored), "a value for each score"),
            ("repeat_nll", not (self.legal and self._repeats), "none"),
            ("shared", 0 <= shared_rows <= len(rows) and 1 <= shared_states <= states, "rows and states there are"),
        ):
            if not holds:
                raise LegalityError(f"{path}: {name} is damaged, wanted {wanted}")

    def _extent(self) -> tuple[int, int, int]:
        return self._num_rows, self._num_states, len(self._repeats)

    def _positions(self, state: np.ndarray | int, starts: np.ndarray, ends: np.ndarray, what: str) -> np.ndarray:
        """The tokens of the ranges. Raises LegalityError when one is no target, or a state does not exist."""
        self._check(state, starts, ends, what)
        return ranges_to_positions(starts, ends)

    def _check(self, state: np.ndarray | int, starts: np.ndarray, ends: np.ndarray, what: str) -> None:
        state = np.asarray(state)
        unknown = state[(state < 0) | (state >= self._num_states) | (state % 1 != 0)]
        if len(unknown):
            raise LegalityError(f"{what}: got state {unknown[0]}, wanted one of the {self._num_states} there are")
        wrong = np.flatnonzero((starts < 1) | (ends > self.num_tokens) | (ends < starts))
        if len(wrong):
            start, end = starts[wrong[0]], ends[wrong[0]]
            raise LegalityError(f"{what}: got tokens {start} to {end}, wanted targets from 1 to {self.num_tokens}")

    def _append(self, state: Any, new_state: Any, starts: np.ndarray, ends: np.ndarray) -> None:
        columns = (np.broadcast_to(state, starts.shape), np.broadcast_to(new_state, starts.shape), starts, ends)
        self._parts.append(Rows(*(np.array(c, dtype=kind) for c, (_, kind) in zip(columns, _COLUMNS, strict=True))))
        self._num_rows += len(starts)

    def _enter_repeats(self, positions: np.ndarray, values: np.ndarray) -> None:
        """Enters scores of which some are not the first of their token."""
        fresh = np.zeros(len(positions), dtype=bool)
        fresh[np.unique(positions, return_index=True)[1]] = True
        fresh &= ~self._scored[positions]
        self._scored[positions[fresh]] = True
        self._nll[positions[fresh]] = values[fresh]
        if not fresh.all():
            self._repeats.append((positions[~fresh], values[~fresh]))

    def _adopt(
        self,
        rows: Rows,
        known_states: int,
        new_states: int,
        positions: np.ndarray,
        nll: np.ndarray,
        repeats: list[tuple[np.ndarray, np.ndarray]],
    ) -> None:
        """Adds one rank's rows and scores behind those already here, with its own states renumbered."""
        shift = self._num_states - known_states
        self._append(
            np.where(rows.state >= known_states, rows.state + shift, rows.state),
            np.where(rows.new_state >= 0, rows.new_state + shift, -1),
            rows.start,
            rows.end,
        )
        self._num_states += new_states
        again = positions[self._scored[positions]]
        if len(again) and self.legal:
            raise LegalityError(f"score: token {again[0]} was scored by two ranks; wanted each token once")
        self._enter_repeats(positions, nll)
        self._repeats += repeats


def _ranges(starts: np.ndarray | int, ends: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    return np.atleast_1d(np.asarray(starts, np.int64)), np.atleast_1d(np.asarray(ends, np.int64))


def _checked(positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values`, the losses at `positions`. Raises LegalityError for one that no probability gives."""
    wrong = np.flatnonzero(~(values >= CERTAIN) | np.isinf(values))
    if len(wrong):
        value = values[wrong[0]]
        what = f"of {value:.4g} nats: a probability above 1" if np.isfinite(value) else "that is not finite"
        raise LegalityError(f"score: token {positions[wrong[0]]} has a loss {what}; wanted one above 0 and up to 1")
    return values
