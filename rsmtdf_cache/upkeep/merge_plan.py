"""What a merge will do, decided from two ledgers before a byte is written: rows, array sets, units, conflicts.

Rows and arrays of A keep their places. A unit of the result is A's own, or copied tile by tile from whichever store
has the features, or stays pending. Words: A and B are the stores that are merged, "the result" is what holds both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rsmtdf_cache.codecs import Calibration
from rsmtdf_cache.layout import ArraySet, Part, unit_nbytes
from rsmtdf_cache.ledger import Commit, ShardRecord
from rsmtdf_cache.quality import Quality
from rsmtdf_cache.specs import FeatureKey, FeatureSpec, NumericsProfile, differing_fields
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tiles import TileRecord, TileTable
from rsmtdf_cache.upkeep.diff import spec_difference

__all__ = ["MergePlan", "PlannedSet", "PlannedUnit", "Source", "conflicts", "plan_merge"]

#: A message lists that many conflicting tiles; ``cache diff`` lists all.
TILES_SHOWN = 100


class Source:
    """One of the two stores, asked by content: which rows hold these pixels, and in which numerics."""

    def __init__(self, name: str, store: FeatureStore) -> None:
        self.name, self.store = name, store
        self._rows: dict[bytes, list[int]] = defaultdict(list)
        for row, record in enumerate(store.tiles.records):
            if record is not None:
                self._rows[record.digest].append(row)

    @cached_property
    def specs(self) -> dict[FeatureKey, FeatureSpec]:
        """The arrays of the store."""
        return self.store.ledger.specs()

    @cached_property
    def _commits(self) -> dict[FeatureKey, dict[int, Commit]]:
        ledger = self.store.ledger
        return {k: {g: ledger.commits[ledger.set_of(k)][g] for g in ledger.shards(k)} for k in self.specs}

    def commit(self, key: FeatureKey, row: int) -> Commit | None:
        """Return the commit that holds ``key`` of ``row``."""
        found = self._commits.get(key, {}).get(row // self.store.manifest.group_rows)
        return found if found is not None and found.start <= row < found.stop else None

    def shard(self, key: FeatureKey, group: int, part: Part = "features") -> ShardRecord:
        """Return the record of a shard of the store. Raises ``KeyError`` when there is none."""
        found = self._commits[key][group].shard(key.layer, part)
        if found is None:
            raise KeyError(group)
        return found

    def calibration(self, key: FeatureKey) -> str:
        """Return the digest of the calibration of ``key``, empty for codecs that have none."""
        ledger = self.store.ledger
        return ledger.sets[ledger.set_of(key)].calibrations.get(key.layer, "")

    def rows(self, record: TileRecord) -> list[int]:
        """Return the rows with the pixels of ``record``, the one with its id first."""
        return sorted(self._rows.get(record.digest, ()), key=lambda r: self.store.tiles.ids[r] != record.id)


#: Where the features of one tile can be had, by numerics: the store and its row.
Offers = dict[NumericsProfile, tuple[Source, int]]


@dataclass(frozen=True)
class PlannedSet:
    """An array set of the result: ``specs`` are its arrays that are not dropped; ``own``: the set of A that it is.

    ``calibrations`` and ``quality``: of its layers, as the store that it comes from has them.
    """

    arrays: ArraySet
    specs: tuple[FeatureSpec, ...]
    profile: NumericsProfile
    own: str | None
    calibrations: Mapping[str, Calibration] = field(default_factory=dict, compare=False, hash=False)
    quality: Mapping[str, Quality] = field(default_factory=dict, compare=False, hash=False)


@dataclass(frozen=True)
class PlannedUnit:
    """A unit to copy tile by tile, or (``profile`` None) one that stays pending and why."""

    arrays: PlannedSet
    group: int
    rows: tuple[int, ...]
    profile: NumericsProfile | None
    reason: str = ""

    def nbytes(self, group_rows: int) -> int:
        """Bytes of its shards."""
        return sum(unit_nbytes(s, group_rows, len(self.rows)) for s in self.arrays.specs)


@dataclass
class MergePlan:
    """The result, as values. ``own``: units that are A's. ``mixed``: conflicts that ``allow_mixed`` would accept."""

    a: Source
    b: Source
    segments: dict[int, Sequence[TileRecord]]
    new_segments: dict[int, list[TileRecord]] = field(default_factory=dict)
    sets: list[PlannedSet] = field(default_factory=list)
    own: list[tuple[PlannedSet, Commit]] = field(default_factory=list)
    units: list[PlannedUnit] = field(default_factory=list)
    pending: list[PlannedUnit] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    table: TileTable = field(init=False)

    def __post_init__(self) -> None:
        self.table = TileTable(list(self.segments.items()))

    def offers(self, spec: FeatureSpec, record: TileRecord) -> Offers:
        """Return where the features of a tile can be had, A before B, the same id before other tiles of its pixels."""
        found: Offers = {}
        for source in (self.a, self.b):
            for row in source.rows(record):
                commit = source.commit(spec.key, row)
                if commit is not None:
                    found.setdefault(commit.profile, (source, row))
        return found

    def left_behind(self) -> dict[str, int]:
        """Return for each array how many tiles have features in B and none in the result (their units are pending)."""
        counts: Counter[str] = Counter()
        for unit in self.pending:
            records = [self.table.record(row) for row in unit.rows]
            for spec in unit.arrays.specs:
                counts[str(spec.key)] += sum(self._has(self.b, spec.key, record) for record in records)
        return {key: count for key, count in sorted(counts.items()) if count}

    @staticmethod
    def _has(source: Source, key: FeatureKey, record: TileRecord) -> bool:
        tiles = source.store.tiles
        return record.id in tiles and source.commit(key, tiles.row_of(record.id)) is not None


