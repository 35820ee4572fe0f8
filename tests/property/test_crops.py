"""Any box, grid and frame: coordinates painted into tiles are recovered from a real store through every crop.

Red is the row and green the column of a pixel, so a token of ``MeanTeacher`` says where its cell lies in the unturned
tile. Ramps are linear: reading between tokens must give the coordinates of the place that was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache import teachers
from rsmtdf_cache.build import build_store
from rsmtdf_cache.crops import CropBox, TokenGrid, nearest_orientation, read_crops, turn_between, whole_views
from rsmtdf_cache.errors import UsageError
from rsmtdf_cache.layout import ArraySet, StorePaths
from rsmtdf_cache.ledger import Ledger
from rsmtdf_cache.manifest import Manifest, create_manifest
from rsmtdf_cache.request import BuildRequest
from rsmtdf_cache.specs import CropSpec, EncodingSpec, FeatureKey, FeatureSpec, NumericsProfile, ViewSpec
from rsmtdf_cache.store import Features, FeatureStore
from rsmtdf_cache.teachers._dense import DenseTeacher
from rsmtdf_cache.teachers.base import Teacher, TeacherRequest
from rsmtdf_cache.tiles import TileRecord
from rsmtdf_cache.views import Box, inverse_orientation, orient, orient_point
from rsmtdf_cache.writer import UnitWriter
from tests.contract.test_teachers import averaging
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher, load_mean_teacher

SIDE = 96
LAYERS = ("mean8", "mean16")
#: Rounding of a coordinate up to 96 to float16, twice.
ROUNDING = 0.07

frames = st.integers(0, 7)
corners = st.floats(-1.5 * SIDE, 1.5 * SIDE)
sides = st.floats(1, 1.5 * SIDE)
grids = st.builds(TokenGrid, st.integers(1, 9), st.integers(1, 9), st.floats(1, 40), st.floats(-20, 40))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """All orientations and two scales, built by the real thing; tiles 0 to 2 are painted, tile 3 is a picture."""
    root = tmp_path_factory.mktemp("crops")
    data = write_dataset(root / "data", tiles=4, tile_px=SIDE, splits={"train": range(4)})
    ys, xs = np.mgrid[0:SIDE, 0:SIDE].astype(np.uint8)
    for n in range(3):
        Image.fromarray(np.stack([ys, xs, np.full_like(ys, n)], -1)).save(data / "images" / f"t{n:03}.png")
    values = {"data": data, "out": root / "store", "teachers": ["mean"], "group_rows": 2, "threads": 1}
    build_store(BuildRequest.of(values | {"orientations": 8, "scales": (1.0, 0.5)}), load_teacher=load_mean_teacher)
    return FeatureStore.open(root / "store")


def spec_of(
    layer: str, orientation: int = 0, size_px: int = SIDE, crop: CropSpec | None = None, offset: float | None = None
) -> FeatureSpec:
    teacher = MeanTeacher()
    (known,) = teacher.layer_specs([layer], size_px)
    here = known if offset is None else known.model_copy(update={"offset_px": offset})
    return FeatureSpec(
        teacher=teacher.spec, layer=here, encoding=EncodingSpec(), tile_px=SIDE, grid=teacher.grid(layer, size_px),
        view=ViewSpec(size_px=size_px, orientation=orientation, crop=crop),
    )  # fmt: skip


def paint_store(root: Path, specs: Sequence[FeatureSpec], tiles: int = 2, groups: int = 1) -> FeatureStore:
    """A store whose tokens are ``(row, column, tile)`` of their centre in the unturned tile, whatever their offset."""
    paths = StorePaths(root)
    create_manifest(paths, Manifest(tile_px=SIDE, group_rows=tiles, dataset="painted"))
    ledger = Ledger(paths)
    records = [TileRecord(f"t{n}", bytes([n]) * 32, "train", f"t{n}.png") for n in range(2 * tiles)]
    ledger.add_tiles(0, records)
    profile = NumericsProfile(device="cpu", precision="float32", torch="test", threads=1, micro_batch=1)
    for spec in specs:
        arrays = ArraySet((spec,))
        ledger.add_set(arrays, profile)
        first = np.array(spec.origin_tile_px) + spec.offset_tile_px
        for group in range(groups):
            with UnitWriter(ledger, arrays, group, tiles, profile) as unit:
                for row in range(group * tiles, (group + 1) * tiles):
                    painted = np.zeros((*spec.grid, 3), np.float32)
                    for i, j in np.ndindex(spec.grid):
                        y, x = first + spec.stride_tile_px * np.array([i, j])
                        back = inverse_orientation(spec.view.orientation)
                        painted[i, j] = (*orient_point(y, x, SIDE, back), row)
                    unit.add(row, records[row].id, {spec.layer.name: painted})
                unit.commit((group + 1) * tiles)
    return FeatureStore.open(root)


def centres(found: Features, box: CropBox | Box) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the tokens of a crop say they lie, in the frame of the crop."""
    height, width = found.valid.shape[1:]
    ys, xs = (found.offset_px + found.stride_px * np.arange(n) for n in (height, width))
    return np.meshgrid(box.y + ys, box.x + xs, indexing="ij")


