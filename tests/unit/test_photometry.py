"""Photometry: parameters are values; a batch of them has torchvision's values, row by row, and moves no pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from rsmtdf_train.photometry import NO_PHOTOMETRY, PhotometricParameters, Photometry, draw_photometric
from rsmtdf_train.sections import AugmentConfig

FACTORS = st.one_of(st.just(1.0), st.floats(0.0, 2.0))
PARAMETERS = st.builds(
    PhotometricParameters,
    brightness=FACTORS,
    contrast=FACTORS,
    saturation=FACTORS,
    hue=st.one_of(st.just(0.0), st.floats(-0.5, 0.5)),
    order=st.permutations(range(4)).map(tuple),
    gray=st.booleans(),
    blur_sigma_px=st.one_of(st.just(0.0), st.floats(0.1, 2.5)),
)


def images(count: int, height: int = 24, width: int | None = None, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def image(side: int = 24) -> Tensor:
    return images(1, side)[0]


def strong(image_3HW: Tensor, parameters: PhotometricParameters) -> Tensor:
    return Photometry([parameters]).apply(image_3HW[None])[0]


def by_torchvision(image_3HW: Tensor, parameters: PhotometricParameters) -> Tensor:
    """The same view of one image, one operation of torchvision after the other."""
    factors = (parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue)
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    x = image_3HW
    for operation in parameters.order:
        x = operations[operation](x, factors[operation])
    if parameters.gray:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    if sigma := parameters.blur_sigma_px:
        radius = min(math.ceil(3 * sigma), min(x.shape[-2:]) - 1)
        x = tv.gaussian_blur(x, [2 * radius + 1, 2 * radius + 1], [sigma, sigma])
    return x


@given(st.lists(PARAMETERS, min_size=1, max_size=6), st.integers(0, 2**32), st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_batch_has_the_values_of_torchvision_image_by_image(
    drawn: list[PhotometricParameters], seed: int, together: bool
) -> None:
    source = images(len(drawn), 14, 17, seed)
    source[0, :, :2] = 0.25  # no colour: hue and saturation have nothing to hold on to
    expected = torch.stack([by_torchvision(x, p) for x, p in zip(source, drawn, strict=True)])
    torch.testing.assert_close(Photometry(drawn).apply(source, together), expected, atol=1e-5, rtol=0)


@given(st.lists(PARAMETERS, min_size=2, max_size=5), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_depends_on_its_own_image_and_parameters_alone(
    drawn: list[PhotometricParameters], together: bool, data: st.DataObject
) -> None:
    source = images(len(drawn), 12)
    whole = Photometry(drawn).apply(source, together)
    some = data.draw(st.lists(st.integers(0, len(drawn) - 1), min_size=1, max_size=7))
    part = Photometry([drawn[i] for i in some]).apply(source[some], together)
    torch.testing.assert_close(part, whole[some], atol=2e-6, rtol=0)
    if not together:
        assert torch.equal(part, whole[some])


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_the_strong_view_keeps_shape_and_range_and_repeats_exactly(seed: int) -> None:
    drawn = [draw_photometric(np.random.default_rng([seed, i]), AugmentConfig()) for i in range(3)]
    source = images(3)
    view = Photometry(drawn).apply(source)
    assert view.shape == source.shape and view.dtype == torch.float32
    assert float(view.min()) >= 0 and float(view.max()) <= 1
    assert torch.equal(view, Photometry(drawn).apply(source))
    assert torch.equal(source, images(3)), "the weak view was changed in place"
    layout = Photometry(drawn).apply(source.contiguous(memory_format=torch.channels_last))
    assert torch.equal(view, layout), "the memory format of the images changed values"


def test_neutral_parameters_change_nothing_beside_others_that_do() -> None:
    off = AugmentConfig(jitter_p=0, gray_p=0, blur_p=0)
    drawn = [NO_PHOTOMETRY, PhotometricParameters(0.5, 0.6, 0.7, 0.1, gray=True, blur_sigma_px=2.0)]
    drawn.append(draw_photometric(np.random.default_rng(1), off))
    for together in (True, False):
        view = Photometry(drawn).apply(images(3), together)
        assert torch.equal(view[[0, 2]], images(3)[[0, 2]])
        assert not torch.equal(view[1], images(3)[1])
    assert torch.equal(Photometry([NO_PHOTOMETRY] * 3).apply(images(3)), images(3))


def test_parameters_of_another_number_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images and parameters of 2"):
        Photometry([NO_PHOTOMETRY] * 2).apply(images(3))


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
    assert float((strong(image(), parameters) - image()).abs().max()) > 0.02


def test_grey_has_equal_channels_and_blur_lowers_the_variance_but_not_the_mean() -> None:
    gray = strong(image(), PhotometricParameters(gray=True))
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    blurred = strong(image(), PhotometricParameters(blur_sigma_px=2.0))
    assert float(blurred.var()) < 0.2 * float(image().var())
    assert float((blurred.mean() - image().mean()).abs()) < 0.02


def test_blur_is_centred() -> None:
    point = torch.zeros(3, 33, 33)
    point[:, 16, 16] = 1
    blurred = strong(point, PhotometricParameters(blur_sigma_px=1.3))[0]
    ys, xs = torch.meshgrid(torch.arange(33.0), torch.arange(33.0), indexing="ij")
    assert float((blurred * ys).sum() / blurred.sum()) == pytest.approx(16, abs=1e-4)
    assert float((blurred * xs).sum() / blurred.sum()) == pytest.approx(16, abs=1e-4)
    variance = float((blurred * (ys - 16) ** 2).sum() / blurred.sum())
    assert variance == pytest.approx(1.3**2, rel=0.05)


def test_order_of_the_jitter_counts() -> None:
    a = PhotometricParameters(brightness=1.5, contrast=0.5, order=(0, 1, 2, 3))
    b = PhotometricParameters(brightness=1.5, contrast=0.5, order=(1, 0, 2, 3))
    assert not torch.allclose(strong(image(), a), strong(image(), b))


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
        shifted = strong(source, PhotometricParameters(hue=turns))
        torch.testing.assert_close(shifted, tv.adjust_hue(source, turns), atol=1e-5, rtol=0)


def test_a_crop_smaller_than_the_blur_kernel_is_blurred_too() -> None:
    assert strong(image(4), PhotometricParameters(blur_sigma_px=2.0)).shape == (3, 4, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_the_same_values_and_waits_for_nothing() -> None:
    drawn = [draw_photometric(np.random.default_rng(i), AugmentConfig()) for i in range(16)]
    source = images(16, 64)
    on_gpu, photometry = source.cuda(), Photometry(drawn)
    photometry.to("cuda").apply(on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        view = photometry.to("cuda").apply(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(view.cpu(), photometry.apply(source), atol=1e-5, rtol=0)
