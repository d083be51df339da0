"""Quantises and packs the nn.Linear layers of any model: GPTQ codes of at most 6 bits, coded near their entropy.

The clip decides on size and error, the number of bits only bounds them: the published systems clip rows at 12.85 of
their standard deviations, which leaves codes of some three bits.
"""

from contextlib import ExitStack
from copy import deepcopy

import torch
from torch import Tensor, nn

from pgolf_kernels import GptqRecipe, decode_codes, encode_codes, gptq_quantize_many


def quantise_and_pack(
    model: nn.Module, batches: list[Tensor], *, bits: int, clip_sigmas: float
) -> tuple[bytes, dict[str, Tensor]]:
    """(the packed codes, the row scales of each matrix by its layer's name); batches are typical inputs of the model.

    Layers that are never called (nn.MultiheadAttention reads its out_proj's weight itself) stay as they are.
    """
    hessians: dict[nn.Module, Tensor] = {}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        hessians.setdefault(layer, x.new_zeros(x.shape[1], x.shape[1])).addmm_(x.T, x)

    with torch.no_grad(), ExitStack() as hooks:
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                hooks.enter_context(layer.register_forward_pre_hook(add))
        for batch in batches:
            model(batch)
    layers = {name: layer for name, layer in model.named_modules() if layer in hessians}
    weights = [layer.weight.detach() for layer in layers.values()]
    recipe = GptqRecipe(bits=bits, clip_sigmas=clip_sigmas)
    found = gptq_quantize_many(weights, [hessians[layer] for layer in layers.values()], recipe)
    packed = encode_codes([codes.cpu().numpy() for codes, _ in found])
    return packed, {name: scales for name, (_, scales) in zip(layers, found, strict=True)}


def load_packed(model: nn.Module, packed: bytes, scales: dict[str, Tensor]) -> None:
    """Puts the packed matrices into a model of the same layers."""
    with torch.no_grad():
        for (name, scale), codes in zip(scales.items(), decode_codes(packed), strict=True):
            model.get_submodule(name).weight.copy_(torch.from_numpy(codes).to(scale.device) * scale.float()[:, None])


def main() -> list[tuple[float, float]]:
    """(bits a weight, relative change of the output) by clip."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    mixing = torch.randn(64, 64) / 8  # correlated inputs, as real ones are
    inputs = [torch.randn(512, 64) @ mixing for _ in range(4)]
    test = torch.randn(512, 64) @ mixing
    expected = model(test)
    weights = sum(module.weight.numel() for module in model if isinstance(module, nn.Linear))
    results = []
    for clip_sigmas in (12.85, 4.0):
        quantised = deepcopy(model)
        packed, scales = quantise_and_pack(quantised, inputs, bits=6, clip_sigmas=clip_sigmas)
        load_packed(quantised, packed, scales)
        error = ((quantised(test) - expected).norm() / expected.norm()).item()
        bits = 8 * len(packed) / weights
        print(
            f"clipped at {clip_sigmas} sigma: {weights:,} weights in {len(packed):,} bytes, {bits:.2f} bits each; "
            f"output changed by {error:.1%}"
        )
        results.append((bits, error))
    return results


if __name__ == "__main__":
    main()
