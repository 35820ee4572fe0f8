"""How GDAL is used here: a bounded cache of blocks, one line of what it says when it fails."""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.rasters.png import PngError, require_whole_png

__all__ = ["GDAL_CACHE_MB", "all_sources", "gdal_settings", "has_place", "reason_of", "require_whole_file"]

#: Megabytes of decoded blocks that GDAL keeps. Its own default is a twentieth of the machine's memory.
GDAL_CACHE_MB = 64


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


def require_whole_file(path: Path, driver: str, what: str) -> None:
    """Raise ``DataError`` for damage that GDAL reads over without an error, once a file is opened.

    It gives any pixels for the part of a PNG file that is missing, and black ones for a source of a virtual raster that
    is not there, from the second time it looks for it. ``what`` names the file.
    """
    if driver == "PNG":
        try:
            require_whole_png(path)
        except PngError as error:
            raise DataError(f"{what}: {error}; copy the file again") from None
    elif driver == "VRT":
        missing = next((p for p in _sources(path) if not p.exists()), None)
        if missing is not None:
            raise DataError(f"{what}: its source {missing} is not there; a virtual raster needs all of them")


def all_sources(path: Path) -> list[Path]:
    """Return the files that a virtual raster is made of, those of virtual ones among them too, in order, each once."""
    found: dict[Path, None] = {}
    waiting = [path]
    while waiting:
        for source in _sources(waiting.pop()):
            if source not in found and source != path:
                found[source] = None
                if source.suffix.lower() == ".vrt":
                    waiting.append(source)
    return list(found)


def _sources(path: Path) -> Iterator[Path]:
    """Yield the files that a virtual raster is made of, as far as they are files."""
    try:
        tree = ElementTree.parse(path)
    except (ElementTree.ParseError, OSError):
        return
    for entry in tree.iter("SourceFilename"):
        name = (entry.text or "").strip()
        if name and not name.startswith("/vsi") and "://" not in name and ":" not in name[2:]:
            yield path.parent / name if entry.get("relativeToVRT") == "1" else Path(name)


def reason_of(error: Exception) -> str:
    """Return what GDAL said, in one line: rasterio keeps it in the cause."""
    cause = error.__cause__ or error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__
