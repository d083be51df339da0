"""Writes recorded results into the documentation, so that no figure there is typed by hand.

    python -m bench.render             # rewrites what stands between the markers
    python -m bench.render --check     # exit status 1 where that would change a page

`<!-- results:SUITE -->` ... `<!-- /results -->` encloses a suite's tables, one for each machine in bench/results;
`<!-- results:headline -->` the README's table, made of HEADLINE;
`<!-- run:NAME,OTHER -->` ... `<!-- /run -->` whole runs side by side (real_runs.py).
A page that shows losses.svg gets it drawn beside it (loss_curves.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench import loss_curves, real_runs
from bench.headline import HEADLINE
from bench.machine import given_to, text_of
from bench.storage import RESULTS, Record, read_results
from bench.table import DISTURBED, Row, commit_name, rate_text, share_text, shares, significant

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/*.md")
MARKED = re.compile(r"^(<!-- results:(\w+) -->\n).*?^(<!-- /results -->)", re.DOTALL | re.MULTILINE)
RECORDS_GRAPHS = "train_step/"  # a suite whose provider here records graphs before the call that is measured
NOT_RECORDED = "_not recorded_"
TIMED = ("graph", "calls", "")  # what a row says of how it was timed when there is nothing to tell

Results = dict[str, list[Record]]


def groups_of(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of one part and case, which the ratios compare; ours is the first."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.suite, row.case), []).append(row)
    return found


def is_peer(provider: str) -> bool:
    """Neither a setting of ours nor a floor, such as a kernel's matrix products alone."""
    return not provider.startswith("pgolf") and not provider.endswith(("alone", "only")) and provider != "memcpy"


def seconds(value: float) -> str:
    """In the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{significant(value / size)} {unit}"
    return f"{significant(value * 1e6)} µs"


def result(row: Row) -> str:
    """What else came out, and whether the row was disturbed."""
    disturbed = f"others took {row.others:.1f} cores" if row.others >= DISTURBED else ""
    return "; ".join(filter(None, ("" if row.how in TIMED else row.how, disturbed)))


def memory(row: Row) -> str:
    """Nothing for calls that replay graphs of their own, on records from before the graphs' pools were counted."""
    if row.peak_bytes is None or (row.graph_bytes is None and row.suite.startswith(RECORDS_GRAPHS)):
        return ""
    return f"{row.peak_bytes / 1e6:.0f} MB"


def outcome(row: Row) -> str:
    """Time, and in brackets what else came out, whose own brackets become a colon."""
    if row.seconds is None:
        return f"absent: {row.absent}"
    others = re.sub(r" \((.*?)\)", r": \1", result(row))
    return seconds(row.seconds) + (f" ({others})" if others else "")


def machine_line(record: Record) -> str:
    environment, ceilings = record.environment, record.ceilings
    torch = f"torch {environment['torch']}" + (f", CUDA {environment['cuda']}" if environment["cuda"] else "")
    load = environment.get("load_at_start")
    used = {name for row in record.rows for name in given_to(row.suite, row.case)}
    given = {name: value for name, value in environment.get("given", {}).items() if name in used}
    parts = [
        f"{environment['device']}, {environment['threads']} threads",
        torch,
        f"commit `{commit_name(record.commit)}`",
        f"copy {significant(ceilings['bytes_per_s'] / 1e9)} GB/s, matrix product "
        f"{significant(ceilings['flop_per_s'] / 1e12)} TFLOP/s",
        f"load average at the start {load}" if load is not None else "",
        ", ".join(f"{name} sha256 {value[:16]}" for name, value in given.items()),
        environment.get("note", ""),
        f"`{environment['command']}`",
    ]
    return "; ".join(filter(None, parts))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table without the columns that are empty in every row."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def record_lines(record: Record) -> list[str]:
    """One run's rows of one suite."""
    lines = [machine_line(record)]
    for (suite, case), rows in groups_of(record.rows).items():
        ours = rows[0].seconds
        cells = []
        for row in rows:
            if row.seconds is None:
                cells.append([row.provider, f"absent: {row.absent}", "", "", "", "", "", ""])
                continue
            cells.append(
                [
                    row.provider,
                    seconds(row.seconds),
                    f"{row.seconds / ours:.2f}" if ours else "",
                    rate_text(row, record.best),
                    share_text(max(shares(row, record.best))),
                    memory(row),
                    seconds(row.launch) if row.launch else "",
                    result(row),
                ]
            )
        header = ["", "time", "against ours", "rate", "of the ceiling", "memory beyond inputs", "host a call", "result"]
        part = suite.partition("/")[2].replace("_", " ")
        lines += [
            "",
            ", ".join(filter(None, (part, case, text_of(suite, record.environment)))),
            "",
            *table(header, cells),
        ]
    return lines


