"""``build_store``: tiles → views → teachers → codec → shards → commit, as one readable loop. Events out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rsmtdf_cache.calibrate import Calibrator, check_given, own_calibrations, read_calibrations
from rsmtdf_cache.encode import TileReader, encode_unit
from rsmtdf_cache.errors import DataError, Interrupted, RsmtdfError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import build_lock, disk_errors, replace_json
from rsmtdf_cache.forecast import Measured, compared, find_measured, forecast, teacher_work, tiles_sampled
from rsmtdf_cache.head import load_whole, write_head
from rsmtdf_cache.index import Quarantined, index_tiles, new_records
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.ledger import TAIL_MAX, Ledger
from rsmtdf_cache.manifest import Manifest, create_manifest, load_manifest, refuse_foreign_content
from rsmtdf_cache.pixel_units import store_unit
from rsmtdf_cache.pixels import PIXEL_PROFILE, PIXELS, pixel_specs
from rsmtdf_cache.plan import (
    TeacherJob,
    TeacherLoader,
    array_sets,
    check_space,
    decide_group_rows,
    decide_profile,
    pending_nbytes,
    plan_teacher,
    refuse_other_content,
    revive,
    rows_of_group,
    settle_profile,
)
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.share.catalogue import register_store
from rsmtdf_cache.sources import TileSource, open_source
from rsmtdf_cache.specs import FeatureSpec
from rsmtdf_cache.steady import steady_profile
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.tiles import TileRecord
from rsmtdf_cache.upkeep.canary import check_canary, will_grow
from rsmtdf_cache.writer import clear_drafts

_EncodeUnit = Callable[[ArraySet, int, list[int]], Iterator[int]]

__all__ = ["BuildReport", "build_store", "calibrator_of", "judge_tiles", "refuse_store_among_tiles"]


@dataclass
class BuildReport:
    """What a build did. ``planned_*``: what it was to do, by arithmetic and by what ``cache plan`` measured."""

    store: Path
    tiles: int
    quarantined: list[Quarantined]
    arrays: list[dict[str, Any]]
    units: int = 0
    units_before: int = 0
    seconds: float = 0.0
    nbytes_written: int = 0
    nbytes_shards: int = 0
    planned_nbytes: int = 0
    planned_seconds: float | None = None
    snapshot: str = ""
    rates: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "store": str(self.store), "dry_run": False, "tiles": self.tiles, "units": self.units,
            "units_before": self.units_before, "seconds": round(self.seconds, 3), "nbytes_written": self.nbytes_written,
            "snapshot": self.snapshot, "tiles_per_second": {k: round(v, 2) for k, v in self.rates.items()},
            "quarantined": [{"id": q.id, "reason": q.reason} for q in self.quarantined], "arrays": self.arrays,
            **compared(self.planned_nbytes, self.planned_seconds, self.nbytes_shards, self.seconds),
        }  # fmt: skip


def build_store(
    request: BuildRequest,
    on_event: EventSink = ignore_events,
    load_teacher: TeacherLoader | None = None,
    measured: Measured | None = None,
) -> BuildReport:
    """Build, continue or extend the store ``request.out`` and return what was done.

    ``load_teacher``: how a name becomes a teacher (default: ``rsmtdf_cache.teachers.load``), for teachers of your own.
    ``measured``: what a plan measured, for the report to compare with (default: the latest plan of the same build).
    Raises ``DataError`` (dataset), ``MismatchError`` (the store holds something else), ``ResourceError`` (disk,
    weights), ``UsageError`` (request), ``Interrupted`` (Ctrl-C, SIGTERM): committed units stay in every case.
    """
    started = time.perf_counter()
    source = open_source(request.data)
    refuse_store_among_tiles(request)
    source.check(request.splits)
    records, quarantined = index_tiles(source, source.tiles(request.splits), on_event)
    judge_tiles(records, quarantined, request, on_event)
    paths = StorePaths(request.out)
    jobs = [plan_teacher(asked, request, source.tile_px, load_teacher) for asked in request.teachers]
    pixels = pixel_specs(source) if request.pixels else []
    specs = pixels + [s for job in jobs for s in job.specs]
    measured = measured or find_measured(request, specs)
    report = BuildReport(request.out, len(records), quarantined, [])
    known = load_whole(paths) if paths.manifest.is_file() else None
    if known is not None:
        refuse_other_content(load_manifest(paths), known, specs, source, request)
    check_given(read_calibrations(request.calibration), specs, own_calibrations(known) if known is not None else [])
    with disk_errors(request.out):
        refuse_foreign_content(request.out)
        request.out.mkdir(parents=True, exist_ok=True)
        on_wait = lambda: on_event(Warned(f"another build holds {request.out}; waiting for it to end"))  # noqa: E731
        with build_lock(paths.lock, on_wait):
            clear_drafts(paths)
            manifest = create_manifest(paths, _manifest(source, decide_group_rows(request, paths, specs)))
            try:
                _run(request, source, records, jobs, pixels, paths, manifest, report, on_event, measured)
            except KeyboardInterrupt:
                raise Interrupted(
                    f"stopped; {report.units_before + report.units} shard groups of {request.out} are safe, "
                    "the same command continues"
                ) from None
            finally:
                clear_drafts(paths)
    report.seconds = time.perf_counter() - started
    store = FeatureStore.open(request.out, verify_reads="never")
    report.snapshot = store.snapshot
    register_store(request.out, request.data, manifest.dataset, on_event)
    asked, described = {str(s.key) for s in specs}, store.describe()
    report.arrays = [a for a in described["arrays"] + described["pixels"] if a["key"] in asked]
    return report


def _run(
    request: BuildRequest, source: TileSource, records: list[TileRecord], jobs: list[TeacherJob],
    pixels: list[FeatureSpec], paths: StorePaths, manifest: Manifest, report: BuildReport, on_event: EventSink,
    measured: Measured | None,
) -> None:  # fmt: skip
    ledger = load_whole(paths)
    # Again, under the lock: another builder may have been here since.
    specs = pixels + [s for job in jobs for s in job.specs]
    refuse_other_content(manifest, ledger, specs, source, request)
    fresh = new_records(ledger.table, records, request.out)
    for job in jobs:  # before anything is written: a teacher that changed without a name adds nothing
        if will_grow(ledger, job.specs, [r.id for r in records], manifest.group_rows):
            reader = TileReader(source, ledger.table)
            check_canary(job.teacher, ledger, reader, manifest.group_rows, on_event=on_event)
    if fresh:
        first_row = -(-len(ledger.table) // manifest.group_rows) * manifest.group_rows
        ledger.add_tiles(first_row, fresh)
    if report.quarantined or paths.quarantine.is_file():
        replace_json(paths.quarantine, {"tiles": {q.id: q.reason for q in report.quarantined}})
    groups = sorted({ledger.table.row_of(r.id) // manifest.group_rows for r in records})
    reader = TileReader(source, ledger.table)
    revive(ledger, specs)
    pixel_sets = array_sets(pixels, ledger)
    planned = [(job.teacher, array_sets(job.specs, ledger)) for job in jobs]
    calibrator = calibrator_of(request, records, jobs, ledger, reader, on_event)
    sampled = tiles_sampled(calibrator, [a for _, sets in planned for a in sets if a.id not in ledger.sets])
    for arrays in pixel_sets:
        ledger.add_set(arrays, PIXEL_PROFILE)
    for teacher, sets in planned:
        for arrays in sets:
            if arrays.id not in ledger.sets:
                profile, fixed = decide_profile(request, teacher), request.micro_batch is not None
                profile = steady_profile(profile, teacher, arrays, fixed, on_event)
                known = calibrator.run(teacher, arrays, profile)
                digests = {layer: ledger.add_calibration(c) for layer, c in sorted(known.calibrations.items())}
                ledger.add_set(arrays, profile, digests, known.quality)
    write_head(paths, manifest, ledger, final=False)
    everything = pixel_sets + [a for _, sets in planned for a in sets]
    check_space(request.out, ledger, everything, groups, manifest.group_rows)
    work = [w for t, sets in planned for w in teacher_work(t.spec, sets, groups, ledger, manifest.group_rows, sampled)]
    pixel_nbytes = pending_nbytes(ledger, pixel_sets, groups, manifest.group_rows)
    ahead = forecast(work, measured, pixel_nbytes) if measured else None
    report.planned_nbytes = sum(w.nbytes for w in work) + pixel_nbytes
    report.planned_seconds = ahead.seconds if ahead else None
    try:
        _run_pixels(request, pixel_sets, groups, ledger, manifest, reader, report, on_event)
        for teacher, sets in planned:
            _run_teacher(request, teacher, sets, groups, ledger, manifest, reader, report, on_event)
    except BaseException:
        with contextlib.suppress(OSError, RsmtdfError):  # so that what is committed can be pulled, where there is room
            write_head(paths, manifest, ledger, final=False)
        raise
    ledger.compact()
    write_head(paths, manifest, ledger)


def _run_pixels(
    request: BuildRequest, sets: list[ArraySet], groups: list[int], ledger: Ledger, manifest: Manifest,
    reader: TileReader, report: BuildReport, on_event: EventSink,
) -> None:  # fmt: skip
    """Store what is pending of the tiles' pixels: before teachers, which take longer."""
    if not sets:
        return
    encode: _EncodeUnit = lambda arrays, group, rows: store_unit(  # noqa: E731
        arrays, group, rows, ledger, manifest.group_rows, reader, request.workers
    )
    _run_units(PIXELS, encode, sets, groups, ledger, manifest, report, on_event)


