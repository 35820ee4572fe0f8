"""Boundary F1 pixel by pixel, as its definition reads: for tests of the quick way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["slow_boundary_f1"]

_Maps = NDArray[np.integer]


def slow_boundary_f1(
    predicted_NHW: _Maps, label_NHW: _Maps, classes: int, ignore: int, tolerance: float
) -> list[float | None]:
    """Return F1 of each class, from the distance of every boundary pixel to every one of the other map of its tile."""
    found: list[float | None] = []
    for c in range(classes):
        hits = {"precision": [0, 0], "recall": [0, 0]}
        for predicted, label in zip(predicted_NHW, label_NHW, strict=True):
            counted = label != ignore
            mine, truth = (np.array(list(_boundary(m, counted, c))) for m in (predicted, label))
            for name, points, others in (("precision", mine, truth), ("recall", truth, mine)):
                hits[name][1] += len(points)
                if len(points) and len(others):
                    distance = np.hypot(*(points[:, None] - others[None]).transpose(2, 0, 1))
                    hits[name][0] += int((distance.min(1) <= tolerance).sum())
        (right, predicted_px), (seen, labelled_px) = hits.values()
        if not predicted_px and not labelled_px:
            found.append(None)
        elif not right or not seen:
            found.append(0.0)
        else:
            precision, recall = right / predicted_px, seen / labelled_px
            found.append(2 * precision * recall / (precision + recall))
    return found


def _boundary(map_HW: _Maps, counted_HW: NDArray[np.bool_], c: int) -> Iterator[tuple[int, int]]:
    height, width = map_HW.shape
    for y, x in np.argwhere((map_HW == c) & counted_HW):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < height and 0 <= u < width and counted_HW[v, u] and map_HW[v, u] != c:
                yield int(y), int(x)
                break
