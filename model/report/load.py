"""Reading a run's folder for the report. What a run lacks is left out and said so; what is damaged is an error."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from model.artifact import read_artifact
from model.checks import FAIL, Check, Report
from model.config import Config
from model.data.dataset import Dataset, dataset_of
from model.errors import ConfigError, DataError
from model.evaluate.bpb import score_per_document
from model.evaluate.documents import find_documents
from model.evaluate.ledger import Ledger
from model.run import RunDir

# Settings that say where a run is or which one of several equal ones it is, not what it does.
_IDENTITY = frozenset({"seed", "run_id", "run_dir", "data_dir"})


@dataclass(frozen=True)
class WeightClass:
    """Weights of one kind in the artifact. entropy: order-0, bits a weight over all codes of the class."""

    name: str
    weights: int
    bits: float  # allotted to a weight, on average
    entropy: float


@dataclass(frozen=True)
class ArtifactFacts:
    """Bytes of an artifact's parts. `classes` are the quantised matrices, whose codes share one section."""

    parts: dict[str, int]
    classes: list[WeightClass]

    @property
    def size(self) -> int:
        return sum(self.parts.values())

    @property
    def code_bytes(self) -> dict[str, float]:
        """The section of codes, shared out over the classes by their entropy."""
        entropies = {c.name: c.weights * c.entropy for c in self.classes}
        total = sum(entropies.values())
        return {name: self.parts["codes"] * bits / total if total else 0.0 for name, bits in entropies.items()}


class ByToken:
    """The losses of single tokens (nats, by mode) beside the text that they belong to."""

    def __init__(self, dataset: Dataset, nll: dict[str, np.ndarray]) -> None:
        self.tokenizer, self.tokens, self.nll = dataset.tokenizer, dataset.valid_tokens, nll
        self.documents = find_documents(self.tokens)  # start and length of each
        self._token_bytes = dataset.byte_tables.stream_bytes(self.tokens)

    def per_document(self, mode: str) -> np.ndarray:
        """Loss sum (nats), bytes and tokens of each document in this mode."""
        return score_per_document(self.nll[mode], self._token_bytes, self.documents)


@dataclass(frozen=True)
class Run:
    """One run, as far as its folder tells."""

    path: Path
    config: Config
    provenance: dict[str, Any]
    result: dict[str, Any]
    steps: list[dict[str, Any]]  # metrics of training steps
    validations: list[dict[str, Any]]  # metrics of validations during training
    artifact: ArtifactFacts | None
    dataset: Dataset | None  # where it is still there
    ledgers: dict[str, Ledger]  # by evaluation mode, as in `bpb`
    verified: dict[str, Report]  # what `pgolf verify` found, by mode
    missing: list[str] = field(default_factory=list)  # sentences for the page

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def seed(self) -> int:
        return self.config.train.seed

    @property
    def is_validated(self) -> bool:
        """Whether it was validated more than once, at its end: then there is a curve."""
        return len(self.validations) > 1

    @property
    def bpb(self) -> dict[str, float]:
        """Bits per byte by evaluation mode, where there is a number."""
        scores = self.result.get("bpb", {})
        return {m: value for m, value in scores.items() if isinstance(value, int | float) and math.isfinite(value)}

    @property
    def nats(self) -> dict[str, float]:
        """Nats per token by evaluation mode."""
        scores = self.result.get("evaluation", {})
        return {mode: scores[mode]["val_loss"] for mode in self.bpb if mode in scores}

    @property
    def final_mode(self) -> str | None:
        """The mode whose score is the run's: the preset's if it was run, else the last one."""
        wanted = self.config.eval.eval_mode.replace("-", "_").replace("+", "_")
        return wanted if wanted in self.bpb else next(reversed(self.bpb), None)

    def objections(self, mode: str) -> list[str]:
        """What speaks against this mode's score being a legal one, in words; empty where nothing does."""
        facts = self.result.get("evaluation", {}).get(mode, {})
        ledger = self.ledgers.get(mode)
        found = list(ledger.defects if ledger is not None else facts.get("defects", []))
        if not found and facts.get("legal") is False:
            found.append("the evaluation says so")
        if ledger is not None and not np.isfinite(ledger.nll[1:]).all():
            found.append("its ledger is unfinished")
        own = self.config.eval.eval_mode
        for name, report in self.verified.items():
            if (own if name == "own" else name).replace("-", "_").replace("+", "_") == mode and not report.legal:
                failed = [check.name for check in report.checks if check.status == FAIL]
                found.append(f"pgolf verify: {', '.join(failed) or 'not legal'}")
        return found

    @property
    def signature(self) -> tuple[tuple[str, Any], ...]:
        """Equal for runs that differ by their seed (and their place) alone."""
        return tuple((name, value) for _, name, value in self.config.items() if name not in _IDENTITY)

    @cached_property
    def by_token(self) -> ByToken | None:
        """What can be said of single tokens; None without the data set or without a finished evaluation's ledger."""
        found = {mode: self.ledgers[mode].nll for mode in self.bpb if mode in self.ledgers}
        finished = {mode: nll for mode, nll in found.items() if np.isfinite(nll[1:]).all()}
        return ByToken(self.dataset, finished) if self.dataset is not None and finished else None


