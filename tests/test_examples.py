"""The examples, in their folder and in the documentation, run as they stand and do what they say."""

import ctypes
import math
import re
import runpy
from pathlib import Path

import pytest
import torch

import pgolf_kernels
from pgolf_kernels import _native

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
    (bits, error), (finer_bits, finer_error) = main_of("quantise_any_model")()
    assert bits < 4 < finer_bits < 6
    assert 2 * finer_error < error < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_not_called_are_left_alone(dtype):
    """nn.MultiheadAttention multiplies by out_proj's weight without calling it, so that its Hessian stays unknown."""
    example = runpy.run_path(str(EXAMPLES / "quantise_any_model.py"))
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).to(dtype).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    packed, scales = example["quantise_and_pack"](
        model, [torch.randn(4, 64, 32, dtype=dtype)], bits=6, clip_sigmas=12.85
    )
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


KERNEL_PAGES = [
    page
    for page in sorted((EXAMPLES.parent / "docs").glob("*.md"))
    if page.stem not in ("adding_a_kernel", "artifact") and "```python" in page.read_text()
]


@pytest.mark.parametrize("page", KERNEL_PAGES, ids=[page.stem for page in KERNEL_PAGES])
def test_the_kernel_pages_examples(page, tmp_path):
    file = tmp_path / "example.py"
    file.write_text("\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)))
    torch.manual_seed(0)
    runpy.run_path(str(file))


def test_every_exported_function_is_in_the_readme():
    settings = {"attention_backend_info", "set_attention_backend"}
    assert [name for name in pgolf_kernels.__all__ if name not in settings and name not in README] == []


NEW_KERNEL = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / "docs/adding_a_kernel.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def scale_shift(tmp_path_factory):
    """The kernel of docs/adding_a_kernel.md as the page has it, with PyTorch in the place of the native function."""

    def tensor(address, *shape):
        memory = (ctypes.c_float * math.prod(shape)).from_address(address)
        return torch.frombuffer(memory, dtype=torch.float32).view(shape)

    def native(x, scale, shift, y, rows, columns, threads):
        product = tensor(x, rows, columns) * tensor(scale, columns)
        tensor(y, rows, columns).copy_(product + tensor(shift, columns))

    file = tmp_path_factory.mktemp("kernel") / "scale_shift.py"
    file.write_text("\n\n".join(NEW_KERNEL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "scale_shift_cpu", native, raising=False)
        yield runpy.run_path(str(file))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_page_on_kernels_makes_an_op(scale_shift, dtype, transposed):
    torch.manual_seed(0)
    x, scale, shift = torch.randn(5, 3, dtype=dtype), torch.randn(3, dtype=dtype), torch.randn(3, dtype=dtype)
    if transposed:
        x = torch.randn(3, 5, dtype=dtype).T
    inputs = [value.detach().requires_grad_() for value in (x, scale, shift)]
    assert set(torch.library.opcheck(scale_shift["_op"], inputs).values()) == {"SUCCESS"}
    expected = (x.double() * scale.double() + shift.double()).to(dtype)
    torch.testing.assert_close(scale_shift["scale_shift"](*inputs), expected)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(scale_shift["scale_shift"], inputs)


def test_the_page_on_kernels_checks_its_arguments(scale_shift):
    x, scale, shift = torch.ones(5, 3), torch.ones(3), torch.ones(3)
    call = scale_shift["scale_shift"]
    with pytest.raises(ValueError, match=r"x: got shape \(3,\), wanted \[N, D\]"):
        call(x[0], scale, shift)
    with pytest.raises(ValueError, match=r"shift: got shape \(2,\), wanted \[3\]"):
        call(x, scale, shift[:2])
    with pytest.raises(TypeError, match=r"scale: got torch\.bfloat16 on cpu, wanted x's torch\.float32 on cpu"):
        call(x, scale.bfloat16(), shift)
    with pytest.raises(TypeError, match=r"shift: got torch\.float32 on meta, wanted x's torch\.float32 on cpu"):
        call(x, scale, shift.to("meta"))
