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
import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
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
from model.errors import ConfigError, LegalityError, NotVerified, PgolfError
from model.evaluate import evaluate, evaluation_identity
from model.evaluate.ledger import ARTIFACT_STATE, CERTAIN, Ledger, Rows
from model.files import atomic_write
from model.gpt import GPT
from model.isolation import environment
from model.legality_files import check_decoded_bytes, check_documents_apart, check_size, data_files
from model.probe import resolve
from model.rescore import SAVED_SCORES, Saved, check_saved_scores, rescore
from model.rules import SECONDS_BUDGET
from model.run import RunDir
from model.score import check_tokenizer, mode_name, shown, time_left
from model.settings import given_flags, section_options
from model.verify import Sample, check_scorer, planned_tokens, strictly_in_stream_order

TIME = "evaluation time"
ALL_UP_TO, CANDIDATES = 128, 32  # of the normalisation check: all of a small vocabulary, some of a large one
# Of the validation set: its beginning where no ledger of the whole is there, else drawn to compare saved scores.
EVALUATED_TOKENS = {"cpu": 2_048, "cuda": 131_072}
DECODED_DOCUMENTS = 2_000


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
    if mode and evaluator:
        raise ConfigError(f"mode, evaluator: got {mode!r} and {evaluator!r}, wanted one of them")
    if evaluator and ":" not in evaluator:
        raise ConfigError(f"evaluator: got {evaluator!r}, wanted module:function")
    artifact = path / "model.pgolf" if path.is_dir() else path
    run = RunDir(path, writes=False) if (path / "config.json").is_file() else None
    header = read_header(artifact)
    config = header.config.replace(**changes)
    given = {name: value for name, value in (("data_dir", data_dir), ("variant", variant)) if value is not None}
    origin = (run.config() if run else config).replace(**given)
    dataset = dataset_of(origin)
    hide = data_files(dataset, Path(origin.data.data_dir), path)
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
            hide=hide,
            sample=sample,
            progress=show,
        )
    report.seed, report.scorer = sample.seed, evaluator or mode
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if evaluator:
        scores, timed = _check_own_evaluation(
            artifact, dataset, origin, config, evaluator=evaluator, device=device, whole=whole, quiet=quiet
        )
    else:
        scores, timed = _check_mode(
            artifact, run, model, dataset, config,
            mode=mode, device=device, whole=whole, seed=sample.seed, quiet=quiet,
        )  # fmt: skip
    for check in scores:
        report.add(check)
    report.add(check_documents_apart(dataset, quiet=quiet))
    report.add(check_decoded_bytes(dataset, documents=None if whole else DECODED_DOCUMENTS, seed=sample.seed))
    report.add(check_size(path, artifact, dataset, mode, report.other_files, hide=hide))
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

    The exit status is 1 when the score is not legal, and 2 when nothing can be said, for want of a file, say. A check
    that cannot be made, such as the train time of an artifact without its run, is skipped: the last line names it, and
    the exit status stays 0.

    For a run the outcome is kept in RUN/verify_MODE.json.
    """
    flags = given_flags(options)
    names = ("data_dir", "variant", "mode", "evaluator", "device", "whole", "candidates", "seed", "quiet")
    kept = {name: options[name] for name in names}
    try:
        report = verify_artifact(path, **{**flags, **kept})
    except Exception as error:
        why = str(error) if isinstance(error, PgolfError) else f"unexpected {type(error).__name__}: {error}"
        if as_json:
            click.echo(json.dumps({"error": why}))
        raise NotVerified(why) from error
    click.echo(report.to_json() if as_json else "\n".join([*report.lines(), f"{report.verdict} (seed {report.seed})"]))
    if (path / "config.json").is_file():
        label = report.scorer.replace("+", "_").replace(":", "_")
        try:
            with atomic_write(path / f"verify_{label}.json", "w") as file:
                file.write(report.to_json())
        except PgolfError as error:
            click.echo(f"not kept: {error}", err=True)
    sys.exit(0 if report.legal else 1)


def _check_mode(
    artifact: Path,
    run: RunDir | None,
    model: GPT,
    dataset: Dataset,
    config: Config,
    *,
    mode: str,
    device: str,
    whole: bool,
    seed: int,
    quiet: bool,
) -> tuple[list[Check], Check]:
    """The checks "ledger", "saved scores" and "evaluation time" of a mode: of what `pgolf eval` left of just this
    evaluation, or of one that is made here."""
    try:
        saved = None if run is None else saved_evaluation(run, model, dataset, mode, config)
    except LegalityError as error:
        return _no_score(str(error))
    if saved is not None and not whole:
        return _check_saved(saved, model, dataset, config, mode=mode, device=device, seed=seed, quiet=quiet)
    checks, timed = _check_evaluation(
        artifact, saved, dataset, config, mode=mode, device=device, whole=whole, quiet=quiet
    )
    recorded = None if run is None or saved is not None else run.result().get("bpb", {}).get(mode_name(mode))
    if recorded is not None:
        figure = f"result.json says {recorded:.5f} bpb, no ledger of just this evaluation is there to compare"
        checks.append(Check(SAVED_SCORES, SKIPPED, figure))
    return checks, timed


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
    device: str,
    whole: bool,
    quiet: bool,
) -> tuple[list[Check], Check]:
    """The checks "ledger" and "evaluation time" of an evaluation that is made here.

    With `whole` it is of the whole set, and "saved scores" compares all of those with its own.
    """
    tokens = dataset.valid_tokens[: None if whole else EVALUATED_TOKENS[device]]
    started = time.monotonic()
    opened = load_model(artifact, device)
    opening = time.monotonic() - started
    try:
        with shown(mode, len(tokens) - 1, quiet=quiet) as show:
            result = evaluate(
                opened, dataset, mode, config, device=device, tokens=tokens, progress=show, opening_seconds=opening
            )
    except LegalityError as error:
        return _no_score(str(error))
    checks, timed = _of_evaluation(
        result.ledger, result.bpb, result.seconds, result.seconds_by_part, dataset,
        strict=strictly_in_stream_order(mode, config),
    )  # fmt: skip
    total = len(dataset.valid_tokens)
    if saved is not None and len(tokens) == total:
        token_bytes = dataset.byte_tables.stream_bytes(tokens)
        checks.append(check_saved_scores(saved, result.ledger, total - 1, token_bytes, dtype=result.compute_dtype))
    return checks, timed


def _of_evaluation(
    ledger: Ledger, bpb: float, seconds: float, parts: dict[str, float], dataset: Dataset, *, strict: bool
) -> tuple[list[Check], Check]:
    replayed, total = check_ledger(ledger, bpb, strict=strict), len(dataset.valid_tokens)
    if ledger.num_tokens == total:
        return [replayed], _within(TIME, seconds, parts, "")
    figure = f"{replayed.figure}, of the first {ledger.num_tokens:,} of {total:,} tokens"
    timed = f"{seconds:.1f} s for {ledger.num_tokens - 1:,} tokens; --whole times all of them"
    return [dataclasses.replace(replayed, figure=figure)], Check(TIME, SKIPPED, timed)


def _check_own_evaluation(
    artifact: Path,
    dataset: Dataset,
    origin: Config,
    config: Config,
    *,
    evaluator: str,
    device: str,
    whole: bool,
    quiet: bool,
) -> tuple[list[Check], Check]:
    """The same of somebody's own scorer, in a process that has never run it: its time counts what it does at first,
    importing included. `origin` names the data set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {
            "artifact": str(artifact),
            "origin": origin.to_dict(),
            "config": config.to_dict(),
            "evaluator": evaluator,
            "device": device,
            "tokens": None if whole else EVALUATED_TOKENS[device],
            "quiet": quiet,
            "folder": name,
        }
        (folder / "request.json").write_text(json.dumps(request))
        code = "import sys; from model.legality import evaluate_own; evaluate_own(sys.argv[1])"
        command = [sys.executable, "-P", "-c", code, str(folder / "request.json")]
        done = subprocess.run(command, env=environment())
        if done.returncode < 0:  # for want of memory, mostly
            raise ConfigError(f"evaluator: its process was ended by {signal.Signals(-done.returncode).name}")
        if not (folder / "answer.json").is_file():
            return _no_score("its process ended without a score")
        answer = json.loads((folder / "answer.json").read_text())
        if "error" in answer:
            raise ConfigError(f"evaluator: {answer['error']}")
        if "illegal" in answer:
            return _no_score(answer["illegal"])
        try:
            ledger = Ledger.load(folder / "ledger.npz")
        except LegalityError as error:
            return _no_score(str(error))
    token_bytes = dataset.byte_tables.stream_bytes(dataset.valid_tokens[: ledger.num_tokens])
    return _of_evaluation(
        ledger, ledger.totals(token_bytes).bpb, answer["seconds"], answer["parts"], dataset,
        strict=strictly_in_stream_order(evaluator, config),
    )  # fmt: skip


