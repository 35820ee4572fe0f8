"""Collection: what no current content and no pin needs is shown, then deleted. And ``drop``, which makes it so.

Order of a collection, under the build lock: write down what will go (``tmp/collecting.json``), look at the pins once
more, stop naming it (segments, commits, sets, entries of dropped arrays, snapshots, pins, then the head), delete the
shards. A kill between any two of these leaves files that nothing names; the next collection finds them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import UsageError, did_you_mean
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import (
    build_lock,
    disk_errors,
    fsync_folder,
    remove_file,
    replace_json,
)
from rsmtdf_cache.head import load_whole, write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.segment import read_segment_commits, read_segment_stats, write_segment
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.upkeep.gc_plan import DRAFT, Doomed, GcPlan, PinHold, plan_of
from rsmtdf_cache.upkeep.pins import doomed_record, list_pins
from rsmtdf_cache.writer import clear_drafts

__all__ = ["DropReport", "collect", "drop_arrays", "match_keys"]


@dataclass(frozen=True)
class DropReport:
    """What was dropped; ``nbytes``: what its shards take; ``free``: what ``cache gc`` would give back in all."""

    keys: list[str]
    nbytes: int
    free: int
    holds: list[PinHold]
    snapshot: str


def match_keys(keys: Iterable[FeatureKey], patterns: Iterable[str]) -> list[FeatureKey]:
    """Return the keys that a pattern fits, sorted. A pattern is ``teacher/view/layer``, each part with ``* ? [abc]``.

    Raises ``UsageError`` for a pattern that fits none.
    """
    known = sorted(keys, key=str)
    chosen: set[FeatureKey] = set()
    for pattern in patterns:
        parts = pattern.split("/")
        fits = {
            k for k in known
            if len(parts) == 3 and all(map(fnmatchcase, (k.teacher, k.view, k.layer), parts))
        }  # fmt: skip
        if not fits:
            names = [str(k) for k in known]
            raise UsageError(
                f"no array fits {pattern!r}.{did_you_mean(pattern, names)} Write TEACHER/VIEW/LAYER, * for any part; "
                f"there are: {', '.join(names) or 'none'}"
            )
        chosen |= fits
    return sorted(chosen, key=str)


def drop_arrays(root: Path | str, patterns: Iterable[str], on_event: EventSink = ignore_events) -> DropReport:
    """Let the arrays that ``patterns`` fit count no more, and return what was dropped.

    Their bytes stay until ``collect``; snapshots that are pinned still show them.
    Raises ``UsageError`` for a pattern that fits nothing.
    """
    paths = StorePaths(Path(root))
    manifest = load_manifest(paths)
    with disk_errors(paths.root), build_lock(paths.lock, _waiting(paths, on_event)):
        ledger = load_whole(paths)
        list_pins(paths.root)  # a damaged one is told before anything changes
        keys = match_keys(ledger.specs(), patterns)
        nbytes = sum(s.nbytes for key in keys for s in ledger.all_shards(key))
        ledger.drop([(ledger.set_of(key), key.layer) for key in keys])
        write_head(paths, manifest, ledger)
        plan = plan_of(paths, ledger, alone=True)
    return DropReport([str(k) for k in keys], nbytes, plan.nbytes, plan.holds, ledger.snapshot())


def collect(root: Path | str, on_event: EventSink = ignore_events) -> GcPlan:
    """Delete what no current content and no unexpired pin needs, and return what that was.

    Killed at any moment it harms neither, and the next call finishes. Raises like ``plan_gc``, before it deletes.
    """
    paths = StorePaths(Path(root))
    manifest = load_manifest(paths)
    with disk_errors(paths.root), build_lock(paths.lock, _waiting(paths, on_event)):
        drafts = {f.path: f for f in plan_of(paths, load_whole(paths), alone=True).files if f.reason == DRAFT}
        clear_drafts(paths, transfers=True)  # from here on no worker that an earlier build forgot publishes anything
        ledger = load_whole(paths)
        plan = _announce(paths, ledger, drafts)
        shards = [paths.root / f.path for f in plan.files if f.path.startswith("zarr/")]
        records = [paths.root / f.path for f in plan.files if not f.path.startswith(("zarr/", "tmp/"))]
        on_event(ProgressStart("gc", "collecting", len(shards) + len(records), unit="files"))
        _compact_without(paths, ledger, plan)
        head = write_head(paths, manifest, ledger)
        gone = {paths.relative(path) for path in records}
        kept = {name: facts for name, facts in head.files.items() if name not in gone}
        replace_json(paths.head, replace(head, files=kept).to_json())
        _forget(paths, ledger, plan, records)
        write_head(paths, manifest, Ledger.load(paths))
        on_event(Progress("gc", len(records)))
        for start in range(0, len(shards), 100):
            _remove(shards[start : start + 100])
            on_event(Progress("gc", len(shards[start : start + 100])))
        _remove_empty_folders(paths.zarr)
        _remove_empty_folders(paths.ledger / "commits")
        clear_drafts(paths, transfers=True)
        on_event(ProgressEnd("gc"))
    return plan


def _announce(paths: StorePaths, ledger: Ledger, drafts: Mapping[str, Doomed]) -> GcPlan:
    """Return the plan, after everybody who pins from now on can read what it deletes (see ``pins.pin_snapshot``)."""
    plan = plan_of(paths, ledger, alone=True)
    while True:
        announced = {f.path for f in plan.files}
        replace_json(doomed_record(paths), {"files": sorted(announced)})
        plan = plan_of(paths, ledger, alone=True)
        plan.files = [f for f in plan.files if f.path not in drafts and not f.path.startswith("tmp/")]
        if {f.path for f in plan.files} <= announced:
            plan.files += drafts.values()
            return plan


def _compact_without(paths: StorePaths, ledger: Ledger, plan: GcPlan) -> None:
    """Write the segments again without the commits that go; until the old ones are removed both are there."""
    for name in plan.rewritten:
        units = {(c.set_id, c.group, c.generation) for c in read_segment_commits(paths.root / name)}
        known = dict(read_segment_stats(paths.root / name))  # of this one alone: those of a large store fill memory
        kept = [ledger.complete(ledger.generations[s, g][n], known) for s, g, n in sorted(units & plan.units)]
        if kept:
            write_segment(paths.segments, kept)


def _forget(paths: StorePaths, ledger: Ledger, plan: GcPlan, records: list[Path]) -> None:
    """Remove records. A commit's set must be there as long as the commit, a set's dropped entry as long as the set."""
    sets = {paths.array_set(name) for name in plan.sets}
    _remove(path for path in records if path not in sets)
    _remove(sets)
    gone = {(name, layer) for name, layer in ledger.dropped if name in plan.sets or name not in ledger.sets}
    if gone:
        ledger.undrop(gone)


def _remove(files: Iterable[Path]) -> None:
    for file in (files := list(files)):
        remove_file(file)
    _sync(files)


def _sync(files: Iterable[Path]) -> None:
    for folder in {file.parent for file in files}:
        if folder.is_dir():
            fsync_folder(folder)


def _remove_empty_folders(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        if Path(folder) != top and not any(os.scandir(folder)):
            os.rmdir(folder)


def _waiting(paths: StorePaths, on_event: EventSink) -> Any:
    return lambda: on_event(Warned(f"another process holds the build lock of {paths.root}; waiting for it to end"))
