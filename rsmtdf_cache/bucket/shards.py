"""Finished shards on their way to an object store: created, never replaced. What every process that encodes needs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rsmtdf_cache.bucket import steps
from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.records import Commit, ShardRecord
from rsmtdf_cache.share.transport import Transport

__all__ = ["OccupiedError", "ShardSender"]

#: Shards of one unit that travel at once.
_AT_ONCE = 4


class OccupiedError(ResourceError):
    """Objects with other bytes lie where shards of a unit belong: ``tags``, by name. Whoever holds the lease clears."""

    def __init__(self, shown: str, tags: Mapping[str, str]) -> None:
        super().__init__(
            f"{shown}: {min(tags)} is there with other bytes than this build's and is in no record; run the same "
            "command again, it replaces what a killed build left"
        )
        self.shown, self.tags = shown, dict(tags)

    def __reduce__(self) -> tuple[type[OccupiedError], tuple[str, dict[str, str]]]:
        return (OccupiedError, (self.shown, self.tags))


class ShardSender:
    """Puts the shards of units to their final keys."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def __call__(self, drafts: Mapping[Path, ShardRecord], commit: Commit) -> Commit:
        """Send ``drafts`` and return ``commit``, which is published by nobody yet: a ``writer.Publisher``."""
        self.send(drafts)
        return commit

    def send(self, drafts: Mapping[Path, ShardRecord]) -> None:
        """Create every shard, or find it there with the same sha256.

        Raises ``OccupiedError`` when other bytes are there, ``ResourceError`` when the object store is out of reach.
        """
        steps.after_step(4)
        with ThreadPoolExecutor(_AT_ONCE, "send") as pool:
            found = dict(zip((s.path for s in drafts.values()), pool.map(self._send, drafts.items()), strict=True))
        tags = {name: tag for name, tag in found.items() if tag is not None}
        if tags:
            raise OccupiedError(self._transport.address.shown, tags)
        steps.after_step(5)

    def _send(self, item: tuple[Path, ShardRecord]) -> str | None:
        """Return None when the shard is there, else the tag of what is there instead."""
        draft, record = item
        while not self._transport.put(record.path, draft):
            found = self._transport.stat(record.path)
            if found is None:
                continue  # it was removed in between
            size, tag = found
            same = size == record.nbytes and self._transport.sha256(record.path, size) == record.sha256
            return None if same else tag
        return None
