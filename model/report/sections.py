"""The parts of the page that tell of one run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from model.errors import ConfigError, PgolfError
from model.presets import get_preset
from model.report import plots
from model.report.example import example_text
from model.report.html import Markup, details, figure, join, pictures, table, tag, tiles
from model.report.load import Run
from model.rules import SECONDS_BUDGET, SIZE_BUDGET
from model.size import code_size

MODES = {
    "float": "the averaged weights, before quantisation",
    "plain": "the artifact, windows that do not overlap",
    "sliding": "overlapping windows: each token is scored with more text before it",
    "sgd_ttt": "chunk by chunk: score it, then train all weights on it",
    "lora_ttt": "adapters for each document, trained on each chunk once it is scored",
    "phased": "lora_ttt, and between groups of documents training of all weights on what was scored",
    "sliding_cache": "sliding, with shared adapters and an n-gram cache",
}


def describe_run(run: Run, level: str = "h2") -> Iterator[Markup]:
    """Everything about `run`, under headings of this level."""
    yield tag("p", _subtitle(run), class_="soft")
    facts = list(_headline(run))
    if facts:
        yield tiles(facts)
    if run.missing:
        yield tag("p", " ".join(dict.fromkeys(run.missing)), class_="soft")
    for title, part in (
        ("Budgets and time", _budgets),
        ("Training", _training),
        ("Score", _score),
        ("An example text, token by token", example_text),
        ("Artifact", _artifact),
        ("Legality", _legality),
        ("Where it comes from", _origin),
    ):
        content = list(part(run))
        if content:
            yield tag(level, title)
            yield from content


def _subtitle(run: Run) -> str:
    when = run.provenance.get("started", "unknown time")
    return f"preset {run.config.preset}, seed {run.seed}, {when}, {_machine(run)}"


def _machine(run: Run) -> str:
    origin = run.provenance
    ranks = origin.get("world_size", 1)
    where = ", ".join(sorted(set(origin.get("gpus", [])))) or origin.get("cpu") or "unknown hardware"
    return f"{ranks} x {where}" if ranks > 1 else where


def _headline(run: Run) -> Iterator[tuple[str, str]]:
    mode = run.final_mode
    if mode is not None:
        mark = tag("span", ", not a legal score", class_="bad") if run.objections(mode) else ""
        yield join([f"bits per byte, {mode}", mark]), f"{run.bpb[mode]:.4f}"
    if mode in run.nats:
        yield f"nats per token, {mode}", f"{run.nats[mode]:.4f}"
    if run.artifact is not None:
        share = f"{run.artifact.size / SIZE_BUDGET:.1%} of {SIZE_BUDGET / 1e6:g} MB"
        yield f"bytes of artifact ({share})", f"{run.artifact.size:,}"
    train = run.result.get("train", {})
    if "steps" in train:
        yield f"steps, {train.get('tokens', 0):,} tokens", f"{train['steps']:,}"
    if run.steps:
        recent = sorted(r["tokens_per_second"] for r in run.steps[len(run.steps) // 2 :] if r.get("tokens_per_second"))
        if recent:
            yield "tokens per second, second half", f"{recent[len(recent) // 2]:,.0f}"
        mfu = sorted(r["mfu"] for r in run.steps[len(run.steps) // 2 :] if r.get("mfu"))
        if mfu:
            yield "of the GPU's bf16 peak (MFU), second half", f"{mfu[len(mfu) // 2]:.1%}"
    seconds = run.result.get("seconds", {}).get("train")
    if seconds is not None:
        yield "seconds of training", f"{seconds:,.0f}"


_MEDIAN = "A running median over a fiftieth of the run, three steps at least."


def _training(run: Run) -> Iterator[Markup]:
    if not run.steps:
        return
    first, last = run.steps[0], run.steps[-1]
    one = ([run], [run.name], [plots.looks_of([run.name])[run.name]])
    yield pictures(
        figure(
            plots.training_loss(*one),
            f"Training loss by step, from {first['loss']:.3f} to {last['loss']:.3f}",
            "Pale: each step. Strong: a running mean over a fiftieth of the run, three steps at least.",
        ),
        *([figure(plots.validation(*one), "Validation bits per byte during training")] if run.is_validated else []),
        figure(plots.gradient_norm(*one), "Gradient norm before clipping, by step", _MEDIAN),
        figure(plots.learning_rates(run), "Learning rates by step"),
        figure(plots.momentum(run), "Muon's momentum by step"),
        figure(plots.tokens_per_second(run), "Tokens per second by step", _MEDIAN),
        figure(plots.utilisation(run), "Use of the hardware, or time of a step, by step", _MEDIAN),
    )


def _score(run: Run) -> Iterator[Markup]:
    if not run.bpb:
        return
    yield tag(
        "p",
        "Bits per byte: what the model needs on average to code a byte of text that it was not trained on. "
        "Nats per token: the same loss per token of this vocabulary, in natural logarithms.",
    )
    baselines = {k: v for k, v in run.result.get("baselines", {}).items() if isinstance(v, float)}
    shown = [
        figure(
            plots.bpb_by_mode(run.bpb, baselines),
            "Bits per byte by evaluation mode: " + ", ".join(f"{mode} {value:.4f}" for mode, value in run.bpb.items()),
            "Grey: general compressors on the same text, having read the training text." if baselines else "",
        )
    ]
    if run.by_token is not None:
        documents = {mode: run.by_token.per_document(mode) for mode in run.by_token.nll}
        count = f"{len(run.by_token.documents):,} validation documents in groups of about equal number."
        shown.append(figure(plots.bpb_by_length(documents), "Bits per byte by document length and mode", count))
        if "plain" in documents and len(documents) > 1:
            difference = plots.bpb_by_length(documents, "plain")
            words = "The same documents: what each mode gains (below zero) or loses against the plain score."
            shown.append(figure(difference, "Bits per byte minus the plain score, by document length and mode", words))
    yield pictures(*shown)
    plain = run.bpb.get("plain")
    rows = []
    for mode, bpb in run.bpb.items():
        facts = run.result.get("evaluation", {}).get(mode, {})
        against = "" if plain is None or mode == "plain" else f"{bpb - plain:+.5f}"
        rows.append(
            [mode, f"{bpb:.5f}", against, _number(facts.get("val_loss"), ".5f"), _number(facts.get("tokens"), ","),
             _number(facts.get("bytes"), ","), _number(facts.get("seconds"), ",.1f"), _describe_mode(mode)]
        )  # fmt: skip
    columns = ["mode", "bits per byte", "minus plain", "nats per token", "tokens", "bytes", "seconds", "what it is"]
    yield table(columns, rows, numbers=range(1, 7))
    gain = run.result.get("ttt_gain")
    if gain is not None:
        yield tag(
            "p",
            f"Test-time training gains {gain['bpb']:.4f} ± {gain['standard_error']:.4f} bits per byte over the same "
            f"windows with learning rate 0 (mean and standard error, paired over {gain['documents']:,} documents).",
        )


def _describe_mode(mode: str) -> str:
    """What a mode does; endings say what was changed."""
    base = next((name for name in sorted(MODES, key=len, reverse=True) if mode.startswith(name)), None)
    if base is None:
        return ""
    ending = mode.removeprefix(base)
    tail = {"": "", "_lr0": "; learning rate 0, so that nothing is learnt", "_ngram_tilt": "; n-gram hints"}.get(
        ending, f"; {ending.strip('_')}"
    )
    return MODES[base] + tail


def _artifact(run: Run) -> Iterator[Markup]:
    facts = run.artifact
    if facts is None:
        return
    shares = {f"{name} codes": size for name, size in facts.code_bytes.items()}
    parts = shares | {"row scales": facts.parts["scales"], "other tensors": facts.parts["tensors"]}
    parts["header"] = facts.parts["header"]
    room = SIZE_BUDGET - facts.size
    verdict = (
        f"{room:,} of the {SIZE_BUDGET:,} are left for code" if room >= 0 else f"{-room:,} over the {SIZE_BUDGET:,}"
    )
    weights = sum(c.weights for c in facts.classes)
    entropy = sum(c.weights * c.entropy for c in facts.classes)
    stored = 8 * facts.parts["codes"]
    yield pictures(
        figure(
            plots.artifact_bytes(parts),
            "Bytes of the artifact: " + ", ".join(f"{name} {size:,.0f}" for name, size in parts.items()),
            f"{facts.size:,} bytes in all, {verdict}. The codes share one stream, divided here by their entropy.",
        ),
        figure(
            plots.bits_per_weight(
                [c.name for c in facts.classes], [c.bits for c in facts.classes], [c.entropy for c in facts.classes]
            ),
            "Bits per weight and order-0 entropy: " + ", ".join(f"{c.name} {c.entropy:.3f}" for c in facts.classes),
            f"Stored codes: {stored / weights:.4f} bits a weight over {weights:,} quantised weights, "
            f"{100 * (stored / entropy - 1):+.2f} % against the order-0 entropy of the classes "
            f"({entropy / weights:.4f}).",
        ),
    )


def _budgets(run: Run) -> Iterator[Markup]:
    seconds = {
        n.replace("_", " ", 1): v for n, v in run.result.get("seconds", {}).items() if isinstance(v, int | float)
    }
    total = seconds.pop("total", None)
    calibration = seconds.pop("calibrate", seconds.get("quantize", 0.0))  # a part of "quantize"
    used = {}
    if "train" in seconds:
        training = seconds["train"] + calibration
        used["training"] = (training / SECONDS_BUDGET, f"{training:,.1f} of {SECONDS_BUDGET:g} s")
    evaluation = run.result.get("evaluation", {}).get(run.final_mode, {}).get("seconds")
    if evaluation is not None:
        used["evaluation"] = (evaluation / SECONDS_BUDGET, f"{evaluation:,.1f} of {SECONDS_BUDGET:g} s")
    counted = ""
    if run.artifact is not None:
        size, name = run.artifact.size, "artifact and code"
        try:
            size += code_size(run.config)
            counted = "counted is the script that pgolf pack writes"
        except PgolfError as error:  # an installation without the sources of the n-gram hints
            name, counted = "artifact", f"not counted here ({error})"
        used[name] = (size / SIZE_BUDGET, f"{size / 1e6:.2f} of {SIZE_BUDGET / 1e6:g} MB")
    shown = []
    if used:
        words = "; ".join(f"{name} {text}" for name, (_, text) in used.items())
        caption = (
            "Training counts the calibration of the quantiser, which reads training data; evaluation is that of "
            f"{run.final_mode or 'no mode'}. The benchmark's {SECONDS_BUDGET:g} s are meant for 8 H100 GPUs, and its "
            f"{SIZE_BUDGET:,} bytes include the code{': ' * bool(counted)}{counted}."
        )
        shown.append(figure(plots.budgets(used), f"Budgets: {words}", caption))
    if seconds:
        stages = "Seconds by stage: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        in_all = f"In all: {total:,.1f} s." if total is not None else ""
        shown.append(figure(plots.stage_times(seconds), stages, in_all))
    if shown:
        yield pictures(*shown)


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
    if rows and not run.verified:
        yield tag("p", "The scorer itself was not verified; pgolf verify does it.", class_="soft")
    for name, report in run.verified.items():
        verdict = tag("span", report.verdict, class_="good" if report.legal else "bad")
        yield tag("p", join([f"Verified independently ({name}): ", verdict, "."]))
        lines = [[check.name, _status(check.status), check.figure] for check in report.checks]
        yield table(["check", "outcome", "measured"], lines)


def _status(status: str) -> Markup:
    kind = {"pass": "good", "fail": "bad"}.get(status, "soft")
    return tag("span", status, class_=kind)


def _origin(run: Run) -> Iterator[Markup]:
    origin = run.provenance
    versions = {"Python": origin.get("python"), **origin.get("packages", {})}
    facts = {
        "command": tag("code", " ".join(origin["command"])) if "command" in origin else None,
        "commit": tag("code", origin.get("commit") or "not a checkout") if origin else None,
        "sources": _hash("source.zip, SHA-256", origin.get("source_sha256")),
        "data": _hash("fingerprint", origin.get("data_sha256")),
        "machine": f"{_machine(run)}, CPU threads: {origin['threads']}" if "threads" in origin else None,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "folder": tag("code", run.path),
    }
    rows = [[name, value] for name, value in facts.items() if value]
    for later in origin.get("later", []):
        sources = "" if later["source_sha256"] == origin["source_sha256"] else ", with other sources"
        rows.append(["later", join([tag("code", " ".join(later["command"])), f" at {later['started']}{sources}"])])
    yield table(["", ""], rows)
    changed = _changed(run)
    values = [(section, name, value) for section, name, value in run.config.items()]
    marked = [i for i, (_, name, _) in enumerate(values) if name in changed]
    content = table(["section", "setting", "value"], [[s, n, tag("code", v)] for s, n, v in values], marked=marked)
    yield details(f"Configuration ({len(marked)} settings differ from the preset)", content)


def _hash(what: str, digest: str | None) -> Markup | None:
    return join([what, " ", tag("code", digest)]) if digest else None


def _changed(run: Run) -> set[str]:
    """Settings that are not the preset's; none where there is no such preset any more."""
    try:
        preset = {name: value for _, name, value in get_preset(run.config.preset).items()}
    except ConfigError:
        return set()
    return {name for _, name, value in run.config.items() if preset.get(name) != value}


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
