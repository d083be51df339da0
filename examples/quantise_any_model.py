"""Quantises and packs the nn.Linear layers of any model: GPTQ codes of 6 bits, coded near their entropy."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pgolf_kernels import GptqRecipe, decode_codes, encode_codes, gptq_quantize_many


def quantise_and_pack(model: nn.Module, batches: list[Tensor], bits: int) -> tuple[bytes, list[Tensor]]:
    """(the packed codes, a scale for each row of each matrix); batches are typical inputs of the model."""
    hessians = {m: torch.zeros(m.in_features, m.in_features) for m in model.modules() if isinstance(m, nn.Linear)}

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer in hessians:
            x = inputs[0].flatten(0, -2)
            hessians[layer].addmm_(x.T, x)

    with torch.no_grad(), register_module_forward_pre_hook(add):
        for batch in batches:
            model(batch)
    found = gptq_quantize_many([m.weight.detach() for m in hessians], list(hessians.values()), GptqRecipe(bits=bits))
    return encode_codes([codes.numpy() for codes, _ in found]), [scales for _, scales in found]


def load_packed(model: nn.Module, packed: bytes, scales: list[Tensor]) -> None:
    """Puts the packed matrices into a model of the same layers."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for layer, codes, scale in zip(layers, decode_codes(packed), scales, strict=True):
            layer.weight.copy_(torch.from_numpy(codes) * scale.float()[:, None])


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    mixing = torch.randn(64, 64) / 8  # correlated inputs, as real ones are
    inputs = [torch.randn(512, 64) @ mixing for _ in range(4)]
    test = torch.randn(512, 64) @ mixing
    expected = model(test)
    packed, scales = quantise_and_pack(model, inputs, bits=6)
    weights = sum(module.weight.numel() for module in model if isinstance(module, nn.Linear))
    load_packed(model, packed, scales)
    error = ((model(test) - expected).norm() / expected.norm()).item()
    bits = 8 * len(packed) / weights
    print(f"{weights:,} weights in {len(packed):,} bytes, {bits:.2f} bits each; output changed by {error:.1%}")
    return bits, error


if __name__ == "__main__":
    main()
