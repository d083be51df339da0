"""What the verifier runs a scorer on: streams cut from the validation documents, and the scorer as a black box."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from model.config import Config
from model.data.shards import BOS_ID
from model.data.tokenizer import ByteTables
from model.errors import ConfigError, PgolfError
from model.evaluate import run_mode
from model.evaluate.documents import find_documents
from model.evaluate.observe import Enough, ObservedLedger, Watch
from model.evaluate.session import Session
from model.gpt import GPT
from model.signals import Terminated

Scorer = Callable[[Session], None]
LENGTHS = (100, 3, 40, 60, 40, 24, 40, 1, 40, 55)  # of the probe's documents; the same length is the same text
READ_OFTEN = 8  # the document of which most is known: three before it have its text
SHORT = (24, 3, 24)  # of those for the normalisation check


@dataclass(frozen=True)
class Probe:
    """A small stream of the validation set's beginnings of documents, and the evaluation at its scale.

    Documents of many lengths, some of them several times, so that n-gram hints and caches find repetitions. `short`
    has fewer of them; `config` has the settings at that scale and `full` the evaluation's own.
    """

    tokens: np.ndarray
    short: np.ndarray
    config: Config
    full: Config

    @classmethod
    def cut(cls, valid_tokens: np.ndarray, config: Config) -> Probe:
        """Raises ConfigError for a stream without a document of two tokens."""
        bodies = []
        for start, length in find_documents(valid_tokens).tolist():
            body = valid_tokens[start + 1 : start + length]
            body = body[body != BOS_ID]
            if len(body) > 1:
                bodies.append(body)
            if len(bodies) == len(LENGTHS):
                break
        if not bodies:
            raise ConfigError("verify: the validation stream has no document with two tokens; wanted some text")
        texts = {length: bodies[i % len(bodies)] for i, length in enumerate(dict.fromkeys(LENGTHS))}
        return cls(_stream(LENGTHS, texts), _stream(SHORT, texts), small_settings(config), config)


def _stream(lengths: tuple[int, ...], texts: dict[int, np.ndarray]) -> np.ndarray:
    """Documents of these lengths, the texts read round and round where they are shorter, and a BOS at the end."""
    parts = [np.append(BOS_ID, np.resize(texts[length], length)) for length in lengths]
    return np.append(np.concatenate(parts), BOS_ID).astype(np.uint16)


def small_settings(config: Config) -> Config:
    """The settings at the probe's scale: short windows, chunks and phases; rates and switches stay."""
    return config.replace(
        eval_seq_len=32,
        eval_stride=8,
        eval_batch_seqs=4,
        ttt_eval_seq_len=64,
        ttt_chunk_size=16,
        ttt_batch_size=4,
        ttt_lora_rank=min(4, config.eval.ttt_lora_rank),
        phased_prefix_docs=min(6, config.eval.phased_prefix_docs),
        phased_num_phases=min(2, config.eval.phased_num_phases),
        global_ttt_chunk_tokens=32,
        global_ttt_batch_seqs=2,
        sgd_ttt_chunk_tokens=32,
        sgd_ttt_batch_seqs=4,
        ngram_table_bits=min(12, config.eval.ngram_table_bits),
        cache_reset_every=2,
        cache_pretrain_tokens=min(2000, config.eval.cache_pretrain_tokens),
    )


class BlackBox:
    """A scorer with a model, run on streams of the caller's choice. The model's weights are restored after each run.

    `on_run(tokens)` is called with the length of each stream when it has been scored.
    """

    def __init__(
        self,
        scorer: Scorer,
        model: GPT,
        probe: Probe,
        tables: ByteTables,
        on_run: Callable[[int], None] = lambda tokens: None,
    ) -> None:
        self.scorer, self.model, self.probe, self.tables, self.on_run = scorer, model, probe, tables, on_run
        self._weights = [parameter.detach().clone() for parameter in model.parameters()]

    def run(
        self,
        tokens: np.ndarray,
        *,
        targets: np.ndarray | None = None,
        stop_at: int | None = None,
        watch: bool = False,
        config: Config | None = None,
    ) -> ObservedLedger:
        """The ledger that the scorer leaves for a stream; `targets` (default: its tokens) are what losses are for.

        With `watch` weights are hashed before every score and everything that goes through the model is noted. Raises
        ConfigError when the scorer fails.
        """
        config = config or self.probe.config
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        ledger = ObservedLedger(tokens, model=self.model if watch else None, stop_at=stop_at)
        session = Session(
            model=self.model,
            config=config.eval,
            tokens=tokens.copy(),
            # Always there, so that a scorer cannot tell by it whether others than the stream's own are asked for.
            targets=tokens.copy() if targets is None else targets,
            tables=self.tables,
            token_bytes=self.tables.stream_bytes(tokens),
            ledger=ledger,
            device=next(self.model.parameters()).device,
            documents_apart=config.data.loader == "documents",
            graphs=False,
        )
        try:
            # What it prints is no line of the report.
            with redirect_stdout(sys.stderr), Watch(self.model, ledger) if watch else nullcontext():
                self.scorer(session)
            ledger.close()
        except Enough:
            pass
        except (PgolfError, Terminated):
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"evaluator: it failed on {len(tokens)} tokens: {type(error).__name__}: {error}"
            ) from error
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), self._weights, strict=True):
                    parameter.copy_(value)
        self.on_run(len(tokens))
        return ledger


def resolve(scorer: Scorer | str, train_shards: list[Path]) -> Scorer:
    """The function behind a mode's name or "module:function", a module of the current folder too.

    Raises ConfigError when there is none.
    """
    if callable(scorer):
        return scorer
    if ":" not in scorer:
        return partial(run_mode, mode=scorer, train_shards=train_shards)
    module, _, name = scorer.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Scorer = getattr(importlib.import_module(module), name)
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"evaluator: got {scorer!r}, wanted module:function ({reason})") from error
    if not callable(found):
        raise ConfigError(f"evaluator: got {scorer!r}, a {type(found).__name__}, wanted a function of a Session")
    return found
