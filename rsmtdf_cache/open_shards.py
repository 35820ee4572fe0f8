"""The shards of a store that a process has mapped, each compared with its recorded sha256 as the caller asks."""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Collection, Mapping
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

__all__ = ["OpenShards", "VerifyReads"]

VerifyReads = Literal["first", "always", "never"]


class OpenShards:
    """Maps a shard when it is first asked for, and keeps it. Safe among threads, and after a fork.

    ``records``: which shards of an array are committed, by row group. ``mirror`` fetches those of a remote store.
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
        self._verify_reads, self._mirror = verify_reads, mirror
        # Read at every crop, so looked up once.
        self.records = {(k, p): ledger.shards(k, p) for k, spec in specs.items() for p in parts_of(spec)}
        self._open: dict[tuple[FeatureKey, Part], dict[int, ShardReader]] = {}
        self.lock = threading.Lock()
        _OPEN.add(self)

    @property
    def _shown(self) -> str:
        return str(self._paths.root) if self._mirror is None else self._mirror.address.shown

    def of(self, key: FeatureKey, groups: Collection[int], part: Part = "features") -> dict[int, ShardReader | None]:
        """Return the shards of row groups of an array, None for one that is not committed.

        Raises ``FindingsError`` for a damaged or missing one, ``MismatchError`` for one that lies elsewhere,
        ``ResourceError`` when it cannot be fetched.
        """
        records = self.records[key, part]
        found: dict[int, ShardReader | None] = {}
        with self.lock:
            opened = self._open.setdefault((key, part), {})
            for group in groups:
                record, shard = records.get(group), opened.get(group)
                if record is None:
                    found[group] = None
                    continue
                if shard is None:
                    shard = opened[group] = self._open_shard(key, group, part, record)
                elif self._verify_reads == "always":
                    _compare(shard, record)
                found[group] = shard
        return found

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
        if self._verify_reads == "always" or (self._verify_reads == "first" and not is_checked(place, record.sha256)):
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
        for opened in self._open.values():
            for group in [group for group, shard in opened.items() if not shard.path.exists()]:
                del opened[group]
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
