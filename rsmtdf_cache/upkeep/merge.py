"""Two stores become one, without a teacher: the union by tile and array. Codes are copied, never computed again.

The result is written by the commit protocol of a build, so a killed merge is continued by the same command.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import FindingsError, Interrupted, MismatchError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import (
    build_lock,
    disk_errors,
    fsync_file,
    fsync_folder,
    link_file,
    make_folders,
    rename_file,
    replace_json,
    require_space,
    sha256_file,
)
from rsmtdf_cache.head import load_whole, write_head
from rsmtdf_cache.layout import StorePaths, parts_of
from rsmtdf_cache.ledger import Commit
from rsmtdf_cache.manifest import Manifest, create_manifest, load_manifest, refuse_foreign_content
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.upkeep.merge_plan import MergePlan, PlannedSet, PlannedUnit, Source, conflicts, plan_merge
from rsmtdf_cache.writer import UnitWriter, clear_drafts

__all__ = ["MergeReport", "PendingUnit", "merge_stores"]


@dataclass(frozen=True)
class PendingUnit:
    """A unit that the result lacks; ``cache build`` computes it."""

    arrays: list[str]
    group: int
    tiles: int
    reason: str


@dataclass
class MergeReport:
    """What a merge did, or would do.

    ``units_before``: were there already. ``left_behind``: how many tiles' features of B the result lacks, by array,
    because other tiles or layers of their units have none.
    """

    store: str
    dry_run: bool
    tiles: int
    tiles_new: int
    arrays_new: list[str]
    units_linked: int = 0
    units_copied: int = 0
    units_before: int = 0
    nbytes: int = 0
    pending: list[PendingUnit] = field(default_factory=list)
    left_behind: dict[str, int] = field(default_factory=dict)
    snapshot: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


def merge_stores(
    a: Path | str,
    b: Path | str,
    out: Path | str | None = None,
    on_event: EventSink = ignore_events,
    allow_mixed: bool = False,
    dry_run: bool = False,
) -> MergeReport:
    """Merge the stores (folders) ``a`` and ``b`` into the new store ``out``, or into ``a``; return what was done.

    ``allow_mixed``: accept units of other numerics in one array set. Raises ``MismatchError`` with every conflict
    before anything is written, ``FindingsError`` for a damaged shard before its unit is, ``ResourceError`` (disk),
    ``Interrupted``: what is committed stays, and the same call goes on.
    """
    source, other = Path(a), Path(b)
    target = source if out is None else Path(out)
    if out is not None and target.resolve() in (source.resolve(), other.resolve()):
        raise UsageError(f"--out {out}: is one of the stores; leave --out out to merge B into A, or name a new folder")
    if dry_run:
        return _report(_plan(source, other, target, allow_mixed), target, dry_run)
    _plan(source, other, target, allow_mixed)  # refuses before the target is made
    with disk_errors(target):
        refuse_foreign_content(target)
        make_folders(target)
        paths = StorePaths(target)
        on_wait = lambda: on_event(Warned(f"another process holds {target}; waiting for it to end"))  # noqa: E731
        with build_lock(paths.lock, on_wait):
            clear_drafts(paths)
            plan = _plan(source, other, target, allow_mixed)  # again: somebody may have been here since
            report = _report(plan, target, dry_run)
            try:
                _Merge(plan, paths, report, on_event).run()
            except KeyboardInterrupt:
                done = report.units_before + report.units_linked + report.units_copied
                raise Interrupted(f"stopped; {done} units of {target} are safe, the same command continues") from None
            finally:
                clear_drafts(paths)
    return report


def _plan(source: Path, other: Path, target: Path, allow_mixed: bool) -> MergePlan:
    """Return the plan. Raises ``MismatchError`` with all that stands against it."""
    a = Source("A", FeatureStore.open(source, verify_reads="never"))  # ``_Merge`` compares every shard it reads
    b = Source("B", FeatureStore.open(other, verify_reads="never"))
    found = conflicts(a, b)
    if not found:
        plan = plan_merge(a, b, into_a=target == source)
        found = _occupied(plan) if target == source else _foreign(plan, target)
        found += [] if allow_mixed else plan.mixed
        if not found:
            return plan
        mixed = " --allow-mixed accepts other numerics." if plan.mixed and not allow_mixed else ""
    else:
        mixed = ""
    lines = "\n  ".join(found)
    raise MismatchError(
        f"{source} (A) and {other} (B) cannot be merged, nothing was written:\n  {lines}\n"
        f"`rsmtdf cache diff` shows both; drop the arrays in question, or choose another --out.{mixed}"
    )


def _occupied(plan: MergePlan) -> list[str]:
    """Return the arrays of B whose places in A are taken by what was dropped there and not collected."""
    ledger = plan.a.store.ledger
    new = {spec.key: p.arrays.id for p in plan.sets if p.own is None for spec in p.specs}
    found = []
    for name, layer in sorted(ledger.dropped):
        for spec in ledger.sets[name].arrays.specs if name in ledger.sets else ():
            if spec.layer.name != layer or spec.key not in new:
                continue
            shards = [c.shard(layer) for c in ledger.commits[name].values()]
            if new[spec.key] == name or any(s is not None and (ledger.paths.root / s.path).is_file() for s in shards):
                found.append(f"array {spec.key} was dropped from A and not collected; run `rsmtdf cache gc` on A first")
    return found


def _foreign(plan: MergePlan, target: Path) -> list[str]:
    """Return what the target holds that an interrupted run of this merge cannot have put there."""
    paths = StorePaths(target)
    if not paths.manifest.is_file():
        return []
    manifest, ledger = load_manifest(paths), load_whole(paths)
    wanted = _manifest(plan)
    found = [
        f"--out has {name} {getattr(manifest, name)!r}, the result {getattr(wanted, name)!r}"
        for name in ("dataset", "attribution", "tile_px", "group_rows")
        if getattr(manifest, name) != getattr(wanted, name)
    ]
    for first_row, records in ledger.segments.items():
        if list(plan.segments.get(first_row, ())) != list(records):
            found.append(f"--out has other tiles from row {first_row} on than A and B")
    known = {p.arrays.id for p in plan.sets}
    found += [f"--out has an array set {r.arrays.label} of its own" for n, r in ledger.sets.items() if n not in known]
    return found


def _manifest(plan: MergePlan) -> Manifest:
    from importlib.metadata import version

    a, b = plan.a.store.manifest, plan.b.store.manifest
    return a.model_copy(update={
        "dataset": a.dataset if a.dataset == b.dataset else f"{a.dataset} + {b.dataset}",
        "attribution": "; ".join(dict.fromkeys(text for text in (a.attribution, b.attribution) if text)),
        "created_by": f"rsmtdf {version('rsmtdf')}",
    })  # fmt: skip


def _report(plan: MergePlan, target: Path, dry_run: bool) -> MergeReport:
    into_a = target == plan.a.store.path
    new = [str(s.key) for p in plan.sets if p.own is None for s in p.specs]
    report = MergeReport(
        str(target), dry_run, sum(plan.table.splits.values()), sum(map(len, plan.new_segments.values())), sorted(new)
    )
    report.pending = [
        PendingUnit([str(s.key) for s in u.arrays.specs], u.group, len(u.rows), u.reason) for u in plan.pending
    ]
    report.left_behind = plan.left_behind()
    if dry_run:
        report.units_linked = 0 if into_a else len(plan.own)
        report.units_before = len(plan.own) if into_a else 0
        report.units_copied = len(plan.units)
        report.nbytes = sum(u.nbytes(plan.a.store.manifest.group_rows) for u in plan.units)
    return report


class _Merge:
    """Carries a plan out on one target, whose build lock the caller holds."""

    def __init__(self, plan: MergePlan, paths: StorePaths, report: MergeReport, on_event: EventSink) -> None:
        self.plan, self.paths, self.report, self.on_event = plan, paths, report, on_event
        self.into_a = paths.root == plan.a.store.path
        self.checked: set[tuple[str, FeatureKey, int]] = set()

    def run(self) -> None:
        plan, paths = self.plan, self.paths
        wanted = plan.a.store.manifest if self.into_a else _manifest(plan)
        manifest = create_manifest(paths, wanted)
        if manifest.attribution != _manifest(plan).attribution:
            self.on_event(Warned(f"{paths.root} does not name B's source: {plan.b.store.manifest.attribution!r}; "
                                 "a merge into a new store (--out) names both"))  # fmt: skip
        self.ledger = load_whole(paths)
        self.check_space()
        for first_row, records in sorted(plan.segments.items()):
            if first_row not in self.ledger.segments:
                self.ledger.add_tiles(first_row, records)
        for planned in plan.sets:
            if planned.arrays.id not in self.ledger.sets:
                for calibration in planned.calibrations.values():
                    self.ledger.add_calibration(calibration)
                digests = {layer: c.digest for layer, c in planned.calibrations.items()}
                self.ledger.add_set(planned.arrays, planned.profile, digests, planned.quality)
        self.quarantine()
        write_head(paths, manifest, self.ledger, final=False)
        self.on_event(ProgressStart("merge", "merging", len(plan.own) + len(plan.units), unit="units"))
        for planned, commit in plan.own:
            self.take_over(planned, commit)
        for unit in plan.units:
            self.copy(unit)
        self.on_event(ProgressEnd("merge"))
        self.ledger.compact()
        write_head(paths, manifest, self.ledger)
        self.report.snapshot = self.ledger.snapshot()

    def check_space(self) -> None:
        """Raise ``ResourceError`` when the disk lacks room for what is copied."""
        todo = [u for u in self.plan.units if not self.there(u.arrays, u.group)]
        need = sum(u.nbytes(self.plan.a.store.manifest.group_rows) for u in todo)
        if os.stat(self.paths.root).st_dev != os.stat(self.plan.a.store.path).st_dev:
            need += sum(s.nbytes for p, c in self.plan.own if not self.there(p, c.group) for s in c.shards)
        require_space(self.paths.root, need, "merge", "free some space, then run the same command again")

    def there(self, planned: PlannedSet, group: int) -> bool:
        """Whether the target has the unit already."""
        return group in self.ledger.commits.get(planned.arrays.id, {})

    def quarantine(self) -> None:
        """Note the tiles that either store left out and the result does not have."""
        known = self.plan.b.store.quarantined | self.plan.a.store.quarantined
        left_out = {name: reason for name, reason in known.items() if name not in self.ledger.table}
        if left_out:
            replace_json(self.paths.quarantine, {"tiles": left_out})

    def take_over(self, planned: PlannedSet, commit: Commit) -> None:
        """Make a unit of A one of the target: the same bytes, by a second name where the disk allows it."""
        if self.into_a or self.there(planned, commit.group):
            self.report.units_before += 1
            self.on_event(Progress("merge", 1))
            return
        ledger = self.plan.a.store.ledger
        shards = []
        for spec in sorted(planned.specs, key=lambda s: s.layer.name):
            self.check(self.plan.a, spec.key, commit.group)
            shards += [s for s in ledger.complete(commit).shards if s.layer == spec.layer.name]
        with _drafts(self.paths) as folder:
            places = []
            for spec, part in ((s, part) for s in planned.specs for part in parts_of(s)):
                draft = folder / f"{spec.layer.name}.{part}"
                place = self.paths.shard(spec.key, commit.group, part)
                self.report.nbytes += _second_name(self.plan.a.store.paths.shard(spec.key, commit.group, part), draft)
                make_folders(place.parent)
                if not link_file(draft, place):
                    rename_file(draft, place)  # left by a kill before its record: nobody has read it
                places.append(place)
            for place in places:
                fsync_folder(place.parent)
        own = replace(commit, set_id=planned.arrays.id, shards=tuple(shards), generation=0)
        self.ledger.add_commit(own)
        self.report.units_linked += 1
        self.on_event(Progress("merge", 1, sum(s.nbytes for s in shards)))

    def copy(self, unit: PlannedUnit) -> None:
        """Write a unit tile by tile from the codes of A and B."""
        if self.there(unit.arrays, unit.group):
            self.report.units_before += 1
            self.on_event(Progress("merge", 1))
            return
        if unit.profile is None:
            raise ValueError("a pending unit has nothing to copy")
        specs, table = unit.arrays.specs, self.ledger.table
        places = [[self.plan.offers(s, table.record(row))[unit.profile] for s in specs] for row in unit.rows]
        for offers in places:
            for spec, (source, row) in zip(specs, offers, strict=True):
                self.check(source, spec.key, row // source.store.manifest.group_rows)
        nbytes, group_rows = 0, self.plan.a.store.manifest.group_rows
        with UnitWriter(self.ledger, unit.arrays.arrays, unit.group, group_rows, unit.profile) as writer:
            for row, offers in zip(unit.rows, places, strict=True):
                codes = {}
                for spec, (source, from_row) in zip(specs, offers, strict=True):
                    found = source.store.stored(spec.key, from_row)
                    if found is None:
                        raise FindingsError(
                            f"{source.store.path}: {spec.key} of row {from_row} is committed, but not in its shard; "
                            "run `rsmtdf cache verify --deep` on that store"
                        )
                    codes[spec.layer.name] = found
                nbytes += writer.add_stored(row, table.record(row).id, codes)
            writer.commit(unit.rows[-1] + 1)
        self.report.units_copied += 1
        self.report.nbytes += nbytes
        self.on_event(Progress("merge", 1, nbytes))

    def check(self, source: Source, key: FeatureKey, group: int) -> None:
        """Compare a shard that will be read with its record, once a merge. Raises ``FindingsError``."""
        if (source.name, key, group) in self.checked:
            return
        for part in parts_of(source.specs[key]):
            place = source.store.paths.shard(key, group, part)
            record = source.shard(key, group, part)
            if record.path != source.store.paths.relative(place):
                raise FindingsError(f"{source.store.path}: the record of {key}, row group {group} names {record.path}")
            if not place.is_file() or sha256_file(place) != record.sha256:
                raise FindingsError(
                    f"{place}: missing, or its bytes are not those committed (sha256 differs); nothing of this unit "
                    "was merged; mend it with `rsmtdf cache verify --repair`, then run the same command again"
                )
        self.checked.add((source.name, key, group))


@contextmanager
def _drafts(paths: StorePaths) -> Iterator[Path]:
    folder = paths.tmp / f"merge.{uuid.uuid4().hex}"
    make_folders(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _second_name(source: Path, draft: Path) -> int:
    """Give the shard ``source`` the name ``draft``; where the disk cannot, copy it. Returns the bytes copied."""
    try:
        os.link(source, draft)
    except OSError:
        shutil.copyfile(source, draft)
        with draft.open("rb+") as file:
            fsync_file(file, draft)
        return draft.stat().st_size
    return 0
