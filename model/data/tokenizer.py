"""SentencePiece behind a small wrapper, and the byte tables that turn nats per token into bits per byte.

The bytes of a token (spec of the public systems, identical in pull requests 1413, 1499, 1514, 1530 and 1727):

    bytes(t) = len(UTF-8 of the piece without its leading "▁")      1 for a byte piece; 0 for control, unknown, unused
             + 1 if the piece starts with "▁" and the token before it is not control, unknown or unused

The "▁" behind BOS is SentencePiece's dummy prefix and stands for no byte. Tokenizers trained here keep that prefix, so
the rule is exact for every text, also for one that starts with spaces: " a" is encoded as "▁", "▁a" and only the first
is free. A tokenizer without the prefix that keeps leading spaces needs the other rule (`leading_space_is_text`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece

from model.data.shards import BOS_ID, MAX_VOCAB_SIZE
from model.errors import DataError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
# Whoever keeps this text keeps every text: spaces at both ends and doubled, controls, and what NFKC would change.
_EXACTNESS_PROBE = "  a  b\t\r\n\x0b\ufb01 \uff21e\u0301 "
# SentencePiece leaves out longer training sentences, so documents are cut into such pieces.
_MAX_SENTENCE_BYTES = 1 << 16
# A constant, since the model file records it: the same text gives the same bytes on every machine.
_TRAINING_THREADS = 4


@dataclass(frozen=True)
class ByteTables:
    """Per-token tables for counting bytes, each of length `vocab_size` (padding ids count as unused).

    base_bytes: int16, UTF-8 bytes without the leading space. has_leading_space, is_boundary: bool; a boundary is a
    control, unknown or unused token. leading_space_is_text: whether a leading space right behind a boundary is a byte
    of the text (False is the public rule).
    """

    base_bytes: np.ndarray
    has_leading_space: np.ndarray
    is_boundary: np.ndarray
    leading_space_is_text: bool = False

    def token_bytes(self, prev: np.ndarray, cur: np.ndarray) -> np.ndarray:
        """Bytes of the tokens `cur`, each behind the token `prev` (ids of any integer dtype, same shape) as int64."""
        spaces = self.has_leading_space[cur]
        if not self.leading_space_is_text:
            spaces = spaces & ~self.is_boundary[prev]
        return self.base_bytes[cur].astype(np.int64) + spaces

    def stream_bytes(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of every token of a stream as int64 [len(tokens)]; nothing stands before the first."""
        result = np.zeros(len(tokens), dtype=np.int64)
        if len(tokens):
            result[1:] = self.token_bytes(tokens[:-1], tokens[1:])
            result[0] = self.token_bytes(np.array([BOS_ID]), np.asarray(tokens[:1]))[0]
        return result


