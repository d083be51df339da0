"""The step's breakdown: kernels are told by their names, and rows add up to the step, communication among them."""

import json
import re

import pytest
import torch

from bench import real_runs, step_breakdown
from bench.step_breakdown import COMMUNICATION, HIDDEN, KINDS, OPTIMISER, ROWS, STEPS, Span, breakdown, covered, kind_of
from model.distributed import Dist
from model.gpt import GPT
from tests.tiny import tiny_config

# As the profiler names them, some without what follows.
NAMES = {
    COMMUNICATION: [
        "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    ],
    "attention": [
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<flash::Mainloop> > >",
        "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnBwdSm90<flash::Mainloop> > >",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x64_4x1x1_cga1x1x1_kernel0_0",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
    ],
    "MLP's products with an activation": [
        "_up_kernel", "_grad_pre_kernel", "void pgolf::(anonymous namespace)::product_kernel<true>(Tiles)",
    ],
    "loss": [
        "_powers_kernel", "_finish_kernel", "_scale_rows_kernel",
        "void pgolf::(anonymous namespace)::powers_kernel<1>(Arguments)",
    ],
    "norms, mixing, RoPE, XSA": [
        "_forward_kernel", "_backward_kernel", "_frozen_backward_kernel", "_sum_rows_kernel",
    ],
    "other matrix products": [
        "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel__5x_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_256x128_32x3_tn_align8>(Params)",
        "_project_kernel",
    ],
    "embedding": [
        "_tiles_kernel",
        "_joins_kernel",
        "void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<Policy1000, false, long>(unsigned int*)",
    ],
    "copies and the rest": [
        "Memcpy DtoD (Device -> Device)",
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16> >(int)",
    ],
}  # fmt: skip
MICRO = [("nvjet_a", 0.0, 4.0), ("FlashAttnFwd", 4.0, 6.0), ("Memcpy DtoD", 6.0, 6.5)]


def spans(*each: tuple[str, float, float]) -> list[Span]:
    """The same milliseconds in each of STEPS steps, one after the other."""
    return [Span(name, (100 * i + a) / 1e3, (100 * i + b) / 1e3) for i in range(STEPS) for name, a, b in each]


@pytest.mark.parametrize(("kind", "kernel"), [(kind, name) for kind, names in NAMES.items() for name in names])
def test_kernels_are_told_by_their_names(kind: str, kernel: str) -> None:
    assert kind_of(kernel) == kind


def test_every_kind_has_a_row_and_a_name_here() -> None:
    assert set(NAMES) == {kind for kind, _ in KINDS} <= set(ROWS) and len(set(ROWS)) == len(ROWS)


def test_time_in_which_kernels_run_counts_once() -> None:
    assert covered([]) == 0.0
    runs = [Span("a", 0.0, 2.0), Span("b", 1.0, 1.5), Span("c", 1.5, 3.0), Span("d", 5.0, 6.0)]
    assert covered(reversed(runs)) == 4.0


def test_only_communication_beside_nothing_else_is_part_of_the_step() -> None:
    finish = spans(
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 0.0, 3.0),
        ("_direction_kernel", 1.0, 2.0),  # behind it 1 ms of the 3
        ("nvjet_newton_schulz", 3.0, 5.0),
        ("ncclDevKernel_AllGather_RING_LL", 4.0, 5.5),  # 1 of 1.5 ms behind a product
        ("adamw", 7.0, 7.25),
    )
    column = breakdown(spans(*MICRO), finish, total=14e-3)
    assert list(column) == list(ROWS)
    assert {name: round(1e3 * seconds, 9) for name, seconds in column.items() if seconds} == {
        "other matrix products": 4.0, "attention": 2.0, "copies and the rest": 0.5, OPTIMISER: 3.25,
        COMMUNICATION: 2.5, HIDDEN: 2.0, "idle": 1.75, "total": 14.0,
    }  # fmt: skip


def test_rows_add_up_without_communication_and_with_overlap() -> None:
    column = breakdown(spans(*MICRO), spans(("adamw", 0.0, 1.0)), total=7e-3)
    assert column[COMMUNICATION] == column["idle"] == 0.0 and column[HIDDEN] == pytest.approx(0.0, abs=1e-12)
    assert column["overlap"] == pytest.approx(-0.5e-3)
    parts = [column[name] for name in ROWS if name not in ("total", HIDDEN)]
    assert sum(parts) == pytest.approx(column["total"]) == 7e-3


@pytest.mark.parametrize(("world", "name"), [(1, "micro_step_loop_on"), (8, "micro_step_loop_on_gpus_8")])
def test_a_column_is_kept_by_the_number_of_gpus(world: int, name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(step_breakdown, "RECORDS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    column = breakdown(spans(*MICRO), spans(("nccl", 0.0, 1.0), ("adamw", 2.0, 3.0)), total=9e-3)
    step_breakdown.keep(column, True, world)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["machine"] == ("NVIDIA H200" if world == 1 else "8 x NVIDIA H200")
    assert ("torchrun --standalone --nproc_per_node=8" in record["note"]) == (world > 1)
    page = real_runs.rendered(f"<!-- run:{name} -->\n<!-- /run -->\n", tmp_path)
    rows = re.findall(r"^\| (.+) \| .+ ms \|$", page, re.MULTILINE)
    assert rows == list(ROWS) and "| communication | 1.00 ms |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU")
def test_a_column_for_each_case_with_the_optimiser_in_the_step(tmp_path, monkeypatch) -> None:
    """On a CPU, with a small network and made-up kernels: each call that is profiled has its own."""
    config = tiny_config(tmp_path, tmp_path)

    def profiled(call) -> list[Span]:
        call()
        return spans(("nccl", 0.0, 1.0)) if call.__name__ == "finish" else spans(("nvjet", 0.0, 2.0))

    monkeypatch.setattr(step_breakdown, "RECORDS", tmp_path)
    monkeypatch.setattr(step_breakdown, "spans_of", profiled)
    monkeypatch.setattr(step_breakdown, "config", lambda: config)
    monkeypatch.setattr(step_breakdown, "our_model", lambda: GPT(config.model))
    monkeypatch.setattr(step_breakdown, "our_micro_step", lambda case, inputs: lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    table = step_breakdown.measure(Dist.single(), record=True)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [row[0] for row in rows] == list(ROWS) and all(len(row) == 3 for row in rows)
    found = {row[0]: row[1:] for row in rows}
    assert found["other matrix products"] == ("2.00", "2.00") and found[COMMUNICATION] == ("1.00", "1.00")
    assert all(float(total) > 0 for total in found["total"])
    assert {path.name for path in tmp_path.iterdir()} == {"micro_step_loop_off.json", "micro_step_loop_on.json"}


def test_no_record_has_another_row() -> None:
    records = list(real_runs.RECORDS.glob("micro_step_*.json"))
    assert records
    for record in records:
        assert set(json.loads(record.read_text())["breakdown"]) <= set(ROWS)
