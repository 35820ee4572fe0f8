"""A dataset as a folder of image files, one a tile.

::

    DIR/dataset.yaml            name, tile_px, ignore_index, masks: complete | partial, attribution, classes
    DIR/images/ID.png           tile_px x tile_px; 8-bit RGB, or what ``pixels`` in dataset.yaml makes such of
    DIR/masks/ID.png            class numbers or ignore_index in one band, or what ``labels`` and ``values`` say
    DIR/splits/train.txt        one id a line; val.txt and test.txt likewise; no id in two of them
    DIR/splits/labeled/5.txt    subsets of train whose labels may be used; the name is free
    DIR/georeference.csv        optional: id,crs,a,b,c,d,e,f

PNG is read by Pillow, every other raster format by GDAL. Nothing is converted unless ``dataset.yaml`` says how. With
``masks: partial`` a tile may have no mask, unless it is in a labelled subset that is used: a list of tiles can be there
before their masks are drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, TileError, did_you_mean
from rsmtdf_cache.rasters.png import GREY, PALETTE, RGB, PngError, PngHeader, decode_png, parse_png_header
from rsmtdf_cache.sources.base import Georeference, Tile
from rsmtdf_cache.sources.georeference import read_georeference
from rsmtdf_cache.sources.header import DatasetHeader
from rsmtdf_cache.sources.listed import LABELED, ListedSource
from rsmtdf_cache.sources.raster_files import RasterFiles, gdal_version

__all__ = ["FolderSource"]

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".jp2", ".bmp", ".gif", ".webp"}


class FolderSource(ListedSource):
    """The dataset in the folder ``root``, described by ``header``. A snapshot: files are listed once, at first use."""

    _NO_MASK = "has no mask masks/{id}.png"

    def __init__(self, root: str | Path, header: DatasetHeader) -> None:
        super().__init__(Path(root), header)
        self.masks_complete = header.masks == "complete"
        self._rasters = RasterFiles(header)
        self.pixels = self._rasters.rule

    @property
    def decoder(self) -> str:
        """Return ``pillow 11.0``; with GDAL's version where it reads some of the images, and by which rule."""
        from importlib.metadata import version

        name = f"pillow {version('pillow')}"
        if self.pixels is not None:
            return f"{name}, {gdal_version()}, {self.pixels.to_json()}"
        return f"{name}, {gdal_version()}" if self.may_lack_data else name

    @property
    def may_lack_data(self) -> bool:
        """Return whether GDAL reads some of the images: only plain PNG has data everywhere."""
        return self.pixels is not None or any(
            not file.lower().endswith(".png") for files in self._images.values() for file in files
        )

    def check(self, splits: Sequence[str] | None = None) -> None:
        """Raise ``DataError`` for the first fault of the dataset as a whole.

        File names and split files are checked throughout; masks are decoded for the asked ``splits`` alone, and only
        there has a tile of a labelled subset to have one (default: all). A tile whose image cannot be used is no fault
        here: ``read_image`` says so, and its mask is not judged.
        """
        self._check_files()
        self._check_splits(None if splits is None else self._asked(splits))
        self._each(self._check_mask, self.tiles(splits))

    def read_image(self, tile: Tile) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px, 3]`` uint8 RGB.

        Raises ``TileError`` for a file that is damaged or of another size, and for anything but 8-bit RGB where
        ``dataset.yaml`` does not say how to make that of it.
        """
        return self.read_valid(tile)[0]

    def read_valid(self, tile: Tile) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Return the image, and where it holds data: all of it is None. Raises ``TileError`` as ``read_image`` does."""
        try:
            if self.pixels is None and tile.image.suffix.lower() == ".png":
                return self._read_png(tile.image), None
            return self._read_raster(tile.image)
        except (PngError, DataError) as error:
            where = "" if str(tile.image) in str(error) else f"{tile.image}: "
            raise TileError(tile.id, f"{where}{error}") from None
        except OSError as error:
            raise TileError(tile.id, f"{tile.image}: cannot be read ({error.strerror})") from None

    def _read_png(self, path: Path) -> NDArray[np.uint8]:
        data = path.read_bytes()
        header = parse_png_header(data)
        if (header.bit_depth, header.color_type) != (8, RGB) or not self._has_tile_size(header):
            raise PngError(f"found {header}; {self._wanted()}")
        image: NDArray[np.uint8] = decode_png(data)
        return image

    def _read_raster(self, path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        with self._rasters.described(path) as scene:
            size, bands = (scene.width, scene.height), scene.count
            if size != (self.tile_px, self.tile_px) or (self.pixels is None and bands != 3):
                found = f"{bands} band{'s' * (bands != 1)} of {scene.dtype}, {size[0]} x {size[1]} px"
                raise PngError(f"found {found}; {self._wanted()}")
        return self._rasters.image(path, (0, 0))

    def _wanted(self) -> str:
        size = f"{self.tile_px} x {self.tile_px} px"
        if self.pixels is not None:
            return f"this dataset takes {size}"
        return f"this dataset takes 8-bit RGB, {size}; bands and a range for others are set by `pixels` in dataset.yaml"

    def read_mask(self, tile: Tile) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px]`` uint8 class numbers or ``ignore_index``.

        Raises ``DataError`` naming the file when it is no mask of that size, is damaged, or holds what is no class, and
        when the tile has no mask.
        """
        if tile.mask is None:
            raise DataError(f"tile {tile.id!r} of {self.root} has no mask; it can only be used without labels")
        if self.held is not None and self.held.may_lack_data and not tile.image.is_file():
            raise DataError(
                f"{tile.image}: there is no such file. A store has the pixels of {tile.id!r}, but where an image has "
                "no data its labels do not count, and that is read from the image; bring it back"
            )
        if not self._is_plain_mask(tile.mask):
            mask = self._rasters.mask(tile.image, tile.mask, (0, 0))
            return mask
        try:
            data = tile.mask.read_bytes()
            header = parse_png_header(data)
            if header.color_type != PALETTE and (header.color_type != GREY or header.bit_depth not in (1, 8)):
                raise PngError(
                    f"found {header}; a mask is 8-bit with one band of class numbers. Where colours say the class, "
                    "write `labels: {kind: colors}` in dataset.yaml"
                )
            if not self._has_tile_size(header):
                raise PngError(f"found {header}; the tiles are {self.tile_px} x {self.tile_px} px")
            mask = decode_png(data).astype(np.uint8)  # 1 bit comes as bool: class 0 and class 1
        except PngError as error:
            raise DataError(f"mask {tile.mask}: {error}") from None
        except OSError as error:
            raise DataError(f"mask {tile.mask}: cannot be read ({error.strerror})") from None
        bad = (mask >= len(self.classes)) & (mask != self.ignore_index)
        if bad.any():
            row, column = (int(v) for v in np.argwhere(bad)[0])
            raise DataError(
                f"mask {tile.mask}: value {mask[row, column]} at row {row}, column {column} "
                f"({int(bad.sum())} such pixels) is outside the classes 0 to {len(self.classes) - 1} and not "
                f"ignore_index {self.ignore_index}; correct the mask or the classes in dataset.yaml"
            )
        if self.pixels is not None or tile.image.suffix.lower() != ".png":
            with suppress(TileError):  # an image that cannot be used is told of when it is read
                valid = self.read_valid(tile)[1]
                if valid is not None:
                    mask[~valid] = self.ignore_index
        return mask

    def _is_plain_mask(self, mask: Path) -> bool:
        """Whether the file has class numbers in a PNG: nothing else has been asked for."""
        given = self.header.labels is not None or any(c.values is not None for c in self.header.classes)
        return not given and mask.suffix.lower() == ".png"

    def _has_tile_size(self, header: PngHeader) -> bool:
        return header.width == header.height == self.tile_px

    @cached_property
    def _images(self) -> dict[str, list[str]]:
        if self.held is not None and not (self.root / "images").exists():
            return {}
        return _list_files(self.root / "images")

    @cached_property
    def _masks(self) -> dict[str, list[str]]:
        return _list_files(self.root / "masks") if self.masks_complete or (self.root / "masks").is_dir() else {}

    @cached_property
    def _georeference(self) -> Mapping[str, Georeference]:
        path = self.root / "georeference.csv"
        return read_georeference(path) if path.exists() else {}

    def tile(self, tile_id: str, split: str) -> Tile:
        """Return the tile that ``split`` names. Raises ``DataError`` for an id without an image file."""
        files = self._images.get(tile_id)
        if not files and self.is_held(tile_id):
            files = [f"{tile_id}.png"]
        if not files:
            raise DataError(
                f"{self._split_files[split]}: id {tile_id!r} has no image file {self.root / 'images'}/{tile_id}.png;"
                f"{did_you_mean(tile_id, self._images)} add the image or take the id out"
            )
        masks = self._masks.get(tile_id)
        return Tile(
            id=tile_id,
            split="train" if split.startswith(LABELED) else split,
            image=self.root / "images" / files[0],
            mask=self.root / "masks" / masks[0] if masks else None,
            georeference=self._georeference.get(tile_id),
        )

    def _check_files(self) -> None:
        for folder, listing in (("images", self._images), ("masks", self._masks)):
            for stem, names in listing.items():
                if len(names) > 1:
                    raise DataError(f"{self.root / folder}: tile id {stem!r} stands twice: {', '.join(names)}")
        orphans = self._masks.keys() - self._images.keys()
        orphan = min((i for i in orphans if not self.is_held(i)), default=None)
        if orphan is not None:
            raise DataError(
                f"mask {self.root / 'masks' / self._masks[orphan][0]} has no image images/{orphan}.png; add it or "
                "remove the mask"
            )
        bare = sorted(self._images.keys() - self._masks.keys()) if self.masks_complete else []
        if bare:
            raise DataError(
                f"image {self.root / 'images' / self._images[bare[0]][0]} has no mask masks/{bare[0]}.png "
                f"({len(bare)} such images); add it, or set 'masks: partial' in dataset.yaml for tiles without labels"
            )

    def _check_mask(self, tile: Tile) -> None:
        if tile.mask is None:
            return
        try:
            image = self._rasters.size(tile.image)
        except (PngError, OSError, DataError):
            if not self.is_held(tile.id) or tile.image.exists():
                return
            image = (self.tile_px, self.tile_px)
        try:
            mask = self._rasters.size(tile.mask)
        except (PngError, OSError) as error:
            raise DataError(f"mask {tile.mask}: {error}") from None
        if image != mask:
            raise DataError(
                f"mask {tile.mask} is {mask[0]} x {mask[1]} px, its image {tile.image.name} "
                f"{image[0]} x {image[1]} px; they have to be the same"
            )
        if image == (self.tile_px, self.tile_px):
            self.read_mask(tile)


def _list_files(folder: Path) -> dict[str, list[str]]:
    """Return file names by stem: image files alone, without hidden ones."""
    found: dict[str, list[str]] = {}
    try:
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_file())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); a dataset has images/ and masks/") from None
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in _IMAGE_SUFFIXES:
            found.setdefault(stem, []).append(name)
    return found
