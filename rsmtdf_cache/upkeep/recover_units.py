"""Rebuild damaged set records, commit records and the list of dropped arrays from zarr metadata and the shards."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.files import read_json, sha256_file
from rsmtdf_cache.head import Head
from rsmtdf_cache.layout import StorePaths, parts_of, set_id, shard_layout
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.manifest import Manifest
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile
from rsmtdf_cache.stats import ChannelStats
from rsmtdf_cache.upkeep.recover import Repaired, discard, propose, sound_head
from rsmtdf_cache.upkeep.survey import Survey, survey

__all__ = [
    "Unit",
    "forget_units",
    "lost_units",
    "recover_commits",
    "recover_dropped",
    "recover_sets",
    "recover_snapshots",
]

#: Set, row group, generation.
Unit = tuple[str, int, int]

_SUBSETS_MAX = 12  # arrays of one teacher and view, of which every subset is tried


def recover_sets(paths: StorePaths) -> list[Repaired]:
    """Make set records good again from the specs in the zarr metadata; the name of a set proves them."""
    found, head = survey(paths), sound_head(paths)
    listed = {Path(p).stem for p in (head.files if head is not None else {}) if p.startswith("ledger/sets/")}
    lost = {Path(p).stem for p in found.damaged if p.startswith("ledger/sets/")} | (listed - set(found.ledger.sets))
    lost |= {c.set_id for c in found.commits} - set(found.ledger.sets)
    known = {s.digest() for r in found.ledger.sets.values() for s in r.arrays.specs}
    specs = [s for s in _zarr_specs(paths).values() if s.digest() not in known]
    done = []
    for name in sorted(lost):
        place = paths.array_set(name)
        arrays = _set_called(name, specs)
        profiles = Counter(c.profile for c in found.commits if c.set_id == name)
        if not profiles and place.is_file() and not _has_commits(paths, name):
            discard(place)
            done.append(
                Repaired(paths.relative(place), "removed: nothing of it was committed; a build registers it again")
            )
        elif arrays is not None and profiles:
            profile = profiles.most_common(1)[0][0]
            ways: Iterator[Sequence[FeatureSpec]] = itertools.islice(itertools.permutations(arrays), 720)
            more = _set_facts(arrays, [*_zarr_attributes(paths), *_dropped_facts(paths)])
            bodies = [{"arrays": [s.to_json() for s in way], "profile": profile.to_json(), **more} for way in ways]
            if not any(propose(paths, place, body, head) for body in bodies):
                propose(paths, place, bodies[0], head, proven=True)
            done.append(
                Repaired(paths.relative(place), "rebuilt from the zarr metadata and the profile of its commits")
            )
    return done


def _has_commits(paths: StorePaths, name: str) -> bool:
    return any(True for _ in (paths.ledger / "commits" / name).glob("*.json")) or any(paths.segments.glob("*.parquet"))


def _set_facts(specs: Sequence[FeatureSpec], attributes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a set record says beside arrays and profile, as the zarr metadata repeats it."""
    layers = {s.digest(): s.layer.name for s in specs}
    facts: dict[str, dict[str, Any]] = {}
    for found in attributes:
        for member, name in (("calibration", "calibrations"), ("quality", "quality")):
            if member in found and found.get("digest") in layers:
                facts.setdefault(name, {})[layers[found["digest"]]] = found[member]
    return facts


def _zarr_attributes(paths: StorePaths) -> list[dict[str, Any]]:
    """Return the attributes of every array of features, from the arrays' own files and the root's."""
    nodes: list[Any] = []
    for path in sorted(paths.zarr.glob("*/*/*/features/zarr.json")):
        nodes.append(_json(path))
    root = _json(paths.zarr / "zarr.json")
    if isinstance(root, dict) and isinstance(root.get("consolidated_metadata"), dict):
        nodes += list((root["consolidated_metadata"].get("metadata") or {}).values())
    attributes = [node.get("attributes") for node in nodes if isinstance(node, dict)]
    return [a for a in attributes if isinstance(a, dict) and "spec" in a]


