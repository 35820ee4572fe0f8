"""Values of any type to the 8 bits that teachers and students read, by a range that is given for each band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.errors import UsageError

__all__ = ["EIGHT_BIT", "PixelRule", "Scale", "parse_scale", "percentile_scale", "scale_of", "scale_text", "to_8_bit"]

#: The values that become 0 and 255, for red, green and blue.
Scale = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

EIGHT_BIT: Scale = ((0.0, 255.0), (0.0, 255.0), (0.0, 255.0))


@dataclass(frozen=True)
class PixelRule:
    """How the values of rasters become 8-bit RGB: which bands (from 1; None: as each file says), and which range.

    ``dtype``: the type that the range is meant for.
    """

    bands: tuple[int, int, int] | None
    scale: Scale
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data that ``from_json`` reads back to an equal value."""
        bands = None if self.bands is None else list(self.bands)
        return {"bands": bands, "scale": [list(pair) for pair in self.scale], "dtype": self.dtype}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PixelRule:
        """Return the value of ``to_json``; raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        red, green, blue = ((float(low), float(high)) for low, high in data["scale"])
        bands = None
        if data["bands"] is not None:
            first, second, third = (int(n) for n in data["bands"])
            bands = (first, second, third)
        return cls(bands, (red, green, blue), str(data["dtype"]))


def scale_of(numbers: Sequence[float]) -> Scale:
    """Return the ranges written as ``LOW, HIGH`` for all bands or as a pair a band. Raises ``UsageError``."""
    values = [float(v) for v in numbers]
    text = ",".join(f"{v:g}" for v in values)
    if len(values) not in (2, 6):
        raise UsageError(f"--scale {text}: give LOW,HIGH, or six numbers: a pair for red, for green and for blue")
    pairs = [(values[i], values[i + 1]) for i in range(0, len(values), 2)]
    for low, high in pairs:
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"--scale {text}: {low:g},{high:g} is no range; give finite values, the lower one first")
    red, green, blue = pairs * 3 if len(pairs) == 1 else pairs
    return red, green, blue


def parse_scale(text: str) -> Scale:
    """Return ``"0,3000"`` or ``"0,3000,0,3000,0,2500"`` as ranges. Raises ``UsageError``."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--scale {text}: give numbers with commas between, such as 0,3000") from None
    return scale_of(numbers)


def scale_text(scale: Scale) -> str:
    """Return ``scale`` as ``--scale`` takes it: one pair where all bands have the same."""
    pairs = scale[:1] if len(set(scale)) == 1 else scale
    return ",".join(f"{value:.17g}" for pair in pairs for value in pair)


def percentile_scale(values: Sequence[NDArray[Any]], percentiles: tuple[float, float]) -> Scale | None:
    """Return the range between two percentiles of each of three bands; None where a band has no two values.

    Rounded to four digits of the range, so that it can be written down and typed again.
    """
    pairs = []
    for band in values:
        if not band.size:
            return None
        low, high = (float(v) for v in np.percentile(band.astype(np.float64), percentiles))
        if not low < high:
            return None
        decimals = 3 - math.floor(math.log10(high - low))  # four digits of the range, however far from 0 it lies
        pairs.append((round(low, decimals), round(high, decimals)))
    red, green, blue = pairs
    return red, green, blue


def to_8_bit(band: NDArray[Any], limits: tuple[float, float]) -> NDArray[np.uint8]:
    """Return ``(value - low) / (high - low)`` in 255ths, rounded, cut at 0 and 255; what is not finite becomes 0."""
    low, high = limits
    if band.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return np.asarray(band)
    if band.dtype.itemsize <= 2 and band.dtype.kind in "iu":  # a table is as exact and faster
        info = np.iinfo(band.dtype)
        values = np.arange(int(info.min), int(info.max) + 1, dtype=np.float64)
        table = _scaled(values, low, high)
        index = band.astype(np.int32) - int(info.min)
        return np.asarray(table[index])
    return _scaled(band, low, high)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    with np.errstate(invalid="ignore", over="ignore"):
        level = np.clip((values - low) * (255 / (high - low)), 0, 255)
        level = np.where(np.isfinite(level), level, 0)
        return np.asarray((level + 0.5).astype(np.uint8))
