"""Runs as one HTML page and as numbers: arms with paired differences, classes, curves, confusion, pictures, speed.

runs (folders → values) → arms (which runs are one arm) → numbers, curves, panels → tables, page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import DataError, RsmtdfError, UsageError
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.files import replace_file
from rsmtdf_cache.sources import TileSource, open_source
from rsmtdf_train.report.arms import Arm, choose_baseline, group_runs
from rsmtdf_train.report.numbers import Numbers, collect
from rsmtdf_train.report.page import render
from rsmtdf_train.report.panels import Panels, draw_panels, score_run
from rsmtdf_train.report.runs import RunRecord, find_runs

__all__ = ["Report", "default_path", "write_report"]


@dataclass(frozen=True)
class Report:
    """What was written. ``tiles``: ids of the tiles in the pictures."""

    path: Path
    nbytes: int
    numbers: Numbers
    tiles: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"out": str(self.path), "nbytes": self.nbytes, **self.numbers.to_json(), "tiles": list(self.tiles)}


def default_path(paths: Sequence[Path]) -> Path:
    """Return ``report.html`` in the one folder that is given, unless that is a run; else in the working directory."""
    if len(paths) == 1 and paths[0].is_dir() and not (paths[0] / "recipe.yaml").is_file():
        return paths[0] / "report.html"
    return Path("report.html")


def write_report(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    data: Path | None = None,
    split: str | None = None,
    tiles: int = 6,
    baseline: str | None = None,
    device: str | None = None,
    context: Mapping[str, Any] | None = None,
    on_event: EventSink = ignore_events,
) -> Report:
    """Write the page on the runs in ``paths`` (run folders, or folders of them) and return what it says.

    ``split``: runs that were scored on another one are scored on it now. ``tiles``: of the pictures, 0: none. A dataset
    that cannot be had leaves the pictures out with a warning, unless ``data`` names it. ``context``: date, command,
    machine, versions, for the page's end.
    Raises ``UsageError`` for what is no run, no baseline or several splits, ``MismatchError`` for runs of different
    classes or another dataset, ``DataError`` for damaged files.
    """
    if tiles < 0:
        raise UsageError(f"--tiles {tiles}: give a number of tiles, 0 for no pictures")
    path = out or default_path(paths)
    if path.is_dir():
        raise UsageError(f"--out {path}: is a folder; give a file, e.g. {path / 'report.html'}")
    runs = find_runs(paths, on_event)
    source: TileSource | None = None
    why = "" if tiles else "Left out as asked."
    again = [run for run in runs if run.complete and split is not None and run.split != split]
    if tiles or again:
        try:
            source = _open_data(runs, data)
        except RsmtdfError as error:
            if data is not None or again:
                raise
            why = f"No pictures: {error}. Name the dataset folder with --data."
            on_event(Warned(f"no pictures: {error}; name the dataset folder with --data"))
    if again and source is not None and split is not None:
        chosen = _device(device)
        scored = {run.folder: score_run(run, source, split, chosen, on_event) for run in again}
        runs = [scored.get(run.folder, run) for run in runs]
    arms = group_runs(runs)
    numbers = collect(arms, choose_baseline(arms, baseline), split)
    panels: Panels | None = None
    if tiles and source is not None:
        panels, why = _panels(arms, source, numbers, tiles, device, data is not None, on_event)
    page = render(numbers, panels, why, context or {}, _title(arms))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = page.encode()
    replace_file(path, content)
    return Report(path, len(content), numbers, tuple(row.tile for row in panels.rows) if panels else ())


def _open_data(runs: Sequence[RunRecord], data: Path | None) -> TileSource:
    return open_source(data if data is not None else Path(runs[0].recipe["data"]))


def _device(name: str | None) -> Any:
    from rsmtdf_train.devices import pick_device

    return pick_device(name)


def _panels(
    arms: Sequence[Arm], source: TileSource, numbers: Numbers, tiles: int, device: str | None, must: bool,
    on_event: EventSink,
) -> tuple[Panels | None, str]:  # fmt: skip
    """Return the pictures, or None and why there are none."""
    if not any(arm.complete for arm in arms):
        return None, "No pictures: no run is complete."
    try:
        panels = draw_panels(arms, source, numbers.split, numbers.checkpoint, tiles, _device(device), on_event)
    except DataError as error:
        if must:
            raise
        on_event(Warned(f"no pictures: {error}"))
        return None, f"No pictures: {error}"
    return (panels, "") if panels.seeds else (None, "No pictures: no arm has weights that can be read.")


def _title(arms: Sequence[Arm]) -> str:
    names = [arm.name for arm in arms]
    return "Report: " + (", ".join(names) if len(", ".join(names)) <= 80 else f"{len(names)} arms")
