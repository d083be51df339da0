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

COLOURS = ("#2b6cb0", "#c8641e", "#2f855a", "#8e4a9e", "#b83280", "#5a6b7b", "#0f8b8d", "#a67c00")
GREY = "#8a94a0"
_POINTS = 800  # a curve is drawn with about so many points
_WIDTH = 7.6  # inches; the page scales it
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


def draw(height: float, columns: int, paint: Callable[..., None]) -> str:
    """A data URI of a figure with so many panels side by side, painted by `paint(*axes)`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height))
        paint(*np.atleast_1d(figure.subplots(1, columns)))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def loss_curves(runs: Sequence[Run], labels: Sequence[str], colours: Sequence[str]) -> str:
    """Training loss (smoothed over the raw one), and validation bpb or else the gradients' norm, by step."""
    validated = any(run.validations for run in runs)

    def paint(train: Axes, right: Axes) -> None:
        for run, label, colour in zip(runs, labels, colours, strict=True):
            step, loss = _series(run.steps, "loss")
            if len(runs) == 1:
                train.plot(*_thin(step, loss), color=colour, alpha=0.25, linewidth=0.8)
                _mark_loop(train, run)
            train.plot(*_thin(step, _smooth(loss)), color=colour, label=label)
            if validated:
                right.plot(*_series(run.validations, "val_bpb"), color=colour, marker="o", markersize=3.5)
            else:
                step, norm = _series(run.steps, "grad_norm")
                right.plot(*_thin(step, _smooth(norm, median=True)), color=colour)
        _label(train, "Training loss", "step", "nats per token")
        _limit_to_tail(train, [loss for run in runs for loss in _series(run.steps, "loss")[1]])
        if validated:
            _label(right, "Validation during training", "step", "bits per byte")
        else:
            _label(right, "Gradient norm before clipping", "step", "")
            right.set_ylim(bottom=0)
        if 1 < len(set(labels)) <= 8:
            _legend(train)

    return draw(2.9, 2, paint)


def learning_rates(run: Run) -> str:
    """The learning rates and Muon's momentum by step."""

    def paint(rates: Axes, momentum: Axes) -> None:
        step, scale = _series(run.steps, "lr_scale")
        train = run.config.train
        for name, colour in zip(("matrix_lr", "tied_embed_lr", "scalar_lr"), COLOURS, strict=False):
            base = getattr(train, name)
            rates.plot(*_thin(step, scale * base), color=colour, label=f"{name} {base:g}")
        rates.set_ylim(bottom=0)
        rates.legend(fontsize=7.5)
        _label(rates, "Learning rates", "step", "")
        momentum.plot(*_thin(*_series(run.steps, "muon_momentum")), color=COLOURS[3])
        _label(momentum, "Muon momentum", "step", "")

    return draw(2.5, 2, paint)


def speed(run: Run) -> str:
    """Tokens per second and, where the GPU's peak is known, MFU by step."""
    has_mfu = any(record.get("mfu") for record in run.steps)

    def paint(rate: Axes, mfu: Axes) -> None:
        step, values = _series(run.steps, "tokens_per_second")
        rate.plot(*_thin(step, _smooth(values, median=True)), color=COLOURS[0])
        rate.set_ylim(0, 1.15 * float(np.percentile(values, 99)) if values.size else 1)
        rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        _mark_loop(rate, run)
        _label(rate, "Tokens per second", "step", "")
        if has_mfu:
            step, values = _series(run.steps, "mfu")
            mfu.plot(*_thin(step, 100 * _smooth(values, median=True)), color=COLOURS[2])
            mfu.set_ylim(bottom=0)
            _mark_loop(mfu, run)
            _label(mfu, "Model FLOPs utilisation", "step", "% of the GPU's bf16 peak")
        else:
            step, values = _series(run.steps, "step_ms")
            mfu.plot(*_thin(step, _smooth(values, median=True)), color=COLOURS[2])
            mfu.set_ylim(0, 1.3 * float(np.percentile(values, 99)) if values.size else 1)
            _mark_loop(mfu, run)
            _label(mfu, "Milliseconds a step", "step", "")

    return draw(2.5, 2, paint)


def stage_times(seconds: dict[str, float], budget: float) -> str:
    """Seconds of each stage, in order, with the budget where it comes into view."""

    def paint(axes: Axes) -> None:
        names = list(seconds)[::-1]
        values = [seconds[name] for name in names]
        bars = axes.barh(names, values, color=COLOURS[0], height=0.62)
        axes.bar_label(bars, [f"{value:,.1f} s" for value in values], padding=3, fontsize=8, color="#38424d")
        if max(values) > budget / 4:
            axes.axvline(budget, color=COLOURS[1], linestyle="--", linewidth=1.1)
            axes.text(budget, len(names) - 0.45, f" {budget:g} s", color=COLOURS[1], fontsize=8, va="bottom")
        axes.set_xlim(0, 1.18 * max(*values, budget if max(values) > budget / 4 else 0.0, 1e-9))
        axes.grid(axis="y", visible=False)
        _label(axes, "", "seconds", "")

    return draw(0.75 + 0.3 * len(seconds), 1, paint)


