"""Which tile comes when, and how it is cut: a function of seed and position, of nothing else.

No state is carried from one sample to the next, so neither the number of threads nor the step a run resumes at can
change a batch, and two arms with one seed see the same tiles, crops and photometry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.views import Box
from rsmtdf_train.augment import NO_CUTMIX, CutMixBox, draw_cutmix_box
from rsmtdf_train.geometry import DEFAULT_LATTICE_PX, CropGeometry, Cut, Geometry
from rsmtdf_train.photometry import PhotometricParameters, draw_photometric
from rsmtdf_train.sections import AugmentConfig

__all__ = [
    "DEFAULT_LATTICE_PX",
    "Draw",
    "Geometry",
    "LABELED",
    "Stream",
    "UNLABELED",
]

LABELED = 0
UNLABELED = 1

_ORDER, _GEOMETRY, _PHOTOMETRY, _CUTMIX, _SECOND_PHOTOMETRY, _SECOND_CUTMIX = range(6)


@dataclass(frozen=True)
class Draw:
    """All that is random about one sample."""

    tile_id: str
    epoch: int
    cut: Cut
    photometric: PhotometricParameters
    cutmix_box: CutMixBox = NO_CUTMIX

    @property
    def orientation(self) -> int:
        """Return how the tile is turned before it is cut."""
        return self.cut.orientation

    @property
    def box(self) -> Box:
        """Return what is cut, in pixels of the turned (and, by the native geometry, resized) tile."""
        return self.cut.box


class Stream:
    """An endless sequence of draws over ``tile_ids``: each epoch is a permutation, each position is independent.

    The tile at a position and the parameters of a tile in an epoch are keyed by ``(seed, stream, epoch, tile id)``;
    neither row numbers nor the order of ``tile_ids`` enter.
    """

    def __init__(
        self, tile_ids: Sequence[str], stream: int, seed: int, geometry: CropGeometry, augment: AugmentConfig
    ) -> None:
        self.tile_ids = tuple(sorted(tile_ids))
        if not self.tile_ids:
            raise ValueError("a stream needs at least one tile")
        self.stream = stream
        self.seed = seed
        self.geometry = geometry
        self.augment = augment
        self._order = lru_cache(maxsize=4)(self._permutation)

    def place(self, position: int) -> tuple[int, str]:
        """Return ``(epoch, tile id)`` at ``position`` 0, 1, 2, …; each tile comes once per epoch."""
        epoch, index = divmod(position, len(self.tile_ids))
        return epoch, self.tile_ids[int(self._order(epoch)[index])]

    def draw(self, position: int) -> Draw:
        """Return the tile at ``position`` and its parameters."""
        epoch, tile_id = self.place(position)
        name = _number(tile_id)
        cut = self.geometry.draw(self._rng(_GEOMETRY, epoch, name), self.augment.orientations)
        return Draw(
            tile_id=tile_id,
            epoch=epoch,
            cut=cut,
            photometric=draw_photometric(self._rng(_PHOTOMETRY, epoch, name), self.augment),
            cutmix_box=draw_cutmix_box(self._rng(_CUTMIX, epoch, name), self.augment.cutmix_p, self.geometry.crop_px),
        )

    def draws(self, step: int, size: int) -> list[Draw]:
        """Return the draws of batch ``step``: positions ``step * size`` up to ``(step + 1) * size``."""
        return [self.draw(position) for position in range(step * size, (step + 1) * size)]

    def second_view(self, draw: Draw) -> tuple[PhotometricParameters, CutMixBox]:
        """Return photometry and CutMix box of another strong view of ``draw``; the first view stays what it is."""
        key = (draw.epoch, _number(draw.tile_id))
        return (
            draw_photometric(self._rng(_SECOND_PHOTOMETRY, *key), self.augment),
            draw_cutmix_box(self._rng(_SECOND_CUTMIX, *key), self.augment.cutmix_p, self.geometry.crop_px),
        )

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return self._rng(_ORDER, epoch).permutation(len(self.tile_ids))

    def _rng(self, purpose: int, *key: int) -> np.random.Generator:
        # One generator per purpose: a recipe that changes the photometry keeps tiles, crops and CutMix boxes.
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.stream, purpose, *key])))


def _number(tile_id: str) -> int:
    return int.from_bytes(hashlib.sha256(tile_id.encode()).digest()[:8])
