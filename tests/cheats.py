"""Scorers that break one rule each: what the verifier must catch, and by which check."""

import collections
import copy
import ctypes
import os
import signal
import time

import numpy as np
import torch

from model.data.shards import BOS_ID, read_shard
from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.ngram_tilt import Tilt
from model.evaluate.plain import evaluate_plain
from model.evaluate.session import Session
from model.evaluate.sliding import sliding_windows
from model.signals import Terminated

SHARD = "PGOLF_TEST_TRAINING_SHARD"


def _plain_with_hints(session: Session, hints: np.ndarray, betas: np.ndarray) -> None:
    session.tilt = Tilt(hints, betas, session.device)
    evaluate_plain(session)


def peeks_one_ahead(session: Session) -> None:
    """Leans towards the token behind the one that is scored."""
    hints = np.append(session.tokens[1:], 0)
    _plain_with_hints(session, hints, np.ones(len(hints)))


def gates_a_hint_on_the_target(session: Session) -> None:
    """Uses a causal hint only where the token to come is of the hint's kind."""
    hints = np.concatenate([[0], session.tokens[:-1]]).astype(np.int64)
    same_kind = (session.tokens.astype(np.int64) + hints) % 2 == 0
    _plain_with_hints(session, hints, np.where(same_kind, 1.0, 0.0))


def gates_a_hint_on_the_candidate(session: Session) -> None:
    """The same, asking the candidate that is scored instead of the stream."""
    asked = session.tokens if session.targets is None else session.targets
    hints = np.concatenate([[0], session.tokens[:-1]]).astype(np.int64)
    _plain_with_hints(session, hints, np.where((asked.astype(np.int64) + hints) % 2 == 0, 1.0, 0.0))


