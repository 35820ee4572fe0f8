"""Scores as pictures: the confusion matrix, and reliability diagrams. A panel for each kind of weights."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rsmtdf_train.metrics import Scores
from rsmtdf_train.scoring.calibration import BINS, Reliability

__all__ = ["draw_confusion", "draw_reliability"]

_DPI = 110
#: Cells of larger matrices are too small for numbers.
_NUMBERED = 32


def draw_confusion(scores: Mapping[str, Scores], title: str) -> bytes:
    """Return a PNG file: for each kind of weights the shares of every label's pixels by prediction; rows sum to 100."""
    names = [c.name for c in next(iter(scores.values())).classes]
    side = max(2.4, 0.42 * len(names))
    margin = 0.3 + 0.085 * max(map(len, names))
    figure = Figure(figsize=(len(scores) * (side + 0.3) + margin, side + margin + 0.9), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for axis, (kind, found) in zip(axes, scores.items(), strict=True):
        counts = np.array(found.confusion, np.float64)
        totals = counts.sum(1, keepdims=True)
        shares = np.divide(100 * counts, totals, out=np.zeros_like(counts), where=totals > 0)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        axis.set_title(kind, fontsize=9)
        axis.set_xlabel("predicted", fontsize=8)
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=8, parse_math=False)
        axis.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        for i, j in np.argwhere(counts > 0) if len(names) <= _NUMBERED else ():
            text = f"{shares[i, j]:.0f}" if shares[i, j] >= 0.5 else "·"
            axis.text(j, i, text, ha="center", va="center", fontsize=7, color="w" if shares[i, j] > 55 else "k")
    axes[0].set_ylabel("label", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return _png(figure)


def draw_reliability(scores: Mapping[str, Scores], title: str) -> bytes:
    """Return a PNG file: a row for each kind of weights; all pixels first, then those predicted as each class.

    Bars: share of right pixels by probability. On the dashed line probabilities say what comes true. Below: where the
    pixels are. Kinds without calibration are left out.
    """
    kinds = {kind: found.calibration for kind, found in scores.items() if found.calibration is not None}
    columns = 1 + max(len(c.classes) for c in kinds.values())
    per_row = min(columns, 6)
    lines = math.ceil(columns / per_row)
    figure = Figure(figsize=(0.5 + 1.7 * per_row, 0.5 + 2.0 * lines * len(kinds)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines * len(kinds), per_row, squeeze=False, sharex=True, sharey=True)
    for n, (kind, calibration) in enumerate(kinds.items()):
        panels = [(f"{kind}: all pixels", calibration.overall)]
        panels += [(c.name, c.predicted) for c in calibration.classes]
        some = axes[n * lines : (n + 1) * lines].ravel()
        for axis, (name, reliability) in zip(some, panels, strict=False):
            _draw(axis, name, reliability)
        for axis in some[len(panels) :]:
            axis.set_axis_off()
    figure.supxlabel("probability of the predicted class", fontsize=8)
    figure.supylabel("share of right pixels", fontsize=8)
    figure.suptitle(title, fontsize=10, parse_math=False)
    return _png(figure)


def _draw(axis: Axes, name: str, reliability: Reliability) -> None:
    centres = (np.arange(BINS) + 0.5) / BINS
    right = [math.nan if v is None else v for v in reliability.accuracy]
    sure = [math.nan if v is None else v for v in reliability.confidence]
    axis.bar(centres, right, width=1 / BINS, color="C0", edgecolor="w", linewidth=0.4)
    axis.plot(sure, right, "k.", markersize=3)
    axis.plot([0, 1], [0, 1], "--", color="0.4", linewidth=0.8)
    total = sum(reliability.pixels)
    if total:
        axis.bar(centres, [-0.2 * n / max(reliability.pixels) for n in reliability.pixels], width=1 / BINS, color="0.7")
    axis.set_xlim(0, 1)
    axis.set_ylim(-0.22, 1)
    axis.set_yticks([0, 0.5, 1])
    axis.set_xticks([0, 0.5, 1])
    axis.tick_params(labelsize=7, labelbottom=True)
    ece = "never predicted" if reliability.ece is None else f"ECE {100 * reliability.ece:.1f} %"
    axis.set_title(f"{name}\n{ece}", fontsize=8, parse_math=False)


def _png(figure: Figure) -> bytes:
    memory = io.BytesIO()
    figure.savefig(memory, format="png", metadata={"Software": "rsmtdf"})
    return memory.getvalue()
