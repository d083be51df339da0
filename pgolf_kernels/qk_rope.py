"""Queries and keys made ready for attention: RMS norm a head, rotary embedding, gain a query head; one pass.

    n = x / sqrt(mean_d(x^2) + eps)
    r = [n1 cos + n2 sin, -n1 sin + n2 cos, n_rest],   n1 and n2 the halves of the first `2 P` dimensions
    q' = gain[h] r(q),   k' = r(k)

q [N, H, d], k [N, Hkv, d], gain [H], cos and sin [T, P]: row i takes position i mod T, so a batch of equal rows shares
one table. With g = dq', t = gain * R^T g (R^T turns back) and s = 1 / sqrt(mean + eps):

    dq = s (t - n mean_d(n t)),     dgain[h] = sum_i g . r(q)

All inside in fp32 (fp64 for fp64), one rounding at the end: the public systems round to bf16 after each of the three
steps. `qk_rope_readers` returns keys and values once for each reader and adds the readers' gradients in the same pass.
`qkv_rope` does so from the block's input on: q, k and v are one matrix product on a GPU, in which bfloat16 heads are
normed and turned before they are written, and the backward writes the three gradients side by side, so that dx and dW
are one product each. It then has r(q) and s, of the formula above, where others compute them again from q: with the
rotation as a whole taken back last, dq = s gain R^T (g - r mean_d(g r)).
Source: pull requests 1413, 1514, 1530, 1727.
"""

from __future__ import annotations

from typing import Any

import torch

from pgolf_kernels._native_op import register_op
from pgolf_kernels._triton_op import kernels, runs_narrow_triton, runs_triton

EPS = torch.finfo(torch.float32).eps  # torch's rms_norm takes this for eps=None in bfloat16 as well


