"""Is a score legal? Every rule of the benchmark as a check that anyone can run again (docs/evaluation.md).

A scorer is a function of a Session: it reads `session.tokens`, takes losses at `session.targets` and enters scores and
updates into `session.ledger`. It is run as a black box on a small stream cut from the validation documents, over and
over, with something changed each time, at places drawn from a seed:

    causality            what follows is replaced (at random, by one token, by its reverse): earlier scores keep their
                         bits. The token itself is replaced and its old value asked for: the score keeps its bits. The
                         BOS behind a document is replaced and asked for: its score stays.
    normalisation        the tokens of the vocabulary are asked for in turn: the probabilities sum to 1, at the
                         beginning and where a text is read again and again.
    score before update  each update names tokens that have scores; weights change with a named update only; with all
                         learning rates at 0 the scores of the artifact's own state keep their bits.
    single pass          each token has one score, and goes through the model once before it.
    warm-up              no validation token goes through the model before the evaluation.
    full scale           the same rules, causality and some tokens of a sum once more with the evaluation's own
                         settings, on a longer stream.
    no training data     the same scores in a fresh process without the data set's files and without a network, which
                         has read other tokens before: no run remembers another. Where files cannot be taken from a
                         process, nothing is proved and the check is skipped.

These run on the CPU, where a run gives the same bits twice (attention's backward pass on a GPU does not).
model/legality.py adds the checks of the data and the artifact. A check that another one's failure makes meaningless is
"implied", not a failure of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import pgolf_kernels
from model.checks import FAIL, IMPLIED, PASS, SKIPPED, Check, Report
from model.config import Config
from model.data.shards import BOS_ID
from model.data.tokenizer import ByteTables
from model.errors import LegalityError
from model.evaluate.observe import NORMALISATION, ONCE, ORDER, WARM_UP, ObservedLedger
from model.gpt import GPT
from model.isolation import Isolation, environment
from model.probe import READ_OFTEN, BlackBox, Probe, Scorer, resolve

CAUSALITY, FULL_SCALE, TRAINING_DATA = "causality", "full scale", "no training data"
SUM_TOLERANCE = 1e-4  # fp32 probabilities of a large vocabulary; an illegal blend is off by percents
PRECISION = 0.02  # of an estimated sum, as a standard error; more tokens are asked for until it has it
END_TOLERANCE = 0.1  # nats that a BOS may be likelier for ending a document; another length rounds otherwise
FULL_CANDIDATES, FULL_MOST, FULL_PRECISION = 16, 256, 0.1  # tokens asked for at the full scale, and the error allowed
REPLACEMENTS = ("random", "one token", "reversed")
_LEARNING_RATES = ("ttt_lora_lr", "sgd_ttt_lr", "global_ttt_lr", "global_ttt_warmup_start_lr")


@dataclass(frozen=True)
class Sample:
    """How much is tried. A defect that touches one token in n escapes k places with probability (1 - 1/n)^k."""

    seed: int = 0
    futures: int = 9  # places behind which everything is replaced
    own: int = 12  # places where the token itself is replaced
    ends: int = 2  # documents whose end is replaced
    distributions: int = 3  # places where the vocabulary is asked for: the first document, the one read most, others
    candidates: int | None = 32  # tokens asked for at each of them; None: the whole vocabulary
    full_tokens: int = 1024  # of the stream on which the evaluation's own settings are tried; 0: not at all


def strictly_in_stream_order(scorer: Scorer | str, config: Config) -> bool:
    """Whether a scorer may learn from earlier tokens of the stream alone, whatever order it processes them in.

    True of the modes, except phased in the order of lengths; of a scorer of one's own when `phased_order` says so.
    """
    mode = str(scorer).partition("+")[0] if isinstance(scorer, str) and ":" not in scorer else "phased"
    return mode != "phased" or config.eval.phased_order == "stream"


class _Verifier:
    """One scorer under examination: its black box, what its first run left, and where to look.

    `strict`: its scores may depend on what stands before in the stream alone.
    """

    def __init__(self, box: BlackBox, sample: Sample, *, strict: bool) -> None:
        self.box, self.sample, self.strict = box, sample, strict
        self.rng = np.random.default_rng(sample.seed)
        self.started = time.time()
        self.base = box.run(box.probe.tokens, watch=True)
        self.full: tuple[np.ndarray, ObservedLedger] | None = None  # the stream of the full scale, and its ledger

    def places(self, tokens: np.ndarray, count: int) -> np.ndarray:
        """Places between 8 and the end, spread over the stream: one drawn from each of `count` equal stretches."""
        cuts = np.linspace(8, len(tokens) - 2, count + 1)
        return np.array([self.rng.integers(int(a), max(int(a) + 1, int(b))) for a, b in itertools.pairwise(cuts)])


def check_scorer(
    scorer: Scorer | str,
    model: GPT,
    valid_tokens: np.ndarray,
    tables: ByteTables,
    config: Config,
    *,
    train_shards: Sequence[Path] = (),
    hide: Sequence[Path] = (),
    sample: Sample | None = None,
    progress: Callable[[str, int], None] = lambda name, tokens: None,
) -> Report:
    """The checks of a scorer: a mode's name, "module:function", or a function of a Session.

    `train_shards` is what the published form of 1499 reads; `hide` are the data set's files or its folder, which no
    other scorer may open (the check needs a scorer that can be named). `progress(check, tokens)` is called with the
    tokens that each run of the scorer has read, `planned_tokens` of them in all. Raises ConfigError where a scorer does
    not run.
    """
    sample = sample or Sample()
    probe = Probe.cut(valid_tokens, config)
    stage = [ORDER]
    box = BlackBox(resolve(scorer, list(train_shards)), model, probe, tables, lambda n: progress(stage[0], n))
    report = Report()
    try:
        verifier = _Verifier(box, sample, strict=strictly_in_stream_order(scorer, config))
    except LegalityError as error:
        report.checks.append(Check(ONCE, FAIL, str(error)))
        return report
    order = _check_order(verifier)
    stage[0] = NORMALISATION
    normalisation = _check_normalisation(verifier)
    stage[0] = CAUSALITY
    if order.status == FAIL:
        report.checks.append(Check(CAUSALITY, IMPLIED, "scores depend on what was learnt too early"))
    else:
        report.checks.append(_check_causality(verifier))
    warm_up = _from_record(verifier.base, WARM_UP)
    if order.status == FAIL and warm_up.status == FAIL:
        warm_up = Check(WARM_UP, IMPLIED, warm_up.figure)
    report.checks += [normalisation, order, _from_record(verifier.base, ONCE), warm_up]
    stage[0] = FULL_SCALE
    if report.failed:
        report.add(Check(FULL_SCALE, SKIPPED, "the small scale says enough"))
    else:
        report.add(_check_full_scale(verifier, valid_tokens))
    stage[0] = TRAINING_DATA
    report.add(_check_training_data(scorer, verifier, hide, train_shards, report))
    return report


def planned_tokens(valid_tokens: np.ndarray, config: Config, sample: Sample) -> int:
    """Tokens that the runs of `check_scorer` read in all, about: a measure of its time."""
    probe = Probe.cut(valid_tokens, config)
    asked = min(sample.candidates or config.model.vocab_size, config.model.vocab_size)
    small = (4 + sample.futures + sample.own + sample.ends) * len(probe.tokens)
    full = (4 + FULL_CANDIDATES) * min(sample.full_tokens, len(valid_tokens))
    often = asked * len(probe.tokens) if sample.distributions > 1 else 0
    return small + often + max(1, sample.distributions - 1) * asked * len(probe.short) + full


def _from_record(base: ObservedLedger, rule: str) -> Check:
    broken = base.violations.get(rule, [])
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        return Check(rule, FAIL, broken[0] + more)
    figures = {
        ONCE: f"{len(base.entered) - 1} tokens, one score and one forward pass each",
        WARM_UP: "nothing of the stream was read in advance",
        NORMALISATION: "",
    }
    return Check(rule, PASS, figures[rule])


def _check_order(verifier: _Verifier) -> Check:
    box, base = verifier.box, verifier.base
    if base.violations.get(ORDER):
        return _from_record(base, ORDER)
    still = box.run(box.probe.tokens, config=box.probe.config.replace(**dict.fromkeys(_LEARNING_RATES, 0.0)))
    own = base.first_state & ~np.isnan(base.entered)
    different = _different(base.entered[own], still.entered[own])
    if different:
        return Check(ORDER, FAIL, f"{different} scores of the untrained artifact change when learning is switched off")
    return Check(
        ORDER, PASS, f"{base.num_states - 1} updates, each on scored tokens; {int(own.sum())} scores before any"
    )


def _check_causality(verifier: _Verifier) -> Check:
    box, base, sample = verifier.box, verifier.base, verifier.sample
    tokens, caveat = box.probe.tokens, False
    for number, place in enumerate(verifier.places(tokens, sample.futures).tolist()):
        problem, reordered = _future_matters(verifier, base, tokens, place, REPLACEMENTS[number % len(REPLACEMENTS)])
        if problem:
            return Check(CAUSALITY, FAIL, problem)
        caveat |= reordered
    inner = np.flatnonzero(tokens != BOS_ID)[8:]
    for place in np.sort(verifier.rng.choice(inner, size=min(sample.own, len(inner)), replace=False)).tolist():
        other = tokens.copy()
        other[place] = tokens[place] % (box.model.config.vocab_size - 1) + 1
        other[place] += other[place] == BOS_ID
        ledger = box.run(other, targets=tokens.copy(), stop_at=place)
        if _different(ledger.entered[place], base.entered[place]):
            return Check(CAUSALITY, FAIL, f"the distribution at token {place} changes with the token that is scored")
    figure = f"{sample.futures} futures and {sample.own} tokens replaced, all earlier scores bit-equal"
    if caveat:
        # With other lengths, documents come in another order: their ends cannot be moved.
        order = "in the order of processing, not of the stream: longer documents come first"
        return Check(CAUSALITY, PASS, f"{figure}; {order}")
    ends = np.flatnonzero(tokens == BOS_ID)[1:-1]
    for place in verifier.rng.choice(ends, size=min(sample.ends, len(ends)), replace=False).tolist():
        other = tokens.copy()
        other[place] = tokens[place - 1] if tokens[place - 1] != BOS_ID else tokens[1]
        gained = box.run(other, targets=tokens.copy(), stop_at=place).entered[place] - base.entered[place]
        if gained > END_TOLERANCE:
            return Check(CAUSALITY, FAIL, f"the score of the BOS at token {place} knows that the document ends there")
    return Check(CAUSALITY, PASS, f"{figure}; {sample.ends} ends moved")


def _future_matters(
    verifier: _Verifier, base: ObservedLedger, tokens: np.ndarray, place: int, kind: str, config: Config | None = None
) -> tuple[str, bool]:
    """(what is wrong or "", whether that took the order of processing) when all behind a place is replaced.

    The order of processing is no excuse for a scorer that is held to the stream's.
    """
    future = np.arange(len(tokens)) > place
    changed = _changed(verifier, base, tokens, future, kind, ~future, config)
    if not changed:
        return "", False
    if verifier.strict:
        return f"{changed} scores change with tokens behind {place} in the stream ({kind})", False
    future = _not_before(base, tokens, place)
    earlier = ~future & (base.event_of <= base.event_of[place])
    changed = _changed(verifier, base, tokens, future, kind, earlier, config)
    return (f"{changed} scores change with tokens behind {place} ({kind})" if changed else ""), True


def _changed(
    verifier: _Verifier,
    base: ObservedLedger,
    tokens: np.ndarray,
    future: np.ndarray,
    kind: str,
    earlier: np.ndarray,
    config: Config | None,
) -> int:
    """Scores among `earlier` that are not bit-equal when the tokens `future` are exchanged."""
    other = verifier.box.run(_replaced(verifier, tokens, future, kind), config=config)
    return _different(other.entered[earlier], base.entered[earlier])


def _different(a: np.ndarray, b: np.ndarray) -> int:
    """How many scores do not have the same bits; no score equals no score."""
    return int((~((a == b) | (np.isnan(a) & np.isnan(b)))).sum())


def _replaced(verifier: _Verifier, tokens: np.ndarray, where: np.ndarray, kind: str) -> np.ndarray:
    """The stream with the tokens `where` exchanged; BOS stay where they are, so that no document changes its length."""
    places = np.flatnonzero(where & (tokens != BOS_ID))
    result = tokens.copy()
    if kind == "random":
        drawn = verifier.rng.integers(0, verifier.box.model.config.vocab_size - 1, len(places))
        result[places] = drawn + (drawn >= BOS_ID)
    elif kind == "one token":
        result[places] = tokens[tokens != BOS_ID][0]
    else:
        result[places] = tokens[places][::-1]
    return result


def _not_before(base: ObservedLedger, tokens: np.ndarray, place: int) -> np.ndarray:
    """Tokens that do not come before `place` in the order of processing: behind it in its document, and of other
    documents those that are scored at the same time or later."""
    document = np.cumsum(tokens == BOS_ID)
    document[tokens == BOS_ID] -= 1  # a BOS is the last target of the document before it
    own = document == document[place]
    return np.where(own, np.arange(len(tokens)) > place, base.event_of >= base.event_of[place])


def _check_normalisation(verifier: _Verifier) -> Check:
    box, rng = verifier.box, verifier.rng
    recorded = _from_record(verifier.base, NORMALISATION)
    if recorded.status == FAIL:
        return recorded
    vocabulary = box.model.config.vocab_size
    short, often = (np.flatnonzero(tokens == BOS_ID) for tokens in (box.probe.short, box.probe.tokens))
    # In the first document, and where a document repeats one that was read, or several: adapted weights, hints and
    # cached counts.
    stretches = [
        (box.probe.short, short[0] + 2, short[1]),
        (box.probe.tokens, often[READ_OFTEN] + 8, often[READ_OFTEN + 1]),
        *[(box.probe.short, short[2] + 17, short[3])] * verifier.sample.distributions,
    ][: verifier.sample.distributions]
    worst, error, asked = 0.0, 0.0, vocabulary
    for tokens, start, end in stretches:
        place = int(rng.integers(start, end))
        found = _Sum(verifier, tokens, place, verifier.sample.candidates)
        while found.suspicious(PRECISION) and not found.problem():
            found = _Sum(verifier, tokens, place, 4 * len(found.probabilities), found.probabilities)
        asked, error = min(asked, len(found.probabilities)), max(error, found.error)
        if math.isnan(found.total) and verifier.base.violations.get(ONCE):
            return Check(NORMALISATION, SKIPPED, f"token {place} gets no score")
        if found.problem():
            return Check(NORMALISATION, FAIL, f"at token {place}: {found.problem()}")
        worst = max(worst, abs(found.total - 1.0))
    where = f"at {len(stretches)} places over"
    if asked == vocabulary:
        return Check(NORMALISATION, PASS, f"|sum - 1| <= {worst:.1e} {where} all {vocabulary} tokens")
    estimated = f"estimated, standard error {error:.0e}; --whole asks for all"
    return Check(NORMALISATION, PASS, f"|sum - 1| <= {worst:.1e} {where} {asked} of {vocabulary} tokens ({estimated})")


class _Sum:
    """The sum of a scorer's probabilities over the vocabulary at one place of a stream.

    Over a part of the vocabulary it is estimated. Asked for are the token that stands there, those that followed the
    same token before (what hints and caches raise), the ones that the model itself finds likeliest, and a draw of the
    others. For those the model's own probabilities q are known, so that the draw has to show the difference only:

        sum = sum of p (asked for anyway) + sum of q (the others) + mean over the draw of (p - q) / chance to be drawn

    Where that is rough or too far from 1, more tokens have to be asked for, in the end all: an estimate alone condemns
    nobody.
    `count`: how many are asked for (None: all); `known` are probabilities from before.
    """

    def __init__(
        self,
        verifier: _Verifier,
        tokens: np.ndarray,
        place: int,
        count: int | None,
        known: dict[int, float] | None = None,
        config: Config | None = None,
    ) -> None:
        box, rng, vocabulary = verifier.box, verifier.rng, verifier.box.model.config.vocab_size
        known = known or {}

        def ask(candidates: Iterable[int]) -> dict[int, float]:
            return {
                c: known[c] if c in known else _ask(box, tokens, place, c, config) for c in dict.fromkeys(candidates)
            }

        self.complete = count is None or count >= vocabulary
        self.error = 0.0
        if self.complete:
            self.probabilities = ask(range(vocabulary))
            self.total = sum(self.probabilities.values())
            return
        assert count is not None
        q = _own_distribution(box.model, tokens, place)
        followers = tokens[1:place][tokens[: place - 1] == tokens[place - 1]].tolist()
        likeliest = np.argsort(-q, kind="stable").tolist()
        sure = list(dict.fromkeys([int(tokens[place]), *followers[-count // 4 :], *likeliest]))[: count // 2]
        rest = np.setdiff1d(np.arange(vocabulary), sure)
        chance = 0.75 * q[rest] / q[rest].sum() + 0.25 / len(rest)
        drawn = rng.choice(len(rest), size=count - len(sure), p=chance / chance.sum())
        self.probabilities = ask([*sure, *rest[drawn].tolist()])
        ratios = np.array([(self.probabilities[int(rest[i])] - q[rest[i]]) / chance[i] for i in drawn])
        self.total = float(sum(self.probabilities[c] for c in sure) + q[rest].sum() + ratios.mean())
        self.error = float(ratios.std(ddof=1) / math.sqrt(len(ratios)))

    def suspicious(self, precision: float) -> bool:
        """Whether the estimate is too rough, or further from 1 than chance would have it."""
        rough = self.error > precision
        return not self.complete and (rough or abs(self.total - 1.0) > SUM_TOLERANCE + 3.0 * self.error)

    def problem(self) -> str:
        """What is wrong with the sum, or ""."""
        values = list(self.probabilities.values())
        if any(math.isnan(value) for value in values):
            return "a token gets no score"
        if len(set(values)) == 1 and len(values) > 2:
            return "the score does not depend on the token that is asked for, wanted losses of session.targets"
        if sum(values) > 1.0 + SUM_TOLERANCE or (self.complete and sum(values) < 1.0 - SUM_TOLERANCE):
            return f"probabilities of {len(values)} tokens sum to {sum(values):.6f}"
        return ""


def _ask(box: BlackBox, tokens: np.ndarray, place: int, candidate: int, config: Config | None) -> float:
    """The scorer's probability of `candidate` at a place."""
    targets = tokens.copy()
    targets[place] = candidate
    nll = box.run(tokens, targets=targets, stop_at=place, config=config).entered[place]
    return float(np.exp(min(-nll, 700.0)))  # exp overflows beyond; any such value is far above a probability


