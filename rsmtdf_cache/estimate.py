"""``plan_build``: what a build will make, how long it takes and what limits it, before the first byte of the store.

Sizes are arithmetic and exact (without a byte compressor). Times are measured with the code that a build runs: real
tiles of the dataset go through ``encode_unit`` into a scratch unit that is never committed, in the build's numerics, on
its device and file system. So decoding, encoding and hashing share the processor as they will. See ``forecast.py``.
"""

from __future__ import annotations

import contextlib
import errno
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsmtdf_cache.build import calibrator_of, judge_tiles, refuse_store_among_tiles
from rsmtdf_cache.destination import Destination, destination_of
from rsmtdf_cache.disk_speed import DiskSpeed, file_system_of, free_nbytes, measure_disk, scratch_folder
from rsmtdf_cache.encode import TileReader, encode_unit
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import disk_errors
from rsmtdf_cache.forecast import (
    Forecast,
    Measured,
    Rate,
    TeacherWork,
    batch_tiles,
    forecast,
    keep_measured,
    teacher_work,
    tiles_sampled,
)
from rsmtdf_cache.head import load_whole
from rsmtdf_cache.index import Quarantined, index_tiles, new_records
from rsmtdf_cache.layout import ArraySet, StorePaths, unit_nbytes
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest, refuse_foreign_content
from rsmtdf_cache.pixels import pixel_specs
from rsmtdf_cache.plan import (
    TeacherLoader,
    array_sets,
    decide_group_rows,
    decide_profile,
    pending_nbytes,
    plan_teacher,
    planned_array,
    refuse_other_content,
    revivable,
    settle_profile,
)
from rsmtdf_cache.records import SetRecord
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.sources import Tile, TileSource, open_source
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, NumericsProfile
from rsmtdf_cache.steady import steady_profile
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.tiles import TileRecord, pixel_digest

__all__ = ["BuildPlan", "Probe", "plan_build"]

#: Of larger datasets as many tiles are decoded, evenly spread; the rest is taken for sound and timed after them.
_LOOK_AT_MOST = 2000
_WORKERS = 8


@dataclass(frozen=True)
class Probe:
    """How long to measure: seconds for each (teacher, scale) and for the disk, and the bytes at most written."""

    seconds: float = 3.0
    disk_nbytes: int = 2**30
    scratch_nbytes: int = 2**28


@dataclass(frozen=True)
class BuildPlan:
    """What ``cache build`` would do. ``arrays``: what it adds to each; ``unread``: tiles that nobody looked at.

    ``needed_nbytes``: of the disk at hand; None: all that is added.
    """

    store: Path | str
    tiles: int
    quarantined: list[Quarantined]
    unread: int
    arrays: list[dict[str, Any]]
    exact: bool
    work: list[TeacherWork]
    free_nbytes: int
    file_system: str
    needed_nbytes: int | None = None
    disk: DiskSpeed | None = None
    measured: Measured | None = None
    forecast: Forecast | None = None

    @property
    def nbytes(self) -> int:
        return sum(int(a["nbytes"]) for a in self.arrays)

    @property
    def fits(self) -> bool:
        return (self.nbytes if self.needed_nbytes is None else self.needed_nbytes) <= self.free_nbytes

    def to_json(self) -> dict[str, Any]:
        """Return the JSON of ``cache plan`` and of ``cache build --dry-run``: a build's report, and ``plan``."""
        seconds = self.forecast.seconds if self.forecast else None
        rates: dict[str, float] = {}
        for rate in self.measured.rates if self.measured else ():  # a teacher's own view: its largest
            rates[rate.teacher] = min(rates.get(rate.teacher, rate.tiles_per_s), rate.tiles_per_s)
        return {
            "store": str(self.store), "dry_run": True, "tiles": self.tiles, "units": 0, "units_before": 0,
            "seconds": 0.0, "nbytes_written": 0, "snapshot": "",
            "tiles_per_second": {name: round(rate, 2) for name, rate in rates.items()},
            "quarantined": [{"id": q.id, "reason": q.reason} for q in self.quarantined], "arrays": self.arrays,
            "planned": {"nbytes": self.nbytes, "seconds": _rounded(seconds)},
            "plan": {
                "exact": self.exact, "tiles_unread": self.unread,
                "disk": {
                    "file_system": self.file_system, "free_nbytes": self.free_nbytes, "fits": self.fits,
                    "in_memory": self.disk.in_memory if self.disk else None,
                    "probed_nbytes": self.disk.probed_nbytes if self.disk else 0,
                },
                "work": [item.to_json() for item in self.work],
                "measured": self.measured.to_json() if self.measured else None,
                "forecast": self.forecast.to_json() if self.forecast else None,
            },
        }  # fmt: skip


