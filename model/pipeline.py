"""One call from a configuration to a score: train -> quantise into an artifact -> evaluate -> result.json.

Each stage reads what the one before left in the run's folder, so that any of them can be skipped or run again alone.
`python -m model.train` (also under torchrun) and `pgolf train` are `main` below.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from model.artifact import build_model, write_artifact
from model.checkpoint import list_checkpoints, load_checkpoint
from model.config import Config
from model.convert import from_reference
from model.data.dataset import Dataset, dataset_of
from model.data.loaders import LOADERS, Batch, Loader
from model.distributed import Dist, distributed, local_micro_batches
from model.errors import ArtifactError, ConfigError, PgolfError
from model.evaluate import EvalResult, parse_mode
from model.evaluate.observe import hash_weights
from model.files import sha256_bytes, sha256_file
from model.gpt import GPT
from model.memory import lower, memory_for
from model.quantize import collect_hessians, quantize_with_hessians
from model.run import FREE_ON_RESUME, RunDir
from model.schedule import budget_seconds
from model.score import PATIENCE_SECONDS, mode_name, record_score, score_mode, score_modes
from model.settings import Settings, config_options, given_flags, print_settings, resolve
from model.signals import Terminated, terminate_by_exception
from model.train import check_dataset, train

STAGES = ("train", "quantize", "evaluate")


class Interrupted(PgolfError):
    """A signal ended training; a checkpoint is on the disk. `number` is the signal's."""

    def __init__(self, number: int, run_id: str) -> None:
        super().__init__(f"stopped by signal {number}; --run-id {run_id} --resume goes on")
        self.number = number