def render_suite(results: Results, suite: str) -> list[str]:
    if suite not in results:
        return [NOT_RECORDED]
    lines: list[str] = []
    for record in results[suite]:
        lines += ["", *record_lines(record)] if lines else record_lines(record)
    return lines


def render_headline(results: Results) -> list[str]:
    """For each entry and machine: its case or the first, our time, the peer's of that run; then what has no record."""
    cells, missing = [], []
    for part, label, wanted, wanted_case in HEADLINE:
        firsts: dict[str, tuple[Record, str, list[Row]]] = {}
        for record in results.get(part.split("/")[0], []):
            for (suite, case), rows in groups_of(record.rows).items():
                if suite == part and wanted_case in (None, case) and rows[0].seconds is not None:
                    firsts.setdefault(record.environment["device"], (record, case, rows))
        if not firsts:
            missing.append(label)
        for device, (record, case, rows) in firsts.items():
            ours = rows[0]
            peers = [row for row in rows[1:] if row.seconds and is_peer(row.provider)]
            named = [row for row in peers if wanted in (None, row.provider)]
            best = min(named, key=lambda row: row.seconds or 0.0, default=None)
            cells.append(
                [
                    label,
                    "; ".join(filter(None, (case, text_of(part, record.environment), device))),
                    outcome(ours),
                    share_text(max(shares(ours, record.best))),
                    f"{best.provider}: {outcome(best)}" if best else "",
                    f"{best.seconds / ours.seconds:.2f}" if best and best.seconds and ours.seconds else "",
                ]
            )
    lines = table(["", "case and machine", "here", "of the ceiling", "peer", "times faster"], cells)
    return [*lines, "", f"Without a record so far: {'; '.join(missing)}."] if missing else lines


def rendered(text: str, results: Results) -> str:
    """The page with what stands between its markers made anew."""

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        lines = render_headline(results) if name == "headline" else render_suite(results, name)
        return match[1] + "\n".join(["", *lines, "", ""]) + match[3]

    return MARKED.sub(fill, text)


def stale_picture(file: Path) -> dict[Path, str]:
    """The picture of losses for `file`, unless it is there as it should be."""
    curves = loss_curves.read_curves()
    if file.is_file() and loss_curves.is_current(file.read_text(), curves):
        return {}
    return {file: loss_curves.picture(curves)}


def main(arguments: list[str] | None = None, root: Path = ROOT, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description="Write recorded results into README.md and docs/.")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 where a page is out of date"
    )
    options = parser.parse_args(arguments)
    results, stale = read_results(folder), []
    for page in sorted(page for pattern in PAGES for page in root.glob(pattern)):
        before = page.read_text()
        after = real_runs.rendered(rendered(before, results))
        made = {page: after} if after != before else {}
        if f"({loss_curves.PICTURE})" in after:
            made |= stale_picture(page.with_name(loss_curves.PICTURE))
        for file, text in made.items():
            stale.append(file)
            if not options.check:
                file.write_text(text)
            print(f"{file.relative_to(root)}: {'out of date' if options.check else 'written'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
