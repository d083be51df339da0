"""The report's pictures: matplotlib figures as self-contained SVG data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from model.report.load import Run

Look = dict[str, Any]  # keyword arguments of a curve
# Okabe and Ito's colours, which stay apart for colour-blind eyes; curves differ by dashes or markers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b6672", "#000000")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY, INK, SOFT, LIMIT = "#8a94a0", "#38424d", "#5b6672", "#b3261e"
_POINTS = 800  # a curve is drawn with about so many points
_SIZE = (4.7, 2.75)  # inches of a picture: legible at the width of a telephone, two side by side on a desk
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "pgolf",  # the same figures give the same bytes
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4af",
    "axes.labelcolor": "#38424d",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": "#1d2733",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ed",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b6672",
    "ytick.color": "#5b6672",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
}


def draw(paint: Callable[[Axes], None], height: float = _SIZE[1]) -> str:
    """A data URI of a picture painted by `paint(axes)`."""
    picture = svg(paint, height, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(picture).decode()


def svg(paint: Callable[[Axes], None], height: float = _SIZE[1], *, metadata: Mapping[str, str | None]) -> bytes:
    """A picture painted by `paint(axes)`; `metadata` as matplotlib takes them."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_SIZE[0], height))
        paint(figure.subplots())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata=dict(metadata))
    return buffer.getvalue()


def training_loss(runs: Sequence[Run], labels: Sequence[str], looks: Sequence[Look]) -> str:
    """Training loss by step, smoothed; for a single run over the raw one."""

    def paint(axes: Axes) -> None:
        for run, label, look in zip(runs, labels, looks, strict=True):
            step, loss = _series(run.steps, "loss")
            if len(runs) == 1:
                axes.plot(*_thin(step, loss), color=look["color"], alpha=0.25, linewidth=0.8)
                _mark_loop(axes, run)
            axes.plot(*_thin(step, _smooth(loss)), label=label, **look)
        _label(axes, "Training loss", "step", "nats per token")
        _limit_to_tail(axes, [loss for run in runs for loss in _series(run.steps, "loss")[1]])
        _legend(axes)

    return draw(paint)


def validation(runs: Sequence[Run], labels: Sequence[str], looks: Sequence[Look]) -> str:
    """Bits per byte of the validations during training."""

    def paint(axes: Axes) -> None:
        for run, label, look in zip(runs, labels, looks, strict=True):
            axes.plot(*_series(run.validations, "val_bpb"), marker="o", markersize=3.5, label=label, **look)
        _label(axes, "Validation during training", "step", "bits per byte")
        _legend(axes)

    return draw(paint)


def gradient_norm(runs: Sequence[Run], labels: Sequence[str], looks: Sequence[Look]) -> str:
    """The gradients' norm, a running median."""

    def paint(axes: Axes) -> None:
        for run, label, look in zip(runs, labels, looks, strict=True):
            step, norm = _series(run.steps, "grad_norm")
            axes.plot(*_thin(step, _smooth(norm, median=True)), label=label, **look)
        _label(axes, "Gradient norm before clipping", "step", "2-norm")
        axes.set_ylim(bottom=0)
        _legend(axes)

    return draw(paint)


def learning_rates(run: Run) -> str:
    """The learning rates by step."""

    def paint(axes: Axes) -> None:
        step, scale = _series(run.steps, "lr_scale")
        names = ("matrix_lr", "tied_embed_lr", "scalar_lr")
        for name, look in zip(names, looks_of(names, dashed=True).values(), strict=True):
            base = getattr(run.config.train, name)
            axes.plot(*_thin(step, scale * base), label=f"{name} {base:g}", **look)
        axes.set_ylim(bottom=0)
        _label(axes, "Learning rates", "step", "learning rate")
        _legend(axes)

    return draw(paint)


def momentum(run: Run) -> str:
    """Muon's momentum by step."""

    def paint(axes: Axes) -> None:
        step, values = _series(run.steps, "muon_momentum")
        axes.plot(*_thin(step, values), color=COLOURS[0])
        axes.set_ylim(min([0.8, *(values - 0.05)]), 1.0)
        _label(axes, "Muon's momentum", "step", "momentum")

    return draw(paint)


