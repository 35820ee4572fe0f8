"""IEEE half precision: 11 bits of mantissa, magnitudes up to 65504; larger values become infinite and are refused."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs.base import Affine, Codec, Codes

__all__ = ["Float16"]


class Float16(Codec):
    """Store features as little-endian float16."""

    dtype = np.dtype("<f2")
    fill = float("nan")

    def encode(self, features: NDArray[np.float32]) -> Codes:
        """Return float16 rounded to nearest even; overflow becomes infinite (the writer refuses it)."""
        with np.errstate(over="ignore"):
            return Codes(features.astype(self.dtype))

    @property
    def affine(self) -> Affine:
        return Affine()
