"""How fast data comes in and maps go out on this machine, against what bounds each: codec, reading, forward pass.

    python bench/data_speed.py OUT.json [--rounds 3] [--side 4096]

Everything is made of the package's own image raster, repeated, in a temporary folder. Ratios are of runs that
alternate; the medians of all rounds are printed and written. ``cores`` is processor time over wall time: what a stage
keeps busy on average. Beside it stands what the same pixels cost at least: the codec alone, or GDAL alone, on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from rasterio.windows import Window

from rsmtdf_cache.prepare.cutting import Cut
from rsmtdf_cache.prepare.plan import Request
from rsmtdf_cache.prepare.write import prepare
from rsmtdf_cache.rasters.png import decode_png, encode_png
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.landcover import CLASSES, load_rasters
from rsmtdf_cache.tiling.request import Held, TileRequest
from rsmtdf_cache.tiling.write import tile
from rsmtdf_cli.machine import context
from rsmtdf_train.checkpoint import RunIdentity
from rsmtdf_train.fused_student import build_fused_student
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.scenes.map_scene import map_scene
from rsmtdf_train.scenes.request import MapRequest
from rsmtdf_train.scenes.segmenter import Segmenter

__all__ = ["main"]

_TILE_PX = 512
_WINDOW_PX = 256
_Stage = Callable[[], int]


def _measured(stage: _Stage) -> tuple[float, float]:
    """Return megapixels a second, and processor time over wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    pixels = stage()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return pixels / wall / 1e6, cpu / wall


