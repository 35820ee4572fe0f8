"""The pictures of one array, as numbers: colours, norms, cosines, packed tokens. Its features are let go afterwards.

Shape legend: N tiles, h w shown tokens, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.preview.norms import Norms, token_norms
from rsmtdf_cache.preview.pca import pca_shares
from rsmtdf_cache.preview.selection import Selection, ShownArray
from rsmtdf_cache.preview.similarity import PackedTokens, cosine_map, pack_tokens

__all__ = ["Maps", "make_maps"]


@dataclass(frozen=True)
class Maps:
    """What is drawn of ``array``.

    ``pca`` ``[N, h, w, 3]`` uint8, ``pca_share``: share of the variance in its three colours. ``cosine``
    ``[N, h, w]``: similarity of all tokens to token ``patch`` (i, j) of the selection's patch tile. ``packed``: the
    tokens in the order tile, row, column, for a page; None without one.
    """

    array: ShownArray
    pca: NDArray[np.uint8]
    pca_share: float
    norms: Norms
    cosine: NDArray[np.float32]
    patch: tuple[int, int]
    packed: PackedTokens | None

    @property
    def cosine_low(self) -> float:
        """Where the colours of cosines begin: the 2nd percentile; they end at 1."""
        known = self.cosine[np.isfinite(self.cosine)]
        return min(float(np.percentile(known, 2)), 0.99) if len(known) else 0.0

    def describe(self) -> dict[str, Any]:
        """Return the figures of the array as JSON data."""
        packed = self.packed
        return {
            "key": str(self.array.key), "grid": list(self.array.spec.grid), "every": self.array.step,
            "channels": self.array.spec.layer.channels, "stride_tile_px": self.array.spec.stride_tile_px,
            "patch": list(self.patch), "pca_share": self.pca_share,
            "norm_low": self.norms.low, "norm_high": self.norms.high, "norm_limit": self.norms.limit,
            "outliers": self.norms.outliers,
            "embedded": None if packed is None else {
                "dimensions": packed.codes.shape[1], "nbytes": packed.codes.nbytes, "error_mean": packed.error_mean,
                "error_worst1": packed.error_worst1, "error_max": packed.error_max,
            },
        }  # fmt: skip


def make_maps(selection: Selection, array: ShownArray, pack_nbytes: int | None) -> Maps:
    """Read the shown tokens of ``array`` and return its pictures; ``pack_nbytes``: bound of the packed tokens."""
    features = np.stack([array.read(selection.store, tile.row) for tile in selection.tiles])
    colors, share = pca_shares(features)
    i, j = array.nearest(*selection.patch[1:])
    cosine = cosine_map(features, features[selection.patch_tile, i, j])
    packed = None if pack_nbytes is None else pack_tokens(features.reshape(-1, features.shape[-1]), pack_nbytes)
    return Maps(array, colors, share, token_norms(features), cosine, (i, j), packed)
