"""Pixels as they are: whole numbers of 0 to 255. No codec for features, so nobody is offered it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.codecs.base import Affine, Codec, Codes

__all__ = ["Uint8"]


class Uint8(Codec):
    """Store pixels as bytes. A tile that is not committed reads as 0: the ledger alone says what is there."""

    dtype = np.dtype("u1")
    fill = 0
    #: Every byte is a value, and the tile table has the digest of all of them.
    counted = False
    #: A crop of a tile in one chunk is one slice of the mapped file.
    chunk_side = 1024

    def encode(self, features: NDArray[np.float32]) -> Codes:
        """Return the nearest whole numbers of 0 to 255."""
        return Codes(np.clip(np.rint(features), 0, 255).astype(self.dtype))

    def decode(self, codes: Codes) -> NDArray[np.float16]:
        """Return the same numbers as float16, which holds them exactly."""
        return codes.values.astype(np.float16)

    @property
    def affine(self) -> Affine:
        return Affine()
