"""Fixed views: the same numbers for ever, sensible crops, and coordinates that are recovered through each of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmtdf_cache import photometry
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.fixed_views import FixedView, describe_view, draw, draw_fixed_view, fixed_views
from rsmtdf_cache.photometry import photometric
from rsmtdf_cache.specs import CropSpec, EncodingSpec, FeatureSpec, PhotometrySpec, ViewSpec
from rsmtdf_cache.views import inverse_orientation, orient, orient_point, render
from rsmtdf_train.photometry import PhotometricParameters, Photometry
from tests.datasets import make_tile
from tests.teachers import MeanTeacher

SIDE = 96

#: (orientation, y, x, side) and colours of the first four views of seed 7, for tiles of 512 px.
GOLDEN_GEOMETRY = [(7, 101, 140, 320), (7, 6, 37, 448), (2, 62, 31, 448), (4, 5, 6, 480)]
GOLDEN_COLOURS = [
    {"brightness": 0.719, "contrast": 0.938, "saturation": 0.826, "hue": -0.024, "grey": False, "blur_px": 1.51},
    {"brightness": 1.175, "contrast": 0.821, "saturation": 0.911, "hue": 0.038, "grey": False, "blur_px": 0.0},
    {"brightness": 0.914, "contrast": 1.005, "saturation": 1.027, "hue": -0.088, "grey": False, "blur_px": 0.0},
    {"brightness": 1.159, "contrast": 0.996, "saturation": 1.176, "hue": 0.075, "grey": False, "blur_px": 0.0},
]
GOLDEN_NAME = "s512o7-608cb1eb"


def painted() -> np.ndarray:
    """Return a tile whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(np.uint8)
    return np.stack([rows, columns, np.zeros_like(rows)], -1)


PHOTOMETRY = st.builds(
    PhotometrySpec, brightness=st.floats(0.5, 1.5), contrast=st.floats(0.5, 1.5), saturation=st.floats(0, 1.5),
    hue=st.floats(-0.5, 0.5), grey=st.booleans(), blur_px=st.sampled_from([0.0, 0.5, 2.0]),
)  # fmt: skip
CROPS = st.integers(8, SIDE).flatmap(
    lambda side: st.builds(
        CropSpec, y=st.integers(0, SIDE - side), x=st.integers(0, SIDE - side), side_px=st.just(side)
    )
)


def test_the_views_of_a_seed_are_these_numbers_today_and_next_year() -> None:
    assert draw(7, 0, "side") == 0.3621866157755713
    found = [draw_fixed_view(7, k, 512) for k in range(4)]
    assert [(f.orientation, f.crop.y, f.crop.x, f.crop.side_px) for f in found] == GOLDEN_GEOMETRY
    assert [f.photometry.model_dump() for f in found if f.photometry] == GOLDEN_COLOURS
    assert fixed_views(MeanTeacher().spec, 512, 1, 7)[0].name == GOLDEN_NAME


@given(st.integers(0, 2**63), st.integers(1, 6), st.sampled_from([16, 48, 96, 100, 256, 512, 6000, 6016]))
@settings(max_examples=50)
def test_views_depend_on_seed_and_number_alone_and_stay_in_the_tile(seed: int, count: int, tile_px: int) -> None:
    wide = MeanTeacher().spec
    narrow = wide.model_copy(update={"name": "other", "patch_px": 14, "native_px": 224})
    views = fixed_views(wide, tile_px, count, seed)
    assert views == fixed_views(wide, tile_px, 8, seed)[:count]
    shown = [FixedView.of(v) for v in views]
    assert shown == [FixedView.of(v) for v in fixed_views(narrow, tile_px, count, seed)]
    for view in views:
        assert not view.is_whole and view.crop is not None
        assert 0.4 * tile_px <= view.crop.side_px <= tile_px
        assert max(view.crop.y, view.crop.x) + view.crop.side_px <= tile_px
        assert view.crop.side_px % math.gcd(tile_px, 32) == 0
        assert ViewSpec.from_json(view.to_json()) == view


def test_seeds_and_views_differ_and_every_parameter_varies() -> None:
    views = [draw_fixed_view(seed, k, 512) for seed in range(8) for k in range(8)]
    assert len(set(views)) == 64
    assert {v.orientation for v in views} == set(range(8))
    assert len({v.crop.side_px for v in views}) == 10  # 224, 256, ..., 512
    changes = [v.photometry.model_dump() for v in views if v.photometry]
    assert all(len({c[name] for c in changes}) > 1 for name in changes[0])
    assert {c["blur_px"] == 0 for c in changes} == {True, False}


