"""Hessians, recipes and the quantised model."""

import dataclasses
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from model.artifact import build_model
from model.config import Config
from model.data.loaders import Batch
from model.errors import ArtifactError, ConfigError
from model.gpt import GPT
from model.layers import bigram_index, document_starts
from model.presets import get_preset
from model.quantize import (
    collect_hessians,
    prune_smallest,
    quantize_with_hessians,
    recipe_of,
    round_rows,
    sort_hidden_units,
)
from model.quantized import PlainTensor, QuantizedModel
from pgolf_kernels.gptq import GptqRecipe, gptq_quantize_many
from tests.artifacts import calibrated, small_quantized
from tests.golden import load_safetensors
from tests.systems import golden_model, small_config

HESSIANS = load_safetensors("hessian_pr1530.safetensors")
REFERENCE_NAMES = {
    "q": "attn.c_q",
    "k": "attn.c_k",
    "v": "attn.c_v",
    "o": "attn.proj",
    "up": "mlp.fc",
    "down": "mlp.proj",
}


def reference_name(name: str) -> str:
    if name == "tok_emb":
        return "tok_emb.weight"
    layer, kind = name.split(".")[1], name.split(".")[3]
    return f"blocks.{layer}.{REFERENCE_NAMES[kind]}.weight"


def golden_batches() -> list[Batch]:
    return [Batch(ids.long(), ids.long(), None, ids.shape[1]) for ids in HESSIANS["input_ids"]]


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def test_hessians_are_those_of_the_public_system() -> None:
    model, _ = golden_model("pr1530")
    hessians = collect_hessians(model, golden_batches())
    names = [name for name, _, _ in model.matrix_names()]
    assert sorted(hessians) == sorted(names) and len(names) == 67
    for name in names:
        public = reference_name(name)
        if f"diag.{public}" not in HESSIANS:
            assert name.split(".")[-1] in "kv", name
            assert hessians[name] is hessians[name.rsplit(".", 1)[0] + ".q"]
            continue
        assert relative(hessians[name].diagonal(), HESSIANS[f"diag.{public}"]) < 2e-5, name
        assert relative(hessians[name].sum(1), HESSIANS[f"rowsum.{public}"]) < 2e-4, name
        if f"full.{public}" in HESSIANS:
            assert relative(hessians[name], HESSIANS[f"full.{public}"]) < 2e-5, name


def test_hessians_per_token_and_without_the_loop() -> None:
    model, _ = golden_model("pr1530")
    batches = golden_batches()
    per_batch, per_token = (collect_hessians(model, batches, per_token=flag)["tok_emb"] for flag in (False, True))
    assert torch.allclose(per_token * batches[0].inputs.numel(), per_batch, rtol=1e-5)
    looped, plain = (collect_hessians(model, batches, loop=loop)["blocks.4.mlp.up"] for loop in (True, False))
    assert looped.trace() > 2 * plain.trace()
    with pytest.raises(ConfigError, match="calibration_batches: got 0"):
        collect_hessians(model, [])


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model, _ = golden_model("pr1530")
    batches = golden_batches()
    hessians = collect_hessians(model, batches[:2] if rank == 0 else batches[2:])
    torch.save({"h": hessians["blocks.2.mlp.down"]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_ranks_share_their_hessians(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (2, port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True)["h"] for rank in range(2))
    assert torch.equal(first, second)
    assert relative(first, collect_hessians(golden_model("pr1530")[0], golden_batches())["blocks.2.mlp.down"]) < 1e-6


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("pr1413", {"q": (6, 12.85), "up": (6, 12.85), "tok_emb": (8, 20.0)}),
        ("pr1727", {"q": (6, 13.0), "up": (6, 12.0), "tok_emb": (7, 15.0)}),
    ],
)
def test_recipes_of_the_presets(preset: str, expected: dict[str, tuple[int, float]]) -> None:
    quant = get_preset(preset).quant
    for kind, (bits, sigmas) in expected.items():
        name = kind if kind == "tok_emb" else f"blocks.0.{'attn' if kind == 'q' else 'mlp'}.{kind}"
        assert recipe_of(name, quant) == GptqRecipe(bits=bits, clip_sigmas=sigmas)


