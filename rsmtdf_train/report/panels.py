"""What the arms make of the same tiles: image, label and predictions as data URIs. Tiles are chosen by labels alone.

Shape legend: H W pixels.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.errors import DataError, MismatchError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned
from rsmtdf_cache.sources.base import ClassInfo, TileSource
from rsmtdf_train.report.arms import Arm
from rsmtdf_train.report.runs import RunRecord

if TYPE_CHECKING:
    import torch

__all__ = ["Cell", "Panel", "Panels", "draw_panels", "score_run"]

_SIDE_PX = 256  # larger tiles are shown reduced


@dataclass(frozen=True)
class Cell:
    """A mask as a data URI, and the share in 0..1 of right pixels among labelled ones (None: none is labelled)."""

    uri: str
    right: float | None


@dataclass(frozen=True)
class Panel:
    """One tile; ``predictions`` has a cell for each arm of ``Panels.seeds``."""

    tile: str
    image: str
    label: str
    predictions: tuple[Cell, ...]


@dataclass(frozen=True)
class Panels:
    """``seeds``: arm name → seed of the run whose weights drew its column. ``classes``: those that occur."""

    rows: tuple[Panel, ...]
    seeds: dict[str, int]
    classes: tuple[ClassInfo, ...]
    unlabelled: bool
    attribution: str


def draw_panels(
    arms: Sequence[Arm],
    source: TileSource,
    split: str,
    kind: str,
    tiles: int,
    device: torch.device,
    on_event: EventSink,
) -> Panels:
    """Return pictures of ``tiles`` tiles of ``split``: predictions of one complete run of each arm.

    The seed is the smallest that all these arms have, else each arm's smallest. An arm whose weights are not there or
    cannot be read is left out with a warning. Raises ``DataError`` for a dataset that cannot be read,
    ``MismatchError`` when its classes are not those of the runs.
    """
    from rsmtdf_train.checkpoint import RunFolder, load_deployed
    from rsmtdf_train.predict import predict_mask
    from rsmtdf_train.showcase import choose_tiles

    chosen = choose_tiles(source, split, tiles)
    images = [source.read_image(tile) for tile in chosen]
    labels = [source.read_mask(tile) for tile in chosen]
    there = [arm for arm in arms if arm.complete]
    shared = set.intersection(*({run.seed for run in arm.complete} for arm in there)) if there else set()
    predicted: dict[str, list[NDArray[np.uint8]]] = {}
    seeds: dict[str, int] = {}
    task = "report pictures"
    on_event(ProgressStart(task, "predict the tiles of the pictures", len(there), unit="arms"))
    for arm in there:
        run = next((r for r in arm.complete if r.seed in shared), arm.complete[0])
        _check_classes(run, source)
        try:
            model, _ = load_deployed(RunFolder(run.folder), kind, device)
        except (UsageError, DataError) as error:
            on_event(Warned(f"{arm.name}: no pictures ({error})"))
        else:
            predicted[arm.name] = [predict_mask(model, image, device) for image in images]
            seeds[arm.name] = run.seed
        on_event(Progress(task, 1))
    on_event(ProgressEnd(task))
    rows = tuple(
        Panel(
            tile.id,
            _jpeg(image),
            _mask(label, source.classes),
            tuple(_cell(masks[n], label, source.classes) for masks in predicted.values()),
        )
        for n, (tile, image, label) in enumerate(zip(chosen, images, labels, strict=True))
    )
    seen = {int(v) for mask in (*labels, *(m for masks in predicted.values() for m in masks)) for v in np.unique(mask)}
    classes = tuple(c for number, c in enumerate(source.classes) if number in seen)
    return Panels(rows, seeds, classes, any(v >= len(source.classes) for v in seen), source.attribution)


def score_run(run: RunRecord, source: TileSource, split: str, device: torch.device, on_event: EventSink) -> RunRecord:
    """Return ``run`` with the scores of its weights on ``split``. Raises what loading and scoring raise."""
    from rsmtdf_train.checkpoint import RunFolder, load_deployed
    from rsmtdf_train.evaluate import evaluate
    from rsmtdf_train.results import scores_to_json

    _check_classes(run, source)
    folder = RunFolder(run.folder)
    loaded = {kind: load_deployed(folder, kind, device) for kind in run.scores}
    identity = next(iter(loaded.values()))[1]
    scores = evaluate({kind: model for kind, (model, _) in loaded.items()}, source, split, device, on_event)
    return replace(run, split=split, scores=scores_to_json(identity, split, scores, run.step)["scores"])


def _check_classes(run: RunRecord, source: TileSource) -> None:
    names = tuple(c.name for c in source.classes)
    if run.classes != names:
        raise MismatchError(
            f"{source.root} has the classes {', '.join(names)}; the run {run.folder} knows {', '.join(run.classes)}; "
            "give the dataset it was trained for with --data"
        )


def _cell(mask_HW: NDArray[np.uint8], label_HW: NDArray[np.uint8], classes: Sequence[ClassInfo]) -> Cell:
    counted = label_HW < len(classes)
    right = float((mask_HW == label_HW)[counted].mean()) if counted.any() else None
    return Cell(_mask(mask_HW, classes), right)


def _mask(mask_HW: NDArray[np.uint8], classes: Sequence[ClassInfo]) -> str:
    """Return the mask in the colours of ``classes``, any other number white, as a palette PNG."""
    image = Image.fromarray(np.minimum(mask_HW, len(classes)).astype(np.uint8))
    image.putpalette([v for c in classes for v in c.color] + [255, 255, 255])
    if max(image.size) > _SIDE_PX:
        image = image.resize(_fitted(image.size), Image.Resampling.NEAREST)
    memory = io.BytesIO()
    image.save(memory, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(memory.getvalue()).decode()}"


def _jpeg(image_HW3: NDArray[np.uint8]) -> str:
    image = Image.fromarray(image_HW3)
    if max(image.size) > _SIDE_PX:
        image = image.resize(_fitted(image.size), Image.Resampling.LANCZOS)
    memory = io.BytesIO()
    image.save(memory, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(memory.getvalue()).decode()}"


def _fitted(size: tuple[int, int]) -> tuple[int, int]:
    factor = _SIDE_PX / max(size)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
