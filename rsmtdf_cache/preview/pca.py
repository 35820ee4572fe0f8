"""Three principal components as red, green and blue. Shape legend: N tiles, h w tokens, D channels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rsmtdf_cache.preview.norms import GREY, outlier_limit, token_lengths

__all__ = ["pca_colors", "pca_shares"]

#: Tokens that the basis is fitted to, at most: evenly strided, so that the same tokens are taken every time.
_FITTED_TOKENS = 20_000


def pca_colors(features_NhwD: NDArray[Any]) -> NDArray[np.uint8]:
    """Return ``[N, h, w, 3]`` uint8: the first three principal components of all tokens together.

    One basis for all tiles, so that one colour means one thing in all of them. Channels are standardised first: the
    channels of largest variance would otherwise be the picture. Tokens of outlying norm have no say in basis and
    stretch (see ``norms.outlier_limit``); they are coloured by them. Each component is stretched between its 2nd and
    98th percentile; signs are fixed, so the same features give the same picture. Tokens with a NaN are grey.
    """
    return pca_shares(features_NhwD)[0]


def pca_shares(features_NhwD: NDArray[Any]) -> tuple[NDArray[np.uint8], float]:
    """Return ``pca_colors`` and the share of the standardised variance that the three colours show (0..1)."""
    shape, channels = features_NhwD.shape[:-1], features_NhwD.shape[-1]
    tokens = features_NhwD.reshape(-1, channels).astype(np.float32)
    known = np.isfinite(tokens).all(1)
    colors = np.full((len(tokens), 3), GREY, np.uint8)
    values, share = tokens[known], 1.0
    if len(values) > 1:
        norms = token_lengths(values)
        usual = norms <= outlier_limit(norms)
        mean, spread, axes, share = _basis(values[usual])
        parts = ((values - mean) / spread) @ axes
        low, high = np.percentile(parts[usual], (2, 98), axis=0)
        stretched = (parts - low) / np.where(high > low, high - low, 1.0)
        colors[known, : parts.shape[1]] = np.rint(stretched.clip(0, 1) * 255)
    return colors.reshape(*shape, 3), share


def _basis(
    tokens: NDArray[np.float32],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float]:
    """Return mean ``[D]``, spread ``[D]``, axes ``[D, 3]`` (fewer for fewer channels) and the share they explain."""
    fitted = tokens[:: max(1, len(tokens) // _FITTED_TOKENS)].astype(np.float64)
    spread = fitted.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    mean = fitted.mean(0)
    values = (fitted - mean) / spread
    variance, axes = np.linalg.eigh(values.T @ values)
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    total = float(variance.sum())
    return mean, spread, axes, float(variance[::-1][:3].sum()) / total if total > 0 else 1.0
