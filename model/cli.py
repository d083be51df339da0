"""The `pgolf` command. Each subcommand imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from model.errors import PgolfError
from model.rules import SIZE_BUDGET
from model.settings import given_flags, section_options
from model.signals import terminate_by_exception

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
ANY_PATH = click.Path(path_type=Path)
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


class Deferred(click.Command):
    """A subcommand that is the click command `attribute` of a module, imported when it is used."""

    def __init__(self, name: str, module: str, attribute: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._module, self._attribute = module, attribute

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        command: click.Command = getattr(importlib.import_module(self._module), self._attribute)
        return command.make_context(info_name, args, parent, **extra)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pgolf_kernels", prog_name="pgolf")
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error (works anywhere on the line)."
)
def cli() -> None:
    """Train, compress and score very small language models.

    `pgolf demo` runs everything on the bundled text; `pgolf doctor` says what this installation can do.
    """


@cli.command()
@click.option("--runs", type=ANY_PATH, default=Path("runs"), show_default=True, help="Where the run's folder goes.")
@click.option("--seed", type=int, help="Seed of the weights [default: the preset's].")
@click.option("--steps", type=click.IntRange(1), help="Training steps [default: the preset's]. Few give a quick look.")
@click.option("--quiet", is_flag=True, help="No progress.")
def demo(runs: Path, **options: Any) -> None:
    """Run everything on the bundled text: about four minutes on two cores.

    Builds a data set, trains a small model from random weights, quantises it, packs it into an artifact, scores the
    artifact in a fresh process (plain, sliding window, with test-time training) and writes a report page.
    """
    from model.demo import print_result, run_demo

    run = run_demo(runs, **options)
    print_result(run)


@cli.group()
def data() -> None:
    """Build, check and download data sets (tokenizer, shards, manifest)."""


@data.command("build")
@click.option(
    "--input",
    "inputs",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    required=True,
    help="A .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a folder of them. May be repeated.",
)
@click.option("--out", type=ANY_PATH, required=True, help="The data set's folder; it appears when it is complete.")
@click.option("--vocab-size", type=click.IntRange(1, 65536), help="Train a SentencePiece BPE tokenizer of this size.")
@click.option("--tokenizer", type=FILE, help="Use this SentencePiece model instead of training one.")
@click.option(
    "--normalization",
    type=click.Choice(["identity", "nmt_nfkc"]),
    default="identity",
    show_default=True,
    help="identity keeps every byte; nmt_nfkc is the public recipe, and bytes are then those of the normalised text.",
)
@click.option(
    "--valid-docs", type=click.IntRange(1), help="Validation is the first so many documents [default: one in twenty]."
)
@click.option(
    "--valid-input",
    "valid_inputs",
    type=click.Path(path_type=Path, exists=True),
    multiple=True,
    help="Validation is this file or folder. May be repeated.",
)
@click.option(
    "--shard-tokens", type=click.IntRange(2), default=100_000_000, show_default=True, help="Tokens in a shard."
)
@click.option("--shuffle-seed", type=int, help="Bring the training documents into this random order.")
@click.option("--allow-overlap", is_flag=True, help="Accept documents that are in both splits.")
@click.option("--replace", is_flag=True, help="Replace a data set that is already there.")
@click.option("--threads", type=click.IntRange(1), help="Threads for tokenising [default: all cores].")
@click.option("--quiet", is_flag=True, help="No progress.")
def data_build(inputs: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Make a data set from text: one document for a .txt file or for a line of .jsonl (its field "text").

    \b
    pgolf data build --input books/ --input notes.jsonl.zst --out data/mine --vocab-size 8192
    """
    from model.data.build import build_dataset

    if (options["vocab_size"] is None) == (options["tokenizer"] is None):
        raise click.UsageError("wanted either --vocab-size or --tokenizer")
    manifest = build_dataset(inputs, out, **options)
    for split, facts in manifest["splits"].items():
        click.echo(
            f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, {facts['bytes']:,} bytes of text"
        )
    click.echo(f"wrote {out}")


