"""Building data sets: what comes out, and what each bad input is told."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.data.build import build_dataset
from model.data.dataset import open_dataset
from model.data.shards import MAGIC, document_starts, read_shard, shard_length, write_shard
from model.data.text import SAMPLE, find_inputs, read_documents
from model.data.verify import verify_dataset
from model.errors import DataError, PgolfError
from model.files import sha256_file

TEXTS = [document.text for document in read_documents([SAMPLE])][:30]
ODD = [" two  spaces\n", "日本語\t😀", "a\x00b\u2581c", "\r\n\r\n", "\ufeffmark"]


def write_jsonl(path, texts):
    data = "".join(json.dumps({"text": text, "other": 1}, ensure_ascii=False) + "\n" for text in texts).encode()
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    elif path.name.endswith(".zst"):
        half = len(data) // 2  # two frames in a row are one stream
        data = b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:]))
    path.write_bytes(data)
    return path


def build(out, *inputs, **options):
    options.setdefault("vocab_size", None if "tokenizer" in options else 400)
    return build_dataset(inputs, out, quiet=True, threads=1, **options)


def texts_of(paths, tokenizer):
    tokens = np.concatenate([read_shard(path) for path in paths])
    return tokenizer.decode_batch(np.split(tokens, document_starts(tokens))[1:])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("text") / "corpus.jsonl", TEXTS + ODD)


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "set"
    build(out, corpus, valid_docs=4, shard_tokens=20_000)
    return out


def test_a_data_set_is_what_went_in(built, corpus):
    dataset = open_dataset(built)
    assert texts_of(dataset.train_shards, dataset.tokenizer) == (TEXTS + ODD)[4:]
    assert texts_of(dataset.valid_shards, dataset.tokenizer) == TEXTS[:4]
    assert len(dataset.train_shards) > 1
    assert all(shard_length(path) <= 20_000 for path in dataset.train_shards)
    assert all(read_shard(path)[0] == 1 for path in dataset.train_shards)
    assert dataset.vocab_size == 400 and dataset.tokenizer.exact
    valid = dataset.manifest["splits"]["valid"]
    assert valid["documents"] == 4 and valid["bytes"] == sum(len(text.encode()) for text in TEXTS[:4])
    assert dataset.byte_tables.stream_bytes(dataset.valid_tokens).sum() == valid["bytes"]
    assert dataset.valid_tokens.dtype == np.uint16 and dataset.valid_tokens.size == valid["tokens"]
    assert dataset.manifest["inputs"] == [
        {"file": "corpus.jsonl", "bytes": corpus.stat().st_size, "sha256": sha256_file(corpus)}
    ]
    assert verify_dataset(built, quiet=True) == []


def test_the_shards_are_in_the_public_format(built):
    raw = (built / "valid_000000.bin").read_bytes()
    header = np.frombuffer(raw, "<i4", 256)
    assert header[:2].tolist() == [MAGIC, 1] == [20240520, 1]
    assert len(raw) == 1024 + 2 * header[2] and not header[3:].any()


def test_the_same_input_gives_the_same_bytes(built, corpus, tmp_path):
    again = tmp_path / "again"
    build_dataset([corpus], again, vocab_size=400, valid_docs=4, shard_tokens=20_000, quiet=True, threads=3)
    assert sorted(os.listdir(again)) == sorted(os.listdir(built))
    assert all((again / name).read_bytes() == (built / name).read_bytes() for name in os.listdir(built))
    assert open_dataset(again).fingerprint == open_dataset(built).fingerprint


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt"])
def test_every_kind_of_file(tmp_path, suffix):
    texts = TEXTS[:6] + ODD
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    (tmp_path / "in" / "notes.md").write_text("not a text file of ours")
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), folder / "a.parquet")
    elif suffix == ".txt":
        for number, text in enumerate(texts):
            (folder / f"{number:03d}.txt").write_bytes(text.encode())
    else:
        write_jsonl(folder / f"a{suffix}", texts)
    assert [document.text for document in read_documents(find_inputs([tmp_path / "in"]))] == texts


def test_normalised_text_is_counted_as_such(corpus, tmp_path):
    manifest = build(tmp_path / "set", corpus, valid_docs=4, normalization="nmt_nfkc")
    dataset = open_dataset(tmp_path / "set")
    assert manifest["tokenizer"]["normalization"] == "nmt_nfkc"
    assert manifest["bytes_counted_on"] == "the normalised text"
    assert texts_of(dataset.train_shards, dataset.tokenizer)[-5:] == ["two spaces", "日本語 😀", "a\x00b c", "", "mark"]
    assert verify_dataset(tmp_path / "set", quiet=True) == []


def test_an_existing_tokenizer(built, corpus, tmp_path):
    manifest = build(tmp_path / "set", corpus, tokenizer=built / "tokenizer.model", valid_docs=4, shard_tokens=20_000)
    assert (tmp_path / "set" / "train_000000.bin").read_bytes() == (built / "train_000000.bin").read_bytes()
    assert manifest["tokenizer"]["source"] == "given: tokenizer.model"


def test_validation_from_files(tmp_path):
    train, valid = write_jsonl(tmp_path / "t.jsonl", TEXTS[:8]), write_jsonl(tmp_path / "v.jsonl.zst", TEXTS[8:10])
    build(tmp_path / "set", train, valid_inputs=[valid])
    dataset = open_dataset(tmp_path / "set")
    assert texts_of(dataset.train_shards, dataset.tokenizer) == TEXTS[:8]
    assert texts_of(dataset.valid_shards, dataset.tokenizer) == TEXTS[8:10]


def test_validation_is_one_document_in_twenty_by_default(corpus, tmp_path):
    manifest = build(tmp_path / "set", corpus)
    assert manifest["splits"]["valid"]["documents"] == 2 and manifest["validation"] == "the first 2 documents"


def test_shuffling_moves_training_documents_alone(corpus, tmp_path):
    for name in ("a", "b"):
        build(tmp_path / name, corpus, valid_docs=4, shard_tokens=20_000, shuffle_seed=3)
    a, b = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    shuffled = texts_of(a.train_shards, a.tokenizer)
    assert sorted(shuffled) == sorted((TEXTS + ODD)[4:]) and shuffled != (TEXTS + ODD)[4:]
    assert texts_of(a.valid_shards, a.tokenizer) == TEXTS[:4]
    assert a.fingerprint == b.fingerprint
    assert verify_dataset(tmp_path / "a", quiet=True) == []
    assert not (tmp_path / "a" / "spool.bin").exists()


def test_documents_in_both_splits(tmp_path):
    train = write_jsonl(tmp_path / "t.jsonl", [*TEXTS[:6], TEXTS[7]])
    valid = write_jsonl(tmp_path / "v.jsonl", TEXTS[7:9])
    with pytest.raises(DataError, match=r"1 documents are in both .* \(.*t\.jsonl:7 is one\)"):
        build(tmp_path / "set", train, valid_inputs=[valid])
    assert not (tmp_path / "set").exists()
    manifest = build(tmp_path / "set", train, valid_inputs=[valid], allow_overlap=True)
    assert manifest["documents_in_both_splits"] == 1
    assert verify_dataset(tmp_path / "set", quiet=True) == []


@pytest.mark.parametrize("shuffle_seed", [None, 3])
def test_documents_in_both_splits_once_normalised(tmp_path, shuffle_seed):
    train = write_jsonl(tmp_path / "t.jsonl", [*TEXTS[:6], "one  \ufb01sh", "one\nfish ", "two", "\t"])
    valid = write_jsonl(tmp_path / "v.jsonl", [*TEXTS[7:9], "one fish", " one fish", "two", "\n"])
    options = {"valid_inputs": [valid], "normalization": "nmt_nfkc", "shuffle_seed": shuffle_seed}
    with pytest.raises(DataError, match=r"1 documents are in both training and validation, .* \(.*t\.jsonl:9 is one\)"):
        build(tmp_path / "set", train, **options)
    manifest = build(tmp_path / "set", train, **options, allow_overlap=True)
    assert manifest["documents_in_both_splits"] == 3
    assert list(manifest["splits"]) == ["train", "valid"]
    assert verify_dataset(tmp_path / "set", quiet=True) == []

    write_jsonl(valid, [*TEXTS[7:9], "one fish"])
    with pytest.raises(DataError, match=r"1 documents are in both .* once normalised, .* \(.*t\.jsonl:7 is one\)"):
        build(tmp_path / "other", train, **options)
    assert sorted(os.listdir(tmp_path)) == ["set", "t.jsonl", "v.jsonl"]
    options["normalization"] = "identity"
    assert build(tmp_path / "other", train, **options)["documents_in_both_splits"] == 0


def test_empty_documents_are_left_out_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", ["", TEXTS[0], "", *TEXTS[1:5], ""])
    manifest = build(tmp_path / "set", path, valid_docs=1)
    assert manifest["empty_documents_left_out"] == 3
    assert manifest["splits"]["valid"]["documents"] == 1 and manifest["splits"]["train"]["documents"] == 4


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=30), min_size=2, max_size=8, unique=True))
def test_any_text_is_kept(built, tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("any")
    build(folder / "set", write_jsonl(folder / "t.jsonl", texts), tokenizer=built / "tokenizer.model", valid_docs=1)
    dataset = open_dataset(folder / "set")
    assert texts_of(dataset.train_shards, dataset.tokenizer) == texts[1:]
    assert verify_dataset(folder / "set", quiet=True) == []


BAD_FILES = {
    "latin1.txt": (b"caf\xe9", r"latin1\.txt: not UTF-8: byte 0xe9 at offset 3"),
    "latin1.jsonl": (b'{"text": "a"}\n{"text": "\xff"}\n', r"latin1\.jsonl:2: not UTF-8: byte 0xff"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: not a line of JSON"),
    "list.jsonl": (b"[1]\n", r'list\.jsonl:1: wanted an object with a string in "text"'),
    "number.jsonl": (b'{"text": 7}\n', r"number\.jsonl:1: wanted an object"),
    "digits.jsonl": (b'{"text": ' + b"1" * 9999 + b"}", r"digits\.jsonl:1: not a line of JSON"),
    "nested.jsonl": (b"[" * 100_000, r"nested\.jsonl:1: not a line of JSON"),
    "lone.jsonl": (b'{"text": "x\\ud800"}\n', r"lone\.jsonl:1: lone surrogate U\+D800"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], r"cut\.jsonl\.gz: .* damaged or cut off"),
    "not.jsonl.gz": (b"plain", r"not\.jsonl\.gz: .* damaged or cut off"),
    "cut.jsonl.zst": (zstandard.compress(b'{"text": "abc"}\n' * 9999)[:-9], r"cut\.jsonl\.zst: .* damaged or cut off"),
    "not.jsonl.zst": (b"plain", r"not\.jsonl\.zst: .* damaged or cut off"),
    "not.parquet": (b"plain", r"not\.parquet: cannot be read as \.parquet"),
    "other.pdf": (b"%PDF", r"other\.pdf: not a kind of text file"),
    "none.jsonl": (b"", r"0 of 0 documents, wanted at least one in each split"),
    "one.jsonl": (b'{"text": "a"}\n', r"1 of 1 documents, wanted at least one in each split"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        build(tmp_path / "set", tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_table_without_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: columns \['body'\], wanted one named \"text\""):
        build(tmp_path / "set", tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"vocab_size": None}, "either a vocabulary size or an existing tokenizer"),
        ({"vocab_size": 60_000}, "cannot train 60000 pieces"),
        ({"valid_docs": 35}, "35 of 35 documents, wanted at least one in each split"),
        ({"valid_docs": 2, "valid_inputs": [SAMPLE]}, "either a number of validation documents or"),
        ({"shard_tokens": 1}, "shard_tokens: got 1"),
        ({"tokenizer": SAMPLE}, "not a SentencePiece model"),
        ({"tokenizer": "missing.model"}, "missing.model: cannot be read"),
    ],
)
def test_options_that_cannot_be(corpus, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        build(tmp_path / "set", corpus, **options)
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(corpus, built, tmp_path):
    before = sha256_file(built / "manifest.json")
    with pytest.raises(PgolfError, match="not empty"):
        build(built, corpus)
    assert sha256_file(built / "manifest.json") == before
    with pytest.raises(DataError, match="no such file or folder"):
        build(tmp_path / "set", tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="no text file in this folder"):
        build(tmp_path / "set", tmp_path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_replace_exchanges_a_data_set_and_nothing_else(built, corpus, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / "notes.md").write_text("not a data set")
    before = contents(tmp_path)
    with pytest.raises(PgolfError, match=r"set: the folder has no manifest\.json, wanted one to replace"):
        build(out, corpus, replace=True)
    assert contents(tmp_path) == before
    (out / "manifest.json").write_text("{}")
    build(out, corpus, replace=True, valid_docs=4, shard_tokens=20_000)
    assert sorted(os.listdir(out)) == sorted(os.listdir(built)) and os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("as_input", ["inputs", "valid_inputs"])
@pytest.mark.parametrize("name", ["set/deep/t.jsonl", "set", ".", "link"])
def test_an_input_is_never_replaced(corpus, tmp_path, monkeypatch, name, as_input):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set" / "deep").mkdir(parents=True)
    (tmp_path / "set" / "manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to("set")
    write_jsonl(tmp_path / "set" / "deep" / "t.jsonl", TEXTS[:6])
    before = contents(tmp_path)
    inputs = {"inputs": [corpus], "valid_inputs": [corpus]} | {as_input: [name]}
    for out in ("set", "link"):
        with pytest.raises(PgolfError, match=r"t\.jsonl: is in .*set, which is replaced; wanted an input outside"):
            build_dataset(**inputs, out=out, vocab_size=400, replace=True, quiet=True)
    assert contents(tmp_path) == before


def test_the_current_folder_is_not_replaced(built, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PgolfError, match=f"{tmp_path}: is or holds the current folder"):
        build(".", corpus, replace=True)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PgolfError, match=r"cannot be written \(No space left on device\)"):
        build(tmp_path / "set", corpus)
    assert os.listdir(tmp_path) == []


def test_ctrl_c_leaves_nothing(tmp_path):
    write_jsonl(tmp_path / "big.jsonl", [f"{i} {text}" for i in range(60) for text in TEXTS])
    code = (
        "import sys; from model.data.build import build_dataset;"
        "build_dataset([sys.argv[1]], sys.argv[2], vocab_size=2000, threads=1, quiet=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "big.jsonl", tmp_path / "set"], stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(os.listdir(tmp_path)) == 1:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors and process.returncode != 0
    assert os.listdir(tmp_path) == ["big.jsonl"]


class TestShards:
    def damaged(self, path, change):
        write_shard(path, np.arange(1, 50))
        raw = bytearray(path.read_bytes())
        path.write_bytes(change(raw))
        return path

    @pytest.mark.parametrize(
        "change, message",
        [
            (lambda raw: raw[:-1], "1121 bytes, wanted 1122 for the 49 tokens"),
            (lambda raw: raw + b"x", "1123 bytes, wanted 1122"),
            (lambda raw: raw[:100], "100 bytes, wanted a shard header"),
            (lambda raw: b"", "0 bytes, wanted a shard header"),
            (lambda raw: b"\0" + raw[1:], "not a token shard: magic"),
            (lambda raw: raw[:4] + b"\2" + raw[5:], "shard version 2, wanted 1"),
            (lambda raw: raw[:8] + b"\xff\xff\xff\xff" + raw[12:], "-1 tokens"),
            (lambda raw: raw[:8] + b"\xff\xff\xff\x7f" + raw[12:], "2147483647 tokens"),
        ],
    )
    def test_damage_is_named(self, tmp_path, change, message):
        with pytest.raises(DataError, match=message):
            read_shard(self.damaged(tmp_path / "a.bin", change))

    def test_round_trip(self, tmp_path):
        for tokens in (np.array([], dtype=np.int64), np.array([0, 1, 65535]), np.arange(1000, dtype=np.uint16)):
            write_shard(tmp_path / "a.bin", tokens)
            np.testing.assert_array_equal(read_shard(tmp_path / "a.bin"), tokens)

    @pytest.mark.parametrize("tokens", [np.array([-1]), np.array([65536]), np.array([0.5]), np.zeros((2, 2), int)])
    def test_tokens_that_do_not_fit(self, tmp_path, tokens):
        with pytest.raises(ValueError, match="tokens"):
            write_shard(tmp_path / "a.bin", tokens)
        assert os.listdir(tmp_path) == []

    def test_a_missing_shard(self, tmp_path):
        with pytest.raises(DataError, match=r"a\.bin: cannot be read \(No such file"):
            read_shard(tmp_path / "a.bin")


def test_the_bundled_text_and_its_provenance():
    documents = [json.loads(line) for line in zstandard.decompress(SAMPLE.read_bytes()).decode().split("\n") if line]
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (SAMPLE.parent / "PROVENANCE.md").read_text().splitlines()
        if line.startswith("|")
    ][2:]
    found = {}
    for document in documents:
        count = found.setdefault((document["source"].split("/")[0], document["licence"]), [0, 0])
        count[0] += 1
        count[1] += len(document["text"].encode())
    assert {(row[0], row[1]): [int(row[2]), int(row[3])] for row in table} == found
    assert all(licence.startswith("public domain") for _, licence in found)
    assert len(documents) == 400 and len({document["text"] for document in documents}) == 400
