"""Settings: flags over environment variables over presets, for the commands that the authors published."""

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from model.config import Config, field_types
from model.environment import known_variables, read_environment
from model.errors import ConfigError
from model.presets import DEFECTS, get_preset, preset_names
from model.settings import config_options, given_flags, print_settings, resolve
from tests.systems import PUBLISHED

# Every variable that a public script reads, with its code default in each system (null: not read there).
VARIABLES = json.loads((Path(__file__).parent / "environment_variables.json").read_text())
SYSTEMS = ("pr1413", "pr1499", "pr1514", "pr1530", "pr1727")
PLACES = {"DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "ARTIFACT_DIR", "RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
# The published codec is brotli; the presets take this package's own, which is smaller and faster.
OUR_CHOICE = {"COMPRESSOR"}


def code_defaults(system: str) -> dict[str, str]:
    return {name: values[system] for name, values in VARIABLES.items() if values.get(system) is not None}


def fields(config: Config) -> dict[str, object]:
    return {name: value for _, name, value in config.items()}


def test_every_public_variable_is_known():
    assert len(VARIABLES) == 164
    assert set(VARIABLES) <= known_variables()


@pytest.mark.parametrize("system", SYSTEMS)
def test_presets_are_the_code_defaults_with_the_published_environment(system):
    skipped = PLACES | OUR_CHOICE
    environ = {name: text for name, text in code_defaults(system).items() if name not in skipped} | PUBLISHED[system]
    preset = get_preset(system)
    changed = {k: (fields(preset)[k], v) for k, v in fields(resolve(system, {}, environ).config).items()}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    assert changed == {}


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_commands_give_the_preset(system):
    assert resolve(system, {}, PUBLISHED[system]).config == get_preset(system)


@pytest.mark.parametrize("system", SYSTEMS)
def test_code_defaults_are_accepted_one_by_one(system):
    for name, text in code_defaults(system).items():
        if name not in PLACES:
            resolve(system, {}, {name: text})


def test_flags_win_over_variables_over_the_preset():
    environ = {"MATRIX_LR": "0.03", "SEED": "7"}
    settings = resolve("pr1727", {"matrix_lr": 0.04}, environ)
    assert settings.config.train.matrix_lr == 0.04
    assert settings.config.train.seed == 7
    assert settings.config.train.ema_decay == get_preset("pr1727").train.ema_decay
    assert settings.taken == {"MATRIX_LR": "matrix_lr=0.03", "SEED": "seed=7"}


def test_unrelated_variables_are_left_alone():
    assert resolve("pr1530", {}, {"PATH": "/bin", "HOME": "/root", "SEEDS": "1"}).taken == {}


@pytest.mark.parametrize(
    ("system", "environ", "field", "value"),
    [
        ("pr1413", {"TTT_ENABLED": "0"}, "eval_mode", "sliding"),
        ("pr1413", {"TTT_ENABLED": "0", "SLIDING_WINDOW_ENABLED": "0"}, "eval_mode", "plain"),
        ("pr1514", {"NGRAM_TILT_ENABLED": "0"}, "eval_mode", "sgd-ttt"),
        ("pr1530", {"TTT_ENABLED": "0"}, "eval_mode", "plain"),
        ("pr1530", {"TTT_ENABLED": "0", "SLIDING_WINDOW_ENABLED": "1"}, "eval_mode", "sliding"),
        ("pr1727", {"PHASED_TTT_ENABLED": "0"}, "eval_mode", "phased"),  # never read by the public script
        ("pr1499", {"EVAL_STRIDE": "0"}, "eval_mode", "plain"),
        ("pr1499", {"DEPTH_RECUR_COUNT": "3"}, "num_loops", 2),
        ("pr1499", {"TTT_LR": "0.1"}, "ttt_lora_lr", 0.1),
        ("pr1413", {"TTT_LR": "0.1"}, "sgd_ttt_lr", 0.1),
        ("pr1413", {"SKIP_GATES_ENABLED": "0"}, "skip_form", "additive"),
        ("pr1499", {"FP16_KEEP_NAME_PATTERNS": "blocks.2.attn.proj"}, "keep_fp16", ("blocks.2.attn.o",)),
        ("pr1499", {"EMA_ENABLED": "0"}, "ema_decay", 0.0),
        ("pr1499", {"DATA_PATH": "/d/datasets/fineweb10B_sp8192"}, "data_dir", "/d"),
        ("pr1499", {"DATA_PATH": "/d/datasets/fineweb10B_sp1024/"}, "variant", "sp1024"),
        ("pr1499", {"DATA_PATH": "datasets/fineweb10B_sp1024"}, "data_dir", "."),
        ("pr1499", {"TOKENIZER_PATH": "/d/tokenizers/fineweb_8192_bpe.model"}, "data_dir", "/d"),
        ("pr1499", {"TOKENIZER_PATH": "/d/tokenizers/fineweb_1024_bpe.model"}, "variant", "sp1024"),
        ("pr1530", {"VOCAB_SIZE": "1024"}, "variant", ""),  # the data set is chosen when the folder is opened
        ("pr1530", {"MATRIX_CLIP_SIGMAS": "9"}, "mlp_clip_sigmas", 9.0),
        ("pr1530", {"VAL_BATCH_TOKENS": "65536", "EVAL_SEQ_LEN": "1024"}, "eval_batch_seqs", 8),
        ("pr1530", {"ARTIFACT_DIR": "/out"}, "run_dir", "/out"),
        ("pr1530", {"RUN_ID": "x"}, "run_id", "x"),
        ("pr1530", {"MUON_ROW_NORMALIZE": "0"}, "muon_row_normalize", False),
    ],
)
def test_variables_that_are_more_than_a_number(system, environ, field, value):
    assert fields(resolve(system, {}, environ).config)[field] == value


def test_eval_only_path_replaces_training():
    assert resolve("pr1530", {}, {"EVAL_ONLY_PATH": "/w.pt"}).weights == "/w.pt"
    assert resolve("pr1530", {}, {"EVAL_ONLY_PATH": ""}).weights is None


@pytest.mark.parametrize(
    ("system", "environ", "message"),
    [
        ("pr1499", {"PREQUANT_TTT_ENABLED": "1"}, r"PREQUANT_TTT_ENABLED: got '1'.*scored before.*\(C3\)"),
        ("pr1514", {"USE_POLAR_EXPRESS": "1"}, "USE_POLAR_EXPRESS: got '1', wanted '0'"),
        ("pr1530", {"TIE_EMBEDDINGS": "0"}, "TIE_EMBEDDINGS"),
        ("pr1530", {"PHASED_TTT_ENABLED": "1"}, "--eval-mode phased"),
        ("pr1727", {"MATRIX_CLIP_SIGMAS": "9"}, "ATTN_CLIP_SIGMAS"),
        ("pr1530", {"EMBEDDING_DIM": "256"}, "EMBEDDING_DIM: got '256', wanted model_dim=512"),
        ("pr1530", {"CONTROL_TENSOR_NAME_PATTERNS": "q_gain"}, "CONTROL_TENSOR_NAME_PATTERNS"),
        ("pr1530", {"SEED": "one"}, "SEED: got 'one', wanted an integer"),
        ("pr1530", {"MATRIX_LR": "fast"}, "MATRIX_LR: got 'fast', wanted a number"),
        ("pr1530", {"LN_SCALE": "maybe"}, "LN_SCALE: got 'maybe', wanted 0 or 1"),
        ("pr1530", {"COMPRESSOR": "zip"}, "codec: got 'zip'"),
        ("pr1530", {"EVAL_STRIDE": "0"}, "EVAL_STRIDE: got '0', wanted at least 1"),
        ("pr1499", {"TTT_ENABLED": "0"}, "--eval-mode sliding"),
        ("pr1499", {"DATA_PATH": "/d/shards"}, "DATA_DIR/datasets/fineweb10B_spN"),
        ("pr1499", {"DATA_PATH": "/d/datasets/other"}, "DATA_PATH: got '/d/datasets/other', wanted DATA_DIR/datasets/"),
        ("pr1499", {"TOKENIZER_PATH": "/d/t.model"}, r"DATA_DIR/tokenizers/fineweb_N_bpe\.model"),
        ("pr1530", {"TTT_EVAL_BATCHES": "3"}, "every document"),
    ],
)
def test_refused_with_the_reason(system, environ, message):
    with pytest.raises(ConfigError, match=message):
        resolve(system, {}, environ)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"DATA_PATH": "/a/datasets/fineweb10B_sp8192", "TOKENIZER_PATH": "/b/tokenizers/fineweb_8192_bpe.model"},
         "variables DATA_PATH and TOKENIZER_PATH: got '/a/.*' and '/b/.*', wanted one folder"),
        ({"DATA_PATH": "/a/datasets/fineweb10B_sp8192", "TOKENIZER_PATH": "/a/tokenizers/fineweb_1024_bpe.model"},
         "variables DATA_PATH and TOKENIZER_PATH: .*wanted one data set"),
        ({"DATA_DIR": "/b", "DATA_PATH": "/a/datasets/fineweb10B_sp8192"}, "DATA_DIR and DATA_PATH.*one folder"),
        ({"DATA_PATH": "/a/datasets/fineweb10B_sp1024", "VOCAB_SIZE": "8192"}, "DATA_PATH and VOCAB_SIZE.*one data"),
    ],
)  # fmt: skip
def test_places_of_the_data_that_disagree(environ, message):
    with pytest.raises(ConfigError, match=message):
        resolve("pr1499", {}, environ)