@data.command("verify")
@click.argument("folder", type=FOLDER)
@click.option("--variant", default="", help="Which data set of the public layout [default: the only one].")
@click.option("--threads", type=click.IntRange(1), help="Threads for decoding [default: all cores].")
@click.option("--quiet", is_flag=True, help="No progress.")
def data_verify(folder: Path, **options: Any) -> None:
    """Check a data set from end to end.

    Headers, sizes, ids below the vocabulary size, BOS counts, hashes, that decoding gives back the very bytes, and that
    the byte tables sum to their number.
    """
    from model.data.verify import verify_dataset

    findings = verify_dataset(folder, **options)
    for finding in findings:
        click.echo(f"{finding.where}: {finding.problem}")
    if findings:
        raise PgolfError(f"{folder}: {len(findings)} problem{'s' if len(findings) > 1 else ''} found")
    click.echo(f"{folder}: all checks passed")


@data.command("download")
@click.option("--out", type=ANY_PATH, envvar="DATA_DIR", default="data", show_default=True, show_envvar=True,
              help="The folder.")  # fmt: skip
@click.option("--variant", default="sp8192", show_default=True, help="Which tokenizer's data set.")
@click.option("--train-shards", type=click.IntRange(1), help="Only the first so many training shards [default: all].")
@click.option("--repo", help="Hub repository [default: MATCHED_FINEWEB_REPO_ID, or the public one].")
@click.option("--prefix", help="Folder in it [default: MATCHED_FINEWEB_REMOTE_ROOT_PREFIX, or the public one].")
@click.option("--quiet", is_flag=True, help="No progress.")
def data_download(out: Path, **options: Any) -> None:
    """Fetch the public shards and their tokenizer from the hub.

    Files that are there and whole are kept, so an interrupted download goes on where it stopped.
    """
    from model.data.download import download_dataset

    dataset = download_dataset(out, **options)
    click.echo(f"{out}: {len(dataset.train_shards)} training and {len(dataset.valid_shards)} validation shards")


cli.add_command(Deferred("train", "model.pipeline", "train_command", "Train, quantise, write the artifact, evaluate."))


@cli.command()
@click.argument("run", type=FOLDER)
@click.option(
    "--weights", help="Start from these instead of the run's model.safetensors: a run, a checkpoint or a file."
)
@click.option("--data", "data_dir", type=FOLDER, help="Data set for the calibration [default: the run's].")
@click.option("--variant", help="Which data set of the public layout [default: the run's].")
@click.option("--quiet", is_flag=True, help="No progress.")
@section_options("quant")
def quantize(
    run: Path, weights: str | None, data_dir: Path | None, variant: str | None, quiet: bool, **flags: Any
) -> None:
    """Quantise the weights of a run into its artifact, RUN/model.pgolf.

    Without flags with the run's own settings. Scores the unquantised weights on the way.
    """
    from model.distributed import distributed
    from model.pipeline import run_pipeline
    from model.run import RunDir

    run = run.resolve()
    changes = {**given_flags(flags), "run_dir": str(run.parent), "run_id": run.name}
    if data_dir:
        changes["data_dir"] = str(data_dir)
    if variant is not None:
        changes["variant"] = variant
    config = RunDir(run).config().replace(**changes)
    with distributed(None, config.train.timeout_seconds) as ranks:
        run_pipeline(config, ranks=ranks, stages=("quantize",), weights=weights, quiet=quiet)


