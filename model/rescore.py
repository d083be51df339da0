"""Saved scores against new ones: a part of an evaluation is scored again and compared token by token.

Rescored is what the artifact's own weights have scored, since that depends on nothing before it, at places drawn by a
seed:

    plain, sliding   windows (of a model that knows documents: pieces of them)
    sgd-ttt          windows of the first chunk
    sliding-cache    windows of the batches in front of which the adapters are new
    lora-ttt         documents, or their beginnings
    phased           the same, of the first phase's documents

Later chunks of sgd-ttt and later phases need all the training before them: only a whole evaluation scores those again,
and can be compared in the same way.

Two computations of one score round differently: windows share matrix products with other ones, and adapters learn from
the difference. So single tokens may differ by some tenths of a nat in bf16, but not all of them in one direction: the
mean is held to less (`Tolerance`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from model.checks import FAIL, PASS, Check
from model.config import Config
from model.data.dataset import Dataset
from model.data.progress import progress
from model.errors import LegalityError
from model.evaluate import add_hints, borrowed
from model.evaluate.bpb import Score
from model.evaluate.documents import document_boundaries, find_documents
from model.evaluate.ledger import ARTIFACT_STATE, Ledger
from model.evaluate.lora_ttt import DocumentTrainer
from model.evaluate.phased_ttt import phases_of
from model.evaluate.plain import plain_windows
from model.evaluate.session import Session
from model.evaluate.sgd_ttt import chunk_numbers
from model.evaluate.sliding import sliding_windows
from model.evaluate.sliding_cache import Blend
from model.gpt import GPT

SAVED_SCORES = "saved scores"
LEAST_WINDOWS = 8  # so that there are several places, however long the windows are
# Of a document, at most so many windows' worth of tokens: a long one would be read in hundreds of steps, one after the
# other, and beyond its first window every step is like the next.
DOCUMENT_WINDOWS = 2


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """By how many nats two computations may differ.

    `token`: of one token, but for a share `outliers` of them; `mean`: of their mean, beyond `SIGMAS` standard errors.
    """

    token: float
    mean: float
    outliers: float = 0.0


SIGMAS = 4.0
# A small network on a CPU, about 1,000 tokens: in fp32 no token differs by more than 2e-5. In bf16 means differ by up
# to 3.5e-3 and tokens by up to 0.4 where adapters learn, by 1e-3 and 0.1 without; bf16 and fp32 by up to 5e-3 and 0.4.
# Among hundreds of thousands a token where adapters went another way may be further off.
TOLERANCES = {
    "float32": Tolerance(token=0.02, mean=2e-4),
    "bfloat16": Tolerance(token=1.0, mean=5e-3, outliers=1e-4),
}


def rescore(
    model: GPT,
    dataset: Dataset,
    mode: str,
    config: Config,
    *,
    device: torch.device | str,
    tokens_wanted: int,
    seed: int,
    quiet: bool = True,
) -> tuple[Ledger, int, str]:
    """(scores of about `tokens_wanted` tokens, how many these were drawn from, the dtype that they were computed in).

    `config` has the settings of the saved evaluation. The ledger has no score for the other tokens. Raises ConfigError
    for an unknown mode.
    """
    device, tokens, tables = torch.device(device), dataset.valid_tokens, dataset.byte_tables
    ledger = Ledger(len(tokens))
    with borrowed(model, device, mutated=False), progress("rescoring", tokens_wanted, "tokens", quiet=quiet) as task:

        def show(score: Score, done: int, total: int) -> None:
            task.advance(min(done, tokens_wanted) - task.done)

        session = Session(
            model=model,
            config=config.eval,
            tokens=tokens,
            token_bytes=tables.stream_bytes(tokens),
            tables=tables,
            ledger=ledger,
            device=device,
            documents_apart=config.data.loader == "documents",
            graphs=False,
            progress=show,
        )
        name, rng = add_hints(session, mode), np.random.default_rng(seed)
        if name in ("lora-ttt", "phased"):
            drawn_from = _rescore_documents(session, name, tokens_wanted, rng)
        else:
            drawn_from = _rescore_windows(session, name, tokens_wanted, rng)
        ledger.flush()
        return ledger, drawn_from, str(model.compute_dtype).removeprefix("torch.")


def _rescore_windows(session: Session, name: str, tokens_wanted: int, rng: np.random.Generator) -> int:
    every, eligible = _windows(session, name)
    order = rng.permutation(len(eligible))
    counts = (eligible[:, 1] - eligible[:, 2])[order]
    enough = max(LEAST_WINDOWS, int(np.searchsorted(np.cumsum(counts), tokens_wanted)) + 1)
    chosen = eligible[np.sort(order[:enough])]
    blend = Blend(session, every) if name == "sliding-cache" else None
    for first in range(0, len(chosen), session.config.eval_batch_seqs):
        batch = chosen[first : first + session.config.eval_batch_seqs]
        if blend is None:
            session.score_windows(ARTIFACT_STATE, batch)
        else:
            blend.score(ARTIFACT_STATE, batch, {})  # new adapters change nothing
        session.pause()
    return int(counts.sum())


def _windows(session: Session, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(all windows of a mode, those that the artifact's own weights score): int64 [n, 3], see `plain_windows`."""
    config, num_tokens, seq_len = session.config, session.num_tokens, session.config.eval_seq_len
    if name == "plain":
        batches = plain_windows(num_tokens, seq_len, config.eval_batch_seqs, 0, 1, drop=False)
        windows = np.concatenate([_pieces(session, batch) if session.documents_apart else batch for batch in batches])
        return windows, windows
    windows = sliding_windows(num_tokens, seq_len, config.eval_stride)
    if name == "sgd-ttt":
        return windows, windows[chunk_numbers(windows, num_tokens - 1, config.sgd_ttt_chunk_tokens) == 0]
    if name == "sliding-cache" and config.cache_adapters:
        return windows, windows[np.arange(len(windows)) // config.eval_batch_seqs % config.cache_reset_every == 0]
    return windows, windows


def _pieces(session: Session, batch: np.ndarray) -> np.ndarray:
    """What attention sees of a batch of plain windows that are one row: each piece is a window of its own."""
    start, length = int(batch[0, 0]), int(batch[:, 1].sum())
    cuts = document_boundaries(session.tokens[start : start + length], session.config.eval_seq_len).astype(np.int64)
    lengths = np.diff(cuts)
    return np.stack([start + cuts[:-1], lengths, np.zeros_like(lengths)], axis=1)


def _rescore_documents(session: Session, name: str, tokens_wanted: int, rng: np.random.Generator) -> int:
    """Each document takes up to half of what is left, and no more than `DOCUMENT_WINDOWS`, in whole chunks."""
    config, documents = session.config, find_documents(session.tokens)
    most = DOCUMENT_WINDOWS * config.ttt_eval_seq_len
    eligible = np.arange(len(documents))
    if name == "phased":
        eligible = phases_of(session, documents)[0][0]
    drawn_from = int((documents[eligible, 1] - 1).sum())
    chosen, left = [], tokens_wanted
    for index in rng.permutation(eligible).tolist():
        if left <= 0:
            break
        chunks = max(1, min(left // 2, most) // config.ttt_chunk_size)
        # The beginning of a document does not know what follows.
        documents[index, 1] = min(documents[index, 1], 1 + chunks * config.ttt_chunk_size)
        left -= int(documents[index, 1]) - 1
        chosen.append(index)
    session.config = dataclasses.replace(config, ttt_batch_size=min(config.ttt_batch_size, len(chosen)))
    DocumentTrainer(session, documents).read(np.array(chosen), ARTIFACT_STATE)
    return drawn_from


class Saved(NamedTuple):
    """What `pgolf eval` left: the ledger, its entry in result.json, and the run's bits per byte there."""

    ledger: Ledger
    facts: dict[str, Any]
    bpb: Any


def check_saved_scores(
    saved: Saved, rescored: Ledger, drawn_from: int, token_bytes: np.ndarray, *, dtype: str
) -> Check:
    """A finished ledger against the scores of `rescored`, and what result.json says against the ledger's own sums.

    `dtype` is the one that `rescored` was computed in; the less exact of the two sets the tolerance.
    """
    ledger, facts, bpb = saved
    score = ledger.totals(token_bytes)
    said_and_own = (
        ("bpb", bpb, score.bpb),
        ("bpb", facts.get("bpb"), score.bpb),
        ("nats a token", facts.get("val_loss"), score.val_loss),
    )
    for unit, recorded, own in said_and_own:
        if not isinstance(recorded, int | float) or not math.isclose(recorded, own, rel_tol=1e-9):
            return Check(SAVED_SCORES, FAIL, f"result.json says {recorded} {unit}, the ledger's scores give {own:.5f}")
    exact = {dtype, facts.get("compute_dtype")} <= {"float32", "float64"}
    allowed = TOLERANCES["float32" if exact else "bfloat16"]
    places = np.flatnonzero(~np.isnan(rescored.nll))
    if not len(places):
        raise LegalityError("rescored: got no score, wanted those of some tokens to compare")
    lower = rescored.nll[places] - ledger.nll[places]  # by so much the saved scores look better
    worst = int(np.abs(lower).argmax())
    off = int((~(np.abs(lower) <= allowed.token)).sum())
    said = f"{len(places):,} of {drawn_from:,} tokens rescored"
    if off > allowed.outliers * len(places):
        token = int(places[worst])
        return Check(
            SAVED_SCORES,
            FAIL,
            f"{said}, {off} differ by more than {allowed.token:g} nats: token {token} has {ledger.nll[token]:.4f} "
            f"in the ledger, {rescored.nll[token]:.4f} now",
        )
    mean, error = float(lower.mean()), float(lower.std() / math.sqrt(len(lower)))
    differences = f"largest difference {abs(lower[worst]):.1e} nats, mean {abs(mean):.1e}"
    if abs(mean) > allowed.mean + SIGMAS * error:
        return Check(SAVED_SCORES, FAIL, f"{said}, {differences}, wanted a mean of at most {allowed.mean:g}")
    return Check(SAVED_SCORES, PASS, f"{said}, {differences}; {ledger.num_tokens - 1:,} in all")
