"""Ctrl-C and a full disk at the worst moment: a file is written but has not got its name yet, in every command.

Each ends with one line and a non-zero status, leaves no half-written file and no changed one, and works when it is
run again.
"""

import errno
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
import torch

from model import cli
from model.checkpoint import save_checkpoint
from model.errors import PgolfError
from model.files import append_text, sha256_file
from model.pipeline import run_pipeline
from tests.tiny import tiny_config, tiny_data

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="names open files through /proc")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("tiny"), documents=60)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run that went through every stage."""
    config = tiny_config(data, tmp_path_factory.mktemp("runs"), run_id="whole")
    run_pipeline(config)
    return Path(config.train.run_dir) / "whole"


def pgolf(capsys, *arguments: object) -> tuple[int, str]:
    """(exit status, stderr) of the command in this process."""
    with pytest.raises(SystemExit) as done:
        cli.main([str(argument) for argument in arguments])
    return done.value.code or 0, capsys.readouterr().err


def arguments_of(job: str, folder: Path, data: Path) -> list[object]:
    """The command line of a job that works in `folder`."""
    run = folder / "run"
    return {
        "data build": [
            *("data", "build", "--input", folder / "text", "--out", folder / "set", "--vocab-size", "300", "--quiet"),
            "--allow-overlap",
        ],
        "train": ["train-tiny", folder, data],
        "quantize": ["quantize", run, "--matrix-bits", "4", "--quiet"],
        "eval": ["eval", run, "--mode", "plain", "--quiet"],
        "report": ["report", run],
    }[job]


@click.command()
@click.argument("folder")
@click.argument("data")
def train_tiny(folder: str, data: str) -> None:
    """`pgolf train` at toy size."""
    run_pipeline(
        tiny_config(Path(data), Path(folder), run_id="new", checkpoint_every=3), stages=("train",), resume=True
    )


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def end_writing(monkeypatch, name: str, how: str) -> None:
    """The next time that a file `name` is complete and about to be renamed, Ctrl-C is pressed or the disk is full."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if name in Path(os.readlink(f"/proc/self/fd/{descriptor}")).name:
            monkeypatch.setattr(os, "fsync", real)
            if how == "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            signal.raise_signal(signal.SIGINT)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("how", ["full", "interrupted"])
@pytest.mark.parametrize(
    ("job", "name", "result"),
    [
        ("data build", "train_000000.bin", "set"),
        ("data build", "manifest.json", "set"),
        ("train", "config.json", "new/config.json"),
        ("train", "model.safetensors", "new/model.safetensors"),
        ("quantize", "model.pgolf", "run/model.pgolf"),
        ("eval", "ledger_plain.npz", "run/ledger_plain.npz"),
        ("eval", "result.json", "run/result.json"),
        ("report", "report.html", "run/report.html"),
    ],
)
def test_write_that_is_stopped(job, name, result, how, data, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(data.parent / "text", tmp_path / "text")
    monkeypatch.setitem(cli.cli.commands, "train-tiny", train_tiny)
    arguments = arguments_of(job, tmp_path, data)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        end_writing(patch, name, how)
        status, errors = pgolf(capsys, *arguments)
    assert errors.count("\n") == 1, errors
    if how == "full":
        assert status == 1
        assert errors.startswith("pgolf: ") and f"{name}: cannot be written (No space left on device)" in errors
    else:
        assert (status, errors) == (130, "pgolf: stopped by Ctrl-C\n")
    after = contents(tmp_path)
    assert [path for path in after if ".tmp" in path or ".old" in path] == []
    assert after.get(result) == before.get(result)
    if job == "data build":
        assert after == before

    status, errors = pgolf(capsys, *arguments)
    assert (status, errors) == (0, "")
    assert (tmp_path / result).exists()


@contextmanager
def largest_file(size: int):
    """The system lets no file of this process grow beyond so many bytes: a full disk without one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_checkpoint_that_does_not_fit(tmp_path):
    """The safetensors library writes it, and has an error of its own for that."""
    save_checkpoint(tmp_path, 1, {"a": torch.zeros(10)}, {}, keep=2)
    with pytest.raises(PgolfError, match=r"step_00000002: cannot be written \(.*large"), largest_file(1 << 16):
        save_checkpoint(tmp_path, 2, {"a": torch.zeros(1 << 16)}, {}, keep=2)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_line_that_does_not_fit(tmp_path):
    """Nothing of it stays, not even what the disk could take."""
    path = tmp_path / "log.txt"
    append_text(path, "first\n")
    with pytest.raises(PgolfError, match=r"log\.txt: cannot be written \(File too large\)"), largest_file(10):
        append_text(path, "second line\n")
    assert path.read_text() == "first\n"
    append_text(path, "second line\n")
    assert path.read_text() == "first\nsecond line\n"
