"""The canary: before a store grows, its teacher encodes a few tiles again that the store has.

Names and digests say which network reads pixels how. They cannot say that a library, a driver or the code of the
teacher changed what comes out. A store half of whose features come from another function is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsmtdf_cache.codecs import Codec, Codes
from rsmtdf_cache.encode import TileReader, encode_batch
from rsmtdf_cache.errors import DataError, FindingsError, MismatchError
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.files import sha256_file
from rsmtdf_cache.layout import ArraySet, Part, parts_of, shard_layout
from rsmtdf_cache.ledger import Commit, Ledger, ShardRecord
from rsmtdf_cache.quality import token_cosines
from rsmtdf_cache.shard import ShardReader
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile, TeacherSpec, differing_fields
from rsmtdf_cache.teachers.base import Teacher

__all__ = [
    "CanaryResult",
    "Likeness",
    "StoredCodes",
    "check_canary",
    "compare_maps",
    "encode_again",
    "profile_here",
    "will_grow",
]

#: Below this cosine, or beyond this relative difference of lengths, features are another function's. Other devices and
#: libraries stay above 0.9999 (decision 3).
COSINE_MIN, LENGTH_MAX = 0.999, 0.02

#: Tiles of a dataset that lacks or changed them are passed over; so many are tried.
_TRIES = 256

Float32Maps = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Likeness:
    """How alike two maps are: mean cosine of their tokens, relative difference of their lengths, equal bytes."""

    cosine: float
    length: float
    equal: bool

    @property
    def alike(self) -> bool:
        """Whether the maps come from the same function, as far as numbers can tell. NaN is not alike."""
        return self.cosine >= COSINE_MIN and self.length <= LENGTH_MAX


@dataclass(frozen=True)
class CanaryResult:
    """What the canary saw: tiles encoded again, and the worst of their maps over all arrays."""

    teacher: str
    tiles: int
    cosine: float
    key: str = ""
    tile: str = ""


def check_canary(
    teacher: Teacher, ledger: Ledger, reader: TileReader, group_rows: int, tiles: int = 4,
    on_event: EventSink = ignore_events, damaged: Collection[str] = (),
    fetch: Callable[[ShardRecord, Path], None] | None = None,
) -> CanaryResult:  # fmt: skip
    """Encode ``tiles`` committed tiles of every array set of ``teacher`` again and compare them with what is stored.

    The tiles are those of smallest content digest, in the recorded numerics; ones that the dataset at hand lacks are
    passed over, and so are shards whose paths ``damaged`` names. Nothing committed, or no tile at hand: nothing is
    compared, the latter with a warning. ``fetch``: what brings a shard to its place where shards lie elsewhere. Raises
    ``MismatchError`` when a map differs, ``FindingsError`` when a stored shard is damaged.
    """
    name = teacher.spec.name
    worst = CanaryResult(name, 0, 1.0)
    seen: set[int] = set()
    committed, codes = 0, StoredCodes(ledger, group_rows, fetch)
    for set_id, record in sorted(ledger.sets.items()):
        specs = ledger.live(set_id)
        units = [c for c in ledger.commits[set_id].values() if not any(s.path in damaged for s in c.shards)]
        if not specs or not _same_network(specs[0].teacher, teacher.spec) or not units:
            continue
        committed += 1
        rows = _readable(_smallest(ledger, units), reader, tiles)
        seen |= set(rows)
        arrays, profile = ArraySet(tuple(specs)), profile_here(record.profile, teacher)
        for row, maps in encode_again(teacher, arrays, rows, profile, reader):
            for spec in specs:
                like = compare_maps(maps[spec.layer.name], codes.read(spec, row), ledger.codec(spec))
                tile = ledger.table.record(row).id
                if not like.alike:
                    raise MismatchError(_alarm(ledger, record.profile, spec, tile, like, teacher))
                if like.cosine < worst.cosine or not worst.key:
                    worst = CanaryResult(name, 0, like.cosine, str(spec.key), tile)
    if committed and not seen:
        on_event(Warned(
            f"{ledger.paths.root} has features of {name}, but the dataset at hand has none of their tiles: whether the "
            "teacher still gives the same features was not checked"
        ))  # fmt: skip
    return CanaryResult(name, len(seen), worst.cosine, worst.key, worst.tile)


def _same_network(stored: TeacherSpec, here: TeacherSpec) -> bool:
    """Whether both say they are the same; another network under the same name is told apart by its digest."""
    told = {"weights_origin", "license"}
    return stored.model_dump(exclude=told) == here.model_dump(exclude=told)


def will_grow(ledger: Ledger, specs: Sequence[FeatureSpec], tile_ids: Sequence[str], group_rows: int) -> bool:
    """Whether a build of ``specs`` over these tiles has anything to compute: a new array, tile, or pending unit."""
    known = ledger.specs()
    if any(s.key not in known for s in specs) or any(name not in ledger.table for name in tile_ids):
        return True
    groups = {ledger.table.row_of(name) // group_rows for name in tile_ids}
    return any(not groups <= ledger.commits[ledger.set_of(s.key)].keys() for s in specs)


def encode_again(
    teacher: Teacher, arrays: ArraySet, rows: Sequence[int], profile: NumericsProfile, reader: TileReader
) -> Iterator[tuple[int, Float32Maps]]:
    """Yield ``(row, {layer: [h, w, D] float32})``, encoded in micro-batches like ``encode_unit`` does."""
    view, layers = arrays.specs[0].view, [s.layer.name for s in arrays.specs]
    size = 1 if view.windows is not None else profile.micro_batch  # maps of large tiles come one at a time
    for start in range(0, len(rows), size):
        batch = list(rows[start : start + size])
        maps = encode_batch(teacher, view, layers, [reader.read(row) for row in batch], profile)
        for i, row in enumerate(batch):
            yield row, {layer: values[i] for layer, values in maps.items()}


def profile_here(recorded: NumericsProfile, teacher: Teacher) -> NumericsProfile:
    """Return the recorded numerics as this machine can give them: its own device and torch, all else as recorded."""
    cuda = teacher.device.type == "cuda"
    device = torch.cuda.get_device_name(teacher.device) if cuda else teacher.device.type
    return recorded.model_copy(update={"device": device, "torch": torch.__version__})


class StoredCodes:
    """Reads committed rows as they are stored. Each shard is compared with its sha256 when it is first touched.

    ``fetch``: what brings a shard to its place before, where shards lie elsewhere.
    """

    def __init__(
        self, ledger: Ledger, group_rows: int, fetch: Callable[[ShardRecord, Path], None] | None = None
    ) -> None:
        self._ledger, self._group_rows, self._fetch = ledger, group_rows, fetch
        self._shards: dict[str, ShardReader] = {}

    def read(self, spec: FeatureSpec, row: int) -> Codes:
        """Return the codes ``[h, w, C]`` of ``row``. Raises ``FindingsError`` when a shard is missing or damaged."""
        parts = {part: self._part(spec, row, part) for part in parts_of(spec)}
        return Codes(parts["features"], parts["scale"][..., 0] if "scale" in parts else None)

    def _part(self, spec: FeatureSpec, row: int, part: Part) -> NDArray[Any]:
        group = row // self._group_rows
        commit = self._ledger.commits[self._ledger.set_of(spec.key)][group]
        record, place = commit.shard(spec.layer.name, part), self._ledger.paths.shard(spec.key, group, part)
        layout = shard_layout(spec, self._group_rows, part)
        if str(place) not in self._shards:
            if self._fetch is not None and record is not None:
                self._fetch(record, place)
            if record is None or not place.is_file() or sha256_file(place) != record.sha256:
                raise FindingsError(f"{place}: missing or damaged; run `rsmtdf cache verify --repair` on the store")
            self._shards[str(place)] = ShardReader(place, layout)
        out = np.empty((*spec.grid, layout.channels), layout.dtype)
        self._shards[str(place)].read(row - commit.start, 0, 0, out)
        return out


def compare_maps(fresh: NDArray[np.float32], stored: Codes, codec: Codec) -> Likeness:
    """Return how alike a map encoded just now ``[h, w, D]`` and stored codes are; both go through the codec."""
    codes = codec.encode(fresh)
    a, b = (codec.decode(c).astype(np.float64) for c in (codes, stored))
    total = float(np.linalg.norm(b))
    length = abs(float(np.linalg.norm(a)) - total) / total if total else float(np.linalg.norm(a))
    return Likeness(float(token_cosines(a, b).mean()), length, codes.tobytes() == stored.tobytes())


def _smallest(ledger: Ledger, units: Sequence[Commit]) -> Iterator[int]:
    """Yield the committed rows by content digest: the same ones whatever was appended in which order."""
    records = ledger.table.records
    rows = [
        (record.digest, row)
        for commit in units
        for row in range(commit.start, commit.stop)
        if (record := records[row]) is not None
    ]
    return (row for _, row in sorted(rows))


def _readable(rows: Iterator[int], reader: TileReader, tiles: int) -> list[int]:
    """Return the first ``tiles`` of ``rows`` that the dataset at hand has as they were."""
    found: list[int] = []
    changed = 0
    for row in rows:
        if len(found) == tiles or changed == _TRIES:
            break
        try:
            reader.read(row)
        except MismatchError:  # another split or dataset: it has no such tile
            continue
        except DataError:  # a tile of the same name with other pixels
            changed += 1
            continue
        found.append(row)
    return found


def _alarm(
    ledger: Ledger, recorded: NumericsProfile, spec: FeatureSpec, tile: str, like: Likeness, teacher: Teacher
) -> str:
    here = profile_here(recorded, teacher)
    lines = differing_fields(recorded.to_json(), here.to_json())
    numerics = "\n  ".join(["", *lines]) if lines else " the same numerics profile"
    return (
        f"{ledger.paths.root}: {spec.teacher.name} does not give the features any more that the store has: {spec.key}, "
        f"tile {tile!r}: cosine {like.cosine:.6f} (at least {COSINE_MIN} is needed), length off by {like.length:.2%}. "
        "A library, a driver, the weights or the preprocessing changed without its name changing. Found here:"
        f"{numerics}\nGo back to the software the store was built with, or build into a new folder"
    )
