"""What the observer of an evaluation writes down, and what it does not let pass."""

from typing import Any

import numpy as np
import pytest
import torch

from model.errors import LegalityError
from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.observe import ORDER, ObservedLedger
from model.gpt import GPT
from tests import test_verify as small

TOKENS = np.append(1, np.arange(4, 23)).astype(np.uint16)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(small.CONFIG.model)


def train(model: GPT) -> None:
    with torch.no_grad():
        model.tok_emb.add_(1e-3)


@pytest.mark.parametrize("state", [2, 12345, -7, 0.5])
def test_a_state_that_nobody_made_is_refused(state: float) -> None:
    ledger = ObservedLedger(TOKENS)
    ledger.score(ARTIFACT_STATE, 1, 5, np.ones(4))
    assert ledger.update(ARTIFACT_STATE, 1, 5) == 1
    with pytest.raises(LegalityError, match=f"score: got state {state}, wanted one of the 2 there are"):
        ledger.score(np.array([1, state]), np.array([5, 6]), np.array([6, 8]), np.ones(3))
    with pytest.raises(LegalityError, match=f"update: got state {state}, wanted one of the 2 there are"):
        ledger.update(state, 1, 5)
    with pytest.raises(LegalityError, match="update: got tokens 15 to 21, wanted targets from 1 to 20"):
        ledger.update(1, 15, 21)


@pytest.mark.parametrize(
    "states, found",
    [
        (1, []),
        (ARTIFACT_STATE, ["token 5 is scored as by the artifact, with other weights"]),
        (np.array([1, ARTIFACT_STATE]), ["token 8 is scored as by the artifact, with other weights"]),
    ],
)
def test_trained_weights_are_not_the_artifacts(states: Any, found: list[str], model: GPT) -> None:
    """The update is in the ledger, but scores are entered as those of the artifact."""
    ledger = ObservedLedger(TOKENS, model=model)
    ledger.score(ARTIFACT_STATE, 1, 5, np.ones(4))
    assert ledger.update(ARTIFACT_STATE, 1, 5) == 1
    train(model)
    ledger.score(states, np.array([5, 8]), np.array([8, 20]), np.ones(15))
    assert ledger.violations.get(ORDER, []) == found


def test_weights_that_are_the_artifacts_again_may_score_as_the_artifact(model: GPT) -> None:
    kept = model.tok_emb.detach().clone()
    ledger = ObservedLedger(TOKENS, model=model)
    ledger.score(ARTIFACT_STATE, 1, 5, np.ones(4))
    state = ledger.update(ARTIFACT_STATE, 1, 5)
    train(model)
    ledger.score(state, 5, 8, np.ones(3))
    ledger.update(state, 5, 8)
    with torch.no_grad():
        model.tok_emb.copy_(kept)
    ledger.score(ARTIFACT_STATE, 8, 20, np.ones(12))
    ledger.close()
    assert not ledger.violations
