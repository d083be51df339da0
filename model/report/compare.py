"""Several runs side by side: groups of seeds, their means, and whether they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from model.report import plots
from model.report.html import Markup, details, figure, join, pictures, table, tag
from model.report.load import Run
from model.report.stats import RECORD_NATS, RECORD_P, summarize, welch


def compare_runs(runs: list[Run]) -> Iterator[Markup]:
    """The comparison, without the runs' own sections. The first run's group is what the others are compared with."""
    groups = _group(runs)
    different = _differences(groups)
    words = f"{len(runs)} runs in {len(groups)} group{'s' if len(groups) > 1 else ''}. "
    words += "Runs that differ by their seed alone form a group. "
    if len(groups) > 1:
        words += f"The other groups are compared with {next(iter(groups))}, that of the first run named."
    yield tag("p", words)
    yield table(*_group_table(groups), numbers=(1,))
    if different:
        yield tag("h2", "What differs between the groups")
        yield table(["setting", *groups], different)
    labels = [name for name, members in groups.items() for _ in members]
    ordered = [run for members in groups.values() for run in members]
    looks = plots.looks_of(list(groups))
    modes = _modes(groups)
    final = [mode for mode in modes if mode == next((run.final_mode for run in runs if run.final_mode), None)]
    for mode in final:
        yield tag("h2", f"Score: {mode}")
        yield from _compare_mode(groups, mode, looks)
    for mode in modes:
        if mode not in final:
            yield details(f"Score: {mode}", join(_compare_mode(groups, mode, looks)))
    if any(run.steps for run in runs):
        shown = (ordered, labels, [looks[label] for label in labels])
        yield tag("h2", "Training")
        validated = any(run.is_validated for run in runs)
        right = (plots.validation, "Validation") if validated else (plots.gradient_norm, "Gradient norm")
        yield pictures(
            figure(plots.training_loss(*shown), "Training loss by step, one look for each group"),
            figure(right[0](*shown), f"{right[1]} by step, one look for each group"),
        )
    yield tag("h2", "Every run")
    yield _run_table(groups)


def _group(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs of one configuration, data and source code by name: the preset, with a letter where there are several."""
    by_signature: dict[Any, list[Run]] = {}
    for run in runs:
        origin = (run.provenance.get("data_sha256"), run.provenance.get("source_sha256"))
        key = (run.config.preset, run.signature, origin)
        by_signature.setdefault(key, []).append(run)
    presets = [key[0] for key in by_signature]
    named = {}
    for number, (key, members) in enumerate(by_signature.items()):
        name = key[0] if presets.count(key[0]) == 1 else f"{key[0]} {chr(ord('A') + presets[:number].count(key[0]))}"
        named[name] = members
    return named


def _group_table(groups: dict[str, list[Run]]) -> tuple[list[str], list[list[Any]]]:
    rows = [
        [name, len(members), ", ".join(str(run.seed) for run in members), ", ".join(run.name for run in members)]
        for name, members in groups.items()
    ]
    return ["group", "runs", "seeds", "folders"], rows


def _differences(groups: dict[str, list[Run]]) -> list[list[Any]]:
    settings = [dict(members[0].signature) for members in groups.values()]
    rows = [
        [name, *(tag("code", values[name]) for values in settings)]
        for name in settings[0]
        if len({repr(values.get(name)) for values in settings}) > 1
    ]
    for label, name in (("data set (hash)", "data_sha256"), ("source code (hash)", "source_sha256")):
        digests = [members[0].provenance.get(name) or "unknown" for members in groups.values()]
        if len(set(digests)) > 1:
            rows.append([label, *(tag("code", digest[:12]) for digest in digests)])
    return rows


def _modes(groups: dict[str, list[Run]]) -> list[str]:
    """Evaluation modes that at least two runs have, in the order of the evaluations."""
    modes = dict.fromkeys(mode for members in groups.values() for run in members for mode in run.bpb)
    return [m for m in modes if sum(m in run.bpb for members in groups.values() for run in members) > 1]


