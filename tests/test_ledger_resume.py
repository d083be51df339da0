"""What an evaluation that is to go on from a ledger says of one that it does not fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.errors import ConfigError, LegalityError
from model.evaluate import evaluate
from model.gpt import GPT
from tests import test_evaluate_modes as modes
from tests import test_verify as small
from tests.test_ledger import with_arrays, with_header


def resumed(
    path: Path, *, mode: str = "plain", tokens: tuple[int, ...] = (40, 30), model: GPT | None = None, **changes
):
    """An evaluation of 72 tokens that goes on from `path` where there is a ledger."""
    data, config = modes.dataset(modes.stream(*tokens)), modes.CONFIG.replace(**changes)
    return evaluate(model or small.model(), data, mode, config, device="cpu", ledger_path=path, resume=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    resumed(tmp_path / "ledger_plain.npz", eval_seq_len=64)
    return tmp_path / "ledger_plain.npz"


@pytest.mark.parametrize(
    "changes, different",
    [
        ({"eval_seq_len": 32}, "eval_seq_len: 64 in the ledger, 32 asked"),
        ({"ttt_k_lora": False}, "ttt_k_lora: True in the ledger, False asked"),
        ({"mode": "sliding"}, "mode: plain in the ledger, sliding asked"),
        ({"tokens": (40, 31)}, r"tokens_sha256: \w{40} in the ledger, \w{40} asked"),
    ],
)
def test_what_differs_is_named_with_both_values(changes: dict[str, Any], different: str, path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"ledger_plain\.npz: ledger of another evaluation \({different}\); wanted"):
        resumed(path, **{"eval_seq_len": 64, **changes})


def test_other_weights_are_another_evaluation(path: Path) -> None:
    torch.manual_seed(1)
    with pytest.raises(ConfigError, match=r"\(weights_sha256: \w+ in the ledger, \w+ asked\)"):
        resumed(path, model=GPT(small.CONFIG.model), eval_seq_len=64)


def header(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return json.loads(file["header"].tobytes())


def test_settings_that_only_one_side_has_differ(path: Path) -> None:
    settings = header(path)["meta"]["eval"]
    for changed, different in (
        ({**settings, "eval_more": None}, "eval_more: None in the ledger, nothing asked"),
        ({k: v for k, v in settings.items() if k != "eval_stride"}, "eval_stride: nothing in the ledger, 8 asked"),
        ([1], r"eval: \[1\] in the ledger, \{'eval_mode': .*asked"),
    ):
        with_header(path, meta={**header(path)["meta"], "eval": changed})
        with pytest.raises(ConfigError, match=different):
            resumed(path, eval_seq_len=64)


def test_a_ledger_for_fewer_tokens_is_another_evaluation(path: Path) -> None:
    none = np.empty(0, np.int64)
    rows = {"state": none.astype(np.int32), "new_state": none.astype(np.int32), "start": none, "end": none}
    with_arrays(path, nll=np.full(60, np.nan), scored=np.zeros(60, bool), **rows)
    with_header(path, shared=[0, 1])
    with pytest.raises(ConfigError, match=r"\(tokens: 60 in the ledger, 72 asked\)"):
        resumed(path, eval_seq_len=64)


def test_scores_that_are_no_numbers_are_not_gone_on_from(path: Path) -> None:
    with np.load(path) as file:
        nll = file["nll"].copy()
    nll[50:] = np.nan
    with_arrays(path, nll=nll)
    with pytest.raises(LegalityError, match=r"ledger_plain\.npz: nll is damaged, wanted a value for each score"):
        resumed(path, eval_seq_len=64)
