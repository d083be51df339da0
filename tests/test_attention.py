"""Varlen attention: every backend against the formula in fp64, its gradients, its contract, no recompiles."""

import sys
import types

import pytest
import torch

from pgolf_kernels import attention_backend_info, set_attention_backend, varlen_attention
from pgolf_kernels.attention import (
    _backend_for,
    _backward_op,
    _by_member_op,
    _fa3_backward,
    _fa3_forward,
    _flash_attention_3,
    _forward_op,
    _left_out_of_flash_attention_3,
    attention_backend,
    flash_attention_3_takes,
    reference,
)
from tests.gpu import assert_returns_at_once, replayed

SAME = [0, 3, 4, 4, 9, 21, 21, 21]  # an empty document, two of one length apart, padded ends
LONGER_KEYS = [0, 5, 7, 8, 19, 31, 31, 31]  # and a document without queries but with keys
SHORTER_KEYS = [0, 1, 2, 2, 4, 12, 12, 12]  # and queries that see no key
NO_KEYS = [0, 3, 3, 3, 8, 20, 20, 20]  # and a document with a query and without keys


def _case(k_bounds, dtype, device="cpu", heads=4, kv_heads=2, dim=8, scale=1):
    q_bounds = [scale * b for b in SAME]
    k_bounds = [scale * b for b in k_bounds]
    generator = torch.Generator().manual_seed(len(k_bounds))

    def draw(*size):
        return torch.randn(size, generator=generator).to(dtype).to(device)

    q = draw(q_bounds[-1], heads, dim)
    k, v = (draw(k_bounds[-1], kv_heads, dim) for _ in range(2))
    cu_q, cu_k = (torch.tensor(b, dtype=torch.int32, device=device) for b in (q_bounds, k_bounds))
    return (q, k, v), (cu_q, cu_k), draw(*q.shape)


def _assert_close_to_the_formula(k_bounds, causal, dtype, device="cpu", **shape):
    tensors, (cu_q, cu_k), grad = _case(k_bounds, dtype, device, **shape)
    scale = tensors[0].shape[-1] ** -0.5

    def run(function, convert):
        leaves = [convert(t.detach().clone()).requires_grad_() for t in tensors]
        out = function(*leaves)
        out.backward(grad.to(out.dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    def formula(q, k, v):
        return reference(q, k, v, cu_q, cu_k, causal, scale)

    exact = run(formula, lambda t: t.double())
    plain = run(formula, lambda t: t)
    longest = int(max(cu_q.diff().max(), cu_k.diff().max()))

    def attend(q, k, v):
        return varlen_attention(q, k, v, cu_q, longest, cu_k, longest, causal=causal)

    def by_member(q, k, v):
        group = q.shape[1] // v.shape[1]
        return attend(q, [k.view_as(k) for _ in range(group)], [v.view_as(v) for _ in range(group)])

    for way in (attend, by_member):
        ours = run(way, lambda t: t)
        for name, mine, theirs, truth in zip(("out", "dq", "dk", "dv"), ours, plain, exact, strict=True):
            assert mine.dtype == dtype
            error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (mine, theirs))
            assert error <= 2 * allowed + 1e-6, f"{way.__name__}, {name}: {error:.2e}, PyTorch's {allowed:.2e}"


@pytest.mark.parametrize("k_bounds", [SAME, LONGER_KEYS, SHORTER_KEYS, NO_KEYS])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_no_worse_than_pytorch(k_bounds, causal, dtype):
    _assert_close_to_the_formula(k_bounds, causal, dtype)


@pytest.mark.parametrize("k_bounds", [SAME, LONGER_KEYS, SHORTER_KEYS, NO_KEYS])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_by_finite_differences(k_bounds, causal):
    tensors, (cu_q, cu_k), _ = _case(k_bounds, torch.float64, dim=3)
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(
        lambda q, k, v: varlen_attention(q, k, v, cu_q, 32, cu_k, 32, causal=causal, scale=0.7), leaves
    )


def test_documents_do_not_see_each_other():
    (q, k, v), (cu, _), _ = _case(SAME, torch.float32)
    before = varlen_attention(q, k, v, cu, 32)
    k[9:], v[9:] = 100.0, 100.0
    after = varlen_attention(q, k, v, cu, 32)
    assert torch.equal(before[:9], after[:9]) and not torch.equal(before[9:], after[9:])


def test_queries_without_keys_get_zero():
    (q, k, v), (cu_q, cu_k), _ = _case(SHORTER_KEYS, torch.float32)
    out = varlen_attention(q, k, v, cu_q, 32, cu_k, 32)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))  # 3 queries, 1 key: only the last sees it
    assert out.isfinite().all()


