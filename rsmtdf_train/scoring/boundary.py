"""Boundary F1: how well the borders of the classes are placed.

After Csurka, Larlus and Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013: a pixel
of class c is on the boundary of c when one of its four neighbours has another class. Over the boundary pixels of c,
precision is the share of predicted ones within the tolerance (Euclidean distance, in pixels) of a labelled one, recall
the share of labelled ones within the tolerance of a predicted one, ``F1 = 2 P R / (P + R)``.

Two things differ from the paper. Its scores are means over images; here counts are added up over the split, as those
of the IoU are, so a tile with few boundaries weighs little. Its tolerance is a share of the image's diagonal; here it
is a number of pixels, for a scene cut into larger tiles would otherwise be given a larger one.

Only pixels with a label are looked at: edges of tiles and of ignored areas are no boundaries, and no prediction counts
on ignored pixels. A boundary is looked for within its own tile. A class without boundary pixels on either side has no
score and enters no mean; with some on one side only, F1 is 0. All counts are integers: the order of tiles, batches and
processes changes nothing.

Shape legend: B batch, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsmtdf_train.scoring.means import mean_of

__all__ = ["BoundaryCounts", "BoundaryScore", "BoundaryScores", "TOLERANCE_PX"]

#: Default tolerance: the disc around class borders that the eroded reference of the ISPRS benchmarks leaves out.
TOLERANCE_PX = 3

#: How many classes a word of each type holds, a bit each: the sign stays free.
_WORDS = ((8, torch.uint8), (15, torch.int16), (31, torch.int32), (63, torch.int64))
#: Pixels at once on a CPU: what stays in its caches.
_CPU_PIXELS = 2**18


@dataclass(frozen=True)
class BoundaryScore:
    """One class; scores in 0..1, None where there is nothing to score. ``*_px``: boundary pixels."""

    name: str
    f1: float | None
    precision: float | None
    recall: float | None
    predicted_px: int
    labelled_px: int


@dataclass(frozen=True)
class BoundaryScores:
    """Boundary F1 of each class at one tolerance, and its mean over the classes that have one."""

    tolerance_px: int
    classes: tuple[BoundaryScore, ...]
    mf1: float | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"tolerance_px": self.tolerance_px, "mf1": self.mf1, "classes": [vars(c) | {} for c in self.classes]}


class BoundaryCounts:
    """Counts ``[C, 2, 2]`` (class; predicted, labelled; missed, found) of boundary pixels; exact (int64)."""

    def __init__(self, names: Sequence[str], ignore_index: int, tolerance_px: int = TOLERANCE_PX) -> None:
        self.names = tuple(names)
        self.ignore_index = ignore_index
        self.tolerance_px = tolerance_px
        self.counts = torch.zeros(len(self.names), 2, 2, dtype=torch.int64)

    def add(self, predicted_BHW: Tensor, label_BHW: Tensor) -> None:
        """Count class numbers ``predicted`` against ``label``; both ``[B, H, W]`` integers."""
        classes = len(self.names)
        pixels = label_BHW[0].numel() if len(label_BHW) else 1
        size = max(1, _CPU_PIXELS // pixels) if label_BHW.device.type == "cpu" else max(1, len(label_BHW))
        for start in range(0, len(label_BHW), size):
            part = slice(start, start + size)
            counted = label_BHW[part] != self.ignore_index
            maps = [m[part].to(torch.int16) for m in (predicted_BHW, label_BHW)]
            edges = [_edges(m, counted) for m in maps]
            for first in range(0, classes, _WORDS[-1][0]):
                self._add([m - first for m in maps], edges, slice(first, min(classes, first + _WORDS[-1][0])))

    def _add(self, maps: Sequence[Tensor], edges: Sequence[Tensor], some: slice) -> None:
        """Count the classes ``some``; ``maps`` are numbered from the first of them."""
        count = some.stop - some.start
        dtype = next(dtype for size, dtype in _WORDS if count <= size)
        if count < len(self.names):
            edges = [e & (m >= 0) & (m < count) for m, e in zip(maps, edges, strict=True)]
        words = [_words(m, e, count, dtype) for m, e in zip(maps, edges, strict=True)]
        for side, (mine, other) in enumerate((words, words[::-1])):
            found = (mine & _dilated(other, self.tolerance_px)) != 0
            numbers = (2 * maps[side] + found).masked_fill_(mine == 0, 2 * count)
            counts = torch.bincount(numbers.reshape(-1), minlength=2 * count + 1)[: 2 * count]
            self.counts[some, side] += counts.view(count, 2).cpu()

    def scores(self) -> BoundaryScores:
        """Return the scores of what was added."""
        classes = tuple(_score(name, counts) for name, counts in zip(self.names, self.counts.tolist(), strict=True))
        return BoundaryScores(self.tolerance_px, classes, mean_of([c.f1 for c in classes]))


def _score(name: str, counts: list[list[int]]) -> BoundaryScore:
    (missed, right), (lost, found) = counts
    precision = right / (missed + right) if missed + right else None
    recall = found / (lost + found) if lost + found else None
    if precision is None and recall is None:
        f1 = None
    elif not precision or not recall:
        f1 = 0.0
    else:
        f1 = 2 * precision * recall / (precision + recall)
    return BoundaryScore(name, f1, precision, recall, missed + right, lost + found)


def _edges(map_BHW: Tensor, counted_BHW: Tensor) -> Tensor:
    """Return bool ``[B, H, W]``: counted pixels beside a counted pixel of another number."""
    found = torch.zeros_like(counted_BHW)
    for here, after in ((map_BHW[:, :-1], map_BHW[:, 1:]), (map_BHW[:, :, :-1], map_BHW[:, :, 1:])):
        tall, wide = here.shape[1], here.shape[2]
        both = counted_BHW[:, :tall, :wide] & counted_BHW[:, -tall:, -wide:] & (here != after)
        found[:, :tall, :wide] |= both
        found[:, -tall:, -wide:] |= both
    return found


def _words(class_BHW: Tensor, edges_BHW: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``[B, H, W]`` words: bit c at edge pixels of class c, 0 elsewhere. Edge pixels are of ``0..count-1``.

    A pixel has one class, so one word holds the boundary maps of all of them, and they are dilated at the price of one.
    """
    bits = torch.ones((), dtype=dtype, device=class_BHW.device) << class_BHW.clamp(0, count - 1).to(dtype)
    return bits * edges_BHW


