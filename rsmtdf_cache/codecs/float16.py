"""IEEE half precision: 11 bits of mantissa, magnitudes up to 65504; larger values become infinite and are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs.base import Codec

__all__ = ["Float16"]


class Float16(Codec):
    """Store features as little-endian float16."""

    dtype = np.dtype("<f2")
    fill = float("nan")

    def encode(self, features: NDArray[np.float32]) -> NDArray[Any]:
        """Return float16 rounded to nearest even; overflow becomes infinite (the writer refuses it)."""
        with np.errstate(over="ignore"):
            return features.astype(self.dtype)

    def decode(self, stored: NDArray[Any]) -> NDArray[np.float16]:
        """Return ``stored`` itself."""
        return stored
