"""How much of a feature survives its codec: measured on tiles that the codec was not calibrated with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Quality", "token_cosines"]


def token_cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine of every token of two maps ``[..., D]``, as ``[...]``; two zero vectors are alike (1)."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    product = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    silent = ~(x.any(-1) | y.any(-1))
    return np.where(silent, 1.0, (x * y).sum(-1) / np.where(product == 0, 1.0, product))


@dataclass(frozen=True)
class Quality:
    """Decoded against original features of ``tiles`` tiles (``tokens`` tokens).

    ``cosine``: mean over tokens; ``cosine_worst``: mean over the worst 1 % of them; ``standardised``: mean after both
    are standardised per channel, which is what distillation compares; ``error``: norm of the difference, relative to
    the norm of the original without its mean. ``held_out``: whether the codec was calibrated with other tiles.
    """

    cosine: float
    cosine_worst: float
    standardised: float
    error: float
    tiles: int
    tokens: int
    held_out: bool

    @classmethod
    def of(cls, original: NDArray[Any], decoded: NDArray[Any], held_out: bool = True, tiles: int | None = None) -> Self:
        """Return the quality of ``decoded`` ``[tiles, h, w, D]``, or of tokens ``[..., D]`` of so many ``tiles``."""
        channels = original.shape[-1]
        x = original.reshape(-1, channels).astype(np.float64)
        y = decoded.reshape(-1, channels).astype(np.float64)
        mean, std = x.mean(0), x.std(0)
        lively = std > 1e-6 * np.maximum(1, np.abs(mean))
        cosines = np.sort(token_cosines(x, y))
        worst = cosines[: max(1, math.ceil(len(cosines) / 100))]
        scaled = [(v[:, lively] - mean[lively]) / std[lively] for v in (x, y)]
        spread = float(np.linalg.norm(x - mean))
        error = float(np.linalg.norm(x - y)) / spread if spread else 0.0
        return cls(
            float(cosines.mean()), float(worst.mean()), float(token_cosines(*scaled).mean()),
            error, len(original) if tiles is None else tiles, len(x), held_out,
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Return the value of plain JSON data. Raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        numbers = {name: float(data[name]) for name in ("cosine", "cosine_worst", "standardised", "error")}
        if not all(map(math.isfinite, numbers.values())):
            raise ValueError("not a quality")
        return cls(**numbers, tiles=int(data["tiles"]), tokens=int(data["tokens"]), held_out=bool(data["held_out"]))
