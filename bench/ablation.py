"""What each kernel is worth in a training step: `python -m bench.ablation [--only NAME ...] [--record]`.

The micro-step of bench_train_step.py, layer loop on, is timed with all kernels, with one after another replaced by the
PyTorch expression of expressions.py, and with all replaced: eagerly, and under torch.compile. The network's form stays
(its sums of residual streams, its stacked weights, one cast a call), so that a row says what the kernel alone is worth.
"The same attention" is called through our op: what one has without this package but with FlashAttention 3. The ratio
is to all kernels in the same process. Compiled variants take minutes and run only where `--only` names them.

`--record` keeps the rows in bench/runs, beside those that machine, versions and commit had there already; bench.render
writes them into the documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from bench import expressions
from bench.bench_train_step import CASES, DEVICE, GPU, MICRO_STEP_WEIGHT, config, our_model, setup
from bench.common import Call, elapsed, first_line
from bench.machine import environment
from bench.real_runs import RECORDS, ablated
from model.data.loaders import Batch
from model.gpt import GPT
from model.micro_step import MicroStep
from model.run import commit
from pgolf_kernels import attention_backend_info, set_attention_backend
from pgolf_kernels.xsa import reference as xsa_reference

CALLS, ROUNDS = (5, 5) if GPU else (1, 3)  # calls back to back; the median of so many rounds
CASE = CASES[-1]

# By kernel: the names that the network finds it under. Where two name one place, the later has it if both are replaced.
REPLACEMENTS: dict[str, dict[str, Callable[..., Any]]] = {
    "residual": {
        "model.gpt.norm_residual": expressions.norm_residual,
        "model.stream.norm_residual": expressions.norm_residual,
        "model.stream.combine": expressions.combine,
        "model.stream.combine_norm": expressions.combine_norm,
        "model.stream.Stream.replaced": expressions.replaced,
        "model.gpt.add_linear_": expressions.add_linear,
        "model.gpt.fused_mlp": expressions.fused_mlp_beside,
    },
    "mlp": {"model.gpt.fused_mlp": expressions.mlp},
    "qkv-rope": {"model.gpt.qkv_rope": expressions.qkv_rope},
    "xsa": {"model.gpt.xsa": xsa_reference},
    "attention": {"model.gpt.varlen_attention": expressions.attention},
    "embedding": {"model.gpt.embedding": expressions.embedding},
    "head": {"model.gpt.linear_softcap_cross_entropy": expressions.head},
}


@dataclass(frozen=True)
class Variant:
    title: str
    replaced: tuple[str, ...] = ()
    torch_attention: bool = False  # FlashAttention 3 is not ours: who has it has it without this package
    record: bool = True  # as a CUDA graph
    compiled: bool = False


EVERY = tuple(REPLACEMENTS)
VARIANTS = {
    "none": Variant("all kernels"),
    "residual": Variant("without the residual stream's sums and norms", ("residual",)),
    "mlp": Variant("without the fused MLP", ("mlp",)),
    "qkv-rope": Variant("without q, k and v with norms and RoPE", ("qkv-rope",)),
    "xsa": Variant("without XSA", ("xsa",)),
    "attention": Variant("torch's attention", ("attention",), torch_attention=True),
    "embedding": Variant("without the embedding", ("embedding",)),
    "head": Variant("without the head with its loss", ("head",)),
    "graphs": Variant("without CUDA graphs", record=False),
    "all": Variant("none of these", EVERY, torch_attention=True, record=False),
    "all-same-attention": Variant("none of these, the same attention", EVERY, record=False),
    "compiled": Variant("none, torch.compile", EVERY, torch_attention=True, record=False, compiled=True),
    "compiled-same-attention": Variant("none, torch.compile, the same attention", EVERY, record=False, compiled=True),
}
QUICK = [name for name, variant in VARIANTS.items() if not variant.compiled]


@contextlib.contextmanager
def applied(variant: Variant, model: GPT, **compiler: Any) -> Iterator[None]:
    """The network as the variant has it; everything is put back. `compiler`: torch.compile's other options."""
    places: dict[str, Callable[..., Any]] = {}
    for name in REPLACEMENTS:
        places |= REPLACEMENTS[name] if name in variant.replaced else {}
    with contextlib.ExitStack() as stack:
        for place, expression in places.items():
            stack.enter_context(mock.patch(place, expression))
        if variant.torch_attention:
            stack.callback(set_attention_backend, attention_backend_info()["forced"])
            set_attention_backend("torch")
        if variant.compiled:
            stack.callback(torch._dynamo.reset)
            loss = torch.compile(model.loss, dynamic=False, fullgraph=True, **compiler)
            stack.enter_context(mock.patch.object(model, "loss", loss))
        yield


