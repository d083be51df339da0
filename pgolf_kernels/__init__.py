"""Kernels for training and shipping tiny language models."""

from pgolf_kernels.adapter_adamw import adapter_adamw
from pgolf_kernels.attention import attention_backend_info, set_attention_backend, varlen_attention
from pgolf_kernels.batched_lora import batched_lora, batched_lora_multi
from pgolf_kernels.fused_mlp import fused_mlp
from pgolf_kernels.qk_rope import qk_rope
from pgolf_kernels.xsa import xsa

__all__ = [
    "adapter_adamw",
    "attention_backend_info",
    "batched_lora",
    "batched_lora_multi",
    "fused_mlp",
    "qk_rope",
    "set_attention_backend",
    "varlen_attention",
    "xsa",
]
