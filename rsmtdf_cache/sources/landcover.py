"""The sample dataset: land cover of the world, 225 tiles of 256 px and 8 classes, from two rasters in this package.

Images are NASA's Blue Marble Next Generation (5400 x 2700, 15 pixels a degree), labels MODIS MCD12C1 of 2019 (IGBP
classes, 7200 x 3600, 20 cells a degree); both are plate carrée from 180 W to 180 E and 90 N to 90 S. A tile is a
window of 128 x 128 image pixels, enlarged twice by bicubic interpolation from its own pixels alone, so that no pixel
feeds two tiles. Tile columns, not tiles, are dealt to the splits: bands of longitude 8.5 degrees wide.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import yaml
from numpy.typing import NDArray
from PIL import Image, features

from rsmtdf_cache.errors import DataError, MismatchError, ResourceError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.sources.base import Georeference
from rsmtdf_cache.sources.georeference import write_georeference
from rsmtdf_cache.specs import canonical_json, digest_of

__all__ = [
    "ATTRIBUTION",
    "CLASSES",
    "RASTER_FOLDER",
    "RASTER_SHA256",
    "WindowTile",
    "build_sample",
    "label_cells",
    "load_rasters",
    "recipe_digest",
    "split_of_column",
]

RASTER_FOLDER = Path(__file__).parent / "landcover_data"
_IMAGE_FILE = "blue_marble_5400x2700.jpg"
_LABEL_FILE = "mcd12c1_2019_igbp_7200x3600.tif"
RASTER_SHA256 = {
    _IMAGE_FILE: "10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8",
    _LABEL_FILE: "a253c7643966d99580dacc890fedbe78417ca0dcb4c45845b41b838369c975ad",
}

#: name, colour, IGBP codes (0 = water as stored). Wetland (11) and urban (13) are ignored: 1 % of the pixels.
CLASSES: tuple[tuple[str, tuple[int, int, int], tuple[int, ...]], ...] = (
    ("water", (52, 108, 176), (0,)),
    ("forest", (22, 102, 52), (1, 2, 3, 4, 5)),
    ("shrubland", (186, 144, 82), (6, 7)),
    ("savanna", (148, 176, 60), (8, 9)),
    ("grassland", (112, 204, 122), (10,)),
    ("cropland", (232, 96, 150), (12, 14)),
    ("barren", (244, 222, 158), (16,)),
    ("snow_ice", (226, 244, 252), (15,)),
)
_WATER, _SNOW, _IGNORE = 0, 7, 255
_CODE_TO_CLASS = np.full(256, _IGNORE, np.uint8)
for _number, _entry in enumerate(CLASSES):
    _CODE_TO_CLASS[list(_entry[2])] = _number

TILE_PX = 256
_WINDOW_PX = TILE_PX // 2
_TOP_PX = 262  # 72.5 N; 15 rows of windows from here end at 55.5 S
_ROWS, _COLUMNS = 15, 5400 // _WINDOW_PX
_PIXELS_A_DEGREE = 15
_MIN_LAND = 0.20
_MAX_WHITE, _WHITE_LEVEL = 0.05, 170  # the picture is one month: seasonal snow that the label does not know
_SUBSETS = (5, 10, 25)
_PRESENT = 0.05  # a tile counts as holding a class from this share of its pixels

ATTRIBUTION = (
    "Images: NASA Earth Observatory, Blue Marble: Next Generation (R. Stöckli, E. Vermote, N. Saleous, R. Simmon, "
    "D. Herring, 2005). Labels: MODIS/Terra+Aqua Land Cover Type MCD12C1 v006, 2019, IGBP majority class (M. Friedl, "
    "D. Sulla-Menashe; NASA LP DAAC; doi 10.5067/MODIS/MCD12C1.006). Both are in the public domain."
)
_LISTS = "splits/labeled/"
_MARKER = "sample.json"
_RECIPE = "rsmtdf landcover sample, 1"


@dataclass(frozen=True)
class WindowTile:
    """One window of the image raster: tile row and column of the grid, and its split."""

    row: int
    column: int

    @property
    def id(self) -> str:
        return f"r{self.row:02}c{self.column:02}"

    @property
    def split(self) -> str:
        return split_of_column(self.column)

    @property
    def top_px(self) -> int:
        return _TOP_PX + self.row * _WINDOW_PX

    @property
    def left_px(self) -> int:
        return self.column * _WINDOW_PX

    @property
    def georeference(self) -> Georeference:
        """EPSG:4326: x is the longitude and y the latitude of a tile pixel's corner, in degrees."""
        degrees = 1 / (2 * _PIXELS_A_DEGREE)
        left, top = self.left_px / _PIXELS_A_DEGREE - 180, 90 - self.top_px / _PIXELS_A_DEGREE
        return Georeference("EPSG:4326", (degrees, 0.0, left, 0.0, -degrees, top))


