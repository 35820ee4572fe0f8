"""Views in windows: a teacher sees a large view in overlapping squares, and their maps are blended into one.

Windows start at multiples of the coarsest stride, so that all of them have their tokens on one grid; the last of a row
or column is flush with the border. Where windows overlap, each weighs in by a smooth ramp from 0 at its own edge to 1
at the other's (``3 u^2 - 2 u^3``; nothing but sums and products, so the same bits everywhere); where one window alone
covers a token, its value is taken as it is.

Memory: the tile in uint8, a micro-batch of windows, and one band of maps, a window high and as wide as the view. Each
window is resized on its own from the pixels it needs, by the teacher's rule with the weights of the whole view, and
rounded to uint8: within 0.5 / 255 of the resized whole, also at borders; exact where the view has the tile's own scale.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.specs import LayerSpec, NumericsProfile, PixelSpec, ViewSpec, WindowSpec
from rsmtdf_cache.teachers.base import Teacher

__all__ = [
    "Band",
    "encode_bands",
    "map_layers",
    "resize_part",
    "window_origins",
    "window_weights",
    "with_windows",
]

#: Views of more than twice the side a teacher was trained at are cut into windows; for networks of any size, this side.
_ANY_SIZE_WINDOW_PX = 1024


class Band(NamedTuple):
    """Finished rows ``[n, w, D]`` float32 of a layer's map, from token row ``y0`` on."""

    layer: str
    y0: int
    rows: NDArray[np.float32]


