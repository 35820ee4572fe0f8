"""``scenes.csv`` and ``domains.csv``: from which scene, place and domain a tile is, one line a tile."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rsmtdf_cache.errors import DataError

__all__ = ["DOMAINS", "SCENES", "SceneCell", "read_domains", "read_scenes", "write_domains", "write_scenes"]

SCENES = "scenes.csv"
DOMAINS = "domains.csv"
_SCENE_COLUMNS = ("id", "scene", "row", "column")
_DOMAIN_COLUMNS = ("id", "domain")


@dataclass(frozen=True)
class SceneCell:
    """Where a tile was cut: the scene, and the row and column of its first pixel there."""

    scene: str
    row_px: int
    column_px: int


def read_scenes(root: Path) -> dict[str, SceneCell]:
    """Return the scene of each tile id of the dataset ``root``; nothing where there is no ``scenes.csv``.

    Raises ``DataError`` naming the line for a missing column, a row that is no number, an id that stands twice.
    """
    found: dict[str, SceneCell] = {}
    for where, (tile_id, scene, row, column) in _rows(root / SCENES, _SCENE_COLUMNS).items():
        try:
            found[tile_id] = SceneCell(scene, int(row), int(column))
        except ValueError:
            raise DataError(f"{where}: row and column have to be whole pixels, found {row!r}, {column!r}") from None
    return found


def write_scenes(root: Path, cells: Mapping[str, SceneCell]) -> None:
    """Write ``scenes.csv`` of the dataset ``root``, in the order of ``cells``."""
    _write(root / SCENES, _SCENE_COLUMNS, [(i, c.scene, c.row_px, c.column_px) for i, c in cells.items()])


def read_domains(root: Path) -> dict[str, str]:
    """Return the domain (``rural``, ``urban``) of each tile id of the dataset ``root``; nothing without the file.

    Raises ``DataError`` as ``read_scenes`` does.
    """
    return dict(_rows(root / DOMAINS, _DOMAIN_COLUMNS).values())  # type: ignore[arg-type]  # pairs, by the columns


def write_domains(root: Path, domains: Mapping[str, str]) -> None:
    """Write ``domains.csv`` of the dataset ``root``, in the order of ``domains``."""
    _write(root / DOMAINS, _DOMAIN_COLUMNS, list(domains.items()))


def _rows(path: Path, columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the values of ``columns`` by what a message calls the line."""
    if not path.exists():
        return {}
    try:
        reader = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); write it as UTF-8 text or delete it") from None
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; the first line has to be {','.join(columns)}")
    found: dict[str, tuple[str, ...]] = {}
    ids: set[str] = set()
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        values = tuple(row[name] or "" for name in columns)
        if not all(values) or values[0] in ids:
            raise DataError(f"{where}: {'an id stands twice' if values[0] in ids else 'a value is missing'}: {values}")
        ids.add(values[0])
        found[where] = values
    return found


def _write(path: Path, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
