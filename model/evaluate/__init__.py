"""Evaluation in bits per byte: every mode of the reference systems, each on a ledger that proves its score legal.

    plain          windows that do not overlap
    sliding        windows every `eval_stride` tokens
    sgd-ttt        chunks of the stream: score, then train the whole model (pull requests 1413, 1514)
    lora-ttt       a document at a time with adapters of its own: score, then train (1530)
    phased         lora-ttt, with the base weights trained between groups of documents (1727)
    sliding-cache  sliding windows with shared adapters and an n-gram cache (1499)

"+ngram-tilt" behind a mode shifts each prediction towards a causal n-gram hint (1514).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from model.config import Config
from model.data.dataset import Dataset
from model.data.shards import read_shard
from model.errors import ConfigError
from model.evaluate.bpb import score_per_document
from model.evaluate.documents import find_documents
from model.evaluate.ledger import Ledger
from model.evaluate.lora_ttt import evaluate_lora_ttt
from model.evaluate.ngram_tilt import make_tilt
from model.evaluate.observe import hash_weights
from model.evaluate.phased_ttt import evaluate_phased
from model.evaluate.plain import DROPPED_SEQUENCES, evaluate_plain
from model.evaluate.session import Progress, Session, rank_path, rank_paths
from model.evaluate.sgd_ttt import evaluate_sgd_ttt
from model.evaluate.sliding import evaluate_sliding
from model.evaluate.sliding_cache import DEFECTS as CACHE_DEFECTS
from model.evaluate.sliding_cache import evaluate_sliding_cache
from model.gpt import GPT
from model.memory import lower, memory_for

TILT = "ngram-tilt"
_MODES: dict[str, Callable[[Session], None]] = {
    "plain": evaluate_plain,
    "sliding": evaluate_sliding,
    "sgd-ttt": evaluate_sgd_ttt,
    "lora-ttt": evaluate_lora_ttt,
    "phased": evaluate_phased,
    "sliding-cache": evaluate_sliding_cache,
}
MODES = tuple(_MODES)
# What decides the memory of a mode, where it is not eval_batch_seqs.
_BATCH_SETTING = {"sgd-ttt": "sgd_ttt_batch_seqs", "lora-ttt": "ttt_batch_size", "phased": "ttt_batch_size"}


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found. `per_document` float64 [n, 3]: loss sum (nats), bytes, tokens, in stream order."""

    mode: str
    val_loss: float  # nats per token
    bpb: float  # bits per byte
    tokens: int
    bytes: int
    seconds: float  # from opening the artifact to the result, interrupted calls included
    seconds_by_part: dict[str, float]  # of the last call alone; no second is in two parts
    compilations: int  # kernels that Triton compiled in the last call
    late_compilations: int  # of these, in steps for which CUDA graphs had been recorded
    compute_dtype: str  # of the activations, "bfloat16" say: how exactly another computation agrees
    per_document: np.ndarray
    ledger: Ledger

    def summary(self) -> dict[str, Any]:
        """The figures, for JSON."""
        values = {k: v for k, v in vars(self).items() if k not in ("per_document", "ledger")}
        return {**values, "legal": self.ledger.legal, "defects": list(self.ledger.defects)}


def parse_mode(mode: str) -> tuple[str, bool]:
    """(mode, whether the n-gram tilt is on top). Raises ConfigError for an unknown one."""
    name, _, suffix = mode.partition("+")
    if name not in _MODES or suffix not in ("", TILT):
        raise ConfigError(f"eval_mode: got {mode!r}, wanted one of {', '.join(MODES)}, each with or without +{TILT}")
    return name, bool(suffix)


