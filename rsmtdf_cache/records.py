"""The facts a ledger is made of, as values and as JSON: an array set, a commit, a shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError
from rsmtdf_cache.files import read_json
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile
from rsmtdf_cache.stats import ChannelStats

__all__ = ["Commit", "SetRecord", "ShardRecord", "read_commit", "read_dropped", "read_set", "read_snapshot"]


@dataclass(frozen=True)
class ShardRecord:
    """One committed shard: where it lies, what its bytes are, what they hold.

    ``stats`` is None when the record comes from a compacted segment; ``Ledger.stats_of`` reads it from there.
    """

    layer: str
    path: str
    nbytes: int
    sha256: str
    stats: ChannelStats | None = None


@dataclass(frozen=True)
class Commit:
    """One committed unit: rows ``[start, stop)`` of a row group, one shard per layer.

    ``generation`` counts repairs that could not reproduce the bytes; the highest one counts.
    """

    set_id: str
    group: int
    start: int
    stop: int
    profile: NumericsProfile
    shards: tuple[ShardRecord, ...]
    generation: int = 0

    def shard(self, layer: str) -> ShardRecord | None:
        """Return the shard of ``layer``, None when this unit was committed without it."""
        return next((s for s in self.shards if s.layer == layer), None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data. Every shard must have its statistics."""
        shards = []
        for s in self.shards:
            if s.stats is None:
                raise ValueError(f"{s.path}: its statistics were not read")
            stats = s.stats.to_json()
            shards.append({"layer": s.layer, "path": s.path, "nbytes": s.nbytes, "sha256": s.sha256, "stats": stats})
        return {
            "set": self.set_id, "group": self.group, "generation": self.generation, "start": self.start,
            "stop": self.stop, "profile": self.profile.to_json(), "shards": shards,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Commit:
        """Return the commit of plain JSON data. Raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        shards = tuple(
            ShardRecord(str(s["layer"]), str(s["path"]), _count(s["nbytes"]), str(s["sha256"]),
                        ChannelStats.from_json(s["stats"]))
            for s in data["shards"]
        )  # fmt: skip
        profile = NumericsProfile.from_json(data["profile"])
        group, start, stop = _count(data["group"]), _count(data["start"]), _count(data["stop"])
        if start > stop or not shards:
            raise ValueError(f"rows {start} to {stop}, {len(shards)} shards")
        return cls(str(data["set"]), group, start, stop, profile, shards, _count(data.get("generation", 0)))


@dataclass(frozen=True)
class SetRecord:
    """An array set of the store and the numerics profile it is encoded in."""

    arrays: ArraySet
    profile: NumericsProfile


def read_commit(path: Path) -> Commit:
    """Return the commit record at ``path``. Raises ``FindingsError`` when it is damaged or lies at a wrong place."""
    try:
        commit = Commit.from_json(read_json(path))
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise FindingsError(f"{path}: not a commit record ({error})") from None
    name = f"{commit.group:08d}" + (f"-{commit.generation}" if commit.generation else "")
    if commit.set_id != path.parent.name or path.stem != name:
        raise FindingsError(f"{path}: the record says it is {commit.set_id}/{name}")
    return commit


def read_set(path: Path) -> SetRecord:
    """Return the array set record at ``path``. Raises ``FindingsError`` when it is damaged."""
    body = read_json(path)
    try:
        arrays = ArraySet(tuple(FeatureSpec.from_json(s) for s in body["arrays"]))
        profile = NumericsProfile.from_json(body["profile"])
        named = bool(arrays.specs) and arrays.id == path.stem
        keys = {str(s.key) for s in arrays.specs}
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise FindingsError(f"{path}: not an array set record ({error})") from None
    if not named or len(keys) != len(arrays.specs):
        raise FindingsError(f"{path}: the record's arrays do not have the name of the file")
    if len({(s.teacher.name, s.view.name) for s in arrays.specs}) != 1:
        raise FindingsError(f"{path}: the arrays of a set have one teacher and one view")
    return SetRecord(arrays, profile)


def read_dropped(path: Path) -> frozenset[tuple[str, str]]:
    """Return the (set, layer) that the list at ``path`` names. Raises ``FindingsError`` when it is damaged."""
    try:
        return frozenset((str(name), str(layer)) for name, layer in read_json(path)["arrays"])
    except (KeyError, TypeError, ValueError) as error:
        raise FindingsError(f"{path}: not a list of dropped arrays ({error})") from None


def read_snapshot(path: Path) -> Content:
    """Return what the snapshot that ``path`` is named after holds. Raises ``FindingsError`` when it is damaged."""
    body = read_json(path)
    try:
        if body["snapshot"] != path.stem:
            raise ValueError(f"it is of {body['snapshot']}")
        return Content.from_json(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FindingsError(f"{path}: not the snapshot record it should be ({error})") from None


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"not a count: {value!r}")
    return value
