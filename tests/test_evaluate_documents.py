"""Documents, windows, schedules: the arithmetic under every mode."""

import itertools

import numpy as np
import pytest

from model.config import EvalConfig
from model.data.shards import BOS_ID
from model.errors import ConfigError
from model.evaluate.documents import (
    CHUNK_OVERHEAD_TOKENS,
    balance,
    document_boundaries,
    document_costs,
    find_documents,
    length_groups,
    num_chunks,
    pad_boundaries,
    ranges_to_positions,
)
from model.evaluate.lora_ttt import Step, choose_sizes, plan_steps
from model.evaluate.phased_ttt import plan_phases
from model.evaluate.plain import plain_windows
from model.evaluate.sgd_ttt import cosine_rate
from model.evaluate.sliding import sliding_windows
from tests.evaluation import arrays, results

B = BOS_ID


def alone(predictions: int, chunk_size: int, seq_len: int) -> list[Step]:
    """The steps of one document."""
    document = np.array([[0, predictions + 1]])
    return list(plan_steps(document, np.array([0]), slots=1, chunk_size=chunk_size, seq_len=seq_len))


def test_documents_of_the_golden_stream() -> None:
    assert np.array_equal(find_documents(arrays()["val_tokens"]), arrays()["docs"])


@pytest.mark.parametrize(
    "tokens, documents",
    [
        ([], []),
        ([B], []),
        ([7], []),
        ([5, 6, 7], [[0, 3]]),  # no BOS at all
        ([5, B, 6], [[0, 2], [1, 2]]),  # something in front of the first
        ([B, B, 6, B], [[0, 2], [1, 3]]),  # an empty document; a lone BOS at the end predicts nothing
    ],
)
def test_documents_at_the_edges(tokens: list[int], documents: list[list[int]]) -> None:
    found = find_documents(np.array(tokens, dtype=np.uint16))
    assert found.tolist() == documents
    targets = ranges_to_positions(found[:, 0] + 1, found.sum(axis=1))
    assert targets.tolist() == list(range(1, len(tokens)))  # every token but the first is a target, once


def test_chunk_windows_are_the_golden_ones() -> None:
    for chunk, predictions, chunks, size, seq_len, *window in arrays()["chunk_window_cases"].tolist():
        steps = alone(predictions, size, seq_len)
        assert len(steps) == num_chunks(predictions, size) == chunks
        step = steps[chunk]
        assert [int(part[0]) for part in (step.start, step.length, step.offset, step.count)] == window


def test_document_costs_are_the_inputs_read() -> None:
    lengths = np.arange(2, 300)
    documents = np.stack([np.zeros_like(lengths), lengths], axis=1)
    for chunk, seq_len in ((16, 64), (16, 70), (7, 50)):
        want = [sum(step.length[0] + CHUNK_OVERHEAD_TOKENS for step in alone(n, chunk, seq_len)) for n in lengths - 1]
        assert document_costs(documents, chunk, seq_len).tolist() == want


