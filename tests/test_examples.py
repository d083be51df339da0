"""The examples run as they stand, and do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def main_of(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_the_loss_is_the_models_own():
    ours, theirs = main_of("causal_lm_loss")()
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours > 5  # an untrained model: about ln 512


def test_packed_codes_are_smaller_than_their_bits():
    bits, error = main_of("quantise_any_model")()
    assert bits < 4
    assert error < 0.15


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
