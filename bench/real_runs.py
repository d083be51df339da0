"""Records of whole runs, which bench.render puts into the documentation.

    python -m bench.real_runs RUN NAME --note TEXT    # keeps what RUN's folder says as bench/runs/NAME.json; no paths
    python -m bench.real_runs RUN NAME --like OTHER   # with the losses of the steps of which OTHER has them

`<!-- run:NAME,OTHER -->` ... `<!-- /run -->` in a page encloses a table with a column for each record, and
one with means and standard deviations where they differ by their seeds alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.presets import get_preset
from model.report.stats import summarize
from model.run import RunDir

RECORDS = Path(__file__).parent / "runs"
MARKED = re.compile(r"^(<!-- run:([\w,-]+) -->\n).*?^(<!-- /run -->)", re.DOTALL | re.MULTILINE)
PLACES = frozenset({"data_dir", "run_dir", "run_id"})  # settings that say where, not what
SHOWN_STEPS = 12

Record = dict[str, Any]


def record_of(run: RunDir, shown: Collection[int] | None = None) -> Record:
    """What a run's folder says, without what belongs to the machine's file system; `shown`: the steps of its losses."""
    config, result = run.config(), run.result()
    origin = json.loads((run.path / "provenance.json").read_text(encoding="utf-8"))
    preset = {name: value for _, name, value in get_preset(config.preset).items()}
    steps = [record for record in run.metrics() if "loss" in record]
    seconds = {name: round(value, 2) for name, value in result.get("seconds", {}).items()}
    return {
        "preset": config.preset,
        "changed": {n: v for _, n, v in config.items() if v != preset[n] and n not in PLACES},
        "machine": _machine(origin),
        "command": _command(origin["command"], config.data.data_dir),
        "versions": {"python": origin["python"], "torch": origin["packages"]["torch"], "cuda": origin["cuda"]},
        "commit": origin["commit"],
        "data_sha256": origin["data_sha256"],
        "loss": {str(r["step"]): round(r["loss"], 4) for r in _shown(steps, shown)},
        "step_ms": _by_loop(steps, "step_ms"),
        "tokens_per_second": _by_loop(steps, "tokens_per_second"),
        "mfu": _by_loop(steps, "mfu"),
        "tokens": result.get("train", {}).get("tokens"),
        "data_wait": result.get("train", {}).get("data_wait"),
        "peak_gpu_bytes": result.get("train", {}).get("peak_gpu_bytes"),
        "bpb": {mode: round(value, 5) for mode, value in result.get("bpb", {}).items()},
        "nats": {mode: round(facts["val_loss"], 5) for mode, facts in result.get("evaluation", {}).items()},
        "artifact": result.get("artifact"),
        "baselines": {name: round(value, 4) for name, value in result.get("baselines", {}).items()},
        "ttt_gain": result.get("ttt_gain"),
        "seconds": seconds,
    }


def _machine(origin: dict[str, Any]) -> str:
    """What the run's processes computed on, each on a GPU of its own where there are any."""
    ranks = origin["world_size"]
    one = origin["gpus"][0] if origin["gpus"] else f"{origin['cpu']}, {origin['threads']} threads"
    return f"{ranks} x {one}" if ranks > 1 else one


def _command(words: Sequence[str], data_dir: str) -> str:
    """The command line; $CORPUS stands for a data folder given by its absolute path, no more than a name for others."""

    def placed(word: str) -> str:
        option, equals, value = word.rpartition("=")
        if not value.startswith("/"):
            return word
        return option + equals + ("$CORPUS" if Path(value) == Path(data_dir) else Path(value).name)

    return " ".join(word if "$CORPUS" in word else shlex.quote(word) for word in map(placed, words))


def _shown(steps: list[dict[str, Any]], shown: Collection[int] | None) -> list[dict[str, Any]]:
    """Those that are asked for, or about SHOWN_STEPS of them, the first and the last among them."""
    if shown is not None:
        return [record for record in steps if record["step"] in shown]
    count = min(SHOWN_STEPS, len(steps))
    return [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]


