"""Scores of the map of whole scenes, at the pixels of a split's tiles.

What differs from scoring tile by tile is what the student sees: windows over the whole scene, blended where they
overlap, in place of tiles that end at their edges. Pixels, labels and counts are the same.

Shape legend: C classes, T side of a tile.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.rasters.scene import Scene, open_scene
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_train.evaluate import labelled_tiles
from rsmtdf_train.metrics import Scores
from rsmtdf_train.scenes.map_scene import blended_rows
from rsmtdf_train.scenes.request import BUFFER_NBYTES, scene_grid
from rsmtdf_train.scenes.segmenter import WindowSegmenter
from rsmtdf_train.scenes.windows import Grid, Strip
from rsmtdf_train.scoring.tally import Measures, Tally

__all__ = ["SceneWindows", "score_scenes"]


@dataclass(frozen=True)
class SceneWindows:
    """Windows over scenes: sides in pixels, None for those a map has. ``tta``: mean over eight turns of each."""

    window_px: int | None = None
    overlap_px: int | None = None
    tta: bool = False


def score_scenes(
    segmenters: Mapping[str, WindowSegmenter],
    source: TileSource,
    split: str,
    windows: SceneWindows,
    device: torch.device,
    on_event: EventSink = ignore_events,
    measures: Measures | None = None,
    budget_nbytes: int = BUFFER_NBYTES,
) -> tuple[dict[str, Scores], SceneWindows]:
    """Return the scores of each student on ``split``, and the windows they were made with.

    Values become pixels as for the tiles of ``source``. Memory: a row of windows and a row of tiles, of strips of a
    scene. Raises ``UsageError`` for a dataset whose tiles are files and for sides that do not fit the student,
    ``DataError`` for an unknown split, a split without labels, and a scene or label that cannot be read.
    """
    tiles = labelled_tiles(source, split)
    if any(tile.origin_px is None for tile in tiles):
        raise UsageError(
            f"--whole-scenes: the tiles of {source.root} are files of their own, and nothing around them is known; lay "
            "scenes out as tiles with `rsmtdf data tile`, or score tile by tile"
        )
    scenes = {tile.image: [t for t in tiles if t.image == tile.image] for tile in tiles}
    names = [c.name for c in source.classes]
    tallies = {kind: Tally(names, source.ignore_index, measures or Measures()) for kind in segmenters}
    task = f"evaluate {split}"
    used = windows
    on_event(ProgressStart(task, f"evaluate on whole scenes of {split}", len(tiles) * len(segmenters)))
    with gdal_settings():
        for path, some in scenes.items():
            with open_scene(path, learned=source.pixels) as scene:
                scene.require_whole()
                for kind, segmenter in segmenters.items():
                    grid = scene_grid(segmenter, scene, windows.window_px, windows.overlap_px)
                    used = SceneWindows(grid.window_px, grid.overlap_px, windows.tta)
                    band = max(grid.rows.side, source.tile_px) * (8 * len(names) + 28)
                    width = max(source.tile_px, budget_nbytes // band)
                    for strip, inside in _strips(some, source.tile_px, scene.width, width):
                        made = _tiles(segmenter, scene, grid, strip, inside, source.tile_px, windows.tta, device)
                        with closing(made):  # its reader ends before the scene is closed, whatever ends this
                            for tile, probabilities in made:
                                _count(tallies[kind], tile, probabilities, source, device)
                                on_event(Progress(task, 1))
    on_event(ProgressEnd(task))
    return {kind: tally.scores() for kind, tally in tallies.items()}, used


def _count(tally: Tally, tile: Tile, probabilities_CTT: torch.Tensor, source: TileSource, device: torch.device) -> None:
    p = probabilities_CTT[None].to(device)
    label = torch.from_numpy(source.read_mask(tile))[None].to(device).long()
    tally.add_predicted(p.argmax(dim=1), p, label, [tile])


def _strips(tiles: Sequence[Tile], tile_px: int, width: int, widest: int) -> Iterator[tuple[Strip, list[Tile]]]:
    """Yield columns of the scene with the tiles that lie in them whole; each tile once, in the first strip it fits."""
    left = sorted(tiles, key=lambda t: (_column(t), _row(t)))
    number = 0
    while left:
        x0 = _column(left[0])
        inside = [t for t in left if _column(t) + tile_px <= x0 + widest]
        x1 = min(max(_column(t) + tile_px for t in inside), width)
        yield Strip(number, x0, x1), sorted(inside, key=_row)
        left = [t for t in left if _column(t) + tile_px > x0 + widest]
        number += 1


def _row(tile: Tile) -> int:
    assert tile.origin_px is not None
    return tile.origin_px[0]


def _column(tile: Tile) -> int:
    assert tile.origin_px is not None
    return tile.origin_px[1]


def _tiles(
    segmenter: WindowSegmenter,
    scene: Scene,
    grid: Grid,
    strip: Strip,
    tiles: Sequence[Tile],
    tile_px: int,
    tta: bool,
    device: torch.device,
) -> Generator[tuple[Tile, torch.Tensor], None, None]:
    """Yield each of ``tiles`` (by row) with its blended probabilities ``[C, T, T]``; 0 beyond the scene."""
    classes = len(segmenter.classes)
    waiting = list(tiles)
    begun: list[tuple[Tile, torch.Tensor]] = []
    y = _row(waiting[0])
    finished = blended_rows(segmenter, scene, grid, strip, y, tta, device)
    with closing(finished):
        for rows, _ in finished:
            below = y + rows.shape[1]
            while waiting and _row(waiting[0]) < below:
                begun.append((waiting.pop(0), torch.zeros(classes, tile_px, tile_px)))
            for tile, p in begun:
                top, x = max(_row(tile), y), _column(tile) - strip.x0
                bottom = min(_row(tile) + tile_px, below)
                part = torch.from_numpy(np.ascontiguousarray(rows[:, top - y : bottom - y, x : x + tile_px]))
                p[:, top - _row(tile) : bottom - _row(tile), : part.shape[2]] = part
            y = below
            complete = [b for b in begun if min(_row(b[0]) + tile_px, scene.height) <= y]
            begun = begun[len(complete) :]  # by row, and of one side: the first ones end first
            yield from complete
            if not waiting and not begun:
                return
