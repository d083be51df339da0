"""`pgolf verify`: all checks of an artifact's score, those of the scorer (model/verify.py) and those around it.

ledger               an evaluation's ledger is replayed row by row: the one that `pgolf eval` left in the run's folder,
                     or that of a new evaluation, of the whole validation set or of its beginning
saved scores         where it is the run's: a part is scored again and compared (model/rescore.py)
documents apart      no document of the validation set stands in a training shard (hashes of their tokens)
bytes                the byte tables count what the decoded text has, document by document
size                 artifact and code, at most 16,000,000 bytes
train time           training and calibration, which reads training data; from the run's own record, at most 600 s
evaluation time      from opening the artifact to the bits per byte, at most 600 s
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from model.artifact import load_model, read_header
from model.checks import FAIL, PASS, SKIPPED, Check, Report
from model.config import Config
from model.data.dataset import Dataset, dataset_of
from model.data.progress import progress
from model.data.shards import BOS_ID, shard_length, whole_documents, write_shard
from model.errors import DataError, LegalityError
from model.evaluate import evaluate, evaluation_identity
from model.evaluate.bpb import check_bytes
from model.evaluate.documents import find_documents
from model.evaluate.ledger import ARTIFACT_STATE, CERTAIN, Ledger, Rows
from model.files import atomic_write
from model.gpt import GPT
from model.probe import resolve
from model.rescore import SAVED_SCORES, Saved, check_saved_scores, rescore
from model.rules import SECONDS_BUDGET, SIZE_BUDGET
from model.run import RunDir
from model.score import check_tokenizer, mode_name, shown, time_left
from model.settings import given_flags, section_options
from model.verify import Sample, check_scorer, planned_tokens, strictly_in_stream_order

TIME = "evaluation time"
ALL_UP_TO, CANDIDATES = 128, 32  # of the normalisation check: all of a small vocabulary, some of a large one
# Of the validation set: its beginning where no ledger of the whole is there, else drawn to compare saved scores.
EVALUATED_TOKENS = {"cpu": 2_048, "cuda": 131_072}
DECODED_DOCUMENTS = 2_000
SHORTEST_DOCUMENT = 32  # tokens; shorter ones repeat by chance ("Yes.")
_SCRIPT = "train_gpt.py"
_SCRIPT_TOKENS = 512  # that a packed script scores to show which files it opens


def verify_artifact(
    path: Path,
    *,
    data_dir: str | None = None,
    variant: str | None = None,
    mode: str | None = None,
    evaluator: str | None = None,
    device: str | None = None,
    whole: bool = False,
    candidates: int | None = None,
    seed: int | None = None,
    quiet: bool = True,
    **changes: Any,
) -> Report:
    """Checks the score of an artifact, of that of the run in the folder `path`, or of a packed submission.

    `mode` is the configuration's by default; `evaluator` "module:function" is checked in its place. With `whole`
    everything is tried: the whole vocabulary, the whole validation set (on `device`) and all of its text; otherwise
    samples, drawn by `seed` (default: a new one). `candidates` as in `Sample`. `changes` are fields of EvalConfig.

    Raises ArtifactError, ConfigError, DataError where there is nothing to check.
    """
    artifact = path / "model.pgolf" if path.is_dir() else path
    run = RunDir(path, writes=False) if (path / "config.json").is_file() else None
    header = read_header(artifact)
    config = header.config.replace(**changes)
    dataset = dataset_of(run.config() if run else config, data_dir, variant=variant)
    check_tokenizer(header, dataset)
    mode = mode or config.eval.eval_mode
    model = load_model(artifact, "cpu")
    if candidates is None and not whole and config.model.vocab_size > ALL_UP_TO:
        candidates = CANDIDATES
    sample = Sample(seed=secrets.randbelow(1 << 31) if seed is None else seed, candidates=candidates)
    work = planned_tokens(dataset.valid_tokens, config, sample)
    with progress("verifying", work, "tokens", quiet=quiet) as task:
        started = time.monotonic()

        def show(name: str, tokens: int) -> None:
            task.unit = f"tokens, {name}" + time_left(started, task.done, work)
            task.advance(min(tokens, work - task.done))

        report = check_scorer(
            evaluator or mode,
            model,
            dataset.valid_tokens,
            dataset.byte_tables,
            config,
            train_shards=dataset.train_shards,
            hide=[*dataset.train_shards, *dataset.valid_shards],
            sample=sample,
            progress=show,
        )
    report.seed = sample.seed
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    saved = None if evaluator or run is None else saved_evaluation(run, model, dataset, mode, config)
    if saved is not None and not whole:
        scores, timed = _check_saved(
            saved, model, dataset, config, mode=mode, device=device, seed=sample.seed, quiet=quiet
        )
    else:
        scores, timed = _check_evaluation(
            artifact, saved, dataset, config, mode=mode, evaluator=evaluator, device=device, whole=whole, quiet=quiet
        )
    for check in scores:
        report.add(check)
    report.add(check_documents_apart(dataset, quiet=quiet))
    report.add(check_decoded_bytes(dataset, documents=None if whole else DECODED_DOCUMENTS, seed=sample.seed))
    report.add(check_size(path, artifact, dataset, mode, report.other_files))
    report.add(_check_train_time(run))
    report.add(timed)
    return report


@click.command("verify")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--mode", help="As for `pgolf eval`, a single one [default: the artifact's own].")
@click.option("--evaluator", metavar="MODULE:FUNCTION", help="A scorer of your own, a function of a Session.")
@click.option("--data", "data_dir", type=click.Path(exists=True, file_okay=False), help="[default: the run's]")
@click.option("--variant", help="Which data set of the public layout [default: the run's].")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[default: cuda where there is one]")
@click.option(
    "--whole",
    is_flag=True,
    help="Score the whole validation set, decode all of its text and ask for the whole vocabulary, instead of samples.",
)
@click.option(
    "--candidates",
    type=click.IntRange(8),
    help=f"Tokens of the vocabulary that are asked for in the normalisation check [default: all up to {ALL_UP_TO}, "
    f"{CANDIDATES} of a larger one]. From a part the sum is estimated.",
)
@click.option("--seed", type=click.IntRange(0), help="Which places are tried [default: a new one each time].")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
@click.option("--quiet", is_flag=True, help="No progress.")
@section_options("eval")
def verify_command(path: Path, as_json: bool, **options: Any) -> None:
    """Say whether a score is legal: one line for each check, with its figure.

    PATH is an artifact, a run's folder, or the folder of a packed submission, of which every file counts, and those
    that its script opens elsewhere. For the others the script that `pgolf pack` would write counts as the code.

    The exit status is 1 when the score is not legal. A check that cannot be made, such as the train time of an artifact
    without its run, is skipped: the last line names it, and the exit status stays 0.

    For a run the outcome is kept in RUN/verify_MODE.json.
    """
    flags = given_flags(options)
    names = ("data_dir", "variant", "mode", "evaluator", "device", "whole", "candidates", "seed", "quiet")
    kept = {name: options[name] for name in names}
    report = verify_artifact(path, **{**flags, **kept})
    click.echo(report.to_json() if as_json else "\n".join(report.lines()))
    if (path / "config.json").is_file():
        label = (kept["mode"] or kept["evaluator"] or "own").replace("+", "_").replace(":", "_")
        with atomic_write(path / f"verify_{label}.json", "w") as file:
            file.write(report.to_json())
    if not as_json:
        click.echo(f"{report.verdict} (seed {report.seed})")
    sys.exit(0 if report.legal else 1)


def _check_saved(
    saved: Saved,
    model: GPT,
    dataset: Dataset,
    config: Config,
    *,
    mode: str,
    device: str,
    seed: int,
    quiet: bool,
) -> tuple[list[Check], Check]:
    """The checks "ledger" and "saved scores", and "evaluation time", of what `pgolf eval` left."""
    ledger, facts, _ = saved
    token_bytes = dataset.byte_tables.stream_bytes(dataset.valid_tokens)
    strict = strictly_in_stream_order(mode, config)
    replayed = check_ledger(ledger, ledger.totals(token_bytes).bpb, strict=strict)
    replayed = dataclasses.replace(replayed, figure=f"{replayed.figure}, as `pgolf eval` left it")
    seconds = max(facts["seconds"], ledger.seconds)
    timed = _within(TIME, seconds, facts.get("seconds_by_part", {}), ", as recorded")
    if replayed.status == FAIL:
        return [replayed, Check(SAVED_SCORES, SKIPPED, "the ledger says enough")], timed
    rescored, drawn_from, dtype = rescore(
        model, dataset, mode, config, device=device, tokens_wanted=EVALUATED_TOKENS[device], seed=seed, quiet=quiet
    )
    return [replayed, check_saved_scores(saved, rescored, drawn_from, token_bytes, dtype=dtype)], timed


def _check_evaluation(
    artifact: Path,
    saved: Saved | None,
    dataset: Dataset,
    config: Config,
    *,
    mode: str,
    evaluator: str | None,
    device: str,
    whole: bool,
    quiet: bool,
) -> tuple[list[Check], Check]:
    """The checks "ledger" and "evaluation time" of an evaluation that is made here.

    With `whole` it is of the whole set, and "saved scores" compares all of those with its own.
    """
    total = len(dataset.valid_tokens)
    tokens = dataset.valid_tokens[: total if whole else EVALUATED_TOKENS[device]]
    started = time.monotonic()
    opened = load_model(artifact, device)
    opening = time.monotonic() - started
    scorer = resolve(evaluator, dataset.train_shards) if evaluator else None
    name = evaluator or mode
    try:
        with shown(name, len(tokens) - 1, quiet=quiet) as show:
            result = evaluate(
                opened,
                dataset,
                name,
                config,
                device=device,
                scorer=scorer,
                tokens=tokens,
                progress=show,
                opening_seconds=opening,
            )
    except LegalityError as error:
        return [Check("ledger", FAIL, str(error))], Check(TIME, SKIPPED, "no score")
    replayed = check_ledger(result.ledger, result.bpb, strict=strictly_in_stream_order(name, config))
    if len(tokens) == total:
        checks = [replayed]
        if saved is not None:
            token_bytes = dataset.byte_tables.stream_bytes(tokens)
            checks.append(check_saved_scores(saved, result.ledger, total - 1, token_bytes, dtype=result.compute_dtype))
        return checks, _within(TIME, result.seconds, result.seconds_by_part, "")
    figure = f"{replayed.figure}, of the first {len(tokens):,} of {total:,} tokens"
    timed = Check(TIME, SKIPPED, f"{result.seconds:.1f} s for {result.tokens:,} tokens; --whole times all of them")
    return [dataclasses.replace(replayed, figure=figure)], timed


def saved_evaluation(run: RunDir, model: GPT, dataset: Dataset, mode: str, config: Config) -> Saved | None:
    """What `pgolf eval` left of just this evaluation; None without one that is finished."""
    name, result = mode_name(mode), run.result()
    path, facts = run.path / f"ledger_{name}.npz", result.get("evaluation", {}).get(name, {})
    if not path.is_file() or "seconds" not in facts:
        return None
    ledger = Ledger.load(path)
    wanted = evaluation_identity(model, dataset.valid_tokens, mode, config)
    same = all(ledger.meta.get(key) == value for key, value in wanted.items())
    return Saved(ledger, facts, result.get("bpb", {}).get(name)) if same and ledger.missing() == 0 else None


def check_ledger(ledger: Ledger, bpb: float, *, strict: bool = False) -> Check:
    """Replays the rows of a finished ledger: scores once each, updates on scored tokens only, nothing left out.

    `strict`: no score may be of a state that has learnt from tokens further on in the stream.
    """
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
    if not ((ledger.nll[1:] >= CERTAIN) & (ledger.nll[1:] < np.inf)).all():
        return Check(name, FAIL, "losses that no probability gives")
    seen = furthest_seen(rows, ledger.num_states)
    early = np.flatnonzero(rows.is_score & (seen[rows.state] > rows.start))
    if strict and len(early):
        token, end = int(rows.start[early[0]]), int(seen[rows.state[early[0]]])
        return Check(name, FAIL, f"token {token} is scored by a state that has learnt from tokens up to {end}")
    order = "order of processing" if len(early) else "stream order"
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


def check_documents_apart(dataset: Dataset, *, quiet: bool = True) -> Check:
    """Whether a validation document stands in a training shard, token for token."""
    name = "documents apart"
    if not dataset.train_shards:
        return Check(name, SKIPPED, "no training shards here")
    tokens = dataset.valid_tokens
    held_out = _bodies(tokens)
    keys = np.unique(_keys(tokens, held_out))
    digests = {_digest(tokens, *row) for row in held_out.tolist()}
    shared: set[bytes] = set()
    compared = 0
    total = sum(map(shard_length, dataset.train_shards))
    with progress("comparing documents", total, "tokens", quiet=quiet) as task:
        for training in whole_documents(dataset.train_shards):
            bodies = _bodies(training)
            compared += len(bodies)
            alike = bodies[np.isin(_keys(training, bodies), keys)]
            shared |= {_digest(training, *row) for row in alike.tolist()} & digests
            task.advance(len(training))
    if shared:
        return Check(name, FAIL, f"{len(shared)} validation documents stand in the training shards")
    return Check(name, PASS, f"{len(digests):,} validation documents, none among {compared:,} of training")


def _bodies(tokens: np.ndarray) -> np.ndarray:
    """(start, end) of the documents' tokens without the BOS at either end, those of some length: int64 [n, 2]."""
    documents = find_documents(tokens)
    ends = documents.sum(axis=1)
    bodies = np.stack([documents[:, 0] + 1, ends - (tokens[ends - 1] == BOS_ID)], axis=1)
    return bodies[bodies[:, 1] - bodies[:, 0] >= SHORTEST_DOCUMENT]


