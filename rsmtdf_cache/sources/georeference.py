"""``georeference.csv``: where each tile lies on the earth, one line a tile (``id,crs,a,b,c,d,e,f``)."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.sources.base import Georeference

__all__ = ["read_georeference", "write_georeference"]

_COLUMNS = ("id", "crs", "a", "b", "c", "d", "e", "f")


def read_georeference(path: Path) -> dict[str, Georeference]:
    """Return the georeference of each tile id in ``path``.

    Raises ``DataError`` for a missing column, a coefficient that is no finite number, an affine without an inverse, an
    id that stands twice.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it as UTF-8 text or delete it") from None
    reader = csv.DictReader(lines)
    missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; the first line has to be {','.join(_COLUMNS)}")
    found: dict[str, Georeference] = {}
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        try:
            a, b, c, d, e, f = (float(row[name]) for name in _COLUMNS[2:])
        except (TypeError, ValueError):
            raise DataError(f"{where}: a to f have to be six numbers, found {list(row.values())}") from None
        if not all(map(math.isfinite, (a, b, c, d, e, f))) or a * e == b * d:
            raise DataError(f"{where}: the affine {(a, b, c, d, e, f)} has no inverse")
        if not row["id"] or not row["crs"]:
            raise DataError(f"{where}: id and crs have to be given (crs for example as EPSG:4326)")
        if row["id"] in found:
            raise DataError(f"{where}: tile {row['id']!r} stands twice")
        found[row["id"]] = Georeference(row["crs"], (a, b, c, d, e, f))
    return found


def write_georeference(path: Path, entries: Mapping[str, Georeference]) -> None:
    """Write ``entries``, sorted by id; ``read_georeference`` returns equal values."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for tile_id, entry in sorted(entries.items()):
            writer.writerow([tile_id, entry.crs, *map(repr, entry.affine)])
