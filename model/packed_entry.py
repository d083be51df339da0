"""What train_gpt.py of a packed submission runs: score the artifact beside it, or train another one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(script: str) -> None:
    """`train_gpt.py [--data DIR] [--mode MODE]` scores; `train_gpt.py train ...` trains (as `pgolf train` does)."""
    from model.errors import PgolfError

    try:
        if sys.argv[1:2] == ["train"]:
            _train(sys.argv[2:])
        else:
            _score(Path(script).resolve().parent / "model.pgolf", sys.argv[1:])
    except PgolfError as error:
        sys.exit(f"train_gpt.py: {error}")


def _train(arguments: list[str]) -> None:
    from model import pipeline

    if "--codec" not in arguments:
        arguments = [*arguments, "--codec", "brotli"]  # the project's own coder is compiled code
    pipeline.main(arguments, "train_gpt.py train")


def _score(artifact: Path, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="train_gpt.py", epilog="train_gpt.py train --help: training")
    parser.add_argument("--data", required=True, help="data set with the validation text and the tokenizer")
    parser.add_argument("--mode", action="append", default=[], help="evaluation mode, may be repeated")
    parser.add_argument("--device", choices=["cuda", "cpu"])
    options = parser.parse_args(arguments)

    from model.score import print_scores, score_artifact

    results = score_artifact(
        artifact, options.mode, data_dir=options.data, device=options.device, quiet=True, ledgers=False
    )
    print_scores(results)
    print(json.dumps({"bpb": {name: result.bpb for name, result in results.items()}}))
