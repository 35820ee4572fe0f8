"""``scenes.csv`` and ``domains.csv``: from which scene, place and domain a tile is, one line a tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rsmtdf_cache.errors import DataError
from rsmtdf_cache.sources.csv_table import read_table, write_table

__all__ = ["DOMAINS", "SCENES", "SceneCell", "read_domains", "read_scenes", "write_domains", "write_scenes"]

SCENES = "scenes.csv"
DOMAINS = "domains.csv"
_SCENE_COLUMNS = ("id", "scene", "row", "column")
_LABELED = "labeled"
_DOMAIN_COLUMNS = ("id", "domain")


@dataclass(frozen=True)
class SceneCell:
    """Where a tile was cut: the scene, and the row and column of its first pixel there.

    ``labeled``: the share of its pixels that have a label; None where that was not written down.
    """

    scene: str
    row_px: int
    column_px: int
    labeled: float | None = None


def read_scenes(root: Path) -> dict[str, SceneCell]:
    """Return the scene of each tile id of the dataset ``root``; nothing where there is no ``scenes.csv``.

    Raises ``DataError`` naming the line for a missing column, a row that is no number, an id that stands twice.
    """
    found: dict[str, SceneCell] = {}
    for where, line in read_table(root / SCENES, _SCENE_COLUMNS, [_LABELED]).items():
        try:
            share = float(line[_LABELED]) if line[_LABELED] else None
            found[line["id"]] = SceneCell(line["scene"], int(line["row"]), int(line["column"]), share)
        except ValueError:
            raise DataError(
                f"{where}: row and column have to be whole pixels, labeled a number; found {line['row']!r}, "
                f"{line['column']!r}, {line[_LABELED]!r}"
            ) from None
    return found


def write_scenes(root: Path, cells: Mapping[str, SceneCell]) -> None:
    """Write ``scenes.csv`` of the dataset ``root``, in the order of ``cells``."""
    with_share = any(c.labeled is not None for c in cells.values())
    columns = (*_SCENE_COLUMNS, *([_LABELED] if with_share else []))
    lines = [
        (i, c.scene, c.row_px, c.column_px, "" if c.labeled is None else f"{c.labeled:.9g}") for i, c in cells.items()
    ]
    write_table(root / SCENES, columns, [line[: len(columns)] for line in lines])


def read_domains(root: Path) -> dict[str, str]:
    """Return the domain (``rural``, ``urban``) of each tile id of the dataset ``root``; nothing without the file.

    Raises ``DataError`` as ``read_scenes`` does.
    """
    return {line["id"]: line["domain"] for line in read_table(root / DOMAINS, _DOMAIN_COLUMNS).values()}


def write_domains(root: Path, domains: Mapping[str, str]) -> None:
    """Write ``domains.csv`` of the dataset ``root``, in the order of ``domains``."""
    write_table(root / DOMAINS, _DOMAIN_COLUMNS, list(domains.items()))
