"""Tiles of scenes: the right pixels, labels and places, told by numpy and rasterio alone; and what rests on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import yaml
from numpy.typing import NDArray
from PIL import Image

from rsmtdf_cache.build import build_store
from rsmtdf_cache.errors import MismatchError
from rsmtdf_cache.rasters.scaling import PixelRule
from rsmtdf_cache.sources import open_source
from rsmtdf_cache.sources.base import TileSource
from rsmtdf_cache.sources.geotiff import GeotiffSource
from rsmtdf_cache.sources.survey import survey
from rsmtdf_cache.store import FeatureStore
from rsmtdf_cache.tiling.request import Held
from rsmtdf_cache.tiling.write import plan_tiles, tile
from tests.scene_sets import CLASS_TABLE, classes_file, held, nested, request, write_labels, write_pair
from tests.scenes import PLACE, blobs, write_scene

NUMBERS = {10: 0, 20: 1, 21: 1, 30: 2, 99: 255}


def made(folder: Path, **values: Any) -> GeotiffSource:
    tile(request(folder, **values))
    source = open_source(folder / values.get("out", "set"))
    assert isinstance(source, GeotiffSource)
    source.check()
    return source


def scaled(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """Return the rule of docs/datasets.md, written again."""
    level = np.floor((values.astype(np.float64) - low) / (high - low) * 255 + 0.5)
    return np.nan_to_num(level).clip(0, 255).astype(np.uint8)


def padded(values: NDArray[Any], y: int, x: int, side: int, fill: int) -> NDArray[Any]:
    out = np.full((side, side, *values.shape[2:]), fill, values.dtype)
    part = values[y : y + side, x : x + side]
    out[: part.shape[0], : part.shape[1]] = part
    return out


STORED = {
    "tiled": {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"},
    "strips": {},
    "one block": {"blockysize": 150, "compress": "lzw"},
    "by pixel": {"interleave": "pixel"},
    "bigtiff": {"BIGTIFF": "YES"},
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED.keys())
def test_tiles_are_windows_of_the_scene_wherever_they_lie(tmp_path: Path, stored: dict[str, Any]) -> None:
    pixels, labels = write_pair(tmp_path, **stored)
    source = made(tmp_path)
    numbers = np.vectorize(NUMBERS.get)(labels).astype(np.uint8)
    tiles = source.tiles()
    assert len(tiles) == 5 * 7 and sorted(t.id for t in tiles) == sorted(source.cells)
    for entry in tiles:
        assert entry.origin_px is not None
        y, x = entry.origin_px
        image, valid = source.read_valid(entry)
        assert np.array_equal(image, padded(pixels.transpose(1, 2, 0), y, x, 32, 0))
        inside = padded(np.ones((150, 210), bool), y, x, 32, 0)
        assert (valid is None) == inside.all()
        assert valid is None or np.array_equal(valid, inside)
        wanted = padded(numbers, y, x, 32, 255)
        if entry.mask is not None:
            assert np.array_equal(source.read_mask(entry), wanted)
        else:
            assert (wanted == 255).all()
        assert entry.georeference is not None and entry.georeference.crs == "EPSG:32633"
        with rasterio.open(tmp_path / "images" / "a.tif") as file:
            a, b, c, d, e, f = entry.georeference.affine
            assert (a / 2 + b / 2 + c, d / 2 + e / 2 + f) == pytest.approx(file.xy(y, x), abs=1e-6)


TYPES = [("uint16", 40.0), ("int16", -30.0), ("float32", 0.013), ("uint8", 1.0)]


@pytest.mark.parametrize(("dtype", "factor"), TYPES, ids=[t for t, _ in TYPES])
def test_bands_and_ranges_make_8_bit_by_the_written_rule(tmp_path: Path, dtype: str, factor: float) -> None:
    pixels, _ = write_pair(tmp_path, dtype=dtype, bands=5, factor=factor)
    low, high = sorted((0.1 * 255 * factor, 0.8 * 255 * factor))
    scale = ((low, high), (low, high + 1), (low - 1, high))
    source = made(tmp_path, bands=(4, 3, 1), scale=scale)
    wanted = np.stack([scaled(pixels[b - 1], *limits) for b, limits in zip((4, 3, 1), scale, strict=True)], -1)
    for entry in source.tiles():
        y, x = entry.origin_px or (0, 0)
        found = source.read_image(entry).astype(int)
        assert np.abs(found - padded(wanted, y, x, 32, 0)).max() <= 1  # halves of float32 may round either way
        if dtype != "float32":
            assert np.array_equal(found, padded(wanted, y, x, 32, 0))
    assert source.pixels == PixelRule((4, 3, 1), scale, dtype)


def test_measured_percentiles_are_those_of_the_data_and_are_written_down(tmp_path: Path) -> None:
    pixels, _ = write_pair(tmp_path, dtype="uint16", factor=31, nodata=0, height=200, width=200)
    write_scene(tmp_path / "images" / "a.tif", np.where(np.arange(200) < 60, 0, pixels).astype(np.uint16), nodata=0)
    source = made(tmp_path, scale=(2.0, 98.0))
    assert source.pixels is not None
    for band, (low, high) in zip(pixels[:, :, 60:], source.pixels.scale, strict=True):
        assert (low, high) == pytest.approx(tuple(np.percentile(band, (2, 98))), rel=1e-3)
    assert open_source(tmp_path / "set").pixels == source.pixels


@pytest.mark.parametrize("kind", ["nodata", "alpha", "mask", "nan"])
def test_what_holds_no_data_is_black_unlabelled_and_invalid_and_empty_tiles_are_left_out(
    tmp_path: Path, kind: str
) -> None:
    pixels, labels = write_pair(tmp_path, dtype="float32" if kind == "nan" else "uint8", height=128, width=128)
    hole = np.zeros((128, 128), bool)
    hole[:64, :70] = True
    hole[100, 100] = True
    path = tmp_path / "images" / "a.tif"
    if kind == "nodata":
        write_scene(path, np.where(hole, 0, np.maximum(pixels, 1)).astype(np.uint8), nodata=0)
    elif kind == "nan":
        write_scene(path, np.where(hole, np.nan, pixels).astype(np.float32))
    elif kind == "alpha":
        alpha = np.where(hole, 0, 255).astype(np.uint8)[None]
        write_scene(path, np.concatenate([pixels, alpha]), photometric="RGB", ALPHA="YES")
    else:
        write_scene(path, pixels)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
            file.write_mask(~hole)
    scale = ((0.0, 255.0),) * 3 if kind == "nan" else None
    request_ = request(tmp_path, scale=scale)
    plan = plan_tiles(request_)
    assert plan.layout.empty == 4 and len(plan.layout.windows) == 12
    source = made(tmp_path, scale=scale)
    numbers = np.vectorize(NUMBERS.get)(labels).astype(np.uint8)
    for entry in source.tiles():
        y, x = entry.origin_px or (0, 0)
        image, valid = source.read_valid(entry)
        missing = hole[y : y + 32, x : x + 32]
        assert (valid is None) == (not missing.any())
        assert valid is None or np.array_equal(valid, ~missing)
        assert (image[missing] == 0).all()
        if entry.mask is not None:
            wanted = np.where(missing, 255, numbers[y : y + 32, x : x + 32])
            assert np.array_equal(source.read_mask(entry), wanted)


def test_a_scene_smaller_than_a_tile_is_one_tile(tmp_path: Path) -> None:
    pixels, _ = write_pair(tmp_path, height=20, width=27)
    source = made(tmp_path, val=Held(), test=Held())
    (entry,) = source.tiles()
    assert np.array_equal(source.read_image(entry), padded(pixels.transpose(1, 2, 0), 0, 0, 32, 0))


def test_overlap_is_what_was_asked_for_and_blocks_refuse_it(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_pair(tmp_path, "b", seed=1)
    write_pair(tmp_path, "c", seed=2)
    source = made(tmp_path, overlap_px=8)
    rows = sorted({cell.row_px for cell in source.cells.values() if cell.scene == "a"})
    assert rows == [0, 24, 48, 72, 96, 120] and max(rows) + 32 >= 150
    homes: dict[str, set[str]] = {}
    for entry in source.tiles():
        homes.setdefault(source.cells[entry.id].scene, set()).add(entry.split)
    assert sorted(map(len, homes.values())) == [1, 1, 1]


def test_nothing_is_copied_and_the_folder_is_equal_each_time(tmp_path: Path) -> None:
    write_pair(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.tif")}
    made(tmp_path)
    first = {p.name: p.read_bytes() for p in (tmp_path / "set").rglob("*") if p.is_file()}
    assert set(first) == {
        "dataset.yaml", "rasters.csv", "scenes.csv", "tile.json", "train.txt", "val.txt", "test.txt", "1.txt", "5.txt",
        "10.txt", "100.txt",
    }  # fmt: skip
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.tif")} == before
    made(tmp_path, out="again")
    again = {p.name: p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    same = {name for name in first if first[name] == again[name]}
    assert set(first) - same == {"dataset.yaml", "tile.json"}  # the name of the dataset is that of its folder
    assert tile(request(tmp_path))[1] is False
    with pytest.raises(MismatchError, match="differs in seed"):
        tile(request(tmp_path, seed=3))


def test_the_folder_may_move_with_its_scenes(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write_pair(here)
    tiles = {t.id: source_pixels(made(here), t.id) for t in made(here).tiles()}
    os.rename(here, there)
    moved = open_source(there / "set")
    moved.check()
    assert {t.id: source_pixels(moved, t.id) for t in moved.tiles()} == tiles


def source_pixels(source: TileSource, tile_id: str) -> bytes:
    return source.read_image(next(t for t in source.tiles() if t.id == tile_id)).tobytes()


def test_scenes_are_dealt_whole_by_name_or_share_and_labelled_subsets_are_nested(tmp_path: Path) -> None:
    for n, name in enumerate("abcdefgh"):
        write_pair(tmp_path, name, height=64, width=96, seed=n)
    source = made(tmp_path, val=held("b", "c*"), test=Held(), percents=("10", "30", "100"))
    scenes: dict[str, set[str]] = {t.split: set() for t in source.tiles()}
    for entry in source.tiles():
        scenes[entry.split].add(source.cells[entry.id].scene)
    assert scenes == {"val": {"b", "c"}, "train": set("adefgh")}
    lists = [source.split(f"labeled/{p}") for p in ("10", "30", "100")]
    assert nested(lists) and len(lists[-1]) == sum(t.mask is not None for t in source.tiles(["train"]))
    by_share = made(tmp_path, out="shares")
    homes: dict[str, set[str]] = {}
    for entry in by_share.tiles():
        homes.setdefault(by_share.cells[entry.id].scene, set()).add(entry.split)
    assert all(len(h) == 1 for h in homes.values()) and {"train", "val", "test"} == set.union(*homes.values())
    assert not survey(by_share).shared_scenes


def test_without_labels_there_is_a_dataset_to_build_from(tmp_path: Path) -> None:
    write_pair(tmp_path)
    source = made(tmp_path, labels=None)
    assert all(entry.mask is None for entry in source.tiles()) and source.split_names() == ["train", "val", "test"]


def test_a_tile_without_any_label_has_no_mask_and_is_not_held_out(tmp_path: Path) -> None:
    write_pair(tmp_path, height=256, width=256)
    labels = np.full((256, 256), 99, np.uint8)
    labels[:128, :128] = 10
    write_scene(tmp_path / "labels" / "a.tif", labels[None])
    source = made(tmp_path)
    for entry in source.tiles():
        y, x = entry.origin_px or (0, 0)
        assert (entry.mask is not None) == (y < 128 and x < 128)
    assert all(entry.mask is not None for entry in source.tiles(["val", "test"]))


TEACHER = "timm:resnet10t,pretrained=none,layers=stage2"


def _as_pngs(source: TileSource, out: Path) -> Path:
    """Write the tiles of ``source`` as a folder of PNG files: the copy that nobody needs."""
    for folder in ("images", "masks", "splits"):
        (out / folder).mkdir(parents=True)
    for entry in source.tiles():
        Image.fromarray(source.read_image(entry)).save(out / "images" / f"{entry.id}.png")
    for name in ("train", "val", "test"):
        (out / "splits" / f"{name}.txt").write_text("\n".join(source.split(name)) + "\n")
    header = {
        "name": source.name, "tile_px": source.tile_px, "masks": "partial",
        "classes": [{"name": c.name, "color": list(c.color)} for c in source.classes],
    }  # fmt: skip
    (out / "dataset.yaml").write_text(yaml.safe_dump(header))
    return out


def build(data: Path, out: Path) -> FeatureStore:
    from rsmtdf_cache.request import BuildRequest

    build_store(BuildRequest.of({
        "data": data, "out": out, "teachers": (TEACHER,), "splits": ("train", "val"), "scales": (1.0,),
        "device": "cpu", "threads": 1, "micro_batch": 4,
    }))  # fmt: skip
    return FeatureStore(out)


def test_a_store_of_scenes_is_bit_for_bit_that_of_the_same_tiles_as_png(tmp_path: Path) -> None:
    write_pair(tmp_path, dtype="uint16", factor=40, bands=4, nodata=0)
    source = made(tmp_path, bands=(3, 2, 1), scale=((100.0, 9000.0),) * 3)
    scenes = build(tmp_path / "set", tmp_path / "of-scenes")
    files = build(_as_pngs(source, tmp_path / "png"), tmp_path / "of-files")
    assert scenes.snapshot == files.snapshot
    record = scenes.tiles.record(0)
    assert record.crs == "EPSG:32633" and record.source.startswith("a.tif#")


def test_another_range_is_another_dataset_for_a_store(tmp_path: Path) -> None:
    write_pair(tmp_path)
    made(tmp_path)
    build(tmp_path / "set", tmp_path / "store")
    made(tmp_path, out="darker", scale=((0.0, 300.0),) * 3)
    with pytest.raises(MismatchError, match="other pixels than when the store was built"):
        build(tmp_path / "darker", tmp_path / "store")


def test_a_scene_changed_in_place_is_found_by_its_pixels(tmp_path: Path) -> None:
    write_pair(tmp_path)
    made(tmp_path)
    build(tmp_path / "set", tmp_path / "store")
    write_scene(tmp_path / "images" / "a.tif", 255 - blobs(150, 210))
    with pytest.raises(MismatchError, match="other pixels"):
        build(tmp_path / "set", tmp_path / "store")


def test_labels_may_be_larger_numbers_or_whole_floats(tmp_path: Path) -> None:
    _, labels = write_pair(tmp_path)
    wanted = {t.id: made(tmp_path).read_mask(t) for t in made(tmp_path).tiles() if t.mask is not None}
    for dtype, add in (("int32", 70000), ("int16", -200), ("float32", 0)):
        table = {**CLASS_TABLE, "labels": {"ignore": [99 + add]}, "classes": [
            {**entry, "values": [v + add for v in entry["values"]]} for entry in CLASS_TABLE["classes"]
        ]}  # fmt: skip
        write_scene(tmp_path / "labels" / "a.tif", (labels.astype(np.int64) + add).astype(dtype)[None])
        source = made(tmp_path, out=dtype, classes=classes_file(tmp_path, table))
        found = {t.id: source.read_mask(t) for t in source.tiles() if t.mask is not None}
        assert found.keys() == wanted.keys() and all(np.array_equal(found[i], wanted[i]) for i in wanted)


def test_no_data_of_the_labels_is_no_label(tmp_path: Path) -> None:
    write_pair(tmp_path)
    labels = write_labels(tmp_path / "labels" / "a.tif", 150, 210, 50)
    write_scene(tmp_path / "labels" / "a.tif", np.where(labels == 99, 0, labels).astype(np.uint8)[None], nodata=0)
    source = made(tmp_path)
    numbers = np.vectorize(NUMBERS.get)(labels).astype(np.uint8)
    for entry in source.tiles():
        if entry.mask is not None:
            y, x = entry.origin_px or (0, 0)
            assert np.array_equal(source.read_mask(entry), padded(numbers, y, x, 32, 255))


def test_a_scene_without_place_is_tiled_with_labels_by_size_alone(tmp_path: Path) -> None:
    write_pair(tmp_path, crs=None, transform=rasterio.Affine.identity())
    source = made(tmp_path)
    assert all(entry.georeference is None for entry in source.tiles())
    assert rasterio.Affine.identity() != PLACE
