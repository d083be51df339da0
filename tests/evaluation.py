"""The golden evaluation set-up: the public systems' small models on the golden stream, as sessions of ours."""

from functools import cache

import numpy as np
import pytest
import torch

from model.config import Config
from model.data.tokenizer import ByteTables
from model.evaluate.ledger import Ledger
from model.evaluate.session import Session
from tests.golden import load_json, load_npz
from tests.systems import golden_model, small_config

SEQ_LEN, STRIDE = 64, 16


@cache
def arrays() -> dict[str, np.ndarray]:
    return load_npz("eval.npz")


@cache
def results() -> dict:
    return load_json("eval.json")


def tables() -> ByteTables:
    data = arrays()
    return ByteTables(data["base_bytes"], data["has_leading_space"], data["is_boundary"])


def golden_config(system: str, **changes: object) -> Config:
    """The configuration of the golden evaluations of a system."""
    loader = "documents" if system == "pr1530" else "shuffled"
    settings = {
        "loader": loader,
        "eval_seq_len": SEQ_LEN,
        "eval_stride": STRIDE,
        "eval_batch_seqs": 8,
        "ttt_eval_seq_len": SEQ_LEN,
        "ttt_lora_rank": 4,
        "ttt_lora_lr": 0.01,
        "ttt_chunk_size": 16,
        "ttt_batch_size": 4,
        "sgd_ttt_chunk_tokens": 512,
        "sgd_ttt_batch_seqs": 2,
        "sgd_ttt_epochs": 3,
        "sgd_ttt_lr": 0.02,
        "phased_prefix_docs": 24,
        "global_ttt_lr": 0.02,
        "global_ttt_chunk_tokens": 256,
        "global_ttt_batch_seqs": 2,
    }
    return Config(model=small_config(system)).replace(**{**settings, **changes})


def golden_session(
    system: str, *, compat: bool = False, defects: tuple[str, ...] = (), loop: bool = True, **changes: object
) -> Session:
    """A session on the golden stream with the golden parameters of `system`."""
    config = golden_config(system, compat=compat, **changes)
    model, _ = golden_model(system)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tokens = arrays()["val_tokens"]
    return Session(
        model=model,
        config=config.eval,
        tokens=tokens,
        token_bytes=tables().stream_bytes(tokens),
        ledger=Ledger(len(tokens), defects),
        device=torch.device("cpu"),
        documents_apart=config.data.loader == "documents",
        loop=loop,
    )


def check_result(session: Session, name: str, *, relative: float = 2e-6) -> None:
    """Compares a finished session's totals with the golden result: counts exactly, losses and bpb relatively."""
    want = results()[name]
    got = session.ledger.totals(session.token_bytes)
    assert got.tokens == want["token_count"]
    assert got.bytes == want["byte_count"]
    assert abs(got.loss_sum / want["loss_sum"] - 1) < relative
    assert abs(got.val_loss / want["val_loss"] - 1) < relative
    assert abs(got.bpb / want["val_bpb"] - 1) < relative


def count_scores(patch: pytest.MonkeyPatch) -> list[int]:
    """The list that each call of `Session.window_scores` adds its number of scored predictions to."""
    counts: list[int] = []
    window_scores = Session.window_scores

    def counted(self: Session, windows: np.ndarray, **inputs: object) -> torch.Tensor:
        counts.append(int((windows[:, 1] - windows[:, 2]).sum()))
        return window_scores(self, windows, **inputs)

    patch.setattr(Session, "window_scores", counted)
    return counts
