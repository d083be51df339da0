"""The parts of the page that tell of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from model.errors import ConfigError
from model.presets import get_preset
from model.report import plots
from model.report.example import example_text
from model.report.html import Markup, details, figure, join, table, tag, tiles
from model.report.load import Run

SIZE_LIMIT = 16_000_000  # bytes, code included
STAGE_BUDGET = 600.0  # seconds for training, and again for evaluation


def describe_run(run: Run, level: str = "h2") -> Iterator[Markup]:
    """Everything about `run`, under headings of this level."""
    yield tag("p", _subtitle(run), class_="soft")
    yield tiles(_headline(run))
    for title, part in (
        ("Training", _training),
        ("Score", _score),
        ("An example text, token by token", example_text),
        ("Artifact", _artifact),
        ("Time", _time),
        ("Legality", _legality),
        ("Where it comes from", _origin),
    ):
        content = list(part(run))
        if content:
            yield tag(level, title)
            yield from content
    if run.missing:
        yield tag("p", " ".join(dict.fromkeys(run.missing)), class_="soft")


def _subtitle(run: Run) -> str:
    where = ", ".join(sorted(set(run.provenance.get("gpus", [])))) or run.provenance.get("cpu") or "unknown hardware"
    ranks = run.provenance.get("world_size", 1)
    hardware = f"{ranks} x {where}" if ranks > 1 else where
    return f"preset {run.config.preset}, seed {run.seed}, {run.provenance.get('started', 'unknown time')}, {hardware}"


def _headline(run: Run) -> Iterator[tuple[str, str]]:
    mode = run.final_mode
    if mode is not None:
        yield f"bits per byte, {mode}", f"{run.bpb[mode]:.4f}"
    if mode in run.nats:
        yield f"nats per token, {mode}", f"{run.nats[mode]:.4f}"
    if run.artifact is not None:
        yield f"bytes of artifact ({run.artifact.size / SIZE_LIMIT:.1%} of 16 MB)", f"{run.artifact.size:,}"
    train = run.result.get("train", {})
    if "steps" in train:
        yield f"steps, {train.get('tokens', 0):,} tokens", f"{train['steps']:,}"
    if run.steps:
        recent = sorted(r["tokens_per_second"] for r in run.steps[len(run.steps) // 2 :] if r.get("tokens_per_second"))
        if recent:
            yield "tokens per second, second half", f"{recent[len(recent) // 2]:,.0f}"
    seconds = run.result.get("seconds", {}).get("train")
    if seconds is not None:
        yield "seconds of training", f"{seconds:,.0f}"


def _training(run: Run) -> Iterator[Markup]:
    if not run.steps:
        return
    first, last = run.steps[0], run.steps[-1]
    yield figure(
        plots.loss_curves([run], [run.name], plots.COLOURS[:1]),
        f"Training loss by step, from {first['loss']:.3f} to {last['loss']:.3f}",
        "Bold: a running mean over a fiftieth of the run.",
    )
    yield figure(plots.learning_rates(run), "Learning rates and Muon's momentum by step")
    yield figure(plots.speed(run), "Tokens per second and use of the hardware by step")


def _score(run: Run) -> Iterator[Markup]:
    if not run.bpb:
        return
    baselines = {k: v for k, v in run.result.get("baselines", {}).items() if isinstance(v, float)}
    yield figure(
        plots.bpb_by_mode(run.bpb, baselines),
        "Bits per byte by evaluation mode: " + ", ".join(f"{mode} {value:.4f}" for mode, value in run.bpb.items()),
        "float: the weights before quantisation. Everything below it is scored from the artifact."
        + (" Grey: general compressors on the same text, having read the training text." if baselines else ""),
    )
    rows = []
    for mode, bpb in run.bpb.items():
        facts = run.result.get("evaluation", {}).get(mode, {})
        rows.append(
            [mode, f"{bpb:.5f}", _number(facts.get("val_loss"), ".5f"), _number(facts.get("tokens"), ","),
             _number(facts.get("bytes"), ","), _number(facts.get("seconds"), ",.1f")]
        )  # fmt: skip
    yield table(["mode", "bits per byte", "nats per token", "tokens", "bytes", "seconds"], rows, numbers=range(1, 6))
    if run.by_token is not None:
        count = len(run.by_token.documents)
        yield figure(
            plots.bpb_by_length({mode: run.by_token.per_document(mode) for mode in run.by_token.nll}),
            "Bits per byte by document length and evaluation mode",
            f"The {count:,} validation documents in groups of about equal number, from the shortest to the longest.",
        )


def _artifact(run: Run) -> Iterator[Markup]:
    facts = run.artifact
    if facts is None:
        return
    shares = {f"{name} codes": size for name, size in facts.code_bytes.items()}
    parts = shares | {"row scales": facts.parts["scales"], "other tensors": facts.parts["tensors"]}
    parts["header"] = facts.parts["header"]
    room = SIZE_LIMIT - facts.size
    verdict = f"{room:,} bytes of the 16,000,000 are left for code" if room >= 0 else f"{-room:,} bytes too many"
    yield figure(
        plots.artifact_bytes(parts, SIZE_LIMIT),
        "Bytes of the artifact: " + ", ".join(f"{name} {size:,.0f}" for name, size in parts.items()),
        f"{facts.size:,} bytes in all: {verdict}. The codes share one stream, divided here by their entropy.",
    )
    weights = sum(c.weights for c in facts.classes)
    entropy = sum(c.weights * c.entropy for c in facts.classes)
    stored = 8 * facts.parts["codes"]
    yield figure(
        plots.bits_per_weight(
            [c.name for c in facts.classes], [c.bits for c in facts.classes], [c.entropy for c in facts.classes]
        ),
        "Bits per weight and order-0 entropy: " + ", ".join(f"{c.name} {c.entropy:.3f}" for c in facts.classes),
        f"Stored codes: {stored / weights:.4f} bits a weight over {weights:,} quantised weights, "
        f"{100 * (stored / entropy - 1):+.2f} % against the order-0 entropy of the classes ({entropy / weights:.4f}).",
    )


def _time(run: Run) -> Iterator[Markup]:
    seconds = {n.replace("_", " "): v for n, v in run.result.get("seconds", {}).items() if isinstance(v, int | float)}
    total = seconds.pop("total", None)
    if seconds:
        yield figure(
            plots.stage_times(seconds, STAGE_BUDGET),
            "Seconds by stage: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
            "The benchmark allows 600 s for training, which counts whatever reads training data, and 600 s for "
            "evaluation, each on 8 H100 GPUs." + (f" In all: {total:,.1f} s." if total is not None else ""),
        )


def _legality(run: Run) -> Iterator[Markup]:
    rows = []
    for mode, ledger in run.ledgers.items():
        targets = ledger.num_tokens - 1
        scored = int(np.isfinite(ledger.nll[1:]).sum())
        word = "not a legal score" if not ledger.legal else "unfinished" if scored < targets else "legal"
        verdict = tag("span", word, class_="good" if word == "legal" else "bad")
        rows.append([mode, verdict, f"{scored:,} of {targets:,}", f"{ledger.num_states - 1:,}",
                     "; ".join(ledger.defects) or "none"])  # fmt: skip
    if rows:
        yield tag(
            "p", "From each evaluation's ledger: is every token scored, once, and before anything learned from it?"
        )
        yield table(["mode", "verdict", "tokens scored", "updates", "rules it may break"], rows, numbers=(2, 3))
    for name, report in run.verified.items():
        verdict = tag("span", "legal" if report["legal"] else "not legal", class_="good" if report["legal"] else "bad")
        yield tag("p", join([f"Verified independently ({name}): ", verdict, "."]))
        lines = [[c["name"], _status(c["status"]), c["figure"]] for c in report["checks"]]
        yield table(["check", "outcome", "measured"], lines)


def _status(status: str) -> Markup:
    kind = {"pass": "good", "fail": "bad"}.get(status, "soft")
    return tag("span", status, class_=kind)


def _origin(run: Run) -> Iterator[Markup]:
    origin = run.provenance
    packages = origin.get("packages", {})
    rows = [
        ["command", tag("code", " ".join(origin.get("command", [])))],
        ["commit", tag("code", origin.get("commit") or "not a checkout")],
        ["sources", tag("code", origin.get("source_sha256", "unknown"))],
        ["data", tag("code", origin.get("data_sha256", "unknown"))],
        ["machine", _subtitle(run).split(", ", 3)[-1]],
        ["versions", ", ".join(f"{n} {v}" for n, v in {"Python": origin.get("python"), **packages}.items() if v)],
        ["folder", tag("code", run.path)],
    ]
    yield table(["", ""], rows)
    changed = _changed(run)
    values = [(section, name, value) for section, name, value in run.config.items()]
    marked = [i for i, (_, name, _) in enumerate(values) if name in changed]
    content = table(["section", "setting", "value"], [[s, n, tag("code", v)] for s, n, v in values], marked=marked)
    yield details(f"Configuration ({len(marked)} settings differ from the preset)", content)


def _changed(run: Run) -> set[str]:
    """Settings that are not the preset's; none where there is no such preset any more."""
    try:
        preset = {name: value for _, name, value in get_preset(run.config.preset).items()}
    except ConfigError:
        return set()
    return {name for _, name, value in run.config.items() if preset.get(name) != value}


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
