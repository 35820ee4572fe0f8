"""Shards of a remote store fetched before they are read: in the order of need, a few at once, never too far ahead."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from rsmtdf_cache.records import ShardRecord

__all__ = ["FETCHES", "FetchAhead"]

#: So many shards of a store come at once. A request waits for the line most of its time, whatever the line carries.
FETCHES = 8


class FetchAhead:
    """Calls ``fetch`` for shards that will be read, in threads of its own. Safe among threads, and after a fork.

    Its threads are daemons and end when there is nothing to do: an interrupted run does not wait for a shard that
    nobody will read. An error is silent, for whoever reads the shard meets it again.
    """

    def __init__(self, fetch: Callable[[ShardRecord, Path], None], bound_nbytes: Callable[[], int]) -> None:
        """``bound_nbytes``: how much may be fetched, or be on its way, that nobody has read yet; one shard always."""
        self._fetch, self._bound = fetch, bound_nbytes
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, tuple[ShardRecord, Path]] = OrderedDict()
        self._unread: dict[str, int] = {}  # sha256 → bytes, of shards under way or fetched and not read yet
        self._threads = 0

    def ask(self, record: ShardRecord, place: Path, wanted: Callable[[], bool]) -> bool:
        """Have ``record`` fetched to ``place`` when its turn comes, if it is ``wanted``; return whether that was new.

        ``wanted`` says no before ``taken`` is called, so that nothing is counted as unread that nobody will read.
        """
        self._after_fork()
        with self._lock:
            if record.sha256 in self._unread or record.sha256 in self._waiting or not wanted():
                return False
            self._waiting[record.sha256] = (record, place)
            self._start()
        return True

    def taken(self, sha256: str) -> None:
        """Hear that a reader has the shard, or could not get it: there is room for another one."""
        self._after_fork()
        with self._lock:
            self._waiting.pop(sha256, None)
            if self._unread.pop(sha256, None) is not None:
                self._start()

    def _start(self) -> None:
        """Start a thread for each shard that may come now; the lock is held."""
        while self._threads < FETCHES and (following := self._next()) is not None:
            self._threads += 1
            threading.Thread(target=self._work, args=(following,), name="rsmtdf-fetch", daemon=True).start()

    def _next(self) -> tuple[ShardRecord, Path] | None:
        if not self._waiting:
            return None
        record, place = next(iter(self._waiting.values()))
        if self._unread and sum(self._unread.values()) + record.nbytes > self._bound():
            return None
        del self._waiting[record.sha256]
        self._unread[record.sha256] = record.nbytes
        return record, place

    def _work(self, following: tuple[ShardRecord, Path] | None) -> None:
        while following is not None:
            record, place = following
            failed = False
            try:
                self._fetch(record, place)
            except Exception:
                failed = True
            with self._lock:
                if failed:
                    self._unread.pop(record.sha256, None)
                following = self._next()
                self._threads -= following is None

    def _after_fork(self) -> None:
        if self._process != os.getpid():  # threads stayed behind, a lock may be held for ever
            self._begin()
