"""From a batch to what the student is shown: on the device, recoloured, labelled by the EMA, mixed, with targets.

Nothing here has a gradient. All counts that losses divide by are known afterwards, so that a step cut into parts and
spread over processes has the loss of the whole batch.

Shape legend: B batch, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rsmtdf_train.augment import cutmix, cutmix_targets
from rsmtdf_train.losses import SupervisedLoss
from rsmtdf_train.objective import TermWeights
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, Targets
from rsmtdf_train.state import TrainState

if TYPE_CHECKING:
    from rsmtdf_train.probe import Probe
    from rsmtdf_train.targets.live import LiveTeachers

__all__ = ["Labeled", "PERTURBED", "Part", "Prepared", "StepTools", "Strong", "Unlabeled", "part_to", "prepare"]

#: Name of the weak view with perturbed features among the counts of a step.
PERTURBED = "perturbed"


@dataclass(frozen=True)
class StepTools:
    """What a step needs besides state, batch and recipe, and what never changes in a run.

    ``offsets_px``: centre of token 0 in crop pixels by target key. ``live``: the teachers themselves, for online
    targets, at the steps that ``is_online`` names. ``probe``: the head that labels unlabelled crops at first.
    """

    supervised: SupervisedLoss
    ignore_index: int
    offsets_px: Mapping[str, float] = field(default_factory=dict)
    live: LiveTeachers | None = None
    probe: Probe | None = None
    is_online: Callable[[int], bool] = lambda step: True

    def live_at(self, step: int) -> LiveTeachers | None:
        """Return the teachers if the targets of ``step`` come from them."""
        return self.live if self.live is not None and self.is_online(step) else None


@dataclass(frozen=True)
class Labeled:
    """Labelled crops on the device. Images are float RGB in 0..1, as everywhere from here on."""

    image: Tensor  # [B, 3, H, W]
    label: Tensor  # [B, H, W] int64
    valid: Tensor  # [B, H, W] bool
    targets: Targets


@dataclass(frozen=True)
class Strong:
    """One strong view of unlabelled crops, not mixed yet, and its CutMix boxes ``[B, 4]``."""

    image: Tensor  # [B, 3, H, W]
    boxes: Tensor


@dataclass(frozen=True)
class Unlabeled:
    """Unlabelled crops on the device: the weak view and the strong ones."""

    weak: Tensor  # [B, 3, H, W]
    views: tuple[Strong, ...]
    valid: Tensor  # [B, H, W] bool
    label: Tensor  # [B, H, W] int64, for monitoring only
    targets: Targets  # of the weak view


@dataclass(frozen=True)
class Part:
    """A batch, or a part of one, on the device."""

    step: int
    labeled: Labeled
    unlabeled: Unlabeled | None


@dataclass(frozen=True)
class Mixed:
    """A view that the student learns pseudo-labels on: a strong one after CutMix, or the weak one as it is."""

    image: Tensor  # [B, 3, H, W]
    pseudo: Tensor  # [B, H, W] int64
    confidence: Tensor  # [B, H, W]
    valid: Tensor  # [B, H, W] bool


@dataclass(frozen=True)
class Prepared:
    """All that the student's passes of one part need, and the counts that its losses are divided by.

    The main pass sees ``[labelled; mixed...; perturbed]``, unless nothing is segmented yet. ``perturbed``: the weak
    view, whose features the student perturbs (UniMatch). ``targets`` belong to ``[labelled; unlabelled]`` in the view
    that is distilled; ``extra`` are the images among them that the main pass does not see: the weak crops, or all of
    them before anything is segmented. ``privileged``: true features of the labelled crops.
    """

    labeled: Labeled
    mixed: tuple[Mixed, ...]
    perturbed: Mixed | None
    targets: Targets | None
    extra: Tensor | None
    privileged: Targets | None
    counts: dict[str, Tensor]
    sums: dict[str, tuple[Tensor, Tensor]]  # name for the log → (numerator, denominator), additive

    @property
    def views(self) -> dict[str, Mixed]:
        """Return what the main pass sees of the unlabelled crops, in its order, by the names in ``counts``."""
        found = {f"unlabeled{i}": view for i, view in enumerate(self.mixed)}
        return found if self.perturbed is None else {**found, PERTURBED: self.perturbed}


def part_to(batch: Batch, device: torch.device, channels_last: bool = False) -> Part:
    """Return ``batch`` on ``device``: images as floats, strong views recoloured there, targets decoded there."""
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    def image(x: Tensor) -> Tensor:
        return move(x).to(dtype=torch.float32, memory_format=layout).div_(255)

    a, b = batch.labeled, batch.unlabeled
    labeled = Labeled(image(a.image), move(a.label).long(), move(a.valid), a.targets.decoded(device))
    if b is None:
        return Part(batch.step, labeled, None)
    weak = image(b.image)
    views = tuple(
        Strong(v.photometry.to(device).apply(weak).contiguous(memory_format=layout), move(v.cutmix_boxes))
        for v in b.views
    )
    label = move(b.label).long()
    return Part(batch.step, labeled, Unlabeled(weak, views, move(b.valid), label, b.targets.decoded(device)))


@torch.no_grad()
def prepare(state: TrainState, part: Part, recipe: Recipe, weights: TermWeights, tools: StepTools) -> Prepared:
    """Return what the student's passes need. ``weights`` say whether anything is segmented at this step.

    Order (RS-MTDF, released code): the EMA labels the weak view; CutMix mixes strong image, pseudo-label, confidence
    and validity by the same boxes, and stored targets too; live teachers see the image that the student sees.
    """
    labeled = part.labeled
    unlabeled = part.unlabeled if recipe.method != "supervised" else None
    counts: dict[str, Tensor] = {"labeled": tools.supervised.count(labeled.label)}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    mixed: tuple[Mixed, ...] = ()
    perturbed: Mixed | None = None
    if unlabeled is not None and weights.segments:
        confidence, pseudo = _pseudo_labels(state, unlabeled, recipe, tools).max(dim=1)
        sums |= _judged(confidence, pseudo, unlabeled, recipe.threshold, tools.ignore_index)
        mixed = tuple(
            Mixed(
                cutmix(view.image, view.boxes),
                cutmix(pseudo, view.boxes),
                cutmix(confidence, view.boxes),
                cutmix(unlabeled.valid, view.boxes),
            )
            for view in unlabeled.views
        )
        if recipe.method == "unimatch-v1":
            perturbed = Mixed(unlabeled.weak, pseudo, confidence, unlabeled.valid)
    targets, extra = None, None
    if recipe.distill is not None and weights.distill != 0:
        targets, clean = _distilled(labeled, unlabeled, mixed, recipe, tools, part.step)
        if not weights.segments:
            extra = torch.cat(clean)
        elif recipe.distill.view == "weak" and unlabeled is not None:
            extra = clean[1]
        counts |= {f"distill/{key}": w.sum() for key, w in targets.weights.items()}
    known = recipe.privileged is not None and weights.privileged != 0 and bool(labeled.targets.features)
    privileged = labeled.targets if known else None
    found = Prepared(labeled, mixed, perturbed, targets, extra, privileged, counts, sums)
    counts |= {name: view.valid.sum() for name, view in found.views.items()}
    return found


def _pseudo_labels(state: TrainState, unlabeled: Unlabeled, recipe: Recipe, tools: StepTools) -> Tensor:
    """Return class probabilities ``[B, C, H, W]`` of the weak view: the EMA's, the probe's at first, or a blend."""
    share = 0.0
    if tools.probe is not None and recipe.probe is not None:
        from rsmtdf_train.probe import probe_share

        share = probe_share(recipe.probe, state.step, recipe.total_steps)
    size = (unlabeled.weak.shape[-2], unlabeled.weak.shape[-1])
    if tools.probe is None or share == 0:
        return _ema_probabilities(state, unlabeled, recipe)
    probed: Tensor = tools.probe(unlabeled.targets, unlabeled.weak, size)
    if share == 1:
        return probed
    return share * probed + (1 - share) * _ema_probabilities(state, unlabeled, recipe)


def _ema_probabilities(state: TrainState, unlabeled: Unlabeled, recipe: Recipe) -> Tensor:
    privileged = unlabeled.targets if recipe.privileged is not None and unlabeled.targets.features else None
    return state.ema.label(unlabeled.weak, privileged).float().softmax(dim=1)


def _judged(
    confidence: Tensor, pseudo: Tensor, unlabeled: Unlabeled, threshold: float, ignore_index: int
) -> dict[str, tuple[Tensor, Tensor]]:
    used = (confidence >= threshold) & unlabeled.valid
    known = used & (unlabeled.label != ignore_index)
    return {
        "mask_ratio": (used.sum(), unlabeled.valid.sum()),
        "pseudo_accuracy": (((pseudo == unlabeled.label) & known).sum(), known.sum()),
    }


def _distilled(
    labeled: Labeled,
    unlabeled: Unlabeled | None,
    mixed: tuple[Mixed, ...],
    recipe: Recipe,
    tools: StepTools,
    step: int,
) -> tuple[Targets, list[Tensor]]:
    """Return the targets of ``[labelled; unlabelled]`` in the distilled view, and the images, labelled ones first."""
    assert recipe.distill is not None
    images, valids = [labeled.image], [labeled.valid]
    boxes: Tensor | None = None
    if unlabeled is not None:
        if recipe.distill.view == "weak":
            images.append(unlabeled.weak)
            valids.append(unlabeled.valid)
        else:
            view = unlabeled.views[0]
            boxes = view.boxes
            images.append(mixed[0].image if mixed else cutmix(view.image, boxes))
            valids.append(mixed[0].valid if mixed else cutmix(unlabeled.valid, boxes))
    live = tools.live_at(step)
    if live is not None:
        return live.targets(torch.cat(images), torch.cat(valids)), images
    if unlabeled is None:
        return labeled.targets, images
    targets = unlabeled.targets
    if boxes is not None and targets.features:
        targets = cutmix_targets(targets, boxes, images[1].shape[-1], tools.offsets_px)
    return _joined(labeled.targets, targets), images


def _joined(first: Targets, second: Targets) -> Targets:
    return Targets(
        {k: torch.cat([v, second.features[k]]) for k, v in first.features.items()},
        {k: torch.cat([v, second.weights[k]]) for k, v in first.weights.items()},
    )