def test_strided_inputs():
    (q, k, v), (cu, _), _ = _case(SAME, torch.float32)
    joined = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=1)
    parts = joined.split([32, 16, 16], dim=1)
    views = [part.unflatten(1, (-1, 8)) for part in parts]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(varlen_attention(*views, cu, 32), varlen_attention(q, k, v, cu, 32))


def test_aliases_get_the_gradients_of_their_heads():
    (q, k, v), (cu, _), grad = _case(SAME, torch.float64)
    keys, values = ([t.clone().requires_grad_() for _ in range(2)] for t in (k, v))
    found = torch.autograd.grad(varlen_attention(q, keys, values, cu, 32), [*keys, *values], grad)
    for member in range(2):
        leaves = [k.clone().requires_grad_(), v.clone().requires_grad_()]
        out = varlen_attention(q[:, member::2], *leaves, cu, 32)
        for mine, wanted in zip(found[member::2], torch.autograd.grad(out, leaves, grad[:, member::2]), strict=True):
            torch.testing.assert_close(mine, wanted)
    with pytest.raises(ValueError, match="k, v: got 3 and 2 aliases"):
        varlen_attention(q, [k, k, k], values, cu, 32)


def test_aliases_compile_with_the_bounds_of_the_queries():
    (q, k, v), (cu, _), grad = _case(SAME, torch.float32)

    def gradient(function):
        leaf = k.clone().requires_grad_()
        return torch.autograd.grad(function(q, leaf, v, cu), leaf, grad)[0]

    def attend(q, k, v, cu):
        return varlen_attention(q, [k, k.view_as(k)], [v, v.view_as(v)], cu, 32)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled), gradient(attend))


def test_a_forced_backend_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("pgolf_kernels.attention._forced", "fa3")
    monkeypatch.setattr("pgolf_kernels.attention._flash_attention_3", lambda: None)
    with pytest.raises(RuntimeError, match="PGOLF_ATTENTION: 'fa3' needs flash_attn_interface"):
        attention_backend(torch.device("cuda", 0))


def test_op_contract():
    (q, k, v), (cu, _), grad = _case(SAME, torch.float32)
    out, lse = _forward_op(q, k, v, cu, cu, 32, 32, True, 0.3)
    torch.library.opcheck(_backward_op, (grad, q, k, v, out, lse, cu, cu, 32, 32, True, 0.3))
    torch.library.opcheck(_by_member_op, (grad, q, k, v, out, lse, cu, cu, 32, 32, True, 0.3))
    for bounds in (SAME, SHORTER_KEYS):
        tensors, (cu_q, cu_k), _ = _case(bounds, torch.float32)
        torch.library.opcheck(_forward_op, (*(t.requires_grad_() for t in tensors), cu_q, cu_k, 32, 32, True, 0.3))


def test_compiles_once_whatever_the_number_of_documents():
    tensors, _, _ = _case(SAME, torch.float32)
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v, cu: varlen_attention(q, k, v, cu, 32), fullgraph=True, backend=frames)
    for bounds in ([0, 21], [0, 5, 21], [0, 1, 5, 7, 21, 21, 21], [0, 3, 4, 4, 9, 21, 21, 21, 21, 21]):
        cu = torch.tensor(bounds, dtype=torch.int32)
        torch._dynamo.mark_dynamic(cu, 0)
        torch.testing.assert_close(compiled(*tensors, cu), varlen_attention(*tensors, cu, 32))
    assert frames.frame_count == 1


