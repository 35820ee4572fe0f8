"""The sample as scenes: GeoTIFF files of both rasters with their true place, for trying what one does with own data.

::

    OUT/images/west_africa.tif     8-bit RGB, 15 pixels a degree, EPSG:4326; eight of them
    OUT/labels/west_africa.tif     IGBP classes as the product has them, on the pixels of the image
    OUT/new/andes.tif              one more image, without labels, to make a map of
    OUT/classes.yaml               which IGBP values are which class
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.prepare.workplace import is_made, publish, refuse_file, workplace
from rsmtdf_cache.rasters.gdal import gdal_settings, reason_of
from rsmtdf_cache.sources.landcover import ATTRIBUTION, CLASSES, load_rasters, recipe_digest

__all__ = ["REGIONS", "build_scenes"]

_RECORD = "sample.json"
_PIXELS_A_DEGREE, _CELLS_A_DEGREE = 15, 20


@dataclass(frozen=True)
class Region:
    """A part of the earth: its upper left corner in degrees; all have one size in pixels."""

    west: int
    north: int
    height: int = 512
    width: int = 640


#: Eight regions with labels; what is learned on some of them is scored on others.
REGIONS: Mapping[str, Region] = {
    "mediterranean": Region(-6, 48),
    "west_africa": Region(-18, 24),
    "south_africa": Region(10, 2),
    "india": Region(66, 38),
    "south_east_asia": Region(92, 30),
    "australia": Region(112, -8),
    "brazil": Region(-76, 6),
    "north_america": Region(-124, 50),
}
_NEW = {"andes": Region(-80, -10, 512, 512)}
_IGNORED = (11, 13)  # wetland and urban, as in the sample of tiles


def build_scenes(out: Path, on_event: EventSink = ignore_events) -> bool:
    """Write the sample's scenes to the folder ``out``. Returns False when they were there already.

    ``out`` appears complete or not at all. Raises ``MismatchError`` when it holds anything else, ``DataError`` when a
    source raster is missing or damaged, ``ResourceError`` when the disk does not take it.
    """
    out = out.resolve()
    refuse_file(out)
    asked = {"scenes": recipe_digest(), "regions": {n: [r.west, r.north] for n, r in {**REGIONS, **_NEW}.items()}}
    with workplace(out) as partial:
        if is_made(out, _RECORD, asked, "sample"):
            return False
        images, codes = load_rasters()
        on_event(ProgressStart("sample", "sample scenes", len(REGIONS) + len(_NEW), unit="scenes"))
        for folder in ("images", "labels", "new"):
            (partial / folder).mkdir()
        with gdal_settings():
            for name, region in REGIONS.items():
                _write(partial / "images" / f"{name}.tif", _image(images, region), region)
                _write(partial / "labels" / f"{name}.tif", _codes(codes, region)[None], region)
                on_event(Progress("sample", 1))
            for name, region in _NEW.items():
                _write(partial / "new" / f"{name}.tif", _image(images, region), region)
                on_event(Progress("sample", 1))
        on_event(ProgressEnd("sample"))
        (partial / "classes.yaml").write_text(_classes(), encoding="utf-8")
        (partial / "ATTRIBUTION.md").write_text(f"# Attribution\n\n{ATTRIBUTION}\n", encoding="utf-8")
        (partial / _RECORD).write_text(json.dumps({"asked": asked}) + "\n", encoding="utf-8")
        publish(partial, out)
    return True


def _image(images: NDArray[np.uint8], region: Region) -> NDArray[np.uint8]:
    """Return ``[3, height, width]`` of the image raster."""
    top, left = (90 - region.north) * _PIXELS_A_DEGREE, (region.west + 180) * _PIXELS_A_DEGREE
    return images[top : top + region.height, left : left + region.width].transpose(2, 0, 1)


def _codes(codes: NDArray[np.uint8], region: Region) -> NDArray[np.uint8]:
    """Return ``[height, width]``: the label cell that holds the centre of each image pixel."""
    rows, columns = (
        (first * 2 * _PIXELS_A_DEGREE + 2 * np.arange(count) + 1) * _CELLS_A_DEGREE // (2 * _PIXELS_A_DEGREE)
        for first, count in ((90 - region.north, region.height), (region.west + 180, region.width))
    )
    return codes[np.ix_(rows, columns)]


def _write(path: Path, pixels: NDArray[np.uint8], region: Region) -> None:
    import rasterio
    from rasterio.errors import RasterioError
    from rasterio.transform import Affine

    step = 1 / _PIXELS_A_DEGREE
    try:
        with rasterio.open(
            path, "w", driver="GTiff", height=region.height, width=region.width, count=len(pixels), dtype="uint8",
            crs="EPSG:4326", transform=Affine(step, 0, region.west, 0, -step, region.north), tiled=True, blockxsize=256,
            blockysize=256, compress="deflate", photometric="RGB" if len(pixels) == 3 else "MINISBLACK",
        ) as file:  # fmt: skip
            file.write(pixels)
    except RasterioError as error:
        raise DataError(f"{path}: GDAL cannot write it ({reason_of(error)})") from None


def _classes() -> str:
    header = {
        "attribution": ATTRIBUTION,
        "labels": {"kind": "values", "ignore": list(_IGNORED)},
        "classes": [{"name": name, "color": list(color), "values": list(codes)} for name, color, codes in CLASSES],
    }
    return yaml.safe_dump(header, sort_keys=False, allow_unicode=True, default_flow_style=None, width=200)
