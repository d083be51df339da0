"""Attention over packed documents of different lengths.

    out[i, h] = sum_j softmax_j(scale * q[i, h] . k[j, g(h)]) v[j, g(h)],   g(h) = h // (H / Hkv)

j runs over the keys of i's document; with `causal`, aligned at the lower right corner: query i of a document with Lq
queries and Lk keys sees keys j <= i + Lk - Lq. Tensors are packed [tokens, heads, head_dim]; `cu_seqlens` holds the
documents' bounds and may be padded with repeated ends. A query that sees no key gets 0.

Backends: FlashAttention 3 (`flash_attn_interface`) on a Hopper GPU where it imports and was built for the dtype and
head size, torch's own FlashAttention 2 otherwise on a GPU (grouped-query without copying keys or values), and one
scaled-dot-product call for each set of documents of equal length on the CPU. `PGOLF_ATTENTION=fa3|torch` or
:func:`set_attention_backend` forces the GPU's.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pgolf_kernels._native_op import register_op
from pgolf_kernels._triton_op import compute_capability

BACKENDS = ("auto", "fa3", "torch")
_HEAD_SIZES = (64, 96, 128, 192, 256)  # that FlashAttention 3 has kernels for
_DISABLED = "FLASHATTENTION_DISABLE_"
_NO_MODULE = "needs flash_attn_interface, which does not import; `pgolf doctor` says how to get it"
_forced = os.environ.get("PGOLF_ATTENTION", "auto")


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    scale: float,
) -> Tensor:
    """The formula, document by document, differentiable by PyTorch."""
    group = q.shape[1] // k.shape[1]
    outputs = []
    for q_span, k_span in _documents(cu_seqlens_q, cu_seqlens_k):
        keys, values = (x[k_span].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[q_span], keys) * scale
        if causal:
            rows, columns = scores.shape[1:]
            visible = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
            scores = scores.masked_fill(~visible, float("-inf"))
        # A row of nothing but -inf has no softmax; it counts as no attention at all.
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1).nan_to_num(), values))
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def _documents(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> list[tuple[slice, slice]]:
    """(queries, keys) of every document that has queries. Reads the bounds, so it waits for a GPU."""
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    spans = zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False)
    return [(slice(a, b), slice(c, d)) for a, b, c, d in spans if b > a]


# ---- backends --------------------------------------------------------------------------------------------------------


@functools.cache
def _flash_attention_3() -> Any:
    """The module `flash_attn_interface`, or None (PyPI's `flash_attn_3` is an empty placeholder without it)."""
    try:
        module = importlib.import_module("flash_attn_interface")
    except (ImportError, OSError, RuntimeError):  # a build for another torch fails in any of these ways
        return None
    return module if hasattr(module, "_flash_attn_forward") and hasattr(module, "_flash_attn_backward") else None


@functools.cache
def _left_out_of_flash_attention_3() -> frozenset[str]:
    """What FlashAttention 3 was built without, by its build's own record: "FP16", "HDIM64", "BACKWARD", ..."""
    try:
        flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):  # older builds kept no record
        return frozenset()
    return frozenset(name.removeprefix(_DISABLED) for name, left_out in flags.items() if left_out)


def flash_attention_3_takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the installed build of FlashAttention 3 has varlen kernels for both, forward and backward."""
    left_out = _left_out_of_flash_attention_3()
    fits = any(head_dim <= size and f"HDIM{size}" not in left_out for size in _HEAD_SIZES)
    needed = {"BACKWARD", "VARLEN"} | ({"FP16"} if dtype == torch.float16 else set())
    return fits and not needed & left_out


def set_attention_backend(name: str) -> None:
    """Forces the GPU backend: "fa3", "torch", or "auto" (see the module's docstring). Process-wide.

    Raises ValueError for another name, RuntimeError for "fa3" where `flash_attn_interface` does not import.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"name: got {name!r}, wanted one of {', '.join(BACKENDS)}")
    if name == "fa3" and _flash_attention_3() is None:
        raise RuntimeError(f"name: 'fa3' {_NO_MODULE}")
    _forced = name


def attention_backend(device: torch.device) -> str:
    """The backend that tensors on `device` use: "fa3", "torch" or "cpu".

    "auto" may still leave single calls to torch's: see :func:`flash_attention_3_takes`.
    """
    if device.type != "cuda":
        return "cpu"
    if _forced not in BACKENDS:
        raise ValueError(f"PGOLF_ATTENTION: got {_forced!r}, wanted one of {', '.join(BACKENDS)}")
    if _forced == "fa3" and _flash_attention_3() is None:
        raise RuntimeError(f"PGOLF_ATTENTION: 'fa3' {_NO_MODULE}")
    if _forced != "auto":
        return _forced
    index = device.index if device.index is not None else torch.cuda.current_device()
    usable = _flash_attention_3() is not None and flash_attention_3_takes(torch.bfloat16, 1)
    return "fa3" if usable and compute_capability(index) == 90 else "torch"


