"""Means over what has a value."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["mean_of"]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None without any."""
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None
