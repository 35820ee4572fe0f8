"""Tiny valid datasets in the folder format, for tests: real PNG files with some structure, the same at every call."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

__all__ = ["edit_header", "make_tile", "png", "write_dataset", "write_split"]

_COLORS = ((40, 70, 150), (50, 120, 60), (200, 170, 90), (160, 60, 60), (220, 220, 230), (120, 90, 160))


def make_tile(
    index: int, tile_px: int = 64, classes: int = 3, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image ``[px, px, 3]`` and mask ``[px, px]``: smooth regions, a colour per class, texture and noise.

    Every class is in every tile (a Voronoi diagram of ``2 * classes`` random sites, each class owning two).
    """
    rng = np.random.default_rng([seed, index])
    sites = rng.uniform(0, tile_px, size=(2 * classes, 2))
    ys, xs = np.mgrid[0:tile_px, 0:tile_px] + 0.5
    distance = np.hypot(ys[..., None] - sites[:, 0], xs[..., None] - sites[:, 1])
    mask = (distance.argmin(-1) % classes).astype(np.uint8)
    palette = np.array([_COLORS[c % len(_COLORS)] for c in range(classes)], dtype=np.float64)
    wave = 12 * np.sin(xs / (3.0 + mask) + index)[..., None]
    image = palette[mask] + wave + rng.normal(0, 8, (tile_px, tile_px, 3))
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_split(root: Path, name: str, ids: Sequence[str]) -> None:
    """Write ``splits/NAME.txt``; ``name`` may be ``labeled/5``."""
    path = root / "splits" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{tile_id}\n" for tile_id in ids))


def write_dataset(
    root: Path,
    tiles: int = 12,
    tile_px: int = 64,
    classes: int = 3,
    seed: int = 0,
    splits: Mapping[str, Sequence[int]] | None = None,
    labeled: Mapping[str, Sequence[int]] | None = None,
    georeference: bool = False,
) -> Path:
    """Write a valid folder dataset and return ``root``. Tile ids are ``t000``, ``t001``, …

    ``splits`` and ``labeled`` give tile numbers; by default train is the first two thirds, val and test share the rest
    and the labelled subsets 5, 10, 25 are the first 1/4, 1/2 and 3/4 of train (nested, at least one tile each).
    ``georeference``: also write ``georeference.csv`` with one degree a tile.
    """
    n_train, n_val = max(1, tiles * 2 // 3), max(1, tiles // 6)
    if splits is None:
        bounds = {"train": (0, n_train), "val": (n_train, n_train + n_val), "test": (n_train + n_val, tiles)}
        splits = {name: range(*span) for name, span in bounds.items() if span[0] < span[1]}
    if labeled is None:
        train = list(splits["train"])
        labeled = {p: train[: max(1, len(train) * k // 4)] for p, k in (("5", 1), ("10", 2), ("25", 3))}
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for index in range(tiles):
        image, mask = make_tile(index, tile_px, classes, seed)
        Image.fromarray(image).save(root / "images" / f"t{index:03}.png")
        Image.fromarray(mask).save(root / "masks" / f"t{index:03}.png")
    for name, numbers in splits.items():
        write_split(root, name, [f"t{i:03}" for i in numbers])
    for name, numbers in labeled.items():
        write_split(root, f"labeled/{name}", [f"t{i:03}" for i in numbers])
    header = {
        "name": "tiny",
        "tile_px": tile_px,
        "ignore_index": 255,
        "masks": "complete",
        "attribution": "synthetic, made by the tests",
        "classes": [{"name": f"class{c}", "color": list(_COLORS[c % len(_COLORS)])} for c in range(classes)],
    }
    (root / "dataset.yaml").write_text(yaml.safe_dump(header, sort_keys=False))
    if georeference:
        step = 1 / tile_px
        rows = [f"t{i:03},EPSG:4326,{step!r},0.0,{float(i)!r},0.0,{-step!r},50.0" for i in range(tiles)]
        (root / "georeference.csv").write_text("\n".join(["id,crs,a,b,c,d,e,f", *rows]) + "\n")
    return root


def edit_header(root: Path, **changes: object) -> None:
    """Change keys of ``dataset.yaml``."""
    path = root / "dataset.yaml"
    header = yaml.safe_load(path.read_text())
    header.update(changes)
    path.write_text(yaml.safe_dump(header))


def png(width: int, height: int, bit_depth: int, color_type: int, rows: bytes) -> bytes:
    """Return a PNG file of these raw rows; Pillow cannot write 16-bit RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