def _by_loop(steps: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Medians of a figure over the steps without and with the layer loop."""
    found = {}
    for name, loop in (("loop off", False), ("loop on", True)):
        values = [record[key] for record in steps if bool(record.get("loop")) == loop and record.get(key)]
        if values:
            found[name] = round(statistics.median(values), 4)
    return found


@dataclass(frozen=True)
class Line:
    """A row of the table: its name, where a record has its figure (None: nowhere), and how that is written."""

    title: str
    get: Callable[[Record], Any]
    form: Callable[[Any], str]

    def of(self, record: Record) -> str:
        found = self.get(record)
        return "" if found is None else self.form(found)

    def spread(self, records: Sequence[Record]) -> str:
        """Mean and sample standard deviation of a number that every record has and that differs between them."""
        values = [self.get(record) for record in records]
        if not all(isinstance(value, (int, float)) for value in values) or len(set(values)) == 1:
            return ""
        found = summarize(values)
        return f"{self.form(found.mean)} ± {self.form(found.sd)}"


def lines_of(records: Sequence[Record]) -> list[Line]:
    def under(
        key: str, form: Callable[[Any], str], prefix: str = "", order: Callable[[str], int] = lambda name: 0
    ) -> list[Line]:
        names = sorted(dict.fromkeys(name for record in records for name in record.get(key) or {}), key=order)
        return [
            Line(prefix + name, lambda record, name=name: (record.get(key) or {}).get(name), form) for name in names
        ]

    return [
        *under("loss", "{:.4f}".format, "train loss, step ", order=int),
        *under("step_ms", "{:,.1f} ms".format, "step time, "),
        *under("tokens_per_second", "{:,.0f}".format, "tokens per second, "),
        *under("mfu", "{:.1%}".format, "MFU, "),
        Line("tokens", lambda r: r.get("tokens") or None, "{:,.0f}".format),
        Line("time waiting for data", lambda r: r.get("data_wait"), "{:.2%}".format),
        Line("peak GPU memory", lambda r: r.get("peak_gpu_bytes") or None, lambda value: f"{value / 1e9:.1f} GB"),
        *under("bpb", "{:.5f}".format, "bits per byte, "),
        *under("nats", "{:.5f}".format, "nats per token, "),
        *under("baselines", "{:.4f}".format, "bits per byte, primed "),
        Line("gain of test-time training", lambda r: r.get("ttt_gain") or None, _gain),
        Line("artifact", lambda r: (r.get("artifact") or {}).get("bytes"), "{:,.0f} bytes".format),
        *under("seconds", "{:,.1f}".format, "seconds, "),
        *under("breakdown", lambda value: f"{1000 * value:.2f} ms"),
        *under("ablation", ablated),
    ]


def differ_by_seed(records: Sequence[Record]) -> bool:
    """Whether there are several, of one configuration, code and data, each with another seed."""

    def rest(record: Record) -> Any:
        changed = {name: value for name, value in record["changed"].items() if name != "seed"}
        return record.get("preset"), changed, record.get("commit"), record.get("data_sha256"), record["machine"]

    seeds = [record["changed"].get("seed") for record in records]
    return len(records) > 1 and len(set(seeds)) == len(seeds) and all(rest(r) == rest(records[0]) for r in records)


def _gain(gain: dict[str, Any]) -> str:
    return f"{gain['bpb']:.4f} ± {gain['standard_error']:.4f} bits per byte"


def ablated(row: dict[str, Any]) -> str:
    """A row of ablation.py: its time, against all kernels, and what there is to say."""
    times = f"{1000 * row['seconds']:.2f} ms, {row['ratio']:.3f} times"
    return f"{times} ({row['remark']})" if row["remark"] else times


def table(names: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Where each record comes from, then a row a figure and a column a record."""
    text = []
    for name, record in zip(names, records, strict=True):
        settings = " ".join(f"{key}={value}" for key, value in record["changed"].items())
        versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items() if value)
        parts = [record["machine"], versions, f"preset `{record['preset']}`" if record.get("preset") else ""]
        parts += [
            f"`{record['command']}`" if record.get("command") else "",
            f"`{settings}`" if settings else "",
            f"data `{record['data_sha256'][:12]}`" if record.get("data_sha256") else "",
        ]
        parts += [f"commit `{record['commit'][:12]}`" if record.get("commit") else "", record.get("note", "")]
        text += [f"**{name}**: " + "; ".join(filter(None, parts)) + ".", ""]
    header, by_seed = ["", *names], differ_by_seed(records)
    if by_seed:
        header.append("mean ± standard deviation")
    cells = [
        [line.title, *map(line.of, records), *([line.spread(records)] if by_seed else [])] for line in lines_of(records)
    ]
    kept = [row for row in cells if any(row[1:])]
    return [*text, *("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *kept])]


def rendered(page: str, folder: Path = RECORDS) -> str:
    """The page with what stands between its markers made anew."""

    def fill(match: re.Match[str]) -> str:
        names = match[2].split(",")
        records = [json.loads((folder / f"{name}.json").read_text()) for name in names]
        return match[1] + "\n".join(["", *table(names, records), "", ""]) + match[3]

    return MARKED.sub(fill, page)


def main(arguments: list[str] | None = None, folder: Path = RECORDS) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real_runs", description="Keep what a run's folder says.")
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    parser.add_argument("--note", help="what else a reader must know of the run")
    parser.add_argument("--like", metavar="OTHER", help="a record beside which this one will stand: of the same steps")
    options = parser.parse_args(arguments)
    shown = None
    if options.like:
        other = folder / f"{options.like}.json"
        if not other.is_file():
            parser.error(f"--like: got {options.like!r}, wanted a record in {folder}")
        shown = {int(step) for step in json.loads(other.read_text(encoding="utf-8"))["loss"]}
    found = record_of(RunDir(options.run, writes=False), shown) | ({"note": options.note} if options.note else {})
    (folder / f"{options.name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
