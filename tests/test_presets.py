"""Presets: valid, complete, and as large as the published models."""

import re

import pytest
import torch

from model.config import Config
from model.errors import ConfigError
from model.gpt import GPT
from model.presets import DEFECTS, get_preset, preset_names
from tests.golden import load_json

# Parameters of the published models.
PARAMETERS = {
    "pr1413": 35_943_512,
    "pr1499": 37_338_221,
    "pr1514": 35_944_536,
    "pr1530": 35_944_602,
    "pr1727": 35_944_602,
}


@pytest.mark.parametrize("name", preset_names())
def test_presets_survive_json(name):
    config = get_preset(name)
    assert config.preset == name
    assert Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = GPT(get_preset(name).model)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


# Field -> name in the public scripts, where they differ.
NAMES = {
    "calibration_batches": "gptq_calibration_batches",
    "reserve_seconds": "gptq_reserve_seconds",
    "parallel_start": "parallel_residual_start",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_hyperparameters_of_the_published_runs(name):
    golden = load_json("schedules.json")[name.removeprefix("pr")]["hyperparameters"]
    checked = 0
    for _, field, value in get_preset(name).items():
        wanted = golden.get(NAMES.get(field, field), golden.get(field))
        # The golden file has 1727's code defaults for what its command sets: bits and clips.
        if wanted is not None and not (
            name == "pr1727" and field in ("embed_bits", "embed_clip_sigmas", "mlp_clip_sigmas")
        ):
            assert value == wanted, field
            checked += 1
    assert checked >= 12


def test_demo_has_a_step_budget_and_the_parts_of_the_large_presets():
    demo = get_preset("demo")
    assert demo.train.max_wallclock_seconds == 0
    assert demo.model.num_loops > 0
    assert 0 <= demo.model.parallel_start < demo.model.num_layers
    assert demo.data.loader == "documents"
    assert demo.train.cuda_graphs is False


@pytest.mark.parametrize("impossible", [-2, float("nan"), float("inf"), 10**30])
def test_every_number_has_a_range(impossible):
    for _, name, value in get_preset("pr1530").items():
        if type(value) in (int, float):
            with pytest.raises(ConfigError, match=f"^{name}: got {re.escape(str(impossible))}, wanted "):
                get_preset("pr1530").replace(**{name: impossible})


def test_minus_one_is_none():
    for name in ("parallel_start", "loop_start_step"):
        get_preset("pr1530").replace(**{name: -1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches": 0}, "micro_batches: got 0, wanted at least 1"),
        ({"micro_batches": 5}, "train_batch_tokens: got 786432, wanted a multiple of micro_batches=5"),
        ({"vocab_size": 65537}, "vocab_size: got 65537, wanted 2 to 65536"),
        ({"muon_momentum": 1.0}, "muon_momentum: got 1.0, wanted 0 <= value < 1"),
        ({"logit_softcap": 0.0}, "logit_softcap: got 0.0, wanted above 0"),
        ({"embed_bits": 9}, "embed_bits: got 9, wanted 2 to 8"),
        ({"calibration_tokens": 1000}, "calibration_tokens: got 1000, wanted a multiple of train_seq_len=2048"),
        ({"ttt_chunk_size": 4096}, "ttt_chunk_size: got 4096, wanted at most ttt_eval_seq_len=2048"),
        ({"num_heads": 3}, "model_dim: got 512, wanted a multiple of num_heads=3"),
        ({"num_kv_heads": 3}, "num_heads: got 8, wanted a multiple of num_kv_heads=3"),
        ({"rope_dims": 7}, "rope_dims: got 7, wanted even"),
        ({"loop_end": 11}, "loop_start: got 3, wanted 0 <= loop_start <= loop_end < num_layers"),
        ({"parallel_start": 12}, "parallel_start: got 12"),
        ({"xsa_last_n": 12}, "xsa_last_n: got 12"),
        ({"mlp_mult": 0.001}, "mlp_mult: got 0.001, wanted a hidden unit or more"),
        ({"bigram_vocab_size": 1}, r"bigram_vocab_size: got 1, wanted 0 \(none\) or at least 2"),
        ({"bigram_vocab_size": 9, "bigram_dim": 0}, "bigram_dim: got 0, wanted at least 1"),
        ({"cu_bucket_size": 10**9}, "cu_bucket_size: got 1000000000, wanted 1 to 65536"),
        ({"adam_eps": 0.0}, "adam_eps: got 0.0, wanted above 0"),
        ({"gptq_damping": -0.1}, "gptq_damping: got -0.1, wanted at least 0"),
        ({"ttt_grad_steps": 0}, "ttt_grad_steps: got 0, wanted at least 1"),
        ({"ngram_table_bits": 60}, "ngram_table_bits: got 60, wanted 4 to 32"),
        ({"ngram_table_bits": 3}, "ngram_table_bits: got 3, wanted 4 to 32"),
        ({"ngram_order_stride": 0}, "ngram_order_stride: got 0, wanted at least 1"),
        ({"ngram_base_beta": 1000.0}, "ngram_base_beta: got 1000.0, wanted 0 to 100"),
        ({"cache_reset_every": 0}, "cache_reset_every: got 0, wanted at least 1"),
        ({"cache_alpha": 1.5}, "cache_alpha: got 1.5, wanted 0 to 1"),
        ({"cache_order": 0}, "cache_order: got 0, wanted 1 to 64"),
        ({"timeout_seconds": 1e14}, "timeout_seconds: got 100000000000000.0, wanted above 0, at most 1000000000"),
        ({"loader": "random"}, "loader: got 'random', wanted one of documents, shuffled, stream"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        get_preset("pr1530").replace(**changes)


def test_unknown_preset():
    with pytest.raises(ConfigError, match="preset: got 'pr9', wanted one of demo, pr1413"):
        get_preset("pr9")


def test_every_defect_says_what_and_why():
    for defect in DEFECTS:
        assert all((defect.reference, defect.ours, defect.why, defect.faithful))
        if defect.faithful.startswith("--"):
            flag = defect.faithful.split()[0].removeprefix("--").removeprefix("no-").replace("-", "_")
            assert flag in {name for _, name, _ in get_preset("pr1530").items()}
        else:
            assert defect.faithful.startswith("not offered: ")
