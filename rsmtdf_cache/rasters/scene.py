"""A georeferenced image through GDAL: what it is, and any box of it as 8-bit RGB with the pixels that hold data.

Other than 8-bit values become 8-bit by an explicit range, as the tiles a student learned from are 8-bit. A pixel holds
no data where alpha or mask say so, where a value is not finite, and where its bands hold the no-data value: all of
them, or one where that value lies outside the range (then it cannot be a dark or bright pixel).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.rasters.gdal import all_sources, reason_of, require_whole_file
from rsmtdf_cache.rasters.scaling import EIGHT_BIT, PixelRule, Scale, percentile_scale, scale_text, to_8_bit

__all__ = ["Scene", "open_scene"]

_SUGGEST_PX = 512
_PERCENTILES = (2, 98)


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
    scale: Scale
    crs: str | None
    affine: tuple[float, float, float, float, float, float] | None
    nodata: tuple[float | None, ...]
    nbytes: int
    mtime_ns: int
    _dataset: Any = field(repr=False, compare=False)
    _alpha: int | None = None
    _masked: bool = False

    @property
    def count(self) -> int:
        """Number of bands in the file, alpha included."""
        return int(self._dataset.count)

    def waste(self, side_px: int) -> float:
        """Return how many pixels are decoded for each pixel of a window of ``side_px``, as the file is stored."""
        height, width = self._dataset.block_shapes[self.bands[0] - 1]
        rows, columns = (-(-side_px // size) * size for size in (height, width))
        side = min(side_px, self.height) * min(side_px, self.width)
        return float(min(rows, self.height) * min(columns, self.width) / side)

    def facts(self) -> dict[str, Any]:
        """Return what a map takes from the scene besides its pixels, as JSON: place, no-data, files of a VRT.

        The place and no-data may stand in files beside it (``.tfw``, ``.aux.xml``).
        """
        files = all_sources(self.path) if self._dataset.driver == "VRT" else []
        status = [(str(file), file.stat()) for file in files if file.exists()]
        return {
            "crs": self.crs,
            "affine": self.affine and list(self.affine),
            "nodata": [repr(value) for value in self.nodata],
            "masked": [self._alpha, self._masked],
            "sources": [[name, found.st_size, found.st_mtime_ns] for name, found in status],
        }

    @property
    def dataset_crs(self) -> Any:
        """The CRS as rasterio has it, or None."""
        return self._dataset.crs

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
        pixels, valid = self.read_inside(y0, x0, height, width)
        below, right = y1 - y0 - height, x1 - x0 - width
        if below or right:
            pixels = np.pad(pixels, ((0, 0), (0, below), (0, right)), mode="edge")
            valid = np.pad(valid, ((0, below), (0, right)), mode="edge")
        return pixels, valid

    def read_inside(self, y: int, x: int, height: int, width: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return what ``read`` does, of a box inside the scene."""
        raw, valid = self.read_raw(y, x, height, width)
        valid &= ~self._without_data(raw)
        pixels = np.stack([to_8_bit(band, limits) for band, limits in zip(raw, self.scale, strict=True)])
        pixels[:, ~valid] = 0
        return pixels, valid

    @property
    def may_lack_data(self) -> bool:
        """Whether there can be pixels without data."""
        declared = all(value is not None for value in self.nodata)
        return self._alpha is not None or self._masked or declared or np.dtype(self.dtype).kind == "f"

    def _unmasked(self, window: Any) -> NDArray[np.bool_]:
        """Return ``[h, w]``: where neither alpha nor a mask says that there is no data."""
        valid = np.ones((int(window.height), int(window.width)), bool)
        if self._alpha is not None:
            valid &= self._dataset.read(self._alpha, window=window) > 0
        if self._masked:
            valid &= self._dataset.read_masks(self.bands[0], window=window) > 0
        return valid

    def read_raw(self, y: int, x: int, height: int, width: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the values of a box inside the scene as the file has them, ``[3, h, w]``, and what is not masked.

        Values that mean no data are not looked for. Raises ``DataError`` as ``read`` does.
        """
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        window = Window(x, y, width, height)
        try:
            raw = self._dataset.read(list(self.bands), window=window)
            valid = self._unmasked(window)
        except RasterioError as error:
            raise DataError(
                f"scene {self.path}: cannot be read at rows {y} to {y + height}, columns {x} to {x + width} "
                f"({reason_of(error)}); the file is damaged or cut short, copy it again"
            ) from None
        return raw, valid

    def _without_data(self, raw: NDArray[Any]) -> NDArray[np.bool_]:
        """Return ``[h, w]``: where bands ``[3, h, w]`` hold no data."""
        missing = np.zeros(raw.shape[1:], bool)
        if all(value is not None and not math.isnan(value) for value in self.nodata):
            empty = [band == value for band, value in zip(raw, self.nodata, strict=True)]
            pairs = zip(self.nodata, self.scale, strict=True)
            outside = any(not low <= value <= high for value, (low, high) in pairs if value is not None)
            missing |= np.logical_or.reduce(empty) if outside else np.logical_and.reduce(empty)
        if raw.dtype.kind == "f":
            missing |= ~np.isfinite(raw).all(axis=0)
        return missing

    def values_with_data(
        self, raw_3HW: NDArray[Any], valid_HW: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the values of each band where there is data: ``raw`` is as the file has it, ``[3, h, w]``."""
        everything = (-math.inf, math.inf)
        valid = ~replace(self, scale=(everything,) * 3)._without_data(raw_3HW)
        if valid_HW is not None:
            valid &= valid_HW
        red, green, blue = (band[valid] for band in raw_3HW)
        return red, green, blue

    def require_whole(self) -> None:
        """Read corners and centre: a file that was cut short shows here, before hours of work. Raises ``DataError``."""
        rows, columns = ({0, size // 2, size - 1} for size in (self.height, self.width))
        for y in sorted(rows):
            for x in sorted(columns):
                self.read_inside(y, x, 1, 1)


@contextmanager
def open_scene(
    path: Path, bands: Sequence[int] | None = None, scale: Scale | None = None, learned: PixelRule | None = None
) -> Iterator[Scene]:
    """Yield the scene in ``path``; inside ``gdal_settings``.

    ``bands``: three numbers from 1; default: those of ``learned``, else those that the file calls red, green and blue,
    else 1, 2, 3. ``scale``: the values that become black and white; default: that of ``learned``, which is for one type
    of values; else 8-bit bands need none. ``learned``: how the tiles that a student learned from were made. Raises
    ``DataError`` for a file that cannot be used, ``UsageError`` for bands it does not have and for a missing range.
    """
    import rasterio
    from rasterio.errors import RasterioError

    if not path.is_file():
        raise DataError(f"scene {path}: there is no such file")
    try:
        dataset = rasterio.open(path)
    except RasterioError as error:
        raise DataError(
            f"scene {path}: GDAL cannot open it ({reason_of(error)}); give a whole GeoTIFF or another raster it knows"
        ) from None
    with dataset:
        require_whole_file(path, dataset.driver, f"scene {path}")
        yield _described(path, dataset, bands, scale, learned)


def _described(
    path: Path, dataset: Any, bands: Sequence[int] | None, scale: Scale | None, learned: PixelRule | None
) -> Scene:
    from rasterio.enums import ColorInterp, MaskFlags

    affine = None if dataset.transform.is_identity else tuple(dataset.transform)[:6]
    if affine is None and (dataset.gcps[0] or dataset.rpcs):
        kind = "ground control points" if dataset.gcps[0] else "rational polynomials (RPC)"
        raise DataError(
            f"scene {path}: it is placed by {kind} only, which a map cannot keep; rectify it first, "
            f"such as with gdalwarp {path.name} rectified.tif"
        )
    alpha = [n for n, c in enumerate(dataset.colorinterp, 1) if c is ColorInterp.alpha]
    chosen = _bands(path, dataset, bands if bands is not None or learned is None else learned.bands, alpha)
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
        scale=EIGHT_BIT,
        crs=dataset.crs.to_wkt() if dataset.crs is not None else None,
        affine=affine,
        nodata=tuple(dataset.nodatavals[n - 1] for n in chosen),
        nbytes=status.st_size,
        mtime_ns=status.st_mtime_ns,
        _dataset=dataset,
        _alpha=alpha[0] if alpha else None,
        _masked=MaskFlags.per_dataset in dataset.mask_flag_enums[chosen[0] - 1] and not alpha,
    )
    return replace(scene, scale=_scale(scene, scale, learned))


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


def _scale(scene: Scene, asked: Scale | None, learned: PixelRule | None) -> Scale:
    if asked is not None:
        return asked
    if learned is not None and learned.dtype == scene.dtype:
        return learned.scale
    if learned is not None:
        raise UsageError(
            f"scene {scene.path}: its values are {scene.dtype}, the student learned from {learned.dtype} with the "
            f"range {scale_text(learned.scale)}; say with --scale LOW,HIGH which values here mean the same"
        )
    if scene.dtype == "uint8":
        return EIGHT_BIT
    raise UsageError(
        f"scene {scene.path}: its values are {scene.dtype}; say with --scale LOW,HIGH which of them are black and "
        f"white (for a map: as for the tiles that the student learned from){_suggestion(scene)}"
    )


def _suggestion(scene: Scene) -> str:
    """Return what percentiles of the scene, seen small, would be."""
    from rasterio.errors import RasterioError

    shape = tuple(max(1, min(size, _SUGGEST_PX)) for size in (scene.height, scene.width))
    try:
        raw = scene._dataset.read(list(scene.bands), out_shape=(3, *shape))
    except RasterioError:
        return ""
    values = scene.values_with_data(raw)
    if not values[0].size:
        return "; this scene, seen small, has no data"
    found = percentile_scale([np.concatenate(values)] * 3, _PERCENTILES)
    name = f"the {_PERCENTILES[0]}nd and {_PERCENTILES[1]}th percentiles here"
    return f"; {name} are --scale {scale_text(found)}" if found else f"; {name} are the same value"


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))
