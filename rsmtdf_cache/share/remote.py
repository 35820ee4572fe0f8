"""Read a store where it is: its records in a local mirror, its shards fetched at first touch into a bounded cache.

::

    <cache>/remote/<store>/<head>/     a mirror: manifest and ledger as one head lists them; never changes
    <cache>/remote/shards/<sha256>     shards of all stores; the least recently used make room for new ones
    <cache>/remote/drafts/             shards on their way
    <cache>/remote/locks/              one process fetches a shard, the others wait for it

In a mirror a shard is a symbolic link into ``shards``. ``<cache>`` is ``home.cache_home()``;
``RSMTDF_REMOTE_CACHE_GB`` bounds the shards (20 by default).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rsmtdf_cache.errors import MismatchError, ResourceError, UsageError
from rsmtdf_cache.files import build_lock, disk_errors, make_folders, rename_file, sha256_file
from rsmtdf_cache.head import find_snapshot
from rsmtdf_cache.home import cache_home
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.records import ShardRecord
from rsmtdf_cache.share.address import Address
from rsmtdf_cache.share.ahead import FetchAhead
from rsmtdf_cache.share.names import checked_name
from rsmtdf_cache.share.staged import is_whole, read_remote_head, stage_records, store_missing
from rsmtdf_cache.share.transport import Transport, connect

__all__ = ["AHEAD_SHARE", "RemoteMirror", "cache_limit_nbytes", "open_remote", "remote_home"]

#: A mirror that nobody opened for so long is removed when its store is opened again.
MIRROR_DAYS = 30
_TOUCH_S = 60.0
#: Share of the cache that one process fills ahead of need: eight processes of a node push nothing out for each other.
AHEAD_SHARE = 1 / 8


def remote_home() -> Path:
    """Return the folder of mirrors and shards; it need not exist."""
    return cache_home() / "remote"


def cache_limit_nbytes() -> int:
    """Return how many bytes the cached shards may take. Raises ``UsageError`` for a bad ``RSMTDF_REMOTE_CACHE_GB``."""
    text = os.environ.get("RSMTDF_REMOTE_CACHE_GB", "20")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UsageError(f"RSMTDF_REMOTE_CACHE_GB={text!r}: write the bound of the cache in GB, e.g. 20")
    return int(value * 1e9)


def open_remote(address: Address, transport: Transport | None = None) -> tuple[Path, RemoteMirror]:
    """Return the folder with the records of the store at ``address`` as they are now, and what fetches its shards.

    ``transport``: the way there, when the caller has it.
    Raises ``MismatchError`` (no store, newer format), ``FindingsError`` (damaged, hostile), ``ResourceError``.
    """
    transport = transport or connect(replace(address, snapshot=None))
    raw = read_remote_head(transport)
    if raw is None:
        raise store_missing(transport)
    home = remote_home()
    folder = home / address.digest
    root = folder / hashlib.sha256(raw).hexdigest()[:16]
    with disk_errors(home):
        make_folders(folder)
        with build_lock(folder / "open.lock"):
            if not is_whole(root, raw):  # new, not ended (the head is written last), or damaged on this disk since
                stage_records(transport, root, raw, all_snapshots=True)
            os.utime(root)
            _remove_old(folder, root)
    if address.snapshot is not None:
        try:
            find_snapshot(StorePaths(root), Ledger.load(StorePaths(root)), address.snapshot)
        except MismatchError as error:
            raise MismatchError(str(error).replace(str(root), transport.address.shown)) from None
    return root, RemoteMirror(transport, home)


class RemoteMirror:
    """Brings shards of one remote store into the cache. Safe among threads and processes; can be pickled."""

    def __init__(self, transport: Transport, home: Path) -> None:
        self._transport, self._home = transport, home
        self._touched: dict[Path, float] = {}
        self._ahead = FetchAhead(self.ensure, lambda: int(cache_limit_nbytes() * AHEAD_SHARE))

    def __reduce__(self) -> tuple[Any, ...]:
        return (RemoteMirror, (self._transport, self._home))

    def __repr__(self) -> str:
        return f"RemoteMirror({self._transport.address.shown!r})"

    @property
    def address(self) -> Address:
        return self._transport.address

    def ensure(self, record: ShardRecord, place: Path) -> None:
        """Make ``place`` (a path in the mirror) the shard of ``record``, fetched and checked unless it is cached.

        Another fetch may remove it again at any time; an open file stays readable. Raises ``ResourceError`` (network,
        disk, a shard larger than the whole cache), ``FindingsError`` (the remote has other bytes).
        """
        shard = self._home / "shards" / record.sha256
        if not self._use(shard):
            limit = cache_limit_nbytes()
            if record.nbytes > limit:
                raise ResourceError(
                    f"{self.address.shown}: the shard {record.path} has {record.nbytes / 1e9:g} GB, the cache of "
                    f"remote shards may have {limit / 1e9:g} GB; raise RSMTDF_REMOTE_CACHE_GB, or copy the store with "
                    "`rsmtdf cache pull`"
                )
            with disk_errors(self._home):
                self._fetch(record, shard, limit)
        _link(shard, place)

    def fetch_soon(self, record: ShardRecord, place: Path, wanted: Callable[[], bool]) -> bool:
        """Have the shard fetched in the background, after those asked for before, unless it is not ``wanted`` any more.

        Return whether that was new. ``taken`` says that a reader has it; what is fetched and not taken yet is
        ``AHEAD_SHARE`` of the cache at most.
        """
        return self._ahead.ask(record, place, wanted)

    def taken(self, record: ShardRecord) -> None:
        """Hear that a reader has opened the shard, or failed to."""
        self._ahead.taken(record.sha256)

    def discard(self, record: ShardRecord, place: Path) -> None:
        """Forget the cached shard at ``place``, whose bytes are not those of ``record``; ``ensure`` fetches it anew."""
        shard = self._home / "shards" / record.sha256
        with _flock(self._lock_of(record.sha256)):
            with contextlib.suppress(FileNotFoundError):
                if sha256_file(shard) != record.sha256:  # else another process has mended it
                    shard.unlink()
            self._touched.pop(shard, None)
        with contextlib.suppress(FileNotFoundError):
            place.unlink()

    def _use(self, shard: Path) -> bool:
        """Whether the shard is cached; notes that it was used now."""
        now = time.monotonic()
        if now - self._touched.get(shard, -math.inf) < _TOUCH_S:
            return shard.is_file()
        try:
            os.utime(shard)
        except FileNotFoundError:
            return False
        self._touched[shard] = now
        return True

    def _fetch(self, record: ShardRecord, shard: Path, limit: int) -> None:
        name = checked_name(record.path)
        for folder in ("shards", "drafts", "locks"):
            make_folders(self._home / folder)
        with _flock(self._lock_of(record.sha256)):
            if self._use(shard):
                return
            draft = self._home / "drafts" / f"{record.sha256}.{record.nbytes}"
            self._make_room(draft, record.nbytes, limit)
            self._transport.fetch(name, draft, record.nbytes, record.sha256, lambda count: None)
            rename_file(draft, shard)  # first: a draft that nobody may write to could not be continued
            shard.chmod(0o444)
            self._touched[shard] = time.monotonic()

    def _lock_of(self, sha256: str) -> Path:
        return self._home / "locks" / f"{sha256[:2]}.lock"

    def _make_room(self, draft: Path, nbytes: int, limit: int) -> None:
        """Reserve ``nbytes``: remove what was used longest ago until it fits beside the fetches under way.

        The draft stands for the reservation; its name says its size.
        """
        while True:
            with _flock(self._home / "locks" / "room.lock"):
                here = [p for p in (self._home / "drafts").iterdir() if _is_ours(p)]
                drafts = {p: int(p.suffix[1:]) for p in here if p != draft}
                shards = sorted(_files(self._home / "shards"), key=lambda item: item[0])
                used = sum(drafts.values()) + sum(size for _, size, _ in shards)
                for _, size, path in shards:
                    if used + nbytes <= limit:
                        break
                    path.unlink(missing_ok=True)
                    used -= size
                for path, size in drafts.items():
                    if used + nbytes > limit and self._is_abandoned(path, draft):
                        path.unlink(missing_ok=True)
                        used -= size
                if used + nbytes <= limit:
                    draft.touch()
                    break
            time.sleep(0.05)  # the fetches under way fill the cache; they end and make room
        free = shutil.disk_usage(self._home).free
        if nbytes > free:
            raise ResourceError(
                f"{self._home}: {nbytes / 1e9:.3f} GB are needed for a shard, {free / 1e9:.3f} GB are free"
            )

    def _is_abandoned(self, path: Path, draft: Path) -> bool:
        lock = self._lock_of(path.name)
        if lock == self._lock_of(draft.name):
            return True  # we hold that lock, so nobody works on it
        with lock.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


def _link(shard: Path, place: Path) -> None:
    target = os.path.relpath(shard, place.parent)
    try:
        if os.readlink(place) == target:
            return
    except OSError:
        place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{os.getpid()}.{time.monotonic_ns()}.link")
    draft.symlink_to(target)
    draft.replace(place)


def _files(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Yield when each file of ``folder`` was used last, its bytes, and its path."""
    for path in filter(_is_ours, folder.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            if stat.S_ISREG(found.st_mode):
                yield found.st_mtime, found.st_size, path


def _is_ours(path: Path) -> bool:
    """False for what a network file system keeps of a file that is removed while a process has it open: ``.nfs…``."""
    return not path.name.startswith(".")


def _remove_old(folder: Path, root: Path) -> None:
    limit = time.time() - MIRROR_DAYS * 86400
    for path in folder.iterdir():
        if path.is_dir() and path != root and path.stat().st_mtime < limit:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _flock(path: Path) -> Iterator[None]:
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = os.getpid()
        try:
            yield
        finally:
            if os.getpid() == holder:  # a process that was forked meanwhile has the file open too, and would keep it
                fcntl.flock(file, fcntl.LOCK_UN)
