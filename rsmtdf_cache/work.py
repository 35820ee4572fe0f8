"""What is to be computed (units), what computing them takes (a bench), and where it happens (an executor)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

import torch

from rsmtdf_cache.destination import Destination, FolderDestination
from rsmtdf_cache.encode import TileReader, encode_unit
from rsmtdf_cache.events import EventSink
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.plan import rows_of_group
from rsmtdf_cache.records import Commit
from rsmtdf_cache.request import BuildRequest, TeacherAsked
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import NumericsProfile
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.writer import Publisher

__all__ = ["Bench", "Executor", "InProcess", "OnTiles", "Tally", "Unit", "UnitDone", "compute"]


@dataclass(frozen=True)
class Unit:
    """One unit of work: a row group of an array set. ``tiles``: how many tiles it has."""

    set_id: str
    group: int
    tiles: int


@dataclass(frozen=True)
class UnitDone:
    """A unit that is committed. ``nbytes``: of its tiles' codes; ``worker``: who encoded it, for people."""

    unit: Unit
    commit: Commit
    nbytes: int
    worker: str


@dataclass
class Tally:
    """What one worker did. ``seconds``: those it spent on its units."""

    name: str
    units: int = 0
    tiles: int = 0
    seconds: float = 0.0

    def add(self, unit: Unit, seconds: float) -> None:
        """Count one more unit."""
        self.units, self.tiles, self.seconds = self.units + 1, self.tiles + unit.tiles, self.seconds + seconds

    @property
    def rate(self) -> float:
        """Tiles in a second of work."""
        return self.tiles / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, str | int | float]:
        """Return plain JSON data, with the rate."""
        rate = round(self.rate, 2)
        return {"name": self.name, "units": self.units, "tiles": self.tiles, "tiles_per_second": rate}


@dataclass
class Bench:
    """All that a process needs to compute units of a build. ``asked``, ``teachers`` and ``profiles``: by array set.

    ``publish``: what takes a unit's shards where the store is no folder. ``store``: where other processes' units go.
    """

    request: BuildRequest
    source: TileSource
    ledger: Ledger
    group_rows: int
    asked: Mapping[str, TeacherAsked]
    teachers: Mapping[str, Teacher]
    profiles: Mapping[str, NumericsProfile]
    reader: TileReader = field(repr=False)
    publish: Publisher | None = field(default=None, repr=False)
    store: Destination | None = field(default=None, repr=False)

    @property
    def destination(self) -> Destination:
        """Where the store is; the folder of the ledger when nothing else was said."""
        return self.store or FolderDestination(self.ledger.paths.root)


#: Told while a unit is computed: ``(unit, tiles, nbytes)`` more of it; less than nothing when a worker was lost.
OnTiles = Callable[[Unit, int, int], None]


class Executor(Protocol):
    """Where units are computed. ``threads``: of a forward pass in new array sets when nobody asked for a number.

    It is entered before a build begins, so that what cannot work is told before anything is written.
    """

    threads: int | None
    tallies: list[Tally]
    failures: list[str]

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def run(
        self, bench: Bench, units: Iterator[Unit], on_tiles: OnTiles, on_event: EventSink
    ) -> Generator[UnitDone, None, None]:
        """Compute ``units`` (drawn as room is made) and yield each as it is committed, in any order.

        Closing the generator stops what is under way; what is committed stays. ``on_event`` may raise to stop.
        """


class InProcess(AbstractContextManager["InProcess"]):
    """One worker: this process."""

    threads: int | None = None

    def __init__(self) -> None:
        self.tallies = [Tally("in process")]
        self.failures: list[str] = []

    def run(
        self, bench: Bench, units: Iterator[Unit], on_tiles: OnTiles, on_event: EventSink
    ) -> Generator[UnitDone, None, None]:
        """See ``Executor``."""
        [tally] = self.tallies
        for unit in units:
            begun, total = time.perf_counter(), 0

            def tell(nbytes: int, unit: Unit = unit) -> None:
                nonlocal total
                total += nbytes
                on_tiles(unit, 1, nbytes)

            commit = compute(bench, unit, tell)
            tally.add(unit, time.perf_counter() - begun)
            yield UnitDone(unit, commit, total, tally.name)

    def __exit__(self, *error: object) -> None:
        """Nothing was opened."""


def compute(bench: Bench, unit: Unit, on_tile: Callable[[int], None], folder: Path | None = None) -> Commit:
    """Encode and commit one unit in this process; ``on_tile(nbytes)`` is called as each tile is written.

    Torch has the threads of the profile meanwhile, whatever the environment said when the process began.
    ``folder``: what permits it (``writer.grant``) where another process holds the build lock.
    """
    ledger, profile = bench.ledger, bench.profiles[unit.set_id]
    arrays, teacher = ledger.sets[unit.set_id].arrays, bench.teachers[unit.set_id]
    rows = rows_of_group(ledger.table, unit.group, bench.group_rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(profile.threads)
    try:
        with contextlib.closing(
            encode_unit(
                teacher, arrays, unit.group, rows, profile, ledger, bench.group_rows, bench.reader,
                bench.request.decoders, folder, bench.publish,
            )
        ) as tiles:  # fmt: skip
            for nbytes in tiles:
                on_tile(nbytes)
    finally:
        torch.set_num_threads(threads)
    return ledger.commits[unit.set_id][unit.group]
