"""Scoring an artifact: what `pgolf eval` does, in one process or in those that torchrun started."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from model.artifact import Header, load_model, read_header
from model.config import Config
from model.data.dataset import Dataset, dataset_of
from model.data.progress import progress
from model.distributed import Dist, distributed
from model.errors import ConfigError, DataError
from model.evaluate import EvalResult, evaluate, parse_mode
from model.evaluate.bpb import Score
from model.evaluate.session import Progress
from model.files import sha256_bytes
from model.gpt import GPT
from model.run import RunDir

PACKED_SCRIPT = "train_gpt.py"  # in the folder of a packed submission, of which every file counts
PATIENCE_SECONDS = 3600.0  # for the slowest rank: documents are dealt by an estimate of their cost


def score_artifact(
    path: Path,
    modes: Sequence[str],
    *,
    data_dir: str | None = None,
    variant: str | None = None,
    label: str | None = None,
    device: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    ledgers: bool = True,
    **changes: Any,
) -> dict[str, EvalResult]:
    """Scores the artifact `path`, or that of the run or packed submission in the folder `path`.

    In `modes` (default: the configuration's). The data set is the run's or the artifact's, or that in `data_dir` or of
    another `variant`. The configuration is the artifact's with `changes` (fields of EvalConfig). For a run, results go
    into its result.json under the mode's name (or `label`). A ledger is kept for each (`ledger_path`) unless `ledgers`
    is False; with `resume` an interrupted evaluation goes on from it. Where the folder cannot be written neither is
    kept. Returns the results by that name, on every rank. Each evaluation's time counts from opening the artifact.

    Raises ArtifactError, ConfigError for a mode, DataError for data with another tokenizer, TrainError for more ranks
    than GPUs.
    """
    places = {"data_dir": data_dir, "variant": variant}
    options: dict[str, Any] = {"places": places, "label": label, "resume": resume, "quiet": quiet}
    with distributed(device, timeout_seconds=PATIENCE_SECONDS) as ranks:
        return _score(path, modes, ranks, ledgers=ledgers, changes=changes, **options)


def _score(
    path: Path,
    modes: Sequence[str],
    ranks: Dist,
    *,
    places: dict[str, str | None],
    label: str | None,
    resume: bool,
    quiet: bool,
    ledgers: bool,
    changes: dict[str, Any],
) -> dict[str, EvalResult]:
    run = RunDir(path, writes=ranks.is_main) if is_run(path) else None
    artifact = path / "model.pgolf" if path.is_dir() else path
    header = read_header(artifact)
    config = header.config.replace(**changes)
    modes = modes or (config.eval.eval_mode,)
    for mode in modes:
        parse_mode(mode)
    dataset = dataset_of(run.config() if run else config, **places)
    check_tokenizer(header, dataset)
    kept = (ledgers or run is not None) and _can_keep(path, ranks, resume=resume)
    run, place = run if kept else None, path if ledgers and kept else None
    options: dict[str, Any] = {"run": run, "place": place, "label": label, "resume": resume, "quiet": quiet}
    return dict(score_modes(artifact, dataset, modes, config, ranks, **options))


def score_modes(
    artifact: Path,
    dataset: Dataset,
    modes: Iterable[str],
    config: Config,
    ranks: Dist,
    *,
    run: RunDir | None,
    place: Path | None,
    resume: bool,
    quiet: bool,
    label: str | None = None,
) -> Iterator[tuple[str, EvalResult]]:
    """(name, result) of each mode, when it is scored and, where there is a `run`, in its result.json.

    Ledgers are those of `place` (`ledger_path`), None: none is kept. The artifact is opened once, and each result's
    time counts from there.
    """
    started = time.monotonic()
    model = load_model(artifact, ranks.device)
    opening = time.monotonic() - started
    for mode in modes:
        name = label or mode_name(mode)
        result = score_mode(
            model,
            dataset,
            mode,
            config,
            ranks,
            name=name,
            quiet=quiet,
            ledger_path=ledger_path(place, name) if place else None,
            resume=resume,
            opening_seconds=opening,
        )
        if run:
            record_score(run, name, result)
        yield name, result


def record_score(run: RunDir, name: str, result: EvalResult) -> None:
    """Puts a result into the run's result.json. Its seconds count what was interrupted, too."""
    run.merge_result(
        {
            "evaluation": {name: result.summary()},
            "bpb": {name: result.bpb},
            "seconds": {f"evaluate_{name}": result.seconds},
        }
    )


def score_mode(
    model: GPT, dataset: Dataset, mode: str, config: Config, ranks: Dist, *, name: str, quiet: bool, **options: Any
) -> EvalResult:
    """`evaluate` (and its `options`) on all ranks; the first shows its progress under `name`, unless `quiet`."""
    with shown(name, len(dataset.valid_tokens) - 1, quiet=quiet or not ranks.is_main) as show:
        return evaluate(model, dataset, mode, config, device=ranks.device, progress=show, **options)


def mode_name(mode: str) -> str:
    """An evaluation mode as a key of result.json: "lora-ttt" -> "lora_ttt"."""
    return mode.replace("-", "_").replace("+", "_")


def is_run(path: Path) -> bool:
    """Whether `path` is a run's folder, which results and ledgers go into, and not a packed submission's."""
    return (path / "config.json").is_file()


def ledger_path(path: Path, name: str) -> Path:
    """Where the ledger of the result `name` of `path` is kept: in a run's folder, otherwise beside the artifact.

    For a packed submission beside its folder: every file in there counts.
    """
    if is_run(path):
        return path / f"ledger_{name}.npz"
    path = Path(os.path.abspath(path))  # "." has no name to put something beside
    if (path.parent / PACKED_SCRIPT).is_file():
        path = path.parent
    return path.with_name(f"{path.name}.ledger_{name}.npz")


def _can_keep(path: Path, ranks: Dist, *, resume: bool) -> bool:
    """Whether ledgers and a run's result can be written, the same on every rank.

    Raises ConfigError where a ledger was to be gone on with.
    """
    folder = ledger_path(path, "").parent
    if all(ranks.gather_json(os.access(folder, os.W_OK))):
        return True
    if resume:
        raise ConfigError(f"resume: {folder} cannot be written, wanted a folder in which the ledger can be kept")
    if ranks.is_main:
        result = " or result.json" if is_run(path) else ""
        print(f"no ledger{result} is kept: {folder} cannot be written", file=sys.stderr)
    return False


def check_tokenizer(header: Header, dataset: Dataset) -> None:
    """Raises DataError when the data set's tokenizer is not the one that the artifact was trained with."""
    digest = sha256_bytes(dataset.tokenizer.model)
    if header.tokenizer_sha256 not in (None, digest):
        raise DataError(
            f"{dataset.name}: its tokenizer (SHA-256 {digest[:12]}...) is not the artifact's "
            f"({header.tokenizer_sha256[:12]}...), wanted the data set that the artifact was trained on"
        )


def print_scores(results: dict[str, EvalResult], console: Console | None = None) -> None:
    """The results as a table; under torchrun from the first process alone."""
    if int(os.environ.get("RANK", "0")):
        return
    table = Table("mode", box=None, pad_edge=False)
    for title in ("bits per byte", "nats per token", "seconds"):
        table.add_column(title, justify="right")
    for name, result in results.items():
        legal = "" if result.ledger.legal else " (not a legal score)"
        table.add_row(name + legal, f"{result.bpb:.5f}", f"{result.val_loss:.5f}", f"{result.seconds:.1f}")
    (console or Console()).print(table)


@contextmanager
def shown(name: str, tokens: int, *, quiet: bool) -> Iterator[Progress]:
    """A progress callback for `evaluate`: the running bits per byte and the time that is left."""
    with progress(f"evaluating {name}", tokens, "tokens", quiet=quiet) as task:
        started, resumed = time.monotonic(), -1

        def show(score: Score, done: int, total: int) -> None:
            nonlocal resumed
            resumed = done if resumed < 0 else resumed
            left = time_left(started, done - resumed, total - resumed)
            task.unit = f"tokens, {score.bpb:.4f} bpb{left}"
            task.advance(done - task.done)

        yield show


def time_left(started: float, done: float, total: float) -> str:
    """The time left for work of which `done` took since `started`, for a line; "" where a bar shows it already."""
    if not 0 < done < total or sys.stderr.isatty():
        return ""
    minutes, seconds = divmod(round((time.monotonic() - started) * (total - done) / done), 60)
    clock = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    return f", {clock} left"
