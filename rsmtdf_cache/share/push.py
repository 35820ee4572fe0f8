"""Publish a store, or a part of it, at a URL. Pixels travel only if asked for, labels never.

Order: manifest, tile segments, set records, then unit by unit the shards and the commit record (put-if-absent), Zarr
metadata, and ``ledger/head.json`` last: readers of a remote store trust the head alone. A local shard is compared with
its recorded sha256 before it leaves.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rsmtdf_cache.bucket.lease import refuse_held
from rsmtdf_cache.errors import FindingsError, Interrupted, MismatchError, ResourceError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.files import RECORD_NBYTES_MAX, read_json, record_bytes, replace_file, replace_json, sha256_file
from rsmtdf_cache.head import parse_head, read_head, write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.share.address import Address
from rsmtdf_cache.share.checks import check_stats, refuse_double, refuse_other_store
from rsmtdf_cache.share.names import HEAD, checked_name, is_metadata, safe_place
from rsmtdf_cache.share.parallel import Counter, run_jobs
from rsmtdf_cache.share.pull import CopyReport, copy_local, find_damaged
from rsmtdf_cache.share.select import CopyPlan, Selection, Unit, plan_copy
from rsmtdf_cache.share.staged import Staged, local_records, read_remote_head, stage_records
from rsmtdf_cache.share.transport import Transport, connect
from rsmtdf_cache.tiles import TileTable, read_segment

__all__ = ["push_store"]

#: Other pushes to the same place that end meanwhile make this one look again.
_ROUNDS = 5


def push_store(
    root: str | Path,
    url: str | Address,
    selection: Selection | None = None,
    on_event: EventSink = ignore_events,
    workers: int = 4,
    dry_run: bool = False,
    deep: bool = False,
) -> CopyReport:
    """Publish the store ``root`` (a folder, or ``FOLDER@SNAPSHOT``) at ``url``; return what was done.

    A second call continues, or adds what is new, and replaces what is missing there or of another size; ``deep``: also
    what has another sha256 (reads all of it). Raises ``MismatchError`` (another store is there; nothing was
    overwritten), ``FindingsError`` (a local shard is damaged), ``ResourceError`` (network), ``UsageError``.
    """
    started = time.perf_counter()
    target = url if isinstance(url, Address) else Address.parse(url)
    origin, chosen = Address.parse(root), selection or Selection()
    if target.snapshot is not None:
        raise UsageError(f"{target.shown}: a push goes to a place, not to a snapshot; write it without @SNAPSHOT")
    if target.is_http:
        raise UsageError(f"{target.shown}: can only be read; push to a folder or an object store (s3://bucket/store)")
    if origin.is_remote:
        raise UsageError(f"{origin.shown} is remote; bring it here with `rsmtdf cache pull`, then push that folder")
    if target.is_local:
        return copy_local(origin, target.path, chosen, on_event, workers, dry_run, deep)
    source = local_records(origin.path, origin.snapshot)
    transport = connect(Address(target.scheme, target.location, target.query))
    if not dry_run:
        refuse_held(transport)
    report = CopyReport(origin.shown, target.shown, dry_run, CopyPlan(), source.snapshot)
    first: CopyPlan | None = None
    try:
        for _ in range(_ROUNDS):
            with tempfile.TemporaryDirectory(prefix="rsmtdf-") as folder:
                push = _Push(source, transport, chosen, Path(folder) / "image", on_event, workers, deep)
                first = first or push.plan
                report.plan = first
                if dry_run or push.run(report):
                    break
        else:
            raise ResourceError(f"{target.shown}: other pushes keep changing it; run the same command again")
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; what arrived at {target.shown} stays, the same command continues") from None
    report.seconds = time.perf_counter() - started
    return report


class _Push:
    """One round: the remote's records as they are now, a plan, the transfers, and a new head.

    ``image``: a folder with the records that the remote will have, and no shards.
    """

    def __init__(
        self, source: Staged, transport: Transport, selection: Selection, image: Path, on_event: EventSink,
        workers: int, deep: bool,
    ) -> None:  # fmt: skip
        self.workers, self.deep = workers, deep
        self.source, self.transport, self.on_event = source, transport, on_event
        self.paths, self.shown = StorePaths(image), transport.address.shown
        self.there: set[str] = set()  # immutable files that the remote has for certain
        self.head = read_remote_head(transport)
        if deep and self.head is not None:
            self._mend_records(self.head, image / "tmp")
        theirs = stage_records(transport, image, self.head) if self.head is not None else None
        if theirs is not None:
            refuse_other_store(
                (source.manifest, source.ledger), (theirs.manifest, theirs.ledger), transport.address.shown
            )
        rows = source.manifest.group_rows
        self.plan = plan_copy(source.ledger, rows, selection, theirs.ledger if theirs is not None else None)
        self.plan.replace_damaged(lambda shards: find_damaged(transport, shards, deep, workers, on_event))

    def _mend_records(self, raw: bytes, scratch: Path) -> None:
        """Put records there again that are damaged or missing, where the head's sha256 is that of one of ours."""
        replace_file(scratch / "head.json", raw)
        head = parse_head(read_json(scratch / "head.json"), self.shown)
        facts = {checked_name(n): f for n, f in head.files.items() if not is_metadata(n)}
        bad = [n for n, (nbytes, digest) in facts.items() if self.transport.sha256(n, nbytes) != digest]
        for name in bad:
            place = safe_place(self.source.paths.root, name)
            for data in self._records_of(name, place, scratch):
                if hashlib.sha256(data).hexdigest() == facts[name][1]:
                    self.transport.put(name, data, absent=False)
                    self.on_event(Warned(f"{self.shown}: {name} was damaged or missing and is replaced"))
                    break

    def _records_of(self, name: str, place: Path, scratch: Path) -> Iterator[bytes]:
        if place.is_file():
            yield place.read_bytes()
        for commit in (c for found in self.source.ledger.generations.values() for c in found.values()):
            if name == self.source.paths.relative(
                self.source.paths.commit(commit.set_id, commit.group, commit.generation)
            ):  # folded into a segment here, a file of its own there
                replace_json(scratch / "commit.json", self.source.ledger.complete(commit).to_json())
                yield (scratch / "commit.json").read_bytes()

    def run(self, report: CopyReport) -> bool:
        """Return whether the remote's head lists everything now; False when it changed meanwhile."""
        self._begin()
        self._transfer(report)
        ledger = Ledger.load(self.paths)
        if self.plan.undrop & ledger.dropped:
            ledger.undrop(self.plan.undrop)
        ledger.compact()
        return self._finish(ledger, report)

    def _begin(self) -> None:
        """Bring the records that units refer to into the image and to the remote."""
        source = self.source.paths
        self._record(source.manifest)
        for first in sorted(self.source.ledger.segments):
            if not self.paths.tile_segment(first).is_file():
                self._tiles(source.tile_segment(first))
        for name in self.plan.arrays:
            for digest in self.source.ledger.sets[name].calibrations.values():
                self._record(source.calibration(digest))
            self._record(source.array_set(name))
        try:
            manifest, ledger = load_manifest(self.paths), Ledger.load(self.paths)
        except FindingsError:
            raise self._foreign() from None
        refuse_other_store((self.source.manifest, self.source.ledger), (manifest, ledger), self.shown)
        refuse_double(self.plan.arrays, self.source.ledger, ledger, self.shown)
        if self.plan.drop - ledger.dropped:
            ledger.drop(self.plan.drop)
        if not self.paths.quarantine.is_file() and source.quarantine.is_file():
            replace_file(self.paths.quarantine, source.quarantine.read_bytes())

    def _tiles(self, record: Path) -> None:
        """Bring a tile segment. A push that was stopped may have put its table without the record: theirs counts."""
        table = record.with_suffix(".parquet")
        self._record(table)
        place = self.paths.root / self.source.paths.relative(table)
        body, theirs = read_json(record), sha256_file(place)
        if theirs == body["sha256"]:
            self._record(record)
            return
        try:
            splits = TileTable([(0, read_segment(place, body["rows"]))]).splits
        except FindingsError:
            raise self._foreign() from None
        self._record(record, record_bytes({**body, "sha256": theirs, "splits": splits}))

    def _foreign(self) -> MismatchError:
        return MismatchError(
            f"{self.shown}: files of another store, or of a broken push, are there; push to another place"
        )

    def _record(self, record: Path, data: bytes | None = None) -> None:
        name = self.source.paths.relative(record)
        place = self.paths.root / name
        if place.is_file():
            return
        data = data or record.read_bytes()
        if not self.transport.put(name, data):
            # Of an earlier push, or of one beside this: theirs counts, and is compared by its meaning.
            data = self.transport.get(name, 2 * len(data) + 2**16) or data
        replace_file(place, data)
        self.there.add(name)

    def _transfer(self, report: CopyReport) -> None:
        task = "push"
        self.on_event(ProgressStart(task, f"pushing to {self.shown}", self.plan.nbytes, unit="bytes"))

        def count(nbytes: int, moved: int) -> None:
            report.nbytes_moved += moved
            self.on_event(Progress(task, nbytes, moved))

        for _ in run_jobs(((unit, self._job(unit)) for unit in self.plan.units), self.workers, count):
            pass
        self.on_event(ProgressEnd(task))
        for note in self.plan.notes[:5]:
            self.on_event(Warned(note))

    def _job(self, unit: Unit) -> Callable[[Counter], None]:
        def send(count: Counter) -> None:
            commit = check_stats(self.source.ledger, unit.commit, str(self.source.paths.root))
            place = self.paths.commit(commit.set_id, commit.group, commit.generation)
            name = self.paths.relative(place)
            there = self._their_record(name, commit) if unit.is_new else b""
            for shard in unit.shards:
                self._send(shard, there is not None, commit.generation > 0, count)
            if not unit.is_new:
                return
            if there is None:
                scratch = self.paths.root / "tmp" / f"{commit.set_id}-{place.name}"
                replace_json(scratch, commit.to_json())
                there = scratch.read_bytes()
                if not self.transport.put(name, there):
                    there = self._their_record(name, commit) or there
            replace_file(place, there)
            self.there.add(name)

        return send

    def _their_record(self, name: str, commit: Commit) -> bytes | None:
        """Return the commit record that is there. Raises ``MismatchError`` when it says something else than ours."""
        data = self.transport.get(name, RECORD_NBYTES_MAX)
        if data is None:
            return None
        try:
            same = Commit.from_json(json.loads(data)).to_json() == commit.to_json()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            same = False
        if not same:
            raise self._other(name)
        return data

    def _send(self, shard: ShardRecord, recorded: bool, replace: bool, count: Counter) -> None:
        place = self.source.paths.root / shard.path
        size, trusted = self.transport.size(shard.path), recorded and not self.deep
        if size == shard.nbytes and (trusted or self.transport.sha256(shard.path, size) == shard.sha256):
            count(shard.nbytes, 0)
            return  # an earlier push, or one beside this, brought it
        # A record there that says what ours says proves which bytes belong there.
        replace = replace or recorded
        if size is not None and not replace:
            raise self._other(shard.path)
        if not place.is_file() or sha256_file(place) != shard.sha256:
            raise FindingsError(
                f"{place}: missing, or not the bytes that were committed; it was not pushed: run "
                "`rsmtdf cache verify --deep --repair` on the store, then the same command again"
            )
        sent = self.transport.put(shard.path, place, absent=not replace)
        if not sent and self.transport.sha256(shard.path, shard.nbytes) != shard.sha256:
            raise self._other(shard.path)
        count(shard.nbytes, shard.nbytes)

    def _other(self, name: str) -> MismatchError:
        return MismatchError(
            f"{self.shown}: {name} is there with other bytes than this store's (built or repaired elsewhere); nothing "
            "was overwritten; push to another place"
        )

    def _finish(self, ledger: Ledger, report: CopyReport) -> bool:
        old = dict(read_head(self.paths).files) if self.head is not None else {}
        new = write_head(self.paths, load_manifest(self.paths), ledger)
        report.snapshot = new.snapshot
        root = "zarr/zarr.json"  # consolidated: it comes after what it describes
        for name in sorted(new.files, key=lambda n: (n == root, n)):
            again = self.deep and is_metadata(name)  # small, and nobody looked at what is there
            if name not in self.there and (again or old.get(name) != new.files[name]):
                self.transport.put(name, self.paths.root / name, absent=False)
        data = self.paths.head.read_bytes()
        if read_remote_head(self.transport) != self.head:
            return False  # another push ended meanwhile: its units belong into the head as well
        if data != self.head:
            self.transport.put(HEAD, data, absent=False)
        return read_remote_head(self.transport) == data
