"""Micro-steps: weighted gradients that add up, and recordings that equal eager runs."""

import pytest
import torch

from model.data.loaders import Batch
from model.micro_step import MicroStep
from tests.systems import golden_model

CU_SEQLENS = [[0, 17, 70, 128, 128, 128], [0, 50, 60, 64, 100, 128]]


def _batches(golden, device="cpu"):
    ids, targets = (golden[name].long().view(1, -1).to(device) for name in ("input_ids", "target_ids"))
    bounds = [torch.tensor(c, dtype=torch.int32, device=device) for c in CU_SEQLENS]
    return [Batch(ids, targets, bounds[0], 64), Batch(ids.flip(1), targets.flip(1), bounds[1], 64)]


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def _eager(model, batches, loop):
    model.zero_grad()
    for batch in batches:
        loss = model.loss(batch.inputs, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=64, loop=loop)
        (0.5 * loss).backward()
    return _gradients(model)


def test_weighted_gradients_add_up():
    model, golden = golden_model("pr1530")
    batches = _batches(golden)
    expected = _eager(model, batches, True)
    model.zero_grad()
    step = MicroStep(model, weight=0.5, max_seqlen=64)
    losses = [step(batch, loop=True) for batch in batches]
    assert all(loss.dim() == 0 and not loss.requires_grad for loss in losses)
    for name, gradient in _gradients(model).items():
        assert torch.equal(gradient, expected[name]), name
    assert step.recordings == 0


@pytest.mark.gpu
def test_recordings_equal_eager_runs():
    model, golden = golden_model("pr1530")
    model = model.cuda()
    model.compute_dtype = torch.bfloat16
    batches = _batches(golden, "cuda")
    step = MicroStep(model, weight=0.5, max_seqlen=64)
    for loop in (False, True):
        expected = _eager(model, batches, loop)
        for parameter in model.parameters():
            parameter.grad.zero_()
        before = step.recordings
        losses = [step(batch, loop=loop).item() for batch in batches]
        assert step.recordings == before + 1
        assert losses[0] != losses[1]
        for name, gradient in _gradients(model).items():
            error = (gradient - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)
            assert error < 2e-2, f"{name}: relative error {error:.1e}"