def _backend_for(q: Tensor) -> str:
    """The backend of `q`'s device, or torch's where FlashAttention 3 is no one's order and was not built for q."""
    backend = attention_backend(q.device)
    if backend == "fa3" and _forced == "auto" and not flash_attention_3_takes(q.dtype, q.shape[-1]):
        return "torch"
    return backend


def attention_backend_info() -> dict[str, str]:
    """What `pgolf doctor` prints: the choice, why, and how to get FlashAttention 3."""
    found = _flash_attention_3()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    toolkit = "cu" + (torch.version.cuda or "<CUDA version>").replace(".", "")
    release = "torch" + "".join(torch.__version__.split("+")[0].split(".")[:3])
    wheels = f"https://windreamer.github.io/flash-attention3-wheels/{toolkit}_{release}/"
    return {
        "backend": attention_backend(device),
        "forced": _forced,
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "flash_attn_interface": getattr(found, "__file__", None) or "not importable",
        "left_out": ", ".join(sorted(_left_out_of_flash_attention_3())) if found else "",
        "wheel": f"pip install flash_attn_3 --no-deps --find-links {wheels} (this pair is derived, not verified; "
        "cu128_torch291 has been seen to work)",
        "source": "https://github.com/Dao-AILab/flash-attention, folder hopper: python setup.py install",
    }


def _cpu_groups(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> dict[tuple[int, int], list[tuple[slice, slice]]]:
    """Documents by (queries, keys), without those that see no key, and without leading queries that see none."""
    groups: dict[tuple[int, int], list[tuple[slice, slice]]] = {}
    for q_span, k_span in _documents(cu_seqlens_q, cu_seqlens_k):
        lengths = (q_span.stop - q_span.start, k_span.stop - k_span.start)
        if lengths[1] > 0:
            groups.setdefault(lengths, []).append((q_span, k_span))
    return groups


def _cpu_batches(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor, bool, Tensor | None]]:
    """(query rows [documents, Lq], key rows [documents, Lk], causal flag, mask): one fused call each."""
    batches = []
    for (rows, columns), spans in _cpu_groups(cu_seqlens_q, cu_seqlens_k).items():
        blind = max(rows - columns, 0) if causal else 0  # leading queries that see no key
        q_rows = torch.stack([torch.arange(q.start + blind, q.stop) for q, _ in spans])
        k_rows = torch.stack([torch.arange(k.start, k.stop) for _, k in spans])
        rows -= blind
        mask = None
        if causal and rows != columns:
            mask = torch.zeros(rows, columns, dtype=dtype)
            mask.masked_fill_(torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1), float("-inf"))
        batches.append((q_rows, k_rows, causal and mask is None, mask))
    return batches


def _heads_first(x: Tensor, rows: Tensor) -> Tensor:
    """[documents, heads, length, head_dim] of packed rows; a view where the rows are one run."""
    first, count = int(rows[0, 0]), rows.numel()
    in_order = int(rows[-1, -1]) - first + 1 == count and bool((rows[1:, 0] - rows[:-1, 0] == rows.shape[1]).all())
    picked = x[first : first + count] if in_order else x[rows.flatten()]
    return picked.unflatten(0, tuple(rows.shape)).transpose(1, 2)


def _cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.zeros(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for q_rows, k_rows, is_causal, mask in _cpu_batches(cu_q, cu_k, causal, q.dtype):
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads_first(q, q_rows),
            _heads_first(k, k_rows),
            _heads_first(v, k_rows),
            0.0,
            is_causal,
            attn_mask=mask,
            scale=scale,
        )
        out[q_rows.flatten()] = part.transpose(1, 2).flatten(0, 1)
        lse[:, q_rows.flatten()] = part_lse.transpose(0, 1).flatten(1)
    return out, lse


def _cpu_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for q_rows, k_rows, is_causal, mask in _cpu_batches(cu_q, cu_k, causal, q.dtype):
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads_first(grad, q_rows), _heads_first(q, q_rows), _heads_first(k, k_rows), _heads_first(v, k_rows),
            _heads_first(out, q_rows), lse[:, q_rows.flatten()].unflatten(1, q_rows.shape).transpose(0, 1).contiguous(),
            0.0, is_causal, attn_mask=mask, scale=scale,
        )  # fmt: skip
        for target, rows, part in zip((dq, dk, dv), (q_rows, k_rows, k_rows), parts, strict=True):
            target[rows.flatten()] = part.transpose(1, 2).flatten(0, 1)
    return dq, dk, dv


