"""The records of a store elsewhere, brought into a folder, checked, and read as a ledger. No shard is touched."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError, MismatchError, ResourceError
from rsmtdf_cache.files import RECORD_NBYTES_MAX, make_folders, read_json, replace_file, sha256_file
from rsmtdf_cache.head import Head, find_snapshot, load_whole, read_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest, load_manifest
from rsmtdf_cache.share.checks import check_ledger
from rsmtdf_cache.share.names import (
    DROPPED,
    HEAD,
    LEASE,
    MANIFEST,
    QUARANTINE,
    checked_name,
    is_metadata,
    is_replaced,
    is_shard,
    safe_place,
)
from rsmtdf_cache.share.transport import Transport

__all__ = ["Staged", "is_whole", "local_records", "read_remote_head", "stage_records", "store_missing"]

#: Bounds on what a remote may announce. A manifest has a few hundred bytes, a head 150 bytes a file.
MANIFEST_NBYTES_MAX, HEAD_NBYTES_MAX, FILES_MAX = 2**20, 64 * 2**20, 2**19
PARQUET_NBYTES_MAX = 4 * 2**30
#: A head that changes while its files are read is read again.
_TRIES = 4


@dataclass(frozen=True)
class Staged:
    """A store's records in the folder of ``paths``: what it holds, without its shards."""

    paths: StorePaths
    manifest: Manifest
    ledger: Ledger
    snapshot: str

    def unfinished(self, shown: str) -> str:
        """Return a warning when no row group is listed, else an empty text. ``shown``: how to call the store."""
        if any(self.ledger.commits.values()):
            return ""
        return f"{shown}: its last build or push has not ended: no row group is listed yet, so no feature comes"


def local_records(root: Path, snapshot: str | None = None) -> Staged:
    """Return the records of a store on this disk, where they lie. Raises what opening a store raises.

    What is committed counts, also while a build runs or after it was stopped.
    """
    paths = StorePaths(root)
    manifest, ledger = load_manifest(paths), load_whole(paths)
    check_ledger(manifest, ledger, str(root))
    if snapshot is not None:
        ledger = find_snapshot(paths, ledger, snapshot)
    return Staged(paths, manifest, ledger, ledger.snapshot())


def read_remote_head(transport: Transport) -> bytes | None:
    """Return ``ledger/head.json`` as it is there now, None when there is none.

    Raises ``MismatchError`` when a web page comes instead.
    """
    raw = transport.get(HEAD, HEAD_NBYTES_MAX)
    if raw is not None and raw[:256].lstrip()[:1] == b"<":
        raise MismatchError(
            f"{transport.address.shown}: no feature store is there (the server sends a web page for {HEAD}); check the "
            "address, and whether the server asks to log in"
        )
    return raw


def store_missing(transport: Transport) -> MismatchError:
    """Return what to raise where no head is, with as much of the reason as can be told."""
    shown = transport.address.shown
    if transport.bucket_missing:
        return MismatchError(f"{shown}: no feature store is there: the bucket does not exist; check the address")
    if transport.get(MANIFEST, MANIFEST_NBYTES_MAX) is not None:
        return MismatchError(
            f"{shown}: no feature store is there yet: a build or push has begun ({MANIFEST} is there) and has not "
            f"ended (no {HEAD}); run it again, it continues"
        )
    return MismatchError(f"{shown}: no feature store is there (no {HEAD}); check the address")


def is_whole(root: Path, raw: bytes) -> bool:
    """Whether the records that ``stage_records`` brought to ``root`` for the head ``raw`` are still as it left them."""
    try:
        paths = StorePaths(root)
        if paths.head.read_bytes() != raw or (paths.dropped.is_file() and not read_json(paths.dropped)):
            return False
        for name, (nbytes, digest) in read_head(paths).files.items():
            if is_replaced(name):
                continue
            place = root / checked_name(name)
            if place.stat().st_size != nbytes or sha256_file(place) != digest:
                return False
    except (OSError, FindingsError):
        return False
    return True


def stage_records(transport: Transport, root: Path, raw: bytes | None = None, all_snapshots: bool = False) -> Staged:
    """Bring the records of the store behind ``transport`` to the folder ``root`` and return them, checked.

    What ``root`` has already is not fetched again; the head comes last, so that a folder with a head is complete.
    ``raw``: the head, when the caller has read it. With a snapshot in the address, that content is returned;
    ``all_snapshots``: the records of every snapshot come along.
    Raises ``MismatchError`` (no store, newer format), ``FindingsError`` (damage, hostility), ``ResourceError``.
    """
    shown = transport.address.shown
    for attempt in range(_TRIES):
        raw = raw if raw is not None else read_remote_head(transport)
        if raw is None:
            raise store_missing(transport)
        try:
            return _stage(transport, root, raw, all_snapshots)
        except (FindingsError, MismatchError) as error:
            # What is wrong is wrong there, not in the folder that the records came to.
            failure = type(error)(
                str(error).replace(str(StorePaths(root / "tmp").root), shown).replace(str(root), shown)
            )
        now = read_remote_head(transport)
        if now == raw or attempt == _TRIES - 1:
            raise failure
        raw = now
    raise AssertionError("the last try returns or raises")


