"""Several processes find what one finds, in every mode, and go on where others were interrupted."""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing as mp

from model.evaluate import evaluate
from model.evaluate.ledger import Ledger
from model.evaluate.session import rank_path, rank_paths
from model.pipeline import run_pipeline
from model.run import RunDir
from model.score import score_artifact
from tests import evaluation_ranks as ranks
from tests import test_evaluate_modes as modes
from tests import test_verify as small
from tests.tiny import tiny_config, tiny_data

ROOT = Path(__file__).parent.parent
TOLERANCE = 2e-5  # nats: another split of a sum over ranks rounds otherwise

multiprocessing.set_forkserver_preload(["tests.evaluation_ranks"])


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """By (processes, rank): what `score_all` left."""
    folder = tmp_path_factory.mktemp("ranks")
    for count in (1, 2, 3):
        ranks.start(ranks.score_all, count, folder)
    return {
        (count, rank): dict(np.load(folder / f"{count}.{rank}.npz")) for count in (1, 2, 3) for rank in range(count)
    }


@pytest.mark.parametrize("mode", ranks.MODES)
@pytest.mark.parametrize("name", list(ranks.streams()))
def test_any_number_of_ranks_finds_the_same(name: str, mode: str, scores: dict) -> None:
    alone = scores[1, 0]
    for place, found in scores.items():
        assert np.allclose(found[f"{name} {mode}"][1:], alone[f"{name} {mode}"][1:], rtol=0, atol=TOLERANCE), place
        assert np.array_equal(found[f"{name} {mode} score"][1:], alone[f"{name} {mode} score"][1:])
        assert found[f"{name} {mode} score"][0] == pytest.approx(alone[f"{name} {mode} score"][0], rel=1e-6)
        # One update is entered once, however many ranks made it together.
        updates = found[f"{name} {mode} updates"], alone[f"{name} {mode} updates"]
        assert sorted(updates[0].T.tolist()) == sorted(updates[1].T.tolist()), place


@pytest.mark.parametrize(
    "mode, before, after, pauses",
    [
        ("lora-ttt", 3, 2, 4),
        pytest.param("phased", 2, 3, 8, marks=pytest.mark.long),
        pytest.param("sgd-ttt", 2, 1, 2, marks=pytest.mark.long),
        pytest.param("plain+ngram-tilt", 3, 3, 1, marks=pytest.mark.long),
    ],
)
def test_an_interrupted_evaluation_goes_on_with_other_ranks(
    mode: str, before: int, after: int, pauses: int, tmp_path: Path
) -> None:
    path = tmp_path / "ledger_x.npz"
    with pytest.raises(mp.ProcessExitedException):
        ranks.start(ranks.break_off, before, mode, path, pauses)
    left = rank_paths(path)
    assert left, "the others saved their parts"
    ledger = Ledger.load(*[p for p in (path, *left) if p.exists()])
    assert 0 < ledger.missing() < ledger.num_tokens - 1
    scored = ledger.nll.copy()
    ranks.start(ranks.go_on, after, mode, path)
    assert not rank_paths(path) and Ledger.load(path).missing() == 0
    alone = evaluate(small.model(), modes.dataset(ranks.streams()["many"]), mode, ranks.CONFIG, device="cpu")
    for rank in range(after):
        nll = np.load(path.with_suffix(f".{rank}.npy"))
        assert np.array_equal(nll[~np.isnan(scored)], scored[~np.isnan(scored)])
        assert np.allclose(nll[1:], alone.ledger.nll[1:], rtol=0, atol=TOLERANCE)


def ledger_of(rank: int) -> Ledger:
    """A rank's ledger: tokens 1 to 2 in common, then one of its own and an update."""
    ledger = Ledger(20)
    ledger.score(0, 1, 3, np.ones(2))
    ledger.synchronise()
    ledger.score(0, 5 + 5 * rank, 8 + 5 * rank, np.full(3, 2.0 + rank))
    ledger.update(0, 5 + 5 * rank, 7 + 5 * rank)
    return ledger


def test_the_parts_of_several_ranks_make_one_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.npz"
    for rank in range(3):
        ledger_of(rank).save(rank_path(path, rank))
    parts = [path, *rank_paths(path)]
    assert len(parts) == 3
    whole = Ledger.load(*parts)
    assert whole.num_scored == 2 + 9 and whole.num_states == 4
    assert whole.nll[[1, 5, 10, 15]].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert whole.rows.new_state.tolist() == [-1, -1, 1, -1, 2, -1, 3]
    assert len(whole.rows) == 7  # what they had in common stands there once


def test_a_part_from_before_the_last_exchange_adds_nothing(tmp_path: Path) -> None:
    old, new = ledger_of(0), ledger_of(0)
    new.synchronise()
    new.score(1, 12, 14, np.ones(2))
    old.save(tmp_path / "old.npz")
    new.save(tmp_path / "new.npz")
    whole = Ledger.load(tmp_path / "old.npz", tmp_path / "new.npz")
    assert len(whole.rows) == len(new.rows) and whole.num_scored == new.num_scored


@pytest.mark.long
def test_pgolf_eval_under_torchrun(tmp_path: Path) -> None:
    rates = {"ttt_lora_lr": 0.02, "global_ttt_lr": 0.05, "global_ttt_chunk_tokens": 64, "phased_prefix_docs": 6}
    config = tiny_config(tiny_data(tmp_path), tmp_path / "runs", run_id="scored", **rates)
    run_pipeline(config, stages=("train", "quantize"))
    run, alone = tmp_path / "runs" / "scored", tmp_path / "runs" / "alone"
    shutil.copytree(run, alone)
    modes = ["plain", "lora-ttt", "phased"]
    results = score_artifact(alone, modes, quiet=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "model.cli"]
    command += ["eval", str(run), "--device", "cpu", *(part for mode in modes for part in ("--mode", mode))]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("bits per byte") == 1  # one process prints
    assert [line.split(":")[0] for line in done.stderr.splitlines() if line.endswith(" bpb")] == [
        "evaluating plain",
        "evaluating lora_ttt",
        "evaluating phased",
    ]
    found = RunDir(run, writes=False).result()["evaluation"]
    assert len({round(result.bpb, 3) for result in results.values()}) == 3
    for name, result in results.items():
        assert found[name]["bpb"] == pytest.approx(result.bpb, rel=1e-6)
        assert found[name]["tokens"] == result.tokens
        assert Ledger.load(run / f"ledger_{name}.npz").missing() == 0
    assert not list(run.glob(".*"))
