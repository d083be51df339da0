"""`pgolf verify`: all checks of an artifact's score, those of the scorer (model/verify.py) and those around it.

ledger               the evaluation runs once over the whole validation set; its ledger is replayed row by row
documents apart      no document of the validation set stands in a training shard (hashes of their tokens)
bytes                the byte tables count what the decoded text has, document by document
size                 artifact and code, at most 16,000,000 bytes
train time           from the run's own record, at most 600 s
evaluation time      from opening the artifact to the bits per byte, at most 600 s
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from model.artifact import load_model, read_header
from model.data.dataset import Dataset, open_dataset
from model.data.shards import read_shard
from model.errors import DataError
from model.evaluate import EvalResult, evaluate
from model.evaluate.bpb import check_bytes
from model.evaluate.documents import find_documents
from model.evaluate.ledger import ARTIFACT_STATE, Ledger, Rows
from model.evaluate.session import Progress
from model.files import atomic_write
from model.run import RunDir
from model.settings import given_flags, section_options
from model.verify import FAIL, PASS, SKIPPED, Check, Report, check_scorer

SIZE_BUDGET = 16_000_000  # bytes, artifact and code together
SECONDS_BUDGET = 600.0
ALL_UP_TO, SAMPLE = 1024, 64  # candidates of the normalisation check: all of a small vocabulary, some of a large one
SHORTEST_DOCUMENT = 32  # tokens; shorter ones repeat by chance ("Yes.")


def verify_artifact(
    path: Path,
    *,
    data_dir: str | None = None,
    mode: str | None = None,
    evaluator: str | None = None,
    device: str | None = None,
    candidates: int | None = None,
    code_bytes: int | None = None,
    progress: Progress | None = None,
    tick: Callable[[str], None] = lambda name: None,
    **changes: Any,
) -> Report:
    """Checks the score of an artifact, or of that of the run in the folder `path`, in a mode or by a scorer.

    `mode` is the configuration's by default; `evaluator` "module:function" is checked in its place (then the whole
    validation set is not scored). `code_bytes` are added to the artifact's. `candidates` as in `check_scorer`, but
    SAMPLE of a vocabulary over ALL_UP_TO by default; `device` is where the whole set is scored;
    `changes` are fields of EvalConfig. Raises ArtifactError, ConfigError, DataError where there is nothing to check.
    """
    run = RunDir(path) if path.is_dir() else None
    artifact = run.artifact_path if run else path
    header = read_header(artifact)
    config = header.config.replace(**changes)
    dataset = open_dataset(data_dir or (run.config() if run else config).data.data_dir)
    mode = mode or config.eval.eval_mode
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    report = check_scorer(
        evaluator or mode,
        load_model(artifact, "cpu"),
        dataset.valid_tokens,
        dataset.byte_tables,
        config,
        train_shards=dataset.train_shards,
        candidates=SAMPLE if candidates is None and header.config.model.vocab_size > ALL_UP_TO else candidates,
        tick=tick,
    )
    if evaluator is None:
        tick("ledger")
        started = time.monotonic()
        model = load_model(artifact, device)
        opened = time.monotonic() - started
        result = evaluate(model, dataset, mode, config, device=device, progress=progress)
        report.checks.append(check_ledger(result.ledger, result.bpb))
    tick("documents apart")
    report.checks.append(check_documents_apart(dataset))
    tick("bytes")
    report.checks.append(_check_bytes(dataset))
    report.checks.append(check_size(artifact.stat().st_size, code_bytes))
    report.checks.append(_check_train_time(run))
    if evaluator is None:
        report.checks.append(_check_evaluation_time(opened, result))
    return report


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--mode", help="As for `pgolf eval`, a single one [default: the artifact's own].")
@click.option("--evaluator", metavar="MODULE:FUNCTION", help="A scorer of your own, a function of a Session.")
@click.option("--data", "data_dir", type=click.Path(exists=True, file_okay=False), help="[default: the run's]")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[default: cuda where there is one]")
@click.option(
    "--candidates",
    type=click.IntRange(2),
    help=f"Tokens of the vocabulary that are asked for in the normalisation check [default: all up to {ALL_UP_TO}, "
    f"{SAMPLE} of a larger one]. A part is quicker and can only show probabilities that sum to more than 1.",
)
@click.option("--code-bytes", type=click.IntRange(0), help="Bytes of the code that ships with the artifact.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@section_options("eval")
def verify_command(path: Path, as_json: bool, **options: Any) -> None:
    """Say whether the score of an artifact, or of a run's, is legal: one line for each check, with its figure.

    The exit status is 1 when it is not. For a run the outcome is kept in RUN/verify_MODE.json for the report.
    """
    flags = given_flags(options)
    names = ("data_dir", "mode", "evaluator", "device", "candidates", "code_bytes")
    kept = {name: options[name] for name in names}
    report = verify_artifact(path, **{**flags, **kept}, tick=lambda name: click.echo(f"checking {name} ...", err=True))
    click.echo(report.to_json() if as_json else "\n".join(report.lines()))
    if path.is_dir():
        label = (kept["mode"] or kept["evaluator"] or "own").replace("+", "_").replace(":", "_")
        with atomic_write(path / f"verify_{label}.json", "w") as file:
            file.write(report.to_json())
    if not as_json:
        click.echo("legal" if report.legal else "NOT legal")
    sys.exit(0 if report.legal else 1)


def check_ledger(ledger: Ledger, bpb: float) -> Check:
    """Replays the rows of a finished ledger: scores once each, updates on scored tokens only, nothing left out."""
    name = "ledger"
    if not ledger.legal:
        return Check(name, FAIL, "not a legal score: " + "; ".join(ledger.defects))
    rows = ledger.rows
    scored = np.zeros(ledger.num_tokens, dtype=np.int64)
    for is_score, start, end in zip(rows.is_score.tolist(), rows.start.tolist(), rows.end.tolist(), strict=True):
        if is_score:
            scored[start:end] += 1
        elif not scored[start:end].all():
            return Check(name, FAIL, f"an update uses tokens {start} to {end} before all of them have scores")
    wrong = int((scored[1:] != 1).sum())
    if wrong or np.isnan(ledger.nll[1:]).any():
        return Check(name, FAIL, f"{wrong} tokens do not have exactly one score")
    seen = furthest_seen(rows, ledger.num_states)
    order = "stream order" if (seen[rows.state] <= rows.start)[rows.is_score].all() else "order of processing"
    updates = int((~rows.is_score).sum())
    return Check(name, PASS, f"{ledger.num_tokens - 1:,} scores, {updates:,} updates, causal in {order}; {bpb:.5f} bpb")


def furthest_seen(rows: Rows, num_states: int) -> np.ndarray:
    """For each state, one past the last token that it or a state before it has learnt from: int64 [states]."""
    seen = np.zeros(num_states, dtype=np.int64)
    updates = ~rows.is_score
    for state, new, end in zip(
        rows.state[updates].tolist(), rows.new_state[updates].tolist(), rows.end[updates].tolist(), strict=True
    ):
        seen[new] = max(seen[new], seen[state], end)
    assert seen[ARTIFACT_STATE] == 0
    return seen


def check_documents_apart(dataset: Dataset) -> Check:
    """Whether a validation document stands in a training shard, token for token."""
    name = "documents apart"
    if not dataset.train_shards:
        return Check(name, SKIPPED, "no training shards here")
    held_out = _digests(dataset.valid_tokens)
    shared = compared = 0
    for shard in dataset.train_shards:
        training = _digests(read_shard(shard))
        compared += len(training)
        shared += len(held_out & training)
    if shared:
        return Check(name, FAIL, f"{shared} validation documents stand in the training shards")
    return Check(name, PASS, f"{len(held_out):,} validation documents, none among {compared:,} of training")


def _digests(tokens: np.ndarray) -> set[bytes]:
    """Hashes of the documents' bodies, without the BOS at either end."""
    found = set()
    last = len(tokens)
    for start, length in find_documents(tokens).tolist():
        end = start + length - (start + length < last)
        if end - start > SHORTEST_DOCUMENT:
            found.add(hashlib.blake2b(tokens[start + 1 : end].tobytes(), digest_size=16).digest())
    return found


