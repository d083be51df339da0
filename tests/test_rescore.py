"""Saved scores are compared with new ones: honest ledgers of every mode pass, doctored ones do not."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checks import FAIL, PASS, Check
from model.evaluate import EvalResult, evaluate
from model.evaluate.documents import find_documents
from model.evaluate.ledger import Ledger
from model.evaluate.lora_ttt import DocumentTrainer
from model.rescore import DOCUMENT_WINDOWS, LEAST_WINDOWS, SAVED_SCORES, TOLERANCES, Saved, check_saved_scores, rescore
from tests import test_evaluate_modes as modes
from tests import test_verify as small

TOKENS = modes.stream(40, 200, 3, 90, 31, 32, 33, 120, 8, 70, 9, 90, 300, 55)
DATA = modes.dataset(TOKENS)
CONFIG = modes.CONFIG.replace(ngram_table_bits=8, sgd_ttt_chunk_tokens=256, phased_prefix_docs=10)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {"loader": "documents"}),
    ("plain", {"loader": "shuffled"}),
    ("sliding", {}),
    ("sgd-ttt", {}),
    ("lora-ttt", {}),
    ("phased", {"phased_order": "stream"}),
    ("phased", {"phased_order": "length"}),
    ("sliding-cache", {}),
    ("sliding-cache", {"cache_adapters": False}),
    ("lora-ttt+ngram-tilt", {}),
]
each_case = pytest.mark.parametrize("mode, changes", CASES, ids=lambda value: str(value))


@cache
def _scored(mode: str, changes: tuple[tuple[str, Any], ...]) -> EvalResult:
    return evaluate(small.model(), DATA, mode, CONFIG.replace(**dict(changes)), device="cpu")


def scored(mode: str, changes: dict[str, Any]) -> EvalResult:
    return _scored(mode, tuple(changes.items()))


def part(mode: str, changes: dict[str, Any], *, seed: int = 0, tokens_wanted: int = 200) -> tuple[Ledger, int, str]:
    config = CONFIG.replace(**changes)
    return rescore(small.model(), DATA, mode, config, device="cpu", tokens_wanted=tokens_wanted, seed=seed)


def compare(ledger: Ledger, rescored: tuple[Ledger, int, str], *, dtype: str = "float32", **said: Any) -> Check:
    token_bytes = DATA.byte_tables.stream_bytes(DATA.valid_tokens)
    own = ledger.totals(token_bytes)
    facts = {"bpb": own.bpb, "val_loss": own.val_loss, "compute_dtype": dtype} | said.get("facts", {})
    new, drawn_from, new_dtype = rescored
    bpb = said.get("bpb", own.bpb)
    return check_saved_scores(Saved(ledger, facts, bpb), new, drawn_from, token_bytes, dtype=new_dtype)


def doctored(ledger: Ledger, path: Path, where: Any, factor: float) -> Ledger:
    """The ledger with losses multiplied in its file, as somebody would who wants a better score."""
    ledger.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["nll"][where] *= factor
    np.savez(path, **arrays)
    return Ledger.load(path)


@each_case
def test_honest_scores_pass(mode: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    result = scored(mode, changes)
    assert result.compute_dtype == "float32"
    for seed in range(3):
        rescored = part(mode, changes, seed=seed)
        check = compare(result.ledger, rescored, bpb=result.bpb)
        assert check.status == PASS, check
        found = np.flatnonzero(~np.isnan(rescored[0].nll))
        assert np.abs(rescored[0].nll[found] - result.ledger.nll[found]).max() < 1e-4
        assert f"{len(found):,} of {rescored[1]:,} tokens rescored" in check.figure
        assert 100 <= len(found) <= min(rescored[1], 300)
        assert (np.diff(found) > 1).any()  # several places
    monkeypatch.setattr("model.rescore.DOCUMENT_WINDOWS", 100)
    everything = part(mode, changes, tokens_wanted=100_000)
    assert np.isfinite(everything[0].nll).sum() == everything[1]
    assert everything[1] == len(TOKENS) - 1 or mode in ("sgd-ttt", "phased", "sliding-cache")
    assert compare(result.ledger, everything).status == PASS


@each_case
def test_doctored_scores_are_caught(mode: str, changes: dict[str, Any], tmp_path: Path) -> None:
    ledger = scored(mode, changes).ledger
    rescored = part(mode, changes, seed=5)
    places = np.flatnonzero(~np.isnan(rescored[0].nll))
    for where in (slice(None), places[:3]):  # the whole, and a few tokens that are rescored
        check = compare(doctored(ledger, tmp_path / "ledger.npz", where, 0.5), rescored)
        assert check.status == FAIL and "differ by more than 0.02 nats: token" in check.figure, check
    better = doctored(ledger, tmp_path / "ledger.npz", slice(None), 0.98)  # less than bf16 rounds off
    check = compare(better, rescored, dtype="bfloat16")
    assert check.status == FAIL and "wanted a mean of at most 0.005" in check.figure


def test_other_places_with_another_seed() -> None:
    found = [~np.isnan(part("lora-ttt", {}, seed=seed)[0].nll) for seed in range(6)]
    assert len({mask.tobytes() for mask in found}) > 3
    assert np.any(found, axis=0).sum() > found[0].sum()


@pytest.mark.parametrize("tokens_wanted", [400, 100_000])
def test_a_long_document_takes_no_more_steps_than_its_first_windows(
    tokens_wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, runs = modes.dataset(modes.stream(2000, 40, 1000, 3000)), []
    config, run = CONFIG.replace(ttt_batch_size=4), DocumentTrainer._run
    monkeypatch.setattr(DocumentTrainer, "_run", lambda self, *step: runs.append(step) or run(self, *step))
    ledger, drawn_from, _ = rescore(
        small.model(), data, "lora-ttt", config, device="cpu", tokens_wanted=tokens_wanted, seed=0
    )
    most = DOCUMENT_WINDOWS * config.eval.ttt_eval_seq_len
    assert len(runs) <= most // config.eval.ttt_chunk_size
    assert drawn_from == len(data.valid_tokens) - 1
    for start, length in find_documents(data.valid_tokens):
        assert np.isnan(ledger.nll[start + 1 + most : start + length]).all()
    assert np.isfinite(ledger.nll).sum() > most


def test_few_tokens_are_still_several_windows() -> None:
    rescored = part("sliding", {"eval_stride": 32}, tokens_wanted=1)
    assert np.isfinite(rescored[0].nll).sum() > (LEAST_WINDOWS - 1) * 32


def test_a_score_in_bf16_is_allowed_its_rounding() -> None:
    model = small.model()
    for mode in ("plain", "sliding", "lora-ttt"):
        ledger = scored(mode, {}).ledger
        try:
            model.compute_dtype = torch.bfloat16
            rescored = part(mode, {})
        finally:
            model.compute_dtype = torch.float32
        check = compare(ledger, rescored)
        assert rescored[2] == "bfloat16" and check.status == PASS, check
        different = np.nanmax(np.abs(rescored[0].nll - ledger.nll))
        assert TOLERANCES["float32"].token / 20 < different < TOLERANCES["bfloat16"].token


def test_one_token_in_ten_thousand_may_be_further_off_in_bf16() -> None:
    ledger, rescored = Ledger(20_001), Ledger(20_001)
    for one in (ledger, rescored):
        one.score(0, 1, 20_001, np.full(20_000, 3.0))
        one.finish()
    score, token_bytes = ledger.totals(np.ones(20_001, np.int64)), np.ones(20_001, np.int64)
    for count, dtype, status in ((2, "bfloat16", PASS), (3, "bfloat16", FAIL), (1, "float32", FAIL)):
        rescored._nll[1:] = 3.0
        rescored._nll[1 : 1 + count] = 5.0
        facts = {"bpb": score.bpb, "val_loss": score.val_loss, "compute_dtype": dtype}
        saved = Saved(ledger, facts, score.bpb)
        check = check_saved_scores(saved, rescored, 20_000, token_bytes, dtype=dtype)
        assert check.status == status, check


def test_the_recorded_figures_are_the_ledgers() -> None:
    result, rescored = scored("plain", {}), part("plain", {})
    for bpb in (result.bpb / 2, result.bpb * (1 - 1e-6), "1.0", None):
        want = f"result.json says {bpb} bpb, the ledger's scores give {result.bpb:.5f}"
        for said in ({"bpb": bpb}, {"facts": {"bpb": bpb}}):
            assert compare(result.ledger, rescored, **said) == Check(SAVED_SCORES, FAIL, want)
    check = compare(result.ledger, rescored, facts={"val_loss": 1.0})
    assert check.status == FAIL and check.figure.startswith("result.json says 1.0 nats a token")
