"""Where distillation targets come from. A run chooses one mode; this file holds the modes that read a store.

A *target* is a feature map without its orientation: its key is ``teacher/s{size}/layer`` (for example
``dinov2_vits14/s448/block11``), and the orientation of each sample picks the stored array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs import Codes, codec_name, load_codec
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_cache.crops import nearest_orientation, read_crops, whole_views
from rsmtdf_cache.errors import MismatchError, UsageError, did_you_mean
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec
from rsmtdf_cache.tiles import pixel_digest
from rsmtdf_cache.views import Box, base_size_px, lattice_px, token_box
from rsmtdf_train.sampler import Geometry

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = [
    "CachedTargets",
    "TargetMode",
    "TargetRequest",
    "TargetSpec",
    "asked_as",
    "check_pins",
    "match_keys",
    "store_geometry",
    "target_specs",
]


@dataclass(frozen=True)
class TargetSpec:
    """One target. ``stride_px`` and ``offset_px`` are tile pixels in the oriented frame; token 0 of a crop on the
    lattice is centred at ``offset_px`` of the crop. ``mean`` and ``std`` (``[D]`` float32) are those of the
    store; ``std`` is infinite for a channel that never changes, so that it standardises to 0. ``decoder`` makes
    standardised features of what ``TargetMode.read`` returns.
    """

    key: str
    channels: int
    stride_px: float
    offset_px: float
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    decoder: DeviceDecoder


@dataclass(frozen=True)
class TargetRequest:
    """The targets of one crop: a row of the store, an orientation and a box in its frame."""

    row: int
    orientation: int
    box: Box


class TargetMode(ABC):
    """What the dataset asks for targets. A mode that computes them from the batch's images reads nothing here."""

    #: Targets by key, in a fixed order; the model builds one translator for each.
    specs: Mapping[str, TargetSpec]

    #: Orientations whose targets are turned maps of others, by key: approximations that the recipe asked for.
    approximated: Mapping[str, tuple[int, ...]] = {}

    @abstractmethod
    def row_of(self, tile_id: str) -> int:
        """Return the row of a tile. Raises ``KeyError``."""

    @abstractmethod
    def check_tiles(self, tile_ids: Iterable[str], data: Path) -> None:
        """Raise ``MismatchError`` unless every tile has targets. ``data`` is the dataset, for the message."""

    @abstractmethod
    def check_pixels(self, tile_id: str, image: NDArray[np.uint8]) -> None:
        """Raise ``MismatchError`` when the targets were made from other pixels than ``image``."""

    @abstractmethod
    def read(self, requests: Sequence[TargetRequest]) -> list[dict[str, Codes]]:
        """Return for each request ``{key: codes of [h, w]}``; NaN in tokens that are not valid."""


def asked_as(teacher: str) -> str:
    """Return what ``--teacher`` calls the stored ``teacher``: ``timm-a`` is asked for as ``timm:a``."""
    return f"timm:{teacher[5:]}" if teacher.startswith("timm-") else teacher


def match_keys(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return those of ``known`` that match any glob pattern (all when there is none), in the order of ``known``.

    Raises ``UsageError`` for a pattern that matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in known):
            raise UsageError(
                f"distill.keys {pattern!r} matches no features of the store.{did_you_mean(pattern, known)} "
                f"Stored: {', '.join(known) or 'none'}"
            )
    return [key for key in known if not patterns or any(fnmatchcase(key, p) for p in patterns)]


def target_specs(store: FeatureStore) -> Mapping[str, Mapping[int, FeatureSpec]]:
    """Return ``{target key: {orientation: spec}}`` of all whole tiles a store holds, sorted by key; no fixed views."""
    return whole_views(store)


