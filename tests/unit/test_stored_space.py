"""Principal components as targets: what distances and cosines mean there, against the decoded channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rsmtdf_cache.codecs import Codec, load_codec
from rsmtdf_cache.codecs.calibration import Calibration, Moments
from rsmtdf_cache.codecs.device import DeviceDecoder
from rsmtdf_cache.specs import EncodingSpec

CHANNELS, KEPT = 24, 7


def pca(kept: int = KEPT) -> tuple[Codec, Calibration, np.ndarray]:
    """Return a codec, its calibration and features whose channels differ in mean and deviation and go together."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(400, CHANNELS)) * np.linspace(4, 0.2, CHANNELS) @ rng.normal(size=(CHANNELS, CHANNELS))
    features = (mixed * rng.uniform(0.1, 9, CHANNELS) + rng.normal(size=CHANNELS) * 20).astype(np.float32)
    moments = Moments(CHANNELS)
    moments.add(features.reshape(20, 20, CHANNELS))
    calibration = Calibration.fit(moments, CHANNELS, {})
    encoding = EncodingSpec(codec="pca-int8", parameters={"components": kept})
    return load_codec(encoding, CHANNELS, calibration), calibration, features


def both(kept: int = KEPT) -> tuple[torch.Tensor, torch.Tensor, Calibration]:
    """Return the same codes as standardised channels ``[400, D]`` and as components ``[400, K]``."""
    codec, calibration, features = pca(kept)
    codes = codec.encode(features)
    assert codes.scale is not None
    values, scale = torch.from_numpy(codes.values), torch.from_numpy(codes.scale)
    channels = DeviceDecoder(codec, calibration.mean, calibration.spread())
    return channels(values, scale), DeviceDecoder.of_components(codec)(values, scale), calibration


@pytest.mark.parametrize("kept", [1, KEPT, CHANNELS])
def test_mean_squares_and_cosines_between_tokens_are_those_of_the_channels(kept: int) -> None:
    channels, components, _ = both(kept)
    assert channels.shape == (400, CHANNELS) and components.shape == (400, kept)
    i, j = torch.arange(400), torch.arange(400).roll(7)
    distance = (channels[i] - channels[j]).square().mean(-1)
    torch.testing.assert_close((components[i] - components[j]).square().mean(-1), distance, rtol=2e-3, atol=1e-5)
    assert distance.max() > 0.5
    cosines = F.cosine_similarity(channels[i], channels[j], dim=-1)
    torch.testing.assert_close(F.cosine_similarity(components[i], components[j], dim=-1), cosines, rtol=0, atol=2e-3)
    assert cosines.min() < -0.5 < 0.5 < cosines.max()


def test_the_loss_of_a_translation_is_that_of_its_part_among_the_kept_axes() -> None:
    channels, components, calibration = both()
    guess = torch.randn(400, CHANNELS, generator=torch.Generator().manual_seed(1))
    axes, _ = calibration.components(KEPT)
    inside = guess @ torch.from_numpy(axes).T
    outside = guess - inside @ torch.from_numpy(axes)
    whole = (guess - channels).square().mean()
    mine = (inside * (KEPT / CHANNELS) ** 0.5 - components).square().mean()
    torch.testing.assert_close(mine + outside.square().mean(), whole, rtol=1e-3, atol=0)


def test_components_of_all_axes_have_the_mean_square_of_standardised_channels() -> None:
    _, components, _ = both(CHANNELS)
    assert components.square().mean().item() == pytest.approx(1, abs=0.02)
    _, few, _ = both(2)
    assert few.square().mean().item() < 1


def test_a_codec_that_stores_channels_has_no_components() -> None:
    for encoding in (EncodingSpec(), EncodingSpec(codec="int8")):
        calibration = pca()[1] if encoding.codec == "int8" else None
        codec = load_codec(encoding, CHANNELS, calibration)
        assert codec.component_std is None
        with pytest.raises(ValueError, match="stores channels"):
            DeviceDecoder.of_components(codec)
