"""From trained weights to codes: Hessians of every matrix in one pass, then GPTQ of the whole model.

    H = (1/n) sum over n batches of x^T x         x [tokens, C]: the inputs of a matrix, summed over loop passes

(1/tokens for the recipe of pull request 1499). Query, key and value share one Hessian. Ranks calibrate on different
batches and their sums are reduced: the public systems calibrate on every rank and keep rank 0's (openai/parameter-golf
pull requests 1413, 1514, 1530, 1727).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.config import QuantConfig
from model.data.loaders import Batch
from model.errors import ConfigError
from model.gpt import GPT
from model.quantized import PlainTensor, QuantizedMatrix, QuantizedModel
from pgolf_kernels.gptq import GptqRecipe, gptq_quantize_many

PRUNE_MIN_ELEMENTS = 65536
_SMALLEST_SCALE = torch.finfo(torch.float16).tiny


class HessianSums:
    """Running sums of x^T x by matrix name, for `GPT.hidden(collect=...)`.

    On CUDA the products are bf16 with fp32 accumulation; elsewhere they are in the inputs' precision, at least fp32.
    Matrices that share an input share one sum.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}

    def __call__(self, names: tuple[str, ...], x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.is_cuda:
            rows = rows.to(torch.bfloat16)
            if names in self.sums:
                total = self.sums[names]
                torch.addmm(total, rows.mT, rows, out_dtype=torch.float32, out=total)
            else:
                self.sums[names] = torch.mm(rows.mT, rows, out_dtype=torch.float32)
            return
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if names in self.sums:
            self.sums[names].addmm_(rows.mT, rows)
        else:
            self.sums[names] = rows.mT @ rows

    def by_name(self, divisor: float) -> dict[str, Tensor]:
        """Sums divided by `divisor`; names that share an input get the same tensor."""
        result = {}
        for names, total in self.sums.items():
            mean = total / divisor
            result.update(dict.fromkeys(names, mean))
        return result


@torch.no_grad()
def collect_hessians(
    model: GPT, batches: Iterable[Batch], *, loop: bool = True, per_token: bool = False
) -> dict[str, Tensor]:
    """Hessian [C, C] of each matrix by name (`GPT.matrix_names`), fp32, averaged over the batches of all ranks.

    `loop` as in `GPT.hidden`; `per_token` divides by the number of tokens instead of batches. With torch.distributed
    initialised the sums of all ranks are added; every rank then holds the same Hessians. Raises ConfigError when there
    is no batch.
    """
    collect = HessianSums()
    was_training = model.training
    model.eval()
    count = 0
    for batch in batches:
        model.hidden(batch.inputs, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, loop=loop, collect=collect)
        count += batch.inputs.numel() if per_token else 1
    model.train(was_training)
    if count == 0:
        raise ConfigError("calibration_batches: got 0, wanted at least 1")
    if dist.is_available() and dist.is_initialized():
        count = _all_reduce(list(collect.sums.values()), count)
    return collect.by_name(count)


def _all_reduce(sums: list[Tensor], count: int) -> int:
    """Adds the sums of all ranks in place and returns the sum of their counts."""
    for total in sums:
        dist.all_reduce(total)
    counter = torch.tensor(count, dtype=torch.int64, device=sums[0].device)
    dist.all_reduce(counter)
    return int(counter)


@torch.no_grad()
def quantize_with_hessians(
    model: GPT, quant: QuantConfig, hessians: dict[str, Tensor], device: torch.device | str | None = None
) -> QuantizedModel:
    """Quantises every matrix by `quant`, with its Hessian by name; the rest becomes fp16.

    device: where GPTQ runs (None: the model's). The model is not changed. Raises ConfigError for a name in `keep_fp16`
    that is no matrix, ValueError for weights or Hessians that are not finite.
    """
    parameters = dict(model.named_parameters())
    device = torch.device(device) if device is not None else model.tok_emb.device
    places = model.matrix_names()
    unknown = sorted(set(quant.keep_fp16) - {name for name, _, _ in places})
    if unknown:
        raise ConfigError(f"keep_fp16: got {unknown[0]!r}, wanted names of matrices such as 'blocks.0.attn.q'")
    kept, coded = [], []
    for name, parameter, index in places:
        weight = parameters[parameter] if index is None else parameters[parameter][index]
        weight = prune_smallest(weight.detach(), quant.prune_fraction)
        if name in quant.keep_fp16:
            kept.append(PlainTensor(name, parameter, index, weight.to(torch.float16)))
        else:
            coded.append((name, parameter, index, weight.to(device)))
    recipes = [recipe_of(name, quant) for name, *_ in coded]
    # One copy of a shared Hessian, so that it is factorised once.
    moved = {hessian: hessian.to(device) for hessian in {hessians[name] for name, *_ in coded}}
    matrices = [moved[hessians[name]] for name, *_ in coded]
    results = gptq_quantize_many([weight for *_, weight in coded], matrices, recipes)
    quantized = [
        QuantizedMatrix(name, parameter, index, recipe.bits, codes.cpu(), scales.cpu())
        for (name, parameter, index, _), recipe, (codes, scales) in zip(coded, recipes, results, strict=True)
    ]
    banks = {parameter for _, parameter, _ in places}
    for name, tensor in parameters.items():
        if name in banks:
            continue
        if quant.quant_recipe == "pr1499" and name == "bigram_embed":
            pruned = prune_smallest(tensor.detach(), quant.prune_fraction)
            quantized.append(
                QuantizedMatrix(name, name, None, quant.matrix_bits, *round_rows(pruned, quant.matrix_bits))
            )
        else:
            kept.append(PlainTensor(name, name, None, tensor.detach().to(torch.float16).cpu()))
    quantized.sort(key=lambda matrix: _storage_order(matrix.name))
    result = QuantizedModel(tuple(quantized), tuple(dataclasses.replace(t, value=t.value.cpu()) for t in kept))
    return sort_hidden_units(result) if quant.sort_hidden_units else result


def recipe_of(name: str, quant: QuantConfig) -> GptqRecipe:
    """The GPTQ settings of a matrix, by its class: embedding, MLP, or attention."""
    if name == "tok_emb":
        bits, sigmas = quant.embed_bits, quant.embed_clip_sigmas
    elif ".mlp." in name:
        bits, sigmas = quant.mlp_bits, quant.mlp_clip_sigmas
    else:
        bits, sigmas = quant.matrix_bits, quant.attn_clip_sigmas
    recipe = GptqRecipe.pr1499(bits, sigmas) if quant.quant_recipe == "pr1499" else GptqRecipe(bits, sigmas)
    return dataclasses.replace(
        recipe, scale_rule=quant.clip_rule, damping=quant.gptq_damping, block_size=quant.gptq_block_size
    )


def prune_smallest(weight: Tensor, fraction: float) -> Tensor:
    """`weight` with entries below the `fraction` quantile of |weight| set to zero (pull request 1499).

    Only matrices of more than 65,536 elements are pruned; others, and fraction 0, come back as they are.
    """
    if fraction == 0 or weight.numel() <= PRUNE_MIN_ELEMENTS:
        return weight
    magnitudes = weight.abs().float().flatten()
    place = fraction * (magnitudes.numel() - 1)
    low = magnitudes.kthvalue(int(place) + 1).values
    high = magnitudes.kthvalue(min(int(place) + 2, magnitudes.numel())).values
    threshold = torch.lerp(low, high, place - int(place))
    return weight.masked_fill(weight.abs() < threshold, 0.0)


def round_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round to nearest with absmax scales: codes int8 [R, C] in -2^(bits-1) .. 2^(bits-1) - 1, scales fp16 [R].

    scale = max |row| / R, R = 2^(bits-1) - 1, at least fp16's smallest normal number (pull request 1499's quantiser of
    tensors without a Hessian).
    """
    limit = 2 ** (bits - 1) - 1
    rows = weight.float()
    scales = (rows.abs().amax(dim=1) / limit).clamp_min(1e-12).to(torch.float16).clamp_min(_SMALLEST_SCALE)
    codes = (rows / scales.float()[:, None]).round().clamp(-limit - 1, limit).to(torch.int8)
    return codes.cpu(), scales.cpu()


def sort_hidden_units(quantized: QuantizedModel) -> QuantizedModel:
    """The same network with each MLP's hidden units in ascending order of their up-projection's scale.

    The order of hidden units has no meaning: up-projection rows, down-projection columns and hidden gains move together
    and the function stays, up to the order of summation. Sorted scales cost a bit or two each instead of about eight,
    some 20 kB for 11 layers of 2048 units. Layers with a matrix that is not quantised stay as they are.
    """
    matrices = {matrix.name: matrix for matrix in quantized.matrices}
    tensors = {tensor.name: tensor for tensor in quantized.tensors}
    for name, up in list(matrices.items()):
        down_name = name.removesuffix("up") + "down"
        if not name.endswith(".mlp.up") or down_name not in matrices:
            continue
        order = torch.argsort(up.scales.float(), stable=True)
        down = matrices[down_name]
        matrices[name] = dataclasses.replace(up, codes=up.codes[order], scales=up.scales[order])
        matrices[down_name] = dataclasses.replace(down, codes=down.codes[:, order].contiguous())
        if "hidden_gain" in tensors:
            gain = tensors["hidden_gain"].value.clone()
            gain[up.index] = gain[up.index][order]
            tensors["hidden_gain"] = dataclasses.replace(tensors["hidden_gain"], value=gain)
    return QuantizedModel(tuple(matrices.values()), tuple(tensors.values()))


def _storage_order(name: str) -> tuple[Any, ...]:
    """Matrices of one kind side by side, layer by layer: the entropy coder learns from the one before."""
    parts = name.split(".")
    return (0, parts[2:], int(parts[1])) if parts[0] == "blocks" else (1, parts, 0)
