"""N-gram tilt: a causal hint for the next token shifts the model's distribution towards it.

For a position with hint h and strength beta, every token's probability is multiplied by e^beta if it is h, and the
result is divided by its sum Z = 1 + p(h) (e^beta - 1):

    nll' = nll + ln Z - beta [target = h]

The hint and beta come from the tokens before the position alone, so the result is a distribution fixed before the
target is seen. p(h) is the model's own, from the same pass as the loss (pull request 1514).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.config import EvalConfig
from model.data.tokenizer import ByteTables
from model.errors import PgolfError
from pgolf_kernels import _native, ngram_hints

LOWEST_ORDER, HIGHEST_ORDER = 8, 16  # of the contexts in tokens


class Tilt:
    """Hints int64 [T] (-1: none) and betas float64 [T] of a stream, on a device."""

    def __init__(self, hints: np.ndarray, betas: np.ndarray, device: torch.device) -> None:
        if hints.shape != betas.shape or hints.ndim != 1:
            raise ValueError(f"hints, betas: got shapes {hints.shape} and {betas.shape}, wanted one entry a token each")
        self.hints = torch.from_numpy(np.asarray(hints, dtype=np.int64)).to(device)
        self.betas = torch.from_numpy(np.asarray(betas, dtype=np.float64)).to(device)

    def apply(self, nll: Tensor, log_p_hint: Tensor, targets: Tensor, token_index: Tensor) -> Tensor:
        """Tilted nll, float64 [n], of the tokens `token_index`; nll and log p(hint) [n] are the model's own."""
        hints, betas = self.hints[token_index], self.betas[token_index]
        p_hint = log_p_hint.double().exp().clamp(max=1.0)
        shift = torch.log1p(p_hint * torch.expm1(betas)) - betas * (targets == hints)
        return nll.double() + torch.where(hints >= 0, shift, 0.0)


def make_tilt(tokens: np.ndarray, config: EvalConfig, tables: ByteTables, device: torch.device) -> Tilt:
    """The tilt of a stream with the settings `ngram_*` of `config`.

    Hints are made on the CPU in one pass, by rank 0 alone: the tables take gigabytes. Raises PgolfError in a packed
    submission whose run does not use them.
    """
    ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if ranks and dist.get_rank() > 0:
        tilt = Tilt(np.empty(len(tokens), np.int64), np.empty(len(tokens)), device)
    else:
        tilt = _compute(tokens, config, tables, device)
    if ranks:
        dist.broadcast(tilt.hints, src=0)
        dist.broadcast(tilt.betas, src=0)
    return tilt


def _compute(tokens: np.ndarray, config: EvalConfig, tables: ByteTables, device: torch.device) -> Tilt:
    if not hasattr(_native, "ngram_hints_cpu"):
        raise PgolfError("n-gram hints: this submission was packed from a run that does not use them")
    hints, betas = ngram_hints(
        torch.from_numpy(tokens),
        orders=tuple(range(LOWEST_ORDER, HIGHEST_ORDER + 1, config.ngram_order_stride)),
        table_bits=config.ngram_table_bits,
        base_beta=config.ngram_base_beta,
        agree_bonus=config.ngram_agree_bonus,
        within_threshold=config.ngram_within_threshold,
        within_beta=config.ngram_within_beta,
        word_threshold=config.ngram_word_threshold,
        word_beta=config.ngram_word_beta,
        has_leading_space=torch.from_numpy(np.array(tables.has_leading_space)),
        is_boundary=torch.from_numpy(np.array(tables.is_boundary)),
        hash=config.ngram_hash,
    )
    return Tilt(hints.numpy(), betas.numpy(), device)