def evaluate(
    model: GPT,
    dataset: Dataset,
    mode: str,
    config: Config,
    *,
    device: torch.device | str,
    scorer: Callable[[Session], None] | None = None,
    tokens: np.ndarray | None = None,
    progress: Progress | None = None,
    ledger_path: str | Path | None = None,
    resume: bool = False,
    loop: bool = True,
    opening_seconds: float = 0.0,
) -> EvalResult:
    """Scores the validation stream of `dataset` in one of the modes above, on one process or all ranks together.

    The model is left as it came; on a GPU an fp32 model computes in bfloat16. `progress` is called now and then (see
    Session). With `ledger_path` the ledger is saved there about once a minute and at the end; with `resume` an
    evaluation that was interrupted goes on from it, on any number of ranks, and its time counts on; SIGTERM and Ctrl-C
    then wait until it is saved (`Session.stoppable`). `scorer` scores in the place of the mode, which then is only its
    name; `tokens` stand in for the data set's stream. `opening_seconds`, what it took to open the artifact, count as
    part of the evaluation.

    Raises ConfigError for a mode or a ledger that does not fit, DataError for a stream that does not fit the model,
    LegalityError where a rule would be broken, DeviceMemoryError naming what to set lower.
    """
    started = time.monotonic() - opening_seconds
    name = mode if scorer else parse_mode(mode)[0]
    device = torch.device(device)
    tokens = dataset.valid_tokens if tokens is None else tokens
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    setting = _BATCH_SETTING.get(name, "eval_batch_seqs")
    smaller = partial(lower, setting, getattr(config.eval, setting))
    memory = memory_for(f"while evaluating ({mode})", device, smaller)
    with memory, borrowed(model, device, mutated=scorer is not None or name in ("sgd-ttt", "phased")):
        ledger = Ledger(len(tokens), _defects(name, config))
        if ledger_path is not None:
            ledger_path = Path(ledger_path)
            ledger.meta = evaluation_identity(model, tokens, mode, config, loop=loop)
            ledger = _open_ledger(ledger, ledger_path, resume=resume, rank=rank, world=world)
            started -= ledger.seconds
        compute_dtype = str(model.compute_dtype).removeprefix("torch.")
        token_bytes = dataset.byte_tables.stream_bytes(tokens)
        session = Session(
            model=model,
            config=config.eval,
            # What a scorer of somebody's own is given is not what its score is counted with.
            tokens=tokens.copy() if scorer else tokens,
            targets=tokens.copy() if scorer else None,
            token_bytes=token_bytes.copy() if scorer else token_bytes,
            tables=dataset.byte_tables,
            ledger=ledger,
            device=device,
            documents_apart=config.data.loader == "documents",
            loop=loop,
            progress=progress,
            ledger_path=ledger_path,
            rank=rank,
            world=world,
            started=started,
        )
        if opening_seconds:
            session.seconds["opening"] = opening_seconds
        if session.ledger.missing():
            with session.stoppable(), session.compilations:
                if scorer is None:
                    run_mode(session, mode, train_shards=dataset.train_shards)
                else:
                    scorer(session)
        if device.type == "cuda":
            session.seconds["compiling"] = session.compilations.seconds
        session.exchange()
        session.ledger.finish()
        session.pause(last=True)
        if ledger_path is not None and rank:
            rank_path(ledger_path, rank).unlink(missing_ok=True)
    score = ledger.totals(token_bytes)
    seconds = time.monotonic() - started
    return EvalResult(
        mode=mode,
        val_loss=score.val_loss,
        bpb=score.bpb,
        tokens=score.tokens,
        bytes=score.bytes,
        seconds=seconds,
        seconds_by_part=session.seconds,
        compilations=len(session.compilations.kernels),
        late_compilations=len(session.late.kernels),
        compute_dtype=compute_dtype,
        per_document=score_per_document(ledger.nll, token_bytes, find_documents(tokens)),
        ledger=ledger,
    )


def run_mode(session: Session, mode: str, *, train_shards: Sequence[Path] = ()) -> None:
    """Scores the session's stream into its ledger. `train_shards` are read by the published form of 1499 only.

    Raises ConfigError for an unknown mode, and for hints without the session's `tables`.
    """
    name = add_hints(session, mode)
    if name == "sliding-cache" and session.config.compat:
        train_tokens = _first_tokens(train_shards, session.config.cache_pretrain_tokens)
        evaluate_sliding_cache(session, train_tokens=train_tokens)
    else:
        _MODES[name](session)


