"""Cosine similarity of tokens, exact, and packed small enough to travel in a page.

Shape legend: T tokens, D channels, K kept dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.preview.norms import token_lengths

__all__ = ["PackedTokens", "cosine_map", "pack_tokens", "packed_cosine"]

#: Dimensions that are tried, fewest first. Powers of two, for the Hadamard turn.
_DIMENSIONS = (8, 16, 32, 64, 128, 256)
#: The first that is this good is taken: mean and worst 1 % of the error of a cosine.
_GOOD_MEAN, _GOOD_WORST = 0.003, 0.01
_FITTED_TOKENS = 20_000
_QUERIES = 64


@dataclass(frozen=True)
class PackedTokens:
    """``codes`` ``[T, K]`` int8: directions of tokens, zero for tokens without one; lengths are lost.

    ``error_mean``, ``error_worst1``, ``error_max``: difference of packed and exact cosines over up to 64 evenly strided
    tokens against all, mean, 99th percentile and largest.
    """

    codes: NDArray[np.int8]
    error_mean: float
    error_worst1: float
    error_max: float


def cosine_map(features: NDArray[Any], query_D: NDArray[Any]) -> NDArray[np.float32]:
    """Return ``[...]`` float32 in -1..1: cosine of every token of ``features`` ``[..., D]`` to ``query_D``.

    NaN where either has a NaN or no length.
    """
    cosines: NDArray[np.float32] = _directions(features) @ _directions(query_D)
    return cosines.clip(-1, 1)


def pack_tokens(features_TD: NDArray[Any], max_nbytes: int) -> PackedTokens:
    """Return the tokens' directions in int8, in the fewest dimensions that keep cosines (or that the bytes allow).

    Unit vectors are projected on the leading eigenvectors of their second moments (not centred, so that products are
    kept), turned by a Hadamard matrix (spreads them evenly, so that 8 bits lose less) and rounded, each token with its
    own scale. A cosine of codes needs no scale, and a token has exactly 1 to itself.
    """
    units = _directions(features_TD)
    known = np.isfinite(units).all(1)
    found = units[known]
    if not len(found):
        return PackedTokens(np.zeros((len(units), _DIMENSIONS[0]), np.int8), 0.0, 0.0, 0.0)
    fitted = found[:: max(1, len(found) // _FITTED_TOKENS)]
    _, axes = np.linalg.eigh(fitted.T.astype(np.float64) @ fitted)
    axes = axes[:, ::-1]
    axes = (axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)).astype(np.float32)
    queries = np.unique(np.linspace(0, len(found) - 1, _QUERIES).astype(int))
    exact = found @ found[queries].T
    allowed = [k for k in _DIMENSIONS if k * len(units) <= max_nbytes] or [_DIMENSIONS[0]]
    for kept in allowed:
        codes = np.zeros((len(units), kept), np.int8)
        codes[known] = _round(found @ axes[:, :kept], kept)
        error = np.abs(packed_cosine(codes[known], codes[known][queries]) - exact)
        mean, worst = float(error.mean()), float(np.percentile(error, 99))
        enough = (mean <= _GOOD_MEAN and worst <= _GOOD_WORST) or kept >= axes.shape[1]
        if enough or kept == allowed[-1]:
            break
    return PackedTokens(codes, mean, worst, float(error.max()))


def packed_cosine(codes_TK: NDArray[np.int8], queries_QK: NDArray[np.int8]) -> NDArray[np.float32]:
    """Return ``[T, Q]``: cosines of codes, as the page computes them; NaN for codes of zeros."""
    return _directions(codes_TK) @ _directions(queries_QK).T


def _directions(features: NDArray[Any]) -> NDArray[np.float32]:
    """Return unit vectors ``[..., D]``, NaN where there is no direction."""
    values = features.astype(np.float32)
    length = token_lengths(values)[..., None]
    directions: NDArray[np.float32] = (values / np.where(length > 0, length, np.nan)).astype(np.float32)
    return directions


def _round(parts: NDArray[np.float32], kept: int) -> NDArray[np.int8]:
    """Return int8 codes ``[T, kept]`` of ``parts`` ``[T, D]`` with at most ``kept`` (a power of two) columns."""
    turn = np.ones((1, 1), np.float32)
    while len(turn) < kept:
        turn = np.block([[turn, turn], [turn, -turn]])
    turned = parts @ turn[: parts.shape[1]]
    top = np.abs(turned).max(1, keepdims=True)
    return np.rint(turned / np.where(top > 0, top, 1.0) * 127).astype(np.int8)
