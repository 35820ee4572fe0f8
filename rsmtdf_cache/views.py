"""Geometry: tile pixels, view pixels, tokens, and the eight orientations of a tile.

``orient(image, o)`` turns a tile by ``o % 4`` quarter turns counter-clockwise and then mirrors it left-right when
``o >= 4``. Features are stored in the frame of the oriented view; a crop box is given in that frame too, so image,
label and features are cut by the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.photometry import photometric
from rsmtdf_cache.specs import FeatureSpec, TeacherSpec, ViewSpec

__all__ = [
    "Box",
    "CropBox",
    "ORIENTATION_NAMES",
    "ORIENTATION_SETS",
    "base_size_px",
    "fitting_scales",
    "inverse_orientation",
    "lattice_px",
    "orient",
    "orient_point",
    "render",
    "token_box",
    "view_specs",
]

ORIENTATION_NAMES = (
    "identity",
    "rot90",
    "rot180",
    "rot270",
    "mirror",
    "mirror of rot90",
    "mirror of rot180",
    "mirror of rot270",
)

#: ``--orientations N``: each set is closed under composition, so stored views of stored views are stored.
ORIENTATION_SETS: dict[int, tuple[int, ...]] = {1: (0,), 2: (0, 4), 4: (0, 2, 4, 6), 8: tuple(range(8))}


@dataclass(frozen=True)
class Box:
    """A rectangle in tile pixels of an oriented frame: rows ``[y, y + height)``, columns ``[x, x + width)``."""

    y: int
    x: int
    height: int
    width: int


@dataclass(frozen=True)
class CropBox:
    """As ``Box``, anywhere: fractions of pixels, partly or wholly outside the tile. See ``crops.py``."""

    y: float
    x: float
    height: float
    width: float


def orient(array: NDArray[Any], orientation: int, axes: tuple[int, int] = (0, 1)) -> NDArray[Any]:
    """Return ``array`` in orientation ``0..7``: an exact copy or view of the same values, (row, column) = ``axes``."""
    turned = np.rot90(array, orientation % 4, axes)
    return np.flip(turned, axes[1]) if orientation >= 4 else turned


def inverse_orientation(orientation: int) -> int:
    """Return the orientation that undoes ``orientation``. Mirrored ones undo themselves."""
    return orientation if orientation >= 4 else (4 - orientation) % 4


def orient_point(y: float, x: float, side: float, orientation: int) -> tuple[float, float]:
    """Return where the point ``(y, x)`` of a square tile of ``side`` lies in the oriented frame."""
    for _ in range(orientation % 4):
        y, x = side - x, y
    return (y, side - x) if orientation >= 4 else (y, x)


def render(tile: NDArray[np.uint8], view: ViewSpec) -> NDArray[np.uint8]:
    """Return what ``view`` shows of ``tile`` ``[H, H, 3]``: uint8 ``[side, side, 3]`` at tile resolution, contiguous.

    Turned, cut, then recoloured; the resize to ``view.size_px`` is the teacher's. Where nothing changes, the tile.
    Raises ``UsageError`` when the crop leaves the tile.
    """
    shown: NDArray[np.uint8] = orient(tile, view.orientation)
    if (crop := view.crop) is not None:
        if max(crop.y, crop.x) + crop.side_px > len(tile):
            raise UsageError(f"view {view.name}: its crop {crop!r} leaves the tile of {len(tile)} px")
        shown = shown[crop.y : crop.y + crop.side_px, crop.x : crop.x + crop.side_px]
    if view.photometry is not None:
        shown = photometric(shown, view.photometry)
    return np.ascontiguousarray(shown)


def base_size_px(teacher: TeacherSpec, tile_px: int) -> int:
    """Return the side of the view at scale 1: dyadic on the tile, nearest to what the teacher was trained at.

    Strides of 4, 8, 16, 32 or 64 tile pixels that divide the tile are candidates (decision 9: one lattice); the
    nearest view side to ``min(native, tile)`` on a log scale wins. 512-px tiles: DINOv2 448, CLIP-L/14 224. A teacher
    that aligns corners (``_paper``) is on no lattice anyway: it sees the side it was trained at.
    """
    if teacher.pixel.align_corners:
        return teacher.native_px
    goal = min(teacher.native_px, tile_px)
    sides = [tile_px // d * teacher.patch_px for d in (64, 32, 16, 8, 4) if tile_px % d == 0]
    if not sides:
        raise UsageError(
            f"tiles of {tile_px} px have no lattice of 4, 8, 16, 32 or 64 px; cut tiles whose side is a multiple of 32"
        )
    return min(sides, key=lambda side: (abs(math.log(side / goal)), side))


def fitting_scales(teacher: TeacherSpec, tile_px: int, scales: tuple[float, ...]) -> tuple[float, ...]:
    """Return those of ``scales`` that tiles of ``tile_px`` can have; all of them when none can, so that they are named.

    For defaults: tiles of 6000 px have no scale 0.5, and nobody asked for it.
    """
    base = base_size_px(teacher, tile_px)
    return tuple(s for s in scales if base * s % teacher.patch_px == 0) or scales


def view_specs(teacher: TeacherSpec, tile_px: int, scales: tuple[float, ...], orientations: int) -> list[ViewSpec]:
    """Return the views asked for, scales outermost. Raises ``UsageError`` for a scale the patch grid cannot hold."""
    if orientations not in ORIENTATION_SETS:
        raise UsageError(f"--orientations {orientations}: choose 1, 2, 4 or 8")
    base = base_size_px(teacher, tile_px)
    views: list[ViewSpec] = []
    for scale in scales:
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError(f"scale {scale:g}: scales are positive numbers, such as 0.5, 1, 2")
        size = base * scale
        if size != int(size) or int(size) % teacher.patch_px:
            good = [s for s in (0.25, 0.5, 1.0, 2.0) if base * s % teacher.patch_px == 0]
            raise UsageError(
                f"scale {scale:g} makes views of {size:g} px, not a multiple of the {teacher.patch_px}-px patch of "
                f"{teacher.name}; tiles of {tile_px} px can have the scales {', '.join(f'{s:g}' for s in good)} "
                f"(scale 1 = {base} px)"
            )
        if size > 2**16:
            raise UsageError(f"scale {scale:g} makes views of {size:g} px; at most {2**16} px a side can be stored")
        views += [ViewSpec(size_px=int(size), orientation=o) for o in ORIENTATION_SETS[orientations]]
    if len({v.name for v in views}) != len(views):
        raise UsageError(f"scales {', '.join(f'{s:g}' for s in scales)}: the same scale stands twice")
    return views


def lattice_px(specs: list[FeatureSpec]) -> int:
    """Return the coarsest stride of ``specs`` in tile pixels: crops on its multiples are exact for all of them."""
    lattice = 1
    for spec in specs:
        stride = spec.stride_tile_px
        if stride != int(stride):
            raise UsageError(f"{spec.key}: a stride of {stride:.3f} tile pixels is on no pixel lattice")
        lattice = math.lcm(lattice, int(stride))
    return lattice


def token_box(spec: FeatureSpec, box: Box | CropBox) -> Box:
    """Return the tokens whose cells fill ``box`` exactly, to a millionth of a token.

    ``box`` is in tile pixels of the oriented frame, for a fixed view too. Raises ``UsageError`` when it is off the
    lattice or leaves what the view shows.
    """
    stride, (top, left) = spec.stride_tile_px, spec.origin_tile_px
    edges = [v / stride for v in (box.y - top, box.x - left, box.height, box.width)]
    y, x, height, width = (round(e) if math.isfinite(e) else -1 for e in edges)
    off = any(abs(e - t) > 1e-6 for e, t in zip(edges, (y, x, height, width), strict=True))
    if off or height <= 0 or width <= 0:
        raise UsageError(f"{spec.key}: box {box} is not on its lattice of {stride:g} tile pixels; align the crop to it")
    rows, columns = spec.grid
    if y < 0 or x < 0 or y + height > rows or x + width > columns:
        raise UsageError(f"{spec.key}: box {box} leaves the tile of {spec.tile_px} px")
    return Box(y, x, height, width)