def evaluate_own(request_file: str) -> None:
    """The process of `_check_own_evaluation`: leaves the ledger and the seconds, or what went wrong."""
    request = json.loads(Path(request_file).read_text())
    folder, device, name = Path(request["folder"]), request["device"], request["evaluator"]
    try:
        dataset = dataset_of(Config.from_dict(request["origin"]))
        tokens = dataset.valid_tokens[: request["tokens"]]
        started = time.monotonic()
        opened = load_model(Path(request["artifact"]), device)
        scorer = resolve(name, [])
        with shown(name, len(tokens) - 1, quiet=request["quiet"]) as show, redirect_stdout(sys.stderr):
            result = evaluate(
                opened,
                dataset,
                name,
                Config.from_dict(request["config"]),
                device=device,
                scorer=scorer,
                tokens=tokens,
                progress=show,
                opening_seconds=time.monotonic() - started,
            )
        result.ledger.save(folder / "ledger.npz")
        answer: dict[str, Any] = {"seconds": result.seconds, "parts": result.seconds_by_part}
    except LegalityError as error:
        answer = {"illegal": str(error)}
    except PgolfError as error:
        answer = {"error": str(error)}
    except (Exception, SystemExit) as error:
        answer = {"illegal": f"{type(error).__name__}: {error}"}
    (folder / "answer.json").write_text(json.dumps(answer))


def _no_score(why: str) -> tuple[list[Check], Check]:
    return [Check("ledger", FAIL, why)], Check(TIME, SKIPPED, "no score")


def saved_evaluation(run: RunDir, model: GPT, dataset: Dataset, mode: str, config: Config) -> Saved | None:
    """What `pgolf eval` left of just this evaluation; None without one that is finished."""
    name, result = mode_name(mode), run.result()
    path, facts = run.path / f"ledger_{name}.npz", result.get("evaluation", {}).get(name, {})
    if not path.is_file() or "seconds" not in facts:
        return None
    ledger = Ledger.load(path)
    wanted = evaluation_identity(model, dataset.valid_tokens, mode, config)
    same = all(ledger.meta.get(key) == value for key, value in wanted.items())
    same &= ledger.num_tokens == len(dataset.valid_tokens)
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
