"""Opening and verifying data sets: every kind of damage is found and named."""

import json
import shutil

import numpy as np
import pytest
from golden import FOLDER, load_npz

from model.config import Config
from model.data.build import build_dataset
from model.data.dataset import dataset_of, open_dataset
from model.data.shards import document_starts, read_shard, write_shard
from model.data.text import SAMPLE, read_documents
from model.data.tokenizer import Tokenizer
from model.data.verify import verify_dataset
from model.errors import DataError
from model.files import sha256_file

TEXTS = [document.text for document in read_documents([SAMPLE])][:24]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    build_dataset([folder / "t.jsonl"], folder / "set", vocab_size=400, valid_docs=4, shard_tokens=30_000, quiet=True)
    return folder / "set"


@pytest.fixture
def data(original, tmp_path):
    return shutil.copytree(original, tmp_path / "set")


@pytest.fixture
def public(tmp_path):
    """The golden tokenizer and text in the public layout, documents cut at the shards' ends."""
    folder = tmp_path / "public"
    shards = folder / "datasets" / "fineweb10B_sp512"
    shards.mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    shutil.copy(FOLDER / "bpb_sentencepiece.model", folder / "tokenizers" / "fineweb_512_bpe.model")
    tokens = load_npz("bpb.npz")["tokens"]
    starts = document_starts(tokens)
    valid_end, cut = starts[8], starts[8] + 2000
    assert cut not in starts
    write_shard(shards / "fineweb_val_000000.bin", tokens[:valid_end])
    write_shard(shards / "fineweb_train_000000.bin", tokens[valid_end:cut])
    write_shard(shards / "fineweb_train_000001.bin", tokens[cut:])
    return folder


def findings(data, **kwargs):
    return [str(finding) for finding in verify_dataset(data, quiet=True, threads=1, **kwargs)]


def edit_manifest(data, change):
    manifest = json.loads((data / "manifest.json").read_text())
    change(manifest)
    (data / "manifest.json").write_text(json.dumps(manifest))


def rewrite(data, name, change, *, rehash=True):
    """Changes a shard's tokens, and the manifest's hash with it, so that only deeper checks can notice."""
    tokens = np.array(read_shard(data / name))
    write_shard(data / name, change(tokens))
    if rehash:

        def update(manifest):
            shards = [s for split in manifest["splits"].values() for s in split["shards"]]
            next(s for s in shards if s["file"] == name)["sha256"] = sha256_file(data / name)

        edit_manifest(data, update)


def with_token(position, value):
    def change(tokens):
        tokens[position] = value
        return tokens

    return change


def test_nothing_is_wrong(data, public):
    assert findings(data) == []
    assert findings(public) == []


def test_every_damaged_shard_is_listed(data):
    for name in ("train_000000.bin", "valid_000000.bin"):
        (data / name).write_bytes((data / name).read_bytes()[:-2])
    found = findings(data)
    assert len(found) == 2
    assert all(name in text and "wanted" in text for name, text in zip(("train_", "valid_"), found, strict=True))
    with pytest.raises(DataError, match=r"train_000000\.bin: \d+ bytes, wanted"):
        open_dataset(data)


def test_a_changed_token_breaks_the_hash(data):
    rewrite(data, "train_000000.bin", with_token(500, 270), rehash=False)
    assert any("the manifest's hash" in text for text in findings(data))


def test_a_changed_token_with_the_hash_mended_breaks_the_text(data):
    rewrite(data, "train_000000.bin", with_token(500, 270))
    found = findings(data)
    assert any("decoding does not give back the text" in text for text in found)
    assert not any("hash" in text for text in found)


def test_a_missing_document_start(data):
    tokens = read_shard(data / "train_000000.bin")
    second = int(document_starts(tokens)[1])
    rewrite(data, "train_000000.bin", with_token(second, 270))
    found = findings(data)
    assert any("BOS, wanted" in text for text in found)
    assert any("documents, wanted" in text for text in found)


