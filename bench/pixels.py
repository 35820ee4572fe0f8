"""Samples a second with pixels from the store, against decoding images and windows of scenes, and a bare memory map.

    python bench/pixels.py OUT.json [--rounds 5] [--tiles 64] [--tile-px 512] [--crop-px 256] [--cold]

The same tiles, of the package's own image raster, lie in a temporary folder as PNG files, as a tiled DEFLATE GeoTIFF
scene, as both stores and as one array. Each path makes the same batches of random crops (``BatchLoader``, labels and
validity included), one thread, in rounds that alternate; medians and ratios are printed and written. ``kept``: decoded
tiles stay in memory, as in training on few tiles; elsewhere nothing is kept, as in an epoch larger than memory.
``--cold``: files leave the page cache before every round. ``layouts``: crops out of shards of other chunks, no more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.prepare.cutting import Cut
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.shard import ShardLayout, ShardReader, ShardWriter
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.landcover import load_rasters
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.stored_pixels import StoredPixels
from rsmtdf_cache.tiling.request import Held, TileRequest
from rsmtdf_cache.tiling.write import tile
from rsmtdf_cli.machine import context
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.geometry import Geometry
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.recipe import Recipe

__all__ = ["main"]

_BATCH = 16
_Path = Callable[[int], int]


def _scene(side: int) -> NDArray[np.uint8]:
    """Return ``[side, side, 3]`` of the raster's land, twice as large and with a little noise, as sensors have."""
    image = load_rasters()[0][600:1700, 2500:4700].repeat(2, 0).repeat(2, 1)
    down, across = -(-side // image.shape[0]), -(-side // image.shape[1])
    whole = np.tile(image, (down, across, 1))[:side, :side].astype(np.int16)
    noise = np.random.default_rng(0).integers(-2, 3, whole.shape, np.int16)
    return np.clip(whole + noise, 1, 255).astype(np.uint8)


def _write(work: Path, count: int, tile_px: int) -> NDArray[np.uint8]:
    """Write PNG tiles, and a scene with its windows; return the tiles ``[count, tile_px, tile_px, 3]``."""
    across = round(count**0.5)
    whole = _scene(across * tile_px)
    profile = {"driver": "GTiff", "height": len(whole), "width": len(whole), "count": 3, "dtype": "uint8"}
    profile |= {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", "interleave": "pixel"}
    place = rasterio.Affine(10, 0, 5e5, 0, -10, 5e6)
    (work / "scenes").mkdir()
    with rasterio.open(work / "scenes" / "a.tif", "w", transform=place, crs="EPSG:32632", **profile) as file:
        file.write(whole.transpose(2, 0, 1))
    classes = [{"name": "a", "color": [0, 0, 0], "values": [1]}, {"name": "b", "color": [9, 9, 9], "values": [2]}]
    (work / "classes.yaml").write_text(yaml.safe_dump({"classes": classes}))
    tile(
        TileRequest(
            scenes=(work / "scenes",),
            out=work / "windows",
            classes=work / "classes.yaml",
            cut=Cut(tile_px),
            val=Held(),
            test=Held(),
        )
    )
    folder = work / "png"
    (folder / "images").mkdir(parents=True)
    (folder / "splits").mkdir()
    tiles = whole.reshape(across, tile_px, across, tile_px, 3).swapaxes(1, 2).reshape(-1, tile_px, tile_px, 3)
    for number, pixels in enumerate(tiles):
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "images" / f"t{number:04}.png", compress_level=6)
    (folder / "splits" / "train.txt").write_text("".join(f"t{n:04}\n" for n in range(len(tiles))))
    header = {
        "name": "bench", "tile_px": tile_px, "ignore_index": 255, "masks": "partial",
        "classes": [{k: v for k, v in entry.items() if k != "values"} for entry in classes],
    }  # fmt: skip
    (folder / "dataset.yaml").write_text(yaml.safe_dump(header))
    return np.ascontiguousarray(tiles)


def _loader(folder: Path, store: Path | None, crop_px: int, kept: bool) -> BatchLoader:
    source = open_source(folder)
    recipe = Recipe.model_validate({
        "data": folder, "crop_px": crop_px, "labeled": "train", "method": "supervised", "targets": "none",
        "distill": False, "fuse": False, "batch": {"labeled": _BATCH},
    })  # fmt: skip
    pixels = None if store is None else StoredPixels.of(FeatureStore.open(store))
    geometry = Geometry(source.tile_px, crop_px, 32)
    return BatchLoader(TileDataset(source, None, geometry, 2**31 if kept else 0, pixels=pixels), recipe)


def _batches(loader: BatchLoader) -> _Path:
    def read(first: int) -> int:
        loader.batch(first)
        return _BATCH

    return read


def _memory_map(path: Path, tiles: NDArray[np.uint8], loader: BatchLoader) -> _Path:
    """Return what copies the loader's own crops out of one mapped array, turned as the loader turns them."""
    tiles.tofile(path)
    held = np.memmap(path, np.uint8, "r", shape=tiles.shape)
    rows = {name: n for n, name in enumerate(loader.dataset.tile_ids)}

    def read(first: int) -> int:
        image = np.empty((_BATCH, 3, *[loader.recipe.crop_px] * 2), np.uint8)
        for n in range(_BATCH):
            draw = loader.labeled.draw(first * _BATCH + n)
            cut = draw.cut.image(held[rows[draw.tile_id]], loader.recipe.crop_px)
            image[n] = cut.transpose(2, 0, 1)
        return _BATCH

    return read


def _layouts(work: Path, tiles: NDArray[np.uint8], crop_px: int) -> dict[str, _Path]:
    """Return crops out of shards whose chunks have other sides."""
    found: dict[str, _Path] = {}
    side = tiles.shape[1]
    for chunk in (side, 256, 128, 64):
        layout, path = ShardLayout(len(tiles), side, side, 3, np.dtype("u1"), 0, side=chunk), work / f"{chunk}.shard"
        with ShardWriter(path, layout) as writer:
            for row, pixels in enumerate(tiles):
                writer.add(row, pixels)
            writer.close()
        reader, out = ShardReader(path, layout), np.empty((crop_px, crop_px, 3), np.uint8)

        def read(first: int, reader: ShardReader = reader, out: NDArray[np.uint8] = out) -> int:
            rng = np.random.default_rng(first)
            for _ in range(_BATCH):
                y, x = (int(v) * 32 for v in rng.integers(0, (side - crop_px) // 32 + 1, 2))
                reader.read(int(rng.integers(len(tiles))), y, x, out)
            return _BATCH

        found[f"chunks of {chunk} px"] = read
    return found


def _evict(work: Path) -> None:
    for path in work.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _rounds(paths: dict[str, _Path], rounds: int, seconds: float, cold: Path | None) -> dict[str, dict[str, Any]]:
    """Read by each path in turn, ``rounds`` times after one to warm up; return medians."""
    seen: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds + 1):
        for name, read in paths.items():
            if cold is not None:
                _evict(cold)
            count, step, begun = 0, 0, time.perf_counter()
            while time.perf_counter() - begun < seconds:
                count += read(1000 * number + step)
                step += 1
            if number:
                seen[name].append(count / (time.perf_counter() - begun))
                print(f"  {name}: {seen[name][-1]:.0f}/s", file=sys.stderr)
    return {
        name: {"samples_per_s": round(statistics.median(rates), 1), "all": [round(r, 1) for r in rates]}
        for name, rates in seen.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each path in each round")
    parser.add_argument("--tiles", type=int, default=64, help="a square number")
    parser.add_argument("--tile-px", type=int, default=512)
    parser.add_argument("--crop-px", type=int, default=256)
    parser.add_argument("--cold", action="store_true")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tiles = _write(work, asked.tiles, asked.tile_px)
        for kind in ("png", "windows"):
            build_store(BuildRequest.of({"data": work / kind, "out": work / f"{kind}-store", "pixels": True}))
        crop = asked.crop_px
        stored = _loader(work / "png", work / "png-store", crop, kept=False)
        paths = {
            "store": _batches(stored),
            "store, validity too": _batches(_loader(work / "windows", work / "windows-store", crop, kept=False)),
            "PNG": _batches(_loader(work / "png", None, crop, kept=False)),
            "PNG, kept": _batches(_loader(work / "png", None, crop, kept=True)),
            "scene, windows": _batches(_loader(work / "windows", None, crop, kept=False)),
            "memory map": _memory_map(work / "tiles.raw", tiles, stored),
        }
        cold = work if asked.cold else None
        found = _rounds(paths, asked.rounds, asked.seconds, cold)
        layouts = _rounds(_layouts(work, tiles, crop), asked.rounds, asked.seconds / 4, cold)
    base = found["store"]["samples_per_s"]
    result = {
        **context(), "command": "python bench/pixels.py", **{k: v for k, v in vars(asked).items() if k != "out"},
        "paths": found, "store_over": {name: round(base / f["samples_per_s"], 3) for name, f in found.items()},
        "layouts": layouts,
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':24}{'samples/s':>12}{'store is':>12}")
    for name, rates in found.items():
        print(f"{name:24}{rates['samples_per_s']:>12.0f}{result['store_over'][name]:>11.2f}x")
    for name, rates in layouts.items():
        print(f"{name:24}{rates['samples_per_s']:>12.0f}")


if __name__ == "__main__":
    main()
