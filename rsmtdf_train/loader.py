"""Batches by step number. Batch ``s`` is a function of recipe, store, data and ``s``, whatever ran before it.

A batch can be made in parts, for processes and for accumulated gradients: together they hold the crops of the whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rsmtdf_cache.allocate import Allocator, BlockPool
from rsmtdf_cache.codecs import Codes
from rsmtdf_cache.errors import DataError
from rsmtdf_cache.events import EventSink, ignore_events
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_train.augment import CutMixBox, token_weights
from rsmtdf_train.dataset import TileDataset
from rsmtdf_train.photometry import PhotometricParameters, Photometry
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, Coded, LabeledBatch, Sample, StrongView, Targets, UnlabeledBatch
from rsmtdf_train.sampler import LABELED, UNLABELED, Draw, Stream
from rsmtdf_train.shares import check_shares, labeled_places, unlabeled_places
from rsmtdf_train.targets.base import TargetMode, TargetSpec

if TYPE_CHECKING:
    from rsmtdf_cache.store import FeatureStore
    from rsmtdf_train.pixel_source import PixelSource

__all__ = ["BatchLoader"]

#: So many steps are drawn ahead when shards may have to be fetched from another machine: a shard takes seconds.
_REMOTE_REACH = 32


class _Drawn(NamedTuple):
    """Which crops a batch, or a part of it, has."""

    step: int
    labeled: list[Draw]
    unlabeled: list[Draw]


class BatchLoader:
    """Batches of a recipe. ``threads`` work ahead of the trainer; their number changes no batch."""

    def __init__(
        self, dataset: TileDataset, recipe: Recipe, threads: int = 1, ahead: int = 2, pinned: bool = False
    ) -> None:
        """``pinned``: make batches in page-locked memory, which a GPU copies from while it computes.

        torch uses such memory again by itself; of other memory the loader has a pool.
        """
        self._empty: Allocator = _pinned if pinned else BlockPool().empty
        self.dataset = dataset
        self.recipe = recipe
        self.threads = max(1, threads)
        self.ahead = max(1, ahead)
        seed, geometry, augment = recipe.seed, dataset.geometry, recipe.augment
        labeled_ids = dataset.labeled_ids(recipe.labeled)
        self.labeled = Stream(labeled_ids, LABELED, seed, geometry, augment)
        self.unlabeled: Stream | None = None
        if recipe.method != "supervised":
            self.unlabeled = Stream(_unlabeled_ids(dataset, recipe, labeled_ids), UNLABELED, seed, geometry, augment)

    @classmethod
    def open(
        cls,
        source: TileSource,
        recipe: Recipe,
        store: FeatureStore | None = None,
        threads: int = 1,
        *,
        geometry_keys: Sequence[str] = (),
        device: torch.device | None = None,
        pixels: PixelSource = "auto",
        on_event: EventSink = ignore_events,
    ) -> BatchLoader:
        """Return the loader of a run: batches of ``modes.open_dataset``, which says what is raised."""
        from rsmtdf_train.targets.modes import open_dataset

        dataset = open_dataset(
            source, recipe, store, geometry_keys=geometry_keys, device=device, pixels=pixels, on_event=on_event
        )
        return cls(dataset, recipe, threads, pinned=device is not None and device.type == "cuda")

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

    @property
    def tiles_per_epoch(self) -> int:
        """Return how many tiles a round has: the unlabelled ones, or the labelled ones of supervised training."""
        return len((self.unlabeled or self.labeled).tile_ids)

    def _reads(self, step: int) -> bool:
        """Return whether the features of ``step`` are needed: live teachers replace them only for distillation."""
        if self.recipe.privileged is not None or self.recipe.probe is not None:
            return True
        return self.targets is not None and not self.targets.is_online(step)

    def check_parts(self, parts: int) -> None:
        """Raise ``UsageError`` unless ``parts`` (processes times accumulated parts) can share a batch."""
        check_shares(self.recipe.batch, parts, labeled_only=self.unlabeled is None)

    def batch(self, step: int, part: int = 0, parts: int = 1) -> Batch:
        """Return the batch of ``step`` 0, 1, 2, …, or part ``part`` of ``parts`` of it, on the CPU.

        In a part, too, the CutMix partner of unlabelled crop ``i`` of ``b`` is crop ``b-1-i``. Raises ``UsageError``
        for sizes that cannot be cut (``check_parts``).
        """
        self.check_parts(parts)
        return self._made(self._drawn(step, part, parts))

    def draws(self, step: int, part: int = 0, parts: int = 1) -> tuple[list[Draw], list[Draw]]:
        """Return the labelled and the unlabelled crops of ``batch(step, part, parts)``, in its order; reads nothing."""
        sizes = self.recipe.batch
        labeled = [self.labeled.draw(step * sizes.labeled + i) for i in labeled_places(sizes.labeled, part, parts)]
        if self.unlabeled is None:
            return labeled, []
        places = unlabeled_places(sizes.unlabeled, part, parts)
        return labeled, [self.unlabeled.draw(step * sizes.unlabeled + i) for i in places]

    def _drawn(self, step: int, part: int, parts: int) -> _Drawn:
        """Return which crops a batch has; what is stored of them is on the way from now on."""
        drawn = _Drawn(step, *self.draws(step, part, parts))
        self.dataset.will_read([*drawn.labeled, *drawn.unlabeled], self._reads(step))
        return drawn

    def _made(self, drawn: _Drawn) -> Batch:
        reads, faults = self._reads(drawn.step), _disk_faults()
        batch = Batch(
            step=drawn.step,
            labeled=self._labeled(drawn.labeled, reads),
            unlabeled=self._unlabeled(drawn.unlabeled, reads) if drawn.unlabeled else None,
        )
        if self.targets is not None and _disk_faults() > faults:
            self.targets.left_memory()
        return batch

    def iterate(
        self, first_step: int, last_step: int, parts: Sequence[int] = (0,), of: int = 1
    ) -> Generator[list[Batch], None, None]:
        """Yield ``parts`` (of ``of``) of the batches of ``first_step`` up to, not including, ``last_step``, in order.

        One list for each step. Up to ``ahead`` steps are prepared meanwhile. An error of a batch is raised at its step.
        Closing the generator (also by an exception or an interrupt) drops what is waiting and ends the threads. Raises
        ``UsageError`` at once for a batch that cannot be shared.
        """
        self.check_parts(of)
        return self._iterate(first_step, last_step, tuple(parts), of)

    def _iterate(
        self, first_step: int, last_step: int, parts: tuple[int, ...], of: int
    ) -> Generator[list[Batch], None, None]:
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="rsmtdf-loader")
        drawn: deque[list[Future[_Drawn]]] = deque()  # more than are waiting: the disk works while batches are made
        waiting: deque[list[Future[Batch]]] = deque()
        next_draw = first_step
        reach = max(2 * self.ahead, _REMOTE_REACH if self.dataset.remote else 0)
        try:
            while next_draw < last_step or drawn or waiting:
                while next_draw < last_step and len(waiting) + len(drawn) <= reach:
                    drawn.append([pool.submit(self._drawn, next_draw, part, of) for part in parts])
                    next_draw += 1
                while drawn and len(waiting) <= self.ahead:
                    waiting.append([pool.submit(self._made_of, one) for one in drawn.popleft()])
                yield [made.result() for made in waiting.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _made_of(self, drawn: Future[_Drawn]) -> Batch:
        # Drawn by a thread of the same pool, but asked for before, so it is done or under way.
        return self._made(drawn.result())

    def _labeled(self, draws: Sequence[Draw], reads: bool) -> LabeledBatch:
        return LabeledBatch(*self._pixels(draws, reads))

    def _unlabeled(self, draws: Sequence[Draw], reads: bool) -> UnlabeledBatch:
        views = [_view([(draw.photometric, draw.cutmix_box) for draw in draws])]
        if self.recipe.strong_views == 2 and self.unlabeled is not None:
            views.append(_view([self.unlabeled.second_view(draw) for draw in draws]))
        image, label, valid, targets = self._pixels(draws, reads)
        return UnlabeledBatch(image, tuple(views), valid, label, targets)

    def _pixels(self, draws: Sequence[Draw], reads: bool) -> tuple[Tensor, Tensor, Tensor, Targets]:
        """Return image, label and validity of the crops, and their targets, if ``reads``."""
        samples = self.dataset.samples(draws, features=False)
        size, empty = (len(samples), *samples[0].label.shape), self._empty
        image = empty((size[0], 3, *size[1:]), np.dtype(np.uint8))
        label, valid = empty(size, np.dtype(np.uint8)), empty(size, np.dtype(np.bool_))
        for n, sample in enumerate(samples):
            image[n] = sample.image.transpose(2, 0, 1)
            label[n], valid[n] = sample.label, sample.valid
        targets = self.stack_targets(samples, self.dataset.codes(draws, empty) if reads else {})
        return _tensor(image), _tensor(label), _tensor(valid), targets

    def stack_targets(self, samples: Sequence[Sample], codes: Mapping[str, Codes]) -> Targets:
        """Return ``codes`` of ``samples`` (``TileDataset.codes``) with the weights of their tokens.

        Nothing is copied. Empty where nothing was read, because live teachers make the targets. A token whose cell has
        an invalid pixel weighs 0, or 1 under ``distill.padding``. ``Targets.decoded`` makes features of it.
        """
        padding = self.recipe.distill is not None and self.recipe.distill.padding
        coded: dict[str, Coded] = {}
        weights: dict[str, Tensor] = {}
        full = padding or all(s.valid.all() for s in samples)
        for key, found in codes.items():
            spec, grid = self._specs[key], found.values.shape[1:3]
            if full:
                weights[key] = torch.ones(len(samples), *grid)
            else:
                own = [token_weights(s.valid, (grid[0], grid[1]), spec.offset_px) for s in samples]
                weights[key] = torch.from_numpy(np.stack(own))
            scale = None if found.scale is None else _tensor(found.scale)
            coded[key] = Coded(_tensor(found.values), scale, spec.decoder)
        return Targets({}, weights, coded)


def _unlabeled_ids(dataset: TileDataset, recipe: Recipe, labeled_ids: Sequence[str]) -> list[str]:
    """Return all train tiles (FixMatch treats labelled images as unlabelled ones, too), or ``rest``."""
    if recipe.unlabeled == "all":
        return dataset.tile_ids
    known = set(labeled_ids)
    rest = [tile_id for tile_id in dataset.tile_ids if tile_id not in known]
    if not rest:
        raise DataError(
            f"{dataset.source.root}: unlabeled: rest asks for train tiles outside the labelled subset "
            f"{recipe.labeled!r}, and it holds all {len(known)} of them; choose a smaller labelled subset, "
            "unlabeled: all, or method: supervised"
        )
    return rest


def _view(drawn: Sequence[tuple[PhotometricParameters, CutMixBox]]) -> StrongView:
    parameters, boxes = zip(*drawn, strict=True)
    return StrongView(Photometry(parameters), torch.tensor(boxes, dtype=torch.int64))


def _disk_faults() -> int:
    """Return how often this thread waited for a page of a mapped file; 0 where the system does not say."""
    try:
        import resource

        return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
    except (AttributeError, ImportError):
        return 0


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return an array that is lent by a tensor in page-locked memory."""
    made: NDArray[Any] = torch.from_numpy(np.empty(0, dtype)).new_empty(shape, pin_memory=True).numpy()
    return made


def _tensor(array: NDArray[Any]) -> Tensor:
    """Return the array as a tensor, without a copy.

    Of one that a tensor lent: that tensor. Only it tells torch that its memory may not be used again before a copy that
    was begun without waiting is over.
    """
    return array.base if isinstance(array.base, Tensor) else torch.from_numpy(array)
