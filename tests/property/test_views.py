"""Geometry by painting: coordinates painted into a tile are recovered through every orientation, view and crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, ViewSpec
from rsmtdf_cache.views import (
    ORIENTATION_SETS,
    Box,
    base_size_px,
    inverse_orientation,
    lattice_px,
    orient,
    orient_point,
    token_box,
    view_specs,
)
from tests.teachers import MeanTeacher

SIDE = 96


def painted(side: int = SIDE) -> np.ndarray:
    """Return a tile ``[side, side, 3]`` whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[0:side, 0:side].astype(np.uint8)
    return np.stack([rows, columns, np.zeros_like(rows)], -1)


def spec(size_px: int, orientation: int, layer: str) -> FeatureSpec:
    teacher = MeanTeacher()
    return FeatureSpec(
        teacher=teacher.spec, layer=teacher.layer_specs([layer], size_px)[0], encoding=EncodingSpec(), tile_px=SIDE,
        view=ViewSpec(size_px=size_px, orientation=orientation), grid=teacher.grid(layer, size_px),
    )  # fmt: skip


@given(st.integers(0, 7), st.integers(0, SIDE - 1), st.integers(0, SIDE - 1))
def test_a_pixel_is_found_where_orient_point_says(orientation: int, row: int, column: int) -> None:
    y, x = orient_point(row + 0.5, column + 0.5, SIDE, orientation)
    assert orient(painted(), orientation)[int(y), int(x)].tolist() == [row, column, 0]


@given(st.integers(0, 7))
def test_the_inverse_orientation_undoes_it(orientation: int) -> None:
    back = orient(orient(painted(), orientation), inverse_orientation(orientation))
    np.testing.assert_array_equal(back, painted())


def test_the_eight_orientations_differ_and_every_stored_set_is_a_group() -> None:
    tiles = [orient(painted(), o).tobytes() for o in range(8)]
    assert len(set(tiles)) == 8
    for size, members in ORIENTATION_SETS.items():
        assert len(members) == size
        for a in members:
            for b in members:
                assert tiles.index(orient(orient(painted(), a), b).tobytes()) in members


@given(st.integers(0, 7), st.sampled_from([48, 96, 192]), st.sampled_from(["mean8", "mean16"]), st.data())
def test_token_centres_tell_where_a_token_of_any_crop_lies_in_the_tile(
    orientation: int, size_px: int, layer: str, data: st.DataObject
) -> None:
    here = spec(size_px, orientation, layer)
    tile = torch.from_numpy(orient(painted(), orientation).copy())[None]
    maps = MeanTeacher().encode(tile, size_px, [layer])[layer][0].numpy()
    cells = here.grid[0]
    y, x = data.draw(st.integers(0, cells - 1)), data.draw(st.integers(0, cells - 1))
    height, width = data.draw(st.integers(1, cells - y)), data.draw(st.integers(1, cells - x))
    stride = here.stride_tile_px
    crop = token_box(here, Box(*(int(v * stride) for v in (y, x, height, width))))
    assert (crop.y, crop.x, crop.height, crop.width) == (y, x, height, width)
    for i, j in ((y, x), (y + height - 1, x + width - 1)):
        if 0 < i < cells - 1 and 0 < j < cells - 1:  # at the border the antialiasing kernel is cut, centres shift
            centre = here.offset_tile_px + stride * i, here.offset_tile_px + stride * j
            row, column = orient_point(*centre, SIDE, inverse_orientation(orientation))
            assert abs(maps[i, j, 0] - (row - 0.5)) < 0.02 and abs(maps[i, j, 1] - (column - 0.5)) < 0.02


@pytest.mark.parametrize(
    ("patch", "native", "tile", "side"),
    [(14, 518, 512, 448), (14, 224, 512, 224), (14, 518, 256, 224), (14, 224, 256, 224), (32, 4096, 256, 256)],
)
def test_scale_one_is_on_the_dyadic_lattice_nearest_to_the_training_size(
    patch: int, native: int, tile: int, side: int
) -> None:
    teacher = MeanTeacher().spec.model_copy(update={"patch_px": patch, "native_px": native})
    assert base_size_px(teacher, tile) == side


def test_one_lattice_serves_all_default_views() -> None:
    sizes = {("dino", 14, 518), ("clip", 14, 224), ("cnn", 32, 4096)}
    specs = []
    for name, patch, native in sizes:
        teacher = MeanTeacher(name).spec.model_copy(update={"patch_px": patch, "native_px": native})
        for view in view_specs(teacher, 512, (1.0, 0.5), 1):
            layer = MeanTeacher().layer_specs(["mean16"], 512)[0].model_copy(update={"stride_px": patch})
            cells = view.size_px // patch
            specs.append(
                FeatureSpec(
                    teacher=teacher, layer=layer, view=view, encoding=EncodingSpec(), tile_px=512, grid=(cells, cells)
                )
            )
    assert lattice_px(specs) == 64


@pytest.mark.parametrize(
    ("scales", "orientations"),
    [((0.3,), 1), ((1.0, 1.0), 1), ((1.0,), 3), ((0.0,), 1), ((float("nan"),), 1), ((float("inf"),), 1), ((-1.0,), 1)],
)
def test_views_that_make_no_sense_are_refused(scales: tuple[float, ...], orientations: int) -> None:
    with pytest.raises(UsageError):
        view_specs(MeanTeacher().spec, 96, scales, orientations)


def test_the_scales_that_a_refusal_names_work() -> None:
    with pytest.raises(UsageError, match="can have the scales 1, 2 "):
        view_specs(MeanTeacher().spec.model_copy(update={"patch_px": 32}), 48, (0.5,), 1)
    assert view_specs(MeanTeacher().spec.model_copy(update={"patch_px": 32}), 48, (1.0, 2.0), 1)
