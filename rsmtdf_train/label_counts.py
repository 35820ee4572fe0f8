"""How many pixels of each class a set of tiles has: for class weights, and to warn of classes that never occur."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.sources.base import TileSource

__all__ = ["count_labels"]


def count_labels(source: TileSource, tile_ids: Sequence[str]) -> Tensor:
    """Return labelled pixels per class of these train tiles, int64 ``[C]``; pixels of ``ignore_index`` do not count.

    Reads every mask once. Raises ``DataError`` for a label outside the classes, a mask that cannot be read, and an id
    that is no train tile.
    """
    tiles = {tile.id: tile for tile in source.tiles(["train"])}
    counts = np.zeros(256, np.int64)
    for tile_id in tile_ids:
        if tile_id not in tiles:
            raise DataError(f"{source.root}: {tile_id!r} is no tile of the train split, where labels are counted")
        counts += np.bincount(source.read_mask(tiles[tile_id]).ravel(), minlength=256)
    return torch.from_numpy(counts[: len(source.classes)].copy())
