"""K fixed random views of every tile: drawn once, when a request becomes concrete, and stored as numbers.

A seed is no record of an augmentation: libraries change their streams. So the numbers come from a generator that is
specified to the bit, and what a store keeps is the numbers. Replay reads the stored ``ViewSpec``, never the seed.

The number called NAME of fixed view K of seed S is::

    u(S, K, NAME) = (first 8 bytes of sha256("rsmtdf fixed view/S/K/NAME"), big-endian, without its 11 low bits) / 2**53

uniform in [0, 1). It depends on nothing else, so the views of K = 4 are the first four of K = 8, and a number that a
later version adds changes no other. From them, in float64, ``pick(u, n) = floor(u * n)``:

* ``orientation``: ``pick(u, 8)``.
* crop: ``side``: a multiple of ``step`` from ``ceil(0.4 * tile / step) * step`` to the tile, uniform; ``step`` is the
  largest of 32, 16, 8, 4, 2, 1 that divides the tile. A view of scale 1 has 32 or 16 tokens a side for the usual
  teachers, so their strides inside the crop are whole tile pixels again (decision 9). ``y``, ``x``: any whole pixel,
  uniform: the crop is a view of its own, its corner need not be on the lattice of others.
* colours: ``brightness``, ``contrast``, ``saturation`` = ``0.6 + 0.8 u``; ``hue`` = ``0.2 u - 0.1`` turns; ``grey``
  when ``u < 0.1``; blur when ``u(blur) < 0.3``, then ``blur_px`` = ``0.3 + 1.7 u``. Rounded to 3 decimals.

Geometry and colours are those of all teachers of a build: one training sample can use what every teacher said of
view K. The teacher sees the crop at its side of scale 1, so a crop is zoomed in.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.specs import CropSpec, PhotometrySpec, TeacherSpec, ViewSpec
from rsmtdf_cache.views import ORIENTATION_NAMES, base_size_px

__all__ = ["FIXED_VIEWS_MAX", "FixedView", "describe_view", "draw", "draw_fixed_view", "fixed_views"]

#: More are refused: each is as large as a whole view, and names have 8 digits of a digest.
FIXED_VIEWS_MAX = 1024

_SIDE_MIN = 0.4
#: Smallest value and width of each range.
_COLOUR, _HUE, _BLUR_PX = (0.6, 0.8), (-0.1, 0.2), (0.3, 1.7)
_GREY_P, _BLUR_P = 0.1, 0.3


@dataclass(frozen=True)
class FixedView:
    """What a fixed view shows of a tile, whatever the teacher: equal values = views of one training sample."""

    orientation: int
    crop: CropSpec
    photometry: PhotometrySpec | None

    @classmethod
    def of(cls, view: ViewSpec) -> FixedView | None:
        """Return what the stored ``view`` shows; None when it is a whole tile in its own colours."""
        return None if view.crop is None else cls(view.orientation, view.crop, view.photometry)


def draw(seed: int, view: int, name: str) -> float:
    """Return the number ``name`` of fixed view ``view`` of ``seed``: uniform in [0, 1), 53 bits."""
    digest = hashlib.sha256(f"rsmtdf fixed view/{seed}/{view}/{name}".encode()).digest()
    return float(int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53


def draw_fixed_view(seed: int, view: int, tile_px: int) -> FixedView:
    """Return fixed view number ``view`` (from 0) of ``seed`` for tiles of ``tile_px``."""

    def pick(name: str, choices: int) -> int:
        return int(draw(seed, view, name) * choices)

    def between(name: str, low: float, width: float) -> float:
        return round(low + width * draw(seed, view, name), 3) + 0.0  # -0.0 becomes 0.0

    step = next(s for s in (32, 16, 8, 4, 2, 1) if tile_px % s == 0)
    least, most = max(1, math.ceil(_SIDE_MIN * tile_px / step)), tile_px // step
    side = step * (least + pick("side", most - least + 1))
    return FixedView(
        pick("orientation", 8),
        CropSpec(y=pick("y", tile_px - side + 1), x=pick("x", tile_px - side + 1), side_px=side),
        PhotometrySpec(
            brightness=between("brightness", *_COLOUR),
            contrast=between("contrast", *_COLOUR),
            saturation=between("saturation", *_COLOUR),
            hue=between("hue", *_HUE),
            grey=draw(seed, view, "grey") < _GREY_P,
            blur_px=between("blur_px", *_BLUR_PX) if draw(seed, view, "blur") < _BLUR_P else 0.0,
        ),
    )


def fixed_views(teacher: TeacherSpec, tile_px: int, count: int, seed: int) -> list[ViewSpec]:
    """Return the first ``count`` fixed views of ``seed`` for ``teacher``, at its side of scale 1, without windows.

    Raises ``UsageError`` for a count that makes no sense, and for two views of one name.
    """
    if not 0 <= count <= FIXED_VIEWS_MAX:
        raise UsageError(f"--fixed-views {count}: choose 0 to {FIXED_VIEWS_MAX}")
    if count == 0:
        return []
    size = base_size_px(teacher, tile_px)
    drawn = [draw_fixed_view(seed, k, tile_px) for k in range(count)]
    views = [ViewSpec(size_px=size, orientation=d.orientation, crop=d.crop, photometry=d.photometry) for d in drawn]
    if len({v.name for v in views}) != count:
        raise UsageError(f"--fixed-views {count} --seed {seed}: two views got one name; choose another seed")
    return views


def describe_view(view: ViewSpec) -> str:
    """Return one line for people: ``"256 px at (12, 40), rot90, brightness 1.1, …, shown at 448 px"``."""
    parts = ["whole tile" if view.crop is None else f"{view.crop.side_px} px at ({view.crop.y}, {view.crop.x})"]
    parts.append(ORIENTATION_NAMES[view.orientation])
    if view.photometry is not None:
        changed = view.photometry.model_dump(exclude_defaults=True)
        parts += [name if value is True else f"{name.replace('_px', '')} {value:g}" for name, value in changed.items()]
    parts.append(f"shown at {view.size_px} px")
    if view.windows is not None:
        parts.append(f"in windows of {view.windows.side_px} px that overlap by {view.windows.overlap_px} px")
    return ", ".join(parts)
