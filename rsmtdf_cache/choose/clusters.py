"""Distances and k-means on tile vectors: plain numpy, seeded, in blocks of bounded memory.

Shape legend: n tiles, k centres, d components.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events

__all__ = ["cluster", "nearest", "squared_distances", "squared_lengths"]

_BLOCK = 2**22  # distances held at a time
_ROUNDS = 50
_SETTLED = 1e-4  # share by which a round has to lower the cost of a single start for another one to follow
_STARTS, _MANY = 5, 10**7  # the best of so many starts, of one where there are more than so many distances


def squared_distances(
    points: NDArray[np.float32], others: NDArray[np.float32], squares: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return the squared distances ``[n, k]``, at least 0. ``squares`` ``[n]``: of the points' lengths, if known."""
    between: NDArray[np.float32] = points @ others.T
    between *= -2
    between += (squared_lengths(points) if squares is None else squares)[:, None]
    between += squared_lengths(others)
    np.maximum(between, 0, out=between)
    return between


def squared_lengths(points: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the squared lengths ``[n]``."""
    found: NDArray[np.float32] = np.einsum("nd,nd->n", points, points)
    return found


def nearest(points: NDArray[np.float32], centres: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return for each point ``[n]`` the number of its nearest centre, the first of equals, and the squared distance."""
    labels, distances = np.empty(len(points), np.intp), np.empty(len(points), np.float32)
    for here in _blocks(len(points), len(centres)):
        found = squared_distances(points[here], centres)
        labels[here] = found.argmin(1)
        distances[here] = np.take_along_axis(found, labels[here, None], 1)[:, 0]
    return labels, distances


def cluster(
    points: NDArray[np.float32], number: int, seed: int = 0, on_event: EventSink = ignore_events
) -> NDArray[np.intp]:
    """Return the cluster ``[n]`` (0 to ``number - 1``) of each point by k-means from k-means++ starts (Arthur 2007).

    The best of several starts while that is cheap. A cluster is empty only where there are fewer distinct points.
    """
    starts = _STARTS if len(points) * number <= _MANY else 1
    least = _SETTLED if starts == 1 else 0.0
    on_event(ProgressStart("cluster", f"forming {number} clusters", starts * _ROUNDS, unit="rounds"))
    best: tuple[float, NDArray[np.intp]] | None = None
    for start in range(starts):
        rng = np.random.default_rng([seed, start])
        centres = _spread_starts(points, number, rng, on_event)
        labels, distances = nearest(points, centres)
        cost, left = float(distances.sum(dtype=np.float64)), _ROUNDS
        settled = False
        while left and not settled:
            before, paid = labels, cost
            labels, distances = nearest(points, _means(points, labels, distances, number))
            cost = float(distances.sum(dtype=np.float64))
            settled, left = bool((labels == before).all()) or cost > (1 - least) * paid, left - 1
            on_event(Progress("cluster", 1))
        on_event(Progress("cluster", left))
        if best is None or cost < best[0]:
            best = cost, labels
    on_event(ProgressEnd("cluster"))
    assert best is not None
    return best[1]


def _spread_starts(
    points: NDArray[np.float32], number: int, rng: np.random.Generator, on_event: EventSink
) -> NDArray[np.float32]:
    """Return ``[number, d]`` points: each drawn with a chance in proportion to its squared distance to those before."""
    chosen = [int(rng.integers(len(points)))]
    squares = squared_lengths(points)
    distances = squared_distances(points, points[chosen], squares)[:, 0]
    for _ in range(1, number):
        on_event(Progress("cluster", 0))  # a signal to stop is noticed here
        reach = np.cumsum(distances, dtype=np.float64)
        place = int(np.searchsorted(reach, rng.random() * reach[-1], side="right"))
        chosen.append(min(place, len(points) - 1))
        distances = np.minimum(distances, squared_distances(points, points[chosen[-1:]], squares)[:, 0])
    return points[chosen]


def _means(
    points: NDArray[np.float32], labels: NDArray[np.intp], distances: NDArray[np.float32], number: int
) -> NDArray[np.float32]:
    """Return the means of the clusters; one without points moves to a point that is far from its own centre."""
    counts = np.bincount(labels, minlength=number)
    sums = np.zeros((number, points.shape[1]))
    np.add.at(sums, labels, points)
    means = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
    empty = np.flatnonzero(counts == 0)
    means[empty] = points[np.argsort(-distances, kind="stable")[: len(empty)]]
    return means


def _blocks(points: int, others: int) -> Iterator[slice]:
    size = max(1, _BLOCK // max(1, others))
    yield from (slice(start, start + size) for start in range(0, points, size))
