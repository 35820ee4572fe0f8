"""The files of a map: GeoTIFF or cloud-optimised GeoTIFF with place, no-data, colours and names of the classes.

::

    classes        one band: class numbers, colour table, class names
    confidence     one band: probability of the class that was chosen
    probabilities  one band a class

Confidence and probabilities are bytes: ``p = value / 254``, which GDAL knows as the band's scale. 255 is no-data in all
three. Tiles are written in one order, so the same map has the same bytes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.files import disk_errors, fsync_folder, rename_file
from rsmtdf_cache.rasters.scene import Scene
from rsmtdf_cache.sources.base import ClassInfo
from rsmtdf_train.scenes.pieces import Pieces, workroom
from rsmtdf_train.scenes.windows import BLOCK_PX, Grid

__all__ = ["LEVELS", "Layer", "NODATA", "REQUEST_TAG", "recorded_request", "write_layers"]

NODATA = 255
#: A probability of 1.
LEVELS = 254
REQUEST_TAG = "RSMTDF_REQUEST"


@dataclass(frozen=True)
class Layer:
    """One file of a map: its ``kind``, where it goes, and which planes of the pieces it has."""

    kind: str
    out: Path
    first: int
    count: int

    @property
    def draft(self) -> Path:
        return workroom(self.out) / f"{self.kind}.tif"


def recorded_request(path: Path) -> str | None:
    """Return the digest of the request that the map at ``path`` answers, None for any other file.

    Inside ``gdal_settings``, as all of this module.
    """
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(path) as dataset:
            tag: str | None = dataset.tags().get(REQUEST_TAG)
            return tag
    except RasterioError:
        return None


def write_layers(
    layers: Sequence[Layer],
    pieces: Pieces,
    grid: Grid,
    scene: Scene,
    classes: Sequence[ClassInfo],
    tags: Mapping[str, str],
    cog: bool,
    on_event: EventSink = ignore_events,
) -> NDArray[np.int64]:
    """Write all files of a map from its pieces and publish them; return the count of each value ``[256]``.

    Files are read back before they get their names. Raises ``ResourceError`` when that does not give what was written:
    a full disk may be told by nothing else.
    """
    for layer in layers:
        layer.draft.parent.mkdir(parents=True, exist_ok=True)
    total = scene.width * scene.height
    on_event(ProgressStart("write", "write the map", total, unit="pixels"))
    with disk_errors(layers[0].out.parent):
        counts, sums = _write_drafts(layers, pieces, grid, scene, classes, tags, on_event)
        for layer, expected in zip(layers, sums, strict=True):
            _finish_draft(layer, expected, grid, cog)
        for layer in layers:
            _publish(layer, classes)
    on_event(ProgressEnd("write"))
    return counts


def _write_drafts(
    layers: Sequence[Layer],
    pieces: Pieces,
    grid: Grid,
    scene: Scene,
    classes: Sequence[ClassInfo],
    tags: Mapping[str, str],
    on_event: EventSink,
) -> tuple[NDArray[np.int64], list[int]]:
    """Write the drafts; return the counts of class values and the checksum of each file's content."""
    from rasterio.errors import RasterioError
    from rasterio.windows import Window

    counts, sums = np.zeros(256, np.int64), [0] * len(layers)
    strips = list(grid.strips())
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(_create(layer, scene, classes, tags)) for layer in layers]
            for block in range(pieces.blocks):
                for strip in strips:
                    planes = pieces.read(strip, block)
                    counts += np.bincount(planes[0].ravel(), minlength=256)
                    for x in range(0, strip.width, BLOCK_PX):
                        here = planes[:, :, x : x + BLOCK_PX]
                        place = Window(strip.x0 + x, block * BLOCK_PX, here.shape[2], here.shape[1])
                        for n, (layer, file) in enumerate(zip(layers, files, strict=True)):
                            part = np.ascontiguousarray(here[layer.first : layer.first + layer.count])
                            sums[n] = zlib.crc32(part.data, sums[n])
                            file.write(part, window=place)
                    on_event(Progress("write", planes.shape[1] * planes.shape[2]))
    except RasterioError as error:
        raise _cannot_write(layers[0].out, error) from None
    return counts, sums


