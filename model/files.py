"""Writing files and folders so that a reader never sees half of one, and hashing them.

Files and folders are written under a temporary name beside their final place, flushed to the disk and renamed. Whatever
ends the write early (an error, a full disk, Ctrl-C) removes what was written.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from model.errors import PgolfError

# Errors of the place that is written to, whatever inside the `with` block met them.
_PLACE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
_READ_SIZE = 1 << 20


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "wb", encoding: str | None = None) -> Iterator[IO[Any]]:
    """A file object whose contents appear at `path` in one step when the block ends without an error.

    `mode` is "wb" or "w" (UTF-8 unless `encoding` says otherwise; newlines are written as they are). The file that was
    at `path` stays untouched until then. Raises PgolfError when the place cannot be written or is full.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode: got {mode!r}, wanted 'wb' or 'w'")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    text: dict[str, Any] = {} if mode == "wb" else {"encoding": encoding or "utf-8", "newline": ""}
    try:
        file: IO[Any] = open(temporary, mode.replace("w", "x"), **text)  # noqa: SIM115 (closed before the rename)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        finally:
            file.close()
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno in _PLACE_ERRORS or error.filename == str(temporary):
            raise _cannot_write(path, error) from error
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def _sync(path: Path) -> None:
    """Returns when what the file holds, or a folder's names, are on the disk."""
    try:
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
    except OSError as error:
        if not path.is_dir() or error.errno in _PLACE_ERRORS:
            raise  # a folder may be one that cannot be read, or of a file system that knows no such thing


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Adds `text` to the end of a file, all of it or nothing. Raises PgolfError when it cannot be written."""
    left = memoryview(text.encode())
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except BaseException:
                file.truncate(before)
                raise
    except OSError as error:
        raise _cannot_write(Path(path), error) from error


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, replace: bool | str = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends without an error.

    An empty folder that is already there is exchanged for the new one. `replace` admits others: those that hold a file
    of this name, or with True any. Raises PgolfError when the place cannot be written, is full, or holds something that
    may not be replaced.
    """
    path = resolved(path)
    check_replaceable(path, replace=replace)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
        check_replaceable(path, replace=replace)
        for part in (*temporary.rglob("*"), temporary):
            if not part.is_symlink():
                _sync(part)
        try:
            if path.exists():
                path.rename(old)
            temporary.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        _sync(path.parent)
    except OSError as error:
        if error.errno in _PLACE_ERRORS or str(temporary) in str(error.filename):
            raise _cannot_write(path, error) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path without "..", links followed."""
    return Path(os.path.realpath(path))


def check_replaceable(path: Path, *, replace: bool | str, inputs: Iterable[Path] = ()) -> None:
    """Raises PgolfError unless `atomic_folder` may write `path`, a resolved one, and loses none of `inputs` by it."""
    if path.is_dir():
        if Path.cwd().is_relative_to(path):
            raise PgolfError(f"{path}: is or holds the current folder, wanted another one")
        if not replace and any(path.iterdir()):
            raise PgolfError(f"{path}: the folder is not empty, wanted a new or an empty one")
        if isinstance(replace, str) and any(path.iterdir()) and not (path / replace).is_file():
            raise PgolfError(f"{path}: the folder has no {replace}, wanted one to replace that has, or an empty one")
        for file in inputs:
            if resolved(file).is_relative_to(path):
                raise PgolfError(f"{file}: is in {path}, which is replaced; wanted an input outside of it")
    elif path.exists():
        raise PgolfError(f"{path}: is a file, wanted a folder")


def sha256_bytes(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's contents as 64 hexadecimal digits, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_SIZE):
            digest.update(piece)
    return digest.hexdigest()


def _cannot_write(path: Path, error: OSError) -> PgolfError:
    reason = error.strerror or str(error)
    return PgolfError(f"{path}: cannot be written ({reason}), wanted a folder that can be written, with enough space")
