"""The ledger: what it refuses, what it counts, and what survives the disk."""

import json
import pickle
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


@pytest.mark.parametrize("state", [2, 12345, -7, 0.5, float("nan"), 10**12])
def test_a_state_that_nobody_made_is_refused(state: float) -> None:
    ledger = scored((1, 5))
    assert ledger.update(ARTIFACT_STATE, 1, 5) == 1
    wanted = rf"got state {state}, wanted one of the 2 there are"
    with pytest.raises(LegalityError, match=f"score: {wanted}"):
        ledger.score(state, 5, 7, torch.zeros(2))
    with pytest.raises(LegalityError, match=f"score: {wanted}"):
        ledger.score(np.array([1, state]), np.array([5, 6]), np.array([6, 7]), torch.zeros(2))
    for together in (ledger.update, ledger.update_together):
        with pytest.raises(LegalityError, match=f"update: {wanted}"):
            together(state, 1, 5)
    with pytest.raises(LegalityError, match=f"update: {wanted}"):
        ledger.update(np.array([0, state]), np.array([1, 2]), np.array([2, 3]), separate=True)
    assert (len(ledger.rows), ledger.num_states, ledger.num_scored) == (2, 2, 4)
    ledger.score(np.array([0, 1]), np.array([5, 6]), np.array([6, 7]), torch.zeros(2))


def test_an_update_that_learns_from_nothing_makes_a_state_too(tmp_path) -> None:
    ledger, none = scored((1, 5)), np.empty(0, np.int64)
    assert ledger.update(ARTIFACT_STATE, none, none) == 1
    assert ledger.update(none, none, none, separate=True).tolist() == []
    ledger.score(1, 5, 10, torch.ones(5))
    ledger.save(tmp_path / "ledger.npz")
    assert Ledger.load(tmp_path / "ledger.npz").num_states == 2


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
        header = {**json.loads(file["header"].tobytes()), **changes}
    header = {name: value for name, value in header.items() if value is not None}
    with_arrays(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8))


def with_arrays(path: Path, **changes: Any) -> None:
    with np.load(path) as file:
        arrays = {**dict(file), **changes}
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


def three_chunks(path: Path) -> None:
    """Saves a ledger of 1500 of 2000 tokens, with two updates."""
    ledger, state = Ledger(2000), ARTIFACT_STATE
    for start, end in ((1, 500), (500, 1000), (1000, 1500)):
        ledger.score(state, start, end, np.ones(end - start))
        if end < 1500:
            state = ledger.update(state, start, end)
    ledger.save(path)


def put(array: np.ndarray, where: Any, value: Any) -> np.ndarray:
    array = array.copy()
    array[where] = value
    return array


DAMAGES = [
    ("nll", lambda a: put(a, slice(100, None), np.nan), "nll is damaged"),
    ("nll", lambda a: put(a, 1700, 1.0), "nll is damaged"),
    ("nll", lambda a: put(a, 0, 1.0), "nll is damaged"),
    ("nll", lambda a: a[:-1], "1999 nll, wanted 2000 as scored"),
    ("nll", lambda a: a.astype(np.float32), "nll has dtype float32, wanted float64"),
    ("nll", lambda a: a[None], "nll has dtype"),
    ("scored", lambda a: put(a, slice(100, None), False), "scored is damaged"),
    ("scored", lambda a: put(a, 1700, True), "scored is damaged"),
    ("state", lambda a: a + 500, "got state 500, wanted one of the 3 there are"),
    ("state", lambda a: put(a, 2, -3), "got state -3"),
    ("state", lambda a: put(a, 3, 2), "new_state is damaged"),  # a state made from itself
    ("state", lambda a: a[1:], "4 state, wanted 5 as new_state"),
    ("new_state", lambda a: put(a, 3, 3), "new_state is damaged"),
    ("new_state", lambda a: put(a, 1, 0), "new_state is damaged"),
    ("new_state", lambda a: put(a, 1, -1), "got 3 states, wanted 1 to 2"),
    ("end", lambda a: a + 100_000, "got tokens 1 to 100500, wanted targets from 1 to 2000"),
    ("end", lambda a: put(a, 3, 100), "got tokens 500 to 100"),
    ("end", lambda a: put(a, 4, 1600), "scored is damaged"),
    ("start", lambda a: a - 900, "got tokens -899 to 500"),
    ("start", lambda a: put(a, 4, 100), "scored is damaged"),  # two rows for one score
    ("start", lambda a: put(a, 4, 1100), "scored is damaged"),
    ("repeat_position", lambda a: np.array([9, 2000]), "2 repeat_position, wanted 0 as repeat_nll"),
]


