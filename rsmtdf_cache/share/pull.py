"""Bring a store, or a part of it, from a URL into a folder; through the same commit protocol as a build.

Order: manifest, tile segments, set records, the list of arrays that are not here, then unit by unit the shards and the
commit record, the head last. A draft that a kill left in ``tmp/`` is continued; a committed unit is not fetched again.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import FindingsError, Interrupted, MismatchError, ResourceError, RsmtdfError, UsageError
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
    require_space,
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
from rsmtdf_cache.writer import clear_drafts

__all__ = ["CopyReport", "copy_local", "copy_store", "find_damaged", "pull_store"]


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
            "units_before": self.plan.units_before, "shards": self.plan.shards,
            "shards_replaced": self.plan.replaced, "nbytes": self.plan.nbytes,
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
    deep: bool = False,
) -> CopyReport:
    """Bring the store at ``url`` (or its snapshot, ``URL@SNAPSHOT``) into the folder ``target``; return what was done.

    A second call continues, or adds what the selection has more; ``target`` may hold an earlier or partial copy, whose
    shards are fetched again where they are missing or of another size; ``deep``: also where their sha256 differs.
    Default: all that is published, pixels too.
    Raises ``MismatchError`` (another store there), ``FindingsError`` (the remote is damaged or hostile),
    ``ResourceError`` (network, disk), ``UsageError`` (selection), ``Interrupted``: committed units stay in every case.
    """
    address = url if isinstance(url, Address) else Address.parse(url)
    if address.is_local:
        return copy_local(address, Path(target), selection or Selection(pixels=True), on_event, workers, dry_run, deep)
    transport = connect(address)

    def stage(folder: Path) -> Staged:
        return stage_records(transport, folder)

    return copy_store(
        transport, stage, Path(target), selection or Selection(pixels=True), on_event, workers, dry_run, deep
    )


def copy_store(
    transport: Transport, stage: Callable[[Path], Staged], target: Path, selection: Selection, on_event: EventSink,
    workers: int, dry_run: bool, deep: bool,
) -> CopyReport:  # fmt: skip
    """Bring what ``stage(folder)`` says is behind ``transport`` into ``target``. See ``pull_store``."""
    started = time.perf_counter()
    if transport.address.is_local:
        _refuse_inside(transport.address.path, target)
    refuse_foreign_content(target)
    shown, paths = transport.address.shown, StorePaths(target)

    def planned(folder: Path) -> tuple[Staged, CopyPlan]:
        staged = stage(folder)
        if text := staged.unfinished(shown):
            on_event(Warned(text))
        known = paths.manifest.is_file()
        ledger = Ledger.load(paths) if known else None
        if ledger is not None:
            refuse_other_store((staged.manifest, staged.ledger), (load_manifest(paths), ledger), str(paths.root))
        plan = plan_copy(staged.ledger, staged.manifest.group_rows, selection, ledger)
        if ledger is not None:
            here = connect(Address("file", str(target)))
            plan.replace_damaged(lambda shards: find_damaged(here, shards, deep, workers, on_event))
        return staged, plan

    if dry_run:
        with tempfile.TemporaryDirectory(prefix="rsmtdf-") as folder:
            staged, plan = planned(Path(folder))
            return CopyReport(shown, str(target), True, plan, staged.snapshot, 0, time.perf_counter() - started)
    made = [] if paths.ledger.exists() else [p for p in (target, *target.parents) if not p.exists()]
    undo = not paths.ledger.exists()
    with disk_errors(target):
        make_folders(target)
        on_wait = lambda: on_event(Warned(f"another process writes to {target}; waiting for it to end"))  # noqa: E731
        with build_lock(paths.lock, on_wait):
            clear_drafts(paths)
            drafts = _drafts(paths)
            try:
                staged, plan = planned(drafts / f"records-{transport.address.digest}")
                report = CopyReport(shown, str(target), False, plan, staged.snapshot)
                _Copy(transport, staged, paths, plan, drafts, on_event).run(workers, report)
            except RsmtdfError as error:
                begun = isinstance(error, ResourceError) and any(p.is_file() for p in drafts.rglob("*"))
                if undo and not begun and not paths.manifest.exists():
                    _remove_traces(paths, made)
                raise
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


def _refuse_inside(source: Path, target: Path) -> None:
    inner, outer = target.resolve(), source.resolve()
    if inner == outer:
        raise UsageError(f"{target}: is the store itself; give another folder")
    if outer in inner.parents:
        raise UsageError(f"{target}: lies inside the store {source}; give a folder outside of it")


def _remove_traces(paths: StorePaths, made: list[Path]) -> None:
    """Remove the lock and drafts of a copy that published nothing, and the folders ``made`` for it."""
    shutil.rmtree(paths.tmp, ignore_errors=True)
    paths.lock.unlink(missing_ok=True)
    for folder in (paths.ledger, *made):
        with contextlib.suppress(OSError):  # something else is in it by now
            folder.rmdir()


def find_damaged(
    transport: Transport, shards: Sequence[ShardRecord], deep: bool, workers: int, on_event: EventSink
) -> set[str]:
    """Return the paths of those ``shards`` that are missing behind ``transport``, have another size, or, when
    ``deep``, another sha256.
    """
    sizes = transport.sizes([s.path for s in shards], "zarr")
    found = {s.path for s in shards if sizes.get(s.path) != s.nbytes}
    if not deep:
        return found

    def look_at(shard: ShardRecord) -> Callable[[Counter], None]:
        def look(count: Counter) -> None:
            if transport.sha256(shard.path, shard.nbytes) != shard.sha256:
                found.add(shard.path)
            count(shard.nbytes, shard.nbytes)

        return look

    task, rest = "check", [s for s in shards if s.path not in found]
    label = f"checking {transport.address.shown}"
    on_event(ProgressStart(task, label, sum(s.nbytes for s in rest), unit="bytes"))
    jobs = ((s.path, look_at(s)) for s in rest)
    for _ in run_jobs(jobs, workers, lambda nbytes, moved: on_event(Progress(task, nbytes, moved))):
        pass
    on_event(ProgressEnd(task))
    return found


class _Copy:
    """One copy into a folder whose lock is held."""

    def __init__(
        self, transport: Transport, staged: Staged, paths: StorePaths, plan: CopyPlan, drafts: Path, on_event: EventSink
    ) -> None:
        self.transport, self.staged, self.paths, self.plan = transport, staged, paths, plan
        self.drafts, self.on_event = drafts, on_event

    def run(self, workers: int, report: CopyReport) -> None:
        self._check_space()
        if self.transport.address.is_local:
            self._check_source(workers)
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
        advice = "free some space, or choose fewer teachers, layers, views or tiles"
        require_space(self.paths.root, self.plan.nbytes - there, "copy", advice)

    def _check_source(self, workers: int) -> None:
        """A damaged store leaves nothing behind: its shards are read before the first record is published."""
        shards = [shard for unit in self.plan.units for shard in unit.shards]
        bad = sorted(find_damaged(self.transport, shards, True, workers, self.on_event))
        if bad:
            raise FindingsError(
                f"{self.transport.address.path / bad[0]}{f' and {len(bad) - 1} more' if bad[1:] else ''}: missing, or "
                "not the bytes that were committed; nothing was copied: run `rsmtdf cache verify --deep --repair` on "
                f"{self.transport.address.path}, then the same command again"
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
            for digest in self.staged.ledger.sets[name].calibrations.values():
                self._publish_file(source.calibration(digest), self.paths.calibration(digest))
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

        def count(nbytes: int, moved: int) -> None:
            report.nbytes_moved += moved
            self.on_event(Progress(task, nbytes, moved))

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
                count(shard.nbytes, 0)
                return
            begun = draft.stat().st_size if draft.is_file() else 0
            count(begun if begun <= shard.nbytes else 0, 0)
            self.transport.fetch(shard.path, draft, shard.nbytes, shard.sha256, lambda n: count(n, max(n, 0)))

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
            if any(s.path == shard.path and s.sha256 != shard.sha256 for c in others for s in c.shards):
                raise MismatchError(
                    f"{place}: another array set has this shard (dropped, or of an older build); run `rsmtdf cache gc` "
                    "on the store, then the same command again"
                )
            # Damaged, of a killed copy, of a dropped array, or of the generation before: replaced in one step.
            rename_file(draft, place)
        draft.unlink(missing_ok=True)
        fsync_folder(place.parent)

    def _quarantine(self) -> None:
        if self.staged.paths.quarantine.is_file() and not self.paths.quarantine.is_file():
            replace_json(self.paths.quarantine, read_json(self.staged.paths.quarantine))


def _is(place: Path, shard: ShardRecord) -> bool:
    return place.is_file() and place.stat().st_size == shard.nbytes and sha256_file(place) == shard.sha256


def copy_local(
    address: Address, target: Path, selection: Selection, on_event: EventSink, workers: int, dry_run: bool, deep: bool
) -> CopyReport:
    """Copy the store in the folder ``address`` into the folder ``target``; every shard's sha256 is checked before."""
    return copy_store(
        connect(Address("file", address.location)),
        lambda folder: local_records(address.path, address.snapshot),
        target, selection, on_event, workers, dry_run, deep,
    )  # fmt: skip
