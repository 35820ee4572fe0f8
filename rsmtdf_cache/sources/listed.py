"""Datasets whose splits are text files of tile ids: ``splits/train.txt``, ``splits/labeled/5.txt``."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

from rsmtdf_cache.errors import DataError, did_you_mean
from rsmtdf_cache.sources.base import ClassInfo, Tile, TileSource
from rsmtdf_cache.sources.header import DatasetHeader

__all__ = ["LABELED", "ListedSource", "SPLITS", "is_tile_id"]

SPLITS = ("train", "val", "test")
LABELED = "labeled/"
_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")


def is_tile_id(text: str) -> bool:
    """Return whether ``text`` can be a tile id: safe as a file name."""
    return _ID.fullmatch(text) is not None


class ListedSource(TileSource):
    """The dataset in the folder ``root`` with what ``dataset.yaml`` says. A snapshot: lists are read once."""

    def __init__(self, root: Path, header: DatasetHeader) -> None:
        self.root = root
        self.header = header
        self.name = header.name
        self.tile_px = header.tile_px
        self.classes = tuple(ClassInfo(c.name, c.color) for c in header.classes)
        self.ignore_index = header.ignore_index
        self.attribution = header.attribution
        self._ids: dict[str, list[str]] = {}

    @abstractmethod
    def tile(self, tile_id: str, split: str) -> Tile:
        """Return the tile that ``split`` names. Raises ``DataError`` for an id that the dataset does not have."""

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
            found += [self.tile(tile_id, name) for tile_id in ids]
        home = {s: i for i, s in enumerate(SPLITS)}
        return sorted(found, key=lambda tile: (home[tile.split], tile.id))

    @cached_property
    def _split_files(self) -> dict[str, Path]:
        folder = self.root / "splits"
        found = {name: folder / f"{name}.txt" for name in SPLITS if (folder / f"{name}.txt").is_file()}
        for path in sorted((folder / "labeled").glob("*.txt"), key=lambda p: (len(p.stem), p.stem)):
            found[LABELED + path.stem] = path
        return found

    def _full_name(self, name: str) -> str:
        known = self._split_files
        if name in known:
            return name
        if LABELED + name in known:
            return LABELED + name
        words = [*known, *(n.removeprefix(LABELED) for n in known)]
        listed = ", ".join(known) if known else "none; write one id a line to splits/train.txt"
        raise DataError(f"{self.root} has no split {name!r}.{did_you_mean(name, words)} Splits there: {listed}")

    def _asked(self, splits: Sequence[str] | None) -> list[str]:
        if splits is not None:
            return [self._full_name(name) for name in splits]
        return [name for name in SPLITS if name in self._split_files] or [self._full_name("train")]

    def _check_splits(self, asked: Sequence[str] | None) -> None:
        """Raise ``DataError`` for an id in two splits, outside train in a labelled subset, or there without labels."""
        owner: dict[str, str] = {}
        for name in self.split_names():
            for tile_id in self.split(name):
                tile = self.tile(tile_id, name)
                if name in SPLITS and owner.setdefault(tile_id, name) != name:
                    raise DataError(
                        f"{self.root}: tile id {tile_id!r} is in splits {owner[tile_id]} and {name}; a tile belongs to "
                        "one of train, val and test"
                    )
                if name.startswith(LABELED) and owner.get(tile_id) != "train":
                    raise DataError(
                        f"{self._split_files[name]}: tile {tile_id!r} is not in splits/train.txt; a labelled subset "
                        "is a part of train"
                    )
                used = asked is None or name in asked
                if name.startswith(LABELED) and used and tile.mask is None:
                    raise DataError(f"{self._split_files[name]}: tile {tile_id!r} {self._NO_MASK.format(id=tile_id)}")

    _NO_MASK = "has no labels"

    def _each(self, check: Callable[[Tile], object], tiles: Sequence[Tile]) -> None:
        """Call ``check`` with every tile, on all cores."""
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for _ in pool.map(check, tiles):
                pass


def _read_ids(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write one tile id a line, as UTF-8 text") from None
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise DataError(f"{path}: the split is empty; write one tile id a line, or delete the file")
    for tile_id in ids:
        if not is_tile_id(tile_id):
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