def check_pins(store: FeatureStore, pins: Mapping[str, str]) -> None:
    """Raise ``MismatchError`` that lists every array whose digest does not begin with its pin.

    ``pins``: ``{key: hex digits}``. A key is ``teacher/view/layer``, or a target key: then the pin is the digest of the
    array in orientation 0, and the arrays of all stored orientations must differ from it in the orientation alone.
    """
    lines: list[str] = []
    targets = target_specs(store)
    full = {str(key): store.spec(key).digest() for key in store.keys()}
    for key, pin in pins.items():
        if key in full:
            found = {full[key]}
        elif key in targets:
            found = {_upright(spec).digest() for spec in targets[key].values()}
        else:
            lines.append(f"{key}: pinned {pin}, not stored.{did_you_mean(key, [*targets, *full])}")
            continue
        lines += [
            f"{key}: pinned {pin}, the store has {digest}" for digest in sorted(found) if not digest.startswith(pin)
        ]
    if lines:
        listing = "\n  ".join(lines)
        raise MismatchError(
            f"{store.shown} does not hold the features that distill.pins of the recipe names:\n  {listing}\n"
            "use the store that was pinned, build one with the same teachers, weights and views, or change the pins"
        )


def _upright(spec: FeatureSpec) -> FeatureSpec:
    return spec.model_copy(update={"view": spec.view.model_copy(update={"orientation": 0})})


def store_geometry(
    store: FeatureStore, crop_px: int, patterns: Sequence[str] = (), approximate: bool = False
) -> Geometry:
    """Return the crops whose features are stored for every target that matches ``patterns``.

    Without patterns: of all targets on a pixel lattice. So the geometry is a function of the store alone, and arms
    that distil from all, some or none of its features see the same crops. ``approximate``: all eight orientations, for
    features of those that are not stored can be approximated. Raises ``UsageError`` for a ``crop_px`` off the lattice,
    a named target without one, targets that share no orientation, or a store without arrays.
    """
    stored = target_specs(store)
    if not stored:
        raise UsageError(
            f"store {store.shown} holds no arrays; build features into it: "
            f"rsmtdf cache build DATA --out {store.shown} --teacher NAME"
        )
    chosen = match_keys(patterns, list(stored))
    specs = [next(iter(stored[key].values())) for key in chosen]
    if not patterns:
        specs = [s for s in specs if float(s.stride_tile_px).is_integer()]
        chosen = [key for key in chosen if next(iter(stored[key].values())) in specs]
    if not chosen:
        raise UsageError(f"store {store.shown}: no features on a pixel lattice; build a view of a dyadic scale")
    shared = set(range(8)) if approximate else set.intersection(*(set(stored[key]) for key in chosen))
    return Geometry(store.tile_px, crop_px, lattice_px(specs), tuple(sorted(shared)))


