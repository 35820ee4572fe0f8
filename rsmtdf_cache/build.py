"""``build_store``: tiles → views → teachers → codec → shards → commit, as one readable loop. Events out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsmtdf_cache.calibrate import Calibrator, check_given, own_calibrations, read_calibrations
from rsmtdf_cache.destination import Destination, destination_of
from rsmtdf_cache.encode import TileReader
from rsmtdf_cache.errors import DataError, Interrupted, RsmtdfError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import replace_json
from rsmtdf_cache.forecast import Measured, compared, find_measured, forecast, teacher_work, tiles_sampled
from rsmtdf_cache.head import load_whole
from rsmtdf_cache.index import Quarantined, index_tiles, new_records
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.ledger import TAIL_MAX, Ledger
from rsmtdf_cache.manifest import Manifest, create_manifest, load_manifest
from rsmtdf_cache.pixel_units import store_unit
from rsmtdf_cache.pixels import PIXEL_PROFILE, PIXELS, pixel_specs
from rsmtdf_cache.plan import (
    TeacherJob,
    TeacherLoader,
    array_sets,
    decide_group_rows,
    decide_profile,
    largest_unit_nbytes,
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
from rsmtdf_cache.watch import leave_note
from rsmtdf_cache.work import Bench, Executor, InProcess, Tally, Unit

__all__ = ["BuildReport", "build_store", "calibrator_of", "judge_tiles", "refuse_store_among_tiles"]


@dataclass
class BuildReport:
    """What a build did. ``planned_*``: what it was to do, by arithmetic and by what ``cache plan`` measured.

    ``workers``: what each of them did. ``failures``: workers that were lost or left out, and why, for people.
    """

    store: Path | str
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
    workers: list[Tally] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "store": str(self.store), "dry_run": False, "tiles": self.tiles, "units": self.units,
            "units_before": self.units_before, "seconds": round(self.seconds, 3), "nbytes_written": self.nbytes_written,
            "snapshot": self.snapshot, "tiles_per_second": {k: round(v, 2) for k, v in self.rates.items()},
            "quarantined": [{"id": q.id, "reason": q.reason} for q in self.quarantined], "arrays": self.arrays,
            "workers": [t.to_json() for t in self.workers], "failures": self.failures,
            **compared(self.planned_nbytes, self.planned_seconds, self.nbytes_shards, self.seconds),
        }  # fmt: skip


def build_store(
    request: BuildRequest,
    on_event: EventSink = ignore_events,
    load_teacher: TeacherLoader | None = None,
    measured: Measured | None = None,
    executor: Executor | None = None,
) -> BuildReport:
    """Build, continue or extend the store ``request.out``, a folder or a URL, and return what was done.

    ``load_teacher``: how a name becomes a teacher (default: ``rsmtdf_cache.teachers.load``), for teachers of your own.
    ``measured``: what a plan measured, for the report to compare with (default: the latest plan of the same build).
    ``executor``: where units are computed (default: in this process); ``rsmtdf_cache.cluster`` has others.
    Raises ``DataError`` (dataset), ``MismatchError`` (the store holds something else), ``ResourceError`` (disk,
    weights, network), ``UsageError`` (request), ``Interrupted`` (Ctrl-C, SIGTERM): committed units stay in every case.
    """
    with executor or InProcess() as place, destination_of(request.out) as store:
        return _build(request, on_event, load_teacher, measured, place, store)


def _build(
    request: BuildRequest, on_event: EventSink, load_teacher: TeacherLoader | None, measured: Measured | None,
    executor: Executor, store: Destination,
) -> BuildReport:  # fmt: skip
    started = time.perf_counter()
    source = open_source(request.data)
    refuse_store_among_tiles(request)
    store.refuse_held()
    source.check(request.splits)
    records, quarantined = index_tiles(source, source.tiles(request.splits), on_event)
    judge_tiles(records, quarantined, request, on_event)
    jobs = [plan_teacher(asked, request, source.tile_px, load_teacher) for asked in request.teachers]
    pixels = pixel_specs(source) if request.pixels else []
    specs = pixels + [s for job in jobs for s in job.specs]
    measured = measured or find_measured(request, specs)
    report = BuildReport(request.out if isinstance(request.out, Path) else store.shown, len(records), quarantined, [])
    now = store.look()
    known = load_whole(now) if now.manifest.is_file() else None
    if known is not None:
        refuse_other_content(load_manifest(now), known, specs, source, request)
    check_given(read_calibrations(request.calibration), specs, own_calibrations(known) if known is not None else [])
    with store.hold(on_event):
        paths = store.paths
        manifest = create_manifest(paths, _manifest(source, decide_group_rows(request, paths, specs)))
        begun: dict[Unit, None] = {}  # and not committed
        try:
            _run(request, source, records, jobs, pixels, store, manifest, report, on_event, measured, executor, begun)
        except BaseException as error:
            if begun or report.units or isinstance(error, KeyboardInterrupt):
                with contextlib.suppress(OSError, RsmtdfError):  # what is committed can be pulled, with room for it
                    store.leave(manifest, begun)
            if not isinstance(error, KeyboardInterrupt):
                raise
            raise Interrupted(
                f"stopped; {report.units_before + report.units} shard groups of {store.shown} are safe, "
                "the same command continues"
            ) from None
        report.seconds = time.perf_counter() - started
        built = FeatureStore.open(paths.root, verify_reads="never")
    report.snapshot = built.snapshot
    register_store(request.out, request.data, manifest.dataset, on_event)
    asked, described = {str(s.key) for s in specs}, built.describe()
    report.arrays = [a for a in described["arrays"] + described["pixels"] if a["key"] in asked]
    return report


def _run(
    request: BuildRequest, source: TileSource, records: list[TileRecord], jobs: list[TeacherJob],
    pixels: list[FeatureSpec], store: Destination, manifest: Manifest, report: BuildReport, on_event: EventSink,
    measured: Measured | None, executor: Executor, begun: dict[Unit, None],
) -> None:  # fmt: skip
    paths = store.paths
    ledger = load_whole(paths)
    # Again, under the lock: another builder may have been here since.
    specs = pixels + [s for job in jobs for s in job.specs]
    refuse_other_content(manifest, ledger, specs, source, request)
    fresh = new_records(ledger.table, records, store.shown)
    for job in jobs:  # before anything is written: a teacher that changed without a name adds nothing
        if will_grow(ledger, job.specs, [r.id for r in records], manifest.group_rows):
            reader = TileReader(source, ledger.table)
            check_canary(job.teacher, ledger, reader, manifest.group_rows, on_event=on_event, fetch=store.fetch)
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
                profile, fixed = decide_profile(request, teacher, executor.threads), request.micro_batch is not None
                profile = steady_profile(profile, teacher, arrays, fixed, on_event)
                known = calibrator.run(teacher, arrays, profile)
                digests = {layer: ledger.add_calibration(c) for layer, c in sorted(known.calibrations.items())}
                ledger.add_set(arrays, profile, digests, known.quality)
    store.write_head(manifest, ledger, final=False)
    everything, rows = pixel_sets + [a for _, sets in planned for a in sets], manifest.group_rows
    store.check_space(pending_nbytes(ledger, everything, groups, rows), largest_unit_nbytes(everything, rows))
    work = [w for t, sets in planned for w in teacher_work(t.spec, sets, groups, ledger, manifest.group_rows, sampled)]
    pixel_nbytes = pending_nbytes(ledger, pixel_sets, groups, manifest.group_rows)
    ahead = forecast(work, measured, pixel_nbytes) if measured else None
    report.planned_nbytes = sum(w.nbytes for w in work) + pixel_nbytes
    report.planned_seconds = ahead.seconds if ahead else None
    _run_pixels(request, pixel_sets, groups, ledger, manifest, reader, report, on_event, store, begun)
    bench = _bench(request, source, planned, groups, ledger, manifest, reader, store)
    _encode(bench, planned, groups, report, on_event, executor, manifest, begun)
    ledger.compact()
    store.write_head(manifest, ledger)


def _run_pixels(
    request: BuildRequest, sets: list[ArraySet], groups: list[int], ledger: Ledger, manifest: Manifest,
    reader: TileReader, report: BuildReport, on_event: EventSink, store: Destination, begun: dict[Unit, None],
) -> None:  # fmt: skip
    """Store what is pending of the tiles' pixels, here and before teachers, which take longer."""
    if not sets:
        return
    sizes = {g: len(rows_of_group(ledger.table, g, manifest.group_rows)) for g in groups}
    pending = [(g, a) for g in groups for a in sets if g not in ledger.commits[a.id]]
    total, left = sum(sizes.values()) * len(sets), sum(sizes[g] for g, _ in pending)
    report.units_before += len(groups) * len(sets) - len(pending)
    on_event(ProgressStart(PIXELS, PIXELS, total, total - left))
    started, publish = time.perf_counter(), store.publisher(ledger)
    for group, arrays in pending:
        rows = rows_of_group(ledger.table, group, manifest.group_rows)
        unit = Unit(arrays.id, group, len(rows))
        begun[unit] = None
        for nbytes in store_unit(arrays, group, rows, ledger, manifest.group_rows, reader, request.decoders, publish):
            on_event(Progress(PIXELS, 1, nbytes))
            report.nbytes_written += nbytes
        del begun[unit]
        report.units += 1
        report.nbytes_shards += sum(s.nbytes for s in ledger.commits[arrays.id][group].shards)
        if report.units % TAIL_MAX == 0:
            store.fold(manifest, ledger)
    on_event(ProgressEnd(PIXELS))
    if left:
        report.rates[PIXELS] = left / (time.perf_counter() - started)


