"""Downloading, against a server on the loopback that answers as the hub does."""

import hashlib
import http.server
import json
import shutil
import threading

import huggingface_hub
import numpy as np
import pytest
from golden import FOLDER, load_npz

from model.data.download import download_dataset
from model.data.shards import document_starts, write_shard
from model.errors import DataError

REPO = "someone/parameter-golf"
NAME = "fineweb10B_sp512"


class Hub(http.server.ThreadingHTTPServer):
    """Serves /datasets/REPO/resolve/main/PATH for the files of a folder, with ranges; `requests` lists the GETs."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.requests, self.break_after = folder, [], {}
        self.fail, self.fail_after_break = set(), set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        prefix = f"/datasets/{REPO}/resolve/main/"
        path = self.server.folder / self.path.removeprefix(prefix)
        if path.name in self.server.fail:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if not self.path.startswith(prefix) or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith(prefix) else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        start = 0
        ranged = self.headers.get("Range", "")
        if ranged.startswith("bytes=") and not ranged.startswith("bytes=0-0"):
            start = int(ranged.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self.server.requests.append((path.name, start))
            limit = self.server.break_after.pop(path.name, None)
            self.wfile.write(data[start : start + limit] if limit else data[start:])
            if limit:
                self.close_connection = True
                self.server.fail |= self.server.fail_after_break & {path.name}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for name in ("MATCHED_FINEWEB_REPO_ID", "MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "hub" / "datasets"
    shards = root / "datasets" / NAME
    shards.mkdir(parents=True)
    (root / "tokenizers").mkdir()
    shutil.copy(FOLDER / "bpb_sentencepiece.model", root / "tokenizers" / "fineweb_512_bpe.model")
    tokens = load_npz("bpb.npz")["tokens"]
    starts = document_starts(tokens)
    bounds = [0, *starts[[10, 25, 40]], tokens.size]
    for number, name in enumerate(["val_000000", "train_000000", "train_000001", "train_000002"]):
        write_shard(shards / f"fineweb_{name}.bin", tokens[bounds[number] : bounds[number + 1]])
    manifest = {
        "datasets": [{"name": "fineweb10B_sp1024"}, {"name": NAME, "stats": {"files_train": 3, "files_val": 1}}]
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    server = Hub(tmp_path / "hub")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def download(hub, out, **options):
    options = {"repo": REPO, "variant": "sp512", "endpoint": hub.url, "quiet": True} | options
    return download_dataset(out, **options)


def same_files(hub, out, paths):
    return all((out / path).read_bytes() == (hub.folder / "datasets" / path).read_bytes() for path in paths)


def test_the_wanted_files_arrive_in_the_public_layout(hub, tmp_path):
    dataset = download(hub, tmp_path / "out", train_shards=2)
    files = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file())
    wanted = [f"datasets/{NAME}/fineweb_{n}.bin" for n in ("train_000000", "train_000001", "val_000000")]
    assert files == [*wanted, "tokenizers/fineweb_512_bpe.model"]
    assert same_files(hub, tmp_path / "out", files)
    assert len(dataset.train_shards) == 2 and dataset.vocab_size == 512


def test_all_training_shards_by_default(hub, tmp_path):
    assert len(download(hub, tmp_path / "out").train_shards) == 3


def test_the_environment_names_repository_prefix_and_endpoint(hub, tmp_path, monkeypatch):
    (hub.folder / "datasets").rename(hub.folder / "elsewhere")
    monkeypatch.setenv("MATCHED_FINEWEB_REPO_ID", REPO)
    monkeypatch.setenv("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "elsewhere")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    dataset = download_dataset(tmp_path / "out", variant="sp512", train_shards=1, quiet=True)
    assert len(dataset.train_shards) == 1


def test_an_empty_prefix(hub, tmp_path):
    hub.folder = hub.folder / "datasets"
    assert len(download(hub, tmp_path / "out", prefix="", train_shards=1).train_shards) == 1


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    download(hub, tmp_path / "out", train_shards=1)
    hub.requests.clear()
    download(hub, tmp_path / "out", train_shards=2)
    assert [name for name, _ in hub.requests] == ["manifest.json", "fineweb_train_000001.bin"]


def test_a_broken_connection_goes_on_where_it_was(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.break_after["fineweb_train_000000.bin"] = 3000
    download(hub, tmp_path / "out", train_shards=1)
    assert [start for name, start in hub.requests if name == "fineweb_train_000000.bin"] == [0, 3000]
    assert same_files(hub, tmp_path / "out", [f"datasets/{NAME}/fineweb_train_000000.bin"])


def test_a_download_that_was_stopped_goes_on_with_the_next_file(hub, tmp_path):
    hub.fail = {"fineweb_train_000001.bin"}
    with pytest.raises(DataError, match=r"cannot fetch .*fineweb_train_000001\.bin .*run again to go on from here"):
        download(hub, tmp_path / "out")
    assert not (tmp_path / "out" / "datasets" / NAME / "fineweb_train_000001.bin").exists()
    hub.fail, hub.requests = set(), []
    download(hub, tmp_path / "out")
    assert [name for name, _ in hub.requests] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]


def test_a_download_that_was_stopped_inside_a_file_goes_on_with_that_file(hub, tmp_path, monkeypatch):
    name = "fineweb_train_000001.bin"
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.break_after[name], hub.fail_after_break = 3000, {name}
    with pytest.raises(DataError, match=r"run again to go on from here"):
        download(hub, tmp_path / "out", train_shards=2)
    assert not (tmp_path / "out" / "datasets" / NAME / name).exists()
    hub.fail, hub.requests = set(), []
    download(hub, tmp_path / "out", train_shards=2)
    assert [file for file, _ in hub.requests if file.endswith(".bin")] == [name]
    assert same_files(hub, tmp_path / "out", [f"datasets/{NAME}/{name}"])
    assert not (tmp_path / "out" / ".download").exists()


def test_a_damaged_local_file_is_fetched_again(hub, tmp_path):
    download(hub, tmp_path / "out", train_shards=1)
    path = tmp_path / "out" / "datasets" / NAME / "fineweb_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    download(hub, tmp_path / "out", train_shards=1)
    assert same_files(hub, tmp_path / "out", [f"datasets/{NAME}/fineweb_train_000000.bin"])


def test_a_local_file_stays_until_there_is_a_better_one(hub, tmp_path):
    download(hub, tmp_path / "out", train_shards=1)
    path = tmp_path / "out" / "datasets" / NAME / "fineweb_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    kept = path.read_bytes()
    (hub.folder / "datasets" / "datasets" / NAME / path.name).write_bytes(b"")
    with pytest.raises(DataError, match="arrived damaged"):
        download(hub, tmp_path / "out", train_shards=1)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("damage", [b"", b"<html>not a shard</html>"])
def test_a_damaged_remote_file_is_refused(hub, tmp_path, damage):
    (hub.folder / "datasets" / "datasets" / NAME / "fineweb_train_000000.bin").write_bytes(damage)
    with pytest.raises(DataError, match=r"fineweb_train_000000\.bin arrived damaged: .* wanted a shard header"):
        download(hub, tmp_path / "out", train_shards=1)
    assert not (tmp_path / "out" / "datasets" / NAME / "fineweb_train_000000.bin").exists()


@pytest.mark.parametrize("form", [dict, list])
def test_hashes_of_the_manifest_are_checked(hub, tmp_path, form):
    path = hub.folder / "datasets" / "datasets" / NAME / "fineweb_train_000000.bin"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = {path.name: digest} if form is dict else [{"name": f"datasets/{NAME}/{path.name}", "sha256": digest}]
    manifest = {"datasets": [{"name": NAME, "stats": {"files_train": 1, "files_val": 1}, "files": files}]}
    (hub.folder / "datasets" / "manifest.json").write_text(json.dumps(manifest))
    download(hub, tmp_path / "good")
    write_shard(path, np.array([1, 2, 3]))
    with pytest.raises(DataError, match=r"arrived damaged: not the contents that the manifest's SHA-256"):
        download(hub, tmp_path / "bad")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "sp8192"}, f"{REPO} has no fineweb10B_sp8192, only fineweb10B_sp1024, fineweb10B_sp512"),
        ({"variant": "sp1024"}, "fineweb10B_sp1024 has files_train=None"),
        ({"train_shards": 4}, "train_shards: got 4, wanted 1 to 3"),
        ({"train_shards": 0}, "train_shards: got 0, wanted 1 to 3"),
        ({"repo": "nobody/nothing"}, "nobody/nothing: no such dataset repository"),
        ({"repo": "not a name"}, "repo: got 'not a name'"),
        ({"prefix": "other"}, r"other/manifest\.json is not in this repository"),
    ],
)
def test_what_is_not_there(hub, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        download(hub, tmp_path / "out", **options)


@pytest.mark.parametrize("text", ["{", "[]", '{"datasets": 3}'])
def test_manifests_that_cannot_be_used(hub, tmp_path, text):
    (hub.folder / "datasets" / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        download(hub, tmp_path / "out")
