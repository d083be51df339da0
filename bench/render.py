"""Writes recorded results into the documentation, so that no figure there is typed by hand.

    python -m bench.render             # rewrites what stands between the markers
    python -m bench.render --check     # exit status 1 where that would change a page

`<!-- results:SUITE -->` ... `<!-- /results -->` encloses a suite's tables, one for each machine in bench/results;
`<!-- results:headline -->` the README's table, made of HEADLINE.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench.record import RESULTS, read_results

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/*.md")
MARKED = re.compile(r"^(<!-- results:(\w+) -->\n).*?^(<!-- /results -->)", re.DOTALL | re.MULTILINE)
NOT_RECORDED = "_not recorded_"
HOW = ("graph", "calls", "stream", "")  # what a row says when it has nothing else to say

# Suite, its part, what the README calls it, and which peer stands beside it (None: the fastest).
HEADLINE = (
    ("softcap_ce", "forward_backward", "softcap cross-entropy, forward and backward", None),
    ("softcap_ce", "one_pass", "softcap cross-entropy, loss and gradient in one pass", None),
    ("softcap_ce", "head", "head and loss, forward and backward", None),
    ("fused_mlp", "forward_backward", "fused MLP, forward and backward", None),
    ("batched_lora", "forward_backward", "linear with an adapter a document, forward and backward", None),
    ("attention", "forward_backward", "attention over packed documents, forward and backward", None),
    ("residual", "forward_backward", "residual sum and norm, forward and backward", None),
    ("adapter_adamw", "step", "AdamW over adapters", None),
    ("gptq", "model", "GPTQ of a whole model", None),
    ("ngram", "stream", "n-gram hints", None),
    ("packing", "codes", "coding of quantised weights", "brotli"),
    ("train_step", "step", "training step", None),
    ("evaluate", "whole_set", "test-time training of a validation set", None),
)

Rows = list[dict[str, Any]]


def groups_of(rows: Rows) -> dict[tuple[str, str], Rows]:
    """Rows of one part and case, which the ratios compare; ours is the first."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        part = row["suite"].partition("/")[2]
        found.setdefault((part, row["case"]), []).append(row)
    return found


def is_peer(provider: str) -> bool:
    """Neither a setting of ours nor a floor, such as a kernel's matrix products alone."""
    return not provider.startswith("pgolf") and not provider.endswith("alone")


def digits(value: float) -> str:
    """Three significant digits, all of them before the point where the number is large."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def seconds(value: float) -> str:
    """In the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{digits(value / size)} {unit}"
    return f"{digits(value * 1e6)} µs"


def outcome(row: dict[str, Any]) -> str:
    """Time, and in brackets what else came out."""
    if row["seconds"] is None:
        return f"absent: {row['absent'] or 'failed'}"
    return seconds(row["seconds"]) + ("" if row["how"] in HOW else f" ({row['how']})")


def rate(row: dict[str, Any]) -> str:
    """In the unit of the ceiling: operations where there are any that count, else bytes."""
    if row["flop_per_s"] > 0:
        return f"{digits(row['flop_per_s'] / 1e12)} TFLOP/s"
    return f"{digits(row['bytes_per_s'] / 1e9)} GB/s" if row["bytes_per_s"] else ""


def machine_line(environment: dict[str, Any]) -> str:
    ceilings = environment["ceilings"]
    commit = environment["commit"] or "unknown"
    commit = commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
    torch = f"torch {environment['torch']}" + (f", CUDA {environment['cuda']}" if environment["cuda"] else "")
    return (
        f"{environment['device']}, {environment['threads']} threads, {torch}, commit "
        f"`{commit}`; copy {digits(ceilings['bytes_per_s'] / 1e9)} GB/s, "
        f"matrix product {digits(ceilings['flop_per_s'] / 1e12)} TFLOP/s; `{environment['command']}`"
    )


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table without the columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def suite_lines(record: dict[str, Any]) -> list[str]:
    """One machine's record of one suite."""
    lines = [machine_line(record["environment"])]
    for (part, case), rows in groups_of(record["rows"]).items():
        ours = rows[0]["seconds"]
        cells = []
        for row in rows:
            if row["seconds"] is None:
                cells.append([row["provider"], f"absent: {row['absent'] or 'failed'}", "", "", "", "", ""])
                continue
            cells.append(
                [
                    row["provider"],
                    seconds(row["seconds"]),
                    f"{row['seconds'] / ours:.2f}" if ours else "",
                    rate(row),
                    f"{row['of_floor']:.0%}" if row["of_floor"] else "",
                    f"{row['peak_bytes'] / 1e6:.0f} MB" if row["peak_bytes"] is not None else "",
                    "" if row["how"] in HOW else row["how"],
                ]
            )
        header = ["", "time", "against ours", "rate", "of the ceiling", "memory beyond inputs", "result"]
        lines += ["", ", ".join(filter(None, (part.replace("_", " "), case))), "", *table(header, cells)]
    return lines


def render_suite(results: dict[str, dict[str, dict[str, Any]]], suite: str) -> list[str]:
    machines = results.get(suite)
    if not machines:
        return [NOT_RECORDED]
    lines: list[str] = []
    for record in machines.values():
        lines += ["", *suite_lines(record)] if lines else suite_lines(record)
    return lines


def render_headline(results: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """For each entry and machine: the first case, our time, the fastest peer of that run."""
    cells = []
    for suite, part, label, wanted in HEADLINE:
        machines = results.get(suite, {})
        groups = [
            (record["environment"]["device"], case, rows)
            for record in machines.values()
            for (found, case), rows in list(groups_of(record["rows"]).items())
            if found == part
        ]
        firsts = {device: (case, rows) for device, case, rows in reversed(groups)}
        if not firsts:
            cells.append([label, "", NOT_RECORDED, "", "", ""])
        for device, (case, rows) in firsts.items():
            ours = rows[0]
            peers = [row for row in rows[1:] if row["seconds"] and is_peer(row["provider"])]
            named = [row for row in peers if wanted in (None, row["provider"])]
            best = min(named, key=lambda row: row["seconds"], default=None)
            cells.append(
                [
                    label,
                    f"{case}; {device}",
                    outcome(ours),
                    f"{ours['of_floor']:.0%}" if ours["of_floor"] else "",
                    f"{best['provider']}: {outcome(best)}" if best else "",
                    f"{best['seconds'] / ours['seconds']:.2f}" if best and ours["seconds"] else "",
                ]
            )
    return table(["", "case and machine", "here", "of the ceiling", "peer", "times faster"], cells)


def rendered(text: str, results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The page with what stands between its markers made anew."""

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        lines = render_headline(results) if name == "headline" else render_suite(results, name)
        return match[1] + "\n".join(["", *lines, "", ""]) + match[3]

    return MARKED.sub(fill, text)


def main(arguments: list[str] | None = None, root: Path = ROOT, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description="Write recorded results into README.md and docs/.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 where a page is out of date"
    )
    options = parser.parse_args(arguments)
    results, stale = read_results(folder), []
    for page in sorted(page for pattern in PAGES for page in root.glob(pattern)):
        before = page.read_text()
        after = rendered(before, results)
        if after == before:
            continue
        stale.append(page)
        if not options.check:
            page.write_text(after)
        print(f"{page.relative_to(root)}: {'out of date' if options.check else 'written'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