def _dilated(words_BHW: Tensor, radius_px: int) -> Tensor:
    """Return the bitwise or over a disc of ``radius_px`` around each pixel: Euclidean distance at most the radius.

    A disc is a stack of rows; rows of the same half width are made once.
    """
    offsets: dict[int, list[int]] = {}
    for dy in range(-radius_px, radius_px + 1):
        offsets.setdefault(math.isqrt(radius_px**2 - dy**2), []).append(dy)
    row, disc = words_BHW.clone(), torch.zeros_like(words_BHW)
    for half in range(radius_px + 1):
        if half:
            _or_moved(row, words_BHW, 0, half)
            _or_moved(row, words_BHW, 0, -half)
        for dy in offsets.get(half, ()):
            _or_moved(disc, row, dy, 0)
    return disc


def _or_moved(into: Tensor, words: Tensor, dy: int, dx: int) -> None:
    """Replace ``into`` by its bitwise or with ``words`` moved up by ``dy`` and left by ``dx``."""
    height, width = words.shape[-2:]
    if abs(dy) >= height or abs(dx) >= width:
        return
    rows, columns = slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))
    to_rows, to_columns = slice(max(-dy, 0), height - max(dy, 0)), slice(max(-dx, 0), width - max(dx, 0))
    into[..., to_rows, to_columns] |= words[..., rows, columns]
