"""Where a build's store comes to be: which folder has its records meanwhile, who may write, how a unit is committed.

A folder is the plain case. ``bucket/`` has the other one, an object store.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from rsmtdf_cache.events import EventSink, Warned
from rsmtdf_cache.files import build_lock, disk_errors, require_space
from rsmtdf_cache.head import write_head
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest, refuse_foreign_content
from rsmtdf_cache.records import Commit, ShardRecord
from rsmtdf_cache.unrecorded import leave_whole
from rsmtdf_cache.writer import Publisher, clear_drafts, grant, revoke, withdraw

if TYPE_CHECKING:
    from rsmtdf_cache.work import Unit

__all__ = ["Destination", "FolderDestination", "Permit", "destination_of"]


@dataclass(frozen=True)
class Permit:
    """What permits one attempt at a unit in another process. ``told``: what that process is told of it."""

    name: str
    told: str


class Destination(Protocol):
    """Where a store is built. Entered before teachers are loaded, so that what is out of reach is told before.

    ``paths``: its records on this machine while it is held; ``shown``: its name for people.
    """

    paths: StorePaths
    shown: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def look(self) -> StorePaths:
        """Return where the records are that are there now, for reading, without holding it."""

    def refuse_held(self) -> None:
        """Raise ``ResourceError`` when ``hold`` would be refused now: before what takes long is done for nothing."""

    def hold(self, on_event: EventSink) -> AbstractContextManager[None]:
        """Be the only one who writes, with ``paths`` as the store is now. Drafts of killed builds are gone then."""

    def check_space(self, nbytes: int, unit_nbytes: int) -> None:
        """Raise ``ResourceError`` when there is too little room for ``nbytes`` in units of at most ``unit_nbytes``."""

    def write_head(self, manifest: Manifest, ledger: Ledger, final: bool = True) -> None:
        """Let readers find what ``ledger`` holds; see ``head.write_head``."""

    def fold(self, manifest: Manifest, ledger: Ledger) -> None:
        """Fold commit records that became many."""

    def leave(self, manifest: Manifest, begun: Iterable[Unit]) -> None:
        """Leave the store as it should be found after a build that ends early; ``begun``: and not committed."""

    @property
    def fetch(self) -> Callable[[ShardRecord, Path], None] | None:
        """Bring a committed shard to its place below ``paths``; None: they all are there."""

    def publisher(self, ledger: Ledger) -> Publisher | None:
        """Return what publishes and commits a unit's drafts in this process; None: ``UnitWriter`` itself."""

    # -- units that other processes encode

    def open_site(self, token: str) -> str:
        """Prepare for workers; return a mark by which they know that they see the same store."""

    def grant(self, set_id: str, group: int) -> Permit:
        """Permit one attempt at a unit."""

    def withdraw(self, permit: Permit) -> bool:
        """Take the permission back unless the attempt has begun, as far as that is known; return whether this did."""

    def revoke(self, permit: Permit) -> None:
        """Take the permission back: after this the attempt cannot commit."""

    def accept(self, commit: Commit) -> Commit:
        """Return the record that counts of a unit that a permitted attempt has ended."""

    def clear(self, error: Exception) -> bool:
        """Remove what ``error`` of an attempt says was in its way; return whether it can be tried again."""


class FolderDestination:
    """A folder that all who encode see: whoever encodes a unit commits it (decision 32)."""

    fetch: Callable[[ShardRecord, Path], None] | None = None

    def __init__(self, root: Path) -> None:
        self.paths = StorePaths(root)
        self.shown = str(root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing was opened."""

    def look(self) -> StorePaths:
        """See ``Destination``."""
        return self.paths

    def refuse_held(self) -> None:
        """See ``Destination``: nobody is refused, they wait."""

    @contextlib.contextmanager
    def hold(self, on_event: EventSink) -> Iterator[None]:
        """See ``Destination``. A second builder waits."""
        root = self.paths.root
        with disk_errors(root):
            refuse_foreign_content(root)
            root.mkdir(parents=True, exist_ok=True)
            on_wait = lambda: on_event(Warned(f"another build holds {root}; waiting for it to end"))  # noqa: E731
            with build_lock(self.paths.lock, on_wait):
                clear_drafts(self.paths)
                try:
                    yield
                finally:
                    clear_drafts(self.paths)

    def check_space(self, nbytes: int, unit_nbytes: int) -> None:
        """See ``Destination``."""
        require_space(
            self.paths.root, nbytes, "build", "free some space, or ask for fewer layers, scales or orientations"
        )

    def write_head(self, manifest: Manifest, ledger: Ledger, final: bool = True) -> None:
        """See ``Destination``."""
        write_head(self.paths, manifest, ledger, final)

    def fold(self, manifest: Manifest, ledger: Ledger) -> None:
        """See ``Destination``."""
        ledger.compact()

    def leave(self, manifest: Manifest, begun: Iterable[Unit]) -> None:
        """See ``Destination``: nothing that ``verify`` would name.

        No attempt may commit any more before the ledger is read: shards go whose record was not there then.
        """
        clear_drafts(self.paths)
        leave_whole(self.paths, manifest, begun)

    def publisher(self, ledger: Ledger) -> Publisher | None:
        """See ``Destination``."""
        return None

    def open_site(self, token: str) -> str:
        """See ``Destination``: the mark is a file in ``tmp/``, which the end of the build takes away."""
        mark = self.paths.tmp / f"build-{token}"
        self.paths.tmp.mkdir(exist_ok=True)
        mark.touch()
        return mark.name

    def grant(self, set_id: str, group: int) -> Permit:
        """See ``Destination``: the permission is a folder."""
        folder = grant(self.paths, set_id, group)
        return Permit(folder.name, str(folder.absolute()))

    def withdraw(self, permit: Permit) -> bool:
        """See ``Destination``."""
        return withdraw(self.paths.tmp / permit.name)

    def revoke(self, permit: Permit) -> None:
        """See ``Destination``."""
        revoke(self.paths.tmp / permit.name)

    def accept(self, commit: Commit) -> Commit:
        """See ``Destination``: its worker has committed it."""
        return commit

    def clear(self, error: Exception) -> bool:
        """See ``Destination``: a writer replaces what is in its way itself."""
        return False


def destination_of(out: Path | str) -> Destination:
    """Return the destination of a build ``--out OUT``: a folder, or a URL."""
    if isinstance(out, Path):
        return FolderDestination(out)
    from rsmtdf_cache.bucket.destination import BucketDestination
    from rsmtdf_cache.share.address import Address

    return BucketDestination(Address.parse(out))
