"""One step of FixMatch with distillation (RS-MTDF section III; FixMatch, Sohn et al. 2020; CutMix, Yun et al. 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rsmtdf_train.augment import cutmix, cutmix_targets
from rsmtdf_train.losses import pseudo_label_loss, supervised_loss
from rsmtdf_train.objective import combine, distill_term, term_weights
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Batch, LabeledBatch, Targets, UnlabeledBatch
from rsmtdf_train.state import TrainState, set_learning_rates, update_ema

__all__ = ["batch_to", "step_seed", "train_step"]

_SEED_PRIME = 1_000_003


@dataclass(frozen=True)
class _Mixed:
    """The unlabelled half after CutMix: what the student sees, and its pseudo-labels."""

    strong: Tensor  # [B, 3, H, W]
    pseudo: Tensor  # [B, H, W] int64
    confidence: Tensor  # [B, H, W]
    valid: Tensor  # [B, H, W] bool


def step_seed(seed: int, step: int) -> int:
    """Return the seed of the random numbers inside the networks at ``step``: a function of position, not of history."""
    return (seed * _SEED_PRIME + step) % 2**63


def train_step(
    state: TrainState, batch: Batch, recipe: Recipe, ignore_index: int, offsets_px: dict[str, float] | None = None
) -> dict[str, Tensor | float]:
    """Advance ``state`` by one step and return what the log shows; tensors are scalars still on the device.

    Order: the EMA labels the weak view; CutMix of strong image, pseudo-label, confidence, validity and targets by the
    same boxes; one pass of the student over [labelled; strong]; losses; optimiser; EMA. Raises ``ValueError`` for a
    batch of another step.
    """
    if batch.step != state.step:
        raise ValueError(f"batch of step {batch.step} at step {state.step}")
    torch.manual_seed(step_seed(recipe.seed, state.step))
    lr = set_learning_rates(state.optimizer, recipe.optim, state.step, recipe.total_steps)
    weights = term_weights(recipe, state.step)
    logs: dict[str, Tensor | float] = {}
    loss_labeled: Tensor | None = None
    loss_unlabeled: Tensor | None = None
    loss_distill: Tensor | None = None
    unlabeled = batch.unlabeled if recipe.method == "fixmatch" else None
    with torch.autocast(batch.labeled.image.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        if weights.labeled == 0 and weights.unlabeled == 0:
            # Nothing is segmented yet: no pseudo-labels, no decoder.
            images, targets = _distilled(batch.labeled, unlabeled, recipe, offsets_px)
            translated = state.student.forward_translate(images)
        else:
            mixed = _label_and_mix(state, unlabeled, recipe, ignore_index, logs) if unlabeled else None
            images = torch.cat([batch.labeled.image, mixed.strong]) if mixed else batch.labeled.image
            logits, translated = state.student.forward_train(images)
            count = len(batch.labeled.image)
            loss_labeled = supervised_loss(logits[:count], batch.labeled.label, ignore_index)
            if mixed:
                loss_unlabeled = pseudo_label_loss(
                    logits[count:], mixed.pseudo, mixed.confidence, mixed.valid, recipe.threshold
                )
            targets = batch.labeled.targets
            if recipe.distill is not None and unlabeled:
                images, targets = _distilled(batch.labeled, unlabeled, recipe, offsets_px)
                if recipe.distill.view == "weak":  # what was segmented were the strong views
                    clean = state.student.forward_translate(images[count:])
                    translated = {k: torch.cat([v[:count], clean[k]]) for k, v in translated.items()}
    if recipe.distill is not None and translated:
        loss_distill, cosines = distill_term(recipe.distill, translated, targets)
        logs |= cosines
    loss = combine(weights, loss_labeled, loss_unlabeled, loss_distill)

    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    if recipe.optim.clip_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(state.student.parameters(), recipe.optim.clip_norm)
        logs["grad_norm"] = norm.detach()
    state.optimizer.step()
    update_ema(state.ema, state.student, state.step, recipe.ema.decay)
    state.step += 1
    zero = torch.zeros((), device=loss.device)
    return {
        "loss": loss.detach(),
        "loss_labeled": loss_labeled.detach() if loss_labeled is not None else zero,
        "loss_unlabeled": loss_unlabeled.detach() if loss_unlabeled is not None else zero,
        "loss_distill": loss_distill.detach() if loss_distill is not None else zero,
        "lr": lr,
        **logs,
    }


@torch.no_grad()
def _label_and_mix(
    state: TrainState,
    unlabeled: UnlabeledBatch,
    recipe: Recipe,
    ignore_index: int,
    logs: dict[str, Tensor | float],
) -> _Mixed:
    confidence, pseudo = state.ema(unlabeled.weak).float().softmax(dim=1).max(dim=1)
    valid, boxes = unlabeled.valid, unlabeled.cutmix_boxes
    used = (confidence >= recipe.threshold) & valid
    known = used & (unlabeled.label != ignore_index)
    logs["mask_ratio"] = used.sum() / valid.sum().clamp(min=1)
    logs["pseudo_accuracy"] = ((pseudo == unlabeled.label) & known).sum() / known.sum()  # NaN: nothing to judge
    return _Mixed(
        strong=cutmix(unlabeled.strong, boxes),
        pseudo=cutmix(pseudo, boxes),
        confidence=cutmix(confidence, boxes),
        valid=cutmix(valid, boxes),
    )


def _distilled(
    labeled: LabeledBatch, unlabeled: UnlabeledBatch | None, recipe: Recipe, offsets_px: dict[str, float] | None
) -> tuple[Tensor, Targets]:
    """Return the images that are distilled, ``[labelled; unlabelled]``, and their targets."""
    if unlabeled is None:
        return labeled.image, labeled.targets
    if recipe.distill is not None and recipe.distill.view == "weak":
        return torch.cat([labeled.image, unlabeled.weak]), _joined(labeled.targets, unlabeled.targets)
    boxes = unlabeled.cutmix_boxes
    targets = unlabeled.targets
    if targets.features:
        targets = cutmix_targets(targets, boxes, unlabeled.strong.shape[-1], offsets_px)
    return torch.cat([labeled.image, cutmix(unlabeled.strong, boxes)]), _joined(labeled.targets, targets)


def _joined(first: Targets, second: Targets) -> Targets:
    return Targets(
        {k: torch.cat([v, second.features[k]]) for k, v in first.features.items()},
        {k: torch.cat([v, second.weights[k]]) for k, v in first.weights.items()},
    )


def batch_to(batch: Batch, device: torch.device) -> Batch:
    """Return ``batch`` on ``device``, its targets decoded there; nothing is copied when it is there already."""

    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    a, b = batch.labeled, batch.unlabeled
    labeled = LabeledBatch(move(a.image), move(a.label), a.targets.decoded(device))
    unlabeled = None
    if b is not None:
        unlabeled = UnlabeledBatch(
            move(b.weak), move(b.strong), move(b.valid), move(b.label), move(b.cutmix_boxes), b.targets.decoded(device)
        )
    return Batch(batch.step, labeled, unlabeled)
