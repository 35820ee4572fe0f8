"""How uncertain a linear probe that learned from the labelled tiles is of every tile.

The probe is that of ``tune`` (softmax regression on stored features, nothing drawn by chance). A tile's uncertainty is
the entropy of the predicted classes, in shares of that of a guess, averaged over a lattice of points. A class that no
labelled tile shows has no evidence: the probe takes its pixels for other classes, and may well be sure of that.

Only masks of labelled tiles are read. Maps and masks are read a few at a time; what is held are the features at the
points of the labelled tiles (float32, three times while the probe learns) and one number a tile.

Shape legend: n tiles, P points a side, C classes, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_cache.errors import MismatchError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.memory import require_memory
from rsmtdf_cache.sources.base import Tile, TileSource
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tune.maps import grid_of
from rsmtdf_cache.tune.probe import LinearProbe, ProbeTask

__all__ = ["labelled_tiles", "tile_uncertainty"]

_BATCH_NBYTES = 32 * 2**20  # of float32 maps of all arrays at a time
_ASKED = 32  # points a side of a tile


def labelled_tiles(
    store: FeatureStore, source: TileSource | None, have: Sequence[str], place: Mapping[str, int]
) -> dict[int, Tile]:
    """Return the tiles of ``have`` that a probe can learn from, by their ``place`` among those with features.

    No mask is read. Raises ``UsageError`` when there are none, or one has no mask.
    """
    if source is None or not have:
        raise UsageError(
            "--strategy uncertain learns from labelled tiles first, and none are named; name a labelled subset of the "
            "dataset with --have SUBSET, or begin with --strategy typical or k-center, which need no labels"
        )
    known = {tile.id: tile for tile in source.tiles(["train"])}
    found = {place[tile_id]: known[tile_id] for tile_id in have if tile_id in place and tile_id in known}
    if not found:
        raise UsageError(
            f"--strategy uncertain learns from the tiles of --have, and none of the {len(have)} has features in "
            f"{store.shown}; name another labelled subset, or add its tiles with `rsmtdf cache build`"
        )
    bare = [tile.id for tile in found.values() if tile.mask is None]
    if bare:
        raise UsageError(
            f"--strategy uncertain learns from the masks of --have, and {len(bare)} of its {len(have)} tiles have "
            f"none, such as {bare[0]!r}; draw their masks, or name a subset without them"
        )
    return dict(sorted(found.items()))


def tile_uncertainty(
    store: FeatureStore,
    keys: Sequence[FeatureKey],
    rows: Sequence[int],
    source: TileSource,
    labelled: Mapping[int, Tile],
    on_event: EventSink = ignore_events,
) -> NDArray[np.float32]:
    """Return the uncertainty ``[n]`` (0..1) of ``rows``, whose features of all ``keys`` are committed.

    ``labelled``: tiles of ``source`` with a mask, by their position in ``rows``; in the same order they give the same
    numbers. Raises ``UsageError`` when their masks are empty, ``MismatchError`` when tiles of ``source`` have another
    side, ``DataError`` for a mask that cannot be read, ``ResourceError`` when memory does not hold their points,
    ``FindingsError`` for a damaged shard.
    """
    probe = _learned(store, keys, rows, source, labelled, on_event)
    grids = [grid_of(store.spec(key)) for key in keys]
    centres = (np.arange(_ASKED, dtype=np.float64) + 0.5) * (source.tile_px / _ASKED)
    found = np.empty(len(rows), np.float32)
    place = 0
    on_event(ProgressStart("uncertainty", "asking a probe", len(rows)))
    for maps in _maps(store, keys, rows):
        for logits in probe.logits(maps, grids, centres):
            found[place] = _entropy(logits)
            place += 1
        on_event(Progress("uncertainty", len(maps[0]), sum(m.nbytes for m in maps)))
    on_event(ProgressEnd("uncertainty"))
    return found


def _learned(
    store: FeatureStore, keys: Sequence[FeatureKey], rows: Sequence[int], source: TileSource,
    labelled: Mapping[int, Tile], on_event: EventSink,
) -> LinearProbe:  # fmt: skip
    """Return the probe of all ``keys`` together that learned from the ``labelled`` tiles."""
    specs = [store.spec(key) for key in keys]
    if specs[0].tile_px != source.tile_px:
        raise MismatchError(
            f"{source.root}: tiles of {source.tile_px} px, {store.shown} is of tiles of {specs[0].tile_px} px; name "
            "the dataset that it was built from"
        )
    side = source.tile_px
    on_event(ProgressStart("learn", "teaching a probe", 2 * len(labelled), unit="masks and maps"))

    def masks() -> Iterator[NDArray[np.uint8]]:
        for tile in labelled.values():
            yield source.read_mask(tile)
            on_event(Progress("learn", 1))

    task = ProbeTask(masks(), np.empty((0, side, side), np.uint8), len(source.classes), source.ignore_index)
    if not float(task.counts.sum()):
        raise UsageError(
            f"--strategy uncertain learns from the masks of --have, and those of its {len(labelled)} tiles show no "
            "class where the probe looks; name a subset whose masks are drawn"
        )
    need = 12 * len(task.counts) * sum(s.layer.channels for s in specs)
    advice = "choose fewer arrays with --array, or a smaller --have"
    require_memory(need, f"{store.shown}: a probe of all labelled tiles takes", advice)
    grids = [grid_of(spec) for spec in specs]
    points: list[list[Tensor]] = [[] for _ in keys]
    first = 0
    for maps in _maps(store, keys, [rows[place] for place in labelled]):
        for several, values, grid in zip(points, maps, grids, strict=True):
            several.append(task.points(values, grid, first))
        first += len(maps[0])
        on_event(Progress("learn", len(maps[0]), sum(m.nbytes for m in maps)))
    probe = task.fit([torch.cat(several) for several in points])
    on_event(ProgressEnd("learn"))
    return probe


def _maps(store: FeatureStore, keys: Sequence[FeatureKey], rows: Sequence[int]) -> Iterator[list[NDArray[np.floating]]]:
    """Yield the maps ``[b, h, w, D]`` of each array, of some ``rows`` at a time."""
    specs = [store.spec(key) for key in keys]
    size = max(1, _BATCH_NBYTES // sum(4 * s.grid[0] * s.grid[1] * s.layer.channels for s in specs))
    for start in range(0, len(rows), size):
        yield [store.read(key, rows[start : start + size]).values for key in keys]


def _entropy(logits: Tensor) -> float:
    """Return the mean entropy of ``softmax(logits)`` ``[P, P, C]``, 0 = certain, 1 = a guess among all classes."""
    logs = logits.log_softmax(-1)
    most = math.log(max(2, logits.shape[-1]))  # one class alone is certain
    return min(1.0, float(-(logs.exp() * logs).sum(-1).mean()) / most)
