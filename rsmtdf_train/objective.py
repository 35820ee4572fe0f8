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
    """Weights of the terms at one step."""

    labeled: float
    unlabeled: float
    distill: float
    privileged: float = 0.0

    @property
    def segments(self) -> bool:
        """Whether anything is segmented at this step, or only distilled."""
        return self.labeled != 0 or self.unlabeled != 0


def term_weights(recipe: Recipe, step: int) -> TermWeights:
    """Return the weights at ``step`` (0-based): distillation alone at first, its weight linear to ``decay_to``.

    ``objective: mean`` divides by the number of terms the method has (RS-MTDF: labelled, unlabelled, distillation);
    the labelled loss on true features is a part of the labelled term and no term of its own.
    """
    distill = 0.0
    alone = False
    if recipe.distill is not None:
        progress = step / max(recipe.total_steps - 1, 1)
        distill = recipe.distill.weight * (1 + (recipe.distill.decay_to - 1) * progress)
        alone = step < recipe.distill.only_steps and distill > 0
    semi = recipe.method != "supervised"
    terms = 1 + semi + (recipe.distill is not None)
    scale = 1 / terms if recipe.objective == "mean" else 1.0
    return TermWeights(
        labeled=0.0 if alone else scale,
        unlabeled=0.0 if alone or not semi else recipe.unlabeled_weight * scale,
        distill=distill * scale,
        privileged=0.0 if alone or recipe.privileged is None else recipe.privileged.aux_weight * scale,
    )


def key_weight(config: DistillConfig, key: str) -> float:
    """Return the weight of target ``key``: the first glob pattern of ``config.weights`` that matches it, else 1."""
    return next((w for pattern, w in config.weights.items() if fnmatchcase(key, pattern)), 1.0)


def distill_term(
    config: DistillConfig,
    translated: Mapping[str, Tensor],
    targets: Targets,
    denominators: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted mean of the targets' losses, and ``{"cosine/KEY": mean cosine}`` for the log.

    ``denominators``: by key, what sums over tokens are divided by, where they are more than these tokens' own weights.
    """
    total: Tensor | None = None
    weights = {key: key_weight(config, key) for key in translated}
    cosines: dict[str, Tensor] = {}
    for key, mine in translated.items():
        loss, cosines[f"cosine/{key}"] = distillation(
            mine,
            targets.features[key],
            targets.weights[key],
            config.loss,
            denominator=None if denominators is None else denominators[key],
        )
        total = weights[key] * loss if total is None else total + weights[key] * loss
    if total is None:
        return torch.zeros(()), cosines
    return total / max(sum(weights.values()), 1e-6), cosines


def combine(weights: TermWeights, terms: Mapping[str, Tensor]) -> Tensor:
    """Return the weighted sum of ``terms`` (by the names of ``TermWeights``); one of weight 0 takes no part."""
    weighted = [getattr(weights, name) * term for name, term in terms.items() if getattr(weights, name) != 0]
    if not weighted:
        raise ValueError("no term has a weight above 0")
    return torch.stack(weighted).sum()
