"""Cuts by painting: coordinates painted into a tile are recovered through native crops, fixed views and lattice crops.

Red is the row of a pixel, green its column; two label maps say the same. So a crop of any geometry tells where each of
its pixels came from, and that must be where its centre lies.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.fixed_views import draw_fixed_view
from rsmtdf_cache.views import inverse_orientation, orient_point
from rsmtdf_train.geometry import CropGeometry, Cut, FixedViewGeometry, Geometry, NativeGeometry
from rsmtdf_train.sampler import UNLABELED, Stream
from rsmtdf_train.sections import AugmentConfig

IGNORE = 255


def painted(side: int) -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:side, 0:side].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 77)], -1)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def assert_shows_its_place(geometry: CropGeometry, cut: Cut) -> None:
    tile_px, crop_px = geometry.tile_px, geometry.crop_px
    tile = painted(tile_px)
    image, valid = cut.image(tile, crop_px), cut.valid(tile_px, crop_px)
    labels = [cut.label(np.ascontiguousarray(tile[..., k]), crop_px, IGNORE) for k in (0, 1)]
    assert image.shape == (crop_px, crop_px, 3) and image.dtype == np.uint8
    assert valid.shape == (crop_px, crop_px) and valid.dtype == np.bool_
    assert all(m.shape == (crop_px, crop_px) and m.dtype == np.uint8 for m in labels)

    zoom = tile_px / (cut.scaled_px or tile_px)
    step = cut.box.height / crop_px * zoom  # tile pixels from one pixel of the crop to the next
    first = (cut.box.y * zoom + step / 2, cut.box.x * zoom + step / 2)
    ys, xs = (np.arange(crop_px) * step + start for start in first)  # centres, in the turned tile
    in_y, in_x = ((v > 0) & (v < tile_px) for v in (ys, xs))
    np.testing.assert_array_equal(valid, in_y[:, None] & in_x)
    assert not image[~valid].any() and all((m[~valid] == IGNORE).all() for m in labels)

    # Nearer to a border, what a kernel would see beyond it is missing; those of a view end where it was cut.
    reach = max(1.0, step)
    low, high = ((0, 0), (tile_px, tile_px))
    if cut.scaled_px is None:
        low, high = ((cut.box.y, cut.box.x), (cut.box.y + cut.box.height, cut.box.x + cut.box.width))
    far = [(v >= a + reach) & (v <= b - reach) for v, a, b in zip((ys, xs), low, high, strict=True)]
    inner = far[0][:, None] & far[1]
    grid = np.meshgrid(ys, xs, indexing="ij")
    where = orient_point(grid[0], grid[1], tile_px, inverse_orientation(cut.orientation))
    for k in (0, 1):
        place, label = np.asarray(where[k]), labels[k].astype(int)
        # A centre on the edge of two pixels belongs to either: the tile may be turned.
        assert (np.abs(label + 0.5 - place)[valid] <= 0.5 + 1e-9).all()
        assert (np.abs(image[..., k] + 0.5 - place)[inner] <= 0.5 + 0.01).all()
    assert (image[..., 2][valid] == 77).all()


SCALES = st.sampled_from([(0.5, 2.0), (0.2, 0.6), (1.0, 1.0), (1.5, 3.0)])


@given(st.integers(9, 60), st.integers(4, 48), SCALES, st.integers(0, 2**40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_painted_coordinates_are_recovered_through_native_crops(
    tile_px: int, crop_px: int, scale: tuple[float, float], seed: int, turn: bool
) -> None:
    geometry = NativeGeometry(tile_px, crop_px, scale)
    assert_shows_its_place(geometry, geometry.draw(rng(seed), turn))


@given(st.integers(0, 2**40), st.integers(0, 7), st.sampled_from([17, 32, 64, 90]), st.sampled_from([60, 64, 96]))
@settings(max_examples=60, deadline=None)
def test_painted_coordinates_are_recovered_through_fixed_views(
    seed: int, view: int, crop_px: int, tile_px: int
) -> None:
    geometry = FixedViewGeometry(tile_px, crop_px, (draw_fixed_view(seed, view, tile_px),))
    assert_shows_its_place(geometry, geometry.draw(rng(seed)))


@given(st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_painted_coordinates_are_recovered_through_crops_on_the_lattice(seed: int) -> None:
    geometry = Geometry(64, 32, 16)
    assert_shows_its_place(geometry, geometry.draw(rng(seed)))


@given(st.integers(8, 70), st.integers(4, 60), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_native_crops_are_those_of_the_released_order_of_steps(tile_px: int, crop_px: int, seed: int) -> None:
    """Resize the whole tile, pad to the right and below, crop, mirror the crop."""
    tile = rng(seed + 1).integers(0, 256, (tile_px, tile_px, 3), np.uint8)
    geometry = NativeGeometry(tile_px, crop_px)
    cut, plain = geometry.draw(rng(seed)), geometry.draw(rng(seed), turn=False)
    assert plain.scaled_px is not None and plain.scaled_px == cut.scaled_px and plain.orientation == 0
    side = max(plain.scaled_px, crop_px)
    assert 0 <= plain.box.y <= side - crop_px and 0 <= plain.box.x <= side - crop_px
    canvas = np.zeros((side, side, 3), np.uint8)
    resized = Image.fromarray(tile).resize((plain.scaled_px, plain.scaled_px), Image.Resampling.BILINEAR)
    canvas[: plain.scaled_px, : plain.scaled_px] = np.asarray(resized)
    expected = canvas[plain.box.y :, plain.box.x :][:crop_px, :crop_px]
    for drawn in (plain, cut):
        if drawn.orientation == 4:
            expected = expected[:, ::-1]
        # The same sums from other places round the other way where they tie: once along rows, once along columns.
        assert np.abs(drawn.image(tile, crop_px).astype(int) - expected).max() <= 2
        height, width = (min(crop_px, plain.scaled_px - start) for start in (plain.box.y, plain.box.x))
        unpadded = drawn.valid(tile_px, crop_px)[:, :: -1 if drawn.orientation == 4 else 1]
        assert unpadded[:height, :width].all() and unpadded.sum() == height * width


def test_native_crops_have_every_side_and_place_and_are_mirrored_as_often_as_not() -> None:
    geometry = NativeGeometry(16, 12, (0.5, 1.5))
    draws = [geometry.draw(rng(seed)) for seed in range(3000)]
    assert {d.scaled_px for d in draws} == set(range(8, 25))
    assert {d.orientation for d in draws} == {0, 4}
    assert 0.45 < sum(d.orientation == 4 for d in draws) / len(draws) < 0.55
    largest = {(d.box.y, d.box.x) for d in draws if d.scaled_px == 24}
    assert {y for y, _ in largest} == {x for _, x in largest} == set(range(13))
    padded = [d for d in draws if (d.scaled_px or 0) < 12]
    assert {(d.box.y, d.box.x) for d in padded if d.orientation == 0} == {(0, 0)}


def test_a_crop_may_be_larger_than_its_tile() -> None:
    cut = NativeGeometry(32, 40, (1.0, 1.0)).draw(rng(0), turn=False)
    image = cut.image(painted(32), 40)
    np.testing.assert_array_equal(image[:32, :32], painted(32))
    assert not image[32:].any() and not image[:, 32:].any()


def test_every_fixed_view_is_drawn_and_no_other() -> None:
    views = tuple(draw_fixed_view(3, k, 96) for k in range(5))
    geometry = FixedViewGeometry(96, 48, views)
    draws = [geometry.draw(rng(seed)) for seed in range(500)]
    counts = np.bincount([d.view for d in draws if d.view is not None], minlength=5)
    assert counts.sum() == 500 and counts.min() > 60
    for d in draws:
        assert d.view is not None and d.scaled_px is None
        view = views[d.view]
        assert (d.orientation, d.box.y, d.box.x) == (view.orientation, view.crop.y, view.crop.x)
        assert d.box.height == d.box.width == view.crop.side_px


def test_a_geometry_without_views_is_refused() -> None:
    with pytest.raises(UsageError, match="fixed view"):
        FixedViewGeometry(96, 48, ())


GEOMETRIES = (
    Geometry(96, 32),
    NativeGeometry(96, 32),
    FixedViewGeometry(96, 32, tuple(draw_fixed_view(0, k, 96) for k in range(4))),
)


def stream(geometry: CropGeometry, seed: int) -> Stream:
    return Stream([f"t{i}" for i in range(7)], UNLABELED, seed, geometry, AugmentConfig())


@given(st.sampled_from(GEOMETRIES), st.integers(0, 2**40), st.permutations(range(20)))
@settings(max_examples=20, deadline=None)
def test_draws_are_the_same_whenever_and_in_whatever_order_they_are_asked_for(
    geometry: CropGeometry, seed: int, order: list[int]
) -> None:
    one, other = stream(geometry, seed), stream(geometry, seed)
    ahead = {position: one.draw(position) for position in order}
    assert [ahead[i] for i in range(20)] == [other.draw(i) for i in range(20)]
    assert len({draw.cut for draw in ahead.values()}) > 1
    assert [d.cut for d in ahead.values()] != [stream(geometry, seed + 1).draw(i).cut for i in order]


def test_geometries_share_tiles_photometry_and_cutmix() -> None:
    draws = [[stream(geometry, 5).draw(i) for i in range(20)] for geometry in GEOMETRIES]
    for other in draws[1:]:
        for a, b in zip(draws[0], other, strict=True):
            assert (a.tile_id, a.photometric, a.cutmix_box) == (b.tile_id, b.photometric, b.cutmix_box)
            assert a.cut != b.cut
