"""Scoring an artifact: what `pgolf eval` does, and the fresh process in which the demo's artifact is scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model.artifact import Header, load_model, read_header
from model.data.dataset import Dataset, open_dataset
from model.data.progress import progress
from model.errors import DataError
from model.evaluate import EvalResult, evaluate, parse_mode
from model.evaluate.bpb import Score
from model.evaluate.session import Progress
from model.files import sha256_bytes
from model.pipeline import mode_name
from model.run import RunDir


def score_artifact(
    path: Path,
    modes: Sequence[str],
    *,
    data_dir: str | None = None,
    label: str | None = None,
    device: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    **changes: Any,
) -> dict[str, EvalResult]:
    """Scores the artifact `path`, or that of the run in the folder `path`, in `modes` (default: the configuration's).

    The configuration is the artifact's with `changes` (fields of EvalConfig). For a run, results go into its
    result.json under the mode's name (or `label`), and ledgers into its folder; with `resume` an interrupted
    evaluation goes on from its ledger. Returns the results by that name.

    Raises ArtifactError, ConfigError for a mode, DataError for data with another tokenizer.
    """
    run = RunDir(path) if path.is_dir() else None
    artifact = run.artifact_path if run else path
    header = read_header(artifact)
    config = header.config.replace(**changes)
    modes = modes or (config.eval.eval_mode,)
    for mode in modes:
        parse_mode(mode)
    dataset = open_dataset(data_dir or (run.config() if run else config).data.data_dir)
    check_tokenizer(header, dataset)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(artifact, device)
    results = {}
    for mode in modes:
        name = label or mode_name(mode)
        ledger = run.path / f"ledger_{name}.npz" if run else None
        with _shown(name, dataset, quiet=quiet) as show:
            result = evaluate(
                model, dataset, mode, config, device=device, progress=show, ledger_path=ledger, resume=resume
            )
        results[name] = result
        if run:
            run.merge_result(
                {
                    "evaluation": {name: result.summary()},
                    "bpb": {name: result.bpb},
                    "seconds": {f"evaluate_{name}": result.seconds},
                }
            )
    return results


def check_tokenizer(header: Header, dataset: Dataset) -> None:
    """Raises DataError when the data set's tokenizer is not the one that the artifact was trained with."""
    digest = sha256_bytes(dataset.tokenizer.model)
    if header.tokenizer_sha256 not in (None, digest):
        raise DataError(
            f"{dataset.name}: its tokenizer (SHA-256 {digest[:12]}...) is not the artifact's "
            f"({header.tokenizer_sha256[:12]}...), wanted the data set that the artifact was trained on"
        )


def print_scores(results: dict[str, EvalResult], console: Console | None = None) -> None:
    """The results as a table."""
    table = Table("mode", box=None, pad_edge=False)
    for title in ("bits per byte", "nats per token", "seconds"):
        table.add_column(title, justify="right")
    for name, result in results.items():
        legal = "" if result.ledger.legal else " (not a legal score)"
        table.add_row(name + legal, f"{result.bpb:.5f}", f"{result.val_loss:.5f}", f"{result.seconds:.1f}")
    (console or Console()).print(table)


@contextmanager
def _shown(name: str, dataset: Dataset, *, quiet: bool) -> Iterator[Progress]:
    """A progress callback for `evaluate`."""
    with progress(f"evaluating {name}", len(dataset.valid_tokens) - 1, "tokens", quiet=quiet) as task:

        def show(score: Score, total: int, seconds: float) -> None:
            task.unit = f"tokens, {score.bpb:.4f} bpb"
            task.advance(score.tokens - task.done)

        yield show
