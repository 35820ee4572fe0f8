"""Targets that are read from a store, and the mode ``cached``: crops of whole tiles in their stored orientations."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.allocate import Allocator, page_empty
from rsmtdf_cache.codecs import Codec, Codes, load_codec
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_cache.crops import nearest_orientation, read_crops, whole_views
from rsmtdf_cache.errors import MismatchError, UsageError, did_you_mean
from rsmtdf_cache.specs import EncodingSpec, FeatureKey, FeatureSpec
from rsmtdf_cache.stats import ChannelStats
from rsmtdf_cache.stored_pixels import require_pixels
from rsmtdf_cache.views import Box, lattice_px, token_box
from rsmtdf_train.geometry import Geometry
from rsmtdf_train.targets.base import TargetMode, TargetRequest, TargetSpec, match_keys, silence_constant
from rsmtdf_train.targets.rebuild import rebuild_command

if TYPE_CHECKING:
    from rsmtdf_cache.read_plan import Lattice, ReadPlan
    from rsmtdf_cache.store import FeatureStore

__all__ = [
    "CachedTargets",
    "StoredTargets",
    "check_pins",
    "derangement",
    "store_geometry",
    "target_specs",
]

_CALM = 50  # batches without a new row after which a store is taken to lie in memory


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


def derangement(tile_ids: Iterable[str], seed: int) -> dict[str, str]:
    """Return for each tile another one: a function of the set of ids and ``seed``, one cycle through all of them.

    The control ``shuffled`` gives tiles each other's features: whatever the features then do, they do not do it by
    what they say of the tile. Raises ``UsageError`` for a single tile.
    """
    ordered = sorted(set(tile_ids), key=lambda name: hashlib.sha256(f"shuffled/{seed}/{name}".encode()).digest())
    if len(ordered) == 1:
        raise UsageError(f"distill.control shuffled: {ordered[0]!r} is the only train tile; it needs at least two")
    return dict(zip(ordered, [*ordered[1:], *ordered[:1]], strict=True))


class StoredTargets(TargetMode):
    """Targets that are read from a store: what its modes have in common.

    ``instead``: the row whose features each row is given (control ``shuffled``); None: its own. ``components``: of each
    target that has some, in ``distill.space: stored``, and so is distilled in them.
    """

    def __init__(
        self, store: FeatureStore, standardize: bool, shuffled: Mapping[str, str] | None, space: str = "channels"
    ) -> None:
        """``shuffled``: whose features each tile is given (``derangement``); what the store lacks is left out."""
        self.store = store
        self.standardize = standardize
        self.space = space
        self.components: dict[str, int] = {}
        self.specs: dict[str, TargetSpec] = {}
        self.instead: dict[int, int] | None = None
        self._calm = 0  # batches in which nothing was new to the store
        if shuffled is not None:
            pairs = [(a, b) for a, b in shuffled.items() if a in store.tiles and b in store.tiles]
            self.instead = {self.row_of(a): self.row_of(b) for a, b in pairs}

    @property
    def remote(self) -> bool:
        return self.store.remote

    def row_of(self, tile_id: str) -> int:
        return self.store.tiles.row_of(tile_id)

    @abstractmethod
    def arrays(self) -> list[FeatureSpec]:
        """Return the arrays that a run may read."""

    def check_tiles(self, tile_ids: Iterable[str], data: Path) -> None:
        """Raise ``MismatchError`` unless every tile has a row and committed features in all arrays of the mode."""
        wanted = list(tile_ids)
        committed = [np.asarray(self.store.committed(spec.key)) for spec in self.arrays()]
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
                f"  {rebuild_command(self.store, [spec.teacher.name for spec in self.arrays()], data)}"
            )

    def check_pixels(self, tile_id: str, image: NDArray[np.uint8]) -> None:
        """Raise ``MismatchError`` when the store was built from other pixels than ``image``."""
        require_pixels(self.store, tile_id, image)

    def _check_components(self) -> None:
        """Raise ``UsageError`` when components are asked for and nothing that is distilled has any."""
        if self.space == "stored" and not self.components:
            raise UsageError(
                f"distill.space stored: no features that are distilled from {self.store.shown} are stored as principal "
                "components (or they are read as features); build them with --codec pcaK-int8, or set distill.space "
                "to channels"
            )

    def _refuse_features(self, key: str, why: str) -> None:
        """Raise ``UsageError`` for components that would have to be read as features."""
        if self.space == "stored" and self.store.codec(self.arrays_of(key)[0].key).component_std is not None:
            raise UsageError(
                f"distill.space stored: {key}: {why}, so it is read as features, not as components; set distill.space "
                "to channels, or name other features in distill.keys"
            )

    @abstractmethod
    def arrays_of(self, key: str) -> list[FeatureSpec]:
        """Return the arrays of one target."""

    def will_read(self, requests: Sequence[TargetRequest]) -> None:
        # Once all seems to lie in memory nobody is asked any more; the rows of a batch still are when it is read.
        if self._calm < _CALM:
            self._calm = 0 if self._ask(requests) else self._calm + 1

    @abstractmethod
    def _ask(self, requests: Sequence[TargetRequest]) -> int:
        """Let the store fetch what ``requests`` read, and return how much of it was new."""

    def left_memory(self) -> None:
        self._calm = 0
        self.store.left_memory()

    def source_rows(self, requests: Iterable[TargetRequest]) -> list[int]:
        """Return the rows whose features the requests are given."""
        return self.rows_read(request.row for request in requests)

    def rows_read(self, rows: Iterable[int]) -> list[int]:
        """Return the rows whose features tiles of ``rows`` are given."""
        return [row if self.instead is None else self.instead[row] for row in rows]

    def _target(
        self, key: str, stride_px: float, offset_px: float, stats: Sequence[FeatureKey], codec: Codec
    ) -> TargetSpec:
        """Return the target ``key``, standardised by the statistics of the arrays ``stats`` together."""
        if self.space == "stored" and codec.component_std is not None:
            self.components[key] = count = len(codec.component_std)
            plain = np.zeros(count, np.float32), np.ones(count, np.float32)
            return TargetSpec(key, count, stride_px, offset_px, *plain, DeviceDecoder.of_components(codec))
        total = ChannelStats.total(map(self.store.ledger.stats, stats), self.store.spec(stats[0]).layer.channels)
        mean, std = total.mean, total.std
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise MismatchError(f"{stats[0]}: its statistics are not finite; rebuild this array of {self.store.shown}")
        std = silence_constant(mean, std)
        if not self.standardize:
            mean, std = np.zeros_like(mean), np.ones_like(std)
        return TargetSpec(key, len(mean), stride_px, offset_px, mean, std, DeviceDecoder(codec, mean, std))


class CachedTargets(StoredTargets):
    """Features of clean, whole tiles, read from a store by row, orientation and box."""

    def __init__(
        self,
        store: FeatureStore,
        patterns: Sequence[str],
        geometry: Geometry,
        approximate: bool = False,
        *,
        standardize: bool = True,
        shuffled: Mapping[str, str] | None = None,
        space: str = "channels",
    ) -> None:
        """Choose the targets that match ``patterns``.

        ``approximate``: orientations of ``geometry`` that are not stored are made by turning stored ones.
        ``standardize``: by the store's statistics, else features come as they are. ``shuffled``: as in
        ``StoredTargets``. ``space``: stored, then pcaK-int8 targets are their components. Raises ``UsageError`` when
        targets and ``geometry`` do not fit.
        """
        super().__init__(store, standardize, shuffled, space)
        self.geometry = geometry
        stored = target_specs(store)
        self._by_key = {key: stored[key] for key in match_keys(patterns, list(stored))}
        self._arrays = {
            key: {o: (spec.key, store.lattice(spec.key)) for o, spec in by.items()} for key, by in self._by_key.items()
        }
        self.approximated = {}
        for key, by_orientation in self._by_key.items():
            missing = sorted(set(geometry.orientations) - set(by_orientation))
            if missing and approximate:
                self._refuse_features(key, f"orientations {missing} are approximated")
                self.approximated[key] = tuple(missing)
            elif missing:
                raise UsageError(
                    f"{key}: orientations {missing} are not stored, other features have them; build the store with one "
                    f"--orientations for all teachers, or name fewer features in distill.keys"
                )
            for spec in by_orientation.values():
                token_box(spec, Box(0, 0, geometry.crop_px, geometry.lattice_px))
            spec = next(iter(by_orientation.values()))
            # Approximations are features, not codes, so a target that has some is read as features altogether.
            plain = load_codec(EncodingSpec(), spec.layer.channels)
            codec = plain if key in self.approximated else store.codec(spec.key)
            # One mean and deviation for all orientations: a turned tile has the same values up to the teacher's
            # equivariance, and the same token must not mean two things in two frames.
            self.specs[key] = self._target(key, spec.stride_tile_px, spec.offset_tile_px, [spec.key], codec)
        self._check_components()

    def arrays_of(self, key: str) -> list[FeatureSpec]:
        return list(self._by_key[key].values())

    @property
    def by_key(self) -> Mapping[str, Mapping[int, FeatureSpec]]:
        """The chosen targets: ``{key: {orientation: spec}}``."""
        return self._by_key

    def arrays(self) -> list[FeatureSpec]:
        frames = self.geometry.orientations
        return [by[o] for by in self._by_key.values() for o in sorted({nearest_orientation(f, by) for f in frames})]

    def read(self, requests: Sequence[TargetRequest], empty: Allocator = page_empty) -> dict[str, Codes]:
        """Return ``{key: codes [n, h, w]}``; NaN in tokens that are not valid. Stored codes are copied once.

        Raises ``UsageError`` for a box off the lattice or an orientation that is neither stored nor approximated.
        """
        found: dict[str, Codes] = {}
        by_orientation: dict[int, _Crops] = defaultdict(_Crops)
        for place, (row, request) in enumerate(zip(self.source_rows(requests), requests, strict=True)):
            crops = by_orientation[request.orientation]
            crops.places.append(place)
            crops.rows.append(row)
            crops.boxes.append(request.box)
        plans: dict[tuple[Lattice, int], ReadPlan] = {}  # one does for all layers of a teacher
        for key, arrays in self._arrays.items():
            for orientation, crops in by_orientation.items():
                if key in self.approximated:
                    turned = read_crops(
                        self.store, key, crops.rows, crops.boxes, orientation=orientation, approximate=True
                    ).values
                    if key not in found:
                        found[key] = Codes(empty((len(requests), *turned.shape[1:]), turned.dtype))
                    found[key].values[crops.places] = turned
                    continue
                if orientation not in arrays:
                    raise UsageError(f"{key}: orientation {orientation} is not stored; have {sorted(arrays)}")
                array, lattice = arrays[orientation]
                plan = plans.get((lattice, orientation))
                if plan is None:
                    plan = self.store.plan(array, crops.rows, crops.boxes, crops.places)
                    plans[lattice, orientation] = plan
                if key not in found:
                    found[key] = self.store.empty_codes(array, len(requests), plan.size, empty)
                self.store.read_planned(array, plan, found[key])
        return found

    def _ask(self, requests: Sequence[TargetRequest]) -> int:
        by_orientation: dict[int, list[int]] = defaultdict(list)
        for row, request in zip(self.source_rows(requests), requests, strict=True):
            by_orientation[request.orientation].append(row)
        return sum(
            self.store.will_read(arrays[orientation][0], by_orientation[orientation])
            for arrays in self._arrays.values()
            for orientation in by_orientation.keys() & arrays.keys()
        )


class _Crops:
    """The crops of a batch in one orientation: their places in it, rows of the store, boxes."""

    __slots__ = ("boxes", "places", "rows")

    def __init__(self) -> None:
        self.places: list[int] = []
        self.rows: list[int] = []
        self.boxes: list[Box] = []


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