@pytest.mark.parametrize("name, change, message", DAMAGES)
def test_a_file_that_contradicts_itself_is_refused(name: str, change: Any, message: str, tmp_path) -> None:
    path = tmp_path / "ledger_plain.npz"
    three_chunks(path)
    assert Ledger.load(path).num_scored == 1499
    with np.load(path) as file:
        changed = change(file[name])
    with_arrays(path, **{name: changed})
    with pytest.raises(LegalityError, match=f"ledger_plain.npz: {message}"):
        Ledger.load(path)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("states", 10**12, "got 1000000000000 states, wanted 1 to 3"),
        ("states", 503, "got 503 states, wanted 1 to 3"),
        ("states", 2, "got state 2, wanted one of the 2 there are"),
        ("states", -3, "got -3 states, wanted 1 to 3"),
        ("states", float("inf"), "not a ledger"),
        ("shared", [6, 1], "shared is damaged"),
        ("shared", [-1, 1], "shared is damaged"),
        ("shared", [0, 4], "shared is damaged"),
        ("shared", [0], "not a ledger"),
        ("version", 2, r"not a ledger \(version 2, wanted 1\)"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(name: str, value: Any, message: str, tmp_path) -> None:
    path = tmp_path / "ledger_plain.npz"
    three_chunks(path)
    with_header(path, **{name: value})
    with pytest.raises(LegalityError, match=f"ledger_plain.npz: {message}"):
        Ledger.load(path)


def test_repeats_are_those_of_a_compatible_ledger(tmp_path) -> None:
    path = tmp_path / "ledger.npz"
    ledger = Ledger(10, defects=("scores the end twice",))
    ledger.score(0, 1, 8, np.ones(7))
    ledger.score(0, 6, 9, np.full(3, 2.0))
    ledger.save(path)
    assert Ledger.load(path).totals(BYTES) == ledger.totals(BYTES)
    with_arrays(path, repeat_position=np.array([6, 10]))
    with pytest.raises(LegalityError, match=r"ledger\.npz: got tokens 10 to 11, wanted targets from 1 to 10"):
        Ledger.load(path)
    scored((1, 10)).save(path)
    with_arrays(path, repeat_position=np.array([6]), repeat_nll=np.array([0.0]))
    with pytest.raises(LegalityError, match=r"ledger\.npz: repeat_nll is damaged, wanted none"):
        Ledger.load(path)


def test_a_file_of_another_kind_is_refused_without_advice_to_unpickle_it(tmp_path) -> None:
    path = tmp_path / "ledger.npz"
    three_chunks(path)
    packed = path.read_bytes()
    np.savez(tmp_path / "objects.npz", header=np.array([{}, None]))
    with (tmp_path / "array").open("wb") as file:
        np.save(file, np.arange(3))
    for data in (
        b"",
        b"text",
        pickle.dumps({"nll": [1.0]}),
        b"X" + packed[1:],  # the rest of the archive is there
        (tmp_path / "array").read_bytes(),
        (tmp_path / "objects.npz").read_bytes(),
    ):
        path.write_bytes(data)
        with pytest.raises(LegalityError, match=r"ledger\.npz: not a ledger \(") as caught:
            Ledger.load(path)
        assert "unsafe" not in str(caught.value) and "allow_pickle=True" not in str(caught.value)
    with pytest.raises(LegalityError, match=r"nothing\.npz: not a ledger \(.*No such file"):
        Ledger.load(tmp_path / "nothing.npz")