def add_hints(session: Session, mode: str) -> str:
    """Gives the session the n-gram tilt if `mode` has one; returns the mode without it.

    Raises ConfigError for an unknown mode, and for hints without the session's `tables`.
    """
    name, tilted = parse_mode(mode)
    if tilted:
        if session.tables is None:
            raise ConfigError(f"eval_mode: {mode} wants a session with byte tables")
        with session.timed("hints"):
            session.tilt = make_tilt(session.tokens, session.config, session.tables, session.device)
    return name


def _defects(name: str, config: Config) -> tuple[str, ...]:
    if not config.eval.compat:
        return ()
    if name == "plain" and config.data.loader == "documents":
        return (DROPPED_SEQUENCES,)
    return CACHE_DEFECTS if name == "sliding-cache" else ()


def _first_tokens(train_shards: Sequence[Path], count: int) -> np.ndarray:
    parts: list[np.ndarray] = []
    for shard in train_shards:
        if sum(len(part) for part in parts) >= count:
            break
        parts.append(read_shard(shard))
    return np.concatenate([np.empty(0, np.uint16), *parts])[:count]


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def evaluation_identity(
    model: GPT, tokens: np.ndarray, mode: str, config: Config, *, loop: bool = True
) -> dict[str, Any]:
    """What tells one evaluation from another: a ledger's `meta`."""
    return {
        "mode": mode,
        "loop": loop,
        "eval": asdict(config.eval),
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "weights_sha256": hash_weights(model),
    }


def _open_ledger(new: Ledger, path: Path, *, resume: bool, rank: int, world: int) -> Ledger:
    """`new`, or the ledger at `path` that an interrupted evaluation like it has left (compatible ones start over)."""
    ledger, parts = new, rank_paths(path)
    if resume and new.legal and (path.exists() or parts):
        found = [*([path] if path.exists() else []), *parts]
        ledger = Ledger.load(*found)
        kept, asked = ({**one.meta, "defects": one.defects, "tokens": one.num_tokens} for one in (ledger, new))
        if different := _difference(kept, asked):
            raise ConfigError(f"{path}: ledger of another evaluation ({different}); wanted the one to go on with")
    if world > 1:
        dist.barrier()  # every rank has read them
    if rank == 0 and parts:
        if ledger is not new:
            ledger.save(path)
        for part in parts:
            part.unlink(missing_ok=True)
    if world > 1:
        dist.barrier()
    return ledger


def _difference(kept: Any, asked: Any, name: str = "") -> str:
    """The first entry that is not the same in both, as a phrase with both values; nothing where all are."""
    if isinstance(kept, dict) and isinstance(asked, dict):
        entries = (_difference(kept.get(key, "nothing"), asked.get(key, "nothing"), key) for key in {**asked, **kept})
        return next(filter(None, entries), "")
    return "" if kept == asked else f"{name}: {kept!s:.40} in the ledger, {asked!s:.40} asked"


@contextmanager
def borrowed(model: GPT, device: torch.device, *, mutated: bool) -> Iterator[None]:
    """The model with frozen parameters on `device` in a dtype it can compute in; as it came when the block ends.

    `mutated`: the block may change weights.
    """
    flags = [parameter.requires_grad for parameter in model.parameters()]
    grads = [parameter.grad for parameter in model.parameters()]
    saved = [parameter.detach().clone() for parameter in model.parameters()] if mutated else []
    dtype, qat, home = model.compute_dtype, model.late_qat, next(model.parameters()).device
    try:
        model.to(device)
        model.late_qat = False
        if device.type == "cuda" and dtype == torch.float32:
            model.compute_dtype = torch.bfloat16
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        # Streams and graphs belong to the current device, whichever one tensors are on.
        with torch.cuda.device(device if device.type == "cuda" else -1):
            yield
    finally:
        model.to(home)
        model.compute_dtype, model.late_qat = dtype, qat
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), saved, strict=False):
                parameter.copy_(value)
        for parameter, flag, grad in zip(model.parameters(), flags, grads, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = grad