def _stage(transport: Transport, root: Path, raw: bytes, all_snapshots: bool) -> Staged:
    paths, shown = StorePaths(root), transport.address.shown
    make_folders(paths.ledger)
    # The manifest first: a newer format may have files that this version would take for hostile.
    data = transport.get(MANIFEST, MANIFEST_NBYTES_MAX)
    if data is None:
        raise FindingsError(f"{shown}: {HEAD} is there and {MANIFEST} is not; the remote store is damaged")
    replace_file(paths.manifest, data)
    manifest = load_manifest(paths)
    draft = StorePaths(root / "tmp")
    replace_file(draft.head, raw)
    head = read_head(draft)
    files = dict(_wanted(transport, head, shown, all_snapshots))
    for place in _staged_files(root):
        if place.relative_to(root).as_posix() not in files:
            place.unlink()
    _refuse_too_much(root, files, shown)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda item: _bring(transport, root, *item), files.items()):
            pass
    _bring_quarantine(transport, paths, head)
    ledger = Ledger.load(paths)
    _derive_dropped(paths, ledger, head, shown)
    check_ledger(manifest, ledger, shown)
    snapshot = head.snapshot
    if transport.address.snapshot is not None:
        ledger = find_snapshot(paths, ledger, transport.address.snapshot)
        snapshot = ledger.snapshot()
    elif ledger.snapshot() != head.snapshot:
        raise FindingsError(f"{shown}: its records amount to another snapshot than its head names; it is damaged")
    replace_file(paths.head, raw)
    shutil.rmtree(draft.root, ignore_errors=True)
    return Staged(paths, manifest, ledger, snapshot)


def _wanted(transport: Transport, head: Head, shown: str, all_snapshots: bool) -> Iterator[tuple[str, tuple[int, str]]]:
    """Yield the files of the head that are records and never change. Derived metadata is made anew where it is needed.

    ``dropped.json`` is replaced by a push before the head is, so what is dropped is taken from the snapshot's record.
    """
    if len(head.files) > FILES_MAX:
        raise FindingsError(f"{shown}: its head names {len(head.files)} files; damaged or hostile, nothing was used")
    asked, now = transport.address.snapshot, f"ledger/snapshots/{head.snapshot}.json"
    for name, (nbytes, digest) in head.files.items():
        checked_name(name)
        limit = PARQUET_NBYTES_MAX if name.endswith(".parquet") else RECORD_NBYTES_MAX
        if is_shard(name) or name in (HEAD, LEASE) or nbytes > limit:
            raise FindingsError(f"{shown}: its head names {name} with {nbytes} bytes; it is damaged or hostile")
        if is_metadata(name) or name == QUARANTINE or (name == DROPPED and now in head.files):
            continue
        other = re.match("ledger/snapshots/([0-9a-f]+)", name)
        if other is None or all_snapshots or name == now or (asked is not None and other[1].startswith(asked)):
            yield name, (nbytes, digest)


def _derive_dropped(paths: StorePaths, ledger: Ledger, head: Head, shown: str) -> None:
    record = paths.snapshot(head.snapshot)
    if not record.is_file():  # a build that has not ended; its dropped.json came along
        return
    try:
        layers = Content.from_json(read_json(record)).layers
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FindingsError(f"{shown}: the record of its snapshot is none ({error}); it is damaged") from None
    arrays = {(name, s.layer.name) for name, r in ledger.sets.items() for s in r.arrays.specs}
    gone = arrays - {(name, layer) for name, kept in layers.items() for layer in kept}
    if gone:  # else there is no such file, as in the store itself: a build that goes on there names what lies here
        ledger.drop(gone)


def _bring_quarantine(transport: Transport, paths: StorePaths, head: Head) -> None:
    """Bring the list of tiles left out, for people; while a push replaces it there is none."""
    nbytes, digest = head.files.get(QUARANTINE, (0, ""))
    data = transport.get(QUARANTINE, RECORD_NBYTES_MAX) if nbytes else None
    if data is not None and hashlib.sha256(data).hexdigest() == digest:
        replace_file(paths.quarantine, data)


def _staged_files(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root / "ledger"):
        yield from (Path(folder) / name for name in names)


def _refuse_too_much(root: Path, files: dict[str, tuple[int, str]], shown: str) -> None:
    need, free = sum(nbytes for nbytes, _ in files.values()), shutil.disk_usage(root).free
    if need > free * 0.9:
        raise ResourceError(f"{shown}: its records take {need / 1e9:.2f} GB, {root} has {free / 1e9:.2f} GB free")


def _bring(transport: Transport, root: Path, name: str, facts: tuple[int, str]) -> None:
    nbytes, digest = facts
    place = safe_place(root, name)
    if place.is_file() and place.stat().st_size == nbytes and sha256_file(place) == digest:
        return
    make_folders(place.parent)
    draft = root / "tmp" / f"{digest}.{name.replace('/', '-')}"
    transport.fetch(name, draft, nbytes, digest, lambda count: None)
    draft.replace(place)