def _create(layer: Layer, scene: Scene, classes: Sequence[ClassInfo], tags: Mapping[str, str]) -> Any:
    """Return the draft, open for writing: described, still without pixels."""
    import rasterio
    from rasterio.transform import Affine

    layer.draft.unlink(missing_ok=True)
    place = {"transform": Affine(*scene.affine)} if scene.affine is not None else {}
    file = rasterio.open(
        layer.draft, "w", driver="GTiff", width=scene.width, height=scene.height, count=layer.count, dtype="uint8",
        crs=scene.crs, nodata=NODATA, tiled=True, blockxsize=BLOCK_PX, blockysize=BLOCK_PX, compress="deflate",
        interleave="band", BIGTIFF="IF_SAFER", **place,
    )  # fmt: skip
    names = [c.name for c in classes]
    file.update_tags(**tags, RSMTDF_LAYER=layer.kind, RSMTDF_CLASSES=json.dumps(names, ensure_ascii=False))
    if layer.kind == "classes":
        file.write_colormap(1, {n: (*c.color, 255) for n, c in enumerate(classes)} | {NODATA: (0, 0, 0, 0)})
        file.set_band_description(1, "class")
        file.update_tags(1, **{f"CLASS_{n}": name for n, name in enumerate(names)})
    else:
        file.scales = (1 / LEVELS,) * layer.count
        for n, name in enumerate(names if layer.kind == "probabilities" else ["confidence"], start=1):
            file.set_band_description(n, name)
    return file


def _finish_draft(layer: Layer, expected: int, grid: Grid, cog: bool) -> None:
    """Turn the draft into a COG if asked, compare it with what was written, and make it durable."""
    from rasterio.errors import RasterioError
    from rasterio.shutil import copy

    try:
        if cog:
            made = layer.draft.with_suffix(".cog")
            made.unlink(missing_ok=True)
            resampling = "MODE" if layer.kind == "classes" else "AVERAGE"
            try:
                copy(
                    layer.draft, made, driver="COG", COMPRESS="DEFLATE", BLOCKSIZE=BLOCK_PX, BIGTIFF="IF_SAFER",
                    OVERVIEW_RESAMPLING=resampling, strict=False,
                )  # fmt: skip
            except Exception as error:  # rasterio lets errors of GDAL through here, which have no public class
                made.unlink(missing_ok=True)
                raise _cannot_write(layer.out, error) from None
            made.replace(layer.draft)
        found = _checksum(layer.draft, grid)
    except RasterioError as error:
        raise _cannot_write(layer.out, error) from None
    if found != expected:
        raise _cannot_write(layer.out, "what was read back is not what was written")
    with layer.draft.open("rb") as file:
        os.fsync(file.fileno())


def _checksum(path: Path, grid: Grid) -> int:
    import rasterio
    from rasterio.windows import Window

    total = 0
    with rasterio.open(path) as dataset:
        for y in range(0, dataset.height, BLOCK_PX):
            for x in range(0, dataset.width, BLOCK_PX):
                shape = min(BLOCK_PX, dataset.width - x), min(BLOCK_PX, dataset.height - y)
                total = zlib.crc32(dataset.read(window=Window(x, y, *shape)), total)
    return total


def _publish(layer: Layer, classes: Sequence[ClassInfo]) -> None:
    """Give the file its name, the sidecar with the class names before it: a name without a map misleads nobody."""
    if layer.kind == "classes":
        sidecar = layer.draft.with_suffix(".aux.xml")
        sidecar.write_text("\n".join(_category_names(classes)) + "\n", encoding="utf-8")
        rename_file(sidecar, layer.out.with_name(f"{layer.out.name}.aux.xml"))
    rename_file(layer.draft, layer.out)
    fsync_folder(layer.out.parent)


def _category_names(classes: Sequence[ClassInfo]) -> Iterator[str]:
    """Yield the lines of the file in which GDAL keeps names of pixel values: a GeoTIFF has no place for them."""
    yield "<PAMDataset>"
    yield '  <PAMRasterBand band="1">'
    yield "    <CategoryNames>"
    for entry in classes:
        yield f"      <Category>{escape(entry.name)}</Category>"
    yield "    </CategoryNames>"
    yield "  </PAMRasterBand>"
    yield "</PAMDataset>"


def _cannot_write(out: Path, why: object) -> ResourceError:
    text = why if isinstance(why, str) else str(getattr(why, "__cause__", None) or why).partition("\n")[0]
    return ResourceError(
        f"map {out}: cannot be written ({text}); make room on the disk and run the same command again, what is "
        "segmented is kept"
    )