def tokens_per_second(run: Run) -> str:
    """Training speed by step, a running median."""

    def paint(axes: Axes) -> None:
        step, values = _series(run.steps, "tokens_per_second")
        axes.plot(*_thin(step, _smooth(values, median=True)), color=COLOURS[0])
        axes.set_ylim(0, 1.15 * float(np.percentile(values, 99)) if values.size else 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        _mark_loop(axes, run)
        _label(axes, "Training speed", "step", "tokens per second")

    return draw(paint)


def utilisation(run: Run) -> str:
    """MFU by step where the GPU's peak is known, else the time of a step."""
    has_mfu = any(record.get("mfu") for record in run.steps)

    def paint(axes: Axes) -> None:
        step, values = _series(run.steps, "mfu" if has_mfu else "step_ms")
        shown = _smooth(100 * values if has_mfu else values, median=True)
        axes.plot(*_thin(step, shown), color=COLOURS[0])
        axes.set_ylim(0, 1.3 * float(np.percentile(shown, 99)) if shown.size else 1)
        _mark_loop(axes, run)
        if has_mfu:
            _label(axes, "Model FLOP utilisation (MFU)", "step", "% of the GPU's bf16 peak")
        else:
            _label(axes, "Time of a step", "step", "milliseconds")

    return draw(paint)


def budgets(used: Mapping[str, tuple[float, str]]) -> str:
    """What was used of each budget: name -> (share of it, words)."""

    def paint(axes: Axes) -> None:
        names = list(used)[::-1]
        shares = [100 * used[name][0] for name in names]
        bars = axes.barh(names, shares, color=[COLOURS[0] if s <= 100 else LIMIT for s in shares], height=0.55)
        axes.bar_label(bars, [used[name][1] for name in names], padding=3, fontsize=8, color=INK)
        axes.axvline(100, color=LIMIT, linestyle="--", linewidth=1.1)
        # Room for the words behind the longest bar.
        axes.set_xlim(0, max(112.0, 1.55 * max(shares)))
        axes.grid(axis="y", visible=False)
        _label(axes, "Budgets", "% of the budget", "")

    return draw(paint, 0.9 + 0.36 * len(used))


def stage_times(seconds: Mapping[str, float]) -> str:
    """Seconds of each stage, in order."""
    return _bars(dict(seconds), [f"{value:,.1f} s" for value in seconds.values()], "Time of each stage", "seconds")


def artifact_bytes(parts: Mapping[str, float]) -> str:
    """Bytes of the artifact, part by part."""
    total = sum(parts.values())
    labels = [f"{size:,.0f}  ({size / total:.1%})" for size in parts.values()]
    return _bars(dict(parts), labels, "The artifact by kind", "bytes", room=1.6)


def bits_per_weight(names: Sequence[str], allotted: Sequence[float], entropy: Sequence[float]) -> str:
    """Bits allotted to a weight beside the order-0 entropy of its class."""

    def paint(axes: Axes) -> None:
        places = np.arange(len(names))
        for shift, values, label, colour in (
            (-0.18, allotted, "allotted", "#c3cad2"),
            (0.18, entropy, "order-0 entropy", COLOURS[0]),
        ):
            bars = axes.bar(places + shift, values, width=0.34, color=colour, label=label)
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=8, color=INK)
        axes.set_xticks(places, names)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, 1.3 * max([*allotted, *entropy]))
        axes.legend(fontsize=8, ncols=2, loc="upper left")
        _label(axes, "Bits per weight", "", "bits")

    return draw(paint)


def bpb_by_mode(values: Mapping[str, float], baselines: Mapping[str, float]) -> str:
    """Bits per byte of each evaluation mode, with general compressors below for scale."""
    numbers = {**values, **baselines}
    colours = [COLOURS[0] if name in values else "#c3cad2" for name in numbers]
    labels = [f"{number:.4f}" for number in numbers.values()]
    return _bars(numbers, labels, "Score by evaluation mode", "bits per byte (less is better)", colours=colours)


def bpb_by_length(documents: Mapping[str, np.ndarray], base: str | None = None) -> str:
    """Bits per byte of documents by their length in tokens, in eight groups of about equal number, for each mode.

    With `base`, each mode's difference from that mode.
    """

    def paint(axes: Axes) -> None:
        looks = looks_of(list(documents), marked=True)
        shown = [mode for mode in documents if mode != base]
        lengths: list[float] = []
        for mode in shown:
            lengths, bpb = _by_length(documents[mode])
            if base is not None:
                bpb = bpb - _by_length(documents[base])[1]
            axes.plot(lengths, bpb, markersize=4.5, label=mode, **looks[mode])
        if base is not None:
            axes.axhline(0, color=GREY, linewidth=1)
        if len(lengths) > 1 and max(lengths) > 3 * min(lengths):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        what = f"bits per byte minus {base}" if base is not None else "bits per byte"
        title = "Score by document length" + (f", against {base}" if base is not None else "")
        _label(axes, title, "tokens in a document (median of the group)", what)
        _legend(axes)

    return draw(paint)


