"""What tests/test_distributed.py runs under torchrun: `python -m tests.distributed_worker SCENARIO FOLDER`."""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

from model.checkpoint import list_checkpoints
from model.config import Config
from model.data.dataset import open_dataset
from model.distributed import Dist, distributed
from model.errors import PgolfError
from model.run import RunDir
from model.train import Trainer, train


def agreement(folder: Path, ranks: Dist) -> None:
    """What ranks tell each other, and failures that reach all of them."""
    assert ranks.agree_max(float(ranks.rank), -1.0 - ranks.rank) == (1.0, -1.0)
    values = ranks.gather_json({"rank": ranks.rank, "text": "x" * (ranks.rank * 1000), "big": 2**100})
    assert [value["rank"] for value in values] == [0, 1]
    assert len(values[1]["text"]) == 1000 and values[0]["big"] == 2**100
    assert ranks.sum_(torch.tensor([1.0 + ranks.rank])).item() == 3.0
    message = ""
    try:
        with ranks.together("opening a door"):
            if ranks.rank == 1:
                raise PgolfError("door 1 is locked")
    except PgolfError as error:
        message = str(error)
    assert message == ("door 1 is locked" if ranks.rank == 1 else "opening a door: rank 1 failed: door 1 is locked")


def weights(folder: Path, ranks: Dist) -> None:
    """Trains each configuration in FOLDER/*.json; rank 0 leaves the weights, the last checkpoint the optimiser."""
    for path in sorted(folder.glob("*.json")):
        config = Config.from_dict(json.loads(path.read_text()))
        run = RunDir(folder / path.stem, writes=ranks.is_main)
        result = train(config, open_dataset(config.data.data_dir), run, ranks)
        mine = torch.cat([p.detach().flatten() for p in result.model.parameters()])
        theirs = ranks.broadcast_(mine.clone())
        assert torch.equal(mine, theirs), "replicas differ"


def killed(folder: Path, ranks: Dist) -> None:
    """Rank 1 of the first attempt kills itself in step 4; the second attempt goes on."""
    config = Config.from_dict(json.loads((folder / "config.json").read_text()))
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    step = Trainer.train_step

    def fatal_step(self: Trainer, settings: object) -> torch.Tensor:
        if restarts == 0 and ranks.rank == 1 and self.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, settings)

    Trainer.train_step = fatal_step
    run = RunDir(folder / "run", writes=ranks.is_main)
    if restarts:
        assert list_checkpoints(run.checkpoints), "no checkpoint to go on from"
    train(config, open_dataset(config.data.data_dir), run, ranks, resume=restarts > 0)


def missing(folder: Path, ranks: Dist) -> None:
    """Rank 1 does not find a shard."""
    config = Config.from_dict(json.loads((folder / "config.json").read_text()))
    dataset = open_dataset(config.data.data_dir)
    if ranks.rank == 1:
        dataset.train_shards[0] = dataset.train_shards[0].with_name("gone.bin")
    train(config, dataset, RunDir(folder / "run", writes=ranks.is_main), ranks)


def main() -> None:
    """As model.pipeline.main: a rank leaves at once, whatever its library's threads are doing."""
    torch.set_num_threads(1)
    scenario, folder = sys.argv[1], Path(sys.argv[2])
    status = 1
    try:
        with distributed("cpu", timeout_seconds=60) as ranks:
            {"agreement": agreement, "weights": weights, "killed": killed, "missing": missing}[scenario](folder, ranks)
        status = 0
    except PgolfError as error:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
