"""The `pgolf` command: help, errors as one line, exit statuses, and what it does not import."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from model import cli
from model.errors import DataError

ROOT = Path(__file__).parent.parent


def pgolf(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Runs the command as a user does."""
    command = [sys.executable, "-m", "model.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **options)


def call(monkeypatch, capsys, *arguments: str, raises: BaseException | None = None) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command in this process; `pgolf fail` raises the given error."""

    @click.command("fail")
    def fail() -> None:
        raise raises

    monkeypatch.setitem(cli.cli.commands, "fail", fail)
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


def all_commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    paths = []
    for name, command in group.commands.items():
        paths.append((*path, name))
        if isinstance(command, click.Group):
            paths += all_commands(command, (*path, name))
    return paths


@pytest.mark.parametrize("path", all_commands(cli.cli), ids=" ".join)
def test_every_command_has_help(path, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([*path, "--help"])
    output = capsys.readouterr().out
    assert done.value.code == 0
    assert output.startswith("Usage: pgolf")
    command = cli.cli
    for name in path:
        command = command.commands[name]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{' '.join(path)} {parameter.opts}"


@pytest.mark.parametrize("arguments", [(), ("data",)])
def test_bare_group_shows_help(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    assert done.value.code == 0
    assert "Commands:" in capsys.readouterr().out


def test_help_needs_no_torch():
    script = (
        "import sys; from model.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("x.bin: magic 0,\n wanted 1"), "pgolf: x.bin: magic 0, wanted 1\n"),
        (OSError(28, "No space left on device", "runs/a"), "pgolf: runs/a: No space left on device\n"),
        (MemoryError(), "pgolf: out of memory\n"),
        (KeyError("k"), "pgolf: unexpected KeyError: 'k' (--debug shows the traceback)\n"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, error, line):
    status, output, errors = call(monkeypatch, capsys, "fail", raises=error)
    assert (status, output, errors) == (1, "", line)


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setitem(cli.cli.commands, "fail", click.Command("fail", callback=lambda: 1 / 0))
    for arguments in (["--debug", "fail"], ["fail", "--debug"]):
        with pytest.raises(ZeroDivisionError):
            cli.main(arguments)


def test_interrupt(monkeypatch, capsys):
    status, output, errors = call(monkeypatch, capsys, "fail", raises=KeyboardInterrupt())
    assert (status, output, errors) == (130, "", "pgolf: stopped by Ctrl-C\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("frobnicate",), "No such command 'frobnicate'. (pgolf --help says more)"),
        (("doctor", "--frob"), "No such option '--frob'. (pgolf doctor --help says more)"),
        (("data", "verify", "/nowhere"), "Directory '/nowhere' does not exist"),
        (("data", "build", "--out", "x", "--input", "."), "wanted either --vocab-size or --tokenizer"),
        (("train", "--preset", "pr9"), "'pr9' is not one of 'demo'"),
        (("eval", "/nowhere"), "Path '/nowhere' does not exist"),
        (("report",), "Missing argument 'RUNS...'"),
    ],
)
def test_wrong_command_lines_are_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as done:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    assert done.value.code == 2
    assert captured.err.startswith("pgolf: ") and captured.err.count("\n") == 1
    assert words in captured.err


def test_unknown_benchmark(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "nothing"])
    assert done.value.code == 1
    assert capsys.readouterr().err.startswith("pgolf: bench: got 'nothing', wanted one of ")


def test_data_build_verify_and_damage(tmp_path):
    """The three commands on a real folder, in processes of their own; nothing half-written stays."""
    text = tmp_path / "text.jsonl"
    documents = [f"Document {i}: the {i * 37 % 11} quick brown foxes jump over {i} lazy dogs." for i in range(60)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    out = tmp_path / "data"
    build = ("data", "build", "--input", str(text), "--out", str(out), "--quiet")
    done = pgolf(*build, "--vocab-size", "300", "--valid-docs", "5")
    assert done.returncode == 0, done.stderr
    assert "valid: 5 documents" in done.stdout
    assert pgolf("data", "verify", str(out), "--quiet").returncode == 0

    shard = next(out.glob("valid*.bin"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done = pgolf("data", "verify", str(out), "--quiet")
    assert done.returncode == 1
    assert shard.name in done.stdout
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr

    done = pgolf(*build, "--vocab-size", "300")
    assert done.returncode == 1
    assert done.stderr == f"pgolf: {out}: the folder is not empty, wanted a new or an empty one\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "text.jsonl"]


def test_ctrl_c_during_a_build_leaves_nothing(tmp_path):
    """SIGINT to the process while it tokenises."""
    text = tmp_path / "text.jsonl"
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz      ", k=3_000_000)
    lines = (json.dumps({"text": "".join(letters[i : i + 1000])}) for i in range(0, len(letters), 1000))
    text.write_text("\n".join(lines) + "\n")
    command = [
        sys.executable,
        "-m",
        "model.cli",
        "data",
        "build",
        "--input",
        str(text),
        "--out",
        str(tmp_path / "data"),
    ]
    process = subprocess.Popen(
        [*command, "--vocab-size", "400"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    # The temporary folder appears when the reading is over and the writing begins.
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".data.*.tmp")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "pgolf: stopped by Ctrl-C"
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


def test_closed_pipe_is_quiet():
    command = f"{sys.executable} -m model.cli doctor | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
