"""One scene to one map: read a row of windows ahead, segment, blend, keep finished blocks, write the files."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import ResourceError, RsmtdfError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import build_lock, make_folders, require_space
from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.rasters.scene import Scene, open_scene
from rsmtdf_train.scenes.blend import BandBuffer, windows_at_once
from rsmtdf_train.scenes.geotiff import LEVELS, NODATA, REQUEST_TAG, recorded_request, write_layers
from rsmtdf_train.scenes.pieces import Pieces, workroom
from rsmtdf_train.scenes.request import (
    BUFFER_NBYTES,
    MapPlan,
    MapRequest,
    map_state,
    map_tags,
    plan_map,
)
from rsmtdf_train.scenes.segmenter import WindowSegmenter
from rsmtdf_train.scenes.windows import BLOCK_PX, Grid, Strip

if TYPE_CHECKING:  # a map by an exported file needs no torch
    import torch

__all__ = ["MapReport", "blended_rows", "describe_map", "map_scene"]


@dataclass(frozen=True)
class MapReport:
    """What was made. ``made``: False when the files were there already, as asked for.

    ``shares``: of each class in the pixels with data, None for what was not counted; ``nodata``: share of the others.
    """

    scene: Path
    files: dict[str, Path]
    made: bool
    width: int
    height: int
    crs: str | None
    shares: dict[str, float] | None
    nodata: float | None


def describe_map(segmenter: WindowSegmenter, request: MapRequest, on_event: EventSink = ignore_events) -> MapPlan:
    """Return what the map would take. The scene is opened and checked as for the map; nothing is written."""
    with gdal_settings(), open_scene(request.scene, request.bands, request.scale, segmenter.pixels) as scene:
        plan = plan_map(segmenter, request, scene)
        scene.require_whole()
        _warn(scene, on_event)
    return plan


def map_scene(
    segmenter: WindowSegmenter,
    request: MapRequest,
    device: torch.device | None,
    on_event: EventSink = ignore_events,
    budget_nbytes: int = BUFFER_NBYTES,
) -> MapReport:
    """Write the map of a scene of any size in bounded memory. ``device``: where a loaded student lies.

    A stopped run leaves its finished blocks in a hidden folder beside ``request.out``, and the same request continues
    from them to the same bytes; files get their names when they are complete. Raises ``DataError`` for a scene that
    cannot be used, ``UsageError`` for a request that cannot be met or a file in its place, ``MismatchError`` for the
    unfinished map of another request.
    """
    with gdal_settings(), open_scene(request.scene, request.bands, request.scale, segmenter.pixels) as scene:
        plan = plan_map(segmenter, request, scene, budget_nbytes)
        scene.require_whole()
        _warn(scene, on_event)
        for layer in plan.layers:
            try:
                make_folders(layer.out.parent)
            except OSError as error:
                raise ResourceError(
                    f"{layer.out.parent}: cannot be made ({error.strerror}); give another --out"
                ) from None
        room = workroom(request.out)
        with build_lock(room / "lock", lambda: on_event(Warned(f"{request.out}: another process makes it; waiting"))):
            return _made(segmenter, request, scene, plan, device, on_event)


def _warn(scene: Scene, on_event: EventSink) -> None:
    if scene.affine is None:
        on_event(Warned(f"scene {scene.path} has no georeference: the map will have none either"))
    elif scene.crs is None:
        on_event(Warned(f"scene {scene.path} has no CRS: the map keeps its coordinates, which no GIS can place"))


def _made(
    segmenter: WindowSegmenter,
    request: MapRequest,
    scene: Scene,
    plan: MapPlan,
    device: torch.device | None,
    on_event: EventSink,
) -> MapReport:
    classes = segmenter.classes
    tags = map_tags(segmenter, request, scene, plan)
    pieces = Pieces(workroom(request.out), plan.planes, scene.height)
    state = map_state(segmenter, request, scene, plan) | {"strip_px": plan.grid.strip_px}
    try:
        counts = None
        if not _complete(plan, tags[REQUEST_TAG]):
            needed = 2 * sum(plan.output_nbytes.values()) // 4  # pieces and files, at a quarter of their pixels
            require_space(request.out.parent, needed, "map and its pieces", "make room or give another --out")
            pieces.begin(state)
            _segment(segmenter, request, scene, plan, pieces, device, on_event)
            counts = write_layers(plan.layers, pieces, plan.grid, scene, classes, tags, request.cog, on_event)
    except RsmtdfError:
        if not any(pieces.folder.glob("*.zlib")):
            _clear(plan, pieces)
        raise
    _clear(plan, pieces)
    data = None if counts is None else int(counts.sum() - counts[NODATA])
    return MapReport(
        scene=request.scene,
        files={layer.kind: layer.out for layer in plan.layers},
        made=counts is not None,
        width=scene.width,
        height=scene.height,
        crs=scene.crs_name,
        shares=None
        if counts is None
        else {c.name: float(counts[n] / max(data or 0, 1)) for n, c in enumerate(classes)},
        nodata=None if counts is None else float(counts[NODATA] / counts.sum()),
    )


def _complete(plan: MapPlan, digest: str) -> bool:
    """Whether all files are there, as asked for. Raises ``UsageError`` for a file that is something else."""
    there = [layer for layer in plan.layers if layer.out.exists()]
    for layer in there:
        if recorded_request(layer.out) != digest:
            raise UsageError(
                f"{layer.out} is there and is not this map (another student, scene or setting, or no map); give "
                "another name or delete it"
            )
    return len(there) == len(plan.layers)


def _clear(plan: MapPlan, pieces: Pieces) -> None:
    for layer in plan.layers:
        room = workroom(layer.out)
        if room != pieces.folder and room.is_dir():
            layer.draft.unlink(missing_ok=True)
            if not any(room.iterdir()):
                room.rmdir()
    pieces.remove()


def _segment(
    segmenter: WindowSegmenter,
    request: MapRequest,
    scene: Scene,
    plan: MapPlan,
    pieces: Pieces,
    device: torch.device | None,
    on_event: EventSink,
) -> None:
    """Make all pieces that are not there."""
    starts = [(strip, pieces.first_missing(strip)) for strip in plan.grid.strips()]
    done = sum(min(block * BLOCK_PX, scene.height) * strip.width for strip, block in starts)
    on_event(ProgressStart("map", "segment", scene.width * scene.height, done=done, unit="pixels"))
    with_confidence = any(layer.kind == "confidence" for layer in plan.layers)
    with_all = any(layer.kind == "probabilities" for layer in plan.layers)
    for strip, block in starts:
        if block == pieces.blocks:
            continue
        planes = np.empty((plan.planes, pieces.rows(block), strip.width), np.uint8)
        filled = 0
        finished = blended_rows(segmenter, scene, plan.grid, strip, block * BLOCK_PX, request.tta, device)
        with closing(finished):  # its reader ends before the scene is closed, whatever ends this
            for probabilities, valid in finished:
                rows = _planes(probabilities, valid, with_confidence, with_all)
                on_event(Progress("map", rows.shape[1] * rows.shape[2]))
                while rows.shape[1]:
                    count = min(rows.shape[1], planes.shape[1] - filled)
                    planes[:, filled : filled + count] = rows[:, :count]
                    rows, filled = rows[:, count:], filled + count
                    if filled == planes.shape[1]:
                        pieces.write(strip, block, planes)
                        block, filled = block + 1, 0
                        planes = planes[:, : pieces.rows(block)] if block < pieces.blocks else planes
    on_event(ProgressEnd("map"))


def blended_rows(
    segmenter: WindowSegmenter,
    scene: Scene,
    grid: Grid,
    strip: Strip,
    y0: int,
    tta: bool,
    device: torch.device | None,
) -> Generator[tuple[NDArray[np.float32], NDArray[np.bool_]], None, None]:
    """Yield probabilities ``[C, n, width]`` and which pixels hold data ``[n, width]``, of the strip's rows from ``y0``.

    Probabilities are views of a buffer: use them before the next ones are asked for. Windows without any data are not
    segmented.
    """
    rows, columns = grid.rows, grid.columns
    across = columns.touching(strip.x0, strip.x1)
    left, right = columns.starts[across[0]], columns.starts[across[-1]] + columns.side
    down = rows.touching(y0, scene.height)
    buffer = BandBuffer(len(segmenter.classes), rows.side, strip.x0, strip.width)
    buffer.begin(rows.starts[down[0]])
    # one shape of batches for the whole scene, whatever its strips: other shapes may have other bits
    count = min(windows_at_once(device, max(rows.side, columns.side)), len(columns.starts))
    with ThreadPoolExecutor(1) as pool:

        def read(i: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
            return scene.read(rows.starts[i], rows.starts[i] + rows.side, left, right)

        following = pool.submit(read, down[0])
        for i in down:
            pixels, valid = following.result()
            if i != down[-1]:
                following = pool.submit(read, i + 1)
            places = {k: slice(columns.starts[k] - left, columns.starts[k] - left + columns.side) for k in across}
            wanted = [k for k in across if valid[:, places[k]].any()]
            for first in range(0, len(wanted), count):
                some = wanted[first : first + count]
                windows = [pixels[:, :, places[k]] for k in some]
                made = segmenter.window_probabilities(windows, device, count=count, tta=tta)
                for k, window in zip(some, made, strict=True):
                    buffer.add(columns.starts[k], window, rows.weights[i], columns.weights[k])
            shown = valid[:, strip.x0 - left : strip.x1 - left]
            for y, part in buffer.finished(rows.after(i)):
                skip = max(y0 - y, 0)
                if skip < part.shape[1]:
                    top = y - rows.starts[i]
                    yield part[:, skip:], shown[top + skip : top + part.shape[1]]


def _planes(
    probabilities_CHW: NDArray[np.float32], valid_HW: NDArray[np.bool_], with_confidence: bool, with_all: bool
) -> NDArray[np.uint8]:
    """Return the bytes of a few rows, ``[planes, n, width]``: class numbers, confidence and probabilities as asked.

    Of equal classes the first is chosen.
    """
    best, chosen = probabilities_CHW[0].copy(), np.zeros(valid_HW.shape, np.uint8)
    for number, probability in enumerate(probabilities_CHW[1:], start=1):  # argmax, but along whole rows of memory
        higher = probability > best
        np.copyto(chosen, number, where=higher, casting="unsafe")
        np.copyto(best, probability, where=higher)
    parts = [chosen[None]]
    if with_confidence:
        parts.append(_levels(best)[None])
    if with_all:
        parts.append(_levels(probabilities_CHW))
    planes = np.concatenate(parts)
    planes[:, ~valid_HW] = NODATA
    return planes


def _levels(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    return np.asarray((np.clip(probabilities, 0, 1) * LEVELS + 0.5).astype(np.uint8))