def _run_teacher(
    request: BuildRequest, teacher: Teacher, sets: list[ArraySet], groups: list[int], ledger: Ledger,
    manifest: Manifest, reader: TileReader, report: BuildReport, on_event: EventSink,
) -> None:  # fmt: skip
    def encode(arrays: ArraySet, group: int, rows: list[int]) -> Iterator[int]:
        profile = settle_profile(request, teacher, ledger.sets[arrays.id].profile)
        torch.set_num_threads(profile.threads)
        return encode_unit(
            teacher, arrays, group, rows, profile, ledger, manifest.group_rows, reader, request.workers
        )  # fmt: skip

    threads = torch.get_num_threads()
    try:
        _run_units(teacher.spec.name, encode, sets, groups, ledger, manifest, report, on_event)
    finally:
        torch.set_num_threads(threads)


def _run_units(
    name: str, encode: _EncodeUnit, sets: list[ArraySet], groups: list[int], ledger: Ledger, manifest: Manifest,
    report: BuildReport, on_event: EventSink,
) -> None:  # fmt: skip
    """Commit what is pending of ``sets`` in ``groups``, a unit at a time."""
    sizes = {g: len(rows_of_group(ledger.table, g, manifest.group_rows)) for g in groups}
    pending = [(g, a) for g in groups for a in sets if g not in ledger.commits[a.id]]
    total = sum(sizes.values()) * len(sets)
    left = sum(sizes[g] for g, _ in pending)
    report.units_before += len(groups) * len(sets) - len(pending)
    on_event(ProgressStart(name, name, total, total - left))
    started = time.perf_counter()
    for group, arrays in pending:
        for nbytes in encode(arrays, group, rows_of_group(ledger.table, group, manifest.group_rows)):
            on_event(Progress(name, 1, nbytes))
            report.nbytes_written += nbytes
        report.units += 1
        report.nbytes_shards += sum(s.nbytes for s in ledger.commits[arrays.id][group].shards)
        if report.units % TAIL_MAX == 0:
            ledger.compact()
    on_event(ProgressEnd(name))
    if left:
        report.rates[name] = left / (time.perf_counter() - started)


