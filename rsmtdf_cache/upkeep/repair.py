"""Repair: rebuild damaged records, encode damaged shards again and nothing else, then write what is derived anew."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsmtdf_cache.array_writer import ArrayWriter
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.encode import TileReader, encode_unit
from rsmtdf_cache.errors import DataError, FindingsError, MismatchError, ResourceError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import build_lock, disk_errors, fsync_folder, make_folders, rename_file
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import ArraySet, StorePaths, parts_of
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.manifest import Manifest, load_manifest
from rsmtdf_cache.pixel_units import read_codes, store_unit
from rsmtdf_cache.pixels import is_pixels
from rsmtdf_cache.plan import TeacherLoader, rows_of_group
from rsmtdf_cache.request import TeacherAsked
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.upkeep.canary import check_canary, encode_again, profile_here
from rsmtdf_cache.upkeep.recompute import TeacherShelf
from rsmtdf_cache.upkeep.recover import Repaired, discard, recover_manifest, recover_tiles
from rsmtdf_cache.upkeep.recover_units import (
    Unit,
    forget_units,
    lost_units,
    recover_commits,
    recover_dropped,
    recover_sets,
    recover_snapshots,
)
from rsmtdf_cache.upkeep.survey import Finding, survey
from rsmtdf_cache.verify import LEFT, audit, check_shards, shard_checks
from rsmtdf_cache.writer import clear_drafts

__all__ = ["RepairReport", "Repaired", "UnrepairedError", "repair_store"]


@dataclass
class RepairReport:
    """What a repair did, file by file, and what is still wrong."""

    store: Path
    done: list[Repaired] = field(default_factory=list)
    left: list[Finding] = field(default_factory=list)
    snapshot: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "store": str(self.store), "repaired": [asdict(r) for r in self.done],
            "left": [asdict(f) for f in self.left], "snapshot": self.snapshot,
        }  # fmt: skip


class UnrepairedError(FindingsError):
    """Some damage is left; ``report`` says what was repaired and what was not."""

    def __init__(self, report: RepairReport) -> None:
        lines = "\n".join(f"  {f.path}: {f.fault}" for f in report.left)
        super().__init__(
            f"{report.store}: {len(report.done)} files were repaired, {len(report.left)} findings are left\n{lines}"
        )
        self.report = report


def repair_store(
    root: Path, data: Path | None = None, teachers: Sequence[TeacherAsked] = (), on_event: EventSink = ignore_events,
    load_teacher: TeacherLoader | None = None, device: str | None = None,
) -> RepairReport:  # fmt: skip
    """Repair the store at ``root`` and return what was done; a sound store is left as it is, and ``done`` is empty.

    Records are rebuilt from what repeats them and taken when a checksum or a snapshot's root proves them. Damaged
    shards are encoded again from ``data`` in the recorded numerics: bytes with the recorded sha256 take their place,
    others become a new generation of the commit, and the report says so. Raises ``UsageError`` when shards are damaged
    and there is no ``data``, ``UnrepairedError`` (exit code 7) when damage is left.
    """
    paths, report = StorePaths(root), RepairReport(root)
    if not root.is_dir() or not (paths.manifest.is_file() or paths.head.is_file()):
        load_manifest(paths)  # says what is wrong
    with disk_errors(root), build_lock(paths.lock, lambda: on_event(Warned(f"a builder holds {root}; waiting"))):
        clear_drafts(paths)
        try:
            _repair(paths, report, _Encoder(paths, data, teachers, on_event, load_teacher, device), on_event)
        finally:
            clear_drafts(paths)
    if report.left:
        raise UnrepairedError(report)
    return report


def _repair(paths: StorePaths, report: RepairReport, encoder: _Encoder, on_event: EventSink) -> None:
    report.done += recover_manifest(paths)
    manifest = load_manifest(paths)
    report.done += recover_tiles(paths)
    report.done += recover_sets(paths)
    report.done += recover_dropped(paths)
    report.done += recover_commits(paths, manifest)
    report.done += recover_dropped(paths)  # once more: now that the commits are back, a root can prove it
    found = survey(paths)
    before = audit(found, manifest, builder=False)
    broken = {f.path for f in before if f.path.startswith(("ledger/tiles", "ledger/sets", "ledger/dropped"))}
    if broken:  # what everything else is counted by
        report.left = before
        return
    lost = [u for u in lost_units(paths) if u[1] not in found.ledger.commits[u[0]] and found.ledger.live(u[0])]
    faults = check_shards(paths, shard_checks(found.ledger), manifest, True, on_event)
    if lost:
        encoder.demand_data([paths.relative(paths.commit(*u)) for u in lost])
    report.done += forget_units(paths, lost)
    if faults and encoder.data is None:
        _finish(paths, manifest, report, before)
        encoder.demand_data([f.path for _, f in faults])
    ledger = Ledger.load(paths)
    units: dict[tuple[str, int], list[FeatureSpec]] = {}
    for check, _ in faults:
        units.setdefault((check.commit.set_id, check.commit.group), []).append(check.spec)
    encoder.damaged = {f.path for _, f in faults}
    on_event(ProgressStart("repair", "encoding again", len(units) + len(lost), unit="units"))
    for (name, group), specs in sorted(units.items()):
        report.done += encoder.again(ledger, ledger.commits[name][group], specs, manifest)
        on_event(Progress("repair", 1))
    for unit in lost:
        report.done += encoder.whole(ledger, unit, manifest)
        on_event(Progress("repair", 1))
    on_event(ProgressEnd("repair"))
    _finish(paths, manifest, report, before)
    report.left += encoder.left


def _finish(paths: StorePaths, manifest: Manifest, report: RepairReport, before: list[Finding]) -> None:
    """Remove leftovers, write what is derived anew, and note what an audit still finds."""
    for finding in audit(survey(paths), manifest, builder=False):  # not ``before``: what was left may be committed now
        path = paths.root / finding.path
        if finding.fault == LEFT and path.is_file():
            discard(path)
            report.done.append(Repaired(finding.path, "removed: left by an interrupted build"))
    found = survey(paths)
    if paths.relative(paths.quarantine) in found.damaged:
        discard(paths.quarantine)
        report.done.append(Repaired(paths.relative(paths.quarantine), "removed: the next build lists its tiles again"))
    report.done += recover_snapshots(paths, manifest)
    ledger = Ledger.load(paths)
    if before or report.done:
        report.snapshot = write_head(paths, manifest, ledger).snapshot
    report.snapshot = report.snapshot or ledger.snapshot()
    report.left += audit(survey(paths), manifest, builder=False)
    wrong, known = {f.path for f in report.left}, {r.path for r in report.done}
    mended = sorted({f.path for f in before} - wrong - known)
    report.done += [Repaired(name, "written again from the ledger") for name in mended]


class _Encoder:
    """Encodes units again. What cannot be encoded is noted in ``left``, and the others go on."""

    def __init__(
        self, paths: StorePaths, data: Path | None, teachers: Sequence[TeacherAsked], on_event: EventSink,
        load: TeacherLoader | None, device: str | None,
    ) -> None:  # fmt: skip
        self.paths, self.data, self._on_event = paths, data, on_event
        self._shelf = TeacherShelf(teachers, load, device)
        self._reader: TileReader | None = None
        self._trusted: set[str] = set()
        self.damaged: set[str] = set()
        self.left: list[Finding] = []

    def demand_data(self, names: Sequence[str]) -> None:
        """Raise ``UsageError`` when there are no images to encode ``names`` from."""
        if self.data is None:
            raise UsageError(
                f"--repair: {len(names)} shards or commits of {self.paths.root} must be encoded again "
                f"({', '.join(names[:3])}{' …' if len(names) > 3 else ''}); that needs the images: give --data DIR"
            )

    def again(self, ledger: Ledger, commit: Commit, specs: list[FeatureSpec], manifest: Manifest) -> list[Repaired]:
        """Encode the shards of ``specs`` of one committed unit again and put them in place."""
        places = {(s.layer.name, p): self.paths.shard(s.key, commit.group, p) for s in specs for p in parts_of(s)}
        named = {(s.layer, s.part): s for s in commit.shards}
        wrong = [p for p in places if p not in named or named[p].path != self.paths.relative(places[p])]
        folder = self.paths.tmp / f"repair.{uuid.uuid4().hex}"
        make_folders(folder)
        try:
            if wrong:
                raise FindingsError(f"its record names another place than {'/'.join(wrong[0])} has")
            profile, maps = self._maps(ledger, commit, specs[0], manifest)
            fresh = _drafts(folder, maps, ledger, commit, specs, manifest.group_rows)
        except (DataError, MismatchError, ResourceError, FindingsError) as error:
            self.left += [Finding(self.paths.relative(p), f"not encoded again: {error}") for p in places.values()]
            shutil.rmtree(folder, ignore_errors=True)
            return []
        done, other = [], {}
        for record in fresh.values():
            part = (record.layer, record.part)
            same = record.sha256 == named[part].sha256
            if not same:
                other[part] = record
            what = "reproduced: encoded again, with the recorded sha256"
            done.append(Repaired(record.path, what if same else _new_bytes(commit, profile)))
        if other:
            whole = ledger.complete(commit)
            shards = tuple(other.get((s.layer, s.part), s) for s in whole.shards)
            number = max(ledger.generations[commit.set_id, commit.group]) + 1
            # The record first: a kill right after it leaves a shard that is damaged by the record, and repaired again.
            ledger.add_commit(replace(whole, shards=shards, profile=profile, generation=number))
        for draft, record in fresh.items():
            place = places[record.layer, record.part]
            make_folders(place.parent)
            rename_file(draft, place)
            fsync_folder(place.parent)
        shutil.rmtree(folder, ignore_errors=True)
        return done

    def whole(self, ledger: Ledger, unit: Unit, manifest: Manifest) -> list[Repaired]:
        """Encode and commit a unit whose record is lost."""
        name, group, _ = unit
        path = self.paths.relative(self.paths.commit(name, group))
        rows = rows_of_group(ledger.table, group, manifest.group_rows)
        threads = torch.get_num_threads()
        try:
            arrays = ArraySet(tuple(ledger.live(name)))
            full = ledger.sets[name].arrays  # the writer leaves dropped layers out, and the set keeps its name
            if is_pixels(arrays.specs[0]):
                for _ in store_unit(full, group, rows, ledger, manifest.group_rows, self._images(ledger)):
                    pass
                return [Repaired(path, "its unit was read from the dataset and committed again")]
            teacher, reader = self._ready(ledger, arrays.specs[0], manifest)
            profile = profile_here(ledger.sets[name].profile, teacher)
            torch.set_num_threads(profile.threads)
            for _ in encode_unit(teacher, full, group, rows, profile, ledger, manifest.group_rows, reader):
                pass
        except (DataError, MismatchError, ResourceError, FindingsError) as error:
            self.left.append(Finding(path, f"its unit is lost and was not encoded again: {error}"))
            return []
        finally:
            torch.set_num_threads(threads)
        return [Repaired(path, "its unit was encoded and committed again")]

    def _ready(self, ledger: Ledger, spec: FeatureSpec, manifest: Manifest) -> tuple[Teacher, TileReader]:
        """Return the teacher, after its canary, and the reader of the images."""
        reader = self._images(ledger)
        teacher = self._shelf.teacher(spec.teacher)
        if spec.teacher.name not in self._trusted:
            check_canary(teacher, ledger, reader, manifest.group_rows, damaged=self.damaged)
            self._trusted.add(spec.teacher.name)
        return teacher, reader

    def _images(self, ledger: Ledger) -> TileReader:
        assert self.data is not None
        if self._reader is None:
            self._shelf.refuse_unknown({s.teacher.name for s in ledger.specs().values()})
            self._reader = TileReader(open_source(self.data), ledger.table)
        return self._reader

    def _maps(
        self, ledger: Ledger, commit: Commit, spec: FeatureSpec, manifest: Manifest
    ) -> tuple[NumericsProfile, Iterator[tuple[int, Mapping[str, Codes | NDArray[np.float32]]]]]:
        """Return the maps of a unit's rows by layer, made again, and in which numerics; pixels come as codes."""
        rows = [r for r in rows_of_group(ledger.table, commit.group, manifest.group_rows) if r < commit.stop]
        arrays = ledger.sets[commit.set_id].arrays
        if is_pixels(spec):
            layers = [s.layer.name for s in arrays.specs]
            return commit.profile, read_codes(layers, rows, self._images(ledger))
        teacher, reader = self._ready(ledger, spec, manifest)
        profile = profile_here(commit.profile, teacher)
        return profile, encode_again(teacher, arrays, rows, profile, reader)