def artifact_bytes(parts: dict[str, float], limit: float) -> str:
    """One bar of the artifact's bytes, part by part, against the limit."""

    def paint(axes: Axes) -> None:
        left = 0.0
        for (name, size), colour in zip(parts.items(), COLOURS, strict=False):
            axes.barh([0], [size], left=left, color=colour, height=0.5, label=f"{name}  {size:,.0f}")
            left += size
        wide = left > limit / 4
        if wide:
            axes.axvline(limit, color="#b3261e", linestyle="--", linewidth=1.1)
        axes.set_xlim(0, 1.04 * max(left, limit if wide else 0.0))
        axes.set_yticks([])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1e6:g} MB"))
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=3, fontsize=8)
        _label(axes, "", "", "")

    return draw(1.75, 1, paint)


def bits_per_weight(names: Sequence[str], allotted: Sequence[float], entropy: Sequence[float]) -> str:
    """Bits allotted to a weight beside the order-0 entropy of its class."""

    def paint(axes: Axes) -> None:
        places = np.arange(len(names))
        for shift, values, label, colour in (
            (-0.18, allotted, "allotted", GREY),
            (0.18, entropy, "order-0 entropy", COLOURS[0]),
        ):
            bars = axes.bar(places + shift, values, width=0.34, color=colour, label=label)
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=2, fontsize=8)
        axes.set_xticks(places, names)
        axes.grid(axis="x", visible=False)
        axes.margins(y=0.15)
        axes.legend(fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.14))
        _label(axes, "", "", "bits per weight")

    return draw(2.5, 1, paint)


def bpb_by_mode(values: dict[str, float], baselines: dict[str, float]) -> str:
    """Bits per byte of each evaluation mode, with general compressors below for scale."""

    def paint(axes: Axes) -> None:
        names = [*values, *baselines][::-1]
        numbers = [(values | baselines)[name] for name in names]
        bars = axes.barh(names, numbers, color=[COLOURS[0] if n in values else "#c3cad2" for n in names], height=0.62)
        axes.bar_label(bars, [f"{number:.4f}" for number in numbers], padding=3, fontsize=8, color="#38424d")
        axes.set_xlim(0, 1.12 * max(numbers))
        axes.grid(axis="y", visible=False)
        _label(axes, "", "bits per byte (less is better)", "")

    return draw(0.75 + 0.3 * (len(values) + len(baselines)), 1, paint)


def bpb_by_length(documents: dict[str, np.ndarray]) -> str:
    """Bits per byte of documents by their length in tokens, in eight groups of about equal size, for each mode."""

    def paint(axes: Axes) -> None:
        for (mode, rows), colour in zip(documents.items(), COLOURS, strict=False):
            rows = rows[rows[:, 1] > 0]
            groups = np.array_split(rows[np.argsort(rows[:, 2], kind="stable")], min(8, len(rows)))
            lengths = [float(np.median(group[:, 2])) for group in groups]
            bpb = [group[:, 0].sum() / math.log(2) / group[:, 1].sum() for group in groups]
            axes.plot(lengths, bpb, color=colour, marker="o", markersize=4, label=mode)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axes.legend(fontsize=8)
        _label(axes, "", "tokens in a document (median of the group)", "bits per byte")

    return draw(2.7, 1, paint)


def strip(groups: Mapping[str, Sequence[float]], axis_label: str) -> str:
    """One row a group: each run a dot, the mean a line."""

    def paint(axes: Axes) -> None:
        for place, (values, colour) in enumerate(zip(groups.values(), _cycle(len(groups)), strict=True)):
            axes.scatter(values, [-place] * len(values), color=colour, s=26, alpha=0.8, zorder=3)
            axes.vlines(float(np.mean(values)), -place - 0.28, -place + 0.28, color=colour, linewidth=2)
        axes.set_yticks([-place for place in range(len(groups))], list(groups))
        axes.set_ylim(-len(groups) + 0.4, 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.ticklabel_format(axis="x", useOffset=False)
        axes.grid(axis="y", visible=False)
        _label(axes, "", axis_label, "")

    return draw(0.8 + 0.36 * len(groups), 1, paint)


def group_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each different name, in order."""
    different = list(dict.fromkeys(names))
    return dict(zip(different, _cycle(len(different)), strict=True))


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


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
                      fontsize=7.5, color="#5b6672", va="top")  # fmt: skip


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    first = dict(zip(reversed(labels), reversed(handles), strict=True))
    axes.legend([first[label] for label in dict.fromkeys(labels)], list(dict.fromkeys(labels)), fontsize=7.5)


def _short(value: float) -> str:
    for factor, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{suffix}"
    return f"{value:g}"
