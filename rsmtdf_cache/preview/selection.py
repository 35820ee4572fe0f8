"""What is drawn: which tiles with their pixels, which arrays with their tokens' places, and the patch to compare with.

Shape legend: N tiles, h w tokens, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import TileError, UsageError, did_you_mean
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import FeatureKey, FeatureSpec
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tiles import pixel_digest
from rsmtdf_cache.views import inverse_orientation, orient, orient_point

__all__ = ["Selection", "ShownArray", "ShownTile", "select"]

#: Maps of more tokens than this along a side are drawn thinned out: a picture has no more pixels for them.
_SIDE_TOKENS = 96


@dataclass(frozen=True)
class ShownTile:
    """A tile of the store. ``image``: ``[H, W, 3]`` uint8, None when its pixels are not at hand."""

    id: str
    split: str
    row: int
    image: NDArray[np.uint8] | None


@dataclass(frozen=True)
class ShownArray:
    """An array of the store, turned back into the tiles' own frame.

    Shown token ``(i, j)`` is centred at ``first_px + stride_px * (i, j)`` in tile pixels. Every ``step``-th token is
    shown, ``grid`` of them.
    """

    key: FeatureKey
    spec: FeatureSpec
    first_px: tuple[float, float]
    stride_px: float
    step: int
    grid: tuple[int, int]

    def read(self, store: FeatureStore, row: int) -> NDArray[np.float32]:
        """Return the shown tokens ``[h, w, D]`` of a tile, NaN where the store has none."""
        features = store.read(self.key, [row])
        whole = np.where(features.valid[0, ..., None], features.values[0], np.float16(np.nan))
        return self._thin(orient(whole, inverse_orientation(self.spec.view.orientation))).astype(np.float32)

    def nearest(self, y: float, x: float) -> tuple[int, int]:
        """Return the shown token ``(i, j)`` whose centre is nearest to a point of the tile, in tile pixels."""
        places = [(p - first) / self.stride_px for p, first in zip((y, x), self.first_px, strict=True)]
        i, j = (min(max(math.floor(p + 0.5), 0), n - 1) for p, n in zip(places, self.grid, strict=True))
        return i, j

    def _thin(self, tokens: NDArray[np.float16]) -> NDArray[np.float16]:
        return tokens[self.step // 2 :: self.step, self.step // 2 :: self.step]


@dataclass(frozen=True)
class Selection:
    """What is drawn. ``patch``: tile id and point (y, x) in tile pixels that similarities are taken to."""

    store: FeatureStore
    tiles: tuple[ShownTile, ...]
    arrays: tuple[ShownArray, ...]
    patch: tuple[str, float, float]

    @property
    def patch_tile(self) -> int:
        """Position of the patch's tile among ``tiles``."""
        return [t.id for t in self.tiles].index(self.patch[0])


def select(
    store: FeatureStore,
    source: TileSource | None = None,
    tiles: int | Sequence[str] = 6,
    arrays: Sequence[str] = (),
    patch: tuple[str, float, float] | None = None,
    on_event: EventSink = ignore_events,
) -> Selection:
    """Return what is to be drawn of ``store``.

    ``tiles``: ids, or how many, spread evenly over the tiles that have features of all chosen arrays (of a remote
    store: of its first row group, so that one shard per array is fetched). ``arrays``: patterns such as ``dino*/*/*``;
    default: all whole views in the tiles' own orientation. ``patch``: tile id, y, x in tile pixels; default: the centre
    of the first tile. A tile whose pixels are missing, or are not those that its features were made of, is drawn
    without them, with a warning.

    Raises ``UsageError`` for unknown names, for tiles without features, and when ``source`` has none of the tiles.
    """
    shown = [_place(store, key) for key in _choose_arrays(store, arrays)]
    shown.sort(key=lambda a: (a.key.teacher, -a.spec.view.size_px, -a.spec.grid[0], a.key.layer, a.key.view))
    rows = _choose_rows(store, [a.key for a in shown], source, tiles)
    if patch is not None:
        rows = _with_patch(store, shown, rows, patch)
    images = _images(store, source, rows, on_event)
    records = [store.tiles.record(row) for row in rows]
    found = tuple(ShownTile(r.id, r.split, row, image) for r, row, image in zip(records, rows, images, strict=True))
    return Selection(store, found, tuple(shown), patch or (found[0].id, store.tile_px / 2, store.tile_px / 2))


