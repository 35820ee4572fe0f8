"""Polygons of a vector file as labels: reprojected to a scene, burnt into the pixels of a window of it.

A pixel belongs to the polygon that holds its centre; where polygons overlap, the later one in the file. What no polygon
covers is what the dataset says it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import DataError, ResourceError
from rsmtdf_cache.rasters.gdal import reason_of
from rsmtdf_cache.rasters.scene import Scene

__all__ = ["Polygons", "is_vector_file", "open_polygons", "polygon_values"]

_SUFFIXES = {".gpkg", ".geojson", ".json", ".shp", ".fgb", ".gml", ".kml", ".parquet", ".geoparquet"}


def is_vector_file(path: Path) -> bool:
    """Return whether the name of ``path`` is that of polygons, not of a raster."""
    return path.suffix.lower() in _SUFFIXES


@dataclass(frozen=True)
class Polygons:
    """The polygons of ``path`` that touch one scene, in its CRS, in the order of the file.

    ``bounds``: ``[n, 4]`` left, bottom, right, top. ``values``: what the class field says, one each.
    """

    path: Path
    values: tuple[Any, ...]
    bounds: NDArray[np.float64] = field(repr=False)
    _shapes: tuple[Any, ...] = field(repr=False)
    _affine: tuple[float, float, float, float, float, float]

    def burn(self, numbers: Mapping[Any, int], outside: int, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """Return class numbers ``[h, w]`` of the box ``(row, column, height, width)`` of the scene.

        ``numbers``: class number of each value of the class field. ``outside``: what no polygon covers.
        """
        from rasterio.features import rasterize
        from rasterio.transform import Affine, array_bounds

        y, x, height, width = box
        a, b, c, d, e, f = self._affine
        place = Affine(a, b, a * x + b * y + c, d, e, d * x + e * y + f)
        left, bottom, right, top = _sorted(array_bounds(height, width, place))
        xs, ys = self.bounds[:, 0::2], self.bounds[:, 1::2]
        touching = np.flatnonzero((xs[:, 0] < right) & (xs[:, 1] > left) & (ys[:, 0] < top) & (ys[:, 1] > bottom))
        if not touching.size:
            return np.full((height, width), outside, np.uint8)
        shapes = [(self._shapes[n], numbers[self.values[n]]) for n in touching]
        burnt: NDArray[np.uint8] = rasterize(
            shapes, out_shape=(height, width), transform=place, fill=outside, dtype="uint8"
        )
        return burnt


def polygon_values(path: Path, field_name: str | None, layer: str | None) -> dict[Any, int]:
    """Return how many features have each value of the class field, of the whole file. Raises as ``open_polygons``."""
    _, values, _ = _features(path, field_name, layer, None)
    counts: dict[Any, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def open_polygons(path: Path, scene: Scene, field_name: str | None, layer: str | None) -> Polygons:
    """Return what of the vector file ``path`` touches ``scene``, reprojected where the CRS differ.

    ``field_name``: the attribute that says the class. Raises ``DataError`` for a file, layer or field that cannot be
    used, for a missing CRS, for what is no polygon; ``ResourceError`` when pyogrio and shapely are not installed.
    """
    import shapely
    from rasterio.crs import CRS
    from rasterio.transform import Affine, array_bounds
    from rasterio.warp import transform_bounds, transform_geom

    if scene.affine is None or scene.crs is None:
        raise DataError(f"scene {scene.path} has no CRS: polygons of {path} cannot be laid over it; place it first")
    here = CRS.from_wkt(scene.crs)
    box: tuple[float, float, float, float] | None
    box = _sorted(array_bounds(scene.height, scene.width, Affine(*scene.affine)))
    there = _crs(path, layer)
    if there != here:
        box = transform_bounds(here, there, *box, densify_pts=21)
        if not all(map(math.isfinite, box)) or box[0] > box[2]:  # beyond the CRS, or across the 180th meridian
            box = None
    found, values, _ = _features(path, field_name, layer, box)
    kinds = {shapely.get_type_id(shape) for shape in found} - {3, 6}
    if kinds:
        raise DataError(
            f"labels {path}: it has features that are no polygons; give polygons, such as buffers of lines and points"
        )
    shapes = [shape.__geo_interface__ for shape in found]
    if there != here and shapes:
        shapes = transform_geom(there, here, shapes)
    found = [shapely.geometry.shape(shape) for shape in shapes]
    bounds = np.array([shape.bounds for shape in found], np.float64).reshape(-1, 4)
    return Polygons(path, tuple(values), bounds, tuple(shapes), scene.affine)


def _sorted(bounds: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Return left, bottom, right, top of a box that may be upside down or mirrored."""
    left, bottom, right, top = bounds
    return min(left, right), min(bottom, top), max(left, right), max(bottom, top)


def _crs(path: Path, layer: str | None) -> Any:
    from rasterio.crs import CRS

    info = _info(path, layer)
    if not info["crs"]:
        raise DataError(f"labels {path}: no CRS says where its polygons lie; set it, such as with ogr2ogr -a_srs")
    return CRS.from_user_input(info["crs"])


def _info(path: Path, layer: str | None) -> dict[str, Any]:
    pyogrio = _pyogrio()
    if not path.is_file():
        raise DataError(f"labels {path}: there is no such file")
    try:
        layers = [str(name) for name, _ in pyogrio.list_layers(path)]
        if layer is None and len(layers) > 1:
            raise DataError(
                f"labels {path}: it has the layers {', '.join(layers)}; say which with `labels: {{layer:}}`"
            )
        if layer is not None and layer not in layers:
            raise DataError(f"labels {path}: no layer {layer!r}; it has {', '.join(layers)}")
        return dict(pyogrio.read_info(path, layer=layer))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError) as error:
        raise DataError(f"labels {path}: no vector file that can be read ({reason_of(error)})") from None


def _features(
    path: Path, field_name: str | None, layer: str | None, box: tuple[float, float, float, float] | None
) -> tuple[list[Any], list[Any], list[str]]:
    """Return geometries, values of the class field and field names, of features that touch ``box``."""
    pyogrio = _pyogrio()
    import shapely

    fields = [str(name) for name in _info(path, layer)["fields"]]
    if field_name is None or field_name not in fields:
        asked = "none is named" if field_name is None else f"{field_name!r} is none of them"
        raise DataError(
            f"labels {path}: which field says the class? {asked}; fields there: {', '.join(fields) or 'none'}. Name "
            "one with `labels: {field: NAME}`"
        )
    try:
        _, numbers, geometry, columns = pyogrio.raw.read(
            path, layer=layer, columns=[field_name], bbox=box, return_fids=True
        )
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, RuntimeError) as error:
        raise DataError(f"labels {path}: cannot be read ({reason_of(error)}); copy it again") from None
    order = np.argsort(numbers, kind="stable")  # a spatial index gives them in an order of its own
    kept = [int(n) for n in order if geometry[n] is not None]
    shapes = shapely.from_wkb([geometry[n] for n in kept])
    values = [_plain(columns[0][n]) for n in kept]
    return list(shapes), values, fields


def _plain(value: Any) -> Any:
    """Return ``value`` as YAML would have it: 3.0 as 3, numbers of numpy as Python's, None for what is missing."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return None if np.isnan(value) else int(value) if value.is_integer() else value
    return value


def _pyogrio() -> Any:
    try:
        import pyogrio
        import shapely  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"labels in a vector file need pyogrio and shapely ({error}); install them: pip install 'rsmtdf[vector]'"
        ) from None
    return pyogrio
