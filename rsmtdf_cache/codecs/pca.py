"""The leading principal components of standardised channels, whitened, as int8 with a float16 scale per token.

``pca96-int8`` keeps 96 components: 98 bytes a token whatever the teacher's width. Components are of the standardised
channels, since distillation sees those; whitened, so that one scale per token serves all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs.base import Affine, Codes
from rsmtdf_cache.codecs.calibration import Calibration
from rsmtdf_cache.codecs.int8 import ScaledInt8, quantise
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.specs import EncodingSpec

__all__ = ["PcaInt8"]


class PcaInt8(ScaledInt8):
    """Store the first ``components`` whitened principal components as int8 with a scale per token."""

    def __init__(self, encoding: EncodingSpec, channels: int, calibration: Calibration | None = None) -> None:
        super().__init__(encoding, channels, calibration)
        assert calibration is not None
        kept = self.stored_channels(encoding, channels)
        basis_CD, deviations_C = calibration.components(kept)
        spread = calibration.spread()
        self._mean, self._deviations = calibration.mean, deviations_C
        self._into = np.ascontiguousarray((basis_CD / spread / deviations_C[:, None]).T, np.float64)
        self._back = np.ascontiguousarray(basis_CD * spread * deviations_C[:, None], np.float32)

    @classmethod
    def stored_channels(cls, encoding: EncodingSpec, channels: int) -> int:
        kept = encoding.parameters.get("components")
        if set(encoding.parameters) != {"components"} or not isinstance(kept, int) or not 1 <= kept <= channels:
            raise UsageError(
                f"codec pca-int8 with {encoding.parameters}: write pcaK-int8 with K components, 1 <= K <= {channels} "
                "channels of the layer"
            )
        return kept

    def encode(self, features: NDArray[np.float32]) -> Codes:
        # In float64: the order of sums of a matrix product depends on the threads of the linear algebra library, and
        # float32 codes differed between one thread and two; here the difference is far below a rounding step.
        z = (features - self._mean).astype(np.float64) @ self._into
        with np.errstate(over="ignore"):
            return quantise(z.astype(np.float32))

    @property
    def component_std(self) -> NDArray[np.float32] | None:
        return self._deviations

    @property
    def affine(self) -> Affine:
        return Affine(self._back, self._mean)