def _check_bytes(dataset: Dataset) -> Check:
    tokens = dataset.valid_tokens
    try:
        counted, decoded = check_bytes(tokens, find_documents(tokens), dataset.byte_tables, dataset.tokenizer)
    except DataError as error:
        return Check("bytes", FAIL, str(error))
    kind = "the text" if dataset.tokenizer.exact else "the normalised text"
    return Check("bytes", PASS, f"{counted:,} by the tables, {decoded:,} of {kind}")


def check_size(artifact_bytes: int, code_bytes: int | None) -> Check:
    """Artifact and code against the budget."""
    total = artifact_bytes + (code_bytes or 0)
    code = "code not counted" if code_bytes is None else f"code {code_bytes:,}"
    figure = f"{total:,} of {SIZE_BUDGET:,} bytes (artifact {artifact_bytes:,}, {code})"
    return Check("size", PASS if total <= SIZE_BUDGET else FAIL, figure)


def _check_train_time(run: RunDir | None) -> Check:
    seconds = run.result().get("seconds", {}).get("train") if run else None
    if seconds is None:
        return Check("train time", SKIPPED, "no record of a training run here")
    return _within("train time", seconds, "")


def _check_evaluation_time(opened: float, result: EvalResult) -> Check:
    parts = {"opening": opened, **result.seconds_by_part}
    shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    return _within("evaluation time", opened + result.seconds, f" ({shown})")


def _within(name: str, seconds: float, parts: str) -> Check:
    status = PASS if seconds <= SECONDS_BUDGET else FAIL
    return Check(name, status, f"{seconds:.1f} of {SECONDS_BUDGET:.0f} s{parts}")
