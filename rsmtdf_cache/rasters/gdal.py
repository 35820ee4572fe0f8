"""How GDAL is used here: a bounded cache of blocks, one line of what it says when it fails."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["GDAL_CACHE_MB", "gdal_settings", "has_place", "reason_of"]

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


def reason_of(error: Exception) -> str:
    """Return what GDAL said, in one line: rasterio keeps it in the cause."""
    cause = error.__cause__ or error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__
