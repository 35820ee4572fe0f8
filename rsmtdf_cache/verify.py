"""Audit a store: ledger against shards against checksums. Needs no teacher and no images (decision 12)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.files import read_json, sha256_file
from rsmtdf_cache.layout import StorePaths, shard_layout
from rsmtdf_cache.ledger import Ledger, ShardRecord
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.specs import FeatureSpec

__all__ = ["Finding", "verify_store"]


@dataclass(frozen=True)
class Finding:
    """One fault: the file (below the store) and what is wrong with it."""

    path: str
    fault: str


def verify_store(root: Path, deep: bool = False, on_event: EventSink = ignore_events) -> list[Finding]:
    """Return the faults of the store at ``root``; an empty list means none was found.

    Always: manifest, every ledger record and the tile table against their checksums, derived metadata against its
    list, every committed shard there with its size and a sound index, no file that nothing lists. ``deep``: also the
    sha256 of every shard. Raises ``UsageError`` or ``MismatchError`` when there is no store at ``root``.
    """
    paths = StorePaths(root)
    try:
        manifest = load_manifest(paths)
    except FindingsError as error:
        return [Finding("manifest.json", str(error))]
    findings = list(_damaged_records(paths))
    if findings:
        return findings
    try:
        ledger = Ledger.load(paths)
    except FindingsError as error:
        return [Finding("ledger", str(error))]
    listed = {"manifest.json", "ledger/build.lock", "ledger/derived.json", "ledger/quarantine.json"}
    listed |= {paths.relative(p) for p in _record_files(paths)}
    listed |= {f"ledger/tiles/{read_json(p)['file']}" for p in (paths.ledger / "tiles").glob("*.json")}
    specs = ledger.specs()
    shards = [
        (spec, commit.start, record)
        for name, units in ledger.commits.items()
        for commit in units.values()
        for record in commit.shards
        for spec in ledger.sets[name].arrays.specs
        if spec.layer.name == record.layer
    ]
    for name, groups in ledger.commits.items():
        layers = {s.layer.name for s in ledger.sets[name].arrays.specs}
        for group, commit in groups.items():
            if {s.layer for s in commit.shards} != layers:
                findings.append(
                    Finding(paths.relative(paths.commit(name, group)), "does not name every layer of its set")
                )
    derived, faults = _derived_faults(paths)
    findings += faults
    listed |= derived
    on_event(ProgressStart("verify", "checking shards", len(shards), unit="shards"))

    def check(item: tuple[FeatureSpec, int, ShardRecord]) -> Finding | None:
        spec, start, record = item
        expected = paths.relative(paths.shard(spec.key, start // manifest.group_rows))
        return _shard_fault(paths, spec, record, expected, manifest.group_rows, deep)

    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        for item, fault in zip(shards, pool.map(check, shards), strict=True):
            listed.add(item[2].path)
            findings += [fault] if fault else []
            on_event(Progress("verify", 1, item[2].nbytes))
    on_event(ProgressEnd("verify"))
    findings += [Finding(p, "no record lists this file") for p in _all_files(root) if p not in listed]
    if not specs and not findings:
        findings.append(Finding("ledger", "the store holds no array yet; run `rsmtdf cache build` again"))
    return sorted(findings, key=lambda f: (f.path, f.fault))


def _record_files(paths: StorePaths) -> Iterator[Path]:
    for pattern in ("tiles/*.json", "sets/*.json", "commits/*/*.json"):
        yield from sorted(paths.ledger.glob(pattern))


def _damaged_records(paths: StorePaths) -> Iterator[Finding]:
    for path in [*_record_files(paths), *([paths.quarantine] if paths.quarantine.is_file() else [])]:
        try:
            read_json(path)
        except FindingsError as error:
            yield Finding(paths.relative(path), str(error))


def _derived_faults(paths: StorePaths) -> tuple[set[str], list[Finding]]:
    name = paths.relative(paths.derived)
    if not paths.derived.is_file():
        return set(), [Finding(name, "missing: the build did not get that far; `rsmtdf cache build` writes it")]
    try:
        files = read_json(paths.derived)["files"]
    except FindingsError as error:
        return set(), [Finding(name, str(error))]
    faults = []
    for path, digest in files.items():
        place = paths.root / path
        if ".." in Path(path).parts or not place.is_file():
            faults.append(Finding(path, "missing; `rsmtdf cache build` writes it again"))
        elif sha256_file(place) != digest:
            faults.append(Finding(path, "damaged (sha256 differs); `rsmtdf cache build` writes it again"))
    return set(files), faults


def _shard_fault(
    paths: StorePaths, spec: FeatureSpec, record: ShardRecord, expected: str, group_rows: int, deep: bool
) -> Finding | None:
    if record.path != expected:
        return Finding(record.path, f"the record of {spec.key} should name {expected}")
    place = paths.root / record.path
    if not place.is_file():
        return Finding(record.path, "a committed shard is missing")
    if place.stat().st_size != record.nbytes:
        return Finding(record.path, f"{place.stat().st_size} bytes, committed were {record.nbytes}")
    if deep and sha256_file(place) != record.sha256:
        return Finding(record.path, "its bytes are not those that were committed (sha256 differs)")
    try:
        ShardReader(place, shard_layout(spec, group_rows))
    except FindingsError as error:
        return Finding(record.path, str(error))
    return None


def _all_files(root: Path) -> Iterator[str]:
    for folder, _, names in os.walk(root):
        if Path(folder) == root / "tmp":
            continue
        for name in names:
            path = Path(folder, name).relative_to(root)
            if path.parts[0] not in ("tmp", "pins"):
                yield path.as_posix()
