"""The network against the golden vectors of the public systems: fp32 on CPU, every gradient."""

import pytest
import torch

from model.adapters import Adapters
from model.config import ModelConfig
from model.convert import from_reference, to_reference
from model.errors import ArtifactError
from model.gpt import GPT, Tail
from model.layers import rms_norm
from tests.golden import load_safetensors
from tests.systems import golden_model, small_config

CASES = [
    ("pr1413", "off"),
    ("pr1413", "on"),
    ("pr1514", "off"),
    ("pr1514", "on"),
    ("pr1530", "off"),
    ("pr1530", "on"),
    ("pr1530", "varlen"),
    ("pr1499", "off"),
    ("pr1499", "on"),
    ("pr1499", "on_qat"),
]


def _inputs(golden, case):
    prefix = f"{case}." if f"{case}.input_ids" in golden else ""
    inputs = {"loop": case != "off"}
    if case == "varlen":
        inputs |= {"cu_seqlens": golden["varlen.cu_seqlens"], "max_seqlen": 64}
    return golden[f"{prefix}input_ids"].long(), golden[f"{prefix}target_ids"].long(), inputs


@pytest.mark.parametrize(("system", "case"), CASES)
def test_logits_loss_and_gradients_match_the_reference(system, case):
    model, golden = golden_model(system)
    model.late_qat = case == "on_qat"
    ids, targets, inputs = _inputs(golden, case)

    logits = model.logits(ids, **inputs).detach()
    wanted = golden[f"{case}.logits"]
    stride = logits.size(1) // wanted.size(0)
    torch.testing.assert_close(logits[0, ::stride], wanted, atol=1e-4, rtol=0)

    nll = model.loss(ids, targets, reduction="none", **inputs)
    torch.testing.assert_close(nll.detach(), golden[f"{case}.nll"].view_as(nll), atol=5e-5, rtol=0)
    loss = model.loss(ids, targets, **inputs)
    torch.testing.assert_close(loss.detach(), golden[f"{case}.loss"], atol=1e-5, rtol=1e-6)

    loss.backward()
    gradients = to_reference(
        {n: p.grad for n, p in model.named_parameters()}, model.config, banked="param.qo_bank" in golden
    )
    compared = 0
    for name, gradient in gradients.items():
        if f"{case}.grad_norm.{name}" in golden:
            scale = golden[f"{case}.grad_norm.{name}"].item()
            for kind, dim in (("rowsum", -1), ("colsum", -2)):
                _close(gradient.double().sum(dim).float(), golden[f"{case}.grad_{kind}.{name}"], 1e-3, scale * 1e-3)
            assert gradient.norm().item() == pytest.approx(scale, rel=1e-3)
            compared += 1
        if f"{case}.grad.{name}" in golden:
            power = golden.get(f"{case}.grad_scale.{name}", torch.tensor(1.0))
            exact = golden[f"{case}.grad.{name}"].float() / power
            error = (gradient - exact).norm() / exact.norm()
            assert error < 2e-3, f"{name}: relative error {error:.2e}"
            compared += 1
    assert compared >= len(gradients)


def _close(actual, wanted, rtol, atol):
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=atol)


def test_long_sequences_rescale_the_rotary_base():
    model, golden = golden_model("pr1413")
    with torch.no_grad():
        nll = model.loss(golden["long.input_ids"].long(), golden["long.target_ids"].long(), reduction="none")
    torch.testing.assert_close(nll.view(-1), golden["long.nll"], atol=5e-5, rtol=0)


def test_adapters_match_the_reference():
    model, _ = golden_model("pr1530")
    golden = load_safetensors("lora_pr1530.safetensors")
    kinds = ("q", "k", "v", "o", "mlp", "lm_head")
    adapters = Adapters(
        {k: golden[f"A.{k}"].clone() for k in kinds}, {k: golden[f"B.{k}"].clone() for k in kinds}
    ).requires_grad_()
    nll = model.loss(golden["input_ids"].long(), golden["target_ids"].long(), reduction="none", adapters=adapters)
    torch.testing.assert_close(nll.detach(), golden["nll"], atol=5e-5, rtol=0)
    (nll.mean(dim=1) * golden["doc_weight"]).sum().backward()
    for kind in kinds:
        for name, tensor in (("A", adapters.a[kind]), ("B", adapters.b[kind])):
            wanted = golden[f"grad.{name}.{kind}"]
            assert (tensor.grad - wanted).norm() / wanted.norm() < 1e-3, f"{name}.{kind}"


def test_zero_adapters_leave_every_score_bit_equal():
    model, golden = golden_model("pr1530")
    ids, targets, inputs = _inputs(golden, "on")
    adapters = Adapters.zeros(model.config, 17, 2, 4, ("q", "k", "v", "o", "mlp", "lm_head"), ids.device, torch.float32)
    generator = torch.Generator().manual_seed(1)
    for row in range(2):
        adapters.draw(row, generator)
    with torch.no_grad():
        plain = model.loss(ids, targets, reduction="none", **inputs)
        adapted = model.loss(ids, targets, reduction="none", adapters=adapters, **inputs)
    assert torch.equal(plain, adapted)


