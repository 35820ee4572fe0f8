"""The only code that writes features. One unit = one row group of one array set = one commit.

The numbered steps are those of ``FORMAT.md``; tests kill the process after each.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.array_writer import ArrayWriter
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.errors import MismatchError, ResourceError
from rsmtdf_cache.files import fsync_folder, link_file, make_folders, no_step, rename_file, sha256_file
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.specs import NumericsProfile

__all__ = ["Publisher", "UnitWriter", "begin", "clear_drafts", "grant", "revoke", "withdraw"]

#: Publishes the finished drafts of a unit, ``{draft: the shard it is}``, and returns the commit that counts.
Publisher = Callable[[Mapping[Path, ShardRecord], Commit], Commit]


#: So often a folder is emptied before that counts as impossible.
_REMOVALS = 300

#: Called after each numbered step of a commit. Tests replace it to stop the process right there.
after_step: Callable[[int], None] = no_step


def grant(paths: StorePaths, set_id: str, group: int) -> Path:
    """Make and return the folder that permits one attempt at a unit. Only the holder of the build lock may call this.

    The attempt's drafts lie in it, the record's too, so nothing can be published once it is gone (``revoke``).
    """
    folder = paths.tmp / f"{set_id}-{group}.{uuid.uuid4().hex}"
    make_folders(folder)
    return folder


def begin(folder: Path) -> Path:
    """Begin the attempt that ``folder`` permits and return where its drafts go; ``withdraw`` fails from here on.

    Raises ``ResourceError`` when the permission was taken back.
    """
    with contextlib.suppress(FileNotFoundError):
        return folder.rename(_begun(folder))
    raise _taken_over(folder)


def withdraw(folder: Path) -> bool:
    """Take the permission of ``grant`` back unless its attempt has begun; return whether this did it."""
    away = folder.with_name(f".{folder.name}.gone")
    try:
        folder.rename(away)
    except FileNotFoundError:
        return False
    away.rmdir()
    return True


def revoke(folder: Path) -> None:
    """Take the permission of ``grant`` back, in one step, whatever the attempt is doing; then remove its drafts.

    Nothing is published from the folder afterwards; what was published before stays. Another machine of a network file
    system may go by a name that it remembers, so this returns when the drafts are no more (a file that a process of
    this machine holds open may stay, under NFS, as ``.nfs…``). Raises ``ResourceError`` when they cannot be removed.
    """
    away = folder.with_name(f".{folder.name}.gone")
    for name in (folder, _begun(folder)):
        with contextlib.suppress(FileNotFoundError):
            name.rename(away)
    for _ in range(_REMOVALS):
        shutil.rmtree(away, ignore_errors=True)
        if not away.exists() or all(p.name.startswith(".nfs") for p in away.iterdir()):
            return
        time.sleep(0.01)  # a draft was made in it meanwhile
    raise ResourceError(f"{away}: cannot be removed; remove it yourself, then run the same command again")


def _begun(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.begun")


def clear_drafts(paths: StorePaths, transfers: bool = False) -> None:
    """Remove what killed builders left. Only the holder of the build lock may call this.

    It takes all permissions back: what a worker of an earlier build still does is not published any more.
    ``transfers``: also what a stopped pull brought of shards, and would continue.
    """
    for draft in paths.tmp.glob("*"):
        if draft.name == "pull" and not transfers:
            continue
        revoke(draft) if draft.is_dir() else draft.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        paths.tmp.rmdir()
    for folder in (paths.ledger, paths.ledger / "tiles", paths.segments):
        for draft in folder.glob(".*.tmp"):  # of an atomic replace; those below zarr/ go with the stray metadata
            draft.unlink(missing_ok=True)


class UnitWriter:
    """Collects the maps of one unit and commits them. Leaving the block without ``commit()`` leaves no trace.

    ``folder``: what permits this attempt (``grant``), None where the caller holds the build lock. Once it is gone,
    everything here raises ``ResourceError``. ``publish``: what takes the finished drafts elsewhere than into the store
    of ``ledger``'s folder, instead of steps 3 to 7.
    """

    def __init__(
        self, ledger: Ledger, arrays: ArraySet, group: int, group_rows: int, profile: NumericsProfile,
        folder: Path | None = None, publish: Publisher | None = None,
    ) -> None:  # fmt: skip
        self._ledger, self._arrays, self._group, self._profile = ledger, arrays, group, profile
        self._first_row = group * group_rows
        self._elsewhere = publish
        self._folder = folder or grant(ledger.paths, arrays.id, group)
        self._committed = False
        if not self._folder.is_dir():
            raise _taken_over(self._folder)
        live = [s for s in arrays.specs if (arrays.id, s.layer.name) not in ledger.dropped]
        self._arrays_of = {s.layer.name: ArrayWriter(self._folder, s, ledger.codec(s), group_rows) for s in live}

    def add(self, row: int, tile_id: str, features: Mapping[str, NDArray[np.float32]]) -> int:
        """Add the maps ``{layer: [h, w, D]}`` of ``row`` and return the bytes they take.

        Raises ``DataError`` when a value is not finite, or the codec cannot hold it.
        """
        return sum(self.add_rows(row, tile_id, layer, 0, values) for layer, values in features.items())

    def add_rows(self, row: int, tile_id: str, layer: str, y: int, features: NDArray[np.float32]) -> int:
        """Add rows ``[n, w, D]`` of the map of one layer, from token row ``y`` on; bands of a map come in order."""
        return self._arrays_of[layer].add_rows(row - self._first_row, tile_id, y, features)

    def add_stored(self, row: int, tile_id: str, codes: Mapping[str, Codes]) -> int:
        """Add what another store holds, ``{layer: codes of [h, w]}``, as it is: nothing is encoded again."""
        here = row - self._first_row
        return sum(self._arrays_of[layer].add_stored(here, tile_id, values) for layer, values in codes.items())

    def commit(self, stop: int) -> Commit:
        """Make the unit durable and known: rows up to ``stop``. Returns the record that counts."""
        try:
            commit = self._commit(stop)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE) and not self._folder.is_dir():
                raise _taken_over(self._folder) from None
            raise
        self._committed = True
        return commit

    def _commit(self, stop: int) -> Commit:
        after_step(1)
        for writer in self._arrays_of.values():
            writer.close()
        after_step(2)
        paths = self._ledger.paths
        places = {d: p for w in self._arrays_of.values() for d, p in w.places(paths, self._group).items()}
        shards = tuple(record for _, w in sorted(self._arrays_of.items()) for record in w.records(paths, self._group))
        commit = Commit(self._arrays.id, self._group, self._first_row, stop, self._profile, shards)
        if self._elsewhere is not None:
            known = {shard.path: shard for shard in shards}
            drafts = {draft: known[paths.relative(place)] for draft, place in places.items()}
            return self._ledger.adopt(self._elsewhere(drafts, commit))
        for draft, place in places.items():
            self._publish(draft, place)
        after_step(3)
        for place in places.values():
            fsync_folder(place.parent)
        after_step(4)
        return self._ledger.add_commit(commit, after_step, self._folder)

    def _publish(self, draft: Path, place: Path) -> None:
        make_folders(place.parent)
        if link_file(draft, place):
            return
        name = self._ledger.paths.relative(place)
        named = [(c, s) for units in self._ledger.generations.values() for c in units.values()
                 for s in c.shards if s.path == name]  # fmt: skip
        owner = next((c for c, s in named if place.stat().st_size == s.nbytes and sha256_file(place) == s.sha256), None)
        if owner is not None:
            raise MismatchError(
                f"{place}: another array set has this shard ({owner.set_id}, dropped or of an older build); "
                "run `rsmtdf cache gc` on the store, then the same command again"
            )
        # These bytes are in no record: a kill left them before their record was published, and nobody has read them.
        rename_file(draft, place)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._arrays_of.values():
            writer.__exit__(kind, error, trace)
        shutil.rmtree(self._folder, ignore_errors=True)
        if kind is None and self._committed:
            after_step(8)


def _taken_over(folder: Path) -> ResourceError:
    return ResourceError(
        f"{folder}: gone, so this attempt at the unit may not be committed any more: another command writes to the "
        "store, or the build gave the unit to another worker. Nothing of it was published; run the build again"
    )
