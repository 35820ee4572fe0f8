"""Curves of logs as inline SVG: a thin line per seed, a thick smoothed mean per arm, one plot per logged number.

Shape legend: N points of a line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from rsmtdf_train.pictures import moving_average
from rsmtdf_train.report.arms import Arm
from rsmtdf_train.report.runs import Curve, RunRecord

__all__ = [
    "Group",
    "Line",
    "PAGE_POINTS",
    "POINTS",
    "Plot",
    "downsample",
    "draw_svg",
    "plot_groups",
    "points_per_line",
    "ticks",
]

#: Most points of a mean, share of them for a single seed, most points of a page: a point takes about six bytes.
POINTS = 300
_SEED_SHARE = 0.5
PAGE_POINTS = 250_000
_FEWEST = 40

_Values = NDArray[np.float64]

#: Drawn at twice the size that is shown, so that whole numbers place a point to half a pixel.
_WIDTH, _HEIGHT = 680, 380
_TOP, _RIGHT, _BOTTOM, _CHARACTER = 14, 14, 46, 13


@dataclass(frozen=True)
class Line:
    """Points ``[N]`` of an arm (its number in the report). ``mean``: the smoothed mean, else one seed."""

    arm: int
    mean: bool
    x: _Values
    y: _Values


@dataclass(frozen=True)
class Plot:
    """One number over steps. ``scale`` is applied to its values, ``unit`` follows the ticks; ``dots`` marks points."""

    title: str
    lines: tuple[Line, ...]
    scale: float = 1.0
    unit: str = ""
    dots: bool = False


@dataclass(frozen=True)
class Group:
    """Plots that belong together; ``folded`` ones are shown on demand."""

    title: str
    plots: tuple[Plot, ...]
    folded: bool = False


_LOSSES = {
    "loss": "total loss",
    "loss_labeled": "loss, labelled tiles",
    "loss_unlabeled": "loss, pseudo-labels",
    "loss_distill": "loss, distillation",
    "loss_privileged": "loss, labelled tiles with true features",
}
_PSEUDO = {
    "mask_ratio": "pixels with a pseudo-label",
    "pseudo_accuracy": "right pseudo-labels",
    "probe_share": "share of the probe in pseudo-labels",
}
_OTHER = {"lr": "learning rate", "grad_norm": "norm of the gradient"}
_PER_TARGET = {
    "cosine": "cosine to the teacher",
    "gate": "gate of the fusion",
    "drift": "drift of stored features from the live teacher",
}
_SPEED = {
    "samples_per_s": "samples per second",
    "data_wait": "share of time waiting for data",
    "gpu_memory_mb": "GPU memory, MB",
}
_PERCENT = {"mask_ratio", "pseudo_accuracy", "probe_share", "data_wait"}
_EXACT = {"lr", "probe_share"}  # no noise to smooth away
_LEFT_OUT = {"step", "seconds", "online"}


def plot_groups(arms: Sequence[Arm]) -> list[Group]:
    """Return the plots of everything that some run logged; numbers of no known name come last."""
    names = sorted({name for arm in arms for run in arm.runs for name in run.log} - _LEFT_OUT)
    plain = [n for n in names if "/" not in n]
    losses = [*(n for n in _LOSSES if n in plain), *(n for n in plain if n.startswith("loss") and n not in _LOSSES)]
    known = {*losses, *_PSEUDO, *_OTHER, *_SPEED}
    groups = [
        Group("Validation", tuple(_validation(arms))),
        Group("Losses", _plots(arms, losses, _LOSSES)),
        Group("Pseudo-labels", _plots(arms, [n for n in _PSEUDO if n in plain], _PSEUDO)),
        Group("Teachers", tuple(_teachers(arms, names))),
        Group("Each target", _plots(arms, _targets(names), {}), folded=True),
        Group("Optimiser", _plots(arms, [n for n in _OTHER if n in plain], _OTHER)),
        Group("Speed", _plots(arms, [n for n in _SPEED if n in plain], _SPEED), folded=True),
        Group("More", _plots(arms, [n for n in names if n not in known and n.partition("/")[0] not in _PER_TARGET], {}),
              folded=True),
    ]  # fmt: skip
    return [group for group in groups if group.plots]


def _plots(arms: Sequence[Arm], names: Sequence[str], titles: Mapping[str, str]) -> tuple[Plot, ...]:
    plots = []
    for name in names:
        lines = list(_lines(arms, lambda run, name=name: _column(run.log, name), smooth=name not in _EXACT))  # type: ignore[misc]
        if lines:
            percent = name in _PERCENT
            plots.append(Plot(titles.get(name, name), tuple(lines), 100 if percent else 1, " %" if percent else ""))
    return tuple(plots)


def _column(log: Curve, name: str) -> tuple[_Values, _Values] | None:
    """Return steps and values, None where there are none, or for a loss term that is off (always 0)."""
    values = log.get(name)
    if values is None or not np.isfinite(values).any():
        return None
    if name.startswith("loss") and not np.nanmax(np.abs(values)):
        return None
    return log["step"], values


def _targets(names: Sequence[str]) -> list[str]:
    """Return the numbers of single targets, of the kinds that have several targets of one teacher."""
    found = []
    for kind in _PER_TARGET:
        mine = [n for n in names if n.startswith(f"{kind}/")]
        if len(mine) > len({n.split("/")[1] for n in mine}):
            found += mine
    return found


def _teachers(arms: Sequence[Arm], names: Sequence[str]) -> Iterator[Plot]:
    """Yield a plot per kind and teacher: the mean over the teacher's targets."""
    for kind, title in _PER_TARGET.items():
        mine = [n for n in names if n.startswith(f"{kind}/")]
        for teacher in dict.fromkeys(n.split("/")[1] for n in mine):
            keys = [n for n in mine if n.split("/")[1] == teacher]

            def mean(run: RunRecord, keys: Sequence[str] = keys) -> tuple[_Values, _Values] | None:
                there = [run.log[k] for k in keys if k in run.log]
                return (run.log["step"], _mean(there)) if there else None

            lines = tuple(_lines(arms, mean))
            if lines:
                yield Plot(f"{title}, {teacher}" + (f" (mean of {len(keys)})" if len(keys) > 1 else ""), lines)


