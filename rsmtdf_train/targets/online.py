"""Target modes with live teachers: ``online`` (every step) and ``mixed(p)`` (a step with probability p, else stored).

With a store, an online run has the store's targets, geometry and statistics, and teachers with the store's weights:
it is paired with cached runs. Without one, the recipe's ``teachers`` say what there is, and statistics are estimated on
a few train tiles. ``distill.view`` says what the teachers see: ``strong`` the student's own augmented, CutMixed input
(RS-MTDF), ``weak`` the clean crops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsmtdf_cache.allocate import Allocator, page_empty
from rsmtdf_cache.codecs import Codes, load_codec
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_cache.errors import MismatchError, UsageError, did_you_mean
from rsmtdf_cache.events import EventSink, Progress, ProgressEnd, ProgressStart, ignore_events
from rsmtdf_cache.request import parse_teacher
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import EncodingSpec
from rsmtdf_cache.stats import ChannelStats
from rsmtdf_train.augment import batch_token_weights
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.targets.base import TargetMode, TargetRequest, TargetSpec, match_keys, silence_constant
from rsmtdf_train.targets.live import LiveTarget, LiveTeachers, crop_maps, live_target, live_targets
from rsmtdf_train.targets.stored import CachedTargets, target_specs

if TYPE_CHECKING:
    from rsmtdf_cache.plan import TeacherLoader
    from rsmtdf_cache.teachers.base import Teacher

__all__ = ["LiveTeachers", "MixedTargets", "OnlineTargets", "estimate_statistics", "open_online"]

#: Tiles on which statistics are estimated, and crops a teacher is shown at once for it.
_TILES, _AT_ONCE = 32, 4

#: Keeps the draws of ``MixedTargets`` apart from all others of a seed.
_MIXED = 0x6D69786564


class OnlineTargets(TargetMode):
    """Targets that the step computes: nothing is read. ``cached``: the store that this run is paired with."""

    def __init__(
        self,
        live: LiveTeachers,
        specs: Mapping[str, TargetSpec],
        rows: Mapping[str, int],
        cached: CachedTargets | None = None,
    ) -> None:
        self.live: LiveTeachers = live
        self.specs = specs
        self.cached = cached
        self._rows = rows

    def is_online(self, step: int) -> bool:
        return True

    def row_of(self, tile_id: str) -> int:
        return self._rows[tile_id]

    def check_tiles(self, tile_ids: Iterable[str], data: Path) -> None:
        """Accept all tiles: their targets are computed, stored or not."""

    def check_pixels(self, tile_id: str, image: NDArray[np.uint8]) -> None:
        """Raise ``MismatchError`` when the paired store was built from other pixels than ``image``."""
        if self.cached is not None and tile_id in self.cached.store.tiles:
            self.cached.check_pixels(tile_id, image)

    def read(self, requests: Sequence[TargetRequest], empty: Allocator = page_empty) -> dict[str, Codes]:
        return {}


class MixedTargets(TargetMode):
    """Steps that are online with probability ``share``, a function of seed and step, and cached otherwise."""

    def __init__(self, cached: CachedTargets, live: LiveTeachers, seed: int, share: float) -> None:
        self.live: LiveTeachers = live
        self.specs = cached.specs
        self.approximated = cached.approximated
        self.cached = cached
        self._seed = seed
        self._share = share

    @property
    def remote(self) -> bool:
        return self.cached.remote

    def is_online(self, step: int) -> bool:
        """Return whether ``step`` is online: nothing of it need be read."""
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, _MIXED, step]))).random()
        return bool(draw < self._share)

    def row_of(self, tile_id: str) -> int:
        return self.cached.row_of(tile_id)

    def check_tiles(self, tile_ids: Iterable[str], data: Path) -> None:
        self.cached.check_tiles(tile_ids, data)

    def check_pixels(self, tile_id: str, image: NDArray[np.uint8]) -> None:
        self.cached.check_pixels(tile_id, image)

    def read(self, requests: Sequence[TargetRequest], empty: Allocator = page_empty) -> dict[str, Codes]:
        """Return the stored targets: for steps that are not online."""
        return self.cached.read(requests, empty)

    def will_read(self, requests: Sequence[TargetRequest]) -> None:
        self.cached.will_read(requests)

    def left_memory(self) -> None:
        self.cached.left_memory()


def open_online(
    source: TileSource, recipe: Recipe, device: torch.device, cached: CachedTargets | None = None,
    load: TeacherLoader | None = None, on_event: EventSink = ignore_events,
) -> OnlineTargets | MixedTargets:  # fmt: skip
    """Return the mode of ``recipe.targets``, ``online`` or ``mixed(p)``, its teachers loaded on ``device``.

    ``cached``: the targets of the run's store, if there is one. Raises ``UsageError`` (no teachers, sides that do not
    fit, no target that ``distill.keys`` names), ``MismatchError`` (teachers other than the store's), ``ResourceError``
    (weights that cannot be had).
    """
    distill = recipe.distill
    if distill is None:
        raise ValueError("live teachers serve distillation, which the recipe has off")
    if distill.control == "shuffled":
        raise UsageError(
            f"distill.control shuffled gives a tile the stored features of another; targets {recipe.targets} asks the "
            "teachers about the tile itself: use targets cached"
        )
    mixed = recipe.targets != "online"
    if cached is None and mixed:
        raise UsageError(f"targets {recipe.targets} reads stored features too: --use-cache STORE, or targets online")
    if cached is None:
        targets = _asked_targets(source, recipe, device, load)
    else:
        targets = _stored_targets(cached, recipe, device, load)
    specs = cached.specs if cached is not None else _estimated(targets, source, recipe, on_event)
    live = LiveTeachers(targets, specs, recipe.precision, distill.padding)
    if cached is not None and mixed:
        return MixedTargets(cached, live, recipe.seed, recipe.online_share)
    rows = {tile.id: row for row, tile in enumerate(source.tiles(["train"]))}
    return OnlineTargets(live, specs, rows, cached)


def _asked_targets(
    source: TileSource, recipe: Recipe, device: torch.device, load: TeacherLoader | None
) -> list[LiveTarget]:
    """Return the targets of the recipe's teachers that ``distill.keys`` names, in the order of their keys."""
    from rsmtdf_cache.teachers import load as load_by_name
    from rsmtdf_cache.teachers.base import TeacherRequest

    if not recipe.teachers:
        raise UsageError(
            f"targets {recipe.targets} runs teachers in every step, and the recipe names none: set teachers, e.g. "
            "teachers: [\"dinov2_vitb14,layers=block11\"], or give a store whose teachers to run: --use-cache STORE"
        )  # fmt: skip
    found: dict[str, LiveTarget] = {}
    for text in recipe.teachers:
        asked = parse_teacher(text)
        weights = "none" if asked.pretrained == "none" else asked.weights
        request = TeacherRequest(asked.name, weights, asked.seed, asked.layers, asked.positions)
        teacher = (load or load_by_name)(request, device=str(device))
        native = recipe.augment.geometry == "native"
        for target in live_targets(teacher, asked, source.tile_px, recipe.crop_px, native):
            if target.key in found:
                raise UsageError(f"teachers: {target.key} is asked for twice; name each teacher once")
            found[target.key] = target
    patterns = () if recipe.distill is None else recipe.distill.keys
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in found):
            raise UsageError(
                f"distill.keys {pattern!r} matches nothing that the recipe's teachers give."
                f"{did_you_mean(pattern, found)} They give: {', '.join(sorted(found))}"
            )
    return [found[key] for key in match_keys(patterns, sorted(found))]


