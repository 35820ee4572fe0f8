"""A label raster through GDAL: what stands in a window of it, values or colours, and where it says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.rasters.gdal import reason_of, require_whole_file
from rsmtdf_cache.rasters.scene import Scene

__all__ = ["LabelRaster", "open_labels", "require_same_grid"]

#: Parts of a pixel by which the corners of scene and labels may differ: rounding of written coordinates.
_SAME_PX = 0.05


@dataclass(frozen=True)
class LabelRaster:
    """An open label raster. ``nodata``: the value that says nothing. One thread at a time may read."""

    path: Path
    width: int
    height: int
    kind: Literal["values", "colors"]
    nodata: float | None
    _dataset: Any = field(repr=False, compare=False)
    _alpha: int | None = None
    _masked: bool = False
    _palette: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    _fits: set[tuple[Path, int, int]] = field(default_factory=set, repr=False, compare=False)  # scenes, as they were

    def read(self, y: int, x: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values ``[h, w]`` or colours ``[h, w, 3]`` of a box inside, and where they say something, ``[h, w]``.

        Values are whole numbers. Raises ``DataError`` for a file that is damaged there and for values like 1.5.
        """
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        window = Window(x, y, width, height)
        bands = [1, 2, 3] if self.kind == "colors" and self._palette is None else [1]
        try:
            raw = self._dataset.read(bands, window=window)
            known = np.ones((height, width), bool)
            if self._alpha is not None:
                known &= self._dataset.read(self._alpha, window=window) > 0
            if self._masked:
                known &= self._dataset.read_masks(1, window=window) > 0
        except RasterioError as error:
            raise DataError(
                f"labels {self.path}: cannot be read at rows {y} to {y + height}, columns {x} to {x + width} "
                f"({reason_of(error)}); the file is damaged or cut short, copy it again"
            ) from None
        if self.nodata is not None and not np.isnan(self.nodata):
            known &= (raw != self.nodata).any(axis=0)
        if self.kind == "colors":
            pixels = self._palette[raw[0]] if self._palette is not None else raw.transpose(1, 2, 0)
            return pixels, known
        values = raw[0]
        if values.dtype.kind == "f":
            known &= ~np.isnan(values)
            values = self._whole(np.where(known, values, 0), y, x)
        return values, known

    def _whole(self, values: NDArray[Any], y: int, x: int) -> NDArray[np.int64]:
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int64)
        odd = whole != values
        if odd.any():
            row, column = (int(v) for v in np.argwhere(odd)[0])
            raise DataError(
                f"labels {self.path}: value {values[row, column]:g} at row {y + row}, column {x + column} is no class "
                "number; labels are whole numbers, one class a pixel"
            )
        return whole


@contextmanager
def open_labels(path: Path, kind: Literal["values", "colors"]) -> Iterator[LabelRaster]:
    """Yield the label raster in ``path``; inside ``gdal_settings``. Raises ``DataError`` for one that cannot be one."""
    import rasterio
    from rasterio.errors import RasterioError

    if not path.is_file():
        raise DataError(f"labels {path}: there is no such file")
    try:
        dataset = rasterio.open(path)
    except RasterioError as error:
        raise DataError(f"labels {path}: GDAL cannot open it ({reason_of(error)}); give a whole raster") from None
    with dataset:
        require_whole_file(path, dataset.driver, f"labels {path}")
        yield _described(path, dataset, kind)