def test_adapters_can_be_shared_indexed_and_packed():
    model, _ = golden_model("pr1530")
    full = load_safetensors("lora_pr1530.safetensors")
    kinds = ("q", "v", "o", "lm_head")

    def pick(documents):
        return Adapters(
            {k: full[f"A.{k}"][:, documents] for k in kinds}, {k: full[f"B.{k}"][:, documents] for k in kinds}
        )

    ids, targets = full["input_ids"].long(), full["target_ids"].long()
    options = {"reduction": "none"}
    with torch.no_grad():
        both = model.loss(ids, targets, adapters=pick([0, 1]), **options)
        swapped = pick([1, 0])
        swapped.index = torch.tensor([1, 0])
        torch.testing.assert_close(model.loss(ids, targets, adapters=swapped, **options), both)
        one = torch.cat(
            [model.loss(ids[i : i + 1], targets[i : i + 1], adapters=pick([0]), **options) for i in range(2)]
        )
        torch.testing.assert_close(model.loss(ids, targets, adapters=pick([0]), **options), one)
        packed = pick([0, 1])
        packed.cu_seqlens = torch.tensor([0, 64, 128], dtype=torch.int32)
        nll = model.loss(
            ids.view(-1), targets.view(-1), adapters=packed, cu_seqlens=packed.cu_seqlens, max_seqlen=64, **options
        )
        torch.testing.assert_close(nll.view(2, 64), both, atol=2e-5, rtol=0)


def test_only_chosen_positions_are_scored():
    model, golden = golden_model("pr1530")
    ids, targets, inputs = _inputs(golden, "on")
    positions = torch.tensor([3, 64, 127])
    with torch.no_grad():
        whole = model.loss(ids, targets, reduction="none", **inputs)
        some = model.loss(ids, targets, reduction="none", positions=positions, **inputs)
        hints = torch.tensor([5, -1, 7])
        nll, hint_log_probability = model.loss(
            ids, targets, reduction="none", positions=positions, hints=hints, **inputs
        )
        log_probabilities = model.logits(ids, **inputs).log_softmax(-1).view(-1, 512)[positions]
    torch.testing.assert_close(some, whole.view(-1)[positions])
    torch.testing.assert_close(nll, some)
    torch.testing.assert_close(hint_log_probability[[0, 2]], log_probabilities[[0, 2], [5, 7]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kinds", [(), ("q", "k", "v", "o", "mlp", "lm_head"), ("q", "mlp")])
@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("system", ["pr1413", "pr1514", "pr1530", "pr1499"])
@pytest.mark.parametrize("documents", [3, 4])
def test_a_tail_gives_what_its_positions_have(documents, system, loop, kinds):
    """Losses and all gradients in fp64, with a document shorter than its part of the tail, and with one without any."""
    model, golden = golden_model(system, torch.float64)
    ids, targets = golden["input_ids"].long().view(-1)[:100], golden["target_ids"].long().view(-1)[:100]
    bounds = torch.tensor([0, 64, 67, 100, 100], dtype=torch.int32)[: documents + 1]
    rows = torch.cat([torch.arange(60, 64), torch.tensor([64, 64, 65, 66]), torch.arange(96, 100)])
    tail = Tail(rows, torch.tensor([0, 4, 8, 12, 12], dtype=torch.int32)[: documents + 1], 4)
    assert tail.is_even(documents) is (documents == 3)
    kept = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11])  # a short document's first row stands twice
    adapters = None
    if kinds:
        encoder, decoder = model.config.layer_order(True)
        slots = len(encoder) + len(decoder)
        adapters = Adapters.zeros(model.config, slots, documents, 3, kinds, ids.device, torch.float64)
        generator = torch.Generator().manual_seed(1)
        for tensor in adapters.tensors():
            tensor.normal_(std=0.1, generator=generator)
        adapters.requires_grad_()
        adapters.cu_seqlens, adapters.tail_cu_seqlens = bounds, tail.cu_seqlens
    leaves = [*model.parameters(), *(adapters.tensors() if adapters else ())]

    def run(positions):
        nll = model.loss(
            ids, targets, reduction="none", positions=positions, adapters=adapters, cu_seqlens=bounds, max_seqlen=64,
            loop=loop,
        )  # fmt: skip
        return nll, torch.autograd.grad((nll[kept] * torch.arange(1, 12)).sum(), leaves, allow_unused=True)

    (nll, gradients), (wanted, wanted_gradients) = run(tail), run(rows)
    torch.testing.assert_close(nll[kept], wanted[kept])
    assert bool(nll.isfinite().all())
    for gradient, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-9, rtol=1e-7)


