"""Any box of any tile, on any grid of tokens, in any orientation: exact copies where there are any, else resampled.

A crop is asked for by a box in tile pixels of one oriented frame, and a grid of token centres inside it. Each wanted
centre is looked up on the lattice of the stored map:

- all on stored tokens (a box on the lattice, the array's own stride and offset): copies, bit for bit;
- otherwise bilinear interpolation between token centres, in float32 (``resampling.py``);
- a frame that is not stored: refused, or, when the caller accepts an approximation, the map of a stored frame is
  turned, token centres and all, and then read as above. No network commutes with turning its input, hence the word.

A token is valid when its tile is committed and its centre lies in the tile, or in what a fixed view shows. Centres
inside, but beyond the outermost stored one, take the nearest. Only the tokens that count are read from disk.

Shape legend: n crops, h w wanted tokens, D channels; "turned" = the stored map in the frame that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.resampling import Grid, interpolation_weights
from rsmtdf_cache.specs import FeatureKey, FeatureSpec
from rsmtdf_cache.store import Features, FeatureStore
from rsmtdf_cache.views import ORIENTATION_NAMES, Box, CropBox, inverse_orientation, orient, orient_point

__all__ = ["CropBox", "TokenGrid", "nearest_orientation", "read_crops", "turn_between", "whole_views"]

#: Token centres nearer than this to a stored one, in strides, lie on it: strides such as 13.84 px are rounded numbers.
_SAME = 1e-6

#: Turns of a stored map, in the order in which they are taken for a frame that is not stored.
_NEAREST = (0, 4, 2, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class TokenGrid:
    """Where the tokens of a crop lie: centres at ``offset_px + i * stride_px`` tile pixels from its corner."""

    height: int
    width: int
    stride_px: float
    offset_px: float

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for a grid without tokens, or with a stride that is no distance."""
        finite = math.isfinite(self.stride_px) and math.isfinite(self.offset_px)
        if self.height <= 0 or self.width <= 0 or not finite or self.stride_px <= 0:
            raise UsageError(f"{self}: a grid has at least one token and a positive stride")


def turn_between(source: int, wanted: int) -> int:
    """Return the orientation ``t`` with ``orient(orient(tile, source), t) == orient(tile, wanted)``."""
    return _turns()[source, wanted]


def nearest_orientation(wanted: int, stored: Iterable[int]) -> int:
    """Return the one of ``stored`` whose map is turned the least to stand for ``wanted``; ``wanted`` itself if stored.

    The order: a left-right mirror (image networks are trained with it, so they come nearest to commuting with it), half
    turns with and without a mirror (no axis is swapped), quarter turns. Among equals the smallest number.
    """
    return min(stored, key=lambda o: (_NEAREST.index(turn_between(o, wanted)), o))


def whole_views(store: FeatureStore) -> Mapping[str, Mapping[int, FeatureSpec]]:
    """Return ``{target key: {orientation: spec}}``, sorted: all arrays of whole tiles. Fixed views have no target key.

    A target key is ``teacher/scale/layer``, such as ``dinov2_vits14/s448/block11``.
    """
    found = _VIEWS.get(store)
    if found is None:
        views: dict[str, dict[int, FeatureSpec]] = {}
        for key in store.keys():
            spec = store.spec(key)
            if spec.view.is_whole:
                views.setdefault(_target(spec), {})[spec.view.orientation] = spec
        found = _VIEWS[store] = {key: dict(sorted(views[key].items())) for key in sorted(views)}
    return found


def read_crops(
    store: FeatureStore,
    key: FeatureKey | str,
    rows: Sequence[int],
    boxes: Sequence[Box | CropBox] | None = None,
    grid: TokenGrid | None = None,
    orientation: int | None = None,
    approximate: bool = False,
    source: int | None = None,
) -> Features:
    """Return crops ``[n, h, w, D]`` of ``rows``, one box each, all of one size; None = all that the view shows.

    ``key``: an array (``teacher/view/layer``) or a target (``teacher/scale/layer``). ``orientation``: the frame of the
    boxes and of the result; default that of the array, 0 for a target. ``grid``: default the array's own stride and
    offset with ``round(side / stride)`` tokens, at least one. ``approximate``: a frame that is not stored is made by
    turning the nearest one that is; ``source``: by turning this stored one, even where the frame itself is stored, to
    see what that costs. Values are float16 in the teacher's scale, NaN where ``valid`` is False; those of
    a crop do not depend on the crops read beside it.

    Raises ``UsageError`` for an unknown key, row or frame, boxes of several sizes; ``FindingsError`` for damage.
    """
    spec, frame = _choose(store, key, orientation, approximate, source)
    turned = _Turned(spec, turn_between(spec.view.orientation, frame))
    corners, height, width = _corners(spec, turned, rows, boxes)
    stride, offset = spec.stride_tile_px, spec.offset_tile_px
    if grid is None:
        grid = TokenGrid(max(1, round(height / stride)), max(1, round(width / stride)), stride, offset)
    wanted = [
        corners[:, axis, None] + grid.offset_px + grid.stride_px * np.arange(tokens)
        for axis, tokens in enumerate((grid.height, grid.width))
    ]
    inside = [turned.shows(axis, wanted[axis]) for axis in (0, 1)]
    reads = [_read_of(turned.axes[axis], wanted[axis], inside[axis], grid.stride_px) for axis in (0, 1)]
    copied = all(read.index is not None for read in reads)
    if not copied:
        reads = [_between(turned.axes[axis], wanted[axis], grid.stride_px) for axis in (0, 1)]
    found = store.read(spec.key, rows, turned.stored_boxes(reads))
    tokens = orient(found.values, turned.turn, (1, 2))
    values = _copy(tokens, *reads) if copied else _blend(tokens, *reads)
    committed: NDArray[np.bool_] = np.all(found.valid, axis=(1, 2))
    valid = inside[0][:, :, None] & inside[1][:, None, :] & committed[:, None, None]
    values[~valid] = np.nan
    return Features(values, valid, grid.stride_px, grid.offset_px, frame, exact=copied and turned.turn == 0)


