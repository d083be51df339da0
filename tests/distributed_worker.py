"""What tests/test_distributed.py runs under torchrun: `python -m tests.distributed_worker SCENARIO FOLDER`."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from model.checkpoint import list_checkpoints
from model.config import Config
from model.data.dataset import open_dataset
from model.distributed import Dist, distributed
from model.errors import PgolfError
from model.run import RunDir
from model.train import Trainer, TrainResult, train


def read_config(path: Path) -> Config:
    return Config.from_dict(json.loads(path.read_text()))


def train_in(folder: Path, config: Config, ranks: Dist, *, resume: bool = False) -> TrainResult:
    run = RunDir(folder, writes=ranks.is_main)
    return train(config, open_dataset(config.data.data_dir), run, ranks, resume=resume)


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
    ranks.set_timeout(0.5)
    ranks.set_timeout(100.0)
    time.sleep(1.5 * ranks.rank)
    ranks.barrier()
    ranks.set_timeout(0.5)
    gave_up = False
    if ranks.rank == 0:
        try:
            ranks.barrier()
        except RuntimeError:
            gave_up = True
    else:
        time.sleep(3)
    assert gave_up == (ranks.rank == 0)


def weights(folder: Path, ranks: Dist) -> None:
    """Trains each configuration in FOLDER/*.json, on from its last checkpoint; that has the weights and all state."""
    for path in sorted(folder.glob("*.json")):
        result = train_in(folder / path.stem, read_config(path), ranks, resume=True)
        mine = torch.cat([p.detach().flatten() for p in result.model.parameters()])
        theirs = ranks.broadcast_(mine.clone())
        assert torch.equal(mine, theirs), "replicas differ"


def killed(folder: Path, ranks: Dist) -> None:
    """Rank 1 of the first attempt kills itself in step 4; the second attempt goes on."""
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if restarts == 0 and ranks.rank == 1:
        before_step(3, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))
    if restarts:
        assert list_checkpoints(folder / "run" / "checkpoints"), "no checkpoint to go on from"
    train_in(folder / "run", read_config(folder / "config.json"), ranks, resume=restarts > 0)


def before_step(number: int, act: Callable[[Trainer], None]) -> None:
    """Has `act` called when that many steps are done, before the next one."""
    step = Trainer.train_step

    def acting_step(self: Trainer, settings: object) -> torch.Tensor:
        if self.step == number:
            act(self)
        return step(self, settings)

    Trainer.train_step = acting_step


def everywhere(folder: Path, ranks: Dist) -> None:
    """Failures that every rank must meet at the same place: the processes are whole afterwards, and go on."""
    config = read_config(folder / "config.json")
    second = ranks.rank == 1
    plain_step = Trainer.train_step
    outcomes: dict[str, str] = {}

    def fails(name: str, changed: Config, act: Callable[[Trainer], None] | None = None, resume: bool = False) -> None:
        dataset = open_dataset(changed.data.data_dir)
        if name == "missing shard" and second:
            dataset.train_shards[0] = dataset.train_shards[0].with_name("gone.bin")
        run = RunDir(folder / name.replace(" ", "_"), writes=ranks.is_main)
        if act is not None and second:
            before_step(2, act)
        try:
            result = train(changed, dataset, run, ranks, resume=resume)
            outcomes[name] = f"interrupted by {result.interrupted} after step {result.step}"
        except PgolfError as error:
            outcomes[name] = str(error)
        Trainer.train_step = plain_step
        ranks.barrier()

    def spoil(trainer: Trainer) -> None:
        trainer.model.tok_emb.data.fill_(float("nan"))

    fails("missing shard", config)
    fails("tokenizer", config.replace(vocab_size=256))
    fails("division", config.replace(micro_batches=1))
    fails("not finite", config, spoil)
    fails("signal", config, lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
    fails("other ranks", config.replace(loader="shuffled"), resume=True)
    if second:
        RunDir.checkpoints = property(lambda run: run.path / "nothing")
    fails("folders", config, resume=True)
    (folder / f"outcomes.{ranks.rank}").write_text(json.dumps(outcomes))


def alone(folder: Path, ranks: Dist) -> None:
    """Rank 1 fails in the middle of a step, where the others wait for it in a collective."""

    def fail(trainer: Trainer) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    if ranks.rank == 1:
        before_step(2, fail)
    train_in(folder / "run", read_config(folder / "config.json"), ranks)


def vanished(folder: Path, ranks: Dist) -> None:
    """Rank 1 is killed and not replaced."""
    if ranks.rank == 1:
        before_step(2, lambda trainer: os.kill(os.getpid(), signal.SIGKILL))
    train_in(folder / "run", read_config(folder / "config.json"), ranks)


SCENARIOS = {f.__name__: f for f in (agreement, weights, killed, everywhere, alone, vanished)}


def play(scenario: str, folder: Path) -> None:
    with distributed("cpu", timeout_seconds=200) as ranks:
        SCENARIOS[scenario](folder, ranks)


def running_threads() -> set[str]:
    tasks = Path("/proc/self/task")
    return {(task / "comm").read_text().strip() for task in tasks.iterdir()} if tasks.is_dir() else set()


def main() -> None:
    """As model.pipeline.main: after an error the process leaves at once."""
    torch.set_num_threads(1)
    try:
        play(sys.argv[1], Path(sys.argv[2]))
        left = {name for name in running_threads() if "gloo" in name}
        assert not left, f"threads that would outlive the interpreter: {left}"
    except BaseException as error:
        if isinstance(error, PgolfError):
            print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
