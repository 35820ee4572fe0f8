"""Orders in which tiles are worth labelling. Tiles come sorted by id, so that of equals the first id is taken.

``typical``: TypiClust (Hacohen, Dekel, Weinshall 2022, section 3.2): as many clusters as tiles asked for, the most
typical tile of each; typicality is the inverse mean distance to the nearest neighbours within the cluster.
``uncertain``: of the same clusters the tile that a probe is least certain of (entropy sampling, Settles 2009, section
3.1), so that the tiles are not all of one kind.
``k-center``: greedy farthest point (Sener, Savarese 2018, algorithm 1) from the most typical tile of all.

Shape legend: n tiles, d components. Distances are those of the vectors, not squared.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.choose.clusters import cluster, nearest, squared_distances, squared_lengths
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events

__all__ = ["Order", "farthest_first", "neighbour_distances", "random_order", "typical_first", "uncertain_first"]

_NEIGHBOURS = 20  # as in the paper
_SMALL = 5  # tiles; the released code of TypiClust leaves smaller clusters out
_REFERENCES = 4096  # neighbours are sought among so many tiles at most
_BLOCK = 2**22  # distances held at a time
_SAME = 1e-3  # share of the length of the vectors: what is nearer is the same tile, the rest is rounding
_ALIKE = 1e-5  # relative: values this close are equal, so that rounding does not choose


@dataclass(frozen=True)
class Order:
    """``chosen``: positions of tiles, the first to label first, without those that are labelled already.

    ``neighbours`` ``[n]``: mean distance to a tile's nearest neighbours, small = typical (NaN without neighbours).
    ``clusters`` ``[n]``: of each tile; None where there are none.
    """

    chosen: list[int]
    neighbours: NDArray[np.float32]
    clusters: NDArray[np.intp] | None = None


def neighbour_distances(
    points: NDArray[np.float32], most: int = _NEIGHBOURS, on_event: EventSink = ignore_events
) -> NDArray[np.float32]:
    """Return the mean distance ``[n]`` of each point to its ``most`` nearest others; half of them where they are few.

    Neighbours are sought among all, or evenly among 4096. NaN for a single point.
    """
    references = points[:: -(-len(points) // _REFERENCES)]
    number = min(most, max(1, len(references) // 2))
    if len(points) < 2:
        return np.full(len(points), np.nan, np.float32)
    found = np.empty(len(points), np.float32)
    size = max(1, _BLOCK // len(references))
    for start in range(0, len(points), size):
        on_event(Progress("order", 0))
        squared = squared_distances(points[start : start + size], references)
        # The nearest one is the point itself; among references that do not hold it, that is one neighbour less.
        near = np.partition(squared, number, axis=1)[:, : number + 1]
        found[start : start + size] = np.sqrt(np.sort(near, axis=1)[:, 1:]).mean(1)
    return np.maximum(found, np.float32(_SAME * np.sqrt(squared_lengths(references).mean())))


def typical_first(
    points: NDArray[np.float32],
    number: int,
    have: Sequence[int] = (),
    seed: int = 0,
    on_event: EventSink = ignore_events,
) -> Order:
    """Return ``number`` tiles beside ``have``: from the least covered clusters, of those the largest first.

    There are as many clusters as tiles in both. One of less than 5 tiles (or half the mean size, where that is less)
    is left to the others, unless nothing else is left.
    """
    return _from_clusters(points, number, have, seed, on_event)


def uncertain_first(
    points: NDArray[np.float32],
    uncertainty: NDArray[np.float32],
    number: int,
    have: Sequence[int] = (),
    seed: int = 0,
    on_event: EventSink = ignore_events,
) -> Order:
    """Return ``number`` tiles beside ``have``: of each cluster that of the largest ``uncertainty`` ``[n]``.

    Clusters are those of ``typical_first``, and small ones are left out alike; of the least covered ones that with the
    most uncertain tile comes first.
    """
    return _from_clusters(points, number, have, seed, on_event, _ranks(-uncertainty))


def _from_clusters(
    points: NDArray[np.float32], number: int, have: Sequence[int], seed: int, on_event: EventSink,
    ranks: NDArray[np.intp] | None = None,
) -> Order:  # fmt: skip
    """Return the tiles of smallest rank from the least covered clusters, of those from that of the smallest rank.

    ``ranks`` ``[n]``; None = tiles by typicality, clusters by size.
    """
    clusters = cluster(points, min(len(points), number + len(have)), seed, on_event)
    sizes = np.bincount(clusters)
    covered = np.bincount(clusters[list(have)], minlength=len(sizes))
    standing = -sizes[clusters] if ranks is None else ranks  # [n], of a cluster by the tile that is its next
    taken = set(have)
    neighbours = np.empty(len(points), np.float32)
    on_event(ProgressStart("order", "choosing tiles", number))
    groups = [g for g in _members(clusters) if len(g)]
    least = min(_SMALL, len(points) / len(groups) / 2)
    waiting: list[tuple[bool, int, int, int, list[int]]] = []  # a heap; the first member tells all of them apart
    for members in groups:
        neighbours[members] = neighbour_distances(points[members], on_event=on_event)
        ranked = np.argsort(_ranks(neighbours[members]) if ranks is None else ranks[members], kind="stable")
        queue = [int(m) for m in members[ranked] if int(m) not in taken]
        if queue:
            number_covered = int(covered[clusters[members[0]]])
            stands = int(standing[queue[0]])
            waiting.append((len(members) < least, number_covered, stands, int(members[0]), queue))
    heapq.heapify(waiting)
    chosen: list[int] = []
    while len(chosen) < number:
        small, times, _, first, queue = heapq.heappop(waiting)
        chosen.append(queue.pop(0))
        if queue:
            heapq.heappush(waiting, (small, times + 1, int(standing[queue[0]]), first, queue))
        on_event(Progress("order", 1))
    on_event(ProgressEnd("order"))
    return Order(chosen, neighbours, clusters)


def farthest_first(
    points: NDArray[np.float32], number: int, have: Sequence[int] = (), on_event: EventSink = ignore_events
) -> Order:
    """Return ``number`` tiles beside ``have``: always the one that is farthest from all before it.

    Without ``have`` the first is the most typical one. A smaller ``number`` gives the beginning of the same list.
    """
    on_event(ProgressStart("order", "choosing tiles", number))
    neighbours = neighbour_distances(points, on_event=on_event)
    chosen: list[int] = []
    squares = squared_lengths(points)
    if have:
        distances = nearest(points, points[list(have)])[1]
        distances[list(have)] = -1.0
    else:
        distances = np.full(len(points), np.inf, np.float32)
    while len(chosen) < number:
        first = not have and not chosen
        place = int(_ranks(neighbours).argmin()) if first else _first_largest(distances)
        chosen.append(place)
        distances = np.minimum(distances, squared_distances(points, points[[place]], squares)[:, 0])
        distances[place] = -1.0
        on_event(Progress("order", 1))
    on_event(ProgressEnd("order"))
    return Order(chosen, neighbours)


def random_order(count: int, number: int, have: Sequence[int] = (), seed: int = 0) -> list[int]:
    """Return ``number`` positions below ``count`` beside ``have``, drawn without replacement: what to compare with."""
    free = np.setdiff1d(np.arange(count), np.asarray(have, int))
    return [int(i) for i in np.random.default_rng([seed, count]).permutation(free)[:number]]


def _members(clusters: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Return the positions in each cluster, ascending."""
    places = np.argsort(clusters, kind="stable")
    return np.split(places, np.cumsum(np.bincount(clusters))[:-1])


def _first_largest(values: NDArray[np.float32]) -> int:
    """Return the first position whose value is the largest but for rounding."""
    most = values.max()
    return int(np.argmax(values >= most - _ALIKE * abs(most)))


def _ranks(values: NDArray[np.float32]) -> NDArray[np.intp]:
    """Return for each value how many smaller ones there are but for repetitions; rounding makes no difference."""
    places = np.argsort(values, kind="stable")
    ordered = values[places].astype(np.float64)
    steps = np.diff(ordered, prepend=ordered[:1]) > _ALIKE * np.abs(ordered)
    ranks = np.empty(len(values), np.intp)
    ranks[places] = np.cumsum(steps)
    return ranks