class CachedTargets(TargetMode):
    """Features of clean, whole tiles, read from a store by row, orientation and box."""

    def __init__(
        self, store: FeatureStore, patterns: Sequence[str], geometry: Geometry, approximate: bool = False
    ) -> None:
        """Choose the targets that match ``patterns``.

        ``approximate``: orientations of ``geometry`` that are not stored are made by turning stored ones. Raises
        ``UsageError`` when targets and ``geometry`` do not fit.
        """
        self.store = store
        self.geometry = geometry
        stored = target_specs(store)
        self._by_key = {key: stored[key] for key in match_keys(patterns, list(stored))}
        self.specs = {}
        self.approximated = {}
        for key, by_orientation in self._by_key.items():
            missing = sorted(set(geometry.orientations) - set(by_orientation))
            if missing and approximate:
                self.approximated[key] = tuple(missing)
            elif missing:
                raise UsageError(
                    f"{key}: orientations {missing} are not stored, other features have them; build the store with one "
                    f"--orientations for all teachers, or name fewer features in distill.keys"
                )
            for spec in by_orientation.values():
                token_box(spec, Box(0, 0, geometry.crop_px, geometry.lattice_px))
            spec = next(iter(by_orientation.values()))
            # One mean and deviation for all orientations: a turned tile has the same values up to the teacher's
            # equivariance, and the same token must not mean two things in two frames.
            mean, std = store.stats(spec.key)
            mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
            if not (np.isfinite(mean).all() and np.isfinite(std).all()):
                raise MismatchError(f"{spec.key}: its statistics are not finite; rebuild this array of {store.shown}")
            # A channel that never changes carries nothing: it becomes 0 instead of amplified rounding.
            std = np.where(std > 1e-6 * np.maximum(1, np.abs(mean)), std, np.float32(np.inf))
            # Approximations are features, not codes, so a target that has some is read as features altogether.
            codec = load_codec(EncodingSpec(), len(mean)) if key in self.approximated else store.codec(spec.key)
            self.specs[key] = TargetSpec(
                key, spec.layer.channels, spec.stride_tile_px, spec.offset_tile_px, mean, std,
                DeviceDecoder(codec, mean, std),
            )  # fmt: skip

    def row_of(self, tile_id: str) -> int:
        return self.store.tiles.row_of(tile_id)

    def check_tiles(self, tile_ids: Iterable[str], data: Path) -> None:
        """Raise ``MismatchError`` unless every tile has a row and committed features in all frames of the geometry."""
        wanted = list(tile_ids)
        frames = self.geometry.orientations
        keys = [by[o].key for by in self._by_key.values() for o in {nearest_orientation(f, by) for f in frames}]
        committed = [np.asarray(self.store.committed(key)) for key in keys]
        absent: list[str] = []
        for tile_id in wanted:
            try:
                row = self.row_of(tile_id)
            except KeyError:
                absent.append(tile_id)
                continue
            if not all(row < len(rows) and rows[row] for rows in committed):
                absent.append(tile_id)
        if absent:
            raise MismatchError(
                f"the run needs features of {len(wanted)} train tiles; {self.store.shown} lacks {len(absent)} of them "
                f"({_few(absent)}). Build them, or take tiles that the build quarantined out of splits/train.txt:\n"
                f"  {self._build_command(data)}"
            )

    def check_pixels(self, tile_id: str, image: NDArray[np.uint8]) -> None:
        """Raise ``MismatchError`` when the store was built from other pixels than ``image``."""
        if pixel_digest(image) != self.store.tiles.record(self.row_of(tile_id)).digest:
            raise MismatchError(
                f"tile {tile_id!r}: its pixels are not those that {self.store.shown} was built from; "
                f"train on the dataset of the store, or build a new store from this one"
            )

    def read(self, requests: Sequence[TargetRequest]) -> list[dict[str, Codes]]:
        """Return for each request ``{key: codes of [h, w]}``; NaN in tokens that are not valid.

        Raises ``UsageError`` for a box off the lattice or an orientation that is neither stored nor approximated.
        """
        results: list[dict[str, Codes]] = [{} for _ in requests]
        by_orientation: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_orientation[request.orientation].append(index)
        for key, specs in self._by_key.items():
            for orientation, indices in by_orientation.items():
                rows, boxes = [requests[i].row for i in indices], [requests[i].box for i in indices]
                if key in self.approximated:
                    crops = read_crops(self.store, key, rows, boxes, orientation=orientation, approximate=True)
                    found = Codes(crops.values)
                elif orientation not in specs:
                    raise UsageError(f"{key}: orientation {orientation} is not stored; have {sorted(specs)}")
                else:
                    found = self.store.read_codes(specs[orientation].key, rows, boxes)
                for n, index in enumerate(indices):
                    results[index][key] = found[n]
        return results

    def _build_command(self, data: Path) -> str:
        teachers, compressor = [], ""
        for name in sorted({spec.teacher.name for by in self._by_key.values() for spec in by.values()}):
            # All that is stored of the teacher, not only what this run reads: the arrays of a view are built together.
            specs = [
                spec for by in target_specs(self.store).values() for spec in by.values() if spec.teacher.name == name
            ]
            base = base_size_px(specs[0].teacher, self.store.tile_px)
            scales = sorted({spec.view.size_px / base for spec in specs}, reverse=True)
            layers = "+".join(dict.fromkeys(spec.layer.name for spec in specs))
            turns = len({spec.view.orientation for spec in specs})
            scale = "+".join(f"{s:g}" for s in scales)
            origin = specs[0].teacher.weights_origin
            weights = ",weights=FILE" if origin.startswith("file ") else ""
            if origin.startswith("seed "):
                weights = f",pretrained=none,seed={origin.removeprefix('seed ')}"
            encoding = specs[0].encoding
            codec = codec_name(encoding.model_copy(update={"compressor": "none"}))
            if codec != "float16":
                weights += f",codec={codec}"
            teachers.append(f"--teacher {asked_as(name)}{weights},layers={layers},scales={scale},orientations={turns}")
            if encoding.compressor != "none":
                compressor = f" --compressor {encoding.compressor}"
        return f"rsmtdf cache build {data} --out {self.store.shown} {' '.join(teachers)}{compressor}"


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