def micro_step_of(model: GPT, variant: Variant, batch: Batch) -> tuple[MicroStep, str]:
    """One that has run, and why it is not recorded although the variant would be."""
    options: dict[str, Any] = {"weight": MICRO_STEP_WEIGHT, "max_seqlen": batch.max_seqlen}
    eager = MicroStep(model, **options, record=False)
    eager(batch, loop=CASE.loop)
    if not (GPU and variant.record):
        return eager, ""
    try:
        torch.cuda.set_sync_debug_mode("error")  # found by waiting while recording, it would spoil the process
        try:
            eager(batch, loop=CASE.loop)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        gc.collect()
        recorded = MicroStep(model, **options)
        recorded(batch, loop=CASE.loop)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return eager, f"not as a CUDA graph: {first_line(error)}"
    return recorded, ""


def median_seconds(call: Call) -> float:
    """Seconds a call, back to back."""
    call()
    return statistics.median(elapsed(lambda: [call() for _ in range(CALLS)]) / CALLS for _ in range(ROUNDS))


def measure(variant: Variant, batch: Batch) -> tuple[float, str]:
    """(seconds, remark)."""
    gc.collect()  # the graph of the variant before, with its memory
    if GPU:
        torch.cuda.empty_cache()
    model = our_model()
    with applied(variant, model):
        micro_step, remark = micro_step_of(model, variant, batch)
        return median_seconds(lambda: micro_step(batch, loop=CASE.loop)), remark


def keep(rows: dict[str, dict[str, Any]]) -> None:
    """A record in the form of a run's, of these rows and of what the same machine and sources had on record."""
    file = RECORDS / "ablation.json"
    record = {
        "machine": environment([])["device"],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
        "changed": {},
        "note": f"{CASE}; attention: {attention_backend_info()['backend']}; `python -m bench.ablation --record`",
    }
    before = json.loads(file.read_text()) if file.exists() else {}
    if before.get("machine", record["machine"]) != record["machine"]:
        raise SystemExit(f"ablation: {file} is of {before['machine']}, wanted {record['machine']}: move it away first")
    same = record["commit"] is not None and all(before.get(name) == value for name, value in record.items())
    merged = (before["ablation"] if same else {}) | rows
    order = [variant.title for variant in VARIANTS.values()]
    record["ablation"] = {title: merged[title] for title in order if title in merged}
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    names = list(VARIANTS)[1:]
    parser = argparse.ArgumentParser(prog="python -m bench.ablation")
    parser.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"this variant beside all kernels; may be repeated: {', '.join(names)} (default: those not compiled)",
    )
    parser.add_argument("--record", action="store_true", help="keep the rows in bench/runs")
    options = parser.parse_args()
    inputs = setup(CASE, DEVICE)
    batch = Batch(inputs["inputs"], inputs["targets"], inputs["cu_seqlens"], config().data.train_seq_len)
    print(f"{CASE}, {config().train.dtype}, attention: {attention_backend_info()['backend']}")
    rows: dict[str, dict[str, Any]] = {}
    for name in ["none", *(options.only or QUICK[1:])]:
        variant = VARIANTS[name]
        print(f"{variant.title:<48}", end="", flush=True)
        seconds, remark = measure(variant, batch)
        ratio = seconds / next(iter(rows.values()))["seconds"] if rows else 1.0
        rows[variant.title] = {"seconds": round(seconds, 6), "ratio": round(ratio, 4), "remark": remark}
        print(ablated(rows[variant.title]), flush=True)
        if options.record:
            keep(rows)


if __name__ == "__main__":
    main()
