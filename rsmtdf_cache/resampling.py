"""Reading a map between its tokens: the one set of weights that crops of a store and maps of a student share.

Pure numpy: reading a store needs no torch. Shape legend: t wanted tokens, s stored ones, along one axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Grid", "interpolation_weights"]


@dataclass(frozen=True)
class Grid:
    """Token centres along one axis: ``offset_px + i * stride_px``, ``i < tokens``."""

    tokens: int
    stride_px: float
    offset_px: float

    @property
    def last_px(self) -> float:
        """The centre of the last token."""
        return self.offset_px + self.stride_px * (self.tokens - 1)

    def centres(self) -> NDArray[np.float64]:
        """Return ``[tokens]`` float64."""
        return self.offset_px + self.stride_px * np.arange(self.tokens, dtype=np.float64)


def interpolation_weights(
    source: Grid,
    wanted: NDArray[np.float64],
    wanted_stride_px: float,
    start: NDArray[Any] | int = 0,
    span: int | None = None,
) -> NDArray[np.float32]:
    """Return ``[..., t, s]`` float32: linear interpolation of ``source`` at ``wanted`` ``[..., t]``; sums over s are 1.

    Where the target is coarser, the triangle is as wide as the target's stride, so that no source token is skipped.
    Beyond the outermost source centre the nearest tokens count. ``start`` ``[...]`` and ``span``: the weights of the
    source tokens ``start .. start + span`` alone (default: all), which must hold all that count.
    """
    width = max(source.stride_px, wanted_stride_px)
    tokens = np.asarray(start)[..., None] + np.arange(source.tokens if span is None else span, dtype=np.float64)
    centres = source.offset_px + source.stride_px * tokens
    inside = wanted.clip(source.offset_px, source.last_px)
    weights = np.maximum(0, 1 - np.abs(inside[..., None] - centres[..., None, :]) / width)
    weights /= weights.sum(-1, keepdims=True)
    return weights.astype(np.float32)
