"""Triton kernel of adapter_adamw.py: one read of p, g and v, one write of p and v."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pgolf_kernels._triton_op import pdl
from pgolf_kernels._triton_tile import wait_for_previous

BLOCK, WARPS = 1024, 4  # H200, 534.8 M parameters: 2.70 ms; 2 warps 3.20, 512 by 1 warp 3.19, 2048 by 4 warps 3.28


@triton.jit
def adamw(p, g, v, m, inverse1, inverse2, lr, beta1, rest1, beta2, rest2, eps, keep, MOMENT: tl.constexpr):
    """(p, v, m) after a step with the gradient g; m is not read without MOMENT. rest is 1 - beta, subtracted before
    beta was rounded to fp32: 1 - 0.999 would be off by 1e-5 of itself."""
    v = beta2 * v + rest2 * g * g
    if MOMENT:
        g = beta1 * m + rest1 * g
    return p * keep - lr * inverse1 * g / (tl.sqrt(v) * inverse2 + eps), v, g


@triton.jit(do_not_specialize=["total", "documents"])
def _step_kernel(
    p_ptr, g_ptr, v_ptr, m_ptr, factor_ptr, reset_ptr, total, inner, documents, lr, beta1, rest1, beta2, rest2, eps,
    keep, MOMENT: tl.constexpr, RESET: tl.constexpr, ZERO: tl.constexpr, UNIFORM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """UNIFORM: a block never spans two documents, so that idle documents cost nothing."""
    wait_for_previous(PDL)
    base = tl.program_id(0).to(tl.int64) * BLOCK
    i = base + tl.arange(0, BLOCK)
    mask = i < total
    document = (base // inner) % documents if UNIFORM else (i // inner) % documents
    inverse1 = tl.load(factor_ptr + 2 * document)
    # Compared as a vector: the interpreter turns a comparison of float scalars into a float.
    inverse2 = tl.load(factor_ptr + 2 * document + 1) + tl.zeros((BLOCK,), tl.float32)
    if RESET:
        flag = tl.load(reset_ptr + document)
        fresh = mask & (flag != 0)
        tl.store(v_ptr + i, tl.zeros((BLOCK,), tl.float32), mask=fresh)
        if MOMENT:
            tl.store(m_ptr + i, tl.zeros((BLOCK,), tl.float32), mask=fresh)
        if ZERO:
            tl.store(p_ptr + i, tl.zeros((BLOCK,), tl.float32), mask=fresh)
        mask = mask & (flag == 0)
    mask = mask & (inverse2 > 0)
    p = tl.load(p_ptr + i, mask=mask, other=0.0)
    g = tl.load(g_ptr + i, mask=mask, other=0.0)
    v = tl.load(v_ptr + i, mask=mask, other=0.0)
    m = g
    if MOMENT:
        m = tl.load(m_ptr + i, mask=mask, other=0.0)
    p, v, m = adamw(p, g, v, m, inverse1, inverse2, lr, beta1, rest1, beta2, rest2, eps, keep, MOMENT)
    if MOMENT:
        tl.store(m_ptr + i, m, mask=mask)
    tl.store(v_ptr + i, v, mask=mask)
    tl.store(p_ptr + i, p, mask=mask)


def step(
    p: Tensor, g: Tensor, v: Tensor, m: Tensor | None, factors: Tensor, reset: Tensor | None, zero: bool,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One parameter tensor [slots, documents, ...], in place."""
    inner = p.numel() // (p.shape[0] * p.shape[1])
    flags = None if reset is None else reset.contiguous().view(torch.uint8)
    with torch.cuda.device_of(p):
        _step_kernel[(triton.cdiv(p.numel(), BLOCK),)](
            p, g, v, m, factors, flags, p.numel(), inner, p.shape[1],
            lr, beta1, 1.0 - beta1, beta2, 1.0 - beta2, eps, 1.0 - lr * weight_decay,
            MOMENT=m is not None, RESET=reset is not None, ZERO=zero, UNIFORM=inner % BLOCK == 0, BLOCK=BLOCK,
            num_warps=WARPS, **pdl(p),
        )  # fmt: skip
