"""Signs of a run that goes wrong without failing. Each is said once, with what to do."""

from __future__ import annotations

from collections.abc import Mapping

from rsmtdf_train.recipe import Recipe

__all__ = ["Watch"]

#: Steps in a row without a confident pixel that are worth a word: a tenth of the run, within these bounds.
_LONG = (50, 1000)
_NONE = 1e-4  # share of the pixels


class Watch:
    """Looks at the numbers of every step."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.patience = min(max(recipe.total_steps // 10, _LONG[0]), _LONG[1])
        self._empty = 0
        self._said = False

    def see(self, step: int, values: Mapping[str, float]) -> str | None:
        """Return what a person should read after ``step`` (0-based), None mostly."""
        ratio = values.get("mask_ratio")
        if ratio is None or self._said:
            return None
        self._empty = self._empty + 1 if ratio < _NONE else 0
        if self._empty < self.patience:
            return None
        self._said = True
        probe = ", or begin with probe pseudo-labels (probe: true)" if self.recipe.probe is None else ""
        return (
            f"step {step}: no pseudo-label reached the threshold of {self.recipe.threshold:g} in the last "
            f"{self.patience} steps, so the unlabelled tiles teach nothing. Lower threshold, train longer, raise "
            f"optim.lr{probe}"
        )
