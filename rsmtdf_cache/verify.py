"""Audit a store: ledger against shards against checksums. Needs no teacher and no images (decision 12)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import is_locked, sha256_file
from rsmtdf_cache.head import content_lost, record_files
from rsmtdf_cache.layout import PARTS, StorePaths, contradiction, parts_of, shard_layout
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.manifest import Manifest, load_manifest
from rsmtdf_cache.pixel_units import changed_tile
from rsmtdf_cache.pixels import RGB, is_pixels
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.specs import FeatureSpec
from rsmtdf_cache.tiles import TileTable
from rsmtdf_cache.upkeep.survey import Finding, Survey, survey

__all__ = ["Finding", "LEFT", "ORPHAN", "ShardCheck", "audit", "check_shards", "shard_checks", "verify_store"]

#: The fault of a shard that no record names, when records are missing.
ORPHAN = "no record names it, and records are missing: `rsmtdf cache verify --repair` looks for them"
#: The fault of a file that is no damage: a builder was stopped before it was recorded.
LEFT = "left by an interrupted build; the same `cache build` or `cache gc` removes it"
_DERIVED = "`rsmtdf cache build` or `verify --repair` writes it again"
_DRAFT = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # of files.replace_file


@dataclass(frozen=True)
class ShardCheck:
    """One committed shard and what it must be. ``live``: its array was not dropped, so it must be there.

    ``tiles``: the store's tile table, which has a digest of all pixels.
    """

    spec: FeatureSpec
    commit: Commit
    record: ShardRecord
    live: bool = True
    tiles: TileTable = field(default_factory=TileTable, repr=False)


def verify_store(root: Path, deep: bool = False, on_event: EventSink = ignore_events) -> list[Finding]:
    """Return the faults of the store at ``root``; an empty list means none was found.

    Always: manifest, every record, pin and the tile table against their checksums, the head against every file it
    lists, recorded snapshots against their roots, committed rows against their group and the tile table, every
    committed shard there with its size and a sound index, no link, no file that nothing lists. ``deep``: also the
    sha256 of every shard, and stored pixels against the digests of the tile table. While a builder works on the store,
    what it is about to commit or to list is no finding. Raises ``UsageError`` or ``MismatchError`` when there is no
    store at ``root``.
    """
    paths = StorePaths(root)
    builder = is_locked(paths.lock)
    if not paths.manifest.is_file() and paths.head.is_file():
        return [Finding("manifest.json", "missing; `rsmtdf cache verify --repair` rebuilds it")]
    try:
        manifest = load_manifest(paths)
    except FindingsError as error:
        return [Finding("manifest.json", str(error).removeprefix(f"{paths.manifest}: "))]
    if builder:
        on_event(Warned(f"{root}: a builder works on it; its head and what is not committed yet are left out"))
    found = survey(paths)
    findings = audit(found, manifest, builder)
    findings += [f for _, f in check_shards(paths, shard_checks(found.ledger), manifest, deep, on_event)]
    if not found.ledger.specs() and not found.snapshots and not findings:
        findings.append(Finding("ledger", "the store holds no array yet; run `rsmtdf cache build` again"))
    return sorted(set(findings), key=lambda f: (f.path, f.fault))


def audit(found: Survey, manifest: Manifest, builder: bool) -> list[Finding]:
    """Return the faults of everything but the shards' content. ``builder``: somebody is writing to the store."""
    findings = list(found.findings)
    findings += _row_faults(found, manifest)
    findings += [] if builder else _head_faults(found)
    findings += _unlisted(found, builder)
    return findings


def shard_checks(ledger: Ledger) -> list[ShardCheck]:
    """Return every shard of the latest generations; those of dropped arrays too, unless others lie there now."""
    checks = [
        ShardCheck(spec, commit, record, (name, record.layer) not in ledger.dropped, ledger.table)
        for name, units in ledger.commits.items()
        for _, commit in sorted(units.items())
        for record in commit.shards
        for spec in ledger.sets[name].arrays.specs
        if spec.layer.name == record.layer
    ]
    taken = {check.record.path for check in checks if check.live}
    return [check for check in checks if check.live or check.record.path not in taken]


