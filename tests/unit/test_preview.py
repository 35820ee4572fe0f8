"""Pictures of features as numbers: norms, cosines and what packing costs them; one basis for all tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.preview import draw_pca, pca_colors
from rsmtdf_cache.preview.norms import OUTLIER_COLOR, outlier_limit, ramp, token_norms
from rsmtdf_cache.preview.pca import pca_shares
from rsmtdf_cache.preview.similarity import cosine_map, pack_tokens, packed_cosine


def _tokens(count: int, channels: int, rank: int, seed: int = 0) -> NDArray[np.float16]:
    """Return float16 tokens with a common part, like those of a network: few strong directions and some noise."""
    random = np.random.default_rng(seed)
    parts = random.normal(size=(count, rank)) @ random.normal(size=(rank, channels))
    noise = 0.2 * random.normal(size=(count, channels))
    return np.asarray(parts + random.normal(size=channels) + noise, np.float16)


def test_the_basis_is_that_of_all_tiles_and_not_moved_by_outlying_tokens() -> None:
    random = np.random.default_rng(0)
    strong = random.normal(size=(200, 3)) * (4, 2, 1)  # axes that cannot swap
    tokens = (strong @ random.normal(size=(3, 24)) + 5).reshape(2, 10, 10, 24)
    together = pca_colors(tokens)
    swapped = pca_colors(tokens[::-1])
    assert np.abs(together.astype(int) - swapped[::-1].astype(int)).max() <= 1
    loud = tokens.copy()
    loud[0, 0, :3] *= 40
    moved = np.abs(pca_colors(loud)[1].astype(int) - together[1].astype(int))
    assert moved.mean() < 5
    dimmed = tokens.copy()
    dimmed[0, 0, :3] = 0  # as many tokens, of no outlying norm
    assert np.abs(pca_colors(dimmed)[1].astype(int) - together[1].astype(int)).max() > 0
    quiet_part = np.random.default_rng(5).normal(size=(1, 4, 4, 3))
    assert pca_shares(quiet_part)[1] == pytest.approx(1.0)


def test_norms_are_those_of_numpy_and_outliers_stand_out() -> None:
    features = _tokens(72, 16, 4).reshape(2, 6, 6, 16)
    features[1, 2, 3] *= 30
    features[0, 5, 5] = np.nan
    norms = token_norms(features)
    expected = np.linalg.norm(features.astype(np.float64), axis=-1)
    np.testing.assert_allclose(norms.values, expected, rtol=1e-6)
    assert norms.outliers == 1 and norms.values[1, 2, 3] > norms.limit
    colors = norms.colors()
    assert tuple(colors[1, 2, 3]) == OUTLIER_COLOR
    assert (colors[0, 5, 5] == 128).all()
    assert (colors == np.array(OUTLIER_COLOR)).all(-1).sum() == 1
    assert norms.low < norms.high < norms.limit


@pytest.mark.parametrize("norms", [np.zeros(0), np.zeros(4), np.ones(3)])
def test_equal_or_no_norms_have_no_outliers(norms: NDArray[np.float64]) -> None:
    assert not (norms > outlier_limit(norms)).any()
    assert ramp(norms, 1.0, 1.0, "viridis").shape == (*norms.shape, 3)


def test_the_cosine_map_is_one_at_the_patch_and_numpys_elsewhere() -> None:
    features = _tokens(32, 20, 5).reshape(2, 4, 4, 20)
    found = cosine_map(features, features[1, 2, 3])
    assert found[1, 2, 3] == pytest.approx(1.0, abs=1e-6)
    wide, query = features.astype(np.float64), features[1, 2, 3].astype(np.float64)
    expected = wide @ query / np.linalg.norm(wide, axis=-1) / np.linalg.norm(query)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.isnan(cosine_map(features, np.zeros(20))).all()


@pytest.mark.parametrize("channels", [1, 3, 8, 40, 300])
def test_packed_tokens_keep_cosines_within_the_error_they_state(channels: int) -> None:
    tokens = _tokens(60, channels, 6)  # fewer than the queries that the error is measured on: all pairs
    packed = pack_tokens(tokens, 10**6)
    assert packed.codes.dtype == np.int8 and len(packed.codes) == 60
    wide = tokens.astype(np.float64)
    units = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    error = np.abs(packed_cosine(packed.codes, packed.codes) - units @ units.T)
    assert error.max() == pytest.approx(packed.error_max, abs=1e-6)
    assert error.mean() == pytest.approx(packed.error_mean, abs=1e-6)
    assert packed.error_mean <= 0.003 and packed.error_worst1 <= 0.01
    np.testing.assert_allclose(np.diag(packed_cosine(packed.codes, packed.codes)), 1.0, atol=1e-6)


def test_a_small_budget_costs_accuracy_and_says_so() -> None:
    tokens = np.random.default_rng(3).normal(size=(64, 128))
    small, large = pack_tokens(tokens, 64 * 8), pack_tokens(tokens, 64 * 256)
    assert small.codes.nbytes <= 64 * 8 < large.codes.nbytes
    assert small.error_mean > 10 * large.error_mean


def test_tokens_without_a_direction_have_no_cosine_and_harm_no_other() -> None:
    tokens = _tokens(30, 12, 4)
    holed = np.concatenate([tokens, np.full((1, 12), np.nan, np.float16), np.zeros((1, 12), np.float16)])
    packed = pack_tokens(holed, 10**6)
    np.testing.assert_array_equal(packed.codes[:30], pack_tokens(tokens, 10**6).codes)
    assert not packed.codes[30:].any()
    assert np.isnan(packed_cosine(packed.codes, packed.codes[:1])[30:]).all()
    assert not pack_tokens(holed[30:], 100).codes.any()


def test_tile_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Names with dollars are formulas for the drawing library, and broken ones stop it."""
    images = np.zeros((1, 4, 4, 3), np.uint8)
    path = draw_pca(tmp_path / "a.png", images, {"$\\frac{/s/l": np.ones((1, 2, 2, 3))}, ["$x_{\n" + "y" * 400])
    assert Image.open(path).width < 1000
