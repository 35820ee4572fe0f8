"""Views in windows: weights add up, a local teacher sees no difference, coordinates come back, seams do not show."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rsmtdf_cache.encode import encode_batch
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.specs import EncodingSpec, FeatureSpec, NumericsProfile, PixelSpec, ViewSpec, WindowSpec
from rsmtdf_cache.teachers import load
from rsmtdf_cache.teachers.base import TeacherRequest
from rsmtdf_cache.views import inverse_orientation, orient_point, render
from rsmtdf_cache.windows import (
    encode_bands,
    map_layers,
    resize_part,
    window_origins,
    window_weights,
    with_windows,
)
from tests.datasets import make_tile
from tests.teachers import MeanTeacher

#: Sides in units of 16 px: view, window, overlap.
CUTS = st.tuples(st.integers(2, 30), st.integers(1, 8), st.integers(0, 7)).filter(lambda c: c[2] < c[1] <= c[0])


def profile(micro_batch: int = 4) -> NumericsProfile:
    return NumericsProfile(
        device="cpu", precision="float32", torch=torch.__version__, threads=1, micro_batch=micro_batch
    )


def in_windows(view: ViewSpec, side_px: int, overlap_px: int) -> ViewSpec:
    return view.model_copy(update={"windows": WindowSpec(side_px=side_px, overlap_px=overlap_px)})


@given(CUTS, st.sampled_from([8, 16]))
def test_windows_cover_the_view_and_their_weights_add_up_to_one(cut: tuple[int, int, int], stride: int) -> None:
    size, side, overlap = (16 * n for n in cut)
    windows = WindowSpec(side_px=side, overlap_px=overlap)
    origins = window_origins(size, windows)
    assert origins[0] == 0 and origins[-1] + side == size and all(o % 16 == 0 for o in origins)
    assert all(0 < b - a <= side - overlap for a, b in itertools.pairwise(origins))
    weights = window_weights(size, windows, stride)
    total, count = np.zeros(size // stride), np.zeros(size // stride, int)
    for origin, row in zip(origins, weights, strict=True):
        assert (row >= 0).all()
        total[origin // stride :][: len(row)] += row
        count[origin // stride :][: len(row)] += 1
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    for origin, row in zip(origins, weights, strict=True):
        alone = count[origin // stride :][: len(row)] == 1
        assert (row[alone] == 1).all()  # exactly: such tokens are copied


def test_in_an_overlap_the_weight_goes_over_smoothly() -> None:
    weights = window_weights(256, WindowSpec(side_px=160, overlap_px=64), 8)
    ramp = weights[0][12:]  # the last 64 px of the first window
    assert (np.diff(ramp) < 0).all() and np.abs(np.diff([1, *ramp, 0])).max() < 0.25
    np.testing.assert_allclose(ramp + weights[1][:8], 1)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize(("tile", "size"), [(100, 77), (60, 200), (300, 64), (90, 90)])
def test_a_part_is_resized_as_the_whole_is(mode: str, antialias: bool, corners: bool, tile: int, size: int) -> None:
    pixel = PixelSpec(mean=(0, 0, 0), std=(1, 1, 1), resize=mode, antialias=antialias, align_corners=corners)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (tile, tile, 3), np.uint8))
    planes = image.permute(2, 0, 1)[None].float()
    whole = functional.interpolate(planes, size=(size, size), mode=mode, antialias=antialias, align_corners=corners)
    expected = whole[0].permute(1, 2, 0).clamp(0, 255)
    for y, x, side in ((0, 0, 30), (size - 40, size - 40, 40), (11, 17, 40), (0, 0, size)):
        part = resize_part(image, size, pixel, y, x, side)
        assert part.dtype == torch.uint8 and part.shape == (side, side, 3)
        assert (part - expected[y : y + side, x : x + side]).abs().max() <= 0.51  # of 255


@given(CUTS, st.sampled_from([1, 2]), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_a_local_teacher_gives_the_same_map_in_windows_as_at_once(
    cut: tuple[int, int, int], zoom: int, micro_batch: int
) -> None:
    size, side, overlap = (16 * n for n in cut)
    tile, layers = make_tile(size, size // zoom)[0], ["mean8", "mean16"]
    view = ViewSpec(size_px=size, orientation=3)
    whole = encode_batch(MeanTeacher(), view, layers, [tile], profile())
    parts = encode_batch(MeanTeacher(), in_windows(view, side, overlap), layers, [tile], profile(micro_batch))
    for layer in layers:
        assert parts[layer].shape == whole[layer].shape
        np.testing.assert_allclose(parts[layer], whole[layer], atol=1e-3 if zoom == 1 else 0.5)


@given(st.integers(0, 7), CUTS.filter(lambda c: c[0] <= 15), st.sampled_from(["mean8", "mean16"]))
@settings(max_examples=25, deadline=None)
def test_painted_coordinates_are_recovered_through_windows(
    orientation: int, cut: tuple[int, int, int], layer: str
) -> None:
    tile_px, (size, side, overlap) = 240, (16 * n for n in cut)
    rows, columns = np.mgrid[0:tile_px, 0:tile_px].astype(np.uint8)
    tile = np.stack([rows, columns, np.zeros_like(rows)], -1)
    view, teacher = in_windows(ViewSpec(size_px=size, orientation=orientation), side, overlap), MeanTeacher()
    ((layer_spec, grid),) = map_layers(teacher, [layer], view)
    spec = FeatureSpec(
        teacher=teacher.spec, layer=layer_spec, view=view, encoding=EncodingSpec(), tile_px=tile_px, grid=grid
    )
    found = encode_batch(teacher, view, [layer], [tile], profile())[layer][0]
    assert found.shape == (*grid, 3)
    for i in range(1, grid[0] - 1):
        for j in range(1, grid[1] - 1):
            y, x = (spec.offset_tile_px + spec.stride_tile_px * n for n in (i, j))
            row, column = orient_point(y, x, tile_px, inverse_orientation(orientation))
            assert abs(found[i, j, 0] - (row - 0.5)) < 0.5 and abs(found[i, j, 1] - (column - 0.5)) < 0.5


@given(CUTS, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_bands_come_in_order_and_no_higher_than_a_window(cut: tuple[int, int, int], micro_batch: int) -> None:
    size, side, overlap = (16 * n for n in cut)
    view = in_windows(ViewSpec(size_px=size, orientation=0), side, overlap)
    image = render(make_tile(0, 48)[0], view)
    due = {"mean8": 0, "mean16": 0}
    for layer, y0, rows in encode_bands(MeanTeacher(), view, list(due), image, profile(micro_batch)):
        stride = int(layer[4:])
        assert y0 == due[layer] and 0 < len(rows) <= side // stride and rows.shape[1:] == (size // stride, 3)
        due[layer] += len(rows)
    assert due == {"mean8": size // 8, "mean16": size // 16}


def test_bits_do_not_depend_on_the_tiles_beside_and_seams_are_no_steeper_than_what_is_inside() -> None:
    teacher = load(TeacherRequest("timm:test_vit", "none", 0))
    layer, side = "block5", teacher.spec.native_px
    tiles = [make_tile(n, 3 * side)[0] for n in range(2)]
    view = ViewSpec(size_px=3 * side, orientation=0)

    def steps(cut: ViewSpec) -> np.ndarray:
        """Return the mean difference of neighbouring tokens by column, relative to the median column."""
        both = encode_batch(teacher, cut, [layer], tiles, profile())[layer]
        alone = encode_batch(teacher, cut, [layer], tiles[1:], profile())[layer]
        np.testing.assert_array_equal(both[1:], alone)
        found = np.linalg.norm(np.diff(both, axis=2), axis=-1).mean((0, 1))
        return np.asarray(found / np.median(found))

    hard, blended = steps(in_windows(view, side, 0)), steps(with_windows(teacher, [layer], view))
    at_seams = [side // 16 - 1, 2 * side // 16 - 1]
    assert hard[at_seams].min() > 3  # position embeddings begin anew: without an overlap the seam shows
    assert blended.max() < 2 and blended.max() < hard.max() / 2


def test_large_views_are_cut_by_themselves_and_small_ones_never() -> None:
    teacher = load(TeacherRequest("timm:test_vit", "none", 0))  # trained at 160 px, patch 16

    def cut(size_px: int, *asked: float, layers: tuple[str, ...] = ("block5",)) -> str:
        return with_windows(teacher, layers, ViewSpec(size_px=size_px, orientation=0), *asked).scale  # type: ignore[arg-type]

    assert cut(320) == "s320"
    assert cut(336) == "s336w160v48"
    assert cut(336, 0) == "s336"
    assert cut(336, 100, 0.5) == "s336w96v48"
    assert cut(96, 100) == "s96"
    assert cut(336, 100, 0.0) == "s336w96v0"
    view = with_windows(MeanTeacher(), ["mean8"], ViewSpec(size_px=2064, orientation=0))
    assert view.scale == "s2064w1024v256"
    for side, overlap, text in ((15, 0.25, "cannot be cut"), (100, 0.8, "overlap")):
        with pytest.raises(UsageError, match=text):
            cut(336, side, overlap)
    with pytest.raises(UsageError, match="cannot be cut"):
        with_windows(teacher, ["block5"], ViewSpec(size_px=330, orientation=0), 160)


def test_a_pyramid_is_cut_on_its_coarsest_stride() -> None:
    teacher = load(TeacherRequest("timm:test_resnet", "none", 0))
    layers = teacher.layer_names[-3:]
    view = with_windows(teacher, layers[:1], ViewSpec(size_px=192, orientation=0), 100)
    assert view.scale == "s192w96v32"
    found = encode_batch(teacher, view, layers, [make_tile(0, 192)[0]], profile())
    for spec, grid in map_layers(teacher, layers, view):
        assert found[spec.name].shape == (1, *grid, spec.channels)
        assert grid[0] * spec.stride_px == 192
