"""Symmetric int8 of standardised channels, with a float16 scale per token.

A channel is centred and divided by its standard deviation first (the calibration), so that the outlier channels of CLIP
do not take all levels; then each token is scaled so that its largest magnitude is 127, so that the outlier tokens of
DINOv2 do not take them from all others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs.base import Affine, Codec, Codes
from rsmtdf_cache.codecs.calibration import Calibration
from rsmtdf_cache.specs import EncodingSpec

__all__ = ["Int8", "ScaledInt8", "quantise"]


def quantise(z: NDArray[np.float32]) -> Codes:
    """Return int8 codes in -127..127 and the scale of each token: ``z`` is about ``codes * scale``.

    A token with a value that is not finite, or too large for a float16 scale, gets a scale that is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (np.abs(z).max(-1) / np.float32(127)).astype(np.float16)
        wide = scale.astype(np.float32)[..., None]
        steps = np.divide(z, wide, out=np.zeros_like(z), where=np.isfinite(wide) & (wide > 0))
    return Codes(np.clip(np.rint(steps), -127, 127).astype(np.int8), scale)


class ScaledInt8(Codec):
    """What codecs of int8 with a scale per token share."""

    dtype = np.dtype("i1")
    fill = 0
    scaled = True
    calibrated = True


class Int8(ScaledInt8):
    """Store ``(x - mean) / std`` per channel as int8 with a scale per token."""

    def __init__(self, encoding: EncodingSpec, channels: int, calibration: Calibration | None = None) -> None:
        super().__init__(encoding, channels, calibration)
        assert calibration is not None
        self._mean, self._spread = calibration.mean, calibration.spread()

    def encode(self, features: NDArray[np.float32]) -> Codes:
        return quantise((features - self._mean) / self._spread)

    @property
    def affine(self) -> Affine:
        return Affine(self._spread, self._mean)
