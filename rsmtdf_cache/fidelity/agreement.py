"""How alike what was read and what the live teacher gave are: token by token, and as a whole.

Shape legend: h w tokens of a map, D channels, n tokens of all maps that were added.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.quality import token_cosines

__all__ = ["Agreement", "Tally", "TokenMeans", "linear_cka"]


@dataclass(frozen=True)
class TokenMeans:
    """Means over a part of the tokens: cosine in the teacher's scale, and standardised."""

    tokens: int
    cosine: float
    standardised: float


@dataclass(frozen=True)
class Agreement:
    """Read features against live ones, over ``tokens`` tokens.

    ``cosine``, ``standardised``: mean cosine in the teacher's scale, and after both are standardised per channel by the
    store's statistics, which is what distillation compares; ``…_worst``: mean over the worst 1 %. ``error``: norm of
    the difference, relative to the norm of the live features without their mean (1: as bad as the mean). ``cka``:
    linear centred-kernel alignment, 1 for features equal up to turning and a common scale. None: not defined, for
    nothing varies. ``interior`` and ``edge``: tokens far from and near the crop's border; None for whole tiles.
    """

    tokens: int
    cosine: float
    cosine_worst: float
    standardised: float
    standardised_worst: float
    error: float | None
    cka: float | None
    interior: TokenMeans | None = None
    edge: TokenMeans | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


class Tally:
    """Adds up pairs of maps. Memory: three matrices ``[D, D]`` float64, and two numbers per token."""

    def __init__(self, mean: NDArray[np.float32], std: NDArray[np.float32]) -> None:
        """``mean``, ``std`` ``[D]``: what features are standardised by; channels that never change count nothing."""
        self._mean = mean.astype(np.float64)
        lively = std > 1e-6 * np.maximum(1, np.abs(mean))
        self._gain = np.where(lively, 1 / np.where(lively, std, 1).astype(np.float64), 0.0)
        channels = len(mean)
        self._live, self._read = np.zeros(channels), np.zeros(channels)
        self._products = np.zeros((3, channels, channels))
        self._difference = 0.0
        self._tokens: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]] = []
        self._has_edge = False

    def add(
        self, live: NDArray[Any], read: NDArray[Any], counts: NDArray[np.bool_], edge: NDArray[np.bool_] | None = None
    ) -> None:
        """Add a map ``[h, w, D]`` and what was read for it; ``counts``, ``edge`` ``[h, w]``.

        Tokens that do not count, or are not finite in both, are left out.
        """
        counts = counts & np.isfinite(live).all(-1) & np.isfinite(read).all(-1)
        a, b = live[counts].astype(np.float64), read[counts].astype(np.float64)
        x, y = a - self._mean, b - self._mean
        self._live += x.sum(0)
        self._read += y.sum(0)
        self._products += np.stack([x.T @ x, y.T @ y, x.T @ y])
        self._difference += float(((x - y) ** 2).sum())
        near = np.zeros(len(a), np.bool_) if edge is None else edge[counts]
        self._has_edge |= edge is not None
        self._tokens.append((token_cosines(a, b), token_cosines(x * self._gain, y * self._gain), near))

    def result(self) -> Agreement | None:
        """Return what was seen; None when no token counted."""
        cosine, standardised, near = (np.concatenate(parts) for parts in zip(*self._tokens, strict=True))
        n = len(cosine)
        if n == 0:
            return None
        live, read = self._live, self._read
        xx, yy, xy = (
            product - np.outer(a, b) / n
            for product, a, b in zip(self._products, (live, read, live), (live, read, read), strict=True)
        )
        spread = float(np.trace(xx))
        moves = spread > 1e-12 * max(1.0, float(np.trace(self._products[0])))
        return Agreement(
            n, float(cosine.mean()), _worst(cosine), float(standardised.mean()), _worst(standardised),
            math.sqrt(self._difference / spread) if moves else None, _cka(xx, yy, xy),
            _means(cosine, standardised, ~near) if self._has_edge else None,
            _means(cosine, standardised, near) if self._has_edge else None,
        )  # fmt: skip


def linear_cka(x: NDArray[Any], y: NDArray[Any]) -> float | None:
    """Return the linear centred-kernel alignment of ``[n, D]`` and ``[n, E]``; None when one does not vary.

    ``|Y'X|² / (|X'X| |Y'Y|)`` of centred features, Frobenius norms (Kornblith et al. 2019, eq. 5). It leans towards 1
    when there are fewer tokens than channels; the control with another tile shows by how much.
    """
    x, y = (v.astype(np.float64) - v.astype(np.float64).mean(0) for v in (x, y))
    return _cka(x.T @ x, y.T @ y, x.T @ y)


def _cka(xx: NDArray[np.float64], yy: NDArray[np.float64], xy: NDArray[np.float64]) -> float | None:
    own = float(np.linalg.norm(xx)) * float(np.linalg.norm(yy))
    # Rounding leaves a trace of a constant.
    return float(np.linalg.norm(xy)) ** 2 / own if own > 1e-20 * max(1.0, float(np.linalg.norm(xx))) ** 2 else None


def _worst(cosines: NDArray[np.float64]) -> float:
    return float(np.sort(cosines)[: max(1, math.ceil(len(cosines) / 100))].mean())


def _means(
    cosine: NDArray[np.float64], standardised: NDArray[np.float64], which: NDArray[np.bool_]
) -> TokenMeans | None:
    if not which.any():
        return None
    return TokenMeans(int(which.sum()), float(cosine[which].mean()), float(standardised[which].mean()))
