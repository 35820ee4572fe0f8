"""Where a run reads its store from: mapped files, or memory. Batches are the same."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.residency import hold_in_memory
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.units import size
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.targets.resident import ResidentTargets
from rsmtdf_train.targets.stored import StoredTargets

__all__ = ["Residency", "hold_run", "read_of", "residency_of", "small_cache"]

#: ``stream``: mapped, as the page cache has it. ``ram``: all that the run reads is copied into memory before step 0;
#: ``device``: features go to the training device instead, and are gathered there.
Residency = Literal["stream", "ram", "device"]


def residency_of(text: str) -> Residency:
    """Return ``text`` as the word it is. Raises ``UsageError`` for another one."""
    for word in get_args(Residency):
        if text == word:
            found: Residency = word
            return found
    raise UsageError(f"--residency {text}: choose {', '.join(get_args(Residency))}")


def hold_run(
    dataset: TileDataset, asked: Residency, on_event: EventSink = ignore_events, device: torch.device | None = None
) -> int:
    """Copy what ``dataset`` reads of its store into memory where ``ram`` is asked for; return the bytes.

    Features of all train tiles, and their pixels where those come from the store. For ``device``: features alone, and
    ``dataset`` has ``ResidentTargets`` from then on; 0 is returned. Raises ``UsageError`` when nothing is read from a
    store or ``device`` cannot hold such targets, ``ResourceError`` when it does not fit, ``FindingsError`` for damage.
    """
    if residency_of(asked) == "stream":
        return 0
    mode = dataset.targets
    if asked == "device":
        rows = [] if mode is None else [mode.row_of(tile_id) for tile_id in dataset.tile_ids]
        dataset.targets = ResidentTargets.of(mode, rows, device or torch.device("cpu"), on_event)
        return 0
    store, keys, rows = read_of(dataset)
    if store is None:
        raise UsageError("residency ram: this run reads nothing from a store; leave it at stream")
    return hold_in_memory(store, keys, rows, on_event, _processes_here())


def read_of(dataset: TileDataset) -> tuple[FeatureStore | None, list[FeatureKey], list[int]]:
    """Return what ``dataset`` reads of which store, features and pixels: arrays and rows. No store: nothing."""
    mode = dataset.targets
    stored = mode if isinstance(mode, StoredTargets) else getattr(mode, "cached", None)
    keys: list[FeatureKey] = []
    store: FeatureStore | None = None
    if stored is not None:
        store = stored.store
        keys += [spec.key for spec in stored.arrays()]
    if dataset.pixels is not None:
        store = dataset.pixels.store
        keys += store.pixel_keys()
    if store is None:
        return None, [], []
    rows = [store.tiles.row_of(tile_id) for tile_id in dataset.tile_ids if tile_id in store.tiles]
    return store, list(dict.fromkeys(keys)), rows


def small_cache(dataset: TileDataset) -> str | None:
    """Return a warning when the cache of remote shards is smaller than what ``dataset`` reads of its store."""
    store, keys, rows = read_of(dataset)
    if store is None or not store.remote or isinstance(dataset.targets, ResidentTargets):
        return None
    from rsmtdf_cache.share.remote import cache_limit_nbytes

    need = store.shards.nbytes(keys, {row // store.manifest.group_rows for row in rows})
    if need <= (limit := cache_limit_nbytes()):
        return None
    return (
        f"{store.shown}: this run reads {size(need)} of it again and again, and the cache of remote shards of this "
        f"machine may have {size(limit)}: shards will be fetched many times; raise RSMTDF_REMOTE_CACHE_GB, copy the "
        "store with `rsmtdf cache pull`, or read less of it (distill.keys)"
    )


def _processes_here() -> int:
    """Return how many processes of the run this machine has, as ``torchrun`` says."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1
