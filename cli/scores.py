"""Scores and paired differences as words: percent rounded the same way in every table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rsmtdf_train.experiment.compare import Difference

__all__ = ["difference_text", "mean_text"]


def mean_text(mean: float, sd: float | None, digits: int = 1) -> str:
    """Return ``45.9 ± 2.8`` for a mean and a standard deviation in 0..1; the mean alone for one seed."""
    return f"{100 * mean:.{digits}f}" + ("" if sd is None else f" ± {100 * sd:.{digits}f}")


def difference_text(difference: Difference | None, digits: int = 1) -> str:
    """Return ``+8.5 [+1.3, +15.7]``; without an interval for one pair, nothing for None (the baseline)."""
    if difference is None:
        return ""
    values = [v for v in (difference.mean, difference.low, difference.high) if v is not None]
    mean, *ends = (f"{round(100 * v, digits) + 0.0:+.{digits}f}" for v in values)  # + 0.0: no "-0.0"
    return f"{mean} [{', '.join(ends)}]" if ends else mean
