"""A dataset as a folder of PNG files.

::

    DIR/dataset.yaml            name, tile_px, ignore_index, masks: complete | partial, attribution, classes
    DIR/images/ID.png           8-bit RGB, tile_px x tile_px
    DIR/masks/ID.png            8-bit, one band (grey or palette): class numbers, or ignore_index
    DIR/splits/train.txt        one id a line; val.txt and test.txt likewise; no id in two of them
    DIR/splits/labeled/5.txt    subsets of train whose labels may be used; the name is free
    DIR/georeference.csv        optional: id,crs,a,b,c,d,e,f

With ``masks: partial`` a tile may have no mask, unless it is in a labelled subset that is used: a list of tiles can be
there before their masks are drawn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, TileError, did_you_mean
from rsmtdf_cache.sources.base import ClassInfo, Georeference, Tile, TileSource
from rsmtdf_cache.sources.georeference import read_georeference
from rsmtdf_cache.sources.header import read_header
from rsmtdf_cache.sources.png import (
    GREY,
    PALETTE,
    RGB,
    PngError,
    PngHeader,
    decode_png,
    parse_png_header,
    read_png_header,
)

__all__ = ["FolderSource"]

_SPLITS = ("train", "val", "test")
_LABELED = "labeled/"
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"}


class FolderSource(TileSource):
    """The dataset in the folder ``root``. A snapshot: file listings are taken once, at first use.

    Raises ``DataError`` when the folder or its ``dataset.yaml`` is missing or malformed.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        header = read_header(self.root)
        self.name = header.name
        self.tile_px = header.tile_px
        self.classes = tuple(ClassInfo(c.name, c.color) for c in header.classes)
        self.ignore_index = header.ignore_index
        self.attribution = header.attribution
        self.masks_complete = header.masks == "complete"
        self._ids: dict[str, list[str]] = {}

    def split_names(self) -> list[str]:
        """Return those of train, val, test that have a file, then the labelled subsets, smaller numbers first."""
        return list(self._split_files)

    def split(self, name: str) -> list[str]:
        """Return the ids of split ``name`` in file order; ``"5"`` is short for ``"labeled/5"``.

        Raises ``DataError`` for an unknown or empty split, an id that stands twice or is no safe file name.
        """
        name = self._full_name(name)
        if name not in self._ids:
            self._ids[name] = _read_ids(self._split_files[name])
        return list(self._ids[name])

    def tiles(self, splits: Sequence[str] | None = None) -> list[Tile]:
        """Return the tiles of ``splits``, each once, in the order train, val, test, and by id within a split.

        A tile of a labelled subset carries the split ``train``. Raises ``DataError`` for an id without an image file.
        """
        asked = self._asked(splits)
        found: list[Tile] = []
        seen: set[str] = set()
        for name in asked:
            ids = sorted(set(self.split(name)) - seen)
            seen.update(ids)
            found += [self._tile(tile_id, name) for tile_id in ids]
        home = {s: i for i, s in enumerate(_SPLITS)}
        return sorted(found, key=lambda tile: (home[tile.split], tile.id))

    def check(self, splits: Sequence[str] | None = None) -> None:
        """Raise ``DataError`` for the first fault of the dataset as a whole.

        File names and split files are checked throughout; masks are decoded for the asked ``splits`` alone, and only
        there has a tile of a labelled subset to have one (default: all). A tile whose image cannot be used is no fault
        here: ``read_image`` says so, and its mask is not judged.
        """
        self._check_files()
        self._check_splits(None if splits is None else self._asked(splits))
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(self._check_mask, self.tiles(splits)):
                pass

    def read_image(self, tile: Tile) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px, 3]`` uint8 RGB.

        Raises ``TileError`` for anything but a whole 8-bit RGB PNG of that size; nothing is converted.
        """
        try:
            data = tile.image.read_bytes()
            header = parse_png_header(data)
            if (header.bit_depth, header.color_type) != (8, RGB) or not self._has_tile_size(header):
                raise PngError(f"found {header}; this dataset takes 8-bit RGB, {self.tile_px} x {self.tile_px} px")
            image: NDArray[np.uint8] = decode_png(data)
        except PngError as error:
            raise TileError(tile.id, f"{tile.image}: {error}") from None
        except OSError as error:
            raise TileError(tile.id, f"{tile.image}: cannot be read ({error.strerror})") from None
        return image

    def read_mask(self, tile: Tile) -> NDArray[np.uint8]:
        """Return ``[tile_px, tile_px]`` uint8 class numbers or ``ignore_index``.

        Raises ``DataError`` naming the file when it is no 8-bit mask of one band and that size, is damaged, or holds a
        value outside the classes, and when the tile has no mask.
        """
        if tile.mask is None:
            raise DataError(f"tile {tile.id!r} of {self.root} has no mask; it can only be used without labels")
        try:
            data = tile.mask.read_bytes()
            header = parse_png_header(data)
            if header.color_type not in (GREY, PALETTE) or (header.color_type == GREY and header.bit_depth != 8):
                raise PngError(f"found {header}; a mask is 8-bit with one band of class numbers")
            if not self._has_tile_size(header):
                raise PngError(f"found {header}; the tiles are {self.tile_px} x {self.tile_px} px")
            mask: NDArray[np.uint8] = decode_png(data)
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
        return mask

    def _has_tile_size(self, header: PngHeader) -> bool:
        return header.width == header.height == self.tile_px

    @cached_property
    def _split_files(self) -> dict[str, Path]:
        folder = self.root / "splits"
        found = {name: folder / f"{name}.txt" for name in _SPLITS if (folder / f"{name}.txt").is_file()}
        for path in sorted((folder / "labeled").glob("*.txt"), key=lambda p: (len(p.stem), p.stem)):
            found[_LABELED + path.stem] = path
        return found

    def _full_name(self, name: str) -> str:
        known = self._split_files
        if name in known:
            return name
        if _LABELED + name in known:
            return _LABELED + name
        words = [*known, *(n.removeprefix(_LABELED) for n in known)]
        listed = ", ".join(known) if known else "none; write one id a line to splits/train.txt"
        raise DataError(f"{self.root} has no split {name!r}.{did_you_mean(name, words)} Splits there: {listed}")

    def _asked(self, splits: Sequence[str] | None) -> list[str]:
        if splits is not None:
            return [self._full_name(name) for name in splits]
        return [name for name in _SPLITS if name in self._split_files] or [self._full_name("train")]

    @cached_property
    def _images(self) -> dict[str, list[str]]:
        return _list_files(self.root / "images")

    @cached_property
    def _masks(self) -> dict[str, list[str]]:
        return _list_files(self.root / "masks") if self.masks_complete or (self.root / "masks").is_dir() else {}

    @cached_property
    def _georeference(self) -> Mapping[str, Georeference]:
        path = self.root / "georeference.csv"
        return read_georeference(path) if path.exists() else {}

    def _tile(self, tile_id: str, split: str) -> Tile:
        files = self._images.get(tile_id)
        if not files:
            raise DataError(
                f"{self._split_files[split]}: id {tile_id!r} has no image file {self.root / 'images'}/{tile_id}.png;"
                f"{did_you_mean(tile_id, self._images)} add the image or take the id out"
            )
        masks = self._masks.get(tile_id)
        return Tile(
            id=tile_id,
            split="train" if split.startswith(_LABELED) else split,
            image=self.root / "images" / files[0],
            mask=self.root / "masks" / masks[0] if masks else None,
            georeference=self._georeference.get(tile_id),
        )

    def _check_files(self) -> None:
        for folder, listing in (("images", self._images), ("masks", self._masks)):
            for stem, names in listing.items():
                if len(names) > 1:
                    raise DataError(f"{self.root / folder}: tile id {stem!r} stands twice: {', '.join(names)}")
        orphan = min(self._masks.keys() - self._images.keys(), default=None)
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

    def _check_splits(self, asked: Sequence[str] | None) -> None:
        owner: dict[str, str] = {}
        for name in self.split_names():
            ids = self.split(name)
            for tile_id in ids:
                self._tile(tile_id, name)
                if name in _SPLITS and owner.setdefault(tile_id, name) != name:
                    raise DataError(
                        f"{self.root}: tile id {tile_id!r} is in splits {owner[tile_id]} and {name}; a tile belongs to "
                        "one of train, val and test"
                    )
                if name.startswith(_LABELED) and owner.get(tile_id) != "train":
                    raise DataError(
                        f"{self._split_files[name]}: tile {tile_id!r} is not in splits/train.txt; a labelled subset "
                        "is a part of train"
                    )
                used = asked is None or name in asked
                if name.startswith(_LABELED) and used and tile_id not in self._masks:
                    raise DataError(f"{self._split_files[name]}: tile {tile_id!r} has no mask masks/{tile_id}.png")

    def _check_mask(self, tile: Tile) -> None:
        if tile.mask is None:
            return
        try:
            image = read_png_header(tile.image)
        except (PngError, OSError):
            return
        try:
            mask = read_png_header(tile.mask)
        except (PngError, OSError) as error:
            raise DataError(f"mask {tile.mask}: {error}") from None
        if (image.width, image.height) != (mask.width, mask.height):
            raise DataError(
                f"mask {tile.mask} is {mask.width} x {mask.height} px, its image {tile.image.name} "
                f"{image.width} x {image.height} px; they have to be the same"
            )
        if self._has_tile_size(image):
            self.read_mask(tile)


def _read_ids(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write one tile id a line, as UTF-8 text") from None
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise DataError(f"{path}: the split is empty; write one tile id a line, or delete the file")
    for tile_id in ids:
        if not _ID.fullmatch(tile_id):
            raise DataError(
                f"{path}: {tile_id!r} cannot be a tile id; use letters, digits, '_', '.' and '-' (no leading dot, no "
                "folder, no suffix is needed)"
            )
    twice = _first_repeated(ids)
    if twice is not None:
        raise DataError(f"{path}: tile id {twice!r} stands twice; keep one")
    return ids


def _first_repeated(words: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for word in words:
        if word in seen:
            return word
        seen.add(word)
    return None


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