def test_double_backward_raises():
    (q, k, v), (cu, _), _ = _case(SAME, torch.float32)
    (gradient,) = torch.autograd.grad(varlen_attention(q.requires_grad_(), k, v, cu, 32).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_the_choice_of_backend_is_visible_and_checked():
    info = attention_backend_info()
    assert info["backend"] == attention_backend(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert "--find-links" in info["wheel"] and "not verified" in info["wheel"]
    assert torch.version.cuda is not None or "cu<CUDA version>_torch" in info["wheel"]
    with pytest.raises(ValueError, match="name: got 'math', wanted one of auto, fa3, torch"):
        set_attention_backend("math")
    if _flash_attention_3() is None:
        with pytest.raises(RuntimeError, match="flash_attn_interface"):
            set_attention_backend("fa3")


_FA3_FORWARD = (
    "q k v k_new v_new qv {out} cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q "
    "max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale "
    "v_descale softmax_scale causal"
)
_FA3_BACKWARD = (
    "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q max_seqlen_k dq dk dv "
    "softmax_scale {causal}"
)


@pytest.mark.parametrize("names", [{"out": "out", "causal": "causal"}, {"out": "out_", "causal": "is_causal"}])
def test_flash_attention_3_gets_its_arguments_by_position(monkeypatch, names):
    """Both published signatures of its two functions, played by a stub: the names differ, the order does not."""
    seen = {}

    def stub(signature, result):
        order = signature.format(**names).split()

        def function(*args):
            bound = dict(zip(order, args, strict=True))
            seen.update(bound)
            return result(bound)

        return function

    (q, k, v), (cu_q, cu_k), grad = _case(LONGER_KEYS, torch.bfloat16)
    module = types.SimpleNamespace(
        _flash_attn_forward=stub(_FA3_FORWARD, lambda a: (a["q"] + 1, torch.rand(4, len(q)), None, None)),
        _flash_attn_backward=stub(_FA3_BACKWARD, lambda a: [a[n].fill_(i) for i, n in enumerate(("dq", "dk", "dv"))]),
    )
    monkeypatch.setattr("pgolf_kernels.attention._flash_attention_3", lambda: module)
    out, lse = _fa3_forward(q, k, v, cu_q, cu_k, 12, 13, True, 0.5)
    passed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 12, "max_seqlen_k": 13, "softmax_scale": 0.5}
    expected = {"q": q, "k": k, "v": v, **passed, "causal": True}
    assert {name: value for name, value in seen.items() if value is not None} == expected
    assert torch.equal(out, q + 1) and lse.shape == (4, len(q))
    seen.clear()
    gradients = _fa3_backward(grad, q, k, v, out, lse, cu_q, cu_k, 12, 13, True, 0.5)
    assert {name: seen[name] for name in passed} == passed and seen[names["causal"]] is True
    assert seen["dout"] is grad and seen["out"] is out and seen["softmax_lse"] is lse
    for i, (gradient, leaf) in enumerate(zip(gradients, (q, k, v), strict=True)):
        assert gradient.shape == leaf.shape and bool((gradient == i).all())
    every_other = torch.ones_like(q)[:, ::2]
    dq, *_ = _fa3_backward(grad, q, k, v, out, lse, cu_q, cu_k, 12, 13, True, 0.5, dq=every_other)
    assert seen["dq"] is dq is every_other and not every_other.any()


@pytest.fixture
def small_build(monkeypatch):
    """FlashAttention 3 built for bf16 and heads of up to 96 alone, on a Hopper GPU."""
    flags = {f"FLASHATTENTION_DISABLE_{name}": True for name in ("FP16", "HDIM64", "HDIM128", "HDIM192", "HDIM256")}
    flags["FLASHATTENTION_DISABLE_HDIM96"] = False
    config = types.SimpleNamespace(CONFIG={"build_flags": flags})
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)
    monkeypatch.setattr("pgolf_kernels.attention._flash_attention_3", lambda: object())
    monkeypatch.setattr("pgolf_kernels.attention.compute_capability", lambda index: 90)
    _left_out_of_flash_attention_3.cache_clear()
    yield flags
    _left_out_of_flash_attention_3.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "dim", "missing", "backend"),
    [
        (torch.bfloat16, 64, None, "fa3"),
        (torch.bfloat16, 96, None, "fa3"),
        (torch.bfloat16, 128, None, "torch"),
        (torch.float16, 64, None, "torch"),
        (torch.bfloat16, 64, "BACKWARD", "torch"),
        (torch.bfloat16, 64, "VARLEN", "torch"),
        (torch.bfloat16, 64, "HDIM96", "torch"),
    ],
)
def test_a_small_build_of_flash_attention_3_is_used_for_what_it_has(
    monkeypatch, small_build, dtype, dim, missing, backend
):
    if missing:
        small_build[f"FLASHATTENTION_DISABLE_{missing}"] = True
        assert attention_backend(torch.device("cuda", 0)) == "torch"
    q = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype, shape=(1, 1, dim))
    assert _backend_for(q) == backend
    monkeypatch.setattr("pgolf_kernels.attention._forced", "fa3")
    assert _backend_for(q) == "fa3"


