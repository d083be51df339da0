"""Records of whole runs, which bench.render puts into the documentation.

    python -m bench.real_runs RUN NAME --note TEXT    # keeps what RUN's folder says as bench/runs/NAME.json; no paths

`<!-- run:NAME,OTHER -->` ... `<!-- /run -->` in a page encloses a table with a column for each record.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model.presets import get_preset
from model.run import RunDir

RECORDS = Path(__file__).parent / "runs"
MARKED = re.compile(r"^(<!-- run:([\w,-]+) -->\n).*?^(<!-- /run -->)", re.DOTALL | re.MULTILINE)
PLACES = frozenset({"data_dir", "run_dir", "run_id"})  # settings that say where, not what
SHOWN_STEPS = 12

Record = dict[str, Any]


def record_of(run: RunDir) -> Record:
    """What a run's folder says, without what belongs to the machine's file system."""
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
        "loss": {str(r["step"]): round(r["loss"], 4) for r in _thinned(steps)},
        "step_ms": _by_loop(steps, "step_ms"),
        "tokens_per_second": _by_loop(steps, "tokens_per_second"),
        "mfu": _by_loop(steps, "mfu"),
        "tokens": result.get("train", {}).get("tokens"),
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


def _thinned(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About SHOWN_STEPS of them, the first and the last among them."""
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


# One line of the table: its name, and what it says of a record (None: nothing).
Line = tuple[str, Callable[[Record], str | None]]


def lines_of(records: Sequence[Record]) -> list[Line]:
    def under(key: str, form: Callable[[Any], str]) -> list[Line]:
        names = dict.fromkeys(name for record in records for name in record.get(key) or {})
        return [
            (name, lambda record, name=name: form(record[key][name]) if name in (record.get(key) or {}) else None)
            for name in names
        ]

    def titled(prefix: str, lines: list[Line]) -> list[Line]:
        return [(f"{prefix}{name}", say) for name, say in lines]

    return [
        *titled("train loss, step ", under("loss", lambda value: f"{value:.4f}")),
        *titled("step time, ", under("step_ms", lambda value: f"{value:,.1f} ms")),
        *titled("tokens per second, ", under("tokens_per_second", lambda value: f"{value:,.0f}")),
        *titled("MFU, ", under("mfu", lambda value: f"{value:.1%}")),
        ("tokens", lambda r: f"{r['tokens']:,}" if r.get("tokens") else None),
        ("peak GPU memory", lambda r: f"{r['peak_gpu_bytes'] / 1e9:.1f} GB" if r.get("peak_gpu_bytes") else None),
        *titled("bits per byte, ", under("bpb", lambda value: f"{value:.5f}")),
        *titled("nats per token, ", under("nats", lambda value: f"{value:.5f}")),
        *titled("bits per byte, primed ", under("baselines", lambda value: f"{value:.4f}")),
        ("gain of test-time training", lambda r: _gain(r["ttt_gain"]) if r.get("ttt_gain") else None),
        ("artifact", lambda r: f"{r['artifact']['bytes']:,} bytes" if r.get("artifact") else None),
        *titled("seconds, ", under("seconds", lambda value: f"{value:,.1f}")),
        *under("breakdown", lambda value: f"{1000 * value:.2f} ms"),
        *under("ablation", ablated),
    ]


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
    rows = [(title, [say(record) for record in records]) for title, say in lines_of(records)]
    cells = [[title, *(value or "" for value in values)] for title, values in rows if any(values)]
    return [*text, *("| " + " | ".join(row) + " |" for row in [["", *names], ["---"] * (1 + len(names)), *cells])]


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
    options = parser.parse_args(arguments)
    found = record_of(RunDir(options.run, writes=False)) | ({"note": options.note} if options.note else {})
    (folder / f"{options.name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
