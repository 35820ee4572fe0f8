"""Where tokens lie relative to crops and pasted boxes, in tile pixels.

Shape legend: h w tokens of a live map.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.fixed_views import draw
from rsmtdf_cache.specs import FeatureSpec

__all__ = ["PastedBox", "cutmix_box", "cutmix_tokens", "near_border", "near_box"]

#: Rows and columns ``(y0, y1, x0, x1)``, half open, in tile pixels.
PastedBox = tuple[int, int, int, int]

#: A token is near an edge when its centre is nearer than this part of the crop's side, or than a stride.
_EDGE = 1 / 8


def cutmix_box(n: int, tile_px: int) -> PastedBox:
    """Return a box of 10 to 40 % of the tile, of an aspect of 1/2 to 2, for tile ``n`` of a sample."""
    area = (0.1 + 0.3 * draw(0, n, "fidelity cutmix area")) * tile_px * tile_px
    aspect = 2 ** (2 * draw(0, n, "fidelity cutmix aspect") - 1)
    height, width = int(math.sqrt(area * aspect)), int(math.sqrt(area / aspect))
    y = int(draw(0, n, "fidelity cutmix y") * (tile_px - height + 1))
    x = int(draw(0, n, "fidelity cutmix x") * (tile_px - width + 1))
    return (y, y + height, x, x + width)


def cutmix_tokens(live: FeatureSpec, box: PastedBox) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which tokens ``[h, w]`` of a whole view lie inside ``box``, and which outside; crossed ones are neither.

    A token's cell is one stride wide around its centre, cut to the tile: the rule of the trainer (decision 11).
    """
    y0, y1, x0, x1 = box
    sides = []
    for low, high, axis in ((y0, y1, 0), (x0, x1, 1)):
        start, end = (
            (_centres(live, axis) + sign * live.stride_tile_px / 2).clip(0, live.tile_px).astype(np.float32)
            for sign in (-1, 1)
        )
        sides.append(((start >= low) & (end <= high), (end <= low) | (start >= high)))
    (inside_y, outside_y), (inside_x, outside_x) = sides
    return inside_y[:, None] & inside_x[None, :], outside_y[:, None] | outside_x[None, :]


def near_border(live: FeatureSpec) -> NDArray[np.bool_]:
    """Return which tokens ``[h, w]`` lie near the border of what ``live`` shows: an eighth of it, or a stride."""
    y, x = (np.minimum(c, live.shown_px - c) for c in (_centres(live, 0), _centres(live, 1)))
    return np.asarray(np.minimum(y[:, None], x[None, :]) < _margin(live))


def near_box(live: FeatureSpec, box: PastedBox) -> NDArray[np.bool_]:
    """Return which tokens ``[h, w]`` lie as near to the edge of ``box``, inside or outside."""
    y, x = _centres(live, 0), _centres(live, 1)
    # Signed distance to the box along each axis, positive inside.
    depth_y, depth_x = np.minimum(y - box[0], box[1] - y), np.minimum(x - box[2], box[3] - x)
    return np.asarray(np.abs(np.minimum(depth_y[:, None], depth_x[None, :])) < _margin(live))


def _centres(live: FeatureSpec, axis: int) -> NDArray[np.float64]:
    return np.asarray(live.offset_tile_px + live.stride_tile_px * np.arange(live.grid[axis]), np.float64)


def _margin(live: FeatureSpec) -> float:
    return max(live.shown_px * _EDGE, live.stride_tile_px)
