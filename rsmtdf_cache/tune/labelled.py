"""Which labelled tiles a probe learns from, and which it is judged on. Test tiles are never looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, TileError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned
from rsmtdf_cache.sources import Tile, TileSource

__all__ = ["LabelledSample", "choose_tiles", "read_sample"]

_HELD_SHARE = 4  # one tile of so many is held out


@dataclass(frozen=True)
class LabelledSample:
    """Images ``[H, W, 3]`` and masks ``[n, H, W]`` uint8 of tiles to learn from and of ``held`` out ones."""

    train: list[Tile]
    held: list[Tile]
    held_from: str
    images: list[NDArray[np.uint8]]  # of train, then of held
    train_masks: NDArray[np.uint8]
    held_masks: NDArray[np.uint8]
    unusable: int = 0


def choose_tiles(source: TileSource, labels: str, count: int) -> tuple[list[Tile], list[Tile], str]:
    """Return tiles to learn from, held-out ones and where those come from; at most ``count`` together.

    ``labels``: ``train`` or a labelled subset. Tiles are taken in the order of a hash of their ids. Held out is a
    quarter: of split ``val`` where that has masks, else of ``labels``: the easternmost tiles where all are
    georeferenced (neighbours resemble each other), others by the same hash. Raises ``DataError`` without labels.
    """
    if labels in ("val", "test"):
        raise UsageError(
            f"--labels {labels}: a probe learns from train or a labelled subset of it, never from {labels}"
        )
    pool = _labelled(source, labels)
    known = source.split_names()
    val = _labelled(source, "val") if "val" in known else []
    if len(pool) < 2 or len(pool) + len(val) < 4:
        raise DataError(
            f"{source.root}: {len(pool)} tiles of {labels} and {len(val)} of val have a mask; tune trains a linear "
            "probe on labelled tiles and judges it on others, at least 2 of each. Add masks, or take sizes and times "
            "alone from `rsmtdf cache plan`"
        )
    if len(val) >= 2:
        held = val[: max(2, count // _HELD_SHARE, count - len(pool))]
        return pool[: max(2, count - len(held))], held, "split val"
    pool = pool[:count]
    number = max(2, len(pool) // _HELD_SHARE)
    if all(t.georeference is not None for t in pool):
        ordered = sorted(pool, key=lambda t: (t.georeference.affine[2] if t.georeference else 0.0, t.id))
        return ordered[:-number], ordered[-number:], f"the easternmost of {labels}"
    return pool[number:], pool[:number], labels


def read_sample(source: TileSource, labels: str, count: int, on_event: EventSink) -> LabelledSample:
    """Return the chosen tiles with their pixels and labels; tiles whose image cannot be used are left out, and said.

    Raises ``DataError`` when the rest is too little: one class to learn, no labelled pixel to judge by.
    """
    train, held, held_from = choose_tiles(source, labels, count)
    on_event(ProgressStart("labelled", "reading labelled tiles", len(train) + len(held)))
    bad: list[str] = []
    kept: tuple[list[Tile], list[Tile]] = ([], [])
    images, masks = [], []
    for into, tiles in zip(kept, (train, held), strict=True):
        for tile in tiles:
            try:
                image = source.read_image(tile)
            except TileError as error:
                bad.append(str(error))
            else:
                images.append(image)
                masks.append(source.read_mask(tile))
                into.append(tile)
            on_event(Progress("labelled", 1))
    on_event(ProgressEnd("labelled"))
    if bad:
        on_event(Warned(f"{len(bad)} tiles cannot be used and are left out: {'; '.join(bad[:3])}"))
    cut = len(kept[0])
    side = source.tile_px
    learned, judged = (np.stack(m) if m else np.zeros((0, side, side), np.uint8) for m in (masks[:cut], masks[cut:]))
    classes = np.setdiff1d(np.unique(learned), [source.ignore_index])
    if len(classes) < 2 or len(kept[1]) < 2 or not (judged != source.ignore_index).any():
        raise DataError(
            f"{source.root}: {len(kept[0])} tiles of {labels} show {len(classes)} classes, {len(kept[1])} held-out "
            "tiles were read; a probe needs two classes to learn and two labelled tiles for its test; add --tiles"
        )
    return LabelledSample(*kept, held_from, images, learned, judged, len(bad))


def _labelled(source: TileSource, split: str) -> list[Tile]:
    return _in_hash_order([t for t in source.tiles([split]) if t.mask is not None])


def _in_hash_order(tiles: Sequence[Tile]) -> list[Tile]:
    return sorted(tiles, key=lambda t: hashlib.sha256(t.id.encode()).digest())
