"""Documents from text files: .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet.

A .txt file is one document; a line of JSON or a row of a table holds one in its field `text`. Text is UTF-8 and is
kept byte for byte: no newline is translated, no byte order mark removed.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import zstandard

from model.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SAMPLE = Path(__file__).parent / "sample" / "quickstart.jsonl.zst"  # ships with the package, see its PROVENANCE.md
MAX_DOCUMENT_BYTES = 256 << 20  # a longer line is a damaged file sooner than a document


class Document(NamedTuple):
    """A text and where it came from ("corpus.jsonl:17"), for messages."""

    text: str
    where: str


def find_inputs(inputs: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The text files that are meant: files as they are named, folders searched through in the order of their paths.

    Raises DataError for a missing path, a file of an unknown kind and a folder without any text file.
    """
    found: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
            if not inside:
                raise DataError(f"{path}: no text file in this folder, wanted {', '.join(SUFFIXES)}")
            found += inside
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: not a kind of text file that can be read, wanted {', '.join(SUFFIXES)}")
        else:
            found.append(path)
    if not found:
        raise DataError("no input named, wanted text files or folders")
    return found


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """The documents of these files, in order. Raises DataError naming file, line and byte of what cannot be read."""
    for path in paths:
        try:
            if path.name.endswith(".txt"):
                yield Document(_decode(path.read_bytes(), str(path)), str(path))
            elif path.name.endswith(".parquet"):
                yield from _read_parquet(path)
            else:
                yield from _read_jsonl(path)
        except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise DataError(f"{path}: the compressed data is damaged or cut off ({error})") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_DOCUMENT_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_DOCUMENT_BYTES:
                raise DataError(f"{where}: line longer than {MAX_DOCUMENT_BYTES >> 20} MiB")
            if not line.strip():
                continue
            try:
                value = json.loads(_decode(line, where))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not a line of JSON ({error})") from error
            text = value.get("text") if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise DataError(f'{where}: wanted an object with a string in "text"')
            yield Document(_unicode(text, where), where)


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow: pip install 'pgolf_kernels[data]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if "text" not in table.schema_arrow.names:
                raise DataError(f'{path}: columns {table.schema_arrow.names}, wanted one named "text"')
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    where = f"{path}:row {row}"
                    if not isinstance(text, str):
                        raise DataError(f'{where}: wanted a string in "text"')
                    yield Document(text, where)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as .parquet ({str(error).splitlines()[0]})") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise DataError(f"{where}: not UTF-8: byte 0x{byte:02x} at offset {error.start} ({error.reason})") from error


def _unicode(text: str, where: str) -> str:
    """JSON escapes can spell a lone surrogate, which is no Unicode text and has no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: lone surrogate U+{ord(text[error.start]):04X} in the text, wanted Unicode"
        ) from error
    return text


def _open(path: Path) -> io.BufferedIOBase:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(path), buffer_size=1 << 20)
    return open(path, "rb")


class _ZstdFile(io.RawIOBase):
    """Decompresses the zstd frames of a file; unlike the library's reader it refuses a frame that is cut off."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (closed in close)
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._empty = True
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(1 << 14)
            if not data:
                if not self._frame.eof and not self._empty:
                    raise EOFError("the last frame is incomplete")
                return 0
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._empty = False
            self._pending = self._frame.decompress(data)
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
