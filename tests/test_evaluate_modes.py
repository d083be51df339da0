"""What holds for evaluations as a whole: edges, interruptions, ranks, adapters that do nothing."""

import math
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.adapters import Adapters
from model.data.shards import BOS_ID, document_starts, whole_documents, write_shard
from model.data.tokenizer import ByteTables
from model.errors import ConfigError, DataError, LegalityError
from model.evaluate import EvalResult, evaluate, lora_ttt, parse_mode
from model.evaluate.adapter_bank import document_keys, uniform
from model.evaluate.bpb import check_bytes, score_per_document
from model.evaluate.documents import find_documents
from model.evaluate.ledger import ARTIFACT_STATE, Ledger
from model.evaluate.lora_ttt import evaluate_lora_ttt
from model.evaluate.ngram_cache import CacheCounts
from model.evaluate.ngram_tilt import Tilt
from model.evaluate.observe import hash_weights
from model.evaluate.session import Session
from model.legality import check_ledger, furthest_seen
from model.legality_files import check_documents_apart
from model.score import shown
from model.verify import strictly_in_stream_order
from tests import test_verify as small
from tests.evaluation import arrays

B = BOS_ID
SETTINGS = {
    "eval_seq_len": 32,
    "eval_stride": 8,
    "eval_batch_seqs": 3,
    "ttt_eval_seq_len": 32,
    "ttt_chunk_size": 8,
    "ttt_batch_size": 3,
    "ttt_lora_rank": 2,
    "sgd_ttt_chunk_tokens": 64,
    "phased_prefix_docs": 4,
    "phased_num_phases": 2,
    "global_ttt_chunk_tokens": 32,
}
CONFIG = small.CONFIG.replace(**SETTINGS)
MODES = ("plain", "sliding", "sgd-ttt", "lora-ttt", "phased", "sliding-cache", "plain+ngram-tilt")


def dataset(tokens: np.ndarray) -> SimpleNamespace:
    return SimpleNamespace(valid_tokens=np.asarray(tokens, np.uint16), byte_tables=small.tables(), train_shards=[])


def stream(*lengths: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.concatenate([np.append(B, rng.integers(4, small.VOCABULARY, n)) for n in lengths])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "tokens",
    [
        stream(3),
        [B, 5],
        [B, B],  # an empty document
        [5, 6, 7, 8],  # no BOS
        [5, B, 6, B],  # something in front of the first document, nothing in the last
        stream(0, 1, 2, 31, 32, 33, 0, 8, 7, 9, 90),  # around the edges of windows and chunks
    ],
    ids=["short", "one token", "empty document", "no BOS", "loose ends", "edges"],
)
def test_every_token_but_the_first_is_scored_once(mode: str, tokens: np.ndarray) -> None:
    config = CONFIG.replace(ngram_table_bits=8)
    result = evaluate(small.model(), dataset(tokens), mode, config, device="cpu")
    assert result.tokens == len(tokens) - 1
    assert np.isfinite(result.ledger.nll[1:]).all()
    # Before anything is learnt, in fp32, a probability of one of 24 tokens.
    assert 0 < result.val_loss < 3 * math.log(small.VOCABULARY)
    strict = strictly_in_stream_order(mode, CONFIG)
    assert strict == (mode != "phased")
    assert check_ledger(result.ledger, result.bpb, strict=strict).status == "pass"
    assert result.per_document[:, 2].sum() == result.tokens