def _torch_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    result = torch.ops.aten._flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, causal, False, scale=scale)
    return result[0], result[1]


def _torch_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # The random state is read only where dropout is on.
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, causal, state, state, scale=scale
    )


# FlashAttention 3's functions took their arguments by other names in 2025, in the same order: they go by position.


def _fa3_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    new_keys_and_out, used, cache = (None,) * 4, (None,) * 3, (None,) * 9
    out, lse, *_ = _flash_attention_3()._flash_attn_forward(
        q, k, v, *new_keys_and_out, cu_q, cu_k, *used, max_q, max_k, *cache, scale, causal
    )
    return out, lse


def _fa3_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, where it is given, is written to in place: any strides but the last."""
    dq = q.new_empty(q.shape) if dq is None else dq
    dk, dv = (t.new_empty(t.shape) for t in (k, v))
    _flash_attention_3()._flash_attn_backward(
        grad, q, k, v, out, lse, cu_q, cu_k, None, None, max_q, max_k, dq, dk, dv, scale, causal
    )
    return dq, dk, dv


_FORWARD: dict[str, Callable[..., Any]] = {"fa3": _fa3_forward, "torch": _torch_flash_forward}
_BACKWARD: dict[str, Callable[..., Any]] = {"fa3": _fa3_backward, "torch": _torch_flash_backward}


# ---- op --------------------------------------------------------------------------------------------------------------


def _forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _cpu_forward(q, k, v, cu_q, cu_k, causal, scale)


def _forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0 or k.numel() == 0:
        return _forward_fake(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)[0].zero_(), q.new_zeros(
            (q.shape[1], q.shape[0]), dtype=torch.float32
        )
    return _FORWARD[_backend_for(q)](q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _backward_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _cpu_backward(grad, q, k, v, out, lse, cu_q, cu_k, causal, scale)


def _backward_cuda(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    backend = _BACKWARD[_backend_for(q)]
    return backend(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, scale)


def _backward_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_backward_op = register_op(
    "varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_cpu,
    cuda=_backward_cuda,
    fake=_backward_fake,
    not_differentiable="double backward is not supported",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, causal, scale = inputs
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k)
    ctx.rest = (max_q, max_k, causal, scale)
    ctx.set_materialize_grads(False)  # no zeros in the shape of lse
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor | None, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 9
    q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
    grads = _backward_op(grad.contiguous(), q, k, v, out, lse, cu_q, cu_k, *ctx.rest)
    return (*grads, None, None, None, None, None, None)


_forward_op = register_op(
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, bool causal, float scale) -> (Tensor, Tensor)",
    _forward_cpu,
    cuda=_forward_cuda,
    fake=_forward_fake,
    backward=_backward,
    setup_context=_setup_context,
)


# ---- gradients by the members of head groups -------------------------------------------------------------------------
# Given grouped heads, FlashAttention 3 adds up the gradients of keys and values by atomics in fp32 buffers, which it
# clears before and converts after. A call for the first query head of every group, one for the second, ... takes less
# time; whoever made keys and values adds the results.


def _by_member(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool, scale: float,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk and dv from the first members, dk and dv from the second, ...]."""
    group = q.shape[1] // k.shape[1]
    lse_of = lse.unflatten(0, (-1, group)).transpose(0, 1).contiguous()
    backward = _backward_cuda if q.is_cuda else _backward_cpu
    strided = q.is_cuda and q.numel() and k.numel() and _backend_for(q) == "fa3"
    dq, found = q.new_empty(q.shape), []
    for member in range(group):
        heads = (slice(None), slice(member, None, group))
        own = (grad[heads], q[heads], k, v, out[heads], lse_of[member], cu_q, cu_k, max_q, max_k, causal, scale)
        if strided:
            _, *rest = _fa3_backward(*own, dq=dq[heads])
        else:
            dq[heads], *rest = backward(*own)
        found += rest
    return [dq, *found]


