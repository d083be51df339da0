"""Scorers that keep the rules in ways of their own: what the verifier must let pass."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from model.evaluate import run_mode
from model.evaluate.documents import find_documents
from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.session import Session


def plain_with_hints(session: Session) -> None:
    run_mode(session, "plain+ngram-tilt")


def sgd_ttt_with_hints(session: Session) -> None:
    run_mode(session, "sgd-ttt+ngram-tilt")


def lora_ttt_with_hints(session: Session) -> None:
    run_mode(session, "lora-ttt+ngram-tilt")


def phased_with_hints(session: Session) -> None:
    run_mode(session, "phased+ngram-tilt")


def sliding_cache_with_hints(session: Session) -> None:
    run_mode(session, "sliding-cache+ngram-tilt")


def one_token_at_a_time(session: Session) -> None:
    """A growing bias, learnt from each token after its score: an update for every token."""
    model, size = session.model, session.model.config.vocab_size
    seen, state = torch.ones(size, dtype=torch.float64), ARTIFACT_STATE
    with torch.no_grad():
        for start in range(0, session.num_tokens - 1, 64):
            end = min(start + 64, session.num_tokens - 1)
            p = torch.softmax(model.logits(session.input_ids[start:end][None])[0].double(), -1)
            for token in range(start + 1, end + 1):
                mixed = 0.9 * p[token - start - 1] + 0.1 * seen / seen.sum()
                nll = -torch.log(mixed[session.target_ids[token]])
                session.ledger.score(state, token, token + 1, nll[None])
                state = session.ledger.update(state, token, token + 1)
                seen[session.input_ids[token]] += 1


def backwards_when_long(session: Session) -> None:
    """As below, on long streams; otherwise plain."""
    if session.num_tokens > 500:
        the_last_document_first(session)
    else:
        run_mode(session, "plain")


def the_last_document_first(session: Session) -> None:
    """Documents backwards, each with the counts of those that were read before it."""
    seen, state = np.ones(session.model.config.vocab_size), ARTIFACT_STATE
    for start, length in find_documents(session.tokens)[::-1].tolist():
        ids = session.input_ids[start : start + length - 1][None]
        with torch.no_grad():
            p = torch.softmax(session.model.logits(ids)[0].double(), -1).numpy()
        mixed = 0.9 * p + 0.1 * seen / seen.sum()
        targets = session.target_ids[start + 1 : start + length].numpy()
        nll = -np.log(mixed[np.arange(length - 1), targets])
        session.ledger.score(state, start + 1, start + length, nll)
        state = session.ledger.update(state, start + 1, start + length)
        np.add.at(seen, session.tokens[start + 1 : start + length], 1)


def keeps_scratch_files(session: Session) -> None:
    """Writes a file of a fixed name and reads it back, and keeps nothing in it."""
    path = Path(tempfile.gettempdir()) / "pgolf_scratch.bin"
    path.write_bytes(session.tokens.tobytes())
    assert path.read_bytes() == session.tokens.tobytes()
    path.unlink()
    run_mode(session, "plain")
