"""The ledger: which tiles have rows, which arrays exist, which units are committed. Readers trust nothing else.

One JSON record per fact, published put-if-absent, each with its own checksum; commits are compacted into Parquet
segments as they grow many. Records never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rsmtdf_cache.codecs import Calibration, Codec, codec_class, load_codec
from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.files import fsync_folder, no_step, publish_json, read_json, remove_file, replace_file, replace_json
from rsmtdf_cache.files import sha256_file as _sha256
from rsmtdf_cache.layout import ArraySet, Part, StorePaths
from rsmtdf_cache.quality import Quality
from rsmtdf_cache.readcheck import has_sha256
from rsmtdf_cache.records import Commit, SetRecord, ShardRecord, read_commit, read_dropped, read_set
from rsmtdf_cache.segment import read_segment_commits, read_segment_stats, write_segment
from rsmtdf_cache.specs import FeatureKey, FeatureSpec, NumericsProfile, digest_of
from rsmtdf_cache.stats import ChannelStats
from rsmtdf_cache.tiles import TileRecord, TileTable, read_segment, segment_bytes

__all__ = ["Commit", "Ledger", "SEGMENTS_MAX", "SetRecord", "ShardRecord", "TAIL_MAX"]

#: That many commit records are folded into a segment, that many segments into one; a large one is left alone, so that
#: folding takes the same memory however large the store.
TAIL_MAX = 256
SEGMENTS_MAX = 16
SEGMENT_NBYTES_LARGE = 64 * 2**20

_Segments = Mapping[int, Sequence[TileRecord]]


class _SetMissingError(FindingsError):
    """A commit names a set without a record: damage, unless a collection removed it between two looks."""


@dataclass
class Ledger:
    """What the records said when ``load`` read them: a consistent picture that later commits do not disturb.

    ``commits``: set → row group → the commit of the latest generation. ``dropped``: (set, layer) that count no more.
    """

    paths: StorePaths
    segments: _Segments = field(default_factory=dict)  # tile records by first row
    sets: dict[str, SetRecord] = field(default_factory=dict)
    generations: dict[tuple[str, int], dict[int, Commit]] = field(default_factory=dict)
    dropped: frozenset[tuple[str, str]] = frozenset()
    table: TileTable = field(init=False)
    commits: dict[str, dict[int, Commit]] = field(init=False)
    _stats: dict[tuple[str, str], dict[tuple[int, int], ChannelStats]] = field(default_factory=dict)
    _totals: dict[FeatureKey, ChannelStats] = field(default_factory=dict)
    _calibrations: dict[str, Calibration] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.table = TileTable(list(self.segments.items()))
        self.commits = {name: {} for name in self.sets}
        for (name, group), generations in sorted(self.generations.items()):
            self.commits[name][group] = generations[max(generations)]

    @classmethod
    def load(cls, paths: StorePaths) -> Ledger:
        """Return the ledger on disk, whoever writes to it meanwhile. Raises ``FindingsError`` for a damaged record."""
        for _ in range(20):  # a file that was compacted or collected between listing and reading: look again
            try:
                return _load(paths)
            except (FileNotFoundError, _SetMissingError):
                continue
        return _load(paths)

    # -- questions

    def specs(self) -> dict[FeatureKey, FeatureSpec]:
        """Every array of the store by its key."""
        return {s.key: s for name in self.sets for s in self.live(name)}

    def live(self, set_id: str) -> list[FeatureSpec]:
        """Return the arrays of a set that were not dropped."""
        specs = self.sets[set_id].arrays.specs
        return [s for s in specs if (set_id, s.layer.name) not in self.dropped]

    def set_of(self, key: FeatureKey) -> str:
        """Return the id of the array set that holds ``key``. Raises ``KeyError``."""
        for name in self.sets:
            if any(s.key == key for s in self.live(name)):
                return name
        raise KeyError(key)

    def shards(self, key: FeatureKey, part: Part = "features") -> dict[int, ShardRecord]:
        """Return the committed shards of a part of ``key`` by row group, in row order."""
        found = {group: c.shard(key.layer, part) for group, c in sorted(self.commits[self.set_of(key)].items())}
        return {group: shard for group, shard in found.items() if shard is not None}

    def all_shards(self, key: FeatureKey) -> list[ShardRecord]:
        """Return the committed shards of all parts of ``key``."""
        commits = sorted(self.commits[self.set_of(key)].items())
        return [shard for _, commit in commits for shard in commit.shards if shard.layer == key.layer]

    def codec(self, spec: FeatureSpec) -> Codec:
        """Return the codec of an array of the store, calibrated as its set record says.

        Raises ``FindingsError`` when the calibration is missing or damaged.
        """
        if not codec_class(spec.encoding).calibrated:
            return load_codec(spec.encoding, spec.layer.channels)
        for name in self.sets:  # dropped arrays are read too, by repairs
            record = self.sets[name]
            if any(s.layer.name == spec.layer.name and s.digest() == spec.digest() for s in record.arrays.specs):
                digest = record.calibrations[spec.layer.name]
                return load_codec(spec.encoding, spec.layer.channels, self.calibration(digest))
        raise KeyError(spec.key)

    def calibration(self, digest: str) -> Calibration:
        """Return the calibration of this sha256. Raises ``FindingsError`` when it is missing or damaged."""
        if digest not in self._calibrations:
            try:
                self._calibrations[digest] = Calibration.read(self.paths.calibration(digest), digest)
            except FindingsError as error:
                raise FindingsError(f"{error}; bring it back, its arrays cannot be read without it") from None
        return self._calibrations[digest]

    def stats(self, key: FeatureKey) -> ChannelStats:
        """Return the statistics of all committed shards of ``key``, added in row order."""
        if key not in self._totals:
            name = self.set_of(key)
            commits, known = self.commits[name], dict(self._stats)
            parts = (self.stats_of(commits[g], key.layer) for g in self.shards(key))
            self._totals[key] = ChannelStats.total(parts, self.specs()[key].layer.channels)
            self._stats = known  # the sum stays, not what it was made of
        return self._totals[key]

    def stats_of(self, commit: Commit, layer: str) -> ChannelStats:
        """Return the statistics of one shard of features, from its record or the segment it was compacted into."""
        shard = commit.shard(layer)
        if shard is None:
            raise KeyError(layer)
        if shard.stats is not None:
            return shard.stats
        array = (commit.set_id, layer)
        if array not in self._stats:
            self._stats[array] = {
                (group, generation): stats
                for path in _segment_files(self.paths)
                for (_, group, generation, _), stats in read_segment_stats(path, array)
            }
        try:
            return self._stats[array][commit.group, commit.generation]
        except KeyError:
            raise FindingsError(f"{self.paths.segments}: lack the statistics of {shard.path}") from None

    def complete(self, commit: Commit, known: Mapping[tuple[str, int, int, str], ChannelStats] | None = None) -> Commit:
        """Return ``commit`` with the statistics of every shard, those not ``known`` read."""

        def stats(shard: ShardRecord) -> ChannelStats:
            if shard.part != "features":
                return ChannelStats.empty(0)
            found = (known or {}).get((commit.set_id, commit.group, commit.generation, shard.layer))
            return found or self.stats_of(commit, shard.layer)

        return replace(commit, shards=tuple(replace(s, stats=stats(s)) for s in commit.shards))

    def snapshot(self) -> str:
        """Return the identity of the content: no time, host or order of commits in it (decision 7)."""
        shards = sorted(
            [s.path, s.sha256, c.start, c.stop]
            for units in self.commits.values()
            for c in units.values()
            for s in c.shards
            if (c.set_id, s.layer) not in self.dropped
        )
        body: dict[str, Any] = {"shards": shards, "tiles": self.table.digest()}
        calibrations = {
            str(s.key): self.sets[name].calibrations[s.layer.name]
            for name in self.sets
            for s in self.live(name)
            if self.commits[name] and s.layer.name in self.sets[name].calibrations
        }
        if calibrations:
            body["calibrations"] = calibrations
        return digest_of(body)

    def content(self) -> Content:
        """Return which records the present content is made of."""
        alive = {name: tuple(s.layer.name for s in self.live(name)) for name in self.sets}
        units = {n: {g: c.generation for g, c in units.items()} for n, units in self.commits.items() if alive[n]}
        return Content(tuple(sorted(self.segments)), units, {n: layers for n, layers in alive.items() if layers})

    def at(self, content: Content) -> Ledger:
        """Return the ledger as it was when it had ``content``. Raises ``MismatchError`` when a record is gone."""
        try:
            segments = {first: self.segments[first] for first in content.tiles}
            sets = {name: self.sets[name] for name in content.layers}
            generations = {
                (name, group): {generation: self.generations[name, group][generation]}
                for name, units in content.units.items()
                for group, generation in units.items()
            }
        except KeyError as error:
            raise MismatchError(
                f"{self.paths.root}: the snapshot needs a record that is no longer there ({error}); pins keep "
                "snapshots from being collected"
            ) from None
        dropped = {
            (name, s.layer.name)
            for name, record in sets.items()
            for s in record.arrays.specs
            if s.layer.name not in content.layers[name]
        }
        return Ledger(
            self.paths, segments, sets, generations, frozenset(dropped),
            _stats=self._stats, _calibrations=self._calibrations,
        )  # fmt: skip

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
            "sha256": _sha256(draft),
            "splits": TileTable([(0, records)]).splits,
        }
        if not publish_json(self.paths.tile_segment(first_row), body, self.paths.tmp):
            raise MismatchError(
                f"{self.paths.root}: another builder added tiles at row {first_row}; run the command again"
            )
        self.segments = {**self.segments, first_row: records}
        self.table = TileTable(list(self.segments.items()))

    def add_calibration(self, calibration: Calibration) -> str:
        """Keep a calibration, durably, and return its digest. It lies there before a set record names it."""
        digest = calibration.digest
        if not self.paths.calibration(digest).is_file():
            replace_file(self.paths.calibration(digest), calibration.to_bytes())
        self._calibrations[digest] = calibration
        return digest

    def add_set(
        self, arrays: ArraySet, profile: NumericsProfile, calibrations: Mapping[str, str] | None = None,
        quality: Mapping[str, Quality] | None = None,
    ) -> SetRecord:  # fmt: skip
        """Register an array set, or return the record that is there already.

        ``calibrations``: layer → digest of a calibration that was added; ``quality``: layer → what was measured.
        """
        body = SetRecord(arrays, profile, calibrations or {}, quality or {}).to_json()
        path = self.paths.array_set(arrays.id)
        left = (
            {(name, layer) for name, layer in self.dropped if name == arrays.id}
            if arrays.id not in self.sets
            else set()
        )
        if left:  # of an earlier set of this name, whose collection was killed before its last step
            self.undrop(left)
        publish_json(path, body, self.paths.tmp)
        record = self.sets[arrays.id] = read_set(path)
        self.commits.setdefault(arrays.id, {})
        return record

    def add_commit(
        self, commit: Commit, after_step: Callable[[int], None] = no_step, drafts: Path | None = None
    ) -> Commit:
        """Publish ``commit``; when another builder was first, adopt and return its record (decision 6).

        ``drafts``: the folder that permits it (``writer.UnitWriter``); raises ``FileNotFoundError`` when it is gone.
        """
        path = self.paths.commit(commit.set_id, commit.group, commit.generation)
        body, folder = commit.to_json(), drafts or self.paths.tmp
        if not publish_json(path, body, folder, after_step, licence=drafts is not None):
            commit = read_commit(path)
        return self.adopt(commit)

    def adopt(self, commit: Commit) -> Commit:
        """Know a commit that is published, by whomever; return it."""
        known = self.generations.setdefault((commit.set_id, commit.group), {})
        known[commit.generation] = commit
        self._totals.clear()
        self.commits[commit.set_id][commit.group] = known[max(known)]
        return commit

    def forget(self, commit: Commit) -> None:
        """Know a published commit no more: a worker need not hold what the client does."""
        self.generations.pop((commit.set_id, commit.group), None)
        self.commits[commit.set_id].pop(commit.group, None)

    def drop(self, arrays: Iterable[tuple[str, str]]) -> None:
        """Let the arrays (set, layer) count no more. The caller holds the build lock."""
        self._write_dropped(self.dropped | set(arrays))

    def undrop(self, arrays: Iterable[tuple[str, str]]) -> None:
        """Let the arrays (set, layer) count again. The caller holds the build lock and knows their shards are there."""
        self._write_dropped(self.dropped - set(arrays))

    def compact(self, tail_max: int = TAIL_MAX) -> None:
        """Fold commit records into a segment when there are more than ``tail_max``. Only under the build lock."""
        tail = _commit_files(self.paths)
        files = [p for p in _segment_files(self.paths) if p.stat().st_size < SEGMENT_NBYTES_LARGE]
        if len(tail) <= tail_max and len(files) <= SEGMENTS_MAX:
            return
        old = files if len(files) > SEGMENTS_MAX else []
        found = {path: read_commit(path) for path in tail}
        # A worker's commit that nobody told us of stays a record: the unit is found by it if it is asked for again.
        told = {p: c for p, c in found.items() if c.generation in self.generations.get((c.set_id, c.group), {})}
        tail, moved = list(told), {(c.set_id, c.group, c.generation) for c in told.values()}
        moved |= {(c.set_id, c.group, c.generation) for path in old for c in read_segment_commits(path)}
        commits = [self.generations[name, group][generation] for name, group, generation in sorted(moved)]
        known = {k: v for path in old for k, v in read_segment_stats(path)}  # of these alone, not of all segments
        new = write_segment(self.paths.segments, (self.complete(c, known) for c in commits))
        for path in [*tail, *(p for p in old if p != new)]:
            remove_file(path)
        for folder in {path.parent for path in tail}:
            fsync_folder(folder)
        self._stats = {}
        for name, group, generation in moved:
            units = self.generations[name, group]
            thin = tuple(replace(s, stats=None) for s in units[generation].shards)
            units[generation] = replace(units[generation], shards=thin)
            self.commits[name][group] = units[max(units)]

    def dropped_json(self) -> dict[str, Any]:
        """Return what ``dropped.json`` says: the pairs of set and layer, their specs, and what set records say of them.

        That stands nowhere else once the zarr metadata is gone, and a set record may need it to be mended.
        """
        pairs = sorted(self.dropped)
        gone = [
            (self.sets[name], s)
            for name, layer in pairs
            for s in (self.sets[name].arrays.specs if name in self.sets else ())
            if s.layer.name == layer
        ]
        facts = [{"digest": s.digest(), **record.facts(s.layer.name)} for record, s in gone]
        body = {"arrays": [list(pair) for pair in pairs], "specs": [s.to_json() for _, s in gone]}
        return {**body, "facts": facts} if any(len(f) > 1 for f in facts) else body

    def _write_dropped(self, arrays: frozenset[tuple[str, str]]) -> None:
        self.dropped = arrays
        self._totals.clear()
        replace_json(self.paths.dropped, self.dropped_json())


def _load(paths: StorePaths) -> Ledger:
    # Against the order of publication (tiles, sets, commits, segments), so that nothing names what was not read yet.
    commits: list[Commit] = []
    for path in _commit_files(paths):
        try:
            commits.append(read_commit(path))
        except FileNotFoundError:  # folded into a segment meanwhile, which the next lines find
            continue
    for path in _segment_files(paths):
        commits += read_segment_commits(path)
    dropped = read_dropped(paths.dropped) if paths.dropped.is_file() else frozenset()
    sets = {path.stem: read_set(path) for path in sorted((paths.ledger / "sets").glob("*.json"))}
    generations: dict[tuple[str, int], dict[int, Commit]] = {}
    for commit in commits:
        if commit.set_id not in sets:
            raise _SetMissingError(
                f"{paths.ledger}: a commit of row group {commit.group} belongs to the array set {commit.set_id!r}, "
                "which is not here"
            )
        known = generations.setdefault((commit.set_id, commit.group), {})
        if commit.generation not in known or known[commit.generation].shards[0].stats is None:
            known[commit.generation] = commit
    return Ledger(paths, _load_segments(paths), sets, generations, dropped)


def _commit_files(paths: StorePaths) -> list[Path]:
    return sorted((paths.ledger / "commits").glob("*/*.json"))


def _segment_files(paths: StorePaths) -> list[Path]:
    return sorted(p for p in paths.segments.glob("*.parquet") if not p.name.startswith("."))


def _load_segments(paths: StorePaths) -> dict[int, Sequence[TileRecord]]:
    segments: dict[int, Sequence[TileRecord]] = {}
    for path in sorted((paths.ledger / "tiles").glob("*.json")):
        body = read_json(path)
        try:
            first_row, rows, name, digest = int(body["first_row"]), int(body["rows"]), body["file"], body["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise FindingsError(f"{path}: not a tile segment record ({error})") from None
        if path.stem != f"{first_row:010d}" or name != f"{first_row:010d}.parquet":
            raise FindingsError(f"{path}: the record names row {first_row} and file {name!r}")
        file = path.parent / name
        if not file.is_file() or not has_sha256(file, str(digest)):
            raise FindingsError(f"{file}: the tile table is missing or damaged (its sha256 is not the recorded one)")
        segments[first_row] = read_segment(file, rows, body.get("splits"))
    return segments
