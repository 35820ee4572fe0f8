"""Look at every tile once before a build: take the digest of its pixels, put aside what cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsmtdf_cache.errors import MismatchError, TileError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_cache.tile_digests import TileDigests
from rsmtdf_cache.tiles import TileRecord, TileTable, pixel_digest

__all__ = ["Quarantined", "index_tiles", "new_records"]

_WORKERS = 8


@dataclass(frozen=True)
class Quarantined:
    """A tile that cannot be used, and why."""

    id: str
    reason: str


def index_tiles(
    source: TileSource, tiles: Sequence[Tile], on_event: EventSink
) -> tuple[list[TileRecord], list[Quarantined]]:
    """Return the records of the usable tiles in the order given, and the others with the reason."""
    records: list[TileRecord] = []
    quarantined: list[Quarantined] = []
    on_event(ProgressStart("index", "reading tiles", len(tiles)))
    digests = TileDigests(source)
    with ThreadPoolExecutor(_WORKERS) as pool:
        for found in pool.map(lambda tile: _look(source, tile, digests), tiles):
            if isinstance(found, TileRecord):
                records.append(found)
            else:
                quarantined.append(found)
            on_event(Progress("index", 1))
    digests.save()
    on_event(ProgressEnd("index"))
    return records, quarantined


def new_records(table: TileTable, records: Sequence[TileRecord], store: Path) -> list[TileRecord]:
    """Return those of ``records`` that the table lacks.

    Raises ``MismatchError`` when a tile of the table has other pixels now: its features would be another picture's.
    """
    changed = [r.id for r in records if r.id in table and table.record(table.row_of(r.id)).digest != r.digest]
    if changed:
        raise MismatchError(
            f"{store}: {len(changed)} tiles have other pixels than when the store was built "
            f"({', '.join(changed[:3])}{' …' if len(changed) > 3 else ''}); build into a new folder, or restore them"
        )
    return [r for r in records if r.id not in table]


def _look(source: TileSource, tile: Tile, digests: TileDigests) -> TileRecord | Quarantined:
    digest = digests.find(tile)
    if digest is None:
        try:
            digest = pixel_digest(source.read_image(tile))
        except TileError as error:
            return Quarantined(tile.id, error.reason)
        digests.keep(tile, digest)
    place = tile.georeference
    inside = tile.image.is_relative_to(source.root) and ".." not in tile.image.parts
    path = tile.image.relative_to(source.root).as_posix() if inside else tile.image.name
    if tile.origin_px is not None:
        path += f"#{tile.origin_px[0]},{tile.origin_px[1]}"
    return TileRecord(tile.id, digest, tile.split, path, place.crs if place else "", place.affine if place else ())
