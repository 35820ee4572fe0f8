"""``rasters.csv``: the files of a dataset of scenes, one line a scene, as they were when it was laid out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.sources.csv_table import read_table, write_table

__all__ = ["RASTERS", "Raster", "read_rasters", "write_rasters"]

RASTERS = "rasters.csv"
_COLUMNS = ("scene", "image", "width", "height")
_AFFINE = ("a", "b", "c", "d", "e", "f")
_OPTIONAL = ("labels", "crs", *_AFFINE)


@dataclass(frozen=True)
class Raster:
    """One scene: its files, its size in pixels, and where it lies. ``labels`` None: without labels."""

    scene: str
    image: Path
    labels: Path | None
    width: int
    height: int
    crs: str | None
    affine: tuple[float, float, float, float, float, float] | None


def read_rasters(root: Path) -> dict[str, Raster]:
    """Return the scenes of the dataset ``root`` by name; paths in the table are relative to ``root`` or absolute.

    Raises ``DataError`` for a missing table and naming the line for what is no size or affine.
    """
    if not (root / RASTERS).is_file():
        raise DataError(f"{root / RASTERS}: there is no such file; make the dataset with `rsmtdf data tile`")
    found: dict[str, Raster] = {}
    for where, line in read_table(root / RASTERS, _COLUMNS, _OPTIONAL, key="scene").items():
        try:
            width, height = int(line["width"]), int(line["height"])
            affine = None
            if any(line[name] for name in _AFFINE):
                a, b, c, d, e, f = (float(line[name]) for name in _AFFINE)
                affine = (a, b, c, d, e, f)
        except ValueError:
            raise DataError(f"{where}: width and height are whole pixels, a to f six numbers: {dict(line)}") from None
        if min(width, height) < 1:
            raise DataError(f"{where}: a scene of {width} x {height} px has no tiles")
        labels = root / line["labels"] if line["labels"] else None
        crs = line["crs"] or None
        found[line["scene"]] = Raster(line["scene"], root / line["image"], labels, width, height, crs, affine)
    return found


def write_rasters(folder: Path, root: Path, rasters: Iterable[Raster]) -> None:
    """Write the table into ``folder``, which will be the dataset ``root``; ``read_rasters`` returns equal scenes.

    Paths are relative where image and dataset share more than the root of the file system: both can move together.
    """
    lines = []
    for entry in rasters:
        affine = entry.affine or ("",) * 6
        numbers = [repr(v) if isinstance(v, float) else v for v in affine]
        labels = _written(entry.labels, root) if entry.labels is not None else ""
        lines.append(
            [entry.scene, _written(entry.image, root), entry.width, entry.height, labels, entry.crs or "", *numbers]
        )
    write_table(folder / RASTERS, (*_COLUMNS, *_OPTIONAL), lines)


def _written(path: Path, root: Path) -> str:
    path = Path(os.path.realpath(path.parent)) / path.name  # `..` after a link is not what its text says
    root = Path(os.path.realpath(root))
    common = os.path.commonpath([path, root])
    return str(path) if common == os.path.abspath(os.sep) else Path(os.path.relpath(path, root)).as_posix()