_VIEWS: WeakKeyDictionary[FeatureStore, Mapping[str, Mapping[int, FeatureSpec]]] = WeakKeyDictionary()


def _target(spec: FeatureSpec) -> str:
    return f"{spec.teacher.name}/{spec.view.scale}/{spec.layer.name}"


@lru_cache(maxsize=1)
def _turns() -> dict[tuple[int, int], int]:
    corner = np.arange(4).reshape(2, 2)  # the eight turns of four numbers differ
    seen = {orient(corner, o).tobytes(): o for o in range(8)}
    # From a to b: undo a, then turn to b.
    return {
        (a, b): seen[orient(orient(corner, inverse_orientation(a)), b).tobytes()] for a in range(8) for b in range(8)
    }


def _choose(
    store: FeatureStore, key: FeatureKey | str, orientation: int | None, approximate: bool, source: int | None
) -> tuple[FeatureSpec, int]:
    """Return the array to read, and the frame that is asked for."""
    if orientation is not None and orientation not in range(8):
        raise UsageError(f"{key}: orientation {orientation!r}; there are 0 to 7")
    views = whole_views(store)
    by = views.get(str(key))
    if by is None:
        try:
            spec = store.spec(key if isinstance(key, FeatureKey) else FeatureKey.parse(key))
        except (UsageError, ValueError):
            names = [*views, *(str(k) for k in store.keys())]
            raise UsageError(
                f"{store.shown} has no array or target {key}.{did_you_mean(str(key), names)} It holds the targets: "
                f"{', '.join(views) or 'none'}"
            ) from None
        frame = spec.view.orientation if orientation is None else orientation
        by = views[_target(spec)] if spec.view.is_whole else {spec.view.orientation: spec}
    else:
        frame = orientation or 0
    if source is not None:
        by = {o: spec for o, spec in by.items() if o == source}
        if not by:
            raise UsageError(f"{key}: orientation {source} is not stored, so nothing can be turned from it")
    if frame not in by and not approximate:
        raise UsageError(
            f"{key}: orientation {frame} ({ORIENTATION_NAMES[frame]}) is not stored, only "
            f"{', '.join(map(str, by))}; build it (--orientations), or accept a turned map as an approximation "
            "(approximate=True)"
        )
    return by[nearest_orientation(frame, by)], frame


