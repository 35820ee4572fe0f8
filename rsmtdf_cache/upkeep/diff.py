"""What two stores differ in: tiles, arrays, committed features and, on demand, bits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.specs import FeatureKey, FeatureSpec, NumericsProfile, differing_fields
from rsmtdf_cache.store import FeatureStore

__all__ = ["ArrayDiff", "Diff", "diff_stores", "spec_difference"]


@dataclass(frozen=True)
class ArrayDiff:
    """One array that both stores have with the same digest.

    ``tiles_a``, ``tiles_b``: tiles with committed features; ``both``: tiles of the same id and pixels with features in
    both; ``different``: how many of these have other bits (None: not compared). ``profiles``: the numerics of either
    store that the other has no unit in.
    """

    key: str
    tiles_a: int
    tiles_b: int
    both: int
    different: int | None
    profiles_only_a: list[dict[str, Any]]
    profiles_only_b: list[dict[str, Any]]


@dataclass
class Diff:
    """How store ``b`` differs from store ``a``."""

    a: str
    b: str
    snapshot_a: str
    snapshot_b: str
    settings: list[str] = field(default_factory=list)
    tiles_both: int = 0
    tiles_only_a: list[str] = field(default_factory=list)
    tiles_only_b: list[str] = field(default_factory=list)
    tiles_other_pixels: list[str] = field(default_factory=list)
    arrays_only_a: list[str] = field(default_factory=list)
    arrays_only_b: list[str] = field(default_factory=list)
    arrays_other_spec: dict[str, list[str]] = field(default_factory=dict)
    arrays: list[ArrayDiff] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether both hold one snapshot: the same tiles, rows and feature bytes."""
        return self.snapshot_a == self.snapshot_b

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {"same": self.same, **asdict(self)}


def diff_stores(a: Path | str, b: Path | str, deep: bool = False, on_event: EventSink = ignore_events) -> Diff:
    """Return how the store ``b`` differs from the store ``a``; both may be URLs or ``STORE@SNAPSHOT``.

    Reads the ledgers only; ``deep`` also compares the stored bits of every tile that both have features of. Raises
    ``UsageError`` or ``MismatchError`` when one is no store, ``FindingsError`` when one is damaged.
    """
    left, right = FeatureStore.open(a), FeatureStore.open(b)
    found = Diff(str(a), str(b), left.snapshot, right.snapshot)
    for name in ("dataset", "tile_px", "group_rows"):
        ours, theirs = getattr(left.manifest, name), getattr(right.manifest, name)
        found.settings += [f"{name}: {ours!r} (A) != {theirs!r} (B)"] if ours != theirs else []
    rows = _common_tiles(left, right, found)
    ours_by_key, theirs_by_key = left.ledger.specs(), right.ledger.specs()
    found.arrays_only_a = sorted(str(k) for k in set(ours_by_key) - set(theirs_by_key))
    found.arrays_only_b = sorted(str(k) for k in set(theirs_by_key) - set(ours_by_key))
    for key in sorted(set(ours_by_key) & set(theirs_by_key), key=str):
        if ours_by_key[key].digest() != theirs_by_key[key].digest():
            found.arrays_other_spec[str(key)] = spec_difference(ours_by_key[key], theirs_by_key[key])
        elif (ours := _calibration(left, key)) != (theirs := _calibration(right, key)):
            found.arrays_other_spec[str(key)] = [f"calibration: {ours[:12]} (A) != {theirs[:12]} (B)"]
        else:
            found.arrays.append(_array(left, right, key, rows, deep, on_event))
    return found


def spec_difference(a: FeatureSpec, b: FeatureSpec) -> list[str]:
    """Return one line per field in which two arrays of one key differ: ``"teacher.weights: 'a' (A) != 'b' (B)"``."""
    lines = differing_fields(a.to_json(), b.to_json())
    return [line.replace(" (store) != ", " (A) != ").removesuffix(" (asked)") + " (B)" for line in lines]


def _common_tiles(left: FeatureStore, right: FeatureStore, found: Diff) -> NDArray[np.int64]:
    """Fill in the tiles and return ``[n, 2]``: the rows in A and in B of every tile with the same id and pixels."""
    pairs = []
    for row, record in enumerate(left.tiles.records):
        if record is None:
            continue
        if record.id not in right.tiles:
            found.tiles_only_a.append(record.id)
            continue
        other = right.tiles.row_of(record.id)
        if right.tiles.record(other).digest == record.digest:
            pairs.append((row, other))
        else:
            found.tiles_other_pixels.append(record.id)
    found.tiles_only_b = [r.id for r in right.tiles.records if r is not None and r.id not in left.tiles]
    found.tiles_both = len(pairs)
    return np.array(pairs, np.int64).reshape(-1, 2)


def _array(
    left: FeatureStore, right: FeatureStore, key: FeatureKey, rows: NDArray[np.int64], deep: bool, on_event: EventSink
) -> ArrayDiff:
    here, there = left.committed(key), right.committed(key)
    both = rows[here[rows[:, 0]] & there[rows[:, 1]]]
    different = _different_bits(left, right, key, both, on_event) if deep else None
    ours, theirs = _profiles(left, key), _profiles(right, key)
    return ArrayDiff(
        str(key), int(here.sum()), int(there.sum()), len(both), different,
        [p.to_json() for p in ours if p not in theirs], [p.to_json() for p in theirs if p not in ours],
    )  # fmt: skip


def _different_bits(
    left: FeatureStore, right: FeatureStore, key: FeatureKey, rows: NDArray[np.int64], on_event: EventSink
) -> int:
    on_event(ProgressStart(str(key), f"comparing {key}", len(rows)))
    different = 0
    for ours, theirs in rows.tolist():
        different += _bits(left, key, ours) != _bits(right, key, theirs)
        on_event(Progress(str(key), 1))
    on_event(ProgressEnd(str(key)))
    return different


def _bits(store: FeatureStore, key: FeatureKey, row: int) -> bytes:
    """Return the codes of a tile as bytes, where -0.0 is not 0.0. Raises ``FindingsError`` for a shard without it."""
    codes = store.stored(key, row)
    if codes is None:
        raise FindingsError(f"{store.path}: {key} of row {row} is committed, but its shard has no such tile")
    return codes.tobytes()


def _calibration(store: FeatureStore, key: FeatureKey) -> str:
    """Return the digest of what the codec of ``key`` was calibrated with, empty for none."""
    return store.ledger.sets[store.ledger.set_of(key)].calibrations.get(key.layer, "")


def _profiles(store: FeatureStore, key: FeatureKey) -> list[NumericsProfile]:
    """Return the numerics that units of ``key`` were encoded in, without repeats."""
    return list(dict.fromkeys(c.profile for c in store.ledger.commits[store.ledger.set_of(key)].values()))