@pytest.mark.parametrize("mode", ["sgd-ttt", "phased", "lora-ttt", "sliding-cache"])
def test_the_model_is_left_as_it_came(mode: str) -> None:
    model = small.model()
    before, flags = hash_weights(model), [p.requires_grad for p in model.parameters()]
    evaluate(model, dataset(stream(40, 50, 60)), mode, CONFIG, device="cpu")
    assert hash_weights(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_streams_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match="1 tokens, wanted at least 2"):
        evaluate(small.model(), dataset([B]), "plain", CONFIG, device="cpu")
    with pytest.raises(DataError, match="token 24, wanted ids below the model's vocabulary of 24"):
        data = dataset([B, 24])
        data.byte_tables = ByteTables(np.ones(30, np.int16), np.zeros(30, bool), np.zeros(30, bool))
        evaluate(small.model(), data, "plain", CONFIG, device="cpu")
    with pytest.raises(DataError, match="validation stream: no bytes, wanted text"):
        data = dataset([B, B, B])
        data.byte_tables = ByteTables(np.arange(24) > 3, np.zeros(24, bool), np.arange(24) < 4)
        evaluate(small.model(), data, "plain", CONFIG, device="cpu")
    with pytest.raises(ConfigError, match="eval_mode: got 'plain\\+magic'"):
        parse_mode("plain+magic")


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("mode", MODES)
def test_an_interrupted_evaluation_goes_on(mode: str, tmp_path, monkeypatch) -> None:
    config, data = CONFIG.replace(ngram_table_bits=8), dataset(stream(40, 9, 50, 33, 60, 20, 70))
    whole = evaluate(small.model(), data, mode, config, device="cpu")
    path = tmp_path / "ledger.npz"
    pauses = 0

    def stop(self: Session, *, last: bool = False) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 2:
            self.ledger.save(path)
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Session, "pause", stop)
        patch.setattr(lora_ttt, "PAUSE_STEPS", 2)
        with pytest.raises(Interrupted):
            evaluate(small.model(), data, mode, config, device="cpu", ledger_path=path)
    ledger = Ledger.load(path)
    assert 0 < ledger.missing() < ledger.num_tokens - 1
    scored = ledger.nll.copy()
    result = evaluate(small.model(), data, mode, config, device="cpu", ledger_path=path, resume=True)
    assert np.array_equal(result.ledger.nll[~np.isnan(scored)], scored[~np.isnan(scored)])
    # Documents that are read on with others share their matrix products with others: that may round otherwise.
    tolerance = 2e-6 if mode in ("lora-ttt", "phased") else 0.0
    assert np.allclose(result.ledger.nll[1:], whole.ledger.nll[1:], rtol=0, atol=tolerance)
    assert result.bpb == pytest.approx(whole.bpb, rel=1e-7 if tolerance else 1e-15)
    with pytest.raises(ConfigError, match="ledger of another evaluation"):
        evaluate(small.model(), data, mode, config.replace(eval_stride=4), device="cpu", ledger_path=path, resume=True)


def test_adapters_that_are_zero_change_no_bit() -> None:
    model = small.model()
    ids = torch.from_numpy(stream(40, 30).astype(np.int64))
    cu_seqlens = torch.tensor([0, 41, len(ids) - 1], dtype=torch.int32)
    inputs = {"cu_seqlens": cu_seqlens, "max_seqlen": 64, "reduction": "none"}
    kinds = ("q", "k", "v", "o", "mlp", "lm_head")
    slots = sum(map(len, model.config.layer_order(True)))
    zero = Adapters.zeros(model.config, slots, 2, 2, kinds, torch.device("cpu"), torch.float32)
    zero.cu_seqlens = cu_seqlens
    with torch.no_grad():
        plain = model.loss(ids[:-1][None], ids[1:][None], **inputs)
        assert torch.equal(plain, model.loss(ids[:-1][None], ids[1:][None], adapters=zero, **inputs))


def test_the_schedule_and_the_company_change_nothing() -> None:
    tokens = stream(40, 9, 50, 33, 60)
    found = []
    for slots in (1, 2, 5):
        config = CONFIG.replace(ttt_batch_size=slots)
        found.append(evaluate(small.model(), dataset(tokens), "lora-ttt", config, device="cpu").ledger.nll[1:])
    assert np.allclose(found[0], found[1], atol=1e-5) and np.allclose(found[0], found[2], atol=1e-5)


def test_initial_adapters_depend_on_seed_document_and_layer_alone() -> None:
    documents = torch.arange(50)
    keys = document_keys(3, documents, 2, torch.arange(4).unsqueeze(1))
    values = uniform(keys, 1000)
    assert values.shape == (4, 50, 1000)
    assert torch.equal(values[2, 7], uniform(document_keys(3, torch.tensor([7]), 2, torch.tensor([[2]])), 1000)[0, 0])
    assert len(torch.unique(keys)) == 200
    assert values.min() >= 0 and values.max() < 1
    assert values.mean().item() == pytest.approx(0.5, abs=0.005)
    assert values.var().item() == pytest.approx(1 / 12, rel=0.02)
    neighbours = torch.corrcoef(values[0, :10])
    assert (neighbours - torch.eye(10)).abs().max() < 0.15


