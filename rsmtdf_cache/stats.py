"""Per-channel sums of stored features: exact to merge, the same whatever the order of commits (decision 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["ChannelStats"]


@dataclass
class ChannelStats:
    """Float64 sums over tokens, per channel, and norms of token vectors over one shard or many."""

    count: int
    sums: NDArray[np.float64]  # [D]
    squares: NDArray[np.float64]  # [D]
    norm_sum: float = 0.0
    norm_max: float = 0.0
    non_finite: int = 0  # a writer refuses such values, so it stays 0 unless a shard came to be otherwise

    @classmethod
    def empty(cls, channels: int) -> Self:
        return cls(0, np.zeros(channels), np.zeros(channels))

    def add(self, features: NDArray[Any]) -> None:
        """Count one map ``[h, w, D]``."""
        tokens = features.reshape(-1, features.shape[-1]).astype(np.float64)
        squares = tokens * tokens
        norms = np.sqrt(squares.sum(1))
        self.count += len(tokens)
        self.sums += tokens.sum(0)
        self.squares += squares.sum(0)
        self.norm_sum += float(norms.sum())
        self.norm_max = max(self.norm_max, float(norms.max()))
        if not np.isfinite(norms).all():
            self.non_finite += int(np.count_nonzero(~np.isfinite(tokens)))

    def merge(self, other: ChannelStats) -> None:
        """Add the sums of ``other``."""
        self.count += other.count
        self.sums += other.sums
        self.squares += other.squares
        self.norm_sum += other.norm_sum
        self.norm_max = max(self.norm_max, other.norm_max)
        self.non_finite += other.non_finite

    @property
    def mean(self) -> NDArray[np.float32]:
        """Mean per channel ``[D]``; zeros when nothing was counted."""
        return (self.sums / max(self.count, 1)).astype(np.float32)

    @property
    def std(self) -> NDArray[np.float32]:
        """Population standard deviation per channel ``[D]``, at least 1e-6 so that one can divide by it."""
        n = max(self.count, 1)
        variance = self.squares / n - (self.sums / n) ** 2
        return np.sqrt(np.maximum(variance, 1e-12)).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count, "sums": self.sums.tolist(), "squares": self.squares.tolist(),
            "norm_sum": self.norm_sum, "norm_max": self.norm_max, "non_finite": self.non_finite,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            int(data["count"]), np.asarray(data["sums"], np.float64), np.asarray(data["squares"], np.float64),
            float(data["norm_sum"]), float(data["norm_max"]), int(data.get("non_finite", 0)),
        )  # fmt: skip

    @classmethod
    def total(cls, parts: Iterable[ChannelStats], channels: int) -> Self:
        """Return the sum of ``parts``, added in the order given (row order, for the same bits every time)."""
        result = cls.empty(channels)
        for part in parts:
            result.merge(part)
        return result
