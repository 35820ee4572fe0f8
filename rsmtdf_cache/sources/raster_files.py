"""Images and labels of a dataset in any raster format: windows of them as 8-bit RGB and as class numbers."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, UsageError
from rsmtdf_cache.rasters.gdal import gdal_settings, reason_of
from rsmtdf_cache.rasters.label_raster import LabelRaster, open_labels, require_same_grid
from rsmtdf_cache.rasters.png import read_png_header
from rsmtdf_cache.rasters.polygons import Polygons, open_polygons
from rsmtdf_cache.rasters.pool import FilePool
from rsmtdf_cache.rasters.scaling import PixelRule
from rsmtdf_cache.rasters.scene import Scene, open_scene
from rsmtdf_cache.sources.header import DatasetHeader, LabelsHeader, label_numbers
from rsmtdf_cache.sources.labels import ColorTable, LabelTable, ValueTable

__all__ = ["RasterFiles", "gdal_version"]

_WHOLE = re.compile(r"-?[0-9]{1,18}")
#: Scenes whose polygons are kept in memory.
_KEPT = 8


def gdal_version() -> str:
    """Return ``gdal 3.9.2`` and the like."""
    import rasterio

    return f"gdal {rasterio.__gdal_version__}"


class RasterFiles:
    """Reads what ``header`` describes. Threads may share it, and other processes get one of their own."""

    def __init__(self, header: DatasetHeader) -> None:
        self.rule: PixelRule | None = header.pixels.rule if header.pixels is not None else None
        self.labels = header.labels or LabelsHeader()
        self.tile_px = header.tile_px
        self._ignore = header.ignore_index
        self._numbers = label_numbers(header.classes, self.labels, self._ignore)
        names = [c.name for c in header.classes]
        self._outside = self._ignore if self.labels.outside is None else names.index(self.labels.outside)
        self.scenes = FilePool(self._open_scene)
        self.label_rasters = FilePool(self._open_labels)
        self._polygons: dict[tuple[Path, Path], Polygons] = {}
        self._lock = threading.Lock()

    def _open_scene(self, path: Path) -> AbstractContextManager[Scene]:
        if self.rule is None:
            return open_scene(path)
        return open_scene(path, self.rule.bands, None, self.rule)

    def _open_labels(self, path: Path) -> AbstractContextManager[LabelRaster]:
        return open_labels(path, "colors" if self.labels.kind == "colors" else "values")

    @contextmanager
    def described(self, path: Path) -> Iterator[Scene]:
        """Yield the image ``path``, open. Raises ``DataError`` for one that cannot be read by the rule."""
        try:
            with self.scenes.borrow(path) as scene:
                yield scene
        except UsageError as error:  # such as bands that the file does not have: here no option is at fault
            raise DataError(str(error)) from None

    def size(self, path: Path) -> tuple[int, int]:
        """Return the declared width and height of a raster. Raises ``DataError``, ``PngError``, ``OSError``."""
        if path.suffix.lower() == ".png":
            header = read_png_header(path)
            return header.width, header.height
        import rasterio
        from rasterio.errors import RasterioError

        try:
            with gdal_settings(), rasterio.open(path) as dataset:
                return dataset.width, dataset.height
        except RasterioError as error:
            raise DataError(f"{path}: GDAL cannot open it ({reason_of(error)})") from None

    @property
    def table(self) -> LabelTable:
        """What stands in label rasters."""
        if self.labels.kind == "colors":
            return _Colors({k: n for k, n in self._numbers.items() if isinstance(k, tuple)})
        return _Values({k: n for k, n in self._numbers.items() if isinstance(k, int)})

    def image(self, path: Path, corner: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        """Return the tile at ``corner`` (row, column): ``[tile_px, tile_px, 3]`` uint8, and where it holds data.

        None: everywhere. What lies beyond the scene is black and no data. Raises ``DataError``.
        """
        side = self.tile_px
        with self.described(path) as scene:
            height, width = _inside(scene, corner, side)
            pixels, valid = scene.read_inside(*corner, height, width)
        image = np.zeros((side, side, 3), np.uint8)
        image[:height, :width] = pixels.transpose(1, 2, 0)
        if (height, width) == (side, side) and valid.all():
            return image, None
        whole = np.zeros((side, side), bool)
        whole[:height, :width] = valid
        return image, whole

    def mask(self, image: Path, labels: Path, corner: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the labels of the tile at ``corner``: ``[tile_px, tile_px]`` uint8 class numbers or ``ignore_index``.

        Where the scene ends or holds no data, there is no label. Raises ``DataError`` for labels that cannot be used.
        """
        side = self.tile_px
        mask = np.full((side, side), self._ignore, np.uint8)
        with self.described(image) as scene:
            height, width = _inside(scene, corner, side)
            box = (*corner, height, width)
            found = (self._burnt if self.labels.kind == "polygons" else self._stored)(scene, labels, box)
            if scene.may_lack_data:
                with suppress(DataError):  # an image that is damaged here is told of when it is read
                    found[~scene.read_inside(*box)[1]] = self._ignore
        mask[:height, :width] = found
        return mask

    def check_labels(self, image: Path, labels: Path) -> None:
        """Raise ``DataError`` unless ``labels`` fit the scene: same pixels, or polygons whose classes are known."""
        with self.described(image) as scene:
            if self.labels.kind == "polygons":
                self._laid_over(scene, labels)
                return
            with self.label_rasters.borrow(labels) as raster:
                require_same_grid(scene, raster)

    def _stored(self, scene: Scene, labels: Path, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        with self.label_rasters.borrow(labels) as raster:
            require_same_grid(scene, raster)
            pixels, known = raster.read(*box)
        table = self.table
        if not known.all():  # what says nothing is not asked about: any known code will do
            code = next(iter(table.table()))
            filler = (code >> 16, code >> 8 & 255, code & 255) if pixels.ndim == 3 else code
            pixels = np.array(pixels, np.int64 if pixels.ndim == 2 else np.uint8)
            pixels[~known] = filler
        numbers, _ = table.convert(pixels, f"labels {labels}", self.labels.unknown, self._ignore, box[:2])
        numbers[~known] = self._ignore
        return numbers

    def _burnt(self, scene: Scene, labels: Path, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        polygons, numbers = self._laid_over(scene, labels)
        return polygons.burn(numbers, self._outside, box)

    def _laid_over(self, scene: Scene, labels: Path) -> tuple[Polygons, Mapping[object, int]]:
        key = (scene.path, labels)
        with self._lock:
            polygons = self._polygons.get(key)
        if polygons is None:
            polygons = open_polygons(labels, scene, self.labels.field, self.labels.layer)
            with self._lock:
                self._polygons[key] = polygons
                while len(self._polygons) > _KEPT:
                    del self._polygons[next(iter(self._polygons))]
        numbers: dict[object, int] = dict(self._numbers.items())
        for value in dict.fromkeys(polygons.values):
            if value in numbers:
                continue
            if isinstance(value, str) and _WHOLE.fullmatch(value) and int(value) in numbers:
                numbers[value] = numbers[int(value)]  # a field of text that holds numbers
                continue
            if self.labels.unknown == "error" and value is not None:
                known = ", ".join(repr(v) for v in numbers)
                raise DataError(
                    f"labels {labels}: {self.labels.field} = {value!r} is no class; known: {known}. Name it in the "
                    "values of a class or in labels.ignore, or ignore such polygons with labels.unknown: ignore"
                )
            numbers[value] = self._ignore
        return polygons, numbers

    def __getstate__(self) -> dict[str, object]:
        """Return all but what belongs to one process."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"} | {"_polygons": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


class _Values(ValueTable):
    def advice(self) -> str:
        return "Name it in the values of a class, in labels.ignore, or ignore such pixels with labels.unknown: ignore"


class _Colors(ColorTable):
    def advice(self) -> str:
        return "Name it in the values of a class, in labels.ignore, or ignore such pixels with labels.unknown: ignore"


def _inside(scene: Scene, corner: tuple[int, int], side: int) -> tuple[int, int]:
    """Return how many rows and columns of a tile at ``corner`` the scene has. Raises ``DataError`` for none."""
    height, width = min(side, scene.height - corner[0]), min(side, scene.width - corner[1])
    if height < 1 or width < 1:
        raise DataError(
            f"scene {scene.path} has {scene.width} x {scene.height} px: nothing at row {corner[0]}, column {corner[1]}"
        )
    return height, width
