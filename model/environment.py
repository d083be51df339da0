"""The reference systems' environment variables, as changes of our configuration.

Their published commands run unchanged with `-m model.train --preset prNNNN` in place of their script. A variable sets
fields (`_FIELDS`, `_SPECIAL`), takes part in choosing the evaluation (`_evaluation`), belongs to the launcher (RANK,
WORLD_SIZE, LOCAL_RANK: model/distributed.py), or was dead in the published runs (`_DEAD`): then it is accepted at its
default and refused otherwise. Variables that say where the data lie may not contradict each other (`_places`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from model.config import Config, field_types
from model.errors import ConfigError

Values = dict[str, Any]  # field -> value
Mapper = Callable[[str, str, Values], Values]  # (variable, text, fields as they stand) -> changed fields
_BOOLEANS = {"1": True, "0": False, "true": True, "false": False}
_TYPES = field_types()


@dataclass(frozen=True)
class Environment:
    """What the variables ask for: changed fields, what each variable did, and EVAL_ONLY_PATH."""

    changes: Values
    taken: dict[str, str]
    weights: str | None


def read_environment(config: Config, environ: Mapping[str, str]) -> Environment:
    """The variables of `environ` that the reference systems know, read for the preset `config`.

    Raises ConfigError naming the variable, its value and what was wanted.
    """
    values: Values = {"preset": config.preset} | {name: value for _, name, value in config.items()}
    changes: Values = {}
    taken: dict[str, str] = {}
    mappers = dict.fromkeys(_FIELDS, _set_fields) | _SPECIAL
    for name in mappers:
        if name in environ:
            changed = mappers[name](name, environ[name], values)
            changes |= changed
            values |= changed
            taken[name] = _described(changed) or "as it is"
    for name, changed in _places(environ).items():
        changes |= changed
        taken[name] = _described(changed)
    for name, dead in _DEAD.items():
        if name in environ:
            dead.check(name, environ[name])
            taken[name] = "as it is"
    switches = {name: environ[name] for name in _EVALUATION_SWITCHES if name in environ}
    if switches:
        changed = _evaluation(switches, config)
        changes |= changed
        taken |= dict.fromkeys(switches, _described(changed))
    weights = environ.get("EVAL_ONLY_PATH") or None
    if weights is not None:
        taken["EVAL_ONLY_PATH"] = "no training"
    return Environment(changes, taken, weights)


def _described(changed: Values) -> str:
    return ", ".join(f"{field}={value}" for field, value in changed.items())


def _refuse(name: str, text: str, wanted: str) -> ConfigError:
    return ConfigError(f"environment variable {name}: got {text!r}, wanted {wanted}")


def _number(name: str, text: str, kind: type) -> Any:
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        raise _refuse(name, text, "an integer" if kind is int else "a number") from None


def _boolean(name: str, text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise _refuse(name, text, "0 or 1")
    return _BOOLEANS[text.lower()]


# Variables that set fields.


def _set_fields(name: str, text: str, values: Values) -> Values:
    """The text, read as the fields' type, is the new value of each of them."""
    return {field: _as_field(name, text, field) for field in _FIELDS[name]}


def _as_field(name: str, text: str, field: str) -> Any:
    kind = _TYPES[field]
    if kind is bool:
        return _boolean(name, text)
    return _number(name, text, kind) if kind in (int, float) else text


def _matrix_clip(name: str, text: str, values: Values) -> Values:
    if values["preset"] == "pr1727":
        _Dead("12.85", "it clips by ATTN_CLIP_SIGMAS and MLP_CLIP_SIGMAS").check(name, text)
        return {}
    return dict.fromkeys(("attn_clip_sigmas", "mlp_clip_sigmas"), _number(name, text, float))


def _test_time_lr(name: str, text: str, values: Values) -> Values:
    field = "ttt_lora_lr" if values["preset"] == "pr1499" else "sgd_ttt_lr"
    return {field: _number(name, text, float)}


def _loop_count(name: str, text: str, values: Values) -> Values:
    return {"num_loops": max(_number(name, text, int) - 1, 0)}  # the variable counts the first pass too


