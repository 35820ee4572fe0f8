"""The objective of a step: named, weighted terms, their sum, and what the log shows of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from rsmtdf_train.losses import distillation
from rsmtdf_train.recipe import Recipe
from rsmtdf_train.sample import Targets
from rsmtdf_train.sections import DistillConfig

__all__ = ["TermWeights", "combine", "distill_term", "key_weight", "term_weights"]


@dataclass(frozen=True)
class TermWeights:
    """Weights of the three terms at one step."""

    labeled: float
    unlabeled: float
    distill: float


def term_weights(recipe: Recipe, step: int) -> TermWeights:
    """Return the weights at ``step`` (0-based): distillation alone at first, its weight linear to ``decay_to``."""
    distill = 0.0
    alone = False
    if recipe.distill is not None:
        progress = step / max(recipe.total_steps - 1, 1)
        distill = recipe.distill.weight * (1 + (recipe.distill.decay_to - 1) * progress)
        alone = step < recipe.distill.only_steps
    return TermWeights(
        labeled=0.0 if alone else 1.0,
        unlabeled=0.0 if alone or recipe.method == "supervised" else recipe.unlabeled_weight,
        distill=distill,
    )


def key_weight(config: DistillConfig, key: str) -> float:
    """Return the weight of target ``key``: the first glob pattern of ``config.weights`` that matches it, else 1."""
    return next((w for pattern, w in config.weights.items() if fnmatchcase(key, pattern)), 1.0)


def distill_term(
    config: DistillConfig, translated: Mapping[str, Tensor], targets: Targets
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted mean of the targets' losses, and ``{"cosine/KEY": mean cosine}`` for the log."""
    total: Tensor | None = None
    weights = {key: key_weight(config, key) for key in translated}
    cosines: dict[str, Tensor] = {}
    for key, mine in translated.items():
        loss, cosines[f"cosine/{key}"] = distillation(mine, targets.features[key], targets.weights[key], config.loss)
        total = weights[key] * loss if total is None else total + weights[key] * loss
    if total is None:
        return torch.zeros(()), cosines
    return total / max(sum(weights.values()), 1e-6), cosines


def combine(weights: TermWeights, labeled: Tensor | None, unlabeled: Tensor | None, distill: Tensor | None) -> Tensor:
    """Return the weighted sum of the terms that are there; a term of weight 0 takes no part in the gradient."""
    pairs = [(weights.labeled, labeled), (weights.unlabeled, unlabeled), (weights.distill, distill)]
    terms = [weight * term for weight, term in pairs if term is not None and weight != 0]
    if not terms:
        raise ValueError("no term has a weight above 0")
    return torch.stack(terms).sum()
