"""Bring a store, or a part of it, from a URL into a folder; through the same commit protocol as a build.

Order: manifest, tile segments, set records, the list of arrays that are not here, then unit by unit the shards and the
commit record, the head last. A draft that a kill left in ``tmp/`` is continued; a committed unit is not fetched again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import Interrupted, MismatchError, ResourceError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import (
    build_lock,
    disk_errors,
    fsync_file,
    fsync_folder,
    link_file,
    make_folders,
    read_json,
    rename_file,
    replace_json,
    sha256_file,
)
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger, ShardRecord
from rsmtdf_cache.manifest import load_manifest, refuse_foreign_content
from rsmtdf_cache.share.address import Address
from rsmtdf_cache.share.checks import check_stats, refuse_other_store
from rsmtdf_cache.share.names import safe_place
from rsmtdf_cache.share.parallel import Counter, run_jobs
from rsmtdf_cache.share.select import CopyPlan, Selection, Unit, plan_copy
from rsmtdf_cache.share.staged import Staged, local_records, stage_records
from rsmtdf_cache.share.transport import Transport, connect
from rsmtdf_cache.specs import digest_of

__all__ = ["CopyReport", "copy_local", "copy_store", "pull_store"]


@dataclass
class CopyReport:
    """What a pull or push did, or would do."""

    source: str
    target: str
    dry_run: bool
    plan: CopyPlan
    snapshot: str = ""
    nbytes_moved: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "source": self.source, "target": self.target, "dry_run": self.dry_run, "units": len(self.plan.units),
            "units_before": self.plan.units_before, "shards": self.plan.shards, "nbytes": self.plan.nbytes,
            "nbytes_moved": self.nbytes_moved, "tiles": self.plan.tiles, "tiles_along": self.plan.tiles_along,
            "snapshot": self.snapshot, "seconds": round(self.seconds, 3),
        }  # fmt: skip


def pull_store(
    url: str | Address,
    target: Path,
    selection: Selection | None = None,
    on_event: EventSink = ignore_events,
    workers: int = 4,
    dry_run: bool = False,
) -> CopyReport:
    """Bring the store at ``url`` (or its snapshot, ``URL@SNAPSHOT``) into the folder ``target``; return what was done.

    A second call continues, or adds what the selection has more; ``target`` may hold an earlier or partial copy.
    Raises ``MismatchError`` (another store there), ``FindingsError`` (the remote is damaged or hostile),
    ``ResourceError`` (network, disk), ``UsageError`` (selection), ``Interrupted``: committed units stay in every case.
    """
    address = url if isinstance(url, Address) else Address.parse(url)
    transport = connect(address)

    def stage(folder: Path) -> Staged:
        return stage_records(transport, folder)

    return copy_store(transport, stage, Path(target), selection or Selection(), on_event, workers, dry_run)


def copy_store(
    transport: Transport, stage: Callable[[Path], Staged], target: Path, selection: Selection, on_event: EventSink,
    workers: int, dry_run: bool,
) -> CopyReport:  # fmt: skip
    """Bring what ``stage(folder)`` says is behind ``transport`` into ``target``. See ``pull_store``."""
    started = time.perf_counter()
    if transport.address.is_local and _same_folder(transport.address.path, target):
        raise UsageError(f"{target}: is the store itself; give another folder")
    refuse_foreign_content(target)
    shown, paths = transport.address.shown, StorePaths(target)
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="rsmtdf-") as folder:
            staged = stage(Path(folder))
            plan = _plan(staged, paths, selection)
            return CopyReport(shown, str(target), True, plan, staged.snapshot, 0, time.perf_counter() - started)
    with disk_errors(target):
        make_folders(target)
        on_wait = lambda: on_event(Warned(f"another process writes to {target}; waiting for it to end"))  # noqa: E731
        with build_lock(paths.lock, on_wait):
            drafts = _drafts(paths)
            try:
                staged = stage(drafts / f"records-{transport.address.digest}")
                plan = _plan(staged, paths, selection)
                report = CopyReport(shown, str(target), False, plan, staged.snapshot)
                _Copy(transport, staged, paths, plan, drafts, on_event).run(workers, report)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped; what was committed to {target} is safe, the same command continues"
                ) from None
            shutil.rmtree(paths.tmp, ignore_errors=True)
    report.seconds = time.perf_counter() - started
    return report


def _drafts(paths: StorePaths) -> Path:
    folder = paths.tmp / "pull"
    for place in (paths.tmp, folder):
        if place.is_symlink():
            raise MismatchError(f"{place}: a symbolic link; remove it, drafts must lie on the disk of the store")
    make_folders(folder)
    return folder


def _same_folder(source: Path, target: Path) -> bool:
    return source.resolve() == target.resolve()


def _plan(staged: Staged, paths: StorePaths, selection: Selection) -> CopyPlan:
    known = paths.manifest.is_file()
    target = Ledger.load(paths) if known else None
    if target is not None:
        refuse_other_store((staged.manifest, staged.ledger), (load_manifest(paths), target), str(paths.root))
    return plan_copy(staged.ledger, staged.manifest.group_rows, selection, target)


class _Copy:
    """One copy into a folder whose lock is held."""

    def __init__(
        self, transport: Transport, staged: Staged, paths: StorePaths, plan: CopyPlan, drafts: Path, on_event: EventSink
    ) -> None:
        self.transport, self.staged, self.paths, self.plan = transport, staged, paths, plan
        self.drafts, self.on_event = drafts, on_event

    def run(self, workers: int, report: CopyReport) -> None:
        self._check_space()
        self._publish_file(self.staged.paths.manifest, self.paths.manifest)
        ledger = Ledger.load(self.paths)
        if self.plan.drop - ledger.dropped:  # before the sets, so that no reader takes an array for one that comes
            ledger.drop(self.plan.drop)
        self._publish_records()
        ledger = Ledger.load(self.paths)
        self._transfer(ledger, workers, report)
        if self.plan.undrop & ledger.dropped:
            ledger.undrop(self.plan.undrop)
        self._quarantine()
        ledger.compact()
        report.snapshot = write_head(self.paths, load_manifest(self.paths), ledger).snapshot

    def _check_space(self) -> None:
        there = sum(p.stat().st_size for p in self.drafts.glob("shard-*"))
        need, free = self.plan.nbytes - there, shutil.disk_usage(self.paths.root).free
        if need > free:
            raise ResourceError(
                f"{self.paths.root}: the copy needs {need / 1e9:.2f} GB more, the disk has {free / 1e9:.2f} GB free; "
                "free some space, or choose fewer teachers, layers, views or tiles"
            )

    def _publish_records(self) -> None:
        source = self.staged.paths
        for first in sorted(self.staged.ledger.segments):
            place = self.paths.tile_segment(first)
            if place.is_file():
                continue  # the same rows, as refuse_other_store saw; perhaps written by another version of Parquet
            record = source.tile_segment(first)
            self._publish_file(record.with_suffix(".parquet"), place.with_suffix(".parquet"))
            self._publish_file(record, place)
        for name in self.plan.arrays:
            self._publish_file(source.array_set(name), self.paths.array_set(name))

    def _publish_file(self, record: Path, place: Path) -> None:
        place = safe_place(self.paths.root, self.paths.relative(place))
        if place.suffix == ".json" and place.is_file():
            return
        make_folders(place.parent)
        draft = self.drafts / f"record-{uuid.uuid4().hex}"
        with record.open("rb") as origin, draft.open("xb") as file:
            shutil.copyfileobj(origin, file)
            fsync_file(file, draft)
        # A table file without its record is a killed copy's: no one reads it.
        rename_file(draft, place) if place.suffix == ".parquet" else link_file(draft, place)
        draft.unlink(missing_ok=True)
        fsync_folder(place.parent)

    def _transfer(self, ledger: Ledger, workers: int, report: CopyReport) -> None:
        task = "pull"
        self.on_event(ProgressStart(task, f"copying {self.transport.address.shown}", self.plan.nbytes, unit="bytes"))

        def count(nbytes: int) -> None:
            report.nbytes_moved += nbytes
            self.on_event(Progress(task, nbytes, nbytes))

        left = {id(unit): len(unit.shards) for unit in self.plan.units}
        jobs = ((unit, self._job(shard)) for unit in self.plan.units for shard in unit.shards)
        for unit in self.plan.units:
            if not unit.shards and unit.is_new:
                self._commit(ledger, unit)
        for unit in run_jobs(jobs, workers, count):
            left[id(unit)] -= 1
            if not left[id(unit)]:
                self._commit(ledger, unit)
        self.on_event(ProgressEnd(task))
        for note in self.plan.notes[:5]:
            self.on_event(Warned(note))

    def _job(self, shard: ShardRecord) -> Callable[[Counter], None]:
        def fetch(count: Counter) -> None:
            place, draft = safe_place(self.paths.root, shard.path), self._draft(shard)
            if _is(place, shard) or _is(draft, shard):
                count(0)
                return
            self.transport.fetch(shard.path, draft, shard.nbytes, shard.sha256, count)

        return fetch

    def _draft(self, shard: ShardRecord) -> Path:
        return self.drafts / f"shard-{shard.sha256[:32]}-{digest_of(shard.path)[:16]}"

    def _commit(self, ledger: Ledger, unit: Unit) -> None:
        for shard in unit.shards:
            self._publish_shard(ledger, unit, shard)
        if not unit.is_new:
            return
        commit = check_stats(self.staged.ledger, unit.commit, self.transport.address.shown)
        if ledger.add_commit(commit).to_json() != commit.to_json():
            raise MismatchError(f"{self.paths.root}: another process committed row group {commit.group} differently")

    def _publish_shard(self, ledger: Ledger, unit: Unit, shard: ShardRecord) -> None:
        place, draft = safe_place(self.paths.root, shard.path), self._draft(shard)
        if not draft.is_file():
            return  # it was there
        make_folders(place.parent)
        if not link_file(draft, place):
            others = [c for (name, _), units in ledger.generations.items() if name != unit.commit.set_id
                      for c in units.values()]  # fmt: skip
            if any(s.path == shard.path for c in others for s in c.shards):
                raise MismatchError(
                    f"{place}: another array set has this shard (dropped, or of an older build); run `rsmtdf cache gc` "
                    "on the store, then the same command again"
                )
            # Of a killed copy, of a dropped array, or of the generation before: replaced in one step.
            rename_file(draft, place)
        draft.unlink(missing_ok=True)
        fsync_folder(place.parent)

    def _quarantine(self) -> None:
        if self.staged.paths.quarantine.is_file() and not self.paths.quarantine.is_file():
            replace_json(self.paths.quarantine, read_json(self.staged.paths.quarantine))


def _is(place: Path, shard: ShardRecord) -> bool:
    return place.is_file() and place.stat().st_size == shard.nbytes and sha256_file(place) == shard.sha256


def copy_local(
    root: Path, target: Path, selection: Selection, on_event: EventSink, workers: int, dry_run: bool
) -> CopyReport:
    """Copy the store at ``root`` into the folder ``target``; every shard's sha256 is checked on the way."""
    address = Address.parse(root)
    return copy_store(
        connect(Address("file", address.location)),
        lambda folder: local_records(address.path, address.snapshot),
        target, selection, on_event, workers, dry_run,
    )  # fmt: skip
