"""What tests/test_evaluate_ranks.py runs in several processes."""

import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.evaluate import Session, evaluate
from model.evaluate import session as sessions
from tests import test_evaluate_modes as modes
from tests import test_verify as small

CONFIG = modes.CONFIG.replace(ngram_table_bits=8)
MODES = (*modes.MODES, "phased+ngram-tilt")


def streams() -> dict[str, np.ndarray]:
    """Texts that repeat, so that there are hints; and fewer documents than ranks."""
    return {"many": np.concatenate([modes.stream(40, 9, 50)] * 3), "one": modes.stream(20), "two": modes.stream(70, 3)}


def start(function: object, ranks: int, *arguments: object) -> None:
    """Calls `function(rank, ranks, *arguments)` in so many processes; fails when one fails, and ends the others."""
    mp.start_processes(function, (ranks, *arguments), nprocs=ranks, start_method="forkserver")


def join(rank: int, ranks: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)


def score_all(rank: int, ranks: int, folder: Path) -> None:
    """Every mode on every stream; leaves FOLDER/ranks.rank.npz with the scores and what the ledger holds."""
    join(rank, ranks, folder / f"meet{ranks}")
    found = {}
    for name, tokens in streams().items():
        for mode in MODES:
            result = evaluate(small.model(), modes.dataset(tokens), mode, CONFIG, device="cpu")
            rows = result.ledger.rows
            found[f"{name} {mode}"] = result.ledger.nll
            found[f"{name} {mode} updates"] = np.stack([rows.start, rows.end])[:, ~rows.is_score]
            found[f"{name} {mode} score"] = np.array([result.bpb, result.tokens, result.bytes])
            assert modes.check_ledger(result.ledger, result.bpb).status == "pass"
    np.savez(folder / f"{ranks}.{rank}.npz", **found)
    dist.destroy_process_group()


def break_off(rank: int, ranks: int, mode: str, path: Path, pauses: int) -> None:
    """Saves at every pause, and after some of them is gone, as a process that was killed."""
    join(rank, ranks, path.with_suffix(".meet"))
    sessions.SAVE_SECONDS = 0.0
    modes.lora_ttt.PAUSE_STEPS = 1
    pause, done = Session.pause, 0

    def stop(self: Session, *, last: bool = False) -> None:
        nonlocal done
        pause(self, last=last)
        done += 1
        if done == pauses:
            while not sessions.rank_paths(path):  # the others may not have come to their first pause yet
                time.sleep(0.01)
            os._exit(1)

    Session.pause = stop  # type: ignore[method-assign]
    evaluate(small.model(), modes.dataset(streams()["many"]), mode, CONFIG, device="cpu", ledger_path=path)


def go_on(rank: int, ranks: int, mode: str, path: Path) -> None:
    """Resumes; leaves PATH.rank.npy."""
    join(rank, ranks, path.with_suffix(".again"))
    data = modes.dataset(streams()["many"])
    result = evaluate(small.model(), data, mode, CONFIG, device="cpu", ledger_path=path, resume=True)
    assert modes.check_ledger(result.ledger, result.bpb).status == "pass"
    np.save(path.with_suffix(f".{rank}.npy"), result.ledger.nll)
    dist.destroy_process_group()
