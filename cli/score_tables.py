"""Scores in a terminal: by class, calibration, confusion, and by domain, scene or tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rsmtdf_cli.cache.show import plain
from rsmtdf_cli.console import console

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["show_calibration", "show_confusion", "show_groups", "show_metrics"]

#: Up to so many groups stand side by side, class by class; more are a list, the worst ones of it.
_SIDE_BY_SIDE = 8
_LISTED = 20


def show_metrics(metrics: Mapping[str, Any], without: Sequence[str] = ()) -> None:
    """Print the scores of ``metrics.json`` data as a table on stdout: one row per class, one group per checkpoint."""
    scores: Mapping[str, Any] = metrics["scores"]
    first = next(iter(scores.values()))
    bounds = all("boundary" in s for s in scores.values())
    windows = metrics.get("whole_scenes")
    how = "" if windows is None else f" in whole scenes, windows of {windows['window_px']} px"
    table = _table(f"{metrics['name']}: {metrics['split']} tiles{how}, percent", "class")
    names = ("IoU", "F1", "accuracy", "boundary F1") if bounds else ("IoU", "F1", "accuracy")
    for kind in scores:
        for name in names:
            table.add_column(f"{kind}\n{name.replace(' ', chr(10))}", justify="right")
    table.add_column("pixels", justify="right")
    for i, entry in enumerate(first["classes"]):
        cells = []
        for s in scores.values():
            cells += [_percent(s["classes"][i][k]) for k in ("iou", "f1", "accuracy")]
            cells += [_percent(s["boundary"]["classes"][i]["f1"])] if bounds else []
        last = i == len(first["classes"]) - 1
        table.add_row(plain(entry["name"]), *cells, f"{entry['pixels']:,}", end_section=last)
    means = []
    for s in scores.values():
        means += [_percent(s[m]) for m in ("miou", "mf1", "macc")]
        means += [_percent(s["boundary"]["mf1"])] if bounds else []
    table.add_row("mean", *means, f"{sum(e['pixels'] for e in first['classes']):,}", style="bold")
    overall = []
    for s in scores.values():
        overall += ["", "", _percent(s["pixel_accuracy"]), *([""] if bounds else [])]
    table.add_row("all pixels", *overall, "")
    console().print(table)
    if bounds:
        console().print(f"boundary F1: within {first['boundary']['tolerance_px']} px", soft_wrap=True)
    for kind in scores if without else ():
        value = _percent(scores[kind]["miou_without"])
        console().print(f"mean IoU without {', '.join(without)}: {kind} {value}", markup=False, soft_wrap=True)


def show_calibration(metrics: Mapping[str, Any]) -> None:
    """Print the calibration of every checkpoint: of the pixels predicted as each class, and one-vs-rest."""
    scores: Mapping[str, Any] = metrics["scores"]
    table = _table("calibration: errors of the probabilities, percent", "class")
    for kind in scores:
        for name in ("ECE", "too sure by", "classwise ECE"):
            table.add_column(f"{kind}\n{name.replace(' ', chr(10), 1)}", justify="right")
    keys = ("ece", "overconfidence", "classwise_ece")
    names = [c["name"] for c in next(iter(scores.values()))["classes"]]
    for i, name in enumerate(names):
        cells = [_percent(s["calibration"]["classes"][i][k], k) for s in scores.values() for k in keys]
        table.add_row(plain(name), *cells, end_section=i == len(names) - 1)
    cells = [_percent(s["calibration"][k], k) for s in scores.values() for k in keys]
    table.add_row("all pixels", *cells, style="bold")
    console().print(table)
    console().print(
        "ECE: |probability - share of right pixels| where the class is predicted; classwise: at all pixels, against "
        "whether it is the label, and the mean over classes",
        soft_wrap=True,
    )


def show_confusion(metrics: Mapping[str, Any], kind: str) -> None:
    """Print the confusion matrix of a checkpoint: shares of each label's pixels, so rows sum to 100."""
    found: Mapping[str, Any] = metrics["scores"][kind]
    names = [c["name"] for c in found["classes"]]
    table = _table(f"confusion, {kind}: percent of each label's pixels", "label")
    for number in range(1, len(names) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    table.add_column("pixels", justify="right")
    for i, (name, row) in enumerate(zip(names, found["confusion"], strict=True)):
        total = sum(row)
        shares = [n / total if total else 0.0 for n in row]
        cells = [_shaded(share, n, i == j) for j, (share, n) in enumerate(zip(shares, row, strict=True))]
        table.add_row(f"{i + 1} {plain(name)}", *cells, f"{total:,}")
    console().print(table)


def show_groups(metrics: Mapping[str, Any], kind: str) -> None:
    """Print the scores of a checkpoint by group: a few side by side, of many the worst ones."""
    found: Mapping[str, Any] = metrics["scores"][kind]
    groups = found["groups"]["groups"]
    title = f"{kind} by {found['groups']['by']}, percent"
    if len(groups) <= _SIDE_BY_SIDE:
        _side_by_side(title, found, groups)
        return
    table = _table(f"{title}: the fewest right pixels first", found["groups"]["by"])
    for name in ("tiles", "pixels", "right", "mIoU"):
        table.add_column(name, justify="right")
    table.add_column("largest error")
    for group in groups[:_LISTED]:
        scores = (_percent(group["pixel_accuracy"]), _percent(group["miou"]))
        pixels = sum(c["pixels"] for c in group["classes"])
        table.add_row(plain(group["name"]), f"{group['tiles']:,}", f"{pixels:,}", *scores, _largest_error(group))
    console().print(table)
    if len(groups) > _LISTED:
        console().print(f"{len(groups) - _LISTED:,} more; --json and --out have all of them", soft_wrap=True)


def _side_by_side(title: str, whole: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    columns = [whole, *sorted(groups, key=lambda g: str(g["name"]))]
    table = _table(title, "IoU")
    for name in ("all", *(plain(g["name"]) for g in columns[1:])):
        table.add_column(name, justify="right")
    for i, entry in enumerate(whole["classes"]):
        cells = [_percent(c["classes"][i]["iou"]) for c in columns]
        table.add_row(plain(entry["name"]), *cells, end_section=i == len(whole["classes"]) - 1)
    table.add_row("mean", *(_percent(c["miou"]) for c in columns), style="bold")
    table.add_row("all pixels", *(_percent(c["pixel_accuracy"]) for c in columns))
    tiles = [sum(g["tiles"] for g in groups), *(g["tiles"] for g in columns[1:])]
    table.add_row("tiles", *(f"{n:,}" for n in tiles))
    console().print(table)


def _largest_error(group: Mapping[str, Any]) -> str:
    """Return the confusion that cost most pixels, with its share of them; nothing when all are right."""
    names = [c["name"] for c in group["classes"]]
    wrong = [(n, i, j) for i, row in enumerate(group["confusion"]) for j, n in enumerate(row) if i != j and n]
    if not wrong:
        return ""
    count, label, predicted = max(wrong)
    total = sum(map(sum, group["confusion"]))
    return f"{plain(names[label])} as {plain(names[predicted])}, {100 * count / total:.0f}"


def _table(title: str, first: str) -> Table:
    from rich.table import Table

    table = Table(title=plain(title), title_justify="left")
    table.add_column(first, no_wrap=True)
    return table


def _shaded(share: float, count: int, right: bool) -> str:
    """Return whole percent on green where right, on red where wrong, the stronger the more; a dot below 0.5."""
    if not count:
        return ""
    if share < 0.005:
        return "·"
    strength = round(40 + 160 * share)
    ground = f"rgb(0,{round(strength * 0.75)},0)" if right else f"rgb({strength},0,0)"
    return f"[{'bold ' if right else ''}white on {ground}]{100 * share:.0f}[/]"


def _percent(value: float | None, key: str = "") -> str:
    if value is None:
        return "–"
    return f"{100 * value:+.2f}" if key == "overconfidence" else f"{100 * value:.2f}"