@pytest.mark.parametrize("count", [-1, 1025])
def test_counts_that_make_no_sense_are_refused(count: int) -> None:
    with pytest.raises(UsageError, match="fixed-views"):
        fixed_views(MeanTeacher().spec, 512, count, 0)


def test_people_are_told_what_a_view_shows() -> None:
    view = ViewSpec(
        size_px=64, orientation=1, crop=CropSpec(y=3, x=4, side_px=32),
        photometry=PhotometrySpec(brightness=1.25, grey=True, blur_px=0.5),
    )  # fmt: skip
    assert describe_view(view) == "32 px at (3, 4), rot90, brightness 1.25, grey, blur 0.5, shown at 64 px"


@given(st.integers(0, 7), CROPS)
def test_a_view_without_colours_is_a_cut_of_the_turned_tile(orientation: int, crop: CropSpec) -> None:
    shown = render(painted(), ViewSpec(size_px=SIDE, orientation=orientation, crop=crop))
    assert shown.shape == (crop.side_px, crop.side_px, 3) and shown.flags.c_contiguous
    expected = orient(painted(), orientation)[crop.y :, crop.x :][: crop.side_px, : crop.side_px]
    np.testing.assert_array_equal(shown, expected)


def test_a_crop_that_leaves_the_tile_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves the tile"):
        render(painted(), ViewSpec(size_px=64, orientation=0, crop=CropSpec(y=0, x=65, side_px=32)))


@given(st.integers(0, 7), CROPS, st.sampled_from([48, 96, 192]), st.sampled_from(["mean8", "mean16"]))
@settings(max_examples=60)
def test_painted_coordinates_are_recovered_through_every_crop(
    orientation: int, crop: CropSpec, size_px: int, layer: str
) -> None:
    teacher = MeanTeacher()
    view = ViewSpec(size_px=size_px, orientation=orientation, crop=crop)
    spec = FeatureSpec(
        teacher=teacher.spec, layer=teacher.layer_specs([layer], size_px)[0], view=view, encoding=EncodingSpec(),
        tile_px=SIDE, grid=teacher.grid(layer, size_px),
    )  # fmt: skip
    maps = teacher.encode(torch.from_numpy(render(painted(), view))[None], size_px, [layer])[layer][0].numpy()
    top, left = spec.origin_tile_px
    reach = max(1.0, crop.side_px / size_px) + spec.stride_tile_px / 2  # nearer to the border, kernels are cut
    centres = [spec.offset_tile_px + spec.stride_tile_px * i for i in range(spec.grid[0])]
    for i, j in itertools.product(range(spec.grid[0]), repeat=2):
        if reach <= min(centres[i], centres[j]) and max(centres[i], centres[j]) <= crop.side_px - reach:
            y, x = top + centres[i], left + centres[j]
            row, column = orient_point(y, x, SIDE, inverse_orientation(orientation))
            assert abs(maps[i, j, 0] - (row - 0.5)) < 0.03 and abs(maps[i, j, 1] - (column - 0.5)) < 0.03


def test_a_change_of_nothing_changes_nothing() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    np.testing.assert_array_equal(photometric(tile, PhotometrySpec()), tile)


@given(PHOTOMETRY)
@settings(max_examples=40, deadline=None)
def test_colours_are_those_of_the_trainers_strong_view(change: PhotometrySpec) -> None:
    tile = make_tile(1, 48)[0]
    same = PhotometricParameters(
        change.brightness, change.contrast, change.saturation, change.hue, (0, 1, 2, 3), change.grey, change.blur_px
    )
    image = torch.from_numpy(tile).permute(2, 0, 1).float()[None] / 255
    expected = Photometry([same]).apply(image)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(photometric(tile, change).astype(np.float64) - expected).max() <= 0.51


@given(PHOTOMETRY, st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_colours_do_not_depend_on_the_frame(change: PhotometrySpec, orientation: int) -> None:
    tile = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    turned = photometric(np.ascontiguousarray(orient(tile, orientation)), change)
    # Blurring rows, then columns, rounds otherwise than columns, then rows.
    assert np.abs(orient(photometric(tile, change), orientation).astype(int) - turned).max() <= 1


@pytest.mark.parametrize("rows", [7, 64, 4096])
def test_bands_of_any_height_give_the_same_bytes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tile = make_tile(2, 96)[0]
    change = PhotometrySpec(brightness=1.3, contrast=0.7, saturation=1.4, hue=0.1, blur_px=1.7)
    expected = photometric(tile, change)
    monkeypatch.setattr(photometry, "_BAND_ROWS", rows)
    np.testing.assert_array_equal(photometric(tile, change), expected)
