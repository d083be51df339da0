"""A HuggingFace causal language model's loss without its logits: one call, less memory, the same number.

Works on a model with `model.model` (gives last_hidden_state), `model.lm_head` and a config, as many of transformers
have. Without transformers installed a small class of the same interface is used.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pgolf_kernels import linear_softcap_cross_entropy


def causal_lm_loss(model: nn.Module, input_ids: Tensor) -> Tensor:
    """What `model(input_ids=input_ids, labels=input_ids).loss` computes, for input_ids [B, T]."""
    hidden = model.model(input_ids=input_ids).last_hidden_state[:, :-1].flatten(0, 1)
    softcap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2 has one, most models have none
    return linear_softcap_cross_entropy(hidden, model.lm_head.weight, input_ids[:, 1:].flatten(), softcap=softcap)


class Backbone(nn.Module):
    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.embed_tokens, self.rnn = nn.Embedding(vocab, width), nn.GRU(width, width, batch_first=True)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.rnn(self.embed_tokens(input_ids))[0])


class CausalLM(nn.Module):
    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(final_logit_softcapping=30.0)
        self.model, self.lm_head = Backbone(vocab, width), nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = 30.0 * torch.tanh(self.lm_head(self.model(input_ids).last_hidden_state[:, :-1]) / 30.0)
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


def build_model() -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return CausalLM(vocab=512, width=64)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2))


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    model, input_ids = build_model(), torch.randint(512, (4, 33))
    loss = causal_lm_loss(model, input_ids)
    loss.backward()  # gradients of every parameter, the head's included
    ours, theirs = loss.item(), model(input_ids=input_ids, labels=input_ids).loss.item()
    print(f"{type(model).__name__}: {ours:.6f} here, {theirs:.6f} by its own forward")
    return ours, theirs


if __name__ == "__main__":
    main()
