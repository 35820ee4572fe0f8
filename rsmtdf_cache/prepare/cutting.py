"""Where the tiles of a scene lie, and their pixels; what lies outside the scene is zero and has no label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.prepare.labels import IGNORE

__all__ = ["Cut", "cut_tile"]


@dataclass(frozen=True)
class Cut:
    """Square tiles of ``tile_px``, each sharing ``overlap_px`` with the next. Raises ``UsageError`` for others."""

    tile_px: int = 512
    overlap_px: int = 0

    def __post_init__(self) -> None:
        if self.tile_px < 1 or not 0 <= self.overlap_px < self.tile_px:
            raise UsageError(
                f"tiles of {self.tile_px} px that overlap by {self.overlap_px} px cannot be cut; a side is at least 1, "
                "an overlap at least 0 and less than the side"
            )

    def starts(self, side_px: int) -> list[int]:
        """Return the first pixel of each tile along a scene's side of ``side_px``; the last may reach beyond it."""
        step = self.tile_px - self.overlap_px
        count = 1 + max(0, -(-(side_px - self.tile_px) // step))
        return [step * i for i in range(count)]

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (first row, first column) of every tile, row by row: upper left first, lower right last."""
        return [(top, left) for top in self.starts(height) for left in self.starts(width)]


def cut_tile(
    image: NDArray[np.uint8], mask: NDArray[np.uint8], place: tuple[int, int], side_px: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image ``[side, side, 3]`` and mask ``[side, side]`` at ``place``: 0 and ``IGNORE`` outside the scene."""
    top, left = place
    pixels = image[top : top + side_px, left : left + side_px]
    labels = mask[top : top + side_px, left : left + side_px]
    missing = (0, side_px - pixels.shape[0]), (0, side_px - pixels.shape[1])
    if missing == ((0, 0), (0, 0)):
        return pixels, labels
    return np.pad(pixels, (*missing, (0, 0))), np.pad(labels, missing, constant_values=IGNORE)
