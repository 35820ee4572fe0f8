"""Small tables beside a dataset, one line a tile or scene: read strictly, a typing error is named by its line."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rsmtdf_cache.errors import DataError

__all__ = ["read_table", "write_table"]


def read_table(
    path: Path, columns: Sequence[str], optional: Sequence[str] = (), key: str = "id"
) -> dict[str, Mapping[str, str]]:
    """Return the lines of ``path`` by what a message calls them; nothing where there is no such file.

    ``optional`` columns may be absent or empty. Raises ``DataError`` for a missing column or value and for a ``key``
    that stands twice.
    """
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # a name may hold the end of a line
            reader = csv.DictReader(io.StringIO(file.read(), newline=""))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it as UTF-8 text or delete it") from None
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; the first line has to be {','.join(columns)}")
    found: dict[str, Mapping[str, str]] = {}
    keys: set[str] = set()
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        values = [row[name] or "" for name in columns]
        if not all(values) or row[key] in keys:
            fault = f"{key} {row[key]!r} stands twice" if row[key] in keys else "a value is missing"
            raise DataError(f"{where}: {fault}: {tuple(values)}")
        keys.add(row[key])
        found[where] = {name: row.get(name) or "" for name in (*columns, *optional)}
    return found


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table that ``read_table`` reads."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