def _validation(arms: Sequence[Arm]) -> Iterator[Plot]:
    kinds = sorted({kind for arm in arms for run in arm.runs for kind in run.validation} - {"step"})
    splits = sorted({run.validation_split for arm in arms for run in arm.runs if run.validation_split})
    for kind in kinds:
        lines = _lines(
            arms,
            lambda run, kind=kind: (run.validation["step"], run.validation[kind]) if kind in run.validation else None,  # type: ignore[misc]
            smooth=False,
        )
        yield Plot(f"mean IoU on {', '.join(splits)}, {kind}", tuple(lines), 100, " %", dots=True)


def _lines(
    arms: Sequence[Arm], values: Callable[[RunRecord], tuple[_Values, _Values] | None], smooth: bool = True
) -> Iterator[Line]:
    for number, arm in enumerate(arms):
        found = [(run, *xy) for run in arm.runs if (xy := values(run)) is not None]
        if not found:
            continue
        if smooth or len(found) > 1:
            for _, x, y in found:
                yield Line(number, False, x, y)
        whole = [(x, y) for run, x, y in found if run.complete] or [(x, y) for _, x, y in found]
        steps = sorted(set.intersection(*(set(x.tolist()) for x, _ in whole)))
        if steps:
            at = np.array(steps)
            rows = [y[np.searchsorted(x, at)] for x, y in whole]
            yield Line(number, True, at, _mean([moving_average(row) for row in rows] if smooth else rows))


def _mean(rows: Sequence[_Values]) -> _Values:
    """Return the mean ``[N]`` over ``rows`` at every point; NaN counts nowhere."""
    stacked = np.stack(rows)
    known = np.isfinite(stacked)
    count = known.sum(0)
    mean: _Values = np.where(count > 0, np.where(known, stacked, 0.0).sum(0) / np.maximum(count, 1), np.nan)
    return mean


