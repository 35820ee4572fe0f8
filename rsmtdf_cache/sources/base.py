"""The contract of a dataset: which tiles there are, and their pixels. One file of this folder = one kind of dataset."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.rasters.scaling import PixelRule

__all__ = ["ClassInfo", "Georeference", "HeldPixels", "Tile", "TileSource"]


@dataclass(frozen=True)
class ClassInfo:
    """One land-cover class: its position in the dataset's list is its label value."""

    name: str
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Georeference:
    """CRS (e.g. ``"EPSG:4326"``) and affine ``(a, b, c, d, e, f)``: x = a*col + b*row + c, y = d*col + e*row + f."""

    crs: str
    affine: tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class Tile:
    """One tile of a dataset. ``id`` is unique in the dataset and safe as a file name.

    ``origin_px``: row and column of its first pixel in ``image`` where that is a larger scene, None where the file is
    the tile.
    """

    id: str
    split: str
    image: Path
    mask: Path | None
    georeference: Georeference | None = None
    origin_px: tuple[int, int] | None = None

    @property
    def place(self) -> str:
        """The file, and where in it: what tells apart two tiles of one scene."""
        return str(self.image) if self.origin_px is None else f"{self.image}#{self.origin_px[0]},{self.origin_px[1]}"


class HeldPixels(Protocol):
    """Who has pixels of tiles beside the dataset's own files: a store."""

    def __contains__(self, tile_id: object) -> bool: ...

    @property
    def may_lack_data(self) -> bool: ...


class TileSource(ABC):
    """A dataset on disk. All tiles are square, of one side ``tile_px``.

    ``pixels``: how values become 8-bit RGB, None where files hold that. ``held``: tiles that somebody else has the
    pixels of: that their images are not there is no fault, as long as nobody reads them.
    """

    root: Path
    name: str
    tile_px: int
    classes: tuple[ClassInfo, ...]
    ignore_index: int
    attribution: str
    pixels: PixelRule | None = None
    held: HeldPixels | None = None

    def is_held(self, tile_id: str) -> bool:
        """Return whether the image of a tile may be absent."""
        return self.held is not None and tile_id in self.held

    @property
    def may_lack_data(self) -> bool:
        """Whether tiles of this dataset can have pixels without data; ``read_valid`` says where."""
        return False

    @property
    @abstractmethod
    def decoder(self) -> str:
        """What turns files into pixels, with its version and all that decides them; another may give others."""

    @abstractmethod
    def split_names(self) -> list[str]:
        """Return the splits there are: ``train``, ``val``, ``test``, and labelled subsets of train as ``labeled/5``."""

    @abstractmethod
    def split(self, name: str) -> list[str]:
        """Return the tile ids of split ``name`` in file order. Raises ``DataError`` when unknown or empty.

        ``name`` may be the short form of a labelled subset: ``"5"`` means ``"labeled/5"``.
        """

    @abstractmethod
    def tiles(self, splits: Sequence[str] | None = None) -> list[Tile]:
        """Return the tiles of ``splits`` (default: all of train, val and test), ordered by split, then id."""

    @abstractmethod
    def check(self, splits: Sequence[str] | None = None) -> None:
        """Raise ``DataError`` for a fault of the dataset as a whole, before anything is written (decision 13).

        Duplicate ids, an id in two splits, an image without mask or mask without image, a mask whose size differs
        from its image's, a label outside the classes, an empty split.
        """

    @abstractmethod
    def read_image(self, tile: Tile) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px, 3]`` uint8 RGB. Raises ``TileError`` for a file that cannot be one."""

    def read_valid(self, tile: Tile) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Return the image as ``read_image`` does, and ``[tile_px, tile_px]``: where it holds data. None: everywhere.

        Raises ``TileError``.
        """
        return self.read_image(tile), None

    @abstractmethod
    def read_mask(self, tile: Tile) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px]`` uint8 class numbers or ``ignore_index``. Raises ``DataError``."""
