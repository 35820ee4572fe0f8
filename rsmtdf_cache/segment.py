"""Compacted commits: many records in one Parquet file named by its own sha256 (10^7 shards must not be 10^7 files).

Statistics are the bulk of a record; they are read only when they are asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.files import replace_file
from rsmtdf_cache.parquet import read_plain, write_plain
from rsmtdf_cache.records import Commit, ShardRecord
from rsmtdf_cache.specs import NumericsProfile, canonical_json
from rsmtdf_cache.stats import ChannelStats

__all__ = ["read_segment_commits", "read_segment_stats", "write_segment"]

_FACTS = ("set", "group", "generation", "start", "stop", "profile", "layer", "path", "nbytes", "sha256")
_STATS = ("count", "norm_sum", "norm_max", "non_finite", "sums", "squares")
_ROW_NBYTES = 32 + 5 * 8  # sha256 and the integers


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


def read_segment_commits(path: Path) -> list[Commit]:
    """Return the commits of a segment, without statistics. Raises ``FindingsError`` when it is damaged."""
    columns = _read(path, _FACTS)
    units: dict[tuple[str, int, int], tuple[Any, list[ShardRecord]]] = defaultdict(lambda: (None, []))
    profiles: dict[str, NumericsProfile] = {}
    try:
        for name, group, generation, start, stop, profile, layer, place, nbytes, sha256 in zip(
            *(columns[c] for c in _FACTS), strict=True
        ):
            if profile not in profiles:
                profiles[profile] = NumericsProfile.from_json(json.loads(profile))
            shards = units[name, group, generation][1]
            shards.append(ShardRecord(layer, place, nbytes, sha256.hex()))
            units[name, group, generation] = ((start, stop, profiles[profile]), shards)
    except (ValidationError, ValueError, TypeError, AttributeError) as error:
        raise FindingsError(f"{path}: not a ledger segment ({error})") from None
    return [
        Commit(name, group, facts[0], facts[1], facts[2], tuple(shards), generation)
        for (name, group, generation), (facts, shards) in units.items()
    ]


def read_segment_stats(path: Path) -> Iterator[tuple[tuple[str, int, int, str], ChannelStats]]:
    """Yield ``(set, group, generation, layer)`` and the statistics of every shard of features in a segment."""
    columns = _read(path, ("set", "group", "generation", "layer", "path", *_STATS))
    for name, group, generation, layer, place, *stats in zip(*columns.values(), strict=True):
        if ShardRecord(layer, place, 0, "").part != "features":
            continue
        count, norm_sum, norm_max, non_finite, sums, squares = stats
        sums_D, squares_D = np.asarray(sums, np.float64), np.asarray(squares, np.float64)
        yield (name, group, generation, layer), ChannelStats(count, sums_D, squares_D, norm_sum, norm_max, non_finite)


def _read(path: Path, columns: tuple[str, ...]) -> dict[str, list[Any]]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise FindingsError(f"{path}: damaged (its sha256 is not its name); run `rsmtdf cache verify` on the store")
    return read_plain(path, columns, _ROW_NBYTES, data)


def _known(shard: ShardRecord) -> ChannelStats:
    if shard.stats is None:
        raise ValueError(f"{shard.path}: its statistics were not read")
    return shard.stats
