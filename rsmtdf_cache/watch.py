"""How far a build is, seen from anywhere that sees the store's folder: ledger, lock, and a note that the build leaves.

Nothing is asked of the build, and nothing is written: it may run on another machine, under another user.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rsmtdf_cache.files import is_locked
from rsmtdf_cache.layout import StorePaths
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.records import Commit, read_commit
from rsmtdf_cache.segment import read_segment_commits

__all__ = ["Builder", "Standing", "Watch", "leave_note"]

#: The rate is that of the units that were committed in so many seconds.
WINDOW_S = 300.0


@dataclass(frozen=True)
class Builder:
    """Who builds, and what is to be there in the end. ``sets``: array set → (units, tiles of all of them)."""

    host: str
    pid: int
    started: float
    sets: Mapping[str, tuple[int, int]]

    @property
    def units(self) -> int:
        return sum(units for units, _ in self.sets.values())

    @property
    def tiles(self) -> int:
        return sum(tiles for _, tiles in self.sets.values())


@dataclass(frozen=True)
class Standing:
    """How far a build was at one moment. ``units``, ``tiles``: those of its array sets that are committed.

    Tiles count once for each array set. ``rate``: tiles a second lately, None before the first unit is committed.
    ``builds``: somebody holds the store's lock.
    """

    builds: bool
    builder: Builder | None
    units: int
    tiles: int
    rate: float | None

    @property
    def whole(self) -> bool:
        """Whether all that was planned is there; also when no plan is known."""
        return self.builder is None or self.units >= self.builder.units

    @property
    def seconds_left(self) -> float | None:
        if self.builder is None or not self.rate or not self.builds:
            return None
        return max(0, self.builder.tiles - self.tiles) / self.rate

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        found = self.builder
        planned = {"units_planned": found.units, "tiles_planned": found.tiles} if found else {}
        return {
            "builds": self.builds, "units": self.units, "tiles": self.tiles, **planned,
            "tiles_per_second": self.rate, "seconds_left": self.seconds_left,
            "builder": {n: v for n, v in asdict(found).items() if n != "sets"} if found else None,
        }  # fmt: skip


def leave_note(paths: StorePaths, sets: Mapping[str, tuple[int, int]]) -> None:
    """Say in ``tmp/`` who builds and what, for those who watch. The end of a build takes it away."""
    paths.tmp.mkdir(exist_ok=True)
    note = {"host": platform.node(), "pid": os.getpid(), "started": time.time(), "sets": dict(sets)}
    _note(paths).write_text(json.dumps(note))


def _note(paths: StorePaths) -> Path:
    return paths.tmp / "note.json"


@dataclass
class Watch:
    """Looks at the store at ``root`` again and again; each record is read once. Raises as ``load_manifest`` does."""

    root: Path
    _units: dict[tuple[str, int], tuple[int, float]] = field(default_factory=dict)  # → tiles, when it was committed
    _segments: set[str] = field(default_factory=set)
    _builder: Builder | None = None

    def __post_init__(self) -> None:
        self._paths = StorePaths(self.root)
        load_manifest(self._paths)

    def look(self) -> Standing:
        """Return how far the build is now. Raises ``FindingsError`` for a damaged record."""
        builds = is_locked(self._paths.lock)  # before the rest: what an ended build committed is seen
        self._builder = self._read_note() or self._builder
        self._read_records()
        ours = [
            found for (name, _), found in self._units.items() if self._builder is None or name in self._builder.sets
        ]
        return Standing(builds, self._builder, len(ours), sum(tiles for tiles, _ in ours), self._rate(ours))

    def _read_note(self) -> Builder | None:
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # or it is being written
            told = json.loads(_note(self._paths).read_bytes())
            sets = {str(name): (int(units), int(tiles)) for name, (units, tiles) in told["sets"].items()}
            return Builder(str(told["host"]), int(told["pid"]), float(told["started"]), sets)
        return None

    def _read_records(self) -> None:
        for path in (self._paths.ledger / "commits").glob("*/*.json"):
            unit = path.parent.name, int(path.stem.partition("-")[0])
            if unit not in self._units:
                with contextlib.suppress(FileNotFoundError):  # folded into a segment meanwhile
                    self._add(read_commit(path), path.stat().st_mtime)
        for path in self._paths.segments.glob("[0-9a-f]*.parquet"):
            if path.name not in self._segments:
                with contextlib.suppress(FileNotFoundError):
                    when = path.stat().st_mtime
                    for commit in read_segment_commits(path):
                        self._add(commit, when)
                    self._segments.add(path.name)

    def _add(self, commit: Commit, when: float) -> None:
        self._units.setdefault((commit.set_id, commit.group), (commit.stop - commit.start, when))

    def _rate(self, found: list[tuple[int, float]]) -> float | None:
        """Return tiles a second of the last minutes, or since the build began where that is less."""
        now, since = time.time(), self._builder.started if self._builder else 0.0
        begin = max(since, now - WINDOW_S)
        tiles = sum(tiles for tiles, when in found if when > begin)
        return tiles / (now - begin) if tiles and now > begin else None