def _zarr_specs(paths: StorePaths) -> dict[str, FeatureSpec]:
    """Return every spec that zarr metadata repeats, by digest."""
    specs = _dropped_specs(paths)
    for attributes in _zarr_attributes(paths):
        try:
            spec = FeatureSpec.from_json(attributes["spec"])
        except ValidationError:
            continue
        if spec.digest() == attributes.get("digest"):
            specs[spec.digest()] = spec
    return specs


def _dropped_specs(paths: StorePaths) -> dict[str, FeatureSpec]:
    """Return the specs of dropped arrays, which are in no metadata any more, by digest."""
    try:
        specs = [FeatureSpec.from_json(body) for body in read_json(paths.dropped).get("specs", [])]
    except (OSError, FindingsError, ValidationError, TypeError):
        return {}
    return {spec.digest(): spec for spec in specs}


def _dropped_facts(paths: StorePaths) -> list[dict[str, Any]]:
    try:
        facts = read_json(paths.dropped).get("facts", [])
    except (OSError, FindingsError):
        return []
    return [f for f in facts if isinstance(f, dict)] if isinstance(facts, list) else []


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _set_called(name: str, specs: Sequence[FeatureSpec]) -> tuple[FeatureSpec, ...] | None:
    for here in {(s.teacher.name, s.view.name) for s in specs}:
        group = [s for s in specs if (s.teacher.name, s.view.name) == here]
        sizes = range(len(group), 0, -1) if len(group) <= _SUBSETS_MAX else [len(group)]
        for subset in itertools.chain.from_iterable(itertools.combinations(group, n) for n in sizes):
            if set_id(subset) == name:
                return subset
    return None


def recover_commits(paths: StorePaths, manifest: Manifest) -> list[Repaired]:
    """Make commit records good again from the shards themselves; what is not proven is left for ``lost_units``.

    A record of its own is proven by the head. What was compacted is proven by the root of a snapshot as a whole.
    """
    found, head = survey(paths), sound_head(paths)
    done = []
    for unit in lost_units(paths):
        for commit in _rebuilt(found, manifest, unit):
            if propose(paths, paths.commit(*unit), commit.to_json(), head):
                done.append(
                    Repaired(paths.relative(paths.commit(*unit)), "rebuilt from its shards (the head proves it)")
                )
                break
    return done + _recover_by_root(paths, manifest, head)


def _recover_by_root(paths: StorePaths, manifest: Manifest, head: Head | None) -> list[Repaired]:
    found = survey(paths)
    if not (lost := lost_units(paths)):
        return []
    done = []
    for root, content in _candidates(found, head, lost):
        units = [(s, g, n) for s, groups in content.units.items() for g, n in groups.items()]
        missing = [u for u in units if u[2] not in found.ledger.generations.get(u[:2], {})]
        commits = [next(_rebuilt(found, manifest, u, content), None) for u in missing]
        if not missing or any(c is None for c in commits):
            continue
        trial = Ledger(paths, found.ledger.segments, found.ledger.sets, _with(found.ledger, commits))
        try:
            proven = trial.at(content).snapshot() == root
        except MismatchError:
            continue
        for commit in commits if proven else []:
            assert commit is not None
            place = paths.commit(commit.set_id, commit.group, commit.generation)
            propose(paths, place, commit.to_json(), head, proven=True)
            done.append(Repaired(paths.relative(place), f"rebuilt from its shards (snapshot {root[:12]} proves it)"))
        if proven:
            found = survey(paths)
    return done


def _with(ledger: Ledger, commits: Sequence[Commit | None]) -> dict[tuple[str, int], dict[int, Commit]]:
    generations = {unit: dict(known) for unit, known in ledger.generations.items()}
    for commit in commits:
        if commit is not None:
            generations.setdefault((commit.set_id, commit.group), {})[commit.generation] = commit
    return generations


def _candidates(found: Survey, head: Head | None, lost: Sequence[Unit]) -> Iterator[tuple[str, Content]]:
    """Yield roots that are known and what they hold, the head's first."""
    root = head.snapshot if head is not None else ""
    if root in found.snapshots:
        yield root, found.snapshots[root]
    elif root:  # its record is lost too: all there is, with the lost units
        now = found.ledger.content()
        units = {name: dict(groups) for name, groups in now.units.items()}
        for name, group, generation in lost:
            units.setdefault(name, {})[group] = max(generation, units.get(name, {}).get(group, 0))
        yield root, Content(now.tiles, units, now.layers)
    others = ((r, c) for r, c in found.snapshots.items() if r != root)
    yield from sorted(others, key=lambda item: (-sum(map(len, item[1].units.values())), item[0]))


