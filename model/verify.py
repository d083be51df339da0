"""Is a score legal? Every rule of the benchmark as a check that anyone can run again (docs/evaluation.md).

A scorer is a function of a Session: it reads `session.tokens`, takes losses at `session.targets` and enters scores and
updates into `session.ledger`. It is run as a black box on a small stream cut from the validation documents, over and
over, with something changed each time:

    causality            what follows is replaced (at random, by one token, by its reverse): earlier scores keep their
                         bits. The token itself is replaced and its old value asked for: the score keeps its bits.
    normalisation        every token of the vocabulary is asked for in turn: the probabilities sum to 1.
    score before update  each update names tokens that have scores; weights change with a named update only; with all
                         learning rates at 0 the scores of the artifact's own state keep their bits.
    single pass          each token has one score, and goes through the model once before it.
    warm-up              no validation token goes through the model before the evaluation.
    no training data     the same scores in a fresh process without the training files.

These run on the CPU, where a run gives the same bits twice (attention's backward pass on a GPU does not).
Then come the checks of the data and the artifact: documents in training and validation, bytes against the decoded text,
size and times. A check that another one's failure makes meaningless is "implied", not a failure of its own.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from model.config import Config
from model.data.shards import BOS_ID
from model.data.tokenizer import ByteTables
from model.errors import ConfigError
from model.evaluate import run_mode
from model.evaluate.documents import find_documents
from model.evaluate.observe import ONCE, ORDER, WARM_UP, Enough, ObservedLedger, watched
from model.evaluate.session import Session
from model.gpt import GPT
from model.isolation import Isolation

Scorer = Callable[[Session], None]
PASS, FAIL, IMPLIED, SKIPPED = "pass", "fail", "implied", "skipped"
CAUSALITY, NORMALISATION, TRAINING_DATA = "causality", "normalisation", "no training data"
SUM_TOLERANCE = 1e-4  # fp32 probabilities of a large vocabulary; an illegal blend is off by percents
OWN_TOKENS = 12  # places where the token itself is replaced
REPLACEMENTS = ("random", "one token", "reversed")
_LEARNING_RATES = ("ttt_lora_lr", "sgd_ttt_lr", "global_ttt_lr", "global_ttt_warmup_start_lr")


@dataclass(frozen=True)
class Check:
    """One line of the report: `figure` says what was measured."""

    name: str
    status: str
    figure: str


@dataclass
class Report:
    checks: list[Check] = field(default_factory=list)

    @property
    def legal(self) -> bool:
        return not any(check.status in (FAIL, IMPLIED) for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that failed of themselves."""
        return [check.name for check in self.checks if check.status == FAIL]

    def lines(self) -> list[str]:
        return [f"{check.status:8s} {check.name:20s} {check.figure}" for check in self.checks]

    def to_json(self) -> str:
        return json.dumps({"legal": self.legal, "checks": [asdict(check) for check in self.checks]}, indent=2)


@dataclass(frozen=True)
class Probe:
    """A small stream of the validation set's beginnings of documents, and the evaluation at its scale."""

    tokens: np.ndarray
    config: Config

    @classmethod
    def cut(cls, valid_tokens: np.ndarray, config: Config) -> Probe:
        """Documents of many lengths, one of them several times, so that n-gram hints and caches find repetitions."""
        bodies = [
            valid_tokens[start + 1 : start + length]
            for start, length in find_documents(valid_tokens)
            if length > 2 and BOS_ID not in valid_tokens[start + 1 : start + length - 1]
        ]
        if not bodies:
            raise ConfigError("verify: the validation stream has no document with two tokens; wanted some text")
        lengths = (100, 3, 40, 60, 40, 24, 40, 1, 55)
        pick = {n: i for i, n in enumerate(dict.fromkeys(lengths))}
        parts = []
        for length in lengths:
            # The same length is the same text. Short documents are read round and round.
            body = bodies[pick[length] % len(bodies)]
            body = body[body != BOS_ID]
            parts += [np.array([BOS_ID], dtype=np.uint16), np.resize(body, length).astype(np.uint16)]
        return cls(np.concatenate(parts), small_settings(config))


