"""Which windows the student sees of a scene, how they are blended, and in which strips a wide scene is done.

Windows start at multiples of the student's stride, so that all of them have their tokens where one pass over the whole
scene would have them; the last one may stick out by less than a stride. Where two windows overlap, the outer quarter of
the shared pixels belongs to the other window alone, and a smooth ramp (``3 u^2 - 2 u^3``) leads over the half between:
a student whose receptive field reaches no farther than a quarter of the overlap gives the same map as in one pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import UsageError

__all__ = ["Axis", "BLOCK_PX", "Grid", "Strip", "lay_windows"]

#: Side of the tiles of the output, and the unit of what a stopped run keeps.
BLOCK_PX = 512


@dataclass(frozen=True)
class Axis:
    """The windows along one side of a scene of ``size`` pixels: ``side`` long, at ``starts``, in ascending order."""

    size: int
    side: int
    starts: tuple[int, ...]

    @cached_property
    def weights(self) -> NDArray[np.float32]:
        """How much each window weighs, ``[windows, side]``; the weights of all windows at a pixel add up to 1."""
        centres = np.arange(self.side) + 0.5
        raw = np.ones((len(self.starts), self.side))
        for k, (here, after) in enumerate(itertools.pairwise(self.starts)):
            shared = here + self.side - after
            if shared > 0:
                raw[k] *= _ramp((self.side - centres) / shared)
                raw[k + 1] *= _ramp(centres / shared)
        total = np.zeros(self.starts[-1] + self.side)
        for start, weights in zip(self.starts, raw, strict=True):
            total[start : start + self.side] += weights
        parts = [w / total[s : s + self.side] for s, w in zip(self.starts, raw, strict=True)]
        return np.stack(parts).astype(np.float32)

    def touching(self, start: int, stop: int) -> list[int]:
        """Return the numbers of the windows that cover pixels of ``start .. stop``, ascending."""
        return [k for k, s in enumerate(self.starts) if s < stop and s + self.side > start]

    def after(self, k: int) -> int:
        """Return where the window after window ``k`` starts: pixels before it are final; the end after the last."""
        return self.starts[k + 1] if k + 1 < len(self.starts) else self.size


def _ramp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 0 up to 1/4, 1 from 3/4 on, smooth between; ``ramp(x) + ramp(1 - x) = 1``."""
    u = np.clip(2 * x - 0.5, 0, 1)
    ramp: NDArray[np.float64] = u * u * (3 - 2 * u)
    return ramp


@dataclass(frozen=True)
class Strip:
    """Columns ``x0 .. x1`` of the scene, done from top to bottom before the next strip begins."""

    number: int
    x0: int
    x1: int

    @property
    def width(self) -> int:
        return self.x1 - self.x0


@dataclass(frozen=True)
class Grid:
    """The windows of a scene and the strips it is done in. ``window_px`` and ``overlap_px`` as asked for."""

    rows: Axis
    columns: Axis
    window_px: int
    overlap_px: int
    strip_px: int

    def strips(self) -> Iterator[Strip]:
        """Yield the strips from left to right; all but the last are whole blocks wide."""
        for number, x0 in enumerate(range(0, self.columns.size, self.strip_px)):
            yield Strip(number, x0, min(x0 + self.strip_px, self.columns.size))

    @property
    def forward_count(self) -> int:
        """Windows that are seen when no pixel is without data; those on the border of two strips count twice."""
        return len(self.rows.starts) * sum(len(self.columns.touching(s.x0, s.x1)) for s in self.strips())


def lay_windows(
    height: int,
    width: int,
    multiple_px: int,
    window_px: int | None,
    overlap_px: int | None = None,
    *,
    crop_px: int,
    square: bool = False,
    column_nbytes: int = 0,
    budget_nbytes: int = 0,
) -> Grid:
    """Return the windows of a scene of ``height`` x ``width`` pixels.

    ``window_px``: by default ``crop_px``, the side of the training crops, rounded up to the student's stride: parts of
    a student that see their whole input (attention, squeeze and excitation) were fitted to that side.
    ``overlap_px``: by default a quarter of the window. A scene smaller than a window gets a smaller one, unless it has
    to be ``square``. Strips are as wide as ``budget_nbytes`` allows at ``column_nbytes`` a column of pixels, and
    whole blocks. Raises ``UsageError`` for sides that are no multiples of the student's stride.
    """
    m = multiple_px
    if window_px is None:
        window_px = _up(crop_px, m)
    if window_px < m or window_px % m:
        near = max(m, int(window_px / m + 0.5) * m)
        raise UsageError(f"--window {window_px}: this student reads multiples of {m} px; give {near}")
    if overlap_px is None:
        overlap_px = min(max(int(window_px / 4 / m + 0.5) * m, m), window_px - m)
    if overlap_px % m or not 0 <= overlap_px < window_px:
        raise UsageError(
            f"--overlap {overlap_px}: give a multiple of {m} px, the student's stride, from 0 to {window_px - m}"
        )
    rows, columns = (_axis(size, window_px, overlap_px, m, square) for size in (height, width))
    whole = _up(width, BLOCK_PX)
    strip = whole if not column_nbytes else max(BLOCK_PX, budget_nbytes // column_nbytes // BLOCK_PX * BLOCK_PX)
    return Grid(rows, columns, window_px, overlap_px, min(strip, whole))


def _axis(size: int, window_px: int, overlap_px: int, multiple: int, square: bool) -> Axis:
    padded = _up(size, multiple)
    side = window_px if square else min(window_px, padded)
    last = max(padded - side, 0)
    return Axis(size, side, (*range(0, last, side - overlap_px), last) if last else (0,))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
