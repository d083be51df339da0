"""The main job, `pgolf demo`: the bundled text through every stage at a size for two CPU cores.

    build data -> train -> quantise -> pack -> evaluate in a fresh process -> report

Nothing here is special to the demo but the preset: each stage is the one that the large presets use.
"""

from __future__ import annotations

import io
import math
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from model.baselines import baselines
from model.config import Config
from model.data.build import build_dataset
from model.data.dataset import Dataset, open_dataset
from model.data.text import SAMPLE
from model.errors import PgolfError
from model.evaluate.bpb import score_per_document
from model.evaluate.documents import find_documents
from model.evaluate.ledger import Ledger
from model.pipeline import Interrupted, run_pipeline
from model.presets import get_preset
from model.report import write_report
from model.run import RunDir

VALID_DOCUMENTS = 40
ADAPTED, FROZEN = "lora_ttt", "lora_ttt_lr0"  # test-time training, and the same windows with learning rate 0


def run_demo(runs: Path, *, seed: int | None = None, steps: int | None = None, quiet: bool = False) -> RunDir:
    """Runs everything in a new folder under `runs` and returns it.

    `seed` and `steps` go over the preset's. Raises PgolfError and its kinds, KeyboardInterrupt after Ctrl-C.
    """
    started = time.perf_counter()
    changes: dict[str, Any] = {"run_dir": str(runs)}
    changes |= {name: value for name, value in (("seed", seed), ("iterations", steps)) if value is not None}
    config = get_preset("demo").replace(**changes)
    config = config.replace(run_id=f"demo-seed{config.train.seed}-{time.strftime('%m%d-%H%M%S')}")
    run = RunDir(runs / config.train.run_id)
    config = config.replace(data_dir=str(run.path / "data"))
    # The steps' own lines go to the run's log.txt in any case.
    with redirect_stdout(io.StringIO()) if quiet else nullcontext():
        run.say(f"1/5  data set from the bundled text, in {run.path}")
        with run.timed("data"):
            build_sample(config, quiet=quiet)
            dataset = open_dataset(config.data.data_dir)
        run.say("2/5  training, quantising, packing")
        _train(config, dataset, quiet=quiet)
        run.say("3/5  scoring the artifact in a fresh process")
        _evaluate_in_fresh_processes(run, quiet=quiet)
        run.say("4/5  general compressors on the same text")
        with run.timed("baselines"):
            general = baselines(dataset)
        gain = paired_gain(run, dataset)
        run.merge_result(
            {
                "val_loss": run.result()["evaluation"][ADAPTED]["val_loss"],
                "baselines": general,
                "ttt_gain": dict(zip(("bpb", "standard_error", "documents"), gain, strict=True)),
            }
        )
        run.say("5/5  report page")
        with run.timed("report"):
            write_report([run.path])
    run.merge_result({"seconds": {"total": time.perf_counter() - started}})
    return run


def _train(config: Config, dataset: Dataset, *, quiet: bool) -> None:
    """The stages that the large presets run in one process, too."""
    try:
        run_pipeline(config, stages=("train", "quantize"), dataset=dataset, quiet=quiet)
    except Interrupted as error:
        # Training has ended by itself and saved a checkpoint, but the demo starts anew: it has no --resume.
        if error.number == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise SystemExit(128 + error.number) from error


def build_sample(config: Config, *, quiet: bool = False) -> None:
    """The bundled text as the data set `config.data.data_dir`."""
    build_dataset(
        [SAMPLE],
        config.data.data_dir,
        vocab_size=config.model.vocab_size,
        valid_docs=VALID_DOCUMENTS,
        quiet=quiet,
    )


def _evaluate_in_fresh_processes(run: RunDir, *, quiet: bool) -> None:
    """`pgolf eval` in processes that know nothing of the training but its files."""
    common = [sys.executable, "-m", "model.cli", "eval", str(run.path)]
    common += ["--quiet"] if quiet else []
    for arguments in (
        ["--mode", "plain", "--mode", "sliding", "--mode", "lora-ttt"],
        ["--mode", "lora-ttt", "--ttt-lora-lr", "0", "--label", FROZEN],
    ):
        # A process group of its own: Ctrl-C reaches this process alone, which ends the other. Its table is left out,
        # the demo's holds the same figures.
        with subprocess.Popen([*common, *arguments], stdout=subprocess.DEVNULL, process_group=0) as process:
            try:
                status = process.wait()
            except BaseException:
                process.terminate()
                process.wait()  # until it has removed what it was writing
                raise
        if status:
            raise PgolfError(f"{run.path}: evaluation ended with exit status {status}, its message is above")


def paired_gain(run: RunDir, dataset: Dataset) -> tuple[float, float, int]:
    """What test-time training gains over learning rate 0: (bits per byte, its standard error, documents).

    Each document is scored both ways; the standard error is that of the sum of the documents' differences.
    """
    losses = [_document_losses(run.path / f"ledger_{name}.npz", dataset) for name in (FROZEN, ADAPTED)]
    difference = (losses[0][:, 0] - losses[1][:, 0]) / math.log(2)
    count, total_bytes = len(difference), losses[0][:, 1].sum()
    spread = math.sqrt(count) * difference.std(ddof=1) if count > 1 else math.nan
    return float(difference.sum() / total_bytes), float(spread / total_bytes), count


def _document_losses(path: Path, dataset: Dataset) -> np.ndarray:
    tokens = dataset.valid_tokens
    nll = Ledger.load(path).nll
    return score_per_document(nll, dataset.byte_tables.stream_bytes(tokens), find_documents(tokens))


def print_result(run: RunDir, console: Console | None = None) -> None:
    """The tables that the demo ends with."""
    console = console or Console()
    result = run.result()
    bpb, artifact, general = result["bpb"], result["artifact"], result["baselines"]
    scores = Table("on the held-out text", box=None, pad_edge=False)
    scores.add_column("bits/byte", justify="right")
    scores.add_column("of xz", justify="right")
    for name, value in (
        ("model before quantisation", bpb["float"]),
        ("artifact", bpb["plain"]),
        ("artifact, sliding window", bpb["sliding"]),
        ("artifact, test-time training", bpb[ADAPTED]),
        ("  with learning rate 0", bpb[FROZEN]),
        ("gzip -9, primed", general["gzip"]),
        ("xz -9e, primed", general["xz"]),
        ("brotli -11, primed", general["brotli"]),
    ):
        scores.add_row(name, f"{value:.4f}", f"{value / general['xz']:.3f}")
    stages = Table("stage", box=None, pad_edge=False)
    stages.add_column("seconds", justify="right")
    for name, value in result["seconds"].items():
        if name != "calibrate":  # a part of "quantize"
            stages.add_row(name.replace("_", " ", 1), f"{value:.1f}")
    both = Table.grid(padding=(0, 3))
    both.add_row(scores, stages)
    console.print("", both, "")
    gain = result["ttt_gain"]
    lines = (
        f"artifact: {artifact['bytes']:,} bytes, {artifact['bits_per_weight']:.3f} bits a weight",
        f"test-time training: {gain['bpb']:.4f} ± {gain['standard_error']:.4f} bits per byte better than with learning "
        f"rate 0 (paired over {gain['documents']} documents)",
        f"report: {run.path / 'report.html'}",
    )
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
