"""What ``metrics.json`` of a run says."""

from __future__ import annotations

from typing import Any

from rsmtdf_train.checkpoint import RunIdentity
from rsmtdf_train.metrics import Scores

__all__ = ["scores_to_json"]


def scores_to_json(
    identity: RunIdentity,
    split: str,
    scores: dict[str, Scores],
    step: int,
    best: dict[str, Any] | None = None,
    stopped_early: bool = False,
) -> dict[str, Any]:
    """Return what ``metrics.json`` holds: what was scored, on what, and the scores by checkpoint kind.

    ``checkpoint`` and ``miou`` at the top name the deployed choice: the EMA of the last step, or what was best on the
    validation split; ``scores`` has all kinds. ``best``: that score and its step.
    """
    chosen = "best" if "best" in scores else "ema"
    recipe = identity.recipe
    return {
        "name": recipe.name,
        "data": str(recipe.data),
        "split": split,
        "labeled": recipe.labeled,
        "seed": recipe.seed,
        "step": step,
        "method": recipe.method,
        "targets": {
            "mode": recipe.targets,
            "keys": [t.key for t in identity.targets],
            **({"approximate_orientations": True} if recipe.augment.approximate_orientations else {}),
            **({"control": recipe.distill.control} if recipe.distill and recipe.distill.control != "none" else {}),
        },
        "fused": recipe.fuse is not None,
        "privileged": recipe.privileged is not None,
        "probe": recipe.probe is not None,
        "store": identity.snapshot,
        "checkpoint": chosen,
        "miou": scores[chosen].miou if chosen in scores else None,
        **({"validation": {**recipe.validation.model_dump(mode="json"), **best}} if best is not None else {}),
        **({"stopped_early": True} if stopped_early else {}),
        "classes": [c.name for c in identity.classes],
        "scores": {kind: {"checkpoint": kind, **s.to_json()} for kind, s in scores.items()},
    }