def _keys(tokens: np.ndarray, bodies: np.ndarray) -> np.ndarray:
    """Length and some tokens of each body in one number: equal for equal bodies, and seldom for others."""
    starts, lengths = bodies[:, 0], bodies[:, 1] - bodies[:, 0]
    keys = lengths.copy()
    for part in range(1, 9):
        keys = keys * 1_000_003 + tokens[starts + lengths * part // 9]
    return keys


def _digest(tokens: np.ndarray, start: int, end: int) -> bytes:
    return hashlib.blake2b(tokens[start:end].tobytes(), digest_size=16).digest()


def check_decoded_bytes(dataset: Dataset, *, documents: int | None = None, seed: int = 0) -> Check:
    """The byte tables against the decoded text, of so many documents drawn by `seed` (None: of all)."""
    tokens = dataset.valid_tokens
    every = find_documents(tokens)
    chosen = every
    if documents is not None and documents < len(every):
        chosen = every[np.sort(np.random.default_rng(seed).choice(len(every), documents, replace=False))]
    try:
        counted, decoded = check_bytes(tokens, chosen, dataset.byte_tables, dataset.tokenizer)
    except DataError as error:
        return Check("bytes", FAIL, str(error))
    kind = "the text" if dataset.tokenizer.exact else "the normalised text"
    of = f" of {len(every):,}" if chosen is not every else ""
    return Check("bytes", PASS, f"{counted:,} by the tables, {decoded:,} of {kind}, {len(chosen):,}{of} documents")


def check_size(path: Path, artifact: Path, dataset: Dataset, mode: str, other_files: dict[str, int]) -> Check:
    """Artifact and code against the budget: a packed submission's files, or the script that packing would add.

    `other_files`: bytes of what an evaluator reads beside them, its own code included.
    """
    artifact_bytes = artifact.stat().st_size
    if (path / _SCRIPT).is_file():
        files = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        try:
            other_files = {**other_files, **files_of_script(path / _SCRIPT, dataset)}
        except DataError as error:
            return Check("size", FAIL, str(error))
        parts = f"{len(files)} files of the submission {sum(files.values()):,}"
        total = sum(files.values())
    else:
        try:
            from model.pack import entry_script
        except ImportError as error:
            return Check("size", SKIPPED, f"artifact {artifact_bytes:,} bytes, code not counted ({error})")
        code_bytes = len(entry_script(ngram=mode.endswith("+ngram-tilt")))
        parts = f"artifact {artifact_bytes:,}, code {code_bytes:,}"
        total = artifact_bytes + code_bytes
    if other_files:
        largest = max(other_files, key=lambda name: other_files[name])
        parts += f", {len(other_files)} other files {sum(other_files.values()):,} such as {Path(largest).name}"
        total += sum(other_files.values())
    return Check("size", PASS if total <= SIZE_BUDGET else FAIL, f"{total:,} of {SIZE_BUDGET:,} bytes ({parts})")


def files_of_script(script: Path, dataset: Dataset) -> dict[str, int]:
    """Bytes of the files outside its folder that a packed script opens when it scores, Python's own left out.

    It runs in a fresh process on the beginning of the validation set, without network. Raises DataError when it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = folder / "data"
        shards = small / "datasets" / f"fineweb10B_sp{dataset.vocab_size}"
        shards.mkdir(parents=True)
        (small / "tokenizers").mkdir()
        (small / "tokenizers" / f"fineweb_{dataset.vocab_size}_bpe.model").write_bytes(dataset.tokenizer.model)
        for split in ("train", "val"):
            write_shard(shards / f"fineweb_{split}_000000.bin", dataset.valid_tokens[:_SCRIPT_TOKENS])
        request = {
            "script": str(script.resolve()),
            "arguments": ["--data", str(small), "--mode", "plain", "--device", "cpu"],
            "hide": [str(path) for path in (*dataset.train_shards, *dataset.valid_shards)],
            "folder": str(folder),
        }
        (folder / "request.json").write_text(json.dumps(request))
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("isolation.py")), str(folder / "request.json")],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        answer = folder / "answer.json"
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
            raise DataError(f"{script.name} does not score: {last}")
        found: dict[str, int] = json.loads(answer.read_text())["other_files"]
        return found


def _check_train_time(run: RunDir | None) -> Check:
    name = "train time"
    seconds = run.result().get("seconds", {}) if run else {}
    if "train" not in seconds:
        return Check(name, SKIPPED, "no record of a training run here")
    if "calibrate" not in seconds:
        return _within(name, seconds["train"], {}, ", training alone: the record has no calibration")
    parts = {part: seconds[part] for part in ("train", "calibrate")}
    return _within(name, sum(parts.values()), parts, "")


def _within(name: str, seconds: float, parts: dict[str, float], remark: str) -> Check:
    shown_parts = ", ".join(f"{part} {value:.1f}" for part, value in parts.items())
    status = PASS if seconds <= SECONDS_BUDGET else FAIL
    figure = f"{seconds:.1f} of {SECONDS_BUDGET:.0f} s" + (f" ({shown_parts})" if parts else "") + remark
    return Check(name, status, figure)