def test_a_shard_that_does_not_start_a_document(data):
    rewrite(data, "train_000001.bin", lambda tokens: np.concatenate((tokens[1:], tokens[:1])))
    assert any("tokens before the first BOS, wanted none" in text for text in findings(data))
    rewrite(data, "train_000000.bin", with_token(0, 270))
    with pytest.raises(DataError, match=r"starts with id 270, wanted BOS"):
        open_dataset(data)


@pytest.mark.parametrize("name", ["train_000000.bin", "valid_000000.bin"])
def test_ids_beyond_the_vocabulary(data, name):
    rewrite(data, name, with_token(-1, 400))
    message = r"id 400 at token \d+, wanted ids below the vocabulary size 400"
    with pytest.raises(DataError, match=message):
        _ = open_dataset(data).valid_tokens
    assert any("vocabulary size 400" in text for text in findings(data))


def test_ids_beyond_the_vocabulary_behind_the_head(data):
    """The last training shard is not looked at when the data set is opened."""
    last = sorted(data.glob("train_*.bin"))[-1].name
    rewrite(data, last, with_token(-1, 65535))
    open_dataset(data)
    assert [text for text in findings(data) if "id 65535" in text]


def test_another_tokenizer(data):
    shutil.copy(FOLDER / "bpb_sentencepiece.model", data / "tokenizer.model")
    message = "not the tokenizer of these shards"
    with pytest.raises(DataError, match=message):
        open_dataset(data)
    assert message in findings(data)[0]


def test_documents_in_both_splits(data):
    tokens = read_shard(data / "valid_000000.bin")
    starts = document_starts(tokens)
    first = tokens[: starts[1]]

    def put_in(train):
        return np.concatenate((first, train))

    rewrite(data, "train_000000.bin", put_in)

    def update(manifest):
        split = manifest["splits"]["train"]
        split["shards"][0]["tokens"] += int(first.size)

    edit_manifest(data, update)
    assert any("1 documents are in both splits, wanted 0" in text for text in findings(data))


def test_tables_that_miscount(public, tmp_path):
    """A tokenizer that keeps leading spaces without a dummy prefix, counted by the public layout's rule."""
    import io

    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=writer, model_type="bpe", vocab_size=512, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False, pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, minloglevel=2, max_sentence_length=100_000,
    )  # fmt: skip
    (public / "tokenizers" / "fineweb_512_bpe.model").write_bytes(writer.getvalue())
    tokenizer = Tokenizer(writer.getvalue())
    shards = public / "datasets" / "fineweb10B_sp512"
    for path, texts in zip(sorted(shards.glob("*.bin")), ([" a", "b"], ["c"], ["d"]), strict=True):
        write_shard(path, np.array([t for text in texts for t in [1, *tokenizer.encode(text)]]))
    assert findings(public) == [
        "fineweb10B_sp512, train: the byte tables miscount 1 documents (document 0: 1 for 2 bytes)"
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format="other"), "not the manifest of a data set"),
        (lambda m: m.update(version=2), "version 2, wanted 1"),
        (lambda m: m.pop("splits"), r"manifest\.splits is missing"),
        (lambda m: m["splits"]["train"].update(shards={}), r"manifest\.splits\.train\.shards is \{\}, wanted list"),
        (lambda m: m["splits"]["train"].update(shards=[]), "no shards in the train split"),
        (lambda m: m["splits"]["train"]["shards"][0].update(tokens="9"), r"shards\[0\]\.tokens is '9', wanted int"),
        (lambda m: m["splits"]["train"]["shards"][0].update(tokens=9), "tokens, wanted 9 as in the manifest"),
        (lambda m: m["splits"]["train"]["shards"][0].update(file="../x.bin"), "wanted a plain name"),
        (lambda m: m["tokenizer"].update(file="/etc/passwd"), "wanted a plain name"),
    ],
)
def test_manifests_that_cannot_be_used(data, change, message):
    edit_manifest(data, change)
    with pytest.raises(DataError, match=message):
        open_dataset(data)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("bytes", 7, "bytes, wanted 7"),
        ("documents", 7, "documents, wanted 7"),
        ("text_sha256", "0", "does not give back"),
    ],
)
def test_records_that_are_not_so(data, key, value, message):
    edit_manifest(data, lambda manifest: manifest["splits"]["train"].update({key: value}))
    assert any(message in text for text in findings(data))


