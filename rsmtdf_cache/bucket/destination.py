"""An object store as the destination of a build: the command commits, whoever encodes a unit puts its shards."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rsmtdf_cache.bucket import steps
from rsmtdf_cache.bucket.lease import Lease, refuse_held
from rsmtdf_cache.bucket.records import RemoteRecords
from rsmtdf_cache.bucket.shards import OccupiedError, ShardSender
from rsmtdf_cache.destination import Permit
from rsmtdf_cache.errors import MismatchError, ResourceError, RsmtdfError
from rsmtdf_cache.events import EventSink, Warned
from rsmtdf_cache.files import build_lock, disk_errors, make_folders, record_bytes, replace_file, require_space
from rsmtdf_cache.head import load_whole, write_head
from rsmtdf_cache.home import cache_home
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest
from rsmtdf_cache.records import Commit, ShardRecord
from rsmtdf_cache.share.address import Address
from rsmtdf_cache.share.remote import RemoteMirror, open_remote, remote_home
from rsmtdf_cache.share.staged import read_remote_head
from rsmtdf_cache.share.transport import connect
from rsmtdf_cache.specs import digest_of
from rsmtdf_cache.writer import Publisher, clear_drafts

if TYPE_CHECKING:
    from rsmtdf_cache.work import Unit

__all__ = ["BucketDestination", "open_for_worker"]

_AT_ONCE = 8


class BucketDestination:
    """The store at ``address``. Its records stand in a folder of this user's cache while it is held."""

    def __init__(self, address: Address) -> None:
        self._address, self.shown = address, address.shown
        self._home = cache_home() / "builds" / address.digest
        self.paths = StorePaths(self._home / "store")
        self._transport = connect(address)
        self._sender = ShardSender(self._transport)
        self._records = RemoteRecords(self._transport, self.paths)
        self._lease: Lease | None = None
        self._ledger = Ledger(self.paths)
        self._seen: list[Path] = [self.paths.root]
        self._next_head_units = 0  # a fold with fewer units than these writes no head

    def __enter__(self) -> Self:
        read_remote_head(self._transport)  # what is out of reach is told before teachers are loaded
        if self._transport.bucket_missing:
            raise ResourceError(f"{self.shown}: the bucket does not exist; make it first")
        self._records.refuse_foreign()
        return self

    def __exit__(self, *raised: object) -> None:
        error = raised[1]
        if isinstance(error, RsmtdfError):  # it speaks of folders that stand for the URL
            text = str(error)
            for folder in self._seen:
                text = text.replace(str(folder), self.shown)
            error.args = (text,)

    def look(self) -> StorePaths:
        """See ``Destination``: a mirror of the records that the head names; nowhere, when there is no head."""
        if read_remote_head(self._transport) is None:
            return StorePaths(self._home / "nothing")
        root, _ = open_remote(self._address, self._transport)
        self._seen.append(root)
        return StorePaths(root)

    @contextlib.contextmanager
    def hold(self, on_event: EventSink) -> Iterator[None]:
        """See ``Destination``. On this machine a second builder waits, elsewhere it is refused (``Lease``)."""
        with disk_errors(self._home):
            make_folders(self._home)
            on_wait = lambda: on_event(Warned(f"another build writes to {self.shown}; waiting for it to end"))  # noqa: E731
            with build_lock(self._home / "build.lock", on_wait), self._leased():
                clear_drafts(self.paths)
                self._records.fill()
                steps.after_step(2)
                try:
                    yield
                finally:
                    clear_drafts(self.paths)
            steps.after_step(11)

    def refuse_held(self) -> None:
        """See ``Destination``."""
        refuse_held(self._transport, self._mark.read_text() if self._mark.is_file() else None)

    @property
    def _mark(self) -> Path:
        """The file with the name that this folder has in leases."""
        return self._home / "home"

    @contextlib.contextmanager
    def _leased(self) -> Iterator[None]:
        if not self._mark.is_file():
            replace_file(self._mark, uuid.uuid4().hex.encode())
        with Lease(self._transport, self._mark.read_text()) as self._lease:
            steps.after_step(1)
            yield

    def check_space(self, nbytes: int, unit_nbytes: int) -> None:
        """See ``Destination``: a unit's drafts lie here until they are sent."""
        need = min(nbytes, 2 * unit_nbytes)
        require_space(self._home, need, "build's drafts", "free some space there, or ask for a smaller --group-rows")

    def write_head(self, manifest: Manifest, ledger: Ledger, final: bool = True) -> None:
        """See ``Destination``: made in the folder, then put."""
        self._held().check()
        write_head(self.paths, manifest, ledger, final)
        self._records.publish()
        if not final:
            steps.after_step(3)

    def fold(self, manifest: Manifest, ledger: Ledger) -> None:
        """See ``Destination``: with a head, so that a build that continues reads few single records.

        A head names all there is, so heads become rarer as the store grows: their cost stays in proportion to it.
        """
        ledger.compact()
        units = sum(map(len, ledger.commits.values()))
        if units >= self._next_head_units:
            self.write_head(manifest, ledger, final=False)
            self._next_head_units = units + units // 4

    def leave(self, manifest: Manifest, begun: Iterable[Unit]) -> None:
        """See ``Destination``: a head of what is committed. Shards without a record stay for the next build."""
        self.write_head(manifest, load_whole(self.paths), final=False)

    @property
    def fetch(self) -> Callable[[ShardRecord, Path], None] | None:
        """See ``Destination``: through the cache of remote shards."""
        make_folders(remote_home())
        return RemoteMirror(self._transport, remote_home()).ensure

    def publisher(self, ledger: Ledger) -> Publisher | None:
        """See ``Destination``: shards are sent, then the unit is committed."""
        self._ledger = ledger

        def publish(drafts: Mapping[Path, ShardRecord], commit: Commit) -> Commit:
            try:
                self._sender.send(drafts)
            except OccupiedError as error:
                self.clear(error)
                self._sender.send(drafts)
            return self.accept(commit)

        return publish

    def open_site(self, token: str) -> str:
        """See ``Destination``: the mark says which tiles and sets are there."""
        return _mark(self._ledger)

    def grant(self, set_id: str, group: int) -> Permit:
        """See ``Destination``: a name; whoever has it can create shards, and commit nothing."""
        name = f"{set_id}-{group}.{uuid.uuid4().hex}"
        return Permit(name, name)

    def withdraw(self, permit: Permit) -> bool:
        """See ``Destination``: should the attempt begin just now, the unit is encoded twice and committed once."""
        return True

    def revoke(self, permit: Permit) -> None:
        """See ``Destination``: nothing to do, for only this process commits, and it does not know the name any more."""

    def accept(self, commit: Commit) -> Commit:
        """Commit a unit whose shards were sent: steps 6 to 8. Raises ``MismatchError`` when it is there otherwise."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            sizes = list(pool.map(lambda shard: self._transport.size(shard.path), commit.shards))
        lost = [s.path for s, size in zip(commit.shards, sizes, strict=True) if size != s.nbytes]
        if lost:
            raise ResourceError(
                f"{self.shown}: {lost[0]} was put and is not there, or has another size; somebody else writes there. "
                "The unit was not committed; run the same command again"
            )
        steps.after_step(6)
        self._held().check()
        name = self.paths.relative(self.paths.commit(commit.set_id, commit.group, commit.generation))
        self._records.add(name, record_bytes(commit.to_json()), lambda there: _says(there, commit))
        return commit

    def clear(self, error: Exception) -> bool:
        """Remove the objects that ``error`` says lie in the way of shards, unless a record names them."""
        if not isinstance(error, OccupiedError):
            return False
        self._held().check()
        for name, tag in sorted(error.tags.items()):
            for commit in (c for found in self._ledger.generations.values() for c in found.values()):
                if any(s.path == name for s in commit.shards):
                    raise MismatchError(
                        f"{self.shown}: another array set has the shard {name} ({commit.set_id}, dropped or of an "
                        "older build); build into another place"
                    )
            self._transport.remove(name, tag)
        return True

    def _held(self) -> Lease:
        if self._lease is None:
            raise ValueError(f"{self.shown} is not held")
        return self._lease


def open_for_worker(url: str, mark: str) -> tuple[Ledger, Publisher]:
    """Return the ledger of the store at ``url`` as its head says, and what a worker's finished drafts go to.

    Raises ``ResourceError`` when it is out of reach, or is not the one that ``mark`` was made of.
    """
    address = Address.parse(url)
    transport = connect(address)
    root, _ = open_remote(address, transport)
    ledger = Ledger.load(StorePaths(root))
    if _mark(ledger) != mark:
        raise ResourceError(f"does not see the store {address.shown} as the build does; is it the same endpoint?")
    return ledger, ShardSender(transport)


def _mark(ledger: Ledger) -> str:
    return digest_of({"sets": sorted(ledger.sets), "tiles": sorted(ledger.segments)})[:16]


def _says(data: bytes, commit: Commit) -> bool:
    try:
        return Commit.from_json(json.loads(data)).to_json() == commit.to_json()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
