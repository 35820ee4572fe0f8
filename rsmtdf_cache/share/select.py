"""What to copy from one store to another: a choice of arrays and tiles, and the plan that follows from it.

Copies work by whole units (a row group of an array set), and a store that holds an array of a set holds it for every
unit it has of that set: so the plan is the smallest such rectangle around what is there and what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from rsmtdf_cache.errors import MismatchError, UsageError, did_you_mean
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.pixels import is_pixels
from rsmtdf_cache.specs import FeatureSpec
from rsmtdf_cache.tiles import TileTable

__all__ = ["CopyPlan", "Selection", "Unit", "plan_copy"]


@dataclass(frozen=True)
class Selection:
    """Patterns (``dino*``) of teachers, layers and views, each empty for all; ``tiles``: a split or a file of ids.

    ``pixels``: also the tiles' pixels, whatever the patterns say (decision 15: they travel only if asked for).
    """

    teachers: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    tiles: str | None = None
    pixels: bool = False

    def takes(self, spec: FeatureSpec) -> bool:
        """Whether the array is chosen."""
        key = spec.key
        if is_pixels(key):
            return self.pixels
        parts = ((self.teachers, key.teacher), (self.layers, key.layer), (self.views, key.view))
        return all(not patterns or any(fnmatchcase(name, p) for p in patterns) for patterns, name in parts)

    def rows(self, table: TileTable) -> list[int] | None:
        """Return the rows of the chosen tiles, None for all. Raises ``UsageError`` for an unknown split or tile."""
        if self.tiles is None:
            return None
        if self.tiles in table.splits:
            return [n for n, r in enumerate(table.records) if r is not None and r.split == self.tiles]
        path = Path(self.tiles)
        if not path.is_file():
            splits = ", ".join(table.splits)
            raise UsageError(
                f"--tiles {self.tiles}: neither a split of the store ({splits}) nor a file of tile ids."
                f"{did_you_mean(self.tiles, table.splits)}"
            )
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        unknown = [name for name in names if name not in table]
        if unknown or not names:
            what = f"{len(unknown)} tiles are not in the store: {', '.join(unknown[:3])}" if names else "no ids in it"
            raise UsageError(f"--tiles {path}: {what}")
        return sorted({table.row_of(name) for name in names})


@dataclass(frozen=True)
class Unit:
    """A commit to copy: the shards to move, and whether the record itself is new there.

    Shards of a unit that is not new are of an array that was not there, or replace damaged ones.
    """

    commit: Commit
    shards: tuple[ShardRecord, ...]
    is_new: bool

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.shards)


@dataclass
class CopyPlan:
    """What a copy does. ``arrays``: set → layers that the target will have of it; ``undrop``: those that it had not.

    ``held``: the chosen part of what the target's records say is there; ``replaced``: how many shards of it are to be
    replaced, for they are missing or damaged.
    """

    arrays: dict[str, tuple[str, ...]] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    drop: set[tuple[str, str]] = field(default_factory=set)
    undrop: set[tuple[str, str]] = field(default_factory=set)
    held: list[Unit] = field(default_factory=list)
    replaced: int = 0
    units_before: int = 0
    tiles: int = 0
    tiles_along: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(u.nbytes for u in self.units)

    @property
    def shards(self) -> int:
        return sum(len(u.shards) for u in self.units)

    def replace_damaged(self, damaged: Callable[[list[ShardRecord]], set[str]]) -> None:
        """Plan to copy again what ``damaged`` (of shard records, their paths) says is not there as it should be."""
        found = damaged([shard for unit in self.held for shard in unit.shards])
        for unit in self.held:
            shards = tuple(s for s in unit.shards if s.path in found)
            if shards:
                self.units.append(replace(unit, shards=shards))
                self.replaced += len(shards)


def plan_copy(source: Ledger, group_rows: int, selection: Selection, target: Ledger | None) -> CopyPlan:
    """Return what to copy from ``source`` so that ``target`` (None: nothing is there yet) holds the selection.

    Raises ``UsageError`` when the selection takes nothing, ``MismatchError`` when a unit has other bytes there.
    """
    rows = selection.rows(source.table)
    groups = None if rows is None else {row // group_rows for row in rows}
    plan, taken = CopyPlan(), 0
    for name in sorted(source.sets):
        chosen = [s for s in source.live(name) if selection.takes(s)]
        taken += len(chosen)
        layers = [
            s.layer.name for s in chosen if target is None or not _held_elsewhere(plan, source, target, s, groups)
        ]
        if layers:
            _plan_set(plan, source, target, name, layers, groups)
    if not taken:
        raise UsageError(_nothing(source, selection))
    _count_tiles(plan, source, rows, groups, group_rows)
    return plan


def _plan_set(
    plan: CopyPlan, source: Ledger, target: Ledger | None, name: str, chosen: Sequence[str], groups: set[int] | None
) -> None:
    everything = {s.layer.name for s in source.sets[name].arrays.specs}
    known = target is not None and name in target.sets
    have = {s.layer.name for s in target.live(name)} if target is not None and known else set()
    theirs = target.commits[name] if target is not None and known else {}
    fresh = set(chosen) - have
    layers = have | set(chosen)
    lost = have - {s.layer.name for s in source.live(name)}
    plan.arrays[name] = tuple(sorted(layers))
    if known:
        plan.undrop |= {(name, layer) for layer in fresh}
    else:
        plan.drop |= {(name, layer) for layer in everything - layers}
    for group, commit in sorted(source.commits[name].items()):
        there = theirs.get(group)
        if there is not None and there.generation >= commit.generation:
            moved = _missing(plan, commit, there, layers, fresh)
            if groups is None or group in groups:
                known_shards = tuple(
                    s for s in commit.shards if s.layer in set(chosen) - fresh and there.shard(s.layer, s.part)
                )
                plan.held.append(Unit(commit, known_shards, is_new=False))
            if not moved:
                plan.units_before += 1
                continue
            plan.units.append(Unit(commit, moved, is_new=False))
        elif there is not None or groups is None or group in groups:
            if any(commit.shard(layer) is not None for layer in lost):
                raise MismatchError(
                    f"the source dropped {', '.join(sorted(lost))} of the array set {name}, the target has it; "
                    "drop it there as well (`rsmtdf cache drop`), or choose another place"
                )
            moved = tuple(s for s in commit.shards if s.layer in layers)
            plan.units.append(Unit(commit, moved, is_new=True))
    alone = [g for g, c in theirs.items() if g not in source.commits[name] and any(c.shard(x) for x in fresh)]
    if alone:
        raise MismatchError(
            f"the target lacks {', '.join(sorted(fresh))} of its row groups {_some(alone)}, and the source does not "
            "have them; build them there, or choose another place"
        )


def _held_elsewhere(plan: CopyPlan, source: Ledger, target: Ledger, spec: FeatureSpec, groups: set[int] | None) -> bool:
    """Whether the target has the array in a set of other layers, which is as good when every chosen row is there.

    Raises ``MismatchError`` when something would have to be copied: a unit belongs to one set.
    """
    if spec.key not in target.specs() or target.set_of(spec.key) == source.set_of(spec.key):
        return False
    theirs = target.commits[target.set_of(spec.key)]
    for group, commit in sorted(source.commits[source.set_of(spec.key)].items()):
        layer = spec.layer.name
        if commit.shard(layer) is None or (groups is not None and group not in groups):
            continue
        there = theirs.get(group)
        if there is None or there.shard(layer) is None or there.stop < commit.stop:
            raise MismatchError(
                f"{spec.key}: the target built it together with other layers than the source, and lacks its row group "
                f"{group}; nothing was written. Unite the two with `rsmtdf cache merge`, or choose another place"
            )
        if there.stop == commit.stop:  # else the target has grown since
            shards = tuple(s for s in commit.shards if s.layer == layer)
            for shard in shards:
                other = there.shard(layer, shard.part)
                if other is None or other.sha256 != shard.sha256:
                    raise _other_bytes(shard.path)
            plan.held.append(Unit(commit, shards, is_new=False))
        plan.units_before += 1
    return True


def _missing(
    plan: CopyPlan, commit: Commit, there: Commit, layers: set[str], fresh: set[str]
) -> tuple[ShardRecord, ...]:
    """Return the shards of a unit, known there, that are still to be copied."""
    moved = []
    for shard in commit.shards:
        if shard.layer not in layers:
            continue
        other = there.shard(shard.layer, shard.part)
        if other is None:
            plan.notes.append(f"{shard.path}: the target has this unit without the layer {shard.layer}; left out")
        elif (other.path, other.nbytes, other.sha256) != (shard.path, shard.nbytes, shard.sha256):
            raise _other_bytes(shard.path)
        elif shard.layer in fresh:
            moved.append(shard)
    return tuple(moved)


def _other_bytes(path: str) -> MismatchError:
    return MismatchError(
        f"{path}: the target has other bytes for it (built or repaired elsewhere); nothing was overwritten; choose "
        "another place"
    )


def _count_tiles(
    plan: CopyPlan, source: Ledger, rows: list[int] | None, groups: set[int] | None, group_rows: int
) -> None:
    held = [n for n, record in enumerate(source.table.records) if record is not None]
    if rows is None or groups is None:
        plan.tiles = len(held)
        return
    plan.tiles = len(rows)
    plan.tiles_along = sum(1 for n in held if n // group_rows in groups) - len(rows)


def _nothing(source: Ledger, selection: Selection) -> str:
    keys = sorted(source.specs(), key=str)
    asked: list[tuple[str, tuple[str, ...], Callable[[FeatureSpec], str]]] = [
        ("--teacher", selection.teachers, lambda s: s.key.teacher),
        ("--layer", selection.layers, lambda s: s.key.layer),
        ("--view", selection.views, lambda s: s.key.view),
    ]
    hint = ""
    for _, patterns, part in asked:
        names = {part(s) for s in source.specs().values()}
        for pattern in patterns:
            if not any(fnmatchcase(n, pattern) for n in names):
                hint = hint or did_you_mean(pattern, names)
    words = " ".join(f"{option} {p}" for option, patterns, _ in asked for p in patterns) or "everything"
    listing = ", ".join(map(str, keys[:8])) + (" …" if len(keys) > 8 else "")
    left = "; pixels travel with --pixels" if not selection.pixels and any(map(is_pixels, keys)) else ""
    return f"{words}: takes no array of the store.{hint} It holds: {listing or 'no array yet'}{left}"


def _some(groups: Sequence[int]) -> str:
    return ", ".join(map(str, groups[:5])) + (" …" if len(groups) > 5 else "")
