"""Document-wise test-time training: a whole validation set, one chunk step of a batch of documents, and a cold start.

The set is the text of data.py, documents over 2,500 tokens left out, and one of 25,000 tokens made from its start; on a
CPU a small part of that and a small network. The peer is the evaluation function of pull request 1727, loaded
from PGOLF_PEER_DIR, compiled and warmed up as its script does before its clock starts, on the same weights. Its chunk
step is compiled for its one context, which is no slower than the script's compilation for all of them, and takes less
time to compile.

A cold start is what a fresh process does between having its network and the first document: ours compiles every kernel
and records every graph, the peer does what its script does before its clock starts. The caches on the disk are empty.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench import common, data
from bench.machine import Neighbours
from bench.peers import Absent, peer_module
from model.config import Config, ModelConfig
from model.convert import to_reference
from model.data.shards import BOS_ID
from model.evaluate.documents import find_documents
from model.evaluate.ledger import Ledger
from model.evaluate.lora_ttt import DocumentTrainer
from model.evaluate.session import Session
from model.gpt import GPT
from model.presets import get_preset
from pgolf_kernels import varlen_attention

GPU = common.DEVICE.type == "cuda"
LONGEST, LONG_DOCUMENT = 2_500, 25_000
CONTEXTS = (96, 2048)
STEPS = 5


def configuration() -> Config:
    config = get_preset("pr1727")
    if GPU:
        return config
    network = ModelConfig(vocab_size=512, num_layers=4, model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=8)
    small = network.__class__(**{**vars(network), "loop_start": 1, "loop_end": 1, "parallel_start": 3, "xsa_last_n": 4})
    return Config(model=small, eval=config.eval).replace(ttt_lora_rank=8, ttt_batch_size=8, ttt_eval_seq_len=256)


def stream(vocabulary: int) -> np.ndarray:
    """The documents as one stream of uint16 tokens."""
    tokens = data.tokens()
    bodies = [tokens[start + 1 : start + n] for start, n in find_documents(tokens)]
    bodies = [body[body != BOS_ID] for body in bodies]
    everything = np.concatenate(bodies)
    kept = [body for body in bodies if len(body) < LONGEST]
    if not GPU:
        kept = [body for body in kept if len(body) < 200][:12]
    long = [np.resize(everything, LONG_DOCUMENT)] if GPU else []
    return np.concatenate([np.append(np.uint16(BOS_ID), body % vocabulary) for body in kept + long]).astype(np.uint16)


def network(config: Config) -> GPT:
    """Random weights with every branch alive: at zero output projections GEMMs look faster than they are."""
    torch.manual_seed(0)
    model = GPT(config.model)
    with torch.no_grad():
        model.qo_bank[config.model.num_layers :].normal_(0, 0.02)
        model.down_bank.normal_(0, 0.01)
    model.requires_grad_(False).to(common.DEVICE)
    model.compute_dtype = torch.bfloat16 if GPU else torch.float32
    return model


class Ours:
    """This package: packed windows, one CUDA graph for each step size."""

    def __init__(self, config: Config, model: GPT, tokens: np.ndarray) -> None:
        self.session = Session(
            model=model,
            config=config.eval,
            tokens=tokens,
            token_bytes=np.ones(len(tokens), np.int64),
            ledger=Ledger(len(tokens)),
            device=common.DEVICE,
            documents_apart=True,
        )
        self.documents = find_documents(tokens)
        self.trainer = DocumentTrainer(self.session, self.documents)

    def prepare(self) -> None:
        self.trainer.prepare([np.arange(len(self.documents))])

    def read(self) -> float:
        """Trains and scores everything; nats a token."""
        self.trainer.read(np.arange(len(self.documents)), 0)
        self.session.ledger.finish()
        return float(np.nanmean(self.session.ledger.nll))

    def chunk_step(self, context: int) -> Callable[[], Any]:
        slots = self.trainer.slots
        self.trainer.bank.hand_over(np.arange(slots), np.arange(slots))
        control = torch.tensor([0, context, 1]).unsqueeze(1).repeat(1, slots)
        control[0] = torch.arange(slots) * context % (self.session.num_tokens - context - 1)
        control = control.to(common.DEVICE)
        if not GPU:
            return lambda: self.trainer.step(slots * context, control)
        return common.graph_of([lambda: self.trainer.step(slots * context, control)]).replay


class Peer1727:
    """Pull request 1727's evaluation, without its phases of global SGD."""

    def __init__(self, config: Config, model: GPT, tokens: np.ndarray) -> None:
        if not GPU:
            raise Absent("the script needs a GPU")
        os.environ.update(PHASED_TTT_PREFIX_DOCS="0", TTT_CHUNK_SIZE=str(config.eval.ttt_chunk_size))
        self.script: ModuleType = peer_module("pr1727/train_gpt.py")
        self.settings = self.script.Hyperparameters()
        network = self.script.GPT(self.settings).to(common.DEVICE).bfloat16()
        self.script.restore_fp32_params(network)
        network.load_state_dict(to_reference(model.state_dict(), config.model, banked=True))
        network.looping_active = True
        self.network = network.requires_grad_(False)
        self.script.BOS_ID = BOS_ID
        size = config.model.vocab_size
        self.data = SimpleNamespace(
            val_tokens=torch.from_numpy(tokens),
            base_bytes_lut=torch.ones(size, dtype=torch.int16, device=common.DEVICE),
            has_leading_space_lut=torch.zeros(size, dtype=torch.bool, device=common.DEVICE),
            is_boundary_token_lut=torch.zeros(size, dtype=torch.bool, device=common.DEVICE),
        )
        for block in network.blocks:
            block.attn.rotary(self.settings.ttt_eval_seq_len, common.DEVICE, torch.bfloat16)
        self.forward = self._compiled(dynamic=True)

    def _compiled(self, *, dynamic: bool) -> Callable[..., Any]:
        return torch.compile(lambda x, y, lora: self.network.forward_ttt(x, y, lora=lora), dynamic=dynamic)

    def prepare(self) -> None:
        for context in (self.settings.ttt_chunk_size, self.settings.ttt_eval_seq_len):
            self._step(context, self.forward)()
        common.synchronize()
        torch.cuda.empty_cache()

    def read(self) -> float:
        nats, _ = self.script.eval_val_ttt_phased(
            self.settings,
            self.network,
            common.DEVICE,
            self.data,
            forward_ttt_train=lambda x, y, lora: self.forward(x, y, lora),
        )
        return float(nats)

    def chunk_step(self, context: int) -> Callable[[], Any]:
        return self._step(context, self._compiled(dynamic=False))

    def _step(self, context: int, forward: Callable[..., Any]) -> Callable[[], Any]:
        h, slots = self.settings, self.settings.ttt_batch_size
        lora = self.script.BatchedTTTLoRA(slots, self.network, h.ttt_lora_rank).to(common.DEVICE)
        optimizer = torch.optim.AdamW(
            lora.parameters(), lr=h.ttt_lora_lr, betas=(h.ttt_beta1, h.ttt_beta2), eps=1e-10,
            weight_decay=h.ttt_weight_decay, fused=True,
        )  # fmt: skip
        x, y = torch.randint(0, h.vocab_size, (2, slots, context), device=common.DEVICE)

        def step() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                losses = forward(x, y, lora)
            optimizer.zero_grad(set_to_none=True)
            losses[:, -h.ttt_chunk_size :].mean(dim=-1).sum().backward()
            optimizer.step()

        return step