def small_settings(config: Config) -> Config:
    """The settings at the probe's scale: short windows, chunks and phases; rates and switches stay."""
    return config.replace(
        eval_seq_len=64,
        eval_stride=16,
        eval_batch_seqs=4,
        ttt_eval_seq_len=64,
        ttt_chunk_size=16,
        ttt_batch_size=4,
        ttt_lora_rank=min(4, config.eval.ttt_lora_rank),
        phased_prefix_docs=min(6, config.eval.phased_prefix_docs),
        phased_num_phases=min(2, config.eval.phased_num_phases),
        global_ttt_chunk_tokens=64,
        global_ttt_batch_seqs=2,
        sgd_ttt_chunk_tokens=128,
        sgd_ttt_batch_seqs=4,
        ngram_table_bits=min(12, config.eval.ngram_table_bits),
        cache_reset_every=2,
        cache_pretrain_tokens=min(2000, config.eval.cache_pretrain_tokens),
    )


class BlackBox:
    """A scorer with a model, run on streams of the caller's choice. The model's weights are restored after each run."""

    def __init__(self, scorer: Scorer, model: GPT, probe: Probe, tables: ByteTables) -> None:
        self.scorer, self.model, self.probe, self.tables = scorer, model, probe, tables
        self._weights = [parameter.detach().clone() for parameter in model.parameters()]

    def run(
        self,
        tokens: np.ndarray,
        *,
        targets: np.ndarray | None = None,
        stop_at: int | None = None,
        hash_weights: bool = False,
        config: Config | None = None,
    ) -> ObservedLedger:
        """The ledger that the scorer leaves for a stream."""
        config = config or self.probe.config
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        ledger = ObservedLedger(tokens, model=self.model if hash_weights else None, stop_at=stop_at)
        session = Session(
            model=self.model,
            config=config.eval,
            tokens=tokens,
            targets=targets,
            token_bytes=self.tables.stream_bytes(tokens),
            ledger=ledger,
            device=next(self.model.parameters()).device,
            documents_apart=config.data.loader == "documents",
            graphs=False,
        )
        try:
            with watched(self.model, ledger):
                self.scorer(session)
            ledger.close()
        except Enough:
            pass
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), self._weights, strict=True):
                    parameter.copy_(value)
        return ledger


def check_scorer(
    scorer: Scorer | str,
    model: GPT,
    valid_tokens: np.ndarray,
    tables: ByteTables,
    config: Config,
    *,
    train_shards: list[Path] | None = None,
    candidates: int | None = None,
    tick: Callable[[str], None] = lambda name: None,
) -> Report:
    """The checks of a scorer: a mode's name, "module:function", or a function of a Session.

    `candidates` limits how many tokens of the vocabulary are asked for in the normalisation check (default: all; a part
    can only show a sum above 1). `train_shards`: what must not be read; the check needs a scorer that can be named.
    `tick(check)` is called before each check.
    """
    train_shards = train_shards or []
    probe = Probe.cut(valid_tokens, config)
    box = BlackBox(resolve(scorer, tables, train_shards), model, probe, tables)
    report = Report()
    tick(ORDER)
    base = box.run(probe.tokens, hash_weights=True)
    order = _check_order(box, base)
    tick(NORMALISATION)
    normalisation = _check_normalisation(box, candidates)
    tick(CAUSALITY)
    if order.status == FAIL:
        report.checks.append(Check(CAUSALITY, IMPLIED, "scores depend on what was learnt too early"))
    else:
        report.checks.append(_check_causality(box, base))
    warm_up = _from_record(base, WARM_UP)
    if order.status == FAIL and warm_up.status == FAIL:
        warm_up = Check(WARM_UP, IMPLIED, warm_up.figure)
    report.checks += [normalisation, order, _from_record(base, ONCE), warm_up]
    tick(TRAINING_DATA)
    report.checks.append(_check_training_data(scorer, box, base, train_shards))
    return report


def resolve(scorer: Scorer | str, tables: ByteTables, train_shards: list[Path]) -> Scorer:
    """The function behind a mode's name or "module:function". Raises ConfigError when there is none."""
    if callable(scorer):
        return scorer
    if ":" not in scorer:
        return partial(run_mode, mode=scorer, tables=tables, train_shards=train_shards)
    module, _, name = scorer.partition(":")
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"evaluator: got {scorer!r}, wanted module:function ({error})") from error


def _from_record(base: ObservedLedger, rule: str) -> Check:
    broken = base.violations.get(rule, [])
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return Check(rule, FAIL, broken[0] + more)
    figures = {
        ONCE: f"{len(base.nll) - 1} tokens, one score and one forward pass each",
        WARM_UP: "nothing of the stream was read in advance",
    }
    return Check(rule, PASS, figures[rule])


