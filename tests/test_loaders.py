"""Loaders: batch for batch equal to the public systems', and resumable at every batch."""

import gc
import json
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from golden import load_npz
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.loaders import LOADERS, DocumentLoader, ShuffledLoader, StreamLoader, build_cu_seqlens
from model.data.shards import read_shard, write_shard
from model.errors import ConfigError, DataError

GOLDEN_NAMES = {"packing": DocumentLoader, "shuffled": ShuffledLoader, "stream1499": StreamLoader}
SIZES = {
    "packing": {"tokens": 4096, "seq_len": 256},
    "shuffled": {"tokens": 2048, "seq_len": 128},
    "stream1499": {"tokens": 2048, "seq_len": 128},
}
BATCHES = 6


@pytest.fixture(scope="module")
def golden():
    return load_npz("loaders.npz")


@pytest.fixture(scope="module")
def shards(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    paths = [folder / f"fineweb_train_{i:06d}.bin" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_bytes(golden[f"shard{i}"].tobytes())
    return paths


def make(name, shards, rank=0, world=1, **kwargs):
    return GOLDEN_NAMES[name](shards, vocab_size=65536, rank=rank, world_size=world, **(SIZES[name] | kwargs))


def assert_same(a, b):
    assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) and a.max_seqlen == b.max_seqlen
    assert (a.cu_seqlens is None) == (b.cu_seqlens is None)
    assert a.cu_seqlens is None or torch.equal(a.cu_seqlens, b.cu_seqlens)


@pytest.mark.parametrize("world, rank", [(1, 0), (2, 0), (2, 1)])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_batches_are_the_public_systems(golden, shards, name, world, rank):
    loader = make(name, shards, rank, world)
    for number in range(BATCHES):
        key = f"{name}.w{world}r{rank}.b{number}"
        batch = loader.next_batch()
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        np.testing.assert_array_equal(batch.inputs, golden[f"{key}.x"])
        np.testing.assert_array_equal(batch.targets[:, :-1], golden[f"{key}.x"][:, 1:])
        np.testing.assert_array_equal(batch.targets[:, -1], golden[f"{key}.y_last"])
        if name == "packing":
            assert batch.cu_seqlens.dtype == torch.int32
            np.testing.assert_array_equal(batch.cu_seqlens, golden[f"{key}.cu_seqlens"])
            assert batch.max_seqlen == golden[f"packing.w{world}r{rank}.max_seqlen"][number]
        else:
            assert batch.cu_seqlens is None


@pytest.mark.parametrize("case", range(5))
def test_cu_seqlens_are_the_public_systems(golden, case):
    total, max_len, bucket = golden[f"build_cu.{case}.args"].tolist()
    boundaries, longest = build_cu_seqlens(golden[f"build_cu.{case}.bos"], total, max_len, bucket)
    np.testing.assert_array_equal(boundaries, golden[f"build_cu.{case}.cu_seqlens"])
    assert boundaries.dtype == np.int32
    assert longest == golden[f"build_cu.{case}.max_seqlen"]


@given(
    st.lists(st.integers(0, 399), unique=True, max_size=30).map(sorted),
    st.integers(400, 500),
    st.sampled_from([0, 1, 7, 64, 1000]),
    st.integers(1, 70),
)
def test_cu_seqlens_cut_at_documents_and_lengths(starts, total, max_len, bucket):
    boundaries, longest = build_cu_seqlens(np.array(starts, dtype=np.int64), total, max_len, bucket)
    wanted, since = [0], 0
    for position in range(1, total):
        since = 0 if position in starts else since + 1
        if since == 0 or (max_len and since % max_len == 0):
            wanted.append(position)
    assert boundaries.size % bucket == 0 and boundaries.size - len(wanted) - 1 < bucket
    assert boundaries.tolist() == wanted + [total] * (boundaries.size - len(wanted))
    assert longest == max(np.diff([*wanted, total]))


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
@settings(deadline=None, max_examples=12)
@given(consumed=st.integers(0, 40), world=st.integers(1, 3), data=st.data())
def test_state_goes_on_with_the_same_sequence(shards, name, prefetch, consumed, world, data):
    """Also across shard ends and reshuffles, which come within these 40 batches."""
    rank = data.draw(st.integers(0, world - 1))
    whole = make(name, shards, rank, world, prefetch=prefetch)
    for _ in range(consumed):
        whole.next_batch()
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = make(name, shards, rank, world, prefetch=prefetch)
    for _ in range(data.draw(st.integers(0, 3))):
        resumed.next_batch()  # a loader that was already used can be set back as well
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    for _ in range(8):
        assert_same(whole.next_batch(), resumed.next_batch())
    whole.close()
    resumed.close()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_prefetching_changes_nothing_and_close_forgets_it(shards, name):
    plain, ahead = make(name, shards, prefetch=0), make(name, shards, prefetch=4)
    for _ in range(5):
        assert_same(plain.next_batch(), ahead.next_batch())
    ahead.close()
    assert ahead.state_dict() == plain.state_dict()
    assert_same(plain.next_batch(), ahead.next_batch())


@pytest.mark.parametrize("name", ["packing", "stream1499"])
def test_state_is_the_same_on_every_rank(shards, name):
    states = []
    for rank in range(2):
        loader = make(name, shards, rank, 2)
        for _ in range(7):
            loader.next_batch()
        states.append(loader.state_dict())
    assert states[0] == states[1]


def test_a_loader_says_how_long_it_was_waited_for(shards):
    """Of what is read ahead nothing but what the caller waits for counts."""
    for prefetch in (0, 1):
        loader = make("packing", shards, prefetch=prefetch)
        read = loader._source.next
        loader._source.next = lambda read=read: time.sleep(0.2) or read()
        loader.next_batch()
        late = loader.waited
        assert late >= 0.2
        if prefetch:
            deadline = time.monotonic() + 60
            while not loader._reader._ready.full() and time.monotonic() < deadline:
                time.sleep(0.01)
        loader.next_batch()
        assert loader.waited - late < 0.1 if prefetch else loader.waited - late >= 0.2
        loader.close()


def test_closing_forgets_the_thread_and_what_it_holds(shards):
    loader = make("packing", shards)
    loader.next_batch()
    reader = weakref.ref(loader._reader)
    loader.close()
    gc.collect()
    assert reader() is None
    loader.close()
    loader.next_batch()
    loader.close()


def test_dropping_a_loader_ends_its_thread(shards):
    loader = make("packing", shards)
    loader.next_batch()
    thread = next(t for t in threading.enumerate() if t.name == "batches" and t is loader._reader._thread)
    del loader
    gc.collect()
    thread.join(timeout=5)
    assert not thread.is_alive()


@pytest.mark.parametrize("change", [{"tokens": 1024}, {"seq_len": 64}])
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_state_of_another_loader_is_refused(shards, name, change):
    state = make(name, shards).state_dict()
    with pytest.raises(DataError, match=r"loader state: .* wanted"):
        make(name, shards, **change).load_state_dict(state)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("name", ["packing", "stream1499"])
def test_another_number_of_ranks_goes_on_with_the_next_token(shards, name, before, after):
    """What the new ranks read together is what comes behind all that the old ones have read."""
    old = make(name, shards, world=before, tokens=1024)
    for _ in range(2):
        old.next_batch()
    state = old.state_dict()
    batches = []
    for rank in range(after):
        loader = make(name, shards, rank, after, tokens=1024)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
        batches.append(loader.next_batch())
    assert state["position"]["shard"] == 0
    unread = read_shard(shards[0])[state["position"]["token"] :].astype(np.int64)
    for rank, batch in enumerate(batches):
        wanted = unread[rank * 1025 :][:1025]
        np.testing.assert_array_equal(batch.inputs.flatten(), wanted[:-1])
        np.testing.assert_array_equal(batch.targets.flatten(), wanted[1:])


def test_a_shuffled_order_belongs_to_its_rank(shards):
    state = make("shuffled", shards).state_dict()
    with pytest.raises(DataError, match="loader state: rank is 0, wanted 1 as in this run"):
        make("shuffled", shards, rank=1, world=2).load_state_dict(state)
    with pytest.raises(DataError, match="loader state: world_size is 1, wanted 2 as in this run"):
        make("shuffled", shards, world=2).load_state_dict(state)


def test_state_of_other_shards_is_refused(shards):
    state = make("packing", shards).state_dict()
    with pytest.raises(DataError, match="loader state: shards"):
        make("packing", shards[:2]).load_state_dict(state)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_ids_beyond_the_vocabulary(tmp_path, kind, prefetch):
    tokens = np.tile(np.array([1, 5, 6, 7], dtype=np.uint16), 64)
    tokens[37] = 600
    write_shard(tmp_path / "a.bin", tokens)
    with pytest.raises(DataError, match=r"id 600 .* vocabulary size 512"):
        loader = LOADERS[kind]([tmp_path / "a.bin"], tokens=64, seq_len=16, vocab_size=512, prefetch=prefetch)
        for _ in range(4):
            loader.next_batch()


def test_a_failure_of_the_thread_is_raised_again_each_time(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([1] * 40 + [999] * 40, dtype=np.uint16))
    loader = StreamLoader([tmp_path / "a.bin"], tokens=32, seq_len=8, vocab_size=10)
    loader.next_batch()
    for _ in range(2):
        with pytest.raises(DataError, match="id 999"):
            loader.next_batch()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_shard_that_vanished_is_named(tmp_path, kind):
    paths = [tmp_path / name for name in ("a.bin", "b.bin", "c.bin")]
    for path in paths:
        write_shard(path, np.array([1] * 50, dtype=np.uint16))
    loader = LOADERS[kind](paths, tokens=16, seq_len=16, vocab_size=10)
    paths[2].unlink()  # the first two may be open by now
    with pytest.raises(DataError, match=r"c\.bin: cannot be read"):
        for _ in range(16):
            loader.next_batch()


def test_a_shard_without_documents(tmp_path):
    write_shard(tmp_path / "a.bin", np.full(100, 7, dtype=np.uint16))
    with pytest.raises(DataError, match="no BOS"):
        DocumentLoader([tmp_path / "a.bin"], tokens=16, seq_len=16, vocab_size=10)


def test_shards_too_small_for_a_batch(tmp_path, shards):
    with pytest.raises(DataError, match=r"no training shard holds the 131076 tokens of one micro-batch \(4 ranks"):
        DocumentLoader(shards, tokens=32768, seq_len=64, vocab_size=65536, world_size=4)
    tokens = np.full(100, 7, dtype=np.uint16)
    tokens[90] = 1  # enough tokens, but not behind the first document's start
    write_shard(tmp_path / "a.bin", tokens)
    with pytest.raises(DataError, match="from its first BOS on"):
        DocumentLoader([tmp_path / "a.bin"], tokens=50, seq_len=64, vocab_size=10, prefetch=0).next_batch()
    with pytest.raises(DataError, match="wanted more than seq_len=100"):
        ShuffledLoader([tmp_path / "a.bin"], tokens=100, seq_len=100, vocab_size=10)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"tokens": 100, "seq_len": 16}, "multiple of seq_len=16"),
        ({"tokens": 0, "seq_len": 16}, "tokens"),
        ({"tokens": 16, "seq_len": 16, "rank": 2, "world_size": 2}, "rank: got 2"),
    ],
)
def test_sizes_that_cannot_be(shards, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        ShuffledLoader(shards, vocab_size=65536, **kwargs)


def test_more_ranks_than_shards(shards):
    with pytest.raises(DataError, match="3 training shards, wanted one for each of 4 ranks"):
        ShuffledLoader(shards, tokens=128, seq_len=128, vocab_size=65536, world_size=4, rank=3)
    with pytest.raises(DataError, match="no shards"):
        StreamLoader([], tokens=128, seq_len=128, vocab_size=10)


@pytest.mark.gpu
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_batches_on_the_gpu(shards, name):
    here, there = make(name, shards, prefetch=0), make(name, shards, device="cuda")
    for _ in range(BATCHES):
        a, b = here.next_batch(), there.next_batch()
        assert b.inputs.device.type == "cuda"
        assert_same(a, b._replace(**{k: v.cpu() for k, v in b._asdict().items() if isinstance(v, torch.Tensor)}))