def run_pipeline(
    config: Config,
    *,
    ranks: Dist | None = None,
    stages: Collection[str] = STAGES,
    dataset: Dataset | None = None,
    weights: str | os.PathLike[str] | None = None,
    resume: bool = False,
    started: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Runs `stages` in the folder `run_dir/run_id` and returns the merged result.json.

    `weights` takes the place of training: a run's folder or checkpoint, model.safetensors, or a state dict of a public
    script. With `resume` training goes on from the newest checkpoint of that folder and evaluating from its ledgers;
    training and quantising are left out where they are finished. Without "train" and `weights`, quantising starts from
    the folder's model.safetensors; without "quantize", evaluating reads its artifact. `quiet` shows no progress of
    evaluations.

    Raises PgolfError and its kinds, on every rank; Interrupted after a signal.
    """
    unknown = set(stages) - set(STAGES)
    if unknown:
        raise ConfigError(f"stages: got {', '.join(sorted(unknown))}, wanted some of {', '.join(STAGES)}")
    parse_mode(config.eval.eval_mode)  # an unknown one is refused before hours of training
    ranks = ranks or Dist.single("cuda" if torch.cuda.is_available() else "cpu")
    config = config.replace(run_id=agree_run_id(config, ranks))
    with ranks.together("opening the data set"):
        dataset = dataset or dataset_of(config)
        check_dataset(config, dataset)
    config = config.replace(variant=dataset.variant)  # the run keeps it, whatever its folder holds later
    folder = Path(config.train.run_dir) / config.train.run_id
    training = "train" in stages and weights is None
    if training:
        budget_seconds(config.train)
        local_micro_batches(config.train.micro_batches, ranks.world)
        taken = (folder / "model.safetensors").exists() or bool(list_checkpoints(folder / "checkpoints"))
        if taken and not resume:
            raise ConfigError(f"run_id: {folder} holds a trained run already, wanted another run_id or --resume")
    trained = training and ranks.gather_json(_is_trained(folder, config))[0]
    ranks.barrier()
    run = RunDir(folder, writes=ranks.is_main)
    run.start(config, dataset.fingerprint)

    model = None
    if trained:
        run.say(f"training is finished: {run.model_path}")
    elif training:
        ranks.set_timeout(config.train.timeout_seconds)
        result = train(config, dataset, run, ranks, resume=resume, started=started)
        if result.interrupted:
            raise Interrupted(result.interrupted, config.train.run_id)
        model = result.model
        run.merge_result({"trained_with_loop": result.looped})
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()  # what recorded graphs held
    ranks.barrier()  # every rank reads what the main one has written
    ranks.set_timeout(max(PATIENCE_SECONDS, config.train.timeout_seconds))
    if "quantize" in stages:
        if model is None:
            model = load_weights(weights or run.model_path, config, ranks.device)
        model = without_unused_loop(model, config, run)
        made_from = artifact_source(model, config, dataset)
        if resume and ranks.gather_json(_is_quantized(run, made_from))[0]:
            run.say(f"quantising is finished: {run.artifact_path}")
        else:
            _quantize(model, config, dataset, run, ranks, made_from=made_from, quiet=quiet)
    if "evaluate" in stages:
        _evaluate(config, dataset, run, ranks, resume=resume, quiet=quiet)
    return run.result()


def _is_trained(folder: Path, config: Config) -> bool:
    """Whether training is finished there. More time on the clock is a reason to go on."""
    if not (folder / "model.safetensors").is_file():
        return False
    return RunDir(folder, writes=False).config().train.max_wallclock_seconds == config.train.max_wallclock_seconds


def _is_quantized(run: RunDir, made_from: str) -> bool:
    """Whether the run's artifact is the one that was made from this (`artifact_source`), byte for byte."""
    record = run.result().get("artifact", {})
    if record.get("made_from") != made_from or not run.artifact_path.is_file():
        return False
    return bool(record["sha256"] == sha256_file(run.artifact_path))


def agree_run_id(config: Config, ranks: Dist) -> str:
    """The configured run_id, or one that all ranks share and that a restart by torchrun finds again."""
    if config.train.run_id:
        return config.train.run_id
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    mark = launch[:8] if launch != "none" else time.strftime("%m%d-%H%M%S")
    return ranks.gather_json(f"{config.preset}-seed{config.train.seed}-{mark}")[0]


def without_unused_loop(model: GPT, config: Config, run: RunDir) -> GPT:
    """`model`, with a rerun loop (pull request 1499) taken out that training never reached."""
    if config.model.loop_form == "rerun" and run.result().get("trained_with_loop") is False:
        model.config = dataclasses.replace(model.config, num_loops=0)
    return model


def load_weights(path: str | os.PathLike[str], config: Config, device: torch.device) -> GPT:
    """A GPT of `config` from a run's folder, a checkpoint folder, a .safetensors file, or a public script's .pt file.

    A checkpoint gives its averaged weights. Raises ArtifactError for a file that cannot be read or does not fit.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():
        path = path / "model.safetensors"
    if path.is_dir():
        tensors = load_checkpoint(path).tensors
        state = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
    elif path.suffix == ".safetensors":
        state = _read_safetensors(path)
    else:
        state = _read_public(path, config)
    return build_model(config, {name: tensor.float() for name, tensor in state.items()}, device)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path}: cannot be read as safetensors ({error})") from error


def _read_public(path: Path, config: Config) -> dict[str, Tensor]:
    """A state dict that torch.save wrote, tensors only: nothing in the file is executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(f"{path}: no state dict of tensors ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ArtifactError(f"{path}: wanted a dictionary of tensors")
    return from_reference(state, config.model)


def calibration_batches(config: Config, dataset: Dataset, ranks: Dist) -> Iterator[Batch]:
    """The preset's calibration data: the stream from its start for pull request 1499, shuffled windows otherwise.

    Each rank draws other windows. With fewer shards than ranks all draw the same ones.
    """
    kind = "stream" if config.data.loader == "stream" else "shuffled"
    shared = kind == "shuffled" and len(dataset.train_shards) < ranks.world
    loader: Loader = LOADERS[kind](
        dataset.train_shards,
        tokens=config.quant.calibration_tokens,
        seq_len=config.data.train_seq_len,
        vocab_size=config.model.vocab_size,
        rank=0 if shared else ranks.rank,
        world_size=1 if shared else ranks.world,
        device=ranks.device,
    )
    try:
        yield from islice(iter(loader.next_batch, None), config.quant.calibration_batches)
    finally:
        loader.close()


def artifact_source(model: GPT, config: Config, dataset: Dataset) -> str:
    """A digest of what an artifact is made from: weights, data and settings, without those that may change in a run."""
    settings = {name: value for _, name, value in _portable(model, config).items() if name not in FREE_ON_RESUME}
    return sha256_bytes(json.dumps([hash_weights(model), dataset.fingerprint, settings], sort_keys=True).encode())


def _quantize(
    model: GPT, config: Config, dataset: Dataset, run: RunDir, ranks: Dist, *, made_from: str, quiet: bool
) -> None:
    """Scores the weights as they are, quantises them and writes the artifact."""
    unquantised = score_mode(model, dataset, "plain", config, ranks, name="float", quiet=quiet)
    record_score(run, "float", unquantised)
    _say_score(run, "float", unquantised)
    with run.timed("quantize"):
        smaller = partial(lower, "calibration_tokens", config.quant.calibration_tokens, config.data.train_seq_len or 1)
        with (
            run.timed("calibrate"),  # up to the last training token that is read
            memory_for("while collecting Hessians", ranks.device, smaller),
        ):
            batches = calibration_batches(config, dataset, ranks)
            hessians = collect_hessians(model, batches, per_token=config.quant.quant_recipe == "pr1499")
            if ranks.device.type == "cuda":
                torch.cuda.synchronize(ranks.device)
        with memory_for("in GPTQ", ranks.device):
            quantized = quantize_with_hessians(model, config.quant, hessians, ranks.device)
    with run.timed("artifact"), ranks.together("writing the artifact"):
        if ranks.is_main:
            header = write_artifact(
                run.artifact_path,
                quantized,
                _portable(model, config),
                {"seed": config.train.seed, "data_sha256": dataset.fingerprint},
                tokenizer_sha256=sha256_bytes(dataset.tokenizer.model),
            )
            weights = sum(parameter.numel() for parameter in model.parameters())
            size, digest = header.file_size, sha256_file(run.artifact_path)
            # Scores of other bytes go before the record names the new ones: an interruption between the two must not
            # leave both.
            if run.result().get("artifact", {}).get("sha256") != digest:
                run.forget_scores()
            record = {"bytes": size, "bits_per_weight": 8 * size / weights, "weights": weights}
            run.merge_result({"artifact": {**record, "sha256": digest, "made_from": made_from}})
            run.say(f"artifact: {size:,} bytes, {8 * size / weights:.3f} bits a weight, {run.artifact_path}")


def _portable(model: GPT, config: Config) -> Config:
    """The configuration that an artifact of `model` holds.

    Without the paths and the name of this run: the same weights give the same artifact, byte for byte.
    """
    defaults = Config()
    return dataclasses.replace(config, model=model.config).replace(
        data_dir=defaults.data.data_dir, run_dir=defaults.train.run_dir, run_id=""
    )


def _evaluate(config: Config, dataset: Dataset, run: RunDir, ranks: Dist, *, resume: bool, quiet: bool) -> None:
    """Scores the artifact plainly and in the preset's mode."""
    modes = dict.fromkeys(("plain", config.eval.eval_mode))
    options: dict[str, Any] = {"run": run, "place": run.path, "resume": resume, "quiet": quiet}
    for name, result in score_modes(run.artifact_path, dataset, modes, config, ranks, **options):
        _say_score(run, name, result)
    final = run.result()["evaluation"][mode_name(config.eval.eval_mode)] if ranks.is_main else {}
    run.merge_result({"val_loss": final.get("val_loss"), "val_bpb": final.get("bpb")})


def _say_score(run: RunDir, name: str, result: EvalResult) -> None:
    run.say(
        f"{name}: val_loss {result.val_loss:.5f}  val_bpb {result.bpb:.5f}  {result.tokens:,} tokens, "
        f"{result.bytes:,} bytes in {result.seconds:.1f} s" + ("" if result.ledger.legal else "  (not a legal score)")
    )


# The command.


@click.command("train", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--resume", is_flag=True, help="Go on where the run stopped: newest checkpoint, ledgers.")
@click.option("--skip", type=click.Choice(STAGES), multiple=True, help="Leave a stage out; may be repeated.")
@click.option("--weights", help="Weights to quantise and evaluate instead of training.")
@click.option("--seeds", metavar="N,N,...", help="Run the pipeline once for each of these seeds.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="[default: cuda where there is one]")
@config_options
def train_command(
    preset: str,
    resume: bool,
    skip: tuple[str, ...],
    weights: str | None,
    seeds: str | None,
    device: str | None,
    **flags: Any,
) -> None:
    """Train, quantise, write the artifact and evaluate it. One process, or several under torchrun.

    \b
    torchrun --standalone --nproc_per_node=8 -m model.train --preset pr1727 --seed 42

    Flags go over environment variables (those of the public scripts are understood), these over the preset.
    """
    started = time.perf_counter()
    settings = resolve(preset, given_flags(flags), os.environ)
    if resume and not settings.config.train.run_id:
        raise ConfigError("resume: got no run_id, wanted --run-id NAME of the run to go on with")
    stages = [stage for stage in STAGES if stage not in skip]
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    with distributed(device, settings.config.train.timeout_seconds) as ranks:
        if ranks.is_main:
            print_settings(settings)
        for config in _seeded(settings, seeds):
            if seeds and ranks.is_main:
                click.echo(f"seed {config.train.seed}")
            result = run_pipeline(
                config,
                ranks=ranks,
                stages=stages,
                weights=weights or settings.weights,
                resume=resume or restarted,
                started=started,
            )
            if ranks.is_main:
                _summarise(result)
            started = time.perf_counter()  # of the next seed's run


def _seeded(settings: Settings, seeds: str | None) -> list[Config]:
    if seeds is None:
        return [settings.config]
    try:
        numbers = [int(text) for text in seeds.split(",")]
    except ValueError:
        raise ConfigError(f"seeds: got {seeds!r}, wanted integers with commas between them") from None
    prefix = settings.config.train.run_id
    return [settings.config.replace(seed=n, run_id=f"{prefix}-seed{n}" if prefix else "") for n in numbers]


def _summarise(result: dict[str, Any]) -> None:
    if result.get("val_loss") is not None:
        click.echo(f"val_loss: {result['val_loss']:.8f}  val_bpb: {result['val_bpb']:.8f}")
    if "artifact" in result:
        click.echo(f"artifact: {result['artifact']['bytes']:,} bytes")
    seconds = {name: value for name, value in result.get("seconds", {}).items() if isinstance(value, float)}
    click.echo("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def main(arguments: list[str] | None = None, program: str | None = None) -> None:
    """`python -m model.train`: errors are one line on stderr, an interruption is 128 + the signal's number."""
    terminate_by_exception()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    say = partial(_say_error, program or "model.train")
    status = 1
    try:
        train_command.main(arguments, program, standalone_mode=False)
        status = 0
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except click.exceptions.Exit as request:
        status = request.exit_code
    except Interrupted as error:
        say(str(error))
        status = 128 + error.number
    except (click.exceptions.Abort, KeyboardInterrupt):
        say("stopped by Ctrl-C")
        status = 130
    except Terminated as request:
        status = int(request.code or 0)
        if not several:  # torchrun ends ranks because of another one, whose message stands already
            say(f"stopped by {signal.Signals(status - 128).name}")
    except (PgolfError, OSError) as error:
        say(str(error))
        status = 1
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if status and several:
        # Groups are not torn down after an error, and their threads would not survive an interpreter that ends.
        os._exit(status)
    sys.exit(status)


def _say_error(program: str, text: str) -> None:
    rank = os.environ.get("RANK")
    print(f"{program}{f' (rank {rank})' if rank else ''}: {' '.join(text.split())}", file=sys.stderr)