def _stored_targets(
    cached: CachedTargets, recipe: Recipe, device: torch.device, load: TeacherLoader | None
) -> list[LiveTarget]:
    """Return the store's targets as its teachers give them live. ``teachers`` says where weights are, no more."""
    from rsmtdf_cache.upkeep.recompute import TeacherShelf

    asked = [parse_teacher(text) for text in recipe.teachers]
    stored = target_specs(cached.store)
    teachers: dict[str, Teacher] = {}
    found = []
    for key, target in cached.specs.items():
        spec = next(iter(stored[key].values()))
        name = spec.teacher.name
        if name not in teachers:  # one shelf holds one teacher, and refuses another than the recorded one
            teachers[name] = TeacherShelf(asked, load, str(device)).teacher(spec.teacher)
        view, tile_px = spec.view.size_px, cached.store.tile_px
        live = live_target(teachers[name], key, spec.layer.name, view, tile_px, recipe.crop_px)
        here = (live.spec.stride_tile_px, live.spec.offset_tile_px, live.spec.layer.channels)
        there = (target.stride_px, target.offset_px, target.channels)
        if any(abs(a - b) > 1e-6 for a, b in zip(here, there, strict=True)):
            raise UsageError(
                f"{key}: its tokens of a crop of {recipe.crop_px} px lie elsewhere than stored ones (stride, offset, "
                f"channels {here} instead of {there}), so online and cached targets are not comparable; set crop_px to "
                f"the whole tile, {tile_px}, or build features of another view"
            )
        found.append(live)
    return found


