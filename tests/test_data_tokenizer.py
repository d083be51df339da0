"""Tokenizer and byte tables: byte-exact for every text, and the public systems' counts."""

import io

import numpy as np
import pytest
import sentencepiece
from golden import FOLDER, load_npz
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model.data.text import SAMPLE, read_documents
from model.data.tokenizer import SPACE, ByteTables, Tokenizer, train_tokenizer
from model.errors import DataError

AWKWARD = [
    "",
    " ",
    "  ",
    "\n",
    " a",
    "a ",
    "\ta\r\n",
    "a\x00b",
    "\x00",
    SPACE,
    f"a{SPACE}b {SPACE}{SPACE} c",
    "\ufeffa",
    "日本語 テキスト",
    "e\u0301 \u00e9 \ufb01 \uff21",
    "👩\u200d👩\u200d👧 😀",
    "<s></s><unk><pad><0x41>",
    "\U0010ffff\U0010fffe",
    "\u2028\x85\u2585",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in read_documents([SAMPLE])]


@pytest.fixture(scope="module")
def tokenizers(texts):
    """With the dummy prefix (what build makes), and one without it that keeps leading spaces (somebody else's)."""
    other = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[:60]),
        model_writer=other,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
        max_sentence_length=100_000,
        allow_whitespace_only_pieces=True,
    )
    return {"prefix": Tokenizer(train_tokenizer(texts[:60], 600)), "no prefix": Tokenizer(other.getvalue())}


unicode_text = st.text(st.characters(codec="utf-8"), max_size=60) | st.text(f" \n{SPACE}ab\x00", max_size=20)


def check_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode([1, *ids]) == text
    tokens = np.array([1, *ids], dtype=np.uint16)
    assert tokenizer.byte_tables().stream_bytes(tokens).sum() == len(text.encode())


@pytest.mark.parametrize("which", ["prefix", "no prefix"])
@settings(deadline=None, max_examples=300)
@given(text=unicode_text)
def test_every_text_comes_back_and_its_bytes_are_counted(tokenizers, which, text):
    check_exact(tokenizers[which], text)


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("which", ["prefix", "no prefix"])
def test_awkward_texts(tokenizers, which, text):
    check_exact(tokenizers[which], text)


def test_batches_equal_single_texts_on_any_number_of_threads(tokenizers):
    tokenizer = tokenizers["prefix"]
    assert tokenizer.encode_batch(AWKWARD, threads=3) == [tokenizer.encode(text) for text in AWKWARD]
    assert tokenizer.decode_batch(tokenizer.encode_batch(AWKWARD), threads=3) == AWKWARD
    assert tokenizer.encode_batch([]) == tokenizer.decode_batch([]) == []


@settings(deadline=None)
@given(st.lists(unicode_text, min_size=2, max_size=4))
@example([" a", "  ", "b"])
def test_documents_count_alike_alone_and_in_a_stream(tokenizers, documents):
    for tokenizer in tokenizers.values():
        stream = np.array([t for text in documents for t in [1, *tokenizer.encode(text)]], dtype=np.uint16)
        assert tokenizer.byte_tables().stream_bytes(stream).sum() == sum(len(text.encode()) for text in documents)


def test_only_a_tokenizer_without_prefix_needs_the_other_rule(tokenizers):
    assert not tokenizers["prefix"].byte_tables().leading_space_is_text
    assert tokenizers["no prefix"].byte_tables().leading_space_is_text
    public = tokenizers["no prefix"].byte_tables(public_rule=True)
    tokens = np.array([1, *tokenizers["no prefix"].encode(" a")])
    assert public.stream_bytes(tokens).sum() == 1
    assert tokenizers["no prefix"].byte_tables().stream_bytes(tokens).sum() == 2


def test_a_text_with_every_stand_in_is_refused(tokenizers):
    text = SPACE + "".join(map(chr, range(0x10F001, 0x110000)))
    with pytest.raises(DataError, match=r"U\+2581"):
        tokenizers["prefix"].encode(text)


def test_nmt_nfkc_normalises(texts):
    tokenizer = Tokenizer(train_tokenizer(texts[:60], 500, normalization="nmt_nfkc"))
    assert not tokenizer.exact
    ids = tokenizer.encode("  \ufb01ne \n\n day \uff21 ")
    assert tokenizer.decode(ids) == "fine day A"
    assert tokenizer.byte_tables().stream_bytes(np.array([1, *ids])).sum() == len("fine day A")


