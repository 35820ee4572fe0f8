"""What a collection would delete, and why: everything but the current content and what unexpired pins protect."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import FindingsError, MismatchError
from rsmtdf_cache.files import is_locked
from rsmtdf_cache.head import find_snapshot, load_whole
from rsmtdf_cache.layout import PARTS, StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.segment import read_segment_commits
from rsmtdf_cache.upkeep.pins import Pin, list_pins, named_shards

__all__ = ["DRAFT", "Doomed", "GcPlan", "PinHold", "plan_gc", "plan_of"]

_DROPPED = "dropped array"
_SUPERSEDED = "superseded generation"
_UNRECORDED = "left by a killed build"
_SNAPSHOT = "snapshot without its data"
_EXPIRED = "expired pin"
DRAFT = "draft"

#: What ``files.replace_file`` leaves when it is killed.
_DRAFT = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")

_Unit = tuple[str, int, int]  # set, row group, generation


@dataclass(frozen=True)
class Doomed:
    """A file that a collection deletes, and why. ``freed`` is 0 for a file that has a second name elsewhere."""

    path: str
    nbytes: int
    freed: int
    reason: str


@dataclass(frozen=True)
class PinHold:
    """What a pin keeps that the current content does not need."""

    name: str
    owner: str
    snapshot: str
    expires: str | None
    shards: int
    nbytes: int


@dataclass
class GcPlan:
    """What a collection deletes.

    ``rewritten``: compacted segments that are written again without what goes. ``holds``: the pins that count.
    ``sets``: array sets that go. ``units``: (set, row group, generation) of the commits that stay.
    """

    store: str
    files: list[Doomed] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    holds: list[PinHold] = field(default_factory=list)
    sets: list[str] = field(default_factory=list)
    units: frozenset[_Unit] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes that the disk gets back."""
        return sum(f.freed for f in self.files)

    def reasons(self) -> dict[str, dict[str, int]]:
        """Return files and bytes per reason."""
        files = Counter(f.reason for f in self.files)
        return {r: {"files": n, "nbytes": sum(f.freed for f in self.files if f.reason == r)} for r, n in files.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "store": self.store, "nbytes": self.nbytes, "reasons": self.reasons(), "sets_removed": self.sets,
            "segments_rewritten": self.rewritten, "pins": [asdict(h) for h in self.holds],
            "files": [asdict(f) for f in self.files],
        }  # fmt: skip


def plan_gc(root: Path | str) -> GcPlan:
    """Return what ``collect`` would delete now. While a builder works, what it may be writing is left out.

    Raises ``FindingsError`` when a pin, or what it protects, cannot be read: then nothing may be deleted.
    """
    paths = StorePaths(Path(root))
    load_manifest(paths)
    return plan_of(paths, load_whole(paths), alone=not is_locked(paths.lock))