@cli.command("eval")
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--mode",
    "modes",
    multiple=True,
    help="plain, sliding, sgd-ttt, lora-ttt, phased or sliding-cache, each also with +ngram-tilt. May be "
    "repeated [default: the artifact's own].",
)
@click.option("--data", "data_dir", type=FOLDER, help="Data set [default: the one it was trained on].")
@click.option("--variant", help="Which data set of the public layout [default: the one it was trained on].")
@click.option("--label", help="Name of the result in result.json [default: the mode].")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[default: cuda where there is one]")
@click.option("--resume", is_flag=True, help="Go on with an interrupted evaluation, from its ledger.")
@click.option("--quiet", is_flag=True, help="No progress.")
@section_options("eval")
def evaluate_command(
    path: Path,
    modes: tuple[str, ...],
    data_dir: Path | None,
    variant: str | None,
    label: str | None,
    device: str | None,
    resume: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Score an artifact, or that of a run or a packed submission, on the validation text.

    For a run the results are merged into its result.json, and its ledgers are kept in its folder for `pgolf verify`.
    Otherwise the ledger lies beside PATH, as PATH.ledger_MODE.npz.

    \b
    pgolf eval runs/NAME --mode plain --mode sliding --eval-stride 128
    """
    from model.score import print_scores, score_artifact

    if label and len(modes) > 1:
        raise click.UsageError("--label wants a single --mode")
    results = score_artifact(
        path,
        modes,
        data_dir=str(data_dir) if data_dir else None,
        variant=variant,
        label=label,
        device=device,
        resume=resume,
        quiet=quiet,
        **given_flags(flags),
    )
    print_scores(results)


@cli.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@click.option("--budget", type=click.IntRange(1), default=SIZE_BUDGET, show_default=True, help="Bytes allowed in all.")
@click.option("--no-code", is_flag=True, help="Leave out the packed script's bytes.")
def size(path: Path, budget: int, no_code: bool) -> None:
    """Say what an artifact weighs, tensor by tensor, against the budget.

    For a run without an artifact, a checkpoint or weights: what theirs would weigh, without calibrating anything.
    """
    from rich.console import Console

    from model.size import print_table, size_report

    Console().print(print_table(size_report(path, code=not no_code), budget))


@cli.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=ANY_PATH, required=True, help="The submission's folder; it appears when it is complete.")
@click.option("--author", default="", help="For submission.json.")
@click.option("--budget", type=click.IntRange(1), default=SIZE_BUDGET, show_default=True, help="Bytes allowed in all.")
@click.option("--replace", is_flag=True, help="Replace a submission that is already there.")
def pack(run: Path, out: Path, budget: int, **options: Any) -> None:
    """Make a size-limited submission of a run: one script, the artifact, papers.

    The folder runs without this package. The exit status is 1 when it is over the budget.
    """
    from model.pack import pack_submission

    submission = pack_submission(run, out, budget=budget, **options)
    for name, count in submission.sizes.items():
        click.echo(f"{count:>12,}  {name}")
    click.echo(f"{submission.total:>12,}  of {budget:,}")
    if not submission.fits:
        raise PgolfError(f"{out}: {submission.total - budget:,} bytes over the budget")


@cli.command()
@click.argument("source", type=FILE)
@click.argument("target", type=ANY_PATH)
@click.option("--preset", help="The network of a public system's file, such as pr1530.")
@click.option("--codec", help="Codec of an artifact that is written [default: as it was, context for public files].")
def convert(source: Path, target: Path, **options: str | None) -> None:
    """Turn an artifact into safetensors (by TARGET's name), or safetensors or a public system's file into an artifact.

    No code of SOURCE is run, whatever it is.

    \b
    pgolf convert runs/NAME/model.pgolf model.safetensors
    pgolf convert final_model.int6.ptz model.pgolf --preset pr1530
    """
    from model.exchange import convert

    convert(source, target, **options)
    click.echo(f"wrote {target}, {target.stat().st_size:,} bytes")


cli.add_command(Deferred("verify", "model.legality", "verify_command", "Say whether a score is legal, check by check."))


@cli.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@click.option("--out", type=ANY_PATH, help="The page [default: report.html in the first run's folder].")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write a page about a run, or a comparison of several, that opens offline."""
    from model.report import write_report

    click.echo(f"wrote {write_report(runs, out)}")


@cli.command()
@click.argument("names", nargs=-1)
@click.option("-k", "expression", metavar="EXPRESSION", help="Only the tests that match, as pytest's -k.")
@click.option("--peers", is_flag=True, help="Time the peers too, beside ours, on the same inputs.")
@click.option("--json", "json_file", type=ANY_PATH, help="Write pytest-benchmark's record here, anew after each row.")
@click.option(
    "--record", metavar="NAME", help="Keep the run, peers included, in bench/results (docs are made of these)."
)
@click.option("--from", "source", type=FILE, help="Record what --json wrote to this file instead of measuring.")
@click.option("--check", is_flag=True, help="Fail where a call has become slower than this machine's record.")
@click.option("--within", type=float, metavar="SECONDS", help="End after that time with what there is.")
def bench(names: tuple[str, ...], json_file: Path | None, **options: Any) -> None:
    """Time the kernels: the machine's ceilings first, then a table. Needs a checkout, with `pip install '.[bench]'`.

    NAMES are those of bench/bench_NAME.py [default: all]. Peers that cannot run are listed as absent, with the reason.
    """
    import subprocess

    root = Path(__file__).resolve().parent.parent
    known = sorted(path.stem.removeprefix("bench_") for path in (root / "bench").glob("bench_*.py"))
    if not known:
        raise PgolfError(f"{root}: no benchmarks here, wanted a checkout of pgolf_kernels")
    if unknown := [name for name in names if name not in known]:
        raise PgolfError(f"bench: got {unknown[0]!r}, wanted one of {', '.join(known)}")
    command = [sys.executable, "-m", "bench", *names]
    command += ["--json", str(json_file.absolute())] if json_file else []
    command += ["-k", options["expression"]] if options["expression"] else []
    command += ["--record", options["record"]] if options["record"] else []
    command += ["--from", str(options["source"].absolute())] if options["source"] else []
    command += ["--within", str(options["within"])] if options["within"] else []
    command += [f"--{name}" for name in ("peers", "check") if options[name]]
    if status := subprocess.run(command, cwd=root).returncode:
        raise PgolfError(f"bench: ended with exit status {status}, the reason is above")


@cli.command()
def doctor() -> None:
    """Say what this installation can do, and the exact command for what is missing.

    The exit status is 1 only where something is broken.
    """
    from rich.console import Console

    from model.doctor import examine, print_findings

    findings = examine()
    print_findings(findings, Console())
    broken = [finding.part for finding in findings if finding.status == "broken"]
    if broken:
        raise PgolfError(f"broken: {', '.join(broken)}")


def _show(error: click.ClickException) -> int:
    """One line for a wrong command line; a bare `pgolf` or group is a question for help."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message())
        return 0
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "pgolf"
    _line(f"{' '.join(error.format_message().split())} ({command} --help says more)")
    return error.exit_code


def _line(text: str) -> None:
    click.echo(f"pgolf: {text}", err=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `pgolf ARGV`. An error is one line on stderr and its exit status, Ctrl-C one line and 130."""
    # Before torch loads OpenMP: by default its threads spin for milliseconds at each barrier, which on two cores that
    # something else uses too made a training step of 0.8 s take 2 to 8 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    terminate_by_exception()  # as silently as by default
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    status = 0
    try:
        with cli.make_context("pgolf", arguments) as context:
            cli.invoke(context)
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.ClickException as error:
        status = _show(error)
    except (click.exceptions.Abort, KeyboardInterrupt):
        if debug:
            raise
        _line("stopped by Ctrl-C")
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`pgolf ... | head`): what Python flushes at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        if debug:
            raise
        _line(_describe(error))
        # An interrupted training says which signal it was.
        if hasattr(error, "number"):
            status = 128 + error.number
        else:
            status = error.status if isinstance(error, PgolfError) else 1
    sys.exit(status)


def _describe(error: Exception) -> str:
    """One line for an error: the user's to mend, the machine's, or ours."""
    text = " ".join(str(error).split())
    if isinstance(error, PgolfError):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"unexpected {type(error).__name__}: {text} (--debug shows the traceback)"


if __name__ == "__main__":
    main()