def check_shards(
    paths: StorePaths, checks: list[ShardCheck], manifest: Manifest, deep: bool, on_event: EventSink
) -> list[tuple[ShardCheck, Finding]]:
    """Return the shards that have a fault, with it. Shards of dropped arrays may be absent, not damaged."""
    faults = []
    on_event(ProgressStart("verify", "checking shards", len(checks), unit="shards"))
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        results = pool.map(lambda check: _shard_fault(paths, check, manifest.group_rows, deep), checks)
        for check, fault in zip(checks, results, strict=True):
            if fault is not None:
                faults.append((check, Finding(check.record.path, fault)))
            on_event(Progress("verify", 1, check.record.nbytes))
    on_event(ProgressEnd("verify"))
    return faults


def _shard_fault(paths: StorePaths, check: ShardCheck, group_rows: int, deep: bool) -> str | None:
    part = check.record.part
    place = paths.shard(check.spec.key, check.commit.group, part)
    if check.record.path != paths.relative(place):
        return f"the record of {check.spec.key} should name {paths.relative(place)}"
    if place.is_symlink() or not place.is_file():
        return "a committed shard is missing" if check.live or place.is_symlink() else None
    nbytes = place.stat().st_size
    if nbytes != check.record.nbytes:
        return f"{nbytes} bytes, committed were {check.record.nbytes}"
    if deep and sha256_file(place) != check.record.sha256:
        return "its bytes are not those that were committed (sha256 differs)"
    try:
        reader = ShardReader(place, shard_layout(check.spec, group_rows, part))
        if deep:
            reader.check_chunks()
            if is_pixels(check.spec) and check.spec.layer.name == RGB:
                changed = changed_tile(reader, check.commit.start, check.tiles)
                if changed is not None:
                    return f"the pixels of tile {changed!r} are not those of the tile table (their digest differs)"
    except FindingsError as error:
        return str(error).removeprefix(f"{place}: ")
    if reader.present[check.commit.stop - check.commit.start :].any():
        return f"it holds rows beyond those committed, {check.commit.start} to {check.commit.stop}"
    return None


def _row_faults(found: Survey, manifest: Manifest) -> Iterator[Finding]:
    ledger, paths = found.ledger, found.paths
    whole = not any(f.path.startswith("ledger/tiles") for f in found.findings)
    for name, units in ledger.commits.items():
        live = {s.layer.name for s in ledger.live(name)}
        for spec in ledger.sets[name].arrays.specs:
            if wrong := contradiction(spec, manifest.tile_px):
                yield Finding(paths.relative(paths.array_set(name)), f"{spec.key}: {wrong}")
        parts = {s.layer.name: parts_of(s) for s in ledger.sets[name].arrays.specs}
        for group, commit in units.items():
            first, layers = group * manifest.group_rows, {s.layer for s in commit.shards}
            place = paths.relative(paths.commit(name, group, commit.generation))
            wanted = sorted((layer, part) for layer in layers & parts.keys() for part in parts[layer])
            if not live <= layers <= parts.keys() or sorted((s.layer, s.part) for s in commit.shards) != wanted:
                yield Finding(place, "does not name every layer of its set once")
            if commit.start != first or not first < commit.stop <= first + manifest.group_rows:
                yield Finding(place, f"rows {commit.start} to {commit.stop} are not of row group {group}")
            elif whole and (commit.stop > len(ledger.table) or ledger.table.records[commit.stop - 1] is None):
                yield Finding(place, f"rows {commit.start} to {commit.stop} are not in the tile table")


