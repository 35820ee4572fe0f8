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
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.targets.resident import ResidentTargets
from rsmtdf_train.targets.stored import StoredTargets

__all__ = ["Residency", "hold_run", "residency_of"]

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
        raise UsageError("residency ram: this run reads nothing from a store; leave it at stream")
    rows = [store.tiles.row_of(tile_id) for tile_id in dataset.tile_ids if tile_id in store.tiles]
    return hold_in_memory(store, list(dict.fromkeys(keys)), rows, on_event, _processes_here())


def _processes_here() -> int:
    """Return how many processes of the run this machine has, as ``torchrun`` says."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(text)) if text.isdecimal() else 1
