"""Comparing candidates on the same held-out tiles, and the rule by which one is recommended.

Tiles are the unit of chance: neighbouring pixels are not independent. Every candidate is scored on the same resamples
of tiles (a paired bootstrap), so that what makes a tile hard for all of them cancels. The interval is the estimate plus
or minus Student's quantile times the bootstrap deviation, corrected for few tiles. It covers the choice of held-out
tiles, not that of the tiles that the probe learned from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["EQUAL_WITHIN", "Interval", "TileBootstrap", "pareto_front", "recommend", "verdict_of"]

#: mIoU differences that lie within this are called equal.
EQUAL_WITHIN = 0.01


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """Return plain data."""
        return asdict(self)


class TileBootstrap:
    """Scores of confusion counts ``[m, C, C]`` (label, prediction) of the same ``m`` tiles.

    mIoU is the mean over the classes that are labelled in the tiles at hand, in each resample too; a class that is
    predicted where it is never labelled costs the classes that it was taken for.
    """

    def __init__(self, tiles: int, draws: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._shares = rng.multinomial(tiles, np.full(tiles, 1 / tiles), size=draws).astype(np.float64)
        self._factor = _student_95(tiles - 1) * math.sqrt(tiles / (tiles - 1)) if tiles > 1 else math.inf

    def score(self, confusions: Tensor) -> Interval:
        """Return mIoU with its interval, within 0..1."""
        value, draws = self._values(confusions)
        half = self._half(draws)
        return Interval(value, max(0.0, value - half), min(1.0, value + half))

    def difference(self, confusions: Tensor, baseline: Tensor) -> Interval:
        """Return the paired difference of mIoU, ``confusions`` minus ``baseline``."""
        (a, draws_a), (b, draws_b) = self._values(confusions), self._values(baseline)
        half = self._half(draws_a - draws_b)
        return Interval(a - b, a - b - half, a - b + half)

    def _half(self, draws: NDArray[np.float64]) -> float:
        return self._factor * float(draws.std())

    def _values(self, confusions: Tensor) -> tuple[float, NDArray[np.float64]]:
        counts = confusions.numpy().astype(np.float64)
        tiles, classes, _ = counts.shape
        sums = self._shares @ counts.reshape(tiles, -1)
        return float(_miou(counts.sum(0)[None])[0]), _miou(sums.reshape(-1, classes, classes))


def _miou(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``[k]`` of ``[k, C, C]``; 0 where nothing is labelled."""
    hits = np.diagonal(counts, axis1=1, axis2=2)
    labelled = counts.sum(2)
    union = labelled + counts.sum(1) - hits
    there = labelled > 0
    iou = np.where(there, hits / np.maximum(union, 1), 0.0)
    return np.asarray(iou.sum(1) / np.maximum(there.sum(1), 1))


def pareto_front(nbytes: Sequence[int], scores: Sequence[float]) -> list[int]:
    """Return the positions that nothing beats: none is as small and better, or smaller and as good; smallest first.

    Of equals in both the first counts.
    """
    front: list[int] = []
    for i in sorted(range(len(nbytes)), key=lambda i: (nbytes[i], -scores[i], i)):
        if not front or scores[i] > scores[front[-1]]:
            front.append(i)
    return front


def verdict_of(difference: Interval) -> str:
    """Return how a candidate stands to the best one: ``equal`` (within a point), ``worse``, or ``inconclusive``."""
    if difference.low >= -EQUAL_WITHIN and difference.high <= EQUAL_WITHIN:
        return "equal"
    if difference.high < 0:
        return "worse"
    return "better" if difference.low > 0 else "inconclusive"


def recommend(nbytes: Sequence[int], differences: Sequence[Interval], max_loss: float | None = None) -> int:
    """Return the position of the smallest candidate that holds its ground against the best.

    ``differences``: to the best one, whose own is zero. ``max_loss`` None: the interval must not lie below zero (the
    candidate cannot be told from the best). Else: it must not reach below ``-max_loss`` (a larger loss is ruled out).
    Among equally large ones the better estimate wins.
    """
    good = [i for i, d in enumerate(differences) if (d.high >= 0 if max_loss is None else d.low >= -max_loss)]
    return min(good, key=lambda i: (nbytes[i], -differences[i].mean, i))


def _student_95(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t: exact for 1 and 2, else Cornish-Fisher (within 0.5 %)."""
    if freedom <= 2:
        return {1: 12.706, 2: 4.303}.get(freedom, math.inf)
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom ** (n + 1) for n, term in enumerate(terms))