def test_the_recipe_of_pr1499() -> None:
    quant = get_preset("pr1499").quant
    assert recipe_of("blocks.0.attn.q", quant) == GptqRecipe.pr1499(6, 12.85)
    assert recipe_of("blocks.0.mlp.down", quant) == GptqRecipe.pr1499(5, 12.85)
    model, golden = golden_model("pr1499")
    ids = golden["input_ids"].long()
    quantized = calibrated(model, Config(model=model.config, quant=quant), [Batch(ids, ids, None, ids.shape[1])])
    kinds = {m.name: m.bits for m in quantized.matrices}
    assert kinds["blocks.0.mlp.up"] == 5 and kinds["blocks.0.attn.o"] == 6
    assert kinds["bigram_embed"] == kinds["bigram_proj"] == 6
    plain = {t.name: t.value.dtype for t in quantized.tensors}
    assert plain["tok_emb"] == plain["blocks.9.attn.k"] == plain["smear"] == torch.float16
    assert not {"tok_emb", "blocks.9.attn.k"} & set(kinds)
    build_model(Config(model=model.config), quantized.state_dict())


def test_the_bigram_projection_is_quantised_for_the_rows_that_the_table_gives_it() -> None:
    model, golden = golden_model("pr1499")
    quant = get_preset("pr1499").quant
    ids = golden["input_ids"].long()
    starts = document_starts(None, *ids.shape, ids.device)
    rows = model.bigram_embed.detach()[bigram_index(ids, starts, model.config.bigram_vocab_size)].flatten(0, 1)
    batch = Batch(ids, ids, None, ids.shape[1])
    hessian = collect_hessians(model, [batch], per_token=True)["bigram_proj"]
    assert relative(hessian, rows.mT @ rows / len(rows)) < 1e-5
    quantized = calibrated(model, Config(model=model.config, quant=quant), [batch])
    got = next(matrix for matrix in quantized.matrices if matrix.name == "bigram_proj")
    recipe = GptqRecipe.pr1499(6, 12.85)
    [(codes, scales)] = gptq_quantize_many([model.bigram_proj.detach()], [hessian], [recipe])
    assert torch.equal(got.codes, codes) and torch.equal(got.scales, scales)


def test_quantised_weights_serve_the_inputs_and_everything_else_is_rounded_to_half() -> None:
    model, golden = golden_model("pr1530")
    ids = golden["input_ids"].long()
    hessians = collect_hessians(model, [Batch(ids, ids, None, ids.shape[1])])
    quantized = quantize_with_hessians(model, Config().replace(sort_hidden_units=False).quant, hessians)
    parameters = dict(model.named_parameters())
    for matrix in quantized.matrices:
        weight = parameters[matrix.parameter].detach()
        weight = weight if matrix.index is None else weight[matrix.index]
        error = weight - matrix.dequantize()
        hessian = hessians[matrix.name]
        lost, whole = (float(((m @ hessian) * m).sum()) for m in (error, weight))
        assert lost < 0.01 * whole, matrix.name
    for tensor in quantized.tensors:
        assert torch.equal(tensor.value, parameters[tensor.parameter].half()), tensor.name
    assert len(quantized.matrices) == 67 and len(quantized.tensors) == len(parameters) - 5


