"""Which part of a tile a sample shows: crops on the lattice, stored random views, or RS-MTDF's scaled crops.

A geometry draws; a ``Cut`` is what was drawn, and cuts image, label and padding mask of a tile by the same numbers.

Shape legend: T side of a tile, S side of a crop (``crop_px``), both in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.fixed_views import FixedView
from rsmtdf_cache.views import Box, orient

__all__ = ["CropGeometry", "Cut", "DEFAULT_LATTICE_PX", "FixedViewGeometry", "Geometry", "NativeGeometry"]

#: The lattice of the default views (decision 9); crops of a run without a store lie on it too.
DEFAULT_LATTICE_PX = 32

_MIRROR = 4


@dataclass(frozen=True)
class Cut:
    """The square ``box`` of a tile that was turned to ``orientation``, then resized to ``scaled_px`` a side.

    ``scaled_px`` None: not resized. ``box`` is in pixels of the turned and resized tile. It may leave it: outside is
    padding. A box of another side than the crop (a fixed view, always inside) is resized to the crop's side, after it
    was cut, as the teacher was shown it. ``view``: which of the geometry's fixed views it is.

    Images are resized by Pillow's bilinear rule, which is antialiased (RS-MTDF's code uses it, and torch's
    ``antialias=True`` is the same rule). The label of a pixel is that of the tile pixel its centre lies in, exactly: a
    centre on the edge of two belongs to the one below or to the right.
    """

    orientation: int
    box: Box
    scaled_px: int | None = None
    view: int | None = None

    def image(self, tile_TT3: NDArray[np.uint8], crop_px: int) -> NDArray[np.uint8]:
        """Return ``[S, S, 3]`` uint8; 0 on padding. A crop that is only turned is a view: a batch copies it once."""
        turned, tile_px, box = orient(tile_TT3, self.orientation), len(tile_TT3), self.box
        frame_px = self.scaled_px or tile_px
        y0, x0 = max(box.y, 0), max(box.x, 0)
        y1, x1 = min(box.y + box.height, frame_px), min(box.x + box.width, frame_px)
        if frame_px == tile_px and box == Box(y0, x0, y1 - y0, x1 - x0):
            cut = turned[y0:y1, x0:x1]
            if box.height == crop_px:
                return cut
            return _resized(cut, (crop_px, crop_px), (0, 0, box.height, box.width))
        # Only what is seen is computed. The kernels still reach beyond it, as if the whole tile had been resized first
        # (but for ties of the rounding: at most 2 levels, a test holds it).
        region = tuple(edge * tile_px / frame_px for edge in (y0, x0, y1, x1))
        image = np.zeros((crop_px, crop_px, 3), np.uint8)
        image[y0 - box.y : y1 - box.y, x0 - box.x : x1 - box.x] = _resized(turned, (y1 - y0, x1 - x0), region)
        return image

    def label(self, tile_TT: NDArray[np.uint8], crop_px: int, ignore_index: int) -> NDArray[np.uint8]:
        """Return ``[S, S]`` uint8; ``ignore_index`` on padding. A view where ``image`` returns one."""
        turned = orient(tile_TT, self.orientation)
        if self._is_plain(len(tile_TT), crop_px):
            plain: NDArray[np.uint8] = turned[self.box.y : self.box.y + crop_px, self.box.x : self.box.x + crop_px]
            return plain
        (rows, in_y), (columns, in_x) = self._sources(len(tile_TT), crop_px)
        label: NDArray[np.uint8] = turned.take(rows, 0, mode="clip").take(columns, 1, mode="clip")
        label[~in_y] = ignore_index
        label[:, ~in_x] = ignore_index
        return label

    def valid(self, tile_px: int, crop_px: int) -> NDArray[np.bool_]:
        """Return ``[S, S]`` bool: False on padding."""
        if self._is_plain(tile_px, crop_px):
            return np.ones((crop_px, crop_px), np.bool_)
        (_, in_y), (_, in_x) = self._sources(tile_px, crop_px)
        return np.asarray(in_y[:, None] & in_x)

    def _is_plain(self, tile_px: int, crop_px: int) -> bool:
        """Whether the crop is a part of the turned tile as it is: not resized, all of it inside."""
        box = self.box
        inside = min(box.y, box.x) >= 0 and max(box.y, box.x) + crop_px <= tile_px
        return (self.scaled_px or tile_px) == tile_px and box.height == box.width == crop_px and inside

    def _sources(self, tile_px: int, crop_px: int) -> tuple[tuple[NDArray[Any], NDArray[Any]], ...]:
        """Return for rows and columns of the crop: index in the turned tile ``[S]``, and whether it is there ``[S]``.

        In whole numbers: the centre of pixel i of the crop lies at ``start + (i + 1/2) * length / S`` of the frame.
        """
        frame_px, pixels = self.scaled_px or tile_px, np.arange(crop_px, dtype=np.int64)
        axes = []
        for start, length in ((self.box.y, self.box.height), (self.box.x, self.box.width)):
            index = (2 * crop_px * start + (2 * pixels + 1) * length) * tile_px // (2 * crop_px * frame_px)
            axes.append((index, (index >= 0) & (index < tile_px)))
        return tuple(axes)


def _resized(image_HW3: NDArray[np.uint8], size: tuple[int, int], region: tuple[float, ...]) -> NDArray[np.uint8]:
    """Return ``size`` (height, width) pixels of the ``region`` (y0, x0, y1, x1) of an image."""
    y0, x0, y1, x1 = region
    picture = Image.fromarray(np.ascontiguousarray(image_HW3))
    return np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)))


class CropGeometry(ABC):
    """Which crops of a tile there are: squares of ``crop_px``, the tiles having ``tile_px``."""

    tile_px: int
    crop_px: int

    @abstractmethod
    def draw(self, rng: np.random.Generator, turn: bool = True) -> Cut:
        """Return a crop, a function of the state of ``rng``. ``turn`` False: not turned, the same place."""


@dataclass(frozen=True)
class Geometry(CropGeometry):
    """Squares at multiples of ``lattice_px`` in one of ``orientations``: there stored features are exact."""

    tile_px: int
    crop_px: int
    lattice_px: int = DEFAULT_LATTICE_PX
    orientations: tuple[int, ...] = tuple(range(8))

    def __post_init__(self) -> None:
        """Raise ``UsageError`` for a crop that no tile holds or that the lattice does not divide."""
        if not self.orientations:
            raise UsageError("no orientation is stored for every feature array; build them with one --orientations")
        if self.crop_px > self.tile_px:
            raise UsageError(
                f"crop_px {self.crop_px} is larger than the tiles of {self.tile_px} px; "
                f"choose a multiple of {self.lattice_px} up to {self.tile_px // self.lattice_px * self.lattice_px}"
            )
        if self.crop_px % self.lattice_px:
            below = self.crop_px // self.lattice_px * self.lattice_px
            near = [px for px in (below, below + self.lattice_px) if 0 < px <= self.tile_px]
            raise UsageError(
                f"crop_px {self.crop_px} is not on the lattice of {self.lattice_px} px, the coarsest token of the "
                f"features; choose {' or '.join(map(str, near)) or f'a multiple of {self.lattice_px}'}"
            )

    def draw(self, rng: np.random.Generator, turn: bool = True) -> Cut:
        """Return a crop on the lattice. ``turn`` False takes the first orientation, same box."""
        u, v, w = rng.random(3)
        places = (self.tile_px - self.crop_px) // self.lattice_px + 1
        orientation = self.orientations[int(u * len(self.orientations))] if turn else self.orientations[0]
        y, x = int(v * places) * self.lattice_px, int(w * places) * self.lattice_px
        return Cut(orientation, Box(y, x, self.crop_px, self.crop_px))


@dataclass(frozen=True)
class FixedViewGeometry(CropGeometry):
    """The crop and the turn of one of the stored ``views``, shown at ``crop_px``.

    Their colours are what the teachers saw. The student's weak view has the tile's own, its strong view those that are
    drawn for it: photometry is no part of the geometry, and a run without teachers shares every pixel.
    """

    tile_px: int
    crop_px: int
    views: tuple[FixedView, ...]

    def __post_init__(self) -> None:
        """Raise ``UsageError`` when there is nothing to draw."""
        if not self.views:
            raise UsageError("there is no fixed view that all features share")

    def draw(self, rng: np.random.Generator, turn: bool = True) -> Cut:
        """Return one of the views, all equally likely; ``turn`` changes nothing, a view is stored with its turn."""
        number = int(rng.random() * len(self.views))
        view = self.views[number]
        return Cut(view.orientation, Box(view.crop.y, view.crop.x, view.crop.side_px, view.crop.side_px), view=number)


@dataclass(frozen=True)
class NativeGeometry(CropGeometry):
    """RS-MTDF's crops: the tile zoomed, padded to the right and below, cropped anywhere, mirrored or not.

    The side becomes a whole number of pixels, uniform in ``scale`` times the tile; a tile that is then smaller than the
    crop is padded; the crop's corner is any pixel, uniform; the crop is mirrored left-right with probability 0.5, its
    padding with it. ``crop_px`` may be larger than the tile. Tiles are square, so both sides are zoomed alike. Source:
    RS-MTDF (arXiv 2506.08772) with its released code, whose augmentation is that of UniMatch-V2.
    """

    tile_px: int
    crop_px: int
    scale: tuple[float, float] = (0.5, 2.0)

    def draw(self, rng: np.random.Generator, turn: bool = True) -> Cut:
        """Return a crop; ``turn`` False never mirrors, and shows the same place."""
        u, v, w, mirror = rng.random(4)
        least, most = (max(1, int(self.tile_px * factor)) for factor in self.scale)
        scaled_px = least + int(u * (most - least + 1))
        places = max(scaled_px, self.crop_px) - self.crop_px + 1
        y, x = int(v * places), int(w * places)
        if turn and mirror < 0.5:
            return Cut(_MIRROR, Box(y, scaled_px - self.crop_px - x, self.crop_px, self.crop_px), scaled_px)
        return Cut(0, Box(y, x, self.crop_px, self.crop_px), scaled_px)
