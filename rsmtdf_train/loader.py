"""Batches by step number. Batch ``s`` is a function of recipe, store, data and ``s``, whatever ran before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_train.augment import photometric, token_weights
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, Coded, LabeledBatch, Sample, Targets, UnlabeledBatch
from rsmtdf_train.sampler import LABELED, UNLABELED, Draw, Geometry, Stream
from rsmtdf_train.targets import CachedTargets, TargetMode, TargetSpec, store_geometry

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore

__all__ = ["BatchLoader"]


class BatchLoader:
    """Batches of a recipe. ``threads`` work ahead of the trainer; their number changes no batch."""

    def __init__(self, dataset: TileDataset, recipe: Recipe, threads: int = 1, ahead: int = 2) -> None:
        self.dataset = dataset
        self.recipe = recipe
        self.threads = max(1, threads)
        self.ahead = max(1, ahead)
        seed, geometry, augment = recipe.seed, dataset.geometry, recipe.augment
        self.labeled = Stream(dataset.labeled_ids(recipe.labeled), LABELED, seed, geometry, augment)
        self.unlabeled: Stream | None = None
        if recipe.method != "supervised":
            # All train tiles, the labelled ones too: FixMatch treats every image as an unlabelled one.
            self.unlabeled = Stream(dataset.tile_ids, UNLABELED, seed, geometry, augment)

    @classmethod
    def open(
        cls,
        source: TileSource,
        recipe: Recipe,
        store: FeatureStore | None = None,
        threads: int = 1,
        geometry_keys: Sequence[str] = (),
    ) -> BatchLoader:
        """Return the loader of a run.

        With a store, crops lie on the lattice and in the orientations of its features (those that match
        ``geometry_keys``, default all; or all eight, where the recipe takes approximations) also when ``recipe`` does
        not distil, so that arms are paired. Raises
        ``UsageError`` (recipe), ``MismatchError`` (store and dataset), ``DataError`` (dataset).
        """
        if store is None:
            if recipe.distill is not None:
                raise UsageError("distill with cached targets needs a store: --use-cache STORE, or --no-distill")
            return cls(TileDataset(source, None, Geometry(source.tile_px, recipe.crop_px)), recipe, threads)
        approximate = recipe.augment.approximate_orientations
        geometry = store_geometry(store, recipe.crop_px, geometry_keys, approximate)
        targets = None if recipe.distill is None else CachedTargets(store, recipe.distill.keys, geometry, approximate)
        return cls(TileDataset(source, targets, geometry, left_out=store.quarantined), recipe, threads)

    @property
    def targets(self) -> TargetMode | None:
        """Return the target mode: its ``specs`` are what translators are built for. None without distillation."""
        return self.dataset.targets

    @property
    def offsets_px(self) -> dict[str, float]:
        """Return the centre of token 0 in crop pixels by target key, for ``augment.cutmix_targets``."""
        return {key: spec.offset_px for key, spec in self._specs.items()}

    @property
    def _specs(self) -> Mapping[str, TargetSpec]:
        return {} if self.targets is None else self.targets.specs

    def batch(self, step: int) -> Batch:
        """Return the batch of ``step`` 0, 1, 2, …, on the CPU."""
        sizes = self.recipe.batch
        labeled = self.labeled.draws(step, sizes.labeled)
        unlabeled = [] if self.unlabeled is None else self.unlabeled.draws(step, sizes.unlabeled)
        samples = self.dataset.samples([*labeled, *unlabeled])
        return Batch(
            step=step,
            labeled=self._labeled(samples[: len(labeled)]),
            unlabeled=self._unlabeled(samples[len(labeled) :], unlabeled) if unlabeled else None,
        )

    def iterate(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """Yield the batches of ``first_step`` up to, not including, ``last_step``, in order.

        Up to ``ahead`` batches are prepared meanwhile. An error of a batch is raised at its step. Closing the generator
        (also by an exception or an interrupt) drops what is waiting and ends the threads.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="rsmtdf-loader")
        waiting: deque[Future[Batch]] = deque()
        step = first_step
        try:
            while step < last_step or waiting:
                while step < last_step and len(waiting) <= self.ahead:
                    waiting.append(pool.submit(self.batch, step))
                    step += 1
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _labeled(self, samples: Sequence[Sample]) -> LabeledBatch:
        return LabeledBatch(_images(samples), _labels(samples), self.stack_targets(samples))

    def _unlabeled(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> UnlabeledBatch:
        weak = _images(samples)
        return UnlabeledBatch(
            weak=weak,
            strong=torch.stack([photometric(x, d.photometric) for x, d in zip(weak, draws, strict=True)]),
            valid=torch.from_numpy(np.stack([s.valid for s in samples])),
            label=_labels(samples),
            cutmix_boxes=torch.tensor([d.cutmix_box for d in draws], dtype=torch.int64),
            targets=self.stack_targets(samples),
        )

    def stack_targets(self, samples: Sequence[Sample]) -> Targets:
        """Return the codes of the features of ``samples`` and the weights of their tokens; see ``Targets.decoded``."""
        coded: dict[str, Coded] = {}
        weights: dict[str, Tensor] = {}
        for key, spec in self._specs.items():
            found = [s.features[key] for s in samples]
            values = torch.from_numpy(np.stack([codes.values for codes in found]))
            scales = [codes.scale for codes in found if codes.scale is not None]
            grid = (values.shape[1], values.shape[2])
            weights[key] = torch.from_numpy(np.stack([token_weights(s.valid, grid, spec.offset_px) for s in samples]))
            coded[key] = Coded(values, torch.from_numpy(np.stack(scales)) if scales else None, spec.decoder)
        return Targets({}, weights, coded)


def _images(samples: Sequence[Sample]) -> Tensor:
    stacked = torch.from_numpy(np.stack([s.image for s in samples]))
    return stacked.permute(0, 3, 1, 2).contiguous().float().div_(255)


def _labels(samples: Sequence[Sample]) -> Tensor:
    return torch.from_numpy(np.stack([s.label for s in samples])).long()