class Tokenizer:
    """A SentencePiece model with BOS = 1, and the guarantees that the rest of the package needs.

    `exact` says whether decoding gives back the very text that was encoded; otherwise the tokenizer normalises, and
    bytes are counted on the normalised text.
    """

    def __init__(self, model: bytes, name: str = "tokenizer") -> None:
        """`model` is a serialised SentencePiece model, `name` names it in errors (DataError: not a usable model)."""
        self.model = model
        self.name = name
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(f"{name}: not a SentencePiece model") from error
        self.vocab_size: int = self._sp.vocab_size()
        if self._sp.bos_id() != BOS_ID:
            raise DataError(f"{name}: BOS has id {self._sp.bos_id()}, wanted {BOS_ID} as in the public shards")
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise DataError(f"{name}: {self.vocab_size} pieces, wanted at most {MAX_VOCAB_SIZE} (ids are uint16)")
        if self._sp.piece_to_id(SPACE) == self._sp.unk_id():
            raise DataError(f"{name}: no piece for the lone space {SPACE!r}, without which bytes cannot be counted")
        self.exact = self._sp.decode(self._sp.encode(_EXACTNESS_PROBE)) == _EXACTNESS_PROBE

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a model file. Raises DataError when it is missing or not a usable model."""
        try:
            return cls(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}), wanted a SentencePiece model") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS. Raises DataError for text that is not Unicode (lone surrogates)."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without BOS, on so many threads."""
        stand_ins = [self._stand_in(text) for text in texts]
        texts = [text.replace(SPACE, char) if char else text for text, char in zip(texts, stand_ins, strict=True)]
        try:
            encoded = self._sp.encode(texts, num_threads=threads)
        except (TypeError, UnicodeEncodeError) as error:
            lone = next((char for text in texts for char in text if "\ud800" <= char <= "\udfff"), None)
            if lone is None:
                raise
            raise DataError(f"text with a lone surrogate (U+{ord(lone):04X}) has no UTF-8") from error
        return [
            _replace(ids, self._byte_ids(char), self._byte_ids(SPACE)) if char else ids
            for ids, char in zip(encoded, stand_ins, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; BOS and other control ids give nothing. Raises DataError for an id out of range."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, batch: Sequence[Iterable[int]], threads: int = 1) -> list[str]:
        """The text of each sequence of token ids, on so many threads."""
        lists = [ids.tolist() if isinstance(ids, np.ndarray) else list(ids) for ids in batch]
        try:
            return self._sp.decode(lists, num_threads=threads) if lists else []
        except IndexError as error:
            raise DataError(f"{self.name}: ids to decode are not all below {self.vocab_size}") from error

    def piece(self, token: int) -> str:
        """The piece with this id, as SentencePiece writes it ("▁the", "<0x0A>")."""
        return self._sp.id_to_piece(int(token))

    def byte_tables(self, vocab_size: int | None = None, *, public_rule: bool = False) -> ByteTables:
        """Byte tables for this tokenizer, padded to `vocab_size` entries (default: its own size).

        With `public_rule` a leading space behind BOS is never counted, as the public scripts do, whatever the
        tokenizer. Raises DataError when `vocab_size` is smaller than the tokenizer's.
        """
        size = self.vocab_size if vocab_size is None else vocab_size
        if size < self.vocab_size:
            raise DataError(f"{self.name}: {self.vocab_size} pieces, wanted at most vocab_size={size}")
        tables = _byte_tables(self._sp, size)
        return replace(tables, leading_space_is_text=False) if public_rule else tables

    def _stand_in(self, text: str) -> str | None:
        """For an exact tokenizer and a text that holds U+2581: a character for its place.

        SentencePiece would take U+2581 for a space. The stand-in has no piece and does not occur in the text, so it
        comes out as byte pieces, which are then exchanged for those of U+2581 (and decode to it).
        """
        if not self.exact or SPACE not in text:
            return None
        for code in range(0x10FFFF, 0x10F000, -1):
            char = chr(code)
            if char not in text and self._sp.piece_to_id(char) == self._sp.unk_id():
                return char
        raise DataError("text holds U+2581 and every private-use character that could stand in for it")

    def _byte_ids(self, char: str) -> list[int]:
        return [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in char.encode()]


def train_tokenizer(texts: Iterable[str], vocab_size: int, *, normalization: str = "identity") -> bytes:
    """Trains a BPE model with byte fallback on `texts` and returns it serialised.

    Ids: pad 0, bos 1, eos 2, unk 3, then the 256 bytes. `normalization` "identity" keeps every text as it is;
    "nmt_nfkc" is SentencePiece's own: NFKC, white space to single spaces, none at the ends (the public recipe).
    Raises DataError when the text is too small for that many pieces or the size cannot be used.
    """
    if normalization not in ("identity", "nmt_nfkc"):
        raise DataError(f"normalization: got {normalization!r}, wanted 'identity' or 'nmt_nfkc'")
    if not 261 <= vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(
            f"vocab_size: got {vocab_size}, wanted 261 (control, byte and space pieces) to {MAX_VOCAB_SIZE}"
        )
    writer = _Buffer()
    # Read before SentencePiece starts: it would turn an error of the reading, or Ctrl-C, into one of its own.
    sentences = list(_sentences(texts))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=writer,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            required_chars=SPACE,
            normalization_rule_name=normalization,
            add_dummy_prefix=True,
            remove_extra_whitespaces=normalization != "identity",
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=2 * _MAX_SENTENCE_BYTES,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"tokenizer: cannot train {vocab_size} pieces: {str(error).splitlines()[-1]}") from error
    return bytes(writer.data)


class _Buffer:
    """The file-like object that SentencePiece writes its model to."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


def _sentences(texts: Iterable[str]) -> Iterable[str]:
    step = _MAX_SENTENCE_BYTES // 4  # a character has at most four bytes
    for text in texts:
        for start in range(0, len(text), step):
            yield text[start : start + step]


def _replace(ids: list[int], old: list[int], new: list[int]) -> list[int]:
    """`ids` with each run `old` exchanged for `new`; runs do not overlap (UTF-8 synchronises itself)."""
    result: list[int] = []
    position = 0
    while position < len(ids):
        if ids[position : position + len(old)] == old:
            result += new
            position += len(old)
        else:
            result.append(ids[position])
            position += 1
    return result


def _byte_tables(sp: sentencepiece.SentencePieceProcessor, size: int) -> ByteTables:
    base = np.zeros(size, dtype=np.int16)
    leading = np.zeros(size, dtype=bool)
    boundary = np.ones(size, dtype=bool)
    for token in range(sp.vocab_size()):
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            continue
        boundary[token] = False
        if sp.is_byte(token):
            base[token] = 1
            continue
        piece = sp.id_to_piece(token)
        leading[token] = piece.startswith(SPACE)
        # A space inside a piece is one byte of text, although its stand-in has three.
        base[token] = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode())
    for table in (base, leading, boundary):
        table.flags.writeable = False
    no_prefix = not sp.normalize("a").startswith(SPACE)
    return ByteTables(base, leading, boundary, no_prefix and sp.normalize(" a").startswith(SPACE))
