"""The ledger: what it refuses, what it counts, and what survives the disk."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.errors import LegalityError
from model.evaluate.ledger import ARTIFACT_STATE, Ledger

BYTES = np.arange(10)


def scored(*ranges: tuple[int, int], tokens: int = 10) -> Ledger:
    ledger = Ledger(tokens)
    for start, end in ranges:
        ledger.score(ARTIFACT_STATE, start, end, torch.arange(start, end, dtype=torch.float32))
    return ledger


def test_totals_are_exact_sums_in_float64() -> None:
    ledger = scored((1, 4), (4, 10))
    ledger.finish()
    total = ledger.totals(BYTES)
    assert (total.loss_sum, total.tokens, total.bytes) == (45.0, 9, 45)
    assert total.val_loss == 5.0
    assert total.bpb == pytest.approx(1 / np.log(2))


def test_a_second_score_is_refused_and_changes_nothing() -> None:
    ledger = scored((1, 4))
    with pytest.raises(LegalityError, match="token 3 would be scored a second time"):
        ledger.score(ARTIFACT_STATE, 3, 6, torch.zeros(3))
    assert ledger.totals(BYTES).tokens == 3
    assert len(ledger.rows) == 1
    with pytest.raises(LegalityError, match="token 6 would be scored a second time"):
        ledger.score(ARTIFACT_STATE, np.array([5, 6]), np.array([7, 8]), torch.zeros(4))


def test_an_update_on_a_token_without_a_score_is_refused() -> None:
    ledger = scored((1, 5))
    assert ledger.update(ARTIFACT_STATE, 1, 5) == 1
    with pytest.raises(LegalityError, match="token 5 is used before it has its score"):
        ledger.update(1, 3, 6)
    assert ledger.num_states == 2


def test_a_token_left_out_is_refused_at_the_end() -> None:
    ledger = scored((1, 5), (6, 10))
    with pytest.raises(LegalityError, match="1 tokens were left out, the first is token 5"):
        ledger.finish()


@pytest.mark.parametrize("start, end", [(0, 3), (5, 11), (6, 4)])
def test_ranges_outside_the_targets_are_refused(start: int, end: int) -> None:
    with pytest.raises(LegalityError, match="wanted targets from 1 to 10"):
        Ledger(10).score(ARTIFACT_STATE, start, end, torch.zeros(max(0, end - start)))


def test_a_loss_that_is_not_finite_is_refused() -> None:
    ledger = Ledger(10)
    ledger.score(ARTIFACT_STATE, 4, 6, torch.tensor([1.0, torch.inf]))
    with pytest.raises(LegalityError, match="token 5 has a loss that is not finite"):
        ledger.flush()


@pytest.mark.parametrize("value", [-0.5, -2e-3])
def test_a_probability_above_1_is_refused(value: float) -> None:
    ledger = Ledger(10)
    ledger.score(ARTIFACT_STATE, 4, 6, torch.tensor([-1e-6, value]))  # rounding may go a little below 0
    with pytest.raises(LegalityError, match=f"token 5 has a loss of {value} nats: a probability above 1"):
        ledger.flush()
    compatible = Ledger(10, defects=("scores the end twice",))
    compatible.score(ARTIFACT_STATE, 4, 6, np.ones(2))
    with pytest.raises(LegalityError, match="a probability above 1"):
        compatible.score(ARTIFACT_STATE, 5, 6, np.array([value]))


def test_scores_are_not_to_be_written_to() -> None:
    ledger = scored((1, 4))
    with pytest.raises(ValueError, match="read-only"):
        ledger.nll[1] = 0.0


def test_the_number_of_values_must_fit() -> None:
    with pytest.raises(ValueError, match="got 2 values, wanted one for each of 3"):
        Ledger(10).score(ARTIFACT_STATE, 1, 4, torch.zeros(2))


def test_select_picks_the_values_that_count() -> None:
    ledger = Ledger(10)
    ledger.score(0, 1, 3, torch.tensor([9.0, 1.0, 9.0, 2.0]), np.array([1, 3]))
    ledger.score(0, 5, 6, torch.tensor([7.0, 3.0]), np.array([1]))
    ledger.flush()
    assert ledger.nll[[1, 2, 5]].tolist() == [1.0, 2.0, 3.0]


def test_documents_of_a_batch_adapt_separately() -> None:
    ledger = scored((1, 9))
    new = ledger.update(np.array([0, 0]), np.array([1, 5]), np.array([3, 7]), separate=True)
    assert new.tolist() == [1, 2]
    rows = ledger.rows
    assert rows.new_state.tolist() == [-1, 1, 2]
    assert rows.is_score.tolist() == [True, False, False]


def test_a_compatible_ledger_counts_as_the_published_scorer_does() -> None:
    ledger = Ledger(10, defects=("scores the end twice",))
    ledger.score(0, 1, 8, np.ones(7))
    ledger.score(0, 6, 9, np.full(3, 2.0))
    ledger.finish()
    total = ledger.totals(BYTES)
    assert not ledger.legal
    assert (total.loss_sum, total.tokens) == (7 + 6, 10)
    assert total.bytes == sum(range(1, 8)) + 6 + 7 + 8
    assert (ledger.repeated(), ledger.missing()) == (2, 1)
    assert ledger.nll[6] == 1.0


def test_save_and_load(tmp_path) -> None:
    ledger = Ledger(10, meta={"mode": "plain"})
    ledger.score(0, 1, 4, torch.arange(3.0))
    state = ledger.update(0, 1, 4)
    ledger.save(tmp_path / "ledger.npz")
    again = Ledger.load(tmp_path / "ledger.npz")
    assert again.meta == {"mode": "plain"} and again.legal and again.num_states == state + 1
    assert np.array_equal(again.nll, ledger.nll, equal_nan=True)
    assert [v.tolist() for v in vars(again.rows).values()] == [v.tolist() for v in vars(ledger.rows).values()]
    with pytest.raises(LegalityError, match="second time"):
        again.score(0, 3, 5, torch.zeros(2))
    again.score(state, 4, 10, torch.ones(6))
    again.finish()
    assert again.totals(BYTES).loss_sum == 9.0


def with_header(path: Path, **changes: Any) -> None:
    """Changes entries of a saved ledger's header; None takes one out."""
    with np.load(path) as file:
        arrays = dict(file)
    header = {**json.loads(arrays["header"].tobytes()), **changes}
    header = {name: value for name, value in header.items() if value is not None}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, **arrays)