def test_the_tilt_is_the_renormalised_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 24, dtype=torch.float64, generator=generator)
    log_p = torch.log_softmax(logits, -1)
    hints, betas = np.array([3, -1, 5, 0, 23, 7]), np.array([0.5, 3.0, 2.0, 0.0, 9.0, 1.0])
    tilt = Tilt(hints, betas, torch.device("cpu"))
    index = torch.arange(6)
    log_p_hint = log_p.gather(1, torch.from_numpy(hints).clamp(min=0)[:, None])[:, 0]
    total = torch.zeros(6, dtype=torch.float64)
    for token in range(24):
        targets = torch.full((6,), token)
        score = tilt.apply(-log_p[:, token], log_p_hint, targets, index)
        total += torch.exp(-score)
        shifted = logits.clone()
        shifted[torch.arange(6)[hints >= 0], hints[hints >= 0]] += torch.from_numpy(betas)[hints >= 0]
        assert torch.allclose(score, -torch.log_softmax(shifted, -1)[:, token])
    assert torch.allclose(total, torch.ones(6, dtype=torch.float64), atol=1e-12)


def test_the_tilt_on_golden_logits() -> None:
    golden = small_tilt_case()
    log_p = torch.log_softmax(torch.from_numpy(golden["tilt.logits"]).double(), -1)
    positions, targets = golden["tilt.positions"], torch.from_numpy(golden["tilt.targets"])
    tilt = Tilt(golden["tilt.hints"], golden["tilt.betas"], torch.device("cpu"))
    index = torch.from_numpy(positions)
    hint = tilt.hints[index].clamp(min=0)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    score = tilt.apply(nll, log_p.gather(1, hint[:, None])[:, 0], targets, index)
    assert np.abs(score.numpy() - golden["tilt.mixed_nll"]).max() < 1e-5


def small_tilt_case() -> dict[str, np.ndarray]:
    from tests.golden import load_npz

    return load_npz("ngram.npz")


def test_cache_counts_are_those_of_a_dictionary() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 3, 40), rng.integers(0, 3, 60)
    order = 4
    events = np.concatenate([np.arange(1, 40), np.arange(41, 80), np.arange(70, 100)])  # some twice, some never
    counts = CacheCounts([first, second], order, events)
    positions = rng.integers(1, 100, 200)
    positions = positions[positions != 40]
    known, tokens = rng.integers(0, len(events) + 1, len(positions)), rng.integers(0, 3, len(positions))
    found = counts.frequency(positions, tokens, known)
    joined = np.concatenate([first, second])
    starts = np.where(np.arange(100) < 40, 0, 40)
    for position, token, limit, frequency in zip(positions, tokens, known, found, strict=True):
        want = math.nan
        for length in range(order - 1, 0, -1):
            if position - length < starts[position]:
                continue
            context = joined[position - length : position].tolist()
            seen = [
                joined[e]
                for e in events[:limit]
                if e - length >= starts[e] and joined[e - length : e].tolist() == context
            ]
            if seen:
                want = seen.count(token) / len(seen)
                break
        assert frequency == want or (math.isnan(frequency) and math.isnan(want))


def test_scores_per_document_add_up() -> None:
    documents = arrays()["docs"]
    nll = np.random.default_rng(0).random(len(arrays()["val_tokens"]))
    nll[0] = np.nan
    found = score_per_document(nll, np.ones(len(nll), np.int64), documents)
    assert found[:, 0].sum() == pytest.approx(nll[1:].sum(), rel=1e-12)
    assert np.array_equal(found[:, 2], documents[:, 1] - 1)


def test_bytes_are_checked_against_the_text() -> None:
    tokenizer = SimpleNamespace(decode_batch=lambda bodies: ["x" * len([t for t in body if t > 3]) for body in bodies])
    tokens = stream(5, 9).astype(np.uint16)
    tables = small.tables()
    plain = type(tables)((np.arange(24) > 3).astype(np.int16), np.zeros(24, bool), tables.is_boundary)
    assert check_bytes(tokens, find_documents(tokens), plain, tokenizer) == (14, 14)
    wrong = type(tables)(plain.base_bytes * 2, plain.has_leading_space, plain.is_boundary)
    with pytest.raises(DataError, match="document at token 0 has 5 bytes of text, the byte tables count 10"):
        check_bytes(tokens, find_documents(tokens), wrong, tokenizer)


def test_the_checks_around_the_scorer(tmp_path) -> None:
    held_out, other = stream(60, 70), stream(60, 70)[::-1]
    shard = tmp_path / "train.bin"
    for body, status in ((other, "pass"), (held_out[:61], "fail")):
        write_shard(shard, np.concatenate([stream(33), body]).astype(np.uint16))
        data = SimpleNamespace(valid_tokens=held_out.astype(np.uint16), train_shards=[shard])
        assert check_documents_apart(data).status == status
    # A document of the same length, with the same tokens but one.
    other = held_out[:61].copy()
    other[9] = other[9] % 20 + 4
    write_shard(shard, other.astype(np.uint16))
    assert check_documents_apart(data).status == "pass"


