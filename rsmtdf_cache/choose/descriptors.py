"""One short vector a tile, from its stored features alone.

Of each array: mean and deviation over the tile's tokens of every channel, standardised by the store's statistics. All
teachers weigh the same, and so do the arrays of a teacher, whatever their number of channels. Principal components of
all of it make the vector. Distances are in units of the root mean square distance of two tiles.

Maps are read once, a few at a time; what is held are the vectors (float32) and, for the components, the undiminished
descriptors of ``FITTED_TILES`` tiles.

Shape legend: n tiles, m fitted tiles, D channels of an array, P numbers of all arrays (2 D each), d components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.crops import whole_views
from rsmtdf_cache.errors import MismatchError, UsageError, did_you_mean
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore

__all__ = ["COMPONENTS", "Descriptors", "FITTED_TILES", "describe_tiles", "upright_arrays"]

#: Components kept at most; what they leave out is said in ``Descriptors.kept``.
COMPONENTS = 128
#: The components are fitted to so many tiles, spread evenly by the digests of their pixels; all others are projected.
FITTED_TILES = 2048

_BATCH_NBYTES = 32 * 2**20  # of float32 maps at a time
_NEGLIGIBLE = 1e-7  # share of the variance below which a component is rounding


@dataclass(frozen=True)
class Descriptors:
    """``vectors`` ``[n, d]`` float32, the largest component first; ``kept``: share of the variance in them (0..1)."""

    vectors: NDArray[np.float32]
    kept: float
    arrays: tuple[str, ...]


def upright_arrays(store: FeatureStore, patterns: Sequence[str] = ()) -> list[FeatureKey]:
    """Return the arrays of whole tiles as they are (orientation 0), sorted; those that match any of ``patterns``.

    ``patterns``: globs of ``teacher/view/layer``, none = all. Raises ``UsageError`` when nothing fits.
    """
    keys = sorted((v[0].key for v in whole_views(store).values() if 0 in v), key=str)
    names = [str(k) for k in keys]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"--array {pattern!r} fits no upright array of whole tiles in {store.shown}."
                f"{did_you_mean(pattern, names)} It holds: {', '.join(names) or 'none'}"
            )
    if not keys:
        raise UsageError(
            f"{store.shown} holds no array of whole tiles in their own orientation; `rsmtdf cache info` lists what it "
            "holds, `rsmtdf cache build` adds to it"
        )
    return [k for k in keys if not patterns or any(fnmatchcase(str(k), p) for p in patterns)]


def describe_tiles(
    store: FeatureStore, keys: Sequence[FeatureKey], rows: Sequence[int], on_event: EventSink = ignore_events
) -> Descriptors:
    """Return the vectors of ``rows`` from the arrays ``keys``, whose features are committed there.

    The same rows in the same order give the same vectors. Raises ``UsageError`` without rows or keys, ``MismatchError``
    for features that are not finite, ``FindingsError`` for a damaged shard.
    """
    if not rows or not keys:
        raise UsageError(f"{len(rows)} tiles and {len(keys)} arrays: a description needs at least one of each")
    fitted = _spread_evenly(store, rows)
    rest = sorted(set(range(len(rows))) - set(fitted))
    on_event(ProgressStart("describe", "describing tiles", len(rows) * len(keys), unit="maps"))
    blocks = [_pooled_array(store, key, [rows[i] for i in fitted], on_event) for key in keys]
    means, weights = [b.mean(0) for b in blocks], _weights(keys, blocks)
    for block, mean, weight in zip(blocks, means, weights, strict=True):
        block -= mean
        block *= weight
    axes, kept = _components(blocks)
    vectors = np.zeros((len(rows), axes[0].shape[1]), np.float32)
    vectors[fitted] = sum(block @ axis for block, axis in zip(blocks, axes, strict=True))
    for key, mean, weight, axis in zip(keys, means, weights, axes, strict=True):
        place = 0
        for pooled in _pooled(store, key, [rows[i] for i in rest], on_event):
            here = rest[place : place + len(pooled)]
            vectors[here] += ((pooled - mean) * weight) @ axis
            place += len(pooled)
    on_event(ProgressEnd("describe"))
    usual = np.sqrt(2 * float(vectors.astype(np.float64).var(0).sum()))  # of two tiles drawn at random
    return Descriptors(vectors / np.float32(usual or 1.0), kept, tuple(str(k) for k in keys))


def _spread_evenly(store: FeatureStore, rows: Sequence[int]) -> list[int]:
    """Return positions in ``rows``, ascending: all, or those of smallest digest, which are as good as random."""
    if len(rows) <= FITTED_TILES:
        return list(range(len(rows)))
    return sorted(sorted(range(len(rows)), key=lambda i: store.tiles.record(rows[i]).digest)[:FITTED_TILES])


def _pooled_array(
    store: FeatureStore, key: FeatureKey, rows: Sequence[int], on_event: EventSink
) -> NDArray[np.float32]:
    return np.concatenate(list(_pooled(store, key, rows, on_event)))


def _pooled(
    store: FeatureStore, key: FeatureKey, rows: Sequence[int], on_event: EventSink
) -> Iterator[NDArray[np.float32]]:
    """Yield mean and deviation over tokens, ``[b, 2 D]`` of some rows at a time, in the order of ``rows``."""
    spec = store.spec(key)
    mean, std = store.stats(key)
    # A channel that never changes says nothing: it becomes 0, not amplified rounding.
    std = np.where(std > 1e-6 * np.maximum(1, np.abs(mean)), std, np.float32(np.inf))
    size = max(1, _BATCH_NBYTES // (4 * spec.grid[0] * spec.grid[1] * spec.layer.channels))
    for start in range(0, len(rows), size):
        features = store.read(key, rows[start : start + size])
        tokens = features.values.reshape(len(features.values), -1, spec.layer.channels).astype(np.float32)
        pooled = np.concatenate([(tokens.mean(1) - mean) / std, tokens.std(1) / std], 1)
        if not np.isfinite(pooled).all():
            bad = rows[start + int(np.argmin(np.isfinite(pooled).all(1)))]
            raise MismatchError(
                f"{key}: features of tile {store.tiles.record(bad).id!r} in {store.shown} are missing or not finite; "
                "run `rsmtdf cache verify`"
            )
        on_event(Progress("describe", len(pooled), features.values.nbytes))
        yield pooled


def _weights(keys: Sequence[FeatureKey], blocks: Sequence[NDArray[np.float32]]) -> list[np.float32]:
    """Return a factor for each array: then all teachers have the same variance, and all arrays of a teacher."""
    found = []
    for key, block in zip(keys, blocks, strict=True):
        variance = float(block.astype(np.float64).var(0).sum())
        shares = sum(other.teacher == key.teacher for other in keys)
        found.append(np.float32(1 / np.sqrt(variance * shares) if variance > 0 else 0.0))
    return found


def _components(blocks: Sequence[NDArray[np.float32]]) -> tuple[list[NDArray[np.float32]], float]:
    """Return the principal axes of centred ``blocks`` ``[m, 2 D]``, as ``[2 D, d]`` each, and what they keep.

    By the products of tiles ``[m, m]``, which are fewer than those of channels. Signs are fixed.
    """
    products = np.zeros((len(blocks[0]),) * 2)
    for block in blocks:
        wide = block.astype(np.float64)
        products += wide @ wide.T
    variance, sides = np.linalg.eigh(products)
    variance, sides = variance[::-1], sides[:, ::-1]
    total = float(variance.clip(0).sum())
    number = max(1, min(COMPONENTS, int((variance > _NEGLIGIBLE * max(total, 1e-30)).sum())))
    sides = sides[:, :number] / np.sqrt(np.maximum(variance[:number], 1e-30))
    sides = sides * np.where(sides[np.abs(sides).argmax(0), np.arange(number)] < 0, -1.0, 1.0)
    axes = [(block.T.astype(np.float64) @ sides).astype(np.float32) for block in blocks]
    return axes, float(variance[:number].clip(0).sum()) / total if total > 0 else 1.0
