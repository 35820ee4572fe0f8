"""What a build writes is what the teacher said, in every reader's eyes; what does not fit is refused."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from PIL import Image

from rsmtdf_cache.build import BuildReport, build_store
from rsmtdf_cache.errors import DataError, MismatchError, ResourceError, UsageError
from rsmtdf_cache.request import BuildRequest, parse_teacher
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.specs import FeatureKey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.verify import verify_store
from rsmtdf_cache.views import Box, orient
from tests.datasets import write_dataset
from tests.teachers import MeanTeacher, load_mean_teacher


def build(data: Path, out: Path, **changes: object) -> BuildReport:
    values = {"data": data, "out": out, "teachers": ["mean"], "group_rows": 3, "threads": 1, **changes}
    return build_store(BuildRequest.of(values), load_teacher=load_mean_teacher)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "data", tiles=12, tile_px=64)


def live(data: Path, tile_id: str, orientation: int, size_px: int, layer: str) -> np.ndarray:
    source = open_source(data)
    tile = next(t for t in source.tiles() if t.id == tile_id)
    import torch

    image = torch.from_numpy(orient(source.read_image(tile), orientation).copy())[None]
    return MeanTeacher().encode(image, size_px, [layer])[layer][0].numpy()


def test_every_stored_map_is_the_teachers_own_map_of_the_oriented_tile(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s", orientations=8, scales=(1.0, 0.5))
    store = FeatureStore.open(tmp_path / "s")
    assert len(store.keys()) == 8 * 2 * 2
    for key in list(store.keys()):
        spec = store.spec(key)
        got = store.read(key, range(len(store.tiles)))
        assert got.valid.all() and got.orientation == spec.view.orientation
        for row, tile_id in enumerate(store.tiles.ids):
            expected = live(data, tile_id, spec.view.orientation, spec.view.size_px, key.layer).astype(np.float16)
            np.testing.assert_array_equal(got.values[row], expected)


def test_plain_zarr_and_xarray_read_the_same_values_labelled_and_without_warnings(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s")
    store = FeatureStore.open(tmp_path / "s")
    key = FeatureKey.parse("mean/s64o0/mean8")
    expected = store.read(key, range(8)).values
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = xr.open_datatree(tmp_path / "s" / "zarr", engine="zarr")
        dataset = xr.open_zarr(tmp_path / "s" / "zarr", group=str(key))
        array = zarr.open_array(tmp_path / "s" / "zarr" / str(key) / "features", mode="r")
    assert tree[str(key)]["features"].dims == ("tile", "y", "x", "channel")
    np.testing.assert_array_equal(array[:], expected)
    np.testing.assert_array_equal(dataset["features"].values, expected)
    tile_id = store.tiles.ids[5]
    np.testing.assert_array_equal(tree[str(key)]["features"].sel(tile=tile_id).values, expected[5])
    np.testing.assert_array_equal(dataset["y"].values, 4 + 8 * np.arange(8))
    np.testing.assert_allclose(dataset["channel_mean"].values, expected.astype(np.float64).mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset["channel_std"].values, expected.astype(np.float64).std((0, 1, 2)), rtol=1e-5)
    assert tree["tiles/split"].to_numpy().tolist() == ["train"] * 8


def test_a_crop_on_the_lattice_is_an_exact_copy_and_off_it_is_refused(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s")
    store = FeatureStore.open(tmp_path / "s")
    key = FeatureKey.parse("mean/s64o0/mean8")
    whole = store.read(key, [2]).values[0]
    crop = store.read(key, [2], [Box(16, 8, 32, 24)]).values[0]
    np.testing.assert_array_equal(crop, whole[2:6, 1:4])
    with pytest.raises(UsageError, match="lattice of 8"):
        store.read(key, [2], [Box(4, 0, 32, 32)])
    with pytest.raises(UsageError, match="leaves the tile"):
        store.read(key, [2], [Box(40, 0, 32, 32)])


def test_maps_larger_than_a_chunk_come_back_whole_and_cropped(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", tiles=4, tile_px=320, splits={"train": [0, 1], "val": [2], "test": [3]})
    build(data, tmp_path / "s", splits=("train",), scales=(1.0,))
    store = FeatureStore.open(tmp_path / "s")
    key = FeatureKey.parse("mean/s320o0/mean8")  # 40 x 40 tokens: four chunks of 20 x 20
    array = zarr.open_array(tmp_path / "s" / "zarr" / str(key) / "features", mode="r")
    assert array.chunks == (1, 20, 20, 3)
    whole = store.read(key, [0, 1]).values
    np.testing.assert_array_equal(array[:], whole)
    np.testing.assert_array_equal(store.read(key, [1], [Box(80, 120, 160, 80)]).values[0], whole[1, 10:30, 15:25])


def test_row_group_size_changes_no_stored_value(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "a", group_rows=3)
    build(data, tmp_path / "b", group_rows=8)
    a, b = FeatureStore.open(tmp_path / "a"), FeatureStore.open(tmp_path / "b")
    for key in list(a.keys()):
        np.testing.assert_array_equal(a.read(key, range(8)).values, b.read(key, range(8)).values)


def test_new_teacher_layer_and_tiles_are_appends_that_leave_old_shards_alone(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    build(data, out, teachers=["mean,layers=mean8"])
    before = {p: p.read_bytes() for p in out.rglob("c/*/0/0/0")}
    snapshots = [FeatureStore.open(out).snapshot]
    for changes in ({"teachers": ["mean"]}, {"teachers": ["mean", "other"]}, {"splits": ("train", "val", "test")}):
        build(data, out, **changes)
        snapshots.append(FeatureStore.open(out).snapshot)
    assert len(set(snapshots)) == 4
    assert all(p.read_bytes() == old for p, old in before.items())
    store = FeatureStore.open(out)
    key = FeatureKey.parse("mean/s64o0/mean8")
    assert len(store.tiles) == 13  # 8 train rows in 3 groups of 3, one hole, 4 more
    assert store.tiles.ids[8] == "" and store.committed(key).sum() == 12
    read = store.read(key, range(13))
    assert not read.valid[8].any() and np.isnan(read.values[8]).all()
    assert verify_store(out, deep=True) == []
    other = store.committed(FeatureKey.parse("other/s64o0/mean8"))
    assert other[:8].all() and not other[9:].any()  # the last build asked for "mean" alone


def test_same_command_again_computes_nothing_and_keeps_the_snapshot(data: Path, tmp_path: Path) -> None:
    first = build(data, tmp_path / "s")
    again = build(data, tmp_path / "s")
    assert first.units == 6 and again.units == 0 and again.units_before == 6
    assert again.snapshot == first.snapshot and again.nbytes_written == 0


def test_other_weights_under_the_same_key_are_refused_with_the_field_named(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s")
    before = FeatureStore.open(tmp_path / "s").snapshot
    with pytest.raises(MismatchError, match=r"teacher\.weights"):
        build(data, tmp_path / "s", teachers=["mean,seed=1"])
    assert FeatureStore.open(tmp_path / "s").snapshot == before


def test_changed_pixels_under_an_old_id_are_refused(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s")
    path = data / "images" / "t001.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[5, 5] ^= 1
    Image.fromarray(pixels).save(path)
    with pytest.raises(MismatchError, match="t001"):
        build(data, tmp_path / "s")


def test_other_numerics_are_refused_unless_allowed(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s", micro_batch=4)
    grown = {"splits": ("train", "val")}
    with pytest.raises(MismatchError, match="micro_batch"):
        build(data, tmp_path / "s", micro_batch=2, **grown)
    build(data, tmp_path / "s", micro_batch=2, allow_mixed=True, **grown)
    assert verify_store(tmp_path / "s", deep=True) == []


def test_one_bad_tile_is_quarantined_and_strict_stops_before_a_write(data: Path, tmp_path: Path) -> None:
    path = data / "images" / "t002.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="t002"):
        build(data, tmp_path / "s", strict=True)
    assert not (tmp_path / "s").exists()
    report = build(data, tmp_path / "s")
    assert [q.id for q in report.quarantined] == ["t002"] and report.tiles == 7
    assert "t002" not in FeatureStore.open(tmp_path / "s").tiles
    assert verify_store(tmp_path / "s", deep=True) == []


def test_a_folder_that_holds_something_else_is_refused_untouched(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    out.mkdir()
    (out / "thesis.tex").write_text("all of it")
    with pytest.raises(MismatchError, match="no feature store"):
        build(data, out)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_a_store_of_another_tile_size_is_refused(data: Path, tmp_path: Path) -> None:
    build(data, tmp_path / "s")
    other = write_dataset(tmp_path / "other", tiles=6, tile_px=128)
    with pytest.raises(MismatchError, match="tiles of 64 px"):
        build(other, tmp_path / "s")


def test_values_beyond_float16_stop_the_build_and_leave_no_shard(data: Path, tmp_path: Path) -> None:
    class Loud(MeanTeacher):
        def encode(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            return {k: v * 1e6 for k, v in super().encode(*args, **kwargs).items()}

    request = BuildRequest.of({"data": data, "out": tmp_path / "s", "teachers": ["mean"]})
    with pytest.raises(DataError, match="do not fit float16"):
        build_store(request, load_teacher=lambda request, device="cpu": Loud())
    assert not list((tmp_path / "s").rglob("c/*/0/0/0"))
    assert not (tmp_path / "s" / "tmp").exists()


def test_a_disk_too_small_is_said_before_the_first_shard(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="the build needs"):
        build(data, tmp_path / "s")
    assert not list((tmp_path / "s").rglob("c/*/0/0/0"))


def test_teacher_options_are_parsed_and_unknown_ones_explained() -> None:
    asked = parse_teacher("dinov2_vits14,pretrained=none,seed=3,layers=block7+block11,scales=1+0.5,orientations=4")
    assert (asked.pretrained, asked.seed, asked.orientations) == ("none", 3, 4)
    assert asked.layers == ("block7", "block11") and asked.scales == (1.0, 0.5)
    with pytest.raises(UsageError, match="Did you mean 'weights'"):
        parse_teacher("dinov2_vits14,weigths=x.pth")


def test_the_store_tells_which_tiles_were_left_out_until_they_are_mended(data: Path, tmp_path: Path) -> None:
    path = data / "images" / "t002.png"
    good = path.read_bytes()
    path.write_bytes(good[:200])
    build(data, tmp_path / "s")
    assert list(FeatureStore.open(tmp_path / "s").quarantined) == ["t002"]
    path.write_bytes(good)
    build(data, tmp_path / "s")
    store = FeatureStore.open(tmp_path / "s")
    assert store.quarantined == {} and "t002" in store.tiles
    assert verify_store(tmp_path / "s", deep=True) == []
