"""A training step of pull request 1530's model on packed documents, beside that pull request's own script.

"micro_step" is one forward and backward pass over 98,304 tokens; "step" adds what follows each of them on 8 GPUs:
clipping, Muon, AdamW and the moving average. The tokens are those of data.py, in documents of lengths drawn as in web
text; output projections are not zero, as they are after the first step. Both sides use the attention that this package
chooses, or FlashAttention 3 where the public script (`pr1530/train_gpt.py` in PGOLF_PEER_DIR) finds it. "pgolf fp8" is
our step with `--fp8-mlp`: other numbers in the MLPs, so that it stands beside the others and is no like for like.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import data
from bench.common import DEVICE, Call, Work
from bench.peers import Absent, script_1530
from model.config import Config
from model.data.loaders import Batch, build_cu_seqlens
from model.distributed import Dist
from model.flops import train_flops
from model.gpt import GPT
from model.micro_step import MicroStep
from model.optim import Optimizer, WeightAverage
from model.presets import get_preset
from pgolf_kernels.fp8_mlp import runs_fp8

GPU = DEVICE.type == "cuda"
MEAN_LOG_LENGTH, STD_LOG_LENGTH = 6.2, 1.0  # documents of about 800 tokens on average
MICRO_STEP_WEIGHT = 1 / 8
_CAPTURE_REFUSED = "it allocates gradients"  # so it is timed as it runs, not as a graph


@dataclass(frozen=True)
class Case:
    tokens: int
    loop: bool

    def __str__(self) -> str:
        return f"{self.tokens} tokens, loop {'on' if self.loop else 'off'}"


CASES = [Case(98304, False), Case(98304, True)] if GPU else [Case(512, False), Case(512, True)]


@functools.cache
def config() -> Config:
    """1530's, or on a CPU a network of the same kind that takes well under a second."""
    preset = get_preset("pr1530")
    if GPU:
        return preset
    small = {"vocab_size": 512, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 8}
    return preset.replace(dtype="float32", train_seq_len=256, **small)


def setup(case: Case, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randn(case.tokens // 16, generator=generator).mul(STD_LOG_LENGTH).add(MEAN_LOG_LENGTH).exp()
    starts = lengths.clamp(min=32).long().cumsum(0)
    starts = starts[starts < case.tokens].numpy()
    cu_seqlens, _ = build_cu_seqlens(starts, case.tokens, config().data.train_seq_len, config().data.cu_bucket_size)
    tokens = torch.from_numpy(np.resize(data.tokens(), case.tokens + 1).astype(np.int64)) % config().model.vocab_size
    tokens[starts] = 1
    return {
        "inputs": tokens[:-1].view(1, -1).to(device),
        "targets": tokens[1:].view(1, -1).to(device),
        "cu_seqlens": torch.from_numpy(cu_seqlens).to(device),
    }


def work(case: Case) -> Work:
    """Matrix products and attention; weights and optimiser state read and written once."""
    lengths = setup(case, torch.device("cpu"))["cu_seqlens"].diff().double()
    pairs = float((lengths * (lengths + 1)).sum() / 2)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config().model).parameters())
    return Work(bytes=parameters * 4 * 6, flops=int(train_flops(config().model, case.loop, case.tokens, pairs)))


def draw_zero_matrices(model: Any) -> None:
    """Output projections as after some training; they start at zero, which no later step sees."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name == "qo_bank":
                param[len(param) // 2 :].normal_(std=0.02)
            elif name in ("down_bank", "mlp_down_bank"):
                param.normal_(std=0.01)


def not_captured() -> None:
    if GPU and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(_CAPTURE_REFUSED)


@functools.cache
def our_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(config().model).to(DEVICE)
    draw_zero_matrices(model)
    model.compute_dtype = getattr(torch, config().train.dtype)
    return model


def our_micro_step(case: Case, inputs: dict[str, Tensor], *, fp8: bool = False) -> Call:
    """With graphs of its own, so that the memory that they hold is this row's."""
    if fp8 and not (GPU and runs_fp8(DEVICE)):
        raise Absent("needs a GPU of compute capability 9.0")
    run = MicroStep(our_model(), weight=MICRO_STEP_WEIGHT, max_seqlen=config().data.train_seq_len, fp8=fp8)
    batch = Batch(inputs["inputs"], inputs["targets"], inputs["cu_seqlens"], run.max_seqlen)

    def call() -> None:
        not_captured()
        run(batch, loop=case.loop)

    return call


def our_step(case: Case, inputs: dict[str, Tensor], *, fp8: bool = False) -> Call:
    params = dict(our_model().named_parameters())
    optimizer = Optimizer(params, config().train, Dist.single(DEVICE))
    average = WeightAverage(params, config().train)
    optimizer.zero_grad()
    micro_step = our_micro_step(case, inputs, fp8=fp8)

    def call() -> None:
        micro_step()
        optimizer.step(0.01, 0.97)
        average.update()

    return call


@functools.cache
def peer() -> tuple[Any, Any, Any]:
    """(module, model, compiled model) of the public script."""
    if not GPU:
        raise Absent("the public script needs a GPU")
    module = script_1530()
    torch.manual_seed(0)
    model = module.GPT(module.Hyperparameters()).to(DEVICE).bfloat16()
    module.restore_fp32_params(model)
    draw_zero_matrices(model)
    return module, model, torch.compile(model, dynamic=False, fullgraph=True)


def peer_micro_step(case: Case, inputs: dict[str, Tensor]) -> Call:
    _, model, compiled = peer()

    def call() -> None:
        not_captured()
        model.looping_active = case.loop
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(inputs["inputs"], inputs["targets"], cu_seqlens=inputs["cu_seqlens"], max_seqlen=2048)
        (loss * MICRO_STEP_WEIGHT).backward()

    return call


def peer_step(case: Case, inputs: dict[str, Tensor]) -> Call:
    module, model, _ = peer()
    hyperparameters = module.Hyperparameters()
    optimizers = module.Optimizers(hyperparameters, model)
    averages = {name: t.detach().float().clone() for name, t in model.state_dict().items()}
    micro_step = peer_micro_step(case, inputs)

    def call() -> None:
        micro_step()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * group["base_lr"]
        torch.nn.utils.clip_grad_norm_(model.parameters(), hyperparameters.grad_clip_norm)
        optimizers.step(distributed=False)
        with torch.no_grad():
            state = model.state_dict()
            for name, average in averages.items():
                average.lerp_(state[name].float(), 1.0 - hyperparameters.ema_decay)

    return call


MICRO_STEPS = {
    "pgolf": our_micro_step,
    "pgolf fp8": functools.partial(our_micro_step, fp8=True),
    "pull request 1530": peer_micro_step,
}
STEPS = {"pgolf": our_step, "pgolf fp8": functools.partial(our_step, fp8=True), "pull request 1530": peer_step}


@pytest.mark.timeout(600)  # the public script compiles for minutes
@pytest.mark.parametrize("provider", MICRO_STEPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_step(bench, case, provider):
    bench(case, provider, MICRO_STEPS, setup, work)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("provider", STEPS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(bench, case, provider):
    bench(case, provider, STEPS, setup, work)
