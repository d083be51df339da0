"""N-gram hints against the golden vectors, against plain Python, and at their edges."""

import numpy as np
import pytest
import torch
from golden import load_npz

from pgolf_kernels.ngram import ngram_hints

GOLDEN = load_npz("ngram.npz")
CASES = {
    "main": {"tokens": 300000},
    "bits12": {"table_bits": 12},
    "stride1": {"orders": range(8, 17)},
    "experts": {"within_beta": 0.92, "word_beta": 0.5},
    "scale": {"tokens": 50000, "threshold_scale": 1.25, "base_beta": 1.5, "agree_bonus": 0.3},
}


def flags(prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(GOLDEN[prefix + name]) for name in ("has_leading_space", "is_boundary")}


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    settings = {"tokens": 100000, "table_bits": 20} | CASES[case]
    tokens = torch.from_numpy(GOLDEN["tokens"][: settings.pop("tokens")])
    hints, betas = ngram_hints(tokens, **settings, **flags())
    assert np.array_equal(hints.numpy(), GOLDEN[f"{case}.hints"])
    assert np.array_equal(betas.numpy(), GOLDEN[f"{case}.beta_values"][GOLDEN[f"{case}.beta_index"]])
