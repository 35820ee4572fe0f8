"""Before the first shard of an array: calibrate its codec, and measure what survives it on tiles it has not seen.

Both use the tiles of smallest content digest among those of the build: no order of files and no chance decides. They
are encoded in the view's orientation 0, so that all orientations of an array have one calibration and their codes
compare. A fixed view is calibrated for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs import Calibration, Moments, codec_class, load_codec
from rsmtdf_cache.encode import TileReader, encode_batch, shown_bands
from rsmtdf_cache.errors import DataError, FindingsError, MismatchError, UsageError
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, Warned, ignore_events
from rsmtdf_cache.layout import ArraySet
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.quality import Quality
from rsmtdf_cache.specs import FeatureSpec, NumericsProfile, ViewSpec
from rsmtdf_cache.teachers.base import Teacher
from rsmtdf_cache.tiles import TileTable
from rsmtdf_cache.views import render

__all__ = [
    "CALIBRATION_TILES",
    "Calibrated",
    "Calibrator",
    "HELD_OUT_TILES",
    "TOKENS_PER_TILE",
    "about",
    "check_given",
    "own_calibrations",
    "read_calibrations",
    "sample_rows",
]

#: Tiles that a codec is calibrated with, and others that show how well it does.
CALIBRATION_TILES = 64
HELD_OUT_TILES = 16

#: A larger map is sampled on a regular grid: neighbouring tokens say little that is new, and memory stays bounded.
TOKENS_PER_TILE = 4096


def sample_rows(table: TileTable, rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the rows to calibrate with and the held-out ones, by content digest; few tiles are shared 3 to 1.

    A single tile is both.
    """
    ordered = sorted(rows, key=lambda row: table.record(row).digest)
    if len(ordered) == 1:
        return ordered, ordered
    held = min(HELD_OUT_TILES, max(1, len(ordered) // 4))
    return ordered[held : held + CALIBRATION_TILES], ordered[:held]


@dataclass(frozen=True)
class Calibrated:
    """What an array set is registered with, by layer."""

    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    quality: Mapping[str, Quality] = field(default_factory=dict)


class Calibrator:
    """Calibrates the array sets of a build; views that differ in orientation alone share the work.

    ``given``: calibrations to use instead of new ones (``read_calibrations``).
    """

    def __init__(
        self, table: TileTable, rows: Sequence[int], reader: TileReader, given: Sequence[Calibration] = (),
        on_event: EventSink = ignore_events,
    ) -> None:  # fmt: skip
        self._table, self._reader, self._on_event = table, reader, on_event
        self._fit_rows, self._held_rows = sample_rows(table, rows)
        self._given = {_about_key(c.about): c for c in given}
        self._done: dict[tuple[str, str, ViewSpec, tuple[str, ...]], Calibrated] = {}

    def tiles(self, arrays: ArraySet) -> int:
        """Return how many tiles ``run`` would encode for the array set."""
        return 0 if self._name(arrays) in self._done else len(self._held_rows) + len(self._needed(arrays)[1])

    def run(self, teacher: Teacher, arrays: ArraySet, profile: NumericsProfile) -> Calibrated:
        """Return calibrations and quality of the layers of ``arrays``, encoded in the numerics of ``profile``.

        Raises ``DataError`` when the teacher gives values that are not finite.
        """
        name = self._name(arrays)
        if name not in self._done:
            self._done[name] = self._run(teacher, arrays, profile)
        return self._done[name]

    def _name(self, arrays: ArraySet) -> tuple[str, str, ViewSpec, tuple[str, ...]]:
        first = arrays.specs[0]
        return first.teacher.name, str(first.encoding), _upright(first.view), tuple(s.layer.name for s in arrays.specs)

    def _needed(self, arrays: ArraySet) -> tuple[list[FeatureSpec], list[int]]:
        """Return the layers that need a calibration that was not given, and the rows it takes."""
        calibrated = [s for s in arrays.specs if codec_class(s.encoding).calibrated]
        missing = [s for s in calibrated if _about_key(about(s)) not in self._given]
        return missing, self._fit_rows if missing else []

    def _run(self, teacher: Teacher, arrays: ArraySet, profile: NumericsProfile) -> Calibrated:
        missing, fit_rows = self._needed(arrays)
        calibrations = {
            s.layer.name: self._given[_about_key(about(s))]
            for s in arrays.specs
            if codec_class(s.encoding).calibrated and s not in missing
        }
        task = f"calibrate-{arrays.label}"
        self._on_event(ProgressStart(task, f"sampling {arrays.label}", len(fit_rows) + len(self._held_rows)))
        moments = {s.layer.name: Moments(s.layer.channels) for s in missing}

        def count(layer: str, _: int, tokens: NDArray[np.float32]) -> None:
            if layer in moments:
                moments[layer].add(tokens)

        self._encode(teacher, arrays, fit_rows, profile, task, count)
        for spec in missing:
            stored = codec_class(spec.encoding).stored_channels(spec.encoding, spec.layer.channels)
            components = stored if spec.encoding.codec.startswith("pca") else 0
            facts = {**about(spec), "tiles": len(fit_rows), "tokens": moments[spec.layer.name].count}
            calibrations[spec.layer.name] = Calibration.fit(moments[spec.layer.name], components, facts)
        quality = self._quality(teacher, arrays, profile, task, calibrations)
        self._on_event(ProgressEnd(task))
        return Calibrated(calibrations, quality)

    def _quality(
        self, teacher: Teacher, arrays: ArraySet, profile: NumericsProfile, task: str,
        calibrations: Mapping[str, Calibration],
    ) -> dict[str, Quality]:  # fmt: skip
        codecs = {
            s.layer.name: load_codec(s.encoding, s.layer.channels, calibrations.get(s.layer.name)) for s in arrays.specs
        }
        pairs: dict[str, list[tuple[NDArray[np.float32], NDArray[np.float16]]]] = {layer: [] for layer in codecs}

        def compare(layer: str, row: int, tokens: NDArray[np.float32]) -> None:
            decoded = codecs[layer].decode(codecs[layer].encode(tokens))
            if not np.isfinite(decoded).all():
                raise DataError(
                    f"{arrays.label}/{layer}, tile {self._table.record(row).id!r}: values do not fit "
                    f"{codecs[layer].encoding.codec} (largest magnitude {float(np.abs(tokens).max()):.4g}); "
                    "nothing was written"
                )
            pairs[layer].append((tokens, decoded))

        self._encode(teacher, arrays, self._held_rows, profile, task, compare)
        held_out = set(self._held_rows).isdisjoint(self._fit_rows)
        tiles = len(self._held_rows)
        return {
            layer: Quality.of(np.concatenate([a for a, _ in p]), np.concatenate([b for _, b in p]), held_out, tiles)
            for layer, p in pairs.items()
        }

    def _encode(
        self, teacher: Teacher, arrays: ArraySet, rows: Sequence[int], profile: NumericsProfile, task: str,
        use: Callable[[str, int, NDArray[np.float32]], None],
    ) -> None:  # fmt: skip
        view, layers = _upright(arrays.specs[0].view), [s.layer.name for s in arrays.specs]
        size = 1 if view.windows is not None else profile.micro_batch
        steps = {s.layer.name: max(1, math.ceil(math.sqrt(math.prod(s.grid) / TOKENS_PER_TILE))) for s in arrays.specs}
        for start in range(0, len(rows), size):
            batch = list(rows[start : start + size])
            tiles = [self._reader.read(row) for row in batch]
            if view.windows is not None:  # a map that must not be held as a whole
                for layer, y0, band in shown_bands(teacher, view, layers, render(tiles[0], view), profile):
                    step = steps[layer]
                    self._use(arrays, layer, batch[0], band[-y0 % step :: step, ::step], use)
            else:
                for layer, maps in encode_batch(teacher, view, layers, tiles, profile).items():
                    step = steps[layer]
                    for row, values in zip(batch, maps, strict=True):
                        self._use(arrays, layer, row, values[::step, ::step], use)
            self._on_event(Progress(task, len(batch)))

    def _use(
        self, arrays: ArraySet, layer: str, row: int, values: NDArray[np.float32],
        use: Callable[[str, int, NDArray[np.float32]], None],
    ) -> None:  # fmt: skip
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise DataError(
                f"{arrays.label}/{layer}, tile {self._table.record(row).id!r}: {bad} of {values.size} values are not "
                "finite; try --precision float32, or check the weights"
            )
        if values.size:
            use(layer, row, values.reshape(-1, values.shape[-1]))


def about(spec: FeatureSpec) -> dict[str, str]:
    """Return what a calibration of the array is of: teacher, weights, scale, layer, codec."""
    view = _upright(spec.view)
    return {
        "teacher": spec.teacher.name, "weights": spec.teacher.weights, "view": view.name, "layer": spec.layer.name,
        "codec": spec.encoding.codec, "parameters": str(sorted(spec.encoding.parameters.items())),
    }  # fmt: skip


def read_calibrations(places: Sequence[Path]) -> list[Calibration]:
    """Return the calibrations in ``places``: files, or stores, of which all are taken.

    Raises ``UsageError`` for a place without any, ``DataError`` for a file that is damaged or none.
    """
    found = []
    for place in places:
        files = sorted((place / "ledger" / "calibrations").glob("*.safetensors")) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            raise UsageError(f"--calibration {place}: no calibration is there; give a .safetensors file, or a store")
        try:
            found += [Calibration.read(file) for file in files]
            for calibration in found:
                _about_key(calibration.about)
        except FindingsError as error:
            raise DataError(f"--calibration {place}: {error}") from None
    return found


def own_calibrations(ledger: Ledger) -> list[Calibration]:
    """Return the calibrations of all array sets of a store."""
    return [ledger.calibration(d) for record in ledger.sets.values() for d in record.calibrations.values()]


def check_given(
    given: Sequence[Calibration], specs: Sequence[FeatureSpec], own: Sequence[Calibration],
    on_event: EventSink = ignore_events,
) -> None:  # fmt: skip
    """Raise where ``given`` calibrations cannot be meant for a build of ``specs``; ``own``: those of its store.

    ``UsageError``: nothing of the build is calibrated, or two contradict each other. ``MismatchError``: none is of an
    array of the build, or the store has another one already. Arrays that they leave out are told as a warning.
    """
    if not given:
        return
    wanted = {_about_key(about(s)): str(s.key) for s in specs if codec_class(s.encoding).calibrated}
    if not wanted:
        raise UsageError("--calibration: nothing of this build is calibrated; give --codec int8 or pcaK-int8")
    known = {_about_key(c.about): c.digest for c in own}
    offered: dict[tuple[str, ...], str] = {}
    for calibration in given:
        key = _about_key(calibration.about)
        if offered.setdefault(key, calibration.digest) != calibration.digest:
            raise UsageError(f"--calibration: two different ones for {wanted.get(key, '/'.join(key[::2]))!r}; give one")
        if key in wanted and known.get(key, calibration.digest) != calibration.digest:
            raise MismatchError(
                f"--calibration: the store has {wanted[key]} with another calibration ({known[key][:12]}, given is "
                f"{calibration.digest[:12]}); leave --calibration out, or build into a new folder"
            )
    if wanted.keys().isdisjoint(offered):
        names = ", ".join(sorted({repr(str(c.about.get("teacher"))) for c in given}))
        raise MismatchError(
            f"--calibration: none of its {len(given)} calibrations ({names}) is of the same weights, view, layer and "
            "codec as an array of this build"
        )
    left = [name for key, name in wanted.items() if key not in offered and key not in known]
    if left:
        on_event(
            Warned(f"--calibration has none for {', '.join(left)}; they are calibrated with the tiles of this build")
        )


def _about_key(facts: Mapping[str, object]) -> tuple[str, ...]:
    names = ("teacher", "weights", "view", "layer", "codec", "parameters")
    try:
        return tuple(str(facts[name]) for name in names)
    except KeyError as error:
        raise FindingsError(f"a calibration does not say its {error}") from None


def _upright(view: ViewSpec) -> ViewSpec:
    return view.model_copy(update={"orientation": 0}) if view.is_whole else view
