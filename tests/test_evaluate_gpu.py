"""Document steps on a GPU: CUDA graphs, eager steps and the CPU agree, and nothing waits for the device."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from model.adapters import Adapters
from model.evaluate import step_graphs
from model.evaluate.ledger import Ledger
from model.evaluate.lora_ttt import evaluate_lora_ttt
from model.evaluate.phased_ttt import evaluate_phased
from model.evaluate.session import Session
from tests.evaluation import arrays, golden_session
from tests.test_evaluate_golden import golden_a

pytestmark = pytest.mark.gpu


def session_on_gpu(*, graphs: bool, **changes: object) -> Session:
    base = golden_session("pr1530", **changes)
    base.model.compute_dtype = torch.bfloat16
    return Session(
        model=base.model.cuda(),
        config=base.config,
        tokens=base.tokens,
        token_bytes=base.token_bytes,
        ledger=Ledger(len(base.tokens)),
        device=torch.device("cuda"),
        documents_apart=True,
        graphs=graphs,
    )


def scores(*, graphs: bool, **changes: object) -> np.ndarray:
    session = session_on_gpu(graphs=graphs, **changes)
    evaluate_lora_ttt(session, initial_a=golden_a)
    session.ledger.finish()
    return session.ledger.nll[1:]


@pytest.mark.parametrize("slots", [4, 16])
def test_graphs_score_as_eager_steps_do(slots: int) -> None:
    eager, graphed = (scores(graphs=graphs, ttt_batch_size=slots) for graphs in (False, True))
    assert np.abs(eager.mean() - graphed.mean()) < 2e-3
    # bf16 rounds differently in another tile, and every step learns from the difference.
    assert np.quantile(np.abs(eager - graphed), 0.9) < 0.1


@pytest.mark.parametrize("evaluate", [evaluate_lora_ttt, evaluate_phased])
def test_nothing_is_compiled_once_graphs_are_recorded(evaluate: Callable[..., None]) -> None:
    """Documents differ in length, and slots run empty in the end; phases change the weights in between."""
    session = session_on_gpu(graphs=True, ttt_batch_size=5)
    with session.compilations:
        evaluate(session, initial_a=golden_a)
    assert session.late.kernels == []
    assert session.seconds["recording"] > 0


@pytest.mark.parametrize("every", [1, 2, 3])
def test_all_kernels_are_compiled_before_one_runs(monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """Of those that have been compiled before, some run in the first steps, on what the others have not written."""
    from triton.runtime.jit import JITFunction

    from pgolf_kernels import _triton_tile

    want = scores(graphs=True)
    modules = [module for name, module in sys.modules.items() if name.startswith("pgolf_kernels._")]
    kernels = {id(value): value for module in modules for value in vars(module).values()}
    kernels = [value for value in kernels.values() if isinstance(value, JITFunction)]
    for kernel in kernels[::every]:
        kernel.device_caches.clear()
    _triton_tile._compiled.clear()
    session = session_on_gpu(graphs=True)
    together, in_time = step_graphs.compiled_together, []

    @contextmanager
    def counting(device: torch.device) -> Iterator[None]:
        with together(device):
            yield
            assert session.compilations.kernels == []
        in_time.extend(session.compilations.kernels)

    monkeypatch.setattr(step_graphs, "compiled_together", counting)
    with session.compilations:
        evaluate_lora_ttt(session, initial_a=golden_a)
    assert in_time == session.compilations.kernels and len(in_time) > 5
    session.ledger.finish()
    got = session.ledger.nll[1:]
    assert np.quantile(np.abs(got - want), 0.9) < 0.1 and abs(got.mean() - want.mean()) < 2e-3


def test_the_gpu_finds_the_golden_losses() -> None:
    want = arrays()["ttt_lora_pr1530.docs"][:, 0].sum() / 3008
    assert scores(graphs=True).mean() == pytest.approx(want, rel=5e-3)


def test_zero_adapters_change_next_to_nothing() -> None:
    session = session_on_gpu(graphs=False)
    model, ids = session.model, session.input_ids
    rows = (len(ids) - 1) // 64
    cu_seqlens = torch.arange(0, rows * 64 + 1, 64, dtype=torch.int32, device="cuda")
    x, y = ids[None, : rows * 64], ids[None, 1 : rows * 64 + 1]
    slots = sum(map(len, model.config.layer_order(True)))
    kinds = ("q", "k", "v", "o", "mlp", "lm_head")
    zero = Adapters.zeros(model.config, slots, rows, 4, kinds, torch.device("cuda"), torch.float32)
    zero.cu_seqlens = cu_seqlens

    def losses(**inputs: object) -> torch.Tensor:
        with torch.no_grad():
            return model.loss(x, y, cu_seqlens=cu_seqlens, max_seqlen=64, reduction="none", **inputs).double().cpu()

    plain, adapted = losses(), losses(adapters=zero)
    assert torch.equal(adapted, losses(adapters=zero))
    # The other kernels round elsewhere in bf16: as far from the truth as the plain path, and no bias.
    model.cpu().compute_dtype = torch.float32
    x, y, cu_seqlens = x.cpu(), y.cpu(), cu_seqlens.cpu()
    exact = losses()
    assert (adapted - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()
    assert abs(adapted.mean() - plain.mean()) < 1e-3