def test_a_build_of_flash_attention_3_without_a_record_is_taken_for_whole(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_config", None)
    _left_out_of_flash_attention_3.cache_clear()
    try:
        assert flash_attention_3_takes(torch.float16, 256) and not flash_attention_3_takes(torch.bfloat16, 512)
    finally:
        _left_out_of_flash_attention_3.cache_clear()


def test_an_unknown_forced_backend_is_named(monkeypatch):
    monkeypatch.setattr("pgolf_kernels.attention._forced", "fast")
    with pytest.raises(ValueError, match="PGOLF_ATTENTION: got 'fast'"):
        attention_backend(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(6, 8)}, ValueError, r"q: got shape \(6, 8\)"),
        ({"q": torch.randn(6, 3, 8)}, ValueError, r"k: got shape \(6, 2, 8\).*3 query heads"),
        ({"v": torch.randn(6, 2, 4)}, ValueError, r"v: got shape \(6, 2, 4\), wanted k's"),
        ({"k": torch.randn(6, 2, 8).double()}, TypeError, "k: got torch.float64, wanted q's torch.float32"),
        ({"cu_seqlens_q": torch.tensor([0, 6])}, TypeError, "cu_seqlens_q: got torch.int64"),
        ({"cu_seqlens_q": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, r"cu_seqlens_q: got shape \(2, 2\)"),
        (
            {"cu_seqlens_k": torch.tensor([0, 2, 6], dtype=torch.int32)},
            ValueError,
            r"cu_seqlens_k: got shape \(3,\), wanted cu_seqlens_q's \(2,\)",
        ),
        ({"k": torch.empty(6, 2, 8, device="meta")}, ValueError, "k: got device meta"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    arguments = {
        "q": torch.randn(6, 4, 8), "k": torch.randn(6, 2, 8), "v": torch.randn(6, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 6], dtype=torch.int32), "max_seqlen_q": 6,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        varlen_attention(**(arguments | change))


@pytest.fixture(params=["torch", "fa3"])
def gpu_backend(request):
    if request.param == "fa3" and _flash_attention_3() is None:
        pytest.skip("flash_attn_interface is not installed")
    set_attention_backend(request.param)
    yield request.param
    set_attention_backend("auto")


@pytest.mark.gpu
@pytest.mark.parametrize("k_bounds", [SAME, LONGER_KEYS, SHORTER_KEYS, NO_KEYS])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_backends_agree_with_the_formula(gpu_backend, k_bounds, causal, dtype):
    if gpu_backend == "fa3" and not flash_attention_3_takes(dtype, 64):
        pytest.skip(f"this build of FlashAttention 3 has no {dtype}: test_gpu_choice_fits_the_dtype")
    _assert_close_to_the_formula(k_bounds, causal, dtype, "cuda", heads=8, kv_heads=4, dim=64, scale=50)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpu_choice_fits_the_dtype(dtype):
    """Whatever FlashAttention 3 was built without."""
    _assert_close_to_the_formula(SAME, True, dtype, "cuda", heads=8, kv_heads=4, dim=64, scale=50)


@pytest.mark.gpu
def test_gpu_refuses_single_precision():
    (q, k, v), (cu, _), _ = _case(SAME, torch.float32, "cuda", dim=64)
    with pytest.raises(TypeError, match=r"q: got torch\.float32 on cuda"):
        varlen_attention(q, k, v, cu, 32)


@pytest.mark.gpu
def test_gpu_returns_at_once_and_captures(gpu_backend):
    tensors, (cu, _), grad = _case(SAME, torch.bfloat16, "cuda", heads=8, kv_heads=4, dim=64, scale=50)
    leaves = [t.requires_grad_() for t in tensors]

    def call():
        return torch.autograd.grad(varlen_attention(*leaves, cu, 1024), leaves, grad)

    expected = call()
    assert_returns_at_once(call)
    for a, b in zip(replayed(call), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # dq is summed by atomics
