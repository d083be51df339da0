"""State dicts of the reference systems, into ours and back.

Pull requests 1413, 1514 and 1499 keep a matrix per projection ("blocks.3.attn.c_q.weight"), 1530 and 1727 stacked
banks; ours stacks everything (model/gpt.py). Both directions are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.errors import ArtifactError
from model.gpt import GPT

# Our parameter -> (per-block name of the reference, first layer that has one).
_PER_BLOCK = {
    "q_gain": ("attn.q_gain", 0),
    "attn_scale": ("attn_scale", 0),
    "mlp_scale": ("mlp_scale", 0),
    "resid_mix": ("resid_mix", 0),
    "v_lambda": ("attn.v_lambda", 1),
    "hidden_gain": ("mlp.hidden_gain", 0),
}
# Our parameter -> name of the reference's whole tensor.
_WHOLE = {
    "tok_emb": "tok_emb.weight",
    "skip_weights": "skip_weights",
    "skip_gates": "skip_gates",
    "lane_mix": "parallel_post_lambdas",
    "lane_resid": "parallel_resid_lambdas",
    "bigram_embed": "bigram.embed.weight",
    "bigram_proj": "bigram.proj.weight",
    "bigram_scale": "bigram.scale",
    "smear": "smear.gate",
}
# Our bank -> per-block matrices of the reference, stacked one after the other; and the name of its bank.
_BANKS = {
    "qo_bank": (("attn.c_q.weight", "attn.proj.weight"), "qo_bank"),
    "kv_bank": (("attn.c_k.weight", "attn.c_v.weight"), "kv_bank"),
    "up_bank": (("mlp.fc.weight",), "mlp_up_bank"),
    "down_bank": (("mlp.proj.weight",), "mlp_down_bank"),
}


def _parameter_names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in GPT(config).named_parameters()]


def from_reference(state_dict: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of ours from one with the reference systems' names, banked or not.

    Raises ArtifactError naming a tensor that is missing, or that is there and has no place in `config`.
    """
    source = dict(state_dict)

    def take(name: str) -> Tensor:
        if name not in source:
            raise ArtifactError(
                f"state dict: tensor {name!r} is missing; wanted one for each parameter of the configuration"
            )
        return source.pop(name)

    banked = "qo_bank" in source
    result = {}
    for name in _parameter_names(config):
        if name in _BANKS:
            matrices, bank = _BANKS[name]
            if banked:
                result[name] = take(bank)
            else:
                result[name] = torch.stack(
                    [take(f"blocks.{i}.{m}") for m in matrices for i in range(config.num_layers)]
                )
        elif name in _PER_BLOCK:
            suffix, first = _PER_BLOCK[name]
            result[name] = torch.stack([take(f"blocks.{i}.{suffix}") for i in range(first, config.num_layers)])
        else:
            result[name] = take(_WHOLE[name])
    if source:
        raise ArtifactError(f"state dict: no place for {', '.join(sorted(source))} in this configuration")
    return result


def to_reference(state_dict: dict[str, Tensor], config: ModelConfig, *, banked: bool) -> dict[str, Tensor]:
    """The inverse of `from_reference`; `banked` as in pull requests 1530 and 1727."""
    result = {}
    for name in _parameter_names(config):
        if name not in state_dict:
            raise ArtifactError(f"state dict: parameter {name!r} is missing")
        tensor = state_dict[name]
        if name in _BANKS:
            matrices, bank = _BANKS[name]
            if banked:
                result[bank] = tensor
            else:
                for position, matrix in enumerate(matrices):
                    for i in range(config.num_layers):
                        result[f"blocks.{i}.{matrix}"] = tensor[position * config.num_layers + i]
        elif name in _PER_BLOCK:
            suffix, first = _PER_BLOCK[name]
            for i in range(first, config.num_layers):
                result[f"blocks.{i}.{suffix}"] = tensor[i - first]
        else:
            result[_WHOLE[name]] = tensor
    return result