def _by_length(rows: np.ndarray) -> tuple[list[float], np.ndarray]:
    """(median length, bits per byte) of groups of documents; rows of loss sum in nats, bytes, tokens."""
    rows = rows[rows[:, 1] > 0]
    groups = np.array_split(rows[np.argsort(rows[:, 2], kind="stable")], min(8, len(rows)))
    lengths = [float(np.median(group[:, 2])) for group in groups]
    return lengths, np.array([group[:, 0].sum() / math.log(2) / group[:, 1].sum() for group in groups])


def strip(groups: Mapping[str, Sequence[float]], axis_label: str, looks: Mapping[str, Look]) -> str:
    """One row a group: each run a dot, the mean a line."""

    def paint(axes: Axes) -> None:
        for place, (name, values) in enumerate(groups.items()):
            colour = looks[name]["color"]
            axes.scatter(values, [-place] * len(values), color=colour, s=26, alpha=0.8, zorder=3)
            axes.vlines(float(np.mean(values)), -place - 0.28, -place + 0.28, color=colour, linewidth=2)
        axes.set_yticks([-place for place in range(len(groups))], list(groups))
        axes.set_ylim(-len(groups) + 0.4, 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.grid(axis="y", visible=False)
        _label(axes, "", axis_label, "")

    return draw(paint, 0.8 + 0.36 * len(groups))


def looks_of(names: Sequence[str], *, dashed: bool = False, marked: bool = False) -> dict[str, Look]:
    """What tells each different name's curve from the others: a colour, dashes once colours repeat, and markers."""
    looks: dict[str, Look] = {}
    for i, name in enumerate(dict.fromkeys(names)):
        looks[name] = {"color": COLOURS[i % len(COLOURS)]}
        looks[name]["linestyle"] = DASHES[(i if dashed else i // len(COLOURS)) % len(DASHES)]
        if marked:
            looks[name]["marker"] = MARKERS[i % len(MARKERS)]
    return looks


def _bars(
    values: dict[str, float],
    labels: Sequence[str],
    title: str,
    axis_label: str,
    *,
    colours: Sequence[str] = COLOURS[:1],
    room: float = 1.25,
) -> str:
    """A bar a name, from the top down, each with its label; `room` is the axis' length in longest bars."""

    def paint(axes: Axes) -> None:
        bars = axes.barh(list(values), list(values.values()), color=colours, height=0.62)
        axes.bar_label(bars, labels, padding=3, fontsize=8, color=INK)
        axes.invert_yaxis()
        axes.set_xlim(0, room * max([*values.values(), 1e-9]))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.grid(axis="y", visible=False)
        _label(axes, title, axis_label, "")

    return draw(paint, 0.9 + 0.27 * len(values))


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def _smooth(values: np.ndarray, *, median: bool = False) -> np.ndarray:
    """A centred running mean or median over a fiftieth of the curve (of fewer values at its ends)."""
    half = max(1, values.size // 100)
    take = np.median if median else np.mean
    return np.array([take(values[max(0, i - half) : i + half + 1]) for i in range(values.size)])


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.unique(np.linspace(0, x.size - 1, min(x.size, _POINTS)).astype(int)) if x.size else slice(0)
    return x[keep], y[keep]


def _limit_to_tail(axes: Axes, losses: Sequence[float]) -> None:
    """Leaves the first steps' high losses out of view: they would flatten the rest."""
    finite = np.array([loss for loss in losses if math.isfinite(loss)])
    if finite.size > 20:
        low, high = float(finite.min()), float(np.percentile(finite, 97))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _mark_loop(axes: Axes, run: Run) -> None:
    first = next((record["step"] for record in run.steps if record.get("loop")), None)
    if first is not None and first > run.steps[0]["step"]:
        axes.axvline(first, color=GREY, linestyle=":", linewidth=1)
        axes.annotate("loop on", (first, 1), (3, -2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      fontsize=7.5, color=SOFT, va="top")  # fmt: skip


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _legend(axes: Axes) -> None:
    """One line for each different label, where there are several."""
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    names = list(dict.fromkeys(labels))
    if len(names) > 1:
        axes.legend([first[name] for name in names], names, fontsize=7.5)


def _short(value: float) -> str:
    for factor, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:g}"
