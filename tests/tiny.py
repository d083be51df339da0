"""A data set and a network that train in milliseconds, for tests of everything around them."""

import random
from pathlib import Path

from model.config import Config
from model.data.build import build_dataset
from tests.golden import FOLDER

_WORDS = ("the", "a", "of", "and", "to", "in", "is", "it", "on", "as", "with", "for", "was", "by", "there", "which")


def tiny_data(folder: Path, documents: int = 120) -> Path:
    """A data set of word salad with the golden 512-piece tokenizer, in two shards."""
    source = folder / "text"
    source.mkdir(parents=True)
    draw = random.Random(5)
    for index in range(documents):
        words = draw.choices(_WORDS, k=draw.randint(5, 120))
        (source / f"{index:04d}.txt").write_text(" ".join(words))
    data = folder / "data"
    build_dataset(
        [source],
        data,
        tokenizer=FOLDER / "bpb_sentencepiece.model",
        valid_docs=8,
        shard_tokens=8000,
        allow_overlap=True,
        quiet=True,
    )
    return data


def tiny_config(data_dir: Path, run_dir: Path, **changes: object) -> Config:
    """Six steps of two micro-batches of 128 tokens under a step budget, fp32, with a loop from the middle on."""
    config = Config().replace(
        preset="demo",
        data_dir=str(data_dir), train_seq_len=64, cu_bucket_size=16,
        vocab_size=512, num_layers=4, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=8,
        rope_train_seq_len=64, xsa_last_n=4, loop_start=1, loop_end=2, num_loops=1, parallel_start=3,
        iterations=6, max_wallclock_seconds=0.0, train_batch_tokens=256, micro_batches=2, warmup_steps=1,
        enable_looping_at=0.5, muon_momentum_warmup_steps=4, dtype="float32", train_log_every=2, val_loss_every=0,
        run_dir=str(run_dir), run_id="tiny", timeout_seconds=60.0,
        calibration_batches=2, calibration_tokens=256, codec="static",
        eval_mode="sliding", eval_seq_len=64, eval_stride=32,
        ttt_lora_rank=2, ttt_chunk_size=32, ttt_batch_size=4, ttt_eval_seq_len=64,
    )  # fmt: skip
    return config.replace(**changes)
