"""A dataset at a glance: tiles and class shares of every split, what leaks between splits, every fault there is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, TileError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_cache.sources.scenes import read_scenes
from rsmtdf_cache.tiles import pixel_digest

__all__ = ["Duplicate", "SplitSurvey", "Survey", "class_pixels", "survey"]


@dataclass(frozen=True)
class Duplicate:
    """Two tiles of different splits with the same image, pixel by pixel: what is scored was trained on."""

    id: str
    split: str
    other_id: str
    other_split: str


@dataclass(frozen=True)
class SplitSurvey:
    """One split: its tiles, and the share of each class and of ignored pixels among those with image and mask."""

    tiles: int
    class_shares: tuple[float, ...] | None
    ignored_share: float | None


@dataclass(frozen=True)
class Survey:
    """What ``survey`` found. With a ``dataset_fault`` nothing can be built; ``tile_faults`` cost a tile each.

    ``duplicates`` and ``shared_scenes`` (scenes with tiles in several splits, as far as ``scenes.csv`` tells) are no
    faults: a score on such splits says less of unseen places.
    """

    splits: dict[str, SplitSurvey]
    dataset_fault: str | None
    tile_faults: tuple[TileError, ...]
    duplicates: tuple[Duplicate, ...] = ()
    shared_scenes: dict[str, list[str]] = field(default_factory=dict)


def survey(source: TileSource, on_event: EventSink = ignore_events) -> Survey:
    """Return tiles, class shares and faults of ``source``; every image and mask of train, val and test is decoded.

    Shares are None where no tile has a mask, and everywhere when the dataset as a whole is at fault.
    """
    try:
        source.check()
        tiles = source.tiles()
        shared = _shared_scenes(source, tiles)
    except DataError as error:
        return Survey(_split_sizes(source), str(error), ())
    faults: list[TileError] = []
    counts: dict[str, NDArray[np.int64]] = {}
    digests: dict[bytes, list[Tile]] = {}
    on_event(ProgressStart("survey", f"reading {source.name}", len(tiles)))
    with _pool() as pool:
        for tile, (fault, count, digest) in zip(tiles, pool.map(lambda tile: _read(source, tile), tiles), strict=True):
            if fault is not None:
                faults.append(fault)
            if count is not None:
                counts[tile.id] = count
            if digest is not None:
                digests.setdefault(digest, []).append(tile)
            on_event(Progress("survey", 1))
    on_event(ProgressEnd("survey"))
    splits: dict[str, SplitSurvey] = {}
    for name in source.split_names():
        ids = source.split(name)
        total = sum((counts[i] for i in ids if i in counts), np.zeros(len(source.classes) + 1, np.int64))
        shares = [float(v) / int(total.sum()) for v in total] if total.any() else None
        splits[name] = SplitSurvey(len(ids), tuple(shares[:-1]) if shares else None, shares[-1] if shares else None)
    return Survey(splits, None, tuple(faults), _duplicates(digests), shared)


def class_pixels(source: TileSource, tiles: Sequence[Tile]) -> NDArray[np.int64]:
    """Return ``[classes + 1]`` pixel counts over the masks of ``tiles``; the last entry counts ignored pixels.

    Tiles without a mask do not count. Raises what ``source.read_mask`` raises.
    """
    with _pool() as pool:
        counts = pool.map(lambda tile: _count(source, tile), [tile for tile in tiles if tile.mask is not None])
        return sum(counts, np.zeros(len(source.classes) + 1, np.int64))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _count(source: TileSource, tile: Tile) -> NDArray[np.int64]:
    values = np.bincount(source.read_mask(tile).ravel(), minlength=256)
    return np.append(values[: len(source.classes)], values[source.ignore_index]).astype(np.int64)


def _read(source: TileSource, tile: Tile) -> tuple[TileError | None, NDArray[np.int64] | None, bytes | None]:
    """Return the tile's fault, or its class counts and the digest of its image; of an image in one colour none."""
    try:
        image = source.read_image(tile)
    except TileError as error:
        return error, None, None
    plain = bool((image == image[0, 0]).all())  # two tiles of sea or of no data say nothing of each other
    digest = None if plain else pixel_digest(image)
    return None, _count(source, tile) if tile.mask is not None else None, digest


def _duplicates(digests: Mapping[bytes, Sequence[Tile]]) -> tuple[Duplicate, ...]:
    """Return each tile that is in an earlier split too, with the first one there; ordered as the tiles are."""
    found = []
    for first, *others in digests.values():
        found += [Duplicate(first.id, first.split, o.id, o.split) for o in others if o.split != first.split]
    return tuple(sorted(found, key=lambda d: (d.other_split, d.other_id)))


def _shared_scenes(source: TileSource, tiles: Sequence[Tile]) -> dict[str, list[str]]:
    cells = read_scenes(source.root)
    homes: dict[str, dict[str, None]] = {}
    for tile in tiles:
        if tile.id in cells:
            homes.setdefault(cells[tile.id].scene, {})[tile.split] = None
    return {scene: list(splits) for scene, splits in sorted(homes.items()) if len(splits) > 1}


def _split_sizes(source: TileSource) -> dict[str, SplitSurvey]:
    sizes: dict[str, SplitSurvey] = {}
    for name in source.split_names():
        try:
            sizes[name] = SplitSurvey(len(source.split(name)), None, None)
        except DataError:
            sizes[name] = SplitSurvey(0, None, None)
    return sizes
