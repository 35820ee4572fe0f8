"""The records of a store at a URL, in a folder of this machine while a build writes there, and on their way back.

What the folder has counts for nothing: it is filled from the URL when a build begins.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from rsmtdf_cache.bucket import steps
from rsmtdf_cache.errors import MismatchError, ResourceError
from rsmtdf_cache.files import RECORD_NBYTES_MAX, make_folders, replace_file, sha256_file
from rsmtdf_cache.head import read_head, record_files
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.share.checks import check_ledger
from rsmtdf_cache.share.names import HEAD, MANIFEST, checked_name, is_replaced, safe_place
from rsmtdf_cache.share.staged import read_remote_head, stage_records
from rsmtdf_cache.share.transport import Transport

__all__ = ["RemoteRecords"]

_AT_ONCE = 8
#: What is put first, so that nothing names what is not there: a prefix each, the rest (commits, segments) after them.
_ORDER = (MANIFEST, "ledger/tiles/", "ledger/calibrations/", "ledger/sets/", "ledger/", "zarr/")


class RemoteRecords:
    """The records behind ``transport``, mirrored in the folder of ``paths``. The caller holds lock and lease."""

    def __init__(self, transport: Transport, paths: StorePaths) -> None:
        self._transport, self._paths, self._shown = transport, paths, transport.address.shown
        self._head: bytes | None = None
        self._there: dict[str, str] = {}  # sha256 of what the URL has, by name

    def fill(self) -> None:
        """Make the folder what the URL has: what its head names, and what a killed build published besides.

        Raises ``FindingsError`` for damage, ``MismatchError`` for a newer format, ``ResourceError``.
        """
        root = self._paths.root
        shutil.rmtree(self._paths.zarr, ignore_errors=True)
        self._head, self._there = read_remote_head(self._transport), {}
        if self._head is not None:
            stage_records(self._transport, root, self._head, all_snapshots=True)
            self._there = {name: digest for name, (_, digest) in read_head(self._paths).files.items()}
        else:
            shutil.rmtree(root, ignore_errors=True)
            self._bring_manifest()
        make_folders(self._paths.ledger)
        self._bring_unlisted()
        if self._paths.manifest.is_file():
            check_ledger(load_manifest(self._paths), Ledger.load(self._paths), self._shown)

    def _bring_manifest(self) -> None:
        raw = self._transport.get(MANIFEST, RECORD_NBYTES_MAX)
        if raw is not None:
            replace_file(self._paths.manifest, raw)
            self._there[MANIFEST] = sha256_file(self._paths.manifest)

    def refuse_foreign(self) -> None:
        """Raise ``MismatchError`` when other files than a store's are there, or what a killed build left of one."""
        if self._transport.size(HEAD) is not None or self._transport.size(MANIFEST) is not None:
            return
        found = [name for name in self._transport.top() or () if name and name != "ledger"]
        if found:
            raise MismatchError(
                f"{self._shown} is not empty and is no feature store (found {', '.join(found[:3])}"
                f"{' …' if len(found) > 3 else ''}); choose a new or empty place"
            )

    def _bring_unlisted(self) -> None:
        """Bring records that no head names yet: published one by one by a build that was killed, or is a push's."""
        listed = self._transport.listing("ledger") or {}
        known = set(self._there) | _names_of_commits(self._paths)
        names = [n for n in listed if n not in known and _is_lasting(n) and _has_its_file(n, listed)]

        def bring(name: str) -> None:
            data = self._transport.get(name, RECORD_NBYTES_MAX)
            if data is not None:
                replace_file(safe_place(self._paths.root, name), data)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(bring, names))
        self._leave_doubles({PurePosixPath(n).stem for n in names if n.startswith("ledger/sets/")})
        for path in record_files(self._paths):
            name = self._paths.relative(path)
            if not is_replaced(name):  # made here, or not brought: only the head says that they are there
                self._there.setdefault(name, sha256_file(path))

    def _leave_doubles(self, unlisted: set[str]) -> None:
        """Leave unlisted sets alone that have an array which a listed one has: of a push that was stopped, and late."""
        if not unlisted or not self._paths.manifest.is_file():
            return
        ledger = Ledger.load(self._paths)
        taken = {spec.key for name in ledger.sets.keys() - unlisted for spec in ledger.live(name)}
        for name in ledger.sets.keys() & unlisted:
            if taken & {spec.key for spec in ledger.sets[name].arrays.specs}:
                self._paths.array_set(name).unlink()
                shutil.rmtree(self._paths.ledger / "commits" / name, ignore_errors=True)

    def add(self, name: str, data: bytes, same: Callable[[bytes], bool]) -> None:
        """Publish the record ``name`` put-if-absent, there and in the folder.

        Raises ``MismatchError`` when one is there already that is not the ``same`` (which an answer that was lost, or
        another writer of the same facts, leaves).
        """
        if not self._transport.put(name, data):
            data = self._transport.get(name, RECORD_NBYTES_MAX) or b""
            if not same(data):
                raise self._other(name)
        steps.after_step(7)
        place = self._paths.root / name
        replace_file(place, data)
        self._there[name] = sha256_file(place)
        steps.after_step(8)

    def publish(self) -> None:
        """Put what the folder's head names and the URL lacks, then the head, if nobody else replaced it meanwhile.

        Raises ``ResourceError`` when somebody did, ``MismatchError`` when a record is there with other content.
        """
        head = read_head(self._paths)
        facts: Mapping[str, tuple[int, str]] = head.files
        new = sorted((n for n in facts if self._there.get(n) != facts[n][1]), key=_rank)
        for _, names in itertools.groupby(new, key=_rank):
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(self._put, names))
        self._there |= {name: facts[name][1] for name in new}
        steps.after_step(9)
        data = self._paths.head.read_bytes()
        if data != self._head:
            self._replace_head(data)
        steps.after_step(10)

    def _put(self, name: str) -> None:
        data = (self._paths.root / name).read_bytes()
        if is_replaced(name):
            self._transport.put(name, data, absent=False)
            return
        if self._transport.put(name, data) or self._transport.get(name, 2 * len(data) + 2**16) == data:
            return
        record = name.removesuffix(".parquet") + ".json"
        if record == name or self._transport.size(record) is not None:  # else a killed build's: no record names it
            raise self._other(name)
        self._transport.put(name, data, absent=False)

    def _other(self, name: str) -> MismatchError:
        return MismatchError(
            f"{self._shown}: {name} is there with other content, of a push or build beside this one; nothing was "
            "overwritten. Run the same command again, it goes on from what is there"
        )

    def _replace_head(self, data: bytes) -> None:
        found = self._transport.tagged(HEAD)
        if (found.data if found is not None else None) == self._head:
            if found is None:
                self._transport.put(HEAD, data)
            else:
                self._transport.replace(HEAD, data, found.tag)
        if read_remote_head(self._transport) != data:
            raise ResourceError(
                f"{self._shown}: a push ended there while this build ran; every unit is safe, the same command lists it"
            )
        self._head = data


def _rank(name: str) -> tuple[int, bool]:
    """Return when ``name`` is put. A file of tiles comes before its record, consolidated metadata last of all."""
    place = next(i for i, prefix in enumerate(_ORDER) if name.startswith(prefix))
    return place, name == "zarr/zarr.json" or (place == 1 and name.endswith(".json"))


def _is_lasting(name: str) -> bool:
    """Whether ``name`` is a record that never changes and says of itself what it is. Segments repeat commits."""
    return name.startswith((*_ORDER[1:4], "ledger/commits/")) and checked_name(name) == name


def _has_its_file(name: str, listed: Mapping[str, int]) -> bool:
    """Whether a tile segment is there with its record; one without was never published."""
    both = (name.removesuffix(".json").removesuffix(".parquet") + end for end in (".json", ".parquet"))
    return not name.startswith("ledger/tiles/") or all(n in listed for n in both)


def _names_of_commits(paths: StorePaths) -> set[str]:
    if not paths.manifest.is_file():
        return set()
    known = Ledger.load(paths).generations
    return {
        paths.relative(paths.commit(set_id, group, generation))
        for (set_id, group), generations in known.items()
        for generation in generations
    }
