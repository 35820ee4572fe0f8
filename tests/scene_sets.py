"""Scenes with labels as people have them, and what a tile of them has to be, told by numpy and rasterio alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from numpy.typing import NDArray

from rsmtdf_cache.prepare.cutting import Cut
from rsmtdf_cache.tiling.request import Held, TileRequest
from tests.scenes import PLACE, blobs, write_scene

__all__ = ["CLASS_TABLE", "classes_file", "request", "write_labels", "write_pair"]

#: Values 10, 20, 21 and 30 of a label raster are three classes; 99 is no label.
CLASS_TABLE: Mapping[str, Any] = {
    "labels": {"ignore": [99]},
    "classes": [
        {"name": "water", "color": [10, 20, 200], "values": [10]},
        {"name": "tree", "color": [0, 120, 0], "values": [20, 21]},
        {"name": "road", "color": [200, 90, 0], "values": [30]},
    ],
}


def classes_file(folder: Path, table: Mapping[str, Any] = CLASS_TABLE) -> Path:
    """Write ``classes.yaml`` into ``folder``."""
    path = folder / "classes.yaml"
    path.write_text(yaml.safe_dump(dict(table)))
    return path


def write_labels(path: Path, height: int, width: int, seed: int = 0, **profile: Any) -> NDArray[np.uint8]:
    """Write smooth regions of the values in ``CLASS_TABLE``; return them, ``[height, width]``."""
    values: NDArray[np.uint8] = np.array([10, 20, 21, 30, 99], np.uint8)[blobs(height, width, seed, 1)[0] // 52]
    write_scene(path, values[None], **profile)
    return values


def write_pair(
    folder: Path, name: str = "a", height: int = 150, width: int = 210, seed: int = 0, dtype: str = "uint8",
    bands: int = 3, factor: float = 1, **profile: Any,
) -> tuple[NDArray[Any], NDArray[np.uint8]]:  # fmt: skip
    """Write ``images/NAME.tif`` and ``labels/NAME.tif``; return their values. Scenes do not lie on each other."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    pixels = (blobs(height, width, seed, bands) * factor).astype(dtype)
    place = rasterio.Affine(PLACE.a, 0, PLACE.c + 500 * seed, 0, PLACE.e, PLACE.f)
    write_scene(folder / "images" / f"{name}.tif", pixels, **{"transform": place, **profile})
    labels = write_labels(folder / "labels" / f"{name}.tif", height, width, seed + 50, transform=place)
    return pixels, labels


def request(folder: Path, out: str = "set", tile_px: int = 32, overlap_px: int = 0, **values: Any) -> TileRequest:
    """Return a request for the scenes below ``folder``, with their labels if there are any."""
    labels = folder / "labels"
    usual: dict[str, Any] = {
        "scenes": (folder / "images",), "out": folder / out, "cut": Cut(tile_px, overlap_px),
        "labels": labels if labels.is_dir() else None,
    }  # fmt: skip
    if "classes" not in values:
        usual["classes"] = classes_file(folder)
    return TileRequest(**{**usual, **values})


def held(*patterns: str) -> Held:
    """Return scenes held out by name."""
    return Held(patterns=patterns)


def nested(lists: Sequence[Sequence[str]]) -> bool:
    """Return whether each list begins with the one before it."""
    return all(list(b[: len(a)]) == list(a) for a, b in pairwise(lists))
