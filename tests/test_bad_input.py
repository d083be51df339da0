"""What a user is told about each kind of bad input: one line on stderr that names it, a non-zero status, no traceback,
and no file that was not there before."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from model import cli
from model.data.shards import read_shard, write_shard
from model.pipeline import run_pipeline
from tests.golden import FOLDER
from tests.tiny import tiny_config, tiny_data


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A data set in `data` and a finished run in `run`."""
    folder = tmp_path_factory.mktemp("original")
    data = tiny_data(folder / "tiny", documents=60).rename(folder / "data")
    run_pipeline(tiny_config(data, folder, run_id="run", eval_mode="plain"))
    return folder


@pytest.fixture
def place(original, tmp_path):
    for name in ("data", "run"):
        shutil.copytree(original / name, tmp_path / name)
    return tmp_path


def change_bytes(path: Path, position: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[position : position + len(new)] = new
    path.write_bytes(data)


def cut(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def empty_validation(data: Path) -> None:
    write_shard(data / "valid_000000.bin", np.array([], dtype=np.uint16))
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["splits"]["valid"]["shards"][0]["tokens"] = 0
    (data / "manifest.json").write_text(json.dumps(manifest))


def id_beyond_the_vocabulary(path: Path) -> None:
    tokens = np.array(read_shard(path))
    tokens[-1] = 512
    write_shard(path, tokens)


def other_tokenizer(data: Path) -> None:
    model = bytearray((FOLDER / "bpb_sentencepiece.model").read_bytes())
    place = model.index(b"the")  # another piece, a model all the same
    model[place : place + 3] = b"teh"
    (data / "tokenizer.model").write_bytes(model)


VALID, TRAIN, ARTIFACT = "data/valid_000000.bin", "data/train_000000.bin", "run/model.pgolf"
# (what is wrong, how it is made so, words of the line)
DATA = {
    "magic": (lambda f: change_bytes(f / VALID, 0, b"\0"), ["valid_000000.bin", "magic", "wanted 20240520"]),
    "version": (lambda f: change_bytes(f / VALID, 4, b"\2"), ["valid_000000.bin", "version 2, wanted 1"]),
    "token count": (
        lambda f: change_bytes(f / TRAIN, 8, b"\7\0\0"),
        ["train_000000.bin", "wanted", "its header names"],
    ),
    "truncated tail": (lambda f: cut(f / TRAIN, 1), ["train_000000.bin", "wanted", "its header names"]),
    "id beyond the vocabulary": (lambda f: id_beyond_the_vocabulary(f / VALID), ["id 512", "vocabulary size 512"]),
    "another tokenizer": (lambda f: other_tokenizer(f / "data"), ["tokenizer.model", "not the tokenizer of these"]),
    "empty split": (lambda f: empty_validation(f / "data"), ["validation split is empty"]),
}
ARTIFACTS = {
    "truncated": (lambda f: cut(f / ARTIFACT, 1), ["model.pgolf", "byte"]),
    "newer format": (
        lambda f: change_bytes(f / ARTIFACT, 8, b"\2\0"),
        ["model.pgolf", "format version 2", "version 1"],
    ),
    "not an artifact": (lambda f: (f / ARTIFACT).write_bytes(b"PK\3\4" * 99), ["model.pgolf", "not an artifact"]),
    "empty file": (lambda f: (f / ARTIFACT).write_bytes(b""), ["model.pgolf", "got 0 bytes"]),
}


def refused(capsys, place: Path, *arguments: object) -> str:
    """The one line that the command ends with."""
    before = {path for path in place.rglob("*") if path.name != "data"}
    with pytest.raises(SystemExit) as done:
        cli.main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    assert done.value.code in (1, 2)
    assert errors.startswith("pgolf: ") and errors.count("\n") == 1, errors
    assert "Traceback" not in output
    assert {path for path in place.rglob("*") if path.name != "data"} == before
    return errors


@pytest.mark.parametrize("defect", DATA)
def test_data_sets(defect, place, capsys):
    """Before evaluation, and by `pgolf data verify`, whose findings are its output."""
    damage, words = DATA[defect]
    damage(place)
    line = refused(capsys, place, "eval", place / "run", "--mode", "plain", "--data", place / "data", "--quiet")
    assert all(word in line for word in words), line
    with pytest.raises(SystemExit) as done:
        cli.main(["data", "verify", str(place / "data"), "--quiet"])
    output, errors = capsys.readouterr()
    assert done.value.code == 1
    assert any(all(word in finding for word in words) for finding in output.splitlines()), output
    assert errors.startswith(f"pgolf: {place / 'data'}: ") and errors.endswith(" found\n")


@pytest.mark.parametrize("defect", ["magic", "truncated tail", "another tokenizer", "empty split"])
def test_data_sets_before_training(defect, place, capsys):
    damage, words = DATA[defect]
    damage(place)
    arguments = ("--preset", "demo", "--data-dir", place / "data", "--run-dir", place / "runs", "--device", "cpu")
    line = refused(capsys, place, "train", *arguments)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("defect", ARTIFACTS)
def test_artifacts(defect, place, capsys):
    damage, words = ARTIFACTS[defect]
    damage(place)
    for command in (
        ("eval", place / "run", "--mode", "plain", "--data", place / "data", "--quiet"),
        ("eval", place / ARTIFACT, "--mode", "plain", "--data", place / "data", "--quiet"),
        ("size", place / ARTIFACT, "--no-code"),
        ("pack", place / "run", "--out", place / "submission"),
    ):
        line = refused(capsys, place, *command)
        assert all(word in line for word in words), line


def test_text_that_is_not_utf8(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    build = ("data", "build", "--input", tmp_path, "--out", tmp_path / "set", "--vocab-size", 300, "--quiet")
    assert "b.txt: not UTF-8: byte 0xe9 at offset 3" in refused(capsys, tmp_path, *build)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--preset", "pr9"), "'pr9' is not one of 'demo'"),
        (("train", "--frobnicate"), "No such option '--frobnicate'"),
        (("train", "--matrix-lr", "fast"), "'fast' is not a valid float"),
        (("eval", "RUN", "--mode", "guess"), "'guess'"),
        (("quantize", "RUN", "--matrix-bits", "9"), "matrix_bits: got 9"),
    ],
)
def test_command_lines(arguments, words, place, capsys):
    line = refused(capsys, place, *(place / "run" if argument == "RUN" else argument for argument in arguments))
    assert words in line, line