def downsample(x: _Values, y: _Values, points: int) -> tuple[_Values, _Values]:
    """Return at most ``points`` points: the finite ones, or the means of equal stretches of them."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(y) <= points:
        return x, y
    edges = np.linspace(0, len(y), points + 1).astype(int)
    counts = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / counts, np.add.reduceat(y, edges[:-1]) / counts


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers in ``low..high``, about ``count`` of them."""
    raw = (high - low) / count
    if not math.isfinite(raw) or raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def points_per_line(groups: Sequence[Group]) -> int:
    """Return how many points a line may have so that all lines of a page stay within its bound."""
    lines = sum(len(plot.lines) for group in groups for plot in group.plots)
    return max(_FEWEST, min(POINTS, PAGE_POINTS // max(1, lines)))


def draw_svg(plot: Plot, names: Sequence[str], number: int = 0, points: int = POINTS) -> str:
    """Return ``plot`` as an ``svg`` element; ``names`` are those of the arms, for readers without eyes.

    Classes: ``mean`` and ``seed`` of lines, ``aN`` the arm's number. ``data-frame`` holds x0 x1 y0 y1 of the values and
    left, right, top, bottom of the frame, for a script that reads values back. ``number``: unique in the page.
    """
    x0, x1, y0, y1 = _ranges(plot)
    labels = [(v, t + plot.unit) for v, t in _labelled(ticks(y0, y1))]
    left = 20 + _CHARACTER * max((len(t) for _, t in labels), default=1)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def place_x(v: float) -> int:
        return round(left + (v - x0) / (x1 - x0) * (right - left))

    def place_y(v: float) -> int:
        return round(bottom - (v - y0) / (y1 - y0) * (bottom - _TOP))

    steps = _labelled(ticks(x0, x1))
    parts = [f'<path class="grid" d="{"".join(f"M{left},{place_y(v)}H{right}" for v, _ in labels)}"/>']
    parts += [f'<text class="y" x="{left - 10}" y="{place_y(v) + 8}">{escape(t)}</text>' for v, t in labels]
    parts += [f'<text x="{min(place_x(v), right - 7 * len(t))}" y="{_HEIGHT - 12}">{t}</text>' for v, t in steps]
    notches = "".join(f"M{place_x(v)},{bottom}v7" for v, _ in steps)
    parts.append(f'<path class="axis" d="M{left},{bottom}H{right}{notches}"/>')
    frame = f"M{left},{_TOP - 6}H{right + 6}V{bottom + 2}H{left}Z"
    parts.append(f'<clipPath id="clip{number}"><path d="{frame}"/></clipPath><g clip-path="url(#clip{number})">')
    for line in sorted(plot.lines, key=lambda item: item.mean):
        x, y = downsample(line.x, line.y * plot.scale, points if line.mean else max(2, round(_SEED_SHARE * points)))
        placed = [(place_x(a), place_y(b)) for a, b in zip(x, y, strict=True)]
        parts.append(f'<path class="{"mean" if line.mean else "seed"} a{line.arm}" d="{_path(placed)}"/>')
        if line.mean and (plot.dots or len(placed) == 1):
            parts.append(f'<path class="dots a{line.arm}" d="{"".join(f"M{a},{b}h0" for a, b in placed)}"/>')
    ends = ", ".join(
        f"{names[line.arm]} {float(known[-1]) * plot.scale:.4g}{plot.unit}"
        for line in plot.lines
        if line.mean and len(known := line.y[np.isfinite(line.y)])
    )
    numbers = " ".join(f"{v:.9g}" for v in (x0, x1, y0, y1, left, right, _TOP, bottom))
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(plot.title)} over steps; last values: '
        f'{escape(ends)}" data-frame="{numbers}" data-unit="{escape(plot.unit)}">{"".join(parts)}</g></svg>'
    )


def _ranges(plot: Plot) -> tuple[float, float, float, float]:
    """Return least and greatest step and value: all of the means, nearly all of the seeds (a spike is cut off)."""
    x = np.concatenate([line.x for line in plot.lines])
    lows, highs = [], []
    for line in plot.lines:
        y = line.y[np.isfinite(line.y)] * plot.scale
        if y.size:
            low, high = (y.min(), y.max()) if line.mean else np.percentile(y, [5, 95])
            lows.append(float(low))
            highs.append(float(high))
    low, high = (min(lows), max(highs)) if lows else (0.0, 1.0)
    if 0 < low < 0.6 * high:
        low = 0.0
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = (low - 0.5 * abs(low), high + 0.5 * abs(high)) if high else (0.0, 1.0)
    margin = 0.04 * (high - low)
    x0, x1 = float(x.min()), float(x.max())
    return x0, max(x1, x0 + 1), low if low == 0 else low - margin, high + margin


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Return ``values`` (evenly spaced) with their texts, as many digits as their distance needs."""
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) if values else 1.0
    largest = max(map(abs, values), default=0.0)
    if 0 < largest < 0.01 or largest >= 1e6:
        digits = max(0, math.floor(math.log10(largest)) - math.floor(math.log10(step) + 1e-9)) if step else 1
        texts = [f"{v:.{digits}e}" for v in values]
        return [(v, "0" if abs(v) < step / 2 else re.sub(r"e([+-])0*", r"e\1", t).replace("e+", "e"))
                for v, t in zip(values, texts, strict=True)]  # fmt: skip
    if step >= 1000 and all(abs(v % 500) < 1e-6 for v in values):
        return [(v, f"{v / 1000:g}k" if v else "0") for v in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [(v, f"{v + 0.0:.{digits}f}") for v in values]


def _path(points: Sequence[tuple[int, int]]) -> str:
    """Return ``M``ove to the first point and relative ``l``ines, repeated points left out."""
    if not points:
        return ""
    (x, y), steps = points[0], []
    for a, b in points[1:]:
        if (a, b) != (x, y):
            steps.append(f"{a - x},{b - y}")
            x, y = a, b
    return f"M{points[0][0]},{points[0][1]}" + ("l" + " ".join(steps) if steps else "h0")
