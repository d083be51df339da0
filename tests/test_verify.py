"""The verifier: honest scorers pass, and each cheat is caught by the check that is meant for it."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import evaluate
from model.checks import FAIL, IMPLIED, Check, Report
from model.config import Config, ModelConfig
from model.data.shards import write_shard
from model.data.tokenizer import ByteTables
from model.errors import ConfigError
from model.evaluate import MODES
from model.evaluate.observe import NORMALISATION, ONCE, ORDER, WARM_UP
from model.gpt import GPT
from model.signals import Terminated
from model.verify import (
    CAUSALITY,
    FULL_SCALE,
    TRAINING_DATA,
    Sample,
    check_scorer,
    planned_tokens,
)
from tests import cheats, honest

VOCABULARY = 24
CONFIG = Config(
    model=ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=2,
        model_dim=16,
        num_heads=2,
        num_kv_heads=1,
        rope_dims=4,
        xsa_last_n=2,
        loop_start=1,
        loop_end=1,
        num_loops=1,
        parallel_start=-1,
    )
).replace(ttt_lora_rank=2, ttt_lora_lr=0.01, global_ttt_lr=0.05, sgd_ttt_lr=0.05)


@cache
def model() -> GPT:
    torch.manual_seed(0)
    network = GPT(CONFIG.model)
    with torch.no_grad():
        network.qo_bank[2:].normal_(0, 0.3)
        network.down_bank.normal_(0, 0.2)
        network.tok_emb.normal_(0, 0.5)
    return network


@cache
def stream() -> np.ndarray:
    rng = np.random.default_rng(0)
    documents = [np.concatenate([[1], rng.integers(4, VOCABULARY, 150)]) for _ in range(8)]
    return np.concatenate(documents).astype(np.uint16)


def tables() -> ByteTables:
    leading = np.arange(VOCABULARY) % 3 == 0
    return ByteTables(np.ones(VOCABULARY, np.int16), leading, np.arange(VOCABULARY) < 4)


def verify(scorer: object, *, shards: list[Path] | None = None, **changes: object) -> Report:
    config = CONFIG.replace(**changes)
    return check_scorer(scorer, model(), stream(), tables(), config, train_shards=shards or [], hide=shards or [])


@cache
def files_can_be_hidden() -> bool:
    code = "from model.isolation import isolate; raise SystemExit(not isolate([]).hidden)"
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def shard_of_sevens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training shard that the cheats look for."""
    shard = folder / "shard.bin"
    write_shard(shard, np.full(1000, 7, dtype=np.uint16))
    monkeypatch.setenv(cheats.SHARD, str(shard))
    return shard


HONEST = {
    "model.evaluate.plain:evaluate_plain": [{}, {"loader": "shuffled"}],
    "model.evaluate.sliding:evaluate_sliding": [{}],
    "model.evaluate.sgd_ttt:evaluate_sgd_ttt": [{}],
    "model.evaluate.lora_ttt:evaluate_lora_ttt": [{}],
    "model.evaluate.phased_ttt:evaluate_phased": [{"phased_order": "stream"}, {"phased_order": "length"}],
    "model.evaluate.sliding_cache:evaluate_sliding_cache": [{}],
    "tests.honest:plain_with_hints": [{}],
    "tests.honest:sgd_ttt_with_hints": [{}],
    "tests.honest:lora_ttt_with_hints": [{}],
    "tests.honest:sliding_cache_with_hints": [{}],
    "tests.honest:phased_with_hints": [{"phased_order": "stream"}],
    "tests.honest:one_token_at_a_time": [{}],
    "tests.honest:the_last_document_first": [{}],
}
QUICK = ("model.evaluate.plain:evaluate_plain", "tests.honest:plain_with_hints", "tests.honest:one_token_at_a_time")
REORDERED = ("tests.honest:the_last_document_first",)