@torch.no_grad()
def _own_distribution(model: GPT, tokens: np.ndarray, place: int) -> np.ndarray:
    """The model's own probabilities at a place, from the document up to there: float64 [V]."""
    start = int(np.flatnonzero(tokens[:place] == BOS_ID)[-1])
    ids = torch.from_numpy(tokens[start:place].astype(np.int64))[None].to(model.tok_emb.device)
    return torch.softmax(model.logits(ids)[0, -1].double(), dim=-1).cpu().numpy()


def _check_full_scale(verifier: _Verifier, valid_tokens: np.ndarray) -> Check:
    """The record, causality and a sum once more with the evaluation's own settings: some scorer may mind the scale."""
    box, count = verifier.box, min(verifier.sample.full_tokens, len(valid_tokens))
    if count < 16:
        return Check(FULL_SCALE, SKIPPED, f"{count} tokens")
    starts = np.flatnonzero(valid_tokens[: len(valid_tokens) - count + 1] == BOS_ID)
    start = int(verifier.rng.choice(starts)) if len(starts) else 0
    tokens = np.asarray(valid_tokens[start : start + count], dtype=np.uint16)
    base = box.run(tokens, watch=True, config=box.probe.full)
    verifier.full = (tokens, base)
    broken = [line for lines in base.violations.values() for line in lines]
    if broken:
        return Check(FULL_SCALE, FAIL, broken[0])
    place = int(verifier.rng.integers(count // 4, 3 * count // 4))
    problem, reordered = _future_matters(verifier, base, tokens, place, "random", box.probe.full)
    if problem:
        return Check(FULL_SCALE, FAIL, problem)
    place = int(verifier.rng.integers(count // 2, count - 1))
    found = _Sum(verifier, tokens, place, FULL_CANDIDATES, config=box.probe.full)
    while found.suspicious(FULL_PRECISION) and not found.problem() and len(found.probabilities) < FULL_MOST:
        found = _Sum(verifier, tokens, place, 4 * len(found.probabilities), found.probabilities, box.probe.full)
    if found.problem():
        return Check(FULL_SCALE, FAIL, f"at token {place}: {found.problem()}")
    if found.suspicious(FULL_PRECISION):
        sum_is = (
            f"{len(found.probabilities)} tokens make it {found.total:.3f} with a standard error of {found.error:.0e}"
        )
        return Check(FULL_SCALE, SKIPPED, f"causal, but the sum at token {place} is not decided: {sum_is}")
    caveat = " in the order of processing" if reordered else ""
    return Check(FULL_SCALE, PASS, f"{count:,} tokens from {start:,} on with the evaluation's settings, causal{caveat}")


def _check_training_data(
    scorer: Scorer | str, verifier: _Verifier, hide: Sequence[Path], train_shards: Sequence[Path], report: Report
) -> Check:
    if not hide:
        return Check(TRAINING_DATA, SKIPPED, "no data files here")
    if not isinstance(scorer, str):
        return Check(TRAINING_DATA, SKIPPED, "a scorer without a name cannot be run in a fresh process")
    box, base = verifier.box, verifier.base
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({k: v.contiguous().cpu() for k, v in box.model.state_dict().items()}, folder / "weights.safetensors")
        streams = [(box.probe.tokens, base, box.probe.config)]
        if verifier.full is not None:
            streams.append((*verifier.full, box.probe.full))
        arrays = _table_arrays(box.tables)
        for i, (tokens, *_) in enumerate(streams):
            arrays |= {f"tokens_{i}": tokens, f"before_{i}": _another_future(verifier, tokens)}
        np.savez(folder / "stream.npz", **arrays)
        request = {
            "call": "model.verify:answer",
            "hide": [str(path) for path in hide],
            "train_shards": [str(path) for path in train_shards],
            "scorer": scorer,
            "configs": [config.to_dict() for *_, config in streams],
            "started": verifier.started,
            "folder": str(folder),
            "threads": torch.get_num_threads(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "device": str(next(box.model.parameters()).device),
            "dtype": str(box.model.compute_dtype).removeprefix("torch."),
        }
        (folder / "request.json").write_text(json.dumps(request))
        # What earlier runs have compiled is no memory of theirs: there it is compiled again.
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "model.isolation", str(folder / "request.json")],
            env={**environment(), **{name: str(folder / name) for name in caches}},
            capture_output=True,
            text=True,
        )
        box.on_run(2 * sum(len(tokens) for tokens, *_ in streams))
        if done.returncode or not (folder / "answer.json").is_file():
            last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            return Check(TRAINING_DATA, FAIL, f"without the data set's files: {last}")
        answer = json.loads((folder / "answer.json").read_text())
        found = [np.load(folder / f"nll_{i}.npy", allow_pickle=False) for i in range(len(streams))]
    report.other_files = answer["other_files"]
    if answer["opened"]:
        return Check(TRAINING_DATA, FAIL, f"{len(answer['opened'])} data files opened: {answer['opened'][0]}")
    if answer["written"]:
        return Check(TRAINING_DATA, FAIL, f"it reads {answer['written'][0]}, written while it was examined")
    changed = sum(_different(nll, ledger.entered) for nll, (_, ledger, _) in zip(found, streams, strict=True))
    if changed:
        why = "without the data set's files, after other tokens"
        return Check(TRAINING_DATA, FAIL, f"{changed} scores change in a fresh process {why}")
    what = "the data folder" if any(path.is_dir() for path in hide) else f"{len(hide)} data files"
    figure = f"same scores in a fresh process; {what}"
    if not answer["hidden"]:  # native code may have read them
        return Check(TRAINING_DATA, SKIPPED, f"{figure} still there ({answer['reason']}), not opened by Python code")
    return Check(TRAINING_DATA, PASS, f"{figure} {answer['reason']}")


def _another_future(verifier: _Verifier, tokens: np.ndarray) -> np.ndarray:
    """The stream with its second half replaced."""
    return _replaced(verifier, tokens, np.arange(len(tokens)) > len(tokens) // 2, "random")


def _table_arrays(tables: ByteTables) -> dict[str, Any]:
    return {k: np.asarray(v) for k, v in vars(tables).items()}


def answer(request: dict[str, Any], isolation: Isolation) -> None:
    """The fresh process: runs the scorer on each of the request's streams, behind one that begins alike and goes on
    otherwise, and writes the scores and what was opened."""
    folder = Path(request["folder"])
    torch.set_num_threads(request["threads"])
    torch.set_float32_matmul_precision(request["matmul_precision"])
    configs = [Config.from_dict(config) for config in request["configs"]]
    model = GPT(configs[0].model)
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    model.to(request["device"])
    model.compute_dtype = getattr(torch, request["dtype"])
    with np.load(folder / "stream.npz", allow_pickle=False) as file:
        streams = [(file[f"before_{i}"], file[f"tokens_{i}"]) for i in range(len(configs))]
        arrays = {k: file[k] for k in ("base_bytes", "has_leading_space", "is_boundary")}
        tables = ByteTables(**arrays, leading_space_is_text=bool(file["leading_space_is_text"]))
    shards = [Path(path) for path in request["train_shards"]]
    probe = Probe(streams[0][1], streams[0][1], configs[0], configs[-1])
    box = BlackBox(resolve(request["scorer"], shards), model, probe, tables)
    for i, ((before, tokens), config) in enumerate(zip(streams, configs, strict=True)):
        box.run(before, config=config)
        np.save(folder / f"nll_{i}.npy", box.run(tokens, config=config).entered)
    kernels = Path(pgolf_kernels.__file__).parent  # and what an editable install writes beside it
    project = [Path(__file__).parent, kernels, kernels.with_suffix(".egg-info")]
    other = isolation.other_files([str(path) for path in (folder, *project)])
    (folder / "answer.json").write_text(
        json.dumps(
            {
                "hidden": isolation.hidden,
                "reason": isolation.reason,
                "opened": isolation.opened,
                "other_files": other,
                "written": isolation.written_since(request["started"], folder),
            }
        )
    )
