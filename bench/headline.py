"""The rows that people ask for: they are measured first, and the README's table is made of them."""

from __future__ import annotations

from typing import NamedTuple


class Headline(NamedTuple):
    part: str  # "FILE/PART", as Row.suite
    label: str
    peer: str | None = None  # which peer stands beside it; None: the fastest
    case: str | None = None  # None: the first on record


HEADLINE = (
    Headline("softcap_ce/forward_backward", "softcap cross-entropy, forward and backward"),
    Headline("softcap_ce/one_pass", "softcap cross-entropy, loss and gradient in one pass"),
    Headline("softcap_ce/forward", "softcap cross-entropy, forward"),
    Headline("softcap_ce/head", "head and loss, forward and backward"),
    Headline("softcap_ce/adapters", "head and loss with an adapter a document"),
    Headline("fused_mlp/forward_backward", "fused MLP, forward and backward"),
    Headline(
        "batched_lora/forward_backward",
        "linear with an adapter a document, forward and backward",
        case="B64 T2048 512->512 r96",
    ),
    Headline("attention/forward_backward", "attention over packed documents, forward and backward"),
    Headline("head_ops/qkv_rope_forward_backward", "projection, norm and RoPE of q, k and v, forward and backward"),
    Headline("head_ops/xsa_forward_backward", "attention less its part along v (XSA), forward and backward"),
    Headline("embedding/forward_backward", "embedding, forward and backward"),
    Headline("muon/update", "Muon's update"),
    Headline("stepped_lora/step", "linears with an adapter a document, and its step"),
    Headline("train_step/step", "training step", case="98304 tokens, loop on"),
    Headline("gptq/model", "GPTQ of a whole model"),
    Headline("gptq/matrix", "GPTQ of one matrix"),
    Headline("adapter_adamw/step", "AdamW over adapters"),
    Headline("residual/forward_backward", "residual sum and norm, forward and backward"),
    Headline("quantize/hessians", "Hessians of a model"),
    Headline("packing/byte_shuffle", "byte shuffle"),
    Headline("packing/codes", "coding of quantised weights", "brotli"),
    Headline("ngram/stream", "n-gram hints"),
    Headline("evaluate/whole_set", "test-time training of a validation set"),
)
