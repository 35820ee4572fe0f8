"""Photometry: parameters are values, and applying them moves no pixel and leaves the range of the input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as tv

from rsmtdf_train.augment import NO_PHOTOMETRY, PhotometricParameters, draw_photometric, photometric, shift_hue
from rsmtdf_train.sections import AugmentConfig


def image(side: int = 24) -> torch.Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_the_strong_view_keeps_shape_and_range_and_repeats_exactly(seed: int) -> None:
    parameters = draw_photometric(np.random.default_rng(seed), AugmentConfig())
    source = image()
    strong = photometric(source, parameters)
    assert strong.shape == source.shape and strong.dtype == torch.float32
    assert float(strong.min()) >= 0 and float(strong.max()) <= 1
    assert torch.equal(strong, photometric(source, parameters))
    assert torch.equal(source, image()), "the weak view was changed in place"


def test_neutral_parameters_change_nothing() -> None:
    assert torch.equal(photometric(image(), NO_PHOTOMETRY), image())
    off = AugmentConfig(jitter_p=0, gray_p=0, blur_p=0)
    assert torch.equal(photometric(image(), draw_photometric(np.random.default_rng(1), off)), image())


@pytest.mark.parametrize(
    "parameters",
    [
        PhotometricParameters(brightness=0.6),
        PhotometricParameters(contrast=1.4),
        PhotometricParameters(saturation=0.3),
        PhotometricParameters(hue=0.2),
        PhotometricParameters(gray=True),
        PhotometricParameters(blur_sigma_px=1.5),
    ],
)
def test_each_parameter_alone_changes_the_image(parameters: PhotometricParameters) -> None:
    assert float((photometric(image(), parameters) - image()).abs().max()) > 0.02


def test_grey_has_equal_channels_and_blur_lowers_the_variance_but_not_the_mean() -> None:
    gray = photometric(image(), PhotometricParameters(gray=True))
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    blurred = photometric(image(), PhotometricParameters(blur_sigma_px=2.0))
    assert float(blurred.var()) < 0.2 * float(image().var())
    assert float((blurred.mean() - image().mean()).abs()) < 0.02


def test_blur_is_centred() -> None:
    point = torch.zeros(3, 33, 33)
    point[:, 16, 16] = 1
    blurred = photometric(point, PhotometricParameters(blur_sigma_px=1.3))[0]
    ys, xs = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")
    assert float((blurred * ys).sum() / blurred.sum()) == pytest.approx(16, abs=1e-4)
    assert float((blurred * xs).sum() / blurred.sum()) == pytest.approx(16, abs=1e-4)
    variance = float((blurred * (ys - 16) ** 2).sum() / blurred.sum())
    assert variance == pytest.approx(1.3**2, rel=0.05)


def test_order_of_the_jitter_counts() -> None:
    a = PhotometricParameters(brightness=1.5, contrast=0.5, order=(0, 1, 2, 3))
    b = PhotometricParameters(brightness=1.5, contrast=0.5, order=(1, 0, 2, 3))
    assert not torch.allclose(photometric(image(), a), photometric(image(), b))


def test_drawn_parameters_have_the_ranges_and_rates_of_the_recipe() -> None:
    config = AugmentConfig(jitter=0.4, jitter_p=0.8, gray_p=0.2, blur_p=0.5)
    drawn = [draw_photometric(np.random.default_rng(i), config) for i in range(2000)]
    jittered = [d for d in drawn if d.brightness != 1]
    for name in ("brightness", "contrast", "saturation"):
        values = [getattr(d, name) for d in jittered]
        assert 0.6 <= min(values) < 0.62 and 1.38 < max(values) <= 1.4
    assert -0.2 <= min(d.hue for d in jittered) < -0.19 and 0.19 < max(d.hue for d in jittered) <= 0.2
    assert 0.77 < len(jittered) / 2000 < 0.83
    assert 0.17 < sum(d.gray for d in drawn) / 2000 < 0.23
    sigmas = [d.blur_sigma_px for d in drawn if d.blur_sigma_px]
    assert 0.46 < len(sigmas) / 2000 < 0.54 and min(sigmas) >= 0.1 and max(sigmas) <= 2.0
    assert {d.order[0] for d in drawn} == {0, 1, 2, 3}


def test_changing_one_probability_changes_no_other_draw() -> None:
    for seed in range(50):
        a = draw_photometric(np.random.default_rng(seed), AugmentConfig())
        b = draw_photometric(np.random.default_rng(seed), AugmentConfig(gray_p=1.0))
        assert (a.brightness, a.hue, a.order, a.blur_sigma_px) == (b.brightness, b.hue, b.order, b.blur_sigma_px)
        assert b.gray


@given(st.floats(-0.5, 0.5))
@settings(max_examples=40, deadline=None)
def test_the_hue_shift_has_the_values_of_torchvision(turns: float) -> None:
    primary = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0.3, 0.3, 0.3]])
    for source in (image(), primary.T[:, None, :].contiguous()):
        torch.testing.assert_close(shift_hue(source, turns), tv.adjust_hue(source, turns), atol=1e-5, rtol=0)


def test_a_crop_smaller_than_the_blur_kernel_is_blurred_too() -> None:
    assert photometric(image(4), PhotometricParameters(blur_sigma_px=2.0)).shape == (3, 4, 4)