def _compare_mode(groups: dict[str, list[Run]], mode: str, looks: dict[str, plots.Look]) -> Iterator[Markup]:
    bpb = {name: [run.bpb[mode] for run in members if mode in run.bpb] for name, members in groups.items()}
    nats = {name: [run.nats[mode] for run in members if mode in run.nats] for name, members in groups.items()}
    bpb = {name: values for name, values in bpb.items() if values}
    objections = {name: _objections(groups[name], mode) for name in bpb}
    yield pictures(
        figure(
            plots.strip(bpb, "bits per byte (less is better)", looks),
            f"Bits per byte in mode {mode}: " + ", ".join(f"{n} {summarize(v).mean:.4f}" for n, v in bpb.items()),
            "Each dot a run, the bar the group's mean.",
        )
    )
    first = next(iter(bpb))
    columns = ["group", "legality", "runs", "bits per byte", "nats per token"]
    columns += [f"bpb minus {first}", f"nats minus {first}"]
    rows: list[list[Any]] = []
    for name, values in bpb.items():
        legality = _legality(len(objections[name]), len(values))
        others = [] if name == first else [(values, bpb[first]), (nats[name], nats[first])]
        differences = [_difference(*pair) for pair in others] or ["", ""]
        rows.append([name, legality, len(values), _mean(values), _mean(nats[name]), *differences])
    yield tag("p", "Mean ± sample standard deviation over the seeds; differences are of means.", class_="soft")
    yield table(columns, rows, numbers=range(2, len(columns)))
    yield from _tests(bpb, nats, first, objections)


def _objections(members: list[Run], mode: str) -> list[str]:
    """A sentence part for each run whose score of this mode is not a legal one."""
    found = {run.name: run.objections(mode) for run in members if mode in run.bpb}
    return [f"{name}: {'; '.join(reasons)}" for name, reasons in found.items() if reasons]


def _legality(illegal: int, runs: int) -> Markup:
    word = f"{illegal} of {runs} not legal" if illegal else "nothing against it"
    return tag("span", word, class_="bad" if illegal else "soft")


def _tests(
    bpb: dict[str, list[float]], nats: dict[str, list[float]], first: str, objections: dict[str, list[str]]
) -> Iterator[Markup]:
    """Welch's test of each group against the first, and whether it would be a record over it: said of legal scores."""
    rows, verdicts = [], []
    for name in bpb:
        test = welch(bpb[name], bpb[first]) if name != first else None
        if test is None:
            continue
        against = objections[first] + objections[name]
        comparable = nats[name] and nats[first] and not against
        record = welch(nats[name], nats[first], -RECORD_NATS, one_sided=True) if comparable else None
        rows.append([name, f"{test.t:.2f}", f"{test.df:.1f}", _p(test.p), _p(record.p) if record else ""])
        if record is not None:
            better = record.p < RECORD_P
            word = tag("span", "is" if better else "is not shown to be", class_="good" if better else "bad")
            line = f" better than {first} by at least {RECORD_NATS} nats per token (p < {RECORD_P})."
            verdicts.append(tag("p", join([name, " ", word, line])))
        elif against:
            why = f"not every score is legal ({', '.join(against)})"
            words = f"Whether {name} is a record over {first} is not said: {why}."
            verdicts.append(tag("p", words))
    if rows:
        columns = [
            f"Welch's test against {first}",
            "t",
            "degrees of freedom",
            "p: no difference (two-sided)",
            f"p: gain under {RECORD_NATS} nats (one-sided)",
        ]
        yield table(columns, rows, numbers=range(1, len(columns)))
        yield tag(
            "p",
            f"A record must be better by at least {RECORD_NATS} nats per token with p < {RECORD_P}. t and the first p "
            "are of the bits per byte. Welch's test gives each group a variance of its own.",
            class_="soft",
        )
        yield from verdicts
    elif len(bpb) > 1:
        yield tag("p", "Whether the groups differ cannot be tested: that needs two runs in each, and some variance.")


def _run_table(groups: dict[str, list[Run]]) -> Markup:
    modes = list(dict.fromkeys(mode for members in groups.values() for run in members for mode in run.bpb))
    rows = []
    for name, members in groups.items():
        for run in members:
            train = run.result.get("train", {})
            seconds = run.result.get("seconds", {}).get("train")
            illegal = [f"{mode} ({'; '.join(run.objections(mode))})" for mode in run.bpb if run.objections(mode)]
            words = f"not legal: {', '.join(illegal)}" if illegal else "nothing against it"
            row: list[Any] = [
                run.name,
                name.replace(" ", "\u00a0"),
                tag("span", words, class_="bad" if illegal else "soft"),
            ]
            row += [run.seed, f"{train['steps']:,}" if "steps" in train else ""]
            row.append("" if seconds is None else f"{seconds:,.1f}")
            row += [f"{run.bpb[mode]:.5f}" if mode in run.bpb else "" for mode in modes]
            rows.append([*row, f"{run.artifact.size:,}" if run.artifact else ""])
    columns = ["run", "group", "legality", "seed", "steps", "train s", *(f"bpb {mode}" for mode in modes)]
    return table([*columns, "artifact bytes"], rows, numbers=range(3, len(columns) + 1))


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    summary = summarize(values)
    return f"{summary.mean:.5f}" + ("" if math.isnan(summary.sd) else f" ± {summary.sd:.5f}")


def _difference(values: list[float], base: list[float]) -> str:
    return f"{summarize(values).mean - summarize(base).mean:+.5f}" if values and base else ""


def _p(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.1e}"
