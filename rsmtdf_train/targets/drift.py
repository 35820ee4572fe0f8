"""The drift monitor: does the live teacher still say what the store says it said?

Whole tiles are compared, as the build encoded them: a crop's features differ from those of its tile for good reasons.
Both maps go through the codec, so that what it loses is not taken for drift.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from rsmtdf_cache.errors import RsmtdfError
from rsmtdf_cache.events import EventSink, Warned, ignore_events
from rsmtdf_cache.request import parse_teacher
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.specs import FeatureSpec, ViewSpec
from rsmtdf_train.loader import BatchLoader
from rsmtdf_train.targets.stored import StoredTargets

if TYPE_CHECKING:
    from rsmtdf_cache.plan import TeacherLoader
    from rsmtdf_cache.stored_pixels import StoredPixels
    from rsmtdf_cache.teachers.base import Teacher

__all__ = ["DRIFT_COSINE", "Drift", "drawn_tiles"]

#: Below this mean cosine a person is told. Other devices and libraries stay above 0.9999 (decision 3).
DRIFT_COSINE = 0.99


def drawn_tiles(loader: BatchLoader, step: int) -> list[tuple[str, int]]:
    """Return ids and orientations of the crops of batch ``step``, unlabelled ones first."""
    sizes = loader.recipe.batch
    draws = loader.labeled.draws(step, sizes.labeled)
    if loader.unlabeled is not None:
        draws = [*loader.unlabeled.draws(step, sizes.unlabeled), *draws]
    return [(draw.tile_id, draw.orientation) for draw in draws]


class Drift:
    """Compares stored targets with live teachers. Teachers are loaded at the first measurement, or given as ``held``.

    A teacher that cannot be had is named once, and passed over from then on.
    """

    def __init__(
        self,
        stored: StoredTargets,
        source: TileSource,
        asked: Sequence[str] = (),
        device: torch.device | None = None,
        held: Mapping[str, Teacher] | None = None,
        load: TeacherLoader | None = None,
        pixels: StoredPixels | None = None,
    ) -> None:
        """``stored``: what the run reads. ``asked``: the recipe's ``teachers``, which say where weights are.

        ``held``: teachers by name that the run has already (``LiveTeachers.teachers``). ``pixels``: what a store has is
        shown to them from there, and no image is decoded.
        """
        self.store = stored.store
        self._source = source
        self._tiles = {tile.id: tile for tile in source.tiles(["train"])}
        self._asked = [parse_teacher(text) for text in asked]
        self._device = torch.device("cpu") if device is None else device
        self._load = load
        self._pixels = pixels
        self._teachers: dict[str, Teacher | None] = dict(held or {})
        self._warned: set[str] = set()
        self._specs: dict[str, list[FeatureSpec]] = defaultdict(list)
        for spec in stored.arrays():
            self._specs[f"{spec.teacher.name}/{spec.view.scale}/{spec.layer.name}"].append(spec)

    def measure(
        self, tiles: Sequence[tuple[str, int]], on_event: EventSink = ignore_events, most: int = 4
    ) -> dict[str, float]:
        """Return ``{key: mean cosine}`` of stored and live tokens over the first ``most`` of ``tiles``.

        ``tiles``: ids and orientations, see ``drawn_tiles``; another stored view stands for an orientation that is not
        stored. Keys whose teacher cannot be had are missing. A cosine below ``DRIFT_COSINE`` (or NaN)
        is a ``Warned`` event, once for each key. Draws no random numbers.
        """
        cosines: dict[str, list[float]] = defaultdict(list)
        for tile_id, orientation in list(dict.fromkeys(tiles))[:most]:
            if tile_id not in self.store.tiles or tile_id not in self._tiles:
                continue
            views: dict[tuple[str, ViewSpec], list[tuple[str, FeatureSpec]]] = defaultdict(list)
            for key, specs in self._specs.items():
                spec = next((s for s in specs if s.view.orientation == orientation), specs[0])
                if self._teacher(spec, on_event) is not None:
                    views[spec.teacher.name, spec.view].append((key, spec))
            for key, cosine in self._compare(tile_id, views).items():
                cosines[key].append(cosine)
        means = {key: sum(found) / len(found) for key, found in cosines.items()}
        for key, mean in means.items():
            if not mean >= DRIFT_COSINE and key not in self._warned:
                self._warned.add(key)
                on_event(Warned(self._alarm(key, mean, len(cosines[key]))))
        return means

    def _compare(
        self, tile_id: str, views: Mapping[tuple[str, ViewSpec], Sequence[tuple[str, FeatureSpec]]]
    ) -> dict[str, float]:
        from rsmtdf_cache.encode import encode_batch
        from rsmtdf_cache.upkeep.canary import compare_maps, profile_here

        row = self.store.tiles.row_of(tile_id)
        held = self._pixels
        if held is not None and tile_id in held:
            image = held.image(tile_id)
        else:
            image = self._source.read_image(self._tiles[tile_id])
        found: dict[str, float] = {}
        for (name, view), together in views.items():
            teacher = self._teachers[name]
            assert teacher is not None
            ledger = self.store.ledger
            recorded = ledger.sets[ledger.set_of(together[0][1].key)].profile
            # One tile, with the threads of this run: not the recorded bits, the recorded precision.
            here = {"micro_batch": 1, "threads": torch.get_num_threads()}
            profile = profile_here(recorded, teacher).model_copy(update=here)
            layers = list(dict.fromkeys(spec.layer.name for _, spec in together))
            maps = encode_batch(teacher, view, layers, [image], profile)
            for key, spec in together:
                stored = self.store.stored(spec.key, row)
                if stored is not None:
                    found[key] = compare_maps(maps[spec.layer.name][0], stored, self.store.codec(spec.key)).cosine
        return found

    def _teacher(self, spec: FeatureSpec, on_event: EventSink) -> Teacher | None:
        from rsmtdf_cache.upkeep.recompute import TeacherShelf

        name = spec.teacher.name
        if name not in self._teachers:
            try:
                self._teachers[name] = TeacherShelf(self._asked, self._load, str(self._device)).teacher(spec.teacher)
            except RsmtdfError as error:
                self._teachers[name] = None
                on_event(Warned(f"drift of {name} is not watched, its stored features are used as they are: {error}"))
        return self._teachers[name]

    def _alarm(self, key: str, mean: float, tiles: int) -> str:
        teacher = key.partition("/")[0]
        return (
            f"drift: {teacher} does not give the features any more that {self.store.shown} has: {key}, mean cosine "
            f"{mean:.4f} over {tiles} tiles, at least {DRIFT_COSINE} is expected. Software, weights or pixels changed "
            f"since the build: ask `rsmtdf cache verify {self.store.shown} --recompute 8`, then train with the "
            "software of the build, or build a new store"
        )
