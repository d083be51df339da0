"""Triton's compilations are counted, in training and evaluating too: kernels for sm_90, compiled without a GPU."""

import sys
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from model.compilations import Compilations, compiled_together
from model.data.dataset import open_dataset
from model.distributed import Dist
from model.evaluate import evaluate
from model.evaluate.lora_ttt import DocumentTrainer
from model.evaluate.session import Session
from model.run import RunDir
from model.train import Trainer, train
from tests import test_evaluate_modes as modes
from tests import test_verify as small
from tests.tiny import tiny_config, tiny_data
from tests.triton_aot import needs_triton

pytestmark = needs_triton
GPU = torch.device("cuda")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of its own for each test, with nothing cached, where Triton believes in a GPU."""
    from triton import jit
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from tests import triton_kernel

    def load(name, binary, shared, device):
        here.loaded.append(threading.get_ident())
        return object(), object(), 32, 0, 1024

    here = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: None,
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 2**17}, load_binary=load),
        loaded=[],
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", here)
    return jit(triton_kernel.double)


def compile_for(kernel, dtype):
    kernel.warmup(dtype, 4, grid=(1,), BLOCK=16)


def test_each_kernel_counts_once_and_its_time(kernel):
    compilations = Compilations(GPU)
    started = time.monotonic()
    with compilations:
        compile_for(kernel, torch.float32)
        compile_for(kernel, torch.float32)
        compile_for(kernel, torch.bfloat16)
    assert compilations.kernels == ["double", "double"]
    assert 0 < compilations.seconds < time.monotonic() - started
    seconds = compilations.seconds
    with compilations:
        compile_for(kernel, torch.float32)
    assert compilations.kernels == ["double", "double"] and compilations.seconds == seconds
    compile_for(kernel, torch.float16)  # outside
    assert len(compilations.kernels) == 2


def test_blocks_in_one_another_count_what_is_in_them(kernel):
    outer, inner = Compilations(GPU), Compilations(GPU)
    with outer:
        compile_for(kernel, torch.float32)
        with inner:
            compile_for(kernel, torch.bfloat16)
        compile_for(kernel, torch.float16)
    assert (len(outer.kernels), len(inner.kernels)) == (3, 1)
    assert inner.seconds < outer.seconds


def test_hooks_from_before_are_called_and_put_back(kernel, monkeypatch):
    from triton import knobs

    seen = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **facts: seen.append("begin") or refuse)
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **facts: seen.append("end"))
    before = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
    refuse, compilations = False, Compilations(GPU)
    with compilations:
        compile_for(kernel, torch.float32)
        refuse = True
        compile_for(kernel, torch.bfloat16)
    assert seen == ["begin", "end", "begin"] and compilations.kernels == ["double"]
    assert (knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook) == before


def test_a_kernel_that_does_not_compile_takes_time_but_does_not_count(kernel):
    from triton.compiler.errors import CompilationError

    compilations = Compilations(GPU)
    with pytest.raises(CompilationError), compilations:
        kernel.warmup(torch.float32, 4, grid=(1,), BLOCK=17)  # no power of two
    seconds = compilations.seconds
    with compilations:
        time.sleep(0.2)
    assert compilations.kernels == [] and 0 < seconds == compilations.seconds


def test_kernels_that_are_not_compiled_are_left_out_and_compiled_together(kernel, monkeypatch):
    """Launches would fail: there is no GPU."""
    from triton import knobs
    from triton.runtime.driver import driver

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    threads = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **facts: threads.append(threading.get_ident()))
    compilations, tensors = Compilations(GPU), [torch.ones(16, dtype=dtype) for dtype in (torch.float32, torch.int32)]
    with compilations:
        with compiled_together(GPU):
            for x in (*tensors, *tensors):
                kernel[(1,)](x, 4, BLOCK=16, num_warps=2)
            assert threads == []
        assert compilations.kernels == ["double", "double"] and compilations.seconds > 0
        assert sorted(driver.active.loaded) == sorted(threads)
        for x in tensors:
            kernel.warmup(x, 4, grid=(1,), BLOCK=16, num_warps=2)
        assert len(threads) == 2 and threading.get_ident() not in threads
        kernel.warmup(tensors[0], 4, grid=(1,), BLOCK=16, num_warps=4)
    assert len(compilations.kernels) == 3


def test_a_block_that_breaks_off_compiles_nothing(kernel, monkeypatch):
    from triton import knobs

    with pytest.raises(ValueError, match="broken"), Compilations(GPU) as compilations, compiled_together(GPU):
        kernel[(1,)](torch.ones(16), 4, BLOCK=16)
        raise ValueError("broken")
    assert compilations.kernels == [] and knobs.runtime.jit_cache_hook is None


def test_nothing_is_counted_where_nothing_can_be_compiled(kernel, monkeypatch):
    with Compilations(torch.device("cpu")) as on_cpu:
        compile_for(kernel, torch.float32)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("model.compilations.has_triton", lambda: False)
    ran = []
    with Compilations(GPU) as without, compiled_together(GPU):
        ran.append(True)
    assert ran
    assert on_cpu.kernels == without.kernels == []


def test_training_counts_what_its_steps_compile_after_the_warm_up(kernel, tmp_path, monkeypatch):
    data = tiny_data(tmp_path)
    step, validate = Trainer.train_step, Trainer._validate
    at_step = {1: torch.float16, 3: torch.bfloat16}

    def compiling_step(self, settings):
        compile_for(kernel, at_step.get(self.step, torch.float32))
        return step(self, settings)

    def compiling_validation(self):
        compile_for(kernel, torch.int32)
        validate(self)

    monkeypatch.setattr(Trainer, "train_step", compiling_step)
    monkeypatch.setattr(Trainer, "_validate", compiling_validation)
    monkeypatch.setattr("model.train.Compilations", lambda device: Compilations(GPU))
    run = RunDir(tmp_path / "run")
    result = train(tiny_config(data, tmp_path), open_dataset(data), run, Dist.single())
    assert result.compilations == 2 == run.result()["train"]["late_compilations"]


def test_an_evaluation_counts_what_it_compiles_and_what_after_its_graphs(kernel, monkeypatch):
    """Graphs that are not there: steps run as they are."""
    losses, data = Session.losses, modes.dataset(modes.stream(40, 9, 50, 33, 60, 20, 70))
    left, preparing = [torch.float32, torch.bfloat16], []

    def compiling_losses(self, *inputs, **options):
        if left:
            compile_for(kernel, left.pop())
        return losses(self, *inputs, **options)

    def prepare(self, parts):
        started = time.monotonic()
        with self.session.timed("recording"):
            compile_for(kernel, torch.float16)
        preparing.append(time.monotonic() - started - self.session.compilations.seconds)
        self._graphs = SimpleNamespace(run=self.step)

    monkeypatch.setattr(Session, "losses", compiling_losses)
    monkeypatch.setattr("model.evaluate.session.Compilations", lambda device: Compilations(GPU))
    plain = evaluate(small.model(), data, "plain", modes.CONFIG, device="cpu")
    assert (plain.compilations, plain.late_compilations) == (2, 0)
    left.append(torch.int32)
    monkeypatch.setattr(DocumentTrainer, "prepare", prepare)
    adapted = evaluate(small.model(), data, "lora-ttt", modes.CONFIG, device="cpu")
    assert (adapted.compilations, adapted.late_compilations) == (2, 1)
    assert 0 < adapted.seconds_by_part["recording"] <= preparing[0]  # without compiling
    assert adapted.summary()["late_compilations"] == 1


@pytest.mark.gpu
def test_a_launch_counts():
    from triton import jit

    from tests import triton_kernel

    kernel, x = jit(triton_kernel.double), torch.ones(16, device="cuda")
    compilations = Compilations(GPU)
    with compilations:
        for _ in range(2):
            kernel[(1,)](x, 16, BLOCK=16)
    assert compilations.kernels == ["double"] and x.sum() == 64
