"""The reference systems: their authors' environments, and their networks with the golden parameters."""

import torch
from torch import Tensor

from model.config import ModelConfig
from model.convert import from_reference
from model.gpt import GPT
from tests.golden import load_safetensors

# What the authors set; together with the code defaults this is what their runs ran with.
PUBLISHED = {
    "pr1413": {"QK_GAIN_INIT": "5.0", "TTT_ENABLED": "1"},
    "pr1499": {},
    "pr1514": {
        "QK_GAIN_INIT": "5.0",
        "TTT_ENABLED": "1",
        "MUON_MOMENTUM": "0.97",
        "PARALLEL_RESIDUAL_START": "7",
        "LOOP_START": "3",
        "NGRAM_TILT_ENABLED": "1",
        "NGRAM_WITHIN_BETA": "0",
        "NGRAM_WORD_BETA": "0",
    },
    "pr1530": {},
    "pr1727": {
        "QK_GAIN_INIT": "5.25",
        "PHASED_TTT_NUM_PHASES": "4",
        "PHASED_TTT_PREFIX_DOCS": "2000",
        "MLP_CLIP_SIGMAS": "12",
        "ATTN_CLIP_SIGMAS": "13",
        "EMBED_BITS": "7",
        "EMBED_CLIP_SIGMAS": "15",
    },
}

_COMMON = {
    "vocab_size": 512,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "rope_dims": 8,
    "rope_train_seq_len": 64,
}
_SYSTEMS = {
    "pr1413": {"loop_start": 4, "parallel_start": -1, "rope_rescale": True},
    "pr1514": {"loop_start": 3, "parallel_start": 7, "parallel_lanes": 1, "rope_rescale": True},
    "pr1530": {},
    "pr1499": {
        "parallel_start": 7,
        "parallel_lanes": 1,
        "loop_form": "rerun",
        "num_loops": 1,
        "skip_form": "additive",
        "xsa_last_n": 4,
        "xsa_form": "self_weight",
        "bigram_vocab_size": 128,
        "bigram_dim": 16,
        "smear_gate": True,
        "value_residual": True,
        "hidden_gain": True,
    },
}


def small_config(system: str, **changes: object) -> ModelConfig:
    return ModelConfig(**{**_COMMON, **_SYSTEMS[system], **changes})


def golden_model(system: str, dtype: torch.dtype = torch.float32) -> tuple[GPT, dict[str, Tensor]]:
    """(our GPT with the golden parameters, every tensor of the golden file)."""
    golden = load_safetensors(f"model_{system}.safetensors")
    reference = {k.removeprefix("param."): v.to(dtype) for k, v in golden.items() if k.startswith("param.")}
    config = small_config(system)
    model = GPT(config).to(dtype)
    model.load_state_dict(from_reference(reference, config))
    model.compute_dtype = dtype
    return model, golden