def plan_build(
    request: BuildRequest,
    on_event: EventSink = ignore_events,
    measure: bool = True,
    load_teacher: TeacherLoader | None = None,
    probe: Probe = Probe(),
) -> BuildPlan:
    """Return what ``build_store(request)`` would do now. Nothing is written into the store.

    ``measure``: False for arithmetic alone, without decoding a tile; then tiles that cannot be used are not known.
    Raises what ``build_store`` raises before it writes; a disk too small is a warning.
    """
    with destination_of(request.out) as store:
        return _plan_build(request, on_event, measure, load_teacher, probe, store)


def _plan_build(
    request: BuildRequest, on_event: EventSink, measure: bool, load_teacher: TeacherLoader | None, probe: Probe,
    store: Destination,
) -> BuildPlan:  # fmt: skip
    source = open_source(request.data)
    refuse_store_among_tiles(request)
    remote, here = not isinstance(request.out, Path), store.paths.root
    if not remote:
        refuse_foreign_content(here)
    looked = _look(source, request, on_event, _LOOK_AT_MOST if measure else 0)
    judge_tiles(looked.records + looked.unread, looked.quarantined, request, on_event)
    begun = time.perf_counter()
    jobs = [plan_teacher(asked, request, source.tile_px, load_teacher) for asked in request.teachers]
    load_seconds = time.perf_counter() - begun
    pixels = pixel_specs(source) if request.pixels else []
    specs = pixels + [s for job in jobs for s in job.specs]
    paths = store.look()
    group_rows = decide_group_rows(request, paths, specs)
    ledger = load_whole(paths) if paths.manifest.is_file() else Ledger(paths)
    if paths.manifest.is_file():
        refuse_other_content(load_manifest(paths), ledger, specs, source, request)
    records = looked.records + looked.unread
    _add_tiles(ledger, looked, store.shown, group_rows)
    ledger.dropped -= set(revivable(ledger, specs))
    groups = sorted({ledger.table.row_of(r.id) // group_rows for r in records})
    pixel_nbytes = pending_nbytes(ledger, array_sets(pixels, ledger), groups, group_rows)
    calibrator = calibrator_of(request, records, jobs, ledger, TileReader(source, ledger.table), on_event)
    work: list[TeacherWork] = []
    pending: list[tuple[Teacher, ArraySet]] = []
    for job in jobs:
        sets = array_sets(job.specs, ledger)
        sampled = tiles_sampled(calibrator, [a for a in sets if a.id not in ledger.sets])
        for arrays in sets:
            _register(ledger, arrays, request, job.teacher, groups, measure, on_event)
        found = teacher_work(job.teacher.spec, sets, groups, ledger, group_rows, sampled)
        work += found
        scales = {arrays.specs[0].view.scale: arrays for arrays in reversed(sets)}
        pending += [(job.teacher, scales[item.scale]) for item in found if item.batches]
    plan = BuildPlan(
        store.shown if remote else here, len(records), looked.quarantined, len(looked.unread),
        [planned_array(s, records, group_rows, ledger) for s in specs],
        all(s.encoding.compressor == "none" for s in specs), work,
        free_nbytes(here), file_system_of(scratch_folder(here)),
    )  # fmt: skip
    if remote:  # of two units at most there are drafts here
        largest = max((sum(unit_nbytes(s, group_rows, group_rows) for s in a.specs) for _, a in pending), default=0)
        plan = replace(plan, needed_nbytes=min(plan.nbytes, 2 * largest))
    if not plan.fits:
        on_event(Warned(
            f"{here}: the build needs {(plan.needed_nbytes or plan.nbytes) / 1e9:.2f} GB more, the disk has "
            f"{plan.free_nbytes / 1e9:.2f} GB free; free some space, or ask for fewer layers, scales or orientations"
        ))  # fmt: skip
    if not measure:
        return plan

    def alive() -> None:  # a signal to stop is seen at events
        on_event(Progress("measure", 0))

    with disk_errors(here):
        folder = scratch_folder(here)
        try:
            on_event(ProgressStart("measure", "measuring disk and teachers", 1 + len(pending), unit="rates"))
            disk = measure_disk(folder, probe.seconds, probe.disk_nbytes, lambda event: alive())
            tiles, rates = _spread(looked.usable, 512), []
            for teacher, arrays in pending:
                on_event(Progress("measure", 1))
                profile = ledger.sets[arrays.id].profile
                rates.append(_measure_teacher(teacher, arrays, profile, source, tiles, folder, probe, alive))
            on_event(Progress("measure", 1))
            on_event(ProgressEnd("measure"))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            disk = None
    if disk is None:
        on_event(Warned(f"{here}: too little room on the disk to measure anything; sizes alone are planned"))
        return plan
    if remote:
        on_event(Warned(f"the way to {store.shown} was not measured: where it is slower than this disk, it limits"))
    measured = Measured(
        tuple(rates), disk.write_nbytes_per_s, disk.read_nbytes_per_s, looked.seconds_ahead, load_seconds
    )
    plan = replace(plan, disk=disk, measured=measured, forecast=forecast(work, measured, pixel_nbytes))
    keep_measured(request, specs, plan.to_json())
    return plan


@dataclass(frozen=True)
class _Looked:
    """Tiles as a look at them found them; ``unread`` stand for others. ``usable``: where to take samples from."""

    records: list[TileRecord]
    quarantined: list[Quarantined]
    unread: list[TileRecord]
    usable: list[Tile]
    seconds_ahead: float


def _look(source: TileSource, request: BuildRequest, on_event: EventSink, at_most: int) -> _Looked:
    """Look at ``at_most`` tiles as a build would, and say how many seconds a build's own look will still take.

    What is looked at here is remembered (``tile_digests.py``), so a build decodes only the others.
    """
    tiles = source.tiles(request.splits)
    chosen = _spread(tiles, at_most)
    whole = len(chosen) == len(tiles)
    begun = time.perf_counter()
    if whole:
        source.check(request.splits)
    else:
        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(source.read_mask, [t for t in chosen if t.mask is not None]))
    checked = time.perf_counter() - begun
    begun = time.perf_counter()
    records, quarantined = index_tiles(source, chosen, on_event) if chosen else ([], [])
    indexed = time.perf_counter() - begun
    seen = {t.id for t in chosen}
    unread = [TileRecord(t.id, b"", t.split, "") for t in tiles if t.id not in seen]
    each = 1 / len(chosen) if chosen else 0.0
    ahead = checked * len(tiles) * each + indexed * len(unread) * each
    bad = {q.id for q in quarantined}
    return _Looked(records, quarantined, unread, [t for t in chosen if t.id not in bad], ahead)


def _spread(items: Sequence[Tile], at_most: int) -> list[Tile]:
    """Return at most ``at_most`` of ``items``, evenly spread, in order."""
    if len(items) <= at_most:
        return list(items)
    return [items[i * len(items) // at_most] for i in range(at_most)]


def _add_tiles(ledger: Ledger, looked: _Looked, out: str, group_rows: int) -> None:
    """Give new tiles their rows, in memory. Raises ``MismatchError`` for tiles whose pixels changed."""
    fresh = new_records(ledger.table, looked.records, out)
    fresh += [r for r in looked.unread if r.id not in ledger.table]
    if fresh:
        first_row = -(-len(ledger.table) // group_rows) * group_rows
        ledger.segments = {**ledger.segments, first_row: fresh}
        ledger.table = type(ledger.table)(list(ledger.segments.items()))


def _register(
    ledger: Ledger, arrays: ArraySet, request: BuildRequest, teacher: Teacher, groups: Sequence[int], measure: bool,
    on_event: EventSink,
) -> None:  # fmt: skip
    """Register a new set in memory; of one that is there, raise ``MismatchError`` when it cannot be continued here."""
    if arrays.id not in ledger.sets:
        profile = decide_profile(request, teacher)
        if measure:
            profile = steady_profile(profile, teacher, arrays, request.micro_batch is not None, on_event)
        ledger.sets[arrays.id] = SetRecord(arrays, profile)
        ledger.commits[arrays.id] = {}
    elif any(g not in ledger.commits[arrays.id] for g in groups):
        profile = settle_profile(request, teacher, ledger.sets[arrays.id].profile)
        ledger.sets[arrays.id] = replace(ledger.sets[arrays.id], profile=profile)


class _SampleReader(TileReader):
    """Reads a few tiles of a dataset over and over: row ``i`` is tile ``i % n``, decoded and hashed like in a build."""

    def __init__(self, source: TileSource, tiles: Sequence[Tile]) -> None:
        self._dataset, self._sample = source, tiles

    def read(self, row: int) -> NDArray[np.uint8]:
        image = self._dataset.read_image(self._sample[row % len(self._sample)])
        pixel_digest(image)
        return image


def _measure_teacher(
    teacher: Teacher, arrays: ArraySet, profile: NumericsProfile, source: TileSource, tiles: Sequence[Tile],
    folder: Path, probe: Probe, alive: Callable[[], None],
) -> Rate:  # fmt: skip
    """Return how long a batch takes when the pipeline runs: a mean over ``probe.seconds``, or two batches if they are
    longer. The first two batches are warm-up and not counted.
    """
    spec, size = arrays.specs[0], batch_tiles(arrays.specs[0].view, profile)
    specs = [_cheap_to_encode(s) for s in arrays.specs]
    most = max(4, min(64, probe.scratch_nbytes // max(1, size * sum(unit_nbytes(s, 1, 1) for s in specs))))
    marks: list[float] = []  # when the first tile of each batch was written, one batch after it was encoded
    least = 2 if spec.view.windows else 3
    threads = torch.get_num_threads()
    torch.set_num_threads(profile.threads)
    try:
        with contextlib.closing(_scratch_unit(teacher, specs, profile, most * size, source, tiles, folder)) as steps:
            for done, _ in enumerate(steps):
                alive()
                if done % size == 0:
                    marks.append(time.perf_counter())
                    # The last batch is followed by no encoding: it is never reached but where room is short.
                    if len(marks) == most - 1 or (len(marks) >= least and marks[-1] - marks[0] >= probe.seconds):
                        break
    finally:
        torch.set_num_threads(threads)
    batches = len(marks) - 1
    return Rate(
        spec.teacher.name, spec.teacher.weights, spec.view.scale, spec.view.size_px, size,
        (marks[-1] - marks[0]) / batches, batches * size, profile.device,
    )  # fmt: skip


def _cheap_to_encode(spec: FeatureSpec) -> FeatureSpec:
    """Return ``spec`` with a codec that needs no calibration; what a byte compressor takes is measured."""
    if spec.encoding.codec == "float16":
        return spec
    return spec.model_copy(update={"encoding": EncodingSpec(compressor=spec.encoding.compressor)})


def _scratch_unit(
    teacher: Teacher, specs: Sequence[FeatureSpec], profile: NumericsProfile, rows: int, source: TileSource,
    tiles: Sequence[Tile], folder: Path,
) -> Generator[int, None, None]:  # fmt: skip
    """Encode a unit of ``rows`` into a folder that is removed; the caller stops before it would be committed."""
    with tempfile.TemporaryDirectory(prefix=".rsmtdf-plan-", dir=folder) as name:
        arrays = ArraySet(tuple(specs))
        stand_ins = [TileRecord(str(row), b"", "train", "") for row in range(rows)]
        ledger = Ledger(StorePaths(Path(name)), {0: stand_ins}, {arrays.id: SetRecord(arrays, profile)})
        reader = _SampleReader(source, tiles)
        yield from encode_unit(teacher, arrays, 0, range(rows), profile, ledger, rows, reader)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