def test_ids_and_pieces(tokenizers):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizers["prefix"].model)
    assert [processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()] == [0, 1, 2, 3]
    assert all(processor.id_to_piece(4 + byte) == f"<0x{byte:02X}>" for byte in range(256))
    assert processor.piece_to_id(SPACE) != 3
    assert tokenizers["prefix"].vocab_size == 600


def test_the_space_has_a_piece_even_without_spaces_in_the_text():
    tokenizer = Tokenizer(train_tokenizer(["aaaa", "b"], 263))
    check_exact(tokenizer, "a b  c")


def test_training_is_repeatable(texts):
    assert train_tokenizer(texts[:40], 400) == train_tokenizer(texts[:40], 400)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["abc"], 5000), "cannot train 5000 pieces"),
        (([], 300), "cannot train 300 pieces"),
        ((["abc"], 100), "vocab_size: got 100"),
        ((["abc"], 65537), "vocab_size: got 65537"),
    ],
)
def test_training_that_cannot_be(arguments, message):
    with pytest.raises(DataError, match=message):
        train_tokenizer(*arguments)
    with pytest.raises(DataError, match="normalization: got 'nfd'"):
        train_tokenizer(["abc"], 300, normalization="nfd")


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="not a SentencePiece model"):
        Tokenizer(b"no model at all")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer.load(tmp_path / "missing.model")

    def train(**kwargs):
        writer = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["abcabd", "xyz"] * 9),
            model_writer=writer,
            model_type="char",
            minloglevel=2,
            hard_vocab_limit=False,
            **kwargs,
        )
        return writer.getvalue()

    with pytest.raises(DataError, match="BOS has id 2, wanted 1"):
        Tokenizer(train(vocab_size=11, bos_id=2, eos_id=1))
    with pytest.raises(DataError, match="no piece for the lone space"):
        Tokenizer(train(vocab_size=11, add_dummy_prefix=False))


def test_text_that_is_not_unicode_and_ids_out_of_range(tokenizers):
    with pytest.raises(DataError, match=r"lone surrogate \(U\+D800\)"):
        tokenizers["prefix"].encode("a\ud800b")
    with pytest.raises(DataError, match="not all below 600"):
        tokenizers["prefix"].decode([1, 600])


@pytest.fixture(scope="module")
def golden():
    return load_npz("bpb.npz")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(FOLDER / "bpb_sentencepiece.model")


class TestGolden:
    """The tables of the public systems' common function."""

    @pytest.mark.parametrize("prefix, size", [("", None), ("padded_", 542)])
    def test_tables(self, golden, tokenizer, prefix, size):
        tables = tokenizer.byte_tables(size)
        for name in ("base_bytes", "has_leading_space", "is_boundary"):
            table = getattr(tables, name)
            assert table.dtype == golden[prefix + name].dtype
            np.testing.assert_array_equal(table, golden[prefix + name])

    def test_documents(self, golden, tokenizer):
        texts = golden["text_utf8"].tobytes().decode().split("\0")
        tokens = golden["tokens"]
        documents = np.split(tokens, np.flatnonzero(tokens == 1))[1:]
        assert len(documents) == len(texts) == golden["doc_bytes"].size
        counts = [int(tokenizer.byte_tables().stream_bytes(d).sum()) for d in documents]
        assert counts == golden["doc_bytes"].tolist() == golden["doc_text_bytes"].tolist()
        assert tokenizer.byte_tables().stream_bytes(tokens).sum() == golden["total_bytes"]
        assert tokenizer.decode_batch(documents) == texts
        assert tokenizer.encode_batch(texts) == [d[1:].tolist() for d in documents]

    def test_tables_smaller_than_the_tokenizer(self, tokenizer):
        with pytest.raises(DataError, match="512 pieces, wanted at most vocab_size=511"):
            tokenizer.byte_tables(511)


def test_the_rule_itself():
    tables = ByteTables(
        np.array([0, 0, 3, 2], np.int16), np.array([False, False, True, False]), np.array([True, True, False, False])
    )
    prev, cur = np.array([1, 2, 3, 2, 0]), np.array([2, 2, 2, 3, 3])
    assert tables.token_bytes(prev, cur).tolist() == [3, 4, 4, 2, 2]
    assert tables.token_bytes(prev, cur).dtype == np.int64
    assert tables.stream_bytes(np.array([1, 2, 2, 3])).tolist() == [0, 3, 4, 2]
    assert tables.stream_bytes(np.array([], dtype=np.uint16)).tolist() == []
