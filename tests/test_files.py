"""Atomic files and folders: all or nothing, whatever ends the write."""

import errno
import os
from pathlib import Path

import pytest

from model.errors import PgolfError
from model.files import atomic_folder, atomic_write, sha256_bytes, sha256_file


def test_file_appears_in_one_step(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_text_is_utf8_with_its_own_newlines(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("é\r\n\n")
    assert (tmp_path / "a.txt").read_bytes() == b"\xc3\xa9\r\n\n"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_write_that_is_stopped_leaves_nothing(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_is_one_clear_error(tmp_path):
    with (
        pytest.raises(PgolfError, match=r"a\.bin: cannot be written \(No space left on device\)"),
        atomic_write(tmp_path / "a.bin"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_systems_own_full_disk(tmp_path, monkeypatch):
    real_open = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: real_open("/dev/full", "wb"))
    with pytest.raises(PgolfError, match="No space left on device"), atomic_write(tmp_path / "a.bin") as file:
        file.write(b"x" * 100)


def test_an_error_of_another_file_is_not_ours(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a.bin"):
        (tmp_path / "missing").read_bytes()


def test_a_missing_folder(tmp_path):
    with pytest.raises(PgolfError, match="cannot be written"), atomic_write(tmp_path / "no" / "a.bin"):
        pass


def test_other_modes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mode: got 'ab'"), atomic_write(tmp_path / "a", "ab"):
        pass


def test_folder_appears_in_one_step(tmp_path):
    target = tmp_path / "deep" / "set"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert os.listdir(target.parent) == ["set"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_that_is_stopped_leaves_nothing(tmp_path, error):
    target = tmp_path / "set"
    target.mkdir()
    (target / "x").write_text("old")
    with pytest.raises(error), atomic_folder(target, replace=True) as folder:
        (folder / "x").write_text("half")
        raise error
    assert (target / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]


def test_a_folder_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    synced, fsync, rename = [], os.fsync, Path.rename

    def noted_rename(self, target):
        synced.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino) or fsync(number))
    monkeypatch.setattr(Path, "rename", noted_rename)
    with atomic_folder(tmp_path / "set") as folder:
        (folder / "in").mkdir()
        (folder / "in" / "x").write_text("1")
    parts = {path.stat().st_ino for path in (tmp_path / "set", tmp_path / "set" / "in", tmp_path / "set" / "in" / "x")}
    assert set(synced[:3]) == parts
    assert synced[3:] == ["rename", tmp_path.stat().st_ino]


def test_ctrl_c_between_two_renames_leaves_the_old_folder(tmp_path, monkeypatch):
    target, rename = tmp_path / "set", Path.rename
    target.mkdir()
    (target / "x").write_text("old")

    def stopped_rename(self, new):
        rename(self, new)
        if self == target:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped_rename)
        with pytest.raises(KeyboardInterrupt), atomic_folder(target, replace=True) as folder:
            (folder / "x").write_text("new")
    assert (target / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]


def test_a_folder_is_replaced_only_when_allowed(tmp_path):
    target = tmp_path / "set"
    target.mkdir()
    with atomic_folder(target) as folder:  # an empty one may go
        (folder / "x").write_text("1")
    with pytest.raises(PgolfError, match="not empty"), atomic_folder(target):
        pass
    with atomic_folder(target, replace=True) as folder:
        (folder / "y").write_text("2")
    assert os.listdir(target) == ["y"]
    assert os.listdir(tmp_path) == ["set"]
    (tmp_path / "file").write_text("")
    with pytest.raises(PgolfError, match="is a file, wanted a folder"), atomic_folder(tmp_path / "file", replace=True):
        pass


def test_a_folder_with_the_named_file_is_replaced_and_no_other(tmp_path):
    target = tmp_path / "set"
    target.mkdir()
    for name in ("first", "second"):  # an empty one, then one with the file
        with atomic_folder(target, replace="mark") as folder:
            (folder / "mark").write_text(name)
        assert (target / "mark").read_text() == name
    (target / "mark").rename(target / "other")
    with pytest.raises(PgolfError, match="set: the folder has no mark, wanted"), atomic_folder(target, replace="mark"):
        pass
    assert os.listdir(target) == ["other"] and os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("name", [".", "..", "../inner"])
def test_the_current_folder_stays(tmp_path, monkeypatch, name):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    with pytest.raises(PgolfError, match="is or holds the current folder"), atomic_folder(name, replace=True):
        pass
    assert os.listdir(tmp_path) == ["inner"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_text() == "1"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_bytes(b"abc") == sha256_file(tmp_path / "a") == known