def _new_bytes(commit: Commit, profile: NumericsProfile) -> str:
    why = "" if profile == commit.profile else f" (recorded {commit.profile.device}, torch {commit.profile.torch})"
    return (
        f"encoded again to other bytes{why}: generation {commit.generation + 1} of the commit; snapshots from before "
        "no longer have this shard"
    )


def _drafts(
    folder: Path, maps: Iterator[tuple[int, Mapping[str, Codes | NDArray[np.float32]]]], ledger: Ledger,
    commit: Commit, specs: list[FeatureSpec], group_rows: int,
) -> dict[Path, ShardRecord]:  # fmt: skip
    """Write the shards of ``specs`` to ``folder``, durably, and return ``{draft: what it is}``."""
    with contextlib.ExitStack() as open_drafts:
        writers = [open_drafts.enter_context(ArrayWriter(folder, s, ledger.codec(s), group_rows)) for s in specs]
        for row, found in maps:
            tile_id = ledger.table.record(row).id
            for writer in writers:
                values = found[writer.spec.layer.name]
                if isinstance(values, Codes):
                    writer.add_stored(row - commit.start, tile_id, values)
                else:
                    writer.add(row - commit.start, tile_id, values)
        done: dict[Path, ShardRecord] = {}
        for writer in writers:
            writer.close()
            drafts = writer.places(ledger.paths, commit.group)
            done |= zip(drafts, writer.records(ledger.paths, commit.group), strict=True)
    return done
