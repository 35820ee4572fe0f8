"""What runs in the processes of workers: they are sent the names of these functions, ids of units, and nothing larger.

Workers start no processes (a Nanny's worker may not); decoding, forward and writing overlap in threads.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsmtdf_cache.cluster.site import set_up
from rsmtdf_cache.errors import ResourceError
from rsmtdf_cache.records import read_commit
from rsmtdf_cache.work import Bench, Unit, compute
from rsmtdf_cache.writer import begin

__all__ = ["NotAdmittedError", "admit", "compute_unit", "leave", "topic"]

#: A worker says once in so many seconds that it lives and how far it is.
SIGN_S = 1.0
#: A build that gave this worker nothing to do for so long makes room for another one; it is admitted again if it comes.
IDLE_S = 60.0


class NotAdmittedError(Exception):
    """This process has no bench for the build: it began after the worker of this address was admitted, or it made
    room for another build.
    """


@dataclass
class _Desk:
    """The bench of a build in this process. ``used``: when it was last needed."""

    token: str
    bench: Bench
    used: float


#: Of the builds that use this worker now: several clients may share a cluster.
_desks: list[_Desk] = []
_opening = threading.Lock()
#: One set-up or unit at a time, of whatever build: torch's number of threads is one for the process.
_turn = threading.Lock()


def topic(token: str) -> str:
    """Return the name under which signs of life of a build travel."""
    return f"rsmtdf-{token}"


def admit(token: str, site: dict[str, Any]) -> dict[str, Any]:
    """Set up the bench of ``site`` here, once; return facts about this process. Raises like ``site.set_up``.

    The teachers of builds that are idle go, and of one into the same store, which is over.
    """
    with _opening, _turn:
        if not any(d.token == token for d in _desks):
            since, out = time.monotonic() - IDLE_S, site["request"]["out"]
            _desks[:] = [d for d in _desks if d.used > since and str(d.bench.request.out) != out]
            _desks.append(_Desk(token, set_up(site), time.monotonic()))
    return {"pid": os.getpid(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}


def leave(token: str) -> None:
    """Let the teachers of a build go."""
    with _opening:
        _desks[:] = [d for d in _desks if d.token != token]


def compute_unit(token: str, set_id: str, group: int, tiles: int, folder: str) -> dict[str, Any]:
    """Compute one unit and commit it where ``folder`` permits it; return the record, bytes and seconds.

    Where the store is no folder, ``folder`` is the attempt's name, and the client commits.
    A unit that is committed already (its worker was lost before it could tell) is not computed again.
    """
    desk = next((d for d in _desks if d.token == token), None)
    if desk is None:
        raise NotAdmittedError(token)
    unit, place = Unit(set_id, group, tiles), Path(folder)
    with _turn, _drafts(desk.bench, place) as drafts:
        since, signs = time.perf_counter(), _Signs(token, place.name)
        ledger = desk.bench.ledger
        there = ledger.paths.commit(set_id, group)
        if there.is_file():
            commit = read_commit(there)
        else:
            signs.folder = drafts or begin(place)
            commit = compute(desk.bench, unit, signs.tile, signs.folder)
            ledger.forget(commit)
        desk.used = time.monotonic()
        return {"commit": commit.to_json(), "nbytes": signs.nbytes, "seconds": time.perf_counter() - since}


@contextlib.contextmanager
def _drafts(bench: Bench, place: Path) -> Iterator[Path | None]:
    """Yield a folder of this machine for drafts, None where the permission itself is the folder for them."""
    if bench.publish is None:
        yield None
        return
    from distributed import get_worker

    with tempfile.TemporaryDirectory(prefix=f"{place.name}-", dir=get_worker().local_directory) as folder:
        yield Path(folder)


class _Signs:
    """Tells the client how far a unit is, and stops the unit when its permission is gone."""

    folder: Path

    def __init__(self, token: str, attempt: str) -> None:
        from distributed import get_worker

        self.tiles = self.nbytes = 0
        self._topic, self._attempt, self._worker = topic(token), attempt, get_worker()
        self._tell()

    def tile(self, nbytes: int) -> None:
        """Count one more tile."""
        self.tiles, self.nbytes = self.tiles + 1, self.nbytes + nbytes
        if time.monotonic() - self._told >= SIGN_S:
            if not self.folder.is_dir():
                raise ResourceError(f"{self.folder}: gone; this attempt at the unit was given up")
            self._tell()

    def _tell(self) -> None:
        said = {"attempt": self._attempt, "tiles": self.tiles, "nbytes": self.nbytes}
        self._worker.log_event(self._topic, said)
        self._told = time.monotonic()