def _estimated(
    targets: Sequence[LiveTarget], source: TileSource, recipe: Recipe, on_event: EventSink
) -> dict[str, TargetSpec]:
    """Return the specs of targets without a store. Raw features need no statistics: mean 0, deviation 1."""
    assert recipe.distill is not None
    found: dict[str, TargetSpec] = {}
    sums: dict[str, ChannelStats] = {}
    if recipe.distill.standardize:
        sums = estimate_statistics(targets, source, recipe.crop_px, recipe.precision, on_event)
    for target in targets:
        channels = target.spec.layer.channels
        mean, std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        if target.key in sums:
            mean, std = sums[target.key].mean, sums[target.key].std
            if not (np.isfinite(mean).all() and np.isfinite(std).all()):
                raise MismatchError(
                    f"{target.key}: the teacher gives values that are not finite; set precision to float32, or check "
                    "its weights"
                )
            std = silence_constant(mean, std)
        decoder = DeviceDecoder(load_codec(EncodingSpec(), channels), mean, std)
        found[target.key] = TargetSpec(
            target.key, channels, target.spec.stride_tile_px, target.spec.offset_tile_px, mean, std, decoder
        )
    return found


def estimate_statistics(
    targets: Sequence[LiveTarget], source: TileSource, crop_px: int, precision: str = "float32",
    on_event: EventSink = ignore_events,
) -> dict[str, ChannelStats]:  # fmt: skip
    """Return sums per channel of ``targets`` over one clean crop of each of up to 32 train tiles.

    Tiles and crops follow from the tiles' ids alone. A crop larger than its tile is padded; padded tokens do not count.
    """
    chosen = sorted(source.tiles(["train"]), key=lambda tile: _hashed(tile.id))[:_TILES]
    sums = {target.key: ChannelStats.empty(target.spec.layer.channels) for target in targets}
    task = "statistics"
    on_event(ProgressStart(task, "teachers' statistics", len(chosen)))
    for start in range(0, len(chosen), _AT_ONCE):
        tiles = chosen[start : start + _AT_ONCE]
        cut = [_clean_crop(source.read_image(tile), tile.id, crop_px) for tile in tiles]
        images = torch.from_numpy(np.stack([image for image, _ in cut])).permute(0, 3, 1, 2).float() / 255
        valid = torch.from_numpy(np.stack([shown for _, shown in cut]))
        maps = crop_maps(targets, images.to(targets[0].teacher.device), precision)
        for target in targets:
            counts = batch_token_weights(valid, target.spec.grid, target.spec.offset_tile_px).numpy() > 0
            for tokens, count in zip(maps[target.key].cpu().numpy(), counts, strict=True):
                if count.any():
                    sums[target.key].add(tokens[count])
        on_event(Progress(task, len(tiles)))
    on_event(ProgressEnd(task))
    return sums


def _clean_crop(image: NDArray[np.uint8], tile_id: str, crop_px: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return ``[crop_px, crop_px, 3]`` of a tile at a place drawn from its id, and which pixels are its own."""
    spare = max(len(image) - crop_px, 0) + 1
    number = int.from_bytes(_hashed(tile_id)[8:16])
    y, x = number % spare, number // spare % spare
    part = image[y : y + crop_px, x : x + crop_px]
    crop: NDArray[Any] = np.zeros((crop_px, crop_px, 3), np.uint8)
    shown = np.zeros((crop_px, crop_px), np.bool_)
    crop[: part.shape[0], : part.shape[1]] = part
    shown[: part.shape[0], : part.shape[1]] = True
    return crop, shown


def _hashed(tile_id: str) -> bytes:
    return hashlib.sha256(tile_id.encode()).digest()