def plan_of(paths: StorePaths, ledger: Ledger, alone: bool) -> GcPlan:
    """Return the plan; ``alone``: nobody else is writing, so what no record names is nobody's."""
    plan = GcPlan(str(paths.root))
    pins = list_pins(paths.root)
    current, views = _views(paths, ledger, pins)
    shards = {snapshot: named_shards(view) for snapshot, view in views.items()}
    keep = {path for named in shards.values() for path in named}
    contents = [view.content() for view in views.values()]
    plan.units = frozenset((s, g, n) for c in contents for s, units in c.units.items() for g, n in units.items())
    sets = {name for content in contents for name in content.layers}
    for pin in pins:
        if pin.expired():
            plan.files += _doomed(paths, [paths.pin(pin.name)], _EXPIRED)
        else:
            held = {path: n for path, n in shards[pin.snapshot].items() if path not in shards[current]}
            hold = PinHold(pin.name, pin.owner, pin.snapshot, pin.expires, len(held), sum(held.values()))
            plan.holds.append(hold)
    plan.sets = sorted(set(ledger.sets) - sets)
    plan.files += _doomed(paths, [paths.array_set(name) for name in plan.sets], _DROPPED)
    for (name, group), generations in sorted(ledger.generations.items()):
        for generation in generations:
            if (name, group, generation) not in plan.units:
                place = paths.commit(name, group, generation)
                plan.files += _doomed(paths, [place], _SUPERSEDED if name in sets else _DROPPED)
    needed = {d for name in sets for d in ledger.sets[name].calibrations.values()}
    calibrations = sorted(paths.calibration("*").parent.glob("*.safetensors"))
    plan.files += _doomed(paths, [p for p in calibrations if p.stem not in needed and alone], _DROPPED)
    for path in sorted(paths.segments.glob("*.parquet")):
        if any((c.set_id, c.group, c.generation) not in plan.units for c in read_segment_commits(path)):
            plan.rewritten.append(paths.relative(path))
            plan.files += _doomed(paths, [path], _SUPERSEDED)
    named = {s.path for known in ledger.generations.values() for c in known.values() for s in c.shards}
    for path in _shard_files(paths):
        if paths.relative(path) not in keep and (alone or paths.relative(path) in named):
            plan.files += _doomed(paths, [path], _DROPPED if paths.relative(path) in named else _UNRECORDED)
    for path in sorted(paths.snapshots.glob("*.json")):
        if path.stem not in views and not _complete(paths, ledger, path.stem, plan.units, keep):
            plan.files += _doomed(paths, [path], _SNAPSHOT)
    if alone:
        plan.files += _doomed(paths, _draft_files(paths), DRAFT)
    return plan


def _views(paths: StorePaths, ledger: Ledger, pins: list[Pin]) -> tuple[str, dict[str, Ledger]]:
    """Return the current snapshot, and by snapshot the ledgers of all that must stay: now, and what pins protect."""
    current = ledger.snapshot()
    views = {current: ledger}
    for pin in pins:
        if pin.expired() or pin.snapshot in views:
            continue
        try:
            views[pin.snapshot] = find_snapshot(paths, ledger, pin.snapshot)
        except (FindingsError, MismatchError) as error:
            raise FindingsError(
                f"what pin {pin.name!r} protects cannot be read, so nothing is deleted: {error}; repair the store, or "
                f"give the pin up: `rsmtdf cache unpin {paths.root} {pin.name}`"
            ) from None
    return current, views


def _complete(paths: StorePaths, ledger: Ledger, snapshot: str, units: frozenset[_Unit], keep: set[str]) -> bool:
    """Whether a snapshot that nobody pinned can still be read after the collection."""
    try:
        view = find_snapshot(paths, ledger, snapshot)
    except (FindingsError, MismatchError):
        return False
    needed = {(s, g, n) for s, known in view.content().units.items() for g, n in known.items()}
    return needed <= units and named_shards(view).keys() <= keep


def _doomed(paths: StorePaths, files: Iterable[Path], reason: str) -> Iterator[Doomed]:
    for file in files:
        try:
            found = file.lstat()
        except FileNotFoundError:
            continue  # never written, or gone already
        yield Doomed(paths.relative(file), found.st_size, found.st_size if found.st_nlink == 1 else 0, reason)


def _shard_files(paths: StorePaths) -> Iterator[Path]:
    """Yield every file that lies where shards lie. Metadata lies beside ``c``, never in it."""
    for folder in sorted(f for part in PARTS for f in paths.zarr.glob(f"*/*/*/{part}/c")):
        yield from sorted(p for p in folder.rglob("*") if p.is_symlink() or p.is_file())


def _draft_files(paths: StorePaths) -> Iterator[Path]:
    yield from sorted(p for p in paths.tmp.rglob("*") if p.is_file())
    for top in (paths.ledger, paths.zarr, paths.pins):
        for folder, _, names in os.walk(top):
            shards = any(f"/{part}/c" in folder for part in PARTS)  # ``_shard_files`` sees to those
            yield from sorted(Path(folder, name) for name in names if not shards and _DRAFT.fullmatch(name))
    for file in sorted((paths.ledger / "tiles").glob("*.parquet")):
        if not file.name.startswith(".") and not file.with_suffix(".json").is_file():
            yield file
