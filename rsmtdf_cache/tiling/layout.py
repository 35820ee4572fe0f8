"""Look at every scene and every window once: what it is, whether it shows anything, how much of it is labelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.cores import usable_cores
from rsmtdf_cache.errors import DataError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart
from rsmtdf_cache.rasters.gdal import gdal_settings
from rsmtdf_cache.rasters.scaling import PixelRule, Scale
from rsmtdf_cache.rasters.scene import open_scene
from rsmtdf_cache.sources.header import DatasetHeader
from rsmtdf_cache.sources.raster_files import RasterFiles
from rsmtdf_cache.sources.rasters import Raster
from rsmtdf_cache.tiling.dealing import Window
from rsmtdf_cache.tiling.finding import FoundScene
from rsmtdf_cache.tiling.request import TileRequest

__all__ = ["Layout", "common_pixels", "lay_out"]

#: A window of a scene whose blocks hold this many times its pixels is slow to read.
_WASTE = 8


@dataclass(frozen=True)
class Layout:
    """The scenes that can be used, the windows that show something, and what was put aside.

    ``empty``: windows without data. ``left_out``: scenes that cannot be read, with the reason. ``pixels``: labelled
    pixels of each class, the last entry those without a label. ``slow``: scenes stored so that a tile costs much more.
    """

    rasters: tuple[Raster, ...]
    windows: tuple[Window, ...]
    empty: int
    left_out: tuple[tuple[str, str], ...]
    pixels: NDArray[np.int64]
    slow: tuple[str, ...]


def common_pixels(
    scenes: Sequence[FoundScene], bands: tuple[int, int, int] | None, scale: Scale | None
) -> tuple[PixelRule, list[tuple[str, str]]]:
    """Return the rule that fits all scenes, and the scenes that cannot be opened.

    Bands and type are those of the first scene. Raises ``DataError`` for scenes that differ in them, ``UsageError`` for
    values that need a range.
    """
    rule: PixelRule | None = None
    first, faults = "", []
    for found in scenes:
        try:
            with gdal_settings(), open_scene(found.image, bands, scale) as scene:
                scene.require_whole()
                here = PixelRule(scene.bands, scene.scale, scene.dtype)
        except DataError as error:
            faults.append((found.name, str(error)))
            continue
        if rule is None:
            rule, first = here, str(found.image)
        if (here.dtype, here.bands) != (rule.dtype, rule.bands):
            raise DataError(
                f"scenes {first} and {found.image} differ: {rule.dtype}, red, green, blue in bands {rule.bands}, and "
                f"{here.dtype}, bands {here.bands}; one range is for one type: make datasets of each, or name --bands"
            )
    if rule is None:
        raise DataError(f"none of {len(scenes)} scenes can be read; the first: {faults[0][1]}")
    return rule, faults


def lay_out(scenes: Sequence[FoundScene], request: TileRequest, header: DatasetHeader, on_event: EventSink) -> Layout:
    """Return the tiles there are. Labels are read throughout, images only where they may hold no data; on all cores.

    Raises ``DataError`` for labels that are damaged, do not lie on their scene's pixels or hold what is no class.
    """
    files = RasterFiles(header)
    rasters: list[Raster] = []
    jobs: list[Callable[[], tuple[list[Window], int, NDArray[np.int64]]]] = []
    slow = []
    classes = len(header.classes)
    for found in scenes:
        with files.described(found.image) as scene:
            raster = Raster(
                found.name, found.image, found.labels, scene.width, scene.height, scene.crs_name, scene.affine
            )
            may_lack = scene.may_lack_data
            if scene.waste(request.cut.tile_px) > _WASTE:
                slow.append(found.name)
        if found.labels is not None:
            files.check_labels(found.image, found.labels)
        rasters.append(raster)
        tops, lefts = (request.cut.starts(side) for side in (raster.height, raster.width))
        digits = max(2, len(str(max(len(tops), len(lefts)) - 1)))
        jobs += [_row_job(files, raster, header, row, top, lefts, digits, may_lack) for row, top in enumerate(tops)]
    windows: list[Window] = []
    empty, pixels = 0, np.zeros(classes + 1, np.int64)
    on_event(ProgressStart("tile", "laying out tiles", len(jobs), unit="rows"))
    with ThreadPoolExecutor(usable_cores()) as pool:
        for some, without, counts in pool.map(lambda job: job(), jobs):
            windows += some
            empty += without
            pixels += counts
            on_event(Progress("tile", 1))
    on_event(ProgressEnd("tile"))
    return Layout(tuple(rasters), tuple(windows), empty, (), pixels, tuple(slow))


def _row_job(
    files: RasterFiles, raster: Raster, header: DatasetHeader, row: int, top: int, lefts: Sequence[int], digits: int,
    may_lack: bool,
) -> Callable[[], tuple[list[Window], int, NDArray[np.int64]]]:  # fmt: skip
    classes, ignore = len(header.classes), header.ignore_index

    def look() -> tuple[list[Window], int, NDArray[np.int64]]:
        found, empty, pixels = [], 0, np.zeros(classes + 1, np.int64)
        for column, left in enumerate(lefts):
            if may_lack and not _shows(files, raster, (top, left)):
                empty += 1
                continue
            name = f"{raster.scene}_y{row:0{digits}}_x{column:0{digits}}"
            window = Window(name, raster.scene, row, column, top, left, 0.0)
            if raster.labels is not None:
                counts = np.bincount(files.mask(raster.image, raster.labels, (top, left)).ravel(), minlength=256)
                pixels[:classes] += counts[:classes]
                pixels[classes] += counts[ignore]
                window = replace(window, labeled=float(counts[:classes].sum() / counts.sum()))
            found.append(window)
        return found, empty, pixels

    return look


def _shows(files: RasterFiles, raster: Raster, corner: tuple[int, int]) -> bool:
    """Whether a tile holds any data. One that is damaged does as far as is known: the build puts it aside by name."""
    try:
        _, valid = files.image(raster.image, corner)
    except DataError:
        return True
    return valid is None or bool(valid.any())