def test_places_of_the_data_that_agree():
    environ = {
        "DATA_DIR": "d/", "DATA_PATH": "./d/datasets/fineweb10B_sp1024", "VOCAB_SIZE": "1024",
        "TOKENIZER_PATH": "d/tokenizers/fineweb_1024_bpe.model",
    }  # fmt: skip
    settings = resolve("pr1499", {}, environ)
    assert settings.config.data.data_dir == "d" and settings.config.data.variant == "sp1024"
    assert settings.taken["DATA_PATH"] == "data_dir=d, variant=sp1024"
    flags = {"data_dir": "/e", "variant": "sp512"}
    assert resolve("pr1499", flags, environ).config.data.variant == "sp512"


def test_layers_and_loop_can_change_together():
    """Each alone would be refused: variables are applied at once."""
    environ = {"NUM_LAYERS": "4", "LOOP_START": "1", "LOOP_END": "2", "XSA_LAST_N": "4", "PARALLEL_START_LAYER": "3"}
    config = resolve("pr1530", {}, environ).config
    with pytest.raises(ConfigError):
        resolve("pr1530", {}, {"NUM_LAYERS": "4"})
    assert config.model.num_layers == 4


def parse(*arguments: str) -> dict[str, object]:
    found = {}

    @click.command()
    @config_options
    def command(preset, **flags):
        found.update(given_flags(flags), preset=preset)

    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    if result.exit_code:
        raise ConfigError(result.output)
    return found


