"""Where the crops of a batch lie: worked out once for all arrays whose tokens lie alike; each is then only copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.shard import RowRead
from rsmtdf_cache.specs import FeatureSpec
from rsmtdf_cache.views import Box, CropBox, token_box

__all__ = ["Lattice", "ReadPlan"]

_MOST = 4096  # sizes, or places along an axis, that are remembered


@dataclass(frozen=True)
class ReadPlan:
    """Crops of ``size`` (height, width) tokens, by row group; for any array on ``lattice``."""

    lattice: Lattice
    size: tuple[int, int]
    groups: dict[int, list[RowRead]]


class _Size:
    """Crops of one size: ``tokens`` (height, width), and the token of each place along an axis that was asked for."""

    def __init__(self, tokens: tuple[int, int]) -> None:
        self.tokens = tokens
        self.ys: dict[float, int] = {}
        self.xs: dict[float, int] = {}


class Lattice:
    """Where the tokens of some arrays lie in the tile: the layers of a teacher share one.

    What was worked out is remembered by axis: a few numbers, which are still in the processor's caches when a batch has
    swept all else out of them. Safe among threads.
    """

    def __init__(self, spec: FeatureSpec, group_rows: int) -> None:
        """``spec``: one of the arrays; ``group_rows``: of the store."""
        self._grid, self._group_rows = spec.grid, group_rows
        self._sizes: dict[tuple[float, float], _Size] = {}

    @staticmethod
    def key_of(spec: FeatureSpec) -> tuple[object, ...]:
        """Return what arrays on one lattice have in common: all that ``token_box`` asks."""
        return (spec.grid, spec.stride_tile_px, spec.origin_tile_px, spec.tile_px)

    def plan(
        self,
        spec: FeatureSpec,
        rows: Sequence[int],
        boxes: Sequence[Box | CropBox] | None = None,
        at: Sequence[int] | None = None,
    ) -> ReadPlan:
        """Return where ``rows``, one box each (None: whole maps), lie in ``spec`` and all other arrays of the lattice.

        ``at``: their places in the batch; default: in order. Raises ``UsageError`` for boxes that are off the lattice,
        of several sizes, or not one for each row.
        """
        places = range(len(rows)) if at is None else at
        groups: dict[int, list[RowRead]] = {}
        if boxes is None:
            for place, row in zip(places, rows, strict=True):
                group, offset = divmod(row, self._group_rows)
                groups.setdefault(group, []).append((place, offset, 0, 0))
            return ReadPlan(self, self._grid, groups)
        if len(boxes) != len(rows):
            raise UsageError(f"{spec.key}: give one box for each of the {len(rows)} rows, not {len(boxes)}")
        if not boxes:
            return ReadPlan(self, self._grid, groups)
        height, width = boxes[0].height, boxes[0].width
        size = self._size(spec, boxes[0])
        ys, xs, group_rows = size.ys, size.xs, self._group_rows
        for place, row, box in zip(places, rows, boxes, strict=True):
            y, x = ys.get(box.y), xs.get(box.x)
            if y is None or x is None or box.height != height or box.width != width:
                y, x = self._corner(spec, box, size)
            group, offset = divmod(row, group_rows)
            if group in groups:
                groups[group].append((place, offset, y, x))
            else:
                groups[group] = [(place, offset, y, x)]
        return ReadPlan(self, size.tokens, groups)

    def _size(self, spec: FeatureSpec, box: Box | CropBox) -> _Size:
        size = self._sizes.get((box.height, box.width))
        if size is None:
            tokens = token_box(spec, box)
            if len(self._sizes) >= _MOST:
                self._sizes = {}
            size = self._sizes[box.height, box.width] = _Size((tokens.height, tokens.width))
        return size

    def _corner(self, spec: FeatureSpec, box: Box | CropBox, size: _Size) -> tuple[int, int]:
        """Return the first token of a box, which is looked at in full: off the lattice, outside, of another size."""
        tokens = token_box(spec, box)
        if (tokens.height, tokens.width) != size.tokens:
            raise UsageError(f"{spec.key}: boxes of one call are of one size; read others in a call of their own")
        for known, place, token in ((size.ys, box.y, tokens.y), (size.xs, box.x, tokens.x)):
            if len(known) < _MOST:
                known[place] = token
        return tokens.y, tokens.x