def _check_order(box: BlackBox, base: ObservedLedger) -> Check:
    broken = base.violations.get(ORDER, [])
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return Check(ORDER, FAIL, broken[0] + more)
    still = box.run(box.probe.tokens, config=box.probe.config.replace(**dict.fromkeys(_LEARNING_RATES, 0.0)))
    own = base.first_state & ~np.isnan(base.nll)
    different = _different(base.nll[own], still.nll[own])
    if different:
        return Check(ORDER, FAIL, f"{different} scores of the untrained artifact change when learning is switched off")
    return Check(
        ORDER, PASS, f"{base.num_states - 1} updates, each on scored tokens; {int(own.sum())} scores before any"
    )


def _check_causality(box: BlackBox, base: ObservedLedger) -> Check:
    tokens, rng = box.probe.tokens, np.random.default_rng(0)
    places = [len(tokens) // 5, len(tokens) // 2, len(tokens) - 30]
    every = np.arange(len(tokens))
    caveat, compared = "", 0
    for place in places:
        for kind in REPLACEMENTS:
            future = every > place
            changed = _changed(box, base, _replaced(tokens, future, kind, rng, box), ~future)
            if changed:
                future = _processed_later(base, tokens, place)
                earlier = ~future & (base.event_of <= base.event_of[place])
                again = _changed(box, base, _replaced(tokens, future, kind, rng, box), earlier)
                if again:
                    return Check(CAUSALITY, FAIL, f"{again} scores change with tokens behind {place} ({kind})")
                caveat = "; in the order of processing, not of the stream: longer documents come first"
            compared += 1
    for place in rng.choice(np.flatnonzero(tokens != BOS_ID)[8:], size=OWN_TOKENS, replace=False):
        other = tokens.copy()
        other[place] = tokens[place] % (box.model.config.vocab_size - 1) + 1
        other[place] += other[place] == BOS_ID
        ledger = box.run(other, targets=tokens, stop_at=int(place))
        if _different(ledger.nll[place], base.nll[place]):
            return Check(CAUSALITY, FAIL, f"the distribution at token {place} changes with the token that is scored")
        compared += 1
    return Check(CAUSALITY, PASS, f"{compared} replacements, all earlier scores bit-equal{caveat}")


def _changed(box: BlackBox, base: ObservedLedger, tokens: np.ndarray, earlier: np.ndarray) -> int:
    """Scores among `earlier` that are not bit-equal for another stream."""
    other = box.run(tokens)
    return _different(other.nll[earlier], base.nll[earlier])


def _different(a: np.ndarray, b: np.ndarray) -> int:
    """How many scores do not have the same bits; no score equals no score."""
    return int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())


def _replaced(tokens: np.ndarray, where: np.ndarray, kind: str, rng: np.random.Generator, box: BlackBox) -> np.ndarray:
    """The stream with the tokens `where` exchanged; BOS stay where they are, so that no document changes its length."""
    places = np.flatnonzero(where & (tokens != BOS_ID))
    result = tokens.copy()
    if kind == "random":
        drawn = rng.integers(0, box.model.config.vocab_size - 1, len(places))
        result[places] = drawn + (drawn >= BOS_ID)
    elif kind == "one token":
        result[places] = tokens[tokens != BOS_ID][0]
    else:
        result[places] = tokens[places][::-1]
    return result


def _processed_later(base: ObservedLedger, tokens: np.ndarray, place: int) -> np.ndarray:
    """Tokens that come after `place` in the order of processing: later in its document, or in a document read later."""
    document = np.cumsum(tokens == BOS_ID)
    document[tokens == BOS_ID] -= 1  # a BOS is the last target of the document before it
    own = document == document[place]
    later = base.event_of > base.event_of[place]
    return np.where(own, np.arange(len(tokens)) > place, later)