@pytest.mark.parametrize("cuts", [(40,), (20, 55), (34, 94), (33,), (95,)])
def test_a_validation_document_that_training_shards_cut_is_found(cuts: tuple[int, ...], tmp_path) -> None:
    """A document of 61 tokens at 34 of the training stream, cut by one shard or more, or at its edges."""
    held_out = stream(60, 70).astype(np.uint16)
    training = np.concatenate([stream(33), held_out[:61], stream(50), stream(33)]).astype(np.uint16)
    shards = [tmp_path / f"train{number}.bin" for number in range(len(cuts) + 1)]
    for shard, tokens in zip(shards, np.split(training, cuts), strict=True):
        write_shard(shard, tokens)
    found = check_documents_apart(SimpleNamespace(valid_tokens=held_out, train_shards=shards))
    assert (found.status, found.figure) == ("fail", "1 validation documents stand in the training shards")
    for pieces in (whole_documents(shards), [training]):
        documents = [d for piece in pieces for d in np.split(piece, document_starts(piece)) if d.size]
        assert [len(d) for d in documents] == [34, 61, 51, 34]
    np.testing.assert_array_equal(np.concatenate(list(whole_documents(shards))), training)


def test_a_validation_document_before_a_last_bos_is_found(tmp_path) -> None:
    held_out = np.append(stream(60), B).astype(np.uint16)
    write_shard(tmp_path / "train.bin", np.concatenate([held_out, stream(40)[1:]]).astype(np.uint16))
    data = SimpleNamespace(valid_tokens=held_out, train_shards=[tmp_path / "train.bin"])
    assert check_documents_apart(data).status == "fail"


def test_a_replayed_ledger_shows_what_was_wrong() -> None:
    ledger = Ledger(6)
    ledger.score(ARTIFACT_STATE, 3, 6, np.ones(3))
    state = ledger.update(ARTIFACT_STATE, 3, 6)
    ledger.score(state, 1, 3, np.ones(2))
    ledger.finish()
    passed = check_ledger(ledger, 1.0)
    assert passed.status == "pass" and "order of processing" in passed.figure
    strictly = check_ledger(ledger, 1.0, strict=True)
    assert strictly.status == "fail" and "learnt from tokens up to 6" in strictly.figure
    ledger.rows.start[1] = 1  # an update that uses what has no score yet
    assert "before all of them have scores" in check_ledger(ledger, 1.0).figure
    with pytest.raises(LegalityError):
        ledger.update(state, 0, 3)


def test_lora_ttt_of_a_session_without_documents_to_read() -> None:
    ledger = Ledger(3)
    ledger.score(ARTIFACT_STATE, 1, 3, np.ones(2))
    tokens = np.array([B, 5, 6], dtype=np.uint16)
    session = Session(
        model=small.model(),
        config=CONFIG.eval,
        tokens=tokens,
        token_bytes=np.ones(3, np.int64),
        ledger=ledger,
        device=torch.device("cpu"),
        documents_apart=True,
    )
    evaluate_lora_ttt(session)
    assert len(ledger.rows) == 1


