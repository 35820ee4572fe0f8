"""mIoU of every candidate against its bytes, with the front that nothing beats."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rsmtdf_cache.tune.sweep import TuneReport, TuneRow
from rsmtdf_cache.units import size

__all__ = ["draw_tuning"]

_MARKS = {"float16": "s", "int8": "o"}
_PCA = "v"


def draw_tuning(path: Path, report: TuneReport, title: str = "") -> Path:
    """Write a PNG and return ``path``: colour = teachers, mark = codec, line = Pareto front, ring = recommended.

    Bars are 95 % intervals of the front's points; dashed lines are controls, the dotted one is the budget.
    """
    figure = Figure(figsize=(8.4, 5.0), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    groups = list(dict.fromkeys(_group(r) for r in sorted(report.rows, key=lambda r: len(r.candidate.parts))))
    for row in report.rows:
        axis.plot(
            row.nbytes, 100 * row.miou.mean, linestyle="none", marker=_mark(row), color=f"C{groups.index(_group(row))}",
            markersize=5, alpha=0.9 if row.fits else 0.25, zorder=3,
        )  # fmt: skip
    front = [r for r in report.rows if r.pareto]
    axis.plot([r.nbytes for r in front], [100 * r.miou.mean for r in front], color="0.3", linewidth=1, zorder=2)
    for row in front:
        axis.plot([row.nbytes] * 2, [100 * row.miou.low, 100 * row.miou.high], color="0.75", linewidth=1, zorder=1)
    if report.recommended is not None:
        row = report.rows[report.recommended]
        axis.plot(
            row.nbytes, 100 * row.miou.mean, marker="o", markersize=13, markerfacecolor="none", markeredgecolor="k",
            markeredgewidth=1.5, linestyle="none", zorder=4,
        )  # fmt: skip
    for n, control in enumerate(report.controls):
        axis.axhline(100 * control.miou.mean, color="0.45", linewidth=1, linestyle=("--", "-.")[n % 2])
    if report.budget is not None:
        axis.axvline(report.budget, color="0.45", linewidth=1, linestyle=":")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(f"features of {report.tiles} tiles")
    axis.set_ylabel(f"mIoU of a linear probe, %, on {report.held_tiles} held-out tiles")
    axis.grid(alpha=0.25)
    handles = [Line2D([], [], color=f"C{n}", marker="o", linestyle="none", label=g) for n, g in enumerate(groups)]
    marks = dict.fromkeys((_codec_kind(r), _mark(r)) for r in report.rows)
    handles += [Line2D([], [], color="0.4", marker=m, linestyle="none", label=text) for text, m in marks]
    handles.append(Line2D([], [], color="0.3", linewidth=1, label="nothing is smaller and better"))
    handles += [
        Line2D([], [], color="0.45", linestyle=("--", "-.")[n % 2], label=c.name) for n, c in enumerate(report.controls)
    ]
    if report.budget is not None:
        handles.append(Line2D([], [], color="0.45", linestyle=":", label=f"budget {size(report.budget)}"))
    if report.recommended is not None:
        handles.append(
            Line2D([], [], color="k", marker="o", markersize=10, markerfacecolor="none", linestyle="none",
                   label="recommended")
        )  # fmt: skip
    legend = figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names of teachers are not formulas
    if title:
        axis.set_title(title, fontsize=10, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": "rsmtdf"})
    return path


def _group(row: TuneRow) -> str:
    return "\n+ ".join(p.teacher for p in row.candidate.parts)


def _codec_kind(row: TuneRow) -> str:
    kinds = {"pca-int8" if p.codec.startswith("pca") else p.codec for p in row.candidate.parts}
    return kinds.pop() if len(kinds) == 1 else "several codecs"


def _mark(row: TuneRow) -> str:
    kind = _codec_kind(row)
    return "D" if kind == "several codecs" else _MARKS.get(kind, _PCA)