def load_run(path: str | os.PathLike[str]) -> Run:
    """Reads a run's folder. Raises ConfigError where there is none, and what its damaged parts raise."""
    run_dir = RunDir(path, writes=False)
    config = run_dir.config()
    origin = run_dir.path / "provenance.json"
    provenance = _read_json(origin) if origin.is_file() else {}
    records = list(run_dir.metrics())
    missing: list[str] = [] if provenance else ["There is no provenance.json: nothing on machine, versions and data."]
    dataset = _find_dataset(run_dir.path, config, provenance, missing)
    ledgers = {}
    for file in sorted(run_dir.path.rglob("ledger*.npz")):
        ledger = Ledger.load(file)
        if dataset is not None and ledger.num_tokens != dataset.valid_tokens.size:
            missing.append(f"{file.name} belongs to another validation stream.")
            continue
        ledgers[re.sub(r"^ledger[_.-]?", "", file.stem) or str(ledger.meta.get("mode"))] = ledger
    if not ledgers:
        missing.append("No ledger was kept: nothing by document, and no example text.")
    artifact = run_dir.artifact_path
    if not artifact.is_file():
        missing.append("There is no artifact: nothing on its bytes.")
    return Run(
        path=run_dir.path.resolve(),
        config=config,
        provenance=provenance,
        result=run_dir.result(),
        steps=[record for record in records if "loss" in record],
        validations=[record for record in records if "val_loss" in record],
        artifact=_artifact_facts(artifact) if artifact.is_file() else None,
        dataset=dataset,
        ledgers=ledgers,
        verified={
            file.stem.removeprefix("verify_"): _read_verified(file)
            for file in sorted(run_dir.path.glob("verify*.json"))
        },
        missing=missing,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not a JSON object ({error})") from error


def _read_verified(path: Path) -> Report:
    report = _read_json(path)
    checks = report.get("checks")
    keys = {"name", "status", "figure"}
    if not isinstance(checks, list) or not all(isinstance(c, dict) and keys <= set(c) for c in checks):
        raise ConfigError(f"{path}: not what `pgolf verify` writes, wanted checks with {', '.join(sorted(keys))}")
    return Report([Check(c["name"], c["status"], c["figure"]) for c in checks])


def _find_dataset(run: Path, config: Config, provenance: dict[str, Any], missing: list[str]) -> Dataset | None:
    """The run's data set, if it is still where it was (or beside the run's results) and what it was."""
    if not provenance:
        return None
    problems = []
    for folder in (Path(config.data.data_dir), run / "data"):
        try:
            dataset = dataset_of(config, folder)
        except DataError as error:
            problems.append(str(error))
            continue
        if dataset.fingerprint == provenance.get("data_sha256"):
            return dataset
        problems.append(f"{folder} is not the data set of this run")
    missing.append(f"The data set was not found ({problems[0]}): nothing by document, and no example text.")
    return None


def _artifact_facts(path: Path) -> ArtifactFacts:
    artifact = read_artifact(path)
    codes: dict[str, list[np.ndarray]] = defaultdict(list)
    bits: dict[str, int] = defaultdict(int)
    for matrix in artifact.quantized.matrices:
        kind = "embedding" if matrix.name == "tok_emb" else "MLP" if ".mlp." in matrix.name else "attention"
        codes[kind].append(matrix.codes.numpy().reshape(-1))
        bits[kind] += matrix.bits * matrix.codes.numel()
    classes = []
    for kind, parts in codes.items():
        values = np.concatenate(parts)
        counts = np.bincount(values.astype(np.int64) + 128, minlength=256)
        share = counts[counts > 0] / values.size
        classes.append(WeightClass(kind, values.size, bits[kind] / values.size, float(-(share * np.log2(share)).sum())))
    header = artifact.header
    return ArtifactFacts({"header": header.size} | {s.name: s.size for s in header.sections}, classes)
