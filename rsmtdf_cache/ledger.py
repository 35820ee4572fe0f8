"""The ledger: which tiles have rows, which arrays exist, which units are committed. Readers trust nothing else.

One JSON record per fact, published put-if-absent, each with its own checksum. Records never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.files import publish_json, read_json, replace_file, sha256_file
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.specs import FeatureKey, FeatureSpec, NumericsProfile, digest_of
from rsmtdf_cache.stats import ChannelStats
from rsmtdf_cache.tiles import TileRecord, TileTable, read_segment, segment_bytes

__all__ = ["Commit", "Ledger", "SetRecord", "ShardRecord"]


@dataclass(frozen=True)
class ShardRecord:
    """One committed shard: where it lies, what its bytes are, what they hold."""

    layer: str
    path: str
    nbytes: int
    sha256: str
    stats: ChannelStats


@dataclass(frozen=True)
class Commit:
    """One committed unit: rows ``[start, stop)`` of a row group, one shard per layer."""

    set_id: str
    group: int
    start: int
    stop: int
    profile: NumericsProfile
    shards: tuple[ShardRecord, ...]

    def to_json(self) -> dict[str, Any]:
        shards = [
            {"layer": s.layer, "path": s.path, "nbytes": s.nbytes, "sha256": s.sha256, "stats": s.stats.to_json()}
            for s in self.shards
        ]
        return {
            "set": self.set_id, "group": self.group, "start": self.start, "stop": self.stop,
            "profile": self.profile.to_json(), "shards": shards,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Commit:
        shards = tuple(
            ShardRecord(s["layer"], s["path"], s["nbytes"], s["sha256"], ChannelStats.from_json(s["stats"]))
            for s in data["shards"]
        )
        profile = NumericsProfile.from_json(data["profile"])
        return cls(data["set"], data["group"], data["start"], data["stop"], profile, shards)


@dataclass(frozen=True)
class SetRecord:
    """An array set of the store and the numerics profile it is encoded in."""

    arrays: ArraySet
    profile: NumericsProfile


@dataclass
class Ledger:
    """What the records said when ``load`` read them: a consistent picture that later commits do not disturb."""

    paths: StorePaths
    table: TileTable
    sets: dict[str, SetRecord] = field(default_factory=dict)
    commits: dict[str, dict[int, Commit]] = field(default_factory=dict)

    @classmethod
    def load(cls, paths: StorePaths) -> Ledger:
        """Return the ledger on disk. Raises ``FindingsError`` when a record is damaged."""
        ledger = cls(paths, _load_table(paths))
        for path in sorted((paths.ledger / "sets").glob("*.json")):
            ledger.sets[path.stem] = _set_record(path)
            ledger.commits[path.stem] = {}
        for path in sorted((paths.ledger / "commits").glob("*/*.json")):
            commit = _commit(path)
            if commit.set_id != path.parent.name or commit.set_id not in ledger.sets:
                raise FindingsError(f"{path}: the record belongs to the array set {commit.set_id!r}, which is not here")
            ledger.commits[commit.set_id][commit.group] = commit
        return ledger

    # -- questions

    def specs(self) -> dict[FeatureKey, FeatureSpec]:
        """Every array of the store by its key."""
        return {s.key: s for record in self.sets.values() for s in record.arrays.specs}

    def set_of(self, key: FeatureKey) -> str:
        """Return the id of the array set that holds ``key``. Raises ``KeyError``."""
        for name, record in self.sets.items():
            if any(s.key == key for s in record.arrays.specs):
                return name
        raise KeyError(key)

    def stats(self, key: FeatureKey) -> ChannelStats:
        """Return the statistics of all committed shards of ``key``, added in row order."""
        commits = self.commits[self.set_of(key)]
        parts = [s.stats for g in sorted(commits) for s in commits[g].shards if s.layer == key.layer]
        return ChannelStats.total(parts, self.specs()[key].layer.channels)

    def snapshot(self) -> str:
        """Return the identity of the content: no time, host or order of commits in it (decision 7)."""
        shards = sorted(
            [s.path, s.sha256, c.start, c.stop]
            for units in self.commits.values()
            for c in units.values()
            for s in c.shards
        )
        return digest_of({"shards": shards, "tiles": self.table.digest()})

    # -- facts

    def add_tiles(self, first_row: int, records: Sequence[TileRecord]) -> None:
        """Give ``records`` the rows from ``first_row`` on. Raises ``MismatchError`` when someone else took them."""
        data = segment_bytes(records)
        draft = self.paths.ledger / "tiles" / f"{first_row:010d}.parquet"
        replace_file(draft, data)
        body = {
            "first_row": first_row,
            "rows": len(records),
            "file": draft.name,
            "sha256": sha256_file(draft),
            "splits": TileTable([(0, records)]).splits,
        }
        if not publish_json(self.paths.tile_segment(first_row), body, self.paths.tmp):
            raise MismatchError(
                f"{self.paths.root}: another builder added tiles at row {first_row}; run the command again"
            )
        self.table = _load_table(self.paths)

    def add_set(self, arrays: ArraySet, profile: NumericsProfile) -> SetRecord:
        """Register an array set, or return the record that is there already."""
        body = {"arrays": [s.to_json() for s in arrays.specs], "profile": profile.to_json()}
        path = self.paths.array_set(arrays.id)
        publish_json(path, body, self.paths.tmp)
        record = self.sets[arrays.id] = _set_record(path)
        self.commits.setdefault(arrays.id, {})
        return record

    def add_commit(self, commit: Commit) -> Commit:
        """Publish ``commit``; when another builder was first, adopt and return its record (decision 6)."""
        path = self.paths.commit(commit.set_id, commit.group)
        if not publish_json(path, commit.to_json(), self.paths.tmp):
            commit = _commit(path)
        self.commits[commit.set_id][commit.group] = commit
        return commit


def _load_table(paths: StorePaths) -> TileTable:
    segments = []
    for path in sorted((paths.ledger / "tiles").glob("*.json")):
        body = read_json(path)
        file = path.parent / Path(str(body["file"])).name
        if not file.is_file() or sha256_file(file) != body["sha256"]:
            raise FindingsError(f"{file}: the tile table is missing or damaged (its sha256 is not the recorded one)")
        segments.append((int(body["first_row"]), read_segment(file)))
    return TileTable(segments)


def _set_record(path: Path) -> SetRecord:
    body = read_json(path)
    try:
        arrays = ArraySet(tuple(FeatureSpec.from_json(s) for s in body["arrays"]))
        profile = NumericsProfile.from_json(body["profile"])
    except (ValidationError, KeyError, TypeError) as error:
        raise FindingsError(f"{path}: not an array set record ({error})") from None
    if not arrays.specs or arrays.id != path.stem:
        raise FindingsError(f"{path}: the record's arrays do not have the name of the file")
    return SetRecord(arrays, profile)


def _commit(path: Path) -> Commit:
    try:
        return Commit.from_json(read_json(path))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise FindingsError(f"{path}: not a commit record ({error})") from None