def test_a_tail_is_of_packed_rows():
    model, golden = golden_model("pr1530")
    ids, targets, _ = _inputs(golden, "on")
    tail = Tail(torch.tensor([63]), torch.tensor([0, 1], dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="tail: got one without cu_seqlens"):
        model.loss(ids, targets, positions=tail)
    adapters = Adapters.zeros(model.config, 17, 1, 2, ("q", "mlp"), ids.device, torch.float32)
    adapters.cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
    packed = {"cu_seqlens": adapters.cu_seqlens, "max_seqlen": 64, "adapters": adapters}
    with pytest.raises(ValueError, match="adapters: got none for the tail's rows, wanted tail_cu_seqlens"):
        model.loss(ids[:1], targets[:1], positions=tail, **packed)


@pytest.mark.parametrize("system", ["pr1413", "pr1530", "pr1499"])
def test_state_dicts_convert_both_ways(system):
    golden = load_safetensors(f"model_{system}.safetensors")
    reference = {k.removeprefix("param."): v.float() for k, v in golden.items() if k.startswith("param.")}
    config = small_config(system)
    back = to_reference(from_reference(reference, config), config, banked="qo_bank" in reference)
    assert back.keys() == reference.keys()
    assert all(torch.equal(back[name], reference[name]) for name in reference)
    name = next(iter(reference))
    missing = {k: v for k, v in reference.items() if k != name}
    with pytest.raises(ArtifactError, match="missing"):
        from_reference(missing, config)
    with pytest.raises(ArtifactError, match="no place for extra"):
        from_reference({**reference, "extra": torch.zeros(1)}, config)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"loop_start": 4, "parallel_start": -1}, 35_943_512),
        ({"parallel_start": 7, "parallel_lanes": 1}, 35_944_536),
        ({}, 35_944_602),
    ],
)
def test_parameter_counts_are_the_published_ones(changes, parameters):
    with torch.device("meta"):
        model = GPT(ModelConfig(**changes))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.matrix_names()) == 67


def test_collect_sees_the_input_of_every_matrix():
    model, golden = golden_model("pr1530")
    ids, _, inputs = _inputs(golden, "on")
    seen: dict[str, int] = {}

    def collect(names, x):
        for name in names:
            seen[name] = seen.get(name, 0) + 1
            parameter, index = {n: (p, i) for n, p, i in model.matrix_names()}[name]
            weight = getattr(model, parameter)
            assert x.shape == (2, 64, (weight if index is None else weight[index]).size(-1))

    with torch.no_grad():
        plain = model.hidden(ids, **inputs)
        collected = model.hidden(ids, collect=collect, **inputs)
    torch.testing.assert_close(plain, collected)
    assert seen.keys() == {name for name, _, _ in model.matrix_names()}
    assert seen["blocks.4.attn.k"] == 3 and seen["blocks.0.mlp.down"] == 1


def test_packed_documents_do_not_see_each_other():
    model, golden = golden_model("pr1499")
    ids = golden["input_ids"].long()
    cu_seqlens = torch.tensor([0, 64, 128, 128], dtype=torch.int32)
    with torch.no_grad():
        rows = model.hidden(ids)
        packed = model.hidden(ids.view(-1), cu_seqlens=cu_seqlens, max_seqlen=64)
    torch.testing.assert_close(packed.view_as(rows), rows, atol=2e-5, rtol=0)


def test_norm_epsilon_is_that_of_fp32_in_bf16():
    x = torch.full((2, 8), 0.005, dtype=torch.bfloat16)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1.1920929e-07).sqrt()
    torch.testing.assert_close(rms_norm(x).double(), wanted, rtol=4e-3, atol=0)


def test_packed_input_needs_its_longest_length():
    model, golden = golden_model("pr1530")
    with pytest.raises(ValueError, match="max_seqlen"):
        model.hidden(golden["input_ids"].view(-1).long(), cu_seqlens=torch.tensor([0, 128], dtype=torch.int32))


@pytest.mark.parametrize("system", ["pr1499", "pr1530"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands_stand_for_the_matrices(system, dtype):
    model, golden = golden_model(system)
    ids, targets, inputs = _inputs(golden, "on")
    with torch.no_grad():
        model.compute_dtype = dtype
        operands = model.operands()
        before = model.loss(ids, targets, **inputs)
        assert torch.equal(model.loss(ids, targets, operands=operands, **inputs), before)
        places = [operand.data_ptr() for operand in operands]
        for matrix in (model.tok_emb, model.qo_bank, model.kv_bank, model.up_bank, model.down_bank):
            matrix.mul_(1.25)
        after = model.loss(ids, targets, **inputs)
        assert not torch.equal(after, before)
        operands.copy_(model.operands())
        assert torch.equal(model.loss(ids, targets, operands=operands, **inputs), after)
        assert [operand.data_ptr() for operand in operands] == places
