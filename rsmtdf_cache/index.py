"""Look at every tile once before a build: take the digest of its pixels, put aside what cannot be used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from rsmtdf_cache.errors import MismatchError, TileError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_cache.tile_digests import TileDigests
from rsmtdf_cache.tiles import TileRecord, TileTable, pixel_digest

__all__ = ["LOOK", "Quarantined", "index_tiles", "new_records"]

#: The task of a build that comes before its teachers are loaded.
LOOK = "index"

#: Tiles looked at at once: PIL and hashing let other threads work. A few files wait for a network disk on one core too.
_WORKERS = max(8, min(os.cpu_count() or 1, 32))
#: Tiles asked for before the first one's answer is waited for.
_AHEAD = 4 * _WORKERS


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
    on_event(ProgressStart(LOOK, "reading tiles", len(tiles)))
    digests = TileDigests(source)
    waiting: deque[Future[TileRecord | Quarantined]] = deque()  # never a future for each of ten million tiles
    try:
        with ThreadPoolExecutor(_WORKERS) as pool:
            coming = iter(tiles)
            while True:
                waiting += [pool.submit(_look, source, t, digests) for t in islice(coming, _AHEAD - len(waiting))]
                if not waiting:
                    break
                found = waiting.popleft().result()
                if isinstance(found, TileRecord):
                    records.append(found)
                else:
                    quarantined.append(found)
                on_event(Progress(LOOK, 1))
    finally:
        digests.save()  # whoever stops an hour's look begins where it was
    on_event(ProgressEnd(LOOK))
    return records, quarantined


def new_records(table: TileTable, records: Sequence[TileRecord], store: str) -> list[TileRecord]:
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
