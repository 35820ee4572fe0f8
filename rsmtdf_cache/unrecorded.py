"""How a build that is stopped leaves its store: nothing that no record names, and a head that fits.

What was linked before its record came is read by nobody, and the next build of its unit replaces it. But ``verify``
rightly names every file that nothing lists, and a build that was merely stopped should leave nothing to be named.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rsmtdf_cache.files import remove_file
from rsmtdf_cache.head import load_whole, write_head
from rsmtdf_cache.layout import PARTS, StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest

if TYPE_CHECKING:
    from rsmtdf_cache.work import Unit

__all__ = ["leave_whole"]


def leave_whole(paths: StorePaths, manifest: Manifest, begun: Iterable[Unit]) -> None:
    """Take back what lacks a record, and bring metadata and head up to date with what is committed.

    ``begun``: units whose attempts are over, or may not commit any more (``writer.revoke``). The caller holds the build
    lock. The ledger is read again, for what is in memory may have been stopped between a record and the note of it.
    """
    ledger = load_whole(paths)
    _remove_shards(ledger, begun)
    for table in (paths.ledger / "tiles").glob("*.parquet"):
        if not table.with_suffix(".json").exists():
            remove_file(table)
    write_head(paths, manifest, ledger, final=False)


def _remove_shards(ledger: Ledger, begun: Iterable[Unit]) -> None:
    """Remove the shards of units without a record, but those that a record of something else names."""
    named = None
    for unit in begun:
        if unit.group in ledger.commits[unit.set_id]:
            continue
        for spec in ledger.sets[unit.set_id].arrays.specs:
            for part in PARTS:
                place = ledger.paths.shard(spec.key, unit.group, part)
                if not place.exists():
                    continue
                if named is None:
                    named = {s.path for known in ledger.generations.values() for c in known.values() for s in c.shards}
                if ledger.paths.relative(place) not in named:
                    remove_file(place)
