"""The configuration of a run: one frozen dataclass in sections, typed and validated.

`model/presets.py` holds one instance per reference system; `model/settings.py` reads flags and environment variables
over a preset. Field names are unique over all sections, so that every field is one command-line flag.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from model.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The network. `L` layers, width `D`, `H` query and `Hkv` key/value heads of `D / H` dimensions."""

    vocab_size: int = 8192  # tokens of the vocabulary; the tokenizer must have as many
    num_layers: int = 11  # blocks
    model_dim: int = 512  # width of the network
    num_heads: int = 8  # query heads
    num_kv_heads: int = 4  # key and value heads, each shared by num_heads / num_kv_heads query heads
    mlp_mult: float = 4.0  # width of the MLP's hidden units, over model_dim
    negative_slope: float = 0.5  # of the leaky ReLU that the MLP squares
    logit_softcap: float = 30.0  # logits are softcap * tanh(logits / softcap)
    rope_base: float = 10000.0  # base of the rotations' frequencies
    rope_dims: int = 16  # dimensions of a head that are rotated
    rope_train_seq_len: int = 2048  # length up to which rope_base holds
    rope_rescale: bool = False  # a larger base for sequences over rope_train_seq_len (pull requests 1413, 1514)
    qk_gain_init: float = 5.0  # first value of the gain of each query head
    tied_embed_init_std: float = 0.005  # deviation of the first embeddings
    ln_scale: bool = True  # divide a block's normed inputs by sqrt(layer + 1)
    xsa_last_n: int = 11  # the last n layers subtract self-attention to their own value
    xsa_form: Literal["projection", "self_weight"] = "projection"  # projection: all of its part along the value
    loop_form: Literal["inline", "rerun"] = "inline"  # rerun: once more after the whole stack (pull request 1499)
    loop_start: int = 3  # first block of the loop
    loop_end: int = 5  # last block of the loop
    num_loops: int = 2  # extra passes over [loop_start, loop_end] once the loop is active
    skip_form: Literal["gated", "additive"] = "gated"  # by a learnt gate, or with learnt factors
    parallel_start: int = 8  # first parallel-residual block; -1: none
    parallel_lanes: Literal[1, 2] = 2  # streams of the parallel blocks: one, or one each for attention and MLP
    bigram_vocab_size: int = 0  # 0: no bigram embedding
    bigram_dim: int = 128  # width of the bigram embedding
    smear_gate: bool = False  # mix each embedding with the one before it, by a learnt gate
    value_residual: bool = False  # mix each layer's values with those of the first layer
    hidden_gain: bool = False  # a learned scale per hidden unit of the MLP

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def hidden_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    def layer_order(self, loop: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(encoder, decoder) physical layer indices in order of use, with the loop inactive or active."""
        order = list(range(self.num_layers))
        if loop and self.loop_form == "inline" and self.num_loops > 0:
            looped = list(range(self.loop_start, self.loop_end + 1))
            order = order[: self.loop_start] + looped * (self.num_loops + 1) + order[self.loop_end + 1 :]
        half = len(order) // 2
        return tuple(order[:half]), tuple(order[half:])

    @property
    def num_skips(self) -> int:
        encoder, decoder = self.layer_order(loop=True)
        return min(len(encoder), len(decoder))

    def validate(self) -> None:
        _require(
            self.model_dim % self.num_heads == 0,
            "model_dim",
            self.model_dim,
            f"a multiple of num_heads={self.num_heads}",
        )
        _require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            self.num_heads,
            f"a multiple of num_kv_heads={self.num_kv_heads}",
        )
        _require(
            self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= self.head_dim,
            "rope_dims",
            self.rope_dims,
            f"even and at most head_dim={self.head_dim}",
        )
        _require(
            0 <= self.xsa_last_n <= self.num_layers, "xsa_last_n", self.xsa_last_n, f"0 to num_layers={self.num_layers}"
        )
        _require(
            0 <= self.loop_start <= self.loop_end < self.num_layers,
            "loop_start",
            self.loop_start,
            "0 <= loop_start <= loop_end < num_layers",
        )
        _require(
            -1 <= self.parallel_start <= self.num_layers,
            "parallel_start",
            self.parallel_start,
            "-1 (none) to num_layers",
        )
        _require(self.hidden_dim > 0, "mlp_mult", self.mlp_mult, "a hidden unit or more")
        _require(self.bigram_vocab_size != 1, "bigram_vocab_size", 1, "0 (none) or at least 2")
        _require(not self.bigram_vocab_size or self.bigram_dim > 0, "bigram_dim", self.bigram_dim, "at least 1")


@dataclass(frozen=True)
class DataConfig:
    data_dir: str = "data"  # a folder with manifest.json, or the public layout's root
    variant: str = ""  # which data set of the public layout, such as sp8192; empty: vocab_size's, or the only one
    train_seq_len: int = 2048  # longest context in training
    loader: Literal["documents", "shuffled", "stream"] = "documents"  # how rows are cut
    cu_bucket_size: int = 64  # cu_seqlens are padded to a multiple of this, so that few shapes occur


@dataclass(frozen=True)
class TrainConfig:
    seed: int = 1337  # of weights, order of the text and random draws
    iterations: int = 20000  # steps, where there is no wall-clock budget
    max_wallclock_seconds: float = 600.0  # 0: no wall-clock budget, `iterations` decides
    reserve_seconds: float = 13.0  # kept back from the budget for Hessians and quantisation
    train_batch_tokens: int = 786432  # over all ranks and micro-batches
    micro_batches: int = 8  # a step has this many, divided over the ranks
    warmup_steps: int = 20  # steps before the clock that compile and record, and are undone
    warmdown_frac: float = 0.72  # fraction of the budget over which the rate falls
    warmdown_iters: int = 0  # > 0: warm down over so many steps of the present length (pull request 1499)
    min_lr: float = 0.0  # least multiplier of the rate
    enable_looping_at: float = 0.35  # fraction of the budget from which the loop is active
    loop_start_step: int = -1  # >= 0: the loop starts at this step instead (pull request 1499)
    matrix_lr: float = 0.022  # rate of the matrices (Muon)
    tied_embed_lr: float = 0.03  # rate of the embedding (AdamW)
    scalar_lr: float = 0.02  # rate of vectors and scalars (AdamW)
    beta1: float = 0.9  # AdamW's average of gradients
    beta2: float = 0.95  # AdamW's average of squared gradients
    adam_eps: float = 1e-8  # AdamW's epsilon
    muon_momentum: float = 0.97  # Muon's momentum after its warm-up
    muon_momentum_warmup_start: float = 0.92  # Muon's first momentum
    muon_momentum_warmup_steps: int = 1500  # steps over which Muon's momentum rises
    muon_steps: int = 5  # Newton-Schulz iterations
    muon_row_normalize: bool = True  # divide rows of Muon's input by their norms
    muon_wd: float = 0.095  # weight decay of the matrices
    embed_wd: float = 0.085  # weight decay of the embedding
    adam_wd: float = 0.02  # weight decay of vectors and scalars
    grad_clip_norm: float = 0.3  # largest norm of the gradient; 0: any
    grad_clip: Literal["per_rank", "global"] = "per_rank"  # whose norm: each rank's own before the sum, or the sum's
    restore_muon_momentum: bool = True  # False: the warm-up's momentum survives, as in the public 1530 and 1727
    ema_decay: float = 0.9965  # of the weights' average that is quantised and scored
    ema_dtype: Literal["float32", "parameter"] = "float32"  # of the embeddings' average
    late_qat_threshold: float = 0.0  # fake-quantise once the lr multiplier is below; 0: never (pull request 1499)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # what activations and products are computed in
    fp8_mlp: bool = False  # training steps multiply in FP8 in the MLPs; everything else does as without it
    cuda_graphs: bool = True  # record micro-steps on a GPU and replay them
    train_log_every: int = 500  # steps between lines of the log
    val_loss_every: int = 4000  # steps, and after the last; 0: only then
    checkpoint_every: int = 0  # steps; 0: when interrupted, and once a minute under torchrun --max-restarts
    keep_checkpoints: int = 2  # newest checkpoints that are kept
    timeout_seconds: float = 600.0  # after which a rank gives up waiting for the others in training
    run_dir: str = "runs"  # where runs are kept
    run_id: str = ""  # empty: made from the preset, the seed and the time


@dataclass(frozen=True)
class QuantConfig:
    calibration_batches: int = 64  # training batches for the Hessians
    calibration_tokens: int = 98304  # a batch, on every rank
    quant_recipe: Literal["gptq", "pr1499"] = "gptq"  # GPTQ as in pull requests 1413 to 1727, or as in 1499
    matrix_bits: int = 6  # bits of an attention matrix's code
    attn_clip_sigmas: float = 12.85  # rows of attention matrices are clipped at so many deviations; more, fewer bytes
    mlp_bits: int = 6  # bits of an MLP matrix's code
    mlp_clip_sigmas: float = 12.85  # rows of MLP matrices are clipped at so many deviations
    embed_bits: int = 8  # bits of the embedding's code
    embed_clip_sigmas: float = 20.0  # rows of the embedding are clipped at so many deviations
    clip_rule: Literal["sigma", "absmax", "search"] = "sigma"  # what sets a row's scale
    gptq_damping: float = 0.01  # this share of the mean of the Hessian's diagonal is added to it
    gptq_block_size: int = 128  # columns a lazy update, on a CPU
    prune_fraction: float = 0.0  # smallest weights zeroed before GPTQ (pull request 1499: 0.03)
    keep_fp16: tuple[str, ...] = ()  # names of matrices that stay fp16
    sort_hidden_units: bool = True  # store MLP hidden units in the order of their scales: fewer bytes, same function
    codec: Literal["context", "static", "brotli", "lzma", "zstd"] = "context"  # how codes become bytes


@dataclass(frozen=True)
class EvalConfig:
    eval_mode: str = "lora-ttt"  # plain, sliding, sgd-ttt, lora-ttt, phased, sliding-cache; "+ngram-tilt" may follow
    eval_seq_len: int = 2048  # longest context in plain, sliding, sgd-ttt and sliding-cache
    eval_stride: int = 64  # tokens that a window of sliding and sliding-cache scores
    eval_batch_seqs: int = 32  # windows side by side
    # Document-wise LoRA test-time training (pull requests 1530, 1727).
    ttt_lora_rank: int = 96  # rank of a document's adapters
    ttt_lora_lr: float = 1e-4  # rate of a document's adapters
    ttt_chunk_size: int = 32  # tokens scored before the next step
    ttt_batch_size: int = 64  # documents side by side
    ttt_eval_seq_len: int = 2048  # longest context in lora-ttt and phased
    ttt_grad_steps: int = 1  # steps a chunk
    ttt_weight_decay: float = 0.5  # weight decay of a document's adapters
    ttt_beta1: float = 0.0  # AdamW's average of the adapters' gradients
    ttt_beta2: float = 0.999  # AdamW's average of squared gradients
    ttt_optimizer: Literal["adam", "sgd"] = "adam"  # what takes the adapters' steps
    ttt_k_lora: bool = True  # adapters on keys
    ttt_o_lora: bool = True  # adapters on attention's output
    ttt_mlp_lora: bool = True  # adapters on the MLPs
    # Multi-phase global SGD between groups of documents (pull request 1727).
    phased_num_phases: int = 4  # phases, each ended by SGD on all weights
    phased_prefix_docs: int = 2000  # documents that the phases divide; all others come behind the last phase
    phased_order: Literal["length", "stream"] = "length"  # longest documents first, or as they come
    global_ttt_lr: float = 0.001  # rate of the SGD between phases
    global_ttt_momentum: float = 0.9  # momentum of the SGD between phases
    global_ttt_epochs: int = 1  # passes of that SGD over a phase's tokens
    global_ttt_chunk_tokens: int = 32768  # tokens a chunk
    global_ttt_batch_seqs: int = 32  # windows a step
    global_ttt_warmup_start_lr: float = 0.0  # first rate
    global_ttt_warmup_chunks: int = 0  # chunks over which the rate rises to global_ttt_lr
    global_ttt_grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    global_ttt_respect_doc_boundaries: bool = True  # no attention between documents
    # Chunked score-first SGD (pull requests 1413, 1514).
    sgd_ttt_lr: float = 0.005  # rate of SGD on all weights
    sgd_ttt_momentum: float = 0.9  # momentum of sgd-ttt's SGD
    sgd_ttt_epochs: int = 3  # passes over a chunk
    sgd_ttt_chunk_tokens: int = 32768  # tokens scored before SGD on them
    sgd_ttt_batch_seqs: int = 32  # windows a step
    sgd_ttt_grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    sgd_ttt_freeze_blocks: int = 0  # first blocks that stay as they are
    # N-gram tilt (pull request 1514).
    ngram_base_beta: float = 2.0  # how far a hint lifts the logit of its token
    ngram_agree_bonus: float = 0.1  # more lift where another voter agrees
    ngram_within_threshold: float = 0.25  # least confidence of the voter within words
    ngram_within_beta: float = 0.0  # how far the voter within words lifts its token
    ngram_word_threshold: float = 0.8  # least confidence of the voter over words
    ngram_word_beta: float = 0.0  # how far the voter over words lifts its token
    ngram_order_stride: int = 2  # orders 8 to 16 in steps of so many
    ngram_table_bits: int = 26  # logarithm of the table's size
    ngram_hash: Literal["compatible", "full"] = "compatible"  # full: faster, other hints
    # Sliding LoRA with an n-gram cache (pull request 1499).
    cache_alpha: float = 0.2  # weight of the cache's frequencies; as published it rises with the loss
    cache_order: int = 7  # one more than the longest context of the cache
    cache_pretrain_tokens: int = 2_000_000  # training tokens that fill the cache beforehand
    cache_adapters: bool = True  # low-rank adapters on q and v beside the cache
    cache_reset_every: int = 8  # batches after which adapters and optimiser start anew
    compat: bool = False  # reproduce the published scorer's defects; its ledger is marked "not a legal score"


@dataclass(frozen=True)
class Config:
    preset: str = "pr1530"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises ConfigError naming the field, its value and what was wanted."""
        for section, name, value in self.items():
            _check_literal(section, name, value)
            _check_range(name, value)
        self.model.validate()
        train, quant, evaluation = self.train, self.quant, self.eval
        _require(
            evaluation.ttt_chunk_size <= evaluation.ttt_eval_seq_len,
            "ttt_chunk_size",
            evaluation.ttt_chunk_size,
            f"at most ttt_eval_seq_len={evaluation.ttt_eval_seq_len}",
        )
        _require(
            train.train_batch_tokens % train.micro_batches == 0,
            "train_batch_tokens",
            train.train_batch_tokens,
            f"a multiple of micro_batches={train.micro_batches}",
        )
        _require(
            self.data.train_seq_len == 0 or quant.calibration_tokens % self.data.train_seq_len == 0,
            "calibration_tokens",
            quant.calibration_tokens,
            f"a multiple of train_seq_len={self.data.train_seq_len}",
        )

    def items(self) -> list[tuple[str, str, Any]]:
        """(section, field, value) of every field below the sections."""
        return [
            (section.name, f.name, getattr(getattr(self, section.name), f.name))
            for section in dataclasses.fields(self)
            if section.name != "preset"
            for f in dataclasses.fields(getattr(self, section.name))
        ]

    def replace(self, **changes: Any) -> Config:
        """A copy with fields replaced by their (unique) names, whatever their section."""
        sections = {name: section for section, name, _ in self.items()}
        updates: dict[str, dict[str, Any]] = {}
        top: dict[str, Any] = {}
        for name, value in changes.items():
            if name == "preset":
                top["preset"] = value
            elif name in sections:
                updates.setdefault(sections[name], {})[name] = value
            else:
                raise ConfigError(f"unknown setting {name!r}")
        for section, values in updates.items():
            top[section] = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **top)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of to_dict (also after a trip through JSON); unknown fields are an error."""
        parts: dict[str, Any] = {}
        for key, value in values.items():
            if key == "preset":
                parts[key] = str(value)
            elif key in _SECTIONS and isinstance(value, dict):
                section = _SECTIONS[key]
                unknown = sorted(set(value) - {f.name for f in dataclasses.fields(section)})
                _require(not unknown, f"config section {key!r}", unknown, f"fields of {section.__name__}")
                parts[key] = section(**{name: _checked_type(name, setting) for name, setting in value.items()})
            else:
                raise ConfigError(f"config: got section {key!r}, wanted one of preset, {', '.join(_SECTIONS)}")
        return cls(**parts)


def _require(condition: bool, name: str, value: Any, wanted: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: got {value!r}, wanted {wanted}")


def _check_literal(section: str, name: str, value: Any) -> None:
    allowed = _LITERALS.get(name)
    if allowed is not None:
        _require(value in allowed, name, value, "one of " + ", ".join(map(str, allowed)))


_MOST = 10**9  # of what has no bound of its own: far more than memory and patience have
_WITHIN = {
    "vocab_size": (2, 65536),  # shards hold uint16
    "parallel_start": (-1, _MOST),
    "cu_bucket_size": (1, 65536),
    "seed": (0, 2**63 - 1),
    "warmdown_frac": (0, 1),
    "min_lr": (0, 1),
    "loop_start_step": (-1, _MOST),
    "late_qat_threshold": (0, 1),
    "matrix_bits": (2, 8),
    "mlp_bits": (2, 8),
    "embed_bits": (2, 8),
    "phased_num_phases": (1, 8),
    "ttt_lora_rank": (1, 128),
    "ngram_base_beta": (0, 100),  # e^beta is computed
    "ngram_agree_bonus": (0, 100),
    "ngram_within_beta": (0, 100),
    "ngram_word_beta": (0, 100),
    "ngram_table_bits": (4, 32),
    "cache_alpha": (0, 1),
    "cache_order": (1, 64),
}
# fmt: off
_BELOW_ONE = frozenset({
    "beta1", "beta2", "muon_momentum", "muon_momentum_warmup_start", "ema_decay", "prune_fraction",
    "ttt_beta1", "ttt_beta2", "global_ttt_momentum", "sgd_ttt_momentum",
})
_ABOVE_ZERO = frozenset({
    "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "logit_softcap", "rope_base",
    "rope_train_seq_len", "tied_embed_init_std", "train_batch_tokens", "micro_batches", "adam_eps",
    "muon_steps", "keep_checkpoints", "timeout_seconds", "calibration_batches", "calibration_tokens",
    "gptq_block_size", "eval_seq_len", "eval_stride", "eval_batch_seqs", "ttt_chunk_size", "ttt_batch_size",
    "ttt_eval_seq_len", "ttt_grad_steps", "global_ttt_chunk_tokens", "global_ttt_batch_seqs", "sgd_ttt_chunk_tokens",
    "sgd_ttt_batch_seqs", "ngram_order_stride", "cache_reset_every",
})
# fmt: on


def _check_range(name: str, value: Any) -> None:
    """Every number has a range."""
    kind = field_types()[name]
    if name in _WITHIN:
        low, high = _WITHIN[name]
        _require(low <= value <= high, name, value, f"{low} to {high}")
    elif name in _BELOW_ONE:
        _require(0 <= value < 1, name, value, "0 <= value < 1")
    elif kind in (int, float):
        good, least = 0 <= value <= _MOST, "at least 0"
        if name in _ABOVE_ZERO:
            good, least = good and value > 0, "at least 1" if kind is int else "above 0"
        _require(good, name, value, f"{least}, at most {_MOST}")


def _checked_type(name: str, value: Any) -> Any:
    """A value from JSON as its field has it: integers serve as floats, lists as tuples. Literals are checked later."""
    kind = field_types()[name]
    if kind is float:
        good = type(value) in (int, float) and abs(value) < 1e300
    elif typing.get_origin(kind) is tuple:
        good = isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
    else:
        good = typing.get_origin(kind) is Literal or type(value) is kind
    _require(good, name, value, f"a value of type {getattr(kind, '__name__', kind)}")
    return float(value) if kind is float else tuple(value) if isinstance(value, list) else value


_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "quant": QuantConfig,
    "eval": EvalConfig,
}


@functools.cache
def field_types() -> dict[str, Any]:
    """The type of every field, by its name."""
    return {name: kind for section in _SECTIONS.values() for name, kind in typing.get_type_hints(section).items()}


_LITERALS = {name: typing.get_args(kind) for name, kind in field_types().items() if typing.get_origin(kind) is Literal}
