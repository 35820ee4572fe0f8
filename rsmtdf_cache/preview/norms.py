"""Lengths of tokens as a picture: artefact tokens of large transformers are far longer than their neighbours.

(Darcet et al., "Vision Transformers Need Registers", 2024.) Shape legend: N tiles, h w tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GREY", "Norms", "OUTLIER_COLOR", "outlier_limit", "ramp", "token_lengths", "token_norms"]

#: Colour of tokens above the limit in the norms picture: in no colour map that is used here.
OUTLIER_COLOR = (255, 0, 170)

#: Colour of tokens without a value, in every picture.
GREY = 128


@dataclass(frozen=True)
class Norms:
    """``values`` ``[N, h, w]`` float32, NaN without a token. The colours run from ``low`` to ``high``.

    ``limit``: tokens that are longer are outliers and have a colour of their own.
    """

    values: NDArray[np.float32]
    low: float
    high: float
    limit: float

    @property
    def outliers(self) -> int:
        """How many tokens are longer than the limit."""
        return int((self.values > self.limit).sum())

    def colors(self) -> NDArray[np.uint8]:
        """Return ``[N, h, w, 3]`` uint8: viridis between ``low`` and ``high``."""
        colors = ramp(self.values, self.low, self.high, "viridis")
        colors[self.values > self.limit] = OUTLIER_COLOR
        return colors


def token_norms(features_NhwD: NDArray[Any]) -> Norms:
    """Return the Euclidean length of every token; the scale is the 2nd to 98th percentile of those below the limit."""
    values = token_lengths(features_NhwD.astype(np.float32))
    known = values[np.isfinite(values)]
    limit = outlier_limit(known)
    usual = known[known <= limit]
    low, high = np.percentile(usual, (2, 98)) if len(usual) else (0.0, 1.0)
    return Norms(values, float(low), float(high), limit)


def token_lengths(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return Euclidean lengths ``[...]`` of ``features`` ``[..., D]``, summed in double precision without a copy."""
    squares: NDArray[np.float64] = np.einsum("...d,...d->...", features, features, dtype=np.float64)
    return np.sqrt(squares).astype(np.float32)


def outlier_limit(norms: NDArray[Any]) -> float:
    """Return the length above which a token is an outlier: 5 robust deviations above the median, at least twice it."""
    if not len(norms):
        return 0.0
    median = float(np.median(norms))
    deviation = 1.4826 * float(np.median(np.abs(norms - median)))
    return max(median + 5 * deviation, 2 * median)


def ramp(values: NDArray[Any], low: float, high: float, name: str) -> NDArray[np.uint8]:
    """Return ``[..., 3]`` uint8: ``values`` on the colour map ``name`` between ``low`` and ``high``, grey where NaN."""
    from matplotlib import colormaps

    table = np.rint(colormaps[name](np.arange(256))[:, :3] * 255).astype(np.uint8)
    place = (values - low) / (high - low if high > low else 1.0)
    colors: NDArray[np.uint8] = table[np.rint(np.nan_to_num(place).clip(0, 1) * 255).astype(int)]
    colors[~np.isfinite(values)] = GREY
    return colors