def _bench(
    request: BuildRequest, source: TileSource, planned: Sequence[tuple[Teacher, list[ArraySet]]], groups: list[int],
    ledger: Ledger, manifest: Manifest, reader: TileReader, store: Destination,
) -> Bench:  # fmt: skip
    """Return what computing the pending units takes. Raises ``MismatchError`` for numerics that are not the store's."""
    pending = {a.id: (t, a) for t, sets in planned for a in sets if not set(groups) <= ledger.commits[a.id].keys()}
    profiles = {n: settle_profile(request, t, ledger.sets[n].profile) for n, (t, _) in pending.items()}
    teachers = {n: t for n, (t, _) in pending.items()}
    asked = {a.id: who for who, (_, sets) in zip(request.teachers, planned, strict=True) for a in sets}
    publish = store.publisher(ledger)
    return Bench(request, source, ledger, manifest.group_rows, asked, teachers, profiles, reader, publish, store)


def _encode(
    bench: Bench, planned: Sequence[tuple[Teacher, list[ArraySet]]], groups: list[int], report: BuildReport,
    on_event: EventSink, executor: Executor, manifest: Manifest, begun: dict[Unit, None],
) -> None:  # fmt: skip
    """Have every pending unit computed, teacher by teacher, wherever ``executor`` does that.

    ``begun``: is kept to the units that are begun and not committed.
    """
    ledger, shares = bench.ledger, _shares(bench, planned, groups, report)
    tiles = sum(len(rows_of_group(ledger.table, g, bench.group_rows)) for g in groups)
    leave_note(ledger.paths, {name: (len(groups), tiles) for share in shares for name in share.set_ids})
    share_of = {set_id: share for share in shares for set_id in share.set_ids}

    def units() -> Iterator[Unit]:
        for share in shares:
            on_event(ProgressStart(share.name, share.name, share.total, share.total - share.tiles))
            share.started = time.perf_counter()
            if not share.pending:
                on_event(ProgressEnd(share.name))
            for unit in share.pending:
                begun[unit] = None
                yield unit

    def on_tiles(unit: Unit, tiles: int, nbytes: int) -> None:
        on_event(Progress(share_of[unit.set_id].name, tiles, nbytes))
        report.nbytes_written += nbytes

    report.workers, report.failures = executor.tallies, executor.failures
    with contextlib.closing(executor.run(bench, units(), on_tiles, on_event)) as found:
        for done in found:
            commit, share = ledger.adopt(done.commit), share_of[done.unit.set_id]
            del begun[done.unit]
            report.units += 1
            report.nbytes_shards += sum(s.nbytes for s in commit.shards)
            if report.units % TAIL_MAX == 0:
                bench.destination.fold(manifest, ledger)
            share.left -= 1
            if not share.left:
                on_event(ProgressEnd(share.name))
                report.rates[share.name] = share.tiles / (time.perf_counter() - share.started)


@dataclass
class _Share:
    """One teacher's part of the pending units. ``total`` and ``tiles``: of all its units, and of the pending ones."""

    name: str
    set_ids: list[str]
    pending: list[Unit]
    total: int
    started: float = 0.0

    def __post_init__(self) -> None:
        self.left, self.tiles = len(self.pending), sum(u.tiles for u in self.pending)


def _shares(
    bench: Bench, planned: Sequence[tuple[Teacher, list[ArraySet]]], groups: list[int], report: BuildReport
) -> list[_Share]:
    sizes = {g: len(rows_of_group(bench.ledger.table, g, bench.group_rows)) for g in groups}
    shares = []
    for teacher, sets in planned:
        pending = [Unit(a.id, g, sizes[g]) for g in groups for a in sets if g not in bench.ledger.commits[a.id]]
        report.units_before += len(groups) * len(sets) - len(pending)
        shares.append(_Share(teacher.spec.name, [a.id for a in sets], pending, sum(sizes.values()) * len(sets)))
    return shares


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
        if isinstance(request.out, Path) and request.out.resolve().is_relative_to((request.data / name).resolve()):
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