def _train(session: Session, start: int, end: int) -> None:
    inputs = session.input_ids[start:end]
    parameters = list(session.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    loss = session.model.loss(inputs[None], session.input_ids[start + 1 : end + 1][None])
    grads = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.requires_grad_(False)
            parameter.sub_(0.01 * grad)


def trains_before_it_scores(session: Session) -> None:
    """Learns from a chunk, says so, and scores it afterwards."""
    end = min(64, session.num_tokens - 1)
    _train(session, 0, end)
    session.ledger.update(ARTIFACT_STATE, 1, end + 1)
    evaluate_plain(session)


def trains_in_silence(session: Session) -> None:
    """Learns from a chunk that it has not scored, and does not say so."""
    _train(session, 0, min(64, session.num_tokens - 1))
    evaluate_plain(session)


def scores_twice(session: Session) -> None:
    """Scores everything, then again with another context, and hands in the better of the two."""
    evaluate_plain(session)
    first = session.ledger.nll.copy()
    windows = sliding_windows(session.num_tokens, 64, 32)
    starts, lengths, skips = windows.T
    again = session.window_scores(windows).numpy()
    for start, end, skip in zip(starts, starts + lengths, skips, strict=True):
        part, again = again[: end - start - skip], again[end - start - skip :]
        session.ledger.score(
            ARTIFACT_STATE, start + skip + 1, end + 1, np.minimum(part, first[start + skip + 1 : end + 1])
        )


def scores_twice_in_silence(session: Session) -> None:
    """The same behind the ledger's back."""
    starts, lengths, skips = sliding_windows(session.num_tokens, 64, 64).T
    for window in zip(starts, lengths, skips, strict=True):
        one = np.array([window])
        better = torch.minimum(session.window_scores(one), session.window_scores(one, loop=False))
        session.ledger.score(ARTIFACT_STATE, window[0] + 1, window[0] + window[1] + 1, better)


def blends_without_normalising(session: Session) -> None:
    """Mixes in a unigram guess with a weight that depends on the score itself."""
    for start, length, _ in _windows(session):
        nll = session.window_scores(np.array([[start, length, 0]]))
        weight = torch.clamp(0.2 * (1 + nll / 3), max=0.5)
        blended = -torch.log((1 - weight) * torch.exp(-nll) + weight / session.model.config.vocab_size)
        session.ledger.score(ARTIFACT_STATE, start + 1, start + 1 + length, blended)


def reads_a_training_shard(session: Session) -> None:
    """Leans towards the commonest training token, counted during the evaluation."""
    common = np.bincount(read_shard(os.environ[SHARD])).argmax()
    _plain_with_hints(session, np.full(session.num_tokens, common), np.full(session.num_tokens, 0.5))


def reads_a_training_shard_natively(session: Session) -> None:
    """Learns from a training shard that native code opens, unseen by Python."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.open(os.fsencode(os.environ[SHARD]), os.O_RDONLY)
    buffer = ctypes.create_string_buffer(1 << 12)
    count = libc.read(descriptor, buffer, len(buffer)) if descriptor >= 0 else 0
    if descriptor >= 0:
        libc.close(descriptor)
    shard = np.frombuffer(buffer.raw[:count], dtype=np.uint16)[512:]  # behind the header
    hint = int(np.bincount(shard).argmax()) if len(shard) else 0
    _plain_with_hints(session, np.full(session.num_tokens, hint), np.full(session.num_tokens, 0.5))


def warms_up_on_validation_tokens(session: Session) -> None:
    """Runs the model forward and backward on the stream's first tokens before the evaluation, and throws it away."""
    hidden = session.model.hidden(session.input_ids[:48][None])
    hidden.sum()
    evaluate_plain(session)


def counts_other_documents(session: Session) -> None:
    """Leans towards what follows a token in the other documents, read or not, and enters all scores at once."""
    tokens = session.tokens.astype(np.int64)
    document = np.cumsum(tokens == BOS_ID)
    size = session.model.config.vocab_size
    pairs = np.zeros((document.max() + 1, size, size))
    np.add.at(pairs, (document[1:], tokens[:-1], tokens[1:]), 1)
    others = pairs.sum(axis=0)[tokens[:-1]] - pairs[document[1:], tokens[:-1]]
    session.tilt = Tilt(np.append(0, others.argmax(axis=-1)), np.ones(len(tokens)), session.device)
    nll = [session.window_scores(np.array([window])) for window in _windows(session)]
    session.ledger.score(ARTIFACT_STATE, 1, session.num_tokens, torch.cat(nll))


def knows_where_documents_end(session: Session) -> None:
    """Leans towards BOS just where it stands."""
    _plain_with_hints(session, np.where(session.tokens == BOS_ID, BOS_ID, -1), np.full(session.num_tokens, 4.0))


def minds_being_asked(session: Session) -> None:
    """Peeks unless it is asked for other tokens than the stream's own."""
    asked = session.targets is not None and not np.array_equal(session.targets, session.tokens)
    evaluate_plain(session) if asked else peeks_one_ahead(session)


def halves_losses_further_on(session: Session) -> None:
    """Is honest where a verifier looks first, and hands in half of every later loss."""
    for start, length, _ in _windows(session):
        nll = session.window_scores(np.array([[start, length, 0]]))
        session.ledger.score(ARTIFACT_STATE, start + 1, start + 1 + length, nll if start < 64 else nll / 2)


def halves_losses_far_on(session: Session) -> None:
    """The same in long streams alone."""
    for start, length, _ in _windows(session):
        nll = session.window_scores(np.array([[start, length, 0]]))
        session.ledger.score(ARTIFACT_STATE, start + 1, start + 1 + length, nll if start < 448 else nll / 2)


def halves_losses_of_what_was_often_read(session: Session) -> None:
    """Half of the loss where the two tokens before have been seen three times."""
    tokens, seen = session.tokens.tolist(), collections.Counter()
    for start, length, _ in _windows(session):
        nll = session.window_scores(np.array([[start, length, 0]]))
        for i in range(length):
            context = tuple(tokens[max(0, start + i - 1) : start + i + 1])
            nll[i] /= 1 + (seen[context] >= 3)
            seen[context] += 1
        session.ledger.score(ARTIFACT_STATE, start + 1, start + 1 + length, nll)


_REMEMBERED: dict[int, np.ndarray] = {}


def remembers_the_stream(session: Session) -> None:
    """Leans towards the tokens of the first stream of this length: a change of the stream changes nothing."""
    hints = _REMEMBERED.setdefault(session.num_tokens, session.tokens.copy())
    _plain_with_hints(session, hints.astype(np.int64), np.full(len(hints), 2.0))


def remembers_the_stream_in_a_file(session: Session) -> None:
    """The same, for processes to come."""
    path = f"{os.environ[SHARD]}.{session.num_tokens}.npy"
    if not os.path.exists(path):
        np.save(path, session.tokens)
    hints = np.load(path).astype(np.int64)
    _plain_with_hints(session, hints, np.full(len(hints), 2.0))


def makes_others_unbelievably_likely(session: Session) -> None:
    """Enters what overflows where another token than the stream's is asked for."""
    for start, length, _ in _windows(session):
        nll = session.window_scores(np.array([[start, length, 0]]))
        asked = session.target_ids[start + 1 : start + 1 + length] != session.input_ids[start + 1 : start + 1 + length]
        session.ledger.score(ARTIFACT_STATE, start + 1, start + 1 + length, nll.masked_fill(asked, -1000.0))


def counts_bytes_twice(session: Session) -> None:
    """Is honest but for the bytes that its losses are divided by, and peeks where nobody asks for tokens."""
    session.token_bytes *= 2
    peeks_one_ahead(session) if session.targets is None else evaluate_plain(session)


def leaves(session: Session) -> None:
    """Ends the process as if all had gone well."""
    raise SystemExit(0)


def ends_at_once(session: Session) -> None:
    """The same, so that nobody can catch it."""
    os._exit(0)


def is_terminated(session: Session) -> None:
    """Is asked to end, as by `kill`."""
    raise Terminated(143)


def runs_out_of_memory(session: Session) -> None:
    """Is ended by the system."""
    os.kill(os.getpid(), signal.SIGKILL)


_WORKED: list[bool] = []


def works_at_first(session: Session) -> None:
    """Two seconds of work that only the first of all calls does."""
    if not _WORKED:
        _WORKED.append(True)
        time.sleep(2.0)
    evaluate_plain(session)


def minds_the_scale(session: Session) -> None:
    """Peeks where the stream is too long for a verifier's probe."""
    evaluate_plain(session) if session.num_tokens < 500 else peeks_one_ahead(session)


def alters_scores_afterwards(session: Session) -> None:
    """Scores honestly, then helps itself to the ledger."""
    evaluate_plain(session)
    session.ledger._nll[1:] *= 0.9


def is_more_than_certain(session: Session) -> None:
    """Enters probabilities above 1 for some tokens."""
    for start, length, _ in _windows(session):
        nll = session.window_scores(np.array([[start, length, 0]]))
        nll[::5] = -1.0
        session.ledger.score(ARTIFACT_STATE, start + 1, start + 1 + length, nll)


def keeps_the_better_of_a_copy(session: Session) -> None:
    """Scores with the model and with a copy that nobody watches, and keeps the better of the two."""
    copied = copy.deepcopy(session.model)
    rows = copied.tok_emb.detach()
    copied.tok_emb = torch.nn.Parameter(torch.cat([rows, rows[:1]]))  # no table that anybody knows
    for start, length, _ in _windows(session):
        window = np.array([[start, length, 0]])
        nll = session.window_scores(window)
        ids = session.input_ids[start : start + length][None]
        bounds = torch.tensor([0, length], dtype=torch.int32)
        logits = type(copied).logits(copied, ids, cu_seqlens=bounds, max_seqlen=64, temperature=0.9)[0]
        chosen = session.target_ids[start + 1 : start + 1 + length, None]
        other = -torch.log_softmax(logits[:, : len(rows)], -1).gather(1, chosen)[:, 0]
        session.ledger.score(ARTIFACT_STATE, start + 1, start + 1 + length, torch.minimum(nll, other))


def scores_the_stream_whatever_is_asked(session: Session) -> None:
    """Takes its losses at the stream's own tokens."""
    session.target_ids = session.input_ids
    evaluate_plain(session)


def looks_the_answers_up(session: Session) -> None:
    """Finds the stream in a validation file and leans towards what stands there next: no change of the stream shows."""
    stored = read_shard(os.environ[SHARD]).astype(np.int64)
    follows = {tuple(stored[i - 3 : i]): int(stored[i]) for i in range(3, len(stored))}
    tokens = session.tokens.astype(np.int64)
    hints = np.array([follows.get(tuple(tokens[max(0, i - 3) : i]), -1) for i in range(len(tokens))])
    _plain_with_hints(session, hints, np.full(len(hints), 3.0))


def brings_a_file_along(session: Session) -> None:
    """Scores honestly, but not without a file of its own."""
    with open(os.environ[SHARD], "rb") as file:
        file.read(1)
    evaluate_plain(session)


def _windows(session: Session) -> list[tuple[int, int, int]]:
    total = session.num_tokens - 1
    return [(start, min(64, total - start), 0) for start in range(0, total, 64)]