def test_groups_are_served_in_the_golden_order() -> None:
    documents = arrays()["docs"]
    groups = length_groups(documents, 4)
    order = np.argsort(documents[:, 1], kind="stable")
    numbers = [int(np.flatnonzero(order == group[0])[0]) // 4 for group in groups]
    assert numbers == results()["ttt_lora_pr1530"]["batch_order"]
    assert len(groups[0]) == len(documents) % 4


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_phases_in_length_order_train_on_the_golden_tokens(phases: int) -> None:
    documents, tokens, name = arrays()["docs"], arrays()["val_tokens"], f"ttt_phased_pr1727_{phases}"
    plan = plan_phases(documents, order="length", group_size=4, prefix=24, phases=phases)
    assert sorted(np.concatenate([read for read, _ in plan]).tolist()) == list(range(len(documents)))
    read = 0
    for number, ((now, train), want) in enumerate(zip(plan, results()[name]["phases"], strict=False), start=1):
        read += len(now)
        assert -(-(read - len(documents) % 4) // 4) + 1 == want["after_batches"]
        stream = tokens[ranges_to_positions(documents[train, 0], documents[train].sum(axis=1))]
        assert np.array_equal(stream, arrays()[f"{name}.phase{number}.tokens"])


def test_phases_in_stream_order_see_the_past_only() -> None:
    documents = arrays()["docs"]
    plan = plan_phases(documents, order="stream", group_size=4, prefix=24, phases=4)
    assert np.concatenate([read for read, _ in plan]).tolist() == list(range(len(documents)))
    done = 0
    for (read, train), boundary in zip(plan, (6, 12, 18, 24), strict=False):
        done += len(read)
        assert train.tolist() == list(range(boundary)) and done == boundary
    assert len(plan) == 5 and not len(plan[-1][1])


@pytest.mark.parametrize(
    "prefix, phases, boundaries",
    [
        (5, 1, []),  # a boundary at the end
        (9, 3, [1, 3]),  # more documents wanted than there are
        (5, 5, [1, 2, 3, 4]),
        (5, 8, [1, 2, 3, 4]),  # boundaries that repeat
        (2, 8, [1, 2]),
        (0, 2, []),
    ],
)
def test_phases_in_stream_order_train_once_and_never_at_the_end(
    prefix: int, phases: int, boundaries: list[int]
) -> None:
    documents = np.array([[4 * n, 5] for n in range(5)])
    plan = plan_phases(documents, order="stream", group_size=2, prefix=prefix, phases=phases)
    assert [len(read) for read, _ in plan] == np.diff([0, *boundaries, 5]).tolist()
    assert [train.tolist() for _, train in plan] == [*(list(range(b)) for b in boundaries), []]
    assert plan_phases(documents[:0], order="stream", group_size=2, prefix=prefix, phases=phases) == []


@pytest.mark.parametrize("order", ["length", "stream"])
@pytest.mark.parametrize("phases", range(1, 9))
def test_one_to_eight_phases_train_on_equal_parts(order: str, phases: int) -> None:
    """Pull request 1727 restated: group after group is read; when the next boundary's number of documents has been,
    the base weights learn from so many of them, those of the earliest groups first."""
    documents, prefix, size = arrays()["docs"], 24, 4
    plan = plan_phases(documents, order=order, group_size=size, prefix=prefix, phases=phases)
    boundaries = [prefix * (i + 1) // phases for i in range(phases)]
    if order == "stream":
        groups = [[i] for i in range(len(documents))]
    else:
        by_length = sorted(range(len(documents)), key=lambda i: (documents[i, 1], i))
        groups = [by_length[i : i + size] for i in range(0, len(documents), size)][::-1]
    read: list[int] = []
    parts = iter(plan)
    for group in groups:
        read += group
        if boundaries and len(read) >= boundaries[0]:
            now, train = next(parts)
            trained_on = sorted(read, key=lambda i: (documents[i, 1], i)) if order == "length" else read
            assert train.tolist() == trained_on[: boundaries.pop(0)]
            done = [i for part, _ in plan[: plan_number(plan, now) + 1] for i in part.tolist()]
            assert sorted(done) == sorted(read)
    now, train = next(parts)
    assert not len(train) and next(parts, None) is None and not boundaries
    assert len(plan) == phases + 1


def plan_number(plan: list[tuple[np.ndarray, np.ndarray]], part: np.ndarray) -> int:
    return next(i for i, (read, _) in enumerate(plan) if read is part)


@pytest.mark.parametrize("order", ["length", "stream"])
@pytest.mark.parametrize("count, prefix, phases", [(0, 5, 2), (1, 5, 8), (3, 0, 4), (5, 5, 1), (5, 2, 8), (9, 100, 3)])
def test_phases_at_the_edges(order: str, count: int, prefix: int, phases: int) -> None:
    documents = np.stack([np.arange(count) * 10, np.full(count, 11)], axis=1)
    plan = plan_phases(documents, order=order, group_size=2, prefix=prefix, phases=phases)
    assert sorted(i for read, _ in plan for i in read.tolist()) == list(range(count))
    done: set[int] = set()
    for read, train in plan:
        done |= set(read.tolist())
        assert set(train.tolist()) <= done
    assert not plan or not len(plan[-1][1])


def test_balance_keeps_everything_and_is_even() -> None:
    costs = np.random.default_rng(0).integers(1, 1000, 200)
    parts = balance(costs, 8)
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    loads = [costs[part].sum() for part in parts]
    assert max(loads) < 1.02 * costs.sum() / 8
    assert all((np.diff(costs[part]) <= 0).all() for part in parts)
    assert [len(part) for part in balance(costs[:2], 4)] == [1, 1, 0, 0]


def test_steps_read_every_chunk_once_and_keep_the_slots_full() -> None:
    documents = arrays()["docs"]
    order = np.argsort(-documents[:, 1], kind="stable")
    steps = list(plan_steps(documents, order, slots=4, chunk_size=16, seq_len=64))
    read: dict[int, list[int]] = {}
    for step in steps:
        for slot in np.flatnonzero(step.document >= 0):
            document, chunk = int(step.document[slot]), int(step.chunk[slot])
            start, predictions = documents[document, 0], documents[document, 1] - 1
            own = alone(int(predictions), 16, 64)[chunk]
            assert (step.start[slot], step.length[slot]) == (start + own.start[0], own.length[0])
            assert (step.offset[slot], step.count[slot]) == (own.offset[0], own.count[0])
            assert step.trains[slot] == (chunk + 1 < num_chunks(int(predictions), 16))
            assert step.new[slot] == (chunk == 0)
            read.setdefault(document, []).append(chunk)
    assert read == {d: list(range(num_chunks(int(documents[d, 1] - 1), 16))) for d in range(len(documents))}
    chunks = sum(len(chunks) for chunks in read.values())
    assert len(steps) <= -(-chunks // 4) + max(map(len, read.values()))


def test_chosen_sizes_are_the_cheapest() -> None:
    rng = np.random.default_rng(0)
    for count, distinct in itertools.product((1, 2, 3), (1, 3, 6)):
        sizes = rng.integers(1, distinct + 1, 15) * 256
        values = np.unique(sizes)
        chosen = choose_sizes(sizes, count)

        def cost(buckets: tuple[int, ...], sizes: np.ndarray = sizes) -> int:
            return sum(min(b for b in buckets if b >= size) for size in sizes.tolist())

        candidates = [
            (*c, int(values[-1])) for n in range(count) for c in itertools.combinations(values[:-1].tolist(), n)
        ]
        assert len(chosen) <= count
        assert cost(tuple(chosen.tolist())) == min(map(cost, candidates))


def test_boundaries_of_a_packed_row() -> None:
    row = np.array([5, 5, B, 5, 5, 5, 5, 5, B, B, 5])
    assert document_boundaries(row, 3).tolist() == [0, 2, 5, 8, 9, 11]
    assert document_boundaries(row[2:3], 3).tolist() == [0, 1]
    assert pad_boundaries(np.array([0, 4, 9]), 4).tolist() == [0, 4, 9, 9]


def test_plain_windows_cover_the_stream_for_any_number_of_ranks() -> None:
    for tokens, world in itertools.product((2, 63, 64, 65, 1000), (1, 2, 7)):
        batches = [b for rank in range(world) for b in plain_windows(tokens, 16, 4, rank, world, drop=False)]
        assert np.array_equal(
            np.concatenate([np.stack(b) for b in batches]),
            np.concatenate(plain_windows(tokens, 16, 4, 0, 1, drop=False)),
        )
        covered = np.concatenate([ranges_to_positions(b[:, 0] + 1, b[:, 0] + b[:, 1] + 1) for b in batches])
        assert covered.tolist() == list(range(1, tokens))


@pytest.mark.parametrize("tokens", [2, 3, 17, 64, 65, 66, 200])
@pytest.mark.parametrize("seq_len, stride", [(64, 16), (64, 64), (64, 1), (16, 5)])
def test_sliding_windows_score_each_target_once(tokens: int, seq_len: int, stride: int) -> None:
    starts, lengths, skips = sliding_windows(tokens, seq_len, stride).T
    targets = ranges_to_positions(starts + skips + 1, starts + lengths + 1)
    assert targets.tolist() == list(range(1, tokens))
    assert (lengths <= seq_len).all() and (starts + lengths <= tokens - 1).all()


def test_a_stride_beyond_the_window_is_refused() -> None:
    with pytest.raises(ConfigError, match="eval_stride: got 65, wanted 1 to eval_seq_len=64"):
        sliding_windows(100, 64, 65)


def test_learning_rates() -> None:
    assert cosine_rate(0, 5, 2.0) == 2.0
    assert cosine_rate(2, 5, 2.0) == pytest.approx(1.0)
    assert cosine_rate(0, 1, 2.0) == 2.0
    warm = [cosine_rate(c, 9, 1.0, 3, 0.2) for c in range(8)]
    assert warm[:3] == pytest.approx([0.2, 0.6, 1.0])
    assert warm[3] == 1.0 and all(a > b for a, b in itertools.pairwise(warm[3:]))
    assert EvalConfig().global_ttt_warmup_chunks == 0