@pytest.mark.parametrize("order", [pytest.param("stream", marks=pytest.mark.long), "length"])
def test_phases_one_to_eight_score_every_token_before_they_learn(order: str) -> None:
    """Every number of phases gives scores of its own; until the first phase ends, they are those of lora-ttt."""
    tokens = stream(40, 9, 50, 33, 60, 20, 70, 12, 31)
    documents = find_documents(tokens)
    alone = evaluate(small.model(), dataset(tokens), "lora-ttt", CONFIG, device="cpu").ledger.nll
    previous = None
    for phases in range(1, 9):
        config = CONFIG.replace(phased_num_phases=phases, phased_order=order, phased_prefix_docs=8)
        result = evaluate(small.model(), dataset(tokens), "phased", config, device="cpu")
        assert check_ledger(result.ledger, result.bpb, strict=order == "stream").status == "pass"
        seen = furthest_seen(result.ledger.rows, result.ledger.num_states)
        rows = result.ledger.rows
        assert order == "length" or (seen[rows.state] <= rows.start)[rows.is_score].all()
        if order == "stream":
            until = documents[8 // phases - 1].sum()
            assert np.allclose(result.ledger.nll[1:until], alone[1:until], rtol=0, atol=2e-5)
            assert np.abs(result.ledger.nll[until:] - alone[until:]).max() > 1e-3
            assert previous is None or np.abs(result.ledger.nll - previous)[1:].max() > 1e-4
            previous = result.ledger.nll


def test_progress_shows_the_running_score_and_the_time_left(monkeypatch, capsys) -> None:
    monkeypatch.setattr("model.data.progress._SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("model.evaluate.session.REPORT_SECONDS", 0.0)
    tokens = stream(*[90] * 12)
    with shown("plain", len(tokens) - 1, quiet=False) as show:
        result = evaluate(small.model(), dataset(tokens), "plain", CONFIG, device="cpu", progress=show)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert re.fullmatch(r"evaluating plain: [\d,]+ of 1,091 tokens, \d\.\d{4} bpb, [\d:]+ left", lines[2])
    assert lines[-1] == f"evaluating plain: 1,091 of 1,091 tokens, {result.bpb:.4f} bpb"


def test_an_evaluation_takes_its_time_from_opening_the_artifact() -> None:
    result = evaluate(
        small.model(),
        dataset(stream(40)),
        "plain+ngram-tilt",
        CONFIG.replace(ngram_table_bits=8),
        device="cpu",
        opening_seconds=100.0,
    )
    assert 100.0 < result.seconds < 200.0
    assert result.seconds_by_part["opening"] == 100.0 and 0 < result.seconds_by_part["hints"] < 100.0


@pytest.mark.parametrize("mode", ["plain", "phased"])
def test_a_resumed_evaluation_takes_the_time_of_all_its_parts(mode: str, tmp_path, monkeypatch) -> None:
    path, data = tmp_path / "ledger.npz", dataset(stream(40, 9, 50, 33, 60, 20, 70))
    monkeypatch.setattr("model.evaluate.session.SAVE_SECONDS", 0.0)
    monkeypatch.setattr(lora_ttt, "PAUSE_STEPS", 2)
    pause = Session.pause

    def stop(self: Session, *, last: bool = False) -> None:
        pause(self, last=last)
        raise Interrupted

    def score(opening: float) -> EvalResult:
        arguments = {"device": "cpu", "ledger_path": path, "resume": True, "opening_seconds": opening}
        return evaluate(small.model(), data, mode, CONFIG, **arguments)

    for opening in (500.0, 300.0):
        with monkeypatch.context() as patch:
            patch.setattr(Session, "pause", stop)
            with pytest.raises(Interrupted):
                score(opening)
    before = Ledger.load(path)
    assert before.missing() and 800.0 < before.seconds < 850.0
    result = score(100.0)
    assert 900.0 < result.seconds < 950.0
    assert result.seconds_by_part["opening"] == 100.0
    finished = Ledger.load(path)
    assert finished.missing() == 0 and 900.0 < finished.seconds <= result.seconds
    assert finished.seconds <= score(0.0).seconds < 950.0


@pytest.mark.parametrize("mode", ["plain", "sgd-ttt", "lora-ttt", "phased", "sliding-cache"])
def test_a_signal_stops_an_evaluation_that_goes_on_later(mode: str, tmp_path, monkeypatch) -> None:
    path, data = tmp_path / "ledger.npz", dataset(stream(40, 9, 50, 33, 60, 20, 70))
    whole = evaluate(small.model(), data, mode, CONFIG, device="cpu")
    losses, calls = Session.losses, 0

    def press(self: Session, *inputs, **options):
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGINT)
        return losses(self, *inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "losses", press)
        with pytest.raises(KeyboardInterrupt):
            evaluate(small.model(), data, mode, CONFIG, device="cpu", ledger_path=path)
    left = Ledger.load(path)
    assert 0 < left.missing() < left.num_tokens - 1
    result = evaluate(small.model(), data, mode, CONFIG, device="cpu", ledger_path=path, resume=True)
    assert np.array_equal(result.ledger.nll[~np.isnan(left.nll)], left.nll[~np.isnan(left.nll)])
    tolerance = 2e-6 if mode in ("lora-ttt", "phased") else 0.0
    assert np.allclose(result.ledger.nll[1:], whole.ledger.nll[1:], rtol=0, atol=tolerance)


def test_a_compatible_evaluation_starts_over(tmp_path) -> None:
    """Its repeated scores cannot be told from those of an interruption."""
    path, config = tmp_path / "ledger.npz", CONFIG.replace(compat=True)
    data = dataset(stream(40, 9, 50, 33))
    once = evaluate(small.model(), data, "sliding-cache", config, device="cpu", ledger_path=path)
    assert once.ledger.repeated() and not once.ledger.legal
    again = evaluate(small.model(), data, "sliding-cache", config, device="cpu", ledger_path=path, resume=True)
    assert again.ledger.repeated() == once.ledger.repeated() and again.bpb == once.bpb
