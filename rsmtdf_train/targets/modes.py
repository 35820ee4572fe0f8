"""The one place that turns ``targets`` and ``augment.geometry`` of a recipe into crops and their targets.

| targets       | features come from                           | crops                                     |
|---------------|----------------------------------------------|-------------------------------------------|
| cached        | stored views of whole tiles                  | on the token lattice, stored orientations |
| fixed-views   | stored random views                          | those views                               |
| online        | teachers in the step                         | on the lattice, or native                 |
| mixed(p)      | teachers with probability p, else the store  | on the lattice                            |
| none          | nowhere                                      | any; those of the store when one is given |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.geometry import CropGeometry, FixedViewGeometry, Geometry, NativeGeometry
from rsmtdf_train.pixel_source import PixelSource, require_stored, stored_pixels
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.targets.base import TargetMode
from rsmtdf_train.targets.fixed import FixedViewTargets, fixed_view_geometry
from rsmtdf_train.targets.stored import CachedTargets, StoredTargets, derangement, store_geometry

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = ["open_dataset"]


def open_dataset(
    source: TileSource,
    recipe: Recipe,
    store: FeatureStore | None = None,
    *,
    geometry_keys: Sequence[str] = (),
    device: torch.device | None = None,
    pixels: PixelSource = "auto",
    on_event: EventSink = ignore_events,
) -> TileDataset:
    """Return the train tiles with the geometry and the targets of ``recipe``.

    With a store, crops are those of its features (that match ``geometry_keys``, default all) also when ``recipe`` does
    not distil, so that arms are paired. ``pixels``: where images come from; the samples are the same. Live teachers
    are loaded on ``device``. Raises ``UsageError`` (recipe),
    ``MismatchError`` (store and dataset, teachers and store), ``ResourceError`` (weights out of reach).
    """
    geometry = _geometry(source, recipe, store, geometry_keys)
    mode: TargetMode | None = None
    if recipe.targets != "none" and (recipe.distill is not None or recipe.probe is not None):
        stored = None if store is None else _stored(source, recipe, store, geometry)
        if recipe.online_share > 0 or (recipe.targets != "cached" and stored is None):
            from rsmtdf_train.targets.online import open_online

            if stored is not None and not isinstance(stored, CachedTargets):
                raise UsageError(f"targets {recipe.targets} goes with augment.geometry lattice or native")
            mode = open_online(source, recipe, device or torch.device("cpu"), stored, on_event=on_event)
        else:
            mode = stored
        if mode is None:
            raise UsageError(f"targets {recipe.targets} reads a store: --use-cache STORE, or --no-distill")
    left_out = store.quarantined if store is not None else ()
    dataset = TileDataset(source, mode, geometry, left_out=left_out, pixels=stored_pixels(store, pixels))
    if pixels == "store" and dataset.pixels is not None:
        require_stored(dataset.pixels, dataset.tile_ids)
    return dataset


def _geometry(source: TileSource, recipe: Recipe, store: FeatureStore | None, keys: Sequence[str]) -> CropGeometry:
    kind = recipe.augment.geometry
    if kind == "native":
        if store is not None:
            raise UsageError(
                "augment.geometry native cuts crops that no stored feature fits: leave out --use-cache, or set "
                "augment.geometry to lattice"
            )
        return NativeGeometry(source.tile_px, recipe.crop_px, recipe.augment.scale)
    if kind == "fixed-views":
        if store is None:
            raise UsageError("augment.geometry fixed-views takes its crops from a store: --use-cache STORE")
        return fixed_view_geometry(store, recipe.crop_px, keys)
    reads_features = recipe.targets != "none" and (recipe.distill is not None or recipe.probe is not None)
    if store is None:
        return Geometry(source.tile_px, recipe.crop_px)
    if not reads_features and not store.keys() and store.pixel_keys():  # pixels alone: no lattice to keep to
        return Geometry(store.tile_px, recipe.crop_px)
    return store_geometry(store, recipe.crop_px, keys, recipe.augment.approximate_orientations)


def _stored(source: TileSource, recipe: Recipe, store: FeatureStore, geometry: CropGeometry) -> StoredTargets | None:
    distill = recipe.distill
    keys = distill.keys if distill is not None else ()
    standardize = distill.standardize if distill is not None else True
    space = distill.space if distill is not None else "channels"
    shuffled = None
    if distill is not None and distill.control == "shuffled":
        shuffled = derangement(
            (tile.id for tile in source.tiles(["train"]) if tile.id not in store.quarantined), recipe.seed
        )
    if isinstance(geometry, FixedViewGeometry):
        return FixedViewTargets(store, keys, geometry, standardize=standardize, shuffled=shuffled, space=space)
    if not isinstance(geometry, Geometry):
        return None
    approximate = recipe.augment.approximate_orientations
    return CachedTargets(store, keys, geometry, approximate, standardize=standardize, shuffled=shuffled, space=space)