def conflicts(a: Source, b: Source) -> list[str]:
    """Return why A and B cannot be one store: tile side, ids with other pixels, keys with other content."""
    found = []
    if a.store.tile_px != b.store.tile_px:
        found.append(f"tile_px: {a.store.tile_px} (A) != {b.store.tile_px} (B)")
    both = [r for r in a.store.tiles.records if r is not None and r.id in b.store.tiles]
    other = [r.id for r in both if b.store.tiles.record(b.store.tiles.row_of(r.id)).digest != r.digest]
    found += [f"tile {name!r} has other pixels in B" for name in other[:TILES_SHOWN]]
    if len(other) > TILES_SHOWN:
        found.append(f"and {len(other) - TILES_SHOWN} more such tiles; `rsmtdf cache diff` lists them")
    for key in sorted(set(a.specs) & set(b.specs), key=str):
        if a.specs[key].digest() != b.specs[key].digest():
            found += [f"array {key}: {line}" for line in spec_difference(a.specs[key], b.specs[key])]
        elif a.calibration(key) != b.calibration(key):
            found.append(
                f"array {key}: calibrated differently, {a.calibration(key)[:12]} (A) != {b.calibration(key)[:12]} (B); "
                "codes are never quantised again: build one of them with --calibration of the other"
            )
    return found


def plan_merge(a: Source, b: Source, into_a: bool) -> MergePlan:
    """Return how B's tiles and arrays join those of A. Call it when ``conflicts`` found none.

    ``into_a``: A itself becomes the result, so its array sets keep their names even where an array was dropped.
    """
    plan = MergePlan(a, b, dict(a.store.ledger.segments))
    plan.sets = list(_sets(a, b, into_a))
    _add_tiles(plan, a.store.manifest.group_rows)
    _add_units(plan, a.store.manifest.group_rows)
    return plan