@pytest.mark.parametrize(
    "scorer, changes",
    [
        pytest.param(scorer, changes, marks=[] if scorer in QUICK else pytest.mark.long)
        for scorer, cases in HONEST.items()
        for changes in cases
    ],
)
def test_honest_scorers_pass(scorer: str, changes: dict, tmp_path: Path) -> None:
    shard = tmp_path / "valid.bin"
    write_shard(shard, stream())
    report = verify(scorer, shards=[shard], **changes)
    assert report.legal, report.lines()
    assert report.skipped == ([] if files_can_be_hidden() else [TRAINING_DATA]), report.lines()
    reordered = scorer in REORDERED or changes.get("phased_order") == "length"
    assert ("in the order of processing" in report.checks[0].figure) == reordered


@pytest.mark.parametrize("mode", ["plain", *(pytest.param(mode, marks=pytest.mark.long) for mode in MODES[1:])])
def test_modes_pass_by_their_names(mode: str) -> None:
    """A mode is the same function as above: one seed more, and no fresh process."""
    sample = Sample(seed=11, futures=3, own=3, ends=1, distributions=2, full_tokens=300)
    report = check_scorer(mode, model(), stream(), tables(), CONFIG, sample=sample)
    assert report.legal, report.lines()


@pytest.mark.parametrize("scorer", ["phased", "phased+ngram-tilt", "tests.honest:the_last_document_first"])
def test_stream_order_is_meant_strictly(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes in the order of processing only fails where the order of the stream was asked for."""
    monkeypatch.setitem(evaluate._MODES, "phased", honest.the_last_document_first)
    sample = Sample(futures=3, own=1, ends=0, distributions=1, candidates=8, full_tokens=200)
    for order, failed in (("length", []), ("stream", [CAUSALITY])):
        config = CONFIG.replace(phased_order=order)
        report = check_scorer(scorer, model(), stream(), tables(), config, sample=sample)
        assert report.failed == failed, report.lines()
        figure = report.checks[0].figure
        assert ("in the order of processing" in figure) == (order == "length")
        assert order == "length" or "in the stream" in figure


def test_full_scale_is_in_stream_order_too() -> None:
    """A scorer that keeps the order on short streams alone."""
    sample = Sample(futures=1, own=1, ends=0, distributions=1, candidates=8, full_tokens=1000)
    config = CONFIG.replace(phased_order="stream")
    report = check_scorer(honest.backwards_when_long, model(), stream(), tables(), config, sample=sample)
    assert report.failed == [FULL_SCALE], report.lines()
    assert "in the stream" in next(check.figure for check in report.checks if check.name == FULL_SCALE)


CHEATS = [
    ("peeks_one_ahead", CAUSALITY),
    ("gates_a_hint_on_the_target", CAUSALITY),
    ("counts_other_documents", CAUSALITY),
    ("knows_where_documents_end", CAUSALITY),
    ("gates_a_hint_on_the_candidate", NORMALISATION),
    ("blends_without_normalising", NORMALISATION),
    ("is_more_than_certain", NORMALISATION),
    ("halves_losses_further_on", NORMALISATION),
    ("halves_losses_of_what_was_often_read", NORMALISATION),
    ("halves_losses_far_on", FULL_SCALE),
    ("trains_before_it_scores", ORDER),
    ("trains_in_silence", ORDER),
    ("scores_twice", ONCE),
    ("alters_scores_afterwards", ONCE),
    ("warms_up_on_validation_tokens", WARM_UP),
    ("minds_the_scale", FULL_SCALE),
]


@pytest.mark.parametrize("cheat, check", CHEATS)
def test_each_cheat_is_caught_by_its_check(cheat: str, check: str) -> None:
    report = verify(f"tests.cheats:{cheat}")
    assert not report.legal
    assert report.failed == [check], report.lines()
    implied = [c.name for c in report.checks if c.status == IMPLIED]
    assert implied == ([CAUSALITY, WARM_UP] if check == ORDER else [])


@pytest.mark.parametrize(
    "cheat, checks",
    [
        ("scores_twice_in_silence", [NORMALISATION, ONCE]),
        ("keeps_the_better_of_a_copy", [NORMALISATION, ONCE]),
        ("scores_the_stream_whatever_is_asked", [CAUSALITY, NORMALISATION]),
        ("makes_others_unbelievably_likely", [CAUSALITY, NORMALISATION]),
    ],
)
def test_breaking_two_rules_is_caught_twice(cheat: str, checks: list[str]) -> None:
    assert verify(f"tests.cheats:{cheat}").failed == checks


def test_asking_for_other_tokens_does_not_make_a_scorer_honest() -> None:
    assert CAUSALITY in verify("tests.cheats:minds_being_asked").failed


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_places_are_drawn_by_the_seed(seed: int) -> None:
    for scorer, failed in (("plain", []), ("tests.cheats:peeks_one_ahead", [CAUSALITY])):
        sample = Sample(seed=seed, futures=3, own=4, candidates=12, full_tokens=200)
        report = check_scorer(scorer, model(), stream(), tables(), CONFIG, sample=sample)
        assert report.failed == failed, report.lines()


@pytest.mark.parametrize("cheat, text", [("reads_a_training_shard", None), ("looks_the_answers_up", stream)])
def test_reading_the_data_sets_files_is_caught_in_a_fresh_process(cheat, text, tmp_path, monkeypatch) -> None:
    shard = tmp_path / "shard.bin"
    write_shard(shard, text() if text else np.full(1000, 7, dtype=np.uint16))
    before = shard.read_bytes()
    monkeypatch.setenv(cheats.SHARD, str(shard))
    report = verify(f"tests.cheats:{cheat}", shards=[shard])
    assert report.failed == [TRAINING_DATA], report.lines()
    assert shard.read_bytes() == before  # hidden from the process, not touched


@pytest.mark.parametrize("cheat", ["remembers_the_stream", "remembers_the_stream_in_a_file"])
def test_remembering_an_earlier_run_is_caught_in_a_fresh_process(cheat, tmp_path, monkeypatch) -> None:
    report = verify(f"tests.cheats:{cheat}", shards=[shard_of_sevens(tmp_path, monkeypatch)])
    assert report.failed == [TRAINING_DATA], report.lines()


def test_a_data_folder_is_hidden_as_a_whole(tmp_path, monkeypatch) -> None:
    if not files_can_be_hidden():
        pytest.skip("no user namespaces here")
    copied = tmp_path / "data" / "copy_of_valid.bin"
    copied.parent.mkdir()
    write_shard(copied, stream())
    monkeypatch.setenv(cheats.SHARD, str(copied))
    report = verify("tests.cheats:looks_the_answers_up", shards=[copied.parent])
    assert report.failed == [TRAINING_DATA], report.lines()
    assert copied.is_file()


def _training_data(report: Report) -> Check:
    return next(check for check in report.checks if check.name == TRAINING_DATA)


def test_native_code_that_opens_a_shard_is_caught_where_files_can_be_hidden(tmp_path, monkeypatch) -> None:
    if not files_can_be_hidden():
        pytest.skip("no user namespaces here")
    report = verify("tests.cheats:reads_a_training_shard_natively", shards=[shard_of_sevens(tmp_path, monkeypatch)])
    assert report.failed == [TRAINING_DATA], report.lines()
    assert "scores change in a fresh process" in _training_data(report).figure


def test_where_files_cannot_be_hidden_nothing_is_proved(tmp_path, monkeypatch) -> None:
    """Then only Python's own opens are seen: those fail, and anything else is skipped, not passed."""
    run = subprocess.run
    without = "import sys, model.isolation as i; i._hide = lambda paths: 'no namespaces'; i.main()"

    def fresh_process(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-P", "-m", "model.isolation"]
        return run([command[0], "-P", "-c", without, *command[4:]], **options)

    monkeypatch.setattr("model.verify.subprocess.run", fresh_process)
    shard = shard_of_sevens(tmp_path, monkeypatch)
    for scorer in ("plain", "tests.cheats:reads_a_training_shard_natively"):
        report = verify(scorer, shards=[shard])
        assert report.legal and report.skipped == [TRAINING_DATA], report.lines()
        assert "1 data files still there (no namespaces), not opened by Python" in _training_data(report).figure
    report = verify("tests.cheats:reads_a_training_shard", shards=[shard])
    assert report.failed == [TRAINING_DATA] and "data files opened" in _training_data(report).figure


def test_what_a_scorer_brings_along_is_counted(tmp_path, monkeypatch) -> None:
    shard, mine = tmp_path / "shard.bin", tmp_path / "answers.bin"
    write_shard(shard, stream())
    mine.write_bytes(bytes(1234))
    monkeypatch.setenv(cheats.SHARD, str(mine))
    report = verify("tests.cheats:brings_a_file_along", shards=[shard])
    assert report.legal, report.lines()
    code = Path(cheats.__file__)
    assert report.other_files == {str(mine): 1234, str(code): code.stat().st_size}


def test_a_part_of_the_vocabulary_is_enough_to_see_an_excess() -> None:
    for scorer, legal in (("plain", True), ("tests.cheats:gates_a_hint_on_the_candidate", False)):
        for seed in range(3):
            sample = Sample(seed=seed, futures=1, own=1, ends=0, candidates=12, full_tokens=0)
            report = check_scorer(scorer, model(), stream(), tables(), CONFIG, sample=sample)
            line = next(check for check in report.checks if check.name == NORMALISATION)
            assert (line.status == "pass") == legal, line
            assert not legal or "12 of 24 tokens (estimated)" in line.figure or "of 24 tokens" in line.figure


def test_the_work_is_planned() -> None:
    sample, read = Sample(), []
    check_scorer(
        "plain", model(), stream(), tables(), CONFIG, sample=sample, progress=lambda name, tokens: read.append(tokens)
    )
    planned = planned_tokens(stream(), CONFIG, sample)
    assert 0.7 * planned < sum(read) < 1.1 * planned


@pytest.mark.long
def test_the_published_blend_of_1499_is_no_distribution() -> None:
    report = verify("sliding-cache", compat=True)
    assert NORMALISATION in report.failed and ONCE in report.failed, report.lines()
    assert "sum to" in next(c.figure for c in report.checks if c.name == NORMALISATION and c.status == FAIL)


@pytest.mark.long
def test_the_dropped_sequences_of_1530_are_named() -> None:
    report = verify("plain", compat=True)
    assert report.failed == [ONCE], report.lines()
    assert "tokens have no score" in next(c.figure for c in report.checks if c.name == ONCE)


def test_a_signal_ends_the_verifier() -> None:
    with pytest.raises(Terminated):
        verify("tests.cheats:is_terminated")


def test_own_scratch_files_are_no_memory(tmp_path, monkeypatch) -> None:
    report = verify("tests.honest:keeps_scratch_files", shards=[shard_of_sevens(tmp_path, monkeypatch)])
    assert report.legal, report.lines()


def test_an_unknown_scorer_is_an_error() -> None:
    for scorer in ("tests.cheats:nobody", "tests.nothing:plain", ":", "tests.cheats:", ":plain"):
        with pytest.raises(ConfigError, match=r"evaluator: got '.*', wanted module:function"):
            verify(scorer)
    with pytest.raises(ConfigError, match=r"evaluator: got 'tests\.cheats:SHARD', a str, wanted a function"):
        verify("tests.cheats:SHARD")
    with pytest.raises(ConfigError, match=r"evaluator: it failed on .* tokens: SystemExit: 0"):
        verify("tests.cheats:leaves")
    with pytest.raises(ConfigError, match="eval_mode: got 'nothing'"):
        verify("nothing")