def _validation_batch(name: str, text: str, values: Values) -> Values:
    """Tokens of 8 shares, as sequences of one share. It does not change a score."""
    return {"eval_batch_seqs": max(_number(name, text, int) // 8 // values["eval_seq_len"], 1)}


def _skip_gates(name: str, text: str, values: Values) -> Values:
    return {"skip_form": "gated" if _boolean(name, text) else "additive"}


def _kept_tensors(name: str, text: str, values: Values) -> Values:
    ours = {"c_q": "q", "c_k": "k", "c_v": "v", "proj": "o"}
    names = []
    for pattern in filter(None, text.split(",")):
        head, _, last = pattern.rpartition(".")
        names.append(f"{head}.{ours.get(last, last)}" if head.endswith(".attn") else pattern)
    return {"keep_fp16": tuple(names)}


def _average(name: str, text: str, values: Values) -> Values:
    return {} if _boolean(name, text) else {"ema_decay": 0.0}


def _embedding_dim(name: str, text: str, values: Values) -> Values:
    if _number(name, text, int) != values["model_dim"]:
        raise _refuse(name, text, f"model_dim={values['model_dim']}: no projection of the embedding is offered")
    return {}


_FIELDS: dict[str, tuple[str, ...]] = {
    "ADAM_EPS": ("adam_eps",),
    "ADAM_WD": ("adam_wd",),
    "ARTIFACT_DIR": ("run_dir",),
    "ATTN_CLIP_SIGMAS": ("attn_clip_sigmas",),
    "BETA1": ("beta1",),
    "BETA2": ("beta2",),
    "BIGRAM_DIM": ("bigram_dim",),
    "BIGRAM_VOCAB_SIZE": ("bigram_vocab_size",),
    "COMPRESSOR": ("codec",),
    "DEPTH_RECUR_END": ("loop_end",),
    "DEPTH_RECUR_START": ("loop_start",),
    "DEPTH_RECUR_START_STEP": ("loop_start_step",),
    "EMA_DECAY": ("ema_decay",),
    "EMBED_BITS": ("embed_bits",),
    "EMBED_CLIP_SIGMAS": ("embed_clip_sigmas",),
    "EMBED_WD": ("embed_wd",),
    "ENABLE_LOOPING_AT": ("enable_looping_at",),
    "EVAL_BATCH_SEQS": ("eval_batch_seqs",),
    "EVAL_SEQ_LEN": ("eval_seq_len",),
    "GLOBAL_TTT_BATCH_SEQS": ("global_ttt_batch_seqs",),
    "GLOBAL_TTT_CHUNK_TOKENS": ("global_ttt_chunk_tokens",),
    "GLOBAL_TTT_EPOCHS": ("global_ttt_epochs",),
    "GLOBAL_TTT_GRAD_CLIP": ("global_ttt_grad_clip",),
    "GLOBAL_TTT_LR": ("global_ttt_lr",),
    "GLOBAL_TTT_MOMENTUM": ("global_ttt_momentum",),
    "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES": ("global_ttt_respect_doc_boundaries",),
    "GLOBAL_TTT_WARMUP_CHUNKS": ("global_ttt_warmup_chunks",),
    "GLOBAL_TTT_WARMUP_START_LR": ("global_ttt_warmup_start_lr",),
    "GPTQ_CALIBRATION_BATCHES": ("calibration_batches",),
    "GPTQ_DAMP": ("gptq_damping",),
    "GPTQ_RESERVE_SECONDS": ("reserve_seconds",),
    "GRAD_CLIP_NORM": ("grad_clip_norm",),
    "ITERATIONS": ("iterations",),
    "LATE_QAT_THRESHOLD": ("late_qat_threshold",),
    "LN_SCALE": ("ln_scale",),
    "LOGIT_SOFTCAP": ("logit_softcap",),
    "LOOP_END": ("loop_end",),
    "LOOP_START": ("loop_start",),
    "MATRIX_BITS": ("matrix_bits", "mlp_bits"),
    "MATRIX_LR": ("matrix_lr",),
    "MAX_WALLCLOCK_SECONDS": ("max_wallclock_seconds",),
    "MIN_LR": ("min_lr",),
    "MLP_CLIP_SIGMAS": ("mlp_clip_sigmas",),
    "MLP_MULT": ("mlp_mult",),
    "MODEL_DIM": ("model_dim",),
    "MUON_BACKEND_STEPS": ("muon_steps",),
    "MUON_MOMENTUM": ("muon_momentum",),
    "MUON_MOMENTUM_WARMUP_START": ("muon_momentum_warmup_start",),
    "MUON_MOMENTUM_WARMUP_STEPS": ("muon_momentum_warmup_steps",),
    "MUON_ROW_NORMALIZE": ("muon_row_normalize",),
    "MUON_WD": ("muon_wd",),
    "NGRAM_AGREE_BONUS": ("ngram_agree_bonus",),
    "NGRAM_ALPHA": ("cache_alpha",),
    "NGRAM_BASE_BETA": ("ngram_base_beta",),
    "NGRAM_OPEN_TABLE_BITS": ("ngram_table_bits",),
    "NGRAM_ORDER": ("cache_order",),
    "NGRAM_ORDER_STRIDE": ("ngram_order_stride",),
    "NGRAM_PRETRAIN_TOKENS": ("cache_pretrain_tokens",),
    "NGRAM_WITHIN_BETA": ("ngram_within_beta",),
    "NGRAM_WITHIN_THRESHOLD": ("ngram_within_threshold",),
    "NGRAM_WORD_BETA": ("ngram_word_beta",),
    "NGRAM_WORD_THRESHOLD": ("ngram_word_threshold",),
    "NUM_HEADS": ("num_heads",),
    "NUM_KV_HEADS": ("num_kv_heads",),
    "NUM_LAYERS": ("num_layers",),
    "NUM_LOOPS": ("num_loops",),
    "PARALLEL_RESIDUAL_START": ("parallel_start",),
    "PARALLEL_START_LAYER": ("parallel_start",),
    "PHASED_TTT_NUM_PHASES": ("phased_num_phases",),
    "PHASED_TTT_PREFIX_DOCS": ("phased_prefix_docs",),
    "QK_GAIN_INIT": ("qk_gain_init",),
    "ROPE_BASE": ("rope_base",),
    "ROPE_DIMS": ("rope_dims",),
    "ROPE_TRAIN_SEQ_LEN": ("rope_train_seq_len",),
    "RUN_ID": ("run_id",),
    "SCALAR_LR": ("scalar_lr",),
    "SDCLIP_K": ("attn_clip_sigmas", "mlp_clip_sigmas"),
    "SEED": ("seed",),
    "TIED_EMBED_INIT_STD": ("tied_embed_init_std",),
    "TIED_EMBED_LR": ("tied_embed_lr",),
    "TRAIN_BATCH_TOKENS": ("train_batch_tokens",),
    "TRAIN_LOG_EVERY": ("train_log_every",),
    "TRAIN_SEQ_LEN": ("train_seq_len",),
    "TTT_BATCH_SEQS": ("sgd_ttt_batch_seqs",),
    "TTT_BATCH_SIZE": ("ttt_batch_size",),
    "TTT_BETA1": ("ttt_beta1",),
    "TTT_BETA2": ("ttt_beta2",),
    "TTT_CHUNK_SIZE": ("ttt_chunk_size",),
    "TTT_CHUNK_TOKENS": ("sgd_ttt_chunk_tokens",),
    "TTT_EPOCHS": ("sgd_ttt_epochs",),
    "TTT_EVAL_SEQ_LEN": ("ttt_eval_seq_len",),
    "TTT_FREEZE_BLOCKS": ("sgd_ttt_freeze_blocks",),
    "TTT_GRAD_CLIP": ("sgd_ttt_grad_clip",),
    "TTT_GRAD_STEPS": ("ttt_grad_steps",),
    "TTT_K_LORA": ("ttt_k_lora",),
    "TTT_LORA_LR": ("ttt_lora_lr",),
    "TTT_LORA_RANK": ("ttt_lora_rank",),
    "TTT_MLP_LORA": ("ttt_mlp_lora",),
    "TTT_MOMENTUM": ("sgd_ttt_momentum",),
    "TTT_OPTIMIZER": ("ttt_optimizer",),
    "TTT_O_LORA": ("ttt_o_lora",),
    "TTT_RESET_EVERY": ("cache_reset_every",),
    "TTT_WEIGHT_DECAY": ("ttt_weight_decay",),
    "VAL_LOSS_EVERY": ("val_loss_every",),
    "VOCAB_SIZE": ("vocab_size",),
    "WARMDOWN_FRAC": ("warmdown_frac",),
    "WARMDOWN_ITERS": ("warmdown_iters",),
    "WARMUP_STEPS": ("warmup_steps",),
    "WEIGHT_DECAY": ("embed_wd", "adam_wd"),
    "XSA_LAST_N": ("xsa_last_n",),
    "XSA_LAYERS": ("xsa_last_n",),
}
_SPECIAL: dict[str, Mapper] = {
    "DEPTH_RECUR_COUNT": _loop_count,
    "EMA_ENABLED": _average,
    "EMBEDDING_DIM": _embedding_dim,
    "FP16_KEEP_NAME_PATTERNS": _kept_tensors,
    "MATRIX_CLIP_SIGMAS": _matrix_clip,
    "SKIP_GATES_ENABLED": _skip_gates,
    "TTT_LR": _test_time_lr,
    "VAL_BATCH_SIZE": _validation_batch,
    "VAL_BATCH_TOKENS": _validation_batch,
}

# Variables that say where the data lie.

_PLACES = ("DATA_DIR", "DATA_PATH", "TOKENIZER_PATH")


def _places(environ: Mapping[str, str]) -> dict[str, Values]:
    """What each of them sets. Two that do not say the same are refused, also beside VOCAB_SIZE, as the scripts do."""
    given = {name: environ[name] for name in _PLACES if name in environ}
    said = {
        name: {"data_dir": text} if name == "DATA_DIR" else _public_path(name, text) for name, text in given.items()
    }
    whole = dict(said)
    if "VOCAB_SIZE" in environ:
        whole["VOCAB_SIZE"] = {"variant": f"sp{_number('VOCAB_SIZE', environ['VOCAB_SIZE'], int)}"}
    for one, other in combinations(whole, 2):
        for field in whole[one].keys() & whole[other].keys():
            if _resolved(field, whole[one][field]) != _resolved(field, whole[other][field]):
                raise ConfigError(
                    f"environment variables {one} and {other}: got {environ[one]!r} and {environ[other]!r}, wanted "
                    f"{'one folder' if field == 'data_dir' else 'one data set, with its own tokenizer'}"
                )
    return said


def _public_path(name: str, text: str) -> Values:
    """The folder and the variant that a path of the public layout is made of."""
    path = Path(text)
    wanted = "datasets/fineweb10B_spN" if name == "DATA_PATH" else "tokenizers/fineweb_N_bpe.model"
    match = re.fullmatch(re.escape(wanted).replace("N", r"(\d+)"), f"{path.parent.name}/{path.name}")
    if match is None:
        raise _refuse(name, text, f"DATA_DIR/{wanted}")
    return {"data_dir": str(path.parent.parent), "variant": f"sp{match[1]}"}


def _resolved(field: str, value: str) -> Path | str:
    return Path(value).resolve() if field == "data_dir" else value


# Variables that choose the evaluation.

_EVALUATION_SWITCHES = (
    "EVAL_STRIDE",
    "NGRAM_TILT_ENABLED",
    "PHASED_TTT_ENABLED",
    "SLIDING_WINDOW_ENABLED",
    "TTT_ENABLED",
)
_TEST_TIME_MODE = {"pr1413": "sgd-ttt", "pr1514": "sgd-ttt", "pr1727": "phased", "pr1499": "sliding-cache"}


def _evaluation(switches: Mapping[str, str], config: Config) -> Values:
    """eval_mode and eval_stride. A switch that is absent stands as in the preset's published command."""
    system = config.preset
    flags = {name: _boolean(name, text) for name, text in switches.items() if name != "EVAL_STRIDE"}
    stride = _number("EVAL_STRIDE", switches.get("EVAL_STRIDE", str(config.eval.eval_stride)), int)
    if flags.get("PHASED_TTT_ENABLED") and system != "pr1727":
        raise _refuse("PHASED_TTT_ENABLED", "1", "0 with this preset (--eval-mode phased asks for phases)")
    tilt = flags.get("NGRAM_TILT_ENABLED", config.eval.eval_mode.endswith("+ngram-tilt"))
    suffix = "+ngram-tilt" if tilt else ""
    if system == "pr1499" and not flags.get("TTT_ENABLED", True):
        raise _refuse("TTT_ENABLED", "0", "1 with this preset (--eval-mode sliding scores without adapters)")
    if stride <= 0:
        if system != "pr1499":
            raise _refuse("EVAL_STRIDE", str(stride), "at least 1")
        return {"eval_mode": "plain"}
    if flags.get("TTT_ENABLED", True):
        mode = _TEST_TIME_MODE.get(system, "lora-ttt")
    else:
        sliding = flags.get("SLIDING_WINDOW_ENABLED", system in ("pr1413", "pr1514"))
        mode = "sliding" if sliding else "plain"
    return {"eval_mode": mode + suffix, "eval_stride": stride}


# Variables that were dead in the published runs.


@dataclass(frozen=True)
class _Dead:
    """Accepted at `default` alone; `why` says what another value would have asked for."""

    default: str
    why: str

    def check(self, name: str, text: str) -> None:
        if text == self.default:
            return
        try:
            same = float(text) == float(self.default)
        except ValueError:
            same = False
        if not same:
            raise _refuse(name, text, f"{self.default!r}: {self.why}")


_CONTROL = (
    "attn_scale,attn_scales,mlp_scale,mlp_scales,resid_mix,resid_mixes,q_gain,skip_weight,skip_weights",
    ",skip_gates",
    ",parallel_post_lambdas,parallel_resid_lambdas",
    ",smear,bigram.scale,v_lambda,ln_scale,hidden_gain",
)


class _DeadControlTensors(_Dead):
    """The published scripts have three defaults."""

    def check(self, name: str, text: str) -> None:
        base, gates, lanes, legacy = _CONTROL
        if text not in (base + gates, base + gates + lanes, base + legacy):
            super().check(name, text)


_OFF = "off in every published run, and not offered"
_UNUSED = "read by the public scripts and never used"
_BEFORE_SCORING = (
    "it trains on validation tokens before they are scored, which breaks the rule that a token is scored before any "
    "update that depends on it (C3)"
)
_DEAD: dict[str, _Dead] = {
    "ASYMMETRIC_LOGIT": _Dead("0", _OFF),
    "CAUTIOUS_WD": _Dead("0", _OFF),
    "CONTROL_TENSOR_NAME_PATTERNS": _DeadControlTensors("its default", "the network says which tensors are scalars"),
    "EMBED_LR": _Dead("0.6", _UNUSED + " with tied embeddings; TIED_EMBED_LR is"),
    "ETLB_CLIP": _Dead("3.0", _OFF),
    "ETLB_ENABLED": _Dead("0", _OFF),
    "ETLB_LR": _Dead("0.05", _OFF),
    "ETLB_STEPS": _Dead("5", _OFF),
    "GATED_ATTN": _Dead("0", _OFF),
    "HEAD_LR": _Dead("0.008", _UNUSED + " with tied embeddings; TIED_EMBED_LR is"),
    "HESSIAN_CLIP_LAMBDA": _Dead("0", _OFF),
    "INT5_LAYERS": _Dead("", _OFF),
    "MIXED_QUANT": _Dead("0", _OFF),
    "MUON_BETA2": _Dead("0.95", _UNUSED),
    "N_INT6_LAYERS": _Dead("50", _OFF),
    "PARALLEL_FINAL_LANE": _Dead("mean", "the lanes' mean is the only form offered"),
    "PREQUANT_TTT_BATCH_SEQS": _Dead("32", _BEFORE_SCORING),
    "PREQUANT_TTT_ENABLED": _Dead("0", _BEFORE_SCORING),
    "PREQUANT_TTT_EPOCHS": _Dead("10", _BEFORE_SCORING),
    "PREQUANT_TTT_FREEZE_BLOCKS": _Dead("1", _BEFORE_SCORING),
    "PREQUANT_TTT_GRAD_CLIP": _Dead("1.0", _BEFORE_SCORING),
    "PREQUANT_TTT_LR": _Dead("0.00045", _BEFORE_SCORING),
    "ROPE_YARN": _Dead("0", _OFF),
    "SDCLIP_K_EMBED": _Dead("20.0", "the embedding stays fp16 there; EMBED_CLIP_SIGMAS is for the others"),
    "TIE_EMBEDDINGS": _Dead("1", "embedding and head share one matrix"),
    "TTT_DEBUG_BYPASS": _Dead("", "a debugging aid of the public script"),
    "TTT_EVAL_BATCHES": _Dead("", "a score covers every document"),
    "TTT_OUTPUT_DIR": _Dead("", "results go to the run's folder"),
    "USE_POLAR_EXPRESS": _Dead("0", _OFF),
    "VALUE_RESIDUAL": _Dead("0", _OFF),
    "VALUE_RESIDUAL_LAMBDA_INIT": _Dead("0.95", "the initial share is fixed"),
    "VAL_DOC_FRACTION": _Dead("1.0", "a score covers every document"),
}

LAUNCHER_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE")


def known_variables() -> set[str]:
    """Every variable that is read here or by the launcher."""
    return {*_FIELDS, *_SPECIAL, *_PLACES, *_DEAD, *_EVALUATION_SWITCHES, *LAUNCHER_VARIABLES, "EVAL_ONLY_PATH"}
