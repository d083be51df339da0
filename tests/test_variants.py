"""A run in a folder of the public layout that comes to hold several variants keeps to the one it was trained on."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from model.cli import cli
from model.data.dataset import open_dataset
from model.data.shards import document_starts, write_shard
from model.errors import DataError, NotVerified
from model.legality import verify_artifact
from model.pipeline import run_pipeline
from model.run import RunDir
from model.score import score_artifact
from tests.golden import FOLDER, load_npz
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on sp1024, the only one at the time. sp512, which its vocabulary names, came later and is not whole."""
    folder = tmp_path_factory.mktemp("public")
    shards = folder / "datasets" / "fineweb10B_sp1024"
    shards.mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    shutil.copy(FOLDER / "bpb_sentencepiece.model", folder / "tokenizers" / "fineweb_1024_bpe.model")
    tokens = load_npz("bpb.npz")["tokens"]
    cut = document_starts(tokens)[2]
    write_shard(shards / "fineweb_val_000000.bin", tokens[:cut])
    write_shard(shards / "fineweb_train_000000.bin", tokens[cut : cut + 3000])
    config = tiny_config(folder, tmp_path_factory.mktemp("runs"), iterations=1, warmup_steps=0, eval_mode="plain")
    run_pipeline(config, stages=("train", "quantize"))
    (folder / "datasets" / "fineweb10B_sp512").mkdir()
    return Path(config.train.run_dir) / config.train.run_id


def test_the_run_keeps_its_variant(run: Path) -> None:
    config = RunDir(run).config()
    assert config.data.variant == "sp1024"
    with pytest.raises(DataError, match=r"fineweb10B_sp512: no fineweb_train_\*\.bin"):
        open_dataset(config.data.data_dir, vocab_size=512)


def test_its_scores_are_of_that_variant(run: Path) -> None:
    scored = score_artifact(run, ["plain"], quiet=True)["plain"]
    with pytest.raises(DataError, match="fineweb10B_sp512: no"):
        score_artifact(run, ["plain"], quiet=True, variant="sp512")
    artifact = run / "model.pgolf"  # alone, in the folder of any copy of the data
    data = RunDir(run).config().data.data_dir
    assert score_artifact(artifact, ["plain"], quiet=True, data_dir=data)["plain"].bpb == scored.bpb


def test_it_is_verified_on_that_variant(run: Path) -> None:
    report = verify_artifact(run, mode="plain", candidates=8, seed=0)
    assert not report.failed
    with pytest.raises(DataError, match="fineweb10B_sp512: no"):
        verify_artifact(run, mode="plain", variant="sp512")


@pytest.mark.parametrize("command", ["eval", "verify", "quantize"])
def test_the_flag(run: Path, command: str) -> None:
    done = CliRunner().invoke(cli, [command, str(run), "--variant", "sp2048"])
    assert isinstance(done.exception, NotVerified if command == "verify" else DataError)
    assert "wanted datasets/fineweb10B_sp2048, there are sp1024, sp512" in str(done.exception)