def test_a_manifest_that_is_not_json(data):
    (data / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: not JSON"):
        open_dataset(data)


def test_an_empty_split(data, public):
    shards = public / "datasets" / "fineweb10B_sp512"
    write_shard(shards / "fineweb_val_000000.bin", np.array([], dtype=np.uint16))
    with pytest.raises(DataError, match="the validation split is empty"):
        open_dataset(public)


def test_the_public_layout(public):
    dataset = open_dataset(public, "sp512")
    assert dataset.name == "fineweb10B_sp512" and dataset.vocab_size == 512 and len(dataset.train_shards) == 2
    assert open_dataset(public).variant == "sp512"  # the only one
    assert not dataset.byte_tables.leading_space_is_text
    golden = load_npz("bpb.npz")
    counted = dataset.byte_tables.stream_bytes(dataset.valid_tokens).sum()
    assert counted == golden["doc_bytes"][:8].sum()
    before = dataset.fingerprint
    write_shard(public / "datasets" / "fineweb10B_sp512" / "fineweb_train_000002.bin", np.array([1, 5]))
    assert open_dataset(public).fingerprint != before


@pytest.fixture
def both(public):
    """Two variants in one folder: sp512, and sp1024 with one training shard less."""
    datasets, tokenizers = public / "datasets", public / "tokenizers"
    shutil.copytree(datasets / "fineweb10B_sp512", datasets / "fineweb10B_sp1024")
    (datasets / "fineweb10B_sp1024" / "fineweb_train_000001.bin").unlink()
    shutil.copy(tokenizers / "fineweb_512_bpe.model", tokenizers / "fineweb_1024_bpe.model")
    return public


def test_several_variants_in_one_folder(both):
    """The one that is asked for, else the one that the vocabulary names; none is taken by chance."""
    config = Config().replace(data_dir=str(both))
    for vocab_size, variant, chosen in [(512, "", "sp512"), (1024, "", "sp1024"), (512, "sp1024", "sp1024")]:
        dataset = dataset_of(config.replace(vocab_size=vocab_size, variant=variant))
        assert dataset.variant == chosen and dataset.name == f"fineweb10B_{chosen}"
        assert {path.parent.name for path in dataset.train_shards} == {dataset.name}
    assert dataset_of(config, variant="sp512").variant == "sp512"
    with pytest.raises(DataError, match=r"holds sp1024 and sp512, and vocab_size=8192 names none .* wanted --variant"):
        dataset_of(config)
    with pytest.raises(DataError, match="holds sp1024 and sp512; wanted --variant"):
        open_dataset(both)
    assert findings(both, variant="sp1024") == []
    assert "wanted --variant" in findings(both)[0]


def test_public_layouts_that_are_not_whole(public, tmp_path):
    with pytest.raises(DataError, match=r"wanted datasets/fineweb10B_sp1024, there are sp512"):
        open_dataset(public, "sp1024")
    (public / "datasets" / "fineweb10B_sp512" / "fineweb_val_000000.bin").unlink()
    with pytest.raises(DataError, match=r"no fineweb_val_\*\.bin"):
        open_dataset(public)
    with pytest.raises(DataError, match=r"neither that nor a manifest\.json"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(tmp_path / "missing")
    assert "no such folder" in findings(tmp_path / "missing")[0]