def calibrator_of(
    request: BuildRequest, records: list[TileRecord], jobs: list[TeacherJob], ledger: Ledger, reader: TileReader,
    on_event: EventSink,
) -> Calibrator:  # fmt: skip
    """Return what calibrates new array sets: with what was given, else with what the store has, else with its tiles."""
    given, own = read_calibrations(request.calibration), own_calibrations(ledger)
    check_given(given, [s for job in jobs for s in job.specs], own, on_event)
    train = [r for r in records if r.split == "train"] or records
    rows = [ledger.table.row_of(r.id) for r in train]
    return Calibrator(ledger.table, rows, reader, [*own, *given], on_event)


def _manifest(source: TileSource, group_rows: int) -> Manifest:
    from importlib.metadata import version

    return Manifest(
        tile_px=source.tile_px, group_rows=group_rows, dataset=source.name, attribution=source.attribution,
        created_by=f"rsmtdf {version('rsmtdf')}",
    )  # fmt: skip


def refuse_store_among_tiles(request: BuildRequest) -> None:
    """Raise ``UsageError`` when the store would lie in a folder of the dataset's files."""
    for name in ("images", "masks", "splits"):
        if request.out.resolve().is_relative_to((request.data / name).resolve()):
            raise UsageError(f"--out {request.out}: lies among the {name} of the dataset; choose a folder of its own")


def judge_tiles(
    records: list[TileRecord], quarantined: list[Quarantined], request: BuildRequest, on_event: EventSink
) -> None:
    """Raise ``DataError`` when a build of these tiles makes no sense, or warn about those left out."""
    listing = "; ".join(f"{q.id}: {q.reason}" for q in quarantined[:5]) + (" …" if len(quarantined) > 5 else "")
    if quarantined and request.strict:
        raise DataError(f"--strict: {len(quarantined)} tiles cannot be used: {listing}")
    if not records:
        raise DataError(f"{request.data}: none of {len(quarantined)} tiles can be used: {listing}")
    if quarantined:
        on_event(Warned(f"{len(quarantined)} tiles cannot be used and are left out: {listing}"))
