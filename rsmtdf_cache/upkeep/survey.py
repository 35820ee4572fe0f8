"""Read a store record by record: what is sound becomes a ledger, what is not becomes a finding that names the file.

``Ledger.load`` refuses a store with one damaged record; an audit and a repair need all the others too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.files import read_json, sha256_file
from rsmtdf_cache.head import Head, read_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.records import Commit, SetRecord, read_commit, read_dropped, read_set, read_snapshot
from rsmtdf_cache.segment import read_segment_commits
from rsmtdf_cache.tiles import TileRecord, TileTable, read_segment
from rsmtdf_cache.upkeep.pins import Pin

__all__ = ["Finding", "Survey", "survey"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Finding:
    """One fault: the file (below the store) and what is wrong with it."""

    path: str
    fault: str


@dataclass
class Survey:
    """What can be read of a store. ``ledger`` holds the sound records only; ``commits`` also those of unknown sets.

    ``snapshots``: what each recorded root is said to hold. ``pinned``: roots that a pin protects.
    """

    paths: StorePaths
    ledger: Ledger
    head: Head | None = None
    commits: list[Commit] = field(default_factory=list)
    snapshots: dict[str, Content] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)

    @property
    def damaged(self) -> set[str]:
        """Paths below the store that have a finding."""
        return {f.path for f in self.findings}

    def then(self, root: str) -> Ledger:
        """Return the ledger as of the recorded snapshot ``root``. Raises ``MismatchError`` when a record is gone."""
        return self.ledger.at(self.snapshots[root])


def survey(paths: StorePaths) -> Survey:
    """Return what the records of the store say and which of them are damaged. Shards are not touched."""
    found = Survey(paths, Ledger(paths))
    # Against the order of publication, like ``Ledger.load``: nothing names what was not read yet.
    found.commits = list(_each(found, sorted((paths.ledger / "commits").glob("*/*.json")), read_commit))
    for part in _each(found, _visible(paths.segments, "*.parquet"), lambda p: read_segment_commits(p, again=True)):
        found.commits += part
    dropped = next(_each(found, _present(paths.dropped), read_dropped), frozenset())
    sets = {s.arrays.id: s for s in _each(found, sorted((paths.ledger / "sets").glob("*.json")), read_set)}
    generations: dict[tuple[str, int], dict[int, Commit]] = {}
    for commit in found.commits:
        if commit.set_id in sets:
            known = generations.setdefault((commit.set_id, commit.group), {})
            if commit.generation not in known or _thin(known[commit.generation]):
                known[commit.generation] = commit
        else:
            path = paths.relative(paths.array_set(commit.set_id))
            if path not in found.damaged:
                found.findings.append(Finding(path, "missing: commits of this array set are here"))
    found.ledger = _ledger(found, _segments(found), sets, generations, dropped)
    found.findings += _calibration_faults(found)
    list(_each(found, _present(paths.quarantine), _read_quarantine))
    found.head = next(_each(found, _present(paths.head), lambda _: _written_as_is(paths.head, read_head(paths))), None)
    for root, content in _each(found, sorted(paths.snapshots.glob("*.json")), lambda p: (p.stem, read_snapshot(p))):
        found.snapshots[root] = content
    for pin in _each(found, sorted(paths.pins.glob("*.json")), lambda p: _written_as_is(p, _read_pin(p))):
        found.pinned |= set() if pin.expired() else {pin.snapshot}
    _compare_snapshots(found)
    return found


def _each(found: Survey, files: Sequence[Path], read: Callable[[Path], _T]) -> Iterator[_T]:
    """Yield ``read(file)`` of every sound file; the others become findings. What a builder just removed is no file."""
    for path in files:
        try:
            yield read(path)
        except FileNotFoundError:
            continue
        except FindingsError as error:
            found.findings.append(Finding(found.paths.relative(path), _fault(path, error)))


def _fault(path: Path, error: FindingsError) -> str:
    return str(error).removeprefix(f"{path}: ").removesuffix("; run `rsmtdf cache verify` on the store")


def _visible(folder: Path, pattern: str) -> list[Path]:
    return sorted(p for p in folder.glob(pattern) if not p.name.startswith("."))


def _present(path: Path) -> list[Path]:
    return [path] if path.is_file() else []


def _thin(commit: Commit) -> bool:
    return any(s.stats is None for s in commit.shards)


def _read_quarantine(path: Path) -> None:
    if not isinstance(read_json(path).get("tiles"), dict):
        raise FindingsError(f"{path}: not a list of quarantined tiles")


def _read_pin(path: Path) -> Pin:
    try:
        pin = Pin(path.stem, **read_json(path))
        pin.expired()
    except (TypeError, ValueError) as error:
        raise FindingsError(f"{path}: not the pin it should be ({error})") from None
    return pin


def _written_as_is(path: Path, value: _T) -> _T:
    """Return ``value`` when the bytes of ``path`` are exactly what is written for it.

    The checksum is of the meaning: a letter of an escape or exponent in the other case would pass it, and nothing else
    vouches for these files.
    """
    data = path.read_bytes()
    if (json.dumps(json.loads(data), sort_keys=True, indent=1) + "\n").encode() != data:
        raise FindingsError(f"{path}: its bytes are not as they were written")
    return value


def _segments(found: Survey) -> dict[int, Sequence[TileRecord]]:
    segments: dict[int, Sequence[TileRecord]] = {}
    for path, body in _each(found, sorted((found.paths.ledger / "tiles").glob("*.json")), _read_tile_record):
        file = path.with_suffix(".parquet")
        name = found.paths.relative(file)
        try:
            if sha256_file(file) != body["sha256"]:
                raise FindingsError(f"{file}: the tile table is damaged (its sha256 is not the recorded one)")
            records = read_segment(file, body["rows"], body.get("splits"))
            records.check()
        except FileNotFoundError:
            found.findings.append(Finding(name, "missing: this part of the tile table is recorded"))
        except FindingsError as error:
            found.findings.append(Finding(name, _fault(file, error)))
        else:
            segments[int(body["first_row"])] = records
    return segments


def _read_tile_record(path: Path) -> tuple[Path, dict[str, Any]]:
    body = read_json(path)
    sound = isinstance(body.get("first_row"), int) and isinstance(body.get("rows"), int)
    if not sound or path.stem != f"{body['first_row']:010d}" or body.get("file") != f"{path.stem}.parquet":
        raise FindingsError(f"{path}: not the tile segment record it should be")
    return path, body


def _calibration_faults(found: Survey) -> Iterator[Finding]:
    """Yield the calibrations that set records name and that are missing or damaged."""
    for digest in sorted({d for record in found.ledger.sets.values() for d in record.calibrations.values()}):
        try:
            found.ledger.calibration(digest)
        except FindingsError as error:
            path = found.paths.calibration(digest)
            yield Finding(found.paths.relative(path), _fault(path, error))


def _ledger(
    found: Survey, segments: dict[int, Sequence[TileRecord]], sets: dict[str, SetRecord],
    generations: dict[tuple[str, int], dict[int, Commit]], dropped: frozenset[tuple[str, str]],
) -> Ledger:  # fmt: skip
    try:
        TileTable(list(segments.items())).check()
    except FindingsError as error:
        found.findings.append(Finding("ledger/tiles", str(error)))
        segments = {}
    return Ledger(found.paths, segments, sets, generations, dropped)


def _compare_snapshots(found: Survey) -> None:
    """A recorded snapshot that can still be read has the root of its name; a pinned one can be read."""
    if any(f.path.split("/")[1:2] in (["tiles"], ["sets"], ["commits"], ["segments"]) for f in found.findings):
        return  # what is missing is named already
    for root in sorted({*found.snapshots, *found.pinned}):
        path = found.paths.relative(found.paths.snapshot(root))
        if root not in found.snapshots:
            if path not in found.damaged:
                found.findings.append(Finding(path, "missing: a pin protects this snapshot"))
            continue
        try:
            now = found.then(root).snapshot()
        except MismatchError as error:
            if root in found.pinned:
                found.findings.append(Finding(path, f"pinned, but no longer there: {error}"))
            continue
        if now != root:
            found.findings.append(Finding(path, f"what it names has the root {now}"))
