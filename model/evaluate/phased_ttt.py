"""Document-wise test-time training with global SGD on what was scored, in phases (pull request 1727).

The first `phased_prefix_docs` documents in the order of processing are cut into phases of equal numbers. When those of
a phase have their scores, the base weights are trained on them: the documents so far, one behind the other, in chunks
with a cosine rate; the last chunk is left out. Later documents start from the new weights.

Orders:
- "length", the public one: groups of `ttt_batch_size` documents of about one length, the longest first; a phase ends
  with the group that completes its number, and trains on the shortest of the documents scored. A document is then
  scored by weights that saw documents from further on in the stream (never itself).
- "stream": documents as they stand in the stream; nothing later is ever seen.

Documents of a phase are dealt to the ranks by a schedule known in advance, so that no result depends on their number.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import torch

from model.evaluate.adapter_bank import InitialA
from model.evaluate.documents import find_documents, length_groups, ranges_to_positions
from model.evaluate.ledger import ARTIFACT_STATE
from model.evaluate.lora_ttt import DocumentTrainer
from model.evaluate.session import Session
from model.evaluate.sgd_ttt import WholeModelSGD, cosine_rate, sequence_batches
from model.memory import lower, memory_for


def plan_phases(
    documents: np.ndarray, *, order: str, group_size: int, prefix: int, phases: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(documents to read, documents to train the base weights on afterwards) in order; indices into `documents`.

    The second is empty where nothing is trained: at the end, where nobody would see it.
    """
    prefix = max(0, min(len(documents), prefix))
    boundaries = [prefix * (i + 1) // phases for i in range(phases)] if prefix else []
    if order == "stream":
        every = np.arange(len(documents))
        cuts = sorted({0, *boundaries, len(documents)})
        plan = [(every[a:b], every[:b] if b in boundaries else every[:0]) for a, b in itertools.pairwise(cuts)]
    else:
        # Trained on in the order of the groups' numbers, shortest first, whatever was scored first.
        number = np.empty(len(documents), dtype=np.int64)
        number[np.argsort(documents[:, 1], kind="stable")] = np.arange(len(documents))
        plan, waiting, read_so_far = [], [], np.empty(0, dtype=np.int64)
        for group in length_groups(documents, group_size):
            waiting.append(group)
            read_so_far = np.concatenate([read_so_far, group])
            if boundaries and len(read_so_far) >= boundaries[0]:
                shortest = read_so_far[np.argsort(number[read_so_far])][: boundaries.pop(0)]
                plan.append((np.concatenate(waiting), shortest))
                waiting = []
        if waiting:
            plan.append((np.concatenate(waiting), np.empty(0, dtype=np.int64)))
    if plan:
        plan[-1] = (plan[-1][0], plan[-1][1][:0])
    return plan


def phases_of(session: Session, documents: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """`plan_phases` of the session's documents as its configuration says."""
    config = session.config
    return plan_phases(
        documents,
        order=config.phased_order,
        group_size=config.ttt_batch_size,
        prefix=config.phased_prefix_docs,
        phases=config.phased_num_phases,
    )


def evaluate_phased(session: Session, *, initial_a: InitialA | None = None, seed: int = 0) -> None:
    """Scores every document with adapters of its own, on base weights that learn between the phases."""
    config = session.config
    documents = find_documents(session.tokens)
    trainer = DocumentTrainer(session, documents, initial_a=initial_a, seed=seed)
    plan = phases_of(session, documents)
    trainer.prepare([read for read, _ in plan])
    state = ARTIFACT_STATE
    for read, train in plan:
        trainer.read(read, state)
        session.exchange()
        if len(train):
            starts, ends = documents[train, 0], documents[train].sum(axis=1)
            state = session.ledger.update_together(state, starts + 1, ends)
            smaller = partial(lower, "global_ttt_batch_seqs", config.global_ttt_batch_seqs)
            with memory_for("while training between phases", session.device, smaller):
                train_base(session, ranges_to_positions(starts, ends))


def train_base(session: Session, tokens: np.ndarray) -> None:
    """Global SGD on the stream's `tokens` (positions, one document behind the other; each ends with the next BOS)."""
    config = session.config
    seq_len, chunk_tokens = config.eval_seq_len, config.global_ttt_chunk_tokens
    stream = session.input_ids[torch.from_numpy(tokens).to(session.device)]
    total = len(tokens) - 1
    chunks = -(-total // chunk_tokens)
    trainer = WholeModelSGD(
        session, rate=config.global_ttt_lr, momentum=config.global_ttt_momentum, clip=config.global_ttt_grad_clip
    )
    for chunk in range(chunks - 1):
        rate = cosine_rate(
            chunk, chunks, config.global_ttt_lr, config.global_ttt_warmup_chunks, config.global_ttt_warmup_start_lr
        )
        start = chunk * chunk_tokens
        for _ in range(config.global_ttt_epochs):
            for starts in sequence_batches(start, start + chunk_tokens, seq_len, config.global_ttt_batch_seqs):
                trainer.step(
                    starts,
                    seq_len,
                    rate,
                    stream=stream,
                    documents_apart=config.global_ttt_respect_doc_boundaries,
                )