class Products:
    """Attention and the base weights' products of a chunk step, forward and backward, and nothing else: no adapter, no
    norm, no activation, no head, and not the last layer, of which a step wants little. The library and FlashAttention 3
    set this time, not this package."""

    def __init__(self, config: Config, model: GPT, tokens: np.ndarray) -> None:
        self.config, self.operands = config, model.operands()
        self.layers = sum(model.config.layer_order(True), start=())[:-1]

    def chunk_step(self, context: int) -> Callable[[], Any]:
        shape, slots = self.config.model, self.config.eval.ttt_batch_size
        rows, group = slots * context, shape.num_heads // shape.num_kv_heads
        dtype = self.operands.head.dtype
        bounds = torch.arange(0, rows + 1, context, dtype=torch.int32, device=common.DEVICE)

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(rows, *sizes, device=common.DEVICE, dtype=dtype)

        x, hidden, d_qkv = draw(shape.model_dim), draw(shape.hidden_dim), draw(shape.model_dim + 2 * shape.kv_dim)
        q, grad = (draw(shape.num_heads, shape.head_dim) for _ in range(2))
        q.requires_grad_()
        keys, values = (
            [t.detach().requires_grad_() for _ in range(group)]
            for t in (draw(shape.num_kv_heads, shape.head_dim) for _ in range(2))
        )

        def step() -> None:
            for weights in (self.operands.layers[layer] for layer in self.layers):
                for read, weight in ((x, weights.qkv), (x, weights.o), (x, weights.up), (hidden, weights.down)):
                    torch.nn.functional.linear(read, weight)
                for grad_of, weight in ((x, weights.down), (hidden, weights.up), (x, weights.o), (d_qkv, weights.qkv)):
                    torch.matmul(grad_of, weight)
                y = varlen_attention(q, keys, values, bounds, self.config.eval.ttt_eval_seq_len)
                torch.autograd.grad(y, [q, *keys, *values], grad)

        return common.graph_of([step]).replay if GPU else step


