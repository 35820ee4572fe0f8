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
    """The unlabelled half after CutMix: what the student sees and is taught. Targets of weak views stay unmixed."""

    strong: Tensor  # [B, 3, H, W]
    pseudo: Tensor  # [B, H, W] int64
    confidence: Tensor  # [B, H, W]
    valid: Tensor  # [B, H, W] bool
    targets: Targets


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
    device_type = batch.labeled.image.device.type
    torch.manual_seed(step_seed(recipe.seed, state.step))
    lr = set_learning_rates(state.optimizer, recipe.optim, state.step, recipe.steps)
    weights = term_weights(recipe, state.step)
    logs: dict[str, Tensor | float] = {}
    labeled, unlabeled = batch.labeled, batch.unlabeled if recipe.method == "fixmatch" else None

    with torch.autocast(device_type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        mixed = _label_and_mix(state, unlabeled, recipe, ignore_index, logs, offsets_px) if unlabeled else None
        images = torch.cat([labeled.image, mixed.strong]) if mixed else labeled.image
        logits, translated = state.student.forward_train(images)
        if unlabeled and recipe.distill is not None and recipe.distill.view == "weak":
            clean = state.student.forward_translate(unlabeled.weak)
            translated = {k: torch.cat([v[: len(labeled.image)], clean[k]]) for k, v in translated.items()}

    count = len(labeled.image)
    loss_labeled = supervised_loss(logits[:count], labeled.label, ignore_index)
    loss_unlabeled = None
    if mixed:
        loss_unlabeled = pseudo_label_loss(
            logits[count:], mixed.pseudo, mixed.confidence, mixed.valid, recipe.threshold
        )
    loss_distill = None
    if recipe.distill is not None and translated:
        targets = _joined(labeled.targets, mixed.targets) if mixed else labeled.targets
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
        "loss_labeled": loss_labeled.detach(),
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
    offsets_px: dict[str, float] | None,
) -> _Mixed:
    confidence, pseudo = state.ema(unlabeled.weak).float().softmax(dim=1).max(dim=1)
    valid, boxes = unlabeled.valid, unlabeled.cutmix_boxes
    used = (confidence >= recipe.threshold) & valid
    known = used & (unlabeled.label != ignore_index)
    logs["mask_ratio"] = used.sum() / valid.sum().clamp(min=1)
    logs["pseudo_accuracy"] = ((pseudo == unlabeled.label) & known).sum() / known.sum()  # NaN: nothing to judge
    targets = unlabeled.targets
    if recipe.distill is not None and recipe.distill.view == "strong" and targets.features:
        targets = cutmix_targets(targets, boxes, unlabeled.strong.shape[-1], offsets_px)
    return _Mixed(
        strong=cutmix(unlabeled.strong, boxes),
        pseudo=cutmix(pseudo, boxes),
        confidence=cutmix(confidence, boxes),
        valid=cutmix(valid, boxes),
        targets=targets,
    )


def _joined(first: Targets, second: Targets) -> Targets:
    return Targets(
        {k: torch.cat([v, second.features[k]]) for k, v in first.features.items()},
        {k: torch.cat([v, second.weights[k]]) for k, v in first.weights.items()},
    )


def batch_to(batch: Batch, device: torch.device) -> Batch:
    """Return ``batch`` on ``device``; nothing is copied when it is there already."""

    def move(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)

    def move_targets(t: Targets) -> Targets:
        return Targets({k: move(v) for k, v in t.features.items()}, {k: move(v) for k, v in t.weights.items()})

    a, b = batch.labeled, batch.unlabeled
    labeled = LabeledBatch(move(a.image), move(a.label), move_targets(a.targets))
    unlabeled = None
    if b is not None:
        unlabeled = UnlabeledBatch(
            move(b.weak), move(b.strong), move(b.valid), move(b.label), move(b.cutmix_boxes), move_targets(b.targets)
        )
    return Batch(batch.step, labeled, unlabeled)
