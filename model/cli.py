"""The `pgolf` command. Each subcommand imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from model.errors import PgolfError

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
ANY_PATH = click.Path(path_type=Path)
INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pgolf_kernels", prog_name="pgolf")
@click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error (works anywhere on the line)."
)
def cli() -> None:
    """Train, compress and score very small language models.

    `pgolf demo` runs everything on the bundled text; `pgolf doctor` says what this installation can do.
    """


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
    help="A .txt, .jsonl, .jsonl.gz or .jsonl.zst file, or a folder of them. May be repeated.",
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
@click.option("--variant", help="Which data set of the public layout [default: sp8192, or the only one].")
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
@click.option("--out", type=ANY_PATH, required=True, help="The folder (the public scripts' DATA_DIR).")
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


@cli.command()
def doctor() -> None:
    """Say what this installation can do, and the exact command for what is missing.

    The exit status is 1 only where something is broken.
    """
    from rich.console import Console

    from model.doctor import examine, report

    findings = examine()
    report(findings, Console())
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
    """Runs `pgolf ARGV`. An error is one line on stderr and exit status 1, Ctrl-C one line and 130."""
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
        status = 1
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
