"""Kernels for training and shipping tiny language models."""

from pgolf_kernels.adapter_adamw import adapter_adamw
from pgolf_kernels.attention import attention_backend_info, set_attention_backend, varlen_attention
from pgolf_kernels.batched_lora import batched_lora, batched_lora_multi
from pgolf_kernels.embedding import embedding
from pgolf_kernels.fp8_mlp import fp8_mlp
from pgolf_kernels.fused_mlp import fused_mlp
from pgolf_kernels.gptq import GptqRecipe, gptq_quantize, gptq_quantize_many
from pgolf_kernels.linear_softcap_ce import linear_softcap_cross_entropy, score_tokens
from pgolf_kernels.muon import muon_apply, muon_direction, orthogonalize
from pgolf_kernels.ngram import ngram_hints
from pgolf_kernels.packing import byte_shuffle, byte_unshuffle, decode_codes, encode_codes
from pgolf_kernels.qk_rope import qk_rope, qk_rope_readers, qkv_rope
from pgolf_kernels.residual import combine, combine_norm, norm_residual
from pgolf_kernels.softcap_ce import softcap_cross_entropy, softcap_cross_entropy_with_grad
from pgolf_kernels.stepped_lora import AdamStep, LoraPass, SteppedLora, stepped_lora
from pgolf_kernels.xsa import xsa

__all__ = [
    "AdamStep",
    "GptqRecipe",
    "LoraPass",
    "SteppedLora",
    "adapter_adamw",
    "attention_backend_info",
    "batched_lora",
    "batched_lora_multi",
    "byte_shuffle",
    "byte_unshuffle",
    "combine",
    "combine_norm",
    "decode_codes",
    "embedding",
    "encode_codes",
    "fp8_mlp",
    "fused_mlp",
    "gptq_quantize",
    "gptq_quantize_many",
    "linear_softcap_cross_entropy",
    "muon_apply",
    "muon_direction",
    "ngram_hints",
    "norm_residual",
    "orthogonalize",
    "qk_rope",
    "qk_rope_readers",
    "qkv_rope",
    "score_tokens",
    "set_attention_backend",
    "softcap_cross_entropy",
    "softcap_cross_entropy_with_grad",
    "stepped_lora",
    "varlen_attention",
    "xsa",
]
