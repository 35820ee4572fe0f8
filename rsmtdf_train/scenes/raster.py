"""A georeferenced image through GDAL: what it is, and any box of it as 8-bit RGB with the pixels that hold data.

Other than 8-bit values become 8-bit by an explicit range, as the tiles a student learned from are 8-bit. A pixel holds
no data where alpha or mask say so, where a value is not finite, and where its bands hold the no-data value: all of
them, or one where that value lies outside the range (then it cannot be a dark or bright pixel).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, UsageError

__all__ = ["GDAL_CACHE_MB", "Scene", "gdal_settings", "has_place", "open_scene"]

#: Megabytes of decoded blocks that GDAL keeps. Its own default is a twentieth of the machine's memory.
GDAL_CACHE_MB = 64
_SUGGEST_PX = 512
_PERCENTILES = (2, 98)


@contextmanager
def gdal_settings() -> Iterator[None]:
    """Hold GDAL to a bounded cache of decoded blocks; what lacks a georeference is told in our own words."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_MB), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def has_place(path: Path) -> bool:
    """Return whether GDAL can open ``path`` and it has a CRS."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with gdal_settings(), rasterio.open(path) as dataset:
            return dataset.crs is not None
    except RasterioError:
        return False


@dataclass(frozen=True)
class Scene:
    """An open scene. ``bands``: numbers, from 1, of what is shown as red, green and blue.

    ``scale``: the values that become 0 and 255. ``crs``: WKT or None. ``affine``: ``(a, b, c, d, e, f)`` as GDAL has it
    for pixel corners, None without georeference. One thread at a time may read.
    """

    path: Path
    width: int
    height: int
    bands: tuple[int, int, int]
    dtype: str
    scale: tuple[float, float]
    crs: str | None
    affine: tuple[float, float, float, float, float, float] | None
    nodata: tuple[float | None, ...]
    nbytes: int
    mtime_ns: int
    _dataset: Any = field(repr=False, compare=False)
    _alpha: int | None = None
    _masked: bool = False

    @property
    def crs_name(self) -> str | None:
        """``EPSG:4326`` and the like where the CRS has such a name, else its WKT."""
        crs = self._dataset.crs
        return None if crs is None else str(crs.to_string())

    def read(self, y0: int, y1: int, x0: int, x1: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return rows ``y0 .. y1`` and columns ``x0 .. x1``: RGB ``[3, h, w]`` uint8, and which pixels hold data.

        Beyond the lower and right edge the last row and column are repeated, as ``predict`` does for images. Pixels
        without data are black. Raises ``DataError`` for a file that is damaged there.
        """
        height, width = min(y1, self.height) - y0, min(x1, self.width) - x0
        pixels, valid = self._read(y0, x0, height, width)
        below, right = y1 - y0 - height, x1 - x0 - width
        if below or right:
            pixels = np.pad(pixels, ((0, 0), (0, below), (0, right)), mode="edge")
            valid = np.pad(valid, ((0, below), (0, right)), mode="edge")
        return pixels, valid

    def _read(self, y: int, x: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        window = Window(x, y, width, height)
        try:
            raw = self._dataset.read(list(self.bands), window=window)
            valid = np.ones((height, width), bool)
            if self._alpha is not None:
                valid &= self._dataset.read(self._alpha, window=window) > 0
            if self._masked:
                valid &= self._dataset.read_masks(self.bands[0], window=window) > 0
        except RasterioError as error:
            raise DataError(
                f"scene {self.path}: cannot be read at rows {y} to {y + height}, columns {x} to {x + width} "
                f"({_reason(error)}); the file is damaged or cut short, copy it again"
            ) from None
        valid &= ~self._without_data(raw)
        pixels = np.stack([_to_8_bit(band, self.scale) for band in raw])
        pixels[:, ~valid] = 0
        return pixels, valid

    def _without_data(self, raw: NDArray[Any]) -> NDArray[np.bool_]:
        """Return ``[h, w]``: where bands ``[3, h, w]`` hold no data."""
        missing = np.zeros(raw.shape[1:], bool)
        if all(value is not None and not math.isnan(value) for value in self.nodata):
            low, high = self.scale
            empty = [band == value for band, value in zip(raw, self.nodata, strict=True)]
            outside = any(not low <= value <= high for value in self.nodata if value is not None)
            missing |= np.logical_or.reduce(empty) if outside else np.logical_and.reduce(empty)
        if raw.dtype.kind == "f":
            missing |= ~np.isfinite(raw).all(axis=0)
        return missing

    def require_whole(self) -> None:
        """Read corners and centre: a file that was cut short shows here, before hours of work. Raises ``DataError``."""
        rows, columns = ({0, size // 2, size - 1} for size in (self.height, self.width))
        for y in sorted(rows):
            for x in sorted(columns):
                self._read(y, x, 1, 1)


def _to_8_bit(band: NDArray[Any], scale: tuple[float, float]) -> NDArray[np.uint8]:
    """Return ``(value - low) / (high - low)`` in 255ths, rounded, cut at 0 and 255; what is not finite becomes 0."""
    low, high = scale
    if band.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return np.asarray(band)
    if band.dtype.itemsize <= 2 and band.dtype.kind in "iu":  # a table is as exact and faster
        info = np.iinfo(band.dtype)
        values = np.arange(int(info.min), int(info.max) + 1, dtype=np.float64)
        table = _scaled(values, low, high)
        index = band.astype(np.int32) - int(info.min)
        return np.asarray(table[index])
    return _scaled(band, low, high)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    with np.errstate(invalid="ignore", over="ignore"):
        level = np.clip((values - low) * (255 / (high - low)), 0, 255)
        level = np.where(np.isfinite(level), level, 0)
        return np.asarray((level + 0.5).astype(np.uint8))


@contextmanager
def open_scene(
    path: Path, bands: Sequence[int] | None = None, scale: tuple[float, float] | None = None
) -> Iterator[Scene]:
    """Yield the scene in ``path``; inside ``gdal_settings``.

    ``bands``: three numbers from 1; default: those that the file calls red, green and blue, else 1, 2, 3. ``scale``:
    the values that become black and white; 8-bit bands need none. Raises ``DataError`` for a file that cannot be used,
    ``UsageError`` for bands it does not have and for a missing or empty range.
    """
    import rasterio
    from rasterio.errors import RasterioError

    if not path.is_file():
        raise DataError(f"scene {path}: there is no such file")
    try:
        dataset = rasterio.open(path)
    except RasterioError as error:
        raise DataError(
            f"scene {path}: GDAL cannot open it ({_reason(error)}); give a whole GeoTIFF or another raster it knows"
        ) from None
    with dataset:
        yield _described(path, dataset, bands, scale)


def _described(path: Path, dataset: Any, bands: Sequence[int] | None, scale: tuple[float, float] | None) -> Scene:
    from rasterio.enums import ColorInterp, MaskFlags

    affine = None if dataset.transform.is_identity else tuple(dataset.transform)[:6]
    if affine is None and (dataset.gcps[0] or dataset.rpcs):
        kind = "ground control points" if dataset.gcps[0] else "rational polynomials (RPC)"
        raise DataError(
            f"scene {path}: it is placed by {kind} only, which a map cannot keep; rectify it first, "
            f"such as with gdalwarp {path.name} rectified.tif"
        )
    alpha = [n for n, c in enumerate(dataset.colorinterp, 1) if c is ColorInterp.alpha]
    chosen = _bands(path, dataset, bands, alpha)
    dtypes = {dataset.dtypes[n - 1] for n in chosen}
    dtype = dtypes.pop()
    if dtypes or np.dtype(dtype).kind not in "iuf":
        found = ", ".join(sorted({dtype, *dtypes}))
        raise DataError(
            f"scene {path}: bands {_list(chosen)} are {found}; a student reads three bands of one real type: convert "
            "them, such as amplitudes of complex values with gdal_calc"
        )
    status = path.stat()
    scene = Scene(
        path=path,
        width=dataset.width,
        height=dataset.height,
        bands=chosen,
        dtype=dtype,
        scale=(0.0, 255.0),
        crs=dataset.crs.to_wkt() if dataset.crs is not None else None,
        affine=affine,
        nodata=tuple(dataset.nodatavals[n - 1] for n in chosen),
        nbytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        _dataset=dataset,
        _alpha=alpha[0] if alpha else None,
        _masked=MaskFlags.per_dataset in dataset.mask_flag_enums[chosen[0] - 1] and not alpha,
    )
    found_scale = _scale(scene, scale)
    return replace(scene, scale=found_scale)


def _bands(path: Path, dataset: Any, asked: Sequence[int] | None, alpha: list[int]) -> tuple[int, int, int]:
    from rasterio.enums import ColorInterp

    there = f"the file has {dataset.count} band{'s' * (dataset.count != 1)}" + (
        f", of which {alpha[0]} is alpha" if alpha else ""
    )
    if asked is None:
        colors = list(dataset.colorinterp)
        if ColorInterp.palette in colors:
            raise DataError(
                f"scene {path}: its values are colours of a palette; make three bands of them, such as with "
                f"gdal_translate -expand rgb {path.name} rgb.tif"
            )
        named = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        asked = [colors.index(c) + 1 for c in named] if all(c in colors for c in named) else (1, 2, 3)
        if any(n > dataset.count or n in alpha for n in asked):
            raise DataError(
                f"scene {path}: a student reads red, green and blue, {there}; name three with --bands, the same one "
                "three times (--bands 1,1,1) for a grey image"
            )
    wrong = [n for n in asked if not 1 <= n <= dataset.count or n in alpha]
    if wrong or len(asked) != 3:
        raise UsageError(f"--bands {_list(asked)}: {there}; name three of them from 1 on, as red, green and blue")
    red, green, blue = asked
    return red, green, blue


def _scale(scene: Scene, asked: tuple[float, float] | None) -> tuple[float, float]:
    if asked is not None:
        low, high = asked
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"--scale {low:g},{high:g}: give two finite values, the lower one first")
        return low, high
    if scene.dtype == "uint8":
        return 0.0, 255.0
    raise UsageError(
        f"scene {scene.path}: its values are {scene.dtype}; say with --scale LOW,HIGH which of them are black and "
        f"white, the same as for the tiles the student learned from{_suggestion(scene)}"
    )


def _suggestion(scene: Scene) -> str:
    """Return what percentiles of the scene, seen small, would be."""
    from rasterio.errors import RasterioError

    shape = tuple(max(1, min(size, _SUGGEST_PX)) for size in (scene.height, scene.width))
    try:
        raw = scene._dataset.read(list(scene.bands), out_shape=(3, *shape))
    except RasterioError:
        return ""
    open_range = replace(scene, scale=(-math.inf, math.inf))
    values = raw[:, ~open_range._without_data(raw)].astype(np.float64)
    if not values.size:
        return "; this scene, seen small, has no data"
    low, high = np.percentile(values, _PERCENTILES)
    advice = f"; the {_PERCENTILES[0]}nd and {_PERCENTILES[1]}th percentiles here are {low:.4g} and {high:.4g}"
    return advice + (f": --scale {low:.4g},{high:.4g}" if f"{low:.4g}" != f"{high:.4g}" else "")


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _reason(error: Exception) -> str:
    """Return what GDAL said, in one line: rasterio keeps it in the cause."""
    cause = error.__cause__ or error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__
