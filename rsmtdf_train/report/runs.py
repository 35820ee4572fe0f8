"""Run folders as values: recipe, log, validation and final scores; of a run that is not complete what there is.

Nothing of PyTorch is needed to read a run.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_train.pictures import read_log
from rsmtdf_train.recipe import load_recipe

__all__ = ["Curve", "RunRecord", "find_runs", "read_run"]

#: Column name → values by entry, with ``step`` among them; NaN where an entry lacks the column.
Curve = Mapping[str, NDArray[np.float64]]

_DEPTH = 3  # folders below a given one in which runs are looked for


@dataclass(frozen=True)
class RunRecord:
    """One run. ``scores`` is that of ``metrics.json`` by checkpoint kind, empty while the run is not complete.

    ``label``: its folder, as short as tells it from the others. ``step``: steps done of ``steps`` (None: not known).
    """

    folder: Path
    label: str
    name: str
    seed: int
    recipe: Mapping[str, Any]
    snapshot: str | None
    store: str | None
    complete: bool
    step: int
    steps: int | None
    split: str
    deployed: str
    classes: tuple[str, ...]
    scores: Mapping[str, Any]
    log: Curve
    validation: Curve
    validation_split: str | None

    @property
    def mode(self) -> str:
        """Return the target mode of the recipe."""
        return str(self.recipe["targets"])

    def miou(self, kind: str) -> float | None:
        """Return mean IoU of a checkpoint kind in 0..1, None when it was not scored."""
        return _number(self.scores.get(kind, {}).get("miou"))

    def iou(self, kind: str, name: str) -> float | None:
        """Return the IoU of class ``name`` in 0..1, None when it was not scored."""
        for entry in self.scores.get(kind, {}).get("classes", ()):
            if entry["name"] == name:
                return _number(entry["iou"])
        return None

    def confusion(self, kind: str) -> NDArray[np.int64] | None:
        """Return counts ``[C, C]`` (label, prediction), None for a run whose metrics lack them."""
        counts = self.scores.get(kind, {}).get("confusion")
        if counts is None:
            return None
        found = np.asarray(counts, np.int64)
        return found if found.shape == (len(self.classes), len(self.classes)) else None


def find_runs(paths: Sequence[Path], on_event: EventSink = ignore_events) -> list[RunRecord]:
    """Return the runs that are, or lie up to three folders below, ``paths``, in order, each once.

    Raises ``UsageError`` for a path that holds no run, ``DataError`` for a run whose files are damaged.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        below = list(_runs_below(path, _DEPTH))
        if not below:
            what = "holds no run (no recipe.yaml in it or below)" if path.is_dir() else "is no folder"
            raise UsageError(f"{path}: {what}; give run folders of `rsmtdf train`, or a folder of such folders")
        for folder in below:
            found.setdefault(folder.resolve(), folder)
    runs = [read_run(folder, on_event) for folder in found.values()]
    common = Path(os.path.commonpath([p.parent for p in found]))
    return [
        replace(run, label=resolved.relative_to(common).as_posix()) for run, resolved in zip(runs, found, strict=True)
    ]


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "recipe.yaml").is_file():
        yield folder
    elif depth > 0 and folder.is_dir():
        for below in sorted(p for p in folder.iterdir() if p.is_dir()):
            yield from _runs_below(below, depth - 1)


def read_run(folder: Path, on_event: EventSink = ignore_events) -> RunRecord:
    """Return the run in ``folder``. Raises ``UsageError`` when there is none, ``DataError`` for damaged files."""
    if not (folder / "recipe.yaml").is_file():
        raise UsageError(f"{folder}: not a run folder (no recipe.yaml); give the folder of --out")
    recipe = load_recipe(folder / "recipe.yaml")
    metrics = _metrics(folder)
    log: Curve = {}
    if (folder / "log.jsonl").is_file():
        try:
            log = read_log(folder / "log.jsonl")
        except DataError as error:
            on_event(Warned(f"{error}; its curves are left out"))
    store = _store(folder, on_event)
    validation, split = _validation(folder, on_event)
    step = int(log["step"][-1]) + 1 if log else 0
    return RunRecord(
        folder=folder,
        label=folder.name,
        name=recipe.name,
        seed=recipe.seed,
        recipe=recipe.model_dump(mode="json"),
        snapshot=metrics["store"] if metrics else store[1],
        store=store[0],
        complete=metrics is not None,
        step=int(metrics["step"]) if metrics else step,
        steps=recipe.steps,
        split=str(metrics["split"]) if metrics else recipe.eval_split,
        deployed=str(metrics.get("checkpoint", "ema")) if metrics else "ema",
        classes=tuple(metrics["classes"]) if metrics else (),
        scores=metrics["scores"] if metrics else {},
        log=log,
        validation=validation,
        validation_split=split,
    )


def _metrics(folder: Path) -> dict[str, Any] | None:
    """Return ``metrics.json``, None while there is none."""
    path = folder / "metrics.json"
    if not path.is_file():
        return None
    try:
        metrics: dict[str, Any] = json.loads(path.read_text())
        _ = metrics["store"], int(metrics["step"]), metrics["split"], [str(c) for c in metrics["classes"]]
        for kind in metrics["scores"].values():
            _ = kind["miou"], [(c["name"], c["iou"]) for c in kind["classes"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not the scores of a run ({type(error).__name__}: {error}); delete the file and run the same "
            "`rsmtdf train` again, which scores the run anew"
        ) from None
    return metrics


def _store(folder: Path, on_event: EventSink) -> tuple[str | None, str | None]:
    """Return place and snapshot of the store that the run reads, None each when it noted none."""
    from rsmtdf_train.run_store import read_run_store

    try:
        noted = read_run_store(folder)
    except DataError as error:
        on_event(Warned(str(error)))
        return None, None
    return (noted.store, noted.snapshot) if noted is not None else (None, None)


def _validation(folder: Path, on_event: EventSink) -> tuple[Curve, str | None]:
    """Return ``step`` and ``KIND`` (mean IoU in 0..1) of ``validation.jsonl``, and the split of its last line."""
    path = folder / "validation.jsonl"
    if not path.is_file():
        return {}, None
    text = path.read_text()
    entries: dict[int, dict[str, float]] = {}
    split = None
    try:
        for line in text[: text.rfind("\n") + 1].splitlines():
            entry = json.loads(line)
            split = str(entry["split"])
            scores = {kind: _number(s["miou"]) for kind, s in entry["scores"].items()}
            entries[int(entry["step"])] = {k: math.nan if v is None else v for k, v in scores.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        on_event(Warned(f"{path}: not one object with step, split and scores a line ({error}); its curve is left out"))
        return {}, None
    if not entries:
        return {}, None
    steps = sorted(entries)
    kinds = sorted({kind for entry in entries.values() for kind in entry})
    columns = {kind: np.array([entries[s].get(kind, math.nan) for s in steps]) for kind in kinds}
    return {"step": np.array(steps, float), **columns}, split


def _number(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None
