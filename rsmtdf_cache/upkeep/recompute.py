"""Recompute: encode a sample of committed rows again and compare, with the teachers that the store itself names."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rsmtdf_cache.encode import TileReader
from rsmtdf_cache.errors import DataError, FindingsError, MismatchError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.head import load_whole
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import load_manifest
from rsmtdf_cache.pixel_units import read_codes
from rsmtdf_cache.pixels import is_pixels
from rsmtdf_cache.plan import TeacherLoader, rows_of_group
from rsmtdf_cache.request import TeacherAsked
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import TeacherSpec, differing_fields
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.upkeep.canary import COSINE_MIN, StoredCodes, compare_maps, encode_again, profile_here
from rsmtdf_cache.upkeep.survey import Finding

__all__ = ["Recomputed", "TeacherShelf", "recompute_sample"]


@dataclass(frozen=True)
class Recomputed:
    """One array, encoded again for some tiles: the worst cosine, and whether all bytes were the stored ones.

    ``same_numerics``: device and torch are the recorded ones, so that equal bytes can be expected.
    """

    key: str
    tiles: int
    cosine: float
    equal: bool
    same_numerics: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)


class TeacherShelf:
    """Loads the teachers that a store names, one at a time, and makes sure that they are the recorded ones.

    ``asked``: where a teacher's weights are, for those whose published weights are not at hand.
    """

    def __init__(
        self, asked: Sequence[TeacherAsked] = (), load: TeacherLoader | None = None, device: str | None = None
    ) -> None:
        self._asked = {_safe(a.name): a for a in asked}
        self._load, self._device = load, device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._teacher: Teacher | None = None
        self._held: TeacherSpec | None = None  # what ``_teacher`` was loaded for

    def refuse_unknown(self, names: set[str]) -> None:
        """Raise ``UsageError`` when a teacher was asked for that the store does not have."""
        foreign = sorted(set(self._asked) - names)
        if foreign:
            raise UsageError(f"--teacher {foreign[0]}: the store has {', '.join(sorted(names)) or 'no teacher'}")

    def teacher(self, spec: TeacherSpec) -> Teacher:
        """Return the teacher of ``spec``. Raises ``MismatchError`` when what can be loaded is another one."""
        if self._teacher is not None and self._held == spec:
            return self._teacher
        self._teacher = self._held = None  # one at a time: they are large
        asked, origin = self._asked.get(spec.name), spec.weights_origin
        name = "timm:" + spec.name.removeprefix("timm-") if spec.name.startswith("timm-") else spec.name
        if asked is not None:
            weights = "none" if asked.pretrained == "none" else asked.weights
            request = TeacherRequest(name, weights, asked.seed, positions=spec.positions)
        elif origin.startswith("seed ") and origin[5:].isdecimal():
            request = TeacherRequest(name, "none", int(origin[5:]), positions=spec.positions)
        else:
            request = TeacherRequest(name, positions=spec.positions)
        if self._load is None:
            from rsmtdf_cache.teachers import load as load_by_name

            self._load = load_by_name
        teacher = self._load(request, device=self._device)
        self._refuse_another(spec, teacher.spec)
        self._teacher, self._held = teacher, spec
        return teacher

    def _refuse_another(self, recorded: TeacherSpec, found: TeacherSpec) -> None:
        unsaid = {"weights_origin", "license"}
        fields = differing_fields(recorded.model_dump(mode="json", exclude=unsaid),
                                  found.model_dump(mode="json", exclude=unsaid))  # fmt: skip
        if not fields:
            return
        lines = "\n  ".join(fields)
        advice = "go back to the software that the store was built with"
        if recorded.weights != found.weights:
            advice = (
                f"give the weights it was built with ({recorded.weights_origin}): "
                f"--teacher {recorded.name},weights=FILE"
            )
        raise MismatchError(f"teacher {recorded.name} is not the one that the store records:\n  {lines}\n{advice}")


def recompute_sample(
    root: Path, data: Path, count: int, teachers: Sequence[TeacherAsked] = (), on_event: EventSink = ignore_events,
    load_teacher: TeacherLoader | None = None, device: str | None = None,
) -> tuple[list[Recomputed], list[Finding]]:  # fmt: skip
    """Encode ``count`` committed units of (tile, array set) again; return what was seen per array, and the faults.

    The sample is spread over array sets and row groups, and is the same at every call. Each tile is encoded in the
    micro-batch and numerics it was stored in, so that its bytes can come out equal. A cosine below 0.999 is a fault.
    Raises ``UsageError``, ``DataError`` (dataset), ``MismatchError`` (a teacher that is not the recorded one).
    """
    if count < 1:
        raise UsageError(f"--recompute {count}: ask for one tile at least")
    paths = StorePaths(root)
    manifest, ledger, source = load_manifest(paths), load_whole(paths), open_source(data)
    shelf = TeacherShelf(teachers, load_teacher, device)
    shelf.refuse_unknown({s.teacher.name for s in ledger.specs().values()})
    reader = TileReader(source, ledger.table)
    sample = list(itertools.islice(_at_hand(ledger, manifest.group_rows, reader), count))
    if not sample:
        on_event(Warned(f"{data} has none of the tiles of {root}; nothing was encoded again"))
    results: dict[str, Recomputed] = {}
    faults: list[Finding] = []
    codes = StoredCodes(ledger, manifest.group_rows)
    on_event(ProgressStart("recompute", "encoding again", len(sample)))
    # By teacher, so that each is loaded once.
    for set_id, row in sorted(sample, key=lambda s: (ledger.live(s[0])[0].teacher.name, *s)):
        arrays = ArraySet(tuple(ledger.live(set_id)))
        if is_pixels(arrays.specs[0]):
            for key, fault in _pixels_again(ledger, arrays, row, reader, codes):
                old = results.get(key, Recomputed(key, 0, 1.0, True, True))
                cosine = 0.0 if fault else old.cosine
                results[key] = Recomputed(key, old.tiles + 1, cosine, old.equal and not fault, True)
                faults += [Finding(key, fault)] if fault else []
            on_event(Progress("recompute", 1))
            continue
        recorded = ledger.commits[set_id][row // manifest.group_rows].profile
        teacher = shelf.teacher(arrays.specs[0].teacher)
        profile = profile_here(recorded, teacher)
        batch = _batch_of(ledger, set_id, row, manifest.group_rows, profile.micro_batch)
        maps = dict(encode_again(teacher, arrays, batch, profile, reader))[row]
        for spec in arrays.specs:
            key = str(spec.key)
            try:
                like = compare_maps(maps[spec.layer.name], codes.read(spec, row), ledger.codec(spec))
            except FindingsError as error:
                faults.append(Finding(paths.relative(paths.shard(spec.key, row // manifest.group_rows)), str(error)))
                continue
            if not like.alike:
                text = (
                    f"tile {ledger.table.record(row).id!r} encoded again: cosine {like.cosine:.6f} (at least "
                    f"{COSINE_MIN} is needed), length off by {like.length:.2%}"
                )
                faults.append(Finding(key, text))
            old = results.get(key, Recomputed(key, 0, 1.0, True, True))
            results[key] = Recomputed(
                key, old.tiles + 1, min(old.cosine, like.cosine), old.equal and like.equal,
                old.same_numerics and profile == recorded,
            )  # fmt: skip
        on_event(Progress("recompute", 1))
    on_event(ProgressEnd("recompute"))
    return [results[key] for key in sorted(results)], faults


def _pixels_again(
    ledger: Ledger, arrays: ArraySet, row: int, reader: TileReader, codes: StoredCodes
) -> Iterator[tuple[str, str]]:
    """Yield each array of pixels and what is wrong with a tile of it, an empty text for nothing: bytes are compared."""
    layers = [s.layer.name for s in arrays.specs]
    fresh = dict(read_codes(layers, [row], reader, workers=1))[row]
    for spec in arrays.specs:
        try:
            same = codes.read(spec, row).tobytes() == fresh[spec.layer.name].tobytes()
        except FindingsError as error:
            yield str(spec.key), str(error)
            continue
        name = ledger.table.record(row).id
        yield str(spec.key), "" if same else f"tile {name!r} read again from the dataset: other values"


def _spread(ledger: Ledger, group_rows: int) -> Iterator[tuple[str, int]]:
    """Yield every committed (set, row) once: one of each unit, then a second of each, units and rows by hash."""
    units = [(name, group) for name, groups in ledger.commits.items() if ledger.live(name) for group in groups]
    units.sort(key=lambda u: _hash(f"{u[0]}/{u[1]}"))
    rows: dict[tuple[str, int], Iterator[int]] = {}
    while units:
        for unit in list(units):
            if unit not in rows:
                name, group = unit
                inside = [
                    r for r in rows_of_group(ledger.table, group, group_rows) if r < ledger.commits[name][group].stop
                ]
                rows[unit] = iter(sorted(inside, key=lambda r, n=name: _hash(f"{n}/{ledger.table.ids[r]}")))  # type: ignore[misc]
            row = next(rows[unit], None)
            if row is None:
                units.remove(unit)
            else:
                yield unit[0], row


def _at_hand(ledger: Ledger, group_rows: int, reader: TileReader) -> Iterator[tuple[str, int]]:
    """Yield of ``_spread`` what the dataset has, with all of the micro-batch it was encoded in."""
    for name, row in _spread(ledger, group_rows):
        size = ledger.commits[name][row // group_rows].profile.micro_batch
        try:
            for other in _batch_of(ledger, name, row, group_rows, size):
                reader.read(other)
        except (MismatchError, DataError):
            continue
        yield name, row


def _batch_of(ledger: Ledger, set_id: str, row: int, group_rows: int, size: int) -> list[int]:
    """Return the rows of the micro-batch in which a build encodes ``row``: in windows, each tile has its own."""
    if ledger.live(set_id)[0].view.windows is not None:
        return [row]
    rows = rows_of_group(ledger.table, row // group_rows, group_rows)
    start = rows.index(row) // size * size
    return rows[start : start + size]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _safe(name: str) -> str:
    """Return a teacher's name as specs write it."""
    return name.replace("timm:", "timm-", 1) if name.startswith("timm:") else name