def test_sorting_hidden_units_keeps_the_function() -> None:
    model, golden = golden_model("pr1499")
    config = Config(model=model.config).replace(sort_hidden_units=False)
    ids = golden["input_ids"].long()
    batch = Batch(ids, ids, None, ids.shape[1])
    plain = calibrated(model, config, [batch])
    ordered = sort_hidden_units(plain)
    assert ordered.state_dict()["hidden_gain"].equal(plain.state_dict()["hidden_gain"]) is False
    with torch.no_grad():
        losses = [build_model(config, q.state_dict()).loss(ids, ids, reduction="none") for q in (plain, ordered)]
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-5)
    for matrix in ordered.matrices:
        if matrix.name.endswith("mlp.up"):
            assert (matrix.scales[1:] >= matrix.scales[:-1]).all()
    assert (
        calibrated(model, config.replace(sort_hidden_units=True), [batch])
        .state_dict()["up_bank"]
        .equal(ordered.state_dict()["up_bank"])
    )


def test_round_rows_golden() -> None:
    golden = load_safetensors("gptq.safetensors")
    for bits, limit in ((5, 15), (6, 31)):
        codes, scales = round_rows(golden["rowwise.t"], bits)
        assert torch.equal(codes, golden[f"rowwise.absmax.R{limit}.q"])
        assert torch.equal(scales, golden[f"rowwise.absmax.R{limit}.s"])


def test_pruning_zeroes_the_smallest() -> None:
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    pruned = prune_smallest(weight, 0.03)
    threshold = torch.quantile(weight.abs().flatten(), 0.03)
    assert torch.equal(pruned, weight.masked_fill(weight.abs() < threshold, 0.0))
    assert (pruned == 0).sum() == 2700
    small = weight[:200, :300]
    assert prune_smallest(small, 0.03) is small and prune_smallest(weight, 0.0) is weight


def test_shared_hessians_stay_shared_and_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = golden_model("pr1530")
    hessians = collect_hessians(model, golden_batches())
    seen = {}

    def spy(weights: list[Tensor], matrices: list[Tensor], recipes: list[GptqRecipe]) -> list[tuple[Tensor, Tensor]]:
        seen["tensors"] = len({id(matrix) for matrix in matrices})
        return [(torch.zeros(w.shape, dtype=torch.int8), torch.ones(len(w)).half()) for w in weights]

    monkeypatch.setattr("model.quantize.gptq_quantize_many", spy)
    quantize_with_hessians(model, Config().quant, hessians)
    assert seen["tensors"] == 4 * 11 + 1
    with pytest.raises(ConfigError, match=r"keep_fp16: got 'blocks\.0\.attn\.x'"):
        quantize_with_hessians(model, Config().replace(keep_fp16=("blocks.0.attn.x",)).quant, hessians)


def test_banks_must_be_complete() -> None:
    quantized = small_quantized()
    with pytest.raises(ArtifactError, match="bank entries"):
        QuantizedModel(quantized.matrices[1:], quantized.tensors).state_dict()
    with pytest.raises(ArtifactError, match="a second entry"):
        QuantizedModel((*quantized.matrices, quantized.matrices[0]), quantized.tensors).state_dict()
    odd = PlainTensor("x", "x", 0, torch.zeros(2)), PlainTensor("y", "x", 1, torch.zeros(3))
    with pytest.raises(ArtifactError, match="different shapes"):
        QuantizedModel((), odd).state_dict()


@pytest.mark.gpu
def test_hessians_on_the_gpu_have_fp32_sums() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(small_config("pr1530"), model_dim=256, num_heads=4)
    model = GPT(config)
    with torch.no_grad():
        for parameter in (model.qo_bank, model.down_bank):
            parameter.normal_(std=0.05)
    ids = torch.randint(0, 512, (8, 64))
    reference = collect_hessians(model, [Batch(ids, ids, None, 64)] * 3)
    model = model.cuda()
    model.compute_dtype = torch.bfloat16
    on_gpu = collect_hessians(model, [Batch(ids.cuda(), ids.cuda(), None, 64)] * 3)
    for name, wanted in reference.items():
        assert on_gpu[name].dtype == torch.float32
        assert relative(on_gpu[name].cpu(), wanted) < 0.02, name
    quantized = quantize_with_hessians(model, Config().quant, on_gpu)
    assert all(matrix.codes.device.type == "cpu" for matrix in quantized.matrices)