def with_windows(
    teacher: Teacher, layers: Sequence[str], view: ViewSpec, window_px: int | None = None, overlap: float = 0.25
) -> ViewSpec:
    """Return ``view``, in windows when it is large.

    ``window_px``: side of the windows, rounded down to a multiple of the coarsest stride, for views larger than that;
    0 = never; None = the side the teacher was trained at (at most 1024 px), for views of more than twice that side.
    ``overlap``: part of a window, rounded to the coarsest stride. Raises ``UsageError`` for what cannot be.
    """
    native = min(teacher.spec.native_px, _ANY_SIZE_WINDOW_PX)
    goal = native if window_px is None else window_px
    if goal == 0 or view.size_px <= (2 * goal if window_px is None else goal):
        return view
    if not 0 <= overlap <= 0.75:
        raise UsageError(f"--overlap {overlap:g}: give a part of the window from 0 to 0.75")
    coarsest = _coarsest(teacher, layers, goal // teacher.spec.patch_px * teacher.spec.patch_px)
    side = goal // coarsest * coarsest
    if side == 0 or view.size_px % coarsest:
        raise UsageError(
            f"teacher {teacher.spec.name}: a view of {view.size_px} px cannot be cut into windows of {goal} px on its "
            f"stride of {coarsest} px; choose a larger window, --window 0 (never), or another scale"
        )
    least = coarsest if overlap > 0 else 0  # what was asked to blend has something to blend
    shared = min(max(int(side * overlap / coarsest + 0.5) * coarsest, least), side - coarsest)
    made = view.model_copy(update={"windows": WindowSpec(side_px=side, overlap_px=shared)})
    map_layers(teacher, layers, made)
    return made


def _coarsest(teacher: Teacher, layers: Sequence[str], size_px: int) -> int:
    """Return what window origins and sides are multiples of: patch and strides."""
    strides = [s.stride_px for s in teacher.layer_specs(layers, size_px)] if size_px else []
    return math.lcm(teacher.spec.patch_px, *strides)


def map_layers(teacher: Teacher, layers: Sequence[str], view: ViewSpec) -> list[tuple[LayerSpec, tuple[int, int]]]:
    """Return each layer as the teacher gives it for ``view``, with the token grid of the whole map.

    In windows, stride and offset are those of a window. Raises ``UsageError`` for an unknown layer, a side the patch
    does not divide, and a network whose maps do not fill their window.
    """
    if view.windows is None:
        return [(s, teacher.grid(s.name, view.size_px)) for s in teacher.layer_specs(layers, view.size_px)]
    side, found = view.windows.side_px, []
    for spec in teacher.layer_specs(layers, side):
        tokens = teacher.grid(spec.name, side)
        if tokens != (side // spec.stride_px,) * 2 or side % spec.stride_px or view.size_px % spec.stride_px:
            raise UsageError(
                f"teacher {teacher.spec.name}: layer {spec.name} has {tokens[0]} tokens in a window of {side} px, "
                f"which its stride of {spec.stride_px} px does not fill; use --window 0 (never), or another layer"
            )
        found.append((spec, (view.size_px // spec.stride_px,) * 2))
    return found


def window_origins(size_px: int, windows: WindowSpec) -> list[int]:
    """Return where windows start along one side, ascending; the last one ends at ``size_px``."""
    last, step = size_px - windows.side_px, windows.side_px - windows.overlap_px
    if last < 0:
        raise UsageError(f"a view of {size_px} px is smaller than its windows of {windows.side_px} px")
    return [*range(0, last, step), last]


def window_weights(size_px: int, windows: WindowSpec, stride_px: int) -> NDArray[np.float32]:
    """Return how much each window weighs along one side: ``[windows, tokens of a window]``, 1 where it is alone.

    The weights of all windows that cover a token add up to 1.
    """
    origins, side = window_origins(size_px, windows), windows.side_px
    centres = np.arange(stride_px / 2, side, stride_px)
    raw = np.ones((len(origins), len(centres)))
    for k, (here, after) in enumerate(itertools.pairwise(origins)):
        shared = here + side - after
        if shared > 0:
            raw[k] *= _smooth((side - centres) / shared)
            raw[k + 1] *= _smooth(centres / shared)
    total = np.zeros(size_px // stride_px)
    for origin, weights in zip(origins, raw, strict=True):
        total[origin // stride_px :][: len(centres)] += weights
    parts = [w / total[o // stride_px :][: len(centres)] for o, w in zip(origins, raw, strict=True)]
    return np.stack(parts).astype(np.float32)


def _smooth(x: NDArray[np.float64]) -> NDArray[np.float64]:
    u = np.clip(x, 0, 1)
    ramp: NDArray[np.float64] = u * u * (3 - 2 * u)
    return ramp


def encode_bands(
    teacher: Teacher, view: ViewSpec, layers: Sequence[str], image: NDArray[np.uint8], profile: NumericsProfile
) -> Iterator[Band]:
    """Yield the maps of one image, ``views.render`` of a tile, as bands from top to bottom, layers in turn.

    Windows go through the teacher row by row in micro-batches of the profile, the last one of a tile padded by
    repeating its last window, so bits do not depend on other tiles.
    """
    if view.windows is None:
        raise ValueError(f"view {view.name} has no windows")
    side = view.windows.side_px
    origins = window_origins(view.size_px, view.windows)
    seams = [_Seam(spec, view, view.windows) for spec, _ in map_layers(teacher, layers, view)]
    pixels = torch.from_numpy(image).to(teacher.device)
    places = [(i, j) for i in range(len(origins)) for j in range(len(origins))]
    row = 0
    for start in range(0, len(places), profile.micro_batch):
        batch = places[start : start + profile.micro_batch]
        shown = [resize_part(pixels, view.size_px, teacher.spec.pixel, origins[i], origins[j], side) for i, j in batch]
        shown += [shown[-1]] * (profile.micro_batch - len(batch))
        maps = teacher.encode(torch.stack(shown), side, layers, profile.precision)
        arrays = {layer: values.cpu().numpy() for layer, values in maps.items()}
        for n, (i, j) in enumerate(batch):
            if i != row:
                yield from (seam.finished(origins[i]) for seam in seams)
                row = i
            for seam in seams:
                seam.add(i, j, arrays[seam.layer][n])
    yield from (seam.finished(view.size_px) for seam in seams)


class _Seam:
    """Adds up the windows of one layer: a buffer of one band, from the first row that is not finished."""

    def __init__(self, spec: LayerSpec, view: ViewSpec, windows: WindowSpec) -> None:
        self.layer, self._stride = spec.name, spec.stride_px
        self._starts = [o // spec.stride_px for o in window_origins(view.size_px, windows)]
        self._weights = window_weights(view.size_px, windows, spec.stride_px)
        shape = (windows.side_px // spec.stride_px, view.size_px // spec.stride_px, spec.channels)
        self._band = np.zeros(shape, np.float32)
        self._y0 = 0

    def add(self, i: int, j: int, tokens: NDArray[np.float32]) -> None:
        """Add the map ``[n, n, D]`` of window ``(i, j)``; the band begins at its first row."""
        side = len(tokens)
        weights = self._weights[i][:, None, None] * self._weights[j][None, :, None]
        self._band[:, self._starts[j] : self._starts[j] + side] += weights * tokens

    def finished(self, next_px: int) -> Band:
        """Return the rows above ``next_px``, where the next window begins, and move on to it."""
        count = min(next_px // self._stride - self._y0, len(self._band))
        rows = self._band[:count].copy()
        band = Band(self.layer, self._y0, rows)
        self._band[: len(self._band) - count] = self._band[count:]
        self._band[len(self._band) - count :] = 0
        self._y0 += count
        return band


def resize_part(image_HH3: Tensor, size_px: int, pixel: PixelSpec, y: int, x: int, side: int) -> Tensor:
    """Return rows ``y .. y + side`` and columns ``x .. x + side`` of the image resized to ``size_px``: uint8.

    Same weights as ``torch.nn.functional.interpolate`` by the rule of ``pixel``; no pixel outside is touched.
    """
    height = len(image_HH3)
    if size_px == height:
        return image_HH3[y : y + side, x : x + side]
    rows, columns = (_taps(height, size_px, pixel, start, start + side) for start in (y, x))
    (y0, y1), (x0, x1) = rows.span, columns.span
    part = image_HH3[y0:y1, x0:x1].float()
    part = _weighted(_weighted(part, rows, 0), columns, 1)
    return (part.clamp(0, 255) + 0.5).floor().to(torch.uint8)


class _Taps(NamedTuple):
    """Which pixels make an output pixel, ``pixels`` ``[n, taps]``, and how much of each, ``weights`` ``[n, taps]``."""

    pixels: NDArray[np.int64]
    weights: NDArray[np.float32]

    @property
    def span(self) -> tuple[int, int]:
        return int(self.pixels.min()), int(self.pixels.max()) + 1


def _weighted(part: Tensor, taps: _Taps, dim: int) -> Tensor:
    index = torch.from_numpy(taps.pixels - taps.span[0]).to(part.device)
    weights = torch.from_numpy(taps.weights).to(part.device)
    shape = (-1, 1, 1) if dim == 0 else (1, -1, 1)
    total = part.index_select(dim, index[:, 0]) * weights[:, 0].view(shape)
    for k in range(1, index.shape[1]):
        total += part.index_select(dim, index[:, k]) * weights[:, k].view(shape)
    return total


def _taps(size: int, wanted: int, pixel: PixelSpec, start: int, stop: int) -> _Taps:
    """Return the taps of outputs ``start .. stop`` of a resize from ``size`` to ``wanted`` pixels (torch's rules)."""
    corners = pixel.align_corners
    scale = (size - 1) / max(wanted - 1, 1) if corners else size / wanted
    reach = 2 if pixel.resize == "bicubic" else 1
    outputs = np.arange(start, stop)[:, None]
    if pixel.antialias:
        wide = max(scale, 1.0)
        centre = scale * (outputs + 0.5)
        first = np.maximum((centre - reach * wide + 0.5).astype(np.int64), 0)
        end = np.minimum((centre + reach * wide + 0.5).astype(np.int64), size)
        index = first + np.arange(math.ceil(reach * wide) * 2 + 1)
        weights = np.where(index < end, _kernel(pixel, (index - centre + 0.5) / wide), 0.0)
        weights /= weights.sum(1, keepdims=True)
    else:
        centre = scale * outputs if corners else scale * (outputs + 0.5) - 0.5
        centre = np.maximum(centre, 0) if pixel.resize == "bilinear" else centre
        index = np.floor(centre).astype(np.int64) + np.arange(1 - reach, 1 + reach)
        weights = _kernel(pixel, index - centre)
    return _Taps(np.clip(index, 0, size - 1), weights.astype(np.float32))


def _kernel(pixel: PixelSpec, distance: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(distance)
    if pixel.resize == "bilinear":
        triangle: NDArray[np.float64] = np.maximum(1 - x, 0)
        return triangle
    a = -0.5 if pixel.antialias else -0.75  # as torch has it
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    cubic: NDArray[np.float64] = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return cubic