def split_of_column(column: int) -> str:
    """Return the split of a tile column: cycles of 4 train, 1 val, 2 test."""
    return ("train", "train", "train", "train", "val", "test", "test")[(column + 2) % 7]


def label_cells(first_px: int) -> NDArray[np.int64]:
    """Return ``[256]`` rows (or columns) of label cells nearest to the pixel centres of a tile.

    ``first_px`` is the tile's first row (or column) in the image raster. The centre of tile pixel ``i`` lies at
    ``first + (2 i + 1) / 4`` image pixels, that is ``(4 first + 2 i + 1) / 3`` label cells; whole numbers, so that a
    centre on a border goes the same way everywhere.
    """
    return (4 * first_px + 2 * np.arange(TILE_PX, dtype=np.int64) + 1) // 3


def build_sample(out: Path, on_event: EventSink = ignore_events, rasters: Path = RASTER_FOLDER) -> bool:
    """Write the sample dataset to the folder ``out`` (folder format). Returns False when it was there already.

    ``out`` appears complete or not at all. Raises ``MismatchError`` when it holds anything else, ``DataError`` when a
    source raster in ``rasters`` is missing or damaged, ``ResourceError`` when the disk does not take it.
    """
    out = out.resolve()
    if _is_there(out):
        return False
    images, codes = _load_all(rasters)
    partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        try:
            _write(partial, images, codes, on_event)
            return _publish(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise ResourceError(
            f"the sample cannot be written to {out}: {error.strerror or error}; it takes 20 MB, nothing was kept"
        ) from error


def _is_there(out: Path) -> bool:
    """Return whether ``out`` is this very sample; False when it is free. Raises ``MismatchError`` otherwise."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        recorded = json.loads((out / _MARKER).read_text(encoding="utf-8"))
        files: dict[str, str] = recorded["files"]
        if recorded["recipe"] != recipe_digest():
            raise MismatchError(f"{out} holds the sample of another version of this package; give another folder")
    except (OSError, ValueError, KeyError, TypeError):
        raise MismatchError(f"{out} is not empty and holds something else; give a new or an empty folder") from None
    found = _digests(out)
    lists = {name for name in found if name.startswith(_LISTS)} - files.keys()  # a user's own, of `rsmtdf select`
    changed = sorted(n for n in (files.keys() | found.keys()) - lists if files.get(n) != found.get(n))
    if changed:
        raise MismatchError(
            f"{out} holds a sample dataset with {len(changed)} changed, added or missing files, first {changed[0]}; "
            "remove the folder to build it again"
        )
    return True


def recipe_digest() -> str:
    """Return what decides the sample: another one is that of another version of this package."""
    return digest_of({"recipe": _RECIPE, "rasters": RASTER_SHA256, "classes": CLASSES})


def _digests(root: Path) -> dict[str, str]:
    """Return the sha256 of every file of the dataset ``root`` but the marker; other things in ``root`` do not count."""
    paths = [root / name for name in ("dataset.yaml", "georeference.csv", "ATTRIBUTION.md")]
    for folder in ("images", "masks", "splits"):
        paths += (root / folder).rglob("[!.]*")
    return {p.relative_to(root).as_posix(): _sha256(p) for p in sorted(paths) if p.is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_rasters() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the image raster ``[2700, 5400, 3]`` and the label raster ``[3600, 7200]`` (IGBP), both from 180 W, 90 N.

    Raises ``DataError`` when one is missing or damaged, ``ResourceError`` when this Pillow cannot decode it.
    """
    images, codes = _load_all(RASTER_FOLDER)
    return np.asarray(images), np.asarray(codes)


def _load_all(rasters: Path) -> tuple[Image.Image, Image.Image]:
    return _load(rasters / _IMAGE_FILE), _load(rasters / _LABEL_FILE)


def _load(path: Path) -> Image.Image:
    expected = RASTER_SHA256[path.name]
    try:
        found = _sha256(path)
    except OSError as error:
        found = f"no readable file ({error.strerror})"
    if found != expected:
        raise DataError(
            f"source raster {path} of the sample is damaged or missing: expected sha256 {expected}, found {found}; "
            "install the package again"
        )
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy()
    except (OSError, Image.DecompressionBombError) as error:
        raise ResourceError(f"source raster {path} is whole, but this Pillow cannot decode it: {error}") from None


def _write(root: Path, images: Image.Image, codes: Image.Image, on_event: EventSink) -> None:
    labels = _CODE_TO_CLASS[np.asarray(codes)]
    windows = list(_kept_windows(images, labels))
    (root / "images").mkdir()
    (root / "masks").mkdir()
    held: dict[str, set[int]] = {}
    on_event(ProgressStart("sample", "land-cover sample", len(windows)))
    for window in windows:
        mask = _mask(labels, window)
        held[window.id] = _classes_held(mask)
        files = [root / folder / f"{window.id}.png" for folder in ("images", "masks")]
        _image(images, window).save(files[0], compress_level=1)
        Image.fromarray(mask).save(files[1], compress_level=6)
        on_event(Progress("sample", 1, sum(file.stat().st_size for file in files)))
    on_event(ProgressEnd("sample"))
    splits: dict[str, list[str]] = {
        name: [w.id for w in windows if w.split == name] for name in ("train", "val", "test")
    }
    order = _labeled_order({i: held[i] for i in splits["train"]})
    for percent in _SUBSETS:
        splits[f"labeled/{percent}"] = sorted(order[: round(len(order) * percent / 100)])
    (root / "splits" / "labeled").mkdir(parents=True)
    for name, ids in splits.items():
        (root / "splits" / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
    write_georeference(root / "georeference.csv", {w.id: w.georeference for w in windows})
    _write_texts(root)
    decoder = {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")}
    marker = {"recipe": recipe_digest(), "decoder": decoder, "files": _digests(root)}
    (root / _MARKER).write_text(canonical_json(marker) + "\n", encoding="utf-8")


def _publish(partial: Path, out: Path) -> bool:
    """Move ``partial`` to ``out``; False when another process was faster with the same sample."""
    try:
        os.rename(partial, out)  # replaces an empty folder, refuses any other
        return True
    except OSError:
        if not _is_there(out):
            raise
    shutil.rmtree(partial, ignore_errors=True)
    return False


def _kept_windows(images: Image.Image, labels: NDArray[np.uint8]) -> Iterator[WindowTile]:
    for row in range(_ROWS):
        for column in range(_COLUMNS):
            window = WindowTile(row, column)
            mask = _mask(labels, window)
            if (mask != _WATER).mean() < _MIN_LAND:
                continue
            red, green, blue = np.moveaxis(np.asarray(_image(images, window)), -1, 0)
            white = np.minimum(np.minimum(red, green), blue) > _WHITE_LEVEL
            if (white & (mask != _SNOW)).mean() <= _MAX_WHITE:
                yield window


def _image(images: Image.Image, window: WindowTile) -> Image.Image:
    left, top = window.left_px, window.top_px
    own = images.crop((left, top, left + _WINDOW_PX, top + _WINDOW_PX))
    return own.resize((TILE_PX, TILE_PX), Image.Resampling.BICUBIC)


def _mask(labels: NDArray[np.uint8], window: WindowTile) -> NDArray[np.uint8]:
    return labels[np.ix_(label_cells(window.top_px), label_cells(window.left_px))]


def _classes_held(mask: NDArray[np.uint8]) -> set[int]:
    counts = np.bincount(mask.ravel(), minlength=256)[: len(CLASSES)]
    return {int(c) for c in np.flatnonzero(counts >= _PRESENT * mask.size)}


def _labeled_order(held: Mapping[str, set[int]]) -> list[str]:
    """Return the train ids so that every prefix is a labelled subset and the first few hold every class.

    Classes in the fewest tiles choose first, each the first tile in hash order that holds it, unless a chosen tile
    does already; then all others in hash order.
    """
    hashed = sorted(held, key=lambda i: hashlib.sha256(f"landcover/{i}".encode()).hexdigest())
    rarest = sorted(range(len(CLASSES)), key=lambda c: (sum(c in classes for classes in held.values()), c))
    chosen: list[str] = []
    for number in rarest:
        if not any(number in held[i] for i in chosen):
            chosen.append(next(i for i in hashed if number in held[i]))
    return chosen + [i for i in hashed if i not in chosen]


def _write_texts(root: Path) -> None:
    header = {
        "name": "landcover",
        "tile_px": TILE_PX,
        "ignore_index": _IGNORE,
        "masks": "complete",
        "attribution": ATTRIBUTION,
        "classes": [{"name": name, "color": list(color)} for name, color, _ in CLASSES],
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(header, sort_keys=False, allow_unicode=True), encoding="utf-8")
    codes: Sequence[str] = [f"- {name}: IGBP {', '.join(map(str, codes))}" for name, _, codes in CLASSES]
    text = [
        "# Attribution",
        "",
        ATTRIBUTION,
        "",
        "Derived work: windows of 128 x 128 image pixels enlarged twice (bicubic), labels by the nearest cell to each",
        "pixel centre, IGBP classes joined as below (0 is water; wetland 11 and urban 13 are ignored). EPSG:4326.",
        "",
        *codes,
    ]
    (root / "ATTRIBUTION.md").write_text("\n".join(text) + "\n", encoding="utf-8")