def lost_units(paths: StorePaths) -> list[Unit]:
    """Return the units that were committed, as far as anything says, and have no sound record."""
    found, head = survey(paths), sound_head(paths)
    sound = {(name, group, n) for (name, group), known in found.ledger.generations.items() for n in known}
    names = {p for p in found.damaged if p.startswith("ledger/commits/")}
    names |= {p for p in (head.files if head is not None else {}) if p.startswith("ledger/commits/")}
    lost = {unit for p in names if (unit := _unit_named(p)) is not None}
    root = head.snapshot if head is not None else ""
    contents = [found.snapshots[root]] if root in found.snapshots else []
    if head is None:
        contents = list(found.snapshots.values())
    lost |= {(s, g, n) for c in contents for s, groups in c.units.items() for g, n in groups.items()}
    if not contents and any(p.startswith("ledger/segments/") for p in found.damaged):
        lost |= {(name, g, 0) for name in found.ledger.sets for g in _groups_on_disk(found, name)
                 if g not in found.ledger.commits[name]}  # fmt: skip
    return sorted(u for u in lost - sound if u[0] in found.ledger.sets)


def _unit_named(path: str) -> Unit | None:
    name, _, file = path.removeprefix("ledger/commits/").partition("/")
    group, _, generation = file.removesuffix(".json").partition("-")
    numbers = group, generation or "0"
    return (name, int(numbers[0]), int(numbers[1])) if all(n.isdecimal() for n in numbers) else None


def _groups_on_disk(found: Survey, name: str) -> set[int]:
    groups = []
    for spec in found.ledger.live(name):
        folder = found.paths.shard(spec.key, 0).parents[3]
        groups.append({int(p.name) for p in folder.glob("*") if p.name.isdecimal()} if folder.is_dir() else set())
    return set.intersection(*groups) if groups else set()


def _rebuilt(found: Survey, manifest: Manifest, unit: Unit, content: Content | None = None) -> Iterator[Commit]:
    """Yield the commit that the shards of ``unit`` amount to, once for each numerics profile it can have been."""
    name, group, generation = unit
    ledger, specs = found.ledger, found.ledger.live(unit[0])
    if content is not None:
        specs = [s for s in ledger.sets[name].arrays.specs if s.layer.name in content.layers.get(name, ())]
    first, stop = group * manifest.group_rows, min((group + 1) * manifest.group_rows, len(ledger.table))
    rows = [r for r in range(first, stop) if ledger.table.records[r] is not None]
    try:
        shards = tuple(
            shard for s in sorted(specs, key=_layer) for shard in _shards(ledger, s, group, manifest.group_rows)
        )
    except (FindingsError, FileNotFoundError):
        return
    if not rows or not shards:
        return
    profiles: dict[NumericsProfile, None] = {ledger.sets[name].profile: None}
    profiles |= {c.profile: None for c in found.commits if c.set_id == name}
    for profile in profiles:
        yield Commit(name, group, first, rows[-1] + 1, profile, shards, generation)


def _layer(spec: FeatureSpec) -> str:
    return spec.layer.name


def _shards(ledger: Ledger, spec: FeatureSpec, group: int, group_rows: int) -> Iterator[ShardRecord]:
    """Yield the records of an array's shards on disk: statistics are summed in row order, as their writer did."""
    paths, parts = ledger.paths, parts_of(spec)
    readers = {p: ShardReader(paths.shard(spec.key, group, p), shard_layout(spec, group_rows, p)) for p in parts}
    held = {p: np.empty((*spec.grid, r.layout.channels), r.layout.dtype) for p, r in readers.items()}
    codec, stats = ledger.codec(spec), ChannelStats.empty(spec.layer.channels)
    for row in np.flatnonzero(readers["features"].present) if codec.counted else ():
        for part, reader in readers.items():
            reader.read(int(row), 0, 0, held[part])
        stats.add(codec.decode(Codes(held["features"], held["scale"][..., 0] if "scale" in held else None)))
    for part in parts:
        place = paths.shard(spec.key, group, part)
        known = stats if part == "features" else ChannelStats.empty(0)
        yield ShardRecord(_layer(spec), paths.relative(place), place.stat().st_size, sha256_file(place), known)