def test_every_field_is_a_flag():
    config = get_preset("pr1499")
    arguments = []
    for name, value in fields(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        else:
            arguments += [flag, ",".join(value) if isinstance(value, tuple) else str(value)]
    given = parse("--preset", "pr1413", *arguments)
    assert given.pop("preset") == "pr1413"
    assert set(given) == set(field_types())
    assert fields(get_preset("pr1413").replace(**given)) == fields(config)


def test_flags_that_are_not_given_are_left_out():
    assert parse("--seed", "3") == {"seed": 3, "preset": "pr1530"}


@pytest.mark.parametrize(
    "arguments",
    [("--preset", "pr9"), ("--loader", "random"), ("--seed", "x"), ("--parallel-lanes", "3"), ("--sed", "1")],
)
def test_bad_flags_are_refused(arguments):
    with pytest.raises(ConfigError, match="Error"):
        parse(*arguments)


def test_settings_are_printed(capsys):
    print_settings(resolve("pr1727", {"seed": 9}, {"MATRIX_LR": "0.5"}))
    text = capsys.readouterr().out
    assert "(preset: 1337)" in text
    assert "(preset: 0.026)" in text
    assert "environment: MATRIX_LR -> matrix_lr=0.5" in text
    assert all(name in text for name in field_types())


def test_environment_says_what_it_changed():
    environment = read_environment(get_preset("pr1499"), {"WEIGHT_DECAY": "0.1", "HEAD_LR": "0.008"})
    assert environment.changes == {"embed_wd": 0.1, "adam_wd": 0.1}
    assert environment.taken == {"WEIGHT_DECAY": "embed_wd=0.1, adam_wd=0.1", "HEAD_LR": "as it is"}


def test_defects_name_known_presets():
    assert {system for defect in DEFECTS for system in defect.systems} <= set(preset_names())