WHOLE: dict[str, type[Ours] | type[Peer1727]] = {"pgolf": Ours, "pull request 1727": Peer1727}
STEPPING: dict[str, type[Ours] | type[Peer1727] | type[Products]] = {
    **WHOLE,
    "attention and base products only": Products,
}


@functools.lru_cache(maxsize=1)  # one at a time: the other's graphs and adapters would stay on the GPU
def built(provider: str) -> Any:
    config = configuration()
    return STEPPING[provider](config, network(config), stream(config.model.vocab_size))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("provider", WHOLE)
def test_whole_set(recording: Any, provider: str) -> None:
    tokens = len(stream(configuration().model.vocab_size)) - 1
    with recording(f"{tokens} tokens", provider) as recorder:
        found = built(provider)
        started = time.perf_counter()
        found.prepare()
        common.synchronize()
        ready = time.perf_counter() - started
        nats = []

        def read() -> None:
            nats.append(found.read())
            common.synchronize()

        seconds = recorder.measure(read)
        recorder.row.how = f"{tokens / seconds:.0f} tokens/s, {nats[0]:.5f} nats, ready in {ready:.1f} s"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("provider", STEPPING)
@pytest.mark.parametrize("context", CONTEXTS if GPU else CONTEXTS[:1])
def test_chunk_step(recording: Any, context: int, provider: str) -> None:
    with recording(f"{configuration().eval.ttt_batch_size} documents, context {context}", provider) as recorder:
        step = built(provider).chunk_step(context)
        step()

        def steps() -> None:
            for _ in range(STEPS):
                step()
            common.synchronize()

        steps()
        recorder.measure(steps, calls=STEPS, rounds=3)


def _prepare_when_asked(connection: Connection, provider: str) -> None:
    """A fresh process: says when it could begin, begins when it is told to, and says when it is ready, and how many
    cores processes that are not its own took meanwhile."""
    try:
        found = built(provider)
        common.synchronize()
        connection.send(None)
        connection.recv()
        with Neighbours() as neighbours:
            found.prepare()
            common.synchronize()
        connection.send(neighbours.cores)
    except Exception as error:  # which the other end of the pipe raises
        connection.send(error)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("provider", WHOLE)
def test_cold_start(recording: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: str) -> None:
    with recording("a fresh process with empty caches", provider) as recorder:
        if not GPU:
            raise Absent("kernels are compiled for a GPU")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
        here, there = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=_prepare_when_asked, args=(there, provider), daemon=True)
        process.start()
        there.close()  # so that the end of the process is seen here

        def answer() -> Any:
            found = here.recv()
            if isinstance(found, Exception):
                raise found
            return found

        cores = []

        def prepare() -> None:
            here.send(None)
            cores.append(answer())

        try:
            answer()
            recorder.measure(prepare)
            recorder.row.others = round(cores[0], 2)
        finally:
            process.kill()
            process.join()
            here.close()