def assert_coordinates(
    found: Features, box: CropBox | Box, first: float, last: float, paint: float, tolerance: float = ROUNDING
) -> None:
    """Compare one crop with the coordinates of its centres; beyond ``first`` and ``last`` the nearest token counts."""
    y, x = (v.clip(first, last) for v in centres(found, box))
    row, column = orient_of(y, x, inverse_orientation(found.orientation))
    valid = found.valid[0]
    for channel, expected in ((0, row), (1, column)):
        got = found.values[0, ..., channel].astype(np.float64)
        assert np.abs(got - (expected - paint))[valid].max(initial=0) <= tolerance


def orient_of(
    y: NDArray[np.float64], x: NDArray[np.float64], orientation: int, side: int = SIDE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``orient_point`` of arrays."""
    for _ in range(orientation % 4):
        y, x = side - x, y
    return (y, side - x) if orientation >= 4 else (y, x)


def assert_validity(found: Features, box: CropBox | Box, low: float = 0, high: float = SIDE) -> None:
    y, x = centres(found, box)
    # No test of which side of an edge a rounded number falls on.
    if all(np.abs(v - edge).min() > 1e-3 for v in (y, x) for edge in (low, high)):
        inside = (y > low) & (y < high) & (x > low) & (x < high)
        np.testing.assert_array_equal(found.valid[0], inside)
    assert np.isnan(found.values[~found.valid]).all() and np.isfinite(found.values[found.valid]).all()


# --- exact copies ----------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_box_on_the_lattice_is_a_copy_bit_for_bit(store: FeatureStore, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(store.keys()))
    spec = store.spec(key)
    stride, cells = int(spec.stride_tile_px), spec.grid[0]
    height, width = data.draw(st.integers(1, cells)), data.draw(st.integers(1, cells))
    places = [(data.draw(st.integers(0, cells - height)), data.draw(st.integers(0, cells - width))) for _ in range(2)]
    boxes = [Box(y * stride, x * stride, height * stride, width * stride) for y, x in places]
    grid = data.draw(st.sampled_from([None, TokenGrid(height, width, stride, spec.offset_tile_px)]))
    expected, found = store.read(key, [0, 2], boxes), store.crop(key, [0, 2], boxes, grid)
    assert found.exact and found.valid.all() and found.values.tobytes() == expected.values.tobytes()
    assert (found.stride_px, found.offset_px) == (expected.stride_px, expected.offset_px)
    assert found.orientation == spec.view.orientation


def test_whole_tiles_and_boxes_over_the_edge_copy_what_is_there(store: FeatureStore) -> None:
    key = FeatureKey.parse(f"mean/s{SIDE}o3/mean16")
    whole = store.read(key, [0, 1])
    assert store.crop(key, [0, 1]).values.tobytes() == whole.values.tobytes()
    found = store.crop(key, [0, 1], [Box(-32, 48, 96, 96), Box(64, -16, 96, 96)])
    expected = np.full((2, 6, 6, 3), np.nan, np.float16)
    expected[0, 2:, :3] = whole.values[0, :4, 3:]
    expected[1, :2, 1:] = whole.values[1, 4:, :5]
    assert found.exact
    np.testing.assert_array_equal(found.values, expected)
    np.testing.assert_array_equal(found.valid, np.isfinite(expected[..., 0]))
    nothing = store.crop(key, [1], [Box(960, 0, 32, 32)])
    assert not nothing.valid.any() and np.isnan(nothing.values).all() and nothing.values.shape == (1, 2, 2, 3)
    assert store.crop(key, [], []).values.shape == (0, 6, 6, 3)


def test_boxes_on_and_off_the_lattice_in_one_call_do_not_change_each_other(store: FeatureStore) -> None:
    key = FeatureKey.parse(f"mean/s{SIDE}o0/mean8")
    boxes: list[Box | CropBox] = [Box(16, 32, 32, 48), CropBox(3.7, 11.1, 32, 48), CropBox(-9.5, 70, 32, 48)]
    together = store.crop(key, [0, 1, 2], boxes)
    for i, box in enumerate(boxes):
        alone = store.crop(key, [i], [box])
        np.testing.assert_array_equal(alone.values[0], together.values[i])
        np.testing.assert_array_equal(alone.valid[0], together.valid[i])
    assert not together.exact


# --- anything else ---------------------------------------------------------------------------------------------------


@given(frames, st.sampled_from(LAYERS), corners, corners, sides, sides, st.none() | grids)
@settings(max_examples=150, deadline=None)
def test_any_crop_on_any_grid_recovers_the_coordinates_of_its_centres(
    store: FeatureStore, frame: int, layer: str, y: float, x: float, height: float, width: float, grid: TokenGrid | None
) -> None:
    box = CropBox(y, x, height, width)
    spec = store.spec(FeatureKey.parse(f"mean/s{SIDE}o{frame}/{layer}"))
    found = read_crops(store, spec.key, [1], [box], grid)
    assert found.orientation == frame and found.values.dtype == np.float16
    assert_validity(found, box)
    assert (found.values[0, ..., 2][found.valid[0]] == 1).all(), "another tile"
    first, last = spec.offset_tile_px, SIDE - spec.offset_tile_px
    if grid is None:
        shape = (max(1, round(height / spec.stride_tile_px)), max(1, round(width / spec.stride_tile_px)))
        assert (found.stride_px, found.offset_px) == (spec.stride_tile_px, spec.offset_tile_px)
        assert found.valid.shape == (1, *shape)
    tolerance = ROUNDING
    if grid is not None and grid.stride_px > spec.stride_tile_px:
        # A triangle over discrete tokens leans by less than half a one; over the border it loses its outer half.
        tolerance = spec.stride_tile_px / 2 + ROUNDING
        ys, xs = centres(found, box)
        reach = grid.stride_px
        whole = [(v - reach >= first) & (v + reach <= last) for v in (ys, xs)]
        found.valid[0] &= whole[0] & whole[1]
    assert_coordinates(found, box, first, last, 0.5, tolerance)


@given(frames, st.floats(0, 48), st.floats(0, 48))
@settings(max_examples=30, deadline=None)
def test_the_smaller_scale_is_read_at_its_own_centres(store: FeatureStore, frame: int, y: float, x: float) -> None:
    spec = store.spec(FeatureKey.parse(f"mean/s48o{frame}/mean8"))
    assert spec.stride_tile_px == 16
    box = CropBox(y, x, 48, 48)
    found = store.crop("mean/s48/mean8", [2], [box], orientation=frame)
    ys, xs = centres(found, box)  # the resize of the tile bends the ramp in the outermost tokens
    found.valid[0] &= (ys > 24) & (ys < 72) & (xs > 24) & (xs < 72)
    assert found.valid.any()
    assert_coordinates(found, box, 8, 88, 0.5)


def test_a_coarse_grid_means_over_all_tokens_in_its_reach(store: FeatureStore) -> None:
    key = FeatureKey.parse(f"mean/s{SIDE}o0/mean8")
    found = store.crop(key, [3], [Box(0, 0, 96, 96)], TokenGrid(4, 4, 31.5, 1))
    stored, at = store.read(key, [3]).values[0].astype(np.float64), 4 + 8 * np.arange(12)
    weights = np.maximum(0, 1 - np.abs(at - np.array([[4], [32.5], [64], [92]])) / 31.5)  # the outermost: clamped
    assert (np.count_nonzero(weights, axis=1) >= 4).all()
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ty,ux,yxd->tud", weights, weights, stored)
    np.testing.assert_allclose(found.values[0], expected, atol=2 * ROUNDING)
    assert found.valid.all() and not found.exact


@given(st.integers(0, 5), st.integers(0, 5), st.floats(0, 1), st.data())
@settings(max_examples=60, deadline=None)
def test_reading_touches_only_the_tokens_around_the_crop(
    store: FeatureStore, i: int, j: int, shift: float, data: st.DataObject
) -> None:
    key = FeatureKey.parse(f"mean/s{SIDE}o{data.draw(frames)}/mean8")
    seen: list[Box | CropBox] = []

    class Watched(FeatureStore):
        def read(self, key, rows, boxes=None, out=None):  # type: ignore[no-untyped-def]
            seen.extend(boxes)
            return super().read(key, rows, boxes, out)

    watched = Watched(store.path)
    box = CropBox(8 * i + shift, 8 * j + shift, 24, 24)
    watched.crop(key, [0], [box])
    (read,) = seen
    assert read.height <= 24 + 8 and read.width <= 24 + 8
    assert read.y <= max(box.y, 0) and read.y + read.height >= min(box.y + 20, SIDE)


def test_strides_that_are_no_whole_pixels_have_a_lattice_too(tmp_path: Path) -> None:
    spec = spec_of("mean16", size_px=112)  # 7 tokens on 96 px
    store = paint_store(tmp_path / "s", [spec])
    stride = spec.stride_tile_px
    assert stride != int(stride)
    whole = store.read(spec.key, [1])
    for y in range(5):
        box = CropBox(y * stride, 2 * stride, 3 * stride, 4 * stride)
        found = store.crop(spec.key, [1], [box])
        assert found.exact
        np.testing.assert_array_equal(found.values[0], whole.values[0, y : y + 3, 2:6])


# --- frames ----------------------------------------------------------------------------------------------------------


@given(frames, frames)
def test_turns_between_frames_compose(source: int, wanted: int) -> None:
    tile = np.arange(9).reshape(3, 3)
    turned = orient(orient(tile, source), turn_between(source, wanted))
    np.testing.assert_array_equal(turned, orient(tile, wanted))


@given(frames, st.sets(frames, min_size=1))
def test_the_nearest_frame_is_the_wanted_one_or_its_mirror_where_stored(wanted: int, stored: set[int]) -> None:
    chosen = nearest_orientation(wanted, sorted(stored))
    assert chosen in stored
    if wanted in stored:
        assert chosen == wanted
    elif any(turn_between(o, wanted) == 4 for o in stored):
        assert turn_between(chosen, wanted) == 4
    elif any(turn_between(o, wanted) in (2, 6) for o in stored):
        assert turn_between(chosen, wanted) in (2, 6)


def test_a_frame_that_is_not_stored_is_refused_and_its_neighbours_named(tmp_path: Path) -> None:
    store = paint_store(tmp_path / "s", [spec_of("mean8", o) for o in (0, 4)])
    for key in (f"mean/s{SIDE}/mean8", f"mean/s{SIDE}o0/mean8"):
        with pytest.raises(UsageError, match=r"orientation 1 \(rot90\) is not stored, only 0, 4"):
            store.crop(key, [0], [Box(0, 0, 16, 16)], orientation=1)
        assert store.crop(key, [0], [Box(0, 0, 16, 16)], orientation=4).orientation == 4
        assert store.crop(key, [0], [Box(0, 0, 16, 16)]).exact
    for source in (0, 4):  # a turned map, though the frame itself is there
        found = read_crops(store, f"mean/s{SIDE}/mean8", [0], orientation=4, approximate=True, source=source)
        assert found.exact == (source == 4) and found.orientation == 4
    with pytest.raises(UsageError, match="orientation 2 is not stored, so nothing"):
        read_crops(store, f"mean/s{SIDE}/mean8", [0], approximate=True, source=2)
    with pytest.raises(UsageError, match="there are 0 to 7"):
        store.crop(f"mean/s{SIDE}/mean8", [0], [Box(0, 0, 16, 16)], orientation=8, approximate=True)
    with pytest.raises(UsageError, match=r"no array or target mean/s96/mean9.*Did you mean 'mean/s96/mean8'"):
        store.crop(f"mean/s{SIDE}/mean9", [0])


@given(
    frames, frames, st.sampled_from([None, 15.5, 0.5, 3.25]), corners, corners, st.sampled_from([16.0, 47.3, 96.0]),
    st.none() | grids,
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_a_turned_map_recovers_coordinates_in_every_frame_also_with_centres_off_the_middle(
    tmp_path_factory: pytest.TempPathFactory, stored: int, frame: int, offset: float | None, y: float, x: float,
    side: float, grid: TokenGrid | None,
) -> None:  # fmt: skip
    """Offsets as TF-style padding makes them are mirrored by a turn: forgetting it is up to a stride off."""
    store = _turned_store(tmp_path_factory, stored, offset)
    (key,) = store.keys()
    spec, box = store.spec(key), CropBox(y, x, side, side)
    found = store.crop(f"mean/s{SIDE}/mean16", [1], [box], grid, frame, approximate=True)
    assert found.orientation == frame
    if frame != stored:
        assert not found.exact
    assert_validity(found, box)
    if grid is not None and grid.stride_px > 16:
        return  # the widened triangle is tested above
    # Where the outermost stored centres lie in the asked frame depends on the turn: stay clear of them.
    first, last = spec.offset_tile_px, spec.offset_tile_px + 80
    inner = max(first, SIDE - last), min(last, SIDE - first)
    ys, xs = centres(found, box)
    found.valid[0] &= (ys >= inner[0]) & (ys <= inner[1]) & (xs >= inner[0]) & (xs <= inner[1])
    assert_coordinates(found, box, *inner, paint=0)


_TURNED: dict[tuple[int, float | None], FeatureStore] = {}


def _turned_store(factory: pytest.TempPathFactory, stored: int, offset: float | None) -> FeatureStore:
    if (stored, offset) not in _TURNED:
        root = factory.mktemp("turned") / "s"
        _TURNED[stored, offset] = paint_store(root, [spec_of("mean16", stored, offset=offset)])
    return _TURNED[stored, offset]


@pytest.mark.parametrize("stored", range(8))
def test_a_symmetric_map_on_the_lattice_is_turned_without_arithmetic(tmp_path: Path, stored: int) -> None:
    store = paint_store(tmp_path / "s", [spec_of("mean16", stored)])
    (key,) = store.keys()
    whole = store.read(key, [0]).values[0]
    for frame in range(8):
        turned = orient(whole, turn_between(stored, frame))
        found = store.crop(key, [0], [Box(16, 48, 64, 32)], orientation=frame, approximate=True)
        np.testing.assert_array_equal(found.values[0], turned[1:5, 3:5])
        assert found.exact == (frame == stored)


# --- validity --------------------------------------------------------------------------------------------------------


def test_a_tile_that_is_not_committed_is_not_valid_however_it_is_read(tmp_path: Path) -> None:
    store = paint_store(tmp_path / "s", [spec_of("mean8")])
    for box, frame in ((Box(0, 0, 16, 16), 0), (CropBox(1.5, 3, 16, 16), 0), (CropBox(1.5, 3, 16, 16), 5)):
        found = store.crop(f"mean/s{SIDE}/mean8", [1, 2], [box] * 2, orientation=frame, approximate=True)
        assert found.valid[0].all() and not found.valid[1].any()
        assert np.isfinite(found.values[0]).all() and np.isnan(found.values[1]).all()


@given(frames, corners, corners, st.sampled_from([16.0, 40.5]), frames)
@settings(max_examples=60, deadline=None)
def test_a_fixed_view_is_read_in_tile_pixels_and_valid_where_it_shows_the_tile(
    tmp_path_factory: pytest.TempPathFactory, own: int, y: float, x: float, side: float, frame: int
) -> None:
    store = _fixed_store(tmp_path_factory, own)
    (key,) = [k for k in store.keys() if not store.spec(k).view.is_whole]
    spec, box = store.spec(key), CropBox(y, x, side, side)
    found = store.crop(key, [1], [box])
    ys, xs = centres(found, box)
    edges = [(v, e) for v, low in ((ys, 24), (xs, 40)) for e in (low, low + 48)]
    if all(np.abs(v - e).min() > 1e-3 for v, e in edges):
        np.testing.assert_array_equal(found.valid[0], (ys > 24) & (ys < 72) & (xs > 40) & (xs < 88))
    stride = spec.stride_tile_px  # beyond the outermost centre the nearest token counts
    found.valid[0] &= (ys >= 24 + stride / 2) & (ys <= 72 - stride / 2)
    found.valid[0] &= (xs >= 40 + stride / 2) & (xs <= 88 - stride / 2)
    assert_coordinates(found, box, 0, SIDE, paint=0)
    # On its own lattice it is copied, whole by default; turned, it shows the same place of the tile.
    assert store.crop(key, [1]).values.tobytes() == store.read(key, [1]).values.tobytes()
    part = Box(24 + int(stride), 40, int(stride), 48)
    np.testing.assert_array_equal(store.crop(key, [1], [part]).values[0], store.read(key, [1]).values[0, 1:2])
    turned = store.crop(key, [1], orientation=frame, approximate=True)
    expected = orient(store.read(key, [1]).values[0], turn_between(own, frame))
    np.testing.assert_array_equal(turned.values[0], expected)


def _fixed_store(factory: pytest.TempPathFactory, own: int) -> FeatureStore:
    if (own, -1.0) not in _TURNED:
        fixed = spec_of("mean8", own, 64, CropSpec(y=24, x=40, side_px=48))
        _TURNED[own, -1.0] = paint_store(factory.mktemp("fixed") / "s", [fixed, spec_of("mean8", own)])
    return _TURNED[own, -1.0]


def test_a_fixed_view_never_stands_for_a_target(tmp_path: Path) -> None:
    crop = CropSpec(y=0, x=0, side_px=SIDE)  # shows all of the tile, and still is a view of its own
    fixed, whole = spec_of("mean8", 3, crop=crop), spec_of("mean8", 0)
    store = paint_store(tmp_path / "s", [fixed, whole])
    assert {k: list(v) for k, v in whole_views(store).items()} == {f"mean/s{SIDE}/mean8": [0]}
    with pytest.raises(UsageError, match="only 0"):
        store.crop(f"mean/s{SIDE}/mean8", [0], orientation=3)
    with pytest.raises(UsageError, match="only 3"):
        store.crop(fixed.key, [0], orientation=0)
    assert store.crop(fixed.key, [0]).exact


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([CropBox(0, 0, 0, 16)], "is no box"),
        ([CropBox(float("nan"), 0, 16, 16)], "is no box"),
        ([CropBox(0, float("inf"), 16, 16)], "is no box"),
        ([CropBox(0, 0, 16, 16)] * 2, "one box for each"),
    ],
)
def test_boxes_that_make_no_sense_are_refused(store: FeatureStore, boxes: list[CropBox], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        store.crop(store.keys()[0], [0], boxes)
    with pytest.raises(UsageError, match="of one size"):
        store.crop(store.keys()[0], [0, 1], [CropBox(0, 0, 16, 16), CropBox(0, 0, 16, 24)])
    with pytest.raises(UsageError, match="at least one token"):
        TokenGrid(2, 2, 0, 1)
    with pytest.raises(UsageError, match="no row"):
        store.crop(store.keys()[0], [7], [CropBox(0, 0, 16, 16)])


# --- a real network with padding on one side ------------------------------------------------------------------------


def test_coordinates_measured_through_a_network_with_tf_padding_are_recovered_by_any_crop_and_turn(
    tmp_path: Path, one_thread: None
) -> None:
    """An averaging EfficientNet-Lite: a token is a mean around its centre, and a ramp's mean is the centre's place.

    Its centres lie 3.5 px off the middle of their cells of 8 px; where a mirror forgot it, they would be 7 px off.
    """
    side, layer = 256, "stage3"

    def load(request: TeacherRequest, device: str = "cpu") -> Teacher:
        teacher = teachers.load(request, device)
        assert isinstance(teacher, DenseTeacher)
        averaging(teacher.network).float()
        return teacher

    data = write_dataset(tmp_path / "data", tiles=4, tile_px=side, splits={"train": range(4)})
    rows, columns = np.mgrid[0:side, 0:side].astype(np.uint8)
    for n, grey in enumerate((rows, columns, np.zeros_like(rows), np.full_like(rows, 255))):
        Image.fromarray(np.stack([grey] * 3, -1)).save(data / "images" / f"t{n:03}.png")
    asked = {"name": "timm:tf_efficientnet_lite0", "pretrained": "none", "layers": [layer], "scales": [1.0]}
    values = {"data": data, "out": tmp_path / "s", "teachers": [asked], "orientations": 2, "threads": 1}
    build_store(BuildRequest.of(values), load_teacher=load)
    store = FeatureStore.open(tmp_path / "s")
    spec = store.spec(store.keys()[0])
    assert spec.stride_tile_px == 8 and spec.offset_tile_px == 7.5
    target = next(iter(whole_views(store)))
    tiles = [store.tiles.row_of(f"t{n:003}") for n in range(4)]
    for frame in range(8):
        for box in (CropBox(96, 64, 64, 64), CropBox(93.3, 101.9, 64, 40)):
            found = store.crop(target, tiles, [box] * 4, orientation=frame, approximate=True)
            assert found.exact == (frame in (0, 4) and box.y == 96) and found.valid.all()
            row, column, black, white = found.values[..., 0].astype(np.float64)
            ys, xs = (np.asarray(v) for v in centres(found, box))
            expected = orient_of(ys, xs, inverse_orientation(frame), side)
            for measured, place in zip((row, column), expected, strict=True):
                got = (measured - black) / (white - black) * 255 + 0.5
                assert np.abs(got - place).max() < 0.5, (frame, box)
