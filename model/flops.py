"""Floating-point operations of training, for the model FLOPs utilisation (MFU).

A matrix product of [n, a] by [a, b] is 2 n a b. Causal attention over a document of n tokens is two products over
n (n + 1) / 2 pairs: 2 D n (n + 1) for D = heads * head_dim. The backward pass counts twice the forward one. Looped
layers count once a pass; the embedding lookup, norms and element-wise work do not count.
"""

from __future__ import annotations

from model.config import ModelConfig

# Dense bf16 peak by the name that CUDA reports, in FLOP/s (NVIDIA's data sheets, without sparsity).
_PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU, or None for one that is not in the table."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)


def layer_passes(config: ModelConfig, loop: bool) -> int:
    """Blocks that one forward pass runs through."""
    encoder, decoder = config.layer_order(loop)
    passes = len(encoder) + len(decoder)
    if loop and config.loop_form == "rerun":
        passes += config.num_loops * (config.loop_end - config.loop_start + 1)
    return passes


def matmul_flops_per_token(config: ModelConfig, loop: bool) -> int:
    """Forward and backward, matrix products only."""
    dim = config.model_dim
    block = 2 * dim * dim + 2 * config.kv_dim * dim + 2 * config.hidden_dim * dim
    forward = 2 * (layer_passes(config, loop) * block + config.vocab_size * dim)
    if config.bigram_vocab_size:
        forward += 2 * config.bigram_dim * dim
    return 3 * forward


def attention_flops_per_pair(config: ModelConfig, loop: bool) -> int:
    """Forward and backward, for one (query, key) pair with the key not behind the query."""
    return 3 * 4 * config.model_dim * layer_passes(config, loop)


def train_flops(config: ModelConfig, loop: bool, tokens: int, pairs: float) -> float:
    """Of `tokens` tokens whose documents have `pairs` = sum of n (n + 1) / 2 attention pairs."""
    return tokens * matmul_flops_per_token(config, loop) + pairs * attention_flops_per_pair(config, loop)