def reference(
    q: torch.Tensor, k: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float = EPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in PyTorch, differentiable; q and k [..., T, heads, d]."""

    def rotate(x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=eps)
        pairs = cos.shape[-1]
        first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
        c, s = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
        return torch.cat([first * c + second * s, second * c - first * s, rest], dim=-1)

    return rotate(q) * gain.to(q.dtype).unsqueeze(-1), rotate(k)


# ---- op --------------------------------------------------------------------------------------------------------------


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """The rotation of [N, heads, d] (sign 1) or its transpose (sign -1)."""
    repeats = x.shape[0] // max(cos.shape[0], 1)
    c, s = (t.to(x.dtype).repeat(repeats, 1).unsqueeze(1) for t in (cos, sign * sin))
    pairs = cos.shape[1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * c + second * s, second * c - first * s, rest], dim=-1)


def _normed(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return wide * inverse, inverse


def _forward(
    q: torch.Tensor, k: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_triton(q) and q.numel() and k.numel():
        return kernels("qk_rope").forward(q, k, gain, cos, sin, eps)
    turned_q, turned_k = (_turn(_normed(x, eps)[0], cos, sin, 1.0) for x in (q, k))
    return (turned_q * gain.to(turned_q.dtype).unsqueeze(-1)).to(q.dtype), turned_k.to(k.dtype)


def _backward_kernel(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    gain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs_triton(q) and q.numel() and k.numel():
        return kernels("qk_rope").backward(grad_q, grad_k, q, k, gain, cos, sin, eps)

    def through_norm(turned_back: torch.Tensor, normed: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        return inverse * (turned_back - normed * (normed * turned_back).mean(-1, keepdim=True))

    (n_q, inverse_q), (n_k, inverse_k) = _normed(q, eps), _normed(k, eps)
    back_q = _turn(grad_q.to(n_q.dtype), cos, sin, -1.0)
    back_k = _turn(grad_k.to(n_k.dtype), cos, sin, -1.0)
    d_gain = (back_q * n_q).sum((0, 2))
    d_q = through_norm(back_q * gain.to(n_q.dtype).unsqueeze(-1), n_q, inverse_q)
    return d_q.to(q.dtype), through_norm(back_k, n_k, inverse_k).to(k.dtype), d_gain.to(gain.dtype)


def _backward_into(
    targets: tuple[torch.Tensor, ...],
    grad_q: torch.Tensor,
    grad_ks: list[torch.Tensor],
    grad_vs: list[torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    gain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    wants_gain: bool,
    inverse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Writes the gradients of q, of k and of v, the `targets`, from those of all their readers; returns gain's, empty
    if it is not wanted. With `inverse`, of the norms, q and k are what the forward pass made of them."""
    if runs_triton(q) and q.numel() and k.numel():
        tensors = (grad_q, grad_ks, grad_vs, q, k, gain, cos, sin)
        return kernels("qk_rope").backward_into(*tensors, eps, *targets, wants_gain, inverse)
    grad_k, grad_v = (torch.stack(grads).sum(0) if len(grads) > 1 else grads[0] for grads in (grad_ks, grad_vs))
    *found, d_gain = _backward_kernel(grad_q, grad_k, q, k, gain, cos, sin, eps)
    for target, value in zip(targets, (*found, grad_v), strict=True):
        target.copy_(value)
    return d_gain if wants_gain else gain.new_empty(0)


_backward_op = register_op(
    "qk_rope_backward(Tensor grad_q, Tensor grad_k, Tensor q, Tensor k, Tensor gain, Tensor cos, Tensor sin, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _backward_kernel,
    fake=lambda grad_q, grad_k, q, k, gain, cos, sin, eps: tuple(t.new_empty(t.shape) for t in (q, k, gain)),
    not_differentiable="double backward is not supported",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[Any, ...]:
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        raise RuntimeError("pgolf::qk_rope: cos and sin are not differentiable")
    return *_backward_op(grad_q, grad_k, *ctx.saved_tensors, ctx.eps), None, None, None


_forward_op = register_op(
    "qk_rope(Tensor q, Tensor k, Tensor gain, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    _forward,
    fake=lambda q, k, gain, cos, sin, eps: (q.new_empty(q.shape), k.new_empty(k.shape)),
    backward=_backward,
    setup_context=_setup_context,
)


# ---- for several readers ---------------------------------------------------------------------------------------------


def _readers_backward_kernel(
    grad_q: torch.Tensor, grad_ks: list[torch.Tensor], grad_vs: list[torch.Tensor], q: torch.Tensor, k: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v and gain, which is empty if it is not wanted."""
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, k))
    return d_q, d_k, d_v, _backward_into((d_q, d_k, d_v), grad_q, grad_ks, grad_vs, q, k, *rest)


_readers_backward_op = register_op(
    "qk_rope_readers_backward(Tensor grad_q, Tensor[] grad_ks, Tensor[] grad_vs, Tensor q, Tensor k, Tensor gain,"
    " Tensor cos, Tensor sin, float eps, bool wants_gain) -> (Tensor, Tensor, Tensor, Tensor)",
    _readers_backward_kernel,
    fake=lambda grad_q, grad_ks, grad_vs, q, k, gain, cos, sin, eps, wants_gain: (
        *(t.new_empty(t.shape) for t in (q, k, k)),
        gain.new_empty(gain.shape if wants_gain else (0,)),
    ),
    not_differentiable="double backward is not supported",
)


def _aliases(k: torch.Tensor, v: torch.Tensor, key_readers: int, value_readers: int) -> list[torch.Tensor]:
    """Keys as often as they are read, then values."""
    return [t.view_as(t) for t, readers in ((k, key_readers), (v, value_readers)) for _ in range(readers)]


def _of_readers(
    grads: tuple[torch.Tensor | None, ...], key_readers: int, like: list[torch.Tensor]
) -> tuple[list[torch.Tensor], ...]:
    """Gradients of (q, keys, values) from those of all aliases; zeros like q, k and v where no reader sends any."""
    parts = grads[:1], grads[1 : 1 + key_readers], grads[1 + key_readers :]
    return tuple(
        [grad for grad in part if grad is not None] or [torch.zeros_like(t, memory_format=torch.contiguous_format)]
        for part, t in zip(parts, like, strict=True)
    )


class _RopeReaders(torch.autograd.Function):
    """The op with keys and values for several readers, which an op's schema cannot say."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gain: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        eps: float,
        key_readers: int,
        value_readers: int,
    ) -> tuple[torch.Tensor, ...]:
        out_q, out_k = _forward_op(q, k, gain, cos, sin, eps)
        ctx.save_for_backward(q, k, gain, cos, sin)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.key_readers = eps, key_readers
        return out_q, *_aliases(out_k, v, key_readers, value_readers)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.needs_input_grad[4] or ctx.needs_input_grad[5]:
            raise RuntimeError("pgolf::qk_rope: cos and sin are not differentiable")
        q, k, *_ = ctx.saved_tensors
        (grad_q,), grad_ks, grad_vs = _of_readers(grads, ctx.key_readers, [q, k, k])
        wants_gain = ctx.needs_input_grad[3]
        *grads, d_gain = _readers_backward_op(grad_q, grad_ks, grad_vs, *ctx.saved_tensors, ctx.eps, wants_gain)
        return *grads, d_gain if wants_gain else None, *(None,) * 5


# ---- with the projections --------------------------------------------------------------------------------------------


def _project(
    x: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_heads: int,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """(q', k', the three projections side by side, an empty tensor), or from one kernel
    (two empty tensors, q', k' and v side by side, 1 / norms of queries and keys)."""
    if _in_one_kernel(x, weight, gain, cos, kv_heads):
        empty = x.new_empty(0), x.new_empty(0)
        return *empty, *kernels("qkv_rope").project(x, weight, gain, cos, sin, kv_heads, eps)
    if runs_triton(x) and x.numel():
        raw = x @ weight.t()
    else:
        # Three products: a single one may round otherwise on some processors, and adapters need them apart.
        raw = torch.cat([x @ part.t() for part in split_projections(weight, gain.numel(), kv_heads)], 1)
    q, k, _ = split_heads(raw, gain.numel(), kv_heads)
    return *_forward(q, k, gain, cos, sin, eps), raw, gain.new_empty(0, dtype=torch.float32)


def _in_one_kernel(x: torch.Tensor, weight: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, kv_heads: int) -> bool:
    return (
        runs_narrow_triton(x)
        and x.numel() > 0
        and kernels("qkv_rope").takes(x, weight, gain.numel(), kv_heads, cos.shape[1])
    )


def split_heads(raw: torch.Tensor, heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """q [N, H, d], k and v [N, Hkv, d] of raw [N, (H + 2 Hkv) d]: views."""
    dim = raw.shape[1] // (heads + 2 * kv_heads)
    return raw.view(raw.shape[0], heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], dim=1)


def split_projections(
    weight: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of q, of k and of v in weight [(H + 2 Hkv) d, D]: views."""
    dim = weight.shape[0] // (heads + 2 * kv_heads)
    w_q, w_k, w_v = weight.split([heads * dim, kv_heads * dim, kv_heads * dim])
    return w_q, w_k, w_v


def _project_fake(x, weight, gain, cos, sin, kv_heads, eps):
    heads, rows = gain.shape[0], x.shape[0]
    dim = weight.shape[0] // (heads + 2 * kv_heads)
    raw, empty = x.new_empty((rows, weight.shape[0])), x.new_empty(0, dtype=torch.float32)
    if _in_one_kernel(x, weight, gain, cos, kv_heads):
        return x.new_empty(0), x.new_empty(0), raw, empty.new_empty((rows, heads + kv_heads))
    return x.new_empty((rows, heads, dim)), x.new_empty((rows, kv_heads, dim)), raw, empty


def _project_backward_kernel(
    grad_q: torch.Tensor,
    grad_ks: list[torch.Tensor],
    grad_vs: list[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    raw: torch.Tensor,
    inverse: torch.Tensor,
    gain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dW, dgain); what is not wanted is empty. raw and inverse: what `_project` gave."""
    heads, kv_heads = grad_q.shape[1], grad_ks[0].shape[1]
    q, k, _ = split_heads(raw, heads, kv_heads)
    d_raw = torch.empty_like(raw)
    d_heads = split_heads(d_raw, heads, kv_heads)
    norms = inverse if inverse.numel() else None
    d_gain = _backward_into(d_heads, grad_q, grad_ks, grad_vs, q, k, gain, cos, sin, eps, wanted[2], norms)
    d_x = d_raw @ weight if wanted[0] else x.new_empty(0)
    return d_x, d_raw.t() @ x if wanted[1] else x.new_empty(0), d_gain


_project_backward_op = register_op(
    "qkv_rope_backward(Tensor grad_q, Tensor[] grad_ks, Tensor[] grad_vs, Tensor x, Tensor weight, Tensor raw,"
    " Tensor inverse, Tensor gain, Tensor cos, Tensor sin, float eps, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _project_backward_kernel,
    fake=lambda grad_q, grad_ks, grad_vs, x, weight, raw, inverse, gain, cos, sin, eps, wanted: tuple(
        t.new_empty(t.shape if want else (0,)) for t, want in zip((x, weight, gain), wanted, strict=True)
    ),
    not_differentiable="double backward is not supported",
)

_project_op = register_op(
    "qkv_rope(Tensor x, Tensor weight, Tensor gain, Tensor cos, Tensor sin, int kv_heads, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _project,
    fake=_project_fake,
    not_differentiable="its values are a part of one result: pgolf_kernels.qkv_rope differentiates",
)


class _QkvRope(torch.autograd.Function):
    """The op with views of what is saved, keys and values for several readers: an op's schema can say neither."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        gain: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        kv_heads: int,
        eps: float,
        key_readers: int,
        value_readers: int,
    ) -> tuple[torch.Tensor, ...]:
        q, k, raw, inverse = _project_op(x, weight, gain, cos, sin, kv_heads, eps)
        ctx.save_for_backward(x, weight, raw, inverse, gain, cos, sin)
        ctx.set_materialize_grads(False)
        ctx.kv_heads, ctx.eps, ctx.key_readers = kv_heads, eps, key_readers
        own_q, own_k, v = split_heads(raw, gain.numel(), kv_heads)
        if inverse.numel():
            q, k = own_q, own_k
        return q, *_aliases(k, v, key_readers, value_readers)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            raise RuntimeError("pgolf::qkv_rope: cos and sin are not differentiable")
        _, _, raw, _, gain, *_ = ctx.saved_tensors
        heads = split_heads(raw, gain.numel(), ctx.kv_heads)
        (grad_q,), grad_ks, grad_vs = _of_readers(grads, ctx.key_readers, list(heads))
        wanted = list(ctx.needs_input_grad[:3])
        results = _project_backward_op(grad_q, grad_ks, grad_vs, *ctx.saved_tensors, ctx.eps, wanted)
        return *(d if want else None for d, want in zip(results, wanted, strict=True)), *(None,) * 6


# ---- public functions ------------------------------------------------------------------------------------------------


def qkv_rope(
    x: torch.Tensor,
    weight: torch.Tensor,
    gain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    kv_heads: int,
    key_readers: int = 1,
    value_readers: int = 1,
    eps: float = EPS,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(q', ks, vs) from the input of the projections: `qk_rope` of x W_q^T and x W_k^T, and x W_v^T.

    x [..., T, D]; weight [(H + 2 kv_heads) d, D] in x's dtype: W_q, W_k and W_v one below the other; gain [H], cos and
    sin as in :func:`qk_rope`.
    Returns q' [..., T, H, d], and k' and v [..., T, Hkv, d] as often as they will be read: the gradients of all readers
    are added within this function's backward kernel. v is a strided view of all three projections, and so are q' and k'
    where one kernel does it all: none may be written to. There, in bfloat16 on a GPU, a gain of 0 counts as 1e-12, so
    that the backward pass can divide by it. Raises ValueError for shapes, TypeError for dtypes.
    """
    _check_readers(key_readers, value_readers)
    if gain.dim() != 1 or gain.numel() == 0:
        raise ValueError(f"gain: got shape {tuple(gain.shape)}, wanted one a query head")
    if kv_heads < 1:
        raise ValueError(f"kv_heads: got {kv_heads}, wanted at least 1")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted [..., T, D]")
    heads = gain.numel() + 2 * kv_heads
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] % heads or weight.shape[0] == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, wanted [{heads} d, {x.shape[-1]}]")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise TypeError(f"weight: got {weight.dtype} on {weight.device}, wanted x's {x.dtype} on {x.device}")
    head_dim = weight.shape[0] // heads
    if cos.dim() != 2 or cos.shape[0] != x.shape[-2] or 2 * cos.shape[1] > head_dim:
        raise ValueError(f"cos: got shape {tuple(cos.shape)}, wanted [{x.shape[-2]}, P] with 2 P at most {head_dim}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin: got shape {tuple(sin.shape)}, wanted cos's {tuple(cos.shape)}")
    _check_tables(x, gain=gain, cos=cos, sin=sin)
    flat = x.reshape(-1, x.shape[-1])
    results = _QkvRope.apply(flat, weight, gain, cos, sin, kv_heads, float(eps), key_readers, value_readers)
    q, *aliases = (t.view(*x.shape[:-1], *t.shape[1:]) for t in results)
    return q, tuple(aliases[:key_readers]), tuple(aliases[key_readers:])


def qk_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    gain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    eps: float = EPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm, rotary embedding and query gain of q [..., T, H, d] and k [..., T, Hkv, d]; see the module's docstring.

    gain [H]; cos and sin [T, P] with 2 P <= d, in any floating-point dtype (fp32 for 16-bit q); P may be 0. Returns
    (q', k') in q's and k's shapes and dtype. Raises ValueError for shapes and devices, TypeError for dtypes.
    """
    _check(q, k, gain, cos, sin)
    flat_q, flat_k = q.flatten(0, -3), k.flatten(0, -3)
    out_q, out_k = _forward_op(flat_q, flat_k, gain, cos, sin, float(eps))
    return out_q.view(q.shape), out_k.view(k.shape)


def qk_rope_readers(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gain: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    key_readers: int = 1,
    value_readers: int = 1,
    eps: float = EPS,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """(q', ks, vs): :func:`qk_rope` with k' and v as often as they will be read, as :func:`qkv_rope` returns them.

    v has k's shape, dtype and device. The gradients of all readers are added within this function's backward kernel.
    Raises ValueError for shapes and devices, TypeError for dtypes.
    """
    _check_readers(key_readers, value_readers)
    _check(q, k, gain, cos, sin)
    if v.shape != k.shape or v.device != k.device:
        raise ValueError(f"v: got shape {tuple(v.shape)} on {v.device}, wanted k's {tuple(k.shape)} on {k.device}")
    if v.dtype != k.dtype:
        raise TypeError(f"v: got {v.dtype}, wanted k's {k.dtype}")
    flat = (t.flatten(0, -3) for t in (q, k, v))
    out_q, *aliases = _RopeReaders.apply(*flat, gain, cos, sin, float(eps), key_readers, value_readers)
    aliases = [t.view(k.shape) for t in aliases]
    return out_q.view(q.shape), tuple(aliases[:key_readers]), tuple(aliases[key_readers:])


def _check_readers(key_readers: int, value_readers: int) -> None:
    if min(key_readers, value_readers) < 1:
        raise ValueError(f"key_readers, value_readers: got {key_readers} and {value_readers}, wanted at least 1")


def _check(q: torch.Tensor, k: torch.Tensor, gain: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    if q.dim() < 3:
        raise ValueError(f"q: got shape {tuple(q.shape)}, wanted [..., T, H, d]")
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: got shape {tuple(k.shape)}, wanted [..., T, Hkv, d] beside q's {tuple(q.shape)}")
    if gain.shape != q.shape[-2:-1]:
        raise ValueError(f"gain: got shape {tuple(gain.shape)}, wanted ({q.shape[-2]},)")
    if cos.dim() != 2 or cos.shape[0] != q.shape[-3] or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(f"cos: got shape {tuple(cos.shape)}, wanted [{q.shape[-3]}, P] with 2 P at most {q.shape[-1]}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin: got shape {tuple(sin.shape)}, wanted cos's {tuple(cos.shape)}")
    if k.dtype != q.dtype or not q.dtype.is_floating_point:
        raise TypeError(f"k: got {k.dtype} beside q's {q.dtype}, wanted one floating-point dtype")
    _check_tables(q, k=k, gain=gain, cos=cos, sin=sin)


def _check_tables(like: torch.Tensor, **tensors: torch.Tensor) -> None:
    """What goes with activations is on their device and, as they are, of floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.device != like.device:
            raise ValueError(f"{name}: got device {tensor.device}, wanted {like.device}, where the activations are")
    for name, tensor in {"x": like, **tensors}.items():
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted a floating-point dtype")