_by_member_op = register_op(
    "varlen_attention_backward_by_member(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale) "
    "-> Tensor[]",
    _by_member,
    fake=lambda grad, q, k, v, *_: [
        q.new_empty(q.shape), *(t.new_empty(t.shape) for _ in range(q.shape[1] // k.shape[1]) for t in (k, v))
    ],
    not_differentiable="double backward is not supported",
)  # fmt: skip


class _AliasedKeys(torch.autograd.Function):
    """Attention to keys and values that come once for each member of the head groups."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, cu_q: Tensor, cu_k: Tensor | None, max_q: int, max_k: int, causal: bool, scale: float,
        *aliases: Tensor,
    ) -> Tensor:  # fmt: skip
        cu_k = cu_q if cu_k is None else cu_k  # torch.compile takes no tensor twice
        k, v = aliases[0], aliases[len(aliases) // 2]
        out, lse = _forward_op(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        ctx.rest = (max_q, max_k, causal, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dq, *parts = _by_member_op(grad.contiguous(), *ctx.saved_tensors, *ctx.rest)
        return dq, *(None,) * 6, *parts[::2], *parts[1::2]


# ---- public function -------------------------------------------------------------------------------------------------


def varlen_attention(
    q: Tensor,
    k: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention within the documents of a packed batch.

    q [Tq, H, D], k and v [Tk, Hkv, D] with H a multiple of Hkv; bfloat16 or float16 on a GPU, also float32 and
    float64 on the CPU. `cu_seqlens_q` and `cu_seqlens_k` (the same by default) are int32 [documents + 1] bounds on q's
    device, padded with repeated ends or not. `max_seqlen_*` are upper bounds of a document's length: keep them fixed,
    the number of documents may change without a recompile (mark dimension 0 of `cu_seqlens` dynamic). `scale` is
    1 / sqrt(D) by default. Returns [Tq, H, D].

    k and v may each come as H / Hkv aliases of one tensor, as `qkv_rope` gives them for so many readers: then the n-th
    alias gets the gradient from the n-th query head of every group, which FlashAttention 3 computes faster so.

    The values of `cu_seqlens` are not read on the host (that would wait for the GPU): bounds outside the tensors are
    the caller's error, and rows behind the last bound have no defined result. Raises ValueError for shapes and devices,
    TypeError for dtypes.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    keys, values = ((t,) if isinstance(t, Tensor) else tuple(t) for t in (k, v))
    if not keys or not values:
        raise ValueError(f"k, v: got {len(keys)} and {len(values)} aliases, wanted at least one each")
    _check(q, keys[0], values[0], cu_seqlens_q, cu_seqlens_k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    rest = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale)
    if len(keys) == len(values) == 1:
        return _forward_op(q, keys[0], values[0], *rest)[0]
    if not len(keys) == len(values) == q.shape[1] // keys[0].shape[1]:
        raise ValueError(
            f"k, v: got {len(keys)} and {len(values)} aliases, wanted one each or as many as a key has query heads "
            f"({q.shape[1] // keys[0].shape[1]})"
        )
    for name, aliases in (("k", keys), ("v", values)):
        if any((t.shape, t.dtype, t.device) != (aliases[0].shape, q.dtype, q.device) for t in aliases):
            raise ValueError(f"{name}: got tensors that differ in shape, dtype or device, wanted aliases of one tensor")
    cu_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    return _AliasedKeys.apply(q, cu_seqlens_q, cu_k, *rest[2:], *keys, *values)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    if q.dim() != 3:
        raise ValueError(f"q: got shape {tuple(q.shape)}, wanted [tokens, heads, head_dim]")
    if k.dim() != 3 or k.shape[2] != q.shape[2] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"k: got shape {tuple(k.shape)}, wanted [tokens, kv_heads, {q.shape[2]}] with {q.shape[1]} query heads a "
            "multiple of kv_heads"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: got shape {tuple(v.shape)}, wanted k's {tuple(k.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted q's {q.dtype}")
    if q.device.type == "cuda" and q.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(
            f"q: got {q.dtype} on {q.device}, wanted torch.bfloat16 or torch.float16 (others run on the CPU)"
        )
    if not q.dtype.is_floating_point:
        raise TypeError(f"q: got {q.dtype}, wanted a floating-point dtype")
    for name, tensor in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name}: got {tensor.dtype}, wanted torch.int32")
        if tensor.dim() != 1 or tensor.shape[0] < 1:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted [documents + 1]")
    if cu_k.shape != cu_q.shape:
        raise ValueError(f"cu_seqlens_k: got shape {tuple(cu_k.shape)}, wanted cu_seqlens_q's {tuple(cu_q.shape)}")
    for name, tensor in (("k", k), ("v", v), ("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if tensor.device != q.device:
            raise ValueError(f"{name}: got device {tensor.device}, wanted q's {q.device}")