def forget_units(paths: StorePaths, units: Sequence[Unit]) -> list[Repaired]:
    """Remove damaged commit records and segments that could not be rebuilt, so that ``units`` can be encoded again."""
    done = []
    for path in sorted(survey(paths).damaged):
        if path.startswith(("ledger/commits/", "ledger/segments/")) and (paths.root / path).is_file():
            discard(paths.root / path)
            still = path.startswith("ledger/segments/") or _unit_named(path) in units
            what = "; its units are encoded again" if still and units else ""
            done.append(Repaired(path, f"removed, damaged{what}"))
    return done


def recover_dropped(paths: StorePaths) -> list[Repaired]:
    """Make the list of dropped arrays good again: those that the zarr metadata has not; a snapshot's root proves it."""
    found, head = survey(paths), sound_head(paths)
    name = paths.relative(paths.dropped)
    listed = head is not None and name in head.files
    if name not in found.damaged and (paths.dropped.is_file() or not listed):
        return []
    live = set(_zarr_specs(paths))
    gone = [(n, s.layer.name) for n, r in found.ledger.sets.items() for s in r.arrays.specs if s.digest() not in live]
    guess = Ledger(paths, found.ledger.segments, found.ledger.sets, found.ledger.generations, frozenset(gone))
    value = guess.dropped_json()
    roots = {*found.snapshots, head.snapshot if head is not None else ""}
    if propose(paths, paths.dropped, value, head) or (
        guess.snapshot() in roots and propose(paths, paths.dropped, value, head, proven=True)
    ):
        return [Repaired(name, "rebuilt from the zarr metadata")]
    return []


def recover_snapshots(paths: StorePaths, manifest: Manifest) -> list[Repaired]:
    """Make snapshot records good again by finding the part of the store that has the root of their name.

    Earlier contents are the first tile segments of some teachers. What is not found is removed, unless it is pinned.
    """
    found, head = survey(paths), sound_head(paths)
    lost = {Path(p).stem for p in found.damaged if p.startswith("ledger/snapshots/")}
    listed = {Path(p).stem for p in (head.files if head is not None else {}) if p.startswith("ledger/snapshots/")}
    lost |= {root for root in listed if not paths.snapshot(root).is_file()}
    done = []
    for content in _parts(found.ledger, manifest.group_rows) if lost else ():
        root = found.ledger.at(content).snapshot()
        if root in lost:
            propose(paths, paths.snapshot(root), {"snapshot": root, **content.to_json()}, head, proven=True)
            done.append(Repaired(paths.relative(paths.snapshot(root)), "rebuilt: its root proves what it holds"))
            lost.remove(root)
        if not lost:
            break
    for root in sorted(lost - found.pinned):
        if paths.snapshot(root).is_file():
            discard(paths.snapshot(root))
            done.append(Repaired(paths.relative(paths.snapshot(root)), "removed: what it named is not known any more"))
    return done


def _parts(ledger: Ledger, group_rows: int) -> Iterator[Content]:
    """Yield contents that the store may have had: all of it first, then fewer tiles, then fewer teachers."""
    now = ledger.content()
    teacher = {name: r.arrays.specs[0].teacher.name for name, r in ledger.sets.items()}
    names = sorted(set(teacher.values()))
    choices = [set(c) for n in range(len(names), 0, -1) for c in itertools.combinations(names, n)]
    for chosen in choices[:64]:
        for count in range(len(now.tiles), 0, -1):
            end = now.tiles[count] // group_rows if count < len(now.tiles) else 2**62
            units = {n: {g: v for g, v in u.items() if g < end} for n, u in now.units.items() if teacher[n] in chosen}
            layers = {n: v for n, v in now.layers.items() if teacher[n] in chosen}
            yield Content(now.tiles[:count], units, layers)
