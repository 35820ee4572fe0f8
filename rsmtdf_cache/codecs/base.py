"""The contract of a codec. One file of this folder = one codec."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.specs import EncodingSpec

__all__ = ["Codec"]


class Codec(ABC):
    """Maps float32 features ``[..., D]`` to stored numbers of ``dtype`` and back."""

    dtype: np.dtype[Any]
    fill: float  # what a missing chunk reads as

    def __init__(self, spec: EncodingSpec) -> None:
        self.spec = spec

    @abstractmethod
    def encode(self, features: NDArray[np.float32]) -> NDArray[Any]:
        """Return the stored form, same shape. Values the codec cannot hold become non-finite, never wrong numbers."""

    @abstractmethod
    def decode(self, stored: NDArray[Any]) -> NDArray[np.float16]:
        """Return features in the teacher's own scale; shares memory with ``stored`` where it can."""
