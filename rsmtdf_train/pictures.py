"""Pictures of runs: image, label and predictions side by side; loss curves.

Shape legend: H W pixels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.sources.base import ClassInfo

__all__ = ["PanelRow", "colorize", "draw_curves", "draw_panel", "moving_average", "read_log"]

_UNKNOWN = (255, 255, 255)  # ignored pixels: white, as on a map
_CELL = 2.0  # inches


@dataclass(frozen=True)
class PanelRow:
    """One tile and what every arm made of it."""

    title: str
    image: NDArray[np.uint8]  # [H, W, 3] RGB
    label: NDArray[np.uint8]  # [H, W] class numbers or ignore index
    predictions: Mapping[str, NDArray[np.uint8]]  # arm -> [H, W] class numbers


def colorize(mask_HW: NDArray[np.uint8], classes: Sequence[ClassInfo]) -> NDArray[np.uint8]:
    """Return ``[H, W, 3]`` uint8: the mask in the colours of ``classes``; any other number is white."""
    palette = np.full((256, 3), _UNKNOWN, np.uint8)
    palette[: len(classes)] = [c.color for c in classes]
    colors: NDArray[np.uint8] = palette[mask_HW]
    return colors


def draw_panel(path: Path, rows: Sequence[PanelRow], classes: Sequence[ClassInfo], title: str = "") -> Path:
    """Write a PNG with one row per tile: image, label, every arm's prediction; return ``path``.

    Under a prediction stands its share of right pixels among labelled ones. The legend shows the classes that occur.
    Raises ``UsageError`` without rows or when rows hold different arms.
    """
    if not rows:
        raise UsageError("a panel without tiles: choose at least one")
    arms = list(rows[0].predictions)
    if any(list(row.predictions) != arms for row in rows):
        raise UsageError(f"a panel needs the same arms in every row; the first has {', '.join(arms) or 'none'}")
    columns = 2 + len(arms)
    seen = {int(v) for row in rows for mask in (row.label, *row.predictions.values()) for v in np.unique(mask)}
    handles = [
        Patch(facecolor=np.divide(c.color, 255).tolist(), edgecolor="0.3", linewidth=0.5, label=c.name)
        for number, c in enumerate(classes)
        if number in seen
    ]
    if any(v >= len(classes) for v in seen):
        handles.append(Patch(facecolor="white", edgecolor="0.3", linewidth=0.5, label="not labelled"))
    per_line = max(2, round(columns * _CELL / 1.35))
    legend = 0.15 + 0.24 * math.ceil(len(handles) / per_line)
    gap, top = 0.24, 0.62 if title else 0.32
    width, height = 0.4 + columns * _CELL + 0.1, top + len(rows) * (_CELL + gap) + legend
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.4 / width,
        right=1 - 0.1 / width,
        top=1 - top / height,
        bottom=(legend + gap) / height,
        wspace=0.04,
        hspace=gap / _CELL,
    )
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_linewidth(0.5)
    for name, axis in zip(("image", "label", *arms), axes[0], strict=True):
        axis.set_title(name, fontsize=9)
    for line, row in zip(axes, rows, strict=True):
        line[0].set_ylabel(row.title, fontsize=8)
        line[0].imshow(row.image)
        line[1].imshow(colorize(row.label, classes), interpolation="nearest")
        counted = row.label < len(classes)
        for axis, mask in zip(line[2:], row.predictions.values(), strict=True):
            axis.imshow(colorize(mask, classes), interpolation="nearest")
            if counted.any():
                share = float((mask == row.label)[counted].mean())
                axis.set_xlabel(f"{share:.0%} of pixels right", fontsize=7, labelpad=3)
    if title:
        figure.suptitle(title, fontsize=10, y=1 - 0.12 / height, va="top")
    if handles:
        figure.legend(
            handles=handles,
            loc="lower center",
            ncols=min(per_line, len(handles)),
            fontsize=8,
            frameon=False,
            handlelength=1.2,
            columnspacing=1.2,
            bbox_to_anchor=(0.5, 0.02 / height),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "rsmtdf"})
    return path


def read_log(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return column name → values by line of a ``log.jsonl``; a key a line lacks is NaN there.

    A step that stands twice (a run killed between log and checkpoint, then resumed) counts with its last line; a last
    line that was cut off while it was written counts nowhere.
    Raises ``DataError`` for a file that is missing, empty or not JSON lines.
    """
    by_step: dict[int, dict[str, float | None]] = {}
    try:
        text = path.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():
            entry = json.loads(line)
            by_step[int(entry["step"])] = entry
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"log {path}: not one JSON object with 'step' per line ({error})") from None
    if not by_step:
        raise DataError(f"log {path}: empty; the run wrote no step yet")
    steps = sorted(by_step)
    names = sorted({name for entry in by_step.values() for name, value in entry.items() if _is_number(value)})
    return {
        name: np.array([by_step[s].get(name) if _is_number(by_step[s].get(name)) else math.nan for s in steps], float)
        for name in names
    }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def draw_curves(path: Path, arms: Mapping[str, Sequence[Path]], title: str = "") -> Path:
    """Write a PNG with the loss terms of ``arms`` (name → ``log.jsonl`` of each seed) and return ``path``.

    One plot per term that some arm has; an arm is one line: the mean over its seeds of a moving average (faint: the
    single seeds).
    """
    if not any(arms.values()):
        raise UsageError("loss curves without runs: give at least one log.jsonl")
    logs = {arm: [read_log(p) for p in paths] for arm, paths in arms.items() if paths}
    terms = [
        (name, text)
        for name, text in (
            ("loss_labeled", "labelled tiles"),
            ("loss_unlabeled", "pseudo-labels"),
            ("loss_distill", "distillation"),
        )
        if any(name in log and np.nanmax(np.abs(log[name]), initial=0) > 0 for runs in logs.values() for log in runs)
    ] or [("loss", "total loss")]
    figure = Figure(figsize=(1.0 + 3.6 * len(terms), 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(terms), squeeze=False)[0]
    for axis, (name, text) in zip(axes, terms, strict=True):
        axis.set_title(text, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        for number, (arm, runs) in enumerate(logs.items()):
            with_term = [r for r in runs if name in r and np.nanmax(np.abs(r[name]), initial=0) > 0]
            if not with_term:
                continue
            color = f"C{number}"
            length = min(len(r[name]) for r in with_term)
            smooth = [moving_average(r[name][:length]) for r in with_term]
            if len(smooth) > 1:
                for run, values in zip(with_term, smooth, strict=True):
                    axis.plot(run["step"][:length], values, color=color, alpha=0.2, linewidth=0.8)
            axis.plot(with_term[0]["step"][:length], np.mean(smooth, axis=0), color=color, linewidth=1.8, label=arm)
        axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("loss (moving average)", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": "rsmtdf"})
    return path


def moving_average(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centred average over 1/20 of the run; shorter windows at the ends, NaN counts nowhere."""
    half = max(1, len(values) // 40)
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    total = counts[high] - counts[low]
    return np.where(total > 0, (sums[high] - sums[low]) / np.maximum(total, 1), np.nan)
