"""Crops of tiles with their cached targets: image, label and features cut by one box in one oriented frame."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.allocate import Allocator, page_empty
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.errors import DataError, MismatchError
from rsmtdf_cache.pixels import VALID
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_cache.stored_pixels import StoredPixels, require_pixels
from rsmtdf_train.geometry import CropGeometry
from rsmtdf_train.sample import Sample
from rsmtdf_train.sampler import Draw
from rsmtdf_train.targets.base import TargetMode, TargetRequest

__all__ = ["TileDataset"]


class _ByteCache:
    """The arrays used last, up to ``limit`` bytes. Threads may share it; a value never changes once it is in."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._items: OrderedDict[str, tuple[NDArray[Any], ...]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> tuple[NDArray[Any], ...] | None:
        """Return the arrays of ``key``, or None."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: str, *arrays: NDArray[Any]) -> None:
        """Keep ``arrays``, dropping what was used longest ago. Arrays larger than the limit are not kept."""
        size = sum(a.nbytes for a in arrays)
        with self._lock:
            if size > self.limit or key in self._items:
                return
            self._items[key] = arrays
            self.nbytes += size
            while self.nbytes > self.limit:
                self.nbytes -= sum(a.nbytes for a in self._items.popitem(last=False)[1])


class TileDataset:
    """The train tiles of ``source``. Decoded tiles stay in memory up to ``memory_bytes``; threads may share it."""

    def __init__(
        self,
        source: TileSource,
        targets: TargetMode | None,
        geometry: CropGeometry,
        memory_bytes: int = 2 * 2**30,
        left_out: Collection[str] = (),
        pixels: StoredPixels | None = None,
    ) -> None:
        """Raise ``MismatchError`` when tiles, geometry and targets do not fit each other.

        ``left_out``: ids of tiles that the build of the store quarantined; no arm of a comparison sees them.
        ``pixels``: what a store holds is read there, mapped, and no image is decoded; the samples are the same.
        """
        if source.tile_px != geometry.tile_px:
            raise MismatchError(
                f"{source.root} has tiles of {source.tile_px} px, the store holds features of tiles of "
                f"{geometry.tile_px} px; use the store that was built from this dataset"
            )
        self.source = source
        self.targets = targets
        self.geometry = geometry
        tiles = [tile for tile in source.tiles(["train"]) if tile.id not in left_out]
        self.left_out = frozenset(left_out)
        self._tiles: dict[str, Tile] = {tile.id: tile for tile in tiles}
        self._rows = {tile.id: row for row, tile in enumerate(tiles)}
        if targets is not None:
            targets.check_tiles(self._tiles, source.root)
            self._rows = {tile_id: targets.row_of(tile_id) for tile_id in self._tiles}
        self._decoded: _ByteCache = _ByteCache(memory_bytes)
        self._known: set[str] = set()
        self.pixels = pixels
        # Of all tiles without labels the same one: it takes one byte.
        self._unlabeled: NDArray[np.uint8] = np.broadcast_to(np.uint8(source.ignore_index), (source.tile_px,) * 2)
        self._labeled: set[str] = set()

    @property
    def tile_ids(self) -> list[str]:
        """Return the ids of all train tiles."""
        return list(self._tiles)

    def labeled_ids(self, subset: str) -> list[str]:
        """Return the tiles of a labelled subset. Raises ``DataError`` when it is unknown or leaves the train split."""
        ids = [tile_id for tile_id in self.source.split(subset) if tile_id not in self.left_out]
        if not ids:
            raise DataError(f"{self.source.root}: every tile of the labelled subset {subset!r} is quarantined")
        foreign = [tile_id for tile_id in ids if tile_id not in self._tiles]
        if foreign:
            raise DataError(
                f"{self.source.root}: labelled subset {subset!r} names {len(foreign)} tiles that are not in the train "
                f"split, e.g. {foreign[0]!r}; labelled subsets are subsets of train"
            )
        self._labeled.update(ids)
        return ids

    def sample(self, draw: Draw) -> Sample:
        """Return the crop that ``draw`` describes (geometry only; photometry and CutMix come with the batch)."""
        return self.samples([draw])[0]

    def samples(self, draws: Sequence[Draw], features: bool = True) -> list[Sample]:
        """Return the crops of ``draws``, with views of what ``codes`` reads of them, or without ``features``.

        Raises ``TileError`` for a tile that cannot be read, ``MismatchError`` for one whose pixels are not those of
        the store.
        """
        read = self.codes(draws) if features else {}
        return [self._cut(draw, {key: codes[n] for key, codes in read.items()}) for n, draw in enumerate(draws)]

    def codes(self, draws: Sequence[Draw], empty: Allocator = page_empty) -> dict[str, Codes]:
        """Return the features of ``draws`` as they are stored, ``{key: codes [n, h, w]}``; see ``TargetMode.read``."""
        if self.targets is None:
            return {}
        return self.targets.read(self._requests(draws), empty)

    @property
    def remote(self) -> bool:
        """Whether what is read may have to be fetched from another machine first."""
        return (self.targets is not None and self.targets.remote) or (
            self.pixels is not None and self.pixels.store.remote
        )

    def will_read(self, draws: Sequence[Draw], features: bool = True) -> None:
        """Hear that pixels and, unless ``features`` is False, features of ``draws`` are read soon."""
        if self.targets is not None and features:
            self.targets.will_read(self._requests(draws))
        if self.pixels is not None and self.pixels.store.remote:
            store = self.pixels.store
            ids = [d.tile_id for d in draws if d.tile_id in self.pixels]
            for key in store.pixel_keys():
                # validity is read with the label, and kept with it
                wanted = ids if key.layer != VALID else [i for i in ids if self._decoded.get(i) is None]
                store.will_read(key, map(store.tiles.row_of, wanted))

    def _requests(self, draws: Sequence[Draw]) -> list[TargetRequest]:
        return [TargetRequest(self._rows[d.tile_id], d.orientation, d.box, d.cut.view) for d in draws]

    def _cut(self, draw: Draw, features: dict[str, Codes]) -> Sample:
        image, label, *held = self._decode(draw.tile_id)
        crop_px = self.geometry.crop_px
        valid = draw.cut.valid(len(image), crop_px)
        if held:  # a cut as of labels: nearest pixels, nothing where the tile ends
            valid &= draw.cut.label(held[0], crop_px, 0) > 0
        return Sample(
            tile_id=draw.tile_id,
            row=self._rows[draw.tile_id],
            orientation=draw.orientation,
            image=draw.cut.image(image, crop_px),
            label=draw.cut.label(label, crop_px, self.source.ignore_index),
            valid=valid,
            features=features,
        )

    def _decode(self, tile_id: str) -> tuple[NDArray[np.uint8], ...]:
        """Return image, label and, where the tile lacks data, validity: of the whole tile."""
        if self.pixels is not None and tile_id in self.pixels:
            return self.pixels.image(tile_id), *self._beside(self.pixels, tile_id)
        found = self._decoded.get(tile_id)
        if found is None:
            tile = self._tiles[tile_id]
            image, valid = self.source.read_valid(tile)
            if self.targets is not None and tile_id not in self._known:
                self.targets.check_pixels(tile_id, image)
                self._known.add(tile_id)
            mask = self._mask(tile)
            found = (image, mask) if valid is None else (image, mask, valid.astype(np.uint8))
            self._decoded.put(tile_id, *found)
        return found

    def _beside(self, pixels: StoredPixels, tile_id: str) -> tuple[NDArray[np.uint8], ...]:
        """Return label and validity of a tile whose pixels are stored; validity only where data is lacking."""
        found = self._decoded.get(tile_id)
        if found is None:
            tile, valid = self._tiles[tile_id], pixels.valid(tile_id)
            if tile_id in self._labeled and tile_id not in self._known and tile.image.is_file():
                # Labels are of this dataset, pixels of the store: they must be of the same tile, not of the same name.
                require_pixels(pixels.store, tile_id, self.source.read_image(tile))
                self._known.add(tile_id)
            mask = self._mask_beside(tile)
            if valid is not None:
                mask = np.where(valid, mask, np.uint8(self.source.ignore_index))
            found = (mask,) if valid is None else (mask, valid.astype(np.uint8))
            self._decoded.put(tile_id, *found)
        return found

    def _mask_beside(self, tile: Tile) -> NDArray[np.uint8]:
        """Return the labels of a tile whose pixels are stored; of unlabelled tiles they only score pseudo-labels."""
        if tile.id in self._labeled or tile.image.is_file():
            return self._mask(tile)
        try:
            return self._mask(tile)
        except DataError:  # where labels lie in a scene is read off its image, and that need not be there
            return self._unlabeled

    def _mask(self, tile: Tile) -> NDArray[np.uint8]:
        return self._unlabeled if tile.mask is None else self.source.read_mask(tile)