def _choose_arrays(store: FeatureStore, patterns: Sequence[str]) -> list[FeatureKey]:
    keys, names = store.keys(), [str(k) for k in store.keys()]
    lost = [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
    if lost:
        raise UsageError(
            f"--array {lost[0]!r} fits no array of {store.shown}.{did_you_mean(lost[0], names)} It holds: "
            f"{', '.join(names)}"
        )
    asked = [k for k in keys if any(fnmatchcase(str(k), p) for p in patterns)] if patterns else keys
    whole = [k for k in asked if store.spec(k).view.is_whole]
    chosen = whole if patterns else [k for k in whole if store.spec(k).view.orientation == 0]
    if not chosen:
        kind = "that shows a whole tile" if patterns else "of whole tiles in their own orientation"
        raise UsageError(
            f"{store.shown}: none of {len(asked)} arrays is one {kind}; `rsmtdf cache info` lists them, --array "
            "'teacher/view/layer' chooses"
        )
    return chosen


def _place(store: FeatureStore, key: FeatureKey) -> ShownArray:
    spec = store.spec(key)
    step = math.ceil(max(spec.grid) / _SIDE_TOKENS)
    back = inverse_orientation(spec.view.orientation)
    index = np.moveaxis(np.indices(spec.grid), 0, -1)
    kept = orient(index, back)[step // 2 :: step, step // 2 :: step]
    i, j = (int(n) for n in kept[0, 0])
    stride, offset = spec.stride_tile_px, spec.offset_tile_px
    first = orient_point(offset + i * stride, offset + j * stride, store.tile_px, back)
    return ShownArray(key, spec, first, stride * step, step, (kept.shape[0], kept.shape[1]))


def _choose_rows(
    store: FeatureStore, keys: Sequence[FeatureKey], source: TileSource | None, tiles: int | Sequence[str]
) -> list[int]:
    held = np.logical_and.reduce([store.committed(k) for k in keys])
    if not isinstance(tiles, int):
        return [_row(store, keys, name) for name in dict.fromkeys(tiles)] or _choose_rows(store, keys, source, 0)
    rows = [int(r) for r in np.flatnonzero(held)]
    if source is not None:
        at_hand = {tile.id for tile in source.tiles()}
        rows = [r for r in rows if store.tiles.ids[r] in at_hand]
    if not rows or tiles < 1:
        where = "" if source is None else f" and are in {source.root}"
        raise UsageError(
            f"{tiles} tiles of {store.shown}: {len(rows)} tiles have features of all {len(keys)} arrays{where}; ask "
            "for at least one tile, for fewer arrays (--array), or name the folder of the dataset"
        )
    if "://" in store.shown:
        size = store.manifest.group_rows
        rows = [r for r in rows if r // size == rows[0] // size]
    return [rows[i] for i in np.linspace(0, len(rows) - 1, min(tiles, len(rows))).astype(int)]


def _row(store: FeatureStore, keys: Sequence[FeatureKey], name: str) -> int:
    if name not in store.tiles or not name:
        known = [i for i in store.tiles.ids if i]
        raise UsageError(
            f"{store.shown} has no tile {name!r}.{did_you_mean(name, known)} It has {len(known)} tiles, the first are "
            f"{', '.join(known[:3])}"
        )
    row = store.tiles.row_of(name)
    missing = [str(k) for k in keys if not store.committed(k)[row]]
    if missing:
        raise UsageError(
            f"tile {name!r} of {store.shown} has no features of {', '.join(missing[:3])}{' …' if missing[3:] else ''}; "
            "finish the build (`rsmtdf cache build` continues), or choose other tiles or arrays (--tiles, --array)"
        )
    return row


def _with_patch(
    store: FeatureStore, shown: Sequence[ShownArray], rows: list[int], patch: tuple[str, float, float]
) -> list[int]:
    name, y, x = patch
    if not (0 <= y < store.tile_px and 0 <= x < store.tile_px):
        raise UsageError(f"--patch {name}:{y:g},{x:g}: y and x are tile pixels, 0 to {store.tile_px - 1}")
    row = _row(store, [a.key for a in shown], name)
    return rows if row in rows else [row, *rows]


def _images(
    store: FeatureStore, source: TileSource | None, rows: Sequence[int], on_event: EventSink
) -> list[NDArray[np.uint8] | None]:
    if source is None:
        return [None] * len(rows)
    tiles = {tile.id: tile for tile in source.tiles()}
    if not any(store.tiles.ids[row] in tiles for row in rows):
        raise UsageError(
            f"{source.root} has none of the {len(rows)} tiles asked for; name the dataset that {store.shown} was built "
            "from, or none"
        )
    images: list[NDArray[np.uint8] | None] = []
    for row in rows:
        record = store.tiles.record(row)
        image, fault = None, f"{source.root} does not have it"
        if record.id in tiles:
            try:
                image = source.read_image(tiles[record.id])
                fault = f"its pixels in {source.root} are not those that the features were made of"
            except TileError as error:
                fault = error.reason
        if image is None or pixel_digest(image) != record.digest:
            on_event(Warned(f"tile {record.id!r} is drawn without its image: {fault}"))
            image = None
        images.append(image)
    return images
