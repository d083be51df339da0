"""The verifier: honest scorers pass, and each cheat is caught by the check that is meant for it."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import Config, ModelConfig
from model.data.shards import write_shard
from model.data.tokenizer import ByteTables
from model.errors import ConfigError
from model.evaluate.observe import ONCE, ORDER, WARM_UP
from model.gpt import GPT
from model.verify import CAUSALITY, FAIL, IMPLIED, NORMALISATION, TRAINING_DATA, Report, check_scorer
from tests import cheats

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
    return check_scorer(scorer, model(), stream(), tables(), config, train_shards=shards)


@pytest.mark.parametrize(
    "mode, changes",
    [
        ("plain", {}),
        ("plain", {"loader": "shuffled"}),
        pytest.param("lora-ttt", {}, marks=pytest.mark.long),
        pytest.param("sliding", {}, marks=pytest.mark.long),
        pytest.param("sgd-ttt", {}, marks=pytest.mark.long),
        pytest.param("sliding-cache", {}, marks=pytest.mark.long),
        pytest.param("phased", {"phased_order": "stream"}, marks=pytest.mark.long),
    ],
)
def test_honest_scorers_pass(mode: str, changes: dict) -> None:
    report = verify(mode, **changes)
    assert report.legal, report.lines()
    assert "in the order of processing" not in report.checks[0].figure


@pytest.mark.long
def test_phased_in_the_public_order_passes_with_its_caveat() -> None:
    report = verify("phased", phased_order="length")
    assert report.legal, report.lines()
    assert "in the order of processing" in report.checks[0].figure


@pytest.mark.parametrize(
    "cheat, check",
    [
        (cheats.peeks_one_ahead, CAUSALITY),
        (cheats.gates_a_hint_on_the_target, CAUSALITY),
        (cheats.gates_a_hint_on_the_candidate, NORMALISATION),
        (cheats.trains_before_it_scores, ORDER),
        (cheats.trains_in_silence, ORDER),
        (cheats.scores_twice, ONCE),
        (cheats.blends_without_normalising, NORMALISATION),
        (cheats.warms_up_on_validation_tokens, WARM_UP),
    ],
)
def test_each_cheat_is_caught_by_its_check(cheat: object, check: str) -> None:
    report = verify(cheat)
    assert not report.legal
    assert report.failed == [check], report.lines()
    implied = [c.name for c in report.checks if c.status == IMPLIED]
    assert implied == ([CAUSALITY, WARM_UP] if check == ORDER else [])


def test_a_better_of_two_behind_the_ledger_is_caught_twice() -> None:
    report = verify(cheats.scores_twice_in_silence)
    assert report.failed == [NORMALISATION, ONCE], report.lines()


def test_reading_training_data_is_caught_in_a_fresh_process(tmp_path, monkeypatch) -> None:
    shard = tmp_path / "train.bin"
    write_shard(shard, np.full(1000, 7, dtype=np.uint16))
    monkeypatch.setenv(cheats.SHARD, str(shard))
    report = verify("tests.cheats:reads_a_training_shard", shards=[shard])
    assert report.failed == [TRAINING_DATA], report.lines()
    honest = verify("plain", shards=[shard])
    assert honest.legal and honest.checks[-1].status == "pass", honest.lines()
    assert len(shard.read_bytes()) == 256 * 4 + 2000  # hidden from the process, not touched


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


def test_an_unknown_scorer_is_an_error() -> None:
    with pytest.raises(ConfigError, match="wanted module:function"):
        verify("tests.cheats:nobody")
    with pytest.raises(ConfigError, match="eval_mode: got 'nothing'"):
        verify("nothing")
