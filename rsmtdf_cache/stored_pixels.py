"""Pixels of tiles out of a store: mapped, not decoded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import MismatchError
from rsmtdf_cache.pixels import RGB, VALID
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.tiles import pixel_digest

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = ["StoredPixels", "require_pixels"]


def require_pixels(store: FeatureStore, tile_id: str, image: NDArray[np.uint8]) -> None:
    """Raise ``MismatchError`` when ``store`` was built from other pixels of the tile than ``image``."""
    if pixel_digest(image) != store.tiles.record(store.tiles.row_of(tile_id)).digest:
        raise MismatchError(
            f"tile {tile_id!r}: its pixels are not those that {store.shown} was built from; "
            f"train on the dataset of the store, or build a new store from this one"
        )


class StoredPixels:
    """The pixels that a store holds. As safe among threads, and as good to pickle, as the store is."""

    def __init__(self, store: FeatureStore, rgb: FeatureKey, valid: FeatureKey | None) -> None:
        """Use ``StoredPixels.of``."""
        self.store, self._rgb, self._valid = store, rgb, valid
        held = store.committed(rgb)
        if valid is not None:
            held &= store.committed(valid)
        self._held = held

    @classmethod
    def of(cls, store: FeatureStore) -> StoredPixels | None:
        """Return the pixels of ``store``, None when it holds none."""
        keys = {key.layer: key for key in store.pixel_keys()}
        return cls(store, keys[RGB], keys.get(VALID)) if RGB in keys else None

    @property
    def may_lack_data(self) -> bool:
        """Whether pixels without data are marked; otherwise all tiles hold data everywhere."""
        return self._valid is not None

    def __contains__(self, tile_id: object) -> bool:
        """Return whether the pixels of a tile are there."""
        return isinstance(tile_id, str) and tile_id in self.store.tiles and bool(self._held[self._row(tile_id)])

    def _row(self, tile_id: str) -> int:
        return self.store.tiles.row_of(tile_id)

    def _stored(self, key: FeatureKey, tile_id: str) -> NDArray[np.uint8]:
        """Return what is stored of a tile, ``[tile_px, tile_px, bands]``: as it lies in the shard, if in one piece."""
        row = self._row(tile_id)
        group, place = divmod(row, self.store.manifest.group_rows)
        shard = self.store.shards.of(key).get(group)
        found = None if shard is None else shard.view(place)
        return self.store.read_codes(key, [row]).values[0] if found is None else found

    def image(self, tile_id: str) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px, 3]`` uint8 RGB of a tile that is there, read-only.

        It lies in the mapped shard, so that a crop is copied once, by the caller; a tile larger than a chunk is copied
        here. Raises ``FindingsError`` for a damaged shard, ``UsageError`` for a tile without a row.
        """
        return self._stored(self._rgb, tile_id)

    def valid(self, tile_id: str) -> NDArray[np.bool_] | None:
        """Return ``[tile_px, tile_px]``: where the tile holds data. None: everywhere. Raises as ``image`` does."""
        if self._valid is None:
            return None
        valid: NDArray[np.bool_] = self._stored(self._valid, tile_id)[..., 0] > 0
        return None if valid.all() else valid
