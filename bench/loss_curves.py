"""The picture of recorded training losses that bench.render draws beside a page which shows it.

The same records give the same bytes under the same matplotlib. Other versions place letters a little differently, so
the file names the version that drew it and the figures that it shows.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from bench.real_runs import RECORDS
from model.report.plots import looks_of, svg

PICTURE = "losses.svg"
CURVES = {
    "pr1530_order0": "pgolf, pr1530",
    "pr1530_fp8": "pgolf, pr1530, MLPs in FP8",
    "public_1530_order0": "pull request 1530",
    "pr1530_same_start": "pgolf, from its initial weights",
}
# Runs from the same initial weights on the same batches as another: which, and from which step on they are compared.
COMPARED = {"pr1530_fp8": "pr1530_order0", "pr1530_same_start": "public_1530_order0"}
FIRST_APART = 50
HEIGHT = 4.6  # inches
SCORE = "float"  # of the weights before they are quantised: all records have it


def read_curves(folder: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """Of each record in CURVES, by its title in the legend: training losses by step, and the validation's score."""
    found = {}
    for name, title in CURVES.items():
        record = json.loads((folder / f"{name}.json").read_text())
        losses = {int(step): loss for step, loss in record["loss"].items()}
        found[title] = {"loss": losses, "bpb": record["bpb"][SCORE]}
    return found


def picture(curves: dict[str, dict[str, Any]]) -> str:
    """The curves as an SVG, and within it, enlarged, what those of COMPARED are above their counterparts."""

    def paint(axes: Axes) -> None:
        looks = looks_of(list(curves), dashed=True)
        apart = axes.inset_axes((0.4, 0.3, 0.57, 0.2))
        for title, curve in curves.items():
            label, losses = f"{title}: {curve['bpb']:.4f} bits per byte", curve["loss"]
            axes.plot(list(losses), list(losses.values()), marker="o", markersize=2.5, label=label, **looks[title])
        for name, other in COMPARED.items():
            losses, base = (curves[CURVES[record]]["loss"] for record in (name, other))
            late = [step for step in losses if step >= FIRST_APART and step in base]
            apart.plot(late, [losses[step] - base[step] for step in late], **looks[CURVES[name]])
        apart.axhline(0.0, color="grey", linewidth=0.8)
        axes.set(title="Losses of single training steps, same batches", xlabel="step", ylabel="nats per token")
        axes.legend(title="validation, before quantising", loc="upper right")
        apart.set_title("above the run with the same first weights", fontsize="small")
        apart.tick_params(labelsize="small")

    return svg(paint, HEIGHT, metadata={"Date": None, "Description": digest(curves)}).decode()


def digest(curves: dict[str, dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(curves).encode()).hexdigest()


def is_current(text: str, curves: dict[str, dict[str, Any]]) -> bool:
    """Whether the file `text` shows these curves: byte for byte, unless another matplotlib has drawn it."""
    if f"Matplotlib v{matplotlib.__version__}," in text:
        return text == picture(curves)
    return digest(curves) in text