def _rounds(stages: dict[str, _Stage], rounds: int) -> dict[str, dict[str, Any]]:
    """Run all stages in turn, ``rounds`` times; return medians."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in stages}
    for _ in range(rounds):
        for name, stage in stages.items():
            seen[name].append(_measured(stage))
            print(f"  {name}: {seen[name][-1][0]:.1f} MP/s, {seen[name][-1][1]:.2f} cores", file=sys.stderr)
    return {
        name: {
            "megapixels_per_s": round(statistics.median(rate for rate, _ in found), 2),
            "cores": round(statistics.median(cores for _, cores in found), 2),
            "all": [round(rate, 2) for rate, _ in found],
        }
        for name, found in seen.items()
    }


def _picture(side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return an image ``[3, side, side]`` and IGBP labels ``[side, side]``: land of the raster, repeated."""
    images, codes = load_rasters()
    image = images[600:1700, 2500:4700].transpose(2, 0, 1)
    rows, columns = ((np.arange(count) * 20 // 15) for count in image.shape[1:])
    labels = codes[800:][rows][:, columns + 3333]
    down, across = -(-side // image.shape[1]), -(-side // image.shape[2])
    whole = np.tile(image, (1, down, across))[:, :side, :side]
    return np.ascontiguousarray(whole), np.ascontiguousarray(np.tile(labels, (down, across))[:side, :side])


def _loveda(folder: Path, scenes: int) -> list[tuple[bytes, bytes]]:
    """Write LoveDA's folders with 1024-px PNG files; return the files."""
    image, labels = _picture(2048)
    files = []
    for part in ("Train", "Val"):
        for domain in ("Rural", "Urban"):
            for kind in ("images_png", "masks_png"):
                (folder / part / domain / kind).mkdir(parents=True)
            for n in range(scenes):
                y, x = (n * 97) % 1024, (n * 389) % 1024
                pixels = image[:, y : y + 1024, x : x + 1024].transpose(1, 2, 0)
                mask = (labels[y : y + 1024, x : x + 1024] % 7 + 1).astype(np.uint8)
                paths = [folder / part / domain / kind / f"{n}.png" for kind in ("images_png", "masks_png")]
                Image.fromarray(np.ascontiguousarray(pixels)).save(paths[0], compress_level=6)
                Image.fromarray(mask).save(paths[1], compress_level=6)
                files.append((paths[0].read_bytes(), paths[1].read_bytes()))
    return files


def _preparing(work: Path, rounds: int) -> dict[str, Any]:
    files = _loveda(work / "loveda", 5)
    pixels = len(files) * 1024 * 1024
    count = 0

    def ours(workers: int) -> _Stage:
        def run() -> int:
            nonlocal count
            count += 1
            prepare(Request("loveda", (work / "loveda",), work / f"out{count}", cut=Cut(_TILE_PX), workers=workers))
            return pixels

        return run

    def codec() -> int:
        for image, mask in files:
            whole, classes = decode_png(image), decode_png(mask)
            for y in (0, 512):
                for x in (0, 512):
                    encode_png(np.ascontiguousarray(whole[y : y + 512, x : x + 512]))
                    encode_png(np.ascontiguousarray(classes[y : y + 512, x : x + 512]))
        return pixels

    return _rounds({"prepare, 1 worker": ours(1), "prepare, 2 workers": ours(2), "PNG codec alone": codec}, rounds)


def _tiling(work: Path, rounds: int, side: int) -> dict[str, Any]:
    image, labels = _picture(side)
    for kind in ("images", "labels"):
        (work / kind).mkdir()
    stored = {
        "driver": "GTiff", "height": side, "width": side, "crs": "EPSG:32633", "tiled": True, "blockxsize": 512,
        "blockysize": 512, "compress": "deflate", "transform": rasterio.Affine(10, 0, 300000, 0, -10, 5000000),
    }  # fmt: skip
    with rasterio.open(work / "images" / "a.tif", "w", count=3, dtype="uint8", **stored) as file:
        file.write(image)
    with rasterio.open(work / "labels" / "a.tif", "w", count=1, dtype="uint8", **stored) as file:
        file.write(labels, 1)
    table = {
        "labels": {"ignore": [11, 13]},
        "classes": [{"name": n, "color": list(c), "values": list(v)} for n, c, v in CLASSES],
    }
    (work / "classes.yaml").write_text(yaml.safe_dump(table))
    count = 0

    def lay_out() -> int:
        nonlocal count
        count += 1
        tile(TileRequest(
            (work / "images",), work / f"set{count}", work / "labels", work / "classes.yaml", cut=Cut(_TILE_PX),
            val=Held(), test=Held(),
        ))  # fmt: skip
        return side * side

    def gdal_labels() -> int:
        with rasterio.open(work / "labels" / "a.tif") as file:
            for _, window in file.block_windows(1):
                file.read(1, window=window)
        return side * side

    found = _rounds({"data tile (labels read)": lay_out, "GDAL alone, labels": gdal_labels}, rounds)
    source = open_source(work / "set1")
    tiles = source.tiles()
    order = np.random.default_rng(0).permutation(len(tiles))

    def ours() -> int:
        for n in order:
            source.read_image(tiles[n])
        return len(order) * _TILE_PX**2

    def ours_threads() -> int:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(lambda n: source.read_image(tiles[n]), order):
                pass
        return len(order) * _TILE_PX**2

    def gdal() -> int:
        with rasterio.Env(GDAL_CACHEMAX=64), rasterio.open(work / "images" / "a.tif") as file:
            for n in order:
                y, x = tiles[n].origin_px or (0, 0)
                file.read([1, 2, 3], window=Window(x, y, _TILE_PX, _TILE_PX))
        return len(order) * _TILE_PX**2

    read = _rounds(
        {"tiles, random, 1 thread": ours, "tiles, random, 2 threads": ours_threads, "GDAL alone, windows": gdal}, rounds
    )
    return found | read


def _predicting(work: Path, rounds: int, side: int) -> dict[str, Any]:
    recipe = Recipe.model_validate({
        "name": "speed", "data": "nowhere", "crop_px": _WINDOW_PX, "method": "supervised", "targets": "none",
        "distill": False, "fuse": False, "student": {"encoder": "timm:lcnet_050", "channels": 32},
    })  # fmt: skip
    classes = open_source(work / "set1").classes
    torch.manual_seed(0)
    model = build_fused_student(recipe, len(classes), (), load_weights=False).eval().requires_grad_(False)
    segmenter = Segmenter(model, RunIdentity(recipe, None, classes, 255, ()), "0" * 64)
    device, count = torch.device("cpu"), 0
    windows = 0

    def ours() -> int:
        nonlocal count, windows
        count += 1
        request = MapRequest(work / "images" / "a.tif", work / f"map{count}.tif")
        map_scene(segmenter, request, device)
        return side * side

    from rsmtdf_cache.rasters.gdal import gdal_settings
    from rsmtdf_cache.rasters.scene import open_scene
    from rsmtdf_train.scenes.blend import windows_at_once
    from rsmtdf_train.scenes.request import plan_map

    with gdal_settings(), open_scene(work / "images" / "a.tif") as scene:
        plan = plan_map(segmenter, MapRequest(scene.path, work / "m.tif"), scene)
    size, batch = plan.grid.rows.side, windows_at_once(device, plan.grid.rows.side)
    rng = np.random.default_rng(0)
    resident = [rng.integers(0, 256, (3, size, size), np.uint8) for _ in range(batch)]

    def forward() -> int:
        for _ in range(-(-plan.windows // batch)):
            segmenter.window_probabilities(resident, device, count=batch, tta=False)
        return side * side

    return _rounds({"predict": ours, "the same forward passes alone": forward}, rounds)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=4096)
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        result = {
            **context(),
            "rounds": asked.rounds,
            "side_px": asked.side,
            "threads": torch.get_num_threads(),
            "preparing": _preparing(work, asked.rounds),
            "tiling": _tiling(work, asked.rounds, asked.side),
            "predicting": _predicting(work, asked.rounds, asked.side),
        }
    result["command"] = "python bench/data_speed.py"
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'':36}{'MP/s':>8}{'cores':>8}")
    for part in ("preparing", "tiling", "predicting"):
        for name, found in result[part].items():
            print(f"{name:36}{found['megapixels_per_s']:8.1f}{found['cores']:8.2f}")


if __name__ == "__main__":
    main()
