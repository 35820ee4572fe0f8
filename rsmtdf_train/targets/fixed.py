"""Targets of fixed views: what every teacher said of K random views of each tile, stored with the views' numbers.

A sample shows one of the views: its turn and its crop, resized to the student's ``crop_px``; the token grid of a target
covers that crop. Nothing is read between tokens, so zoom and any place of a crop cost no accuracy. What the teachers
saw had the view's own colours. The student's weak view has the tile's, its strong view those it draws for itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rsmtdf_cache.allocate import Allocator, page_empty
from rsmtdf_cache.codecs import Codes, codec_class, load_codec
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.fixed_views import FixedView
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, canonical_json
from rsmtdf_train.geometry import FixedViewGeometry
from rsmtdf_train.targets.base import TargetRequest, match_keys
from rsmtdf_train.targets.stored import StoredTargets

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = ["FixedViewTargets", "fixed_view_geometry", "fixed_view_specs"]


def fixed_view_specs(store: FeatureStore) -> Mapping[str, Mapping[FixedView, FeatureSpec]]:
    """Return ``{target key: {view: spec}}`` of all fixed views a store holds: keys and views sorted."""
    views: dict[str, dict[FixedView, FeatureSpec]] = {}
    for key in store.keys():
        spec = store.spec(key)
        if (shown := FixedView.of(spec.view)) is not None:
            views.setdefault(f"{key.teacher}/{spec.view.scale}/{key.layer}", {})[shown] = spec
    return {key: {view: views[key][view] for view in sorted(views[key], key=_order)} for key in sorted(views)}


def fixed_view_geometry(store: FeatureStore, crop_px: int, patterns: Sequence[str] = ()) -> FixedViewGeometry:
    """Return the fixed views that are stored for every target that matches ``patterns`` (default: all that have some).

    A function of the store alone, as ``store_geometry`` is. Raises ``UsageError`` when there is none.
    """
    stored = fixed_view_specs(store)
    if not stored:
        raise UsageError(
            f"store {store.shown} holds no fixed views; run its `rsmtdf cache build` again with "
            "--fixed-views K --seed S, which adds them (K random views of every tile, for all its teachers)"
        )
    chosen = match_keys(patterns, list(stored))
    shared = [view for view in stored[chosen[0]] if all(view in stored[key] for key in chosen)]
    if not shared:
        raise UsageError(
            f"store {store.shown}: no fixed view is stored for all of {', '.join(chosen)}; build them with one "
            "--fixed-views K --seed S for all teachers"
        )
    return FixedViewGeometry(store.tile_px, crop_px, tuple(shared))


class FixedViewTargets(StoredTargets):
    """Features of fixed views, read whole from a store by row and view."""

    def __init__(
        self,
        store: FeatureStore,
        patterns: Sequence[str],
        geometry: FixedViewGeometry,
        *,
        standardize: bool = True,
        shuffled: Mapping[str, str] | None = None,
        space: str = "channels",
    ) -> None:
        """Choose the targets that match ``patterns``; ``standardize``, ``shuffled``, ``space`` as in ``CachedTargets``.

        Raises ``UsageError`` for a target that lacks a view of ``geometry``, or has its tokens elsewhere in each view.
        """
        super().__init__(store, standardize, shuffled, space)
        self.geometry = geometry
        stored = fixed_view_specs(store)
        self._by_key: dict[str, list[FeatureSpec]] = {}
        self._as_features: set[str] = set()
        for key in match_keys(patterns, list(stored)):
            if any(view not in stored[key] for view in geometry.views):
                raise UsageError(
                    f"{key}: lacks fixed views that other features have; build them with one --fixed-views K --seed S "
                    "for all teachers, or name fewer features in distill.keys"
                )
            specs = self._by_key[key] = [stored[key][view] for view in geometry.views]
            stride_px, offset_px = _place(key, specs, geometry.crop_px)
            # Each fixed view is calibrated for itself: codes of two views are read as features, not as codes.
            codec = store.codec(specs[0].key)
            if len(specs) > 1 and codec_class(specs[0].encoding).calibrated:
                self._refuse_features(key, f"each of its {len(specs)} fixed views has components of its own")
                self._as_features.add(key)
                codec = load_codec(EncodingSpec(), specs[0].layer.channels)
            # One mean and deviation for all views, so that a colour or a zoom does not change what a value means.
            self.specs[key] = self._target(key, stride_px, offset_px, [spec.key for spec in specs], codec)
        self._check_components()

    def arrays_of(self, key: str) -> list[FeatureSpec]:
        return self._by_key[key]

    def arrays(self) -> list[FeatureSpec]:
        return [spec for specs in self._by_key.values() for spec in specs]

    def read(self, requests: Sequence[TargetRequest], empty: Allocator = page_empty) -> dict[str, Codes]:
        """Return ``{key: codes [n, h, w]}``, each of its view; NaN in tokens that are not valid.

        Raises ``UsageError`` for a request without a view.
        """
        found: dict[str, Codes] = {}
        by_view: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            if request.view is None or not 0 <= request.view < len(self.geometry.views):
                raise UsageError(f"targets fixed-views: {request} names none of the {len(self.geometry.views)} views")
            by_view[request.view].append(index)
        source = self.source_rows(requests)
        for key, specs in self._by_key.items():
            for view, indices in by_view.items():
                array, rows = specs[view].key, [source[i] for i in indices]
                if key in self._as_features:
                    values = self.store.read(array, rows).values
                    if key not in found:
                        found[key] = Codes(empty((len(requests), *values.shape[1:]), values.dtype))
                    found[key].values[indices] = values
                    continue
                if key not in found:
                    found[key] = self.store.empty_codes(array, len(requests), empty=empty)
                self.store.read_codes(array, rows, None, found[key], indices)
        return found

    def _ask(self, requests: Sequence[TargetRequest]) -> int:
        return sum(
            self.store.will_read(specs[request.view].key, (row,))
            for row, request in zip(self.source_rows(requests), requests, strict=True)
            if request.view is not None and 0 <= request.view < len(self.geometry.views)
            for specs in self._by_key.values()
        )


def _place(key: str, specs: Sequence[FeatureSpec], crop_px: int) -> tuple[float, float]:
    """Return stride and offset of the tokens in pixels of a crop of ``crop_px``, the same in all views."""
    zooms = [(spec, crop_px / spec.shown_px) for spec in specs]
    places = [(spec.stride_tile_px * zoom, spec.offset_tile_px * zoom) for spec, zoom in zooms]
    if any(not math.isclose(a, b, abs_tol=1e-6 * crop_px) for p in places for a, b in zip(p, places[0], strict=True)):
        raise UsageError(
            f"{key}: its teacher aligns the corners of crop and view, so its tokens lie elsewhere in crops of each "
            "size, and fixed views have several; name other features in distill.keys"
        )
    return places[0]


def _order(view: FixedView) -> str:
    colours = None if view.photometry is None else view.photometry.to_json()
    return canonical_json([view.orientation, view.crop.to_json(), colours])
