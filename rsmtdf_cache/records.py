"""The facts a ledger is made of, as values and as JSON: an array set, a commit, a shard."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rsmtdf_cache.codecs import codec_class
from rsmtdf_cache.content import Content
from rsmtdf_cache.errors import FindingsError, MismatchError, UsageError
from rsmtdf_cache.files import read_json
from rsmtdf_cache.layout import ArraySet, Part
from rsmtdf_cache.quality import Quality
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile
from rsmtdf_cache.stats import ChannelStats

__all__ = ["Commit", "SetRecord", "ShardRecord", "read_commit", "read_dropped", "read_set", "read_snapshot"]


_HEX64 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One committed shard: where it lies, what its bytes are, what they hold.

    ``stats`` is None when the record comes from a compacted segment; ``Ledger.stats_of`` reads it from there. Those
    of a shard of scales are empty: its layer's features were counted.
    """

    layer: str
    path: str
    nbytes: int
    sha256: str
    stats: ChannelStats | None = None

    @property
    def part(self) -> Part:
        """Which part of the array it holds, as its path says: ``zarr/<teacher>/<view>/<layer>/<part>/c/...``."""
        return "scale" if self.path.split("/")[4:5] == ["scale"] else "features"


@dataclass(frozen=True, slots=True)
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

    def shard(self, layer: str, part: Part = "features") -> ShardRecord | None:
        """Return the shard of a part of ``layer``, None when this unit was committed without it."""
        return next((s for s in self.shards if s.layer == layer and s.part == part), None)

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
    """An array set of the store and the numerics profile it is encoded in.

    ``calibrations``: layer → digest of what its codec was calibrated with. ``quality``: layer → what a sample showed
    that calibration had not seen (see ``calibrate.Quality``).
    """

    arrays: ArraySet
    profile: NumericsProfile
    calibrations: Mapping[str, str] = field(default_factory=dict)
    quality: Mapping[str, Quality] = field(default_factory=dict)

    def facts(self, layer: str) -> dict[str, Any]:
        """Return ``calibration`` and ``quality`` of one layer as JSON data, as far as they are known."""
        found: dict[str, Any] = {}
        if layer in self.calibrations:
            found["calibration"] = self.calibrations[layer]
        if layer in self.quality:
            found["quality"] = self.quality[layer].to_json()
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        body: dict[str, Any] = {"arrays": [s.to_json() for s in self.arrays.specs], "profile": self.profile.to_json()}
        if self.calibrations:
            body["calibrations"] = dict(sorted(self.calibrations.items()))
        if self.quality:
            body["quality"] = {layer: q.to_json() for layer, q in sorted(self.quality.items())}
        return body


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
    """Return the array set record at ``path``.

    Raises ``FindingsError`` when it is damaged, ``MismatchError`` for a codec that this version does not know.
    """
    body = read_json(path)
    try:
        arrays = ArraySet(tuple(FeatureSpec.from_json(s) for s in body["arrays"]))
        profile = NumericsProfile.from_json(body["profile"])
        named = bool(arrays.specs) and arrays.id == path.stem
        keys = {str(s.key) for s in arrays.specs}
        layers = {s.layer.name for s in arrays.specs}
        calibrations = {str(layer): str(digest) for layer, digest in body.get("calibrations", {}).items()}
        quality = {str(layer): Quality.from_json(q) for layer, q in body.get("quality", {}).items()}
        needed = {s.layer.name for s in arrays.specs if codec_class(s.encoding).calibrated}
    except UsageError as error:
        raise MismatchError(f"{path}: {error} A newer rsmtdf may know it") from None
    except (ValidationError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FindingsError(f"{path}: not an array set record ({error})") from None
    if not named or len(keys) != len(arrays.specs):
        raise FindingsError(f"{path}: the record's arrays do not have the name of the file")
    if len({(s.teacher.name, s.view.name) for s in arrays.specs}) != 1:
        raise FindingsError(f"{path}: the arrays of a set have one teacher and one view")
    if set(calibrations) != needed or not all(_HEX64.fullmatch(d) for d in calibrations.values()):
        raise FindingsError(f"{path}: the record does not name the calibrations of {', '.join(sorted(needed))}")
    if not set(quality) <= layers:
        raise FindingsError(f"{path}: the record states the quality of layers it does not have")
    return SetRecord(arrays, profile, calibrations, quality)


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
