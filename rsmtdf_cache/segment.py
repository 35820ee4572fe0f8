"""Compacted commits: many records in one Parquet file named by its own sha256 (10^7 shards must not be 10^7 files).

Statistics are the bulk of a record; they are read only when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.files import replace_file, sha256_file
from rsmtdf_cache.parquet import read_batches, read_plain, write_plain
from rsmtdf_cache.readcheck import has_sha256
from rsmtdf_cache.records import Commit, ShardRecord
from rsmtdf_cache.specs import NumericsProfile, canonical_json
from rsmtdf_cache.stats import ChannelStats

__all__ = ["read_segment_commits", "read_segment_stats", "write_segment"]

_FACTS = ("set", "group", "generation", "start", "stop", "profile", "layer", "path", "nbytes", "sha256")
_STATS = ("count", "norm_sum", "norm_max", "non_finite", "sums", "squares")
_ROW_NBYTES = 32 + 5 * 8  # sha256 and the integers
#: Statistics of that many shards are decoded at a time.
_ROWS_AT_ONCE = 256


def write_segment(folder: Path, commits: Iterable[Commit]) -> Path:
    """Write ``commits`` (with statistics) to ``folder`` and return the file; the same commits make the same file."""
    import pyarrow as pa

    rows = [
        (c, s)
        for c in sorted(commits, key=lambda c: (c.set_id, c.group, c.generation))
        for s in sorted(c.shards, key=lambda s: (s.layer, s.part))
    ]
    stats = [_known(s) for _, s in rows]
    texts = pa.string()
    data = write_plain(
        {
            "set": pa.array([c.set_id for c, _ in rows], texts),
            "group": pa.array([c.group for c, _ in rows], pa.int64()),
            "generation": pa.array([c.generation for c, _ in rows], pa.int64()),
            "start": pa.array([c.start for c, _ in rows], pa.int64()),
            "stop": pa.array([c.stop for c, _ in rows], pa.int64()),
            "profile": pa.array([canonical_json(c.profile.to_json()) for c, _ in rows], texts),
            "layer": pa.array([s.layer for _, s in rows], texts),
            "path": pa.array([s.path for _, s in rows], texts),
            "nbytes": pa.array([s.nbytes for _, s in rows], pa.int64()),
            "sha256": pa.array([bytes.fromhex(s.sha256) for _, s in rows], pa.binary(32)),
            "count": pa.array([t.count for t in stats], pa.int64()),
            "norm_sum": pa.array([t.norm_sum for t in stats], pa.float64()),
            "norm_max": pa.array([t.norm_max for t in stats], pa.float64()),
            "non_finite": pa.array([t.non_finite for t in stats], pa.int64()),
            "sums": pa.array([t.sums for t in stats], pa.list_(pa.float64())),
            "squares": pa.array([t.squares for t in stats], pa.list_(pa.float64())),
        }
    )
    path = folder / f"{hashlib.sha256(data).hexdigest()}.parquet"
    if not path.is_file():
        replace_file(path, data)
    return path


def read_segment_commits(path: Path, again: bool = False) -> list[Commit]:
    """Return the commits of a segment, without statistics. Raises ``FindingsError`` when it is damaged.

    ``again``: compare the file with its sha256 also when that was done on this node before.
    """
    _check(path, again)
    columns = read_plain(path, _FACTS, _ROW_NBYTES)
    units: dict[tuple[str, int, int], tuple[tuple[int, int, NumericsProfile], list[ShardRecord]]] = {}
    profiles: dict[str, NumericsProfile] = {}
    names: dict[str, str] = {}  # few, each in thousands of rows
    try:
        for name, group, generation, start, stop, profile, layer, place, nbytes, sha256 in zip(
            *(columns[c] for c in _FACTS), strict=True
        ):
            if profile not in profiles:
                profiles[profile] = NumericsProfile.from_json(json.loads(profile))
            name = names.setdefault(name, name)
            shard = ShardRecord(names.setdefault(layer, layer), place, nbytes, sha256.hex())
            known = units.get((name, group, generation))
            shards = [] if known is None else known[1]
            shards.append(shard)
            units[name, group, generation] = ((start, stop, profiles[profile]), shards)
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        raise FindingsError(f"{path}: not a ledger segment ({error})") from None
    return [
        Commit(name, group, facts[0], facts[1], facts[2], tuple(shards), generation)
        for (name, group, generation), (facts, shards) in units.items()
    ]


def read_segment_stats(
    path: Path, array: tuple[str, str] | None = None
) -> Iterator[tuple[tuple[str, int, int, str], ChannelStats]]:
    """Yield ``(set, group, generation, layer)`` and the statistics of every shard of features in a segment.

    ``array``: the (set, layer) to yield; default: all. A few rows at a time are in memory.
    """
    _check(path)
    names = ("set", "group", "generation", "layer", "path", *_STATS)
    for columns in read_batches(path, names, _ROW_NBYTES, rows=_ROWS_AT_ONCE):
        sums, squares = columns.pop("sums"), columns.pop("squares")
        plain = zip(*(column.to_pylist() for column in columns.values()), strict=True)
        for row, (name, group, generation, layer, place, count, norm_sum, norm_max, non_finite) in enumerate(plain):
            if array not in (None, (name, layer)) or ShardRecord(layer, place, 0, "").part != "features":
                continue
            sums_D, squares_D = _row(sums, row), _row(squares, row)
            found = ChannelStats(count, sums_D, squares_D, norm_sum, norm_max, non_finite)
            yield (name, group, generation, layer), found


def _row(lists: Any, row: int) -> NDArray[np.float64]:
    """Return one list of floats, with memory of its own."""
    return np.array(lists[row].values.to_numpy(zero_copy_only=False), np.float64)


def _check(path: Path, again: bool = False) -> None:
    if not (sha256_file(path) == path.stem if again else has_sha256(path, path.stem)):
        raise FindingsError(f"{path}: damaged (its sha256 is not its name); run `rsmtdf cache verify` on the store")


def _known(shard: ShardRecord) -> ChannelStats:
    if shard.stats is None:
        raise ValueError(f"{shard.path}: its statistics were not read")
    return shard.stats
