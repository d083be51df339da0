"""The examples, in their folder and in the documentation, run as they stand and do what they say."""

import re
import runpy
from pathlib import Path

import pytest
import torch

import pgolf_kernels

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_the_loss_is_the_models_own():
    ours, theirs = main_of("causal_lm_loss")()
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours > 5  # an untrained model: about ln 512


def test_the_model_is_huggingfaces_where_it_is_installed():
    transformers = pytest.importorskip("transformers")
    model = runpy.run_path(str(EXAMPLES / "causal_lm_loss.py"))["build_model"]()
    assert isinstance(model, transformers.LlamaForCausalLM)


def test_packed_codes_are_smaller_than_their_bits():
    bits, error = main_of("quantise_any_model")()
    assert bits < 4
    assert error < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_not_called_are_left_alone(dtype):
    """nn.MultiheadAttention multiplies by out_proj's weight without calling it, so that its Hessian stays unknown."""
    example = runpy.run_path(str(EXAMPLES / "quantise_any_model.py"))
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).to(dtype).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed, scales = example["quantise_and_pack"](model, [torch.randn(4, 64, 32, dtype=dtype)], bits=6)
    example["load_packed"](model, packed, scales)
    assert list(scales) == ["linear1", "linear2"]
    for name, value in model.state_dict().items():
        error = ((value - before[name]).norm() / before[name].norm().clamp(min=1)).item()
        assert 0 < error < 0.3 if name in ("linear1.weight", "linear2.weight") else error == 0, name


def test_every_document_learns_its_own_map():
    before, after = main_of("lora_per_document")()
    assert before > 0.5
    assert after < before / 50


def test_no_example_is_left_out():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "causal_lm_loss",
        "lora_per_document",
        "quantise_any_model",
    }


README = (EXAMPLES.parent / "README.md").read_text()
KERNEL_EXAMPLES = re.findall(r"<summary>([^\n]+)</summary>\n\n```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(("title", "code"), KERNEL_EXAMPLES, ids=[title for title, _ in KERNEL_EXAMPLES])
def test_the_readmes_examples(title, code, tmp_path):
    assert len(code.splitlines()) <= 24, "a reader wants to see it at a glance"
    file = tmp_path / "example.py"
    file.write_text(code)
    torch.manual_seed(0)
    runpy.run_path(str(file))


def test_every_exported_function_is_in_the_readme():
    settings = {"attention_backend_info", "set_attention_backend"}
    assert [name for name in pgolf_kernels.__all__ if name not in settings and name not in README] == []