def test_the_time_is_kept_and_the_longest_of_the_parts_counts(tmp_path) -> None:
    paths = [tmp_path / f"{n}.npz" for n in range(3)]
    for path, seconds in zip(paths, (12.5, 80.0, 3.0), strict=True):
        ledger = Ledger(10)
        ledger.seconds = seconds
        ledger.save(path)
    assert Ledger.load(paths[0]).seconds == 12.5
    assert Ledger.load(*paths).seconds == 80.0
    with_header(paths[0], seconds=None)  # from before the time was kept
    assert Ledger.load(paths[0]).seconds == 0.0


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), True, 7, "600", [1.0]])
def test_a_time_that_is_none_is_refused(seconds: Any, tmp_path) -> None:
    path = tmp_path / "ledger.npz"
    scored((1, 10)).save(path)
    with_header(path, seconds=seconds)
    with pytest.raises(LegalityError, match=r"seconds is .*, wanted a finite float of at least 0"):
        Ledger.load(path)


def test_a_damaged_file_is_refused(tmp_path) -> None:
    path = tmp_path / "ledger.npz"
    scored((1, 10)).save(path)
    data = path.read_bytes()
    for length in (0, 10, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(LegalityError, match="not a ledger"):
            Ledger.load(path)
    refused = 0
    for place in range(0, len(data), 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            loaded = Ledger.load(path)
        except LegalityError:
            refused += 1
        else:  # a byte that says nothing, such as a time stamp
            assert loaded.totals(BYTES) == scored((1, 10)).totals(BYTES) and len(loaded.rows) == 1
    assert refused > len(data) // 7 // 2
