"""The plain expressions that bench/ablation.py puts in the kernels' place: the same losses and gradients."""

import json
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model.gpt
import model.stream
from bench import ablation, real_runs
from bench.bench_train_step import draw_zero_matrices
from model.gpt import GPT
from model.presets import get_preset
from pgolf_kernels import attention_backend_info

# What is left of ours once all is replaced: the op that calls FlashAttention.
REMAIN = {"varlen_attention", "varlen_attention_backward"}


class _Ops(TorchDispatchMode):
    """The names of our ops that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pgolf":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def network():
    """bench_train_step's small case on the CPU, with weights away from where they start."""
    generator = torch.Generator().manual_seed(0)
    small = {"vocab_size": 512, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 8}
    torch.manual_seed(0)
    network = GPT(get_preset("pr1530").replace(**small).model)
    draw_zero_matrices(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    tokens = torch.randint(512, (1, 193), generator=generator)
    documents = torch.tensor([0, 50, 114, 120, 192, 192], dtype=torch.int32)
    return network, tokens[:, :-1], tokens[:, 1:], documents


def _run(network, loop):
    """(loss and gradients, our ops that ran)."""
    gpt, inputs, targets, documents = network
    gpt.zero_grad()
    with _Ops() as ops:
        loss = gpt.loss(inputs, targets, cu_seqlens=documents, max_seqlen=72, loop=loop)
        loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in gpt.named_parameters()}}, ops.names


@pytest.fixture(scope="module", params=[False, True], ids=["loop off", "loop on"])
def with_all(request, network):
    return request.param, *_run(network, request.param)


def _compare(got, wanted, tolerance=1e-5):
    for name, value in wanted.items():
        error = (got[name] - value).norm() / value.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", [name for name in ablation.QUICK if name not in ("none", "graphs")])
def test_replacements_compute_the_same(network, with_all, name):
    loop, wanted, ours = with_all
    places = [vars(model.gpt), vars(model.stream), vars(model.stream.Stream), vars(network[0])]
    before, forced = [dict(place) for place in places], attention_backend_info()["forced"]
    with ablation.applied(ablation.VARIANTS[name], network[0]):
        got, left = _run(network, loop)
        assert not ablation.VARIANTS[name].torch_attention or attention_backend_info()["forced"] == "torch"
    _compare(got, wanted)
    assert ours - left
    assert left == REMAIN or not name.startswith("all")
    assert [dict(place) for place in places] == before and attention_backend_info()["forced"] == forced


def test_replacements_compute_in_bf16(network):
    gpt, results = network[0], {}
    gpt.compute_dtype = torch.bfloat16
    try:
        for name in ("none", "all"):
            with ablation.applied(ablation.VARIANTS[name], gpt):
                results[name] = _run(network, True)[0]
    finally:
        gpt.compute_dtype = torch.float32
    _compare(results["all"], results["none"], tolerance=0.1)


@pytest.mark.long
def test_the_plain_network_is_one_graph(network, with_all):
    loop, wanted, _ = with_all
    with ablation.applied(ablation.VARIANTS["compiled"], network[0], backend="aot_eager"):
        gpt, inputs, targets, documents = network
        gpt.zero_grad()
        loss = gpt.loss(inputs, targets, cu_seqlens=documents, max_seqlen=72, loop=loop)
        loss.backward()
    assert "loss" not in vars(gpt)
    _compare({"loss": loss.detach(), **{name: p.grad for name, p in gpt.named_parameters()}}, wanted)


def test_rows_are_kept_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation, "RECORDS", tmp_path)
    monkeypatch.setenv("PGOLF_COMMIT", "a" * 40)
    monkeypatch.setattr(ablation, "setup", lambda *_: dict.fromkeys(("inputs", "targets", "cu_seqlens")))
    seconds = iter([0.1, 0.12, 0.11, 0.33])
    monkeypatch.setattr(ablation, "measure", lambda *_: (next(seconds), ""))
    for name in ("compiled", "mlp"):
        monkeypatch.setattr(sys, "argv", ["ablation", "--only", name, "--record"])
        ablation.main()
    assert "1.200 times" in capsys.readouterr().out
    rows = json.loads((tmp_path / "ablation.json").read_text())["ablation"]
    titles = [ablation.VARIANTS[name].title for name in ("none", "mlp", "compiled")]
    assert list(rows) == titles and rows[titles[0]]["seconds"] == 0.11
    page = real_runs.rendered("<!-- run:ablation -->\n<!-- /run -->\n", tmp_path)
    assert f"| {titles[1]} | 330.00 ms, 3.000 times |" in page
