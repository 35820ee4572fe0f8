"""The shards of a store that a process has mapped, each compared with its recorded sha256 as the caller asks."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rsmtdf_cache.errors import FindingsError, MismatchError, ResourceError
from rsmtdf_cache.layout import Part, StorePaths, parts_of, shard_layout
from rsmtdf_cache.ledger import Ledger, ShardRecord
from rsmtdf_cache.readcheck import is_checked, mark_checked
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.specs import FeatureKey, FeatureSpec

if TYPE_CHECKING:
    from rsmtdf_cache.share.remote import RemoteMirror

__all__ = ["ArrayShards", "OpenShards", "VerifyReads"]

VerifyReads = Literal["first", "always", "never"]


class ArrayShards:
    """The shards of one part of an array: ``records`` of those committed, by row group, and which are ``opened``."""

    def __init__(self, owner: OpenShards, key: FeatureKey, part: Part, records: Mapping[int, ShardRecord]) -> None:
        self.key, self.part, self.records = key, part, records
        self.opened: dict[int, ShardReader] = {}
        self._owner = owner
        self._compares = owner.verify_reads == "always"

    def get(self, group: int) -> ShardReader | None:
        """Return the shard of a row group, None for one that is not committed.

        Raises ``FindingsError`` for a damaged or missing one, ``MismatchError`` for one that lies elsewhere,
        ``ResourceError`` when it cannot be fetched.
        """
        shard = self.opened.get(group)
        return self._owner.open(self, group) if shard is None or self._compares else shard

    def fetch_soon(self, group: int) -> bool:
        """Have a shard that is not open fetched meanwhile where the store is remote; return whether that was new."""
        record = self.records.get(group)
        return record is not None and self._owner.fetch_soon(self, group, record)


class OpenShards:
    """Maps a shard when it is first asked for, and keeps it. Safe among threads, and after a fork.

    ``mirror`` fetches the shards of a remote store.
    """

    def __init__(
        self,
        paths: StorePaths,
        ledger: Ledger,
        specs: Mapping[FeatureKey, FeatureSpec],
        group_rows: int,
        verify_reads: VerifyReads,
        mirror: RemoteMirror | None,
    ) -> None:
        self._paths, self._specs, self._group_rows = paths, specs, group_rows
        self.verify_reads, self._mirror = verify_reads, mirror
        self._parts = {
            (key, part): ArrayShards(self, key, part, ledger.shards(key, part))
            for key, spec in specs.items()
            for part in parts_of(spec)
        }
        self.lock = threading.Lock()
        _OPEN.add(self)

    def of(self, key: FeatureKey, part: Part = "features") -> ArrayShards:
        """Return the shards of one part of an array. What reads it often keeps it: hashing a key takes long."""
        return self._parts[key, part]

    @property
    def _shown(self) -> str:
        return str(self._paths.root) if self._mirror is None else self._mirror.address.shown

    def open(self, shards: ArrayShards, group: int) -> ShardReader | None:
        """Return a shard that ``shards`` has not opened yet, or is to compare at every read."""
        record = shards.records.get(group)
        if record is None:
            return None
        with self.lock:
            shard = shards.opened.get(group)
            if shard is None:
                try:
                    shard = shards.opened[group] = self._open_shard(shards.key, group, shards.part, record)
                finally:
                    if self._mirror is not None:
                        self._mirror.taken(record)
            elif self.verify_reads == "always":
                _compare(shard, record)
            return shard

    def fetch_soon(self, shards: ArrayShards, group: int, record: ShardRecord) -> bool:
        """Have a shard of a remote store fetched meanwhile; return whether that was new."""
        if self._mirror is None:
            return False
        place = self._paths.shard(shards.key, group, shards.part)
        return self._mirror.fetch_soon(record, place, lambda: group not in shards.opened)

    def nbytes(self, keys: Iterable[FeatureKey], groups: Collection[int]) -> int:
        """Return the bytes of the committed shards of ``keys`` that hold ``groups``; those held in memory are none."""
        some = [self.of(key, part) for key in keys for part in parts_of(self._specs[key])]
        return sum(
            record.nbytes
            for shards in some
            for group, record in shards.records.items()
            if group in groups and not (group in shards.opened and shards.opened[group].in_memory)
        )

    def hold(self, key: FeatureKey, group: int, part: Part) -> int:
        """Read a committed shard from memory from now on, and return its bytes. Raises as ``get`` does.

        The copy is compared with the recorded sha256 whatever was compared before: it will not be looked at again.
        """
        shards = self.of(key, part)
        shard, record = shards.get(group), shards.records[group]
        assert shard is not None
        copy = shard.copied()
        _compare(copy, record)
        with self.lock:
            shards.opened[group] = copy
        return record.nbytes

    def _open_shard(self, key: FeatureKey, group: int, part: Part, record: ShardRecord) -> ShardReader:
        place = self._paths.shard(key, group, part)
        if record.path != self._paths.relative(place):
            raise MismatchError(
                f"{self._shown}: the ledger names {record.path} for {key}, expected {self._paths.relative(place)}"
            )
        try:
            return self._checked(place, key, record)
        except FindingsError:
            if self._mirror is None:
                raise
        self._mirror.discard(record, place)  # damaged in the cache of this machine: fetched once more
        return self._checked(place, key, record)

    def _checked(self, place: Path, key: FeatureKey, record: ShardRecord) -> ShardReader:
        shard = self._map(place, key, record)
        if self.verify_reads == "always" or (self.verify_reads == "first" and not is_checked(place, record.sha256)):
            _compare(shard, record)
            mark_checked(place, record.sha256)
        return shard

    def _map(self, place: Path, key: FeatureKey, record: ShardRecord) -> ShardReader:
        layout = shard_layout(self._specs[key], self._group_rows, record.part)
        if self._mirror is None:
            try:
                return ShardReader(place, layout)
            except FileNotFoundError:
                raise FindingsError(
                    f"{place}: a committed shard is missing; run `rsmtdf cache verify`, or open the store again if "
                    "`rsmtdf cache gc` ran meanwhile"
                ) from None
        # What was evicted stays on the disk as long as it is mapped here, beyond the bound of the cache.
        for shards in self._parts.values():
            for group in [g for g, shard in shards.opened.items() if not shard.in_memory and not shard.path.exists()]:
                del shards.opened[group]
        for _ in range(10):  # another process may evict the shard before it is mapped
            self._mirror.ensure(record, place)
            with contextlib.suppress(FileNotFoundError):
                return ShardReader(place, layout)
        raise ResourceError(
            f"{self._shown}: the cache of remote shards is too small for the processes that read from it; raise "
            "RSMTDF_REMOTE_CACHE_GB, or copy the store with `rsmtdf cache pull`"
        )


def _compare(shard: ShardReader, record: ShardRecord) -> None:
    if shard.sha256() != record.sha256:
        raise FindingsError(
            f"{shard.path}: its bytes are not those committed (sha256 differs); run `rsmtdf cache verify --deep`"
        )


#: All of this process. A fork copies locks as they are, held or not, so the child gets new ones.
_OPEN: weakref.WeakSet[OpenShards] = weakref.WeakSet()


def _renew_locks() -> None:
    for shards in _OPEN:
        shards.lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)