def _sets(a: Source, b: Source, into_a: bool) -> Iterator[PlannedSet]:
    for name, record in a.store.ledger.sets.items():
        live = tuple(a.store.ledger.live(name))
        if live:
            arrays = record.arrays if into_a else ArraySet(live)
            yield PlannedSet(arrays, live, record.profile, name, *_known_of(a, name, arrays))
    for name, record in b.store.ledger.sets.items():
        new = tuple(s for s in b.store.ledger.live(name) if s.key not in a.specs)
        if new:
            yield PlannedSet(ArraySet(new), new, record.profile, None, *_known_of(b, name, ArraySet(new)))


def _known_of(source: Source, name: str, arrays: ArraySet) -> tuple[dict[str, Calibration], dict[str, Quality]]:
    """Return calibrations and quality, by layer, that the set ``name`` of a store has for ``arrays``."""
    ledger = source.store.ledger
    record, layers = ledger.sets[name], {s.layer.name for s in arrays.specs}
    calibrations = {layer: ledger.calibration(d) for layer, d in record.calibrations.items() if layer in layers}
    return calibrations, {layer: q for layer, q in record.quality.items() if layer in layers}


def _add_tiles(plan: MergePlan, group_rows: int) -> None:
    """Give B's new tiles rows: those that have the same arrays stand together, in B's order, from a new row group on.

    Otherwise one tile without features would keep its whole group pending.
    """
    alike: dict[object, list[TileRecord]] = defaultdict(list)
    for record in plan.b.store.tiles.records:
        if record is not None and record.id not in plan.table:
            have = tuple(
                frozenset.intersection(*(frozenset(plan.offers(spec, record)) for spec in planned.specs))
                for planned in plan.sets
            )
            alike[have].append(record)
    for records in alike.values():
        first_row = -(-len(plan.table) // group_rows) * group_rows
        plan.new_segments[first_row] = records
        plan.segments = {**plan.segments, first_row: records}
        plan.table = TileTable(list(plan.segments.items()))


def _add_units(plan: MergePlan, group_rows: int) -> None:
    groups: dict[int, list[int]] = defaultdict(list)
    for row, record in enumerate(plan.table.records):
        if record is not None:
            groups[row // group_rows].append(row)
    for planned in plan.sets:
        commits = plan.a.store.ledger.commits[planned.own] if planned.own is not None else {}
        plan.own += [(planned, commit) for _, commit in sorted(commits.items())]
        for group, rows in sorted(groups.items()):
            if group not in commits:
                unit = _unit(plan, planned, group, rows)
                (plan.pending if unit.profile is None else plan.units).append(unit)


def _unit(plan: MergePlan, planned: PlannedSet, group: int, rows: list[int]) -> PlannedUnit:
    common: dict[NumericsProfile, None] | None = None
    missing = 0
    for row in rows:
        offers = [plan.offers(spec, plan.table.record(row)) for spec in planned.specs]
        missing += not all(offers)
        for offer in offers:
            common = dict.fromkeys(p for p in (offer if common is None else common) if p in offer)
    label = f"{planned.arrays.label} ({', '.join(s.layer.name for s in planned.specs)}), row group {group}"
    if missing:
        reason = f"{missing} of {len(rows)} tiles have no features in A or B"
        return PlannedUnit(planned, group, tuple(rows), None, reason)
    if not common:
        plan.mixed.append(f"{label}: its tiles come from different numerics, and a unit has one")
        return PlannedUnit(planned, group, tuple(rows), None, "its tiles come from different numerics")
    if planned.profile in common:
        return PlannedUnit(planned, group, tuple(rows), planned.profile)
    profile = next(iter(common))
    fields = "; ".join(differing_fields(planned.profile.to_json(), profile.to_json()))
    fields = fields.replace("(store)", "(array set)").replace("(asked)", "(unit)")
    plan.mixed.append(f"{label}: encoded in other numerics than its array set: {fields}")
    return PlannedUnit(planned, group, tuple(rows), profile)