def _described(path: Path, dataset: Any, kind: Literal["values", "colors"]) -> LabelRaster:
    from rasterio.enums import ColorInterp, MaskFlags

    colors = list(dataset.colorinterp)
    alpha = colors.index(ColorInterp.alpha) + 1 if ColorInterp.alpha in colors else None
    bands = dataset.count - (alpha is not None)
    dtype = np.dtype(dataset.dtypes[0])
    has_palette = bands == 1 and colors[0] is ColorInterp.palette
    palette = None
    if kind == "colors":
        if has_palette and dtype != np.uint8:
            raise DataError(f"labels {path}: a palette of {dtype} values; colours need an 8-bit palette")
        if has_palette:
            palette = np.zeros((256, 3), np.uint8)
            for number, color in dataset.colormap(1).items():
                palette[number] = color[:3]
        elif bands != 3 or any(t != "uint8" for t in dataset.dtypes[:3]):
            raise DataError(
                f"labels {path}: {bands} band{'s' * (bands != 1)} of {dtype}; colours need three 8-bit bands or a "
                "palette. If the values are class numbers, write `labels: {kind: values}`"
            )
    elif bands != 1:
        raise DataError(
            f"labels {path}: {bands} bands; labels are one band of class numbers. If their colours say the class, "
            "write `labels: {kind: colors}`"
        )
    if dtype.kind not in "iuf":
        raise DataError(f"labels {path}: values of type {dtype}; labels are whole numbers")
    masked = MaskFlags.per_dataset in dataset.mask_flag_enums[0] and alpha is None
    return LabelRaster(
        path, dataset.width, dataset.height, kind, dataset.nodatavals[0], dataset, alpha, masked, palette
    )


def require_same_grid(scene: Scene, labels: LabelRaster) -> None:
    """Raise ``DataError`` unless the pixels of ``labels`` are those of ``scene``.

    Sizes have to agree; CRS and corners too where both have them. Nothing is resampled: how classes are put on another
    grid decides what is learned, so the message has the command instead.
    """
    if (scene.path, scene.nbytes, scene.mtime_ns) in labels._fits:
        return
    dataset = labels._dataset
    where = f"labels {labels.path} and scene {scene.path}"
    here, there = scene.crs_name, None if dataset.crs is None else str(dataset.crs.to_string())
    placed = scene.affine is not None and not dataset.transform.is_identity
    if here is not None and there is not None and dataset.crs != scene.dataset_crs:
        raise DataError(
            f"{where}: the scene has the CRS {_short(here)}, the labels {_short(there)}; put them on the scene's "
            f"pixels, {_warp(scene, labels)}"
        )
    if (labels.width, labels.height) != (scene.width, scene.height):
        advice = _warp(scene, labels) if placed else "give labels of the scene's size"
        raise DataError(
            f"{where}: the scene has {scene.width} x {scene.height} px, the labels {labels.width} x {labels.height}; "
            f"{advice}"
        )
    if placed:
        shift = max(_shift(scene, dataset, x, y) for x in (0, scene.width) for y in (0, scene.height))
        if not shift <= _SAME_PX:
            raise DataError(
                f"{where}: their corners lie up to {shift:.6g} pixels apart; put the labels on the scene's pixels, "
                f"{_warp(scene, labels)}"
            )
    labels._fits.add((scene.path, scene.nbytes, scene.mtime_ns))


def _shift(scene: Scene, dataset: Any, column: int, row: int) -> float:
    """Return how far a pixel corner of the labels is from that of the scene, in pixels of the scene."""
    assert scene.affine is not None
    a, b, c, d, e, f = tuple(dataset.transform)[:6]
    x, y = a * column + b * row + c, d * column + e * row + f
    a, b, c, d, e, f = scene.affine
    if a * e == b * d:
        return float("nan")
    u, v = (e * (x - c) - b * (y - f)) / (a * e - b * d), (a * (y - f) - d * (x - c)) / (a * e - b * d)
    return float(max(abs(u - column), abs(v - row)))


def _warp(scene: Scene, labels: LabelRaster) -> str:
    if scene.affine is None or scene.crs is None:
        return "with a GIS"
    a, b, c, d, e, f = scene.affine
    if b or d:
        return "with a GIS (the scene is rotated)"
    xs, ys = sorted((c, c + a * scene.width)), sorted((f, f + e * scene.height))
    box = " ".join(f"{v:.10g}" for v in (xs[0], ys[0], xs[1], ys[1]))
    crs = _short(scene.crs_name or "")
    return (
        f"such as with gdalwarp -r near -t_srs {crs} -te {box} -ts {scene.width} {scene.height} {labels.path.name} "
        "aligned.tif"
    )


def _short(crs: str) -> str:
    return crs if len(crs) < 40 else crs.partition(",")[0].replace("[", " ").replace('"', "'")
