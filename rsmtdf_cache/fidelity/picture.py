"""Fidelity as a PNG: a panel per teacher and scale, a row per case, a mark per layer and store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.fidelity.report import ArrayFacts, FidelityReport, Line, summary

__all__ = ["draw_fidelity"]

_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
_MARKS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 100


def draw_fidelity(path: Path, report: FidelityReport) -> Path:
    """Write a PNG of the standardised cosines of all arrays and return ``path``.

    A mark is the mean over tokens, the thin line reaches down to the worst 1 %. Layers differ in colour, stores in
    shape. Raises ``UsageError`` for a report without rows.
    """
    panels: dict[str, list[ArrayFacts]] = {}
    for array in report.arrays:
        panels.setdefault(array.array.rpartition("/")[0], []).append(array)
    if not report.rows:
        raise UsageError("nothing was compared, so there is nothing to draw")
    lines = {array: summary(report, array) for arrays in panels.values() for array in arrays}
    labels = list(dict.fromkeys(_general(line) for found in lines.values() for line in found))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    high = rows * (0.8 + 0.3 * len(labels)) + 0.9
    figure = Figure(figsize=(2.2 + 4.6 * columns, high), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    layers = list(dict.fromkeys(array.array.rpartition("/")[2] for array in report.arrays))
    for axis, (name, arrays) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, name, arrays, lines, labels, layers)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("standardised cosine to the live teacher (thin line: worst 1 %)", fontsize=8)
    handles = [Line2D([], [], color=_of(_COLORS, i), marker="o", ls="", label=layer) for i, layer in enumerate(layers)]
    stores = {a.store: a.codec for a in report.arrays}
    if len(report.stores) > 1:
        several = {n: {a.codec for a in report.arrays if a.store == n} for n in stores}
        names = {n: ", ".join(sorted(found)) if len(found) < 3 else _folder(report, n) for n, found in several.items()}
        handles += [Line2D([], [], color="0.4", marker=_of(_MARKS, n), ls="", label=name) for n, name in names.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(7, len(handles)), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": "rsmtdf"})
    return path


def _panel(
    axis: Axes, name: str, arrays: Sequence[ArrayFacts], lines: dict[ArrayFacts, list[Line]], labels: Sequence[str],
    layers: Sequence[str],
) -> None:  # fmt: skip
    step = 0.7 / max(1, len(arrays))
    for number, array in enumerate(arrays):
        color = _of(_COLORS, layers.index(array.array.rpartition("/")[2]))
        for line in lines[array]:
            y = labels.index(_general(line)) - 0.35 + step * (number + 0.5)
            axis.plot([line.standardised_worst, line.standardised], [y, y], color=color, lw=0.8, alpha=0.6)
            axis.plot([line.standardised], [y], color=color, marker=_of(_MARKS, array.store), ms=3.5, ls="")
    for y in range(len(labels)):
        axis.axhline(y - 0.5, color="0.9", lw=0.6, zorder=0)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlim(-0.55, 1.03)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", color="0.85", lw=0.6)
    axis.set_title(name, fontsize=9, parse_math=False)


def _general(line: Line) -> str:
    """Return the label without the name of a scale: panels of all scales share their rows."""
    return "from another scale" if line.case == "scale" else line.label


def _folder(report: FidelityReport, store: int) -> str:
    return report.stores[store][0].rstrip("/").rpartition("/")[2][:40]


def _of(values: Sequence[str], number: int) -> str:
    return values[number % len(values)]