class _Turned:
    """The token centres of a stored map in the frame ``turn`` away from its own, in tile pixels of that frame."""

    def __init__(self, spec: FeatureSpec, turn: int) -> None:
        self.spec, self.turn = spec, turn
        self._back = inverse_orientation(turn)
        grids, spans = [], []
        # Where each axis of the asked frame comes from: which stored axis, and whether it runs backwards.
        step_y, step_x = (orient_point(*unit, 0, turn) for unit in ((1, 0), (0, 1)))
        for axis in (0, 1):
            stored, sign = (0, step_y[axis]) if step_y[axis] else (1, step_x[axis])
            tokens, low = spec.grid[stored], spec.origin_tile_px[stored]
            first = low + spec.offset_tile_px
            if sign < 0:
                low = spec.tile_px - low - spec.shown_px
                first = spec.tile_px - first - spec.stride_tile_px * (tokens - 1)
            grids.append(Grid(tokens, spec.stride_tile_px, first))
            spans.append((float(low), float(low + spec.shown_px)))
        self.axes, self.shown = grids, spans

    def shows(self, axis: int, centres: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return whether each of ``centres`` lies in what the view shows, its edges included."""
        low, high = self.shown[axis]
        slack = _SAME * self.spec.stride_tile_px
        inside: NDArray[np.bool_] = (centres >= low - slack) & (centres <= high + slack)
        return inside

    def stored_boxes(self, reads: Sequence[_AxisRead]) -> list[CropBox]:
        """Return the boxes, in the frame of the stored map, of the tokens that ``reads`` names in the turned one."""
        rows, columns = reads
        stride, (top, left) = self.spec.stride_tile_px, self.spec.origin_tile_px
        side = self.spec.grid[0]
        boxes = []
        for y, x in zip(rows.start.tolist(), columns.start.tolist(), strict=True):
            a = orient_point(y, x, side, self._back)
            b = orient_point(y + rows.span, x + columns.span, side, self._back)
            (y0, x0), (y1, x1) = map(min, zip(a, b, strict=True)), map(max, zip(a, b, strict=True))
            boxes.append(CropBox(top + stride * y0, left + stride * x0, stride * (y1 - y0), stride * (x1 - x0)))
        return boxes


@dataclass(frozen=True)
class _AxisRead:
    """What is read along one axis of the turned map: ``span`` tokens from ``start`` ``[n]``.

    Of them, wanted token ``t`` is a copy of number ``index[n, t]``, or a mean with ``weights[n, t, :]``.
    """

    start: NDArray[np.int64]
    span: int
    index: NDArray[np.int64] | None = None
    weights: NDArray[np.float32] | None = None


def _read_of(
    source: Grid, wanted: NDArray[np.float64], inside: NDArray[np.bool_], wanted_stride_px: float
) -> _AxisRead:
    """Return which stored tokens ``wanted`` ``[n, t]`` names, ``index`` None when one inside falls between them."""
    place = (wanted - source.offset_px) / source.stride_px
    nearest = np.rint(place)
    fits = (np.abs(place - nearest) <= _SAME) & (nearest >= 0) & (nearest < source.tokens)
    span = min(wanted.shape[1], source.tokens)
    if abs(wanted_stride_px / source.stride_px - 1) > _SAME or not (fits | ~inside).all():
        return _AxisRead(np.zeros(len(wanted), np.int64), span)
    start = nearest[:, 0].clip(0, source.tokens - span).astype(np.int64)
    return _AxisRead(start, span, (nearest - start[:, None]).clip(0, span - 1).astype(np.int64))


def _between(source: Grid, wanted: NDArray[np.float64], wanted_stride_px: float) -> _AxisRead:
    """Return the weights of the stored tokens around ``wanted`` ``[n, t]``; the span is a matter of ``t`` alone."""
    reach = max(source.stride_px, wanted_stride_px)
    length = (wanted_stride_px * (wanted.shape[1] - 1) + 2 * reach) / source.stride_px
    span = min(source.tokens, math.ceil(length - _SAME))
    first = wanted[:, 0].clip(source.offset_px, source.last_px)
    before = np.floor((first - reach - source.offset_px) / source.stride_px)
    start = (before + 1).clip(0, source.tokens - span).astype(np.int64)
    return _AxisRead(start, span, weights=interpolation_weights(source, wanted, wanted_stride_px, start, span))


def _copy(tokens: NDArray[np.float16], rows: _AxisRead, columns: _AxisRead) -> NDArray[np.float16]:
    assert rows.index is not None and columns.index is not None
    whole = tokens.shape[1:3] == (rows.index.shape[1], columns.index.shape[1])
    if whole and all(np.all(index == np.arange(index.shape[1])) for index in (rows.index, columns.index)):
        return np.ascontiguousarray(tokens)
    crop = np.arange(len(tokens))[:, None, None]
    return tokens[crop, rows.index[:, :, None], columns.index[:, None, :]]


def _blend(tokens: NDArray[np.float16], rows: _AxisRead, columns: _AxisRead) -> NDArray[np.float16]:
    assert rows.weights is not None and columns.weights is not None
    height, width, channels = tokens.shape[1:]
    out = np.empty((len(tokens), rows.weights.shape[1], columns.weights.shape[1], channels), np.float16)
    # One crop after another: float32 of all of them is four times what is returned.
    for crop, y, x, into in zip(tokens, rows.weights, columns.weights, out, strict=True):
        mixed = y @ crop.astype(np.float32).reshape(height, width * channels)
        into[...] = x @ mixed.reshape(len(y), width, channels)
    return out


def _corners(
    spec: FeatureSpec, turned: _Turned, rows: Sequence[int], boxes: Sequence[Box | CropBox] | None
) -> tuple[NDArray[np.float64], float, float]:
    """Return the corners ``[n, 2]`` and the one height and width of ``boxes``."""
    if boxes is None:
        (top, bottom), (left, right) = turned.shown
        boxes = [CropBox(top, left, bottom - top, right - left)] * len(rows)
    if len(boxes) != len(rows):
        raise UsageError(f"{spec.key}: give one box for each of the {len(rows)} rows, not {len(boxes)}")
    if not boxes:
        return np.zeros((0, 2)), float(spec.shown_px), float(spec.shown_px)
    table = np.array([(b.y, b.x, b.height, b.width) for b in boxes], np.float64)
    sizes = table[:, 2:]
    if not np.isfinite(table).all() or (sizes <= 0).any():
        bad = int(np.argmax(~np.isfinite(table).all(1) | (sizes <= 0).any(1)))
        raise UsageError(f"{spec.key}: {boxes[bad]} is no box; give finite numbers and positive sides")
    if np.ptp(sizes, axis=0).max() > _SAME * spec.stride_tile_px:
        raise UsageError(f"{spec.key}: boxes of one call are of one size; read others in a call of their own")
    return table[:, :2], float(sizes[0, 0]), float(sizes[0, 1])
