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

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.views import Box
from rsmtdf_train.augment import (
    NO_CUTMIX,
    CutMixBox,
    PhotometricParameters,
    draw_cutmix_box,
    draw_photometric,
)
from rsmtdf_train.sections import AugmentConfig

__all__ = [
    "DEFAULT_LATTICE_PX",
    "Draw",
    "Geometry",
    "LABELED",
    "Stream",
    "UNLABELED",
]

#: The lattice of the default views (decision 9); crops of a run without a store lie on it too.
DEFAULT_LATTICE_PX = 32

LABELED = 0
UNLABELED = 1

_ORDER, _GEOMETRY, _PHOTOMETRY, _CUTMIX = range(4)


@dataclass(frozen=True)
class Geometry:
    """Which crops there are: ``crop_px`` squares at multiples of ``lattice_px`` in one of ``orientations``."""

    tile_px: int
    crop_px: int
    lattice_px: int = DEFAULT_LATTICE_PX
    orientations: tuple[int, ...] = tuple(range(8))

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for a crop that no tile holds or that the lattice does not divide."""
        if not self.orientations:
            raise UsageError("no orientation is stored for every feature array; build them with one --orientations")
        if self.crop_px > self.tile_px:
            raise UsageError(
                f"crop_px {self.crop_px} is larger than the tiles of {self.tile_px} px; "
                f"choose a multiple of {self.lattice_px} up to {self.tile_px // self.lattice_px * self.lattice_px}"
            )
        if self.crop_px % self.lattice_px:
            below = self.crop_px // self.lattice_px * self.lattice_px
            near = [px for px in (below, below + self.lattice_px) if 0 < px <= self.tile_px]
            raise UsageError(
                f"crop_px {self.crop_px} is not on the lattice of {self.lattice_px} px, the coarsest token of the "
                f"features; choose {' or '.join(map(str, near)) or f'a multiple of {self.lattice_px}'}"
            )

    def draw(self, rng: np.random.Generator, turn: bool = True) -> tuple[int, Box]:
        """Return an orientation and a box in its frame. ``turn`` False takes the first orientation, same box."""
        u, v, w = rng.random(3)
        places = (self.tile_px - self.crop_px) // self.lattice_px + 1
        orientation = self.orientations[int(u * len(self.orientations))] if turn else self.orientations[0]
        y, x = int(v * places) * self.lattice_px, int(w * places) * self.lattice_px
        return orientation, Box(y, x, self.crop_px, self.crop_px)


@dataclass(frozen=True)
class Draw:
    """All that is random about one sample."""

    tile_id: str
    epoch: int
    orientation: int
    box: Box
    photometric: PhotometricParameters
    cutmix_box: CutMixBox = NO_CUTMIX


class Stream:
    """An endless sequence of draws over ``tile_ids``: each epoch is a permutation, each position is independent.

    The tile at a position and the parameters of a tile in an epoch are keyed by ``(seed, stream, epoch, tile id)``;
    neither row numbers nor the order of ``tile_ids`` enter.
    """

    def __init__(
        self, tile_ids: Sequence[str], stream: int, seed: int, geometry: Geometry, augment: AugmentConfig
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
        name = int.from_bytes(hashlib.sha256(tile_id.encode()).digest()[:8])
        orientation, box = self.geometry.draw(self._rng(_GEOMETRY, epoch, name), self.augment.orientations)
        return Draw(
            tile_id=tile_id,
            epoch=epoch,
            orientation=orientation,
            box=box,
            photometric=draw_photometric(self._rng(_PHOTOMETRY, epoch, name), self.augment),
            cutmix_box=draw_cutmix_box(self._rng(_CUTMIX, epoch, name), self.augment.cutmix_p, self.geometry.crop_px),
        )

    def draws(self, step: int, size: int) -> list[Draw]:
        """Return the draws of batch ``step``: positions ``step * size`` up to ``(step + 1) * size``."""
        return [self.draw(position) for position in range(step * size, (step + 1) * size)]

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return self._rng(_ORDER, epoch).permutation(len(self.tile_ids))

    def _rng(self, purpose: int, *key: int) -> np.random.Generator:
        # One generator per purpose: a recipe that changes the photometry keeps tiles, crops and CutMix boxes.
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.stream, purpose, *key])))