def _check_normalisation(box: BlackBox, candidates: int | None) -> Check:
    vocabulary = box.model.config.vocab_size
    asked = np.arange(vocabulary)
    if candidates is not None and candidates < vocabulary:
        asked = np.sort(np.random.default_rng(0).choice(vocabulary, candidates, replace=False))
    worst = 0.0
    for tokens, place in _normalisation_places(box.probe):
        total = 0.0
        for token in asked:
            targets = tokens.copy()
            targets[place] = token
            total += math.exp(-box.run(tokens, targets=targets, stop_at=place).nll[place])
        if math.isnan(total):
            return Check(NORMALISATION, SKIPPED, f"token {place} gets no score")
        excess = total - 1.0 if len(asked) == vocabulary else max(0.0, total - 1.0)
        if abs(excess) > SUM_TOLERANCE:
            return Check(NORMALISATION, FAIL, f"probabilities of {len(asked)} tokens at {place} sum to {total:.6f}")
        worst = max(worst, abs(excess))
    what = f"all {vocabulary}" if len(asked) == vocabulary else f"{len(asked)} of {vocabulary}"
    return Check(NORMALISATION, PASS, f"|sum - 1| <= {worst:.1e} over {what} tokens")


def _normalisation_places(probe: Probe) -> Iterator[tuple[np.ndarray, int]]:
    """(stream, token): one in the first chunk, one where documents have adapted and repeated text gives hints."""
    starts = np.flatnonzero(probe.tokens == BOS_ID)
    yield probe.tokens[: starts[1] + 1], 9
    yield probe.tokens[: starts[7] + 1], int(starts[6]) + 31


def _check_training_data(scorer: Scorer | str, box: BlackBox, base: ObservedLedger, train_shards: list[Path]) -> Check:
    if not train_shards:
        return Check(TRAINING_DATA, SKIPPED, "no training files here")
    if not isinstance(scorer, str):
        return Check(TRAINING_DATA, SKIPPED, "a scorer without a name cannot be run in a fresh process")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({k: v.contiguous().cpu() for k, v in box.model.state_dict().items()}, folder / "weights.safetensors")
        np.savez(folder / "stream.npz", tokens=box.probe.tokens, **_table_arrays(box.tables))
        request = {
            "call": "model.verify:answer",
            "hide": [str(path) for path in train_shards],
            "scorer": scorer,
            "config": box.probe.config.to_dict(),
            "folder": str(folder),
            "threads": torch.get_num_threads(),
            "device": str(next(box.model.parameters()).device),
            "dtype": str(box.model.compute_dtype).removeprefix("torch."),
        }
        (folder / "request.json").write_text(json.dumps(request))
        paths = os.pathsep.join([str(Path(__file__).parents[1]), *(p for p in sys.path if p)])
        done = subprocess.run(
            [sys.executable, "-m", "model.isolation", str(folder / "request.json")],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        if done.returncode or not (folder / "answer.json").is_file():
            last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            return Check(TRAINING_DATA, FAIL, f"without the training files: {last}")
        answer = json.loads((folder / "answer.json").read_text())
        nll = np.load(folder / "nll.npy", allow_pickle=False)
    if answer["opened"]:
        return Check(TRAINING_DATA, FAIL, f"{len(answer['opened'])} training files opened: {answer['opened'][0]}")
    if not np.array_equal(nll, base.nll, equal_nan=True):
        changed = _different(nll, base.nll)
        return Check(TRAINING_DATA, FAIL, f"{changed} scores change in a fresh process without the training files")
    return Check(TRAINING_DATA, PASS, f"same scores in a fresh process; {len(train_shards)} files {answer['reason']}")


def _table_arrays(tables: ByteTables) -> dict[str, Any]:
    return {k: np.asarray(v) for k, v in vars(tables).items()}


def answer(request: dict[str, Any], isolation: Isolation) -> None:
    """The fresh process: runs the scorer on the request's stream and writes the scores and what was opened."""
    folder = Path(request["folder"])
    torch.set_num_threads(request["threads"])
    config = Config.from_dict(request["config"])
    model = GPT(config.model)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    model.to(request["device"])
    model.compute_dtype = getattr(torch, request["dtype"])
    with np.load(folder / "stream.npz", allow_pickle=False) as file:
        tokens = file["tokens"]
        arrays = {k: file[k] for k in ("base_bytes", "has_leading_space", "is_boundary")}
        tables = ByteTables(**arrays, leading_space_is_text=bool(file["leading_space_is_text"]))
    shards = [Path(path) for path in request["hide"]]
    box = BlackBox(resolve(request["scorer"], tables, shards), model, Probe(tokens, config), tables)
    np.save(folder / "nll.npy", box.run(tokens).nll)
    hidden = "that are not there" if isolation.hidden else f"not opened by Python code ({isolation.reason})"
    (folder / "answer.json").write_text(json.dumps({"opened": isolation.opened, "reason": hidden}))
