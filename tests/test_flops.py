"""Floating-point operations of training, against a count of what the network really multiplies."""

import itertools

import pytest
import torch

from model import gpt
from model.config import ModelConfig
from model.data.loaders import Batch
from model.flops import layer_passes, peak_flops, train_flops
from model.monitor import Monitor, StepRecord
from model.presets import get_preset
from model.run import RunDir
from model.schedule import StepSettings
from model.train import attention_pairs
from tests.tiny import tiny_config

TOY = {"vocab_size": 50, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 4, "mlp_mult": 2.0}
CU_SEQLENS = [0, 5, 6, 20, 32, 32]  # documents of 5, 1, 14 and 12 tokens, and a padded end


def counted(config: ModelConfig, loop: bool, monkeypatch) -> int:
    """Twice the multiply-adds of one forward pass over CU_SEQLENS, times three: product by product, pair by pair."""
    model = gpt.GPT(config)
    weights = {name: (getattr(model, bank), index) for name, bank, index in model.matrix_names()}
    total = 0

    def collect(names: tuple[str, ...], x: torch.Tensor) -> None:
        nonlocal total
        for name in names:
            bank, index = weights[name]
            rows, columns = (bank if index is None else bank[index]).shape
            assert x.size(-1) == columns
            total += 2 * rows * x.numel()

    def count_pairs(q: torch.Tensor) -> None:
        nonlocal total
        pairs = sum(
            1
            for start, end in itertools.pairwise(CU_SEQLENS)
            for query in range(start, end)
            for key in range(start, end)
            if key <= query
        )
        heads, head_dim = q.shape[-2:]
        total += 2 * 2 * heads * head_dim * pairs  # a score and a weighted value for every pair

    for name in ("varlen_attention", "attention_without_self"):
        attention = getattr(gpt, name)

        def counting(q: torch.Tensor, *rest: object, attention=attention) -> torch.Tensor:
            count_pairs(q)
            return attention(q, *rest)

        monkeypatch.setattr(gpt, name, counting)
    ids = torch.arange(32) % config.vocab_size
    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32)
    with torch.no_grad():
        model.hidden(ids, cu_seqlens=cu_seqlens, max_seqlen=14, loop=loop, collect=collect)
    return 3 * total


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("preset", ["pr1413", "pr1499", "pr1514", "pr1530", "pr1727"])
def test_every_product_and_pair_is_counted_once_a_pass(preset, loop, monkeypatch):
    changes = TOY | ({"bigram_vocab_size": 20, "bigram_dim": 8} if preset == "pr1499" else {})
    config = get_preset(preset).replace(**changes).model
    ids = torch.zeros(1, 32, dtype=torch.int64)
    batch = Batch(ids, ids, torch.tensor(CU_SEQLENS, dtype=torch.int32), 14)
    pairs = attention_pairs(batch).item()
    assert train_flops(config, loop, 32, pairs) == counted(config, loop, monkeypatch)


def test_the_published_size():
    """pr1530: 35.9 M weights, of which the loop's three layers run three times."""
    config = get_preset("pr1530").model
    layer = 2 * 512 * 512 + 2 * 256 * 512 + 2 * 2048 * 512
    for loop, passes in ((False, 11), (True, 17)):
        assert layer_passes(config, loop) == passes
        assert train_flops(config, loop, 1, 0) == 6 * (passes * layer + 8192 * 512)
    assert train_flops(config, True, 0, 1) == 3 * 4 * 512 * 17
    assert layer_passes(get_preset("pr1499").model, loop=True) == 11 + 3


def test_peaks():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA Unknown") is None


def test_utilisation_is_a_share_of_all_ranks_peak(tmp_path):
    config = tiny_config(tmp_path, tmp_path)
    monitor = Monitor(config, RunDir(tmp_path), 2, torch.device("cpu"), None)
    record = StepRecord(1, StepSettings(0.0, 1.0, 0.9, True, False), 0.0, 256, pairs=1000.0, seconds=0.5)
    assert monitor._mfu([record]) is None  # a CPU's peak is not known
    monitor._peak = 1e9
    assert monitor._mfu([record]) == train_flops(config.model, True, 256, 1000.0) / 0.5 / (2 * 1e9)
    monitor.close()
