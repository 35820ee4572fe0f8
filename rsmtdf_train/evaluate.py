"""Score a network on whole tiles of a split, in the orientation they are stored in."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_train.fused_student import FusedStudent
from rsmtdf_train.metrics import Scores
from rsmtdf_train.processes import Processes
from rsmtdf_train.scoring.tally import Measures, Tally

__all__ = ["evaluate", "labelled_tiles"]

#: Pixels per forward pass: 16 tiles of 256 px, 4 of 512.
_BATCH_PIXELS = 2**20


def labelled_tiles(source: TileSource, split: str) -> list[Tile]:
    """Return the tiles of ``split`` that have a mask. Raises ``DataError`` for an unknown split, and without any."""
    tiles = [tile for tile in source.tiles([split]) if tile.mask is not None]
    if not tiles:
        raise DataError(f"{source.root}: the tiles of split {split!r} have no masks; scores need labels")
    return tiles


@torch.inference_mode()
def evaluate(
    models: dict[str, FusedStudent],
    source: TileSource,
    split: str,
    device: torch.device,
    on_event: EventSink = ignore_events,
    tiles_at_once: int | None = None,
    processes: Processes | None = None,
    measures: Measures | None = None,
) -> dict[str, Scores]:
    """Return the scores of each of ``models`` (in eval mode) on ``split``; each tile is read once.

    ``measures``: what is scored beside the confusion matrix; its groups hold every tile of ``labelled_tiles``.
    Several processes share the tiles, each tile to one of them, and all return the scores of all tiles: nothing is
    counted twice to fill a last batch.
    Raises ``DataError`` for an unknown or empty split, a split without labels, or a tile that cannot be read.
    """
    tiles = labelled_tiles(source, split)
    size = tiles_at_once or max(1, _BATCH_PIXELS // source.tile_px**2)
    names = [c.name for c in source.classes]
    tallies = {kind: Tally(names, source.ignore_index, measures or Measures()) for kind in models}
    world = processes or Processes()
    mine = tiles[world.rank :: world.count]
    task = f"evaluate {split}"
    on_event(ProgressStart(task, f"evaluate on {split}", len(mine)))
    for some, images, masks in _batches(source, mine, size):
        image = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(255)
        label = torch.from_numpy(masks).to(device).long()
        for kind, model in models.items():
            tallies[kind].add(model.predict(image), label, some)
        on_event(Progress(task, len(some)))
    on_event(ProgressEnd(task))
    for tally in tallies.values():
        tally.add_up(world, device)
    return {kind: tally.scores() for kind, tally in tallies.items()}


_Batch = tuple[list[Tile], NDArray[np.uint8], NDArray[np.uint8]]


def _batches(source: TileSource, tiles: list[Tile], size: int) -> Iterator[_Batch]:
    def read(start: int) -> _Batch:
        some = tiles[start : start + size]
        return some, np.stack([source.read_image(t) for t in some]), np.stack([source.read_mask(t) for t in some])

    if not tiles:  # more processes than tiles
        return
    with ThreadPoolExecutor(1) as pool:  # one batch ahead
        following = pool.submit(read, 0)
        for start in range(0, len(tiles), size):
            current = following.result()
            if start + size < len(tiles):
                following = pool.submit(read, start + size)
            yield current