def _head_faults(found: Survey) -> Iterator[Finding]:
    paths, head = found.paths, found.head
    name = paths.relative(paths.head)
    if head is None:
        if not paths.head.is_file():
            yield Finding(name, f"missing: the last operation did not get that far; {_DERIVED}")
        return
    for path, (nbytes, digest) in sorted(head.files.items()):
        place = paths.root / path
        if Path(path).is_absolute() or ".." in Path(path).parts:
            yield Finding(name, f"it lists {path!r}, which is outside the store")
        elif path in found.damaged:
            continue
        elif not place.is_file():
            if not _moved(found, path):
                yield Finding(
                    path, f"missing; {_DERIVED}" if path.startswith("zarr/") else "missing: the head lists it"
                )
        elif place in (paths.quarantine, paths.dropped):
            continue  # replaced before the head is; their own checksum holds
        elif place.stat().st_size != nbytes or sha256_file(place) != digest:
            yield Finding(path, "damaged (not the bytes the head lists)"
                          + (f"; {_DERIVED}" if path.startswith("zarr/") else ""))  # fmt: skip
    records = {paths.relative(p) for p in record_files(paths)}
    same = records == {p for p in head.files if not p.startswith("zarr/")}
    if same and not found.findings and found.ledger.snapshot() != head.snapshot:
        yield Finding(name, f"its snapshot is {head.snapshot}, the ledger's {found.ledger.snapshot()}")


def _moved(found: Survey, path: str) -> bool:
    """Whether a ledger file that the head lists was folded into a segment since, and nothing of it is lost."""
    parts = path.split("/")
    if parts[:2] == ["ledger", "commits"] and len(parts) == 4:
        group, _, generation = parts[3].removesuffix(".json").partition("-")
        return any((c.set_id, f"{c.group:08d}", str(c.generation)) == (parts[2], group, generation or "0")
                   for c in found.commits)  # fmt: skip
    head = found.head
    if parts[:2] != ["ledger", "segments"] or head is None:
        return False
    if head.snapshot not in found.snapshots:  # a build was stopped: what it compacted is in a segment the head lacks
        return any(found.paths.relative(p) not in head.files for p in found.paths.segments.glob("[0-9a-f]*.parquet"))
    try:
        return found.then(head.snapshot).snapshot() == head.snapshot
    except MismatchError:
        return False


def _unlisted(found: Survey, builder: bool) -> Iterator[Finding]:
    """Yield links, files that nothing lists, and shards that no record names."""
    paths, ledger = found.paths, found.ledger
    listed = {paths.relative(p) for p in (*record_files(paths), paths.head, paths.lock, paths.lease)}
    listed |= {paths.relative(p) for p in paths.pins.glob("*.json") if not p.name.startswith(".")}
    listed |= {s.path for known in ledger.generations.values() for c in known.values() for s in c.shards}
    listed |= set(found.head.files) if found.head is not None else set()
    specs = [s for record in ledger.sets.values() for s in record.arrays.specs]
    arrays = {f"zarr/{s.key}/{part}/c/" for s in specs for part in PARTS}
    listed -= {paths.relative(p) for p in (paths.ledger / "tiles").glob("*.parquet")
               if not p.with_suffix(".json").exists()}  # fmt: skip
    lossy = _is_lossy(found)
    for path, is_link in _all_files(paths.root):
        shard = path.partition("/scale/c/" if "/scale/c/" in path else "/features/c/")
        if is_link:
            yield Finding(path, "a link, which a store never holds")
        elif path in listed or (builder and not shard[1]):
            continue
        elif shard[0] + shard[1] in arrays and re.fullmatch(r"\d+/0/0(/0)?", shard[2]):
            if not builder:
                yield Finding(path, ORPHAN if lossy else LEFT)
        elif found.head is None and path.startswith("zarr/") and not shard[1]:
            continue  # without the head nobody knows; that it is missing is a finding already
        elif _DRAFT.fullmatch(Path(path).name):
            yield Finding(path, LEFT)
        elif path.startswith("ledger/tiles/"):
            yield Finding(path, ORPHAN if lossy else LEFT)
        else:
            yield Finding(path, "no record lists this file")


def _is_lossy(found: Survey) -> bool:
    """Whether records that the head's snapshot is made of are missing: what looks like rubbish may be named by them."""
    return bool(found.findings) if found.head is None else bool(content_lost(found.head.content, found.ledger))


def _all_files(root: Path) -> Iterator[tuple[str, bool]]:
    """Yield every file and link below ``root``, but in ``tmp/``, and whether it is a link. No link is followed."""
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        if here == root and not (root / "tmp").is_symlink():
            folders[:] = [f for f in folders if f != "tmp"]
        for name in [*names, *(f for f in folders if (here / f).is_symlink())]:
            path = here / name
            yield path.relative_to(root).as_posix(), path.is_symlink()
