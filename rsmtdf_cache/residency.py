"""Holding parts of a store in memory: what a run reads again and again, and nothing may push out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.layout import parts_of
from rsmtdf_cache.memory import available_nbytes
from rsmtdf_cache.units import size

if TYPE_CHECKING:
    from rsmtdf_cache.specs import FeatureKey
    from rsmtdf_cache.store import FeatureStore

__all__ = ["hold_in_memory"]


def hold_in_memory(
    store: FeatureStore, keys: Sequence[FeatureKey], rows: Collection[int], on_event: EventSink = ignore_events,
    processes: int = 1,
) -> int:  # fmt: skip
    """Copy the shards of ``keys`` (features, pixels) that hold ``rows`` into memory, and return their bytes.

    Whole shards, each compared with its recorded sha256 as it lies in memory. ``store`` then reads them there: the same
    values, without the page cache. A pickled copy of ``store`` maps files again. ``processes``: how many of this
    machine do the same, each for itself. Raises ``ResourceError`` with both
    numbers when they do not fit into what memory is available, before anything is copied, and what reading raises.
    """
    groups = {row // store.manifest.group_rows for row in rows}
    wanted = [
        (key, group, part, record)
        for key in keys
        for part in parts_of(store.spec(key))
        for group, record in store.shards.of(key, part).records.items()
        if group in groups
    ]
    need, room = processes * sum(record.nbytes for *_, record in wanted), available_nbytes()
    if room is not None and need > room:
        raise ResourceError(
            f"residency ram: {len(keys)} arrays of {store.shown} take {size(need)} of memory"
            f"{f' in {processes} processes' if processes > 1 else ''}, {size(room)} are available; "
            "read them from the disk (residency stream), or distil from fewer or smaller features (distill.keys, an "
            "int8 codec)"
        )
    held = 0
    on_event(ProgressStart("hold", "copying the store into memory", len(wanted), unit="shards"))
    for key, group, part, _ in wanted:
        store.shards.of(key, part).fetch_soon(group)
    for key, group, part, record in wanted:
        held += store.shards.hold(key, group, part)
        on_event(Progress("hold", 1, record.nbytes))
    on_event(ProgressEnd("hold"))
    return held
